//! What an engine needs of a kind of servers: how to make each request. This trait hides all differences between the
//! servers' protocols. The [machine](crate::fleet) decides when to make which request, the same for all of them.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use collective::SharedSlot;
use engine_core::{Result, Version};
use hyper::Method;
use serde::Serialize;
use serde_json::Value;

use crate::chunk::Tensors;
use crate::fleet::{Ask, Said};
use crate::http::{Client, ServerUrl};
use crate::key::{ApiKey, Keys};
use crate::moonshot::Workers;
use crate::{sglang, vllm};

/// The world that servers' workers join.
#[derive(Clone, Debug)]
pub(crate) struct World {
    /// The id by which the library's members find one another.
    pub(crate) id: Vec<u8>,
    /// The members' number, the trainer counted.
    pub(crate) size: u32,
    /// The member that the server's first worker is.
    pub(crate) first: u32,
    /// The most bytes of a bucket, unless that is one weight.
    pub(crate) bucket_bytes: u64,
    /// Where workers find the id, if it is not told to them.
    pub(crate) meeting: Option<Meeting>,
}

/// Where workers find the id of a world.
#[derive(Clone, Debug)]
pub(crate) struct Meeting {
    /// The name that the world has in torch.
    pub(crate) group: String,
    /// The trainer's address, if it is not the one by which it reaches the server.
    pub(crate) address: Option<String>,
    /// The store's port.
    pub(crate) port: u16,
}

/// How workers get to know a world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Meets {
    /// They do not: they read the trainer's slots where they are, and joining only tells a server so.
    Nowhere,
    /// Each server is told the id; its workers join at once, and all members warm the world up.
    AtOnce,
    /// The id is in a store of torch's kind, and workers look for it at their first broadcast.
    AtFirstBroadcast {
        /// The trainer's address, if it is not the one by which it reaches the server.
        address: Option<String>,
        /// The store's port; 0 is any that is free.
        port: u16,
    },
}

/// A server of some kind, as it is asked.
#[async_trait]
pub(crate) trait Server: fmt::Debug + Send + Sync {
    /// Where it is.
    fn url(&self) -> &ServerUrl;

    /// Asks one question of the machine.
    ///
    /// # Errors
    ///
    /// What the server says, or does not say.
    async fn ask(&self, question: Ask, version: Version) -> Result<Said>;

    /// Has the server's workers join a world; ends when they have, or when they know where to meet.
    ///
    /// # Errors
    ///
    /// As [`ask`](Self::ask).
    async fn join(&self, world: &World) -> Result<()>;

    /// Says where all buckets are, on each GPU that has them, if workers are told it once.
    fn reads(&self, buffer: Vec<SharedSlot>) {
        self.worker().reads(buffer);
    }

    /// What a server of this kind, which is in the world that it joined last, is told of a bucket.
    fn describe(&self, tensors: &Tensors) -> Told;

    /// Has the server's workers receive a bucket and load it; ends when they have.
    ///
    /// # Errors
    ///
    /// As [`ask`](Self::ask).
    async fn update(&self, told: &Told) -> Result<()>;

    /// Ends what an update has left under way there, if a server waits for more without an end.
    async fn call_off(&self) {
        self.worker().call_off().await;
    }

    /// Its workers, as far as they speak the protocol of Moonshot's checkpoint-engine.
    fn worker(&self) -> &Workers;
}

/// What a server is told of a bucket.
#[derive(Debug)]
pub(crate) enum Told {
    Json(Value),
    Pickled(Vec<u8>),
}

/// The kinds of servers that are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServerKind {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
}

/// One thing that was looked at, and what was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// Whether it is as it has to be.
    pub passed: bool,
    /// What was found, in words.
    pub details: String,
}

/// Looks at a server: which kind it is of, and whether it has all that it needs to be sent to. Nothing is changed there.
///
/// Each question may take as long as `limit`. A server that was started with a key is asked with it.
pub async fn examine(
    url: &ServerUrl,
    key: Option<&ApiKey>,
    limit: Duration,
) -> (Option<ServerKind>, Vec<Check>) {
    let check = |name: &str, found: Result<String>| {
        let (passed, details) = match found {
            Ok(details) => (true, details),
            Err(error) => (false, error.to_string()),
        };
        Check { name: name.to_owned(), passed, details }
    };
    let keys = Keys { usual: key.cloned(), admin: None };
    let client =
        |kind| Client { url: url.clone(), short: limit, long: limit, kind, keys: keys.clone() };
    let sglang = client(sglang::KIND);
    // Only SGLang has this route, and only vLLM the other one.
    let info = match sglang.ask(Method::GET, sglang::WEIGHTS, None, limit).await {
        Ok(info) => info,
        Err(error) => return (None, vec![check("reached", Err(error))]),
    };
    // vLLM asks nobody for a key here.
    if let (401 | 403, Err(error)) = (info.status, sglang.done(sglang::WEIGHTS, &info)) {
        return (None, vec![check("key", Err(error))]);
    }
    if info.is_success() && info.json()["weight_version"].is_string() {
        let (version, looked) = sglang::examine(sglang).await;
        return (
            Some(ServerKind::Sglang),
            vec![check("version", version), check("weight transfer", looked)],
        );
    }
    let client = client(vllm::KIND);
    let version = client.get("/version").await.and_then(|answer| {
        let version = answer.json()["version"].as_str().map(|version| format!("vLLM {version}"));
        version.ok_or_else(|| client.odd("/version", &answer))
    });
    let other = || {
        let details = "neither vLLM nor SGLang answers here".into();
        Check { name: "kind".into(), passed: false, details }
    };
    let kind = version.is_ok().then_some(ServerKind::Vllm);
    let checks = match kind {
        Some(_) => {
            vec![check("version", version), check("weight transfer", vllm::examine(client).await)]
        }
        None => vec![check("version", version), other()],
    };
    (kind, checks)
}

//! What an engine needs of a kind of server: how to make each request. This trait hides all differences between the servers' protocols. The
//! [machine](crate::fleet) decides when to make which request, in the same way for all kinds.

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
    /// The number of members, including the trainer.
    pub(crate) size: u32,
    /// The member number of the server's first worker.
    pub(crate) first: u32,
    /// The most bytes of a bucket, unless it is a single weight.
    pub(crate) bucket_bytes: u64,
    /// Where workers find the id, if they do not get it directly.
    pub(crate) meeting: Option<Meeting>,
}

/// Where workers find the id of a world.
#[derive(Clone, Debug)]
pub(crate) struct Meeting {
    /// The name of the world in torch.
    pub(crate) group: String,
    /// The trainer's address, if it is not the one by which it reaches the server.
    pub(crate) address: Option<String>,
    /// The store's port.
    pub(crate) port: u16,
}

/// How workers learn of a world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Meets {
    /// They do not: they read the trainer's slots in place, and joining only tells a server so.
    Nowhere,
    /// Each server gets the id. Its workers join at once, and all members warm the world up.
    AtOnce,
    /// The id is in a store of torch's kind, and workers look for it at their first broadcast.
    AtFirstBroadcast {
        /// The trainer's address, if it is not the one by which it reaches the server.
        address: Option<String>,
        /// The store's port; 0 for any free port.
        port: u16,
    },
}

/// The requests to a server of some kind.
#[async_trait]
pub(crate) trait Server: fmt::Debug + Send + Sync {
    /// Its address.
    fn url(&self) -> &ServerUrl;

    /// Makes one request of the machine.
    ///
    /// # Errors
    ///
    /// The server's own error; `Timeout` or `PeerLost` if it does not answer.
    async fn ask(&self, question: Ask, version: Version) -> Result<Said>;

    /// Makes the server's workers join a world. Returns when they have, or when they know where to meet.
    ///
    /// # Errors
    ///
    /// As [`ask`](Self::ask).
    async fn join(&self, world: &World) -> Result<()>;

    /// Tells where all buckets are, on each GPU that has them, if workers learn it once.
    fn reads(&self, buffer: Vec<SharedSlot>) {
        self.worker().reads(buffer);
    }

    /// Describes a bucket to a server of this kind, which is in the world that it joined last.
    fn describe(&self, tensors: &Tensors) -> Told;

    /// Makes the server's workers receive what it was told, and load it. Returns when they have.
    ///
    /// # Errors
    ///
    /// As [`ask`](Self::ask); `Timeout` if it does not answer within the limit.
    async fn update(&self, told: &Told, limit: Duration) -> Result<()>;

    /// Ends an update that is under way at the server, if the server waits for more without an end.
    async fn call_off(&self) {
        self.worker().call_off().await;
    }

    /// Its workers, if they speak the protocol of Moonshot's checkpoint-engine.
    fn worker(&self) -> &Workers;
}

/// The description of a bucket for a server.
#[derive(Debug)]
pub(crate) enum Told {
    Json(Value),
    Pickled(Vec<u8>),
}

/// A kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServerKind {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// Whether the check passed.
    pub passed: bool,
    /// What was found, in words.
    pub details: String,
}

/// Examines a server: its kind, and whether it has all that a trainer needs to send to it. Nothing is changed there.
///
/// Each request may take as long as `limit`. A server that was started with a key needs `key`.
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
    // vLLM needs no key for this route.
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

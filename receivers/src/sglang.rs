//! SGLang's protocol: its routes, requests and answers.
//!
//! A server has the routes without any option. It must be a single replica: its workers join the world by their tensor-parallel rank alone.
//!
//! `/health` is not used: it generates a token, and reports a paused server as unhealthy.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use collective::SharedSlot;
use engine_core::{Error, ErrorKind, Result, Version};
use futures::FutureExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Transport;
use crate::chunk::Tensors;
use crate::fleet::{Ask, Facts, Said};
use crate::http::{Client, Kind, ServerUrl};
use crate::ignored;
use crate::moonshot::Workers;
use crate::pickle::Pickle;
use crate::server::{Server, Told, World};
use crate::shared::arguments;

/// The longest that a server may take to become idle when its caches are flushed, in seconds.
const FLUSH_SECONDS: u64 = 30;

/// What happens to running requests of a server when an update begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub enum Pause {
    /// They are aborted, and what is cached of the old weights is dropped. SGLang's own default.
    #[default]
    Abort,
    /// They go back into the queue and begin again on the new weights. What is cached of the old ones is dropped.
    Retract,
    /// They are frozen and continue with the new weights, on what is cached of the old ones.
    InPlace,
    /// No request is stopped: the program ensures that nothing is generated during an update.
    None,
}

impl Pause {
    fn name(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Retract => "retract",
            Self::InPlace => "in_place",
            Self::None => "none",
        }
    }
}

/// The route that reports the version of the weights.
pub(crate) const WEIGHTS: &str = "/model_info";

/// The name of these servers, and the remedy for a missing route.
pub(crate) const KIND: Kind =
    Kind { name: "SGLang", no_route: "there is no such route: use SGLang 0.5.23 or later" };

/// The route that makes workers connect to the addresses of their GPUs.
const FROM_IPC: &str = "/update_weights_from_ipc";

fn from_ipc(addresses: Value) -> Value {
    json!({ "zmq_handles": addresses, "flush_cache": false })
}

/// A server of SGLang.
#[derive(Debug)]
pub(crate) struct Sglang {
    client: Client,
    transport: Transport,
    /// The number of GPUs on which buckets are read.
    gpus: u32,
    pause: Pause,
    /// The workers, with `transport: zmq`.
    worker: Workers,
    /// The name in torch of the world that the workers joined last.
    group: Mutex<String>,
}

impl Sglang {
    pub(crate) fn new(client: Client, transport: Transport, gpus: u32, pause: Pause) -> Self {
        let (worker, group) = (Workers::default(), Mutex::default());
        Self { client, transport, gpus, pause, worker, group }
    }

    fn group(&self) -> String {
        self.group.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn begin(&self) -> Result<Said> {
        let path = "/begin_weight_update";
        let answer = self.client.post(path, Some(&json!({})), self.client.long).await?;
        if !answer.is_success() && answer.words().contains("already open") {
            return Ok(Said::Open);
        }
        self.client.done(path, &answer)?;
        Ok(Said::Done)
    }

    async fn tell(&self, path: &str, body: Value) -> Result<()> {
        self.client.tell(path, Some(&body)).await
    }

    async fn connect(&self) -> Result<()> {
        let request =
            |addresses: Value| self.client.clone().hold(FROM_IPC, from_ipc(addresses)).boxed();
        self.worker.begin(self.client.long, self.client.operation(FROM_IPC), request).await
    }

    async fn finish(&self, version: Version) -> Result<()> {
        match self.transport {
            Transport::Zmq => self.worker.finish().await?,
            Transport::Nccl | Transport::Ipc => {
                self.tell("/end_weight_update", json!({})).await?;
            }
        }
        if self.pause != Pause::InPlace {
            let seconds = (self.client.long.as_secs() / 2).min(FLUSH_SECONDS);
            self.tell(&format!("/flush_cache?timeout={seconds}"), json!({})).await?;
        }
        let body = json!({ "new_version": version.to_string(), "abort_all_requests": false });
        self.tell("/update_weight_version", body).await
    }

    /// Checks that the server is there and ready to be sent to. Returns its own version, and its facts.
    async fn look(&self) -> Result<(String, Facts)> {
        // Its scheduler answers this route, so an answer also shows that the engine is alive.
        let path = "/server_info";
        let answer = self.client.get(path).await?;
        let info = answer.json();
        let odd = || self.client.odd(path, &answer);
        let number = |key: &str| info[key].as_u64().and_then(|number| u32::try_from(number).ok());
        let workers = number("tp_size").filter(|workers| *workers > 0).ok_or_else(odd)?;
        let version = info["version"].as_str().ok_or_else(odd)?.to_owned();
        let refuse = |found: String, remedy: &str| {
            let message = format!("it was started with {found}: {remedy}");
            Err(Error::new(ErrorKind::Config, format!("{}{path}", self.client.url), message))
        };
        for (key, option) in [("dp_size", "--dp-size"), ("pp_size", "--pp-size")] {
            match number(key) {
                None | Some(1) => {}
                Some(size) => {
                    let remedy = "SGLang gives the weights of a broadcast to one replica without pipeline \
                                  parallelism; start a server for each";
                    return refuse(format!("{option} {size}"), remedy);
                }
            }
        }
        match info["weight_cache_mode"].as_str() {
            None | Some("off") => {}
            Some(mode) => {
                let remedy = "it refuses new weights then; start it with off";
                return refuse(format!("--weight-cache-mode {mode}"), remedy);
            }
        }
        self.transport.reaches(&self.client, workers, self.gpus)?;
        self.worker.are(workers);
        let weights = self.client.weights(WEIGHTS).await?;
        let checkpoint = info["model_path"].as_str().unwrap_or_default();
        let ignored = ignored::read(checkpoint, self.client.short).await;
        Ok((version, Facts { workers, weights, ignored }))
    }
}

#[async_trait]
impl Server for Sglang {
    fn url(&self) -> &ServerUrl {
        &self.client.url
    }

    async fn ask(&self, question: Ask, version: Version) -> Result<Said> {
        match question {
            Ask::Look => return Ok(Said::Facts(self.look().await?.1)),
            Ask::Recall => return self.client.weights(WEIGHTS).await.map(Said::Version),
            Ask::Pause => {
                self.tell("/pause_generation", json!({ "mode": self.pause.name() })).await?;
            }
            Ask::Reset if self.transport == Transport::Zmq => self.worker.call_off().await,
            Ask::Reset => {
                // A session may be open or not. Ending it also activates what it loaded.
                self.begin().await?;
                self.tell("/end_weight_update", json!({})).await?;
            }
            Ask::Leave if self.transport != Transport::Nccl => {}
            Ask::Leave => {
                let path = "/destroy_weights_update_group";
                let body = json!({ "group_name": self.group() });
                let answer = self.client.post(path, Some(&body), self.client.long).await?;
                if !answer.words().contains("does not exist") {
                    self.client.done(path, &answer)?;
                }
            }
            Ask::Start if self.transport == Transport::Zmq => self.connect().await?,
            Ask::Start => return self.begin().await,
            Ask::Finish => self.finish(version).await?,
            Ask::Resume => self.tell("/continue_generation", json!({})).await?,
        }
        Ok(Said::Done)
    }

    async fn join(&self, world: &World) -> Result<()> {
        match self.transport {
            Transport::Nccl => {}
            Transport::Ipc => return Ok(()),
            Transport::Zmq => {
                let remedy = "install it where the server runs: pip install checkpoint-engine";
                let body = from_ipc(json!({}));
                let lacks = &["checkpoint-engine is not installed"];
                return self.worker.look(&self.client, FROM_IPC, &body, lacks, remedy).await;
            }
        }
        let Some(meeting) = &world.meeting else {
            let message = "it takes a world whose members meet at a store";
            return Err(Error::new(ErrorKind::State, "forming a world", message));
        };
        let address = match &meeting.address {
            Some(address) => address.clone(),
            None => self.client.own_address().await?.to_string(),
        };
        meeting.group.clone_into(&mut self.group.lock().unwrap_or_else(PoisonError::into_inner));
        let body = json!({
            "master_address": address,
            "master_port": meeting.port,
            "rank_offset": world.first,
            "world_size": world.size,
            "group_name": meeting.group,
            "backend": "nccl",
        });
        self.tell("/init_weights_update_group", body).await
    }

    fn worker(&self) -> &Workers {
        &self.worker
    }

    fn describe(&self, tensors: &Tensors) -> Told {
        if self.transport == Transport::Zmq {
            return Told::Pickled(self.worker.describe(tensors));
        }
        if !tensors.shared.is_empty() {
            // Indexed by tensor-parallel rank. Buckets beyond a server's last worker are unused.
            let bucket = |slot| STANDARD.encode(bucket(tensors, slot).to_bytes());
            let buckets: Vec<String> = tensors.shared.iter().map(bucket).collect();
            return Told::Json(json!({
                "serialized_named_tensors": buckets,
                "load_format": "flattened_bucket",
                "flush_cache": false,
            }));
        }
        Told::Json(json!({
            "names": tensors.names,
            "dtypes": tensors.types,
            "shapes": tensors.shapes,
            "group_name": self.group(),
            "load_format": "flattened_bucket",
            "flush_cache": false,
        }))
    }

    async fn update(&self, told: &Told, limit: Duration) -> Result<()> {
        let body = match told {
            Told::Json(body) => body,
            Told::Pickled(bucket) => return self.worker.update(bucket).await,
        };
        let path = match self.transport {
            Transport::Nccl => "/update_weights_from_distributed",
            Transport::Ipc | Transport::Zmq => "/update_weights_from_tensor",
        };
        let answer = self.client.post(path, Some(body), limit).await?;
        self.client.done(path, &answer)
    }
}

/// Describes a bucket in place, as SGLang's workers rebuild it: its bytes, and what lies where in them. The workers see all GPUs of the
/// host, and find the right one by its UUID.
///
/// A worker has read it when it answers: when it drops the rebuilt tensor, torch waits for what reads it.
fn bucket(tensors: &Tensors, slot: &SharedSlot) -> Pickle {
    let rebuild = Pickle::Global("torch.multiprocessing.reductions", "rebuild_cuda_tensor");
    let device = Pickle::text(&slot.device);
    let metas = tensors.parts().into_iter().enumerate().map(|(index, Range { start, end })| {
        let shape = tensors.shapes[index].iter().map(|side| Pickle::size(*side)).collect();
        Pickle::Call(
            Box::new(Pickle::Global(
                "sglang.srt.weight_sync.tensor_bucket",
                "FlattenedTensorMetadata",
            )),
            vec![
                Pickle::text(&*tensors.names[index]),
                Pickle::Tuple(shape),
                Pickle::Global("torch", tensors.types[index]),
                Pickle::size(start),
                Pickle::size(end),
                Pickle::size(end - start),
            ],
        )
    });
    let metas = metas.collect();
    Pickle::Dict(vec![
        (
            Pickle::text("flattened_tensor"),
            Pickle::Call(Box::new(rebuild), arguments(slot, device)),
        ),
        (Pickle::text("metadata"), Pickle::List(metas)),
    ])
}

/// Examines an SGLang server without changing anything there. Returns its version, and a description.
pub(crate) async fn examine(client: Client) -> (Result<String>, Result<String>) {
    match Sglang::new(client, Transport::Nccl, 1, Pause::None).look().await {
        Ok((version, Facts { workers, weights, .. })) => {
            let words = format!("{workers} workers take weights; they have version `{weights}`");
            (Ok(format!("SGLang {version}")), Ok(words))
        }
        Err(error) => (Ok("SGLang".into()), Err(error)),
    }
}

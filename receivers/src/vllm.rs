//! vLLM's protocol: its routes, requests and answers.
//!
//! A server has the routes with `VLLM_SERVER_DEV_MODE=1`. `--weight-transfer-config` decides what they do.

use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use collective::SharedSlot;
use engine_core::{Error, ErrorKind, Result, Version};
use futures::FutureExt;
use hyper::Method;
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
use crate::shared::{ANY_DEVICE, arguments};

/// What happens to running requests of a server when an update begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub enum Pause {
    /// They are aborted, and what is cached of the old weights is dropped. vLLM's own default.
    #[default]
    Abort,
    /// The update waits for them, up to the deadline.
    Wait,
    /// They are frozen and continue with the new weights, on what is cached of the old ones.
    Keep,
    /// No request is stopped: the program ensures that nothing is generated during an update.
    None,
}

impl Pause {
    fn name(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Wait => "wait",
            Self::Keep => "keep",
            Self::None => "none",
        }
    }
}

/// How many calls of `update_weights` an update is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub enum Calls {
    /// One for each bucket. Whatever fails, no worker is left waiting for a bucket that does not come.
    #[default]
    Bucket,
    /// One for all buckets, if the last update succeeded. The stream has to bring the same weights in the same order. It is faster, because
    /// the servers hear of the weights only once. If a server fails within the call, workers of other servers may wait for it without an
    /// end, as they do if the trainer's process dies.
    Update,
}

/// A server of vLLM.
#[derive(Debug)]
pub(crate) struct Vllm {
    pub(crate) client: Client,
    pub(crate) transport: Transport,
    /// The number of GPUs on which buckets are read.
    pub(crate) gpus: u32,
    pub(crate) pause: Pause,
    /// Whether each weight is broadcast by itself.
    pub(crate) unpacked: bool,
    /// Whether only changed elements are sent, with their positions.
    pub(crate) delta: bool,
    /// The workers, with `transport: zmq`.
    pub(crate) worker: Workers,
}

/// The route that reports the version of the weights.
const WEIGHTS: &str = "/weight_info";

/// The name of these servers, and the remedy for a missing route.
pub(crate) const KIND: Kind = Kind {
    name: "vLLM",
    no_route: "there is no such route: set VLLM_SERVER_DEV_MODE=1 where the server is started, and use vLLM 0.33 or \
               later",
};

#[async_trait]
impl Server for Vllm {
    fn url(&self) -> &ServerUrl {
        &self.client.url
    }

    async fn ask(&self, question: Ask, version: Version) -> Result<Said> {
        let tell =
            async |path: &str, body: Option<Value>| self.client.tell(path, body.as_ref()).await;
        match question {
            Ask::Look if self.transport == Transport::Zmq => {
                let facts = self.facts().await?;
                self.transport.reaches(&self.client, facts.workers, self.gpus)?;
                self.worker.are(facts.workers);
                return Ok(Said::Facts(facts));
            }
            Ask::Look => {
                let (takes, facts) = self.look().await?;
                self.transport.reaches(&self.client, facts.workers, self.gpus)?;
                if takes != self.wants() {
                    let message = format!(
                        "it was started for {}: {}, or configure `{}`",
                        takes.backend(),
                        config(self.wants()),
                        takes.option()
                    );
                    return Err(Error::new(
                        ErrorKind::Config,
                        self.client.url.to_string(),
                        message,
                    ));
                }
                return Ok(Said::Facts(facts));
            }
            Ask::Recall => return self.client.weights(WEIGHTS).await.map(Said::Version),
            Ask::Pause => tell(&format!("/pause?mode={}", self.pause.name()), None).await?,
            Ask::Reset if self.transport == Transport::Zmq => self.worker.call_off().await,
            Ask::Reset => {
                // An update may be open or not. Ending an open one makes the server forget what it counted.
                self.start().await?;
                tell("/finish_weight_update", None).await?;
            }
            Ask::Leave if self.transport == Transport::Zmq => {}
            Ask::Leave => tell("/shutdown_weight_transfer_engine", None).await?,
            Ask::Start if self.transport == Transport::Zmq => self.begin().await?,
            Ask::Start => return self.start().await,
            Ask::Finish if self.transport == Transport::Zmq => {
                self.worker.finish().await?;
                let body = json!({ "new_version": version.to_string() });
                tell("/update_weight_version", Some(body)).await?;
            }
            Ask::Finish => {
                let body = json!({ "weight_version": version.to_string() });
                tell("/finish_weight_update", Some(body)).await?;
            }
            Ask::Resume => tell("/resume", None).await?,
        }
        Ok(Said::Done)
    }

    async fn join(&self, world: &World) -> Result<()> {
        let info = match self.transport {
            Transport::Nccl => init_info(&STANDARD.encode(&world.id), world, self.unpacked),
            Transport::Ipc => ipc_info(),
            Transport::Zmq => {
                let remedy = "start it with --worker-extension-cls \
                              checkpoint_engine.worker.VllmColocateWorkerExtension";
                let lacks = &["not implemented", "has no attribute"];
                let body = from_ipc(json!({}));
                return self.worker.look(&self.client, RPC, &body, lacks, remedy).await;
            }
        };
        let body = json!({ "init_info": info });
        self.client.tell("/init_weight_transfer_engine", Some(&body)).await
    }

    fn worker(&self) -> &Workers {
        &self.worker
    }

    fn describe(&self, tensors: &Tensors) -> Told {
        if self.transport == Transport::Zmq {
            return Told::Pickled(self.worker.describe(tensors));
        }
        let Tensors { names, types, shapes, sizes, patches, shared } = tensors;
        let mut info = json!({ "names": names, "dtype_names": types, "shapes": shapes });
        if let Some(counts) = patches {
            info["num_updates_list"] = json!(counts);
        }
        if !shared.is_empty() {
            // Each worker looks for the slot on its GPU.
            let place = |slot: &SharedSlot| {
                (Pickle::text(&slot.device), Pickle::Tuple(arguments(slot, ANY_DEVICE)))
            };
            let places = Pickle::Dict(shared.iter().map(place).collect());
            info["ipc_handles_pickled"] = STANDARD.encode(places.to_bytes()).into();
            info["tensor_sizes"] = json!(sizes);
        }
        Told::Json(json!({ "update_info": info }))
    }

    async fn update(&self, told: &Told, limit: Duration) -> Result<()> {
        let body = match told {
            Told::Json(body) => body,
            Told::Pickled(bucket) => return self.worker.update(bucket).await,
        };
        let path = "/update_weights";
        let answer = self.client.post(path, Some(body), limit).await?;
        if !answer.is_success() && answer.words().contains("VLLM_ALLOW_INSECURE_SERIALIZATION") {
            let remedy = "set VLLM_ALLOW_INSECURE_SERIALIZATION=1 where the server is started";
            return Err(self.client.refusal(path, &answer, remedy));
        }
        if !answer.is_success() && answer.words().contains("IPC handle not found") {
            let remedy = "list the GPU of each of its workers in `devices`";
            return Err(self.client.refusal(path, &answer, remedy));
        }
        self.client.done(path, &answer)
    }
}

/// The route that calls a method of a server's workers by name.
const RPC: &str = "/collective_rpc";

/// The request that makes workers connect to the addresses of their GPUs.
fn from_ipc(addresses: Value) -> Value {
    json!({ "method": "update_weights_from_ipc", "args": [addresses] })
}

impl Vllm {
    async fn begin(&self) -> Result<()> {
        let request = |addresses: Value| self.client.clone().hold(RPC, from_ipc(addresses)).boxed();
        self.worker.begin(self.client.long, self.client.operation(RPC), request).await
    }

    async fn start(&self) -> Result<Said> {
        let path = "/start_weight_update";
        let answer = self.client.post(path, None, self.client.long).await?;
        if !answer.is_success() && answer.words().contains("already active") {
            return Ok(Said::Open);
        }
        self.client.done(path, &answer)?;
        Ok(Said::Done)
    }

    /// Checks that the server is there and ready to be sent to. Returns what it was started for, and its facts.
    async fn look(&self) -> Result<(Takes, Facts)> {
        let facts = self.facts().await?;
        Ok((self.configured().await?, facts))
    }

    async fn facts(&self) -> Result<Facts> {
        let health = self.client.ask(Method::GET, "/health", None, self.client.short).await?;
        if !health.is_success() {
            let remedy = "its engine is dead: start it anew";
            return Err(self.client.refusal("/health", &health, remedy));
        }
        let path = "/get_world_size";
        let size = self.client.get(path).await?;
        let workers = size.json()["world_size"].as_u64().and_then(|size| u32::try_from(size).ok());
        let workers = workers.filter(|workers| *workers > 0);
        let workers = workers.ok_or_else(|| self.client.odd(path, &size))?;
        let weights = self.client.weights(WEIGHTS).await?;
        // Optional: a server that needs a key here, or has another route, does not tell its checkpoint.
        let models = self.client.ask(Method::GET, "/v1/models", None, self.client.short).await?;
        let models = models.json();
        let checkpoint = models["data"][0]["root"].as_str().unwrap_or_default();
        Ok(Facts { workers, weights, ignored: ignored::read(checkpoint, self.client.short).await })
    }

    /// What the server has to be started for.
    fn wants(&self) -> Takes {
        match self.transport {
            Transport::Nccl if self.delta => Takes::Changes,
            Transport::Nccl => Takes::Weights,
            Transport::Ipc | Transport::Zmq => Takes::Buckets,
        }
    }

    /// What the server was started for. It says so in the error for a request to join a world with an unknown parameter. No other request
    /// tells it without side effects.
    async fn configured(&self) -> Result<Takes> {
        let path = "/init_weight_transfer_engine";
        let world = World { id: Vec::new(), size: 2, first: 1, bucket_bytes: 1, meeting: None };
        let mut info = init_info("", &world, false);
        // The last parameter: the server names the first one that it does not know.
        info["your_kind"] = true.into();
        let body = json!({ "init_info": info });
        let answer = self.client.post(path, Some(&body), self.client.short).await?;
        let words = answer.words();
        if answer.is_success() {
            return Err(self.client.odd(path, &answer));
        }
        let is = |kind: &str| words.contains(&format!("Invalid init_info for {kind}:"));
        if is("IPCWeightTransferEngine") {
            return Ok(Takes::Buckets);
        }
        if words.contains("'your_kind'") && is("NCCLWeightTransferEngine") {
            return Ok(Takes::Weights);
        }
        if words.contains("'your_kind'") && is("SparseNCCLWeightTransferEngine") {
            return Ok(Takes::Changes);
        }
        let wanted = config(self.wants());
        let remedy = if words.contains("not configured") {
            wanted
        } else if words.contains("unexpected keyword argument 'nccl_unique_id_b64'") {
            format!(
                "its --weight-transfer-config has another backend, or it is older than 0.33: {wanted}"
            )
        } else if words.contains("unexpected keyword") || words.contains("missing") {
            format!("its --weight-transfer-config has another backend: {wanted}")
        } else {
            return self.client.done(path, &answer).and(Err(self.client.odd(path, &answer)));
        };
        Err(self.client.refusal(path, &answer, &remedy))
    }
}

/// What a server accepts, by how it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    /// Whole weights over NCCL.
    Weights,
    /// Positions and values over NCCL, and nothing else.
    Changes,
    /// Whole weights in place.
    Buckets,
}

impl Takes {
    /// The backend of `--weight-transfer-config`.
    fn backend(self) -> &'static str {
        match self {
            Self::Weights => "nccl",
            Self::Changes => "sparse_nccl",
            Self::Buckets => "ipc",
        }
    }

    /// The option of the trainer that goes with it.
    fn option(self) -> &'static str {
        match self {
            Self::Weights => "transport: nccl",
            Self::Changes => "delta: true",
            Self::Buckets => "transport: ipc",
        }
    }
}

/// The remedy: what a server's `--weight-transfer-config` has to be.
fn config(takes: Takes) -> String {
    format!("start it with --weight-transfer-config '{{\"backend\": \"{}\"}}'", takes.backend())
}

/// The parameters with which workers join the trainer's world. Unless they take each weight by a broadcast of its own, they take a call for
/// one bucket by one broadcast, because such a bucket never exceeds the buffer size, or is a single weight.
fn init_info(id: &str, world: &World, unpacked: bool) -> Value {
    json!({
        "nccl_unique_id_b64": id,
        "rank_offset": world.first,
        "world_size": world.size,
        "packed": !unpacked,
        "packed_buffer_size_bytes": world.bucket_bytes,
        "packed_num_buffers": 1,
    })
}

/// The parameters for servers that read buckets in place.
fn ipc_info() -> Value {
    json!({ "packed": true })
}

/// Examines a vLLM server without changing anything there. Returns a description.
///
/// # Errors
///
/// What it lacks for a trainer to send to it.
pub(crate) async fn examine(client: Client) -> Result<String> {
    let (transport, pause) = (Transport::Nccl, Pause::None);
    let worker = Workers::default();
    let server = Vllm { client, transport, gpus: 1, pause, unpacked: false, delta: false, worker };
    let (takes, Facts { workers, weights, .. }) = server.look().await?;
    let backend = takes.backend();
    Ok(format!("{workers} workers take weights by {backend}; they have version `{weights}`"))
}

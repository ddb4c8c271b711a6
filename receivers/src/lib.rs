//! Backends that only send: to unmodified inference servers, by the servers' own protocols.
//!
//! The trainer runs this engine, the receivers do not. Receivers have no deadlines and no digests. A failed update leaves them half loaded
//! while they report that they are healthy, and a receiver that waits in a collective waits for ever. So the trainer has to end every wait,
//! and to report what happened.
//!
//! # Over NCCL
//!
//! The backends `vllm` and `sglang` drive the servers' HTTP routes for weight transfer, and broadcast over NCCL. The trainer and
//! all workers of all servers are one world, of which the trainer is member 0.
//!
//! - **The stream becomes buckets** (`chunk.rs`): whole weights, one behind the other. A bucket is one request to each server, with the
//!   names, types and shapes of its weights, and one broadcast. So the stream need not be known in advance. Nothing is outstanding in NCCL
//!   while the trainer waits for its next weight, so a trainer whose stream fails leaves no server hanging.
//! - **One call may be the whole update** (`whole.rs`), which is faster and loses this property. The weights are then those of the last
//!   update. The act that makes the call owes the workers every bucket that it has announced. If the stream fails, or the update is
//!   dropped, it sends them whatever a slot has, and the update is never confirmed.
//! - **Weights are packed into slots** by `backend-nccl`: one launch packs and quantises weights that are on the device, the CPU all
//!   others. One of two slots is filled while the other travels.
//! - **Calls that can hang** run on the thread of [`collective`], which gives a world up when a deadline passes: joining, warming up, a
//!   broadcast. The servers' part of such a call is an HTTP request with the same deadline. When one side fails, the others get a few
//!   seconds more.
//! - **A state machine without IO decides about each server** (`fleet.rs`). A server that fails is left out and named in
//!   [`SendReport::receivers`], and the update goes on in a world without it. The next update tries it again: its state is queried again,
//!   and it generates only after it has confirmed a version.
//! - **FP8**: the layer in front of the engine quantises the stream. A weight's scales follow its codes.
//! - **A trait hides the differences between vLLM and SGLang** (`server.rs`). vLLM gets the id of the world, and its workers join at once.
//!   SGLang's workers look for the id in a store of torch's kind (`store.rs`), at their first broadcast.
//!
//! # On the trainer's own host
//!
//! With `transport: ipc` there is no world. A server reads a bucket in place, and has read it when it answers. Everything else is the same:
//! one of two slots is filled while the other is read.
//!
//! With `transport: zmq`, which is Moonshot's protocol, a server gets one request for a whole update, and its workers are told of each
//! bucket by ZeroMQ (`moonshot.rs`). They wait for the next message for ever, so an update that fails is called off explicitly.
//!
//! A worker reads only on its own GPU. If a server has several workers, each of their GPUs has the slots: a slot is
//! filled on one GPU and copied to the others before the workers are told.
//!
//! The group of these backends has one rank, the trainer. [`SendReport::receivers`] lists the servers as the ranks 1, 2, … in the order of
//! the configuration. The notes of each contain its address, its workers, and how many `buckets`, `tensors` and `bytes` it said that it
//! loaded.
//!
//! [`SendReport::receivers`]: engine_core::SendReport::receivers
#![forbid(unsafe_code)]

mod chunk;
mod delta;
mod engine;
mod fleet;
#[cfg(fuzzing)]
pub mod fuzzing;
mod http;
mod ignored;
mod key;
mod moonshot;
mod pickle;
mod server;
pub mod sglang;
mod shared;
mod store;
pub mod vllm;
mod whole;
mod zmtp;

use std::path::PathBuf;
use std::sync::Arc;

use collective::Library;
use engine_core::{
    Availability, Backend, DeviceChoice, Devices, EngineContext, Error, ErrorKind, Placement,
    PreparedRollout, PreparedTrainer, Result, Role, WorkerMetadata,
};
use serde::{Deserialize, Serialize};

use crate::engine::{Receivers, limits, prepare};
use crate::http::Client;
use crate::key::Keys;
use crate::moonshot::Workers;
use crate::server::{Meets, Server};
use crate::sglang::Sglang;
use crate::vllm::Vllm;

pub use http::ServerUrl;
pub use key::ApiKey;
pub use server::{Check, ServerKind, examine};

/// The backend that sends to vLLM, to be registered.
pub static VLLM: &dyn Backend = &Sends {
    name: "vllm",
    summary: "vLLM's servers as they are, by broadcast over NCCL",
    kind: ServerKind::Vllm,
};

/// The backend that sends to SGLang, to be registered.
pub static SGLANG: &dyn Backend = &Sends {
    name: "sglang",
    summary: "SGLang's servers as they are, by broadcast over NCCL",
    kind: ServerKind::Sglang,
};

/// Options of the backend `vllm`: `engine_kwargs.vllm` of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VllmOptions {
    /// The servers: `http://HOST:PORT` each.
    pub servers: Vec<ServerUrl>,
    /// How the weights get to the servers.
    pub transport: Transport,
    /// The GPUs of the servers' workers, in the order of the workers of a server, where workers read buckets: the trainer's own unless set.
    /// A bucket is copied to each of them. Not with NCCL.
    pub devices: Vec<DeviceChoice>,
    /// What happens to running requests of a server when an update begins.
    pub pause: vllm::Pause,
    /// Whether each weight is broadcast by itself instead of each bucket. The servers receive it into memory of its own. Over NCCL.
    pub unpacked: bool,
    /// How many calls of `update_weights` an update is. Over NCCL.
    pub calls: vllm::Calls,
    /// Whether only changed elements are sent, with their positions, instead of all weights. For servers whose `--weight-transfer-config`
    /// has the backend `sparse_nccl`, and models without quantisation. The trainer keeps a copy of what it sent in host memory.
    pub delta: bool,
    /// The file with the key that the servers, or a proxy in front of them, ask for.
    pub api_key_file: Option<PathBuf>,
    /// The file `libnccl.so.2`. If not set, it is searched for.
    pub library: Option<PathBuf>,
}

/// Options of the backend `sglang`: `engine_kwargs.sglang` of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SglangOptions {
    /// The servers: `http://HOST:PORT` each.
    pub servers: Vec<ServerUrl>,
    /// How the weights get to the servers.
    pub transport: Transport,
    /// The GPUs of the servers' workers, in the order of the workers of a server, where workers read buckets: the trainer's own unless set.
    /// A bucket is copied to each of them. Not with NCCL.
    pub devices: Vec<DeviceChoice>,
    /// What happens to running requests of a server when an update begins.
    pub pause: sglang::Pause,
    /// The trainer's address, at which the servers' workers meet it. If not set, the address by which the trainer reaches each server.
    pub master_address: Option<String>,
    /// The port there; 0 for any free port.
    pub master_port: u16,
    /// The file with the key that the servers ask for (`--api-key`).
    pub api_key_file: Option<PathBuf>,
    /// The file with the key for administrative requests, if they need another one (`--admin-api-key`).
    pub admin_api_key_file: Option<PathBuf>,
    /// The file `libnccl.so.2`. If not set, it is searched for.
    pub library: Option<PathBuf>,
}

/// How weights get to servers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Transport {
    /// By broadcast over NCCL, to GPUs of any hosts other than the trainer's own.
    #[default]
    Nccl,
    /// By CUDA IPC: a server's workers are on the trainer's host, and each reads buckets on its own GPU.
    Ipc,
    /// By CUDA IPC as well, with the protocol of Moonshot's checkpoint-engine: workers learn by ZeroMQ where buckets are.
    Zmq,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nccl => "nccl",
            Self::Ipc => "ipc",
            Self::Zmq => "zmq",
        })
    }
}

impl Transport {
    /// Checks that it reaches all workers of a server, with buckets on this number of GPUs.
    ///
    /// # Errors
    ///
    /// `Config` if it does not.
    fn reaches(self, client: &Client, workers: u32, gpus: u32) -> Result<()> {
        if self == Self::Nccl || workers <= gpus {
            return Ok(());
        }
        let message = format!(
            "{workers} workers, and buckets on {gpus} GPUs: with `transport: {self}` each worker reads them on its own, so list \
             the GPUs of all of them in `devices`"
        );
        Err(Error::new(ErrorKind::Config, client.url.to_string(), message))
    }

    /// The number of GPUs on which servers read buckets.
    ///
    /// # Errors
    ///
    /// `Config` if GPUs are listed and servers do not read buckets in place.
    fn gpus(self, devices: &[DeviceChoice]) -> Result<u32> {
        if self == Self::Nccl && !devices.is_empty() {
            let message = "`devices` is for `transport: ipc` and `zmq`: over NCCL nobody reads buckets where they are";
            return Err(Error::new(ErrorKind::Config, "preparing", message));
        }
        Ok(u32::try_from(devices.len()).unwrap_or(u32::MAX).max(1))
    }

    fn meets(self, over_nccl: Meets) -> Meets {
        match self {
            Self::Nccl => over_nccl,
            Self::Ipc | Self::Zmq => Meets::Nowhere,
        }
    }
}

/// Prepares a trainer that sends to vLLM's servers over a library of collectives.
///
/// The backend `vllm` uses NCCL. Tests use another library.
///
/// # Errors
///
/// `Config` for options that cannot be used; `State` outside of a tokio runtime; those of [`Library::open`].
pub async fn prepare_vllm<L: Library>(
    library: L,
    context: EngineContext,
) -> Result<PreparedTrainer> {
    let backend = VLLM.name();
    let options: VllmOptions = context.config.kwargs(backend)?;
    let VllmOptions { servers, transport, devices, pause, unpacked, calls, .. } = options;
    let VllmOptions { delta, api_key_file, .. } = options;
    let gpus = transport.gpus(&devices)?;
    let keys = Keys::read(api_key_file, None)?;
    let refuse = |message| Err(Error::new(ErrorKind::Config, "preparing", message));
    if unpacked && transport != Transport::Nccl {
        return refuse("`unpacked` is for `transport: nccl`: nothing is broadcast with another");
    }
    if delta && (unpacked || transport != Transport::Nccl) {
        return refuse(
            "`delta` is for `transport: nccl` without `unpacked`: vLLM takes changes by broadcast alone",
        );
    }
    let whole = calls == vllm::Calls::Update;
    if whole && (unpacked || delta || transport != Transport::Nccl) {
        return refuse(
            "`calls: update` is for `transport: nccl`, without `unpacked` and `delta`: else a call has one bucket",
        );
    }
    if whole && pause == vllm::Pause::None {
        return refuse(
            "`calls: update` takes a `pause`: an update that fails leaves bytes of other weights in the model, and nothing \
             may be generated with them",
        );
    }
    let (short, long) = limits(&context);
    let server = |url| -> Arc<dyn Server> {
        let client = Client { url, short, long, kind: vllm::KIND, keys: keys.clone() };
        let worker = Workers::default();
        Arc::new(Vllm { client, transport, gpus, pause, unpacked, delta, worker })
    };
    let receivers = Receivers {
        backend,
        servers: servers.into_iter().map(server).collect(),
        pauses: pause != vllm::Pause::None,
        meets: transport.meets(Meets::AtOnce),
        unpacked,
        whole,
        delta,
        one_buffer: transport == Transport::Zmq,
    };
    prepare(library, context, receivers).await
}

/// Prepares a trainer that sends to SGLang's servers over a library of collectives.
///
/// The backend `sglang` uses NCCL. Tests use another library.
///
/// # Errors
///
/// As [`prepare_vllm`].
pub async fn prepare_sglang<L: Library>(
    library: L,
    context: EngineContext,
) -> Result<PreparedTrainer> {
    let backend = SGLANG.name();
    let options: SglangOptions = context.config.kwargs(backend)?;
    let gpus = options.transport.gpus(&options.devices)?;
    let keys = Keys::read(options.api_key_file, options.admin_api_key_file)?;
    let (short, long) = limits(&context);
    let server = |url| -> Arc<dyn Server> {
        let client = Client { url, short, long, kind: sglang::KIND, keys: keys.clone() };
        Arc::new(Sglang::new(client, options.transport, gpus, options.pause))
    };
    let receivers = Receivers {
        backend,
        servers: options.servers.into_iter().map(server).collect(),
        pauses: options.pause != sglang::Pause::None,
        meets: options.transport.meets(Meets::AtFirstBroadcast {
            address: options.master_address,
            port: options.master_port,
        }),
        unpacked: false,
        whole: false,
        delta: false,
        one_buffer: options.transport == Transport::Zmq,
    };
    prepare(library, context, receivers).await
}

/// A backend that only sends, to one kind of server.
#[derive(Debug)]
struct Sends {
    name: &'static str,
    summary: &'static str,
    kind: ServerKind,
}

#[async_trait::async_trait]
impl Backend for Sends {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn devices(&self) -> Devices {
        backend_nccl::BACKEND.devices()
    }

    fn probe(&self) -> Availability {
        backend_nccl::BACKEND.probe()
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        match self.kind {
            ServerKind::Vllm => {
                let options: VllmOptions = context.config.kwargs(self.name)?;
                match options.transport {
                    Transport::Nccl => {
                        prepare_vllm(backend_nccl::collectives(options.library), context).await
                    }
                    Transport::Ipc | Transport::Zmq => {
                        prepare_vllm(backend_nccl::shared_slots(options.devices), context).await
                    }
                }
            }
            ServerKind::Sglang => {
                let options: SglangOptions = context.config.kwargs(self.name)?;
                match options.transport {
                    Transport::Nccl => {
                        prepare_sglang(backend_nccl::collectives(options.library), context).await
                    }
                    Transport::Ipc | Transport::Zmq => {
                        prepare_sglang(backend_nccl::shared_slots(options.devices), context).await
                    }
                }
            }
        }
    }

    async fn prepare_rollout(&self, _: EngineContext) -> Result<PreparedRollout> {
        let name = self.name;
        let message = format!(
            "{name} only sends: its rollouts are the servers of engine_kwargs.{name}.servers"
        );
        Err(Error::new(ErrorKind::Config, "preparing", message))
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        let name = self.name;
        let [worker] = workers else {
            let message = format!(
                "{} ranks: {name} has one, the trainer that sends; gather the weights of others there",
                workers.len()
            );
            return Err(Error::new(ErrorKind::Mismatch, "building the topology", message));
        };
        if worker.role != Role::Trainer || worker.backend != name {
            let message = format!("{name}'s only rank is a trainer that was prepared for it");
            return Err(
                Error::new(ErrorKind::Mismatch, "building the topology", message).rank(worker.rank)
            );
        }
        Ok(vec![Placement::new(worker.rank, workers)])
    }
}

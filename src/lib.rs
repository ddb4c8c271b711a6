//! Moves a model's weights from a trainer to the inference engines that generate with them, every
//! training step.
//!
//! A trainer makes a [`WeightStream`] of its weights ([`ensure_async_iterator`] takes any iterator or
//! stream) and [sends](TrainerEngine::send_weights) it; every rollout
//! [receives](RolloutEngine::receive_weights) the same weights, verified, or an error. Which
//! transport carries them is a name in the [configuration](CheckpointEngineConfig) and a Cargo
//! feature of this crate:
//!
//! | backend | feature | between |
//! |---|---|---|
//! | `naive` | always there | tasks of one process |
//! | `ipc` | `ipc` (default) | processes of one host |
//! | `nccl` | `nccl` | GPUs of any hosts, by broadcast over NCCL |
//! | `nixl` | `nixl` | processes of any hosts, over NIXL |
//! | `hccl` | `hccl` | Ascend NPUs of any hosts, over HCCL |
//! | `dir` | `dir` | processes of any hosts that share a folder |
//! | `vllm` | `receivers` | a trainer and vLLM's servers as they are, by broadcast over NCCL |
//! | `sglang` | `receivers` | a trainer and SGLang's servers as they are, by broadcast over NCCL |
//!
//! [`registry`] has those that are compiled in. The feature `fp8` (default) adds quantisation to all of them: with
//! `trainer_quantize_fp8` the trainer sends FP8 blocks and their scales.
//!
//! Programs that embed an engine need [`prelude`], and sometimes more of this module. [`backend`] has the rest, for
//! authors of backends, encodings and kinds of memory.

/// What most programs that embed an engine use: `use checkpoint_engine::prelude::*`.
pub mod prelude {
    pub use crate::control::{ControlConfig, Token};
    pub use crate::{
        CachedEngine, CheckpointEngine as _, CheckpointEngineConfig,
        CheckpointEngineWithCache as _, ControlPlane, DType, Error, ErrorKind, Rank, Result, Role,
        RolloutEngine, TensorMap, TrainerEngine, Version, Weight, WeightCache, WeightStream,
        WeightStreamExt as _, ensure_async_iterator, form_group, registry,
    };
}

#[cfg(any(feature = "ipc", feature = "nixl", feature = "nccl", feature = "hccl"))]
mod lending;

/// For authors of backends, of encodings, of layers and of kinds of memory.
pub mod backend {
    pub use engine_core::control::Control;
    pub use engine_core::{
        Availability, Backend, Devices, Encoding, EngineContext, Kernel, Layer, Prepared,
        PreparedRollout, PreparedTrainer, Program, Storage, StridedView, no_copies,
    };
    pub use engine_core::{CacheStore, CacheWriter, DeviceBytes, DeviceMemory, ensure_fresh};
    pub use engine_core::{clock, digest, memory, native, plan, provider, telemetry};
    /// The protocol of updates, over a transport's links.
    pub use protocol;
}

/// Connections between ranks.
pub use control_plane as control;
pub use control_plane::{Channel, ChannelId, ControlPlane, FormGroup, form_group, join_group};
/// Reads configurations from TOML, JSON and YAML: `config::load("engine.yaml")`.
pub use engine_config as config;
pub use engine_core::{
    Arena, ArenaArc, ChangedElements, CheckpointEngine, CheckpointEngineConfig,
    CheckpointEngineWithCache, CopyOut, DType, DeltaReport, DeviceChoice, Element, EngineContext,
    Error, ErrorKind, ErrorReport, Expected, FromIterator, FromStream, Install, IntoWeight,
    IntoWeightStream, NamePattern, Numbers, Outcome, PartReport, Parts, Placement, Prepared,
    PreparedRollout, PreparedTrainer, Rank, ReceiveReport, ReceivedBucket, ReceivedPiece,
    ReceivedWeights, ReceiverReport, Recovery, Registry, Result, Role, RolloutEngine, SendReport,
    StageTimes, TensorBox, TensorCounts, TensorMap, TensorMeta, TrainerEngine, Treatment, Version,
    VersionState, Weight, WeightStream, WeightStreamExt, WorkerMetadata, ensure_async_iterator,
    form_local_group, observe,
};
pub use serving::{
    CacheUpdate, CachedEngine, CachedVersion, CheckpointEngineManager, Holder, LocalRollout,
    Newcomer, PreparedWorker, Replica, RolloutWorker, WeightCache,
};

/// A folder that ranks share, and the versions in it.
#[cfg(feature = "dir")]
pub use backend_dir as dir;
#[cfg(feature = "hccl")]
pub use backend_hccl as hccl;
#[cfg(feature = "ipc")]
pub use backend_ipc as ipc;
pub use backend_naive as naive;
#[cfg(feature = "nccl")]
pub use backend_nccl as nccl;
#[cfg(feature = "nixl")]
pub use backend_nixl as nixl;
/// Tensors of candle as weights, and received weights as tensors of candle.
#[cfg(feature = "candle")]
pub use candle_weights as candle;
/// CUDA memory and the kernels that fill and read buckets.
#[cfg(feature = "cuda")]
pub use device_cuda as cuda;
#[cfg(any(feature = "ipc", feature = "nixl", feature = "nccl", feature = "hccl"))]
pub use lending::{lend, lend_tensors};
/// Updates that trainers write straight into tensors that rollouts lend.
#[cfg(any(feature = "ipc", feature = "nixl", feature = "nccl", feature = "hccl"))]
pub use placed;
/// FP8 block quantisation: rules, codecs, and the combinator on streams.
#[cfg(feature = "fp8")]
pub use quant_fp8 as fp8;
/// Backends that only send: to inference servers as they are.
#[cfg(feature = "receivers")]
pub use receivers;
/// Plans of who sends which part of which weight to whom, where trainers and rollouts have parts of tensors.
pub use reshard;

/// Updates that carry only what changed.
pub use delta;

/// The backends that this crate brings: `naive`, and those of its features.
pub fn registry() -> Registry {
    let registry = Registry::new().with(backend_naive::BACKEND);
    #[cfg(feature = "ipc")]
    let registry = registry.with(backend_ipc::BACKEND);
    #[cfg(feature = "nccl")]
    let registry = registry.with(backend_nccl::BACKEND);
    #[cfg(feature = "nixl")]
    let registry = registry.with(backend_nixl::BACKEND);
    #[cfg(feature = "hccl")]
    let registry = registry.with(backend_hccl::BACKEND);
    #[cfg(feature = "dir")]
    let registry = registry.with(backend_dir::BACKEND);
    #[cfg(feature = "receivers")]
    let registry = registry.with(receivers::VLLM).with(receivers::SGLANG);
    #[cfg(feature = "cuda")]
    let registry = registry.with_memory(device_cuda::MEMORY);
    let registry = registry.with_layer(delta::LAYER);
    #[cfg(feature = "fp8")]
    let registry = registry.with_layer(quant_fp8::LAYER);
    registry
}

//! Moves a model's weights from a trainer to the inference engines that generate with them, every
//! training step.
//!
//! A trainer makes a [`WeightStream`] of its weights ([`ensure_async_iterator`] takes any iterator or
//! stream) and [sends](CheckpointEngine::send_weights) it; every rollout
//! [receives](CheckpointEngine::receive_weights) the same weights, verified, or an error. Which
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
//!
//! [`registry`] knows those that are compiled in. The feature `fp8` (default) brings quantisation to
//! all of them: with `trainer_quantize_fp8` the trainer sends FP8 blocks and their scales.

/// Connections between ranks, and what an engine needs of one.
pub use control_plane as control;
pub use control_plane::{Channel, ChannelId, ControlPlane, form_group};
/// Reads configurations from TOML, JSON and YAML: `config::load("engine.yaml")`.
pub use engine_config as config;
pub use engine_core::*;
/// The protocol of updates, for authors of backends.
pub use protocol;
pub use serving::{Holder, Newcomer};

#[cfg(feature = "hccl")]
pub use backend_hccl as hccl;
#[cfg(feature = "ipc")]
pub use backend_ipc as ipc;
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
/// FP8 block quantisation: rules, codecs, and the combinator on streams.
#[cfg(feature = "fp8")]
pub use quant_fp8 as fp8;

/// The backends that the features of this crate bring.
pub fn registry() -> Registry {
    let registry = Registry::new();
    #[cfg(feature = "ipc")]
    let registry = registry.with(backend_ipc::BACKEND);
    #[cfg(feature = "nccl")]
    let registry = registry.with(backend_nccl::BACKEND);
    #[cfg(feature = "nixl")]
    let registry = registry.with(backend_nixl::BACKEND);
    #[cfg(feature = "hccl")]
    let registry = registry.with(backend_hccl::BACKEND);
    #[cfg(feature = "fp8")]
    let registry = registry.with_layer(quant_fp8::LAYER);
    registry
}

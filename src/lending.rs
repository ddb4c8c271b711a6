//! Rollouts of placed updates, by the name of their transport.

use engine_core::{EngineContext, Error, ErrorKind, Prepared, Result};
use placed::{LentTensor, PlacedRollout, Wanted};

/// Prepares a rollout that lends its tensors, over the transport of its configuration: the `lend` of `ipc`, `nixl`, `nccl` or `hccl`.
///
/// # Errors
///
/// `Config` for a transport without placed updates; those of the transport.
pub fn lend(
    context: EngineContext,
    wanted: impl IntoIterator<Item = Wanted>,
) -> Result<Prepared<PlacedRollout>> {
    match &*context.config.backend {
        #[cfg(feature = "ipc")]
        "ipc" => backend_ipc::lend(context, wanted),
        #[cfg(feature = "nixl")]
        "nixl" => backend_nixl::lend(context, wanted),
        #[cfg(feature = "nccl")]
        "nccl" => backend_nccl::lend(context, wanted),
        #[cfg(feature = "hccl")]
        "hccl" => backend_hccl::lend(context, wanted),
        other => Err(has_none(other)),
    }
}

/// As [`lend`], of tensors that the rollout's program has made: the `lend_tensors` of these transports.
///
/// # Errors
///
/// As [`lend`].
pub fn lend_tensors(
    context: EngineContext,
    tensors: impl IntoIterator<Item = LentTensor>,
) -> Result<Prepared<PlacedRollout>> {
    match &*context.config.backend {
        #[cfg(feature = "ipc")]
        "ipc" => backend_ipc::lend_tensors(context, tensors),
        #[cfg(feature = "nixl")]
        "nixl" => backend_nixl::lend_tensors(context, tensors),
        #[cfg(feature = "nccl")]
        "nccl" => backend_nccl::lend_tensors(context, tensors),
        #[cfg(feature = "hccl")]
        "hccl" => backend_hccl::lend_tensors(context, tensors),
        other => Err(has_none(other)),
    }
}

fn has_none(backend: &str) -> Error {
    let message = format!("{backend} has no placed updates: ipc, nixl, nccl and hccl have");
    Error::new(ErrorKind::Config, "lending tensors", message)
}

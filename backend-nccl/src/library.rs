//! NCCL as a library of the collective engine: its slots on the rank's GPU.

use std::path::PathBuf;

use async_trait::async_trait;
use collective::{Library, MemorySlots, Opened, Shape, Thread};
use engine_core::memory::Pool;
use engine_core::provider::MemoryKind;
use engine_core::{EngineContext, Error, ErrorKind, Result};
use std::sync::Arc;

use crate::comm::Nccl;
use crate::{NAME, sys};

/// The size of each of the two buckets unless one is configured: a bucket's time has to be long beside
/// what it takes to begin one.
pub(crate) const DEFAULT_BUCKET_BYTES: u64 = 512 << 20;

/// NCCL, found at run time.
#[derive(Debug)]
pub(crate) struct NcclLibrary {
    /// The library's file, if it is not to be searched for.
    pub(crate) library: Option<PathBuf>,
}

#[async_trait]
impl Library for NcclLibrary {
    type Communicator = Nccl;

    fn name(&self) -> &'static str {
        NAME
    }

    fn default_bucket_bytes(&self) -> u64 {
        DEFAULT_BUCKET_BYTES
    }

    fn enlarges_slots(&self) -> bool {
        true
    }

    async fn open(&self, context: &EngineContext, shape: Shape, _: &Pool) -> Result<Opened<Nccl>> {
        let kind = memory_of(context)?;
        let api = sys::load(self.library.as_deref())?;
        let slots = MemorySlots::new(kind, &context.config.device, shape)?;
        let own = slots.clone();
        let thread = Thread::start("ckpt-nccl", move || Nccl::new(api, own)).await?;
        let version = format!("NCCL {}", api.found.version());
        Ok(Opened { thread, slots: Arc::new(slots), version, share: None })
    }
}

/// The kind of memory of the configured GPU: the registry's, or device-cuda's without one.
pub(crate) fn memory_of(context: &EngineContext) -> Result<&'static dyn MemoryKind> {
    if context.config.device.is_cpu() {
        let message = "this transport has its buckets on GPUs: set `device` to `cuda`";
        return Err(Error::new(ErrorKind::Config, "preparing", message));
    }
    Ok(context.memory.unwrap_or(device_cuda::MEMORY))
}

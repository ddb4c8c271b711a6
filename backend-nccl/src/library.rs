//! NCCL as a library of the collective engine: its slots on the rank's GPU.

use std::path::PathBuf;

use async_trait::async_trait;
use collective::{Library, Opened, Shape, Thread};
use device_cuda::CudaArena;
use engine_core::memory::Pool;
use engine_core::{EngineContext, Error, ErrorKind, Result};
use std::sync::Arc;

use crate::comm::Nccl;
use crate::slots::CudaSlots;
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

    async fn open(&self, context: &EngineContext, shape: Shape, _: &Pool) -> Result<Opened<Nccl>> {
        let device = &context.config.device;
        if device.is_cpu() {
            let message = "nccl has its buckets on GPUs: set `device` to `cuda`";
            return Err(Error::new(ErrorKind::Config, "preparing", message));
        }
        let api = sys::load(self.library.as_deref())?;
        let arena = CudaArena::new(device, shape.slots, shape.slot_bytes)?;
        let slots = CudaSlots::new(arena, shape);
        let own = slots.clone();
        let thread = Thread::start("ckpt-nccl", move || Nccl::new(api, own)).await?;
        let version = format!("NCCL {}", api.found.version());
        Ok(Opened { thread, slots: Arc::new(slots), version, share: None })
    }
}

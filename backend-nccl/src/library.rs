//! NCCL as a library of the collective engine: its slots on the rank's GPU.

use std::path::PathBuf;

use async_trait::async_trait;
use collective::{Library, Opened, Shape, SlotGuard, Slots, Thread};
use device_cuda::CudaArena;
use engine_core::memory::{Job, Pool};
use engine_core::{EngineContext, Error, ErrorKind, Result, Storage};
use std::sync::Arc;

use crate::comm::Nccl;
use crate::{NAME, sys};

/// The size of each of the two buckets unless one is configured: a bucket's time has to be long beside
/// what it takes to begin one.
const DEFAULT_BUCKET_BYTES: u64 = 512 << 20;

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
        let own = arena.clone();
        let thread = Thread::start("ckpt-nccl", move || Nccl::new(api, own, shape)).await?;
        let version = format!("NCCL {}", api.found.version());
        Ok(Opened { thread, slots: Arc::new(CudaSlots { arena, shape }), version, share: None })
    }
}

/// Slots on a GPU, filled and digested there.
#[derive(Debug)]
struct CudaSlots {
    arena: CudaArena,
    shape: Shape,
}

impl CudaSlots {
    fn start(&self, slot: &SlotGuard) -> usize {
        (u64::from(slot.index()) * self.shape.slot_bytes) as usize
    }
}

#[async_trait]
impl Slots for CudaSlots {
    async fn fill(
        &self,
        slot: SlotGuard,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        let (arena, threads) = (self.arena.clone(), pool.clone());
        let (at, len) = (self.start(&slot), self.shape.slot_bytes as usize);
        pool.start(move || {
            let sum = arena.fill(at, len, &jobs, &threads, digests);
            drop(slot);
            sum
        })
        .await
    }

    fn slower(&self) -> Vec<String> {
        self.arena.slower()
    }

    fn view(&self, slot: SlotGuard, filled: u64) -> Storage {
        self.arena.storage(self.start(&slot), filled as usize).guarded(slot)
    }
}

//! Slots on a GPU that other processes of the host read where they are: no library, and nobody to call.

use async_trait::async_trait;
use bytes::Bytes;
use collective::{Communicator, Library, MemorySlots, Opened, Shape, Thread, Wait};
use engine_core::memory::Pool;
use engine_core::{DeviceChoice, EngineContext, Error, ErrorKind, Result};
use std::sync::Arc;

use crate::library::{DEFAULT_BUCKET_BYTES, memory_of};

/// Slots without a library.
#[derive(Debug)]
pub(crate) struct SharedSlots {
    /// The GPUs on which they are read, if those are others than the one that fills them.
    pub(crate) readers: Vec<DeviceChoice>,
}

#[async_trait]
impl Library for SharedSlots {
    type Communicator = Alone;

    fn name(&self) -> &'static str {
        "cuda ipc"
    }

    fn default_bucket_bytes(&self) -> u64 {
        DEFAULT_BUCKET_BYTES
    }

    async fn open(&self, context: &EngineContext, shape: Shape, _: &Pool) -> Result<Opened<Alone>> {
        let kind = memory_of(context)?;
        let slots = MemorySlots::shared(kind, &context.config.device, &self.readers, shape)?;
        let thread = Thread::start("ckpt-shared", || Ok(Alone)).await?;
        let version = "CUDA IPC".into();
        Ok(Opened { thread, slots: Arc::new(slots), version, share: None })
    }
}

/// A rank that is in no group, and can be in none.
#[derive(Debug)]
pub(crate) struct Alone;

fn refusal<T>() -> Result<T> {
    let message = "slots are read where they are, and there is no group";
    Err(Error::new(ErrorKind::State, "calling a library of collectives", message))
}

impl Communicator for Alone {
    fn new_group(&mut self) -> Result<Bytes> {
        refusal()
    }

    fn join(&mut self, _: usize, _: &[u8], _: u32, _: u32, _: &Wait<'_>) -> Result<()> {
        refusal()
    }

    fn shrink(&mut self, _: usize, _: &[u32], _: &Wait<'_>) -> Result<()> {
        refusal()
    }

    fn broadcast(&mut self, _: usize, _: u32, _: u64, _: &Wait<'_>) -> Result<()> {
        refusal()
    }

    fn ended(&mut self, _: usize) -> Result<u64> {
        refusal()
    }

    fn leave_groups(&mut self, _: &[usize]) {}

    fn leave(&mut self) {}
}

//! Buckets in shared memory as the links of the update protocol.

use std::sync::Arc;

use async_trait::async_trait;
use engine_core::memory::{Job, Pool};
use engine_core::{Error, Rank, Result, Storage};
use protocol::{ReceiveLink, SendLink};

use crate::segment::{MappedSegment, Segment};

/// The trainer's buckets.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) segment: Arc<Segment>,
    /// Why they are here, if they should be on a device.
    pub(crate) slower: Option<String>,
    pub(crate) pool: Pool,
}

#[async_trait]
impl SendLink for Outgoing {
    fn slots(&self) -> usize {
        self.segment.info().slots as usize
    }

    fn bucket_bytes(&self) -> u64 {
        self.segment.info().bucket_bytes
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let mut bucket = self.segment.write(slot).await;
        let pool = self.pool.clone();
        self.pool.start(move || pool.encode(&jobs, bucket.as_mut(), digests)).await
    }

    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        // The rollouts see the same memory.
        Ok(())
    }

    fn slower(&self) -> Vec<String> {
        self.slower.iter().cloned().collect()
    }
}

/// The trainer's buckets as a rollout reads them.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) segment: MappedSegment,
}

#[async_trait]
impl ReceiveLink for Incoming {
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        let bytes = self.segment.read(slot, filled);
        bytes.map(Storage::from).map_err(|error| Error::from(error).rank(Rank::LEADER))
    }
}

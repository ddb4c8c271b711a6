//! Buckets within a process as the links of the update protocol: lists of weights, each in its own memory.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use engine_core::memory::{Job, Pool};
use engine_core::plan::BucketKind;
use engine_core::{Error, ErrorKind, Rank, Result, Storage};
use protocol::hub::{Hub, Member};
use protocol::{Arrival, Fetch, FetchLink, SendLink};

use crate::engine::Registered;
use crate::rank::OwnRank;

/// Rollouts work on one bucket while the trainer encodes the next one.
const SLOTS: usize = 2;

/// The buckets under way. Rollouts take theirs before the trainer replaces a bucket by a later one.
#[derive(Debug, Default)]
pub(crate) struct Buckets(Mutex<[Option<Arc<[Storage]>>; SLOTS]>);

impl Buckets {
    fn lock(&self) -> MutexGuard<'_, [Option<Arc<[Storage]>>; SLOTS]> {
        // Every change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The trainer's end of the link.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) buckets: Arc<Buckets>,
    pub(crate) bucket_bytes: u64,
    pub(crate) pool: Pool,
    pub(crate) hub: Hub,
    pub(crate) _rank: OwnRank,
}

#[async_trait]
impl SendLink for Outgoing {
    fn slots(&self) -> usize {
        SLOTS
    }

    fn bucket_bytes(&self) -> u64 {
        self.bucket_bytes
    }

    fn bucket_kind(&self) -> BucketKind {
        BucketKind::List
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, _: bool) -> Result<u64> {
        // The jobs are whole weights.
        let weights = jobs.into_iter().map(|job| job.weight).collect();
        let handed = self.pool.hand_over(weights).await?;
        if let Some(slot) = self.buckets.lock().get_mut(slot) {
            *slot = Some(handed.into());
        }
        Ok(0)
    }

    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        // Nothing is sent: the rollouts see the same memory.
        Ok(())
    }

    fn end(&mut self, _: bool) {
        // After a failed update, rollouts do not need the buckets that they have not taken.
        *self.buckets.lock() = Default::default();
    }

    async fn close(&mut self, _: Duration) {
        self.hub.leave();
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.hub.lose("the trainer's engine is gone");
    }
}

/// A rollout's end of the link.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// The trainer's buckets, once the trainer has joined the group.
    pub(crate) buckets: Arc<OnceLock<Arc<Buckets>>>,
    pub(crate) member: Member,
    pub(crate) _registered: Registered,
    pub(crate) _rank: OwnRank,
}

#[async_trait]
impl FetchLink for Incoming {
    fn card(&self) -> Bytes {
        Bytes::new()
    }

    fn bucket_kind(&self) -> BucketKind {
        BucketKind::List
    }

    async fn fetch(&mut self, fetch: Fetch, arrival: Arrival) {
        let bucket = self
            .buckets
            .get()
            .and_then(|buckets| buckets.lock().get(fetch.slot as usize).cloned().flatten());
        arrival.tell_list(bucket.ok_or_else(|| {
            // The trainer reports the cause a moment later.
            let words = "its update has ended";
            Error::new(ErrorKind::Io, "taking a bucket", words).rank(Rank::LEADER)
        }));
    }

    fn abandon(&mut self, _: Rank) {}

    async fn close(&mut self) {
        self.member.leave();
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.member.lose("the rollout's engine is gone");
    }
}

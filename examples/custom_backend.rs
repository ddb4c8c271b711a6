//! Somebody else's transport: a crate of its own implements two traits, registers its backend, and
//! passes the conformance suite.
//!
//! This one moves buckets between tasks of one process through memory that both share. What a
//! transport brings is the memory of the buckets and how a filled one gets across; the protocol
//! around it (plan, digests, deadlines, aborts) is the library's.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use checkpoint_engine::backend::memory::{Job, Pool};
use checkpoint_engine::backend::protocol::{ReceiveLink, Receiver, SendLink, Sender};
use checkpoint_engine::backend::{
    Availability, Backend, EngineContext, Prepared, PreparedRollout, PreparedTrainer, Storage,
};
use checkpoint_engine::prelude::*;
use checkpoint_engine::{Placement, Registry, WorkerMetadata};

/// Filled buckets, by trainer and slot.
type Shelf = Mutex<HashMap<(u64, u32), Bytes>>;
static SHELF: LazyLock<Shelf> = LazyLock::new(Shelf::default);

fn shelf() -> std::sync::MutexGuard<'static, HashMap<(u64, u32), Bytes>> {
    SHELF.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The trainer's end.
#[derive(Debug)]
struct Outgoing {
    id: u64,
    bucket_bytes: u64,
    filled: Vec<Vec<u8>>,
    pool: Pool,
}

#[async_trait]
impl SendLink for Outgoing {
    fn slots(&self) -> usize {
        self.filled.len()
    }

    fn bucket_bytes(&self) -> u64 {
        self.bucket_bytes
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let (pool, len) = (self.pool.clone(), self.bucket_bytes as usize);
        let work = move || {
            let mut bucket = vec![0; len];
            let sum = pool.encode(&jobs, &mut bucket, digests)?;
            Ok((sum, bucket))
        };
        let (sum, bucket) = self.pool.start(work).await?;
        self.filled[slot] = bucket;
        Ok(sum)
    }

    async fn publish(&mut self, slot: usize, filled: u64) -> Result<()> {
        let mut bucket = std::mem::take(&mut self.filled[slot]);
        bucket.truncate(filled as usize);
        shelf().insert((self.id, slot as u32), aligned(&bucket));
        Ok(())
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        shelf().retain(|(owner, _), _| *owner != self.id);
    }
}

/// The same bytes where a view of any type may begin.
fn aligned(bytes: &[u8]) -> Bytes {
    let mut memory = vec![0; bytes.len() + 256];
    let start = memory.as_ptr().align_offset(256);
    memory[start..start + bytes.len()].copy_from_slice(bytes);
    Bytes::from(memory).slice(start..start + bytes.len())
}

/// A rollout's end.
#[derive(Debug)]
struct Incoming {
    id: u64,
}

#[async_trait]
impl ReceiveLink for Incoming {
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        let bucket = shelf().get(&(self.id, slot)).cloned();
        let bucket = bucket.filter(|bytes| bytes.len() as u64 == filled);
        bucket.map(Storage::from).ok_or_else(|| {
            Error::new(ErrorKind::Protocol, "fetching a bucket", "there is no such bucket")
        })
    }
}

/// The transport. A value may have a state of its own: a client, say, or credentials.
#[derive(Debug)]
struct ShelfBackend;

/// What the crate would export.
static BACKEND: &dyn Backend = &ShelfBackend;

#[async_trait]
impl Backend for ShelfBackend {
    fn name(&self) -> &'static str {
        "shelf"
    }

    fn summary(&self) -> &'static str {
        "tasks of one process, through buckets on a shelf"
    }

    fn probe(&self) -> Availability {
        Availability::Usable { details: "always".into() }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        let control = context.require_control()?;
        let pool = Pool::new(context.threads(Role::Trainer))?;
        let (rank, details) = (control.rank(), id.into());
        let metadata = WorkerMetadata::of_this_process("shelf", rank, Role::Trainer, details);
        Ok(Prepared::new(metadata, move |place| async move {
            let bucket_bytes = context.config.bucket_bytes().unwrap_or(16 << 20);
            let link = Outgoing { id, bucket_bytes, filled: vec![Vec::new(); 2], pool };
            let engine = Sender::new(link, &context, control, place.rollouts());
            Ok(Box::new(engine) as Box<dyn TrainerEngine>)
        }))
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        let control = context.require_control()?;
        let pool = Pool::new(context.threads(Role::Rollout))?;
        let (rank, details) = (control.rank(), serde_json::Value::Null);
        let metadata = WorkerMetadata::of_this_process("shelf", rank, Role::Rollout, details);
        Ok(Prepared::new(metadata, move |place| async move {
            let id = place.peer(Rank::LEADER)?.details.as_u64().unwrap_or_default();
            let engine = Receiver::new(Incoming { id }, &context, control, pool);
            Ok(Box::new(engine) as Box<dyn RolloutEngine>)
        }))
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        Placement::for_all("shelf", workers)
    }
}

fn main() {
    // A program adds it to the backends that it knows; a configuration then chooses it by name.
    let registry: Registry = checkpoint_engine::registry().with(BACKEND);
    assert!(registry.get("shelf").is_ok());

    let suite = conformance::Suite::new(BACKEND).with_control_plane();
    for case in conformance::CASES {
        eprintln!("{}: {:?}", case.name, suite.run(case));
    }
}

#[cfg(test)]
mod conforms {
    conformance::suite!(conformance::Suite::new(super::BACKEND).with_control_plane());
}

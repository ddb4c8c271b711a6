//! The engine: ranks of one process, which find one another, and their links.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

use engine_core::memory::Pool;
use engine_core::{
    EngineContext, Error, ErrorKind, Placement, Prepared, PreparedRollout, PreparedTrainer, Result,
    Role, RolloutEngine, TrainerEngine, WorkerMetadata,
};
use protocol::hub::{Hub, Member};
use protocol::{Receiver, Sender};
use serde::{Deserialize, Serialize};

use crate::NAME;
use crate::buckets::{Buckets, Incoming, Outgoing};
use crate::rank::OwnRank;

/// The size at which a bucket ends, unless one is configured. Shared memory costs nothing, so this only bounds the memory of encoded
/// weights.
const BUCKET_BYTES: u64 = 16 << 20;

/// The transport has no options of its own.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kwargs {}

/// The data of a rollout for its trainer.
#[derive(Serialize, Deserialize)]
struct Details {
    id: u64,
}

/// A rollout whose trainer has not joined the group.
#[derive(Debug)]
struct Waiting {
    member: Member,
    /// Where the trainer puts its buckets for it.
    buckets: Arc<OnceLock<Arc<Buckets>>>,
}

/// Rollouts that were prepared in this process, until their trainer joins the group.
static WAITING: LazyLock<Mutex<HashMap<u64, Waiting>>> = LazyLock::new(Mutex::default);

fn waiting() -> MutexGuard<'static, HashMap<u64, Waiting>> {
    // Every change is one insertion or removal.
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A rollout in [`WAITING`], until this is dropped.
#[derive(Debug)]
pub(crate) struct Registered(u64);

impl Drop for Registered {
    fn drop(&mut self) {
        waiting().remove(&self.0);
    }
}

pub(crate) fn prepare_trainer(context: EngineContext) -> Result<PreparedTrainer> {
    context.config.kwargs::<Kwargs>(NAME)?;
    let pool = Pool::new(context.threads(Role::Trainer))?;
    let rank = OwnRank::of(&context, Role::Trainer);
    let bucket_bytes = context.config.bucket_bytes().unwrap_or(BUCKET_BYTES);
    let details = serde_json::Value::Null;
    let metadata = WorkerMetadata::of_this_process(NAME, rank.rank, Role::Trainer, details);
    Ok(Prepared::new(metadata, move |place| async move {
        let (hub, buckets) = (Hub::new(), Arc::<Buckets>::default());
        // If an error drops it, the admitted rollouts are told.
        let link = Outgoing {
            buckets: buckets.clone(),
            bucket_bytes,
            pool,
            hub: hub.clone(),
            _rank: rank,
        };
        for peer in place.peers.iter().filter(|peer| peer.rank != place.rank) {
            let named = |error: Error| error.rank(peer.rank);
            let waiting = take(peer).map_err(named)?;
            hub.admit(&waiting.member).map_err(named)?;
            waiting.buckets.get_or_init(|| buckets.clone());
        }
        let engine = Sender::new(link, &context, hub.control(), place.rollouts());
        Ok(Box::new(engine) as Box<dyn TrainerEngine>)
    }))
}

/// Takes the rollout of this metadata out of [`WAITING`], for one trainer.
fn take(peer: &WorkerMetadata) -> Result<Waiting> {
    let operation = "joining the group";
    let details: Details = serde_json::from_value(peer.details.clone()).map_err(|error| {
        let words = "the rollout's metadata is not naive's";
        Error::new(ErrorKind::Protocol, operation, words).with_source(error)
    })?;
    waiting().remove(&details.id).ok_or_else(|| {
        let words = "the rollout is gone, or in another group";
        Error::new(ErrorKind::PeerLost, operation, words)
    })
}

pub(crate) fn prepare_rollout(context: EngineContext) -> Result<PreparedRollout> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    context.config.kwargs::<Kwargs>(NAME)?;
    let pool = Pool::new(context.threads(Role::Rollout))?;
    let rank = OwnRank::of(&context, Role::Rollout);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let member = Member::new(rank.rank, Role::Rollout);
    let buckets = Arc::<OnceLock<_>>::default();
    waiting().insert(id, Waiting { member: member.clone(), buckets: buckets.clone() });
    let details = serde_json::json!(Details { id });
    let metadata = WorkerMetadata::of_this_process(NAME, rank.rank, Role::Rollout, details);
    let control = member.control();
    // When the link is dropped, the rollout leaves the group, or never joins one.
    let link = Incoming { buckets, member, _registered: Registered(id), _rank: rank };
    Ok(Prepared::new(metadata, move |_: Placement| async move {
        let engine = Receiver::new(link, &context, control, pool);
        Ok(Box::new(engine) as Box<dyn RolloutEngine>)
    }))
}

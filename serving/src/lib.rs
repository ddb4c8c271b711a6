//! Rollouts that have the current version at hand: kept up to date, and taken over from one another.

mod cache;
mod handover;
mod manager;
mod replica;

pub use cache::{CacheUpdate, CachedEngine, CachedVersion, WeightCache};
pub use handover::{Holder, Newcomer};
pub use manager::{CheckpointEngineManager, LocalRollout, PreparedWorker, RolloutWorker};
pub use replica::Replica;

//! What a transport contributes: memory that a rollout lends, and how trainers reach it.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use engine_core::{Rank, Result};

/// Memory of a rollout that trainers write to in updates.
///
/// # Contract
///
/// Trainers reach it by the terms of the last [`lend`](Self::lend) alone. [`take_back`](Self::take_back) has succeeded only when
/// every trainer that reached it has let go or its process has ended, and no one can reach it by these terms any more. So
/// between `take_back` and the next `lend` nobody writes, whatever became of trainers.
pub trait Lender: fmt::Debug + Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lends it for one update: what trainers need to reach it.
    ///
    /// # Errors
    ///
    /// Those of the system.
    fn lend(&mut self) -> Result<Bytes>;

    /// Takes it back, if nobody has it any more; whether that is so. Does not block.
    ///
    /// # Errors
    ///
    /// Those of the system.
    fn take_back(&mut self) -> Result<bool>;

    /// Its bytes. The borrow keeps it from being lent.
    ///
    /// # Errors
    ///
    /// `State` while it is lent.
    fn bytes(&self) -> Result<&[u8]>;
}

/// How a trainer reaches the memory of rollouts.
pub trait Reach: fmt::Debug + Send + Sync {
    /// Reaches what a rollout has lent. What is kept from one update to the next (mappings) is kept for those ranks alone that are
    /// reached again.
    ///
    /// # Errors
    ///
    /// `PeerLost` if the rollout has ended or taken it back; `Protocol` for terms that cannot be read.
    fn reach(&self, terms: &[(Rank, Bytes)]) -> Result<Vec<Arc<dyn Reached>>>;
}

/// A rollout's memory at a trainer. It is let go when the last clone is dropped.
pub trait Reached: fmt::Debug + Send + Sync {
    /// Writes bytes.
    ///
    /// # Errors
    ///
    /// `Protocol` if they do not lie within the memory.
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()>;
}

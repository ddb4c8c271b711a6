//! Chooses ranks for engines whose context has none.

use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex, PoisonError};

use engine_core::{EngineContext, Rank, Role};

/// The ranks that were chosen here, as long as their engines exist.
static RANKS: LazyLock<Mutex<BTreeSet<Rank>>> = LazyLock::new(Mutex::default);

/// A naive engine's rank: the one of its context, else one that no other naive engine of the process has
/// chosen. A trainer leads.
#[derive(Debug)]
pub(crate) struct OwnRank {
    pub(crate) rank: Rank,
    is_chosen: bool,
}

impl OwnRank {
    pub(crate) fn of(context: &EngineContext, role: Role) -> Self {
        let given = context.rank().or((role == Role::Trainer).then_some(Rank::LEADER));
        if let Some(rank) = given {
            return Self { rank, is_chosen: false };
        }
        let mut taken = RANKS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rank = Rank(1);
        while !taken.insert(rank) {
            rank.0 += 1;
        }
        Self { rank, is_chosen: true }
    }
}

impl Drop for OwnRank {
    fn drop(&mut self) {
        if self.is_chosen {
            RANKS.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.rank);
        }
    }
}

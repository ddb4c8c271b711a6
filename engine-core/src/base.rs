//! Which version each rollout has. A layer that sends changes instead of weights has to know it.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::{PartSet, Rank};

/// What a rollout says of itself when it enters an update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Base {
    /// It takes whole weights, and understands nothing else.
    #[default]
    Unable,
    /// It takes changes, but has no version that they could be applied to.
    Missing,
    /// It has the version whose contents this number stands for.
    Has(u64),
}

/// What a rollout has said on entering an update.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entrant {
    /// The rollout.
    pub rank: Rank,
    /// The version that it has, as far as it wants it.
    pub base: Base,
    /// The parts that it wants.
    pub wants: PartSet,
}

impl Entrant {
    /// What this rollout has said.
    pub fn new(rank: Rank, base: Base, wants: PartSet) -> Self {
        Self { rank, base, wants }
    }
}

/// Between a layer and the engine behind it: on a rollout, what the rank says of itself; on the trainer that leads, what all
/// rollouts of the present update have said.
///
/// Clones share it. Nothing is kept from one update to the next: what the layer reads was said for this update.
#[derive(Clone, Debug, Default)]
pub struct Bases(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    own: Base,
    is_wanted: bool,
    said: Option<Vec<Entrant>>,
}

impl Bases {
    /// On a rollout: what it says when it enters the next update.
    pub fn say(&self, base: Base) {
        self.lock().own = base;
    }

    /// For engines, on a rollout: what it says.
    pub fn own(&self) -> Base {
        self.lock().own
    }

    /// On a trainer, before it joins: the layer wants to know what rollouts say before its stream is asked for the first weight.
    pub fn want(&self) {
        self.lock().is_wanted = true;
    }

    /// For engines, on a trainer: whether the stream has to wait until all rollouts have entered the update.
    pub fn is_wanted(&self) -> bool {
        self.lock().is_wanted
    }

    /// For engines, on a trainer: what the rollouts of an update have said.
    pub fn hear(&self, said: Vec<Entrant>) {
        self.lock().said = Some(said);
    }

    /// On a trainer: what the rollouts of the update have said, once. `None` if the engine does not ask them.
    pub fn take(&self) -> Option<Vec<Entrant>> {
        self.lock().said.take()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Every change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

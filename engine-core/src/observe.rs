//! Who is told of the progress of updates: a progress bar, a metrics exporter, a test.

use std::fmt;

use crate::report::VersionState;
use crate::{Rank, Version};

/// A step of an update.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Progress {
    /// An update began.
    Began {
        /// Its version.
        version: Version,
        /// The ranks that receive it.
        receivers: Vec<Rank>,
    },
    /// A bucket was sent, or received and verified.
    Bucket {
        /// Its number within the update, from 0.
        index: u64,
        /// Source bytes that it was made of; at a receiver, bytes of its weights.
        bytes: u64,
    },
    /// A version changed its state at a receiver.
    State {
        /// The receiver.
        rank: Rank,
        /// Its new state.
        state: VersionState,
    },
}

/// Told of the progress of updates, from the task that runs them: it must not block.
///
/// The unit type observes nothing.
pub trait Observer: fmt::Debug + Send + Sync {
    /// Called at each step.
    fn observe(&self, progress: &Progress);
}

impl Observer for () {
    fn observe(&self, _: &Progress) {}
}

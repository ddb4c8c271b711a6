//! Where the cache of a rollout keeps its versions.

use std::fmt;

use crate::{Error, ErrorKind, ReceivedPiece, Result, Version, Weight};

/// The memory that a rollout keeps complete versions in.
pub trait CacheStore: fmt::Debug + Send + Sync {
    /// A place for a version that begins to arrive. Dropping it gives the version up.
    ///
    /// An update counts for [`max_staleness`](crate::CheckpointEngineConfig::max_staleness) from here on, whether it
    /// is completed or not; a version taken over from another rollout (`is_update` is false) does not.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no room.
    fn begin(&self, version: Version, is_update: bool) -> Result<Box<dyn CacheWriter>>;
}

/// A version on its way into a [`CacheStore`].
pub trait CacheWriter: Send {
    /// Takes the next part of a weight. The parts of one follow one another, from its beginning.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no room.
    fn write(&mut self, piece: &ReceivedPiece) -> Result<()>;

    /// Takes a whole weight of the version before, which stays as it is in this one.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no room.
    fn keep(&mut self, weight: &Weight) -> Result<()> {
        let bytes = weight.to_bytes()?.into();
        self.write(&ReceivedPiece { meta: weight.meta().clone(), start: 0, bytes })
    }

    /// The version is complete and active everywhere: gives its weights in the order of their
    /// parts, and replaces the version before it wherever the store shows one.
    ///
    /// # Errors
    ///
    /// `Resource` or `Io`; the version before it stays.
    fn commit(self: Box<Self>) -> Result<Vec<Weight>>;
}

/// Whether a cached version may be given: an error if more than `most` updates have begun to arrive
/// since, `newest` the version of the last of them. Versions are names here and no distances: those of
/// two updates in a row may be far apart, and a trainer that goes back to a checkpoint sends lower ones.
///
/// # Errors
///
/// `State`.
pub fn ensure_fresh(
    cached: Version,
    begun_since: u64,
    newest: Version,
    most: Option<u64>,
) -> Result<()> {
    match most {
        Some(most) if begun_since > most => {
            let message = format!(
                "{begun_since} updates have begun since the last complete version, the last of them \
                 version {newest}; `max_staleness` is {most}"
            );
            Err(Error::new(ErrorKind::State, "reading the cache", message).version(cached))
        }
        _ => Ok(()),
    }
}

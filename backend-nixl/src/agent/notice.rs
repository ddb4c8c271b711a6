//! What agents say to one another where the one that has the bytes writes them.

use serde::{Deserialize, Serialize};

/// A message from one agent to another.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Notice {
    /// "Write the first bytes of your slot to there." No bytes: "are you there?"
    Ask(Ask),
    /// The bytes are there. Nothing is written any more.
    Done { id: u64 },
    /// They are not. If the write had begun, some of them may still arrive.
    Refused { id: u64, begun: bool, words: String },
}

/// What an agent wants written to its memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) id: u64,
    pub(crate) slot: u32,
    /// Address and length.
    pub(crate) target: (u64, u64),
    pub(crate) device: Option<u32>,
    /// How to reach the one who asks.
    pub(crate) metadata: Vec<u8>,
    /// Counts how often that one has learnt to reach the one it asks: another number says that all
    /// connections from before are closed.
    pub(crate) era: u64,
    /// When it is too late.
    pub(crate) millis: u64,
}

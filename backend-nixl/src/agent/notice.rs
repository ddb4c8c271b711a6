//! Messages between agents for writes by the agent that has the bytes.

use serde::{Deserialize, Serialize};

/// A message from one agent to another.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Notice {
    /// "Write the first bytes of your slot to this target." A length of 0 asks "are you there?".
    Ask(Ask),
    /// The bytes are there. Nothing more is written.
    Done { id: u64 },
    /// The bytes are not there. If the write had begun, some of them may still arrive.
    Refused { id: u64, begun: bool, words: String },
}

/// A request to write to the sender's memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) id: u64,
    pub(crate) slot: u32,
    /// Address and length.
    pub(crate) target: (u64, u64),
    pub(crate) device: Option<u32>,
    /// The metadata of the agent that asks.
    pub(crate) metadata: Vec<u8>,
    /// Counts how often the asking agent has loaded the other's metadata. Another number tells that all earlier connections are closed.
    pub(crate) era: u64,
    /// The time after which the write must not begin, in milliseconds from now.
    pub(crate) millis: u64,
}

//! What ranks of placed updates say to one another: a rollout's terms, and messages between agents.

use serde::{Deserialize, Serialize};

use engine_core::Rank;

use crate::lent::Process;

/// A rollout's terms: what a trainer needs to write to its memory in one update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Offer {
    /// The name of the rollout's agent, unique among all agents.
    pub(crate) agent: String,
    /// NIXL's own description of that agent and of the memory.
    pub(crate) metadata: Vec<u8>,
    pub(crate) lease: u64,
    /// The number of the device that it is on, in the rollout's process; `None` for host memory.
    pub(crate) device: Option<u32>,
    pub(crate) parts: Vec<OfferedPart>,
}

/// A part of what is lent, in one piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfferedPart {
    /// The offset of its first byte in what is lent.
    pub(crate) at: u64,
    pub(crate) bytes: u64,
    /// Its address in the rollout's process.
    pub(crate) address: u64,
}

/// From a trainer's agent to a rollout's. `lease` is the number of the lease that it is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum ToLender {
    /// The trainer wants to write. It does not before the grant.
    Accept {
        lease: u64,
        rank: Rank,
        /// The metadata of the trainer's agent.
        metadata: Vec<u8>,
        /// The identity of its host.
        host: String,
        process: Option<Process>,
    },
    /// All of its writes have ended with their bytes there, or it has begun none. It writes no more.
    LetGo { lease: u64 },
}

/// From a rollout's agent to a trainer's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum ToWriter {
    /// The trainer may write until it lets go.
    Granted { lease: u64 },
    /// The lease is over, or was never one.
    Refused { lease: u64 },
}

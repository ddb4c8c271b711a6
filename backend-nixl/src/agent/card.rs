//! What peers need to reach an agent and its slots.

use serde::{Deserialize, Serialize};

use crate::error::NixlError;
use crate::lent::Process;

/// What peers need to reach an agent and its slots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Card {
    /// The agent's name, unique among all agents.
    pub(crate) name: String,
    /// NIXL's own description of it.
    pub(crate) metadata: Vec<u8>,
    /// The address of the first slot.
    pub(crate) address: u64,
    pub(crate) slots: u32,
    pub(crate) slot_bytes: u64,
    /// The number of the CUDA device that they are on; `None` for host memory.
    pub(crate) device: Option<u32>,
    /// The host's identity.
    pub(crate) host: String,
    /// Its process.
    pub(crate) process: Option<Process>,
    /// Whether a slot may have moved from its address, because a peer that was asked to write to it was given up. Only the agent itself
    /// then knows where it is.
    pub(crate) moves: bool,
}

impl Card {
    /// Where the first bytes of a slot are: address and length.
    pub(crate) fn range(&self, slot: u32, filled: u64) -> Result<(usize, usize), NixlError> {
        let (slots, bytes) = (self.slots, self.slot_bytes);
        let outside = NixlError::Outside { slot, filled, slots, bytes };
        if slot >= slots || filled > bytes {
            return Err(outside);
        }
        let at = u64::from(slot).checked_mul(bytes).and_then(|at| at.checked_add(self.address));
        match at.and_then(|at| usize::try_from(at).ok()) {
            Some(at) => Ok((at, filled as usize)),
            None => Err(outside),
        }
    }
}

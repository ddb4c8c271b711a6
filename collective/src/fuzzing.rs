//! Parses the tickets by which ranks join groups, for the targets of `fuzz/`. Compiled only for fuzzing.

use engine_core::Rank;

use crate::group::{Ticket, groups_of};

/// Reads a ticket. A rank's groups are within its members, and it is the same after it was written and read again.
pub fn ticket(bytes: &[u8], rank: u32) {
    let Ok(ticket) = Ticket::from_bytes(bytes) else { return };
    for (group, place) in groups_of(&ticket.members, Rank(rank)) {
        assert!(group < ticket.members.senders.len());
        assert!(place as usize <= ticket.members.others.len());
    }
    let written = ticket.to_bytes().expect("what was read can be written");
    assert_eq!(Ticket::from_bytes(&written).expect("what was written can be read"), ticket);
}

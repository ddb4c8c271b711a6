//! What the leader sends of the groups that ranks join, for the targets of `fuzz/`. It is there in builds for fuzzing
//! alone.

use engine_core::Rank;

use crate::group::{Ticket, groups_of};

/// A ticket, and what a rank makes of it: it names each member once.
pub fn ticket(bytes: &[u8], rank: u32) {
    let Ok(ticket) = Ticket::from_bytes(bytes) else { return };
    for (group, place) in groups_of(&ticket.members, Rank(rank)) {
        assert!(group < ticket.members.senders.len());
        assert!(place as usize <= ticket.members.others.len());
    }
    let written = ticket.to_bytes().expect("what was read can be written");
    assert_eq!(Ticket::from_bytes(&written).expect("what was written can be read"), ticket);
}

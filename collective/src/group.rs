//! Decides the members of groups, and how a membership changes to the next. Pure.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use engine_core::{Error, ErrorKind, Rank, Result};
use protocol::Members;

/// Tells ranks what to do before an update to be in its groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ticket {
    /// Counts the groups that the leader has formed or changed.
    pub(super) epoch: u64,
    pub(super) members: Members,
    pub(super) change: Change,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Change {
    /// The ranks are in the groups of this epoch already.
    Keep,
    /// The ranks form new groups, one for each sender, with these ids.
    Form { ids: Vec<Bytes> },
    /// The ranks remove members from the groups of the previous epoch.
    Shrink { gone: Vec<Rank> },
}

/// The groups of a rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Joined {
    pub(super) epoch: u64,
    pub(super) members: Members,
}

/// The step that the leader chooses for the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Keep,
    Form,
    Shrink,
}

impl Joined {
    /// The step from these groups to the members of the next update.
    pub(super) fn step(&self, next: &Members, can_shrink: bool) -> Step {
        let Members { senders, others } = &self.members;
        if self.epoch == 0 || *senders != next.senders {
            return Step::Form;
        }
        if *others == next.others {
            return Step::Keep;
        }
        let before: BTreeSet<&Rank> = others.iter().collect();
        let fewer = next.others.iter().all(|rank| before.contains(rank));
        if fewer && can_shrink { Step::Shrink } else { Step::Form }
    }

    /// Members that do not take part in the next update.
    pub(super) fn gone(&self, next: &Members) -> Vec<Rank> {
        let stays = |rank: &Rank| next.others.contains(rank);
        self.members.others.iter().copied().filter(|rank| !stays(rank)).collect()
    }

    /// The places of ranks in each group. None of them is a sender.
    pub(super) fn places(&self, ranks: &[Rank]) -> Vec<u32> {
        let others = (1..).zip(&self.members.others);
        others.filter(|(_, rank)| ranks.contains(rank)).map(|(place, _)| place).collect()
    }
}

/// The groups of a rank: number, and the rank's place in it. Group `n` is that of sender `n`, who is at place 0.
pub(super) fn groups_of(members: &Members, rank: Rank) -> Vec<(usize, u32)> {
    if let Some(group) = members.senders.iter().position(|sender| *sender == rank) {
        return vec![(group, 0)];
    }
    let other = (1..).zip(&members.others).find(|(_, other)| **other == rank);
    let Some((place, _)) = other else { return Vec::new() };
    (0..members.senders.len()).map(|group| (group, place)).collect()
}

impl Ticket {
    pub(super) fn to_bytes(&self) -> Result<Bytes> {
        postcard::to_stdvec(self).map(Bytes::from).map_err(|error| {
            Error::new(ErrorKind::Protocol, "writing a ticket", error.to_string())
                .with_source(error)
        })
    }

    /// # Errors
    ///
    /// `Protocol` for bytes that are not a ticket, or for one that contradicts itself.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let refuse = |words: String| {
            Error::new(ErrorKind::Protocol, "reading a ticket", words).rank(Rank::LEADER)
        };
        let (ticket, rest): (Self, _) = postcard::take_from_bytes(bytes)
            .map_err(|error| refuse(error.to_string()).with_source(error))?;
        if !rest.is_empty() {
            return Err(refuse(format!("{} bytes too many", rest.len())));
        }
        let Members { senders, others } = &ticket.members;
        let distinct: BTreeSet<&Rank> = senders.iter().chain(others).collect();
        if senders.is_empty() || distinct.len() != senders.len() + others.len() {
            return Err(refuse("its members are no group".into()));
        }
        match &ticket.change {
            Change::Form { ids } if ids.len() != senders.len() => {
                Err(refuse(format!("{} ids for {} groups", ids.len(), senders.len())))
            }
            _ => Ok(ticket),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members(senders: &[u32], others: &[u32]) -> Members {
        let ranks = |ranks: &[u32]| ranks.iter().copied().map(Rank).collect();
        Members { senders: ranks(senders), others: ranks(others) }
    }

    #[test]
    fn the_same_members_keep_their_groups_fewer_shrink_them_and_others_form_new_ones() {
        let joined = Joined { epoch: 3, members: members(&[0, 1], &[2, 3, 4]) };
        let step = |senders: &[u32], others: &[u32]| joined.step(&members(senders, others), true);
        assert_eq!(step(&[0, 1], &[2, 3, 4]), Step::Keep);
        assert_eq!(step(&[0, 1], &[2, 4]), Step::Shrink);
        assert_eq!(step(&[0, 1], &[2, 4, 5]), Step::Form);
        assert_eq!(step(&[0], &[2, 3, 4]), Step::Form);
        assert_eq!(joined.step(&members(&[0, 1], &[2]), false), Step::Form);
        assert_eq!(Joined::default().step(&Members::default(), true), Step::Form);
        let next = members(&[0, 1], &[3]);
        assert_eq!(joined.gone(&next), [Rank(2), Rank(4)]);
        assert_eq!(joined.places(&joined.gone(&next)), [1, 3]);
    }

    #[test]
    fn a_sender_is_first_in_its_own_group_and_a_receiver_has_one_place_in_all() {
        let members = members(&[0, 2], &[1, 3]);
        assert_eq!(groups_of(&members, Rank(0)), [(0, 0)]);
        assert_eq!(groups_of(&members, Rank(2)), [(1, 0)]);
        assert_eq!(groups_of(&members, Rank(3)), [(0, 2), (1, 2)]);
        assert_eq!(groups_of(&members, Rank(4)), []);
    }

    #[test]
    fn a_ticket_survives_its_way_and_one_that_contradicts_itself_is_refused() {
        let change = Change::Form { ids: vec![Bytes::from_static(b"id")] };
        let ticket = Ticket { epoch: 1, members: members(&[0], &[1]), change };
        assert_eq!(Ticket::from_bytes(&ticket.to_bytes().unwrap()).unwrap(), ticket);
        let twice = Ticket { members: members(&[0], &[1, 1]), ..ticket.clone() };
        assert!(Ticket::from_bytes(&twice.to_bytes().unwrap()).is_err());
        let few = Ticket { members: members(&[0, 2], &[1]), ..ticket };
        assert!(Ticket::from_bytes(&few.to_bytes().unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_a_ticket_or_an_error_but_never_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            drop(Ticket::from_bytes(&bytes));
        }
    }
}

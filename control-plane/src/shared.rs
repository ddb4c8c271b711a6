//! The state that handles and the control thread share.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::group::{Bounds, Group, Link, Mailbox, Membership, Outbox};
use crate::wire::{Counters, Frame, Signal};
use engine_core::{Error, ErrorKind, ErrorReport, Rank};

/// Locked for moments only, never across a wait.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<(Mailbox, Side)>,
    pub(super) changed: Notify,
    pub(super) counters: Arc<Counters>,
}

#[derive(Debug)]
pub(super) enum Side {
    Leader(Group),
    Member(Membership),
}

impl Side {
    /// The link to a rank; `None` if there is none.
    pub(super) fn link_mut(&mut self, to: Rank) -> Option<&mut Link> {
        match self {
            Self::Leader(group) => group.link_mut(to).ok(),
            Self::Member(membership) => (to == Rank::LEADER).then_some(&mut membership.leader),
        }
    }
}

impl Shared {
    /// `bound` is how many bytes of a peer's messages may be unread.
    pub(super) fn new(side: Side, bound: usize) -> Self {
        let updates = match side {
            Side::Leader(_) => bound,
            // Not bounded: the leader is trusted, and rollouts do not read while they generate.
            Side::Member(_) => usize::MAX,
        };
        let mailbox = Mailbox::new(Bounds { updates, others: bound });
        let state = Mutex::new((mailbox, side));
        Self { state, changed: Notify::new(), counters: Arc::default() }
    }

    pub(super) fn read<T>(&self, f: impl FnOnce(&mut Mailbox, &mut Side) -> T) -> T {
        // After a panic elsewhere, going on is better than stopping: at worst one link ends and its
        // peer is lost.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mailbox, side) = &mut *state;
        f(mailbox, side)
    }

    /// As `read`, and wakes all waits for a change.
    pub(super) fn update<T>(&self, f: impl FnOnce(&mut Mailbox, &mut Side) -> T) -> T {
        let result = self.read(f);
        self.changed.notify_waiters();
        result
    }

    /// Says goodbye to every peer and ends every wait of this process.
    pub(super) fn close(&self) {
        self.update(|mailbox, side| {
            mailbox.ended.get_or_insert_with(|| ErrorReport::from(&closed()));
            match side {
                Side::Leader(group) => group.dissolve(),
                Side::Member(membership) => {
                    // A replacement without a receiver, because closing consumes the outbox.
                    let (nowhere, _) = Outbox::new(0);
                    let outbox = std::mem::replace(&mut membership.leader.outbox, nowhere);
                    if outbox.close_with(Frame::Signal(Signal::Goodbye)).is_err() {
                        tracing::trace!("the leader is gone already");
                    }
                }
            }
        });
    }
}

pub(super) fn closed() -> Error {
    Error::new(ErrorKind::State, "using the control plane", "it is closed")
}

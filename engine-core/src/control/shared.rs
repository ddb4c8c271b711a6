//! The state that handles and the control thread share.

use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use super::group::{Group, Mailbox, Membership, Outbox};
use super::wire::{Control, Frame};
use crate::{Error, ErrorKind, ErrorReport};

/// Locked for moments only, never across a wait.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<(Mailbox, Side)>,
    pub(super) changed: Notify,
}

#[derive(Debug)]
pub(super) enum Side {
    Leader(Group),
    Member(Membership),
}

impl Shared {
    pub(super) fn new(side: Side) -> Self {
        Self { state: Mutex::new((Mailbox::default(), side)), changed: Notify::new() }
    }

    pub(super) fn read<T>(&self, f: impl FnOnce(&mut Mailbox, &mut Side) -> T) -> T {
        // A panic of another thread cannot leave the state half-changed in a way that matters
        // more than going on: its link ends, and its peer is lost.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mailbox, side) = &mut *state;
        f(mailbox, side)
    }

    /// As `read`, and wakes whoever waits for a change.
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
                    // The replacement's receiver is gone, so the real outbox closes here.
                    let (nowhere, _) = Outbox::new(0);
                    let outbox = std::mem::replace(&mut membership.leader.outbox, nowhere);
                    if outbox.close_with(Frame::Control(Control::Goodbye)).is_err() {
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

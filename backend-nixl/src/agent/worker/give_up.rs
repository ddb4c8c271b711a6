//! Peers that were given up, and the memory that they may still write to.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use tracing::{info, warn};

use super::{Active, Work, Worker};
use crate::agent::Card;
use crate::arena::{Arena, Lent, Range};
use crate::error::NixlError;
use crate::ffi::RawAgent;

impl Worker {
    /// Gives up the transfers with a peer and closes the connections to it: a later transfer begins
    /// with new ones.
    pub(super) fn forget(&mut self, peer: &str) {
        let active = std::mem::take(&mut self.active).into_iter();
        let (gone, left): (Vec<_>, Vec<_>) =
            active.partition(|transfer| transfer.peer.name == peer);
        self.active = left;
        for mut transfer in gone {
            if matches!(transfer.work, Work::Read(_)) {
                Self::let_linger(&self.arena, &mut transfer, NixlError::Abandoned);
                self.active.push(transfer);
            } else {
                self.give_up(transfer, NixlError::Abandoned);
            }
        }
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (gone, left): (VecDeque<_>, _) =
            waiting.partition(|transfer| transfer.peer.name == peer);
        self.waiting = left;
        for transfer in gone {
            transfer.done.tell(Err(NixlError::Abandoned));
        }
        self.disconnect(peer);
    }

    /// Gives up a transfer that a peer was asked for. The peer may still write.
    pub(super) fn give_up(&mut self, transfer: Active, error: NixlError) {
        let Active { work, peer, done, .. } = transfer;
        match work {
            Work::Asked(lent) => self.retire(lent, &peer),
            Work::Greeted(_, slot) => drop(slot),
            Work::Read(raw) => drop(raw),
        }
        if let Some(done) = done {
            done.tell(Err(error));
        }
    }

    /// Takes memory out of use to which a peer may still write. Its slot gets other memory.
    pub(super) fn retire(&mut self, lent: Lent, peer: &Card) {
        self.stale |= !self.known.told.load(Ordering::SeqCst);
        let slot = lent.number();
        let Self { retired, agent, arena, metadata, .. } = self;
        let more = || more(agent, arena, metadata);
        let result = retired.give_up(
            arena,
            lent,
            self.reach.writer(&peer.host, peer.process.as_ref()),
            more,
        );
        self.count_retired();
        let (peer, kept, bytes) = (&peer.name, self.retired.len(), self.arena.slot_bytes());
        match result {
            Ok(()) => info!(
                peer,
                slot,
                kept,
                bytes,
                "a peer that was given up may still write to a slot: the slot has other memory now"
            ),
            Err(error) => warn!(
                peer, slot, kept, %error,
                "a peer that was given up may still write to a slot, which has no memory until that is over"
            ),
        }
    }

    pub(super) fn count_retired(&self) {
        self.known.retired.store(self.retired.len(), Ordering::SeqCst);
    }
}

/// More memory for one slot, which peers can reach.
fn more(agent: &mut RawAgent, arena: &Arena, metadata: &mut Vec<u8>) -> Result<Range, NixlError> {
    let range = arena.spare()?;
    agent.register(range.place().memory)?;
    *metadata = agent.metadata()?;
    Ok(range)
}

//! Transfers to this rank: read from a peer, or written by a peer on request.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Active, Work, Worker};
use crate::agent::Card;
use crate::agent::handle::Transfer;
use crate::agent::notice::{Ask, Notice};
use crate::arena::{Arena, Slot};
use crate::error::NixlError;
use crate::ffi::{NotStarted, Remote};
use crate::lent::AskId;

impl Worker {
    pub(super) fn start(&mut self, transfer: Transfer) {
        if !transfer.done.is_awaited() {
            // Left over from an update that has ended: its peer may be gone by now.
            return transfer.done.tell(Err(NixlError::Abandoned));
        }
        self.retired.refill(&self.arena);
        self.stale &= !self.known.told.load(Ordering::SeqCst);
        if self.stale {
            // A rank that fetches this bucket from here would read it from the slot's former place.
            return transfer.done.tell(Err(NixlError::Moved));
        }
        if transfer.slot.len() == 0 {
            // NIXL refuses empty transfers.
            return transfer.done.tell(Ok(transfer.slot));
        }
        self.stirred = Instant::now();
        let Transfer { slot, peer, from, deadline, done } = transfer;
        match self.begin(slot, &peer, from, deadline) {
            Ok(work) => {
                let (until, done) = (Instant::now() + deadline, Some(done));
                self.active.push(Active { work, peer, from, until, deadline, done });
            }
            Err(error) => {
                done.tell(Err(error));
                self.forget(&peer.name);
            }
        }
    }

    fn begin(
        &mut self,
        slot: Slot,
        peer: &Card,
        from: u32,
        deadline: Duration,
    ) -> Result<Work, NixlError> {
        let range = peer.range(from, slot.len() as u64)?;
        self.load(&peer.name, &peer.metadata)?;
        if !self.reads_from(peer) {
            return self.ask(peer, from, slot, deadline);
        }
        match self.agent.read(&peer.name, Remote { range, device: peer.device }, slot) {
            Ok(raw) => Ok(Work::Read(raw)),
            Err(NotStarted { error, memory: slot, .. }) if self.is_in_doubt(&peer.name, &error) => {
                self.greet(peer, slot, deadline)
            }
            Err(NotStarted { error, .. }) => Err(error),
        }
    }

    /// Whether bytes are read from a peer, not written by it.
    fn reads_from(&self, peer: &Card) -> bool {
        !(self.options.writes || peer.moves || self.reach.excludes(peer))
    }

    /// Whether a read may have failed because UCX has no transport here that can read.
    fn is_in_doubt(&self, peer: &str, error: &NixlError) -> bool {
        matches!(error, NixlError::Transfer { .. }) && self.reach.is_undecided(peer)
    }

    /// Continues after a read that has failed.
    pub(super) fn try_again(&mut self, transfer: Transfer, until: Instant, error: NixlError) {
        let Transfer { slot, peer, from, deadline, done } = transfer;
        let error = if self.is_in_doubt(&peer.name, &error) {
            match self.greet(&peer, slot, deadline) {
                Ok(work) => {
                    let done = Some(done);
                    self.active.push(Active { work, peer, from, until, deadline, done });
                    return;
                }
                Err(error) => error,
            }
        } else {
            error
        };
        done.tell(Err(error));
        self.forget(&peer.name);
    }

    /// Keeps a read that nobody waits for any more: the library goes on with it, so its slot stays in use.
    pub(super) fn let_linger(arena: &Arena, transfer: &mut Active, error: NixlError) {
        if let Work::Read(raw) = &transfer.work
            && let Some(slot) = raw.memory()
        {
            let peer = &transfer.peer.name;
            arena
                .hold(slot.number(), format!("a read from {peer} that was given up has not ended"));
        }
        transfer.fail(error);
    }

    /// Asks a peer whether it is there, over a new connection: the one of the read has failed.
    fn greet(&mut self, peer: &Card, slot: Slot, deadline: Duration) -> Result<Work, NixlError> {
        self.disconnect(&peer.name);
        let ask = self.next_ask(peer);
        self.request(peer, ask.id, 0, (0, 0), deadline)?;
        Ok(Work::Greeted(ask, slot))
    }

    /// Asks a peer to write from its slot to one of this rank.
    pub(super) fn ask(
        &mut self,
        peer: &Card,
        from: u32,
        slot: Slot,
        deadline: Duration,
    ) -> Result<Work, NixlError> {
        self.known.moves.store(true, Ordering::SeqCst);
        let place = slot.place()?;
        // As long as the peer was told nothing, the slot can be used again.
        self.load(&peer.name, &peer.metadata)?;
        let ask = self.next_ask(peer);
        let id = ask.id;
        let lent = slot.lend(ask);
        match self.request(peer, id, from, (place.address, place.len), deadline) {
            Ok(()) => Ok(Work::Asked(lent)),
            Err(error) => {
                // The peer may have received it all the same.
                self.retire(lent, peer);
                Err(error)
            }
        }
    }

    fn next_ask(&mut self, peer: &Card) -> AskId {
        self.count += 1;
        AskId { peer: peer.name.clone(), id: self.count }
    }

    /// Asks a peer to write the first bytes of a slot.
    fn request(
        &mut self,
        peer: &Card,
        id: u64,
        slot: u32,
        (address, len): (usize, usize),
        deadline: Duration,
    ) -> Result<(), NixlError> {
        let era = self.load(&peer.name, &peer.metadata)?;
        let ask = Notice::Ask(Ask {
            id,
            slot,
            target: (address as u64, len as u64),
            device: self.arena.device(),
            metadata: self.metadata.clone(),
            era,
            millis: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
        });
        self.say(&peer.name, &ask)
    }
}

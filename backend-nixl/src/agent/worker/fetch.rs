//! Transfers to this rank: read from a peer, or asked for where a peer has to write.

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
            // What is left of an update that has ended: its peer may have gone by now.
            return transfer.done.tell(Err(NixlError::Abandoned));
        }
        self.retired.refill(&self.arena);
        self.stale &= !self.known.told.load(Ordering::SeqCst);
        if self.stale {
            // Who fetched this from here would read it where the slot was before.
            return transfer.done.tell(Err(NixlError::Moved));
        }
        if transfer.slot.len() == 0 {
            // An empty bucket; NIXL refuses transfers of nothing.
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

    /// Whether bytes are read from a peer, and it is not asked to write them.
    fn reads_from(&self, peer: &Card) -> bool {
        !(self.options.writes || peer.moves || self.reach.excludes(peer))
    }

    /// Whether a read that failed may have done so because UCX has no transport here that can read.
    fn is_in_doubt(&self, peer: &str, error: &NixlError) -> bool {
        matches!(error, NixlError::Transfer { .. }) && self.reach.is_undecided(peer)
    }

    /// Goes on after a read that has ended with an error.
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

    /// Nobody waits for a read any more. The library goes on with it, and so the slot stays in use.
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

    /// Asks a peer whether it is there, over a new connection: that of the read has failed.
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
        // As long as nothing was said to the peer, the slot is as good as before.
        self.load(&peer.name, &peer.metadata)?;
        let ask = self.next_ask(peer);
        let id = ask.id;
        let lent = slot.lend(ask);
        match self.request(peer, id, from, (place.address, place.len), deadline) {
            Ok(()) => Ok(Work::Asked(lent)),
            Err(error) => {
                // It may have been heard all the same.
                self.retire(lent, peer);
                Err(error)
            }
        }
    }

    fn next_ask(&mut self, peer: &Card) -> AskId {
        self.count += 1;
        AskId { peer: peer.name.clone(), id: self.count }
    }

    /// Has a peer write the first bytes of a slot.
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

//! Writes to peers that have asked for them.

use std::time::Instant;

use tracing::{debug, warn};

use super::Worker;
use crate::agent::notice::{Ask, Notice};
use crate::arena::Place;
use crate::error::NixlError;
use crate::ffi::{RawTransfer, Remote};

/// A peer's request to write.
pub(super) struct Asked {
    pub(super) peer: String,
    pub(super) ask: Ask,
    pub(super) until: Instant,
}

/// A write to a peer that is under way. UCX cannot cancel it, so it stays here until it has ended, even if the peer no longer waits: the
/// peer has to know that it has ended before it uses the memory again.
pub(super) struct Serving {
    pub(super) raw: RawTransfer<Place>,
    pub(super) peer: String,
    pub(super) id: u64,
    pub(super) until: Instant,
}

impl Worker {
    /// Starts a write that a peer has asked for.
    pub(super) fn serve_ask(&mut self, asked: Asked) {
        let known = self.loaded.get(&asked.peer).and_then(|known| known.asks);
        if known.is_some_and(|era| era != asked.ask.era) && self.is_under_way_with(&asked.peer) {
            // An answer needs new connections, and the old ones stay until their transfers have ended.
            return self.postponed.push(asked);
        }
        let Asked { peer, ask: Ask { id, slot, target, device, metadata, era, .. }, until } = asked;
        let known = self.know_asker(&peer, &metadata, era);
        if let Err(error) = known {
            return self.refuse(&peer, id, false, error.to_string());
        }
        // From here on an answer reaches the peer.
        if Instant::now() >= until {
            return self.refuse(&peer, id, false, "it was too late to begin".into());
        }
        if target.1 == 0 {
            return self.confirm(&peer, id);
        }
        match self.write(&peer, slot, target, device) {
            Ok(raw) => self.serving.push(Serving { raw, peer, id, until }),
            Err((error, begun)) => self.refuse(&peer, id, begun, error.to_string()),
        }
    }

    /// Checks the writes to peers. Returns whether one ended.
    pub(super) fn serve(&mut self) -> bool {
        let mut ended = Vec::new();
        let mut at = 0;
        while let Some(serving) = self.serving.get(at) {
            let failed = match self.agent.is_done(&serving.raw) {
                Ok(false) => {
                    at += 1;
                    continue;
                }
                Ok(true) => None,
                Err(error) => Some(error.to_string()),
            };
            let Serving { raw, peer, id, until } = self.serving.swap_remove(at);
            match self.agent.end(raw) {
                Ok(_) => ended.push((peer, id, failed)),
                Err(raw) => {
                    self.serving.push(Serving { raw, peer, id, until });
                    break;
                }
            }
        }
        let any = !ended.is_empty();
        for (peer, id, failed) in ended {
            match failed {
                // Bytes on their way may still arrive.
                Some(words) => self.refuse(&peer, id, true, words),
                // Confirmed even if it is late: the peer can use the memory again.
                None => self.confirm(&peer, id),
            }
        }
        let postponed = std::mem::take(&mut self.postponed);
        postponed.into_iter().for_each(|asked| self.serve_ask(asked));
        any
    }

    /// Loads the metadata of a peer that asks, for connections that the peer has not closed.
    fn know_asker(&mut self, peer: &str, metadata: &[u8], era: u64) -> Result<(), NixlError> {
        if self.loaded.get(peer).is_some_and(|known| known.asks.is_some_and(|asks| asks != era)) {
            self.forget(peer);
        }
        self.load(peer, metadata)?;
        if let Some(known) = self.loaded.get_mut(peer) {
            known.asks = Some(era);
        }
        Ok(())
    }

    /// Starts to write a slot to where a peer wants it. The error tells whether the write may have begun.
    fn write(
        &self,
        peer: &str,
        slot: u32,
        (address, len): (u64, u64),
        device: Option<u32>,
    ) -> Result<RawTransfer<Place>, (NixlError, bool)> {
        let unbegun = |error| (error, false);
        let place = self.arena.place(slot, len).map_err(unbegun)?;
        let address = usize::try_from(address).map_err(|_| unbegun(NixlError::Unknown))?;
        let remote = Remote { range: (address, place.len), device };
        self.agent.write(peer, place, remote).map_err(|not| (not.error, !not.unmoved))
    }

    /// Tells a peer that its write is done.
    fn confirm(&mut self, peer: &str, id: u64) {
        if let Err(error) = self.say(peer, &Notice::Done { id }) {
            warn!(peer, %error, "a peer could not be told that its bucket is there");
            self.forget(peer);
        }
    }

    fn refuse(&mut self, peer: &str, id: u64, begun: bool, words: String) {
        warn!(peer, words, "a bucket could not be written to a peer");
        if let Err(error) = self.say(peer, &Notice::Refused { id, begun, words }) {
            debug!(peer, %error, "it could not be told");
            self.forget(peer);
        }
    }
}

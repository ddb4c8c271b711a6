//! Handles messages of peers: questions, and answers to questions.

use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::push::Asked;
use super::{Active, Work, Worker};
use crate::agent::notice::Notice;
use crate::error::NixlError;
use crate::lent::{AskId, Quiesced};

impl Worker {
    /// Processes messages of peers. Returns whether there were any.
    pub(super) fn listen(&mut self) -> bool {
        self.listened = Instant::now();
        let notices = match self.agent.notices() {
            Ok(notices) => notices,
            Err(error) => {
                warn!(%error, "messages of peers cannot be taken in");
                return false;
            }
        };
        let heard = !notices.is_empty();
        for (peer, bytes) in notices {
            match postcard::from_bytes::<Notice>(&bytes) {
                Ok(notice) => self.hear(peer, notice),
                Err(error) => warn!(peer, %error, "a peer's message cannot be read"),
            }
        }
        if heard {
            self.stirred = Instant::now();
        }
        heard
    }

    fn hear(&mut self, peer: String, notice: Notice) {
        let (ask, words, proof) = match notice {
            Notice::Ask(ask) => {
                self.asked = true;
                let now = Instant::now();
                let until = now.checked_add(Duration::from_millis(ask.millis)).unwrap_or(now);
                return self.serve_ask(Asked { peer, ask, until });
            }
            Notice::Done { id } => {
                let ask = AskId { peer, id };
                (ask.clone(), None, Some(Quiesced::written(ask)))
            }
            Notice::Refused { id, begun, words } => {
                let ask = AskId { peer, id };
                let proof = (!begun).then(|| Quiesced::never_begun(ask.clone()));
                (ask, Some(words), proof)
            }
        };
        let asked = |active: &Active| match &active.work {
            Work::Greeted(asked, _) => *asked == ask,
            Work::Asked(lent) => *lent.ask() == ask,
            Work::Read(_) => false,
        };
        let Some(at) = self.active.iter().position(asked) else {
            if let Some(proof) = proof
                && self.retired.quiesced(&self.arena, proof)
            {
                self.count_retired();
                debug!(
                    peer = ask.peer,
                    "a peer that was given up has answered: its memory is used again"
                );
            }
            return;
        };
        let transfer = self.active.swap_remove(at);
        match transfer.work {
            Work::Asked(lent) => {
                let Active { peer, mut done, .. } = transfer;
                let result = words.map_or(Ok(()), |words| Err(NixlError::Refused(words)));
                let slot = match &proof {
                    Some(proof) => lent.back(proof),
                    None => Err(lent),
                };
                let result = match slot {
                    Ok(slot) => result.map(|()| slot),
                    Err(lent) => {
                        self.retire(lent, &peer);
                        Err(result.err().unwrap_or(NixlError::Unknown))
                    }
                };
                if let Some(done) = done.take() {
                    done.tell(result);
                }
            }
            Work::Greeted(_, slot) => {
                let Active { peer, from, until, deadline, done, .. } = transfer;
                let work = match words {
                    Some(words) => Err(NixlError::Refused(words)),
                    None => {
                        debug!(peer.name, "nothing can be read from a peer, it is asked to write");
                        self.reach.decide(&peer.name, false);
                        self.ask(&peer, from, slot, deadline)
                    }
                };
                match (work, done) {
                    (Ok(work), done) => {
                        self.active.push(Active { work, peer, from, until, deadline, done });
                    }
                    (Err(error), Some(done)) => done.tell(Err(error)),
                    (Err(_), None) => {}
                }
            }
            // Reads ask no question.
            Work::Read(_) => self.active.push(transfer),
        }
    }
}

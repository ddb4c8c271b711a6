//! Ends the agent: for good, or to replace it by another one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::{PAUSE, Work, Worker};
use crate::agent::open::open;
use crate::arena::Slot;
use crate::error::NixlError;
use crate::ffi::RawTransfer;

/// How long the end of an agent waits for transfers over its connections.
const GRACE: Duration = Duration::from_secs(1);

impl Worker {
    /// Waits, up to [`GRACE`], until no write goes over this agent's connections, to a peer or from one, even if nobody here waits for it
    /// any more. Most end soon. Those that do not are of peers that are gone. If a peer closes its agent in the middle of a write, the
    /// writer gets an error from UCX at best: a write from device memory by way of the host may end the writer's process ("unexpected
    /// error: Endpoint timeout").
    fn settle(&mut self, is_worth_it: impl Fn(&Self) -> bool) {
        let until = Instant::now() + GRACE;
        let writes =
            |this: &Self| this.awaits_peers() || this.retired.len() > 0 || !this.serving.is_empty();
        while writes(self) && is_worth_it(self) && Instant::now() < until {
            self.poll();
            std::thread::sleep(PAUSE);
        }
    }

    pub(super) fn close(mut self) {
        *self.known.card() = None;
        for transfer in self.waiting.drain(..) {
            transfer.done.tell(Err(NixlError::Closed));
        }
        self.settle(|_| true);
        let reads = self.end_all(|| NixlError::Closed);
        let writes = self.serving.into_iter().map(|serving| serving.raw).collect();
        let read_to = self.agent.close(reads, writes);
        // The agent's connections are gone.
        drop(read_to);
        self.retired.agent_ended(&self.arena);
        // A peer on this host that was stopped in the middle of a write will go on with it when it continues. It must not find other data
        // at the address.
        for range in self.retired.into_kept() {
            let bytes = range.place().len;
            warn!(bytes, "memory that a peer may still write to is kept for ever");
            std::mem::forget(range);
        }
    }

    /// Ends all transfers to this rank that can be ended. Returns those that the library still works on.
    fn end_all(&mut self, error: impl Fn() -> NixlError) -> Vec<RawTransfer<Slot>> {
        let mut reads = Vec::new();
        for mut transfer in std::mem::take(&mut self.active) {
            transfer.fail(error());
            match transfer.work {
                Work::Read(raw) => reads.push(raw),
                Work::Greeted(..) => {}
                Work::Asked(lent) => {
                    let (ask, writer) = (
                        lent.ask().clone(),
                        self.reach.writer(&transfer.peer.host, transfer.peer.process.as_ref()),
                    );
                    let none = || Err(NixlError::Closed);
                    if self.retired.give_up(&self.arena, lent, writer, none).is_err() {
                        debug!(
                            peer = ask.peer,
                            "a peer may still write to a slot at the agent's end"
                        );
                    }
                }
            }
        }
        reads
    }

    /// Replaces the agent by another one, if that frees memory and somebody still waits for it.
    pub(super) fn renew(&mut self, done: tokio::sync::oneshot::Sender<()>) {
        if !self.retired.is_worth_an_end() || done.is_closed() {
            return;
        }
        let begun = Instant::now();
        self.settle(|this| this.retired.is_worth_an_end() && !done.is_closed());
        if !self.retired.is_worth_an_end() || done.is_closed() {
            return;
        }
        let spares = self.retired.memory();
        self.count += 1;
        let Some(name) = self.known.card().as_ref().map(|card| card.name.clone()) else { return };
        let name = format!("{}+{}", name.split('+').next().unwrap_or_default(), self.count);
        let (agent, card) = match open(&self.options, name, &self.arena, spares) {
            Ok(opened) => opened,
            Err(error) => return warn!(%error, "an agent could not be replaced by another one"),
        };
        {
            // A rank that stops waiting uses the present card, so the card must not change afterwards.
            let mut known = self.known.card();
            if done.is_closed() {
                return debug!("an agent is not replaced: an update has begun");
            }
            self.metadata = card.metadata.clone();
            *known = Some(Arc::new(card));
        }
        // No update is under way, so nobody waits for these transfers.
        let reads = self.end_all(|| NixlError::Abandoned);
        let writes = self.serving.drain(..).map(|serving| serving.raw).collect();
        let old = std::mem::replace(&mut self.agent, agent);
        drop(old.close(reads, writes));
        self.loaded.clear();
        self.closing.clear();
        self.postponed.clear();
        let freed = self.retired.agent_ended(&self.arena);
        self.retired.keep_spares(self.arena.slots() as usize);
        self.count_retired();
        info!(
            freed,
            kept = self.retired.len(),
            seconds = begun.elapsed().as_secs_f64(),
            "memory that peers might have written to is used again: this rank's connections were closed"
        );
        drop(done);
    }
}

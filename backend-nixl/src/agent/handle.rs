//! The handle of an agent's thread, and its commands.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SendError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::debug;

use super::worker::Worker;
use super::{AgentOptions, Card, thread};
use crate::arena::{Arena, Slot};
use crate::error::NixlError;

/// The party that waits for a transfer.
pub(crate) trait Awaiting: Send {
    /// Whether it still waits.
    fn is_awaited(&self) -> bool;

    /// Takes the slot with its bytes, from the agent's thread.
    fn tell(self: Box<Self>, result: Result<Slot, NixlError>);
}

/// A transfer to a slot of this rank from one of a peer.
pub(crate) struct Transfer {
    pub(crate) slot: Slot,
    pub(crate) peer: Arc<Card>,
    /// The peer's slot.
    pub(crate) from: u32,
    pub(crate) deadline: Duration,
    pub(crate) done: Box<dyn Awaiting>,
}

/// The commands to the thread.
pub(super) enum Command {
    Start(Transfer),
    Forget(String),
    /// Something is about to happen: peers will ask for buckets of this rank.
    Stir,
    /// No update is under way: replace the agent, if that frees memory.
    Renew(tokio::sync::oneshot::Sender<()>),
    Close,
}

/// The handle of an agent's thread. Closed when dropped, without waiting; [`close`](Self::close) waits.
#[derive(Debug)]
pub(crate) struct Agent {
    commands: Sender<Command>,
    ended: tokio::sync::oneshot::Receiver<()>,
    pub(super) known: Arc<Known>,
}

/// State shared by an agent and those who pass on its card.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The agent's card, if none of its slots moves.
    pub(super) card: Mutex<Option<Arc<Card>>>,
    /// Whether the agent has asked a peer to write, so that slots may have to move.
    pub(super) moves: AtomicBool,
    /// Whether peers were told so.
    pub(super) told: AtomicBool,
    /// The number of slots whose memory is kept for peers that may still write to it.
    pub(super) retired: AtomicUsize,
}

impl Known {
    pub(super) fn card(&self) -> MutexGuard<'_, Option<Arc<Card>>> {
        self.card.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// Starts a thread, an agent on it, and registers the arena.
    pub(crate) async fn start(
        options: AgentOptions,
        name: String,
        arena: Arc<Arena>,
    ) -> Result<Self, NixlError> {
        let (commands, inbox) = channel();
        let known = Arc::<Known>::default();
        let (theirs, closing) = (known.clone(), commands.clone());
        // A thread that has ended needs no command.
        let close = move || drop(closing.send(Command::Close));
        let make = move || Worker::new(options, name, arena, theirs);
        let ended = thread::start(close, make, move |worker| worker.run(&inbox)).await?;
        Ok(Self { commands, ended, known })
    }

    /// The card, by which peers reach it. If it says that slots move, peers count as told from now on.
    pub(crate) fn card(&self) -> Result<Arc<Card>, NixlError> {
        let card = self.known.card().clone().ok_or(NixlError::Closed)?;
        Ok(if self.moves() { Arc::new(Card { moves: true, ..(*card).clone() }) } else { card })
    }

    /// Whether peers have to be told that slots move. If so, they count as told from now on.
    pub(super) fn moves(&self) -> bool {
        let possible = self.known.moves.load(Ordering::SeqCst);
        if possible {
            self.known.told.store(true, Ordering::SeqCst);
        }
        possible
    }

    /// Replaces the agent between updates by another one with another card, if memory is kept for peers that were given up, and the end of
    /// the agent's connections proves that they can no longer write. The memory is then used again.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the agent is no longer replaced.
    pub(crate) async fn renew(&self, limit: Duration) {
        if self.known.retired.load(Ordering::SeqCst) == 0 {
            return;
        }
        let (done, is_done) = tokio::sync::oneshot::channel();
        if self.commands.send(Command::Renew(done)).is_ok()
            && engine_core::clock::within(limit, is_done).await.is_none()
        {
            debug!("the agent has no time to be replaced");
        }
    }

    /// Starts a transfer. `done` is told its end.
    pub(crate) fn transfer(&self, transfer: Transfer) {
        if let Err(SendError(Command::Start(transfer))) =
            self.commands.send(Command::Start(transfer))
        {
            transfer.done.tell(Err(NixlError::Closed));
        }
    }

    /// Gives up all transfers with a peer, and forgets it.
    pub(crate) fn forget(&self, peer: &Card) {
        if self.commands.send(Command::Forget(peer.name.clone())).is_err() {
            debug!(peer = peer.name, "the agent has ended, and with it what it knew of a peer");
        }
    }

    /// Makes the agent poll more often for questions of peers, for a while.
    pub(crate) fn stir(&self) {
        if self.commands.send(Command::Stir).is_err() {
            debug!("the agent has ended, and serves nobody any more");
        }
    }

    /// Ends the thread. Transfers under way are given up, and the memory is deregistered.
    pub(crate) async fn close(&mut self) {
        self.begin_to_close();
        // The thread drops the sender when it has nothing left to do.
        drop((&mut self.ended).await);
    }

    fn begin_to_close(&self) {
        if self.commands.send(Command::Close).is_err() {
            debug!("the agent has ended before");
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.begin_to_close();
    }
}

//! The thread that owns an agent: its state and its loop.
//!
//! Its parts are in separate files. All of them are methods of [`Worker`].

mod end;
mod fetch;
mod give_up;
mod listen;
mod peers;
mod push;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use tracing::debug;

use super::handle::{Awaiting, Command, Known, Transfer};
use super::open::open;
use super::{AgentOptions, Card, Reach};
use crate::arena::{Arena, Lent, Slot};
use crate::error::NixlError;
use crate::ffi::{RawAgent, RawTransfer};
use crate::lent::{AskId, Retired};
use peers::Loaded;
use push::{Asked, Serving};

/// How often a transfer is polled without a pause: short ones end meanwhile.
const SPINS: u32 = 200;

/// The pause between two polls of a longer one.
const PAUSE: Duration = Duration::from_micros(30);

/// The longest pause between two polls for questions of peers, soon after something happened here.
const LISTEN: Duration = Duration::from_millis(5);

/// The state of the thread.
pub(super) struct Worker {
    agent: RawAgent,
    options: AgentOptions,
    arena: Arc<Arena>,
    reach: Reach,
    known: Arc<Known>,
    /// Whether a slot has moved before peers were told that slots may.
    stale: bool,
    /// Whether a peer has ever asked for something.
    asked: bool,
    /// When messages of peers were last polled.
    listened: Instant,
    /// The metadata of this agent and of all that it has registered.
    metadata: Vec<u8>,
    /// The peers that this agent knows how to reach, by name.
    loaded: HashMap<String, Loaded>,
    /// The peers to forget when no transfer with them is under way any more.
    closing: BTreeSet<String>,
    /// Transfers that have not begun. One is under way at a time: of two that share the way here, both would end late, and those who fetch
    /// the first one from here would wait for the second one, too.
    waiting: VecDeque<Transfer>,
    /// The transfer that is under way, and reads that nobody waits for any more but that the library still works on.
    active: Vec<Active>,
    /// The writes to peers that are under way.
    serving: Vec<Serving>,
    /// Requests of peers that wait until older writes to them have ended.
    postponed: Vec<Asked>,
    /// Counts questions, and loads of peers' metadata.
    count: u64,
    /// Memory that was lent to peers that were given up.
    retired: Retired,
    /// When something last happened to which others may react.
    stirred: Instant,
}

/// A transfer to this rank that is under way.
struct Active {
    work: Work,
    peer: Arc<Card>,
    /// The peer's slot.
    from: u32,
    until: Instant,
    deadline: Duration,
    /// `None` once it was told the end.
    done: Option<Box<dyn Awaiting>>,
}

/// The work that a transfer waits for.
enum Work {
    /// The slot comes back when the library reports that the transfer has ended.
    Read(RawTransfer<Slot>),
    /// A read failed, so the peer is probed. A write target is given only to a peer that answers: a target given to a dead peer would have
    /// to be replaced.
    Greeted(AskId, Slot),
    /// The peer was asked to write.
    Asked(Lent),
}

impl Active {
    fn fail(&mut self, error: NixlError) {
        if let Some(done) = self.done.take() {
            done.tell(Err(error));
        }
    }
}

impl Worker {
    pub(super) fn new(
        options: AgentOptions,
        name: String,
        arena: Arc<Arena>,
        known: Arc<Known>,
    ) -> Result<Self, NixlError> {
        let (agent, card) = open(&options, name, &arena, Vec::new())?;
        let reach = Reach::new(&options, arena.device().is_some());
        known.moves.store(options.writes || reach.reads_nobody(), Ordering::SeqCst);
        let metadata = card.metadata.clone();
        *known.card() = Some(Arc::new(card));
        let most = 2 * arena.slots() as usize;
        Ok(Self {
            agent,
            options,
            arena,
            reach,
            known,
            stale: false,
            asked: false,
            listened: Instant::now(),
            metadata,
            loaded: HashMap::new(),
            closing: BTreeSet::new(),
            waiting: VecDeque::new(),
            active: Vec::new(),
            serving: Vec::new(),
            postponed: Vec::new(),
            count: 0,
            retired: Retired::new(most),
            stirred: Instant::now(),
        })
    }

    pub(super) fn run(mut self, inbox: &Receiver<Command>) {
        let mut idle = 0;
        loop {
            let busy = self.is_busy();
            let command = if busy && idle < SPINS {
                std::thread::yield_now();
                inbox.try_recv().map_err(|error| match error {
                    TryRecvError::Empty => RecvTimeoutError::Timeout,
                    TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                })
            } else if busy {
                inbox.recv_timeout(PAUSE)
            } else {
                idle = 0;
                inbox.recv_timeout(self.pause())
            };
            idle += 1;
            match command {
                Ok(Command::Start(transfer)) => {
                    idle = 0;
                    self.waiting.push_back(transfer);
                }
                Ok(Command::Forget(peer)) => self.forget(&peer),
                Ok(Command::Stir) => self.stirred = Instant::now(),
                Ok(Command::Renew(done)) => self.renew(done),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Command::Close) | Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.poll() {
                idle = 0;
            }
            while self.active.iter().all(|transfer| transfer.done.is_none())
                && let Some(transfer) = self.waiting.pop_front()
            {
                self.start(transfer);
            }
        }
        self.close();
    }

    /// Whether something is under way that somebody waits for.
    fn is_busy(&self) -> bool {
        let now = Instant::now();
        self.active.iter().any(|transfer| transfer.done.is_some())
            || self.serving.iter().any(|serving| now < serving.until)
    }

    /// Checks all transfers. Returns whether anything ended or arrived.
    pub(super) fn poll(&mut self) -> bool {
        let now = Instant::now();
        let listens = self.serves() || now - self.listened >= LISTEN;
        let heard = listens && self.listen();
        let served = self.serve();
        let mut ended = false;
        let mut broken = Vec::new();
        let mut again = Vec::new();
        let mut at = 0;
        while let Some(transfer) = self.active.get_mut(at) {
            let Work::Read(raw) = &transfer.work else {
                if now >= transfer.until {
                    let error = NixlError::Slow(transfer.deadline);
                    let transfer = self.active.swap_remove(at);
                    broken.push(transfer.peer.name.clone());
                    self.give_up(transfer, error);
                } else {
                    at += 1;
                }
                continue;
            };
            let result = match self.agent.is_done(raw) {
                Ok(false) => {
                    if transfer.done.is_some() && now >= transfer.until {
                        broken.push(transfer.peer.name.clone());
                        let error = NixlError::Slow(transfer.deadline);
                        Self::let_linger(&self.arena, transfer, error);
                    }
                    at += 1;
                    continue;
                }
                Ok(true) => Ok(()),
                Err(error) => Err(error),
            };
            let Active { work, peer, from, until, deadline, done } = self.active.swap_remove(at);
            let Work::Read(raw) = work else { continue };
            let slot = match self.agent.end(raw) {
                Ok(slot) => slot,
                // It was not done when the freeing thread checked, but is now.
                Err(raw) => {
                    let work = Work::Read(raw);
                    self.active.push(Active { work, peer, from, until, deadline, done });
                    break;
                }
            };
            ended = true;
            match (result, done) {
                (Ok(()), done) => {
                    self.reach.decide(&peer.name, true);
                    if let Some(done) = done {
                        done.tell(Ok(slot));
                    }
                }
                (Err(error), Some(done)) => {
                    again.push((Transfer { slot, peer, from, deadline, done }, until, error));
                }
                (Err(error), None) => {
                    debug!(peer = peer.name, %error, "a transfer that was given up")
                }
            }
        }
        for peer in broken {
            self.forget(&peer);
        }
        for (transfer, until, error) in again {
            self.try_again(transfer, until, error);
        }
        self.close_connections();
        heard || served || ended
    }

    /// Whether peers may ask for buckets of this rank.
    fn serves(&self) -> bool {
        self.options.writes || self.asked || !self.serving.is_empty() || self.awaits_peers()
    }

    fn awaits_peers(&self) -> bool {
        self.active.iter().any(|transfer| !matches!(transfer.work, Work::Read(_)))
    }

    /// How long to sleep when there is nothing to do: peers may ask at any time, above all soon after something happened here.
    fn pause(&self) -> Duration {
        let quiet = self.stirred.elapsed();
        if !self.serves() {
            // Nobody has asked yet.
            if quiet < Duration::from_secs(1) { LISTEN } else { 4 * LISTEN }
        } else if quiet < Duration::from_millis(20) {
            PAUSE
        } else if quiet < Duration::from_secs(1) {
            Duration::from_micros(250)
        } else {
            LISTEN
        }
    }
}

#[cfg(test)]
mod tests;

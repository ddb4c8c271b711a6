//! The thread of a rollout that owns the agent over what is lent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use engine_core::Rank;
use tracing::{debug, info, warn};

use super::IDLE;
use super::lease::Lease;
use super::notice::{Offer, OfferedPart, ToLender, ToWriter};
use super::peers::Peers;
use crate::agent::{AgentOptions, Reach, open_with};
use crate::arena::Memory;
use crate::error::NixlError;
use crate::ffi::RawAgent;
use crate::lent::Process;

/// The pause between two looks while trainers write: over TCP their bytes arrive by them.
const WRITTEN: Duration = Duration::from_micros(30);

/// The pause while trainers may come.
const EXPECTED: Duration = Duration::from_micros(250);

/// The pause between two looks whether a trainer's process is gone.
const WATCHED: Duration = Duration::from_millis(5);

/// How long a trainer has at most to let go, once the memory is to be taken back, before this rank's agent is ended.
const GRACE: Duration = Duration::from_secs(1);

/// The commands to the thread.
pub(super) enum Command {
    /// Lend the memory. There is no lease.
    Lend(SyncSender<Result<Offer, NixlError>>),
    /// Grant no more, and say when nobody can write any more.
    TakeBack,
    Close,
}

/// The state of the thread.
pub(super) struct Keeper {
    options: AgentOptions,
    name: String,
    parts: Vec<(OfferedPart, Memory)>,
    /// `None` after an agent has ended and no other one could be made.
    agent: Option<Open>,
    /// Counts agents.
    agents: u64,
    reach: Reach,
    lease: Option<Lease>,
    /// The number of the last lease.
    leases: u64,
    /// Whether nobody can write since the last lease.
    over: Arc<AtomicBool>,
    grace: Duration,
    /// When it was last looked whether trainers that have not let go can still write.
    watched: Instant,
    /// Whether it was said of this lease that trainers are waited for.
    has_warned: bool,
}

/// An agent that is open.
struct Open {
    raw: RawAgent,
    name: String,
    metadata: Vec<u8>,
    peers: Peers,
}

impl Keeper {
    pub(super) fn new(
        options: AgentOptions,
        name: String,
        parts: Vec<(OfferedPart, Memory)>,
        over: Arc<AtomicBool>,
        deadline: Duration,
    ) -> Result<Self, NixlError> {
        let mut this = Self {
            reach: Reach::new(&options, false),
            options,
            name,
            parts,
            agent: None,
            agents: 0,
            lease: None,
            leases: 0,
            over,
            grace: GRACE.min(deadline / 8),
            watched: Instant::now(),
            has_warned: false,
        };
        this.open()?;
        Ok(this)
    }

    /// Makes an agent that has registered the memory, if there is none.
    fn open(&mut self) -> Result<&Open, NixlError> {
        let open = match self.agent.take() {
            Some(open) => open,
            None => {
                self.agents += 1;
                let name = format!("{}+{}", self.name, self.agents);
                let memory = self.parts.iter().map(|(_, memory)| memory.clone()).collect();
                let (raw, metadata) = open_with(&self.options, &name, memory)?;
                Open { raw, name, metadata, peers: Peers::default() }
            }
        };
        Ok(self.agent.insert(open))
    }

    pub(super) fn run(mut self, inbox: &Receiver<Command>) {
        loop {
            match inbox.recv_timeout(self.pause()) {
                Ok(Command::Lend(told)) => self.lend(&told),
                Ok(Command::TakeBack) => self.take_back(),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Command::Close) | Err(RecvTimeoutError::Disconnected) => break,
            }
            self.poll();
        }
        self.close();
    }

    fn pause(&self) -> Duration {
        match &self.lease {
            None => IDLE,
            Some(lease) if lease.has_holders() => WRITTEN,
            Some(_) => EXPECTED,
        }
    }

    fn lend(&mut self, told: &SyncSender<Result<Offer, NixlError>>) {
        self.leases += 1;
        let lease = self.leases;
        let parts = self.parts.iter().map(|(part, _)| *part).collect();
        // All of it is on one device.
        let device = self.parts.first().and_then(|(_, memory)| memory.device());
        let offer = self.open().map(|open| Offer {
            agent: open.name.clone(),
            metadata: open.metadata.clone(),
            lease,
            device,
            parts,
        });
        match &offer {
            Ok(_) => {
                self.lease = Some(Lease::new(lease));
                self.has_warned = false;
            }
            Err(_) => self.over.store(true, Ordering::Release),
        }
        // If nobody waits any more, it is taken back.
        drop(told.send(offer));
    }

    fn take_back(&mut self) {
        if let Some(lease) = &mut self.lease {
            lease.close(Instant::now());
        }
    }

    /// Processes what trainers say, and ends a lease that is over.
    fn poll(&mut self) {
        self.listen();
        let Some(lease) = &mut self.lease else { return };
        if lease.is_closed() && lease.has_holders() && self.watched.elapsed() >= WATCHED {
            self.watched = Instant::now();
            if lease.is_overdue(self.watched, self.grace) && !lease.is_over_with_agent() {
                if !std::mem::replace(&mut self.has_warned, true) {
                    let holders: Vec<&str> = lease.holders().collect();
                    warn!(
                        ?holders,
                        "trainers of this host have not let go of lent memory, and may write without a connection: it is waited for the end \
                         of their processes, which can be seen in the PID namespace of this one only. With the transports `tcp,self` here, \
                         their connections would be closed instead"
                    );
                }
            } else if lease.is_overdue(self.watched, self.grace) {
                let begun = Instant::now();
                let holders: Vec<String> = lease.holders().map(str::to_owned).collect();
                // With its connections.
                self.agent = None;
                lease.agent_ended();
                info!(
                    ?holders,
                    seconds = begun.elapsed().as_secs_f64(),
                    "trainers have not let go of lent memory: this rank's connections were closed, so that they cannot write"
                );
            }
        }
        if lease.is_over() {
            self.lease = None;
            self.over.store(true, Ordering::Release);
            // Opened now, not when the next update waits for it.
            if let Err(error) = self.open() {
                warn!(%error, "an agent could not be replaced by another one");
            }
        }
    }

    fn listen(&mut self) {
        let Some(open) = &mut self.agent else { return };
        let notices = match open.raw.notices() {
            Ok(notices) => notices,
            Err(error) => return warn!(%error, "messages of trainers cannot be taken in"),
        };
        for (agent, bytes) in notices {
            match postcard::from_bytes::<ToLender>(&bytes) {
                Ok(ToLender::Accept { lease, rank, metadata, host, process }) => {
                    self.accept(&agent, lease, rank, &metadata, &host, process.as_ref());
                }
                Ok(ToLender::LetGo { lease }) => {
                    if let Some(present) = &mut self.lease {
                        present.let_go(lease, &agent);
                    }
                }
                Err(error) => warn!(agent, %error, "a trainer's message cannot be read"),
            }
        }
    }

    fn accept(
        &mut self,
        agent: &str,
        lease: u64,
        rank: Rank,
        metadata: &[u8],
        host: &str,
        process: Option<&Process>,
    ) {
        let Some(open) = &mut self.agent else { return };
        // A trainer that cannot be told of the grant does not begin.
        if let Err(error) = open.peers.know(&open.raw, rank, agent, metadata) {
            return warn!(agent, %rank, %error, "a trainer that wants to write cannot be answered");
        }
        let writer = self.reach.writer(host, process);
        let granted =
            self.lease.as_mut().is_some_and(|present| present.accept(lease, agent, writer));
        let answer = match granted {
            true => ToWriter::Granted { lease },
            false => ToWriter::Refused { lease },
        };
        debug!(agent, %rank, lease, granted, "a trainer wants to write");
        let said = postcard::to_stdvec(&answer).map_err(NixlError::Card);
        if let Err(error) = said.and_then(|answer| open.raw.notify(agent, &answer)) {
            // It may have been told all the same, so that it counts as one that writes.
            warn!(agent, %rank, %error, "a trainer that wants to write cannot be answered");
        }
    }

    fn close(mut self) {
        self.take_back();
        let until = Instant::now() + self.grace;
        while self.lease.as_ref().is_some_and(Lease::has_holders) && Instant::now() < until {
            self.listen();
            std::thread::sleep(WRITTEN);
        }
        self.agent = None;
        if let Some(lease) = &mut self.lease {
            lease.agent_ended();
            if lease.has_holders() {
                // A trainer on this host that was stopped as it wrote goes on with it when it continues. It must not find other data at the
                // address.
                warn!("memory that a trainer may still write to is kept for ever");
                self.parts.into_iter().for_each(|(_, memory)| std::mem::forget(memory));
                return;
            }
        }
        self.over.store(true, Ordering::Release);
    }
}

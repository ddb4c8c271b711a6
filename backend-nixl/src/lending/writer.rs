//! The thread of a trainer that owns the agent which writes to what rollouts lend.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use engine_core::{Error, ErrorReport, Rank, Result};
use placed::Parts;
use tracing::{debug, info, warn};

use super::IDLE;
use super::notice::{Offer, ToLender, ToWriter};
use super::parcel::Parcel;
use super::peers::Peers;
use super::staging::{LOOK, Staging};
use crate::agent::{AgentOptions, open_with, this_host};
use crate::arena::Memory;
use crate::engine::unique_name;
use crate::error::NixlError;
use crate::ffi::{NotStarted, RawAgent, RawTransfer};
use crate::lent::Process;

/// How often writes are polled without a pause: short ones end meanwhile.
const SPINS: u32 = 200;

/// The pause between two polls of longer ones.
const PAUSE: Duration = Duration::from_micros(30);

/// How long the end of the agent waits for writes under way.
const GRACE: Duration = Duration::from_secs(1);

/// The first error of writing to any of the rollouts that are reached together: it fails the update on all.
pub(super) type Failure = OnceLock<ErrorReport>;

/// The commands to the thread.
pub(super) enum Command {
    /// Accept the leases of rollouts, each with the metadata of its agent, and say when all are granted.
    Reach {
        offers: Vec<(Arc<Target>, Vec<u8>)>,
        /// The end of waiting.
        until: Instant,
        told: SyncSender<Result<()>>,
    },
    /// Write it, which counts as begun.
    Write(Arc<Target>, Parcel),
    /// Register memory that is written from.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only devices need more"))]
    Register(Memory, SyncSender<Result<(), NixlError>>),
    /// Nothing more is put there.
    LetGo(Arc<Target>),
    Close,
}

/// A rollout's memory in one update, as this trainer reaches it.
#[derive(Debug)]
pub(super) struct Target {
    rank: Rank,
    agent: String,
    lease: u64,
    /// The address of each part, in the rollout's process.
    parts: Parts<usize>,
    /// The number of the device that they are on, there; `None` for host memory.
    device: Option<u32>,
    failure: Arc<Failure>,
    writes: Mutex<Writes>,
    changed: Condvar,
}

/// The writes of a target: how many are under way, and how many have ended.
#[derive(Clone, Copy, Debug, Default)]
struct Writes {
    under_way: u64,
    ended: u64,
}

impl Target {
    /// # Errors
    ///
    /// `Protocol`, which names the rank, for parts that no memory has.
    pub(super) fn new(rank: Rank, offer: &Offer, failure: Arc<Failure>) -> Result<Self> {
        let wrong = || Error::from(NixlError::Offer).rank(rank);
        let parts = offer.parts.iter().map(|part| {
            let all = part.address.checked_add(part.bytes).zip(part.at.checked_add(part.bytes));
            let (end, _) = all.ok_or_else(wrong)?;
            usize::try_from(end).map_err(|_| wrong())?;
            Ok((part.at, part.bytes, part.address as usize))
        });
        let parts = Parts::new(parts.collect::<Result<Vec<_>>>()?);
        let (writes, changed) = (Mutex::default(), Condvar::new());
        let (agent, lease, device) = (offer.agent.clone(), offer.lease, offer.device);
        Ok(Self { rank, agent, lease, parts, device, failure, writes, changed })
    }

    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    pub(super) fn parts(&self) -> &Parts<usize> {
        &self.parts
    }

    pub(super) fn is_on_device(&self) -> bool {
        self.device.is_some()
    }

    /// # Errors
    ///
    /// The first of writing to any of those that are reached together.
    pub(super) fn check(&self) -> Result<()> {
        self.failure.get().map_or(Ok(()), |error| Err(error.clone().into()))
    }

    /// Fails the update, unless it has failed.
    pub(super) fn fail(&self, error: NixlError) {
        let error = Error::from(error).rank(self.rank);
        if self.failure.set((&error).into()).is_ok() {
            warn!(rank = %self.rank, %error, "a rollout's tensors could not be written");
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Writes> {
        // Each change is complete before anything can panic.
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write is about to begin.
    pub(super) fn begun(&self) {
        self.lock().under_way += 1;
    }

    fn ended(&self) {
        let mut writes = self.lock();
        writes.under_way = writes.under_way.saturating_sub(1);
        writes.ended += 1;
        drop(writes);
        self.changed.notify_all();
    }

    /// Waits until no write is under way, as long as one ends within `limit`.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check); `Slow`, which names the rank.
    pub(super) fn wait(&self, limit: Duration) -> Result<()> {
        let mut writes = self.lock();
        let (mut ended, mut since) = (writes.ended, Instant::now());
        loop {
            self.check()?;
            if writes.under_way == 0 {
                return Ok(());
            }
            if std::mem::replace(&mut ended, writes.ended) != ended {
                since = Instant::now();
            } else if since.elapsed() >= limit {
                return Err(Error::from(NixlError::Slow(limit)).rank(self.rank));
            }
            let waited = self.changed.wait_timeout(writes, LOOK);
            writes = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The state of the thread.
pub(super) struct Writer {
    options: AgentOptions,
    rank: Rank,
    staging: Arc<Staging>,
    /// What is written from.
    memory: Vec<Memory>,
    limit: Duration,
    /// `None` after an agent has ended and no other one could be made.
    agent: Option<Open>,
    /// Whether something has failed that connections do not survive: the next update has another agent.
    is_worn: bool,
    /// The leases that were accepted and not let go of.
    leases: Vec<Accepted>,
    reaching: Option<Reaching>,
    active: Vec<Active>,
}

/// An agent that is open.
struct Open {
    raw: RawAgent,
    metadata: Vec<u8>,
    peers: Peers,
}

/// A lease that a rollout was asked for.
struct Accepted {
    target: Arc<Target>,
    granted: bool,
    /// Whether a write has failed or was given up: its bytes may arrive at any time, so that this is never let go of.
    is_broken: bool,
    /// Whether nothing more is put.
    is_leaving: bool,
    /// When a write last began or ended.
    moved: Instant,
}

/// Somebody waits for grants.
struct Reaching {
    told: SyncSender<Result<()>>,
    until: Instant,
}

/// A write under way.
struct Active {
    raw: RawTransfer<Parcel>,
    target: Arc<Target>,
}

impl Writer {
    pub(super) fn new(
        options: AgentOptions,
        rank: Rank,
        staging: Arc<Staging>,
        memory: Vec<Memory>,
        limit: Duration,
    ) -> Result<Self, NixlError> {
        let mut this = Self {
            options,
            rank,
            staging,
            memory,
            limit,
            agent: None,
            is_worn: false,
            leases: Vec::new(),
            reaching: None,
            active: Vec::new(),
        };
        this.open()?;
        Ok(this)
    }

    /// Makes an agent, if there is none.
    fn open(&mut self) -> Result<&mut Open, NixlError> {
        let open = match self.agent.take() {
            Some(open) => open,
            None => {
                // Nobody writes any more from what only this thread has.
                self.memory.retain(Memory::is_shared);
                let name = unique_name(self.rank);
                let (raw, metadata) = open_with(&self.options, &name, self.memory.clone())?;
                Open { raw, metadata, peers: Peers::default() }
            }
        };
        Ok(self.agent.insert(open))
    }

    pub(super) fn run(mut self, inbox: &Receiver<Command>) {
        let mut idle = 0;
        loop {
            let is_busy = self.reaching.is_some() || !self.active.is_empty();
            let mut command = if is_busy && idle < SPINS {
                std::thread::yield_now();
                inbox.try_recv()
            } else {
                let pause = if is_busy { PAUSE } else { IDLE };
                inbox.recv_timeout(pause).map_err(|error| match error {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                })
            };
            idle += 1;
            loop {
                match command {
                    Ok(Command::Reach { offers, until, told }) => self.reach(offers, until, told),
                    Ok(Command::Write(target, parcel)) => self.write(target, parcel),
                    Ok(Command::Register(memory, told)) => {
                        // If nobody waits any more, it stays registered as long as the agent.
                        drop(told.send(self.register(memory)));
                    }
                    Ok(Command::LetGo(target)) => self.leave(&target),
                    Err(TryRecvError::Empty) => break,
                    Ok(Command::Close) | Err(TryRecvError::Disconnected) => return self.close(),
                }
                idle = 0;
                command = inbox.try_recv();
            }
            if self.poll() {
                idle = 0;
            }
        }
    }

    fn reach(
        &mut self,
        offers: Vec<(Arc<Target>, Vec<u8>)>,
        until: Instant,
        told: SyncSender<Result<()>>,
    ) {
        // Whoever waited before waits no more: updates take turns.
        self.reaching = None;
        // A peer that is under way must not be forgotten.
        self.is_worn |= !self.active.is_empty();
        if !self.options.reaches_devices && offers.iter().any(|(target, _)| target.is_on_device()) {
            self.options.reaches_devices = true;
            self.is_worn = true;
        }
        if let Err(error) = self.renew() {
            return drop(told.send(Err(error.into())));
        }
        for (target, metadata) in offers {
            if let Err(error) = self.accept(&target, &metadata) {
                self.is_worn = true;
                return drop(told.send(Err(Error::from(error).rank(target.rank))));
            }
            let moved = Instant::now();
            let (granted, is_broken, is_leaving) = (false, false, false);
            self.leases.push(Accepted { target, granted, is_broken, is_leaving, moved });
        }
        self.reaching = Some(Reaching { told, until });
        self.say_reached();
    }

    fn accept(&mut self, target: &Target, metadata: &[u8]) -> Result<(), NixlError> {
        let rank = self.rank;
        let open = self.open()?;
        open.peers.know(&open.raw, target.rank, &target.agent, metadata)?;
        let accept = ToLender::Accept {
            lease: target.lease,
            rank,
            metadata: open.metadata.clone(),
            host: this_host(),
            process: Process::this(),
        };
        open.raw.notify(&target.agent, &postcard::to_stdvec(&accept).map_err(NixlError::Card)?)
    }

    /// Says that all is reached, if it is.
    fn say_reached(&mut self) {
        let all = self.leases.iter().all(|lease| lease.granted || lease.is_leaving);
        if all && let Some(reaching) = self.reaching.take() {
            // If nobody waits any more, the memory is let go of.
            drop(reaching.told.send(Ok(())));
        }
    }

    fn say_unreached(&mut self, error: NixlError, rank: Rank) {
        if let Some(reaching) = self.reaching.take() {
            drop(reaching.told.send(Err(Error::from(error).rank(rank))));
        }
    }

    /// Registers more memory that is written from.
    fn register(&mut self, memory: Memory) -> Result<(), NixlError> {
        self.memory.push(memory.clone());
        match &mut self.agent {
            Some(open) => open.raw.register(memory),
            // The next agent does.
            None => Ok(()),
        }
    }

    /// Gives back the memory of what is not written any more.
    fn give(&self, parcel: Parcel) {
        match parcel {
            Parcel::Gathered(staged) => self.staging.give(staged),
            Parcel::Encoded(encoded) => drop(encoded),
        }
    }

    fn write(&mut self, target: Arc<Target>, parcel: Parcel) {
        let lease = self.leases.iter_mut().find(|lease| Arc::ptr_eq(&lease.target, &target));
        let fit = lease.filter(|lease| lease.granted && !lease.is_broken);
        // After a failure of any, the update has failed.
        let (Some(lease), Some(open), Ok(())) = (fit, &self.agent, target.check()) else {
            target.fail(NixlError::Abandoned);
            self.give(parcel);
            return target.ended();
        };
        match open.raw.write_parcel(&target.agent, parcel, target.device) {
            Ok(raw) => {
                if !self.active.iter().any(|active| Arc::ptr_eq(&active.target, &target)) {
                    lease.moved = Instant::now();
                }
                self.active.push(Active { raw, target });
            }
            Err(NotStarted { error, memory, unmoved }) => {
                lease.is_broken |= !unmoved;
                self.is_worn = true;
                target.fail(error);
                self.give(memory);
                target.ended();
            }
        }
    }

    /// Looks at all writes, and at what rollouts say. Returns whether anything ended or arrived.
    fn poll(&mut self) -> bool {
        let heard = self.listen();
        let ended = self.serve();
        let now = Instant::now();
        if let Some(reaching) = &self.reaching
            && now >= reaching.until
        {
            let late = self.leases.iter().find(|lease| !lease.granted && !lease.is_leaving);
            let rank = late.map_or(self.rank, |lease| lease.target.rank);
            self.is_worn = true;
            self.say_unreached(NixlError::Slow(self.limit), rank);
        }
        for lease in &mut self.leases {
            let is_slow = !lease.is_broken && now - lease.moved >= self.limit;
            let is_its = |active: &Active| Arc::ptr_eq(&active.target, &lease.target);
            if is_slow && self.active.iter().any(is_its) {
                // The writes stay until they end, and their blocks with them.
                lease.is_broken = true;
                self.is_worn = true;
                lease.target.fail(NixlError::Slow(self.limit));
            }
        }
        self.let_go();
        heard || ended
    }

    fn listen(&mut self) -> bool {
        let Some(open) = &mut self.agent else { return false };
        let notices = match open.raw.notices() {
            Ok(notices) => notices,
            Err(error) => {
                warn!(%error, "messages of rollouts cannot be taken in");
                return false;
            }
        };
        let heard = !notices.is_empty();
        for (agent, bytes) in notices {
            match postcard::from_bytes::<ToWriter>(&bytes) {
                Ok(answer) => self.hear(&agent, &answer),
                Err(error) => warn!(agent, %error, "a rollout's message cannot be read"),
            }
        }
        if heard {
            self.say_reached();
        }
        heard
    }

    fn hear(&mut self, agent: &str, answer: &ToWriter) {
        let (ToWriter::Granted { lease } | ToWriter::Refused { lease }) = *answer;
        let is_it = |one: &Accepted| one.target.agent == agent && one.target.lease == lease;
        let found = self.leases.iter().position(is_it);
        match (answer, found) {
            (ToWriter::Granted { .. }, Some(at)) => self.leases[at].granted = true,
            // Nobody waits for it any more.
            (ToWriter::Granted { .. }, None) => self.say_let_go(agent, lease),
            (ToWriter::Refused { .. }, Some(at)) => {
                let rank = self.leases.swap_remove(at).target.rank;
                self.say_unreached(NixlError::Withdrawn, rank);
            }
            (ToWriter::Refused { .. }, None) => {}
        }
    }

    /// Ends writes that have ended. Returns whether there were any.
    fn serve(&mut self) -> bool {
        let Some(open) = &self.agent else { return false };
        let mut any = false;
        let mut at = 0;
        while let Some(active) = self.active.get(at) {
            let failed = match open.raw.is_done(&active.raw) {
                Ok(false) => {
                    at += 1;
                    continue;
                }
                Ok(true) => None,
                Err(error) => Some(error),
            };
            let Active { raw, target } = self.active.swap_remove(at);
            let parcel = match open.raw.end(raw) {
                Ok(parcel) => parcel,
                // It was not done when the freeing call looked.
                Err(raw) => {
                    self.active.push(Active { raw, target });
                    break;
                }
            };
            any = true;
            let lease = self.leases.iter_mut().find(|lease| Arc::ptr_eq(&lease.target, &target));
            if let Some(lease) = lease {
                lease.moved = Instant::now();
                lease.is_broken |= failed.is_some();
            }
            if let Some(error) = failed {
                // Bytes on their way may still arrive.
                self.is_worn = true;
                target.fail(error);
            }
            self.give(parcel);
            target.ended();
        }
        any
    }

    /// Nothing more is put to a target.
    fn leave(&mut self, target: &Arc<Target>) {
        let lease = self.leases.iter_mut().find(|lease| Arc::ptr_eq(&lease.target, target));
        if let Some(lease) = lease {
            lease.is_leaving = true;
        }
    }

    /// Lets go of what nothing more is put to, once all writes there have ended.
    fn let_go(&mut self) {
        if !self.leases.iter().any(|lease| lease.is_leaving) {
            return;
        }
        let busy: HashSet<_> =
            self.active.iter().map(|active| Arc::as_ptr(&active.target)).collect();
        let over = self.leases.extract_if(.., |lease| {
            lease.is_leaving && !busy.contains(&Arc::as_ptr(&lease.target))
        });
        let over: Vec<Accepted> = over.collect();
        for Accepted { target, granted, is_broken, .. } in over {
            // One that is not granted yet is let go of when it is. What is broken the rollout takes back by itself.
            if granted && !is_broken {
                self.say_let_go(&target.agent, target.lease);
            }
        }
    }

    fn say_let_go(&mut self, agent: &str, lease: u64) {
        let Some(open) = &self.agent else { return };
        let said = postcard::to_stdvec(&ToLender::LetGo { lease }).map_err(NixlError::Card);
        if let Err(error) = said.and_then(|said| open.raw.notify(agent, &said)) {
            debug!(agent, %error, "a rollout could not be told that its memory was let go of");
            self.is_worn = true;
        }
    }

    /// Replaces the agent if it is worn, and with it all that is left of updates before.
    fn renew(&mut self) -> Result<(), NixlError> {
        if self.is_worn {
            self.end();
            self.is_worn = false;
            info!("an agent whose peers have failed is replaced by another one");
        }
        self.open().map(drop)
    }

    /// Ends the agent. Nothing is said to rollouts: what was under way to them may still arrive.
    fn end(&mut self) {
        let (raws, targets): (Vec<_>, Vec<_>) =
            self.active.drain(..).map(|active| (active.raw, active.target)).unzip();
        if let Some(open) = self.agent.take() {
            for parcel in open.raw.close(raws, Vec::new()) {
                self.give(parcel);
            }
        }
        for target in targets {
            target.fail(NixlError::Abandoned);
            target.ended();
        }
        self.leases.clear();
    }

    fn close(mut self) {
        self.say_unreached(NixlError::Closed, self.rank);
        let until = Instant::now() + GRACE;
        self.leases.iter_mut().for_each(|lease| lease.is_leaving = true);
        while !self.leases.is_empty() && Instant::now() < until {
            self.poll();
            std::thread::sleep(PAUSE);
        }
        self.end();
    }
}

#[cfg(test)]
mod tests;

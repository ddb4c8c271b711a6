//! A rank's agent: one thread that has it, and the handle of that thread.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use engine_core::{Rank, Role, WorkerMetadata};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::NAME;
use crate::arena::{Arena, Memory, Slot};
use crate::error::NixlError;
use crate::ffi::{ENGINE_CONFIG, RawAgent, RawTransfer, Way};
use crate::sys;

/// How often a transfer is looked at without a pause: short ones end meanwhile.
const SPINS: u32 = 200;
/// The pause between two looks at a longer one.
const PAUSE: Duration = Duration::from_micros(30);
/// The longest pause between two looks for what peers ask for, soon after something happened here.
const LISTEN: Duration = Duration::from_millis(5);
/// How long the end of an agent waits for peers that write here.
const GRACE: Duration = Duration::from_secs(1);

/// What peers need to reach an agent and its slots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Card {
    /// The agent's name, which no other agent has or had.
    pub(crate) name: String,
    /// NIXL's own description of it.
    pub(crate) metadata: Vec<u8>,
    /// Where the slots begin in its memory.
    pub(crate) address: u64,
    pub(crate) slots: u32,
    pub(crate) slot_bytes: u64,
    /// The number of the CUDA device that they are on; `None` for host memory.
    pub(crate) device: Option<u32>,
    /// The host's identity.
    pub(crate) host: String,
    /// Whether a slot may be elsewhere than the address says, because a peer that had been asked to write
    /// to it was given up. Only the agent itself knows where it is then.
    pub(crate) moves: bool,
}

impl Card {
    /// Where the first bytes of a slot are: address and length.
    pub(crate) fn range(&self, slot: u32, filled: u64) -> Result<(usize, usize), NixlError> {
        let (slots, bytes) = (self.slots, self.slot_bytes);
        let outside = NixlError::Outside { slot, filled, slots, bytes };
        if slot >= slots || filled > bytes {
            return Err(outside);
        }
        let at = u64::from(slot).checked_mul(bytes).and_then(|at| at.checked_add(self.address));
        match at.and_then(|at| usize::try_from(at).ok()) {
            Some(at) => Ok((at, filled as usize)),
            None => Err(outside),
        }
    }
}

/// How an agent reaches others.
#[derive(Clone, Debug, Default)]
pub(crate) struct AgentOptions {
    /// The folder of NIXL's library, if it is not to be searched for.
    pub(crate) library_dir: Option<PathBuf>,
    /// UCX's transports, in UCX's words; all that are there if it is empty.
    pub(crate) transports: String,
    /// UCX's way with failures of peers: `peer` notices them.
    pub(crate) error_handling: &'static str,
    /// Whether agents that have bytes write them in any case, and not only where those that want them
    /// cannot read them. The same for all agents of a group.
    pub(crate) writes: bool,
    /// Whether NIXL looks after transfers and peers in a thread of its own as well. An agent of memory of a
    /// device always has one: transports may be emulated there, so that peers have to be answered.
    pub(crate) own_thread: bool,
}

/// From whom an agent can read, as far as that is certain: before it is tried, and after.
#[derive(Debug)]
pub(crate) struct Reach {
    /// Whether there is nothing but TCP.
    only_tcp: bool,
    /// Whether there is nothing but TCP between hosts.
    only_tcp_between_hosts: bool,
    host: String,
    /// Whether UCX emulates what its transports cannot do: for memory of devices.
    emulates: bool,
    /// Whether an agent can be read from, as was found out, by its name.
    decided: HashMap<String, bool>,
}

impl Reach {
    pub(crate) fn new(options: &AgentOptions, arena: &Arena) -> Self {
        // NIXL prefers the variable as well.
        let transports = std::env::var("UCX_TLS").unwrap_or_else(|_| options.transports.clone());
        Self {
            only_tcp: transports.split(',').all(|name| matches!(name, "tcp" | "self")),
            only_tcp_between_hosts: sys::infiniband_devices().is_empty(),
            host: this_host(),
            emulates: arena.device().is_some(),
            decided: HashMap::new(),
        }
    }

    /// Whether it is certain that an agent cannot be read from.
    pub(crate) fn excludes(&self, peer: &Card) -> bool {
        let only_tcp = self.only_tcp || (self.only_tcp_between_hosts && peer.host != self.host);
        let known = only_tcp && !self.emulates && peer.device.is_none();
        known || self.decided.get(&peer.name) == Some(&false)
    }

    /// Whether nothing was found out of an agent. One that could be read from once, and cannot be any more,
    /// is gone.
    fn is_undecided(&self, peer: &str) -> bool {
        !self.decided.contains_key(peer)
    }

    /// Takes note of whether an agent can be read from.
    fn decide(&mut self, peer: &str, readable: bool) {
        if self.is_undecided(peer) {
            self.decided.insert(peer.to_owned(), readable);
        }
    }

    /// Whether it is certain that no memory of a host can be read.
    fn reads_nobody(&self) -> bool {
        self.only_tcp && !self.emulates
    }
}

fn this_host() -> String {
    let nothing = serde_json::Value::Null;
    WorkerMetadata::of_this_process(NAME, Rank::LEADER, Role::Rollout, nothing).host
}

/// Who waits for a transfer.
pub(crate) trait Awaiting: Send {
    /// Whether it still does.
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

enum Command {
    Start(Transfer),
    Forget(String),
    /// Something is about to happen: peers will ask for what this rank has.
    Stir,
    Close,
}

/// The handle of an agent's thread. Closed when dropped, without waiting; [`close`](Self::close) waits.
#[derive(Debug)]
pub(crate) struct Agent {
    commands: Sender<Command>,
    ended: tokio::sync::oneshot::Receiver<()>,
    card: Card,
    moves: Arc<Moves>,
}

/// What an agent and those who pass on its card know of slots that move.
#[derive(Debug, Default)]
struct Moves {
    /// Whether the agent has asked a peer to write, so that slots may have to move.
    possible: AtomicBool,
    /// Whether peers are told so.
    told: AtomicBool,
}

impl Agent {
    /// Starts a thread, an agent on it, and registers the arena.
    pub(crate) async fn start(
        options: AgentOptions,
        name: String,
        arena: Arc<Arena>,
    ) -> Result<Self, NixlError> {
        let (commands, inbox) = channel();
        let (ready, card) = tokio::sync::oneshot::channel();
        let (ending, ended) = tokio::sync::oneshot::channel::<()>();
        let running = Running::new(commands.clone());
        let moves = Arc::<Moves>::default();
        let known = moves.clone();
        let run = move || {
            let _running = running;
            match Worker::new(&options, name, arena, known) {
                Ok((mut worker, card)) => {
                    // Without someone who waits for the card, there is nobody to work for.
                    if ready.send(Ok(card)).is_ok() {
                        worker.run(&inbox);
                    }
                }
                Err(error) => drop(ready.send(Err(error))),
            }
            drop(ending);
        };
        let thread = std::thread::Builder::new().name("ckpt-nixl".into()).spawn(run);
        thread.map_err(|error| NixlError::System {
            call: "clone",
            errno: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
        })?;
        let card = card.await.map_err(|_| NixlError::Closed)??;
        Ok(Self { commands, ended, card, moves })
    }

    /// What peers need to reach it, if none of its slots moves.
    pub(crate) fn card(&self) -> &Card {
        &self.card
    }

    /// Whether peers have to be told that slots move; they are, from now on.
    pub(crate) fn moves(&self) -> bool {
        let possible = self.moves.possible.load(Ordering::SeqCst);
        if possible {
            self.moves.told.store(true, Ordering::SeqCst);
        }
        possible
    }

    /// Has a transfer made; its end is told to `done`.
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

    /// Has the agent look more often for what peers ask for, for a while.
    pub(crate) fn stir(&self) {
        if self.commands.send(Command::Stir).is_err() {
            debug!("the agent has ended, and serves nobody any more");
        }
    }

    /// Ends the thread: transfers under way are given up, the memory is not registered any more.
    pub(crate) async fn close(mut self) {
        self.begin_to_close();
        // The thread drops its end when it has nothing left to do.
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

/// The threads that have agents.
static RUNNING: Mutex<BTreeMap<u64, Sender<Command>>> = Mutex::new(BTreeMap::new());
static ENDED: Condvar = Condvar::new();

/// A thread's entry in the list of those that have agents, until its end.
struct Running(u64);

impl Running {
    fn new(commands: Sender<Command>) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).insert(number, commands);
        Self(number)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
        ENDED.notify_all();
    }
}

/// Closes all agents and waits for it, but not for long: called when the process ends, before UCX
/// takes down what its workers use. An agent that was alive after that would crash the process.
extern "C" fn close_all() {
    let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    for commands in running.values() {
        // One that has ended meanwhile leaves the list by itself.
        drop(commands.send(Command::Close));
    }
    drop(ENDED.wait_timeout_while(running, Duration::from_secs(3), |running| !running.is_empty()));
}

/// What is there, in words, after an agent was made and closed again.
pub(crate) fn probe() -> Result<String, NixlError> {
    let options = AgentOptions { error_handling: "peer", ..Default::default() };
    let arena = Arc::new(Arena::new(1, 4096)?);
    let name = format!("probe-{}", std::process::id());
    let (_, card) = Worker::new(&options, name, arena, Arc::default())?;
    let found = &sys::load(None)?.found;
    let version = |version: &Option<String>| version.clone().unwrap_or("of unknown version".into());
    Ok(format!(
        "NIXL {} at {}, UCX {}, InfiniBand devices: {}, plugins: {}, {} bytes of metadata",
        version(&found.nixl),
        found.path.display(),
        version(&found.ucx),
        in_words(&sys::infiniband_devices()),
        in_words(&found.plugins),
        card.metadata.len(),
    ))
}

fn in_words(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(" ") }
}

/// What agents say to one another where the one that has the bytes writes them.
#[derive(Debug, Serialize, Deserialize)]
enum Notice {
    /// "Write the first bytes of your slot to there." No bytes: "are you there?"
    Ask {
        id: u64,
        slot: u32,
        /// Address and length.
        target: (u64, u64),
        device: Option<u32>,
        /// How to reach the one who asks.
        metadata: Vec<u8>,
        /// Counts how often that one has learnt to reach the one it asks: another number says that all
        /// connections from before are closed.
        era: u64,
        /// When it is too late.
        millis: u64,
    },
    /// The bytes are there.
    Done { id: u64 },
    /// They are not, and will not be written any more.
    Refused { id: u64, words: String },
}

/// What the thread has.
struct Worker {
    agent: RawAgent,
    arena: Arc<Arena>,
    /// Whether the agent that has the bytes writes them, even if the one that wants them can read them.
    writes: bool,
    reach: Reach,
    moves: Arc<Moves>,
    /// Whether a slot has moved before peers were told that slots may.
    stale: bool,
    /// Whether a peer has ever asked for something.
    asked: bool,
    /// When messages of peers were looked for.
    listened: Instant,
    /// What peers need to reach this agent and all that it has registered.
    metadata: Vec<u8>,
    /// The peers that this agent knows how to reach, by name.
    loaded: HashMap<String, Loaded>,
    /// Not begun yet. One is under way at a time: of two that share the way here, both would end
    /// late, and those who fetch the first one from here would wait for the second one too.
    waiting: VecDeque<Transfer>,
    /// The one that is under way, and those that have failed and that the library still works on.
    active: Vec<Active>,
    /// The writes to peers that are under way.
    serving: Vec<Serving>,
    /// Counts what was asked for, and how often a peer was learnt to be reached.
    count: u64,
    /// Memory that a peer may still write to, by what it was asked for: it answers, unless it is gone.
    retired: BTreeMap<u64, Memory>,
    /// Memory that was retired, and is not written to any more.
    spares: Vec<Memory>,
    /// When something happened last that others may react to.
    stirred: Instant,
}

struct Loaded {
    metadata: Vec<u8>,
    /// By this agent's count.
    era: u64,
    /// By the peer's count, if it has asked for something.
    asks: Option<u64>,
}

struct Active {
    work: Work,
    peer: Arc<Card>,
    /// The peer's slot.
    from: u32,
    until: Instant,
    deadline: Duration,
    /// In use until the library has let go of it, even if the transfer has failed.
    slot: Slot,
    /// `None` when the end was told.
    done: Option<Box<dyn Awaiting>>,
}

enum Work {
    Read(RawTransfer),
    /// The peer could not be read from. It was asked whether it is there at all: only then it is told where to
    /// write to, which would have to be replaced if it was not.
    Greeted(u64),
    /// The peer was asked to write.
    Asked(u64),
}

struct Serving {
    raw: RawTransfer,
    peer: String,
    id: u64,
    until: Instant,
    /// Why it failed; it is told when the library has let go of it.
    failed: Option<String>,
}

impl Active {
    fn fail(&mut self, error: NixlError) {
        if let Some(done) = self.done.take() {
            done.tell(Err(error));
        }
    }
}

impl Worker {
    fn new(
        options: &AgentOptions,
        name: String,
        arena: Arc<Arena>,
        moves: Arc<Moves>,
    ) -> Result<(Self, Card), NixlError> {
        let (agent, card) = open(options, name, &arena)?;
        let reach = Reach::new(options, &arena);
        moves.possible.store(options.writes || reach.reads_nobody(), Ordering::SeqCst);
        let this = Self {
            agent,
            arena,
            writes: options.writes,
            reach,
            moves,
            stale: false,
            asked: false,
            listened: Instant::now(),
            metadata: card.metadata.clone(),
            loaded: HashMap::new(),
            waiting: VecDeque::new(),
            active: Vec::new(),
            serving: Vec::new(),
            count: 0,
            retired: BTreeMap::new(),
            spares: Vec::new(),
            stirred: Instant::now(),
        };
        Ok((this, card))
    }

    fn run(&mut self, inbox: &Receiver<Command>) {
        let mut idle = 0;
        loop {
            let busy = !self.active.is_empty() || !self.serving.is_empty();
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

    fn close(&mut self) {
        for transfer in self.waiting.drain(..) {
            transfer.done.tell(Err(NixlError::Closed));
        }
        // What peers write here ends soon, or they are gone.
        let until = Instant::now() + GRACE;
        while self.awaits_peers() && Instant::now() < until {
            self.poll();
            std::thread::sleep(PAUSE);
        }
        for mut transfer in std::mem::take(&mut self.active) {
            transfer.fail(NixlError::Closed);
            let released = match &mut transfer.work {
                Work::Read(raw) => self.agent.release(raw),
                Work::Greeted(_) => true,
                Work::Asked(id) => {
                    self.retired.insert(*id, transfer.slot.into_memory());
                    true
                }
            };
            if !released {
                debug!(peer = transfer.peer.name, "the agent is closed within a transfer");
            }
        }
        for serving in &mut self.serving {
            if !self.agent.release(&mut serving.raw) {
                debug!(peer = serving.peer, "the agent is closed within a transfer to a peer");
            }
        }
        // A peer on this host that was stopped in the middle of a write goes on with it some day. It must
        // not find other things at the address.
        for memory in std::mem::take(&mut self.retired).into_values() {
            warn!(bytes = memory.len(), "memory that a peer may still write to is kept for ever");
            std::mem::forget(memory);
        }
    }

    fn start(&mut self, transfer: Transfer) {
        if !transfer.done.is_awaited() {
            // What is left of an update that has ended: its peer may have gone by now.
            return transfer.done.tell(Err(NixlError::Abandoned));
        }
        self.stale &= !self.moves.told.load(Ordering::SeqCst);
        if self.stale {
            // Who fetched this from here would read it where the slot was before.
            return transfer.done.tell(Err(NixlError::Moved));
        }
        if transfer.slot.range().1 == 0 {
            // An empty bucket; NIXL refuses transfers of nothing.
            return transfer.done.tell(Ok(transfer.slot));
        }
        self.stirred = Instant::now();
        match self.begin(&transfer) {
            Ok(work) => {
                let Transfer { slot, peer, from, deadline, done } = transfer;
                let until = Instant::now() + deadline;
                let done = Some(done);
                self.active.push(Active { work, peer, from, until, deadline, slot, done });
            }
            Err(error) => {
                transfer.done.tell(Err(error));
                self.forget(&transfer.peer.name);
            }
        }
    }

    fn begin(&mut self, transfer: &Transfer) -> Result<Work, NixlError> {
        let &Transfer { ref slot, ref peer, from, deadline, .. } = transfer;
        let remote = peer.range(from, slot.range().1 as u64)?;
        self.load(&peer.name, &peer.metadata)?;
        if self.reads_from(peer) {
            let local = (slot.range(), self.arena.device());
            let started = self.agent.start(Way::Read, &peer.name, local, (remote, peer.device));
            match started {
                Ok(raw) => return Ok(Work::Read(raw)),
                Err(error) if !self.is_in_doubt(&peer.name, &error) => return Err(error),
                Err(_) => return self.greet(peer, deadline),
            }
        }
        self.ask(peer, from, slot, deadline)
    }

    /// Whether bytes are read from a peer, and it is not asked to write them.
    fn reads_from(&self, peer: &Card) -> bool {
        !(self.writes || peer.moves || self.reach.excludes(peer))
    }

    /// Whether a read that failed may have done so because UCX has no transport here that can read.
    fn is_in_doubt(&self, peer: &str, error: &NixlError) -> bool {
        matches!(error, NixlError::Transfer { .. }) && self.reach.is_undecided(peer)
    }

    /// Asks a peer whether it is there, over a new connection: that of the read has failed.
    fn greet(&mut self, peer: &Card, deadline: Duration) -> Result<Work, NixlError> {
        self.disconnect(&peer.name);
        self.request(peer, 0, (0, 0), deadline).map(Work::Greeted)
    }

    /// Asks a peer to write from its slot to one of this rank.
    fn ask(
        &mut self,
        peer: &Card,
        from: u32,
        slot: &Slot,
        deadline: Duration,
    ) -> Result<Work, NixlError> {
        self.moves.possible.store(true, Ordering::SeqCst);
        self.request(peer, from, slot.range(), deadline).map(Work::Asked)
    }

    /// Has a peer write the first bytes of a slot; the number that its answer will have.
    fn request(
        &mut self,
        peer: &Card,
        slot: u32,
        (address, len): (usize, usize),
        deadline: Duration,
    ) -> Result<u64, NixlError> {
        let era = self.load(&peer.name, &peer.metadata)?;
        self.count += 1;
        let id = self.count;
        let ask = Notice::Ask {
            id,
            slot,
            target: (address as u64, len as u64),
            device: self.arena.device(),
            metadata: self.metadata.clone(),
            era,
            millis: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
        };
        self.say(&peer.name, &ask)?;
        Ok(id)
    }

    fn say(&self, peer: &str, notice: &Notice) -> Result<(), NixlError> {
        self.agent.notify(peer, &postcard::to_stdvec(notice).map_err(NixlError::Card)?)
    }

    /// Learns to reach a peer, unless it is known; how often a peer was learnt until then.
    fn load(&mut self, name: &str, metadata: &[u8]) -> Result<u64, NixlError> {
        if let Some(loaded) = self.loaded.get(name).filter(|loaded| loaded.metadata == metadata) {
            return Ok(loaded.era);
        }
        // A peer that is known already has registered more.
        let named = self.agent.load_peer(metadata)?;
        if named != name {
            self.agent.forget_peer(&named)?;
            return Err(NixlError::Unknown);
        }
        self.count += 1;
        let new = Loaded { metadata: Vec::new(), era: self.count, asks: None };
        let loaded = self.loaded.entry(named).or_insert(new);
        loaded.metadata = metadata.to_vec();
        Ok(loaded.era)
    }

    /// Looks after all transfers; whether anything ended or arrived.
    fn poll(&mut self) -> bool {
        let now = Instant::now();
        let listens = self.serves() || now - self.listened >= LISTEN;
        let heard = listens && self.listen();
        let served = self.serve();
        let mut ended = false;
        let mut broken = Vec::new();
        let mut again = Vec::new();
        let mut at = 0;
        while let Some(transfer) = self.active.get_mut(at) {
            let raw = match &mut transfer.work {
                Work::Read(raw) => raw,
                Work::Greeted(_) | Work::Asked(_) => {
                    if now >= transfer.until {
                        let error = NixlError::Slow(transfer.deadline);
                        let transfer = self.active.swap_remove(at);
                        broken.push(transfer.peer.name.clone());
                        self.give_up(transfer, error);
                    } else {
                        at += 1;
                    }
                    continue;
                }
            };
            if transfer.done.is_some() {
                match self.agent.is_done(raw) {
                    Ok(false) if now < transfer.until => {
                        at += 1;
                        continue;
                    }
                    Ok(true) => {
                        if self.agent.release(raw) {
                            ended = true;
                            let Active { slot, peer, done, .. } = self.active.swap_remove(at);
                            self.reach.decide(&peer.name, true);
                            if let Some(done) = done {
                                done.tell(Ok(slot));
                            }
                            continue;
                        }
                        // It is done, and was not a moment ago to whoever releases it.
                        at += 1;
                        continue;
                    }
                    Ok(false) => {
                        let error = NixlError::Slow(transfer.deadline);
                        transfer.fail(error);
                    }
                    Err(error) => {
                        if self.agent.release(raw) {
                            again.push((self.active.swap_remove(at), error));
                            continue;
                        }
                        transfer.fail(error);
                    }
                }
                broken.push(transfer.peer.name.clone());
            }
            let Work::Read(raw) = &mut transfer.work else { continue };
            // It has failed: it goes when the library lets go of it.
            if self.agent.release(raw) {
                self.active.swap_remove(at);
            } else {
                at += 1;
            }
        }
        for peer in broken {
            self.forget(&peer);
        }
        for (transfer, error) in again {
            self.try_again(transfer, error);
        }
        heard || served || ended
    }

    /// Goes on after a read that failed, and that the library has let go of.
    fn try_again(&mut self, mut transfer: Active, error: NixlError) {
        let (peer, deadline) = (transfer.peer.clone(), transfer.deadline);
        let error = if self.is_in_doubt(&peer.name, &error) {
            match self.greet(&peer, deadline) {
                Ok(work) => {
                    self.active.push(Active { work, ..transfer });
                    return;
                }
                Err(error) => error,
            }
        } else {
            error
        };
        transfer.fail(error);
        self.forget(&peer.name);
    }

    /// Whether peers ask for what is here.
    fn serves(&self) -> bool {
        self.writes || self.asked || !self.serving.is_empty() || self.awaits_peers()
    }

    fn awaits_peers(&self) -> bool {
        self.active.iter().any(|transfer| !matches!(transfer.work, Work::Read(_)))
    }

    /// How long to sleep when there is nothing to be done: peers ask when they like, above all soon after
    /// something happened here.
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

    /// Takes in what peers say; whether they said anything.
    fn listen(&mut self) -> bool {
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
        let (id, words) = match notice {
            Notice::Ask { id, slot, target, device, metadata, era, millis } => {
                self.asked = true;
                let now = Instant::now();
                let until = now.checked_add(Duration::from_millis(millis)).unwrap_or(now);
                match self.answer(&peer, slot, (target, device), &metadata, era) {
                    Ok(None) => self.confirm(&peer, id),
                    Ok(Some(raw)) => {
                        self.serving.push(Serving { raw, peer, id, until, failed: None });
                    }
                    Err(error) => self.refuse(&peer, id, error.to_string()),
                }
                return;
            }
            Notice::Done { id } => (id, None),
            Notice::Refused { id, words } => (id, Some(words)),
        };
        if let Some(memory) = self.retired.remove(&id) {
            self.spares.push(memory);
            return;
        }
        let asked = |active: &Active| match active.work {
            Work::Greeted(asked) | Work::Asked(asked) => asked == id,
            Work::Read(_) => false,
        };
        let Some(at) = self.active.iter().position(asked) else { return };
        let mut transfer = self.active.swap_remove(at);
        match (words, &transfer.work) {
            (Some(words), _) => transfer.fail(NixlError::Refused(words)),
            (None, Work::Greeted(_)) => {
                let Active { peer, from, slot, deadline, .. } = &transfer;
                debug!(peer.name, "nothing can be read from a peer, it is asked to write");
                self.reach.decide(&peer.name, false);
                match self.ask(&peer.clone(), *from, slot, *deadline) {
                    Ok(work) => self.active.push(Active { work, ..transfer }),
                    Err(error) => transfer.fail(error),
                }
            }
            // The peer has let go of the memory.
            (None, _) => {
                if let Some(done) = transfer.done {
                    done.tell(Ok(transfer.slot));
                }
            }
        }
    }

    /// Starts to write a slot to where a peer wants it, if it wants any bytes.
    fn answer(
        &mut self,
        peer: &str,
        slot: u32,
        ((address, len), device): ((u64, u64), Option<u32>),
        metadata: &[u8],
        era: u64,
    ) -> Result<Option<RawTransfer>, NixlError> {
        if self.loaded.get(peer).is_some_and(|known| known.asks.is_some_and(|asks| asks != era)) {
            self.forget(peer);
        }
        self.load(peer, metadata)?;
        if let Some(known) = self.loaded.get_mut(peer) {
            known.asks = Some(era);
        }
        // From here on an answer reaches the peer.
        if len == 0 {
            return Ok(None);
        }
        let local = (self.arena.range(slot, len)?, self.arena.device());
        let target = usize::try_from(address).map_err(|_| NixlError::Unknown)?;
        self.agent.start(Way::Write, peer, local, ((target, len as usize), device)).map(Some)
    }

    /// Tells a peer that what it asked for is done.
    fn confirm(&mut self, peer: &str, id: u64) {
        if let Err(error) = self.say(peer, &Notice::Done { id }) {
            warn!(peer, %error, "a peer could not be told that its bucket is there");
            self.forget(peer);
        }
    }

    fn refuse(&mut self, peer: &str, id: u64, words: String) {
        warn!(peer, words, "a bucket could not be written to a peer");
        if let Err(error) = self.say(peer, &Notice::Refused { id, words }) {
            debug!(peer, %error, "it could not be told");
            self.forget(peer);
        }
    }

    /// Looks after the writes to peers; whether one ended.
    fn serve(&mut self) -> bool {
        let now = Instant::now();
        let mut ended = Vec::new();
        let mut at = 0;
        while let Some(serving) = self.serving.get_mut(at) {
            let done = match (&serving.failed, self.agent.is_done(&serving.raw)) {
                (Some(_), _) => true,
                (None, Ok(true)) => true,
                (None, Ok(false)) if now < serving.until => false,
                (None, Ok(false)) => {
                    serving.failed = Some("it did not end in time".into());
                    true
                }
                (None, Err(error)) => {
                    serving.failed = Some(error.to_string());
                    true
                }
            };
            if done && self.agent.release(&mut serving.raw) {
                ended.push(self.serving.swap_remove(at));
            } else {
                at += 1;
            }
        }
        let any = !ended.is_empty();
        for Serving { peer, id, failed, .. } in ended {
            match failed {
                Some(words) => self.refuse(&peer, id, words),
                None => self.confirm(&peer, id),
            }
        }
        any
    }

    /// Gives up what a peer was asked for. It may still write: its target is retired, and the slot gets
    /// other memory.
    fn give_up(&mut self, mut transfer: Active, error: NixlError) {
        let Work::Asked(id) = transfer.work else { return transfer.fail(error) };
        let Active { slot, done, .. } = transfer;
        self.stale |= !self.moves.told.load(Ordering::SeqCst);
        let spare = self.spares.pop().map_or_else(|| self.more(), Ok);
        match spare {
            Ok(spare) => {
                self.retired.insert(id, self.arena.replace(slot, spare));
            }
            Err(error) => {
                warn!(%error, "a slot that a peer may still write to cannot be replaced");
                // It stays in use, and whoever needs it learns that.
                self.retired.insert(id, slot.into_memory_for_ever());
            }
        }
        if let Some(done) = done {
            done.tell(Err(error));
        }
    }

    /// More memory for one slot.
    fn more(&mut self) -> Result<Memory, NixlError> {
        let memory = self.arena.spare()?;
        self.agent.register(memory.clone())?;
        self.metadata = self.agent.metadata()?;
        Ok(memory)
    }

    /// Gives up the transfers with a peer and closes the connections to it: a later transfer begins
    /// with new ones.
    fn forget(&mut self, peer: &str) {
        let active = std::mem::take(&mut self.active).into_iter();
        let (gone, left): (Vec<_>, Vec<_>) =
            active.partition(|transfer| transfer.peer.name == peer);
        self.active = left;
        for mut transfer in gone {
            match &mut transfer.work {
                Work::Greeted(_) | Work::Asked(_) => self.give_up(transfer, NixlError::Abandoned),
                Work::Read(raw) => {
                    let released = self.agent.release(raw);
                    transfer.fail(NixlError::Abandoned);
                    if !released {
                        self.active.push(transfer);
                    }
                }
            }
        }
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (gone, left): (VecDeque<_>, _) =
            waiting.partition(|transfer| transfer.peer.name == peer);
        self.waiting = left;
        for transfer in gone {
            transfer.done.tell(Err(NixlError::Abandoned));
        }
        for serving in self.serving.iter_mut().filter(|serving| serving.peer == peer) {
            serving.failed.get_or_insert_with(|| "the connection was given up".into());
        }
        self.disconnect(peer);
    }

    /// Closes the connections to a peer.
    fn disconnect(&mut self, peer: &str) {
        if self.loaded.remove(peer).is_some()
            && let Err(error) = self.agent.forget_peer(peer)
        {
            warn!(peer, %error, "a peer that failed could not be forgotten");
        }
    }
}

/// An agent that has registered an arena, and what peers need to reach it.
pub(crate) fn open(
    options: &AgentOptions,
    name: String,
    arena: &Arena,
) -> Result<(RawAgent, Card), NixlError> {
    let api = sys::load(options.library_dir.as_deref())?;
    let mut config = Vec::new();
    if arena.device().is_none() {
        // Where a transport cannot read or write by itself (TCP cannot read), UCX would have the other side
        // answer, and that ends its process if the connection breaks at that moment. Without this it says
        // that it cannot, and the peer is asked to write.
        config.push("PROTO_EMULATION_ENABLE=n".into());
    }
    if !options.transports.is_empty() {
        config.push(format!("TLS={}", options.transports));
    }
    if arena.device().is_some() && std::env::var_os("UCX_CUDA_IPC_ENABLE_GET_ZCOPY").is_none() {
        // Where it sees no NVLink, UCX would read over TCP what it can map and copy.
        config.push("CUDA_IPC_ENABLE_GET_ZCOPY=on".into());
    }
    let config = config.join(",");
    let mut parameters = vec![("ucx_error_handling_mode", options.error_handling)];
    if !config.is_empty() {
        parameters.push((ENGINE_CONFIG, config.as_str()));
    }
    arena.enter().map_err(NixlError::Device)?;
    let (slots, slot_bytes, device) = (arena.slots(), arena.slot_bytes(), arena.device());
    let address = arena.memory().address() as u64;
    let own_thread = options.own_thread || device.is_some();
    let agent = RawAgent::new(api, &name, &parameters, arena, own_thread)?;
    // Not before an agent was made: NIXL and its plugins have registered their own ends by then.
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| sys::at_exit(close_all));
    let metadata = agent.metadata()?;
    let (host, moves) = (this_host(), false);
    let card = Card { name, metadata, address, slots, slot_bytes, device, host, moves };
    Ok((agent, card))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use engine_core::memory::{Job, Pool};
    use engine_core::{DType, Weight};
    use tokio::sync::oneshot;

    impl Awaiting for oneshot::Sender<Result<Slot, NixlError>> {
        fn is_awaited(&self) -> bool {
            !self.is_closed()
        }

        fn tell(self: Box<Self>, result: Result<Slot, NixlError>) {
            drop(self.send(result));
        }
    }

    const BYTES: u64 = 3 << 20;
    const DEADLINE: Duration = Duration::from_secs(20);

    async fn agent(name: &str) -> (Agent, Arc<Arena>) {
        agent_that(name, false).await
    }

    async fn agent_with(name: &str, options: AgentOptions) -> (Agent, Arc<Arena>) {
        let arena = Arc::new(Arena::new(2, BYTES).unwrap());
        let name = format!("{name}-{}", std::process::id());
        (Agent::start(options, name, arena.clone()).await.unwrap(), arena)
    }

    async fn agent_that(name: &str, writes: bool) -> (Agent, Arc<Arena>) {
        agent_with(name, AgentOptions { error_handling: "peer", writes, ..Default::default() })
            .await
    }

    /// Begins a transfer; what comes of it.
    async fn begin(
        at: &(Agent, Arc<Arena>),
        slot: u32,
        peer: &Arc<Card>,
        from: u32,
    ) -> Result<oneshot::Receiver<Result<Slot, NixlError>>, NixlError> {
        let (tell, told) = oneshot::channel();
        at.0.transfer(Transfer {
            slot: at.1.lock(slot, BYTES, DEADLINE).await?,
            peer: peer.clone(),
            from,
            deadline: DEADLINE,
            done: Box::new(tell),
        });
        Ok(told)
    }

    async fn transfer(
        at: &(Agent, Arc<Arena>),
        slot: u32,
        peer: &Arc<Card>,
        from: u32,
    ) -> Result<Slot, NixlError> {
        begin(at, slot, peer, from).await?.await.unwrap()
    }

    /// Gives a peer up as soon as it was asked to write; what becomes of the transfer.
    async fn give_up(
        at: &(Agent, Arc<Arena>),
        slot: u32,
        peer: &Arc<Card>,
        from: u32,
    ) -> NixlError {
        loop {
            let told = begin(at, slot, peer, from).await.unwrap();
            at.0.forget(peer);
            // It may have written by then.
            if let Err(error) = told.await.unwrap() {
                return error;
            }
        }
    }

    fn pattern(seed: usize) -> impl Iterator<Item = u8> {
        (0..BYTES as usize).map(move |at| (at * 7 + seed) as u8)
    }

    /// Fills a slot with a pattern.
    async fn fill(arena: &Arena, slot: u32, seed: usize) {
        let slot = arena.lock(slot, BYTES, DEADLINE).await.unwrap();
        let bytes = pattern(seed).collect::<Vec<u8>>();
        let weight = Weight::new("w", DType::U8, [BYTES], bytes).unwrap();
        let job = Job { weight, start: 0, len: BYTES, offset: 0 };
        slot.fill(&[job], &Pool::new(1).unwrap(), false).unwrap();
    }

    fn is_pattern(slot: Slot, seed: usize) -> bool {
        slot.into_storage().to_host().unwrap().iter().copied().eq(pattern(seed))
    }

    #[tokio::test]
    async fn bytes_of_another_agents_slots_are_read_or_written_by_it() {
        for writes in [false, true] {
            let one = agent_that(&format!("one-{writes}"), writes).await;
            let two = agent_that(&format!("two-{writes}"), writes).await;
            let card = Arc::new(one.0.card().clone());
            for seed in 1..5 {
                fill(&one.1, 0, seed).await;
                let slot = transfer(&two, 1, &card, 0).await.unwrap();
                assert!(is_pattern(slot, seed), "other bytes arrived, {writes}");
            }
            two.0.close().await;
            one.0.close().await;
        }
    }

    #[test]
    fn what_cannot_be_read_is_known_from_hosts_and_transports_or_was_found_out() {
        let here = Card {
            name: "peer".into(),
            metadata: Vec::new(),
            address: 0,
            slots: 1,
            slot_bytes: 1,
            device: None,
            host: "here".into(),
            moves: false,
        };
        let elsewhere = Card { host: "elsewhere".into(), ..here.clone() };
        let on_a_device = Card { device: Some(0), ..elsewhere.clone() };
        let excluded = |only_tcp, only_tcp_between_hosts, emulates| {
            let (host, decided) = ("here".into(), HashMap::new());
            let reach = Reach { only_tcp, only_tcp_between_hosts, host, emulates, decided };
            [&here, &elsewhere, &on_a_device].map(|peer| reach.excludes(peer))
        };
        assert_eq!(excluded(false, false, false), [false, false, false]);
        assert_eq!(excluded(false, true, false), [false, true, false]);
        assert_eq!(excluded(true, true, false), [true, true, false]);
        assert_eq!(excluded(true, true, true), [false, false, false]);

        // What was found out of an agent stays, whatever happens to it later.
        let (host, decided) = ("here".into(), HashMap::new());
        let (only_tcp, only_tcp_between_hosts, emulates) = (false, false, false);
        let mut reach = Reach { only_tcp, only_tcp_between_hosts, host, emulates, decided };
        let never = Card { name: "never".into(), ..here.clone() };
        assert!(reach.is_undecided("peer") && !reach.excludes(&here) && !reach.excludes(&never));
        for readable in [true, false] {
            reach.decide("peer", readable);
            reach.decide("never", !readable);
            assert_eq!([reach.excludes(&here), reach.excludes(&never)], [false, true]);
            assert!(!reach.is_undecided("peer") && !reach.is_undecided("never"));
        }
    }

    /// An agent that has only these transports.
    async fn agent_over(name: &str, transports: &str) -> (Agent, Arc<Arena>) {
        let transports = transports.into();
        let options = AgentOptions { transports, error_handling: "peer", ..Default::default() };
        agent_with(name, options).await
    }

    #[tokio::test]
    async fn an_agent_that_cannot_be_read_from_is_asked_to_write() {
        // Of the first, that it has only TCP is known; of the second, it is found.
        for (transports, known) in [("tcp,self", true), ("tcp,tcp,self,", false)] {
            let one = agent_over("unreadable", transports).await;
            let two = agent_over("reads", transports).await;
            assert_eq!(two.0.moves(), known, "{transports}");
            let card = Arc::new(one.0.card().clone());
            for seed in 1..4 {
                fill(&one.1, 0, seed).await;
                let slot = transfer(&two, 1, &card, 0).await.unwrap();
                assert!(is_pattern(slot, seed), "other bytes arrived");
                assert!(two.0.moves(), "{transports}");
            }
        }
    }

    #[tokio::test]
    async fn one_that_cannot_be_read_from_and_does_not_answer_is_not_told_where_to_write() {
        let two = agent_over("greets", "tcp,tcp,self,").await;
        let before = two.1.range(1, BYTES).unwrap();
        // An agent without a thread, which takes in nothing.
        let arena = Arena::new(2, BYTES).unwrap();
        let options = AgentOptions { error_handling: "peer", ..Default::default() };
        let name = format!("silent-{}", std::process::id());
        let (_silent, card) = open(&options, name, &arena).unwrap();
        let card = Arc::new(card);
        let mut told = begin(&two, 1, &card, 0).await.unwrap();
        let waited = tokio::time::timeout(Duration::from_millis(300), &mut told).await;
        assert!(waited.is_err(), "it is still waited for: {waited:?}");
        two.0.forget(&card);
        let error = told.await.unwrap().unwrap_err();
        assert!(matches!(error, NixlError::Abandoned), "{error}");
        assert!(!two.0.moves());
        assert_eq!(two.1.range(1, BYTES).unwrap(), before);
        // The slot is as good as before, in the same update.
        let other = agent_over("answers", "tcp,tcp,self,").await;
        fill(&other.1, 0, 1).await;
        let card = Arc::new(other.0.card().clone());
        assert!(is_pattern(transfer(&two, 1, &card, 0).await.unwrap(), 1));
    }

    #[tokio::test]
    async fn a_slot_whose_writer_was_given_up_is_elsewhere_and_works() {
        let (one, two) = (agent_that("given-up", true).await, agent_that("waits", true).await);
        let three = agent_that("other", true).await;
        let before = two.1.range(1, BYTES).unwrap();
        let card = Arc::new(one.0.card().clone());
        fill(&one.1, 0, 1).await;
        fill(&three.1, 0, 2).await;
        assert!(two.0.moves());
        for round in 0..3 {
            let error = give_up(&two, 1, &card, 0).await;
            assert!(matches!(error, NixlError::Abandoned), "{error}");
            assert_ne!(two.1.range(1, BYTES).unwrap(), before, "round {round}");
            // Another one is asked, which has to learn of the new memory, and then the first one again.
            let other = Arc::new(three.0.card().clone());
            assert!(is_pattern(transfer(&two, 1, &other, 0).await.unwrap(), 2), "round {round}");
            assert!(is_pattern(transfer(&two, 1, &card, 0).await.unwrap(), 1), "round {round}");
        }
    }

    #[tokio::test]
    async fn nothing_is_fetched_to_a_slot_that_moved_before_anyone_was_told() {
        let (one, two) = (agent_that("writes", true).await, agent_that("untold", true).await);
        let card = Arc::new(one.0.card().clone());
        give_up(&two, 1, &card, 0).await;
        let error = transfer(&two, 1, &card, 0).await.unwrap_err();
        assert!(matches!(error, NixlError::Moved), "{error}");
        assert!(two.0.moves());
        drop(transfer(&two, 1, &card, 0).await.unwrap());
    }

    #[tokio::test]
    async fn an_agent_that_is_asked_for_what_it_does_not_have_refuses_at_once() {
        let (one, two) = (agent_that("refuses", true).await, agent_that("asks", true).await);
        let card = Card { slots: 9, ..one.0.card().clone() };
        let error = transfer(&two, 0, &Arc::new(card), 7).await.unwrap_err();
        assert!(matches!(error, NixlError::Refused(_)), "{error}");
        let card = Arc::new(one.0.card().clone());
        drop(transfer(&two, 0, &card, 1).await.unwrap());
    }

    #[tokio::test]
    async fn an_agent_that_is_gone_is_an_error_and_others_still_work() {
        let (one, two, gone) = (agent("a").await, agent("b").await, agent("c").await);
        let card = Arc::new(gone.0.card().clone());
        drop(transfer(&one, 0, &card, 0).await.unwrap());
        gone.0.close().await;
        // Its memory is still there, until the connection's end is noticed.
        let noticed = async { while transfer(&one, 0, &card, 0).await.is_ok() {} };
        tokio::time::timeout(DEADLINE, noticed).await.unwrap();
        // However often it is tried: what was once read from is not taken for something that has to write.
        for _ in 0..3 {
            let error = transfer(&one, 0, &card, 0).await.unwrap_err();
            assert!(!matches!(error, NixlError::Slow(_)), "{error}");
        }
        assert!(!one.0.moves(), "one that is gone was asked to write");
        let card = Arc::new(two.0.card().clone());
        drop(transfer(&one, 0, &card, 0).await.unwrap());
    }

    #[tokio::test]
    async fn what_is_not_a_card_is_an_error() {
        let one = agent("card").await;
        let card = Card { metadata: b"nonsense".to_vec(), ..one.0.card().clone() };
        assert!(card.range(2, 1).is_err() && card.range(0, BYTES + 1).is_err());
        let error = transfer(&one, 0, &Arc::new(card), 0).await;
        assert!(error.is_err());
    }

    #[tokio::test]
    async fn transports_that_do_not_exist_are_an_error_that_names_them() {
        let arena = Arc::new(Arena::new(1, 4096).unwrap());
        let options = AgentOptions {
            transports: "carrier_pigeon".into(),
            error_handling: "peer",
            ..Default::default()
        };
        let error = Agent::start(options, "pigeon".into(), arena).await.unwrap_err();
        assert!(error.to_string().contains("carrier_pigeon"), "{error}");
    }

    #[tokio::test]
    async fn a_slot_that_is_read_is_not_given_away() {
        let arena = Arena::new(1, 4096).unwrap();
        let view = arena.lock(0, 10, DEADLINE).await.unwrap().into_storage();
        let error = arena.lock(0, 10, Duration::from_millis(20)).await.unwrap_err();
        assert!(matches!(error, NixlError::InUse { .. }), "{error}");
        drop(view);
        drop(arena.lock(0, 10, DEADLINE).await.unwrap());
    }
}

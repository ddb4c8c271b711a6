//! A rank's agent: one thread that has it, and the handle of that thread.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use engine_core::{Rank, Role, WorkerMetadata};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::NAME;
use crate::arena::{Arena, Lent, Memory, Place, Range, Slot};
use crate::error::NixlError;
use crate::ffi::{ENGINE_CONFIG, NotStarted, RawAgent, RawTransfer, Remote};
use crate::lent::{AskId, Process, Quiesced, Retired, Writer};
use crate::sys;

/// How often a transfer is looked at without a pause: short ones end meanwhile.
const SPINS: u32 = 200;
/// The pause between two looks at a longer one.
const PAUSE: Duration = Duration::from_micros(30);
/// The longest pause between two looks for what peers ask for, soon after something happened here.
const LISTEN: Duration = Duration::from_millis(5);
/// How long the end of an agent waits for peers that write here.
const GRACE: Duration = Duration::from_secs(1);
/// Of how many agents it is remembered whether they can be read from: each start of a process is another agent.
const DECISIONS: usize = 1024;
/// How many agents are known how to be reached at a time.
const PEERS: usize = 4096;

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
    /// Its process.
    pub(crate) process: Option<Process>,
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
    /// The network interface that UCX's TCP is to use, unless the environment says which; any if it is empty.
    pub(crate) interface: String,
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
    /// Those names, in the order in which it was.
    order: VecDeque<String>,
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
            order: VecDeque::new(),
        }
    }

    /// What is known of a peer that was told to write here.
    fn writer(&self, peer: &Card) -> Writer {
        let here = is_same_machine(&self.host, &peer.host);
        let ends_with_agent = self.reads_nobody() || !(here || self.emulates);
        Writer { ends_with_agent, process: peer.process.clone().filter(|_| here) }
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
            self.order.push_back(peer.to_owned());
            if self.order.len() > DECISIONS
                && let Some(oldest) = self.order.pop_front()
            {
                self.decided.remove(&oldest);
            }
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

/// Whether two identities of hosts may be of one machine: containers of one have names of their own.
fn is_same_machine(one: &str, other: &str) -> bool {
    let boot = |host: &str| host.rsplit('/').next().unwrap_or_default().to_owned();
    boot(one) == boot(other) || boot(one).is_empty() || boot(other).is_empty()
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
    /// No update is going on: replace the agent, if that frees memory.
    Renew(tokio::sync::oneshot::Sender<()>),
    Close,
}

/// The handle of an agent's thread. Closed when dropped, without waiting; [`close`](Self::close) waits.
#[derive(Debug)]
pub(crate) struct Agent {
    commands: Sender<Command>,
    ended: tokio::sync::oneshot::Receiver<()>,
    known: Arc<Known>,
}

/// What an agent and those who pass on its card know.
#[derive(Debug, Default)]
struct Known {
    /// How to reach the agent, if none of its slots moves.
    card: Mutex<Option<Arc<Card>>>,
    /// Whether the agent has asked a peer to write, so that slots may have to move.
    moves: AtomicBool,
    /// Whether peers are told so.
    told: AtomicBool,
    /// How many slots' memory is kept for peers that may still write to it.
    retired: AtomicUsize,
}

impl Known {
    fn card(&self) -> MutexGuard<'_, Option<Arc<Card>>> {
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
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let (ending, ended) = tokio::sync::oneshot::channel::<()>();
        let running = Running::new(commands.clone());
        let known = Arc::<Known>::default();
        let theirs = known.clone();
        let run = move || {
            let _running = running;
            match Worker::new(options, name, arena, theirs) {
                Ok(worker) => {
                    // Without someone who waits for it, there is nobody to work for.
                    if ready.send(Ok(())).is_ok() {
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
        is_ready.await.map_err(|_| NixlError::Closed)??;
        Ok(Self { commands, ended, known })
    }

    /// What peers need to reach it. If it says that slots move, they are told so from now on.
    pub(crate) fn card(&self) -> Result<Arc<Card>, NixlError> {
        let card = self.known.card().clone().ok_or(NixlError::Closed)?;
        Ok(if self.moves() { Arc::new(Card { moves: true, ..(*card).clone() }) } else { card })
    }

    /// Whether peers have to be told that slots move; they are, from now on.
    fn moves(&self) -> bool {
        let possible = self.known.moves.load(Ordering::SeqCst);
        if possible {
            self.known.told.store(true, Ordering::SeqCst);
        }
        possible
    }

    /// Between updates: if memory is kept for peers that were given up, and the end of the agent's connections
    /// proves that they cannot write any more, another agent takes its place, with another card, and the memory is
    /// used again.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the agent is not replaced any more.
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
    let (_agent, card) = open(&options, name, &arena, Vec::new())?;
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
    Ask(Ask),
    /// The bytes are there. Nothing is written any more.
    Done { id: u64 },
    /// They are not. If the write had begun, some of them may still arrive.
    Refused { id: u64, begun: bool, words: String },
}

#[derive(Debug, Serialize, Deserialize)]
struct Ask {
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
}

/// What the thread has.
struct Worker {
    agent: RawAgent,
    options: AgentOptions,
    arena: Arc<Arena>,
    reach: Reach,
    known: Arc<Known>,
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
    /// Those that it is to forget when no transfer with them is under way any more.
    closing: BTreeSet<String>,
    /// Not begun yet. One is under way at a time: of two that share the way here, both would end
    /// late, and those who fetch the first one from here would wait for the second one too.
    waiting: VecDeque<Transfer>,
    /// The one that is under way, and reads that nobody waits for any more and that the library still works on.
    active: Vec<Active>,
    /// The writes to peers that are under way.
    serving: Vec<Serving>,
    /// What peers have asked for that waits until older writes to them have ended.
    postponed: Vec<Asked>,
    /// Counts what was asked for, and how often a peer was learnt to be reached.
    count: u64,
    /// Memory that was lent to peers that were given up.
    retired: Retired,
    /// When something happened last that others may react to.
    stirred: Instant,
}

struct Loaded {
    metadata: Vec<u8>,
    /// By this agent's count.
    era: u64,
    /// By the peer's count, if it has asked for something.
    asks: Option<u64>,
    /// The count when it was used last.
    used: u64,
}

struct Active {
    work: Work,
    peer: Arc<Card>,
    /// The peer's slot.
    from: u32,
    until: Instant,
    deadline: Duration,
    /// `None` when the end was told.
    done: Option<Box<dyn Awaiting>>,
}

enum Work {
    /// The slot comes back when the library says that the transfer has ended.
    Read(RawTransfer<Slot>),
    /// The peer could not be read from. It was asked whether it is there at all: only then it is told where to
    /// write to, which would have to be replaced if it was not.
    Greeted(AskId, Slot),
    /// The peer was asked to write.
    Asked(Lent),
}

/// What a peer has asked for.
struct Asked {
    peer: String,
    ask: Ask,
    until: Instant,
}

/// A write to a peer that is under way. UCX cannot cancel it, so it stays here until it has ended, also if the peer
/// does not wait any more: that it has ended is what the peer needs to know before it uses the memory again.
struct Serving {
    raw: RawTransfer<Place>,
    peer: String,
    id: u64,
    until: Instant,
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
        options: AgentOptions,
        name: String,
        arena: Arc<Arena>,
        known: Arc<Known>,
    ) -> Result<Self, NixlError> {
        let (agent, card) = open(&options, name, &arena, Vec::new())?;
        let reach = Reach::new(&options, &arena);
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

    fn run(mut self, inbox: &Receiver<Command>) {
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

    fn close(mut self) {
        *self.known.card() = None;
        for transfer in self.waiting.drain(..) {
            transfer.done.tell(Err(NixlError::Closed));
        }
        // What peers write here ends soon, or they are gone.
        let until = Instant::now() + GRACE;
        while self.awaits_peers() && Instant::now() < until {
            self.poll();
            std::thread::sleep(PAUSE);
        }
        let reads = self.end_all(|| NixlError::Closed);
        let writes = self.serving.into_iter().map(|serving| serving.raw).collect();
        let read_to = self.agent.close(reads, writes);
        // What the agent was connected by is gone.
        drop(read_to);
        self.retired.agent_ended(&self.arena);
        // A peer on this host that was stopped in the middle of a write goes on with it some day. It must
        // not find other things at the address.
        for range in self.retired.into_kept() {
            let bytes = range.place().len;
            warn!(bytes, "memory that a peer may still write to is kept for ever");
            std::mem::forget(range);
        }
    }

    /// Ends all transfers to this rank, as far as it can; those that the library still works on.
    fn end_all(&mut self, error: impl Fn() -> NixlError) -> Vec<RawTransfer<Slot>> {
        let mut reads = Vec::new();
        for mut transfer in std::mem::take(&mut self.active) {
            transfer.fail(error());
            match transfer.work {
                Work::Read(raw) => reads.push(raw),
                Work::Greeted(..) => {}
                Work::Asked(lent) => {
                    let (ask, writer) = (lent.ask().clone(), self.reach.writer(&transfer.peer));
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

    /// Replaces the agent by another one, if that frees memory, and if somebody still waits for it.
    fn renew(&mut self, done: tokio::sync::oneshot::Sender<()>) {
        if !self.retired.is_worth_an_end() || done.is_closed() {
            return;
        }
        let begun = Instant::now();
        let spares = self.retired.memory();
        self.count += 1;
        let Some(name) = self.known.card().as_ref().map(|card| card.name.clone()) else { return };
        let name = format!("{}+{}", name.split('+').next().unwrap_or_default(), self.count);
        let (agent, card) = match open(&self.options, name, &self.arena, spares) {
            Ok(opened) => opened,
            Err(error) => return warn!(%error, "an agent could not be replaced by another one"),
        };
        {
            // Whoever stops waiting takes the card that is there, so that it must not change afterwards.
            let mut known = self.known.card();
            if done.is_closed() {
                return debug!("an agent is not replaced: an update has begun");
            }
            self.metadata = card.metadata.clone();
            *known = Some(Arc::new(card));
        }
        // No update is going on, so that nobody waits for any of it.
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

    fn count_retired(&self) {
        self.known.retired.store(self.retired.len(), Ordering::SeqCst);
    }

    fn start(&mut self, transfer: Transfer) {
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

    /// Asks a peer whether it is there, over a new connection: that of the read has failed.
    fn greet(&mut self, peer: &Card, slot: Slot, deadline: Duration) -> Result<Work, NixlError> {
        self.disconnect(&peer.name);
        let ask = self.next_ask(peer);
        self.request(peer, ask.id, 0, (0, 0), deadline)?;
        Ok(Work::Greeted(ask, slot))
    }

    /// Asks a peer to write from its slot to one of this rank.
    fn ask(
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

    fn say(&self, peer: &str, notice: &Notice) -> Result<(), NixlError> {
        self.agent.notify(peer, &postcard::to_stdvec(notice).map_err(NixlError::Card)?)
    }

    /// Learns to reach a peer, unless it is known; how often a peer was learnt until then.
    fn load(&mut self, name: &str, metadata: &[u8]) -> Result<u64, NixlError> {
        self.count += 1;
        let used = self.count;
        if let Some(loaded) = self.loaded.get_mut(name).filter(|loaded| loaded.metadata == metadata)
        {
            loaded.used = used;
            return Ok(loaded.era);
        }
        self.make_room();
        // A peer that is known already has registered more.
        let named = self.agent.load_peer(metadata)?;
        if named != name {
            self.agent.forget_peer(&named)?;
            return Err(NixlError::Unknown);
        }
        let new = Loaded { metadata: Vec::new(), era: used, asks: None, used };
        let loaded = self.loaded.entry(named).or_insert(new);
        loaded.metadata = metadata.to_vec();
        loaded.used = used;
        Ok(loaded.era)
    }

    /// Forgets the peer that was used longest ago, if there are many: processes that ended never say so.
    fn make_room(&mut self) {
        if self.loaded.len() < PEERS {
            return;
        }
        let idle = self.loaded.iter().filter(|(name, _)| {
            !self.is_under_way_with(name)
                && !self.active.iter().any(|transfer| transfer.peer.name == **name)
        });
        if let Some(name) = idle.min_by_key(|(_, loaded)| loaded.used).map(|(name, _)| name.clone())
        {
            self.disconnect(&name);
        }
    }

    /// Whether the library works on a transfer with a peer. It must not forget the peer before the end: what it knows
    /// of the peer's memory goes then.
    fn is_under_way_with(&self, peer: &str) -> bool {
        let read =
            |active: &Active| matches!(active.work, Work::Read(_)) && active.peer.name == peer;
        self.active.iter().any(read) || self.serving.iter().any(|serving| serving.peer == peer)
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
                // It is done, and was not a moment ago to whoever frees it.
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

    /// Nobody waits for a read any more. The library goes on with it, and so the slot stays in use.
    fn let_linger(arena: &Arena, transfer: &mut Active, error: NixlError) {
        if let Work::Read(raw) = &transfer.work
            && let Some(slot) = raw.memory()
        {
            let peer = &transfer.peer.name;
            arena
                .hold(slot.number(), format!("a read from {peer} that was given up has not ended"));
        }
        transfer.fail(error);
    }

    /// Goes on after a read that has ended with an error.
    fn try_again(&mut self, transfer: Transfer, until: Instant, error: NixlError) {
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

    /// Whether peers ask for what is here.
    fn serves(&self) -> bool {
        self.options.writes || self.asked || !self.serving.is_empty() || self.awaits_peers()
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
            // Nothing was asked.
            Work::Read(_) => self.active.push(transfer),
        }
    }

    /// Starts to write what a peer has asked for.
    fn serve_ask(&mut self, asked: Asked) {
        let known = self.loaded.get(&asked.peer).and_then(|known| known.asks);
        if known.is_some_and(|era| era != asked.ask.era) && self.is_under_way_with(&asked.peer) {
            // An answer takes new connections, and the old ones stay until what goes over them has ended.
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

    /// Learns to reach a peer that asks, over connections that it has not closed.
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

    /// Starts to write a slot to where a peer wants it; if it fails, whether it may have begun.
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

    /// Tells a peer that what it asked for is done.
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

    /// Looks after the writes to peers; whether one ended.
    fn serve(&mut self) -> bool {
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
                // What was on the way may still arrive.
                Some(words) => self.refuse(&peer, id, true, words),
                // Also if it is late: the peer can use the memory again.
                None => self.confirm(&peer, id),
            }
        }
        let postponed = std::mem::take(&mut self.postponed);
        postponed.into_iter().for_each(|asked| self.serve_ask(asked));
        any
    }

    /// Gives up what a peer was asked for. It may still write.
    fn give_up(&mut self, transfer: Active, error: NixlError) {
        let Active { work, peer, done, .. } = transfer;
        match work {
            Work::Asked(lent) => self.retire(lent, &peer),
            Work::Greeted(_, slot) => drop(slot),
            Work::Read(raw) => drop(raw),
        }
        if let Some(done) = done {
            done.tell(Err(error));
        }
    }

    /// Takes memory out of use that a peer may still write to. Its slot gets other memory.
    fn retire(&mut self, lent: Lent, peer: &Card) {
        self.stale |= !self.known.told.load(Ordering::SeqCst);
        let slot = lent.number();
        let Self { retired, agent, arena, metadata, .. } = self;
        let more = || more(agent, arena, metadata);
        let result = retired.give_up(arena, lent, self.reach.writer(peer), more);
        self.count_retired();
        let (peer, kept, bytes) = (&peer.name, self.retired.len(), self.arena.slot_bytes());
        match result {
            Ok(()) => info!(
                peer,
                slot,
                kept,
                bytes,
                "a peer that was given up may still write to a slot: the slot has other memory now"
            ),
            Err(error) => warn!(
                peer, slot, kept, %error,
                "a peer that was given up may still write to a slot, which has no memory until that is over"
            ),
        }
    }

    /// Gives up the transfers with a peer and closes the connections to it: a later transfer begins
    /// with new ones.
    fn forget(&mut self, peer: &str) {
        let active = std::mem::take(&mut self.active).into_iter();
        let (gone, left): (Vec<_>, Vec<_>) =
            active.partition(|transfer| transfer.peer.name == peer);
        self.active = left;
        for mut transfer in gone {
            if matches!(transfer.work, Work::Read(_)) {
                Self::let_linger(&self.arena, &mut transfer, NixlError::Abandoned);
                self.active.push(transfer);
            } else {
                self.give_up(transfer, NixlError::Abandoned);
            }
        }
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (gone, left): (VecDeque<_>, _) =
            waiting.partition(|transfer| transfer.peer.name == peer);
        self.waiting = left;
        for transfer in gone {
            transfer.done.tell(Err(NixlError::Abandoned));
        }
        self.disconnect(peer);
    }

    /// Closes the connections to a peer, as soon as nothing goes over them any more.
    fn disconnect(&mut self, peer: &str) {
        if self.is_under_way_with(peer) {
            self.closing.insert(peer.to_owned());
            return;
        }
        self.closing.remove(peer);
        if self.loaded.remove(peer).is_some()
            && let Err(error) = self.agent.forget_peer(peer)
        {
            warn!(peer, %error, "a peer that failed could not be forgotten");
        }
    }

    /// Closes connections that were to be closed.
    fn close_connections(&mut self) {
        if self.closing.is_empty() {
            return;
        }
        let over = self.closing.iter().filter(|peer| !self.is_under_way_with(peer));
        for peer in over.cloned().collect::<Vec<_>>() {
            self.disconnect(&peer);
        }
    }
}

/// More memory for one slot, which peers can reach.
fn more(agent: &mut RawAgent, arena: &Arena, metadata: &mut Vec<u8>) -> Result<Range, NixlError> {
    let range = arena.spare()?;
    agent.register(range.place().memory)?;
    *metadata = agent.metadata()?;
    Ok(range)
}

/// An agent that has registered an arena, and what peers need to reach it.
pub(crate) fn open(
    options: &AgentOptions,
    name: String,
    arena: &Arena,
    spares: Vec<Memory>,
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
    if !options.interface.is_empty() && std::env::var_os("UCX_NET_DEVICES").is_none() {
        config.push(format!("NET_DEVICES={}", options.interface));
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
    let address = arena.address() as u64;
    let own_thread = options.own_thread || device.is_some();
    let mut memory = arena.memory();
    memory.extend(spares);
    memory.sort_by_key(Memory::address);
    memory.dedup_by_key(|memory| memory.address());
    let agent = RawAgent::new(api, &name, &parameters, memory, own_thread)?;
    // Not before an agent was made: NIXL and its plugins have registered their own ends by then.
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| sys::at_exit(close_all));
    let metadata = agent.metadata()?;
    let (host, process, moves) = (this_host(), Process::this(), false);
    let card = Card { name, metadata, address, slots, slot_bytes, device, host, process, moves };
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

    #[tokio::test]
    async fn interfaces_that_are_not_there_are_named_and_no_peer_is_blamed() {
        let interface = "nowhere9".to_owned();
        let transports = "tcp,self".to_owned();
        let options =
            AgentOptions { error_handling: "peer", interface, transports, ..Default::default() };
        let arena = Arc::new(Arena::new(2, BYTES).unwrap());
        let error = Agent::start(options, "nowhere".into(), arena).await.unwrap_err().to_string();
        assert!(error.contains("NET_DEVICES=nowhere9"), "{error}");
        assert!(error.contains("TLS=tcp,self"), "{error}");
        assert!(!error.contains("peer"), "{error}");
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
            let card = one.0.card().unwrap();
            for seed in 1..5 {
                fill(&one.1, 0, seed).await;
                let slot = transfer(&two, 1, &card, 0).await.unwrap();
                assert!(is_pattern(slot, seed), "other bytes arrived, {writes}");
            }
            two.0.close().await;
            one.0.close().await;
        }
    }

    fn reach(only_tcp: bool, only_tcp_between_hosts: bool, emulates: bool) -> Reach {
        let (host, decided, order) = ("here".into(), HashMap::new(), VecDeque::new());
        Reach { only_tcp, only_tcp_between_hosts, host, emulates, decided, order }
    }

    #[test]
    fn of_agents_that_came_and_went_only_the_last_ones_are_remembered() {
        let mut reach = reach(false, false, false);
        for agent in 0..3 * DECISIONS {
            reach.decide(&agent.to_string(), true);
        }
        assert_eq!((reach.decided.len(), reach.order.len()), (DECISIONS, DECISIONS));
        assert!(reach.is_undecided("0") && !reach.is_undecided(&(3 * DECISIONS - 1).to_string()));
    }

    #[test]
    fn what_can_still_write_after_this_agents_end_is_what_is_on_this_machine_or_on_a_device() {
        let card = |host: &str| Card {
            name: "peer".into(),
            metadata: Vec::new(),
            address: 0,
            slots: 1,
            slot_bytes: 1,
            device: None,
            host: host.into(),
            process: Process::this(),
            moves: false,
        };
        let ends = |host, only_tcp, emulates| {
            let mut reach = reach(only_tcp, true, emulates);
            reach.host = "here/boot".into();
            let writer = reach.writer(&card(host));
            (writer.ends_with_agent, writer.process.is_some())
        };
        assert_eq!(ends("here/boot", false, false), (false, true));
        assert_eq!(ends("a-container/boot", false, false), (false, true));
        assert_eq!(ends("unknown/", false, false), (false, true));
        assert_eq!(ends("elsewhere/other", false, false), (true, false));
        assert_eq!(ends("here/boot", true, false), (true, true));
        assert_eq!(ends("elsewhere/other", true, true), (false, false));
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
            process: None,
            moves: false,
        };
        let elsewhere = Card { host: "elsewhere".into(), ..here.clone() };
        let on_a_device = Card { device: Some(0), ..elsewhere.clone() };
        let excluded = |only_tcp, only_tcp_between_hosts, emulates| {
            let reach = reach(only_tcp, only_tcp_between_hosts, emulates);
            [&here, &elsewhere, &on_a_device].map(|peer| reach.excludes(peer))
        };
        assert_eq!(excluded(false, false, false), [false, false, false]);
        assert_eq!(excluded(false, true, false), [false, true, false]);
        assert_eq!(excluded(true, true, false), [true, true, false]);
        assert_eq!(excluded(true, true, true), [false, false, false]);

        // What was found out of an agent stays, whatever happens to it later.
        let mut reach = reach(false, false, false);
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
            let card = one.0.card().unwrap();
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
        let before = two.1.place(1, BYTES).unwrap().address;
        // An agent without a thread, which takes in nothing.
        let arena = Arena::new(2, BYTES).unwrap();
        let options = AgentOptions { error_handling: "peer", ..Default::default() };
        let name = format!("silent-{}", std::process::id());
        let (_silent, card) = open(&options, name, &arena, Vec::new()).unwrap();
        let card = Arc::new(card);
        let mut told = begin(&two, 1, &card, 0).await.unwrap();
        let waited = tokio::time::timeout(Duration::from_millis(300), &mut told).await;
        assert!(waited.is_err(), "it is still waited for: {waited:?}");
        two.0.forget(&card);
        let error = told.await.unwrap().unwrap_err();
        assert!(matches!(error, NixlError::Abandoned), "{error}");
        assert!(!two.0.moves());
        assert_eq!(two.1.place(1, BYTES).unwrap().address, before);
        // The slot is as good as before, in the same update.
        let other = agent_over("answers", "tcp,tcp,self,").await;
        fill(&other.1, 0, 1).await;
        let card = other.0.card().unwrap();
        assert!(is_pattern(transfer(&two, 1, &card, 0).await.unwrap(), 1));
    }

    #[tokio::test]
    async fn a_slot_whose_writer_was_given_up_is_elsewhere_and_works() {
        let (one, two) = (agent_that("given-up", true).await, agent_that("waits", true).await);
        let three = agent_that("other", true).await;
        let card = one.0.card().unwrap();
        fill(&one.1, 0, 1).await;
        fill(&three.1, 0, 2).await;
        assert!(two.0.moves());
        for round in 0..3 {
            let before = two.1.place(1, BYTES).unwrap().address;
            let error = give_up(&two, 1, &card, 0).await;
            assert!(matches!(error, NixlError::Abandoned), "{error}");
            assert_ne!(two.1.place(1, BYTES).unwrap().address, before, "round {round}");
            assert!(are_disjoint(&two.1), "round {round}");
            // Another one is asked, which has to learn of the new memory, and then the first one again.
            let other = three.0.card().unwrap();
            assert!(is_pattern(transfer(&two, 1, &other, 0).await.unwrap(), 2), "round {round}");
            assert!(is_pattern(transfer(&two, 1, &card, 0).await.unwrap(), 1), "round {round}");
        }
    }

    #[tokio::test]
    async fn nothing_is_fetched_to_a_slot_that_moved_before_anyone_was_told() {
        let (one, two) = (agent_that("writes", true).await, agent_that("untold", true).await);
        let card = one.0.card().unwrap();
        give_up(&two, 1, &card, 0).await;
        let error = transfer(&two, 1, &card, 0).await.unwrap_err();
        assert!(matches!(error, NixlError::Moved), "{error}");
        assert!(two.0.moves());
        drop(transfer(&two, 1, &card, 0).await.unwrap());
    }

    #[tokio::test]
    async fn an_agent_that_is_asked_for_what_it_does_not_have_refuses_at_once() {
        let (one, two) = (agent_that("refuses", true).await, agent_that("asks", true).await);
        let card = Card { slots: 9, ..(*one.0.card().unwrap()).clone() };
        let error = transfer(&two, 0, &Arc::new(card), 7).await.unwrap_err();
        assert!(matches!(error, NixlError::Refused(_)), "{error}");
        let card = one.0.card().unwrap();
        drop(transfer(&two, 0, &card, 1).await.unwrap());
    }

    #[tokio::test]
    async fn an_agent_that_is_gone_is_an_error_and_others_still_work() {
        let (one, two, gone) = (agent("a").await, agent("b").await, agent("c").await);
        let card = gone.0.card().unwrap();
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
        let card = two.0.card().unwrap();
        drop(transfer(&one, 0, &card, 0).await.unwrap());
    }

    #[tokio::test]
    async fn what_is_not_a_card_is_an_error() {
        let one = agent("card").await;
        let card = Card { metadata: b"nonsense".to_vec(), ..(*one.0.card().unwrap()).clone() };
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

    /// An agent without a thread: it says and takes in only what a test has it.
    fn bare(name: &str, transports: &str) -> (RawAgent, Arc<Card>, Arena) {
        let arena = Arena::new(2, BYTES).unwrap();
        let transports = transports.into();
        let options = AgentOptions { transports, error_handling: "peer", ..Default::default() };
        let name = format!("{name}-{}", std::process::id());
        let (agent, card) = open(&options, name, &arena, Vec::new()).unwrap();
        (agent, Arc::new(card), arena)
    }

    /// What an agent without a thread is asked for.
    async fn asked(agent: &mut RawAgent) -> (String, Ask) {
        loop {
            for (peer, bytes) in agent.notices().unwrap() {
                if let Ok(Notice::Ask(ask)) = postcard::from_bytes(&bytes) {
                    return (peer, ask);
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Answers what an agent without a thread was asked for.
    fn answer(agent: &RawAgent, to: &Card, notice: &Notice) {
        agent.load_peer(&to.metadata).unwrap();
        agent.notify(&to.name, &postcard::to_stdvec(notice).unwrap()).unwrap();
    }

    async fn soon<T>(what: impl Future<Output = T>) -> T {
        tokio::time::timeout(DEADLINE, what).await.expect("it does not take that long")
    }

    /// Waits until so many slots' memory is kept for peers, while an agent without a thread does its part.
    async fn until_kept(at: &(Agent, Arc<Arena>), kept: usize, peer: &mut RawAgent) {
        soon(async {
            while at.0.known.retired.load(Ordering::SeqCst) != kept {
                peer.notices().unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    fn are_disjoint(arena: &Arena) -> bool {
        let mut starts: Vec<usize> =
            (0..arena.slots()).map(|slot| arena.place(slot, BYTES).unwrap().address).collect();
        starts.sort_unstable();
        starts.windows(2).all(|two| two[0] + BYTES as usize <= two[1])
    }

    #[tokio::test]
    async fn slots_have_memory_of_their_own_after_peers_that_were_given_up_answer_late() {
        let two = agent_that("late", true).await;
        let (mut one, card, _arena) = bare("answers-late", "");
        for round in 0..4 {
            let mut told = begin(&two, 1, &card, 0).await.unwrap();
            let (_, ask) = soon(asked(&mut one)).await;
            two.0.forget(&card);
            let error = soon(&mut told).await.unwrap().unwrap_err();
            assert!(matches!(error, NixlError::Abandoned), "{error}");
            assert!(are_disjoint(&two.1), "round {round}");
            until_kept(&two, 1, &mut one).await;
            answer(&one, &two.0.card().unwrap(), &Notice::Done { id: ask.id });
            until_kept(&two, 0, &mut one).await;
            assert!(are_disjoint(&two.1), "round {round}");
        }
    }

    #[tokio::test]
    async fn what_another_agent_says_is_no_answer() {
        let two = agent_that("listens", true).await;
        let (mut one, card, _arena) = bare("is-asked", "");
        let (mut three, _, _other) = bare("is-not-asked", "");
        let mut told = begin(&two, 1, &card, 0).await.unwrap();
        let (_, ask) = soon(asked(&mut one)).await;
        let own = two.0.card().unwrap();
        answer(&three, &own, &Notice::Done { id: ask.id });
        answer(&three, &own, &Notice::Refused { id: ask.id, begun: false, words: "no".into() });
        for _ in 0..200 {
            three.notices().unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(told.try_recv().is_err(), "the other agent's words were taken for an answer");
        answer(&one, &own, &Notice::Done { id: ask.id });
        let answered = async {
            loop {
                one.notices().unwrap();
                match told.try_recv() {
                    Err(oneshot::error::TryRecvError::Empty) => {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    told => return told,
                }
            }
        };
        drop(soon(answered).await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn a_slot_stays_where_it_is_only_if_the_refused_write_was_not_begun() {
        for begun in [false, true] {
            let two = agent_that(&format!("is-refused-{begun}"), true).await;
            let (mut one, card, _arena) = bare(&format!("begins-{begun}"), "");
            let before = two.1.place(1, BYTES).unwrap().address;
            let mut told = begin(&two, 1, &card, 0).await.unwrap();
            let (_, ask) = soon(asked(&mut one)).await;
            let words = "the write failed".into();
            answer(&one, &two.0.card().unwrap(), &Notice::Refused { id: ask.id, begun, words });
            let refused = async {
                loop {
                    one.notices().unwrap();
                    if let Ok(told) = told.try_recv() {
                        return told;
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            let error = soon(refused).await.unwrap_err();
            assert!(matches!(error, NixlError::Refused(_)), "{error}");
            let moved = two.1.place(1, BYTES).unwrap().address != before;
            assert_eq!(moved, begun);
            assert!(are_disjoint(&two.1));
        }
    }

    #[tokio::test]
    async fn a_write_that_is_late_is_finished_and_only_then_answered() {
        // Both without threads, so that nothing happens but what is done here.
        let transports = "tcp,self".to_owned();
        let options = AgentOptions { transports, error_handling: "peer", ..Default::default() };
        let from = Arc::new(Arena::new(2, BYTES).unwrap());
        fill(&from, 0, 7).await;
        let name = format!("writes-late-{}", std::process::id());
        let known = Arc::<Known>::default();
        let mut one = Worker::new(options, name, from, known.clone()).unwrap();
        let (mut two, own, arena) = bare("is-stopped", "tcp,self");
        let target = arena.place(1, BYTES).unwrap();
        let ask = Notice::Ask(Ask {
            id: 5,
            slot: 0,
            target: (target.address as u64, BYTES),
            device: None,
            metadata: own.metadata.clone(),
            era: 1,
            millis: 60_000,
        });
        let card = known.card().clone().unwrap();
        answer(&two, &card, &ask);
        let begun = Instant::now();
        while one.serving.is_empty() {
            assert!(begun.elapsed() < DEADLINE, "it was not asked");
            assert_eq!(two.notices().unwrap().len(), 0);
            one.poll();
        }
        // It takes nothing in meanwhile, as one that is stopped.
        one.serving[0].until = Instant::now();
        for _ in 0..10 {
            one.poll();
        }
        assert_eq!(one.serving.len(), 1, "a write was dropped that UCX goes on with");
        let notice = loop {
            assert!(begun.elapsed() < 2 * DEADLINE, "no answer");
            one.poll();
            if let Some((_, bytes)) = two.notices().unwrap().pop() {
                break postcard::from_bytes::<Notice>(&bytes).unwrap();
            }
        };
        assert!(matches!(notice, Notice::Done { id: 5 }), "{notice:?}");
        assert!(is_pattern(arena.try_lock(1, BYTES).unwrap(), 7), "not all of it is there");
        one.close();
    }

    #[tokio::test]
    async fn memory_kept_for_peers_is_used_again_after_the_connections_were_closed() {
        let two = agent_over("renews", "tcp,self").await;
        let three = agent_over("stays", "tcp,self").await;
        fill(&three.1, 0, 3).await;
        let before = two.0.card().unwrap();
        // Nothing to be done: the agent stays.
        two.0.renew(DEADLINE).await;
        assert_eq!(two.0.card().unwrap(), before);
        let mut places = BTreeSet::new();
        for round in 0..6 {
            let (mut one, card, _arena) = bare(&format!("dies-{round}"), "tcp,self");
            let mut told = begin(&two, 1, &card, 0).await.unwrap();
            soon(asked(&mut one)).await;
            two.0.forget(&card);
            assert!(soon(&mut told).await.unwrap().is_err());
            until_kept(&two, 1, &mut one).await;
            two.0.renew(DEADLINE).await;
            assert_eq!(two.0.known.retired.load(Ordering::SeqCst), 0, "round {round}");
            assert!(are_disjoint(&two.1), "round {round}");
            places.insert(two.1.place(1, BYTES).unwrap().address);
            let known = two.0.card().unwrap();
            assert_ne!(known.name, before.name);
            assert!(known.moves, "slots that moved stay moved");
            let card = three.0.card().unwrap();
            assert!(is_pattern(transfer(&two, 1, &card, 0).await.unwrap(), 3), "round {round}");
        }
        assert!(places.len() <= 2, "more memory with each peer: {places:?}");
    }

    #[tokio::test]
    async fn memory_is_kept_for_a_peer_on_this_host_that_may_write_by_itself() {
        let two = agent_that("keeps", true).await;
        let (mut one, card, _arena) = bare("is-here", "");
        let mut told = begin(&two, 1, &card, 0).await.unwrap();
        soon(asked(&mut one)).await;
        two.0.forget(&card);
        assert!(soon(&mut told).await.unwrap().is_err());
        until_kept(&two, 1, &mut one).await;
        let before = two.0.card().unwrap();
        // It is in this process, which has not ended.
        two.0.renew(DEADLINE).await;
        assert_eq!(two.0.known.retired.load(Ordering::SeqCst), 1);
        assert_eq!(two.0.card().unwrap(), before);
    }
}

//! A rank's agent: one thread that has it, and the handle of that thread.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::arena::{Arena, Slot};
use crate::error::NixlError;
use crate::ffi::{ENGINE_CONFIG, RawAgent, RawTransfer};
use crate::sys;

/// How often a transfer is looked at without a pause: short ones end meanwhile.
const SPINS: u32 = 200;
/// The pause between two looks at a longer one.
const PAUSE: Duration = Duration::from_micros(30);

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
    pub(crate) remote: (usize, usize),
    pub(crate) deadline: Duration,
    pub(crate) done: Box<dyn Awaiting>,
}

enum Command {
    Start(Transfer),
    Forget(String),
    Close,
}

/// The handle of an agent's thread. Closed when dropped, without waiting; [`close`](Self::close) waits.
#[derive(Debug)]
pub(crate) struct Agent {
    commands: Sender<Command>,
    ended: tokio::sync::oneshot::Receiver<()>,
    card: Card,
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
        let run = move || {
            let _running = running;
            match Worker::new(&options, name, arena) {
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
        Ok(Self { commands, ended, card })
    }

    pub(crate) fn card(&self) -> &Card {
        &self.card
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
    let (_, card) = Worker::new(&options, format!("probe-{}", std::process::id()), arena)?;
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

/// What the thread has.
struct Worker {
    agent: RawAgent,
    /// The peers whose cards were loaded, by name.
    loaded: HashSet<String>,
    /// Not begun yet. One is under way at a time: of two that share the way here, both would end
    /// late, and those who fetch the first one from here would wait for the second one too.
    waiting: VecDeque<Transfer>,
    /// The one that is under way, and those that have failed and that the library still works on.
    active: Vec<Active>,
}

struct Active {
    raw: RawTransfer,
    peer: Arc<Card>,
    until: Instant,
    deadline: Duration,
    /// In use until the library has let go of it, even if the transfer has failed.
    slot: Slot,
    /// `None` when the end was told.
    done: Option<Box<dyn Awaiting>>,
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
    ) -> Result<(Self, Card), NixlError> {
        let api = sys::load(options.library_dir.as_deref())?;
        let mut config = Vec::new();
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
        let address = arena.address() as u64;
        let agent = RawAgent::new(api, &name, &parameters, arena)?;
        // Not before an agent was made: NIXL and its plugins have registered their own ends by then.
        static REGISTERED: Once = Once::new();
        REGISTERED.call_once(|| sys::at_exit(close_all));
        let metadata = agent.metadata()?;
        let card = Card { name, metadata, address, slots, slot_bytes, device };
        Ok((
            Self { agent, loaded: HashSet::new(), waiting: VecDeque::new(), active: Vec::new() },
            card,
        ))
    }

    fn run(&mut self, inbox: &Receiver<Command>) {
        let mut idle = 0;
        loop {
            let command = if self.active.is_empty() {
                idle = 0;
                inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else if idle < SPINS {
                std::thread::yield_now();
                inbox.try_recv().map_err(|error| match error {
                    TryRecvError::Empty => RecvTimeoutError::Timeout,
                    TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                })
            } else {
                inbox.recv_timeout(PAUSE)
            };
            idle += 1;
            match command {
                Ok(Command::Start(transfer)) => {
                    idle = 0;
                    self.waiting.push_back(transfer);
                }
                Ok(Command::Forget(peer)) => self.forget(&peer),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Command::Close) | Err(RecvTimeoutError::Disconnected) => break,
            }
            self.poll();
            while self.active.iter().all(|transfer| transfer.done.is_none())
                && let Some(transfer) = self.waiting.pop_front()
            {
                self.start(transfer);
            }
        }
        for transfer in self.waiting.drain(..) {
            transfer.done.tell(Err(NixlError::Closed));
        }
        for transfer in &mut self.active {
            transfer.fail(NixlError::Closed);
            if !self.agent.release(&mut transfer.raw) {
                debug!(peer = transfer.peer.name, "the agent is closed within a transfer");
            }
        }
    }

    fn start(&mut self, transfer: Transfer) {
        let Transfer { slot, peer, remote, deadline, done } = transfer;
        if !done.is_awaited() {
            // What is left of an update that has ended: its peer may have gone by now.
            return done.tell(Err(NixlError::Abandoned));
        }
        if slot.range().1 == 0 {
            // An empty bucket; NIXL refuses transfers of nothing.
            return done.tell(Ok(slot));
        }
        let started = self
            .load(&peer)
            .and_then(|()| self.agent.start(&peer.name, slot.range(), remote, peer.device));
        match started {
            Ok(raw) => {
                let until = Instant::now() + deadline;
                self.active.push(Active { raw, peer, until, deadline, slot, done: Some(done) });
            }
            Err(error) => {
                done.tell(Err(error));
                self.forget(&peer.name);
            }
        }
    }

    fn load(&mut self, peer: &Card) -> Result<(), NixlError> {
        if self.loaded.contains(&peer.name) {
            return Ok(());
        }
        let name = self.agent.load_peer(&peer.metadata)?;
        if name != peer.name {
            self.agent.forget_peer(&name)?;
            return Err(NixlError::Unknown);
        }
        self.loaded.insert(name);
        Ok(())
    }

    /// Looks after all transfers.
    fn poll(&mut self) {
        let mut broken = Vec::new();
        let now = Instant::now();
        let agent = &self.agent;
        let mut at = 0;
        while let Some(transfer) = self.active.get_mut(at) {
            if transfer.done.is_some() {
                match agent.is_done(&transfer.raw) {
                    Ok(false) if now < transfer.until => {
                        at += 1;
                        continue;
                    }
                    Ok(true) => {
                        if agent.release(&mut transfer.raw) {
                            let Active { slot, done, .. } = self.active.swap_remove(at);
                            if let Some(done) = done {
                                done.tell(Ok(slot));
                            }
                            continue;
                        }
                        // It is done, and was not a moment ago to whoever releases it.
                        at += 1;
                        continue;
                    }
                    Ok(false) => transfer.fail(NixlError::Slow(transfer.deadline)),
                    Err(error) => transfer.fail(error),
                }
                broken.push(transfer.peer.name.clone());
            }
            // It has failed: it goes when the library lets go of it.
            if agent.release(&mut transfer.raw) {
                self.active.swap_remove(at);
            } else {
                at += 1;
            }
        }
        for peer in broken {
            self.forget(&peer);
        }
    }

    /// Gives up the transfers with a peer and closes the connections to it: a later transfer begins
    /// with new ones.
    fn forget(&mut self, peer: &str) {
        for transfer in self.active.iter_mut().filter(|transfer| transfer.peer.name == peer) {
            transfer.fail(NixlError::Abandoned);
        }
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (gone, left): (VecDeque<_>, _) =
            waiting.partition(|transfer| transfer.peer.name == peer);
        self.waiting = left;
        for transfer in gone {
            transfer.done.tell(Err(NixlError::Abandoned));
        }
        let agent = &self.agent;
        self.active
            .retain_mut(|transfer| transfer.peer.name != peer || !agent.release(&mut transfer.raw));
        if self.loaded.remove(peer)
            && let Err(error) = self.agent.forget_peer(peer)
        {
            warn!(peer, %error, "a peer that failed could not be forgotten");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use engine_core::memory::{Job, Pool};
    use engine_core::{DType, Weight};

    impl Awaiting for tokio::sync::oneshot::Sender<Result<Slot, NixlError>> {
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
        let arena = Arc::new(Arena::new(2, BYTES).unwrap());
        let options = AgentOptions { error_handling: "peer", ..Default::default() };
        let name = format!("{name}-{}", std::process::id());
        (Agent::start(options, name, arena.clone()).await.unwrap(), arena)
    }

    async fn transfer(
        at: &(Agent, Arc<Arena>),
        slot: u32,
        peer: &Arc<Card>,
        remote: (usize, usize),
    ) -> Result<Slot, NixlError> {
        let (tell, told) = tokio::sync::oneshot::channel();
        at.0.transfer(Transfer {
            slot: at.1.lock(slot, remote.1 as u64, DEADLINE).await?,
            peer: peer.clone(),
            remote,
            deadline: DEADLINE,
            done: Box::new(tell),
        });
        told.await.unwrap()
    }

    #[tokio::test]
    async fn bytes_are_read_from_another_agents_slots() {
        let (one, two) = (agent("one").await, agent("two").await);
        let pattern = |seed: usize| (0..BYTES as usize).map(move |at| (at * 7 + seed) as u8);
        let slot = one.1.lock(0, BYTES, DEADLINE).await.unwrap();
        let weight = Weight::new("w", DType::U8, [BYTES], pattern(1).collect::<Vec<u8>>()).unwrap();
        let job = Job { weight, start: 0, len: BYTES, offset: 0 };
        slot.fill(&[job], &Pool::new(1).unwrap(), false).unwrap();

        let card = Arc::new(one.0.card().clone());
        let there = card.range(0, BYTES).unwrap();
        let slot = transfer(&two, 1, &card, there).await.unwrap();
        let bytes = slot.into_storage().to_host().unwrap();
        assert!(bytes.iter().copied().eq(pattern(1)), "other bytes were read");

        two.0.close().await;
        one.0.close().await;
    }

    #[tokio::test]
    async fn an_agent_that_is_gone_is_an_error_and_others_still_work() {
        let (one, two, gone) = (agent("a").await, agent("b").await, agent("c").await);
        let card = Arc::new(gone.0.card().clone());
        let there = card.range(0, BYTES).unwrap();
        drop(transfer(&one, 0, &card, there).await.unwrap());
        gone.0.close().await;
        let error = transfer(&one, 0, &card, there).await.unwrap_err();
        assert!(!matches!(error, NixlError::Slow(_)), "{error}");
        let card = Arc::new(two.0.card().clone());
        let there = card.range(0, BYTES).unwrap();
        drop(transfer(&one, 0, &card, there).await.unwrap());
    }

    #[tokio::test]
    async fn what_is_not_a_card_is_an_error() {
        let one = agent("card").await;
        let card = Card { metadata: b"nonsense".to_vec(), ..one.0.card().clone() };
        assert!(card.range(2, 1).is_err() && card.range(0, BYTES + 1).is_err());
        let there = card.range(0, BYTES).unwrap();
        let error = transfer(&one, 0, &Arc::new(card), there).await;
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

//! A library of collectives between the ranks of one process, stricter than a real one, with configurable faults.
//!
//! It moves bytes by copying them. It refuses what a real library would answer with a hang or with garbage: broadcasts that ranks enqueue
//! in different orders or with different lengths, calls from a thread other than the one that made it, a group id that is used twice. If
//! ranks are on a device of its kind, it allows only one of them in a group, and lets all ranks of a device read the slots of one.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use collective::{
    CollectiveEngine, CollectiveOptions, Communicator, Library, Opened, Shape, Share, SlotGuard,
    Slots, Thread, Wait, build_topology,
};
use engine_core::memory::{Job, Pool};
use engine_core::{
    Availability, Backend, Devices, EngineContext, Error, ErrorKind, Placement, PreparedRollout,
    PreparedTrainer, Result, Storage, WorkerMetadata,
};
use serde::Deserialize;

/// The library's name in configurations.
const NAME: &str = "in-process";
/// The kind of device that has room for one rank of a group.
pub const DEVICE: &str = "seat";

/// The library as a backend: `engine_kwargs.in-process` has the options of every collective backend, and a `fault`.
pub static BACKEND: &dyn Backend = &InProcess;

/// A fault, and when it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// A bit changes on the way to the last member.
    Corrupts,
    /// A broadcast never ends.
    NeverEnds,
    /// A broadcast never ends, and aborting it takes longer than any deadline.
    NeverLetsGo,
    /// The library reports that the group has failed.
    Fails,
    /// A rank that tries to join never does.
    JoinHangs,
    /// Leaving members out fails.
    ShrinkFails,
    /// Its version differs from that of the other ranks.
    OtherVersion,
    /// It cannot share slots between ranks.
    CannotShare,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default)]
struct Options {
    senders: u32,
    relays: bool,
    rebuild_group: bool,
    /// Whether members can be left out of a group.
    shrinks: bool,
    /// How long members take to connect when they enqueue the first broadcast of a group, in milliseconds. Each then waits for all others.
    /// If it is 0, there is nothing to connect.
    connect_ms: u64,
    /// How long the last member of the process takes to leave a group, in milliseconds. Only then the resources of the group are freed.
    leave_ms: u64,
    fault: Option<Fault>,
    /// The rank on which the fault happens.
    fault_rank: u32,
    /// The broadcast at which the fault happens, counted from 1 over the rank's life. It happens once.
    fault_at: u64,
}

impl Default for Options {
    fn default() -> Self {
        let CollectiveOptions { senders, relays, rebuild_group } = CollectiveOptions::default();
        Self {
            senders,
            relays,
            rebuild_group,
            shrinks: true,
            connect_ms: 0,
            leave_ms: 0,
            fault: None,
            fault_rank: 0,
            fault_at: 1,
        }
    }
}

/// How often groups were joined, shrunk and left in this process, by any rank: for tests that compare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Joins of a new group.
    pub joined: u64,
    /// Groups that continued without some of their members.
    pub shrunk: u64,
    /// Groups that were left.
    pub left: u64,
    /// How often a rank began to read another rank's slots in place.
    pub attached: u64,
    /// Threads of a library with `leave_ms` that have ended and freed all that it keeps for a thread.
    pub ended: u64,
}

static JOINED: AtomicU64 = AtomicU64::new(0);
static SHRUNK: AtomicU64 = AtomicU64::new(0);
static LEFT: AtomicU64 = AtomicU64::new(0);
static ATTACHED: AtomicU64 = AtomicU64::new(0);
static ENDED: AtomicU64 = AtomicU64::new(0);

/// The counts so far.
pub fn counts() -> Counts {
    let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
    let (joined, shrunk) = (count(&JOINED), count(&SHRUNK));
    Counts { joined, shrunk, left: count(&LEFT), attached: count(&ATTACHED), ended: count(&ENDED) }
}

#[derive(Debug)]
struct InProcess;

#[async_trait]
impl Backend for InProcess {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "a collective library within a process, for tests"
    }

    fn devices(&self) -> Devices {
        Devices::Kinds(&[DEVICE])
    }

    fn probe(&self) -> Availability {
        Availability::Usable { details: "tests".into() }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        let (library, options) = library(&context)?;
        CollectiveEngine::prepare_trainer(library, context, options).await
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        let (library, options) = library(&context)?;
        CollectiveEngine::prepare_rollout(library, context, options).await
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        build_topology(NAME, workers)
    }
}

fn library(context: &EngineContext) -> Result<(FakeLibrary, CollectiveOptions)> {
    let options: Options = context.config.kwargs(NAME)?;
    let Options { senders, relays, rebuild_group, .. } = options;
    let rank = context.require_control()?.rank();
    let options =
        Options { fault: options.fault.filter(|_| rank.0 == options.fault_rank), ..options };
    Ok((FakeLibrary { options }, CollectiveOptions { senders, relays, rebuild_group }))
}

#[derive(Debug)]
struct FakeLibrary {
    options: Options,
}

#[async_trait]
impl Library for FakeLibrary {
    type Communicator = FakeCommunicator;

    fn name(&self) -> &'static str {
        NAME
    }

    fn default_bucket_bytes(&self) -> u64 {
        1 << 20
    }

    async fn open(
        &self,
        context: &EngineContext,
        shape: Shape,
        _: &Pool,
    ) -> Result<Opened<FakeCommunicator>> {
        let device = &context.config.device;
        let device = (device.kind() == DEVICE).then(|| device.to_string());
        let memory = Arc::new(FakeMemory::new(shape, device.clone()));
        let (options, own) = (self.options, memory.clone());
        let thread = Thread::start("ckpt-fake", move || Ok(FakeCommunicator::new(own, options)));
        let version = if options.fault == Some(Fault::OtherVersion) { "2" } else { "1" };
        let version = format!("in-process {version}");
        let key = match self.options.fault {
            Some(Fault::CannotShare) => Err("this library is too old to share memory".into()),
            _ => Ok(Bytes::copy_from_slice(&memory.number.to_le_bytes())),
        };
        if key.is_ok() && device.is_some() {
            lock(&SHARED).insert(memory.number, Arc::downgrade(&memory));
        }
        let share = device.map(|device| Share { device, key });
        Ok(Opened { thread: thread.await?, slots: memory, version, share })
    }
}

/// A rank's slots.
#[derive(Debug)]
struct FakeMemory {
    number: u64,
    device: Option<String>,
    /// Empty once they are freed.
    slots: Mutex<Vec<Arc<Mutex<Vec<u8>>>>>,
    /// What others see of the slots: their contents when each last settled.
    settled: Mutex<HashMap<u32, Vec<u8>>>,
    /// Another rank's slots, which are read instead.
    attached: Mutex<Option<Arc<FakeMemory>>>,
}

/// The slots that other ranks may read, by their numbers.
static SHARED: LazyLock<Mutex<HashMap<u64, Weak<FakeMemory>>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeMemory {
    fn new(shape: Shape, device: Option<String>) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let slot = || Arc::new(Mutex::new(vec![0xdb; shape.slot_bytes as usize]));
        Self {
            number: NUMBERS.fetch_add(1, Ordering::SeqCst),
            device,
            slots: Mutex::new((0..shape.slots).map(|_| slot()).collect()),
            settled: Mutex::default(),
            attached: Mutex::default(),
        }
    }

    fn slot(&self, slot: u32) -> Arc<Mutex<Vec<u8>>> {
        lock(&self.slots).get(slot as usize).expect("slots that are not freed").clone()
    }
}

#[async_trait]
impl Slots for FakeMemory {
    async fn fill(
        &self,
        slot: SlotGuard,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        let (memory, threads) = (self.slot(slot.index()), pool.clone());
        pool.start(move || {
            let sum = threads.encode(&jobs, &mut lock(&memory), digests);
            drop(slot);
            sum
        })
        .await
    }

    fn view(&self, slot: SlotGuard, filled: u64) -> Result<Storage> {
        let bytes = match &*lock(&self.attached) {
            Some(other) => lock(&other.settled).get(&slot.index()).cloned().unwrap_or_default(),
            None => lock(&self.slot(slot.index())).clone(),
        };
        // Bytes that never settled are not visible.
        let bytes = &bytes[..bytes.len().min(filled as usize)];
        let mut aligned = vec![0; bytes.len() + 256];
        let start = aligned.as_ptr().align_offset(256);
        aligned[start..start + bytes.len()].copy_from_slice(bytes);
        let view = Bytes::from(aligned).slice(start..start + bytes.len());
        Ok(Storage::from(view).guarded(slot))
    }
}

/// The groups of this process, by their ids.
static WORLD: LazyLock<Mutex<HashMap<u64, Arc<Mutex<World>>>>> = LazyLock::new(Mutex::default);

/// A group as all of its members see it.
#[derive(Debug, Default)]
struct World {
    members: HashMap<u32, Arc<FakeMemory>>,
    /// The members that have enqueued a broadcast.
    connected: BTreeSet<u32>,
    /// The members that have completed each shrinking.
    shrunk: HashMap<u64, BTreeSet<u32>>,
    /// The broadcasts, in their order.
    broadcasts: Vec<Enqueued>,
    devices: BTreeSet<String>,
    left: usize,
    failed: Option<String>,
}

#[derive(Debug)]
struct Enqueued {
    slot: u32,
    len: u64,
    by: BTreeSet<u32>,
    corrupt: bool,
    done: bool,
}

#[derive(Debug)]
struct Membership {
    world: Arc<Mutex<World>>,
    place: u32,
    /// The remaining places, the sender's first.
    places: Vec<u32>,
    shrinks: u64,
    enqueued: usize,
}

#[derive(Debug)]
struct FakeCommunicator {
    memory: Arc<FakeMemory>,
    options: Options,
    groups: HashMap<usize, Membership>,
    broadcasts: u64,
    thread: ThreadId,
}

fn error(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::new(kind, "in the fake library", message)
}

/// Stands for what a library keeps for each thread that calls it. Dropped when the thread has ended.
struct OfThread;

impl Drop for OfThread {
    fn drop(&mut self) {
        // A rank that does not wait for the thread goes on before.
        std::thread::sleep(Duration::from_millis(50));
        ENDED.fetch_add(1, Ordering::SeqCst);
    }
}

thread_local! {
    static OF_THREAD: OfThread = const { OfThread };
}

/// The pause between two checks of the other members.
const PAUSE: Duration = Duration::from_micros(100);

impl FakeCommunicator {
    fn new(memory: Arc<FakeMemory>, options: Options) -> Self {
        if options.leave_ms > 0 {
            OF_THREAD.with(|_| ());
        }
        let thread = std::thread::current().id();
        Self { memory, options, groups: HashMap::new(), broadcasts: 0, thread }
    }

    fn check_thread(&self) {
        assert_eq!(std::thread::current().id(), self.thread, "called from another thread");
    }

    fn group(&mut self, group: usize) -> Result<&mut Membership> {
        let refuse = || error(ErrorKind::State, format!("not in group {group}"));
        self.groups.get_mut(&group).ok_or_else(refuse)
    }

    /// Connects with all members, all of which have to reach their first broadcast for that.
    fn connect(&mut self, group: usize, wait: &Wait<'_>) -> Result<()> {
        let takes = Duration::from_millis(self.options.connect_ms);
        let member = self.group(group)?;
        let begun = Instant::now();
        if member.enqueued > 0 {
            return Ok(());
        }
        loop {
            wait.check("connecting a group of the fake library")?;
            let mut world = lock(&member.world);
            if begun.elapsed() >= takes {
                world.connected.insert(member.place);
            }
            if member.places.iter().all(|place| world.connected.contains(place)) {
                return Ok(());
            }
            drop(world);
            std::thread::sleep(PAUSE);
        }
    }

    /// Whether the fault happens now.
    fn strikes(&self, fault: Fault) -> bool {
        self.options.fault == Some(fault) && self.broadcasts == self.options.fault_at
    }
}

impl Communicator for FakeCommunicator {
    fn new_group(&mut self) -> Result<Bytes> {
        self.check_thread();
        static IDS: AtomicU64 = AtomicU64::new(1);
        let id = IDS.fetch_add(1, Ordering::SeqCst);
        lock(&WORLD).insert(id, Arc::default());
        Ok(Bytes::copy_from_slice(&id.to_le_bytes()))
    }

    fn join(
        &mut self,
        group: usize,
        id: &[u8],
        size: u32,
        place: u32,
        wait: &Wait<'_>,
    ) -> Result<()> {
        self.check_thread();
        let hangs = self.options.fault.take_if(|fault| *fault == Fault::JoinHangs).is_some();
        let id = id.try_into().map_err(|_| error(ErrorKind::Protocol, "no id of mine"))?;
        let world = lock(&WORLD).get(&u64::from_le_bytes(id)).cloned();
        let world = world.ok_or_else(|| error(ErrorKind::State, "an id that is used up"))?;
        if !hangs && lock(&world).members.insert(place, self.memory.clone()).is_some() {
            return Err(error(ErrorKind::State, format!("place {place} is taken")));
        }
        if let Some(device) = self.memory.device.clone()
            && !lock(&world).devices.insert(device.clone())
        {
            return Err(error(
                ErrorKind::Config,
                format!("two ranks of the group are on {device}"),
            ));
        }
        while hangs || lock(&world).members.len() < size as usize {
            wait.check("joining a group of the fake library")?;
            std::thread::sleep(PAUSE);
        }
        lock(&WORLD).remove(&u64::from_le_bytes(id));
        JOINED.fetch_add(1, Ordering::SeqCst);
        let places = (0..size).collect();
        let left =
            self.groups.insert(group, Membership { world, place, places, shrinks: 0, enqueued: 0 });
        if left.is_some() {
            return Err(error(ErrorKind::State, format!("group {group} was never left")));
        }
        Ok(())
    }

    fn can_give_up_joining(&self) -> bool {
        true
    }

    fn can_shrink(&self) -> bool {
        self.options.shrinks
    }

    fn shrink(&mut self, group: usize, gone: &[u32], wait: &Wait<'_>) -> Result<()> {
        self.check_thread();
        if self.options.fault.take_if(|fault| *fault == Fault::ShrinkFails).is_some() {
            return Err(error(ErrorKind::Backend, "it cannot leave anyone out today"));
        }
        let member = self.group(group)?;
        let gone: Vec<u32> = gone.iter().map(|at| member.places[*at as usize]).collect();
        member.places.retain(|place| !gone.contains(place));
        member.shrinks += 1;
        let number = member.shrinks;
        lock(&member.world).shrunk.entry(number).or_default().insert(member.place);
        loop {
            let world = lock(&member.world);
            if world.shrunk[&number].len() == member.places.len() {
                break;
            }
            drop(world);
            wait.check("shrinking a group of the fake library")?;
            std::thread::sleep(PAUSE);
        }
        SHRUNK.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn broadcast(&mut self, group: usize, slot: u32, len: u64, wait: &Wait<'_>) -> Result<()> {
        self.check_thread();
        if self.options.connect_ms > 0 {
            self.connect(group, wait)?;
        }
        self.broadcasts += 1;
        let hangs = self.strikes(Fault::NeverEnds) || self.strikes(Fault::NeverLetsGo);
        let corrupts = self.strikes(Fault::Corrupts);
        let fails = self.strikes(Fault::Fails);
        let member = self.group(group)?;
        let mut world = lock(&member.world);
        if fails {
            world.failed = Some("an asynchronous error".into());
        }
        let at = member.enqueued;
        member.enqueued += 1;
        if world.broadcasts.len() == at {
            world.broadcasts.push(Enqueued {
                slot,
                len,
                by: BTreeSet::new(),
                corrupt: false,
                done: false,
            });
        }
        let enqueued = &mut world.broadcasts[at];
        if (enqueued.slot, enqueued.len) != (slot, len) {
            let words = format!(
                "place {} enqueues {len} bytes of slot {slot}, another one {} of slot {}",
                member.place, enqueued.len, enqueued.slot
            );
            world.failed = Some(words.clone());
            return Err(error(ErrorKind::Protocol, words));
        }
        enqueued.corrupt |= corrupts;
        if !hangs {
            enqueued.by.insert(member.place);
        }
        if !member.places.iter().all(|place| enqueued.by.contains(place)) {
            return Ok(());
        }
        enqueued.done = true;
        let corrupt = enqueued.corrupt;
        let len = len as usize;
        let source = lock(&world.members[&0].slot(slot))[..len].to_vec();
        for place in &member.places[1..] {
            lock(&world.members[place].slot(slot))[..len].copy_from_slice(&source);
        }
        let last = member.places.last().filter(|_| corrupt);
        if let Some(place) = last {
            lock(&world.members[place].slot(slot))[len / 2] ^= 1;
        }
        Ok(())
    }

    fn settle(&mut self, slot: u32, _: &Wait<'_>) -> Result<()> {
        self.check_thread();
        let bytes = lock(&self.memory.slot(slot)).clone();
        lock(&self.memory.settled).insert(slot, bytes);
        Ok(())
    }

    fn attach(&mut self, key: &[u8]) -> Result<()> {
        self.check_thread();
        let number = key.try_into().map(u64::from_le_bytes);
        let number = number.map_err(|_| error(ErrorKind::Protocol, "no key of mine"))?;
        let other = lock(&SHARED).get(&number).and_then(Weak::upgrade);
        let other = other.ok_or_else(|| error(ErrorKind::State, "the slots are gone"))?;
        if other.device.is_none() || other.device != self.memory.device {
            return Err(error(ErrorKind::Config, "they are on another device"));
        }
        ATTACHED.fetch_add(1, Ordering::SeqCst);
        lock(&self.memory.slots).clear();
        if lock(&self.memory.attached).replace(other).is_some() {
            return Err(error(ErrorKind::State, "it is attached already"));
        }
        Ok(())
    }

    fn detach(&mut self) {
        self.check_thread();
        assert!(lock(&self.memory.attached).take().is_some(), "it is not attached");
    }

    fn ended(&mut self, group: usize) -> Result<u64> {
        self.check_thread();
        let member = self.group(group)?;
        let world = lock(&member.world);
        match &world.failed {
            Some(words) => Err(error(ErrorKind::Backend, words.clone())),
            None => Ok(world.broadcasts.iter().take_while(|one| one.done).count() as u64),
        }
    }

    fn leave_groups(&mut self, groups: &[usize]) {
        self.check_thread();
        for group in groups.iter().filter_map(|group| self.groups.remove(group)) {
            lock(&group.world).left += 1;
            LEFT.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn leave(&mut self) {
        self.check_thread();
        if self.strikes(Fault::NeverLetsGo) && !self.groups.is_empty() {
            std::thread::sleep(Duration::from_secs(4));
        }
        for (_, group) in self.groups.drain() {
            let left = {
                let mut world = lock(&group.world);
                world.left += 1;
                world.left
            };
            if left == group.places.len() {
                std::thread::sleep(Duration::from_millis(self.options.leave_ms));
            }
            LEFT.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Drop for FakeCommunicator {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.groups.is_empty(), "{} groups were never left", self.groups.len());
        }
    }
}

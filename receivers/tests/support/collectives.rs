//! A library of collectives between the tasks of a process, with what is inconvenient about NCCL: members find one another
//! by an id of 128 bytes, a call ends when all have made it and not before, and nothing but the trainer has a deadline.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use collective::{
    Communicator, Library, Opened, Shape, SharedSlot, SlotGuard, Slots, Thread, Wait,
};
use engine_core::memory::{Job, Pool};
use engine_core::{DeviceChoice, EngineContext, Error, ErrorKind, Result, Storage};

use super::unpickle::Said;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The worlds that were begun in this process, by their ids.
static WORLDS: LazyLock<Mutex<Worlds>> = LazyLock::new(Mutex::default);

type Worlds = HashMap<Vec<u8>, Arc<Mutex<World>>>;

#[derive(Debug, Default)]
struct World {
    size: u32,
    joined: BTreeSet<u32>,
    warm: BTreeSet<u32>,
    casts: Vec<Cast>,
    /// Whether bytes go from member to member, so that nobody has them before all take part.
    is_ring: bool,
}

#[derive(Debug)]
struct Cast {
    bytes: Vec<u8>,
    begun: BTreeSet<u32>,
    received: BTreeSet<u32>,
}

/// The library, as the trainer uses it.
#[derive(Clone, Debug)]
pub(crate) struct InProcess {
    pub(crate) bucket_bytes: u64,
    pub(crate) is_ring: bool,
    /// The GPUs on which other processes read slots; the trainer's own if there are none.
    pub(crate) devices: Vec<DeviceChoice>,
}

#[async_trait]
impl Library for InProcess {
    type Communicator = Trainer;

    fn name(&self) -> &'static str {
        "in-process"
    }

    fn default_bucket_bytes(&self) -> u64 {
        self.bucket_bytes
    }

    async fn open(&self, _: &EngineContext, shape: Shape, _: &Pool) -> Result<Opened<Trainer>> {
        let bytes = (u64::from(shape.slots) * shape.slot_bytes) as usize;
        let number = |device: &DeviceChoice| device.ordinal().unwrap_or(0) as usize;
        let readers = match &self.devices[..] {
            [] => vec![0],
            devices => devices.iter().map(number).collect(),
        };
        let arena = || Arc::new(Mutex::new(vec![0; bytes]));
        let arenas = DEVICES.map(|_| arena()).into();
        let slots = HostSlots { shape, arenas, readers, enlarged: Arc::default() };
        let (own, is_ring) = (slots.clone(), self.is_ring);
        let start = move || Ok(Trainer { slots: own, world: None, ended: 0, is_ring });
        let thread = Thread::start("ckpt-fake", start).await?;
        let slots = Arc::new(slots);
        Ok(Opened { thread, slots, version: "in-process".into(), share: None })
    }
}

/// An allocation.
type Memory = Arc<Mutex<Vec<u8>>>;

/// The GPUs of these tests. The trainer is on the first one.
pub(crate) const DEVICES: [&str; 3] = [
    "8a1d0b2c-0001-0002-0003-0123456789ab",
    "8a1d0b2c-0001-0002-0003-0123456789ac",
    "8a1d0b2c-0001-0002-0003-0123456789ad",
];

/// What others may read, by its handles, and the GPU that has it.
static SHARED: LazyLock<Mutex<Shared>> = LazyLock::new(Mutex::default);

type Shared = HashMap<Vec<u8>, (usize, Memory)>;

/// What a process on a GPU finds at `rebuild_cuda_tensor`'s arguments: the bytes of the tensor.
pub(crate) fn rebuilt(arguments: &[Said], gpu: &str) -> std::result::Result<Vec<u8>, String> {
    let text = |at: usize| arguments.get(at).and_then(Said::text).unwrap_or_default();
    let int = |at: usize| arguments.get(at).and_then(Said::int);
    let number = |at: usize| {
        let items = arguments.get(at).and_then(Said::items).unwrap_or_default();
        items.first().and_then(Said::int)
    };
    let types = (text(0), text(4), text(5));
    if types != ("torch.Tensor", "torch.storage.TypedStorage", "torch.uint8") {
        return Err(format!("another kind of tensor: {types:?}"));
    }
    let [Some(len), Some(1), Some(0), Some(size), Some(start)] =
        [number(1), number(2), int(3), int(8), int(9)]
    else {
        return Err(format!("other places: {arguments:?}"));
    };
    let ends = [Said::Bool(false), Said::Int(0), Said::Bool(false)];
    if arguments.len() != 15 || [10, 12, 14].map(|at| arguments[at].clone()) != ends || len > size {
        return Err(format!("other arguments: {arguments:?}"));
    }
    let (Said::Bytes(handle), Said::Bytes(_), Said::Bytes(_)) =
        (&arguments[7], &arguments[11], &arguments[13])
    else {
        return Err("handles are bytes".into());
    };
    let (device, memory) = lock(&SHARED).get(handle).cloned().ok_or("invalid resource handle")?;
    if DEVICES[device] != gpu {
        return Err(format!("the memory is on {}, and this process on {gpu}", DEVICES[device]));
    }
    let memory = lock(&memory);
    let place = start as usize..(start + len) as usize;
    memory.get(place).map(<[u8]>::to_vec).ok_or_else(|| "out of the allocation".into())
}

/// Slots in one allocation on each GPU, but for those that were enlarged.
#[derive(Clone, Debug)]
struct HostSlots {
    shape: Shape,
    arenas: Vec<Memory>,
    /// The GPUs on which they are read.
    readers: Vec<usize>,
    enlarged: Arc<Mutex<HashMap<(usize, u32), Memory>>>,
}

impl HostSlots {
    /// The allocation that a slot is in, and its place there.
    fn on(&self, gpu: usize, slot: u32) -> (Memory, Range<usize>) {
        if let Some(own) = lock(&self.enlarged).get(&(gpu, slot)) {
            let len = lock(own).len();
            return (own.clone(), 0..len);
        }
        let start = (u64::from(slot) * self.shape.slot_bytes) as usize;
        (self.arenas[gpu].clone(), start..start + self.shape.slot_bytes as usize)
    }

    fn of(&self, slot: u32) -> (Memory, Range<usize>) {
        self.on(0, slot)
    }
}

#[async_trait]
impl Slots for HostSlots {
    async fn fill(
        &self,
        slot: SlotGuard,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        let ((memory, place), threads) = (self.of(slot.index()), pool.clone());
        let others: Vec<_> = self.readers.iter().filter(|gpu| **gpu != 0).copied().collect();
        let others: Vec<_> = others.into_iter().map(|gpu| self.on(gpu, slot.index())).collect();
        pool.start(move || {
            let sum = threads.encode(&jobs, &mut lock(&memory)[place.clone()], digests);
            for (other, there) in others {
                lock(&other)[there].copy_from_slice(&lock(&memory)[place.clone()]);
            }
            drop(slot);
            sum
        })
        .await
    }

    async fn enlarge(&self, slot: SlotGuard, bytes: u64) -> Result<SlotGuard> {
        if self.of(slot.index()).1.len() < bytes as usize {
            for gpu in 0..DEVICES.len() {
                let own = Arc::new(Mutex::new(vec![0; bytes as usize]));
                lock(&self.enlarged).insert((gpu, slot.index()), own);
            }
        }
        Ok(slot)
    }

    fn shared(&self, slot: &SlotGuard) -> Result<Vec<SharedSlot>> {
        let on = |gpu: &usize| {
            let (memory, place) = self.on(*gpu, slot.index());
            // As CUDA's handles, which name an allocation: another one once the slot was enlarged.
            let mut handle = vec![0xc5; 64];
            handle[..8].copy_from_slice(&(Arc::as_ptr(&memory) as u64).to_le_bytes());
            lock(&SHARED).insert(handle.clone(), (*gpu, memory));
            let (start, bytes) = (place.start as u64, place.len() as u64);
            SharedSlot { device: DEVICES[*gpu].into(), handle, start, bytes }
        };
        Ok(self.readers.iter().map(on).collect())
    }

    fn view(&self, _: SlotGuard, _: u64) -> Result<Storage> {
        unreachable!("trainers look at nothing")
    }
}

/// Member 0 of a world.
#[derive(Debug)]
pub(crate) struct Trainer {
    slots: HostSlots,
    world: Option<Arc<Mutex<World>>>,
    ended: u64,
    is_ring: bool,
}

impl Trainer {
    fn world(&self) -> Result<Arc<Mutex<World>>> {
        let refuse = || Error::new(ErrorKind::State, "in the fake library", "in no world");
        self.world.clone().ok_or_else(refuse)
    }

    fn until(&self, wait: &Wait<'_>, what: &str, done: impl Fn(&World) -> bool) -> Result<()> {
        let world = self.world()?;
        while !done(&lock(&world)) {
            wait.check(what)?;
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }
}

impl Communicator for Trainer {
    fn new_group(&mut self) -> Result<Bytes> {
        static NUMBERS: Mutex<u64> = Mutex::new(0);
        let mut number = lock(&NUMBERS);
        *number += 1;
        let mut id = vec![0x5a; 128];
        id[..8].copy_from_slice(&number.to_le_bytes());
        lock(&WORLDS).insert(id.clone(), Arc::default());
        Ok(id.into())
    }

    fn join(&mut self, _: usize, id: &[u8], size: u32, place: u32, wait: &Wait<'_>) -> Result<()> {
        let world = lock(&WORLDS).get(id).cloned().expect("an id of this library");
        {
            let mut world = lock(&world);
            (world.size, world.is_ring) = (size, self.is_ring);
            world.joined.insert(place);
        }
        (self.world, self.ended) = (Some(world), 0);
        self.until(wait, "joining a world of the fake library", |world| {
            world.joined.len() == size as usize
        })
    }

    fn shrink(&mut self, _: usize, _: &[u32], _: &Wait<'_>) -> Result<()> {
        unreachable!("worlds are formed anew")
    }

    fn greet(&mut self, _: usize, wait: &Wait<'_>) -> Result<()> {
        lock(&*self.world()?).warm.insert(0);
        self.until(wait, "warming up", |world| world.warm.len() == world.size as usize)
    }

    fn broadcast(&mut self, group: usize, slot: u32, len: u64, wait: &Wait<'_>) -> Result<()> {
        self.broadcast_part(group, slot, 0..len, wait)
    }

    fn broadcast_part(
        &mut self,
        _: usize,
        slot: u32,
        part: Range<u64>,
        _: &Wait<'_>,
    ) -> Result<()> {
        let (memory, place) = self.slots.of(slot);
        let bytes = lock(&memory)[place][part.start as usize..part.end as usize].to_vec();
        lock(&*self.world()?).casts.push(Cast {
            bytes,
            begun: BTreeSet::new(),
            received: BTreeSet::new(),
        });
        Ok(())
    }

    fn ended(&mut self, _: usize) -> Result<u64> {
        let world = self.world()?;
        let world = lock(&world);
        let all = world.size as usize - 1;
        let done = world.casts.iter().take_while(|cast| cast.received.len() == all);
        self.ended = done.count() as u64;
        Ok(self.ended)
    }

    fn leave_groups(&mut self, _: &[usize]) {
        self.leave();
    }

    fn leave(&mut self) {
        // The others wait on: nobody tells them.
        self.world = None;
    }
}

/// A worker's end of a world.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    world: Arc<Mutex<World>>,
    place: u32,
    received: usize,
}

async fn until<T>(world: &Mutex<World>, mut found: impl FnMut(&mut World) -> Option<T>) -> T {
    loop {
        if let Some(found) = found(&mut lock(world)) {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

impl Member {
    /// Joins, with the all-reduce that vLLM's workers begin with if it is asked for. Waits as long as it takes.
    pub(crate) async fn join(id: &[u8], place: u32, size: u32, warms: bool) -> Self {
        let world = lock(&WORLDS).get(id).cloned();
        // Nobody answers for another id: that is a wait without an end.
        let Some(world) = world else { return std::future::pending().await };
        assert!(lock(&world).joined.insert(place), "two workers are member {place}");
        until(&world, |world| (world.joined.len() == size as usize).then_some(())).await;
        assert_eq!(lock(&world).size, size, "the trainer counts other members");
        if warms {
            lock(&world).warm.insert(place);
            until(&world, |world| (world.warm.len() == size as usize).then_some(())).await;
        }
        Self { world, place, received: 0 }
    }

    /// Takes part in the next broadcast.
    pub(crate) async fn receive(&mut self, len: usize) -> Vec<u8> {
        let (at, place) = (self.received, self.place);
        self.received += 1;
        until(&self.world, |world| {
            let (others, is_ring) = (world.size as usize - 1, world.is_ring);
            let cast = world.casts.get_mut(at)?;
            assert_eq!(cast.bytes.len(), len, "the trainer broadcasts another length");
            cast.begun.insert(place);
            if is_ring && cast.begun.len() < others {
                return None;
            }
            cast.received.insert(place);
            Some(cast.bytes.clone())
        })
        .await
    }
}

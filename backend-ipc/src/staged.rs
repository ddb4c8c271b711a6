//! Staging memory for tensors that trainers of other processes cannot write to: parcels in a file that both map.
//!
//! Each trainer of an update has a *lane*: two slots, which it fills in turn and the rollout empties in turn. A word of each slot says whose
//! turn it is. Whether a trainer may still use its lane is governed by the [lease](crate::lease) of the update, as with memory that it
//! writes to: a lane is given to nobody else before that is over. A thread of the rollout scatters parcels as long as the memory is lent.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine_core::{Error, Rank, Result};
use placed::parcels::{Carrier, RUNS, Room, Run, Scatter};
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::ffi::Mapping;
use crate::lease::Terms;
use crate::lent::lock;
use crate::memfile::{FileAddress, MemFile};
use crate::segment::{allocate, memory_in_words};

/// The slots of a lane: while the rollout empties one, the trainer fills the other.
const SLOTS: usize = 2;
/// The most bytes of a parcel: they stay in a core's cache between the two copies.
pub(crate) const MOST: u64 = 2 << 20;
/// The least bytes of a parcel, however many trainers share the memory.
const LEAST: u64 = 64 << 10;

/// Where a slot's words are: whose turn it is, and how many runs its parcel has.
const TURN: usize = 0;
const COUNT: usize = 4;
/// Where its runs begin, and behind them its bytes.
const HEADER: usize = 64;
const BYTES: usize = HEADER + RUNS * Run::BYTES;

/// It is the trainer's turn.
const EMPTY: u32 = 0;
/// It is the rollout's turn.
const FULL: u32 = 1;
/// The rollout has found a parcel that does not belong to it, and takes no more.
const REFUSED: u32 = 2;

/// How often a thread looks without a pause, and how long its pauses are then: short, and if nothing comes for long, longer.
const SPINS: u32 = 200;
const PAUSE: Duration = Duration::from_micros(50);
const LONG: u32 = 20_000;
const LONG_PAUSE: Duration = Duration::from_millis(1);
/// How often a trainer that waits looks whether the rollout is still there.
const LOOK: Duration = Duration::from_millis(20);

/// Pauses between looks.
#[derive(Debug, Default)]
struct Pauses(u32);

impl Pauses {
    fn pause(&mut self) {
        self.0 = self.0.saturating_add(1);
        if self.0 <= SPINS {
            return std::thread::yield_now();
        }
        std::thread::sleep(if self.0 <= LONG { PAUSE } else { LONG_PAUSE });
    }
}

/// What trainers need to hand parcels over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StagingOffer {
    pub(crate) file: FileAddress,
    /// The bytes of a parcel.
    slot_bytes: u64,
    /// The trainers, in the order of their lanes.
    lanes: Vec<Rank>,
}

/// Lanes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    lanes: usize,
    slot_bytes: usize,
}

impl Shape {
    /// For so many trainers, with about so many bytes together.
    fn new(lanes: usize, bytes: u64) -> Self {
        let slots = (lanes * SLOTS).max(1) as u64;
        let slot_bytes = (bytes / slots).clamp(LEAST, MOST) / 64 * 64;
        Self { lanes, slot_bytes: slot_bytes as usize }
    }

    fn slot(self, lane: usize, number: usize) -> usize {
        (lane * SLOTS + number) * (BYTES + self.slot_bytes)
    }

    fn bytes(self) -> usize {
        self.slot(self.lanes, 0)
    }
}

/// A rollout's staging memory.
#[derive(Debug)]
pub(crate) struct Staging {
    to: Arc<dyn Scatter>,
    /// What all lanes may take together.
    bytes: u64,
    /// Kept from one update to the next.
    memory: Option<(Shape, Arc<Mapping>, MemFile)>,
    scattering: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

impl Staging {
    /// What comes is scattered to tensors. All lanes together take at most so many bytes, if that is enough for the smallest ones.
    pub(crate) fn new(to: Arc<dyn Scatter>, bytes: u64) -> Self {
        Self { to, bytes, memory: None, scattering: None }
    }

    /// Takes parcels of these trainers. None of those before can hand any over.
    pub(crate) fn begin(&mut self, trainers: &[Rank]) -> Result<StagingOffer, SegmentError> {
        let shape = Shape::new(trainers.len(), self.bytes);
        let known = self.memory.take().filter(|(known, ..)| *known == shape);
        let (_, mapping, file) = match known {
            Some(known) => known,
            None => {
                let needed = shape.bytes().max(1) as u64;
                let full = || SegmentError::NoMemoryToLend { needed, available: memory_in_words() };
                let (file, mapping) = allocate("ckpt-engine-parcels", needed, full)?;
                (shape, Arc::new(mapping), file)
            }
        };
        for slot in slots(shape) {
            // A trainer that has died may have left a parcel.
            mapping.word(slot + TURN).store(EMPTY, Ordering::Release);
        }
        let (stop, theirs) = (Arc::new(AtomicBool::new(false)), mapping.clone());
        let (stopped, to) = (stop.clone(), self.to.clone());
        let offer = StagingOffer {
            file: file.address(),
            slot_bytes: shape.slot_bytes as u64,
            lanes: trainers.to_vec(),
        };
        self.memory = Some((shape, mapping, file));
        let run = move || take_parcels(shape, &theirs, &*to, &stopped);
        let thread = std::thread::Builder::new().name("ckpt-parcels".into()).spawn(run);
        let thread = thread.map_err(|error| SegmentError::NoThread(error.to_string()))?;
        self.scattering = Some((stop, thread));
        Ok(offer)
    }

    /// Takes no more parcels, and returns whether nothing is scattered any more. Does not block.
    pub(crate) fn end(&mut self) -> bool {
        let Some((stop, thread)) = &self.scattering else { return true };
        stop.store(true, Ordering::Release);
        let ended = thread.is_finished();
        if ended {
            self.scattering = None;
        }
        ended
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.scattering.take() {
            stop.store(true, Ordering::Release);
            // The tensors are the program's again.
            if thread.join().is_err() {
                tracing::warn!("the thread that scatters parcels has panicked");
            }
        }
    }
}

fn slots(shape: Shape) -> impl Iterator<Item = usize> {
    (0..shape.lanes).flat_map(move |lane| (0..SLOTS).map(move |slot| shape.slot(lane, slot)))
}

/// Scatters parcels until it is stopped.
fn take_parcels(shape: Shape, memory: &Mapping, to: &dyn Scatter, stop: &AtomicBool) {
    let mut pauses = Pauses::default();
    while !stop.load(Ordering::Acquire) {
        let mut came = false;
        for slot in slots(shape) {
            let turn = memory.word(slot + TURN);
            if turn.load(Ordering::Acquire) != FULL {
                continue;
            }
            came = true;
            let next = match take_parcel(shape, memory, slot, to) {
                Ok(()) => EMPTY,
                Err(error) => {
                    tracing::warn!(%error, "a trainer's parcel is refused");
                    REFUSED
                }
            };
            turn.store(next, Ordering::Release);
        }
        if came { pauses = Pauses::default() } else { pauses.pause() }
    }
}

fn take_parcel(shape: Shape, memory: &Mapping, slot: usize, to: &dyn Scatter) -> Result<()> {
    let count = memory.word(slot + COUNT).load(Ordering::Relaxed) as usize;
    let runs = memory.full(slot + HEADER, count.min(RUNS) * Run::BYTES);
    let runs: Vec<Run> = runs.as_chunks().0.iter().map(Run::of_bytes).collect();
    to.scatter(&runs, memory.full(slot + BYTES, shape.slot_bytes))
}

/// A trainer's lane, while it holds the lease.
#[derive(Debug)]
pub(crate) struct Lane {
    rank: Rank,
    lease: Terms,
    memory: Arc<Mapping>,
    /// Where its slots begin.
    slots: [usize; SLOTS],
    slot_bytes: usize,
    /// How many parcels it has filled.
    filled: AtomicU64,
    limit: Duration,
    looked: Mutex<Instant>,
}

impl StagingOffer {
    /// The bytes to map.
    pub(crate) fn bytes(&self) -> Result<usize, SegmentError> {
        Ok(self.shape()?.bytes())
    }

    fn shape(&self) -> Result<Shape, SegmentError> {
        let too_large = || SegmentError::TooLarge(self.lanes.len() as u32, self.slot_bytes);
        let slot_bytes = usize::try_from(self.slot_bytes).map_err(|_| too_large())?;
        let slot = slot_bytes.checked_add(BYTES).filter(|bytes| bytes.is_multiple_of(64));
        let all = slot.and_then(|slot| slot.checked_mul(SLOTS)?.checked_mul(self.lanes.len()));
        all.ok_or_else(too_large)?;
        Ok(Shape { lanes: self.lanes.len(), slot_bytes })
    }

    /// The lane of a trainer, in the memory that is mapped; `None` if it has none. `limit` is how long it waits for the rollout.
    pub(crate) fn lane(
        &self,
        trainer: Rank,
        rollout: Rank,
        memory: Arc<Mapping>,
        lease: Terms,
        limit: Duration,
    ) -> Result<Option<Lane>, SegmentError> {
        let shape = self.shape()?;
        let Some(lane) = self.lanes.iter().position(|rank| *rank == trainer) else {
            return Ok(None);
        };
        Ok(Some(Lane {
            rank: rollout,
            lease,
            memory,
            slots: std::array::from_fn(|number| shape.slot(lane, number)),
            slot_bytes: shape.slot_bytes,
            filled: AtomicU64::new(0),
            limit,
            looked: Mutex::new(Instant::now()),
        }))
    }
}

impl Lane {
    fn turn(&self, slot: usize) -> &AtomicU32 {
        self.memory.word(self.slots[slot] + TURN)
    }

    /// Waits until a slot is empty.
    fn until_empty(&self, slot: usize) -> Result<()> {
        let failed = |error: SegmentError| Error::from(error).rank(self.rank);
        let (since, mut pauses) = (Instant::now(), Pauses::default());
        loop {
            match self.turn(slot).load(Ordering::Acquire) {
                EMPTY => return Ok(()),
                FULL => {}
                _ => return Err(failed(SegmentError::Refused)),
            }
            let mut looked = lock(&self.looked);
            if looked.elapsed() >= LOOK {
                *looked = Instant::now();
                self.lease.check().map_err(failed)?;
            }
            drop(looked);
            if since.elapsed() >= self.limit {
                return Err(failed(SegmentError::NotEmptied(self.limit)));
            }
            pauses.pause();
        }
    }
}

impl Carrier for Lane {
    type Room = Slot;

    fn room(&self) -> Result<Slot> {
        let number = (self.filled.load(Ordering::Relaxed) % SLOTS as u64) as usize;
        self.until_empty(number)?;
        let at = self.slots[number] + BYTES;
        Ok(Slot { memory: self.memory.clone(), number, at, len: self.slot_bytes })
    }

    fn send(&self, room: Slot, runs: &[Run]) -> Result<()> {
        let slot = self.slots[room.number];
        let mut at = slot + HEADER;
        for run in runs {
            self.memory.put(at, &run.to_bytes());
            at += Run::BYTES;
        }
        self.memory.word(slot + COUNT).store(runs.len() as u32, Ordering::Relaxed);
        self.filled.fetch_add(1, Ordering::Relaxed);
        self.turn(room.number).store(FULL, Ordering::Release);
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        (0..SLOTS).try_for_each(|slot| self.until_empty(slot))
    }
}

/// The bytes of a slot that is empty.
#[derive(Debug)]
pub(crate) struct Slot {
    memory: Arc<Mapping>,
    number: usize,
    at: usize,
    len: usize,
}

impl Room for Slot {
    fn len(&self) -> usize {
        self.len
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len, "a range outside the slot");
        self.memory.put(self.at + at, bytes);
    }
}

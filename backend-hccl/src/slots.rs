//! The memory of an NPU as a kind of memory: slots are filled through pinned memory, and read through a window.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use collective::{Shape, Thread, Wait};
use engine_core::memory::{Job, Pool};
use engine_core::plan::Piece;
use engine_core::provider::{Allocation, BucketMemory, BucketSlot, SlotBytes};
use engine_core::{DeviceBytes, DeviceMemory, Error, ErrorKind, Result, digest};
use tokio::sync::Semaphore;
use tracing::warn;

use crate::comm::{HcclCommunicator, LEASES, Lease, Mark};
#[cfg(feature = "mutations")]
use crate::mutation::Mutation;

/// What is read from an NPU at a time. Parts of a bucket that follow one another come out of one read, so
/// that thousands of small tensors are not as many calls.
const WINDOW_BYTES: u64 = 4 << 20;
// The sum of a part of a bucket is that of its bytes only from an aligned place on.
const _: () = assert!(WINDOW_BYTES.is_multiple_of(engine_core::plan::ALIGNMENT));

/// How often a fill that waits for pinned memory looks for it. Only fills of updates that were dropped keep it from others.
const PAUSE: Duration = Duration::from_millis(1);

/// The memory of a rank's slots on its NPU. The engine's thread has it, and does whatever is done to it in order.
#[derive(Debug)]
pub(crate) struct NpuMemory {
    pub(crate) thread: Thread<HcclCommunicator>,
    pub(crate) shape: Shape,
    pub(crate) deadline: Duration,
    pub(crate) device: String,
    pub(crate) views: Arc<Views>,
    leases: Arc<Semaphore>,
}

/// One of the slots.
#[derive(Debug)]
struct NpuSlot {
    memory: Arc<NpuMemory>,
    /// The same.
    whole: Arc<dyn BucketMemory>,
    number: u32,
}

impl NpuMemory {
    pub(crate) fn new(
        thread: Thread<HcclCommunicator>,
        shape: Shape,
        deadline: Duration,
        device: String,
        views: Arc<Views>,
    ) -> Self {
        let leases = Arc::new(Semaphore::new(LEASES));
        Self { thread, shape, deadline, device, views, leases }
    }

    /// All of it, and its slots.
    pub(crate) fn cut(self) -> Allocation {
        let memory = Arc::new(self);
        let whole: Arc<dyn BucketMemory> = memory.clone();
        let slot = |number| -> Box<dyn BucketSlot> {
            Box::new(NpuSlot { memory: memory.clone(), whole: whole.clone(), number })
        };
        Allocation { slots: (0..memory.shape.slots).map(slot).collect(), memory: whole.clone() }
    }

    /// Pinned memory to fill a bucket in.
    fn lease(&self) -> Result<Lease> {
        let until = Instant::now() + self.deadline;
        let permit = loop {
            if let Ok(permit) = self.leases.clone().try_acquire_owned() {
                break permit;
            }
            if Instant::now() >= until {
                let seconds = self.deadline.as_secs_f64();
                let message = format!("no pinned memory was free for {seconds:.1} s");
                return Err(Error::new(ErrorKind::Timeout, FILLING, message));
            }
            std::thread::sleep(PAUSE);
        };
        self.thread.run_blocking(self.deadline, |own, wait| own.lease(permit, wait))
    }
}

const FILLING: &str = "filling a bucket";

impl BucketMemory for NpuMemory {
    fn len(&self) -> u64 {
        self.shape.slot_bytes * u64::from(self.shape.slots)
    }

    fn spare(&self, bytes: u64) -> Result<Box<dyn BucketSlot>> {
        let message = format!("slots on an NPU keep their size; {bytes} bytes are wanted");
        Err(Error::new(ErrorKind::Config, "enlarging a slot", message))
    }
}

impl BucketSlot for NpuSlot {
    fn memory(&self) -> &Arc<dyn BucketMemory> {
        &self.whole
    }

    fn start(&self) -> u64 {
        self.memory.shape.slot_bytes * u64::from(self.number)
    }

    fn len(&self) -> u64 {
        self.memory.shape.slot_bytes
    }

    /// Ends when the copy to the NPU has begun: whatever uses the slot does so on the same thread, behind the copy.
    fn fill(&mut self, filled: u64, jobs: Vec<Job>, pool: &Pool, digests: bool) -> Result<u64> {
        if filled > self.len() {
            let message = format!("{filled} bytes for a slot of {}", self.len());
            return Err(Error::new(ErrorKind::State, FILLING, message));
        }
        if filled == 0 {
            return Ok(0);
        }
        let (memory, number) = (&self.memory, self.number);
        let mut lease = memory.lease()?;
        let sum = pool.encode(&jobs, lease.as_mut(), digests)?;
        let upload =
            move |own: &mut HcclCommunicator, _: &Wait<'_>| own.upload(number, lease, filled);
        memory.thread.run_blocking(memory.deadline, upload)?;
        Ok(sum)
    }

    fn read(&self, filled: u64) -> Result<SlotBytes<'_>> {
        if filled > self.len() {
            let message = format!("{filled} bytes of a slot of {}", self.len());
            return Err(Error::new(ErrorKind::State, "reading from an NPU", message));
        }
        let view = View {
            memory: self.memory.clone(),
            slot: self.number,
            filled,
            window: Mutex::default(),
            kept: OnceLock::new(),
            mark: Arc::default(),
        };
        let view = Arc::new(view);
        self.memory.views.add(&view);
        Ok(SlotBytes::Device(DeviceBytes::new(view)))
    }
}

/// The views that someone may have, for the thread to care for before it ends.
#[derive(Debug, Default)]
pub(crate) struct Views(Mutex<Vec<Weak<View>>>);

impl Views {
    fn all(&self) -> MutexGuard<'_, Vec<Weak<View>>> {
        // Every change is one assignment, or one insertion.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, view: &Arc<View>) {
        let mut all = self.all();
        // No more than one for each slot are left.
        all.retain(|view| view.strong_count() > 0);
        all.push(Arc::downgrade(view));
    }

    /// Copies the slots that views are of to the host, where they are read from now on.
    pub(crate) fn keep(&self, own: &HcclCommunicator) {
        let all = std::mem::take(&mut *self.all());
        for view in all.iter().filter_map(Weak::upgrade) {
            let mut bytes = vec![0; view.filled as usize];
            match own.read(view.slot, 0, &mut bytes, &view.mark) {
                // Nobody else sets it.
                Ok(()) => drop(view.kept.set(bytes)),
                Err(error) => {
                    warn!(%error, "a bucket that is still in use cannot be read any more")
                }
            }
        }
    }
}

/// The first bytes of a slot. The thread reads them for other threads; when it ends, with its engine, it leaves
/// a copy here.
#[derive(Debug)]
pub(crate) struct View {
    memory: Arc<NpuMemory>,
    slot: u32,
    filled: u64,
    window: Mutex<Window>,
    kept: OnceLock<Vec<u8>>,
    /// Of the bucket, if the slot is the leader's, once some of it was read.
    mark: Arc<OnceLock<Mark>>,
}

/// What was read last.
#[derive(Debug, Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl View {
    /// Reads a part of the slot to the beginning of a buffer, and gives the buffer back.
    fn fetch(&self, start: u64, len: u64, mut buffer: Vec<u8>) -> Result<Vec<u8>> {
        buffer.resize(len as usize, 0);
        let (slot, thread) = (self.slot, &self.memory.thread);
        #[cfg(feature = "mutations")]
        if Mutation::CallFromExecutor.is_on() {
            let find = move |own: &mut HcclCommunicator, _: &Wait<'_>| {
                Ok((own.device().api(), own.escape(slot, start, len)?))
            };
            let (api, escaped) = thread.run_blocking(self.memory.deadline, find)?;
            escaped.read(api, &mut buffer)?;
            return Ok(buffer);
        }
        let mark = self.mark.clone();
        let read = move |own: &mut HcclCommunicator, _: &Wait<'_>| {
            own.read(slot, start, &mut buffer, &mark)?;
            Ok(buffer)
        };
        let read = thread.run_blocking(self.memory.deadline, read);
        let kept = || self.kept.get()?.get(start as usize..(start + len) as usize);
        // The thread is gone, and has left this before it went.
        read.or_else(|error| kept().map(<[u8]>::to_vec).ok_or(error))
    }

    /// The window that has a byte of the slot, with what `window` knows already.
    fn seek(&self, window: &mut Window, at: u64) -> Result<()> {
        let start = at - at % WINDOW_BYTES;
        if window.start != start || window.bytes.is_empty() {
            let buffer = std::mem::take(&mut window.bytes);
            let len = WINDOW_BYTES.min(self.filled - start);
            *window = Window { start, bytes: self.fetch(start, len, buffer)? };
        }
        Ok(())
    }

    fn check(&self, start: u64, len: u64) -> Result<()> {
        if start.checked_add(len).is_none_or(|end| end > self.filled) {
            let message = format!("bytes {start}..{start}+{len} of {}", self.filled);
            return Err(Error::new(ErrorKind::Protocol, "reading from an NPU", message));
        }
        Ok(())
    }
}

impl DeviceMemory for View {
    fn device(&self) -> String {
        self.memory.device.clone()
    }

    fn len(&self) -> u64 {
        self.filled
    }

    fn read(&self, start: u64, destination: &mut [u8]) -> Result<()> {
        self.check(start, destination.len() as u64)?;
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = start;
        let mut rest = destination;
        while !rest.is_empty() {
            self.seek(&mut window, at)?;
            let found = &window.bytes[(at - window.start) as usize..];
            let (now, later) = rest.split_at_mut(found.len().min(rest.len()));
            now.copy_from_slice(&found[..now.len()]);
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn digest(&self, start: u64, pieces: &[Piece]) -> Result<u64> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = 0_u64;
        for piece in pieces {
            self.check(start, piece.offset.saturating_add(piece.len))?;
            let (mut offset, mut left) = (piece.offset, piece.len);
            while left > 0 {
                self.seek(&mut window, start + offset)?;
                let found = &window.bytes[(start + offset - window.start) as usize..];
                let now = left.min(found.len() as u64);
                sum = sum.wrapping_add(digest::sum(offset, &found[..now as usize]));
                offset += now;
                left -= now;
            }
        }
        Ok(sum)
    }
}

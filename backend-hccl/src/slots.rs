//! Slots on an NPU: filled through pinned memory, read through a window.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use collective::{SlotGuard, Slots, Thread, Wait};
use engine_core::memory::{Job, Pool};
use engine_core::plan::Piece;
use engine_core::{DeviceBytes, DeviceMemory, Error, ErrorKind, Result, Storage, clock, digest};
use tokio::sync::Semaphore;
use tracing::warn;

use crate::comm::{HcclCommunicator, LEASES, Mark};
#[cfg(feature = "mutations")]
use crate::mutation::Mutation;

/// What is read from an NPU at a time. Parts of a bucket that follow one another come out of one read, so
/// that thousands of small tensors are not as many calls.
const WINDOW_BYTES: u64 = 4 << 20;
// The sum of a part of a bucket is that of its bytes only from an aligned place on.
const _: () = assert!(WINDOW_BYTES.is_multiple_of(engine_core::plan::ALIGNMENT));

#[derive(Debug)]
pub(crate) struct HcclSlots {
    pub(crate) thread: Thread<HcclCommunicator>,
    pub(crate) slot_bytes: u64,
    pub(crate) deadline: Duration,
    pub(crate) device: String,
    leases: Arc<Semaphore>,
    views: Arc<Views>,
}

impl HcclSlots {
    pub(crate) fn new(
        thread: Thread<HcclCommunicator>,
        slot_bytes: u64,
        deadline: Duration,
        device: String,
        views: Arc<Views>,
    ) -> Self {
        let leases = Arc::new(Semaphore::new(LEASES));
        Self { thread, slot_bytes, deadline, device, leases, views }
    }
}

#[async_trait]
impl Slots for HcclSlots {
    async fn fill(
        &self,
        slot: SlotGuard,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        const OPERATION: &str = "filling a bucket";
        let filled = jobs.iter().map(|job| job.offset + job.len).max().unwrap_or(0);
        if filled > self.slot_bytes {
            let message = format!("{filled} bytes for a slot of {}", self.slot_bytes);
            return Err(Error::new(ErrorKind::Protocol, OPERATION, message));
        }
        if filled == 0 {
            return Ok(0);
        }
        let permit = clock::within(self.deadline, self.leases.clone().acquire_owned()).await;
        let permit = permit.ok_or_else(|| {
            let seconds = self.deadline.as_secs_f64();
            let message = format!("no pinned memory was free for {seconds:.1} s");
            Error::new(ErrorKind::Timeout, OPERATION, message)
        })?;
        let permit = permit.map_err(|error| {
            Error::new(ErrorKind::State, OPERATION, error.to_string()).with_source(error)
        })?;
        let lease = self.thread.run(self.deadline, |own, wait| own.lease(permit, wait));
        let mut lease = lease.await?;
        let threads = pool.clone();
        let encode = move || {
            let sum = threads.encode(&jobs, lease.as_mut(), digests)?;
            Ok((lease, slot, sum))
        };
        let (lease, slot, sum) = pool.start(encode).await?;
        let upload = move |own: &mut HcclCommunicator, _: &Wait<'_>| {
            let uploaded = own.upload(slot.index(), lease, filled);
            // The slot's next use is on this thread, behind the copy.
            drop(slot);
            uploaded
        };
        self.thread.run(self.deadline, upload).await?;
        Ok(sum)
    }

    fn view(&self, slot: SlotGuard, filled: u64) -> Storage {
        let view = View {
            thread: self.thread.clone(),
            slot,
            filled,
            deadline: self.deadline,
            device: self.device.clone(),
            window: Mutex::default(),
            kept: OnceLock::new(),
            mark: Arc::default(),
        };
        let view = Arc::new(view);
        self.views.add(&view);
        DeviceBytes::new(view).into()
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
            match own.read(view.slot.index(), 0, &mut bytes, &view.mark) {
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
    thread: Thread<HcclCommunicator>,
    slot: SlotGuard,
    filled: u64,
    deadline: Duration,
    device: String,
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
        let slot = self.slot.index();
        #[cfg(feature = "mutations")]
        if Mutation::CallFromExecutor.is_on() {
            let find = move |own: &mut HcclCommunicator, _: &Wait<'_>| {
                Ok((own.device().api(), own.escape(slot, start, len)?))
            };
            let (api, escaped) = self.thread.run_blocking(self.deadline, find)?;
            escaped.read(api, &mut buffer)?;
            return Ok(buffer);
        }
        let mark = self.mark.clone();
        let read = move |own: &mut HcclCommunicator, _: &Wait<'_>| {
            own.read(slot, start, &mut buffer, &mark)?;
            Ok(buffer)
        };
        let read = self.thread.run_blocking(self.deadline, read);
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
        self.device.clone()
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

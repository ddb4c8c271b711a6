//! A rank's device, its slots and its groups: all that the engine's one thread has.
//!
//! What is on the device is done in the order of two kinds of streams. Filled buckets are copied from
//! pinned memory on one stream; each group broadcasts on a stream of its own, which waits for the copy of
//! the bucket that it is about to send. Nothing waits on the host, except for pinned memory to be
//! written to again.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use collective::{Communicator, Shape, Share, Wait};
use engine_core::{ErrorKind, Rank};
use tokio::sync::OwnedSemaphorePermit;
use tracing::{debug, warn};

use crate::environment;
use crate::error::HcclError;
use crate::ffi::{
    self, Comm, Copying, Device, DeviceMemory, Event, Imported, IpcKey, Pinned, Stream,
};
use crate::mutation::Mutation;
use crate::slots::Views;
use crate::sys::{self, AGAIN, Api};

/// Memory behind the slots: for the first operations of a group, and for marks.
const SCRATCH_BYTES: usize = 4096;
/// The part of it that the first operations use.
const PROBE_BYTES: usize = 256;
/// Where the slots' marks begin within it, and how far they are apart.
const MARKS: (usize, usize) = (512, 64);
/// What can be shared is made of pages of this size.
const PAGE_BYTES: usize = 2 << 20;
/// How long the leader waits for others to close its memory, before it is left to the process's end.
const CLOSING: Duration = Duration::from_secs(2);
/// How long the thread is in one call that waits: between two of them it looks whether to go on.
const SLICE: Duration = Duration::from_millis(50);
/// How often a group is asked for asynchronous errors while something is under way.
const ASYNC_ERRORS: Duration = Duration::from_millis(20);
/// How long after a group could not be formed the next one is begun. Members may still be in the
/// call that joins, for as long as HCCL waits; the others wait as long for them in the next group, which is
/// too short unless they begin later than those did.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a communicator that is in use is tried to be destroyed, at most.
const RETRY: Duration = Duration::from_millis(5);

/// What an engine asks of the library.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) library_dir: Option<PathBuf>,
    /// The NPU's number; without one the rank chooses.
    pub(crate) device: Option<u32>,
    pub(crate) rank: u32,
    pub(crate) shape: Shape,
    /// The deadline of every wait.
    pub(crate) deadline: Duration,
    /// Whether ranks of the same NPU may read the slots.
    pub(crate) shares: bool,
}

/// Where a rank's slots are.
#[derive(Debug)]
enum SlotMemory {
    Own(DeviceMemory),
    /// In the leader's memory, while that is mapped here.
    Leaders(Option<Imported>),
}

impl SlotMemory {
    fn own(&self) -> Result<&DeviceMemory, HcclError> {
        match self {
            Self::Own(memory) => Ok(memory),
            Self::Leaders(_) => Err(HcclError::NoSlots),
        }
    }
}

/// What a slot had been filled with, when it was read: a rank that reads the leader's memory sees by it that the
/// slot is not being filled anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark([u8; 8]);

/// The calls of HCCL, on one device.
#[derive(Debug)]
pub(crate) struct HcclCommunicator {
    groups: Vec<Option<Group>>,
    /// Communicators that were still in use when their groups were left, which must not be.
    lingering: Vec<Group>,
    uploads: VecDeque<Upload>,
    copies: Stream,
    staging: Staging,
    memory: SlotMemory,
    /// How often a slot was filled.
    fills: u64,
    key: Result<Bytes, String>,
    shape: Shape,
    deadline: Duration,
    version: String,
    rank: Rank,
    /// Whether others know of a group that this rank has not joined.
    announced: bool,
    views: Arc<Views>,
    device: Device,
}

/// A group that the rank is in.
#[derive(Debug)]
struct Group {
    comm: Comm,
    stream: Stream,
    place: u32,
    /// The ends of the broadcasts that are under way.
    events: VecDeque<Event>,
    ended: u64,
    asked: Instant,
}

/// A copy of a filled bucket to its slot.
#[derive(Debug)]
struct Upload {
    slot: u32,
    copying: Copying,
}

/// Pinned memory for buckets that are being filled: made when needed, used again.
#[derive(Debug)]
struct Staging {
    free: Vec<Pinned>,
    lent: usize,
    home: Sender<Pinned>,
    returned: Receiver<Pinned>,
}

/// Pinned memory to fill a bucket in. It goes back to where it came from when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    pinned: Option<Pinned>,
    home: Sender<Pinned>,
    _permit: OwnedSemaphorePermit,
}

impl Lease {
    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        self.pinned.as_mut().map_or(&mut [], Pinned::as_mut)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(pinned) = self.pinned.take() {
            // If nobody is there to take it back, it says so itself.
            drop(self.home.send(pinned));
        }
    }
}

/// How many leases there may be at a time: a bucket is filled while the one before is copied.
pub(crate) const LEASES: usize = 2;

/// Loads the libraries, after the environment that they read has been looked at.
pub(crate) fn load(
    library_dir: Option<&std::path::Path>,
    deadline: Duration,
) -> Result<&'static Api, HcclError> {
    for (name, seconds) in environment::timeouts(deadline) {
        ffi::default_variable(name, &seconds.to_string());
    }
    let api = sys::load(library_dir)?;
    ffi::initialise(api)?;
    Ok(api)
}

impl HcclCommunicator {
    /// Everything of a rank, on the calling thread, which from now on makes all calls.
    pub(crate) fn open(plan: &Plan) -> Result<Self, HcclError> {
        let api = load(plan.library_dir.as_deref(), plan.deadline)?;
        for warning in environment::warnings(|name| std::env::var(name).ok(), plan.deadline) {
            warn!("{warning}");
        }
        let count = ffi::device_count(api)?;
        let number = plan.device.unwrap_or_else(|| plan.rank % count.max(1));
        let device = Device::set(api, number)?;
        let full = HcclError::Full { device: device.number(), bytes: usize::MAX, free: None };
        let bytes = bytes_of(plan.shape).ok_or(full)?;
        let memory = device.allocate(bytes)?;
        let key = match plan.shares {
            true => share(&memory),
            false => Err("only the leader's slots are shared".into()),
        };
        let (home, returned) = channel();
        let version = describe(api);
        debug!(?device, bytes, version, shared = key.is_ok(), "the slots are allocated");
        Ok(Self {
            groups: Vec::new(),
            lingering: Vec::new(),
            uploads: VecDeque::new(),
            copies: device.stream()?,
            staging: Staging { free: Vec::new(), lent: 0, home, returned },
            memory: SlotMemory::Own(memory),
            fills: 0,
            key,
            shape: plan.shape,
            deadline: plan.deadline,
            version,
            rank: Rank(plan.rank),
            announced: false,
            views: Arc::default(),
            device,
        })
    }

    /// What reads the slots.
    pub(crate) fn views(&self) -> &Arc<Views> {
        &self.views
    }

    /// The libraries in words, the same on all ranks that have the same.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn memory(&self) -> Result<&DeviceMemory, HcclError> {
        self.memory.own()
    }

    /// Where the slots are, and what other ranks of the NPU find them by.
    pub(crate) fn share(&self) -> Share {
        Share { device: format!("NPU {}", self.device.chip()), key: self.key.clone() }
    }

    /// Where the first bytes of a slot are.
    fn range(&self, slot: u32, len: u64) -> Result<(usize, usize), HcclError> {
        let Shape { slots, slot_bytes } = self.shape;
        let at = slot_bytes.saturating_mul(slot.into());
        if slot >= slots || len > slot_bytes {
            let size = slot_bytes.saturating_mul(slots.into());
            return Err(HcclError::Outside {
                at: at as usize,
                len: len as usize,
                size: size as usize,
            });
        }
        // `open` checked that all slots have addresses.
        Ok((at as usize, len as usize))
    }

    /// Copies from a slot to the host. The mark of one of the leader's slots is kept by the first read of a
    /// bucket; when another one finds it changed, it is an error.
    pub(crate) fn read(
        &self,
        slot: u32,
        start: u64,
        to: &mut [u8],
        kept: &OnceLock<Mark>,
    ) -> Result<(), HcclError> {
        let end = start.saturating_add(to.len() as u64);
        let (at, _) = self.range(slot, end)?;
        let at = at + start as usize;
        let memory = match &self.memory {
            SlotMemory::Own(memory) => return memory.read(at, to),
            SlotMemory::Leaders(memory) => memory.as_ref().ok_or(HcclError::Detached)?,
        };
        let mark = || -> Result<Mark, HcclError> {
            let mut mark = [0; 8];
            memory.read(self.mark_of(slot)?, &mut mark)?;
            Ok(Mark(mark))
        };
        // All reads are this thread's: nobody keeps another one meanwhile.
        let now = kept.get().copied().map_or_else(mark, Ok)?;
        let before = *kept.get_or_init(|| now);
        memory.read(at, to)?;
        // The leader changes it before it changes any of the slot's bytes.
        if mark()? == before { Ok(()) } else { Err(HcclError::Overwritten) }
    }

    /// Where a slot's mark is.
    fn mark_of(&self, slot: u32) -> Result<usize, HcclError> {
        let (at, len) = (MARKS.0 + slot as usize * MARKS.1, size_of::<Mark>());
        if at + len > SCRATCH_BYTES {
            return Err(HcclError::Outside { at, len, size: SCRATCH_BYTES });
        }
        Ok(self.memory_of_slots() + at)
    }

    /// Where bytes of a slot are, for code that should not know.
    #[cfg(feature = "mutations")]
    pub(crate) fn escape(
        &self,
        slot: u32,
        start: u64,
        len: u64,
    ) -> Result<ffi::Escaped, HcclError> {
        let (at, _) = self.range(slot, start.saturating_add(len))?;
        self.memory.own()?.escape(at + start as usize, len as usize)
    }

    /// Pinned memory for a bucket; waits for the oldest copy if there is none left.
    pub(crate) fn lease(
        &mut self,
        permit: OwnedSemaphorePermit,
        wait: &Wait<'_>,
    ) -> engine_core::Result<Lease> {
        let staging = &mut self.staging;
        while let Ok(pinned) = staging.returned.try_recv() {
            staging.lent -= 1;
            staging.free.push(pinned);
        }
        if staging.free.is_empty() && staging.lent + self.uploads.len() < LEASES {
            let bytes = self.shape.slot_bytes as usize;
            staging.free.push(self.device.allocate_host(bytes)?);
        }
        if staging.free.is_empty() {
            self.finish_upload(wait)?;
        }
        let staging = &mut self.staging;
        let pinned = staging.free.pop();
        staging.lent += usize::from(pinned.is_some());
        Ok(Lease { pinned, home: staging.home.clone(), _permit: permit })
    }

    /// Waits for the oldest copy; its memory is free then.
    fn finish_upload(&mut self, wait: &Wait<'_>) -> engine_core::Result<()> {
        let Some(Upload { slot, copying }) = self.uploads.pop_front() else { return Ok(()) };
        let mut copying = copying;
        let error: engine_core::Error = loop {
            copying = match copying.end() {
                Ok(pinned) => {
                    self.staging.free.push(pinned);
                    return Ok(());
                }
                Err(copying) => copying,
            };
            // On a copy behind it as well, which is not far.
            match self.copies.synchronize(SLICE.min(wait.left())) {
                Ok(_) => {
                    if let Err(error) = wait.check("copying a bucket to the NPU") {
                        self.uploads.push_front(Upload { slot, copying });
                        return Err(error);
                    }
                }
                Err(error) => break error.into(),
            }
        };
        self.uploads.push_front(Upload { slot, copying });
        self.begin_copies_anew()?;
        Err(error)
    }

    /// Gives up a stream that has failed: it does nothing any more, nor do the copies that are behind.
    fn begin_copies_anew(&mut self) -> Result<(), HcclError> {
        self.copies = self.device.stream()?;
        self.take_ended();
        Ok(())
    }

    /// Takes back the memory of copies that have ended. One that has not, on a stream that is given up, is not
    /// looked at again, nor is its memory.
    fn take_ended(&mut self) {
        for Upload { copying, .. } in self.uploads.drain(..) {
            if let Ok(pinned) = copying.end() {
                self.staging.free.push(pinned);
            }
        }
    }

    /// Begins to copy the first bytes of a lease to a slot; broadcasts of the slot wait for it.
    pub(crate) fn upload(
        &mut self,
        slot: u32,
        mut lease: Lease,
        len: u64,
    ) -> engine_core::Result<()> {
        let (at, len) = self.range(slot, len)?;
        let memory = self.memory.own()?;
        if memory.is_exported() {
            self.fills += 1;
            memory.write(self.mark_of(slot)?, &self.fills.to_le_bytes())?;
        }
        let Some(pinned) = lease.pinned.take() else { return Ok(()) };
        self.staging.lent -= 1;
        let (copying, copied) = self.copies.copy(pinned, memory, at, len);
        self.uploads.push_back(Upload { slot, copying });
        if let Err(error) = copied {
            self.begin_copies_anew()?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Joins a group, of which nothing is left if that fails.
    fn try_join(
        &mut self,
        group: usize,
        id: &[u8],
        size: u32,
        place: u32,
        wait: &Wait<'_>,
    ) -> engine_core::Result<()> {
        self.end_lingering()?;
        let comm = self.device.join(size, id, place)?;
        let stream = match self.device.stream() {
            Ok(stream) => stream,
            Err(error) => {
                // Nothing is under way.
                if let Err((_, destroyed)) = comm.destroy() {
                    warn!(error = %destroyed, "a communicator is not destroyed");
                }
                return Err(error.into());
            }
        };
        let warm = self.warm_up(&comm, &stream, place, wait);
        let joined =
            Group { comm, stream, place, events: VecDeque::new(), ended: 0, asked: Instant::now() };
        if let Err(error) = warm {
            self.end(joined);
            return Err(error);
        }
        if self.groups.len() <= group {
            self.groups.resize_with(group + 1, || None);
        }
        self.groups[group] = Some(joined);
        Ok(())
    }

    /// What a new group does first: the library makes its links now and not within an update, and no
    /// member goes on before all are there.
    fn warm_up(
        &self,
        comm: &Comm,
        stream: &Stream,
        place: u32,
        wait: &Wait<'_>,
    ) -> engine_core::Result<()> {
        const OPERATION: &str = "joining a group";
        let (at, memory) = (self.memory_of_slots(), self.memory.own()?);
        let sent = |value| if place == 0 { value } else { 0 };
        // All members are there, which may have taken as long as HCCL waits: one that was in such a call
        // when the update before failed came out of it only now. What follows has the time of any wait.
        let until = Instant::now() + self.deadline;
        let synchronise = || -> engine_core::Result<()> {
            while !stream.synchronize(SLICE)? {
                match wait.check(OPERATION) {
                    Err(error) if error.kind() != ErrorKind::Timeout || Instant::now() >= until => {
                        return Err(error);
                    }
                    _ => {}
                }
            }
            Ok(())
        };
        let arrived = |value: u8| -> Result<(), HcclError> {
            let mut bytes = [0; PROBE_BYTES];
            memory.read(at, &mut bytes)?;
            if bytes == [value; PROBE_BYTES] { Ok(()) } else { Err(HcclError::Garbled) }
        };
        memory.fill(at, PROBE_BYTES, sent(0x5a))?;
        comm.broadcast(memory, at, PROBE_BYTES, stream)?;
        synchronise()?;
        arrived(0x5a)?;
        memory.fill(at, PROBE_BYTES, sent(0x2d))?;
        comm.all_reduce_max(memory, at, PROBE_BYTES, stream)?;
        synchronise()?;
        Ok(arrived(0x2d)?)
    }

    /// Where the slots end and the scratch memory begins.
    fn memory_of_slots(&self) -> usize {
        (self.shape.slot_bytes * u64::from(self.shape.slots)) as usize
    }

    /// Ends all that a group has under way, and its communicator with it. Communicators that do not let
    /// go are kept, and hinder every new group.
    fn end(&mut self, group: Group) {
        let until = Instant::now() + self.deadline;
        let Group { mut comm, stream, place, events, ended, asked } = group;
        let idle = events.is_empty() && matches!(stream.is_idle(), Ok(true));
        if !idle {
            match stream.abort() {
                Ok(true) => {}
                // HCCL's own timeout ends it.
                Ok(false) => debug!("the library cannot abort what a group has under way"),
                Err(error) => warn!(%error, "what a group has under way could not be aborted"),
            }
        }
        let mut pause = Duration::from_micros(50);
        loop {
            let error = match comm.destroy() {
                Ok(()) => return,
                Err((back, error)) => {
                    comm = back;
                    error
                }
            };
            if !error.is(AGAIN) || Instant::now() >= until {
                warn!(%error, "a communicator is not destroyed");
                let group = Group { comm, stream, place, events, ended, asked };
                self.lingering.push(group);
                return;
            }
            // It is not in use any longer when its stream has ended; without an abort that may take
            // as long as HCCL waits.
            if !matches!(stream.synchronize(pause), Ok(false)) {
                std::thread::sleep(pause);
            }
            pause = (pause * 2).min(RETRY);
        }
    }

    /// Destroys what could not be destroyed before.
    fn end_lingering(&mut self) -> Result<(), HcclError> {
        for group in std::mem::take(&mut self.lingering) {
            self.end(group);
        }
        if self.lingering.is_empty() { Ok(()) } else { Err(HcclError::Lingering) }
    }
}

/// What a rank's slots take, in one piece and whole pages, which is what can be shared.
fn bytes_of(shape: Shape) -> Option<usize> {
    let bytes = usize::try_from(shape.slot_bytes.checked_mul(shape.slots.into())?).ok()?;
    bytes.checked_add(SCRATCH_BYTES)?.checked_next_multiple_of(PAGE_BYTES)
}

/// What other processes of the NPU find memory by, or why they cannot.
fn share(memory: &DeviceMemory) -> Result<Bytes, String> {
    match memory.export() {
        Ok(key) => Ok(Bytes::copy_from_slice(key.as_bytes())),
        Err(error @ HcclError::Absent(..)) => Err(format!("{error} (a later CANN has it)")),
        Err(error) => Err(error.to_string()),
    }
}

/// ACL's version in words.
pub(crate) fn describe(api: &'static Api) -> String {
    let version = ffi::version(api).unwrap_or_else(|| "of unknown version".into());
    let simulated = if is_simulated(api) { " (simulated)" } else { "" };
    format!("HCCL with ACL {version}{simulated}")
}

/// Whether the libraries are a simulator's.
pub(crate) fn is_simulated(api: &'static Api) -> bool {
    let named = || ffi::soc_name(api).is_some_and(|name| name.contains("simulated"));
    api.found.simulated.is_some() || named()
}

impl Communicator for HcclCommunicator {
    fn new_group(&mut self) -> engine_core::Result<Bytes> {
        self.new_groups(1)?.pop().ok_or_else(|| HcclError::NotJoined(0).into())
    }

    fn new_groups(&mut self, count: usize) -> engine_core::Result<Vec<Bytes>> {
        if self.announced {
            std::thread::sleep(PATIENCE.min(self.deadline / 4));
        }
        let infos = (0..count).map(|_| self.device.root_info().map(Bytes::from));
        let infos = infos.collect::<Result<Vec<Bytes>, HcclError>>();
        self.announced = infos.is_ok();
        infos.map_err(|error| engine_core::Error::from(error).rank(self.rank))
    }

    fn join(
        &mut self,
        group: usize,
        id: &[u8],
        size: u32,
        place: u32,
        wait: &Wait<'_>,
    ) -> engine_core::Result<()> {
        // HCCL does not say which of the others it waited for, or which one shares this one's chip: the rank
        // that it has failed on is named.
        let joined = self.try_join(group, id, size, place, wait);
        self.announced &= joined.is_err();
        joined.map_err(|error| error.rank(self.rank))
    }

    fn shrink(&mut self, _: usize, _: &[u32], _: &Wait<'_>) -> engine_core::Result<()> {
        Err(HcclError::Absent("a way to leave members out", "groups form anew").into())
    }

    fn broadcast(
        &mut self,
        group: usize,
        slot: u32,
        len: u64,
        wait: &Wait<'_>,
    ) -> engine_core::Result<()> {
        self.broadcast_from(group, 0, slot, 0..len, wait)
    }

    fn broadcast_from(
        &mut self,
        group: usize,
        place: u32,
        slot: u32,
        part: Range<u64>,
        _: &Wait<'_>,
    ) -> engine_core::Result<()> {
        let (at, end) = self.range(slot, part.end)?;
        // `range` has checked that the part fits the addresses.
        let start = part.start as usize;
        let (at, len) = (at + start, end.saturating_sub(start));
        let state = self.groups.get_mut(group).and_then(Option::as_mut);
        let state = state.ok_or(HcclError::NotJoined(group))?;
        let upload = self.uploads.iter().rev().find(|upload| upload.slot == slot);
        let upload = upload.filter(|_| state.place == place);
        let awaited = upload.filter(|_| !Mutation::DroppedSynchronise.is_on());
        if let Some(done) = awaited.and_then(|upload| upload.copying.done()) {
            state.stream.wait_for(done)?;
        }
        let event = self.device.event()?;
        match upload {
            #[cfg(feature = "mutations")]
            Some(_) if Mutation::HostPointer.is_on() => {
                state.comm.broadcast_host(len, &state.stream)?;
            }
            _ => state.comm.broadcast_from(place, self.memory.own()?, at, len, &state.stream)?,
        }
        event.record(&state.stream)?;
        state.events.push_back(event);
        Ok(())
    }

    fn ended(&mut self, group: usize) -> engine_core::Result<u64> {
        let state = self.groups.get_mut(group).and_then(Option::as_mut);
        let state = state.ok_or(HcclError::NotJoined(group))?;
        while let Some(event) = state.events.front() {
            match event.is_reached() {
                Ok(false) => break,
                Ok(true) => {
                    state.ended += 1;
                    state.events.pop_front();
                }
                Err(error) => {
                    // What HCCL knows of it says more than what the stream does.
                    state.comm.check()?;
                    return Err(error.into());
                }
            }
        }
        if !state.events.is_empty() && state.asked.elapsed() >= ASYNC_ERRORS {
            state.asked = Instant::now();
            state.comm.check()?;
        }
        Ok(state.ended)
    }

    fn settle(&mut self, slot: u32, wait: &Wait<'_>) -> engine_core::Result<()> {
        while !Mutation::DroppedSynchronise.is_on()
            && self.uploads.iter().any(|upload| upload.slot == slot)
        {
            self.finish_upload(wait)?;
        }
        Ok(())
    }

    fn attach(&mut self, key: &[u8]) -> engine_core::Result<()> {
        let outside = HcclError::Outside { at: 0, len: usize::MAX, size: 0 };
        let bytes = bytes_of(self.shape).ok_or(outside)?;
        let memory = self.device.import(&IpcKey::new(key)?, bytes)?;
        // What it had itself is freed: two processes share this NPU's memory.
        self.memory = SlotMemory::Leaders(Some(memory));
        Ok(())
    }

    fn detach(&mut self) {
        if let SlotMemory::Leaders(memory) = &mut self.memory {
            *memory = None;
        }
    }

    fn leave_groups(&mut self, groups: &[usize]) {
        for group in groups {
            if let Some(left) = self.groups.get_mut(*group).and_then(Option::take) {
                self.end(left);
            }
        }
    }

    fn leave(&mut self) {
        for left in std::mem::take(&mut self.groups).into_iter().flatten() {
            if Mutation::LeakedCommunicator.is_on() {
                std::mem::forget(left);
            } else {
                self.end(left);
            }
        }
    }
}

impl Drop for HcclCommunicator {
    fn drop(&mut self) {
        for group in std::mem::take(&mut self.groups).into_iter().flatten() {
            self.end(group);
        }
        if self.end_lingering().is_err() {
            warn!("communicators are left behind that are still in use");
        }
        self.views.clone().keep(self);
        let until = Instant::now() + self.deadline;
        while !self.uploads.is_empty() {
            match self.copies.synchronize(SLICE) {
                Ok(false) if Instant::now() < until => {}
                Ok(true) => self.take_ended(),
                Err(_) => {
                    if let Err(error) = self.begin_copies_anew() {
                        warn!(%error, "copies to the NPU have failed: their memory is not freed");
                        self.uploads.clear();
                    }
                }
                Ok(false) => {
                    warn!("copies to the NPU do not end: their memory is not freed");
                    self.uploads.clear();
                }
            }
        }
        // Buckets of an update that was dropped may still be being filled.
        while self.staging.lent > 0 {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(pinned) = self.staging.returned.recv_timeout(left) else { break };
            self.staging.lent -= 1;
            self.staging.free.push(pinned);
        }
        for pinned in self.staging.free.drain(..) {
            self.device.free_host(pinned);
        }
        let SlotMemory::Own(memory) = &self.memory else { return };
        let until = Instant::now() + CLOSING.min(self.deadline);
        // Others close it when their update has ended, which they may hear of a moment later.
        while memory.withdraw().is_err() && Instant::now() < until {
            std::thread::sleep(RETRY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone;
    use collective::Thread;

    /// What a child process does; nothing when the tests are run.
    #[tokio::test]
    async fn alone_here() {
        if !alone::is_alone() {
            return;
        }
        let plan = Plan {
            library_dir: None,
            device: Some(0),
            rank: 0,
            shape: Shape { slots: 1, slot_bytes: 4096 },
            deadline: Duration::from_secs(10),
            shares: false,
        };
        let open = move || Ok(HcclCommunicator::open(&plan)?);
        let thread = Thread::start("ckpt-hccl", open).await.unwrap();
        let join = |size| {
            let join = move |own: &mut HcclCommunicator, wait: &Wait<'_>| {
                let id = own.new_group()?;
                own.join(0, &id, size, 0, wait)
            };
            thread.run(Duration::from_secs(10), join)
        };
        let error = join(2).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert!(error.to_string().contains("HCCL_CONNECT_TIMEOUT says how long"), "{error}");
        let free = |own: &mut HcclCommunicator, _: &Wait<'_>| Ok(own.device().memory_info());
        let before = thread.run(Duration::from_secs(1), free).await.unwrap();
        join(1).await.unwrap();
        let left = |own: &mut HcclCommunicator, _: &Wait<'_>| {
            own.leave();
            Ok(own.device().memory_info())
        };
        assert_eq!(thread.run(Duration::from_secs(5), left).await.unwrap(), before);
        thread.close().await;
    }

    #[test]
    fn a_group_that_nobody_else_joins_is_a_timeout_that_leaves_nothing_behind() {
        alone::run("comm::tests::alone_here", ("HCCL_SIM_TIME_SCALE", "0.005"));
    }
}

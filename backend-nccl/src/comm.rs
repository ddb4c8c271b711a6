//! NCCL as the communicator of the collective engine: groups, their streams, and what is under way.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use collective::{Communicator, MemorySlots, Wait};
use device_cuda::{CollectiveUnderWay, Device, Event, Stream};
use engine_core::{Error, Result};
use tracing::debug;

use crate::error::NcclError;
use crate::ffi::{DeviceBytes, RawComm, Registration, abort_all, unique_id};
use crate::sys::Api;

/// The pause between two looks at a communicator that is being made.
const PAUSE: Duration = Duration::from_micros(200);
/// How long kernels may take to notice that their communicator was aborted.
const ENDING: Duration = Duration::from_secs(5);

/// What the thread has.
#[derive(Debug)]
pub(crate) struct Nccl {
    api: &'static Api,
    device: Device,
    groups: HashMap<usize, Group>,
    slots: MemorySlots,
}

#[derive(Debug)]
struct Group {
    comm: RawComm,
    registration: Option<Registration>,
    /// The broadcast that the library is enqueueing, which no event is behind yet.
    enqueueing: Option<CollectiveUnderWay>,
    /// Broadcasts that have ended.
    ended: u64,
    under_way: VecDeque<(Event, CollectiveUnderWay)>,
    /// Events to be used again.
    spare: Vec<Event>,
    stream: Stream,
}

impl Nccl {
    pub(crate) fn new(api: &'static Api, slots: MemorySlots) -> Result<Self> {
        let memory = slots.memory();
        let number = memory.reach().and_then(|reach| reach.device());
        let number = number.and_then(|number| i32::try_from(number).ok());
        let device = Device::open(number.ok_or(NcclError::OutOfReach)?).map_err(NcclError::from)?;
        // NCCL takes the device whose context is current on the thread.
        memory.enter()?;
        Ok(Self { api, device, groups: HashMap::new(), slots })
    }

    fn group(&mut self, group: usize) -> Result<&mut Group, NcclError> {
        self.groups.get_mut(&group).ok_or(NcclError::NotJoined)
    }

    /// Enqueues a collective on a communicator, and an event behind it.
    fn enqueue(
        &mut self,
        group: usize,
        wait: &Wait<'_>,
        operation: &str,
        call: impl FnOnce(&RawComm, &Stream) -> Result<(), NcclError>,
    ) -> Result<()> {
        let device = self.device.clone();
        let state = self.group(group)?;
        state.enqueueing = Some(CollectiveUnderWay::new());
        call(&state.comm, &state.stream)?;
        // Only now is it on the stream, and the event behind it.
        while !state.comm.is_ready().map_err(Error::from)? {
            wait.check(operation)?;
            std::hint::spin_loop();
        }
        let event = mark(&state.stream, state.spare.pop(), &device)?;
        state.under_way.extend(state.enqueueing.take().map(|under_way| (event, under_way)));
        Ok(())
    }

    /// Does a collective of one float in a group, and waits for it. It counts as none of the group's broadcasts.
    fn first(
        &mut self,
        group: usize,
        wait: &Wait<'_>,
        operation: &str,
        call: impl FnOnce(&RawComm, &DeviceBytes, &Stream) -> Result<(), NcclError>,
    ) -> Result<()> {
        // The slots may be filled already.
        let own = self.slots.memory().spare(size_of::<f32>() as u64)?;
        let float = DeviceBytes::all(own.memory().clone())?;
        self.enqueue(group, wait, operation, |comm, stream| call(comm, &float, stream))?;
        while !self.group(group)?.under_way.is_empty() {
            self.ended(group)?;
            wait.check(operation)?;
            std::thread::sleep(PAUSE);
        }
        self.group(group)?.ended = 0;
        Ok(())
    }

    /// Registers the slots with a communicator.
    fn register(&self, comm: &RawComm, wait: &Wait<'_>) -> Result<Option<Registration>, NcclError> {
        let all = DeviceBytes::all(self.slots.memory().clone())?;
        let registration = match comm.register(&all) {
            Ok(registration) => registration,
            Err(error) => {
                debug!(%error, "the slots are not registered: transfers copy once more");
                None
            }
        };
        await_ready(comm, wait, "registering slots with NCCL")?;
        Ok(registration)
    }
}

/// Waits for a communicator's pending call.
fn await_ready(comm: &RawComm, wait: &Wait<'_>, operation: &str) -> Result<(), NcclError> {
    while !comm.is_ready()? {
        wait.check(operation)?;
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

impl Communicator for Nccl {
    fn new_group(&mut self) -> Result<Bytes> {
        Ok(Bytes::copy_from_slice(&unique_id(self.api)?))
    }

    fn join(
        &mut self,
        group: usize,
        id: &[u8],
        size: u32,
        place: u32,
        wait: &Wait<'_>,
    ) -> Result<()> {
        let id = id.try_into().map_err(|_| NcclError::Id(id.len()))?;
        let comm = RawComm::init(self.api, id, size, place)?;
        await_ready(&comm, wait, "joining a group of NCCL")?;
        let registration = self.register(&comm, wait)?;
        let stream = Stream::new(&self.device).map_err(NcclError::from)?;
        let group_state = Group {
            comm,
            registration,
            enqueueing: None,
            ended: 0,
            under_way: VecDeque::new(),
            spare: Vec::new(),
            stream,
        };
        self.groups.insert(group, group_state);
        Ok(())
    }

    fn can_shrink(&self) -> bool {
        self.api.shrink.is_some()
    }

    fn shrink(&mut self, group: usize, gone: &[u32], wait: &Wait<'_>) -> Result<()> {
        let operation = "leaving ranks out of a group of NCCL";
        let old = &self.group(group)?.comm;
        let new = old.shrink(gone)?;
        // The new communicator is there when the old one is done with making it.
        await_ready(old, wait, operation)?;
        await_ready(&new, wait, operation)?;
        let registration = self.register(&new, wait)?;
        let state = self.group(group)?;
        let old = std::mem::replace(&mut state.comm, new);
        let known = std::mem::replace(&mut state.registration, registration);
        forget(&old, known);
        Ok(())
    }

    fn can_give_up_joining(&self) -> bool {
        true
    }

    fn connect_members(&mut self, group: usize, wait: &Wait<'_>) -> Result<()> {
        // NCCL connects members when a communicator has its first collective.
        self.first(
            group,
            wait,
            "connecting the members of a group of NCCL",
            |comm, bytes, stream| comm.broadcast(0, bytes, stream),
        )
    }

    fn greet(&mut self, group: usize, wait: &Wait<'_>) -> Result<()> {
        self.first(group, wait, "greeting a group of NCCL", |comm, float, stream| {
            comm.all_reduce(float, stream)
        })
    }

    fn broadcast(&mut self, group: usize, slot: u32, len: u64, wait: &Wait<'_>) -> Result<()> {
        self.broadcast_part(group, slot, 0..len, wait)
    }

    fn broadcast_part(
        &mut self,
        group: usize,
        slot: u32,
        part: Range<u64>,
        wait: &Wait<'_>,
    ) -> Result<()> {
        self.broadcast_from(group, 0, slot, part, wait)
    }

    fn broadcast_from(
        &mut self,
        group: usize,
        place: u32,
        slot: u32,
        part: Range<u64>,
        wait: &Wait<'_>,
    ) -> Result<()> {
        let (memory, at) = self.slots.place(slot)?;
        let part = at.saturating_add(part.start)..at.saturating_add(part.end);
        let bytes = DeviceBytes::new(memory, part)?;
        self.enqueue(group, wait, "enqueueing a broadcast", |comm, stream| {
            comm.broadcast(place, &bytes, stream)
        })
    }

    fn ended(&mut self, group: usize) -> Result<u64> {
        let state = self.group(group)?;
        state.comm.is_ready()?;
        while let Some((first, _)) = state.under_way.front() {
            if !first.is_done().map_err(NcclError::from)? {
                break;
            }
            state.ended += 1;
            state.spare.extend(state.under_way.pop_front().map(|(event, _)| event));
        }
        Ok(state.ended)
    }

    fn leave_groups(&mut self, groups: &[usize]) {
        let left = groups.iter().filter_map(|group| self.groups.remove(group)).collect();
        self.end(left);
    }

    fn leave(&mut self) {
        let all = self.groups.drain().map(|(_, group)| group).collect();
        self.end(all);
    }
}

impl Nccl {
    /// Ends groups, with what they have under way.
    fn end(&self, groups: Vec<Group>) {
        let (mut comms, mut rests) = (Vec::new(), Vec::new());
        for group in groups {
            let Group { comm, registration, enqueueing, under_way, spare, stream, .. } = group;
            // While the library is at work with the communicator, nothing but aborting it is allowed.
            if under_way.is_empty() && enqueueing.is_none() {
                forget(&comm, registration);
            }
            comms.push(comm);
            rests.push((under_way, spare, stream, enqueueing));
        }
        // Before the streams, which the library may be about to use.
        abort_all(comms);
        for (under_way, spare, stream, enqueueing) in &mut rests {
            // What the library has come to enqueue after all.
            let Some(enqueued) = enqueueing.take() else { continue };
            match mark(stream, spare.pop(), &self.device) {
                Ok(event) => under_way.push_back((event, enqueued)),
                Err(error) => debug!(%error, "while the end of an aborted broadcast was marked"),
            }
        }
        // Their kernels end when they see that they were aborted; until then they may write to slots.
        let until = Instant::now() + ENDING;
        let ended = |(event, _): &(Event, _)| event.is_done().unwrap_or(true);
        while !rests.iter().all(|(under_way, ..)| under_way.iter().all(ended)) {
            if Instant::now() >= until {
                tracing::error!("broadcasts of an aborted group do not end: the GPU may be lost");
                // Dropping a stream waits for its work.
                std::mem::forget(rests);
                return;
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// Puts an event behind the work of a stream.
fn mark(stream: &Stream, spare: Option<Event>, device: &Device) -> Result<Event, NcclError> {
    let event = match spare {
        Some(event) => event,
        None => Event::new(device, false)?,
    };
    event.record(stream)?;
    Ok(event)
}

/// Ends a communicator in which nothing is under way.
fn forget(comm: &RawComm, registration: Option<Registration>) {
    if let Some(registration) = registration
        && let Err(error) = comm.deregister(registration)
    {
        debug!(%error, "while slots were deregistered");
    }
}

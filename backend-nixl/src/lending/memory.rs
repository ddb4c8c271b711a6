//! A rollout's memory, of the host or of a device, as it lends it.
#![allow(unsafe_code, reason = "the promise of a program that lends its own tensors is passed on")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use engine_core::{Error, ErrorKind, Rank, Result};
use placed::{HostRange, HostRanges, Layout, Lender, LentBytes, LentTensor, Parts};
use protocol::encode;
use tracing::debug;
#[cfg(feature = "cuda")]
use {
    device_cuda::{CudaMemory, CudaSpace, Device, reachable},
    engine_core::DeviceChoice,
    placed::cuda::{CudaKernels, bytes_of, lay_out_tensors},
    quant_fp8::StridedPart,
};

use super::lender::{Command, Keeper};
use super::notice::OfferedPart;
use crate::agent::{AgentOptions, thread};
use crate::arena::Memory;
use crate::error::NixlError;
use crate::host::{Piece, PromisedMemory, pieces};

/// Parts of memory begin at multiples of it in what is lent, so that offsets there are aligned as addresses are.
const PAGE: u64 = 4096;

/// Memory that can be lent.
#[derive(Debug)]
pub(super) struct Lendable {
    views: Views,
    /// In ascending order of what is lent, each with its memory.
    pub(super) parts: Vec<(OfferedPart, Memory)>,
}

/// What is lent, as this process reads it while it is not lent.
#[derive(Debug)]
enum Views {
    Host(Parts<Bytes>),
    /// Its digests are computed there, also while it is lent.
    #[cfg(feature = "cuda")]
    Device(Box<OnDevice>),
}

/// What is lent of a device.
#[cfg(feature = "cuda")]
#[derive(Debug)]
struct OnDevice {
    space: CudaSpace,
    kernels: CudaKernels,
    /// The tensors of the rollout's program, if it lends its own.
    _tensors: Vec<CudaMemory>,
}

/// Allocates so much memory of the host, with all pages present.
pub(super) fn allocate(bytes: u64) -> Result<Lendable> {
    let len = usize::try_from(bytes.max(1)).map_err(|_| NixlError::NoMemoryToLend(bytes))?;
    let (memory, mut cut) = pieces(1, len)?;
    let piece = cut.pop().ok_or(NixlError::NoMemoryToLend(bytes))?;
    let part = OfferedPart { at: 0, bytes: len as u64, address: piece.address() as u64 };
    let view = Bytes::from_owner(View(piece));
    let views = Views::Host(Parts::new([(0, len as u64, view)]));
    Ok(Lendable { views, parts: vec![(part, memory)] })
}

/// Allocates so much memory of a device. Trainers of this host may keep it mapped until they end, so it is never given back to the device.
#[cfg(feature = "cuda")]
pub(super) fn allocate_on(device: &DeviceChoice, bytes: u64) -> Result<Lendable> {
    let device = Device::of(device)?;
    let len = usize::try_from(bytes.max(1)).map_err(|_| NixlError::NoMemoryToLend(bytes))?;
    let memory = CudaMemory::for_life(&device, len)?;
    on_device(&device, vec![(0, memory)], Vec::new())
}

/// Tensors of a program on a device, where they are. Returns their layout too.
#[cfg(feature = "cuda")]
pub(super) fn of_tensors_on(
    device: &DeviceChoice,
    tensors: impl IntoIterator<Item = LentTensor>,
) -> Result<(Layout, Lendable)> {
    let device = Device::of(device)?;
    let (layout, allocations, held) =
        lay_out_tensors(&device, tensors.into_iter().collect(), |_| Ok(Some(())))?;
    let allocations = allocations.into_iter().map(|one| (one.at, one.memory)).collect();
    Ok((layout, on_device(&device, allocations, held)?))
}

#[cfg(feature = "cuda")]
fn on_device(
    device: &Device,
    allocations: Vec<(u64, CudaMemory)>,
    tensors: Vec<CudaMemory>,
) -> Result<Lendable> {
    let slices = allocations.iter().map(|(at, memory)| (*at, memory.all()));
    let (space, kernels) = (CudaSpace::new(device, slices)?, CudaKernels::new(device)?);
    let parts = allocations.into_iter().map(|(at, memory)| {
        let part = OfferedPart { at, bytes: memory.len() as u64, address: memory.address() };
        Ok((part, Memory::new(reachable(memory))?))
    });
    let parts = parts.collect::<Result<_>>()?;
    let views = Views::Device(Box::new(OnDevice { space, kernels, _tensors: tensors }));
    Ok(Lendable { views, parts })
}

/// All bytes of a piece, to be read while it is not lent.
struct View(Piece);

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// Tensors of a program, where they are. Returns their layout too.
pub(super) fn of_tensors(
    tensors: impl IntoIterator<Item = LentTensor>,
) -> Result<(Layout, Lendable)> {
    let tensors: Vec<_> =
        tensors.into_iter().map(LentTensor::into_host_parts).collect::<Result<_>>()?;
    let places = HostRanges::new(0, tensors.iter().flat_map(|(_, both)| both));
    let at = |bytes: &Bytes| places.find(bytes).map_or(0, |(_, at)| at);
    let end = places.end(0);
    let wanted = tensors
        .iter()
        .map(|(wanted, [elements, scales])| (wanted.clone(), at(elements), at(scales)));
    let layout = Layout::at(wanted.collect::<Vec<_>>(), end)?;
    let mut views = Vec::new();
    // A part may have several tensors, one directly behind the other.
    let mut owners = vec![Vec::new(); places.all().len()];
    for bytes in tensors.into_iter().flat_map(|(_, both)| both) {
        if let Some((number, at)) = places.find(&bytes) {
            owners[number].push(bytes.clone());
            views.push((at, bytes.len() as u64, bytes));
        }
    }
    let mut parts = Vec::with_capacity(places.all().len());
    for (range, owners) in places.all().iter().zip(owners) {
        let HostRange { at, bytes, address } = *range;
        let part = OfferedPart { at, bytes, address };
        // SAFETY: the owners are tensors that a program lends, which has promised it of each, and the part is what they are together.
        let memory = unsafe { PromisedMemory::new(part.address, part.bytes as usize, owners) };
        parts.push((part, Memory::new(Arc::new(memory))?));
    }
    Ok((layout, Lendable { views: Views::Host(Parts::new(views)), parts }))
}

/// A rollout's memory, with the agent that lends it.
#[derive(Debug)]
pub(super) struct LentMemory {
    views: Views,
    bytes: u64,
    commands: Sender<Command>,
    state: State,
    /// Whether nobody can write since it was last lent. The agent's thread says so.
    over: Arc<AtomicBool>,
    /// How long lending may take.
    limit: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Own,
    Lent,
    /// The agent's thread was told to take it back.
    Returning,
}

impl LentMemory {
    /// Starts the agent, which registers the memory. `deadline` is that of the group.
    pub(super) async fn start(
        options: AgentOptions,
        name: String,
        memory: Lendable,
        deadline: Duration,
    ) -> Result<Self, NixlError> {
        let (commands, inbox) = channel();
        let closing = commands.clone();
        let over = Arc::new(AtomicBool::new(true));
        let Lendable { views, parts } = memory;
        let bytes = parts.last().map_or(0, |(part, _)| part.at + part.bytes);
        let theirs = over.clone();
        let make = move || Keeper::new(options, name, parts, theirs, deadline);
        // A thread that has ended needs no command.
        let close = move || drop(closing.send(Command::Close));
        thread::start(close, make, move |keeper| keeper.run(&inbox)).await?;
        Ok(Self { views, bytes, commands, state: State::Own, over, limit: deadline / 2 })
    }

    fn require_own(&self) -> Result<()> {
        match self.state {
            State::Own => Ok(()),
            State::Lent | State::Returning => {
                let message = "the tensors are lent: trainers may write to them";
                Err(Error::new(ErrorKind::State, "reading what is lent", message))
            }
        }
    }
}

impl Lender for LentMemory {
    fn len(&self) -> u64 {
        self.bytes.next_multiple_of(PAGE)
    }

    fn lend(&mut self, _: &[Rank]) -> Result<Bytes> {
        self.require_own()?;
        let (told, is_told) = sync_channel(1);
        // Whatever comes of it, the agent's thread says when it is over.
        self.over.store(false, Ordering::Release);
        self.state = State::Lent;
        self.commands.send(Command::Lend(told)).map_err(|_| NixlError::Closed)?;
        let offer = is_told.recv_timeout(self.limit).map_err(|_| NixlError::Slow(self.limit))??;
        encode(&offer)
    }

    fn take_back(&mut self) -> Result<bool> {
        if self.state == State::Lent {
            self.commands.send(Command::TakeBack).map_err(|_| NixlError::Closed)?;
            self.state = State::Returning;
        }
        if self.state == State::Returning && self.over.load(Ordering::Acquire) {
            self.state = State::Own;
        }
        Ok(self.state == State::Own)
    }

    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>> {
        self.require_own()?;
        // Nobody writes: no trainer has the lease, and none is granted it any more.
        let bytes = match &self.views {
            Views::Host(views) => views.bytes(at, len).map(LentBytes::Host),
            #[cfg(feature = "cuda")]
            Views::Device(lent) => bytes_of(&lent.space, at, len),
        };
        bytes.ok_or_else(|| {
            let message = format!("{len} bytes at {at} are in no tensor that is lent");
            Error::new(ErrorKind::State, "reading what is lent", message)
        })
    }

    #[cfg(feature = "cuda")]
    fn sums(
        &self,
        pieces: &[&Arc<[StridedPart]>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        match &self.views {
            Views::Host(_) => Ok(None),
            Views::Device(lent) => lent.kernels.sums(&lent.space, pieces, step).map(Some),
        }
    }
}

impl Drop for LentMemory {
    fn drop(&mut self) {
        if self.commands.send(Command::Close).is_err() {
            debug!("the agent has ended before");
        }
    }
}

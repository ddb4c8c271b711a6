//! Memory of a CUDA device that a rollout lends. Trainers on the same GPU, or on one with peer access to it, write there
//! with their kernels.
//!
//! A trainer keeps the memory open from one update to the next. Whether it may write is governed by a
//! [lease](crate::lease) for each update, as in host memory. Only the end of a lease differs. When a process is killed,
//! the system releases its locks before the driver has destroyed its context, and until then a kernel of the process may
//! run. So each trainer leaves a mark in the lease, and clears it when its kernels have ended. A mark that stays counts
//! until its process is gone.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use device_cuda::{
    Check, CudaMemory, CudaSlice, CudaSpace, Device, Maxima, Placer, Write, export, import, places,
};
use engine_core::plan::ALIGNMENT;
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result, Storage, Weight};
use placed::{Encoded, Encoder, Layout, Lender, LentBytes, LentTensor, Reached, Written};
use protocol::encode;
use quant_fp8::{Fp8Format, SourceType, StridedPart};
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::lease::{Lease, Leased, Marked, Terms, sweep};
use crate::lent::{Offer, lock};

const LENDING: &str = "lending tensors";

const NOT_EXPORTED: &str = "the driver does not export its memory, as that of PyTorch's expandable segments, of its asynchronous allocator and of vLLM's sleep \
     mode: allocate it without them, or receive into it through buckets";

/// What a trainer needs to write to a rollout's memory in one update.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CudaOffer {
    /// In ascending order of what is lent.
    allocations: Vec<OfferedAllocation>,
    /// The lease that other processes hold while they have the allocations open.
    open: Terms,
    lease: Terms,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OfferedAllocation {
    /// The offset of its first byte in what is lent.
    at: u64,
    bytes: u64,
    /// What other processes need to open it.
    handle: Vec<u8>,
}

/// A rollout's memory on a device.
#[derive(Debug)]
pub(crate) struct LentCuda {
    memory: Leased<Held>,
    allocations: Vec<OfferedAllocation>,
    placer: Mutex<Placer>,
    lease: Option<Lease>,
}

/// What is lent, and what keeps it.
#[derive(Clone, Debug)]
struct Held {
    space: CudaSpace,
    /// The tensors of the rollout's program, if it lends its own.
    _tensors: Vec<CudaMemory>,
}

impl LentCuda {
    /// Allocates this many bytes.
    ///
    /// # Errors
    ///
    /// `Resource` if there is not enough memory; `Backend` if other processes cannot open this device's memory.
    pub(crate) fn create(device: &DeviceChoice, bytes: u64) -> Result<Self> {
        sweep();
        let device = Device::of(device)?;
        let len = usize::try_from(bytes.max(1))
            .map_err(|_| Error::from(SegmentError::TooLarge(1, bytes)))?;
        let memory = CudaMemory::new(&device, len)?;
        let handle = export(&memory).map_err(|reason| {
            let message = format!("other processes cannot open this device's memory: {reason}");
            Error::new(ErrorKind::Backend, LENDING, message)
        })?;
        let offered = OfferedAllocation { at: 0, bytes: len as u64, handle };
        Self::of(&device, vec![(offered, memory)], Vec::new())
    }

    /// Lends tensors where they are: in allocations of the driver, of which each is opened as a whole. Returns their layout too.
    ///
    /// # Errors
    ///
    /// `Weight`, which names the tensor, for memory that the driver does not export, and for tensors that share memory; `Mismatch` for a
    /// tensor that is not on the device.
    pub(crate) fn of_tensors(
        device: &DeviceChoice,
        tensors: Vec<LentTensor>,
    ) -> Result<(Layout, Self)> {
        sweep();
        let device = Device::of(device)?;
        // By the address behind their ends.
        let mut known: BTreeMap<u64, (OfferedAllocation, CudaMemory)> = BTreeMap::new();
        let (mut end, mut held) = (0_u64, Vec::new());
        let mut place = |storage: &Storage| -> Result<u64> {
            if storage.is_empty() {
                return Ok(0);
            }
            let slice = CudaSlice::of_storage(storage)
                .filter(|slice| slice.device().ordinal() == device.ordinal());
            let slice = slice.ok_or_else(|| {
                let message =
                    format!("it is not on device {}, where this rollout's are", device.ordinal());
                Error::new(ErrorKind::Mismatch, LENDING, message)
            })?;
            let address = slice.address();
            let found = known.range(address + 1..).next().map(|(_, found)| found);
            let found = found.filter(|(_, memory)| memory.address() <= address);
            held.push(slice.memory().clone());
            if let Some((offered, memory)) = found {
                return Ok(offered.at + (address - memory.address()));
            }
            let whole = slice.memory().allocation()?;
            let handle = export(&whole).map_err(|reason| {
                let message = format!("{NOT_EXPORTED} ({reason})");
                Error::new(ErrorKind::Weight, LENDING, message)
            })?;
            let (at, bytes) = (end, whole.len() as u64);
            end = (at + bytes).next_multiple_of(ALIGNMENT);
            let from = whole.address();
            known.insert(from + bytes, (OfferedAllocation { at, bytes, handle }, whole));
            Ok(at + (address - from))
        };
        let mut placed = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let (wanted, elements, scales) = tensor.into_parts();
            let named = |error: Error| error.tensor(&*wanted.meta.name);
            let at = place(&elements).map_err(named)?;
            let scales_at = place(&scales).map_err(named)?;
            placed.push((wanted, at, scales_at));
        }
        let layout = Layout::at(placed, end)?;
        let mut allocations: Vec<_> = known.into_values().collect();
        allocations.sort_by_key(|(offered, _)| offered.at);
        Ok((layout, Self::of(&device, allocations, held)?))
    }

    fn of(
        device: &Device,
        allocations: Vec<(OfferedAllocation, CudaMemory)>,
        tensors: Vec<CudaMemory>,
    ) -> Result<Self> {
        let slices = allocations.iter().map(|(offered, memory)| (offered.at, memory.all()));
        let held = Held { space: CudaSpace::new(device, slices)?, _tensors: tensors };
        Ok(Self {
            memory: Leased::new(held, Some(Lease::new()?)),
            allocations: allocations.into_iter().map(|(offered, _)| offered).collect(),
            placer: Mutex::new(Placer::new(device)?),
            lease: None,
        })
    }

    fn require_own(&self) -> Result<()> {
        match self.lease {
            None => Ok(()),
            Some(_) => Err(SegmentError::Lent.into()),
        }
    }
}

impl Lender for LentCuda {
    fn len(&self) -> u64 {
        self.memory.space.len().next_multiple_of(ALIGNMENT)
    }

    fn lend(&mut self) -> Result<Bytes> {
        self.require_own()?;
        let lease = Lease::new()?;
        let offer = CudaOffer {
            allocations: self.allocations.clone(),
            open: self.memory.terms().ok_or(SegmentError::Lent)?,
            lease: lease.terms(),
        };
        self.lease = Some(lease);
        encode(&Offer::Cuda(offer))
    }

    fn take_back(&mut self) -> Result<bool> {
        if self.lease.as_ref().is_none_or(Lease::is_over_and_unmarked) {
            self.lease = None;
        }
        Ok(self.lease.is_none())
    }

    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>> {
        self.require_own()?;
        let bytes = usize::try_from(len).ok().and_then(|len| self.memory.space.slice(at, len).ok());
        Ok(LentBytes::Device(bytes.ok_or(SegmentError::NotLent { at, len })?.storage()))
    }

    fn sums(
        &self,
        pieces: &[&Arc<[StridedPart]>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        let memory = &self.memory.space;
        let checks: Vec<Check<'_>> = pieces.iter().map(|parts| Check { memory, parts }).collect();
        lock(&self.placer).check(&checks, step).map(Some)
    }
}

/// How a trainer on a device reaches the memory that rollouts lend on that device or on a peer.
#[derive(Debug)]
pub(crate) struct Peers {
    device: Device,
    placer: Mutex<Placer>,
    /// The memory that is open.
    kept: Mutex<Open>,
}

/// Allocations that are open, by the terms on which they are.
pub(crate) type Open = HashMap<Terms, (Vec<OfferedAllocation>, CudaSpace)>;

impl Peers {
    pub(crate) fn new(device: &DeviceChoice) -> Result<Self> {
        let device = Device::of(device)?;
        let placer = Mutex::new(Placer::new(&device)?);
        Ok(Self { device, placer, kept: Mutex::default() })
    }

    /// Reaches a rollout's memory, and adds it to `present`, which is kept for the next update.
    pub(crate) fn reach(
        &self,
        rank: Rank,
        offer: CudaOffer,
        present: &mut Open,
    ) -> Result<Arc<dyn Reached>> {
        let failed = |error: SegmentError| Error::from(error).rank(rank);
        // The lease comes first: while it is held, the memory is the rollout's.
        let lease = offer.lease.accept_marked().map_err(failed)?;
        let kept = lock(&self.kept).get(&offer.open).cloned();
        let memory = match kept.filter(|(known, _)| *known == offer.allocations) {
            Some((_, memory)) => memory,
            None => {
                // Accepted before the memory is opened, and held until all of it is closed.
                let owner = Arc::new(offer.open.accept().map_err(failed)?);
                let open = |one: &OfferedAllocation| {
                    let len = usize::try_from(one.bytes)
                        .map_err(|_| Error::from(SegmentError::TooLarge(1, one.bytes)))?;
                    let memory = import(&self.device, &one.handle, len, owner.clone())?;
                    // Memory of another process is opened on this device. Memory of this process is where it is.
                    if memory.device().ordinal() != self.device.ordinal() {
                        let message = "it is on another device of this process: give that rank a process of its own";
                        return Err(Error::new(
                            ErrorKind::Config,
                            "opening device memory",
                            message,
                        ));
                    }
                    Ok((one.at, memory.all()))
                };
                let opened: Result<Vec<_>> = offer.allocations.iter().map(open).collect();
                let opened = opened.map_err(|error| error.rank(rank))?;
                CudaSpace::new(&self.device, opened)
                    .map_err(|error| Error::from(error).rank(rank))?
            }
        };
        present.insert(offer.open, (offer.allocations, memory.clone()));
        Ok(Arc::new(BorrowedCuda { memory, _lease: lease }))
    }

    /// Keeps this memory open for the next update, and closes all other memory.
    pub(crate) fn keep(&self, present: Open) {
        *lock(&self.kept) = present;
    }
}

/// A rollout's memory, while its lease is held.
#[derive(Debug)]
struct BorrowedCuda {
    memory: CudaSpace,
    _lease: Marked,
}

impl Reached for BorrowedCuda {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let to = self.memory.slice(at, bytes.len());
        let to = to.map_err(|_| SegmentError::OutsideLent { at, len: bytes.len() as u64 })?;
        Ok(to.write(bytes)?)
    }
}

fn memory_of(to: &dyn Reached) -> Option<&CudaSpace> {
    let to: &dyn Any = to;
    to.downcast_ref::<BorrowedCuda>().map(|borrowed| &borrowed.memory)
}

fn not_here(weight: &Weight) -> Error {
    let message = "its weight or its place is not on the device";
    Error::new(ErrorKind::State, "writing tensors", message).tensor(weight.name())
}

impl Encoder for Peers {
    fn takes(&self, weight: &Weight, format: Option<&Fp8Format>) -> bool {
        weight.storage().is_some_and(|source| places(&self.device, source, format))
    }

    fn writes_to(&self, to: &dyn Reached) -> bool {
        memory_of(to).is_some()
    }

    fn maxima(&self, parts: &[(&Weight, SourceType, &StridedPart)]) -> Result<Vec<Vec<u32>>> {
        let jobs = parts.iter().map(|(weight, ty, part)| {
            let source = weight.storage().ok_or_else(|| not_here(weight))?;
            Ok(Maxima { source, ty: *ty, part })
        });
        lock(&self.placer).maxima(&jobs.collect::<Result<Vec<_>>>()?)
    }

    fn write(
        &self,
        pieces: &[Encoded<'_>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Written> {
        let jobs = pieces.iter().map(|piece| {
            let place = piece.weight.storage().zip(memory_of(piece.to));
            let (source, to) = place.ok_or_else(|| not_here(piece.weight))?;
            let known = piece.known.as_deref();
            Ok(Write { source, ty: piece.ty, parts: piece.parts, to, known })
        });
        let jobs = jobs.collect::<Result<Vec<_>>>()?;
        let found = lock(&self.placer).write(&jobs, step)?;
        Ok(Written {
            sums: found.sums,
            failed: found.failed.map(|failed| (failed.job, failed.block)),
        })
    }
}

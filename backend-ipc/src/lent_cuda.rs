//! Memory of a CUDA device that a rollout lends. Trainers on the same GPU, or on one with peer access to it, write there
//! with their kernels.
//!
//! A trainer keeps the memory open from one update to the next. Whether it may write is governed by a
//! [lease](crate::lease) for each update, as in host memory. Only the end of a lease differs. When a process is killed,
//! the system releases its locks before the driver has destroyed its context, and until then a kernel of the process may
//! run. So each trainer leaves a mark in the lease, and clears it when its kernels have ended. A mark that stays counts
//! until its process is gone.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use device_cuda::{CudaMemory, CudaSpace, Device, export, import};
use engine_core::plan::ALIGNMENT;
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result, Weight};
use placed::cuda::{CudaKernels, LentAllocation, bytes_of, lay_out_tensors};
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
    kernels: CudaKernels,
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
        let (layout, allocations, held) = lay_out_tensors(&device, tensors, |memory| {
            export(memory).map_err(|reason| {
                let message = format!("{NOT_EXPORTED} ({reason})");
                Error::new(ErrorKind::Weight, LENDING, message)
            })
        })?;
        let allocations = allocations.into_iter().map(|allocation| {
            let LentAllocation { at, memory, of_transport: handle } = allocation;
            (OfferedAllocation { at, bytes: memory.len() as u64, handle }, memory)
        });
        Ok((layout, Self::of(&device, allocations.collect(), held)?))
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
            kernels: CudaKernels::new(device)?,
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

    fn lend(&mut self, _: &[Rank]) -> Result<Bytes> {
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
        let bytes = bytes_of(&self.memory.space, at, len);
        Ok(bytes.ok_or(SegmentError::NotLent { at, len })?)
    }

    fn sums(
        &self,
        pieces: &[&Arc<[StridedPart]>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        self.kernels.sums(&self.memory.space, pieces, step).map(Some)
    }
}

/// How a trainer on a device reaches the memory that rollouts lend on that device or on a peer.
#[derive(Debug)]
pub(crate) struct Peers {
    kernels: CudaKernels,
    /// The memory that is open.
    kept: Mutex<Open>,
}

/// Allocations that are open, by the terms on which they are.
pub(crate) type Open = HashMap<Terms, (Vec<OfferedAllocation>, CudaSpace)>;

impl Peers {
    pub(crate) fn new(device: &DeviceChoice) -> Result<Self> {
        Ok(Self { kernels: CudaKernels::new(&Device::of(device)?)?, kept: Mutex::default() })
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
                    let memory = import(self.kernels.device(), &one.handle, len, owner.clone())?;
                    // Memory of another process is opened on this device. Memory of this process is where it is.
                    if memory.device().ordinal() != self.kernels.device().ordinal() {
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
                CudaSpace::new(self.kernels.device(), opened)
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

impl Encoder for Peers {
    fn takes(&self, weight: &Weight, format: Option<&Fp8Format>) -> bool {
        self.kernels.takes(weight, format)
    }

    fn writes_to(&self, to: &dyn Reached) -> bool {
        memory_of(to).is_some()
    }

    fn maxima(&self, parts: &[(&Weight, SourceType, &StridedPart)]) -> Result<Vec<Vec<u32>>> {
        self.kernels.maxima(parts)
    }

    fn write(
        &self,
        pieces: &[Encoded<'_>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Written> {
        let pieces = pieces.iter().map(|piece| {
            let to = memory_of(piece.to).ok_or_else(|| {
                let message = "its place is not on a device";
                let error = Error::new(ErrorKind::State, "writing tensors", message);
                error.tensor(piece.weight.name())
            })?;
            Ok((piece, to))
        });
        self.kernels.write(&pieces.collect::<Result<Vec<_>>>()?, step)
    }
}

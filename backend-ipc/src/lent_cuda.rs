//! Memory of a CUDA device that a rollout lends. Trainers on the same GPU, or on one with peer access to it, write there
//! with their kernels.
//!
//! A trainer keeps the memory open from one update to the next. Whether it may write is governed by a
//! [lease](crate::lease) for each update, as in host memory. Only the end of a lease differs. When a process is killed,
//! the system releases its locks before the driver has destroyed its context, and until then a kernel of the process may
//! run. So each trainer leaves a mark in the lease, and clears it when its kernels have ended. A mark that stays counts
//! until its process is gone.
//!
//! Memory that the driver does not export comes in parcels, through shared memory of the host ([`staged`](crate::staged)).

use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use device_cuda::{CudaMemory, CudaSlice, CudaSpace, Device, export, import};
use engine_core::plan::ALIGNMENT;
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result, Storage, Weight};
use placed::cuda::{CudaKernels, LentAllocation, bytes_of, lay_out_tensors};
use placed::parcels::{Packing, Run, Scatter};
use placed::{Encoded, Encoder, Layout, Lender, LentBytes, LentTensor, Reached, Wanted, Written};
use protocol::encode;
use quant_fp8::{Fp8Format, SourceType, StridedPart};
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::lease::{Lease, Leased, Marked, Terms, sweep};
use crate::lent::{Offer, lock, words_of_staged};
use crate::staged::{Lane, MOST, Staging, StagingOffer};

const LENDING: &str = "lending tensors";

const NOT_EXPORTED: &str = "the driver does not export theirs, as that of PyTorch's expandable segments, of its asynchronous allocator and \
     of vLLM's sleep mode";

/// What a trainer needs to write to a rollout's memory in one update.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CudaOffer {
    /// In ascending order of what is lent.
    allocations: Vec<OfferedAllocation>,
    /// For what is in none of them.
    staging: Option<StagingOffer>,
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
    kernels: Arc<CudaKernels>,
    staging: Option<Staging>,
    /// What goes through staging memory, and why.
    slower: Option<String>,
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
        Self::of(&device, vec![(Some(offered), memory, 0)], Vec::new())
    }

    /// Lends tensors where they are: in allocations of the driver, of which each is opened as a whole. What is in memory that the driver does
    /// not export comes in parcels, for which there are about so many bytes. Returns their layout too.
    ///
    /// # Errors
    ///
    /// `Weight`, which names the tensor, for tensors that share memory; `Mismatch` for a tensor that is not on the device.
    pub(crate) fn of_tensors(
        device: &DeviceChoice,
        tensors: Vec<LentTensor>,
        staging: u64,
    ) -> Result<(Layout, Self)> {
        sweep();
        let device = Device::of(device)?;
        let parts: Vec<(Wanted, [Storage; 2])> = tensors
            .iter()
            .map(|tensor| {
                let (wanted, elements, scales) = tensor.clone().into_parts();
                (wanted, [elements, scales])
            })
            .collect();
        let mut reason = None;
        let (layout, allocations, held) = lay_out_tensors(&device, tensors, |memory| {
            Ok(export(memory).map_err(|error| reason = Some(error)).ok())
        })?;
        let private: Vec<Range<u64>> = allocations
            .iter()
            .filter(|allocation| allocation.of_transport.is_none())
            .map(|LentAllocation { memory, .. }| {
                memory.address()..memory.address() + memory.len() as u64
            })
            .collect();
        let allocations = allocations.into_iter().map(|allocation| {
            let LentAllocation { at, memory, of_transport } = allocation;
            let bytes = memory.len() as u64;
            let offered = of_transport.map(|handle| OfferedAllocation { at, bytes, handle });
            (offered, memory, at)
        });
        let mut this = Self::of(&device, allocations.collect(), held)?;
        if let Some(reason) = reason {
            let why = format!("{NOT_EXPORTED} ({reason})");
            let is_private = |storage: &&Storage| {
                let address = CudaSlice::of_storage(storage).map(|slice| slice.address());
                address.is_some_and(|at| private.iter().any(|range| range.contains(&at)))
            };
            let staged = parts.iter().map(|(wanted, both)| {
                (wanted, both.iter().filter(is_private).map(Storage::len).sum())
            });
            this.slower = words_of_staged(staged, &why);
            let to = Parcels {
                kernels: this.kernels.clone(),
                room: CudaMemory::new(&device, MOST as usize)?,
                held: this.memory.clone(),
            };
            this.staging = Some(Staging::new(Arc::new(to), staging));
        }
        Ok((layout, this))
    }

    fn of(
        device: &Device,
        allocations: Vec<(Option<OfferedAllocation>, CudaMemory, u64)>,
        tensors: Vec<CudaMemory>,
    ) -> Result<Self> {
        let slices = allocations.iter().map(|(_, memory, at)| (*at, memory.all()));
        let held = Held { space: CudaSpace::new(device, slices)?, _tensors: tensors };
        Ok(Self {
            memory: Leased::new(held, Some(Lease::new()?)),
            allocations: allocations.into_iter().filter_map(|(offered, ..)| offered).collect(),
            kernels: Arc::new(CudaKernels::new(device)?),
            staging: None,
            slower: None,
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

    fn lend(&mut self, to: &[Rank]) -> Result<Bytes> {
        self.require_own()?;
        let lease = Lease::new()?;
        let terms = lease.terms();
        self.lease = Some(lease);
        let staging = self.staging.as_mut().map(|staging| staging.begin(to)).transpose()?;
        let offer = CudaOffer {
            allocations: self.allocations.clone(),
            staging,
            open: self.memory.terms().ok_or(SegmentError::Lent)?,
            lease: terms,
        };
        encode(&Offer::Cuda(offer))
    }

    fn take_back(&mut self) -> Result<bool> {
        if self.lease.as_ref().is_none_or(Lease::is_over_and_unmarked)
            && self.staging.as_mut().is_none_or(Staging::end)
        {
            self.lease = None;
        }
        Ok(self.lease.is_none())
    }

    fn slower(&self) -> Vec<String> {
        self.slower.iter().cloned().collect()
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

/// Where parcels are scattered to: they are copied to the device as a whole, and from there to their places by one launch.
#[derive(Debug)]
struct Parcels {
    kernels: Arc<CudaKernels>,
    room: CudaMemory,
    held: Held,
}

impl Scatter for Parcels {
    fn scatter(&self, runs: &[Run], parcel: &[u8]) -> Result<()> {
        let bytes = usize::try_from(Run::all_bytes(runs))
            .map_or(parcel.len(), |bytes| bytes.min(parcel.len()));
        let here = self.room.slice(0, bytes)?;
        here.write(&parcel[..bytes])?;
        self.kernels.scatter(runs, &here.storage(), &self.held.space)
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
        lane: impl FnOnce(StagingOffer, Terms) -> Result<Option<Lane>, SegmentError>,
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
        let lane = offer.staging.map(|staging| lane(staging, offer.lease));
        let parcels = lane.transpose().map_err(failed)?.flatten().map(Packing::new);
        Ok(Arc::new(BorrowedCuda { memory, parcels, _lease: lease }))
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
    /// What takes everything that is not there.
    parcels: Option<Packing<Lane>>,
    _lease: Marked,
}

impl Reached for BorrowedCuda {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        match (self.memory.slice(at, bytes.len()), &self.parcels) {
            (Ok(to), _) => Ok(to.write(bytes)?),
            (Err(_), Some(parcels)) => parcels.put(at, bytes),
            (Err(_), None) => Err(SegmentError::OutsideLent { at, len: bytes.len() as u64 }.into()),
        }
    }

    fn flush(&self) -> Result<()> {
        self.parcels.as_ref().map_or(Ok(()), Packing::flush)
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

    fn writes_to(&self, to: &dyn Reached, places: &[u64]) -> bool {
        memory_of(to).is_some_and(|memory| places.iter().all(|at| memory.rest(*at) > 0))
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

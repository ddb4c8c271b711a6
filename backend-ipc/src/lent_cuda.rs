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
use device_cuda::{
    Check, CudaMemory, CudaSlice, Device, Maxima, Placer, Write, export, import, places,
};
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result, Weight};
use placed::{Encoded, Encoder, Lender, LentBytes, Reached, Written};
use quant_fp8::{Fp8Format, SourceType, StridedPart};
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::lease::{Lease, Leased, Marked, Terms, sweep};
use crate::lent::{Offer, in_bytes, lock};

/// What a trainer needs to write to a rollout's memory in one update.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CudaOffer {
    /// What other processes need to open the allocation.
    handle: Vec<u8>,
    /// The lease that other processes hold while they have it open.
    open: Terms,
    bytes: u64,
    lease: Terms,
}

/// A rollout's memory on a device.
#[derive(Debug)]
pub(crate) struct LentCuda {
    memory: Leased<CudaMemory>,
    handle: Vec<u8>,
    placer: Mutex<Placer>,
    lease: Option<Lease>,
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
        let placer = Mutex::new(Placer::new(&device)?);
        let handle = export(&memory).map_err(|reason| {
            let message = format!("other processes cannot open this device's memory: {reason}");
            Error::new(ErrorKind::Backend, "lending tensors", message)
        })?;
        let memory = Leased::new(memory, Some(Lease::new()?));
        Ok(Self { memory, handle, placer, lease: None })
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
        self.memory.len() as u64
    }

    fn lend(&mut self) -> Result<Bytes> {
        self.require_own()?;
        let lease = Lease::new()?;
        let offer = CudaOffer {
            handle: self.handle.clone(),
            open: self.memory.terms().ok_or(SegmentError::Lent)?,
            bytes: self.len(),
            lease: lease.terms(),
        };
        self.lease = Some(lease);
        in_bytes(&Offer::Cuda(offer))
    }

    fn take_back(&mut self) -> Result<bool> {
        if self.lease.as_ref().is_none_or(Lease::is_over_and_unmarked) {
            self.lease = None;
        }
        Ok(self.lease.is_none())
    }

    fn bytes(&self) -> Result<LentBytes<'_>> {
        self.require_own()?;
        Ok(LentBytes::Device(self.memory.all().storage()))
    }

    fn sums(
        &self,
        pieces: &[&Arc<[StridedPart]>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        self.require_own()?;
        let memory = self.memory.all();
        let checks: Vec<Check<'_>> =
            pieces.iter().map(|parts| Check { memory: &memory, parts }).collect();
        lock(&self.placer).check(&checks, step).map(Some)
    }
}

/// How a trainer on a device reaches the memory that rollouts lend on that device or on a peer.
#[derive(Debug)]
pub(crate) struct Peers {
    device: Device,
    placer: Mutex<Placer>,
    /// The memory that is open.
    kept: Mutex<HashMap<Terms, CudaMemory>>,
}

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
        offer: &CudaOffer,
        present: &mut HashMap<Terms, CudaMemory>,
    ) -> Result<Arc<dyn Reached>> {
        let failed = |error: SegmentError| Error::from(error).rank(rank);
        // The lease comes first: while it is held, the memory is the rollout's.
        let lease = offer.lease.accept_marked().map_err(failed)?;
        let len = usize::try_from(offer.bytes);
        let len = len.map_err(|_| failed(SegmentError::TooLarge(1, offer.bytes)))?;
        let memory = match lock(&self.kept).get(&offer.open).filter(|memory| memory.len() == len) {
            Some(memory) => memory.clone(),
            None => {
                // Accepted before the memory is opened, and held until it is closed.
                let owner = offer.open.accept().map_err(failed)?;
                let memory = import(&self.device, &offer.handle, len, Arc::new(owner))
                    .map_err(|error| error.rank(rank))?;
                // Memory of another process is opened on this device. Memory of this process is where it is.
                if memory.device().ordinal() != self.device.ordinal() {
                    let message = "it is on another device of this process: give that rank a process of its own";
                    let error = Error::new(ErrorKind::Config, "opening device memory", message);
                    return Err(error.rank(rank));
                }
                memory
            }
        };
        present.insert(offer.open.clone(), memory.clone());
        Ok(Arc::new(BorrowedCuda { memory: memory.all(), _lease: lease }))
    }

    /// Keeps this memory open for the next update, and closes all other memory.
    pub(crate) fn keep(&self, present: HashMap<Terms, CudaMemory>) {
        *lock(&self.kept) = present;
    }
}

/// A rollout's memory, while its lease is held.
#[derive(Debug)]
struct BorrowedCuda {
    memory: CudaSlice,
    _lease: Marked,
}

impl Reached for BorrowedCuda {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let size = self.memory.len();
        let to = usize::try_from(at).ok().and_then(|at| self.memory.slice(at, bytes.len()).ok());
        let to = to.ok_or(SegmentError::OutsideLent { at, len: bytes.len(), size })?;
        Ok(to.write(bytes)?)
    }
}

fn memory_of(to: &dyn Reached) -> Option<&CudaSlice> {
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

//! What transports share for memory of CUDA devices: where a rollout's tensors lie in what it lends, the digests of that, and the kernels
//! with which trainers encode.

mod encoder;
mod windows;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use device_cuda::{Check, CudaMemory, CudaSlice, CudaSpace, Device, Maxima, Placer, Write, places};
use engine_core::plan::ALIGNMENT;
use engine_core::{Error, ErrorKind, Result, Storage, Weight};
use quant_fp8::{Fp8Format, SourceType, StridedPart, Strides};

use crate::memory::{Encoded, LentBytes, Written};
use crate::parcels::{Gathered, Run, SCATTERING, places as places_of};
use crate::rollout::Layout;
use crate::tensors::{LENDING, LentTensor};

pub use encoder::{Carries, Reads, WindowEncoder};

/// Memory of a device in which tensors are that a rollout lends.
#[derive(Debug)]
pub struct LentAllocation<T> {
    /// The offset of its first byte in what is lent.
    pub at: u64,
    /// An allocation of the driver, if it is `of_transport`; otherwise the memory of a tensor.
    pub memory: CudaMemory,
    /// What a transport needs to reach it; `None` if nobody else reaches it.
    pub of_transport: Option<T>,
}

/// Finds the allocations in which tensors are, and the layout of what is lent: all of these, one behind the other. `open` is called for each
/// allocation. Where it returns `None`, the memory of each tensor is by itself.
///
/// # Errors
///
/// `Mismatch` for a tensor that is not on the device, `Weight` for tensors that share memory, and those of `open`, each with the name of the
/// tensor.
pub fn lay_out_tensors<T>(
    device: &Device,
    tensors: Vec<LentTensor>,
    mut open: impl FnMut(&CudaMemory) -> Result<Option<T>>,
) -> Result<(Layout, Vec<LentAllocation<T>>, Vec<CudaMemory>)> {
    // By the address behind their ends.
    let mut known: BTreeMap<u64, LentAllocation<T>> = BTreeMap::new();
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
        let (address, until) = (slice.address(), slice.address() + slice.len() as u64);
        let found = known.range(address + 1..).next();
        held.push(slice.memory().clone());
        match found {
            Some((end, found)) if found.memory.address() <= address && until <= *end => {
                return Ok(found.at + (address - found.memory.address()));
            }
            Some((_, found)) if found.memory.address() < until => {
                let message = "its memory overlaps that of another";
                return Err(Error::new(ErrorKind::Weight, LENDING, message));
            }
            _ => {}
        }
        let allocation = slice.memory().allocation()?;
        let of_transport = open(&allocation)?;
        let memory = match of_transport {
            Some(_) => allocation,
            None => slice.memory().clone(),
        };
        let (at, bytes, from) = (end, memory.len() as u64, memory.address());
        end = (at + bytes).next_multiple_of(ALIGNMENT);
        known.insert(from + bytes, LentAllocation { at, memory, of_transport });
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
    let mut allocations: Vec<_> = known.into_values().collect();
    allocations.sort_by_key(|allocation| allocation.at);
    let bytes = allocations.last().map_or(0, |last| last.at + last.memory.len() as u64);
    let layout = Layout::at(placed, bytes)?;
    Ok((layout, allocations, held))
}

/// The kernels of a device for placed updates: with them a trainer encodes, and a rollout digests what it lends.
#[derive(Debug)]
pub struct CudaKernels {
    device: Device,
    placer: Mutex<Placer>,
}

impl CudaKernels {
    /// Loads them.
    ///
    /// # Errors
    ///
    /// Those of [`Placer::new`].
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { device: device.clone(), placer: Mutex::new(Placer::new(device)?) })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn placer(&self) -> MutexGuard<'_, Placer> {
        // A list of launches that a panic has taken out is made anew.
        self.placer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Lender::sums`](crate::Lender::sums).
    ///
    /// # Errors
    ///
    /// Those of [`Placer::check`].
    pub fn sums(
        &self,
        memory: &CudaSpace,
        pieces: &[&Arc<[StridedPart]>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<u64>> {
        let checks: Vec<Check<'_>> = pieces.iter().map(|parts| Check { memory, parts }).collect();
        self.placer().check(&checks, step)
    }

    /// As [`Encoder::takes`](crate::Encoder::takes).
    pub fn takes(&self, weight: &Weight, format: Option<&Fp8Format>) -> bool {
        weight.storage().is_some_and(|source| places(&self.device, source, format))
    }

    /// As [`Encoder::maxima`](crate::Encoder::maxima).
    ///
    /// # Errors
    ///
    /// Those of [`Placer::maxima`].
    pub fn maxima(&self, parts: &[(&Weight, SourceType, &StridedPart)]) -> Result<Vec<Vec<u32>>> {
        let jobs = parts
            .iter()
            .map(|(weight, ty, part)| Ok(Maxima { source: source_of(weight)?, ty: *ty, part }));
        self.placer().maxima(&jobs.collect::<Result<Vec<_>>>()?)
    }

    /// As [`Encoder::write`](crate::Encoder::write), of each piece to this memory.
    ///
    /// # Errors
    ///
    /// Those of [`Placer::write`].
    pub fn write(
        &self,
        pieces: &[(&Encoded<'_>, &CudaSpace)],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Written> {
        let jobs = pieces.iter().map(|(piece, to)| {
            let (source, known) = (source_of(piece.weight)?, piece.known.as_deref());
            Ok(Write { source, ty: piece.ty, parts: piece.parts, to, known })
        });
        let jobs = jobs.collect::<Result<Vec<_>>>()?;
        let found = self.placer().write(&jobs, step)?;
        let failed = found.failed.map(|failed| (failed.job, failed.block));
        Ok(Written { sums: found.sums, failed })
    }
}

impl CudaKernels {
    /// Copies the bytes of a parcel, which is on the device, to their places in memory, by one launch. Returns when they are there.
    ///
    /// # Errors
    ///
    /// `Protocol` for runs that are longer than the parcel or not in the memory; those of [`Placer::write`].
    pub fn scatter(&self, runs: &[Run], parcel: &Storage, to: &CudaSpace) -> Result<()> {
        let mut copies = Vec::with_capacity(runs.len());
        for place in places_of(runs, parcel.len()) {
            let (from, run) = place?;
            let all = run.stride * (run.rows - 1) + run.len;
            if to.rest(run.at) >= all {
                copies.push(copy(Strides::rows(from, run.len), run));
                continue;
            }
            for row in 0..run.rows {
                let (mut from, mut at) = (from + row * run.len, run.at + row * run.stride);
                let mut left = run.len;
                // Slices may be neighbours. A job is in one of them.
                while left > 0 {
                    let here = to.rest(at).min(left);
                    if here == 0 {
                        let message = format!("the byte at {at} is in no tensor that is lent");
                        return Err(Error::new(ErrorKind::Protocol, SCATTERING, message));
                    }
                    copies.push(copy(Strides::rows(from, here), Run::together(at, here)));
                    (from, at, left) = (from + here, at + here, left - here);
                }
            }
        }
        self.copy(&copies, parcel, to)
    }

    /// Copies runs of memory of the device to a parcel there, one behind the other, by one launch. Returns when they are there.
    ///
    /// # Errors
    ///
    /// Those of [`Placer::write`], also for runs that are not in the memory.
    pub fn gather(&self, runs: &[Gathered], memory: &Storage, parcel: &CudaSpace) -> Result<()> {
        let mut at = 0;
        let copies = runs.iter().map(|Gathered { run, from }| {
            let to = Run { at, stride: run.len, ..*run };
            at += run.rows * run.len;
            copy(Strides::rows(*from, run.stride), to)
        });
        self.copy(&copies.collect::<Vec<_>>(), memory, parcel)
    }

    fn copy(&self, parts: &[Arc<[StridedPart]>], source: &Storage, to: &CudaSpace) -> Result<()> {
        let job = |parts| Write { source, ty: None, parts, to, known: None };
        let jobs: Vec<Write<'_>> = parts.iter().map(job).collect();
        self.placer().write(&jobs, || Ok(())).map(drop)
    }
}

/// The copy of rows to those of a run.
fn copy(from: Strides, to: Run) -> Arc<[StridedPart]> {
    let (to, extent) = (Strides::rows(to.at, to.stride), [1, to.rows, to.len]);
    [StridedPart { from, to, extent, element: 1, blocks: None }].into()
}

/// As [`Lender::bytes`](crate::Lender::bytes); `None` for bytes that are not in one piece of the memory.
pub fn bytes_of(memory: &CudaSpace, at: u64, len: u64) -> Option<LentBytes<'static>> {
    let slice = usize::try_from(len).ok().and_then(|len| memory.slice(at, len).ok())?;
    Some(LentBytes::Device(slice.storage()))
}

fn source_of(weight: &Weight) -> Result<&Storage> {
    weight.storage().ok_or_else(|| {
        let message = "its elements are not where a kernel reads them";
        Error::new(ErrorKind::State, "writing tensors", message).tensor(weight.name())
    })
}

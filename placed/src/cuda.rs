//! What transports share for memory of CUDA devices: where a rollout's tensors lie in what it lends, the digests of that, and the kernels
//! with which trainers encode.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use device_cuda::{Check, CudaMemory, CudaSlice, CudaSpace, Device, Maxima, Placer, Write, places};
use engine_core::plan::ALIGNMENT;
use engine_core::{Error, ErrorKind, Result, Storage, Weight};
use quant_fp8::{Fp8Format, SourceType, StridedPart};

use crate::memory::{Encoded, LentBytes, Written};
use crate::rollout::Layout;
use crate::tensors::{LENDING, LentTensor};

/// An allocation of a device in which tensors are that a rollout lends.
#[derive(Debug)]
pub struct LentAllocation<T> {
    /// The offset of its first byte in what is lent.
    pub at: u64,
    /// All of it.
    pub memory: CudaMemory,
    /// What a transport needs of it.
    pub of_transport: T,
}

/// Finds the allocations in which tensors are, and the layout of what is lent: all of these, one behind the other. `open` is called once
/// for each allocation.
///
/// # Errors
///
/// `Mismatch` for a tensor that is not on the device, `Weight` for tensors that share memory, and those of `open`, each with the name of the
/// tensor.
pub fn lay_out_tensors<T>(
    device: &Device,
    tensors: Vec<LentTensor>,
    mut open: impl FnMut(&CudaMemory) -> Result<T>,
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
        let address = slice.address();
        let found = known.range(address + 1..).next().map(|(_, found)| found);
        let found = found.filter(|found| found.memory.address() <= address);
        held.push(slice.memory().clone());
        if let Some(found) = found {
            return Ok(found.at + (address - found.memory.address()));
        }
        let memory = slice.memory().allocation()?;
        let of_transport = open(&memory)?;
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
    let layout = Layout::at(placed, end)?;
    let mut allocations: Vec<_> = known.into_values().collect();
    allocations.sort_by_key(|allocation| allocation.at);
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

//! Placed updates of tensors on GPUs: trainers gather parcels by kernels from what they have encoded, and rollouts scatter them by kernels.

use std::any::Any;
use std::sync::Arc;

use ::placed::cuda::{Carries, CudaKernels, Reads, WindowEncoder, bytes_of, lay_out_tensors};
use ::placed::parcels::{Gathered, Run};
use ::placed::{Encoder, Layout, LentBytes, LentTensor, PlacedRollout, Reached, Wanted};
use collective::{ParcelsTo, Tensors};
use device_cuda::{CudaMemory, CudaSlice, CudaSpace, Device};
use engine_core::{EngineContext, Error, ErrorKind, Prepared, Rank, Result, Storage};
use quant_fp8::StridedPart;

use crate::Configured;
use crate::comm::Nccl;
use crate::library::memory_of;

const LENDING: &str = "lending tensors";

/// Prepares a rollout that lends its tensors, which are on its GPU. Each trainer that has a part of them forms a group of two with it.
///
/// Its trainers need the option `placed` of this transport. What they hold on their own GPU is encoded there.
///
/// # Errors
///
/// `Config` without a control plane, for a `device` that is no GPU, and for tensors that cannot be placed; `Weight`, which names the tensor, for
/// a box outside of its tensor; `Resource` if there is no memory. NCCL's errors come when the rank joins.
pub fn lend(
    context: EngineContext,
    wanted: impl IntoIterator<Item = Wanted>,
) -> Result<Prepared<PlacedRollout>> {
    let (device, layout) = (device_of(&context)?, Layout::new(wanted)?);
    let len = usize::try_from(layout.bytes().max(1)).map_err(|_| {
        let message = format!("{} bytes are more than this machine can address", layout.bytes());
        Error::new(ErrorKind::Resource, LENDING, message)
    })?;
    let space = CudaSpace::from(CudaMemory::new(&device, len)?.all());
    prepare(
        context,
        layout,
        OnGpu { space, kernels: CudaKernels::new(&device)?, _held: Vec::new() },
    )
}

/// As [`lend`], of tensors that the rollout's program has made on its GPU, in memory of any kind: updates are written to where they are.
///
/// # Errors
///
/// As [`lend`]. `Weight`, which names the tensor, for tensors that share memory; `Mismatch` for a tensor that is not on the GPU.
pub fn lend_tensors(
    context: EngineContext,
    tensors: impl IntoIterator<Item = LentTensor>,
) -> Result<Prepared<PlacedRollout>> {
    let device = device_of(&context)?;
    // Nobody else opens their memory, so that it does not matter what it is.
    let tensors = tensors.into_iter().collect();
    let (layout, parts, held) = lay_out_tensors::<()>(&device, tensors, |_| Ok(None))?;
    let slices = parts.iter().map(|part| (part.at, part.memory.all()));
    let space = CudaSpace::new(&device, slices)?;
    prepare(context, layout, OnGpu { space, kernels: CudaKernels::new(&device)?, _held: held })
}

fn device_of(context: &EngineContext) -> Result<Device> {
    // The error of a device that is none.
    memory_of(context)?;
    Ok(Device::of(&context.config.device)?)
}

fn prepare(
    context: EngineContext,
    layout: Layout,
    tensors: OnGpu,
) -> Result<Prepared<PlacedRollout>> {
    let Configured { library, .. } = Configured::of(&context)?;
    collective::prepare_placed_rollout(library, context, layout, Arc::new(tensors))
}

/// What encodes weights on a trainer's GPU.
///
/// # Errors
///
/// `Config` for a `device` that is no GPU; those of the device.
pub(crate) fn encoder(context: &EngineContext) -> Result<Box<dyn Encoder>> {
    let device = device_of(context)?;
    let parcels = Parcels(CudaKernels::new(&device)?);
    Ok(Box::new(WindowEncoder::new(&device, parcels, context.deadline())?))
}

/// What is encoded is gathered into parcels.
#[derive(Debug)]
struct Parcels(CudaKernels);

impl Carries for Parcels {
    type Target = ParcelsTo<Nccl>;
    type Memory = Storage;

    fn target<'a>(&self, to: &'a dyn Reached) -> Option<&'a ParcelsTo<Nccl>> {
        let to: &dyn Any = to;
        to.downcast_ref()
    }

    fn rank(&self, target: &ParcelsTo<Nccl>) -> Rank {
        target.rank()
    }

    fn check(&self, target: &ParcelsTo<Nccl>) -> Result<()> {
        target.check()
    }

    fn memory(&self, memory: &CudaMemory) -> Result<Storage> {
        Ok(memory.all().storage())
    }

    /// When it returns, the memory is not read any more: the bytes are in slots.
    fn carry(
        &self,
        target: &ParcelsTo<Nccl>,
        memory: &Storage,
        runs: &[Gathered],
        _: &dyn Fn() -> Reads,
    ) -> Result<()> {
        target.carry(runs, |runs, parcel| {
            let slot = CudaSlice::of_storage(parcel).ok_or_else(|| {
                let message = "the slots of this transport are not on a GPU";
                Error::new(ErrorKind::State, "gathering a parcel", message)
            })?;
            let room = CudaSpace::new(self.0.device(), [(0, slot)])?;
            self.0.gather(runs, memory, &room)
        })
    }

    fn arrived(&self, target: &ParcelsTo<Nccl>) -> Result<()> {
        target.arrived()
    }
}

/// A rollout's tensors on its GPU.
#[derive(Debug)]
struct OnGpu {
    space: CudaSpace,
    kernels: CudaKernels,
    /// The tensors of the rollout's program, if it lends its own.
    _held: Vec<CudaMemory>,
}

impl Tensors for OnGpu {
    fn len(&self) -> u64 {
        self.space.len()
    }

    fn scatter(&self, runs: &[Run], parcel: &Storage) -> Result<()> {
        self.kernels.scatter(runs, parcel, &self.space)
    }

    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>> {
        bytes_of(&self.space, at, len).ok_or_else(|| {
            let message = format!("{len} bytes at {at} are in no tensor that is lent");
            Error::new(ErrorKind::State, "reading what is lent", message)
        })
    }

    fn sums(
        &self,
        pieces: &[&Arc<[StridedPart]>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        self.kernels.sums(&self.space, pieces, step).map(Some)
    }
}

//! Rollouts of placed updates: tensors on a GPU, to which parcels are scattered by kernels.

use std::sync::Arc;

use ::placed::cuda::{CudaKernels, bytes_of, lay_out_tensors};
use ::placed::parcels::Run;
use ::placed::{Layout, LentBytes, LentTensor, PlacedRollout, Wanted};
use collective::Tensors;
use device_cuda::{CudaMemory, CudaSpace, Device};
use engine_core::{EngineContext, Error, ErrorKind, Prepared, Result, Storage};
use quant_fp8::StridedPart;

use crate::Configured;
use crate::library::memory_of;

const LENDING: &str = "lending tensors";

/// Prepares a rollout that lends its tensors, which are on its GPU. Each trainer that has a part of them forms a group of two with it.
///
/// Its trainers need the option `placed` of this transport. What they hold on their own GPU is encoded by the CPU.
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

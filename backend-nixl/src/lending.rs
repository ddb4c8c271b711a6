//! Placed updates: trainers write into memory that rollouts lend, of the host or of a device, with NIXL's writes.
//!
//! A rollout's memory is registered once, with an agent of its own ([`lender`]). The terms of each update are how that agent is reached,
//! where the memory is, and the number of a [`lease`]. A trainer's agent ([`writer`]) accepts the lease, and waits for the grant. From then
//! on the rollout counts it among those who may write, until it says that it let go, which it does when its last write has ended where the
//! bytes go. What a trainer puts is gathered in [`staging`] and written many runs at a time. Weights on its device are encoded there, and
//! written from there to rollouts' devices. [`notice`] has the messages between the agents.
//!
//! Memory is taken back when all trainers have let go. One that does not may still write, and so may the network in its name. Then the
//! rollout ends its agent, and registers the memory with another one, if that is a proof that nothing more arrives (`lent.rs`). If it is
//! none, because the trainer may write by itself on this host, it waits for the end of that process.
//!
//! An agent whose peer has failed is replaced: every agent has a name of its own, so nothing of an old connection is taken for a new one. So
//! memory is registered anew after a failure, and otherwise never.

#[cfg(feature = "cuda")]
mod device;
mod lease;
mod lender;
mod memory;
mod notice;
mod parcel;
mod peers;
mod reach;
mod staging;
#[cfg(test)]
mod tests;
mod writer;

use std::time::Duration;

#[cfg(not(feature = "cuda"))]
use engine_core::Error;
use engine_core::{EngineContext, Prepared, PreparedTrainer, Result};
use placed::{Layout, LentTensor, PlacedRollout, Wanted};

use crate::NAME;
use crate::agent::AgentOptions;
use crate::engine::{self, unique_name};
use crate::interface;
use memory::LentMemory;
#[cfg(fuzzing)]
pub(crate) use notice::{Offer, ToLender, ToWriter};
pub(crate) use parcel::Parcel;
use reach::Writers;

/// The longest pause between two looks for messages of peers while nothing is under way.
const IDLE: Duration = Duration::from_millis(5);

/// Prepares a rollout that lends its tensors to trainers of any hosts. They write to them in every update. The tensors are in memory of the
/// configured device, of the host or with the feature `cuda` of a CUDA device.
///
/// Its trainers need the option `placed` of this transport. Of this rank's options, those of UCX count.
///
/// # Errors
///
/// `Config` without a control plane, for a `device` of another kind, and for tensors that cannot be placed; `Backend` without NIXL's
/// library; `Weight`, which names the tensor, for a box outside of its tensor; `Resource` if there is no memory. NIXL's other errors come
/// when the rank joins.
pub fn lend(
    context: EngineContext,
    wanted: impl IntoIterator<Item = Wanted>,
) -> Result<Prepared<PlacedRollout>> {
    let (device, layout) = (&context.config.device, Layout::new(wanted)?);
    let memory = match device.is_cpu() {
        true => memory::allocate(layout.bytes())?,
        #[cfg(feature = "cuda")]
        false => memory::allocate_on(device, layout.bytes())?,
        #[cfg(not(feature = "cuda"))]
        false => return Err(without_devices(device)),
    };
    prepare_rollout(context, layout, memory)
}

/// As [`lend`], of tensors that the rollout's program has made: updates are written to where they are, in host memory of any kind, or on the
/// configured device. Trainers on a device of the same host may keep that memory mapped until they end, and CUDA does not define what
/// happens if it is freed meanwhile: keep the tensors as long.
///
/// # Errors
///
/// As [`lend`]. `Weight`, which names the tensor, for tensors that share memory; `Mismatch` for a tensor that is not where the configured
/// device has its memory.
pub fn lend_tensors(
    context: EngineContext,
    tensors: impl IntoIterator<Item = LentTensor>,
) -> Result<Prepared<PlacedRollout>> {
    let device = &context.config.device;
    let (layout, memory) = match device.is_cpu() {
        true => memory::of_tensors(tensors)?,
        #[cfg(feature = "cuda")]
        false => memory::of_tensors_on(device, tensors)?,
        #[cfg(not(feature = "cuda"))]
        false => return Err(without_devices(device)),
    };
    prepare_rollout(context, layout, memory)
}

#[cfg(not(feature = "cuda"))]
fn without_devices(device: &engine_core::DeviceChoice) -> Error {
    let message = format!(
        "this program was built without the feature `cuda`, and this rollout's `device` is `{device}`: set it to `cpu`, or build it with \
         that feature"
    );
    Error::new(engine_core::ErrorKind::Config, "lending tensors", message)
}

fn prepare_rollout(
    context: EngineContext,
    layout: Layout,
    memory: memory::Lendable,
) -> Result<Prepared<PlacedRollout>> {
    let options = engine::options(&context)?.of_agent();
    // Found out before the group forms.
    crate::sys::load(options.library_dir.as_deref())?;
    let control = context.require_control()?;
    let deadline = context.deadline();
    let memory = async move {
        let options = with_interface(options, control.leader_address()).await;
        let name = unique_name(control.rank());
        let memory = LentMemory::start(options, name, memory, deadline).await?;
        Ok(Box::new(memory) as Box<dyn placed::Lender>)
    };
    placed::prepare_rollout(NAME, context, layout, memory)
}

/// Prepares a trainer that writes to what rollouts lend.
pub(crate) async fn prepare_trainer(context: EngineContext) -> Result<PreparedTrainer> {
    let options = engine::options(&context)?.of_agent();
    let control = context.require_control()?;
    let options = with_interface(options, control.leader_address()).await;
    let buckets = 2 * engine::bucket_bytes(&context.config, true);
    let limit = context.deadline().mul_f64(0.75);
    let writers =
        Writers::start(options, &context.config.device, control.rank(), buckets, limit).await?;
    placed::prepare_trainer(NAME, context, std::sync::Arc::new(writers))
}

async fn with_interface(options: AgentOptions, leader: Option<String>) -> AgentOptions {
    AgentOptions { interface: interface::towards(leader).await, ..options }
}

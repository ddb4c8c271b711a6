//! How a transport's ranks come to take part in placed updates: what they say of themselves, and their engines.

use std::future::Future;
use std::sync::Arc;

use engine_core::{
    EngineContext, Error, ErrorKind, Placement, Prepared, PreparedTrainer, Result, Role,
    TrainerEngine, WorkerMetadata,
};

use crate::memory::{Lender, Reach};
use crate::rollout::{Layout, PlacedRollout};
use crate::trainer::PlacedTrainer;

/// The metadata of a rank of placed updates.
const PLACED: &str = "placed";

fn metadata(backend: &str, context: &EngineContext, role: Role) -> Result<WorkerMetadata> {
    let rank = context.require_control()?.rank();
    Ok(WorkerMetadata::of_this_process(backend, rank, role, PLACED.into()))
}

/// Whether the ranks of a group, which are those of one transport, take part in placed updates.
///
/// # Errors
///
/// `Mismatch`, which names the rank, if some do and others do not.
pub fn are_placed(places: &[Placement]) -> Result<bool> {
    let is_placed = |place: &Placement| Ok::<_, Error>(place.own()?.details == PLACED);
    let leads = match places.first() {
        Some(first) => is_placed(first)?,
        None => false,
    };
    for place in places {
        if is_placed(place)? != leads {
            let (one, other) = if leads { ("no", "placed") } else { ("a placed", "no placed") };
            let message = format!("it takes part in {one} updates, the trainer in {other} ones");
            let error = Error::new(ErrorKind::Mismatch, "building the topology", message);
            return Err(error.rank(place.rank));
        }
    }
    Ok(leads)
}

/// Prepares a trainer that reaches the memory of rollouts by `reach`.
///
/// # Errors
///
/// `Config` without a control plane.
pub fn prepare_trainer(
    backend: &str,
    context: EngineContext,
    reach: Arc<dyn Reach>,
) -> Result<PreparedTrainer> {
    let metadata = metadata(backend, &context, Role::Trainer)?;
    Ok(Prepared::new(metadata, move |place| async move {
        let ranks = place.peers.iter().map(|peer| (peer.rank, peer.role)).collect();
        let engine = PlacedTrainer::new(&context, ranks, reach)?;
        Ok(Box::new(engine) as Box<dyn TrainerEngine>)
    }))
}

/// Prepares a rollout that lends memory for a layout. It waits for the memory when it joins the group.
///
/// # Errors
///
/// `Config` without a control plane, and for `wants`: the layout says what the rollout wants.
pub fn prepare_rollout(
    backend: &str,
    context: EngineContext,
    layout: Layout,
    memory: impl Future<Output = Result<Box<dyn Lender>>> + Send + 'static,
) -> Result<Prepared<PlacedRollout>> {
    if context.config.wants.is_some() {
        let message = "wants: what a rollout lends says what it wants";
        let error = Error::new(ErrorKind::Config, "preparing", message);
        return Err(context.rank().into_iter().fold(error, Error::rank));
    }
    let metadata = metadata(backend, &context, Role::Rollout)?;
    Ok(Prepared::new(metadata, move |_| async move {
        PlacedRollout::new(&context, layout, memory.await?)
    }))
}

/// The error of a transport's plain rollouts if its option `placed` is set: such rollouts are prepared in another way.
pub fn says_nothing_of_what_it_wants() -> Error {
    let message = "a rollout of placed updates says what it wants: `lend`";
    Error::new(ErrorKind::Config, "preparing", message)
}

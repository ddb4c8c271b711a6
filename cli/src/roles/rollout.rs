//! What a rollout's process does: joins the trainer's group, or takes over what another rollout holds.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use checkpoint_engine::control::{Address, ControlConfig};
use checkpoint_engine::delta::DeltaConfig;
use checkpoint_engine::fp8::agreed_rules;
use checkpoint_engine::nixl::bare;
use checkpoint_engine::{
    CheckpointEngineConfig, ControlPlane, Error, ErrorKind, Holder, Newcomer, Rank, ReceiveReport,
    Registry, Result, Role, RolloutEngine, Version, WeightCache, form_group, registry,
};

use super::parent::Parent;
use super::{Announcement, Rollout};
use crate::device;
use crate::memory::PeakMemory;
use crate::source::Source;

/// What a rollout process was started with.
#[derive(Clone, Debug)]
pub struct RolloutOptions {
    /// Where the trainer is.
    pub control: ControlConfig,
    /// The rank to take; the trainer gives one without.
    pub rank: Option<Rank>,
    /// The number of ranks of the group, to be refused if the trainer has another one; the trainer's without it.
    pub world_size: Option<u32>,
    /// The engine's configuration.
    pub config: CheckpointEngineConfig,
    /// Whether to compare what is received with its source.
    pub verify: bool,
    /// The folder that the weights are written to.
    pub out: Option<PathBuf>,
    /// Memory for the weights, allocated on the device before the group forms.
    pub reserve: Option<u64>,
    /// Whether to offer memory for bare transfers of NIXL, whose attribute is [`BARE`].
    pub bare: bool,
    /// Where to give the last version, which is kept in memory for that, to rollouts that join later.
    pub hold: Option<Address>,
    /// Whether the trainer's process has started this one.
    pub is_child: bool,
}

/// The attribute of a rollout that says how to reach its memory for bare transfers.
pub const BARE: &str = "bare";

/// A rollout process: joins the trainer's group and receives its updates, to the last one. Whether it received that; if
/// not, the trainer's process says why.
///
/// # Errors
///
/// Those of the group; an update that failed is reported to `each` and the next one waited for.
pub async fn rollout(
    options: RolloutOptions,
    mut each: impl FnMut(&Result<ReceiveReport>) -> Result<()>,
) -> Result<bool> {
    let parent = Parent::new(options.is_child);
    let registry: Registry = registry();
    let memory = PeakMemory::start()?;
    let at = options.control;
    let control = ControlPlane::join(at.clone(), Role::Rollout, options.rank).await?;
    let device = device::of_rank(&options.config.device, control.rank().0)?;
    let mut config = options.config;
    // As inference engines have it, before the first update. With deltas, the copy on the device has all tensors, and is read in place.
    let reserve = options.reserve.unwrap_or(0);
    let deltas = DeltaConfig::of(&config)?;
    let destination = match deltas.delta && !deltas.delta_on_host {
        true => None,
        false => device::destination(&device, reserve)?.map(|to| Arc::new(Mutex::new(to))),
    };
    config.device = device.clone();
    let target = match options.bare {
        true => Some(bare::Target::new(&config, registry.memory(&device)).await?),
        false => None,
    };
    let mut own = serde_json::json!({});
    if let Some(target) = &target {
        own[BARE] = target.card();
    }
    let (mut cache, mut holding, mut own_address) = (None, None, None);
    if let Some(address) = options.hold {
        let kept = WeightCache::default();
        cache = Some(kept.clone());
        let mut at = at.clone();
        at.address = address;
        let backend = registry.get(&config.backend)?.clone();
        let holder = Holder::listen(kept, backend, config.clone(), at).await?;
        own[Holder::ATTRIBUTE] = holder.address().to_string().into();
        own_address = Some(holder.address().clone());
        holding = Some(OnDrop(tokio::spawn(holder.run())));
    }
    let group = form_group(&registry, config.clone(), &control).attributes(own);
    let (mut engine, place) = group.world_size(options.world_size).rollout().await?;
    let workers = &*place.peers;
    let announced = place.peer(Rank::LEADER)?.attributes.clone();
    let announced: Option<Announcement> = serde_json::from_value(announced).ok();
    let source = match (options.verify, &announced) {
        (false, _) => None,
        (true, Some(announcement)) => {
            let source = Source::open(announcement.source.clone())?;
            Some(Arc::new(match agreed_rules(workers, control.rank())? {
                Some(rules) => source.quantized_by(&rules)?,
                None => source,
            }))
        }
        (true, None) => {
            let message = "the trainer does not say where its weights come from: nothing to \
                           compare them with";
            return Err(Error::new(ErrorKind::Mismatch, "verifying weights", message));
        }
    };
    let attests = announced.as_ref().is_some_and(|announcement| announcement.attests);
    let last = announced.map(|announcement| Version(announcement.source.updates));
    // A version comes once more to be attested.
    let mut last_comes = if attests { 2 } else { 1 };
    let rollout = Rollout { source, out: options.out, memory: Some(memory), destination, cache };
    // Without waiting for the next update, if another rollout holds a version.
    let others =
        Newcomer::holders(workers).into_iter().filter(|at| Some(at) != own_address.as_ref());
    match take_over(&rollout, &mut *engine, &registry, &config, &at, others).await {
        Ok(Some(report)) => each(&Ok(report))?,
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "no other rollout gave the current version"),
    }
    let idle = Instant::now();
    loop {
        let result = match rollout.update(&mut *engine).await {
            Ok(None) => {
                tracing::debug!(seconds = idle.elapsed().as_secs(), "no update yet");
                continue;
            }
            Ok(Some(report)) => Ok(report),
            // Without a trainer there is no next update: this is the error of the command.
            Err(error) if error.says_trainer_is_gone() => {
                return if parent.is_there().await { Ok(false) } else { Err(error) };
            }
            Err(error) => Err(error),
        };
        if !result.as_ref().is_err_and(|error| parent.tells(error)) {
            each(&result)?;
        }
        match result {
            Ok(report) if Some(report.version) == last => {
                last_comes -= 1;
                if last_comes == 0 {
                    break;
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "waiting for the next update"),
        }
    }
    drop(holding);
    engine.finalize().await?;
    control.close().await?;
    Ok(true)
}

/// Gets the version that another rollout holds, if one does.
async fn take_over(
    rollout: &Rollout,
    engine: &mut dyn RolloutEngine,
    registry: &Registry,
    config: &CheckpointEngineConfig,
    at: &ControlConfig,
    holders: impl Iterator<Item = Address>,
) -> Result<Option<ReceiveReport>> {
    let mut result = Ok(None);
    for address in holders {
        let mut at = at.clone();
        at.address = address;
        let taken = async {
            let backend = registry.get(&config.backend)?;
            let Some(mut newcomer) = Newcomer::join(backend, config.clone(), at).await? else {
                return Ok(None);
            };
            let report = rollout.take(engine.adopt(newcomer.receive().await?)).await?;
            newcomer.leave().await?;
            Ok(Some(report))
        };
        match taken.await {
            Ok(Some(report)) => return Ok(Some(report)),
            Ok(None) => {}
            Err(error) => result = Err(error),
        }
    }
    result
}

/// A task that ends with its handle.
struct OnDrop(tokio::task::JoinHandle<Result<()>>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

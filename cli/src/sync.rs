//! One trainer and several rollouts on this machine, and the updates between them.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use checkpoint_engine::fp8::agreed_rules;
use checkpoint_engine::{
    CheckpointEngineConfig, DeviceChoice, EngineContext, Error, ErrorKind, Parts, Rank,
    ReceiverReport, Result, RolloutEngine, SendReport, Version, form_local_group, registry,
};
use engine_core::available_memory;
use futures::future::{Either, join_all, select};

use crate::device;
use crate::memory::{PeakMemory, memcpy_gb_per_s};
use crate::placed::Placing;
use crate::processes::Processes;
use crate::progress::Bar;
use crate::report_line::{UpdateLine, line};
use crate::roles::{Rollout, Trainer};
use crate::source::{Source, SourceSpec};

/// Whether a backend's rollouts are servers that run already.
pub fn sends_only(backend: &str) -> bool {
    ["vllm", "sglang"].contains(&backend)
}

/// What to run.
#[derive(Clone, Debug)]
pub struct SyncOptions {
    /// The model.
    pub source: SourceSpec,
    /// The engine's configuration; its backend says whether rollouts are processes.
    pub config: CheckpointEngineConfig,
    /// How many trainers; all of them have the model.
    pub trainers: u32,
    /// Whether the weights stay the same from one update to the next.
    pub still: bool,
    /// How many rollouts.
    pub rollouts: u32,
    /// The devices of ranks that have another one than the configuration says.
    pub devices: BTreeMap<u32, DeviceChoice>,
    /// Whether rollouts compare what they receive with the source.
    pub verify: bool,
    /// The folder that gets one folder per rollout with its weights.
    pub out: Option<PathBuf>,
    /// Where the trainer serves its metrics; rollout n does so n ports higher.
    pub metrics: Option<SocketAddr>,
    /// Who has which part of the model, where trainers write into rollouts' tensors.
    pub placing: Option<Placing>,
    /// Whether each version is attested when all rollouts have it.
    pub attests: bool,
    /// Whether rollouts offer memory for bare transfers of NIXL.
    pub bare: bool,
}

impl SyncOptions {
    pub(crate) fn device_of(&self, rank: u32) -> Result<DeviceChoice> {
        device::of_rank(self.devices.get(&rank).unwrap_or(&self.config.device), rank)
    }
}

/// Runs all updates; `each` is called after every one, and ends them with an error of its own.
///
/// # Cancel safety
///
/// Dropping the future aborts the update and ends the rollout processes.
///
/// # Errors
///
/// The first failure. The rollouts have ended when this returns.
pub async fn run(options: &SyncOptions, each: impl FnMut(&UpdateLine) -> Result<()>) -> Result<()> {
    let device = options.device_of(0)?;
    let mut source = Source::open(options.source.clone())?.on_device(&device);
    // "Training" to the first version is none of the update's time, nor is its memory.
    source.advance(Version(1))?;
    let bucket_bytes = options.config.bucket_bytes().unwrap_or(16 << 20);
    let memcpy = measure_memcpy(&mut source, bucket_bytes)?;
    let bar = Arc::new(Bar::new(source.byte_len()));
    let mut lines = Lines { options, memcpy, memory: PeakMemory::start()?, bar, each };
    let result = match &*options.config.backend {
        "naive" => in_one_process(options, source, &mut lines).await,
        backend if sends_only(backend) => to_servers(options, source, &mut lines).await,
        _ => with_processes(options, source, &mut lines).await,
    };
    lines.bar.clear();
    result
}

/// What is said after each update.
struct Lines<'a, F> {
    options: &'a SyncOptions,
    /// What one thread's copy reached, in GB/s.
    memcpy: f64,
    memory: Arc<PeakMemory>,
    bar: Arc<Bar>,
    each: F,
}

impl<F: FnMut(&UpdateLine) -> Result<()>> Lines<'_, F> {
    /// Says how an update went, and how long its version took to be attested.
    ///
    /// # Errors
    ///
    /// `Digest` if all was to be verified and a rollout did not compare every byte; those of `each`.
    fn say(
        &mut self,
        report: &SendReport,
        attested: Option<&SendReport>,
        source: &Source,
    ) -> Result<()> {
        let peak = self.memory.extra_peak_bytes();
        let backend = &self.options.config.backend;
        let parts = Parts::of(&self.options.config)?;
        let mut line = line(report, source, &parts, backend, Some(self.memcpy), peak);
        line.attested_in(attested);
        if self.options.placing.is_some() {
            // What a rollout lends is not what a trainer has: it says whether it compared all of that.
            let compared = |receiver: &ReceiverReport| {
                receiver.notes["inspected"].as_u64().is_some_and(|boxes| boxes > 0)
            };
            line.verified = !report.receivers.is_empty() && report.receivers.iter().all(compared);
        }
        check(&line, self.options.verify)?;
        self.bar.clear();
        (self.each)(&line)
    }
}

/// What one thread copies into shared memory, measured with up to 1 GiB of the model itself, and no more
/// than an eighth of the memory that is to be had: weights that are made as they are sent take some.
fn measure_memcpy(source: &mut Source, bucket_bytes: u64) -> Result<f64> {
    let enough = available_memory().map_or(1 << 30, |available| (available / 8).min(1 << 30));
    let mut parts = Vec::new();
    let mut left = enough;
    for weight in source.weights(Version(1))? {
        let weight = weight?;
        let part = match weight.contiguous_bytes() {
            Some(_) => weight.to_bytes()?,
            None => {
                // Whole granules; a tensor of which not one fits is passed over.
                let granule = weight.granule().max(1);
                let len = weight.byte_len().min(left / granule * granule);
                let mut part = vec![0; len as usize];
                weight.encode(0..len, &mut part)?;
                part.into()
            }
        };
        left = left.saturating_sub(part.len() as u64);
        parts.push(part);
        if left == 0 {
            break;
        }
    }
    let parts: Vec<&[u8]> = parts.iter().map(|part| &part[..]).collect();
    memcpy_gb_per_s(&parts, bucket_bytes, 3)
}

async fn in_one_process(
    options: &SyncOptions,
    source: Source,
    lines: &mut Lines<'_, impl FnMut(&UpdateLine) -> Result<()>>,
) -> Result<()> {
    let registry = registry();
    let context = |rank| EngineContext::new(options.config.clone()).with_rank(Rank(rank));
    let leads = registry.prepare_trainer(context(0).with_observer(lines.bar.clone())).await?;
    let mut workers = vec![leads.metadata().clone()];
    let mut receive = Vec::new();
    for rank in 1..=options.rollouts {
        let prepared = registry.prepare_rollout(context(rank)).await?;
        workers.push(prepared.metadata().clone());
        receive.push(prepared);
    }
    let backend = registry.get(&options.config.backend)?;
    let (mut trainers, engines) = form_local_group(backend, vec![leads], receive).await?;
    let engine = trainers.remove(0);
    let checked = match options.verify {
        false => None,
        true => {
            let source = Source::open(options.source.clone())?;
            // All rollouts have the same configuration.
            Some(Arc::new(match agreed_rules(&workers, Rank(1))? {
                Some(rules) => source.quantized_by(&rules)?,
                None => source,
            }))
        }
    };
    let mut trainer = Trainer { engine, source, shard: None, attests: options.attests };
    let mut rollouts: Vec<(Rollout, Box<dyn RolloutEngine>)> = (0..)
        .zip(engines)
        .map(|(index, engine)| {
            let out = options.out.as_ref().map(|out| out.join(format!("rollout-{index}")));
            let source = checked.clone();
            (Rollout { source, out, memory: None, destination: None, cache: None }, engine)
        })
        .collect();
    for version in (1..=options.source.updates).map(Version) {
        let report = with_all(trainer.update(version), &mut rollouts).await?;
        let attested = match options.attests {
            true => with_all(trainer.attest(), &mut rollouts).await,
            false => Ok(None),
        };
        said(lines, &report, attested, &trainer.source)?;
    }
    trainer.engine.finalize().await
}

/// Runs what a trainer does with all rollouts, beside what these do. If the trainer fails, they may wait for an update that never comes.
async fn with_all<T>(
    trainer: impl Future<Output = Result<T>>,
    rollouts: &mut [(Rollout, Box<dyn RolloutEngine>)],
) -> Result<T> {
    let receive = rollouts.iter_mut().map(|(rollout, engine)| rollout.update(&mut **engine));
    let (sent, received) = match select(pin!(trainer), join_all(receive)).await {
        Either::Left((sent, receiving)) => (sent?, receiving.await),
        Either::Right((received, sending)) => (sending.await?, received),
    };
    received.into_iter().try_for_each(|received| received.map(drop))?;
    Ok(sent)
}

/// Says how an update went, also if its version could then not be attested.
fn said(
    lines: &mut Lines<'_, impl FnMut(&UpdateLine) -> Result<()>>,
    report: &SendReport,
    attested: Result<Option<SendReport>>,
    source: &Source,
) -> Result<()> {
    let proof = attested.as_ref().ok().and_then(Option::as_ref);
    lines.say(report, proof, source)?;
    attested?.iter().try_for_each(all_present)
}

async fn to_servers(
    options: &SyncOptions,
    source: Source,
    lines: &mut Lines<'_, impl FnMut(&UpdateLine) -> Result<()>>,
) -> Result<()> {
    let registry = registry();
    let mut config = options.config.clone();
    config.device = options.device_of(0)?;
    let context =
        EngineContext::new(config).with_rank(Rank::LEADER).with_observer(lines.bar.clone());
    let prepared = registry.prepare_trainer(context).await?;
    let backend = registry.get(&options.config.backend)?;
    let (mut trainers, _) = form_local_group(backend, vec![prepared], Vec::new()).await?;
    let engine = trainers.remove(0);
    let mut trainer = Trainer { engine, source, shard: None, attests: options.attests };
    let result = send_all(options, &mut trainer, lines).await;
    let ended = trainer.engine.finalize().await;
    // The first failure is the cause of those that follow.
    result.and(ended)
}

/// Sends all versions, each to all rollouts.
async fn send_all(
    options: &SyncOptions,
    trainer: &mut Trainer,
    lines: &mut Lines<'_, impl FnMut(&UpdateLine) -> Result<()>>,
) -> Result<()> {
    for version in (1..=options.source.updates).map(Version) {
        let report = trainer.update(version).await?;
        all_present(&report)?;
        let attested = trainer.attest().await;
        said(lines, &report, attested, &trainer.source)?;
    }
    Ok(())
}

async fn with_processes(
    options: &SyncOptions,
    source: Source,
    lines: &mut Lines<'_, impl FnMut(&UpdateLine) -> Result<()>>,
) -> Result<()> {
    let mut group = Processes::start(options, lines.bar.clone()).await?;
    let updates = async {
        let engine = group.form(options).await?;
        let placing = options.placing.as_ref();
        let shard = placing.map(|placing| placing.shard(&source, Rank::LEADER)).transpose()?;
        let mut trainer = Trainer { engine, source, shard, attests: options.attests };
        send_all(options, &mut trainer, lines).await?;
        trainer.engine.finalize().await
    };
    let result = updates.await;
    // After the last update rollouts may still be writing what they received.
    let grace = Duration::from_secs(if result.is_ok() { 300 } else { 1 });
    let stopped = group.stop(grace).await;
    // The first failure is the cause of those that follow.
    result?;
    stopped
}

/// An engine goes on with the rollouts that are left; a `sync` was asked for all of them.
fn all_present(report: &SendReport) -> Result<()> {
    let Some(&rank) = report.absent.first() else { return Ok(()) };
    let receiver = report.receivers.iter().find(|receiver| receiver.rank == rank);
    let said = receiver.and_then(|receiver| receiver.notes["error"].as_str());
    let message = said.unwrap_or("the rank's process ended between two updates");
    Err(Error::new(ErrorKind::PeerLost, "updating the rollouts", message)
        .rank(rank)
        .version(report.version))
}

/// Whether an update did what was asked for.
fn check(line: &UpdateLine, verify: bool) -> Result<()> {
    if verify && !line.verified {
        let message = "a rollout did not compare every byte with the source";
        return Err(
            Error::new(ErrorKind::Digest, "verifying an update", message).version(line.version)
        );
    }
    Ok(())
}

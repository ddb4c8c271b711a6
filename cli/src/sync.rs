//! One trainer and several rollouts on this machine, and the updates between them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use checkpoint_engine::control::{Address, ControlConfig, Token};
use checkpoint_engine::fp8::agreed_rules;
use checkpoint_engine::nixl::bare;
use checkpoint_engine::observe::Observer;
use checkpoint_engine::{
    CheckpointEngine, CheckpointEngineConfig, ControlPlane, DeviceChoice, EngineContext, Error,
    ErrorKind, Holder, Newcomer, Rank, ReceiveReport, Registry, Result, Role, SendReport, Version,
    VersionState, WeightCache, WorkerMetadata, ensure_async_iterator, form_group, form_local_group,
    registry,
};
use engine_core::available_memory;
use futures::future::{join, join_all, select_all};
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::device;
use crate::memory::{PeakMemory, memcpy_gb_per_s};
use crate::progress::Bar;
use crate::roles::{Announcement, Rollout, RolloutNotes};
use crate::source::{Source, SourceSpec};

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
    /// Whether rollouts offer memory for bare transfers of NIXL.
    pub bare: bool,
}

impl SyncOptions {
    fn device_of(&self, rank: u32) -> Result<DeviceChoice> {
        device::of_rank(self.devices.get(&rank).unwrap_or(&self.config.device), rank)
    }
}

/// One update, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct UpdateLine {
    /// The update's version.
    pub version: Version,
    /// The transport.
    pub backend: String,
    /// Whether the transport's devices are simulated: then no figure says anything of hardware.
    pub simulated: bool,
    /// Tensors sent, scales of quantised ones not counted.
    pub tensors: u64,
    /// Bytes read from the trainer's memory.
    pub source_bytes: u64,
    /// Bytes of weights that travelled.
    pub wire_bytes: u64,
    /// Tensors that were quantised.
    pub quantized: u64,
    /// Tensors left alone although quantisation is on.
    pub kept: u64,
    /// Tensors that were quantised already.
    pub passed_through: u64,
    /// From the beginning to the last confirmation.
    pub seconds: f64,
    /// Source bytes per second.
    pub gb_per_s: f64,
    /// What one thread's copy of the same bytes into shared memory reached, in the same run.
    pub memcpy_gb_per_s: f64,
    /// The most memory that the trainer took beyond what it had before it prepared.
    pub extra_peak_bytes: u64,
    /// Whether every rollout compared every byte with the source.
    pub verified: bool,
    /// Whether names and shapes equalled the last update's, so that no metadata travelled.
    pub plan_reused: bool,
    /// The rollouts.
    pub rollouts: Vec<RolloutLine>,
}

/// A rollout's end of an update.
#[derive(Clone, Debug, Serialize)]
pub struct RolloutLine {
    /// Its rank.
    pub rank: u32,
    /// From the announcement to its confirmation, by its own clock.
    pub seconds: f64,
    /// The version's state there.
    pub state: VersionState,
    /// The digest of the whole version, in hexadecimal.
    pub digest: Option<String>,
    /// The most memory that it took beyond what it had before it prepared.
    pub extra_peak_bytes: u64,
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
pub async fn run(
    options: &SyncOptions,
    mut each: impl FnMut(&UpdateLine) -> Result<()>,
) -> Result<()> {
    let device = options.device_of(0)?;
    let mut source = Source::open(options.source.clone())?.on_device(&device);
    // "Training" to the first version is none of the update's time, nor is its memory.
    source.advance(Version(1))?;
    let bucket_bytes = options.config.bucket_bytes().unwrap_or(16 << 20);
    let memcpy = measure_memcpy(&mut source, bucket_bytes)?;
    let memory = PeakMemory::start()?;
    let bar = Arc::new(Bar::new(source.byte_len()));
    let result = if options.config.backend == "naive" {
        in_one_process(options, source, memcpy, &memory, &bar, &mut each).await
    } else {
        with_processes(options, source, memcpy, &memory, &bar, &mut each).await
    };
    bar.clear();
    result
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

/// A trainer that leads its group: what `sync` and `trainer` have in common.
#[derive(Debug)]
pub struct Trainer {
    /// Its engine, in a group.
    pub engine: Box<dyn CheckpointEngine>,
    /// Where the weights come from.
    pub source: Source,
}

/// How long the trainer waits for those who still read the weights of the version before.
const IN_USE: Duration = Duration::from_secs(30);

impl Trainer {
    /// Runs one update.
    ///
    /// # Errors
    ///
    /// Why it failed.
    pub async fn update(&mut self, version: Version) -> Result<SendReport> {
        let until = Instant::now() + IN_USE;
        loop {
            match self.source.advance(version) {
                // Rollouts let go of an update that failed a little later than the trainer.
                Err(error) if error.kind() == ErrorKind::State && Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                advanced => break advanced?,
            }
        }
        let weights = ensure_async_iterator(self.source.weights(version)?);
        self.engine.send_weights(weights, version).await
    }
}

/// An update's line from its report.
///
/// `tensors` are those of the source: a rollout that verified saw every one of them.
pub fn line(
    report: &SendReport,
    tensors: usize,
    backend: &str,
    memcpy: f64,
    extra: u64,
) -> UpdateLine {
    let counts = &report.counts;
    let notes: Vec<RolloutNotes> = report
        .receivers
        .iter()
        .map(|receiver| serde_json::from_value(receiver.notes.clone()).unwrap_or_default())
        .collect();
    let verified = !notes.is_empty()
        && notes.iter().all(|notes| {
            notes.verified_bytes == counts.source_bytes && notes.verified_tensors == tensors as u64
        });
    let rollouts = report.receivers.iter().zip(&notes).map(|(receiver, notes)| RolloutLine {
        rank: receiver.rank.0,
        seconds: receiver.seconds,
        state: receiver.state,
        digest: receiver.digest.map(|digest| format!("{digest:016x}")),
        extra_peak_bytes: notes.extra_peak_bytes,
    });
    UpdateLine {
        version: report.version,
        backend: backend.to_owned(),
        simulated: device::is_simulated(backend),
        tensors: counts.tensors,
        source_bytes: counts.source_bytes,
        wire_bytes: counts.wire_bytes,
        quantized: counts.quantized,
        kept: counts.kept,
        passed_through: counts.passed_through,
        seconds: report.elapsed.as_secs_f64(),
        gb_per_s: report.gb_per_s(),
        memcpy_gb_per_s: memcpy,
        extra_peak_bytes: extra,
        verified,
        plan_reused: report.plan_reused,
        rollouts: rollouts.collect(),
    }
}

async fn in_one_process(
    options: &SyncOptions,
    source: Source,
    memcpy: f64,
    memory: &PeakMemory,
    bar: &Arc<Bar>,
    each: &mut impl FnMut(&UpdateLine) -> Result<()>,
) -> Result<()> {
    let registry = registry();
    let mut engines = Vec::new();
    for rank in 0..=options.rollouts {
        let role = if rank == 0 { Role::Trainer } else { Role::Rollout };
        let context = EngineContext::new(options.config.clone(), role).with_rank(Rank(rank));
        let context = if rank == 0 { context.with_observer(bar.clone()) } else { context };
        engines.push(registry.create(context)?);
    }
    let mut all: Vec<_> = engines.iter_mut().map(|engine| &mut **engine as _).collect();
    let workers = form_local_group(&mut all, registry.get(&options.config.backend)?).await?;
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
    let mut engines = engines.into_iter();
    let Some(engine) = engines.next() else { return Ok(()) };
    let mut trainer = Trainer { engine, source };
    let mut rollouts: Vec<(Rollout, Box<dyn CheckpointEngine>)> = (0..)
        .zip(engines)
        .map(|(index, engine)| {
            let out = options.out.as_ref().map(|out| out.join(format!("rollout-{index}")));
            let source = checked.clone();
            (Rollout { source, out, memory: None, destination: None, cache: None }, engine)
        })
        .collect();
    for version in (1..=options.source.updates).map(Version) {
        let receive =
            join_all(rollouts.iter_mut().map(|(rollout, engine)| rollout.update(&mut **engine)));
        let (sent, received) = join(trainer.update(version), receive).await;
        let report = sent?;
        for result in received {
            result?;
        }
        let line = line(
            &report,
            trainer.source.tensors(),
            &options.config.backend,
            memcpy,
            memory.extra_peak_bytes(),
        );
        check(&line, options.verify)?;
        bar.clear();
        each(&line)?;
    }
    trainer.engine.finalize().await
}

async fn with_processes(
    options: &SyncOptions,
    source: Source,
    memcpy: f64,
    memory: &PeakMemory,
    bar: &Arc<Bar>,
    each: &mut impl FnMut(&UpdateLine) -> Result<()>,
) -> Result<()> {
    let mut group = Processes::start(options, bar.clone()).await?;
    let updates = async {
        let engine = group.form(&options.source).await?;
        let mut trainer = Trainer { engine, source };
        for version in (1..=options.source.updates).map(Version) {
            let report = trainer.update(version).await?;
            all_present(&report)?;
            let line = line(
                &report,
                trainer.source.tensors(),
                &options.config.backend,
                memcpy,
                memory.extra_peak_bytes(),
            );
            check(&line, options.verify)?;
            bar.clear();
            each(&line)?;
        }
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

/// The leading trainer's control plane, and the other ranks, which run as processes of this machine.
///
/// Dropping it ends the processes.
#[derive(Debug)]
pub(crate) struct Processes {
    registry: Registry,
    /// What each rank said of itself, once the group has formed.
    pub(crate) workers: Arc<[WorkerMetadata]>,
    config: CheckpointEngineConfig,
    observer: Arc<dyn Observer>,
    control: ControlPlane,
    children: Vec<Child>,
}

impl Processes {
    /// Starts the other ranks.
    pub(crate) async fn start(options: &SyncOptions, observer: Arc<dyn Observer>) -> Result<Self> {
        let token = Token::generate()?;
        let address = rendezvous()?;
        let control =
            ControlPlane::lead(ControlConfig::new(address.clone(), token.clone())).await?;
        let mut children = Vec::new();
        for rank in 1..options.trainers + options.rollouts {
            children.push(start_child(options, rank, &address, &token).await?);
        }
        let device = options.device_of(0)?;
        let config = CheckpointEngineConfig { device, ..options.config.clone() };
        let workers = Arc::default();
        Ok(Self { registry: registry(), workers, config, observer, control, children })
    }

    /// Joins the leading trainer's engine with the others; an error if one of them ends meanwhile.
    pub(crate) async fn form(&mut self, source: &SourceSpec) -> Result<Box<dyn CheckpointEngine>> {
        let context = EngineContext::new(self.config.clone(), Role::Trainer)
            .with_control(self.control.clone())
            .with_observer(self.observer.clone());
        let mut engine = self.registry.create(context)?;
        let announcement = serde_json::json!(Announcement { source: source.clone() });
        let world_size = self.children.len() as u32 + 1;
        let deadline = self.config.timeout();
        let backend = self.registry.get(&self.config.backend)?;
        let control = &self.control;
        let group = form_group(&mut *engine, backend, control, world_size, announcement, deadline);
        tokio::select! {
            formed = group => self.workers = formed?.peers,
            error = first_end(&mut self.children) => return Err(error),
        }
        Ok(engine)
    }

    /// Ends the group. The rollouts see that and end by themselves; those that do not within the
    /// grace are killed.
    pub(crate) async fn stop(mut self, grace: Duration) -> Result<()> {
        let closed = self.control.close().await;
        let statuses = join_all(self.children.iter_mut().map(|child| end(child, grace))).await;
        closed?;
        for (rank, status) in (1..).map(Rank).zip(statuses) {
            let status = status?;
            if !status.success() {
                let message = format!("the rank's process failed: {status}");
                return Err(Error::new(ErrorKind::Aborted, "ending the ranks", message).rank(rank));
            }
        }
        Ok(())
    }
}

/// An engine goes on with the rollouts that are left; a `sync` was asked for all of them.
fn all_present(report: &SendReport) -> Result<()> {
    match report.absent.first() {
        None => Ok(()),
        Some(&rank) => {
            let message = "the rank's process ended between two updates";
            Err(Error::new(ErrorKind::PeerLost, "updating the rollouts", message)
                .rank(rank)
                .version(report.version))
        }
    }
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

/// An address for this run, which leaves no file behind.
fn rendezvous() -> Result<Address> {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    format!("unix:@ckpt-engine-{}-{run}", std::process::id()).parse()
}

/// Starts this program as another trainer or as a rollout. The secret goes through its standard input, where no other
/// process can read it.
async fn start_child(
    options: &SyncOptions,
    rank: u32,
    address: &Address,
    token: &Token,
) -> Result<Child> {
    let failed = |error| Error::io("starting a rank", error).rank(Rank(rank));
    let program = std::env::current_exe().map_err(failed)?;
    let device = options.device_of(rank)?;
    let is_cpu = device.is_cpu();
    let config = CheckpointEngineConfig { device, ..options.config.clone() };
    let config =
        serde_json::to_string(&config).map_err(|error| failed(std::io::Error::other(error)))?;
    let rollout = rank.checked_sub(options.trainers);
    let mut command = Command::new(program);
    command
        .arg(if rollout.is_some() { "rollout" } else { "trainer" })
        .args(["--rendezvous", &address.to_string(), "--token-stdin"])
        .args(["--rank", &rank.to_string()])
        .args(["--world-size", &(options.trainers + options.rollouts).to_string()])
        .args(["--config-json", &config]);
    if rollout.is_none() {
        command.arg("--source-json").arg(
            serde_json::to_string(&options.source)
                .map_err(|error| failed(std::io::Error::other(error)))?,
        );
        if options.still {
            command.arg("--still");
        }
    } else if !is_cpu {
        command.args(["--reserve", &reserve(&options.source)?.to_string()]);
    }
    if let Some(mut address) = options.metrics {
        if address.port() != 0 {
            let port = u16::try_from(rank).ok().and_then(|rank| address.port().checked_add(rank));
            let message = format!("there is no port {rank} above {}", address.port());
            let missing = Error::new(ErrorKind::Config, "serving metrics", message);
            address.set_port(port.ok_or(missing)?);
        }
        command.args(["--metrics", &address.to_string()]);
    }
    if let Some(rollout) = rollout {
        if options.bare {
            command.arg("--bare");
        }
        if options.verify {
            command.arg("--verify");
        }
        if let Some(out) = &options.out {
            command.arg("--out").arg(out.join(format!("rollout-{rollout}")));
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(token.expose()).await.map_err(failed)?;
    }
    Ok(child)
}

/// Memory for a model on a device: its tensors, and the gaps between them.
fn reserve(source: &SourceSpec) -> Result<u64> {
    let source = Source::open(source.clone())?;
    Ok(source.byte_len() + source.tensors() as u64 * 1024)
}

/// The error of the first process that ends, while none should.
async fn first_end(children: &mut [Child]) -> Error {
    let ends = children.iter_mut().zip(1..).map(|(child, rank)| {
        Box::pin(async move {
            let message = match child.wait().await {
                Ok(status) => format!("the rank's process ended: {status}"),
                Err(error) => format!("the rank's process cannot be watched: {error}"),
            };
            Error::new(ErrorKind::PeerLost, "forming the group", message).rank(Rank(rank))
        })
    });
    let ends: Vec<_> = ends.collect();
    if ends.is_empty() {
        return std::future::pending().await;
    }
    select_all(ends).await.0
}

/// Waits for a process to end by itself for a while, then kills it.
async fn end(child: &mut Child, grace: Duration) -> Result<std::process::ExitStatus> {
    let failed = |error| Error::io("ending a rollout", error);
    match tokio::time::timeout(grace, child.wait()).await {
        Ok(status) => status.map_err(failed),
        Err(_) => {
            child.kill().await.map_err(failed)?;
            child.wait().await.map_err(failed)
        }
    }
}

/// What a trainer process other than the leader was started with.
#[derive(Clone, Debug)]
pub struct CoTrainerOptions {
    /// Where the leader is.
    pub control: ControlConfig,
    /// The rank to take.
    pub rank: Rank,
    /// The number of ranks of the group.
    pub world_size: u32,
    /// The engine's configuration.
    pub config: CheckpointEngineConfig,
    /// The model, the same as the leader's.
    pub source: SourceSpec,
    /// Whether the weights stay the same from one update to the next.
    pub still: bool,
    /// Whether the leader's process has started this one.
    pub is_child: bool,
}

/// The leader's process, if it has started this one: it says once why updates failed, and before what follows from that.
#[derive(Clone, Copy, Debug)]
struct Parent(Option<u32>);

impl Parent {
    fn new(is_child: bool) -> Self {
        Self(is_child.then(std::os::unix::process::parent_id))
    }

    /// Whether it says what an update failed with, which all ranks hear. What happened here alone names no rank.
    fn tells(self, error: &Error) -> bool {
        self.0.is_some() && error.report().rank.is_some()
    }

    /// Whether it is there to say why it left the group.
    async fn is_there(self) -> bool {
        // The connection of a process that dies ends a moment before it has no children any more.
        tokio::time::sleep(Duration::from_millis(100)).await;
        self.0.is_some_and(|parent| std::os::unix::process::parent_id() == parent)
    }
}

/// A trainer process other than the leader: takes part in all of the leader's updates. Whether it took part in the last
/// one; if not, the leader's process says why.
///
/// # Errors
///
/// Those of the group; an update that failed is reported to `failed` and the next one waited for.
pub async fn co_trainer(options: CoTrainerOptions, mut failed: impl FnMut(&Error)) -> Result<bool> {
    let parent = Parent::new(options.is_child);
    let registry: Registry = registry();
    let deadline = options.config.timeout();
    let control = ControlPlane::join(options.control, Role::Trainer, Some(options.rank)).await?;
    let device = device::of_rank(&options.config.device, options.rank.0)?;
    let mut source = Source::open(options.source.clone())?.on_device(&device);
    source.advance(Version(1))?;
    let config = CheckpointEngineConfig { device, ..options.config };
    let backend = registry.get(&config.backend)?;
    let context = EngineContext::new(config, Role::Trainer).with_control(control.clone());
    let engine = registry.create(context)?;
    let mut trainer = Trainer { engine, source };
    let (engine, world_size) = (&mut *trainer.engine, options.world_size);
    let none = serde_json::Value::Null;
    form_group(engine, backend, &control, world_size, none, deadline).await?;
    for version in (1..=options.source.updates).map(Version) {
        let result = if options.still {
            let weights = ensure_async_iterator(trainer.source.weights(Version(1))?);
            trainer.engine.send_weights(weights, version).await
        } else {
            trainer.update(version).await
        };
        match result {
            Ok(_) => {}
            // Without a leader there is no next update.
            Err(error) if error.kind() == ErrorKind::PeerLost && is_trainer(&error) => {
                return if parent.is_there().await { Ok(false) } else { Err(error) };
            }
            Err(error) if parent.tells(&error) => {}
            Err(error) => failed(&error),
        }
    }
    trainer.engine.finalize().await?;
    control.close().await?;
    Ok(true)
}

/// What a rollout process was started with.
#[derive(Clone, Debug)]
pub struct RolloutOptions {
    /// Where the trainer is.
    pub control: ControlConfig,
    /// The rank to take; the trainer gives one without.
    pub rank: Option<Rank>,
    /// The number of ranks of the group; any number joins one that has formed already.
    pub world_size: u32,
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
    let deadline = options.config.timeout();
    let memory = PeakMemory::start()?;
    let at = options.control;
    let control = ControlPlane::join(at.clone(), Role::Rollout, options.rank).await?;
    let device = device::of_rank(&options.config.device, control.rank().0)?;
    // As inference engines have it, before the first update.
    let reserve = options.reserve.unwrap_or(0);
    let destination = device::destination(&device, reserve)?.map(|to| Arc::new(Mutex::new(to)));
    let config = CheckpointEngineConfig { device: device.clone(), ..options.config };
    let context = EngineContext::new(config.clone(), Role::Rollout).with_control(control.clone());
    let mut engine = registry.create(context)?;
    let world_size = options.world_size;
    let target = match options.bare {
        true => Some(bare::Target::new(&config).await?),
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
        let backend = registry.get(&config.backend)?;
        let holder = Holder::listen(kept, backend, config.clone(), at).await?;
        own[Holder::ATTRIBUTE] = holder.address().to_string().into();
        own_address = Some(holder.address().clone());
        holding = Some(OnDrop(tokio::spawn(holder.run())));
    }
    let backend = registry.get(&config.backend)?;
    let place = form_group(&mut *engine, backend, &control, world_size, own, deadline).await?;
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
    let last = announced.map(|announcement| Version(announcement.source.updates));
    let rollout = Rollout { source, out: options.out, memory: Some(memory), destination, cache };
    // Without waiting for the next update, if another rollout holds a version.
    let others =
        Newcomer::holders(workers).into_iter().filter(|at| Some(at) != own_address.as_ref());
    match take_over(&rollout, &registry, &config, &at, others).await {
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
            Err(error) if error.kind() == ErrorKind::PeerLost && is_trainer(&error) => {
                return if parent.is_there().await { Ok(false) } else { Err(error) };
            }
            Err(error) => Err(error),
        };
        if !result.as_ref().is_err_and(|error| parent.tells(error)) {
            each(&result)?;
        }
        match result {
            Ok(report) if Some(report.version) == last => break,
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
            let report = rollout.take(newcomer.receive().await?).await?;
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

fn is_trainer(error: &Error) -> bool {
    error.report().rank == Some(Rank::LEADER)
}

//! The processes of a measurement: rank 0, and the one of the rollouts.

use std::time::{Duration, Instant};

use bytes::Bytes;
use checkpoint_engine::backend::memory::Pool;
use checkpoint_engine::control::{Address, ControlConfig, Relay, Token};
use checkpoint_engine::{
    CheckpointEngineConfig, ControlPlane, DType, Rank, Registry, Result, Role, Version, Weight,
    ensure_async_iterator, form_group,
};
use engine_core::ProcessStat;
use futures::future::try_join_all;
use rustix::time::{ClockId, clock_gettime};
use tokio::process::Child;

use super::tiny::{NAME, Tiny};
use super::{Cost, ScaleLine, Setting, child, failed, read};

/// The size of a tensor, and the room that it takes in a bucket.
const TENSOR: (usize, u64) = (8, 256);
/// How long a rank may take for a step: many ranks share few cores.
const PATIENCE: Duration = Duration::from_secs(300);

/// The barrier at the end of forming.
const FORMED: &str = "formed";

fn config() -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new(NAME);
    config.timeout_seconds = PATIENCE.as_secs_f64();
    config.digests = false;
    config
}

fn control_config(address: Address, token: Token) -> ControlConfig {
    let mut config = ControlConfig::new(address, token);
    config.connect_timeout = PATIENCE;
    config.heartbeat_timeout = PATIENCE;
    config
}

/// The processor time of this process so far, in seconds.
fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The processor time of another process so far, in seconds, to 10 ms.
fn cpu_of(child: &Child) -> f64 {
    let ticks = child.id().and_then(ProcessStat::of).map_or(0, |process| process.ran);
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// A number of a process's status, in bytes.
fn status(pid: &str, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.split_ascii_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0_u64) << 10
}

/// What was spent so far, to be compared with later.
struct Meter<'a> {
    control: &'a ControlPlane,
    rollouts: &'a Child,
    begun: (Instant, f64, f64, u64, u64),
}

impl<'a> Meter<'a> {
    fn new(control: &'a ControlPlane, rollouts: &'a Child) -> Self {
        Self { control, rollouts, begun: Self::now(control, rollouts) }
    }

    fn now(control: &ControlPlane, rollouts: &Child) -> (Instant, f64, f64, u64, u64) {
        let traffic = control.traffic();
        let frames = traffic.frames_sent + traffic.frames_received;
        let bytes = traffic.bytes_sent + traffic.bytes_received;
        (Instant::now(), cpu(), cpu_of(rollouts), frames, bytes)
    }

    /// The cost since the last time, of one of so many equal parts.
    fn lap(&mut self, parts: u32) -> Cost {
        let now = Self::now(self.control, self.rollouts);
        let was = std::mem::replace(&mut self.begun, now);
        let parts = parts.max(1);
        Cost {
            seconds: now.0.duration_since(was.0).as_secs_f64() / f64::from(parts),
            cpu: (now.1 - was.1) / f64::from(parts),
            rollouts_cpu: (now.2 - was.2) / f64::from(parts),
            frames: (now.3 - was.3) / u64::from(parts),
            bytes: (now.4 - was.4) / u64::from(parts),
        }
    }
}

fn weights(tensors: u32) -> Result<Vec<Weight>> {
    let bytes = Bytes::from(vec![1_u8; TENSOR.0]);
    let weight = |index: u32| {
        let name = format!("model.layers.{}.mlp.experts.{}.weight", index / 128, index % 128);
        Weight::new(name, DType::U8, [TENSOR.0 as u64], bytes.clone())
    };
    (0..tensors).map(weight).collect()
}

/// Runs one setting as rank 0 of this process, whose only task it is.
///
/// # Cancel safety
///
/// Dropping the future ends the process of the rollouts.
///
/// # Errors
///
/// Why an update failed, or a process could not be started.
pub async fn lead(setting: Setting) -> Result<ScaleLine> {
    let weights = weights(setting.tensors)?;
    let in_a_bucket = setting.tensors.div_ceil(setting.buckets.max(1));
    let bucket_bytes = u64::from(in_a_bucket) * TENSOR.1;
    let pool = Pool::new(1)?;
    // What is there belongs to no engine; the peak begins here.
    std::fs::write("/proc/self/clear_refs", "5").map_err(failed)?;
    let before = status("self", "VmRSS:");
    let peak = || status("self", "VmHWM:").saturating_sub(before);
    let token = Token::generate()?;
    let control = ControlPlane::lead(control_config("127.0.0.1:0".parse()?, token.clone())).await?;
    let (address, count) = (control.address().to_string(), setting.rollouts.to_string());
    let behind = setting.behind.to_string();
    let rollouts = ["--members", &count, "--behind", &behind, "--at", &address];
    let mut rollouts = child(&rollouts, Some(&token)).await?;
    let mut meter = Meter::new(&control, &rollouts);
    let registry = Registry::new().with(Tiny { bucket_bytes, pool });
    let group = form_group(&registry, config(), &control).deadline(PATIENCE);
    let (mut engine, _) = group.world_size(setting.rollouts + 1).trainer().await?;
    // What they were told is there as well.
    control.barrier(FORMED, PATIENCE).await?;
    let forming = meter.lap(1);
    let forming_memory = peak();
    let mut first = Cost::default();
    for version in (1..=u64::from(setting.repeats) + 1).map(Version) {
        let stream = ensure_async_iterator(weights.iter().cloned());
        engine.send_weights(stream, version).await?;
        if version.0 == 1 {
            first = meter.lap(1);
        }
    }
    let steady = meter.lap(setting.repeats);
    let memory = peak();
    let pid = rollouts.id().map(|pid| pid.to_string()).unwrap_or_default();
    let rollout_memory = status(&pid, "VmHWM:") / u64::from(setting.rollouts.max(1));
    engine.finalize().await?;
    control.close().await?;
    // They end when the group does.
    read(rollouts.stdout.take()).await?;
    rollouts.wait().await.map_err(failed)?;
    Ok(ScaleLine { setting, forming, first, steady, forming_memory, memory, rollout_memory })
}

/// Runs so many rollouts as tasks of this process, until their trainer leaves; of each relay so many, or without relays
/// if that is 0.
///
/// # Errors
///
/// The first failure of any of them.
pub async fn members(count: u32, behind: u32, at: Address, token: Token) -> Result<()> {
    let pool = Pool::new(1)?;
    let registry = Registry::new().with(Tiny { bucket_bytes: TENSOR.1, pool });
    let registry = std::sync::Arc::new(registry);
    let relays = count.checked_div(behind).map_or(0, |_| count.div_ceil(behind));
    let listen: Address = "127.0.0.1:0".parse()?;
    let starting = (0..relays)
        .map(|_| Relay::start(control_config(at.clone(), token.clone()), listen.clone()));
    let relays = try_join_all(starting).await?;
    let member = |rank: u32| {
        let relay = (rank - 1).checked_div(behind).and_then(|at| relays.get(at as usize));
        let at = relay.map_or(&at, Relay::address);
        let (registry, config, at) =
            (registry.clone(), config(), control_config(at.clone(), token.clone()));
        async move {
            let control = ControlPlane::join(at, Role::Rollout, Some(Rank(rank))).await?;
            let group = form_group(&registry, config, &control).deadline(PATIENCE);
            let (mut engine, place) = group.rollout().await?;
            drop(place);
            control.barrier(FORMED, PATIENCE).await?;
            loop {
                let update = async { engine.receive_weights(None).await?.finish().await };
                match update.await {
                    Ok(_) => {}
                    Err(error) if error.says_trainer_is_gone() => break,
                    Err(error) => return Err(error),
                }
            }
            engine.finalize().await?;
            control.close().await
        }
    };
    let members = (1..=count).map(|rank| tokio::spawn(member(rank)));
    let panicked =
        |error: tokio::task::JoinError| super::failed(std::io::Error::other(error.to_string()));
    let ended = try_join_all(members).await.map_err(panicked)?;
    for relay in relays {
        relay.close().await?;
    }
    ended.into_iter().collect()
}

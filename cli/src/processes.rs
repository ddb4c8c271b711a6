//! The ranks that a command starts on this machine, each a process of this program.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use checkpoint_engine::control::{Address, ControlConfig, Token};
use checkpoint_engine::observe::Observer;
use checkpoint_engine::{
    CheckpointEngineConfig, ControlPlane, Error, ErrorKind, Rank, Registry, Result, TrainerEngine,
    WorkerMetadata, form_group, registry,
};
use futures::future::{join_all, select_all};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::placed::Placing;
use crate::roles::Announcement;
use crate::source::{Source, SourceSpec};
use crate::sync::SyncOptions;

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
        let mut config = options.config.clone();
        config.device = device;
        let config = match &options.placing {
            Some(placing) => placing.of_trainers(&config)?,
            None => config,
        };
        let workers = Arc::default();
        Ok(Self { registry: registry(), workers, config, observer, control, children })
    }

    /// Joins the leading trainer's engine with the others; an error if one of them ends meanwhile.
    pub(crate) async fn form(&mut self, options: &SyncOptions) -> Result<Box<dyn TrainerEngine>> {
        let (source, attests) = (options.source.clone(), options.attests);
        let announcement = serde_json::json!(Announcement { source, attests });
        let group = form_group(&self.registry, self.config.clone(), &self.control)
            .world_size(self.children.len() as u32 + 1)
            .attributes(announcement)
            .observer(self.observer.clone())
            .trainer();
        tokio::select! {
            formed = group => {
                let (engine, place) = formed?;
                self.workers = place.peers;
                Ok(engine)
            }
            error = first_end(&mut self.children) => Err(error),
        }
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
    let mut config = options.config.clone();
    config.device = device;
    if let Some(placing) = options.placing.as_ref().filter(|_| rank < options.trainers) {
        config = placing.of_trainers(&config)?;
    }
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
    if let Some(Placing { trainers, rollouts }) = &options.placing {
        command.args(["--placed", "--trainer-layout", &trainers.to_string()]);
        command.args(["--rollout-layout", &rollouts.to_string()]);
    }
    if rollout.is_none() || options.placing.is_some() {
        command.arg("--source-json").arg(
            serde_json::to_string(&options.source)
                .map_err(|error| failed(std::io::Error::other(error)))?,
        );
    }
    if options.still && (rollout.is_none() || options.placing.is_some()) {
        command.arg("--still");
    }
    if rollout.is_some() && !is_cpu {
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

//! `ckpt-engine sync`: a trainer and its rollouts on this machine.

use std::path::PathBuf;
use std::process::ExitCode;

use checkpoint_engine::DeviceChoice;
use clap::Args;
use cli::source::Source;
use cli::sync::{SyncOptions, sends_only};

use crate::Failure;
use crate::args::{EngineArgs, MetricsArgs, PlacingArgs, SourceArgs, rank_device};
use crate::commands::plan::as_planned;
use crate::commands::update_line::{print_update, say_source};

/// Starts one trainer and N rollout processes on this machine and updates the rollouts.
///
/// With the backend naive, all of them are tasks of one process. With vllm and sglang, the rollouts are servers that run
/// already.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  Two rollouts get a made-up model and compare every byte:
    ckpt-engine sync --synthetic qwen2.5-0.5b --rollouts 2 --verify

  A real model, written out by the rollout, compared:
    ckpt-engine sync --model model.safetensors --out received --verify
    ckpt-engine verify model.safetensors received/rollout-0

  Of which, after the first update, only one layer is sent:
    ckpt-engine sync --synthetic qwen2.5-0.5b --updates 3 --delta --only 'model.layers.23.*' --verify

  Two trainers that hold half of each tensor write into the tensors of two rollouts that want other halves:
    ckpt-engine sync --synthetic tiny-moe --placed --trainer-layout fsdp=2 --rollout-layout tp=2 --verify

  A real model for a server of vLLM that runs, on another GPU:
    ckpt-engine doctor --server http://127.0.0.1:8000
    ckpt-engine sync --backend vllm --server http://127.0.0.1:8000 --model PATH

  The same for one of SGLang:
    ckpt-engine sync --backend sglang --server http://127.0.0.1:30000 --model PATH")]
pub(crate) struct SyncArgs {
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) placing: PlacingArgs,
    /// An inference server that runs already, such as http://127.0.0.1:8000; may be given several times
    #[arg(long = "server", value_name = "URL", requires = "backend",
          conflicts_with_all = ["trainers", "rollouts", "rank_devices", "verify", "out"])]
    pub(crate) servers: Vec<String>,
    /// How many trainers, all of which have the model; transports with several senders use them
    #[arg(long, default_value_t = 1, conflicts_with = "placed", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) trainers: u32,
    /// How many rollouts
    #[arg(long, default_value_t = 1, conflicts_with = "placed", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) rollouts: u32,
    /// The device of one rank, where that is not what --device says; may be given several times. Ranks count
    /// trainers, then rollouts: of one trainer, rank 1 is the first rollout, and 1=npu:0 puts it on the
    /// trainer's NPU
    #[arg(long = "rank-device", value_name = "RANK=DEVICE", value_parser = rank_device)]
    pub(crate) rank_devices: Vec<(u32, DeviceChoice)>,
    /// Let every rollout compare every tensor with the source, bit for bit
    #[arg(long)]
    pub(crate) verify: bool,
    /// After each update, have all ranks compute the digest of the version that they have anew from memory, and
    /// compare. Needs --delta, with which ranks keep copies
    #[arg(long, conflicts_with = "placed")]
    pub(crate) attest: bool,
    /// Write what rollout n received to DIR/rollout-<n>/model.safetensors
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Print one JSON object a line per update
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) metrics: MetricsArgs,
}

pub(crate) async fn sync_command(args: &SyncArgs) -> Result<ExitCode, Failure> {
    let source = args.source.spec()?;
    let mut config = args.engine.config()?;
    if !args.servers.is_empty() {
        if !sends_only(&config.backend) {
            return Err(format!("--server: {} has rollouts of its own", config.backend).into());
        }
        let section = config.engine_kwargs.entry(config.backend.clone()).or_default();
        section.insert("servers".into(), args.servers.clone().into());
    } else if sends_only(&config.backend)
        && !config
            .engine_kwargs
            .get(&config.backend)
            .is_some_and(|section| section.contains_key("servers"))
    {
        let backend = &config.backend;
        return Err(
            format!("{backend} sends to servers that run already: give --server URL").into()
        );
    }
    let placing = args.placing.placing()?;
    if placing.is_some() && args.out.is_some() {
        return Err("--placed: rollouts have parts of tensors; leave out --out".into());
    }
    let (trainers, rollouts) = args.placing.ranks().unwrap_or((args.trainers, args.rollouts));
    let options = SyncOptions {
        config: as_planned(config, &source)?,
        source,
        trainers,
        still: false,
        rollouts,
        placing,
        devices: args.rank_devices.iter().cloned().collect(),
        verify: args.verify,
        out: args.out.clone(),
        metrics: args.metrics.metrics,
        attests: args.attest,
        bare: false,
    };
    if let Some(placing) = &options.placing {
        placing.of_trainers(&options.config)?;
    }
    if options.trainers > 1 && options.config.backend == "naive" {
        return Err("naive has one trainer".into());
    }
    let ranks = options.trainers + options.rollouts;
    if let Some((rank, _)) = options.devices.range(ranks..).next() {
        return Err(format!("--rank-device: there are {ranks} ranks, and no rank {rank}").into());
    }
    let _exporter = args.metrics.serve().await?;
    if !args.json {
        say_source(&Source::open(options.source.clone())?, &options.config.backend)?;
    }
    cli::sync::run(&options, |line| print_update(line, args.json)).await?;
    Ok(ExitCode::SUCCESS)
}

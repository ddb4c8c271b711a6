//! The `ckpt-engine` program: what its command line says, and exit codes.

// `println!` and `eprintln!` panic when nobody reads: `say` and `complain` do not.
#![deny(clippy::print_stdout, clippy::print_stderr, unsafe_code)]

mod commands {
    pub(crate) mod doctor;
    pub(crate) mod fp8;
}

use std::error::Error as StdError;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use checkpoint_engine::control::{Address, ControlConfig, Token, from_env};
use checkpoint_engine::fp8::rules::{QuantPlan, Receiver, parse_ignored_layers};
use checkpoint_engine::fp8::{Granularity, Mode, Quantization, stored};
use checkpoint_engine::{
    Availability, CheckpointEngineConfig, ConfigFormat, ControlPlane, DeviceChoice, EngineContext,
    Error, ErrorKind, Rank, ReceiveReport, Role, TensorMeta, Version, form_group, registry,
};
use clap::{Args, Parser, Subcommand};
use cli::bench::transfer::{TransferLine, TransferOptions, transfer};
use cli::checkpoint::{Checkpoint, end_unfinished, is_ending, verify};
use cli::exporter::Exporter;
use cli::memory::PeakMemory;
use cli::roles::Announcement;
use cli::runtime::Runtime;
use cli::source::{ModelSpec, Source, SourceSpec};
use cli::sync::{CoTrainerOptions, RolloutOptions, SyncOptions, Trainer, UpdateLine};
use cli::synthetic::SyntheticModel;
use cli::top;
use commands::fp8::{
    DequantizeArgs, PlanArgs, QuantBenchArgs, QuantizeArgs, dequantize_command, plan_command,
    quant_bench_command, quantize_command, warn_of,
};
use indicatif::{ProgressBar, ProgressStyle};

/// Moves a model's weights from a trainer to its inference engines, every training step.
#[derive(Debug, Parser)]
#[command(
    name = "ckpt-engine",
    version,
    after_help = "Exit codes: 0 all went well, 1 it failed or something differs, 2 wrong usage.\n\n\
                  Each command's --help has examples."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a trainer and rollouts on this machine, and update the rollouts
    Sync(SyncArgs),
    /// Be the trainer of a group whose rollouts are started elsewhere
    Trainer(TrainerArgs),
    /// Be a rollout of a trainer's group
    Rollout(RolloutArgs),
    /// Show what the ranks of running updates are doing
    Top(TopArgs),
    /// Say which backends can run on this machine, and what the others need
    Doctor(DoctorArgs),
    /// Compare two checkpoints tensor by tensor, bit for bit
    Verify(VerifyArgs),
    /// Write a checkpoint in FP8
    Quantize(QuantizeArgs),
    /// Write an FP8 checkpoint in a wider type again
    Dequantize(DequantizeArgs),
    /// Say which parameters of a model are quantised, and by which rule
    Plan(PlanArgs),
    /// Measure transports and codecs beside what the machine can do
    Bench(BenchArgs),
}

/// Compares two checkpoints tensor by tensor, bit for bit.
///
/// Prints one line for each tensor that differs and a summary. How the tensors are ordered and
/// divided into shards makes no difference.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  Is what a rollout received the model that the trainer sent?
    ckpt-engine verify Qwen2.5-0.5B-Instruct out/rollout-0

  Two files:
    ckpt-engine verify a.safetensors b.safetensors && echo the same")]
struct VerifyArgs {
    /// A .safetensors file, a Hugging Face folder, or the index of one
    a: PathBuf,
    /// The one to compare it with
    b: PathBuf,
}

/// The model, and how often it is updated.
#[derive(Debug, Args)]
struct SourceArgs {
    /// The source as JSON, as `sync` gives it to other trainers
    #[arg(long, value_name = "JSON", hide = true, conflicts_with_all = ["synthetic", "model"])]
    source_json: Option<String>,
    /// A made-up model with the true names and shapes of qwen2.5-0.5b, qwen2.5-7b, qwen3-30b-a3b, or
    /// a tiny-moe of a few MB
    #[arg(long, value_name = "NAME", required_unless_present_any = ["model", "source_json"], conflicts_with = "model")]
    synthetic: Option<SyntheticModel>,
    /// A .safetensors file, a Hugging Face folder, or the index of one
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Take only the first LAYERS layers of a synthetic model
    #[arg(long, conflicts_with = "model")]
    layers: Option<u32>,
    /// How many updates to run; the weights change between them, and the last one of a --model
    /// carries exactly its files' bytes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    updates: u64,
}

impl SourceArgs {
    fn spec(&self) -> Result<SourceSpec, Failure> {
        if let Some(text) = &self.source_json {
            return Ok(serde_json::from_str(text)?);
        }
        let model = match (self.synthetic, &self.model) {
            (Some(name), _) => ModelSpec::Synthetic { name, layers: self.layers },
            (None, Some(path)) => ModelSpec::Checkpoint { path: std::path::absolute(path)? },
            (None, None) => return Err("give --synthetic or --model".into()),
        };
        Ok(SourceSpec { model, updates: self.updates })
    }
}

/// What quantised weights look like, and which there are.
#[derive(Debug, Args)]
struct FormatArgs {
    /// How scales are computed: triton, pytorch or ue8m0 [default: triton]
    #[arg(long = "quant-mode", visible_alias = "mode", value_name = "M", value_parser = mode)]
    mode: Option<Mode>,
    /// Which elements share a scale: RxC, per-row or per-tensor [default: 128x128]
    #[arg(long = "quant-block", visible_alias = "block", value_name = "RxC")]
    block: Option<Granularity>,
    /// Layers to leave alone, comma-separated: whole dotted segments, or re: and a regular expression
    #[arg(long, value_name = "LIST")]
    ignored: Option<String>,
    /// Who has to load the weights: vllm, sglang, transformers, common (vllm and sglang) or any
    /// [default: common]
    #[arg(long, value_name = "NAME")]
    receiver: Option<Receiver>,
}

/// A mode by its name in configurations.
fn mode(text: &str) -> Result<Mode, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

impl FormatArgs {
    fn put_into(&self, section: &mut Quantization) {
        section.mode = self.mode.or(section.mode);
        section.granularity = self.block.or(section.granularity);
        section.receiver = self.receiver.or(section.receiver);
        section.ignored_layers.extend(parse_ignored_layers(self.ignored.as_deref().unwrap_or("")));
    }
}

/// The engine.
#[derive(Debug, Args)]
struct EngineArgs {
    /// The transport: naive (one process), ipc (processes of one host), nccl (GPUs) or nixl (any
    /// hosts); see `doctor`
    #[arg(long)]
    backend: Option<String>,
    /// The size of a bucket in MiB; there are two
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u32).range(1..))]
    bucket_mb: Option<u32>,
    /// The deadline of every wait, in seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
    /// Threads that pack and check buckets; without it all cores on the trainer, half on a rollout
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Do not guard buckets with digests
    #[arg(long)]
    no_digests: bool,
    /// Where weights and buckets are: cpu, cuda or npu (one device for each rank), cuda:N or npu:N
    #[arg(long, value_name = "DEVICE", env = "CKPT_ENGINE_DEVICE")]
    device: Option<DeviceChoice>,
    /// The folder of libascendcl.so and libhccl.so, for the backend hccl: CANN's, or a simulator's
    #[arg(long, value_name = "PATH")]
    hccl_lib: Option<PathBuf>,
    /// Quantise to FP8 blocks on the trainer, so that half the bytes travel
    #[arg(long)]
    trainer_quantize_fp8: bool,
    /// Quantise on the rollouts what arrives there unquantised
    #[arg(long)]
    quantize_on_receive: bool,
    #[command(flatten)]
    format: FormatArgs,
    /// An option of the transport's own, as its engine_kwargs have it; may be given several times
    #[arg(long = "engine-kwarg", value_name = "KEY=VALUE", value_parser = engine_kwarg)]
    engine_kwargs: Vec<(String, serde_json::Value)>,
    /// A configuration file (TOML, JSON or YAML); the options above win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The whole configuration as JSON, as `sync` gives it to its rollouts
    #[arg(long, value_name = "JSON", hide = true, conflicts_with = "config")]
    config_json: Option<String>,
}

/// KEY=VALUE, where the value is JSON or else a text.
fn engine_kwarg(text: &str) -> Result<(String, serde_json::Value), String> {
    let (key, value) = text.split_once('=').ok_or("KEY=VALUE is wanted")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    Ok((key.to_owned(), value))
}

/// RANK=DEVICE.
fn rank_device(text: &str) -> Result<(u32, DeviceChoice), String> {
    let (rank, device) = text.split_once('=').ok_or("RANK=DEVICE is wanted")?;
    let rank = rank.parse().map_err(|error| format!("`{rank}` is no rank: {error}"))?;
    Ok((rank, device.parse::<DeviceChoice>().map_err(|error| error.to_string())?))
}

impl EngineArgs {
    fn config(&self) -> Result<CheckpointEngineConfig, Failure> {
        let mut config = match (&self.config, &self.config_json) {
            (Some(path), _) => CheckpointEngineConfig::from_path(path)?,
            (None, Some(text)) => CheckpointEngineConfig::from_text(text, ConfigFormat::Json)?,
            (None, None) => CheckpointEngineConfig { backend: "ipc".into(), ..Default::default() },
        };
        if let Some(backend) = &self.backend {
            config.backend.clone_from(backend);
        }
        if !self.engine_kwargs.is_empty() {
            let section = config.engine_kwargs.entry(config.backend.clone()).or_default();
            section.extend(self.engine_kwargs.iter().cloned());
        }
        if self.bucket_mb.is_some() {
            config.update_weights_bucket_megabytes = self.bucket_mb;
        }
        if let Some(seconds) = self.timeout {
            config.timeout_seconds = seconds;
        }
        if self.threads.is_some() {
            config.threads = self.threads;
        }
        // A rollout that `sync` starts is told its own device with everything else.
        if let Some(device) = self.device.as_ref().filter(|_| self.config_json.is_none()) {
            config.device.clone_from(device);
        }
        if let Some(folder) = &self.hccl_lib {
            let folder = std::path::absolute(folder)?;
            let text = folder.to_str().ok_or("--hccl-lib: the path is not UTF-8")?.to_owned();
            let section = config.engine_kwargs.entry("hccl".into()).or_default();
            section.insert("library_dir".into(), text.into());
        }
        if config.backend == "hccl" && config.device.is_cpu() {
            // It has buckets nowhere else; each rank takes the NPU of its number.
            config.device = "npu".parse()?;
        }
        config.digests &= !self.no_digests;
        config.trainer_quantize_fp8 |= self.trainer_quantize_fp8;
        let mut section = Quantization::of(&config)?;
        self.format.put_into(&mut section);
        section.quantize_on_receive |= self.quantize_on_receive;
        if section != Quantization::default() {
            let section = serde_json::to_value(section)?;
            config.quantization = section.as_object().cloned().unwrap_or_default();
        }
        config.validate()?;
        registry().get(&config.backend)?;
        Ok(config)
    }
}

/// What a process tells of itself while it runs.
#[derive(Debug, Args)]
struct MetricsArgs {
    /// Serve metrics for Prometheus and `top` at this address, such as 127.0.0.1:9400; rollout n of a
    /// `sync` takes the port n higher. Everyone who reaches the address can read them
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
}

impl MetricsArgs {
    async fn serve(&self) -> Result<Option<Exporter>, Failure> {
        let Some(address) = self.metrics else { return Ok(None) };
        let exporter = Exporter::start(address).await?;
        // In one piece: rollouts write to the same terminal.
        let line = format!("metrics at http://{}/metrics\n", exporter.address());
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes())?;
        Ok(Some(exporter))
    }
}

/// Shows what the ranks of running updates are doing: state, version, rate, and where time goes.
///
/// A rank's line has its version and the version's state, the rate of its last update, how many
/// updates were committed (and aborted: `+1!`), and the mean of each stage. The trainer's endpoint
/// knows the states of all ranks; stage times come from each rank's own.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  In one shell:
    ckpt-engine sync --synthetic qwen2.5-0.5b --rollouts 2 --updates 100 --metrics 127.0.0.1:9400
  In another:
    ckpt-engine top 127.0.0.1:9400 127.0.0.1:9401 127.0.0.1:9402")]
struct TopArgs {
    /// Where processes serve their metrics, as their --metrics says
    #[arg(required = true, value_name = "ADDRESS")]
    addresses: Vec<String>,
    /// Print it once, and end
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
}

/// Starts one trainer and N rollout processes on this machine and updates the rollouts.
///
/// With the backend naive, all of them are tasks of one process.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  Two rollouts get a made-up model and compare every byte:
    ckpt-engine sync --synthetic qwen2.5-0.5b --rollouts 2 --verify

  A real model, written out by the rollout, compared:
    ckpt-engine sync --model model.safetensors --out received --verify
    ckpt-engine verify model.safetensors received/rollout-0")]
struct SyncArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// How many trainers, all of which have the model; transports with several senders use them
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    trainers: u32,
    /// How many rollouts
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    rollouts: u32,
    /// The device of one rank, where that is not what --device says; may be given several times. Ranks count
    /// trainers, then rollouts: of one trainer, rank 1 is the first rollout, and 1=npu:0 puts it on the
    /// trainer's NPU
    #[arg(long = "rank-device", value_name = "RANK=DEVICE", value_parser = rank_device)]
    rank_devices: Vec<(u32, DeviceChoice)>,
    /// Let every rollout compare every tensor with the source, bit for bit
    #[arg(long)]
    verify: bool,
    /// Write what rollout n received to DIR/rollout-<n>/model.safetensors
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON object a line per update
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    metrics: MetricsArgs,
}

/// How ranks find each other.
#[derive(Debug, Args)]
struct RendezvousArgs {
    /// Where the trainer listens: HOST:PORT, unix:/path or unix:@name; without it, torchrun's
    /// MASTER_ADDR and MASTER_PORT say so, and RANK and WORLD_SIZE the rest
    #[arg(long, value_name = "ADDRESS")]
    rendezvous: Option<Address>,
    /// A file with the secret that all ranks share, readable by its owner only
    #[arg(long, value_name = "FILE", required_unless_present = "token_stdin")]
    token_file: Option<PathBuf>,
    /// Read the secret from standard input
    #[arg(long, hide = true, conflicts_with = "token_file")]
    token_stdin: bool,
}

/// A process's place in a group that starts: what its options say, and else torchrun.
struct Meeting {
    control: ControlConfig,
    /// Only torchrun knows them for certain.
    rank: Option<Rank>,
    world_size: Option<u32>,
}

impl RendezvousArgs {
    fn meet(&self, create_token: bool, timeout: Duration) -> Result<Meeting, Failure> {
        let (address, rank, world_size) = match &self.rendezvous {
            Some(address) => (address.clone(), None, None),
            None => {
                let environment = from_env()?.ok_or(
                    "give --rendezvous ADDRESS, or set torchrun's RANK, WORLD_SIZE, MASTER_ADDR \
                     and MASTER_PORT",
                )?;
                (environment.address, Some(environment.rank), Some(environment.world_size))
            }
        };
        let token = match &self.token_file {
            Some(path) if create_token && !path.exists() => Token::create(path)?,
            Some(path) => Token::read(path)?,
            None => {
                let mut secret = Vec::new();
                let limit = Token::MAX_BYTES as u64;
                let input = std::io::Read::take(std::io::stdin(), limit);
                std::io::Read::read_to_end(&mut { input }, &mut secret)?;
                Token::new(&secret)?
            }
        };
        let mut control = ControlConfig::new(address, token);
        control.connect_timeout = timeout;
        Ok(Meeting { control, rank, world_size })
    }
}

/// Leads a group as its trainer, and runs updates with rollouts that are started elsewhere.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  In one shell:
    ckpt-engine trainer --rendezvous localhost:29600 --token-file token --rollouts 2 \\
      --synthetic tiny-moe --updates 3
  In two others:
    ckpt-engine rollout --rendezvous localhost:29600 --token-file token --verify --world-size 3")]
struct TrainerArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The rank: 0 leads the group; another one takes part in the updates of a leader that has the same
    /// model. Without it torchrun's RANK, else 0
    #[arg(long)]
    rank: Option<u32>,
    /// The number of ranks of the group, where other trainers are among them; torchrun's WORLD_SIZE says
    /// so without it, else the rollouts and this one
    #[arg(long)]
    world_size: Option<u32>,
    /// The weights stay the same from one update to the next
    #[arg(long, hide = true)]
    still: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    rendezvous: RendezvousArgs,
    /// How many rollouts to wait for; torchrun's WORLD_SIZE says so without it, else 1
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    rollouts: Option<u32>,
    /// Seconds between the updates
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    interval: f64,
    /// Print one JSON object a line per update
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    metrics: MetricsArgs,
}

/// Joins a trainer's group as a rollout and receives its updates.
#[derive(Debug, Args)]
struct RolloutArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    rendezvous: RendezvousArgs,
    /// The rank to take; without it torchrun's RANK, else the trainer gives the next free one
    #[arg(long)]
    rank: Option<u32>,
    /// The number of ranks of the group, the trainer included; any number joins a group that has
    /// formed already; torchrun's WORLD_SIZE says so without it, else 2
    #[arg(long)]
    world_size: Option<u32>,
    /// Compare every tensor with the trainer's source, bit for bit
    #[arg(long)]
    verify: bool,
    /// Write the weights to DIR/model.safetensors
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Memory to allocate on the device for the weights before the first update, in bytes
    #[arg(long, value_name = "BYTES")]
    reserve: Option<u64>,
    /// Keep the last version in memory, and give it at this address (host:port, port 0 for any that is
    /// free) to rollouts that join later, at once and without the trainer
    #[arg(long, value_name = "ADDRESS")]
    hold: Option<Address>,
    /// Offer memory for bare transfers, as `bench transfer` has it
    #[arg(long, hide = true)]
    bare: bool,
    #[command(flatten)]
    metrics: MetricsArgs,
}

/// Says which backends can run on this machine, and what the others need.
#[derive(Debug, Args)]
struct DoctorArgs {
    /// Try this backend as thoroughly as can be; only hccl can be tried without a group
    #[arg(long, value_name = "NAME", value_parser = ["hccl"])]
    backend: Option<String>,
    /// The folder of libascendcl.so and libhccl.so: CANN's, or a simulator's
    #[arg(long, value_name = "PATH", requires = "backend")]
    hccl_lib: Option<PathBuf>,
    /// What a process that the doctor starts does
    #[arg(long, hide = true, requires = "backend")]
    task: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Measures transports and codecs beside what the machine can do in the same run.
#[derive(Debug, Args)]
struct BenchArgs {
    #[command(subcommand)]
    what: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Updates of a model in memory: one rollout with digests and without, two rollouts, and
    /// 100 000 tensors of 1 KiB, each beside a copy of the same bytes into shared memory
    Transfer(TransferArgs),
    /// The FP8 codecs, beside a copy of the same input
    Quant(QuantBenchArgs),
}

#[derive(Debug, Args)]
struct TransferArgs {
    /// The synthetic model
    #[arg(long, value_name = "NAME", default_value = "qwen2.5-7b")]
    synthetic: SyntheticModel,
    /// Take only its first LAYERS layers
    #[arg(long)]
    layers: Option<u32>,
    #[command(flatten)]
    engine: EngineArgs,
    /// How many trainers, all of which have the model
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    trainers: u32,
    /// The numbers of rollouts to measure with, comma-separated; without them one, and two on the host
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    rollouts: Vec<u32>,
    /// Updates that are measured for each setting
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..1000))]
    repeats: u64,
    /// Print one JSON object a line per setting
    #[arg(long)]
    json: bool,
}

/// Why a command did not end well.
type Failure = Box<dyn StdError>;

/// Lets several ranks of NCCL share a GPU, when this machine has fewer than ranks: NCCL asks for variables
/// to be set for that, before anything else happens in the process.
#[allow(unsafe_code, reason = "the process's environment changes while no other thread runs")]
fn allow_shared_gpus(command: &Command) -> Result<(), Failure> {
    let (engine, ranks) = match command {
        Command::Sync(args) => (&args.engine, args.trainers + args.rollouts),
        Command::Bench(BenchArgs { what: Bench::Transfer(args) }) => {
            (&args.engine, args.trainers + args.rollouts.iter().max().unwrap_or(&1))
        }
        _ => return Ok(()),
    };
    let config = engine.config()?;
    if config.backend != "nccl" || !cli::device::ranks_share_gpus(&config.device, ranks) {
        return Ok(());
    }
    complain(&format!(
        "a test configuration: {ranks} ranks of NCCL share fewer GPUs (NCCL_MULTI_RANK_GPU_ENABLE=1, \
         NCCL_NVLS_ENABLE=0, NCCL_BUFFSIZE=16777216; it takes NCCL 2.30 or later)"
    ));
    // Processes take turns on a GPU, and what NCCL moves in a turn is what its buffers hold.
    for (name, value) in [
        ("NCCL_MULTI_RANK_GPU_ENABLE", "1"),
        ("NCCL_NVLS_ENABLE", "0"),
        ("NCCL_BUFFSIZE", "16777216"),
    ] {
        // SAFETY: `main` calls this before it starts a thread, and nothing so far has.
        unsafe { cli::set_variable(name, value) };
    }
    Ok(())
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    if let Err(error) = allow_shared_gpus(&command) {
        report(&*error);
        return ExitCode::FAILURE;
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("CKPT_ENGINE_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error")),
        )
        .with_writer(std::io::stderr)
        // It would say with `eprintln!` that it cannot write there.
        .log_internal_errors(false)
        // A line for each stage with its times, where the filter lets its span through.
        .with_span_events(tracing_subscriber::fmt::format::FmtSpan::CLOSE)
        .init();
    let result = match command {
        Command::Sync(args) => until_interrupted(sync_command(&args)),
        Command::Trainer(args) => until_interrupted(trainer_command(&args)),
        Command::Rollout(args) => until_interrupted(rollout_command(&args)),
        Command::Top(args) => until_interrupted(top_command(&args)),
        Command::Doctor(args) => doctor_command(&args),
        Command::Verify(args) => verify_command(&args),
        Command::Quantize(args) => cleaning_up(|| quantize_command(&args)),
        Command::Dequantize(args) => cleaning_up(|| dequantize_command(&args)),
        Command::Plan(args) => plan_command(&args),
        Command::Bench(BenchArgs { what: Bench::Quant(args) }) => quant_bench_command(&args),
        Command::Bench(BenchArgs { what: Bench::Transfer(args) }) => {
            until_interrupted(transfer_command(&args))
        }
    };
    result.unwrap_or_else(|error| {
        report(&*error);
        ExitCode::FAILURE
    })
}

/// Runs a command to its end or to an interrupt, which it survives only to clean up.
fn until_interrupted(
    command: impl Future<Output = Result<ExitCode, Failure>>,
) -> Result<ExitCode, Failure> {
    let runtime = Runtime::start()?;
    let result = runtime.block_on(async {
        let ended = ending()?;
        tokio::select! {
            result = command => result,
            code = ended => {
                end_unfinished();
                Ok(ExitCode::from(code))
            }
        }
    });
    runtime.end();
    result
}

/// A configuration that quantises a checkpoint as `plan` and `quantize` do: they know all of its weights
/// before the first one travels, and what its own `config.json` says.
fn as_planned(
    mut config: CheckpointEngineConfig,
    source: &SourceSpec,
) -> Result<CheckpointEngineConfig, Failure> {
    let mut section = Quantization::of(&config)?;
    if !(config.trainer_quantize_fp8 || section.quantize_on_receive) || section.manifest.is_some() {
        return Ok(config);
    }
    let path = match &source.model {
        ModelSpec::Checkpoint { path } => path,
        ModelSpec::Synthetic { name, layers } => {
            let shape = |meta: &TensorMeta| meta.shape.iter().map(|&side| side as usize).collect();
            let metas = name.metas(*layers)?;
            let parameters =
                metas.iter().map(|meta| (&*meta.name, shape(meta), stored(meta.dtype)));
            warn_of(&QuantPlan::resolve(parameters, &section.rules())?);
            return Ok(config);
        }
    };
    let plan = cli::quantize::plan_of(&Checkpoint::open(path)?, &section.rules())?;
    warn_of(&plan);
    section.ignored_layers.extend(plan.layers_to_ignore());
    let section = serde_json::to_value(section)?;
    config.quantization = section.as_object().cloned().unwrap_or_default();
    Ok(config)
}

/// Runs a command that writes files on this thread; a signal that ends the program removes what is not
/// finished first.
fn cleaning_up(command: impl FnOnce() -> Result<ExitCode, Failure>) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async { ending() })?;
    let wait = move || {
        let code = runtime.block_on(ended);
        end_unfinished();
        std::process::exit(code.into());
    };
    let waits = std::thread::Builder::new().name("signals".into()).spawn(wait);
    waits.map_err(|error| Error::io("starting the thread that waits for signals", error))?;
    let result = command();
    // Its files went while it wrote them: that is no failure to tell of.
    while is_ending() {
        std::thread::park();
    }
    result
}

/// Waits for a signal that ends the program, and gives the exit code that a shell expects then. From the
/// call on, such signals end the program in no other way.
///
/// Signals that the program was started to ignore, as by `nohup`, stay ignored.
fn ending() -> Result<impl Future<Output = u8>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut waits = Vec::new();
    for kind in [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::alarm(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
        // Processor time that a limit ends.
        SignalKind::from_raw(24),
    ] {
        let number = kind.as_raw_value();
        if is_ignored(number) {
            continue;
        }
        let mut signal = signal(kind)?;
        waits.push(Box::pin(async move {
            signal.recv().await;
            128 + u8::try_from(number).unwrap_or(0)
        }));
    }
    // Ignored, so that a limit of the size of files is an error of the write that meets it.
    let too_large = signal(SignalKind::from_raw(25))?;
    Ok(async move {
        let _until_the_end = too_large;
        match waits.is_empty() {
            true => std::future::pending().await,
            false => futures::future::select_all(waits).await.0,
        }
    })
}

/// Whether the program was started with a signal ignored.
fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (number - 1) & 1 == 1
}

async fn sync_command(args: &SyncArgs) -> Result<ExitCode, Failure> {
    let source = args.source.spec()?;
    let options = SyncOptions {
        config: as_planned(args.engine.config()?, &source)?,
        source,
        trainers: args.trainers,
        still: false,
        rollouts: args.rollouts,
        devices: args.rank_devices.iter().cloned().collect(),
        verify: args.verify,
        out: args.out.clone(),
        metrics: args.metrics.metrics,
        bare: false,
    };
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

async fn trainer_command(args: &TrainerArgs) -> Result<ExitCode, Failure> {
    let _exporter = args.metrics.serve().await?;
    let config = as_planned(args.engine.config()?, &args.source.spec()?)?;
    let interval = Duration::try_from_secs_f64(args.interval)?;
    let rank = match args.rank {
        Some(rank) => Rank(rank),
        None if args.rendezvous.rendezvous.is_some() => Rank::LEADER,
        None => from_env()?.map_or(Rank::LEADER, |environment| environment.rank),
    };
    let meeting = args.rendezvous.meet(rank == Rank::LEADER, config.timeout())?;
    let told = args.world_size.or(meeting.world_size);
    if rank != Rank::LEADER {
        let options = CoTrainerOptions {
            control: meeting.control,
            rank,
            world_size: told.unwrap_or(args.rollouts.unwrap_or(1) + 2),
            config,
            source: args.source.spec()?,
            still: args.still,
            is_child: args.rendezvous.token_stdin,
        };
        let is_whole = cli::sync::co_trainer(options, |error| report(error)).await?;
        return Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let registry = registry();
    let device = cli::device::of_rank(&config.device, 0)?;
    let config = CheckpointEngineConfig { device, ..config };
    let mut source = Source::open(args.source.spec()?)?.on_device(&config.device);
    if !args.json {
        say_source(&source, &config.backend)?;
    }
    source.advance(Version(1))?;
    let memory = PeakMemory::start()?;
    let world_size = match (args.rollouts, told) {
        (Some(rollouts), None) => rollouts + 1,
        (_, Some(ranks)) => ranks,
        (None, None) => 2,
    };
    let control = ControlPlane::lead(meeting.control).await?;
    if !args.json {
        say(format!("waiting for {} other ranks at {}", world_size - 1, control.address()))?;
    }
    let context = EngineContext::new(config.clone(), Role::Trainer).with_control(control.clone());
    let engine = registry.create(context)?;
    let announcement = serde_json::json!(Announcement { source: source.spec().clone() });
    let mut trainer = Trainer { engine, source };
    let deadline = config.timeout();
    let engine = &mut *trainer.engine;
    let backend = registry.get(&config.backend)?;
    form_group(engine, backend, &control, world_size, announcement, deadline).await?;
    let mut failed = 0;
    for version in (1..=args.source.updates).map(Version) {
        match trainer.update(version).await {
            Ok(report) => {
                let extra = memory.extra_peak_bytes();
                let tensors = trainer.source.tensors();
                let line = cli::sync::line(&report, tensors, &config.backend, 0.0, extra);
                print_update(&line, args.json)?;
            }
            // The engine is in order: the next update goes to the rollouts that are left.
            Err(error) => {
                failed += 1;
                report(&error);
                let left = control.peers().iter().any(|peer| peer.role == Role::Rollout);
                if !left {
                    break;
                }
            }
        }
        tokio::time::sleep(interval).await;
    }
    trainer.engine.finalize().await?;
    control.close().await?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn rollout_command(args: &RolloutArgs) -> Result<ExitCode, Failure> {
    let _exporter = args.metrics.serve().await?;
    let config = args.engine.config()?;
    let meeting = args.rendezvous.meet(false, config.timeout())?;
    let options = RolloutOptions {
        control: meeting.control,
        rank: args.rank.map(Rank).or(meeting.rank),
        world_size: args.world_size.or(meeting.world_size).unwrap_or(2),
        config,
        verify: args.verify,
        out: args.out.clone(),
        reserve: args.reserve,
        bare: args.bare,
        hold: args.hold.clone(),
        is_child: args.rendezvous.token_stdin,
    };
    let print = |result: &checkpoint_engine::Result<ReceiveReport>| match result {
        Ok(report) => say(format!(
            "{}version {}: {} tensors, {} bytes, {:.3} s",
            if cli::device::is_simulated("hccl") { "simulated: " } else { "" },
            report.version,
            report.tensors,
            report.bytes,
            report.elapsed.as_secs_f64()
        )),
        Err(error) => {
            report(error);
            Ok(())
        }
    };
    let is_whole = cli::sync::rollout(options, print).await?;
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn top_command(args: &TopArgs) -> Result<ExitCode, Failure> {
    let interval = Duration::try_from_secs_f64(args.interval.max(0.1))?;
    let terminal = console::Term::stdout();
    let mut shown = 0;
    loop {
        let (table, errors) = top::ask(&args.addresses).await;
        if shown == 0 || args.once {
            // Later, processes may end while others go on.
            errors.iter().for_each(|error| report(error));
            if errors.len() == args.addresses.len() {
                return Err(
                    "nothing answers; is there a process with --metrics at this address?".into()
                );
            }
        }
        let mut text = top::render(&table);
        if table.is_empty() {
            text.push_str("no updates yet\n");
        }
        if args.once {
            say(text.trim_end().to_owned())?;
            return Ok(ExitCode::SUCCESS);
        }
        for error in &errors {
            text.push_str(&format!("{error}\n"));
        }
        // Elsewhere than on a terminal, looks follow one another.
        if terminal.is_term() {
            let width = usize::from(terminal.size().1);
            let lines = text.lines().map(|line| console::truncate_str(line, width, "…"));
            text = lines.map(|line| line.into_owned() + "\n").collect();
            terminal.clear_last_lines(shown)?;
        }
        terminal.write_str(&text)?;
        shown = text.lines().count();
        // One that is merely slow to answer has not ended.
        let ended = errors.iter().filter(|error| error.kind() != ErrorKind::Timeout).count();
        if ended == args.addresses.len() {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(interval).await;
    }
}

fn doctor_command(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    if args.backend.is_some() {
        let hccl = commands::doctor::HcclArgs {
            library_dir: args.hccl_lib.clone(),
            json: args.json,
            task: args.task.clone(),
        };
        return commands::doctor::hccl_command(&hccl);
    }
    let backends: Vec<(&str, &str, Availability)> = registry()
        .backends()
        .map(|backend| (backend.name(), backend.summary(), backend.probe()))
        .collect();
    if args.json {
        let backends: serde_json::Map<String, serde_json::Value> = backends
            .iter()
            .map(|(name, summary, found)| {
                let mut value = serde_json::json!(found);
                value["summary"] = (*summary).into();
                ((*name).to_owned(), value)
            })
            .collect();
        let devices = cli::device::describe();
        say(serde_json::json!({ "backends": backends, "devices": devices }).to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    for line in cli::device::describe() {
        say(line)?;
    }
    for (name, summary, found) in backends {
        say(format!("{name}: {summary}"))?;
        match found {
            Availability::Usable { details } => say(format!("  usable: {details}"))?,
            Availability::Unusable { reason, remedy } => {
                say(format!("  not usable: {reason}\n  to change that: {remedy}"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn transfer_command(args: &TransferArgs) -> Result<ExitCode, Failure> {
    let model = ModelSpec::Synthetic { name: args.synthetic, layers: args.layers };
    let options = TransferOptions {
        source: SourceSpec { model, updates: 1 },
        config: args.engine.config()?,
        repeats: usize::try_from(args.repeats)?,
        trainers: args.trainers,
        rollouts: args.rollouts.clone(),
    };
    if options.config.backend == "naive" {
        return Err(
            "naive hands memory over without a copy: there is no transfer to measure".into()
        );
    }
    let print = |line: &TransferLine| {
        if args.json {
            return say(json_line(line)?);
        }
        say(format!(
            "{}{}: {} rollouts, digests {}: {:.2} GB/s, {:.2} of memcpy's {:.2}; {:.2} µs a tensor; \
             {:.1} MiB extra memory",
            if line.simulated { "simulated: " } else { "" },
            line.what,
            line.rollouts,
            if line.digests { "on" } else { "off" },
            line.gb_per_s,
            line.ratio,
            line.memcpy_gb_per_s,
            line.us_per_tensor,
            line.extra_peak_bytes as f64 / f64::from(1 << 20)
        ))?;
        match (line.bare_gb_per_s, line.bare_ratio) {
            (Some(rate), Some(ratio)) => say(format!(
                "  {ratio:.2} of bare transfers of as many bytes between the same processes, \
                 {rate:.2} GB/s"
            )),
            _ => Ok(()),
        }
    };
    transfer(&options, print).await?;
    Ok(ExitCode::SUCCESS)
}

fn say_source(source: &Source, backend: &str) -> checkpoint_engine::Result<()> {
    let gib = source.byte_len() as f64 / f64::from(1 << 30);
    let words = match &source.spec().model {
        ModelSpec::Synthetic { name, .. } => name.to_string(),
        ModelSpec::Checkpoint { path } => path.display().to_string(),
    };
    say(format!("{words}: {} tensors, {gib:.2} GiB, over {backend}", source.tensors()))?;
    match source.residency() {
        Some(residency) => say(residency.to_string()),
        None => Ok(()),
    }
}

fn print_update(line: &UpdateLine, json: bool) -> checkpoint_engine::Result<()> {
    if json {
        return say(json_line(line)?);
    }
    let rollouts: Vec<String> = line
        .rollouts
        .iter()
        .map(|rollout| {
            let state = format!("{:?}", rollout.state).to_lowercase();
            format!("{} {state}", rollout.rank)
        })
        .collect();
    let quantised = match line.quantized + line.kept + line.passed_through {
        0 => String::new(),
        _ => format!(
            " ({} quantised, {} kept, {} passed through: {:.3} GB travel)",
            line.quantized,
            line.kept,
            line.passed_through,
            line.wire_bytes as f64 / 1e9
        ),
    };
    say(format!(
        "{}version {}: {} tensors{}, {:.3} GB in {:.3} s, {:.2} GB/s (memcpy {:.2}), {:.1} MiB extra \
         memory{}; rollouts: {}",
        if line.simulated { "simulated: " } else { "" },
        line.version,
        line.tensors,
        quantised,
        line.source_bytes as f64 / 1e9,
        line.seconds,
        line.gb_per_s,
        line.memcpy_gb_per_s,
        line.extra_peak_bytes as f64 / f64::from(1 << 20),
        if line.verified { ", every byte verified" } else { "" },
        rollouts.join(", ")
    ))
}

fn json_line(value: &impl serde::Serialize) -> checkpoint_engine::Result<String> {
    serde_json::to_string(value).map_err(|error| {
        Error::new(ErrorKind::Io, "writing a report", error.to_string()).with_source(error)
    })
}

/// Prints a line; a reader that went away is an error and not a panic.
fn say(line: String) -> checkpoint_engine::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout().lock(), "{line}")
        .map_err(|error| Error::io("writing to standard output", error))
}

/// Prints an error and what caused it, each cause once.
fn report(error: &dyn StdError) {
    let mut text = format!("error: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}\n  caused by: {cause_text}");
        }
        source = cause.source();
    }
    complain(&text);
}

/// Writes a line to standard error. If that is gone, too, there is nobody left to tell.
fn complain(line: &str) {
    use std::io::Write;
    let _nobody = writeln!(std::io::stderr().lock(), "{line}");
}

fn verify_command(args: &VerifyArgs) -> Result<ExitCode, Failure> {
    let open = |path: &Path| Checkpoint::open(path);
    let (a, b) = (open(&args.a)?, open(&args.b)?);
    let bar = byte_bar(a.byte_len());
    let report = verify(&a, &b, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let report = report?;
    for difference in &report.differences {
        say(difference.to_string())?;
    }
    say(report.to_string())?;
    Ok(if report.is_equal() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A progress bar of bytes on the terminal; nothing where standard error is none.
fn byte_bar(bytes: u64) -> ProgressBar {
    const TEMPLATE: &str = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let bar = ProgressBar::new(bytes);
    match ProgressStyle::with_template(TEMPLATE) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

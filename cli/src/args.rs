//! The options that several commands have, and what they mean.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use checkpoint_engine::NamePattern;
use checkpoint_engine::control::{Address, ControlConfig, Token, from_env};
use checkpoint_engine::fp8::rules::{Receiver, RulesConfig, parse_ignored_layers};
use checkpoint_engine::fp8::{Fp8Config, Granularity, Mode, Quantization, SourceType};
use checkpoint_engine::reshard::Parallelism;
use checkpoint_engine::{CheckpointEngineConfig, DeviceChoice, Rank, config, registry};
use clap::Args;
use cli::exporter::Exporter;
use cli::placed::Placing;
use cli::source::{ModelSpec, SourceSpec};
use cli::sync::sends_only;
use cli::synthetic::{ChangeRate, SyntheticModel};

use crate::Failure;

/// The model, and how often it is updated.
#[derive(Debug, Args)]
pub(crate) struct SourceArgs {
    /// The source as JSON, as `sync` gives it to other trainers
    #[arg(long, value_name = "JSON", hide = true, conflicts_with_all = ["synthetic", "model"])]
    pub(crate) source_json: Option<String>,
    /// A made-up model with the true names and shapes of qwen2.5-0.5b, qwen2.5-7b, qwen3-30b-a3b, deepseek-v3
    /// or kimi-k2, or a tiny-moe of a few MB
    #[arg(long, value_name = "NAME", required_unless_present_any = ["model", "source_json"], conflicts_with = "model")]
    pub(crate) synthetic: Option<SyntheticModel>,
    /// A .safetensors file, a Hugging Face folder, or the index of one
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,
    /// Take only the first LAYERS layers of a synthetic model
    #[arg(long, conflicts_with = "model")]
    pub(crate) layers: Option<u32>,
    /// How many updates to run; the weights change between them, and the last one of a --model
    /// carries exactly its files' bytes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) updates: u64,
    /// How many of the weights' elements change from one update to the next, from 0 to 1; without it all of a synthetic
    /// model do, and up to a quarter of a --model's
    #[arg(long, value_name = "FRACTION", value_parser = change_rate)]
    pub(crate) change_rate: Option<ChangeRate>,
    /// After the first update, send only weights whose names are like this, such as '*.lora_*', where * stands for any text; may be given
    /// several times. All others stay as they are, and nothing of them travels. Needs --delta
    #[arg(long, value_name = "NAMES", conflicts_with = "placed")]
    pub(crate) only: Vec<NamePattern>,
}

impl SourceArgs {
    pub(crate) fn spec(&self) -> Result<SourceSpec, Failure> {
        if let Some(text) = &self.source_json {
            return Ok(serde_json::from_str(text)?);
        }
        let model = match (self.synthetic, &self.model) {
            (Some(name), _) => ModelSpec::Synthetic { name, layers: self.layers },
            (None, Some(path)) => ModelSpec::Checkpoint { path: std::path::absolute(path)? },
            (None, None) => return Err("give --synthetic or --model".into()),
        };
        let (updates, change_rate, only) = (self.updates, self.change_rate, self.only.clone());
        Ok(SourceSpec { model, updates, change_rate, only })
    }
}

/// What quantised weights look like, and which there are.
#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
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
    pub(crate) fn put_into(&self, section: &mut Quantization) {
        section.mode = self.mode.or(section.mode);
        section.granularity = self.block.or(section.granularity);
        section.receiver = self.receiver.or(section.receiver);
        section.ignored_layers.extend(parse_ignored_layers(self.ignored.as_deref().unwrap_or("")));
    }
}

pub(crate) fn rules(format: &FormatArgs) -> RulesConfig {
    let mut section = Quantization::default();
    format.put_into(&mut section);
    section.rules()
}

pub(crate) fn source_type(text: &str) -> Result<SourceType, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

#[derive(Clone, Debug)]
pub(crate) struct Shape(pub(crate) Vec<usize>);

pub(crate) fn shape(text: &str) -> Result<Shape, String> {
    let sides: Result<Vec<usize>, _> = text.split('x').map(str::parse).collect();
    let sides = sides.map_err(|_| format!("`{text}` is not a shape such as 256x1024"))?;
    let elements = sides.iter().try_fold(1_usize, |product, side| product.checked_mul(*side));
    match elements {
        Some(_) => Ok(Shape(sides)),
        None => Err(format!("`{text}` has too many elements")),
    }
}

/// The engine.
#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// The transport: naive (one process), ipc (processes of one host), nccl (GPUs), nixl (any hosts), dir (a shared
    /// folder), or vllm or sglang (servers that run already); see `doctor`
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
    /// Send only what changed since the last update; every rank keeps a copy of what travelled
    #[arg(long)]
    delta: bool,
    /// Weights that are a part of each version, by their names: adapter=*.lora_*, or draft=mtp.*,draft.* where several patterns say which. May
    /// be given several times. With --delta, updates say which parts changed, with a digest of each
    #[arg(long = "part", value_name = "PART=NAMES", value_parser = part)]
    parts: Vec<(String, Vec<NamePattern>)>,
    /// A part of each version that rollouts want, by its name; all others do not reach them. May be given several times. `policy` is all
    /// weights that no --part has
    #[arg(long = "want", value_name = "PART")]
    wants: Vec<String>,
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

/// PART=NAMES,NAMES.
fn part(text: &str) -> Result<(String, Vec<NamePattern>), String> {
    let (part, names) = text.split_once('=').ok_or("PART=NAMES is wanted")?;
    Ok((part.to_owned(), names.split(',').map(NamePattern::from).collect()))
}

/// A fraction between 0 and 1.
pub(crate) fn change_rate(text: &str) -> Result<ChangeRate, String> {
    let rate = text.parse().ok().and_then(ChangeRate::new);
    rate.ok_or_else(|| format!("`{text}` is no fraction between 0 and 1"))
}

/// RANK=DEVICE.
pub(crate) fn rank_device(text: &str) -> Result<(u32, DeviceChoice), String> {
    let (rank, device) = text.split_once('=').ok_or("RANK=DEVICE is wanted")?;
    let rank = rank.parse().map_err(|error| format!("`{rank}` is no rank: {error}"))?;
    Ok((rank, device.parse::<DeviceChoice>().map_err(|error| error.to_string())?))
}

impl EngineArgs {
    pub(crate) fn config(&self) -> Result<CheckpointEngineConfig, Failure> {
        let mut config = match (&self.config, &self.config_json) {
            (Some(path), _) => config::load(path)?,
            (None, Some(text)) => config::parse(text, config::Format::Json)?,
            (None, None) => CheckpointEngineConfig::new("ipc"),
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
        if sends_only(&config.backend) && config.device.is_cpu() {
            config.device = "cuda".parse()?;
        }
        config.digests &= !self.no_digests;
        if self.delta {
            config.layers.insert("delta".into(), true.into());
        }
        if !self.parts.is_empty() {
            for (part, names) in &self.parts {
                config.parts.entry(part.clone()).or_default().extend(names.iter().cloned());
            }
        }
        if !self.wants.is_empty() {
            config.wants = Some(self.wants.clone());
        }
        let mut fp8 = Fp8Config::of(&config)?;
        fp8.trainer_quantize_fp8 |= self.trainer_quantize_fp8;
        self.format.put_into(&mut fp8.quantization);
        fp8.quantization.quantize_on_receive |= self.quantize_on_receive;
        fp8.put_into(&mut config)?;
        config.validate()?;
        registry().get(&config.backend)?;
        Ok(config)
    }
}

/// Trainers and rollouts that each have a part of the model.
#[derive(Debug, Args)]
pub(crate) struct PlacingArgs {
    /// Have trainers write what each of them holds straight into tensors that rollouts lend; the transports ipc, nixl, nccl and hccl do that
    #[arg(long, requires = "trainer_layout", requires = "rollout_layout")]
    placed: bool,
    /// How trainers hold the model, such as fsdp=2 or tp=2,pp=2: as with `plan --simulate`. It says how many there are
    #[arg(long, value_name = "LAYOUT", requires = "placed")]
    trainer_layout: Option<Parallelism>,
    /// How rollouts want it, such as tp=2 or ep=4. It says how many there are
    #[arg(long, value_name = "LAYOUT", requires = "placed")]
    rollout_layout: Option<Parallelism>,
}

impl PlacingArgs {
    pub(crate) fn placing(&self) -> Result<Option<Placing>, Failure> {
        let layouts = (self.trainer_layout.clone(), self.rollout_layout.clone());
        match (self.placed, layouts) {
            (true, (Some(trainers), Some(rollouts))) => Ok(Some(Placing { trainers, rollouts })),
            _ => Ok(None),
        }
    }

    /// How many trainers and rollouts there are.
    pub(crate) fn ranks(&self) -> Option<(u32, u32)> {
        let layouts = self.trainer_layout.as_ref().zip(self.rollout_layout.as_ref());
        layouts.map(|(trainers, rollouts)| (trainers.ranks, rollouts.ranks))
    }
}

/// What a process tells of itself while it runs.
#[derive(Debug, Args)]
pub(crate) struct MetricsArgs {
    /// Serve metrics for Prometheus and `top` at this address, such as 127.0.0.1:9400; rollout n of a
    /// `sync` takes the port n higher. Everyone who reaches the address can read them
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<SocketAddr>,
}

impl MetricsArgs {
    pub(crate) async fn serve(&self) -> Result<Option<Exporter>, Failure> {
        let Some(address) = self.metrics else { return Ok(None) };
        let exporter = Exporter::start(address).await?;
        // In one piece: rollouts write to the same terminal.
        let line = format!("metrics at http://{}/metrics\n", exporter.address());
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes())?;
        Ok(Some(exporter))
    }
}

/// How ranks find each other.
#[derive(Debug, Args)]
pub(crate) struct RendezvousArgs {
    /// Where the trainer listens: HOST:PORT, unix:/path or unix:@name; without it, torchrun's
    /// MASTER_ADDR and MASTER_PORT say so, and RANK and WORLD_SIZE the rest
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) rendezvous: Option<Address>,
    /// A file with the secret that all ranks share, readable by its owner only
    #[arg(long, value_name = "FILE", required_unless_present = "token_stdin")]
    pub(crate) token_file: Option<PathBuf>,
    /// Read the secret from standard input
    #[arg(long, hide = true, conflicts_with = "token_file")]
    pub(crate) token_stdin: bool,
}

/// A process's place in a group that starts: what its options say, and else torchrun.
pub(crate) struct Meeting {
    pub(crate) control: ControlConfig,
    /// Only torchrun knows them for certain.
    pub(crate) rank: Option<Rank>,
    pub(crate) world_size: Option<u32>,
}

impl RendezvousArgs {
    pub(crate) fn meet(&self, create_token: bool, timeout: Duration) -> Result<Meeting, Failure> {
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

//! `ckpt-engine bench`: transports and codecs, measured beside what the machine can do.

use std::process::ExitCode;

use checkpoint_engine::DeviceChoice;
use checkpoint_engine::NamePattern;
use checkpoint_engine::fp8::{Fp8Format, Granularity, Quantization, SourceType};
use clap::{Args, Subcommand};
use cli::bench::quant::{QuantLine, QuantOptions, quant};
use cli::bench::transfer::{TransferLine, TransferOptions, transfer};
use cli::report_line::delta_in_words;
use cli::source::{ModelSpec, SourceSpec};
use cli::synthetic::{ChangeRate, SyntheticModel};

use crate::Failure;
use crate::args::{EngineArgs, FormatArgs, PlacingArgs, Shape, change_rate, shape, source_type};
use crate::commands::scale::ScaleArgs;
use crate::output::{json_line, say};

/// Measures transports and codecs beside what the machine can do in the same run.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) what: Bench,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Updates of a model in memory: one rollout with digests and without, two rollouts, and
    /// 100 000 tensors of 1 KiB, each beside a copy of the same bytes into shared memory
    Transfer(Box<TransferArgs>),
    /// The FP8 codecs, beside a copy of the same input
    Quant(QuantBenchArgs),
    /// What a group costs beside the bytes of its weights: how that grows with ranks, tensors and buckets
    Scale(ScaleArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TransferArgs {
    /// The synthetic model
    #[arg(long, value_name = "NAME", default_value = "qwen2.5-7b")]
    pub(crate) synthetic: SyntheticModel,
    /// Take only its first LAYERS layers
    #[arg(long)]
    pub(crate) layers: Option<u32>,
    /// How many elements of the model change from one update to the next, from 0 to 1; without it nothing changes
    #[arg(long, value_name = "FRACTION", value_parser = change_rate)]
    pub(crate) change_rate: Option<ChangeRate>,
    /// After the first update, send only weights of the model whose names are like this, such as 'model.layers.23.*'; may be given several
    /// times. All others stay as they are, and nothing of them travels. Needs --delta
    #[arg(long, value_name = "NAMES", conflicts_with = "placed")]
    pub(crate) only: Vec<NamePattern>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// How many trainers, all of which have the model
    #[arg(long, default_value_t = 1, conflicts_with = "placed", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) trainers: u32,
    /// The numbers of rollouts to measure with, comma-separated; without them one, and two on the host
    #[arg(long, value_name = "N,N", value_delimiter = ',', conflicts_with = "placed")]
    pub(crate) rollouts: Vec<u32>,
    #[command(flatten)]
    pub(crate) placing: PlacingArgs,
    /// Have rollouts compare every element of every box in every update, which counts into its time
    #[arg(long, requires = "placed")]
    pub(crate) verify: bool,
    /// Updates that are measured for each setting
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..1000))]
    pub(crate) repeats: u64,
    /// Print one JSON object a line per setting
    #[arg(long)]
    pub(crate) json: bool,
}

/// Measures the FP8 codecs beside a copy of the same input.
#[derive(Debug, Args)]
pub(crate) struct QuantBenchArgs {
    /// The matrix, or a stack of them
    #[arg(long, value_name = "RxC", default_value = "18944x3584", value_parser = shape)]
    shape: Shape,
    /// The type of the source: bf16, f16 or f32
    #[arg(long, value_name = "D", default_value = "bf16", value_parser = source_type)]
    dtype: SourceType,
    /// How many threads quantise and copy; all cores without it
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Repetitions of each codec; the scalar one runs once
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..10_000))]
    repeats: u32,
    /// Quantise on a device: cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceChoice,
    /// How many such matrices a launch on a device quantises
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..100_000))]
    count: u32,
    #[command(flatten)]
    format: FormatArgs,
    /// Print one JSON object a line per codec
    #[arg(long)]
    json: bool,
}

pub(crate) async fn transfer_command(args: &TransferArgs) -> Result<ExitCode, Failure> {
    let model = ModelSpec::Synthetic { name: args.synthetic, layers: args.layers };
    let options = TransferOptions {
        source: SourceSpec {
            model,
            updates: 1,
            change_rate: args.change_rate,
            only: args.only.clone(),
        },
        config: args.engine.config()?,
        repeats: usize::try_from(args.repeats)?,
        trainers: args.placing.ranks().map_or(args.trainers, |(trainers, _)| trainers),
        placing: args.placing.placing()?,
        verify: args.verify,
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
        if let Some(delta) = &line.delta {
            say(format!("  {}", delta_in_words(delta, line.wire_bytes)))?;
        }
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

pub(crate) fn quant_bench_command(args: &QuantBenchArgs) -> Result<ExitCode, Failure> {
    let mut section = Quantization::default();
    args.format.put_into(&mut section);
    let format = Fp8Format {
        mode: section.mode.unwrap_or_default(),
        granularity: section.granularity.unwrap_or(Granularity::default()),
        ..Fp8Format::default()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let options = QuantOptions {
        shape: args.shape.0.clone(),
        ty: args.dtype,
        format,
        threads: args.threads.unwrap_or(cores).max(1),
        repeats: args.repeats as usize,
        device: args.device.clone(),
        count: args.count as usize,
    };
    quant(&options, |line: &QuantLine| {
        if args.json {
            return say(json_line(line)?);
        }
        say(format!(
            "{}: {:.2} GB/s of {:?} with {} threads, {:.2} of a copy's {:.2}",
            line.codec, line.gb_per_s, line.dtype, line.threads, line.ratio, line.copy_gb_per_s
        ))
    })?;
    Ok(ExitCode::SUCCESS)
}

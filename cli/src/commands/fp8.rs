//! `quantize`, `dequantize`, `plan` and `bench quant`.

use std::path::PathBuf;
use std::process::ExitCode;

use checkpoint_engine::DeviceChoice;
use checkpoint_engine::fp8::rules::{QuantPlan, Receiver, RulesConfig, Stored};
use checkpoint_engine::fp8::{Fp8Format, Granularity, Quantization, SourceType};
use clap::Args;
use cli::bench::quant::{QuantLine, QuantOptions, quant};
use cli::checkpoint::Checkpoint;
use cli::quantize::{Converted, dequantize, plan_of, quantize};

use crate::{Failure, FormatArgs, byte_bar, json_line, say};

/// Writes a checkpoint in FP8 blocks, as vLLM and SGLang load it.
///
/// A folder keeps its shards; index and config.json say what is new, everything else is copied.
/// OUT appears when it is complete. What is FP8 already passes as it is; a checkpoint that is quantised in
/// a way that is not understood completely is refused by name.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  A Hugging Face folder:
    ckpt-engine quantize Qwen2.5-7B-Instruct Qwen2.5-7B-Instruct-FP8

  For a receiver that runs DeepGEMM with E8M0 scales, without the first layer:
    ckpt-engine quantize in out --mode ue8m0 --ignored model.layers.0

What would be quantised, and why:
    ckpt-engine plan --model Qwen2.5-7B-Instruct")]
pub(crate) struct QuantizeArgs {
    /// A .safetensors file, a Hugging Face folder, or the index of one
    input: PathBuf,
    /// The file or folder to write
    output: PathBuf,
    #[command(flatten)]
    format: FormatArgs,
}

/// Writes an FP8 checkpoint in a wider type again: scales by blocks, by channel, by tensor, in F32, BF16,
/// F16 or E8M0, as DeepSeek, Qwen, compressed-tensors, FBGEMM and ModelOpt write them.
///
/// Anything else is refused by name, and so is a value that the type cannot hold.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
    ckpt-engine dequantize Qwen3-8B-FP8 Qwen3-8B-BF16")]
pub(crate) struct DequantizeArgs {
    /// A .safetensors file, a Hugging Face folder, or the index of one
    input: PathBuf,
    /// The file or folder to write
    output: PathBuf,
    /// The type of what was FP8: bf16, f16 or f32
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = source_type)]
    dtype: SourceType,
}

/// Prints what happens to each parameter, and by which rule: `name, decision, rule`, tab-separated.
///
/// The decision is quantize, keep or pass (what is FP8 already). Standard error says how much of what could
/// be FP8 stays as it is, and by which rules.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
    ckpt-engine plan --model Qwen3-30B-A3B | cut -f2 | sort | uniq -c

  For one receiver alone, which may load more than both vLLM and SGLang do:
    ckpt-engine plan --model Llama-4-Scout-17B-16E --receiver vllm

  From names and shapes alone:
    printf 'model.layers.0.mlp.gate.weight\\t256x1024\\n' > names
    ckpt-engine plan --names names")]
pub(crate) struct PlanArgs {
    /// A .safetensors file, a Hugging Face folder, or the index of one
    #[arg(long, value_name = "PATH", required_unless_present = "names", conflicts_with = "names")]
    model: Option<PathBuf>,
    /// A file of lines NAME<TAB>SHAPE, the shape as 256x1024
    #[arg(long, value_name = "FILE")]
    names: Option<PathBuf>,
    #[command(flatten)]
    format: FormatArgs,
    /// Make a matrix that no rule knows an error
    #[arg(long)]
    strict: bool,
    /// Print the quantization_config for config.json instead
    #[arg(long)]
    config: bool,
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

#[derive(Clone, Debug)]
struct Shape(Vec<usize>);

fn shape(text: &str) -> Result<Shape, String> {
    let sides: Result<Vec<usize>, _> = text.split('x').map(str::parse).collect();
    let sides = sides.map_err(|_| format!("`{text}` is not a shape such as 256x1024"))?;
    let elements = sides.iter().try_fold(1_usize, |product, side| product.checked_mul(*side));
    match elements {
        Some(_) => Ok(Shape(sides)),
        None => Err(format!("`{text}` has too many elements")),
    }
}

fn source_type(text: &str) -> Result<SourceType, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

fn rules(format: &FormatArgs) -> RulesConfig {
    let mut section = Quantization::default();
    format.put_into(&mut section);
    section.rules()
}

pub(crate) fn quantize_command(args: &QuantizeArgs) -> Result<ExitCode, Failure> {
    let input = Checkpoint::open(&args.input)?;
    let rules = rules(&args.format);
    // What the conversion refuses, it refuses in its own words, which name the scheme.
    let plan = plan_of(&input, &rules);
    let bar = byte_bar(input.byte_len());
    let done = quantize(&input, &args.output, &rules, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let done = done?;
    remark(&plan?, rules.receiver);
    say_converted("quantised", &done)
}

pub(crate) fn dequantize_command(args: &DequantizeArgs) -> Result<ExitCode, Failure> {
    let input = Checkpoint::open(&args.input)?;
    let bar = byte_bar(input.byte_len());
    let done = dequantize(&input, &args.output, args.dtype, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    say_converted("dequantised", &done?)
}

fn say_converted(what: &str, done: &Converted) -> Result<ExitCode, Failure> {
    let kept: u64 = done.kept.values().sum();
    say(format!(
        "{} tensors {what}, {kept} kept; {:.3} GB became {:.3} GB",
        done.converted,
        done.bytes_before as f64 / 1e9,
        done.bytes_after as f64 / 1e9
    ))?;
    for (reason, count) in &done.kept {
        say(format!("  kept {count}: {reason}"))?;
    }
    if done.removed > 0 {
        say(format!("  removed {}: scales of what is not FP8 any more", done.removed))?;
    }
    for note in &done.notes {
        say(format!("  {note}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn plan_command(args: &PlanArgs) -> Result<ExitCode, Failure> {
    let rules = RulesConfig { strict: args.strict, ..rules(&args.format) };
    let plan = match (&args.model, &args.names) {
        (Some(model), _) => plan_of(&Checkpoint::open(model)?, &rules)?,
        (None, Some(names)) => {
            let text = std::fs::read_to_string(names)
                .map_err(|error| format!("{}: {error}", names.display()))?;
            QuantPlan::resolve(parameters(&text)?, &rules)?
        }
        (None, None) => return Err("give --model or --names".into()),
    };
    remark(&plan, rules.receiver);
    if args.config {
        say(serde_json::to_string_pretty(&plan.quantization_config()?)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    for entry in plan.entries() {
        say(format!("{}\t{}\t{}", entry.name, entry.decision, entry.rule.id()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Says on standard error how much of a model stays as it is, and what about a plan may be a mistake.
fn remark(plan: &QuantPlan, receiver: Receiver) {
    let share = plan.share();
    let (part, all) = (share.kept_part(), share.quantized + share.kept.values().sum::<u64>());
    let rules: Vec<String> = share
        .kept
        .iter()
        .map(|(rule, kept)| format!("{rule} {:.1}%", *kept as f64 / all as f64 * 100.0))
        .collect();
    if !rules.is_empty() {
        let (percent, rules) = (part * 100.0, rules.join(", "));
        remark_line(&format!("{percent:.1}% of what could be FP8 stays as it is: {rules}"));
    }
    if share.quantized > 0 && part > 0.5 {
        let title = receiver.profile().title;
        remark_line(&format!("warning: more than half stays as it is for {title}; see --receiver"));
    }
    warn_of(plan);
}

/// Says on standard error what about a plan is most likely a mistake.
pub(crate) fn warn_of(plan: &QuantPlan) {
    if plan.share().quantized == 0 {
        remark_line("warning: nothing is quantised");
    }
    if !plan.unmatched().is_empty() {
        let entries = plan.unmatched().join(", ");
        remark_line(&format!("warning: layers to leave alone that match no parameter: {entries}"));
    }
}

/// If standard error is gone, nobody is left to tell.
fn remark_line(line: &str) {
    use std::io::Write;
    let _nobody = writeln!(std::io::stderr().lock(), "{line}");
}

/// The lines `name<TAB>shape`; empty ones and comments do not count.
fn parameters(text: &str) -> Result<Vec<(String, Vec<usize>, Stored)>, Failure> {
    let lines = (1..).zip(text.lines()).map(|(number, line)| (number, line.trim_end()));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|(number, line)| {
            let parsed = line.split_once('\t').ok_or("NAME<TAB>SHAPE was expected".to_owned());
            let parsed = parsed.and_then(|(name, sides)| Ok((name.to_owned(), shape(sides)?.0)));
            match parsed {
                Ok((name, shape)) => Ok((name, shape, Stored::Float)),
                Err(message) => Err(format!("line {number}: {message}").into()),
            }
        })
        .collect()
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

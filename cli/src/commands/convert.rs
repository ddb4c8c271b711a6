//! `ckpt-engine quantize` and `dequantize`: a checkpoint in another type.

use std::path::PathBuf;
use std::process::ExitCode;

use checkpoint_engine::fp8::SourceType;
use clap::Args;
use cli::checkpoint::Checkpoint;
use cli::quantize::{Converted, dequantize, plan_of, quantize};

use crate::Failure;
use crate::args::{FormatArgs, rules, source_type};
use crate::commands::plan::remark;
use crate::output::{byte_bar, say};

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

//! `ckpt-engine verify`: compares two checkpoints.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use cli::checkpoint::{Checkpoint, verify};

use crate::Failure;
use crate::output::{byte_bar, say};

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
pub(crate) struct VerifyArgs {
    /// A .safetensors file, a Hugging Face folder, or the index of one
    a: PathBuf,
    /// The one to compare it with
    b: PathBuf,
}

pub(crate) fn verify_command(args: &VerifyArgs) -> Result<ExitCode, Failure> {
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

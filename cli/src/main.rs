//! The `ckpt-engine` program: what its command line says, and exit codes.

#![allow(clippy::print_stdout, reason = "printing results is what the program is for")]
#![forbid(unsafe_code)]

use std::error::Error as StdError;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use cli::checkpoint::{Checkpoint, verify};
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
    /// Compare two checkpoints tensor by tensor, bit for bit
    Verify(VerifyArgs),
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
    /// A .safetensors file, or a Hugging Face folder
    a: PathBuf,
    /// The one to compare it with
    b: PathBuf,
}

/// Why a command did not end well.
type Failure = Box<dyn StdError>;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Verify(args) => verify_command(&args),
    };
    result.unwrap_or_else(|error| {
        report(&*error);
        ExitCode::FAILURE
    })
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
    eprintln!("{text}");
}

fn verify_command(args: &VerifyArgs) -> Result<ExitCode, Failure> {
    let open = |path: &Path| Checkpoint::open(path);
    let (a, b) = (open(&args.a)?, open(&args.b)?);
    let bar = byte_bar(a.byte_len());
    let report = verify(&a, &b, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    for difference in &report.differences {
        println!("{difference}");
    }
    println!("{report}");
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

//! The `ckpt-engine` program: which commands there are, and exit codes.

// `println!` and `eprintln!` panic when nobody reads: `say` and `complain` do not.
#![deny(clippy::print_stdout, clippy::print_stderr, unsafe_code)]

mod args;
mod commands;
mod ending;
mod output;

use std::error::Error as StdError;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use commands::bench::{Bench, BenchArgs, quant_bench_command, transfer_command};
use commands::convert::{DequantizeArgs, QuantizeArgs, dequantize_command, quantize_command};
use commands::doctor::{DoctorArgs, doctor_command};
use commands::plan::{PlanArgs, plan_command};
use commands::relay::{RelayArgs, relay_command};
use commands::rollout::{RolloutArgs, rollout_command};
use commands::scale::scale_command;
use commands::sync::{SyncArgs, sync_command};
use commands::top::{TopArgs, top_command};
use commands::trainer::{TrainerArgs, trainer_command};
use commands::verify::{VerifyArgs, verify_command};
use commands::versions::{PublishArgs, PullArgs, publish_command, pull_command};
use ending::{cleaning_up, until_interrupted};
use output::{complain, report};

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
    /// Carry the control traffic of a host's rollouts on one connection to the trainer
    Relay(RelayArgs),
    /// Show what the ranks of running updates are doing
    Top(TopArgs),
    /// Say which backends can run on this machine, and what the others need
    Doctor(DoctorArgs),
    /// Compare two checkpoints tensor by tensor, bit for bit
    Verify(VerifyArgs),
    /// Publish a checkpoint as a version in a folder
    Publish(PublishArgs),
    /// Write a version of a folder as a checkpoint
    Pull(PullArgs),
    /// Write a checkpoint in FP8
    Quantize(QuantizeArgs),
    /// Write an FP8 checkpoint in a wider type again
    Dequantize(DequantizeArgs),
    /// Say which parameters of a model are quantised, and by which rule
    Plan(PlanArgs),
    /// Measure transports and codecs beside what the machine can do
    Bench(BenchArgs),
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
        Command::Relay(args) => until_interrupted(relay_command(&args)),
        Command::Top(args) => until_interrupted(top_command(&args)),
        Command::Doctor(args) => doctor_command(&args),
        Command::Verify(args) => verify_command(&args),
        Command::Publish(args) => until_interrupted(publish_command(&args)),
        Command::Pull(args) => cleaning_up(|| pull_command(&args)),
        Command::Quantize(args) => cleaning_up(|| quantize_command(&args)),
        Command::Dequantize(args) => cleaning_up(|| dequantize_command(&args)),
        Command::Plan(args) => plan_command(&args),
        Command::Bench(BenchArgs { what: Bench::Quant(args) }) => quant_bench_command(&args),
        Command::Bench(BenchArgs { what: Bench::Transfer(args) }) => {
            until_interrupted(transfer_command(&args))
        }
        Command::Bench(BenchArgs { what: Bench::Scale(args) }) => {
            until_interrupted(scale_command(&args))
        }
    };
    result.unwrap_or_else(|error| {
        report(&*error);
        ExitCode::FAILURE
    })
}

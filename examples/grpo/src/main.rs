//! A small language model that learns to add by GRPO; its two rollouts get every step's weights
//! through the engine.
//!
//! ```text
//! cargo run --release -p grpo                               # BF16 over shared memory
//! cargo run --release -p grpo -- --trainer-quantize-fp8     # FP8
//! cargo run --release -p grpo -- --compare --jobs 4 --out target/grpo
//! cargo run --release -p grpo -- --delta                    # only what changed travels
//! ```

mod child;
mod compare;
mod group;
mod model;
mod pipe;
mod random;
mod rollout;
mod task;
mod trainer;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Whatever an example's main may end with.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// GRPO on sums, one trainer process and two rollout processes.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Option<Internal>,
    /// What carries the weights: a backend between processes.
    #[arg(long, default_value = "ipc")]
    backend: String,
    /// Send the projections as FP8 blocks.
    #[arg(long)]
    trainer_quantize_fp8: bool,
    /// Send only what changed since the step before. Each step says how much that was; a comparison plots it, too.
    #[arg(long)]
    delta: bool,
    /// Steps of GRPO, each with an update.
    #[arg(long, default_value_t = 127)]
    steps: u64,
    /// Steps of pretraining.
    #[arg(long, default_value_t = 300)]
    pretrain: u64,
    /// Prompts of a step.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    prompts: u16,
    /// Answers to each prompt.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..))]
    group: u32,
    /// GRPO's learning rate.
    #[arg(long, default_value_t = 3e-4)]
    learning_rate: f64,
    /// Truncated importance sampling: weigh each token by trainer's over rollout's probability, at
    /// most this.
    #[arg(long, value_name = "MOST")]
    truncate: Option<f64>,
    /// Decides prompts, samples and the first weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// BF16 and FP8, each with as many seeds as `--seeds`: a table, and a plot of both.
    #[arg(long)]
    compare: bool,
    /// Seeds of a comparison, from `--seed` on.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(2..))]
    seeds: u64,
    /// Runs of a comparison at a time; each is a trainer and its rollouts, with a share of the cores.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    jobs: u16,
    /// The folder for CSV files, table and plot.
    #[arg(long, default_value = "target/grpo")]
    out: PathBuf,
}

#[derive(Subcommand)]
enum Internal {
    /// What the trainer starts.
    #[command(hide = true)]
    Rollout,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let result = match (&args.command, args.compare) {
        (Some(Internal::Rollout), _) => rollout::run().await,
        (None, true) => compare::compare(&args.settings(), args.seeds, args.jobs.into(), &args.out),
        (None, false) => single(&args).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn single(args: &Args) -> Result<(), Failure> {
    std::fs::create_dir_all(&args.out)?;
    let settings = args.settings();
    let run = compare::Run { fp8: settings.fp8, seed: settings.seed };
    let settings = trainer::Settings { csv: Some(run.csv(&args.out)), ..settings };
    let steps = trainer::train(&settings, &run.to_string()).await?;
    eprintln!("{run}: {}", compare::Summary::of(&steps));
    Ok(())
}

impl Args {
    fn settings(&self) -> trainer::Settings {
        trainer::Settings {
            backend: self.backend.clone(),
            fp8: self.trainer_quantize_fp8,
            delta: self.delta,
            steps: self.steps,
            pretrain: self.pretrain,
            prompts: self.prompts.into(),
            group: self.group,
            learning_rate: self.learning_rate,
            truncate: self.truncate,
            seed: self.seed,
            csv: None,
        }
    }
}

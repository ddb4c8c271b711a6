//! `ckpt-engine rollout`: a rollout of a group whose trainer is started elsewhere.

use std::path::PathBuf;
use std::process::ExitCode;

use checkpoint_engine::control::Address;
use checkpoint_engine::{Rank, ReceiveReport};
use clap::Args;
use cli::placed::{PlacedOptions, placed_rollout};
use cli::roles::{RolloutOptions, rollout};

use crate::Failure;
use crate::args::{EngineArgs, MetricsArgs, PlacingArgs, RendezvousArgs};
use crate::output::{report, say};

/// Joins a trainer's group as a rollout and receives its updates.
#[derive(Debug, Args)]
pub(crate) struct RolloutArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    rendezvous: RendezvousArgs,
    #[command(flatten)]
    placing: PlacingArgs,
    /// The model as JSON, as `sync` gives it to rollouts that lend their tensors
    #[arg(long, value_name = "JSON", hide = true, requires = "placed")]
    source_json: Option<String>,
    /// The weights stay the same from one update to the next
    #[arg(long, hide = true, requires = "placed")]
    still: bool,
    /// The rank to take; without it torchrun's RANK, else the trainer gives the next free one
    #[arg(long)]
    rank: Option<u32>,
    /// The number of ranks of the group, the trainer included, to be refused if it is another one;
    /// torchrun's WORLD_SIZE says so without it, else the trainer alone knows
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

pub(crate) async fn rollout_command(args: &RolloutArgs) -> Result<ExitCode, Failure> {
    let _exporter = args.metrics.serve().await?;
    let config = args.engine.config()?;
    let meeting = args.rendezvous.meet(false, config.timeout())?;
    let placing = args.placing.placing()?;
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
    if let Some(placing) = placing {
        let source =
            args.source_json.as_ref().ok_or("--placed: `sync` and `bench` start such rollouts")?;
        let options = PlacedOptions {
            control: meeting.control,
            rank: args.rank.map(Rank).or(meeting.rank).ok_or("--placed: give --rank")?,
            world_size: placing.trainers.ranks + placing.rollouts.ranks,
            config,
            source: serde_json::from_str(source)?,
            placing,
            verify: args.verify,
            still: args.still,
            is_child: args.rendezvous.token_stdin,
        };
        let is_whole = placed_rollout(options, print).await?;
        return Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let options = RolloutOptions {
        control: meeting.control,
        rank: args.rank.map(Rank).or(meeting.rank),
        world_size: args.world_size.or(meeting.world_size),
        config,
        verify: args.verify,
        out: args.out.clone(),
        reserve: args.reserve,
        bare: args.bare,
        hold: args.hold.clone(),
        is_child: args.rendezvous.token_stdin,
    };
    let is_whole = rollout(options, print).await?;
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

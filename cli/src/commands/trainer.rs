//! `ckpt-engine trainer`: one trainer of a group whose other ranks are started elsewhere.

use std::process::ExitCode;
use std::time::Duration;

use checkpoint_engine::control::from_env;
use checkpoint_engine::{ControlPlane, Parts, Rank, Role, Version, form_group, registry};
use clap::Args;
use cli::memory::PeakMemory;
use cli::report_line::line;
use cli::roles::{Announcement, CoTrainerOptions, Trainer, co_trainer};
use cli::source::Source;

use crate::Failure;
use crate::args::{EngineArgs, MetricsArgs, PlacingArgs, RendezvousArgs, SourceArgs};
use crate::commands::plan::as_planned;
use crate::commands::update_line::{print_update, say_source};
use crate::output::{report, say};

/// Leads a group as its trainer, and runs updates with rollouts that are started elsewhere.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  In one shell:
    ckpt-engine trainer --rendezvous localhost:29600 --token-file token --rollouts 2 \\
      --synthetic tiny-moe --updates 3
  In two others:
    ckpt-engine rollout --rendezvous localhost:29600 --token-file token --verify")]
pub(crate) struct TrainerArgs {
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
    placing: PlacingArgs,
    #[command(flatten)]
    rendezvous: RendezvousArgs,
    /// How many rollouts to wait for; torchrun's WORLD_SIZE says so without it, else 1
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    rollouts: Option<u32>,
    /// Seconds between the updates
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    interval: f64,
    /// After each update, have all ranks compute the digest of the version that they have anew from memory, and
    /// compare. Needs --delta, with which ranks keep copies
    #[arg(long)]
    attest: bool,
    /// Print one JSON object a line per update
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    metrics: MetricsArgs,
}

pub(crate) async fn trainer_command(args: &TrainerArgs) -> Result<ExitCode, Failure> {
    let _exporter = args.metrics.serve().await?;
    let mut config = as_planned(args.engine.config()?, &args.source.spec()?)?;
    if let Some(placing) = args.placing.placing()? {
        config = placing.of_trainers(&config)?;
    }
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
            placing: args.placing.placing()?,
            still: args.still,
            is_child: args.rendezvous.token_stdin,
        };
        let is_whole = co_trainer(options, |error| report(error)).await?;
        return Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let registry = registry();
    config.device = cli::device::of_rank(&config.device, 0)?;
    let mut source = Source::open(args.source.spec()?)?.on_device(&config.device);
    if !args.json {
        say_source(&source, &config.backend)?;
    }
    source.advance(Version(1))?;
    let memory = PeakMemory::start()?;
    let world_size = match (args.rollouts, told) {
        (None, None) if args.placing.ranks().is_some() => {
            args.placing.ranks().map_or(2, |(trainers, rollouts)| trainers + rollouts)
        }
        (Some(rollouts), None) => rollouts + 1,
        (_, Some(ranks)) => ranks,
        (None, None) => 2,
    };
    let control = ControlPlane::lead(meeting.control).await?;
    if !args.json {
        say(format!("waiting for {} other ranks at {}", world_size - 1, control.address()))?;
    }
    let (spec, attests) = (source.spec().clone(), args.attest);
    let parts = Parts::of(&config)?;
    let announcement = serde_json::json!(Announcement { source: spec, attests });
    let group = form_group(&registry, config.clone(), &control).attributes(announcement);
    let (engine, _) = group.world_size(world_size).trainer().await?;
    let placing = args.placing.placing()?;
    let shard = placing.map(|placing| placing.shard(&source, Rank::LEADER)).transpose()?;
    let mut trainer = Trainer { engine, source, shard, attests };
    let mut failed = 0;
    for version in (1..=args.source.updates).map(Version) {
        let done = async {
            let report = trainer.update(version).await?;
            let attested = trainer.attest().await;
            let extra = memory.extra_peak_bytes();
            let mut line = line(&report, &trainer.source, &parts, &config.backend, None, extra);
            line.attested_in(attested.as_ref().ok().and_then(Option::as_ref));
            print_update(&line, args.json)?;
            attested
        };
        match done.await {
            Ok(_) => {}
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

//! `ckpt-engine relay`: many ranks of a host on one connection to the trainer.

use std::process::ExitCode;
use std::time::Duration;

use checkpoint_engine::ErrorKind;
use checkpoint_engine::control::{Address, Relay};
use clap::Args;

use crate::Failure;
use crate::args::RendezvousArgs;
use crate::output::say;

/// Carries the control traffic of many rollouts on one connection to the trainer.
///
/// The trainer's own work for a bucket grows with its connections. With a relay on each host, that is the number of
/// hosts, however many rollouts each has. Rollouts join at the relay's address as they would at the trainer's; weights
/// do not pass through it. Ends with the trainer's group.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  On each host, then each of its rollouts:
    ckpt-engine relay --rendezvous trainer:29600 --token-file token --listen unix:@relay
    ckpt-engine rollout --rendezvous unix:@relay --token-file token")]
pub(crate) struct RelayArgs {
    #[command(flatten)]
    rendezvous: RendezvousArgs,
    /// Where rollouts join: HOST:PORT, unix:/path or unix:@name; port 0 for any that is free
    #[arg(long, value_name = "ADDRESS")]
    listen: Address,
    /// Seconds to wait for the trainer, which may start later
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    timeout: f64,
}

pub(crate) async fn relay_command(args: &RelayArgs) -> Result<ExitCode, Failure> {
    let timeout = Duration::try_from_secs_f64(args.timeout)?;
    let meeting = args.rendezvous.meet(false, timeout)?;
    let relay = Relay::start(meeting.control, args.listen.clone()).await?;
    say(format!("rollouts join at {}", relay.address()))?;
    let error = relay.ended().await;
    match error.kind() {
        ErrorKind::TrainerLeft => Ok(ExitCode::SUCCESS),
        _ => Err(error.into()),
    }
}

//! `ckpt-engine bench scale`: how the costs of a group grow.

use std::process::ExitCode;

use checkpoint_engine::control::{Address, Token};
use clap::Args;
use cli::bench::scale::{
    Cost, ScaleLine, Setting, SimulatedLine, exponents, lead, members, scale, simulated,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Failure;
use crate::output::{json_line, say};

/// Measures what a group costs beside the bytes of its weights, and how that grows.
///
/// Rank 0 and the rollouts are processes of their own, connected as any group is: over TCP, encrypted, with the
/// protocol of every transport. Tensors have 8 bytes and their bytes do not travel. What is left is what grows with
/// ranks, tensors and buckets, above all at rank 0, which every rank talks to.
///
/// Rollouts are tasks of one process, so on a small machine 1000 of them take longer than 1000 machines would: processor time
/// is the figure to trust, wall time is not.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  Each quantity by itself, and the exponents of growth:
    ckpt-engine bench scale

  An update of 500 buckets to 1000 rollouts:
    ckpt-engine bench scale --rollouts 1000 --tensors 500 --buckets 500

  The same with a relay for each 64 of them:
    ckpt-engine bench scale --rollouts 1000 --tensors 500 --buckets 500 --behind 64

  What 10 000 rollouts would cost, simulated:
    ckpt-engine bench scale --simulate 10000 --buckets 500 --behind 64

  A million tensors:
    ckpt-engine bench scale --rollouts 1 --tensors 1000000 --buckets 16

How to read it: `forming` is until all ranks have their engines, `first` the update that sends the plan, `later` an
update of the same plan, in the mean. An exponent of 1 is growth in proportion, 2 its square, 0 none.")]
pub(crate) struct ScaleArgs {
    /// The numbers of rollouts, comma-separated
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=4096))]
    rollouts: Vec<u32>,
    /// The numbers of tensors of an update
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    tensors: Vec<u32>,
    /// The numbers of buckets of an update; of settings with fewer tensors than buckets, as many as tensors
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=100_000))]
    buckets: Vec<u32>,
    /// How many rollouts share a relay's connection to rank 0, as those of one host would; 0 without relays
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=4096))]
    behind: u32,
    /// Run the state machines of a group of N rollouts instead, with the costs of frames, messages and buckets that real
    /// ones of 64 and of one have here; of --buckets and --behind the first counts
    #[arg(long, value_name = "N", conflicts_with_all = ["rollouts", "tensors"],
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    simulate: Option<u32>,
    /// Updates that are measured after the first
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..1000))]
    repeats: u32,
    /// Print one JSON object a line per setting and per exponent
    #[arg(long)]
    json: bool,
    /// Be rank 0 of this setting
    #[arg(long, hide = true, value_name = "JSON")]
    lead: Option<String>,
    /// Be so many rollouts
    #[arg(long, hide = true, requires = "at")]
    members: Option<u32>,
    #[arg(long, hide = true, value_name = "ADDRESS")]
    at: Option<Address>,
}

impl ScaleArgs {
    fn settings(&self) -> Vec<Setting> {
        let setting = |rollouts, tensors: u32, buckets: u32| {
            let buckets = buckets.min(tensors);
            Setting { rollouts, tensors, buckets, behind: self.behind, repeats: self.repeats }
        };
        if self.rollouts.is_empty() && self.tensors.is_empty() && self.buckets.is_empty() {
            let rollouts = [1, 4, 16, 64, 256, 1024].map(|n| setting(n, 100, 1));
            let buckets = [8, 32, 128, 500].map(|n| setting(64, 500, n));
            let tensors = [100, 1000, 10_000, 100_000, 1_000_000].map(|n| setting(1, n, 16));
            return rollouts.into_iter().chain(buckets).chain(tensors).collect();
        }
        let or = |given: &[u32], default: u32| match given {
            [] => vec![default],
            given => given.to_vec(),
        };
        let (rollouts, tensors) = (or(&self.rollouts, 1), or(&self.tensors, 500));
        let mut settings = Vec::new();
        for &rollouts in &rollouts {
            for &tensors in &tensors {
                settings
                    .extend(or(&self.buckets, 1).iter().map(|&n| setting(rollouts, tensors, n)));
            }
        }
        settings
    }
}

pub(crate) async fn scale_command(args: &ScaleArgs) -> Result<ExitCode, Failure> {
    if let Some(setting) = &args.lead {
        say(json_line(&lead(serde_json::from_str(setting)?).await?)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let (Some(count), Some(at)) = (args.members, &args.at) {
        let mut secret = Vec::new();
        let input = std::io::Read::take(std::io::stdin(), Token::MAX_BYTES as u64);
        std::io::Read::read_to_end(&mut { input }, &mut secret)?;
        members(count, args.behind, at.clone(), Token::new(&secret)?).await?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(rollouts) = args.simulate {
        let buckets = args.buckets.first().copied().unwrap_or(500);
        let line = simulated(rollouts, args.behind, buckets).await?;
        say(if args.json { json_line(&line)? } else { simulated_row(&line) })?;
        return Ok(ExitCode::SUCCESS);
    }
    let settings = args.settings();
    let bar = ProgressBar::new(settings.len() as u64);
    let bar = match ProgressStyle::with_template("{wide_bar} {pos}/{len} settings, {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    };
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    if !args.json {
        bar.suspend(|| say(HEAD.to_owned()))?;
    }
    let mut lines = Vec::new();
    let measured = scale(&settings, |line| {
        bar.suspend(|| say(if args.json { json_line(line)? } else { row(line) }))?;
        bar.inc(1);
        lines.push(line.clone());
        Ok(())
    });
    let measured = measured.await;
    bar.finish_and_clear();
    measured?;
    for exponent in exponents(&lines) {
        say(match args.json {
            true => json_line(&exponent)?,
            false => format!(
                "{} grows with {} to the {:.2} ({} settings)",
                exponent.cost, exponent.with, exponent.exponent, exponent.points
            ),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

const HEAD: &str = "rollouts tensors buckets | phase: seconds, CPU of rank 0, CPU of all rollouts, frames and bytes at rank 0";

fn simulated_row(line: &SimulatedLine) -> String {
    format!(
        "simulated: {} rollouts, {} behind a relay, {} buckets: {:.2} s of CPU at rank 0 for an update\n  \
         {} frames of {:.1} µs, {} messages of {:.3} µs and {} buckets of {:.1} µs as measured here with 64 rollouts and with \
         one, and {:.2} s of the state machine",
        line.rollouts,
        line.behind,
        line.buckets,
        line.cpu,
        line.frames,
        line.frame_us,
        line.messages,
        line.message_us,
        line.buckets,
        line.bucket_us,
        line.machine
    )
}

fn row(line: &ScaleLine) -> String {
    let Setting { rollouts, tensors, buckets, .. } = line.setting;
    let cost = |phase: &str, cost: &Cost| {
        format!(
            "\n  {phase}: {:.3} s, {:.1} ms, {:.0} ms, {} frames, {} kB",
            cost.seconds,
            cost.cpu * 1e3,
            cost.rollouts_cpu * 1e3,
            cost.frames,
            cost.bytes / 1000
        )
    };
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    format!(
        "{rollouts} {tensors} {buckets}{}{}{}\n  memory: rank 0 {:.1} MiB forming, {:.1} MiB in all; {:.2} MiB a rollout",
        cost("forming", &line.forming),
        cost("first", &line.first),
        cost("later", &line.steady),
        mib(line.forming_memory),
        mib(line.memory),
        mib(line.rollout_memory)
    )
}

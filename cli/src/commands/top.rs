//! `ckpt-engine top`: what the ranks of running updates are doing.

use std::process::ExitCode;
use std::time::Duration;

use checkpoint_engine::ErrorKind;
use clap::Args;
use cli::top;

use crate::Failure;
use crate::output::{report, say};

/// Shows what the ranks of running updates are doing: state, version, rate, and where time goes.
///
/// A rank's line has its version and the version's state, the rate of its last update, how many
/// updates were committed (and aborted: `+1!`), and the mean of each stage. The trainer's endpoint
/// knows the states of all ranks; stage times come from each rank's own.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  In one shell:
    ckpt-engine sync --synthetic qwen2.5-0.5b --rollouts 2 --updates 100 --metrics 127.0.0.1:9400
  In another:
    ckpt-engine top 127.0.0.1:9400 127.0.0.1:9401 127.0.0.1:9402")]
pub(crate) struct TopArgs {
    /// Where processes serve their metrics, as their --metrics says
    #[arg(required = true, value_name = "ADDRESS")]
    addresses: Vec<String>,
    /// Print it once, and end
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
}

pub(crate) async fn top_command(args: &TopArgs) -> Result<ExitCode, Failure> {
    let interval = Duration::try_from_secs_f64(args.interval.max(0.1))?;
    let terminal = console::Term::stdout();
    let mut shown = 0;
    loop {
        let (table, errors) = top::ask(&args.addresses).await;
        if shown == 0 || args.once {
            // Later, processes may end while others go on.
            errors.iter().for_each(|error| report(error));
            if errors.len() == args.addresses.len() {
                return Err(
                    "nothing answers; is there a process with --metrics at this address?".into()
                );
            }
        }
        let mut text = top::render(&table);
        if table.is_empty() {
            text.push_str("no updates yet\n");
        }
        if args.once {
            say(text.trim_end().to_owned())?;
            return Ok(ExitCode::SUCCESS);
        }
        for error in &errors {
            text.push_str(&format!("{error}\n"));
        }
        // Elsewhere than on a terminal, looks follow one another.
        if terminal.is_term() {
            let width = usize::from(terminal.size().1);
            let lines = text.lines().map(|line| console::truncate_str(line, width, "…"));
            text = lines.map(|line| line.into_owned() + "\n").collect();
            terminal.clear_last_lines(shown)?;
        }
        terminal.write_str(&text)?;
        shown = text.lines().count();
        // One that is merely slow to answer has not ended.
        let ended = errors.iter().filter(|error| error.kind() != ErrorKind::Timeout).count();
        if ended == args.addresses.len() {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(interval).await;
    }
}

//! How a command ends: by itself, or by a signal, which it survives only to clean up.

use std::process::ExitCode;

use checkpoint_engine::Error;
use cli::checkpoint::{end_unfinished, is_ending};
use cli::runtime::Runtime;

use crate::Failure;

/// Runs a command to its end or to an interrupt, which it survives only to clean up.
pub(crate) fn until_interrupted(
    command: impl Future<Output = Result<ExitCode, Failure>>,
) -> Result<ExitCode, Failure> {
    let runtime = Runtime::start()?;
    let result = runtime.block_on(async {
        let ended = ending()?;
        tokio::select! {
            result = command => result,
            code = ended => {
                end_unfinished();
                Ok(ExitCode::from(code))
            }
        }
    });
    runtime.end();
    result
}

/// Runs a command that writes files on this thread; a signal that ends the program removes what is not
/// finished first.
pub(crate) fn cleaning_up(
    command: impl FnOnce() -> Result<ExitCode, Failure>,
) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async { ending() })?;
    let wait = move || {
        let code = runtime.block_on(ended);
        end_unfinished();
        std::process::exit(code.into());
    };
    let waits = std::thread::Builder::new().name("signals".into()).spawn(wait);
    waits.map_err(|error| Error::io("starting the thread that waits for signals", error))?;
    let result = command();
    // Its files went while it wrote them: that is no failure to tell of.
    while is_ending() {
        std::thread::park();
    }
    result
}

/// Waits for a signal that ends the program, and gives the exit code that a shell expects then. From the
/// call on, such signals end the program in no other way.
///
/// Signals that the program was started to ignore, as by `nohup`, stay ignored.
fn ending() -> Result<impl Future<Output = u8>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut waits = Vec::new();
    for kind in [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::alarm(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
        // Processor time that a limit ends.
        SignalKind::from_raw(24),
    ] {
        let number = kind.as_raw_value();
        if is_ignored(number) {
            continue;
        }
        let mut signal = signal(kind)?;
        waits.push(Box::pin(async move {
            signal.recv().await;
            128 + u8::try_from(number).unwrap_or(0)
        }));
    }
    // Ignored, so that a limit of the size of files is an error of the write that meets it.
    let too_large = signal(SignalKind::from_raw(25))?;
    Ok(async move {
        let _until_the_end = too_large;
        match waits.is_empty() {
            true => std::future::pending().await,
            false => futures::future::select_all(waits).await.0,
        }
    })
}

/// Whether the program was started with a signal ignored.
fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (number - 1) & 1 == 1
}

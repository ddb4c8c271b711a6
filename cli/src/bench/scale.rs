//! How the costs of a group grow: with its ranks, with the tensors of a model and with its buckets.
//!
//! The control plane and the protocol are the real ones, over TCP and encrypted. Only the transport is not: a bucket is
//! a few bytes of the trainer's memory, and rollouts read zeros. So what is measured is what grows.
//!
//! Each setting has processes of its own: one is rank 0, whose processor time and memory are told apart from those of
//! the rollouts, which are tasks of another one.

mod fit;
mod lead;
mod simulated;
mod tiny;

use std::process::Stdio;

use checkpoint_engine::control::Token;
use checkpoint_engine::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

pub use fit::{Exponent, exponents};
pub use lead::{lead, members};
pub use simulated::{SimulatedLine, simulated};

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Ranks beside the trainer.
    pub rollouts: u32,
    /// Tensors of an update, 8 bytes each.
    pub tensors: u32,
    /// Buckets of an update, at most as many as tensors.
    pub buckets: u32,
    /// How many rollouts share a relay; 0 without relays.
    pub behind: u32,
    /// Updates that are measured after the first.
    pub repeats: u32,
}

/// What a part of a group's life cost.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Seconds that passed.
    pub seconds: f64,
    /// Seconds of processor time of rank 0.
    pub cpu: f64,
    /// Seconds of processor time of all rollouts together, to 10 ms.
    pub rollouts_cpu: f64,
    /// Frames that rank 0 sent and received.
    pub frames: u64,
    /// Bytes that rank 0 sent and received.
    pub bytes: u64,
}

/// One setting's result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScaleLine {
    /// What was measured.
    #[serde(flatten)]
    pub setting: Setting,
    /// From the first connection until rank 0 has its engine.
    pub forming: Cost,
    /// The first update, which plans.
    pub first: Cost,
    /// The mean of the updates after it.
    pub steady: Cost,
    /// The most memory of rank 0 beyond its weights, while the group formed, in bytes.
    pub forming_memory: u64,
    /// The most memory of rank 0 beyond its weights, in bytes.
    pub memory: u64,
    /// The most memory for each rollout, in bytes; the one process that they share is divided among them.
    pub rollout_memory: u64,
}

/// Measures settings, one after the other.
///
/// # Cancel safety
///
/// Dropping the future ends the processes.
///
/// # Errors
///
/// The first failure of any setting.
pub async fn scale(
    settings: &[Setting],
    mut each: impl FnMut(&ScaleLine) -> Result<()>,
) -> Result<()> {
    for setting in settings {
        let mut child = child(&["--lead", &json(setting)?], None).await?;
        let output = child.stdout.take();
        let said = read(output).await?;
        let status = child.wait().await.map_err(failed)?;
        let line = match status.success() {
            true => serde_json::from_str(&said).ok(),
            false => None,
        };
        let line = line.ok_or_else(|| {
            let message = format!("the process of rank 0 ended: {status}");
            Error::new(ErrorKind::Aborted, MEASURING, message)
        })?;
        each(&line)?;
    }
    Ok(())
}

const MEASURING: &str = "measuring how costs grow";

fn failed(error: std::io::Error) -> Error {
    Error::io(MEASURING, error)
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| failed(std::io::Error::other(error)))
}

/// Starts this program as a part of a measurement. The secret goes through its standard input.
async fn child(arguments: &[&str], token: Option<&Token>) -> Result<Child> {
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = Command::new(program);
    command.args(["bench", "scale"]).args(arguments).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    if let (Some(mut input), Some(token)) = (child.stdin.take(), token) {
        input.write_all(token.expose()).await.map_err(failed)?;
    }
    Ok(child)
}

async fn read(from: Option<impl tokio::io::AsyncRead + Unpin>) -> Result<String> {
    use tokio::io::AsyncReadExt;
    let mut said = String::new();
    if let Some(mut from) = from {
        from.read_to_string(&mut said).await.map_err(failed)?;
    }
    Ok(said)
}

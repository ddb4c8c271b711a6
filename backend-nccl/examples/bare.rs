//! What a bare `ncclBroadcast` of one bucket, repeated, reaches between processes: the figure that updates
//! over NCCL are compared with.
//!
//! ```text
//! bare RANKS [MIB [REPEATS]]
//! ```
//!
//! Rank r takes GPU r, and the ranks share GPUs if there are fewer. Prints a line of JSON.

use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};

use backend_nccl::bare::{Broadcasts, broadcasts, group_id};
use engine_core::{DeviceChoice, Error, ErrorKind, Result};

/// Broadcasts that are timed together.
const BATCH: u32 = 8;
const RANK: &str = "CKPT_ENGINE_BARE_RANK";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn argument(at: usize, default: u32) -> u32 {
    std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn failed(error: std::io::Error) -> Error {
    Error::io("running ranks", error)
}

#[allow(clippy::print_stdout, reason = "a program that says what it measured")]
fn run() -> Result<()> {
    let (ranks, mib, repeats) = (argument(1, 2), argument(2, 256), argument(3, 11));
    let bytes = u64::from(mib) << 20;
    let rank: Option<u32> = std::env::var(RANK).ok().and_then(|rank| rank.parse().ok());
    let mut children = Vec::new();
    let id = if rank.is_some() {
        let mut id = Vec::new();
        std::io::stdin().read_to_end(&mut id).map_err(failed)?;
        id
    } else {
        let id = group_id(None)?;
        for rank in 1..ranks {
            let mut command = Command::new(std::env::current_exe().map_err(failed)?);
            command.args(std::env::args().skip(1)).env(RANK, rank.to_string());
            let mut child = command.stdin(Stdio::piped()).spawn().map_err(failed)?;
            if let Some(mut input) = child.stdin.take() {
                input.write_all(&id).map_err(failed)?;
            }
            children.push(child);
        }
        id
    };
    let rank = rank.unwrap_or(0);
    let gpus = u32::try_from(device_cuda::count()?).unwrap_or(0).max(1);
    let device = DeviceChoice::new("cuda", rank % gpus);
    let what = Broadcasts { device, id, ranks, rank, bytes, batch: BATCH, repeats };
    let mut seconds = futures::executor::block_on(broadcasts(None, what))?;
    for mut child in children {
        if !child.wait().map_err(failed)?.success() {
            let message = "a rank failed";
            return Err(Error::new(ErrorKind::Aborted, "running ranks", message));
        }
    }
    if rank == 0 {
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        println!(
            "{{\"what\":\"bare ncclBroadcast\",\"ranks\":{ranks},\"bytes\":{bytes},\"seconds\":{median:.6},\
             \"gb_per_s\":{:.2},\"least\":{:.2},\"most\":{:.2}}}",
            bytes as f64 / 1e9 / median,
            bytes as f64 / 1e9 / seconds[seconds.len() - 1],
            bytes as f64 / 1e9 / seconds[0],
        );
    }
    Ok(())
}

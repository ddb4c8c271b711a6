//! `ckpt-engine doctor --backend hccl`: tries HCCL, without a group of engines.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use checkpoint_engine::hccl::doctor;

use crate::{Failure, json_line, say};

/// What to try.
#[derive(Debug)]
pub(crate) struct HcclArgs {
    pub(crate) library_dir: Option<PathBuf>,
    pub(crate) json: bool,
    /// Set in the processes that it starts.
    pub(crate) task: Option<String>,
}

pub(crate) fn hccl_command(args: &HcclArgs) -> Result<ExitCode, Failure> {
    let library_dir = args.library_dir.as_ref().map(std::path::absolute).transpose()?;
    if let Some(task) = &args.task {
        doctor::child(library_dir.as_deref(), task)?;
        return Ok(ExitCode::SUCCESS);
    }
    let program = std::env::current_exe()?;
    let child = |task: &str| {
        let mut command = Command::new(&program);
        command.args(["doctor", "--backend", "hccl", "--task", task]);
        if let Some(folder) = &library_dir {
            command.arg("--hccl-lib").arg(folder);
        }
        command
    };
    let found = doctor::examine(library_dir.as_deref(), &child);
    if args.json {
        say(json_line(&found)?)?;
    } else {
        let label = if found.simulated { "simulated: " } else { "" };
        for check in &found.checks {
            say(format!("{label}{} {}: {}", check.verdict, check.name, check.details))?;
        }
    }
    Ok(if found.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

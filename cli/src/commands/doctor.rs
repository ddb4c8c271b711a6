//! `ckpt-engine doctor`: which backends can run here, and whether servers can be sent to. HCCL is tried in full, without a
//! group of engines.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use checkpoint_engine::backend::Availability;
use checkpoint_engine::hccl::doctor;
use checkpoint_engine::registry;
use clap::Args;

use crate::Failure;
#[cfg(feature = "cuda")]
use crate::ending::until_interrupted;
use crate::output::{json_line, say};

/// Says which backends can run on this machine, and what the others need.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Ask an inference server whether it can be sent to, such as http://127.0.0.1:8000; may be given several
    /// times. Nothing is changed there
    #[cfg(feature = "cuda")]
    #[arg(long = "server", value_name = "URL", conflicts_with = "backend")]
    servers: Vec<checkpoint_engine::receivers::ServerUrl>,
    /// A file with the key that the servers ask for
    #[cfg(feature = "cuda")]
    #[arg(long, value_name = "FILE", requires = "servers")]
    api_key_file: Option<PathBuf>,
    /// Try this backend as thoroughly as can be; only hccl can be tried without a group
    #[arg(long, value_name = "NAME", value_parser = ["hccl"])]
    backend: Option<String>,
    /// The folder of libascendcl.so and libhccl.so: CANN's, or a simulator's
    #[arg(long, value_name = "PATH", requires = "backend")]
    hccl_lib: Option<PathBuf>,
    /// What a process that the doctor starts does
    #[arg(long, hide = true, requires = "backend")]
    task: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn doctor_command(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    #[cfg(feature = "cuda")]
    if !args.servers.is_empty() {
        return until_interrupted(servers_command(args));
    }
    if args.backend.is_some() {
        let hccl = HcclArgs {
            library_dir: args.hccl_lib.clone(),
            json: args.json,
            task: args.task.clone(),
        };
        return hccl_command(&hccl);
    }
    let backends: Vec<(&str, &str, Availability)> = registry()
        .backends()
        .map(|backend| (backend.name(), backend.summary(), backend.probe()))
        .collect();
    if args.json {
        let backends: serde_json::Map<String, serde_json::Value> = backends
            .iter()
            .map(|(name, summary, found)| {
                let mut value = serde_json::json!(found);
                value["summary"] = (*summary).into();
                ((*name).to_owned(), value)
            })
            .collect();
        let devices = cli::device::describe();
        say(serde_json::json!({ "backends": backends, "devices": devices }).to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    for line in cli::device::describe() {
        say(line)?;
    }
    for (name, summary, found) in backends {
        say(format!("{name}: {summary}"))?;
        match found {
            Availability::Usable { details } => say(format!("  usable: {details}"))?,
            Availability::Unusable { reason, remedy } => {
                say(format!("  not usable: {reason}\n  to change that: {remedy}"))?;
            }
            other => say(format!("  {other:?}"))?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Looks at servers.
#[cfg(feature = "cuda")]
async fn servers_command(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    const LIMIT: std::time::Duration = std::time::Duration::from_secs(10);
    let key = args.api_key_file.as_deref().map(checkpoint_engine::receivers::ApiKey::read);
    let key = key.transpose()?;
    let mut passed = true;
    let mut all = serde_json::Map::new();
    for server in &args.servers {
        let (_, checks) = checkpoint_engine::receivers::examine(server, key.as_ref(), LIMIT).await;
        passed &= checks.iter().all(|check| check.passed);
        if !args.json {
            for check in &checks {
                let verdict = if check.passed { "ok" } else { "failed" };
                say(format!("{server}: {verdict} {}: {}", check.name, check.details))?;
            }
        }
        all.insert(server.to_string(), serde_json::json!(checks));
    }
    if args.json {
        say(serde_json::json!({ "servers": all }).to_string())?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What to try.
#[derive(Debug)]
struct HcclArgs {
    library_dir: Option<PathBuf>,
    json: bool,
    /// Set in the processes that it starts.
    task: Option<String>,
}

fn hccl_command(args: &HcclArgs) -> Result<ExitCode, Failure> {
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

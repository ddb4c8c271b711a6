//! What it takes to test and measure on a machine that has CUDA and no Rust, in one folder.

use std::fs;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Result;
use crate::process::{run, stage};
use crate::workspace::Workspace;

/// What runs there: on one GPU, and on several of one host.
const SCRIPTS: [(&str, &str); 2] = [
    ("run.sh", include_str!("../tools/gpu.sh")),
    ("several.sh", include_str!("../tools/several-gpus.sh")),
];

/// Tests that need a GPU: package, features, and the test.
const TESTS: [(&str, &str, &str); 7] = [
    ("cli", "", "sync"),
    ("device-cuda", "", "gpu"),
    ("backend-ipc", "cuda", "cuda"),
    ("backend-nccl", "", "cuda"),
    ("backend-nccl", "", "processes"),
    ("backend-nixl", "cuda", "cuda"),
    ("backend-nixl", "cuda", "gone"),
];

/// Programs that measure what others are compared with: package and example.
const EXAMPLES: [(&str, &str); 2] = [("device-cuda", "throughput"), ("backend-nccl", "bare")];

/// Builds programs and tests for this machine's architecture and puts them into a folder with a script
/// that runs them.
pub(crate) fn build(workspace: &Workspace, folder: Option<&Path>) -> Result<()> {
    let folder = match folder {
        Some(folder) => folder.to_owned(),
        None => workspace.target().join("gpu-bundle"),
    };
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    fs::create_dir_all(&folder).map_err(failed)?;

    let mut program = workspace.cargo();
    program.args(["build", "--release", "--locked", "-p", "cli"]);
    stage("program", program)?;
    let built = workspace.target().join("release/ckpt-engine");
    put(&built, &folder.join("ckpt-engine"))?;
    for (package, features, test) in TESTS {
        let mut command = workspace.cargo();
        command.args(["test", "--release", "--locked", "--no-run", "-p", package]);
        command.args(["--features", features, "--test", test, "--message-format", "json"]);
        put(&executable(command, test)?, &folder.join(format!("{package}-{test}")))?;
    }
    for (package, example) in EXAMPLES {
        let mut command = workspace.cargo();
        command.args(["build", "--release", "--locked", "-p", package, "--example", example]);
        stage(example, command)?;
        let built = workspace.target().join("release/examples").join(example);
        put(&built, &folder.join(example))?;
    }
    for (name, script) in SCRIPTS {
        fs::write(folder.join(name), script).map_err(failed)?;
    }
    let bytes: u64 = fs::read_dir(&folder)
        .map_err(failed)?
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .map(|metadata| metadata.len())
        .sum();
    println!("{}: {:.1} MB; on the GPU machine: bash run.sh", folder.display(), bytes as f64 / 1e6);
    Ok(())
}

/// The executable that cargo says it made of a target.
fn executable(mut command: Command, target: &str) -> Result<PathBuf> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cargo could not be started: {error}"))?;
    let mut found = None;
    if let Some(output) = child.stdout.take() {
        for line in std::io::BufReader::new(output).lines().map_while(std::result::Result::ok) {
            let Ok(message) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
            let path = message["executable"].as_str();
            if let Some(path) = path.filter(|_| message["target"]["name"] == target) {
                found = Some(PathBuf::from(path));
            }
        }
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    found.filter(|_| status.success()).ok_or_else(|| "a test could not be built".into())
}

/// Copies an executable without its debug information.
fn put(from: &Path, to: &Path) -> Result<()> {
    let mut strip = Command::new("strip");
    strip.args([Path::new("-o"), to, from]);
    run(strip)
}

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

/// Tests that need a GPU: package and test.
const TESTS: [(&str, &str); 11] = [
    ("checkpoint-engine-cli", "sync"),
    ("checkpoint-engine-cuda", "gpu"),
    ("e5m2", "encoding"),
    ("checkpoint-engine-ipc", "cuda"),
    ("checkpoint-engine-ipc", "cuda_processes"),
    ("checkpoint-engine-ipc", "placed"),
    ("checkpoint-engine-ipc", "placed_cuda"),
    ("checkpoint-engine-nccl", "cuda"),
    ("checkpoint-engine-nccl", "processes"),
    ("checkpoint-engine-nixl", "cuda"),
    ("checkpoint-engine-nixl", "gone"),
];

/// Programs that measure what others are compared with: package and example.
const EXAMPLES: [(&str, &str); 2] =
    [("checkpoint-engine-cuda", "throughput"), ("checkpoint-engine-nccl", "bare")];

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
    program.args(["build", "--release", "--locked", "-p", "checkpoint-engine-cli"]);
    stage("program", program)?;
    let built = workspace.target().join("release/ckpt-engine");
    put(&built, &folder.join("ckpt-engine"))?;
    for (package, test) in TESTS {
        let mut command = workspace.cargo();
        command.args(["test", "--release", "--locked", "--no-run", "-p", package]);
        command.args(["--all-features", "--test", test, "--message-format", "json"]);
        let short = package.trim_start_matches("checkpoint-engine-");
        put(&executable(command, test)?, &folder.join(format!("test-{short}-{test}")))?;
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
pub(crate) fn put(from: &Path, to: &Path) -> Result<()> {
    let mut strip = Command::new("strip");
    strip.args([Path::new("-o"), to, from]);
    run(strip)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    /// A suite of four cases: one passes, one fails, and one crashes after it has passed, before the last.
    const SUITE: &str = r#"#!/bin/bash
if [ "$1" = --list ]; then
    printf '%s: test\n' good bad crash last
    exit
fi
echo "$2" >>ran
echo "the words of $2"
[ "$2" = bad ] && exit 101
[ "$2" = crash ] && kill -SEGV $$
exit 0
"#;

    #[test]
    fn a_case_that_crashes_fails_by_its_name_and_all_others_run() {
        use std::os::unix::fs::PermissionsExt;
        let folder = std::env::temp_dir().join(format!("ckpt-engine-suite-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let program = folder.join("test-some");
        fs::write(&program, SUITE).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let script = folder.join("run.sh");
        fs::write(&script, SCRIPTS[0].1).unwrap();
        let ran = Command::new("bash").arg(&script).args(["suite", "test-some"]).output().unwrap();
        let said = String::from_utf8(ran.stdout).unwrap();
        let cases = fs::read_to_string(folder.join("ran")).unwrap();
        let mut cases: Vec<_> = cases.lines().collect();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(ran.status.code(), Some(1), "{said}");
        for line in [
            "== test-some: 4 cases",
            "FAILED: test-some bad: exit status 101",
            "FAILED: test-some crash: killed by signal 11",
            "FAILED: test-some: 2 cases",
            "the words of crash",
        ] {
            assert!(said.contains(line), "no `{line}` in:\n{said}");
        }
        assert!(!said.contains("the words of good"), "{said}");
        cases.sort_unstable();
        assert_eq!(cases, ["bad", "crash", "good", "last"]);
    }
}

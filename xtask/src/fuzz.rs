//! `cargo xtask fuzz`: libFuzzer on everything that decodes bytes from outside.
//!
//! libFuzzer needs counters in the code, which the pinned stable compiler can add; a sanitizer of memory it cannot,
//! and the decoders have no unsafe code. `cargo fuzz run TARGET -s none` does the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;

use crate::Result;
use crate::bundle::put;
use crate::process::{quiet_stage, run as run_command, stage};
use crate::workspace::Workspace;

/// What has the compiler add libFuzzer's counters.
const COVERAGE: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Runs the targets of a bundle.
const SCRIPT: &str = include_str!("../tools/fuzz.sh");

/// No answer to so few bytes takes longer, also on a busy machine.
const SECONDS_OF_AN_INPUT: u32 = 25;
const MEGABYTES: u32 = 2048;
const LONGEST_INPUT: u32 = 4096;

/// Optimising takes longer than a shorter run.
const SECONDS_THAT_PAY: u32 = 60;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A target of `fuzz/fuzz_targets`; all of them without it, as many at a time as there are processors
    target: Option<String>,

    /// How long each target runs; with 0, only what is in its corpus does
    #[arg(long, default_value_t = 10)]
    seconds: u32,

    /// What the inputs depend on; the time of day without it
    #[arg(long)]
    seed: Option<u32>,

    /// Run nothing: put the targets, their corpora and a script that runs them, all at once, into this folder, for a
    /// machine that has many cores and no Rust
    #[arg(long, value_name = "FOLDER", conflicts_with = "seed")]
    bundle: Option<PathBuf>,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let all = targets(workspace)?;
    let chosen: Vec<&String> = match &options.target {
        None => all.iter().collect(),
        Some(name) => all.iter().filter(|target| *target == name).collect(),
    };
    if chosen.is_empty() {
        return Err(format!("the targets are {}", all.join(", ")));
    }
    let host = host(workspace)?;
    let target_dir = workspace.target().join("fuzz");
    let manifest = workspace.root().join("fuzz/Cargo.toml");
    let mut build = workspace.cargo();
    // For a named machine, so that build scripts and macros get no counters.
    build.args(["build", "--release", "--locked", "--target", &host]);
    build.arg("--manifest-path").arg(&manifest).arg("--target-dir").arg(&target_dir);
    if let Some(name) = &options.target {
        build.args(["--bin", name]);
    }
    build.env("RUSTFLAGS", COVERAGE);
    if options.seconds < SECONDS_THAT_PAY && options.bundle.is_none() {
        build.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
        build.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        build.env("CARGO_PROFILE_RELEASE_DEBUG", "false");
    }
    stage("building", build)?;
    let programs = target_dir.join(&host).join("release");
    if let Some(folder) = &options.bundle {
        return pack(workspace, folder, &programs, &chosen);
    }

    let seed = options.seed.unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.subsec_nanos().max(1))
    });
    let fuzz = |name: &String| -> Result<Command> {
        // What is found goes to the first folder; the others are read.
        let found = target_dir.join("corpus").join(name);
        let kept = workspace.root().join("fuzz/corpus").join(name);
        let artifacts = target_dir.join("artifacts").join(name);
        for folder in [&found, &artifacts] {
            fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        let mut fuzz = Command::new(programs.join(name));
        fuzz.arg(&found).args(Some(kept).filter(|folder| folder.is_dir()));
        match options.seconds {
            0 => fuzz.arg("-runs=0"),
            seconds => fuzz.arg(format!("-max_total_time={seconds}")),
        };
        fuzz.arg(format!("-seed={seed}"));
        fuzz.arg(format!("-timeout={SECONDS_OF_AN_INPUT}"));
        fuzz.arg(format!("-rss_limit_mb={MEGABYTES}"));
        fuzz.arg(format!("-max_len={LONGEST_INPUT}"));
        fuzz.arg(format!("-artifact_prefix={}/", artifacts.display()));
        fuzz.args(["-print_final_stats=1", "-verbosity=0"]);
        fuzz.current_dir(workspace.root());
        Ok(fuzz)
    };
    let explained = |name: &String, error: String| {
        let artifacts = target_dir.join("artifacts").join(name);
        format!(
            "{error}\n{name}: the input is above, and in {}; keep it in fuzz/corpus/{name} with the fix",
            artifacts.display()
        )
    };
    if let [name] = chosen[..] {
        return stage(name, fuzz(name)?).map_err(|error| explained(name, error));
    }
    // A target has one thread. When one has failed, no other begins.
    let left = Mutex::new((chosen.into_iter(), None::<String>));
    let lock = || left.lock().unwrap_or_else(PoisonError::into_inner);
    let next = || {
        let (targets, failure) = &mut *lock();
        targets.next().filter(|_| failure.is_none())
    };
    let at_a_time = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                while let Some(name) = next() {
                    let ran = fuzz(name).and_then(|fuzz| quiet_stage(name, fuzz));
                    if let Err(error) = ran {
                        lock().1.get_or_insert(explained(name, error));
                    }
                }
            });
        }
    });
    let (_, failure) = left.into_inner().unwrap_or_else(PoisonError::into_inner);
    failure.map_or(Ok(()), Err)
}

/// Puts what runs elsewhere into a folder.
fn pack(workspace: &Workspace, folder: &Path, programs: &Path, targets: &[&String]) -> Result<()> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    fs::create_dir_all(folder.join("bin")).map_err(failed)?;
    for name in targets {
        put(&programs.join(name), &folder.join("bin").join(name))?;
    }
    let mut corpora = Command::new("cp");
    corpora.args(["-r", "-T"]).arg(workspace.root().join("fuzz/corpus")).arg(folder.join("corpus"));
    run_command(corpora)?;
    fs::write(folder.join("run.sh"), SCRIPT).map_err(failed)?;
    println!("{}; on the other machine: bash run.sh SECONDS", folder.display());
    Ok(())
}

/// The names of all targets.
fn targets(workspace: &Workspace) -> Result<Vec<String>> {
    let folder = workspace.root().join("fuzz/fuzz_targets");
    let entries =
        std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(PathBuf::from(entry.ok()?.file_name())))
        .filter(|name| name.extension().is_some_and(|extension| extension == "rs"))
        .filter_map(|name| Some(name.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// The kind of machine that the compiler builds for by itself.
fn host(workspace: &Workspace) -> Result<String> {
    let mut version = Command::new("rustc");
    let output = version.arg("-vV").current_dir(workspace.root()).output();
    let output = output.map_err(|error| format!("rustc: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or_else(|| "rustc does not say what it builds for".into())
}

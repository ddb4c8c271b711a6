//! `cargo xtask faults`: builds the program, and has `faults/` do to it what networks and machines do.

use std::path::PathBuf;
use std::process::Command;

use clap::Args;

use crate::process::stage;
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;
use crate::{Result, tools};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// kill, stop, flip, mitm, cut, exhaustion or soak; all of them without any
    #[arg(value_name = "CLASS")]
    classes: Vec<String>,

    /// What the choices of all cases depend on; a random one without it, which is printed
    #[arg(long)]
    seed: Option<u32>,

    /// How long, of all classes together
    #[arg(long, default_value_t = 3.0)]
    minutes: f64,

    /// Only this case of the class: what a failure prints
    #[arg(long)]
    case: Option<u32>,

    /// Only this transport: ipc, nixl or nixl-tcp
    #[arg(long)]
    backend: Option<String>,

    /// How long paths are cut, in the class `cut`
    #[arg(long)]
    seconds: Option<f64>,

    /// What happens to the network, in the class `cut`
    #[arg(long)]
    kind: Option<String>,

    /// Tests an optimised build
    #[arg(long)]
    release: bool,

    /// Tests a program that is there, and builds none
    #[arg(long, value_name = "FILE", conflicts_with = "release")]
    program: Option<PathBuf>,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::prepare(workspace, &[Purpose::Faults])?;
    let program = match &options.program {
        Some(program) => program.clone(),
        None => built(workspace, options.release)?,
    };
    let mut faults = Command::new("python3");
    faults.arg(workspace.root().join("faults")).args(&options.classes);
    faults.arg("--program").arg(program);
    faults.arg("--minutes").arg(options.minutes.to_string());
    let numbers = [("--seed", options.seed), ("--case", options.case)];
    for (name, number) in numbers {
        faults
            .args(number.map(|number| [name.to_owned(), number.to_string()]).into_iter().flatten());
    }
    let seconds = options.seconds.map(|seconds| seconds.to_string());
    let texts =
        [("--seconds", &seconds), ("--kind", &options.kind), ("--backend", &options.backend)];
    for (name, text) in texts {
        faults.args(text.iter().flat_map(|text| [name, text]));
    }
    if std::env::var_os(tools::NIXL_DIR).is_none() {
        faults.env(tools::NIXL_DIR, tools::nixl(workspace));
    }
    faults.env("PYTHONDONTWRITEBYTECODE", "1");
    stage("faults", faults)
}

fn built(workspace: &Workspace, release: bool) -> Result<PathBuf> {
    let mut build = workspace.cargo();
    build.args(["build", "--locked", "--bin", "ckpt-engine"]);
    build.args(release.then_some("--release"));
    stage("building", build)?;
    let profile = if release { "release" } else { "debug" };
    Ok(workspace.target().join(profile).join("ckpt-engine"))
}

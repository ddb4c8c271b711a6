//! The Python package under the real verl.

use std::process::Command;

use crate::process::stage;
use crate::workspace::Workspace;
use crate::{Result, python, tools};

/// Installs what is missing, and runs verl's manager and workers with the package as their backend.
///
/// Over NIXL as well where it is installed: that is `cargo xtask setup`'s to do.
pub(crate) fn update(workspace: &Workspace) -> Result<()> {
    if !tools::has_torch(workspace) {
        println!("installing PyTorch");
        tools::install_torch(workspace)?;
    }
    if !tools::has_verl(workspace) {
        println!("installing verl: the wheels that xtask/tools/verl.txt pins");
        tools::install_verl(workspace)?;
    }
    let package = python::build(workspace)?;
    let path = std::env::join_paths([&package, &tools::verl(workspace)])
        .map_err(|error| format!("{}: {error}", package.display()))?;
    let mut script = Command::new(tools::torch_python(workspace));
    script.arg(workspace.root().join("xtask/tools/verl_cpu.py"));
    script.arg("ipc");
    if tools::has_nixl(workspace) {
        script.arg("nixl").env("CKPT_ENGINE_NIXL_DIR", tools::nixl(workspace));
    }
    script.env("PYTHONPATH", path).env("PYTHONDONTWRITEBYTECODE", "1");
    stage("verl", script)
}

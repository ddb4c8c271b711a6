//! The Python package: its tests, and its wheel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{run, stage};
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;
use crate::{Result, tools};

pub(crate) fn prepare_and_test(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    setup::prepare(workspace, &[Purpose::Tests, Purpose::Faults])?;
    test(workspace, arguments)
}

/// Builds the native module as everything else is built for the tests, and runs pytest on the package.
///
/// No wheel is built for it: that would build all crates once more.
pub(crate) fn test(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    if !tools::has_torch(workspace) || !tools::has_pytest(workspace) {
        println!(
            "\n-- the Python package: ignored, PyTorch or pytest is not installed (see above)"
        );
        return Ok(());
    }
    let folder = build(workspace)?;
    let tools = tools::pytest(workspace);
    let path = std::env::join_paths([&folder, &tools])
        .map_err(|error| format!("{}: {error}", folder.display()))?;
    let package = workspace.root().join("python");
    let mut pytest = Command::new(tools::torch_python(workspace));
    pytest.args(["-m", "pytest", "-p", "no:cacheprovider", "--rootdir"]).arg(&package);
    pytest.arg("-c").arg(package.join("pyproject.toml"));
    if arguments.iter().all(|argument| argument.starts_with('-')) {
        pytest.arg(package.join("tests"));
    }
    pytest.args(arguments).env("PYTHONPATH", path).env("PYTHONDONTWRITEBYTECODE", "1");
    if tools::has_nixl(workspace) {
        pytest.env(tools::NIXL_DIR, tools::nixl(workspace));
    }
    pytest.current_dir(workspace.root());
    stage("tests of the Python package", pytest)
}

/// The folder with the package as it is installed: its modules, and the native one.
pub(crate) fn build(workspace: &Workspace) -> Result<PathBuf> {
    let mut build = workspace.cargo();
    // All libraries, and a test: so dependencies have the features that they have in tests, and what those have built is used.
    // Of this package alone, 80 crates would be built anew.
    build.args(["build", "--workspace", "--lib", "--test", "guide"]);
    stage("the Python package", build)?;
    let folder = workspace.target().join("python");
    let package = folder.join("ckpt_engine");
    if package.exists() {
        fs::remove_dir_all(&package).map_err(|error| format!("{}: {error}", package.display()))?;
    }
    copy(&workspace.root().join("python/ckpt_engine"), &package)?;
    let library = workspace.target().join("debug/lib_native.so");
    let module = package.join("_native.abi3.so");
    fs::copy(&library, module).map_err(|error| format!("{}: {error}", library.display()))?;
    Ok(folder)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let failed = |error: std::io::Error| format!("{}: {error}", from.display());
    fs::create_dir_all(to).map_err(failed)?;
    for entry in fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name() == "__pycache__" {
            continue;
        }
        let target = to.join(entry.file_name());
        if entry.file_type().map_err(failed)?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target).map_err(failed)?;
        }
    }
    Ok(())
}

/// The oldest C library that the wheel runs with, as PyTorch's wheels.
const MANYLINUX: &str = "manylinux_2_28";

/// The wheel, in target/wheels.
pub(crate) fn wheel(workspace: &Workspace) -> Result<()> {
    setup::prepare(workspace, &[Purpose::Wheel])?;
    let mut maturin = Command::new(tools::maturin(workspace));
    maturin.args(["build", "--release", "--locked", "--manifest-path"]);
    maturin.arg(workspace.root().join("python/Cargo.toml"));
    // Linked as for that C library, whatever this machine has, and then checked: a symbol that is newer is an error.
    maturin.args(["--zig", "--compatibility", MANYLINUX, "--auditwheel", "check", "--target"]);
    maturin.arg(format!("{}-unknown-linux-gnu", std::env::consts::ARCH)).arg("--out");
    maturin.arg(workspace.target().join("wheels"));
    maturin.env("CARGO_ZIGBUILD_ZIG_PATH", tools::zig(workspace));
    maturin.env("CARGO_TARGET_DIR", workspace.target()).current_dir(workspace.root());
    run(maturin)
}

//! What inference engines themselves say of this project's FP8 plans and checkpoints.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::process::run;
use crate::tools;
use crate::workspace::Workspace;

/// Of the engines only functions are run, which need nothing of what their wheels declare.
const ENGINES: [&str; 2] = ["vllm", "sglang"];

/// Beside what transformers itself declares, without what PyTorch would bring along.
const TRANSFORMERS: [&str; 2] = ["transformers", "psutil"];

/// Takes the newest wheels and compares: not a part of any test, because they are large and change.
pub(crate) fn compare(workspace: &Workspace) -> Result<()> {
    if !tools::has_torch(workspace) {
        tools::install_torch(workspace)?;
    }
    let python = tools::torch_python(workspace);
    let folder = workspace.target().join("receivers");
    let wheels = folder.join("wheels");
    fs::create_dir_all(&wheels).map_err(|error| format!("{}: {error}", wheels.display()))?;
    let pip = |arguments: &[&str]| {
        let mut pip = Command::new(&python);
        pip.args(["-m", "pip", "--quiet", "--disable-pip-version-check"]).args(arguments);
        pip
    };
    let mut download = pip(&["download", "--no-deps", "--only-binary", ":all:", "--dest"]);
    download.arg(&wheels).args(ENGINES);
    run(download)?;
    // In a folder of its own, and without PyTorch, which is there: its wheel would bring gigabytes of CUDA.
    let packages = folder.join("packages");
    let to_packages = |extra: &[&str]| {
        let mut install = pip(&["install", "--upgrade", "--only-binary", ":all:", "--target"]);
        install.arg(&packages).args(extra);
        install
    };
    run(to_packages(&TRANSFORMERS))?;
    run(to_packages(&["--no-deps", "accelerate"]))?;
    let mut unpacked = Vec::new();
    for engine in ENGINES {
        unpacked.push(unpack(&python, &wheels, engine, &folder)?);
    }
    let mut build = workspace.cargo();
    build.args(["build", "--quiet", "--package", "checkpoint-engine-cli"]);
    run(build)?;
    let mut script = Command::new(&python);
    script.arg(workspace.root().join("xtask/tools/receivers.py"));
    script.arg(workspace.target().join("debug/ckpt-engine"));
    script.arg(workspace.root().join("quant-fp8/tests/data/architectures.tsv"));
    script.args(unpacked).arg(folder.join("work")).env("PYTHONPATH", packages);
    run(script)
}

/// The folder that the newest wheel of an engine is unpacked to.
fn unpack(python: &Path, wheels: &Path, engine: &str, folder: &Path) -> Result<PathBuf> {
    let list = fs::read_dir(wheels).map_err(|error| format!("{}: {error}", wheels.display()))?;
    let is_of = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(&format!("{engine}-")))
    };
    let modified = |path: &PathBuf| fs::metadata(path).and_then(|data| data.modified()).ok();
    let newest = list.flatten().map(|entry| entry.path()).filter(is_of).max_by_key(modified);
    let wheel = newest.ok_or_else(|| format!("{}: no wheel of {engine}", wheels.display()))?;
    let name = wheel.file_stem().unwrap_or_default();
    println!("{}", name.to_string_lossy());
    let to = folder.join(name);
    if !to.is_dir() {
        let mut unpack = Command::new(python);
        unpack.args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(&to);
        run(unpack)?;
    }
    Ok(to)
}

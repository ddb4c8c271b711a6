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
        stage("mistakes that the tests of backend-hccl notice", mutations(workspace))?;
        with_extras(workspace, options)?;
        python::test(workspace, &[])?;
    }
    Ok(())
}

/// The tests of backend-hccl against engines with mistakes that only a feature compiles in.
fn mutations(workspace: &Workspace) -> Command {
    if !has_nextest(workspace) {
        let mut command = workspace.cargo();
        command.args(["test", "--package", "checkpoint-engine-hccl", "--features", "mutations"]);
        command.args(["--test", "conformance", "mutations::"]);
        return command;
    }
    let mut command = run_nextest(workspace);
    command.args(["--workspace", "--features", "checkpoint-engine-hccl/mutations"]);
    command.args(["--test", "conformance"]);
    command.args(["-E", "package(=checkpoint-engine-hccl) & test(mutations::)"]);
    command
}

/// Tests that are ignored elsewhere, because they need what only the set-up brings.
fn with_extras(workspace: &Workspace, options: &Options) -> Result<()> {
    if requires_all(options) {
        return Ok(()); // They ran with the others.
    }
    let has =
        |is_there: bool| is_there.then_some(()).ok_or("it is not installed (see above)".to_owned());
    let torch = tools::has_torch(workspace);
    let pyzmq = torch && tools::has_pyzmq(workspace);
    let nvrtc = tools::has_nvrtc(workspace);
    let headers = tools::has_ascend_include(workspace);
    let pyhccl = tools::pyhccl(workspace).is_file();
    let hosts = tools::try_network_namespaces();
    let mut there = Vec::new();
    for (what, is_there, package, tests) in [
        ("PyTorch", has(torch), "checkpoint-engine-fp8", &["--test", "torch"][..]),
        ("PyTorch", has(torch), "checkpoint-engine-receivers", &["--lib", "--test", "torch"]),
        ("ZeroMQ for Python", has(pyzmq), "checkpoint-engine-receivers", &["--test", "pyzmq"]),
        ("NVRTC", has(nvrtc), "checkpoint-engine-cuda", &["--test", "compile"]),
        ("NVRTC, of an encoding", has(nvrtc), "e5m2", &["--test", "encoding", "compiles"]),
        ("NCCL", has(tools::has_nccl(workspace)), "checkpoint-engine-nccl", &["--test", "library"]),
        ("CANN's headers", has(headers), "hccl-sim", &["--test", "headers"]),
        (
            "CANN's headers, of backend-hccl",
            has(headers),
            "checkpoint-engine-hccl",
            &["--lib", "headers::"],
        ),
        ("pyhccl", has(pyhccl), "hccl-sim", &["--test", "foreign"]),
        (
            "pyhccl, with backend-hccl",
            has(pyhccl),
            "checkpoint-engine-hccl",
            &["--lib", "foreign::"],
        ),
        (
            "hosts that are network namespaces",
            hosts.clone(),
            "checkpoint-engine-nixl",
            &["--test", "processes"],
        ),
        ("pods and nodes", hosts, "checkpoint-engine-cli", &["--test", "clusters"]),
    ] {
        match is_there {
            Ok(()) => there.push((what, package, tests)),
            Err(reason) => println!("\n-- {what}: ignored, {reason}"),
        }
    }
    if there.is_empty() {
        return Ok(());
    }
    for (what, command) in ignored(workspace, &there) {
        stage(&what, command)?;
    }
    Ok(())
}

/// Runs ignored tests of packages: those of a library with `--lib`, those of a file with `--test NAME`, and of these those whose
/// names contain the last word.
///
/// nextest runs all of them at once, and what was built for all others. `cargo test` of one package has other features of its
/// dependencies, and builds them anew.
fn ignored(workspace: &Workspace, of: &[(&str, &str, &[&str])]) -> Vec<(String, Command)> {
    if !has_nextest(workspace) {
        let each = of.iter().map(|(what, package, tests)| {
            let mut command = workspace.cargo();
            command.args(["test", "--package", package]).args(*tests).args(["--", "--ignored"]);
            with_libraries(&mut command, workspace);
            ((*what).to_owned(), command)
        });
        return each.collect();
    }
    let filters = of.iter().map(|(_, package, tests)| {
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
        format!("({filter} & ({}))", binaries.join(" | "))
    });
    let filter = filters.collect::<Vec<_>>().join(" | ");
    let mut command = run_nextest(workspace);
    command.args(["--workspace", "--run-ignored", "only", "--no-fail-fast", "-E", &filter]);
    with_libraries(&mut command, workspace);
    let what: Vec<&str> = of.iter().map(|(what, ..)| *what).collect();
    vec![(what.join("; "), command)]
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

/// How many tests run at a time on each core: most of them wait, for deadlines and for one another.
///
/// `.config/nextest.toml` names those that compute, which count as so many.
const TESTS_PER_CORE: usize = 4;

/// `cargo nextest run`, with as many tests at a time as suit them.
fn run_nextest(workspace: &Workspace) -> Command {
    let mut command = workspace.cargo();
    command.args(["nextest", "run"]);
    let variable = "NEXTEST_TEST_THREADS";
    if std::env::var_os(variable).is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        command.env(variable, (cores * TESTS_PER_CORE).to_string());
    }
    command
}

fn tests(workspace: &Workspace, options: &Options) -> Command {
    let require_all = requires_all(options);
    let nextest = has_nextest(workspace);
    let mut command = if nextest { run_nextest(workspace) } else { workspace.cargo() };
    if !nextest {
        command.arg("test");
    }
    with_libraries(&mut command, workspace);
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

//! Developer tasks: `cargo xtask <task>`. CONTRIBUTING.md says when to use which.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a program that reports to its user on standard output")]

mod book;
mod bundle;
mod faults;
mod fuzz;
mod packages;
mod process;
mod python;
mod receivers;
mod setup;
mod tests;
mod tools;
mod verl;
mod workspace;

use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

use crate::process::run;
use crate::setup::Purpose;
use crate::workspace::Workspace;

/// The result of a task; the error is what the user is told.
type Result<T, E = String> = std::result::Result<T, E>;

/// Developer tasks of the checkpoint engine.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Installs what tests and checks need, into the target folder
    ///
    /// Nothing outside the target folder changes, rustup's components aside. `test`, `deny`, `book` and `ci`
    /// do their part of this themselves; run it to have it done before going offline.
    Setup {
        /// Only say what is there and what is missing; exit with 1 if something needed is missing
        #[arg(long)]
        check: bool,
    },
    /// Sets up what the tests need, then runs all of them
    ///
    /// That is: the library without default features is checked, unit and integration tests run
    /// with cargo-nextest if it is installed and with `cargo test` otherwise, then the doctests run.
    Test(tests::Options),
    /// Checks licences, bans and sources of the dependencies, by deny.toml
    Deny,
    /// Packs every crate that is published, as `cargo publish` would
    ///
    /// What is missing in a package, a licence or a dependency without a version, is an error.
    Package {
        /// Also build each package from nothing but what is in it
        #[arg(long)]
        verify: bool,
    },
    /// Compares the public items of the published crates with those of an earlier version
    ///
    /// Finds what a program that compiles with the earlier version may stumble over: items that are gone or renamed, fields
    /// and variants that structs and enums have more of, trait methods without a default. Each finding has a text that says why it
    /// breaks programs. Ends with 1 if the crates' version does not say so: before 1.0, a break needs a new minor version.
    ///
    /// Takes the tool's source from the crates registry the first time, and minutes to build it; then half a minute for each crate.
    Semver(packages::Semver),
    /// Packs programs, tests and a script for a machine that has a GPU and no Rust
    ///
    /// They are built for this machine's architecture and C library. Needs `strip`, which comes with gcc.
    GpuBundle {
        /// Where to; target/gpu-bundle without it
        folder: Option<std::path::PathBuf>,
    },
    /// Builds the wheel of the Python package into target/wheels
    ///
    /// It is tagged for the oldest C library that it runs with (manylinux), which this machine's decides, and for all
    /// Pythons from 3.10 on.
    Wheel,
    /// Runs the tests of the Python package alone, as `test` does with all others
    Python {
        /// Arguments for pytest
        #[arg(last = true, value_name = "ARGUMENT")]
        arguments: Vec<String>,
    },
    /// Checks the user guide's pages, links and included code, and builds it
    Book,
    /// Compares FP8 plans and checkpoints with what vLLM, SGLang and transformers say of them
    ///
    /// Takes their newest wheels, half a gigabyte, into the target folder, and prints tables: their own
    /// functions on the plans of all families of models, and what transformers loads of small random models.
    Receivers,
    /// Runs the Python package as a backend of the real verl, on the CPU
    ///
    /// Takes verl, Ray and what they import into the target folder, 210 MB, and prints a table: updates through verl's
    /// own manager and workers, compared byte for byte, with rollouts that die.
    Verl,
    /// Kills, stops, cuts off and starves groups of the real program, and judges what they do
    ///
    /// Prints a line for each case, and a table of hangs, leaks, wrong bytes and groups that did not recover. Ends with 1 if
    /// there is any. What needs namespaces (root, or those of users) or network devices (root) is ignored with its
    /// reason where there are none, and a failure with CKPT_ENGINE_REQUIRE_ALL=1.
    Faults(faults::Options),
    /// Fuzzes what decodes bytes from outside, with libFuzzer
    ///
    /// What is found goes to the target folder; inputs that matter are kept in `fuzz/corpus`.
    Fuzz(fuzz::Options),
    /// Runs what a pull request has to pass: `.ci/run`
    Ci,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let workspace = Workspace::find();
    let result = match &arguments.task {
        Task::Setup { check: true } => setup::report(&workspace),
        Task::Setup { check: false } => setup::prepare(&workspace, &Purpose::ALL),
        Task::Test(options) => tests::all(&workspace, options),
        Task::Deny => deny(&workspace),
        Task::Package { verify } => packages::pack(&workspace, *verify),
        Task::Semver(options) => packages::semver(&workspace, options),
        Task::GpuBundle { folder } => bundle::build(&workspace, folder.as_deref()),
        Task::Wheel => python::wheel(&workspace),
        Task::Python { arguments } => python::prepare_and_test(&workspace, arguments),
        Task::Book => book::build(&workspace),
        Task::Receivers => receivers::compare(&workspace),
        Task::Verl => verl::update(&workspace),
        Task::Faults(options) => faults::run(&workspace, options),
        Task::Fuzz(options) => fuzz::run(&workspace, options),
        Task::Ci => run(Command::new(workspace.root().join(".ci/run"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Not the advisories: they change from one day to the next, and a commit's checks should not.
fn deny(workspace: &Workspace) -> Result<()> {
    setup::prepare(workspace, &[Purpose::Deny])?;
    let mut command = Command::new(tools::cargo_deny(workspace));
    command.args(["--locked", "--workspace", "check", "--hide-inclusion-graph"]);
    command.args(["licenses", "bans", "sources"]);
    command.current_dir(workspace.root());
    run(command)
}

#[cfg(test)]
mod tests_of_pages {
    use super::*;

    #[test]
    fn every_task_that_a_page_names_is_one() {
        let root = Workspace::find().root().to_owned();
        let mut pages = vec![root.join("README.md"), root.join("CONTRIBUTING.md")];
        let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
        pages.extend(docs.filter(|path| path.extension().is_some_and(|ending| ending == "md")));
        let mut read = 0;
        for page in pages {
            let text = std::fs::read_to_string(&page).unwrap();
            // Of a line in a block, to its comment; of words in a sentence, to the backtick.
            for (at, _) in text.match_indices("cargo xtask ") {
                let command = text[at..].split(['`', '\n', '#', ';', '…']).next().unwrap();
                let words = command.split_whitespace().skip(1);
                match Arguments::try_parse_from(words) {
                    Ok(_) => read += 1,
                    Err(error) => panic!("{}: {command}: {error}", page.display()),
                }
            }
        }
        assert!(read > 20, "only {read} commands were found");
    }
}

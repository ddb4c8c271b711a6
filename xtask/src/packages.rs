//! The crates that are published: packing them, and comparing their public items with an earlier version.

use std::process::Command;

use clap::Args;

use crate::process::{run, stage};
use crate::workspace::Workspace;
use crate::{Result, tools};

/// Packs every published crate, as `cargo publish` would.
pub(crate) fn pack(workspace: &Workspace, verify: bool) -> Result<()> {
    let mut command = workspace.cargo();
    command.args(["package", "--locked", "--allow-dirty"]);
    for package in published(workspace)? {
        command.args(["--package", &package.name]);
    }
    if !verify {
        command.arg("--no-verify");
    }
    run(command)
}

#[derive(Debug, Args)]
pub(crate) struct Semver {
    /// The git revision to compare with
    #[arg(long, value_name = "REV", conflicts_with = "baseline_version")]
    baseline_rev: Option<String>,

    /// The version on the crates registry to compare with; the newest one without this and `--baseline-rev`
    #[arg(long, value_name = "VERSION")]
    baseline_version: Option<String>,

    /// A crate to compare, by the name of its package; can be repeated. All that are published libraries without it
    #[arg(short, long, value_name = "PACKAGE")]
    package: Vec<String>,
}

/// Compares public items with those of an earlier version.
pub(crate) fn semver(workspace: &Workspace, options: &Semver) -> Result<()> {
    let libraries = published(workspace)?.into_iter().filter(|package| package.is_library);
    let libraries: Vec<String> = libraries.map(|package| package.name).collect();
    if let Some(other) = options.package.iter().find(|name| !libraries.contains(name)) {
        return Err(format!(
            "`{other}` is no published library; these are: {}",
            libraries.join(", ")
        ));
    }
    if !tools::has_cargo_semver_checks(workspace) {
        println!(
            "installing cargo-semver-checks: built from the crates registry, which takes minutes"
        );
        tools::install_cargo_semver_checks(workspace)?;
    }
    let mut command = Command::new(tools::cargo_semver_checks(workspace));
    command.arg("semver-checks").current_dir(workspace.root());
    // A folder of its own: what all crates have in common is built once, and nobody waits for other builds.
    command.env("CARGO_TARGET_DIR", workspace.target().join("semver"));
    if let Some(revision) = &options.baseline_rev {
        command.args(["--baseline-rev", revision]);
    }
    if let Some(version) = &options.baseline_version {
        command.args(["--baseline-version", version]);
    }
    let chosen = if options.package.is_empty() { &libraries } else { &options.package };
    let earlier =
        options.baseline_rev.as_deref().map(|rev| packages_of(workspace, rev)).transpose()?;
    let is_new = |name: &&String| earlier.as_ref().is_some_and(|names| !names.contains(name));
    let (new, both): (Vec<&String>, Vec<&String>) = chosen.iter().partition(is_new);
    if !new.is_empty() {
        println!("not there in the earlier version, and so not compared: {new:?}");
    }
    if both.is_empty() {
        return Err("there is nothing to compare".to_owned());
    }
    for name in both {
        command.args(["--package", name]);
    }
    stage("public items", command)
}

/// A package that `cargo publish` takes.
struct Package {
    name: String,
    /// Whether it has a library that other crates are meant to depend on.
    is_library: bool,
}

fn published(workspace: &Workspace) -> Result<Vec<Package>> {
    let mut metadata = workspace.cargo();
    metadata.args(["metadata", "--no-deps", "--locked", "--format-version", "1"]);
    let output =
        metadata.output().map_err(|error| format!("cargo could not be started: {error}"))?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let has = |package: &serde_json::Value, kind: &str| {
        let mut targets = package["targets"].as_array().into_iter().flatten();
        targets.any(|target| {
            target["kind"].as_array().is_some_and(|kinds| kinds.contains(&kind.into()))
        })
    };
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let packages =
        packages.filter(|package| !package["publish"].as_array().is_some_and(Vec::is_empty));
    Ok(packages
        .filter_map(|package| {
            let name = package["name"].as_str()?.to_owned();
            // The library of a program is its own.
            Some(Package { name, is_library: has(package, "lib") && !has(package, "bin") })
        })
        .collect())
}

/// The names of the packages that a git revision has.
fn packages_of(workspace: &Workspace, revision: &str) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(workspace.root());
    git.args(["grep", "-h", "^name = ", revision, "--", "Cargo.toml", "*/Cargo.toml"]);
    let output = git.output().map_err(|error| format!("git: {error}"))?;
    if !output.status.success() {
        return Err(format!("git has no packages of the revision `{revision}`"));
    }
    let names = String::from_utf8_lossy(&output.stdout);
    Ok(names.lines().filter_map(|line| line.split('"').nth(1)).map(str::to_owned).collect())
}

//! Where backends look for native libraries that they load at run time. This module finds paths and loads nothing.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// The folders `native` that a program of a build has beside it: `cargo xtask setup` unpacks libraries
/// there.
pub fn beside_the_program() -> Vec<PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    // Cargo puts programs, tests and examples one or two folders below its target folder.
    let folders = program.ancestors().skip(2).take(2).map(|folder| folder.join("native"));
    folders.filter(|folder| folder.is_dir()).collect()
}

/// The folders of installed Python packages: of the active environment, of the `python3` that a user's
/// shell would start, of the user and of the system.
pub fn python_packages() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    prefixes.extend(std::env::split_paths(&path).flat_map(|bin| {
        let python = bin.join("python3");
        // The environment that it belongs to, and the installation that this one was made of.
        let prefix = |python: &Path| Some(python.parent()?.parent()?.to_path_buf());
        let installed = python.canonicalize().ok();
        let environment = installed.is_some().then(|| prefix(&python)).flatten();
        environment.into_iter().chain(installed.and_then(|python| prefix(&python)))
    }));
    prefixes.extend(variable("HOME").map(|home| home.join(".local")));
    prefixes.extend(["/usr/local", "/usr"].map(PathBuf::from));
    let mut folders = Vec::new();
    for prefix in distinct(prefixes) {
        let pythons = entries(&prefix.join("lib"), |name| name.starts_with("python3"));
        for packages in ["site-packages", "dist-packages"] {
            folders.extend(pythons.iter().map(|python| python.join(packages)));
        }
    }
    folders
}

/// The folders of the system's libraries, those of `LD_LIBRARY_PATH` first.
pub fn system_folders() -> Vec<PathBuf> {
    let searched = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&searched).collect();
    let arch = std::env::consts::ARCH;
    folders.extend([
        "/usr/local/lib".into(),
        format!("/usr/lib/{arch}-linux-gnu").into(),
        "/usr/lib64".into(),
    ]);
    folders
}

/// Absolute folders, each once, in their order.
pub fn distinct(mut folders: Vec<PathBuf>) -> Vec<PathBuf> {
    folders.retain(|folder| folder.is_absolute());
    let mut seen = HashSet::new();
    folders.retain(|folder| seen.insert(folder.clone()));
    folders
}

/// The entries of a folder whose names are accepted, in order; none if there is no such folder.
pub fn entries(folder: &Path, accept: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let accepted = |path: &PathBuf| path.file_name().and_then(OsStr::to_str).is_some_and(&accept);
    let read = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = read.map(|entry| entry.path()).filter(accepted).collect();
    paths.sort();
    paths
}

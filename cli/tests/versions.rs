//! Folders of versions as users of `ckpt-engine` make and read them.

use std::path::Path;
use std::process::{Command, Output};

fn run(args: &[&str]) -> Output {
    let other = std::env::var_os("CKPT_ENGINE_TEST_PROGRAM");
    let program = other.unwrap_or_else(|| env!("CARGO_BIN_EXE_ckpt-engine").into());
    Command::new(program).args(args).output().expect("the program starts")
}

/// What it says, if all goes well.
fn says(args: &[&str]) -> String {
    let output = run(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What it complains of.
fn complains(args: &[&str]) -> String {
    let output = run(args);
    assert!(!output.status.success(), "{args:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of UTF-8")
}

#[test]
fn versions_that_a_sync_leaves_in_a_folder_are_published_as_changes_and_pulled_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let (weights, changes) = (path("weights"), path("changes"));
    let kwarg = format!("path={}", text(&weights));
    let sync = ["sync", "--backend", "dir", "--engine-kwarg", &kwarg, "--synthetic", "tiny-moe"];
    says(&[&sync[..], &["--updates", "3", "--rollouts", "2", "--verify"]].concat());
    let [second, third] = ["weight_v000002", "weight_v000003"].map(|name| weights.join(name));
    assert!(!weights.join("weight_v000001").exists() && second.exists());
    let whole = says(&["publish", text(&second), text(&changes), "--version", "1"]);
    assert!(whole.contains("whole"), "{whole}");
    for (version, encoding) in [("2", "xor"), ("3", "overwrite")] {
        let model = if version == "2" { &third } else { &second };
        let args = ["publish", text(model), text(&changes), "--version", version, "--changes"];
        let said = says(&[&args[..], &[encoding]].concat());
        assert!(said.contains("as changes"), "{said}");
    }
    for (version, model) in [("1", &second), ("2", &third), ("3", &second)] {
        let out = path(version);
        says(&["pull", text(&changes), text(&out), "--version", version]);
        says(&["verify", text(&out), text(model)]);
    }
    let newest = says(&["pull", text(&changes), text(&path("newest"))]);
    assert!(newest.contains("version 3"), "{newest}");
}

#[test]
fn what_cannot_be_pulled_or_sent_over_a_folder_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let (empty, out) = (text(folder.path()), folder.path().join("out"));
    let none = complains(&["pull", empty, text(&out)]);
    assert!(none.contains("has no version yet"), "{none}");
    let missing = complains(&["pull", empty, text(&out), "--version", "7"]);
    assert!(missing.contains("no such version") && missing.contains("version 7"), "{missing}");
    assert!(!out.exists());
    let sync = ["sync", "--synthetic", "tiny-moe", "--backend", "dir"];
    let nowhere = complains(&sync);
    assert!(nowhere.contains("set `path`"), "{nowhere}");
    let kwarg = format!("path={empty}");
    let delta = complains(&[&sync[..], &["--delta", "--engine-kwarg", &kwarg]].concat());
    assert!(delta.contains("engine_kwargs.dir.keep"), "{delta}");
}

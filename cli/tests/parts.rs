//! Updates that send a part of a version, as users ask for them.

use std::process::{Command, Output, Stdio};

fn run(args: &[&str]) -> Output {
    // Another one where tests run on a machine that they were not built on.
    let other = std::env::var_os("CKPT_ENGINE_TEST_PROGRAM");
    let mut command =
        Command::new(other.unwrap_or_else(|| env!("CARGO_BIN_EXE_ckpt-engine").into()));
    command.stdin(Stdio::null()).args(args).output().expect("the program starts")
}

/// What a run that must succeed prints.
fn lines(args: &[&str]) -> Vec<serde_json::Value> {
    let output = run(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect()
}

const SYNC: [&str; 9] =
    ["sync", "--synthetic", "tiny-moe", "--rollouts", "2", "--updates", "3", "--verify", "--json"];

#[test]
fn after_the_first_update_only_weights_of_such_names_are_sent_and_all_others_are_as_they_were() {
    let fp8: &[&str] = &["--trainer-quantize-fp8"];
    for (backend, quantises) in [("naive", &[][..]), ("naive", fp8), ("ipc", &[]), ("ipc", fp8)] {
        let only = ["--backend", backend, "--delta", "--only", "model.layers.0.*"];
        let part = ["--part", "first=model.layers.0.*,model.embed*"];
        let lines = lines(&[&SYNC[..], &only, &part, quantises].concat());
        let [first, second, third] = &lines[..] else { panic!("three updates") };
        let number = |line: &serde_json::Value, key: &str| line[key].as_u64().expect("a number");
        for part in [second, third] {
            assert_eq!((&first["verified"], &part["verified"]), (&true.into(), &true.into()));
            let (of, before) = (&part["delta"]["parts"], &first["delta"]["parts"]);
            assert_eq!(of["policy"]["digest"], before["policy"]["digest"], "{part}");
            assert_eq!(of["policy"]["sent"], 0);
            assert_ne!(of["first"]["digest"], before["first"]["digest"], "{part}");
            for key in ["tensors", "source_bytes", "wire_bytes"] {
                let (whole, part) = (number(first, key), number(part, key));
                assert!(part > 0 && part < whole, "{backend}: {key}: {part} of {whole}");
            }
        }
    }
}

#[test]
fn rollouts_get_the_parts_that_they_want_and_every_byte_of_these_is_verified() {
    let number = |line: &serde_json::Value, key: &str| line[key].as_u64().expect("a number");
    for backend in ["naive", "ipc", "dir"] {
        let folder = std::env::temp_dir().join(format!("wants-{}", std::process::id()));
        let path = format!("path={}", folder.display());
        let dir: &[&str] = if backend == "dir" { &["--engine-kwarg", &path] } else { &[] };
        for delta in [&[][..], &["--trainer-quantize-fp8"], &["--delta"]] {
            // The folder keeps versions, and changes are none.
            if (backend, delta) == ("dir", &["--delta"]) {
                continue;
            }
            let of = ["--backend", backend, "--part", "first=model.layers.0.*,model.embed*"];
            let common = [&SYNC[..], &of, dir, delta].concat();
            let all = lines(&common);
            let some = lines(&[&common[..], &["--want", "first"]].concat());
            for (some, all) in some.iter().zip(&all) {
                assert_eq!(some["verified"], true, "{backend} {delta:?}: {some}");
                // A version in a folder is whole, also where no rollout wants all of it.
                let (some, all) = (number(some, "wire_bytes"), number(all, "wire_bytes"));
                assert!(some < all || backend == "dir", "{backend} {delta:?}: {some} of {all}");
            }
        }
        drop(std::fs::remove_dir_all(folder));
    }
}

#[test]
fn a_part_that_there_is_not_is_named_with_those_that_there_are() {
    let part = ["--part", "first=model.layers.0.*", "--want", "last"];
    let output = run(&[&SYNC[..], &["--backend", "ipc"], &part].concat());
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("`last`") && error.contains("`first`, `policy`"), "{error}");
    assert!(error.contains("rank 1") || error.contains("rank 2"), "{error}");
}

#[test]
fn measured_updates_send_a_part_as_well() {
    let bench =
        ["bench", "transfer", "--synthetic", "tiny-moe", "--rollouts", "1", "--repeats", "1"];
    let measured = |more: &[&str]| lines(&[&bench[..], &["--delta", "--json"], more].concat());
    let tensors = |lines: &[serde_json::Value]| lines[0]["tensors"].as_u64().expect("a number");
    let (whole, part) = (measured(&[]), measured(&["--only", "model.layers.0.*"]));
    assert!(tensors(&part) > 0 && tensors(&part) < tensors(&whole), "{part:?}");
}

#[test]
fn without_copies_no_part_is_sent_and_the_error_says_what_to_set() {
    let output = run(&[&SYNC[..], &["--backend", "naive", "--only", "model.layers.0.*"]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("delta: true"));
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1);
}

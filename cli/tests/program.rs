//! The program as a user meets it: its output and its exit codes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::path::Path;
use std::process::{Command, Output};

use cli::checkpoint::CheckpointWriter;
use engine_core::{DType, TensorMeta};

fn run(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_ckpt-engine");
    Command::new(program).args(arguments).output().expect("the program starts")
}

fn checkpoint(folder: &Path, last: u8) {
    let mut writer = CheckpointWriter::in_folder(folder).unwrap();
    let meta = TensorMeta::new("model.norm.weight", DType::U8, [2, 2]);
    writer.write_chunk(&meta, 0, &[1, 2, 3, last]).unwrap();
    writer.finish().unwrap();
}

#[test]
fn verify_says_equal_and_exits_0_or_what_differs_and_exits_1() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| folder.path().join(name));
    checkpoint(&a, 4);
    checkpoint(&b, 4);
    checkpoint(&c, 5);
    let [a, b, c] = [&a, &b, &c].map(|path| path.to_str().unwrap());
    let equal = run(&["verify", a, b]);
    assert_eq!(equal.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&equal.stdout), "equal: 1 tensor, 4 bytes\n");
    assert!(equal.stderr.is_empty(), "no progress bar where nobody watches");
    let different = run(&["verify", a, c]);
    assert_eq!(different.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&different.stdout),
        "model.norm.weight: 1 of 4 elements differ, first at [1, 1]: 4 in A, 5 in B\n\
         different: 1 tensor differs; 1 compared, 4 bytes\n"
    );
}

#[test]
fn an_error_names_its_cause_once_and_exits_1() {
    let failed = run(&["verify", "/nonexistent/a", "/nonexistent/b"]);
    assert_eq!(failed.status.code(), Some(1));
    let text = String::from_utf8_lossy(&failed.stderr);
    assert!(text.starts_with("error: /nonexistent/a: cannot open\n"), "{text}");
    assert_eq!(text.matches("No such file").count(), 1, "{text}");
}

#[test]
fn wrong_usage_exits_2_and_help_has_examples() {
    assert_eq!(run(&["verify", "only-one"]).status.code(), Some(2));
    assert_eq!(run(&[]).status.code(), Some(2));
    let help = run(&["verify", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("ckpt-engine verify"));
}

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

/// The program, when the system gives it no thread beside the first one.
fn without_threads(args: &[&str]) -> Output {
    let mut command = Command::new("prlimit");
    command.args(["--nproc=1:1", "--"]);
    if rustix::process::getuid().is_root() {
        // The limit is none of root's, and counts all threads of a user: one that has no others.
        let uid = 1_000_000 + std::process::id();
        command.arg("setpriv").arg(format!("--reuid={uid}")).arg("--clear-groups");
        command.arg("--bounding-set=-all").arg("--inh-caps=-all");
    }
    command.arg(env!("CARGO_BIN_EXE_ckpt-engine")).args(args);
    command.output().expect("prlimit and setpriv of util-linux run")
}

#[test]
fn a_command_that_gets_no_thread_is_an_error_in_words_and_exits_1() {
    let meeting = "--rendezvous unix:@no-threads --token-file /nonexistent";
    for line in [
        "sync --synthetic tiny-moe",
        "sync --synthetic tiny-moe --backend naive",
        &format!("trainer --synthetic tiny-moe {meeting}"),
        &format!("rollout {meeting}"),
        "top --once 127.0.0.1:1",
        "bench transfer --synthetic tiny-moe",
    ] {
        let args: Vec<&str> = line.split(' ').collect();
        let output = without_threads(&args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line}: {text}");
        assert!(text.contains("no further thread") && !text.contains("panicked"), "{text}");
    }
}

#[test]
fn wrong_usage_exits_2_and_help_has_examples() {
    assert_eq!(run(&["verify", "only-one"]).status.code(), Some(2));
    assert_eq!(run(&[]).status.code(), Some(2));
    let help = run(&["verify", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("ckpt-engine verify"));
}

/// Every command, with arguments with which it prints something.
fn commands(folder: &Path) -> Vec<Vec<String>> {
    let [a, b, out] = ["a", "b", "out"].map(|name| folder.join(name).display().to_string());
    checkpoint(Path::new(&a), 4);
    checkpoint(Path::new(&b), 5);
    let names = folder.join("names").display().to_string();
    std::fs::write(&names, "model.norm.weight\t1024\n").unwrap();
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<String>>();
    vec![
        words("--help"),
        words("--version"),
        words("sync --synthetic tiny-moe --backend naive"),
        words("sync --synthetic tiny-moe --backend naive --json"),
        words(&format!("sync --model {a} --backend naive")),
        words(&format!("verify {a} {a}")),
        words(&format!("verify {a} {b}")),
        words(&format!("quantize {a} {out}")),
        words(&format!("dequantize {a} {out}")),
        words(&format!("plan --model {a}")),
        words(&format!("plan --names {names}")),
        words(&format!("plan --names {names} --config")),
        words("doctor"),
        words("doctor --json"),
        words("bench quant --shape 128x128 --repeats 1"),
        words("top --once 127.0.0.1:1"),
        words(&format!(
            "trainer --rendezvous unix:{out}.s --token-file {out}.t --synthetic tiny-moe --timeout 1"
        )),
        words(&format!("rollout --rendezvous unix:{out}.r --token-file {out}.t --timeout 1")),
    ]
}

#[test]
fn no_command_panics_when_nobody_can_read_what_it_says() {
    use std::fs::File;
    use std::io::{PipeReader, pipe};
    use std::process::Stdio;

    let gone = || {
        let (reader, writer): (PipeReader, _) = pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let sinks: [(&str, &dyn Fn() -> Stdio); 2] = [("a closed pipe", &gone), ("/dev/full", &full)];
    for (sink, stdio) in sinks {
        for both in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            for arguments in commands(folder.path()) {
                let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
                command.args(&arguments).stdin(Stdio::null()).stdout(stdio());
                command.env("CKPT_ENGINE_LOG", "trace");
                command.stderr(if both { stdio() } else { Stdio::piped() });
                let done = command.output().unwrap();
                let errors = String::from_utf8_lossy(&done.stderr);
                let code = done.status.code();
                assert!(matches!(code, Some(0 | 1)), "{sink}, {arguments:?}: {code:?} {errors}");
                assert!(!errors.contains("panicked"), "{sink}, {arguments:?}: {errors}");
                for output in ["out", "out.s", "out.r"] {
                    let output = folder.path().join(output);
                    let _there = std::fs::remove_dir_all(&output);
                    let _there = std::fs::remove_file(&output);
                }
            }
        }
    }
}

#[test]
fn threads_that_cannot_be_started_are_an_error_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let [a, out] = ["a", "out"].map(|name| folder.path().join(name).display().to_string());
    checkpoint(Path::new(&a), 4);
    let commands: [&[&str]; 4] = [
        &["verify", &a, &a],
        &["quantize", &a, &out],
        &["dequantize", &a, &out],
        &["bench", "quant", "--shape", "128x128", "--repeats", "1"],
    ];
    for arguments in commands {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
        // No address space has room for such a stack.
        command.args(arguments).env("RUST_MIN_STACK", (1_u64 << 47).to_string());
        let done = command.output().unwrap();
        let errors = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{arguments:?}: {errors}");
        assert!(errors.contains("thread"), "{arguments:?}: {errors}");
        assert!(!errors.contains("panicked"), "{arguments:?}: {errors}");
    }
}

#[test]
fn a_path_that_is_not_utf_8_is_a_path() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let folder = tempfile::tempdir().unwrap();
    let path = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
    let (model, out) = (path(b"mod\xe9l"), path(b"\xffout"));
    checkpoint(&model, 4);
    for backend in ["naive", "ipc"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
        command.arg("sync").arg("--model").arg(&model).arg("--out").arg(&out);
        let done = command.args(["--verify", "--backend", backend]).output().unwrap();
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{backend}: {errors}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
    let done = command.arg("verify").arg(&model).arg(out.join("rollout-0")).output().unwrap();
    assert!(done.status.success());
    for conversion in ["quantize", "dequantize"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
        let done = command.arg(conversion).args([&model, &path(conversion.as_bytes())]).output();
        assert!(done.unwrap().status.success());
    }
}

//! Versions that are attested as users ask for it, copies whose memory changes, and ranks that die meanwhile.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const WEIGHTS: usize = 4;
const WEIGHT_BYTES: usize = 1 << 20;

fn program() -> Command {
    // Another one where tests run on a machine that they were not built on.
    let other = std::env::var_os("CKPT_ENGINE_TEST_PROGRAM");
    let mut command =
        Command::new(other.unwrap_or_else(|| env!("CARGO_BIN_EXE_ckpt-engine").into()));
    command.stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    program().args(args).output().expect("the program starts")
}

#[test]
fn every_update_is_followed_by_a_proof_where_that_is_asked_for() {
    for backend in ["naive", "ipc"] {
        let sync = ["sync", "--synthetic", "tiny-moe", "--rollouts", "2", "--updates", "3"];
        let asked = ["--backend", backend, "--delta", "--attest", "--verify", "--json"];
        let output = run(&[&sync[..], &asked].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{backend}: {error}");
        let lines: Vec<serde_json::Value> = String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(|line| serde_json::from_str(line).expect("a JSON object a line"))
            .collect();
        assert_eq!(lines.len(), 3);
        for (version, line) in (1..).zip(&lines) {
            assert_eq!((&line["version"], &line["verified"]), (&version.into(), &true.into()));
            assert!(line["attested_seconds"].is_number(), "{line}");
        }
    }
}

#[test]
fn without_copies_there_is_nothing_to_attest_and_the_update_is_told_before_that() {
    let output =
        run(&["sync", "--synthetic", "tiny-moe", "--attest", "--json", "--backend", "naive"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("delta: true"));
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1);
}

/// The bytes of a weight, like those of no other memory.
fn bytes_of(weight: usize) -> Vec<u8> {
    let byte = |at: u64| {
        let mixed = at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
    };
    (0..WEIGHT_BYTES as u64).map(|at| byte(at + ((weight as u64) << 32))).collect()
}

/// Writes a checkpoint of some weights.
fn checkpoint(path: &Path) {
    let entry = |weight: usize| {
        let at = weight * WEIGHT_BYTES;
        let to = at + WEIGHT_BYTES;
        format!(
            "\"w{weight}\":{{\"dtype\":\"U8\",\"shape\":[{WEIGHT_BYTES}],\"data_offsets\":[{at},{to}]}}"
        )
    };
    let entries: Vec<String> = (0..WEIGHTS).map(entry).collect();
    let mut header = format!("{{{}}}", entries.join(","));
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    (0..WEIGHTS).for_each(|weight| file.extend(bytes_of(weight)));
    std::fs::write(path, file).expect("a file");
}

/// A `sync` of many updates, and its first two.
fn long_sync(args: &[&str]) -> Child {
    let mut child = program()
        .args(["sync", "--updates", "100000", "--rollouts", "2", "--json", "--timeout", "30"])
        .args(["--delta", "--attest"])
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let output = BufReader::new(child.stdout.take().expect("piped"));
    let mut lines = output.lines();
    for _ in 0..2 {
        let Some(line) = lines.next() else { panic!("no update: {}", error_of(child)) };
        let line = line.expect("text");
        assert!(line.contains("attested_seconds"), "{line}");
    }
    std::thread::spawn(move || lines.for_each(drop));
    child
}

fn rollouts_of(child: &Child) -> Vec<u32> {
    let pid = child.id();
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let text = text.expect("children");
    text.split_ascii_whitespace().map(|pid| pid.parse().expect("a number")).collect()
}

/// Waits for the end of a `sync` that must fail, and returns its error.
fn error_of(mut child: Child) -> String {
    let begun = Instant::now();
    let mut errors = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut errors).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(1), "{errors}");
    assert!(begun.elapsed() < Duration::from_secs(30), "after {:?}: {errors}", begun.elapsed());
    errors
}

/// Changes a bit in all copies of some bytes in a process's own memory. Returns their number.
fn flip(pid: u32, bytes: &[u8]) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("a process");
    let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"));
    let memory = memory.expect("a process of this user");
    let mut flipped = 0;
    for line in maps.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [range, "rw-p", _, _, "0", ..] = words[..] else { continue };
        let (begin, end) = range.split_once('-').expect("a range");
        let at = |text| u64::from_str_radix(text, 16).expect("an address");
        let (begin, end) = (at(begin), at(end));
        let mut region = vec![0; (end - begin) as usize];
        if memory.read_exact_at(&mut region, begin).is_err() {
            continue;
        }
        let finder = |from: usize| {
            let mut windows = region[from..].windows(bytes.len());
            windows.position(|window| window == bytes).map(|found| from + found)
        };
        let mut from = 0;
        while let Some(found) = finder(from) {
            memory.write_all_at(&[bytes[5] ^ 4], begin + found as u64 + 5).expect("memory");
            flipped += 1;
            from = found + 1;
        }
    }
    flipped
}

#[test]
fn a_bit_that_changes_in_a_rollouts_process_is_found_and_its_rank_and_tensor_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.safetensors");
    checkpoint(&model);
    let child = long_sync(&["--model", model.to_str().expect("a path")]);
    // Children have the order of their ranks.
    let rollouts = rollouts_of(&child);
    let at = WEIGHT_BYTES / 2 + 77;
    let flipped = flip(rollouts[1], &bytes_of(2)[at..at + 64]);
    assert!(flipped >= 1, "the rollout has no copy");
    let error = error_of(child);
    for words in ["rank 2", "tensor `w2`", "bytes in memory are not those that were written there"]
    {
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_rank_that_is_killed_while_versions_are_attested_is_named_within_the_deadline() {
    for pause in [0, 30, 70] {
        let child = long_sync(&["--synthetic", "qwen2.5-0.5b", "--layers", "1"]);
        let rollouts = rollouts_of(&child);
        std::thread::sleep(Duration::from_millis(pause));
        let killed = Command::new("kill").args(["-KILL", &rollouts[0].to_string()]).status();
        assert!(killed.expect("kill runs").success());
        let error = error_of(child);
        assert!(error.contains("rank 1"), "{error}");
    }
}

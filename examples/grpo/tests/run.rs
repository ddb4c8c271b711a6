//! The example as a program: a few steps of it, and a rollout that is killed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

fn grpo(out: &Path, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_grpo"))
        .args(["--pretrain", "20", "--prompts", "4", "--group", "4", "--out"])
        .arg(out)
        .args(arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for the program's end, and gives what it said.
fn end(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

/// The columns of a CSV file by name.
fn column(file: PathBuf, name: &str) -> Vec<f64> {
    maybe(file, name).into_iter().map(|value| value.expect(name)).collect()
}

/// The same, of a column in which some rows have nothing.
fn maybe(file: PathBuf, name: &str) -> Vec<Option<f64>> {
    let text = std::fs::read_to_string(file).unwrap();
    let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let at = lines.next().unwrap().iter().position(|column| *column == name).unwrap();
    lines.map(|line| (!line[at].is_empty()).then(|| line[at].parse().unwrap())).collect()
}

#[test]
fn a_comparison_of_five_steps_leaves_a_table_a_plot_and_every_run() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    end(grpo(out, &["--compare", "--seeds", "2", "--steps", "5", "--truncate", "2"]));

    let table = std::fs::read_to_string(out.join("table.md")).unwrap();
    assert!(table.contains("| BF16 |") && table.contains("| FP8 |"), "{table}");
    let plot = std::fs::read_to_string(out.join("grpo.svg")).unwrap();
    assert_eq!(plot.matches("<polyline").count(), 2, "{plot}");
    for seed in [1, 2] {
        let read = |kind, name| column(out.join(format!("{kind}-{seed}.csv")), name);
        assert_eq!(read("bf16", "version"), [1., 2., 3., 4., 5.]);
        assert_eq!(read("bf16", "quantized"), [0.; 5]);
        assert_eq!(read("fp8", "quantized"), [14.; 5], "two layers of seven projections");
        let (bf16, fp8) = (read("bf16", "bytes")[0], read("fp8", "bytes")[0]);
        assert!(fp8 < 0.6 * bf16, "{fp8} bytes of {bf16}");
        // Rounding to BF16 already makes a difference, and FP8 makes a larger one; both are small.
        let kl = |kind| read(kind, "kl").iter().sum::<f64>() / 5.0;
        let (bf16, fp8) = (kl("bf16"), kl("fp8"));
        assert!(0.0 < bf16 && bf16 < fp8 && fp8 < 0.05, "KL {bf16} and {fp8}");
    }
}

#[test]
fn a_comparison_with_deltas_says_what_part_of_each_type_a_step_changes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    end(grpo(out, &["--compare", "--seeds", "2", "--steps", "4", "--delta"]));

    let table = std::fs::read_to_string(out.join("table.md")).unwrap();
    for kind in ["| BF16 | BF16 |", "| FP8 | BF16 |", "| FP8 | F8_E4M3 |", "| FP8 | F32 |"] {
        assert!(table.contains(kind), "{table}");
    }
    let plot = std::fs::read_to_string(out.join("changed.svg")).unwrap();
    assert_eq!(plot.matches("<polyline").count(), 3, "{plot}");
    for (kind, columns) in [
        ("bf16", &["bf16_changed"][..]),
        ("fp8", &["bf16_changed", "codes_changed", "scales_changed"]),
    ] {
        let csv = out.join(format!("{kind}-1.csv"));
        let bytes = column(csv.clone(), "bytes");
        assert!(bytes[1..].iter().all(|changes| *changes < bytes[0]), "{bytes:?}");
        for name in columns {
            // The first update is whole, so nothing is compared.
            let parts = maybe(csv.clone(), name);
            assert!(parts[0].is_none(), "{name}: {parts:?}");
            let is_a_part =
                |part: &Option<f64>| part.is_some_and(|part| (0.0..=1.0).contains(&part));
            assert!(parts[1..].iter().all(is_a_part), "{name}: {parts:?}");
        }
    }
    let codes = maybe(out.join("bf16-1.csv"), "codes_changed");
    assert_eq!(codes, [None; 4], "BF16 has no codes");
}

#[test]
fn runs_side_by_side_are_the_same_runs_as_one_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let [alone, beside] = ["1", "2"].map(|jobs| {
        let out = folder.path().join(jobs);
        end(grpo(&out, &["--compare", "--seeds", "2", "--steps", "2", "--jobs", jobs]));
        let files = ["bf16-1.csv", "bf16-2.csv", "fp8-1.csv", "fp8-2.csv"];
        files.map(|file| ["reward", "bytes"].map(|name| column(out.join(file), name)))
    });
    assert_eq!(alone, beside);
}

#[test]
fn a_run_that_fails_ends_the_comparison_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let child = grpo(folder.path(), &["--compare", "--steps", "2", "--backend", "carrier-pigeon"]);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("carrier-pigeon"), "{said}");
    assert!(!folder.path().join("table.md").exists());
}

#[test]
fn training_goes_on_when_a_rollout_is_killed_in_the_middle() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = grpo(folder.path(), &["--steps", "40", "--trainer-quantize-fp8"]);
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut processes = Vec::new();
    while processes.len() < 2 {
        let line = said.next().expect("two rollouts").unwrap();
        if let Some((_, process)) = line.split_once(" is process ") {
            processes.push(process.trim().parse::<i32>().unwrap());
        }
    }
    let csv = folder.path().join("fp8-1.csv");
    let begun = Instant::now();
    while std::fs::read_to_string(&csv).map_or(0, |text| text.lines().count()) < 6 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no step ends");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_raw(processes[1]).unwrap(), Signal::KILL).unwrap();

    let rest: Vec<String> = said.map(|line| line.unwrap()).collect();
    assert!(child.wait().unwrap().success(), "{rest:?}");
    assert!(rest.iter().any(|line| line.starts_with("rollout 2 died")), "{rest:?}");
    let steps: Vec<f64> = (1..=40).map(f64::from).collect();
    assert_eq!(column(csv.clone(), "step"), steps, "a step is missing, or there twice");
    let restarts = column(csv, "restarts");
    assert_eq!((restarts[4], restarts[39]), (0.0, 1.0), "{restarts:?}");
}

//! `bench scale`, and groups behind a relay.

#![allow(clippy::unwrap_used, reason = "the helpers of tests may panic as tests do")]

use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn bench_scale_counts_what_rank_0_says_and_relays_make_that_less() {
    let measured = |behind| {
        let setting = ["--rollouts", "12", "--tensors", "8", "--buckets", "4", "--repeats", "2"];
        let all = [&["bench", "scale", "--json", "--behind", behind], &setting[..]].concat();
        let output = command(&all).output().unwrap();
        lines(&output).remove(0)
    };
    let (alone, shared) = (measured("0"), measured("6"));
    for line in [&alone, &shared] {
        assert_eq!(line["rollouts"], 12);
        assert!(line["steady"]["cpu"].as_f64().unwrap() > 0.0, "{line}");
        assert!(line["memory"].as_u64().unwrap() > 0, "{line}");
        assert!(line["rollout_memory"].as_u64().unwrap() > 0, "{line}");
    }
    // Each rollout enters, releases four buckets and confirms; down there is no less.
    let bytes = |line: &Value| line["steady"]["bytes"].as_u64().unwrap();
    assert!(alone["steady"]["frames"].as_u64().unwrap() >= 12 * 12, "{alone}");
    assert!(bytes(&shared) < bytes(&alone), "{shared} {alone}");
}

#[test]
fn bench_scale_fits_exponents_of_what_varies() {
    let setting = ["--rollouts", "1,2,4", "--tensors", "4", "--buckets", "2", "--repeats", "1"];
    let all = [&["bench", "scale", "--json"], &setting[..]].concat();
    let lines = lines(&command(&all).output().unwrap());
    assert_eq!(lines.iter().filter(|line| line.get("tensors").is_some()).count(), 3);
    let bytes = lines.iter().find(|line| line["cost"] == "later updates, bytes").unwrap();
    assert_eq!((&bytes["with"], &bytes["points"]), (&"rollouts".into(), &3.into()));
    let exponent = bytes["exponent"].as_f64().unwrap();
    assert!((0.5..1.5).contains(&exponent), "{exponent}");
}

#[test]
fn bench_scale_simulates_groups_that_are_larger() {
    let setting = ["--simulate", "300", "--buckets", "10", "--behind", "50"];
    let all = [&["bench", "scale", "--json"], &setting[..]].concat();
    let line = lines(&command(&all).output().unwrap()).remove(0);
    // Begin, Entered, the buckets and their releases, End, Confirm, Commit.
    assert!(line["messages"].as_u64().unwrap() >= 300 * 25, "{line}");
    assert!(line["frames"].as_u64().unwrap() < 300 * 25 / 10, "{line}");
    assert!(line["cpu"].as_f64().unwrap() > 0.0, "{line}");
}

#[test]
fn rollouts_behind_a_relay_are_updated_and_it_ends_with_their_group() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token").display().to_string();
    let name = |what| format!("unix:@ckpt-scale-{what}-{}", std::process::id());
    let (at, relay) = (name("trainer"), name("relay"));
    let start = |arguments: &[&str]| -> Child {
        command(&[arguments, &["--token-file", &token]].concat()).spawn().unwrap()
    };
    let model = ["--synthetic", "tiny-moe", "--rollouts", "2", "--updates", "2"];
    let trainer = start(&[&["trainer", "--rendezvous", &at], &model[..]].concat());
    while !std::path::Path::new(&token).exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let mut all = vec![trainer, start(&["relay", "--rendezvous", &at, "--listen", &relay])];
    for _ in 0..2 {
        all.push(start(&["rollout", "--rendezvous", &relay, "--verify"]));
    }
    for child in all {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

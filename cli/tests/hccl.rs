//! `ckpt-engine` over HCCL, on simulated NPUs: it works, and whatever it says is labelled as simulated.

use std::path::PathBuf;
use std::process::{Command, Output};

use hccl_sim::Profile;

fn run(profile: Profile, args: &[&str]) -> Output {
    run_with(profile, args, &[])
}

fn run_with(profile: Profile, args: &[&str], settings: &[(&str, &str)]) -> Output {
    let folder: PathBuf = hccl_sim::libraries(profile).expect("the simulated libraries");
    let mut program = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
    program.args(args).args(["--backend", "hccl", "--hccl-lib"]).arg(folder);
    program.env("HCCL_SIM_TIME_SCALE", "0.1").envs(settings.iter().copied());
    program.output().expect("the program starts")
}

fn text(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

fn json(output: &Output) -> Vec<serde_json::Value> {
    text(output);
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect()
}

const SYNC: [&str; 8] =
    ["sync", "--synthetic", "tiny-moe", "--rollouts", "2", "--updates", "2", "--verify"];

#[test]
fn sync_updates_rollouts_on_simulated_npus_and_says_so() {
    let text = text(&run(Profile::Current, &SYNC));
    for version in ["simulated: version 1: ", "simulated: version 2: "] {
        assert!(text.contains(version), "{text}");
    }
    assert!(text.contains("every byte verified"), "{text}");
}

#[test]
fn sync_in_json_says_that_it_was_simulated_and_quantises_on_the_trainers_cpu() {
    let lines = json(&run(
        Profile::Split,
        &[&SYNC[..], &["--trainer-quantize-fp8", "--receiver", "any", "--json"]].concat(),
    ));
    assert_eq!(lines.len(), 2);
    for line in lines {
        assert_eq!(line["simulated"], true, "{line}");
        assert_eq!(line["verified"], true, "{line}");
        assert!(line["wire_bytes"].as_u64() < line["source_bytes"].as_u64(), "{line}");
    }
}

#[test]
fn trainers_write_what_rollouts_want_and_every_element_is_compared() {
    let sync = ["sync", "--synthetic", "tiny-moe", "--updates", "3", "--verify", "--json"];
    let placed = ["--placed", "--trainer-layout", "fsdp=2", "--rollout-layout", "tp=2"];
    for more in [&[][..], &["--trainer-quantize-fp8", "--receiver", "any"]] {
        let lines = json(&run(Profile::Current, &[&sync[..], &placed, more].concat()));
        assert_eq!(lines.len(), 3);
        for line in lines {
            assert_eq!((&line["verified"], &line["simulated"]), (&true.into(), &true.into()));
            assert_eq!(line["rollouts"].as_array().map(Vec::len), Some(2), "{line}");
        }
    }
}

#[test]
fn a_benchmark_of_placed_updates_runs_on_simulated_npus() {
    let bench = ["bench", "transfer", "--synthetic", "tiny-moe", "--repeats", "1", "--json"];
    let placed = ["--placed", "--trainer-layout", "fsdp=2", "--rollout-layout", "tp=2"];
    for line in json(&run(Profile::Current, &[&bench[..], &placed, &["--verify"]].concat())) {
        assert_eq!(line["placed"], serde_json::json!(["fsdp=2,ranks=2", "tp=2,ranks=2"]), "{line}");
    }
}

/// As large as it takes for no NPU to have room for a communicator.
const NO_ROOM: [(&str, &str); 2] = [("HCCL_BUFFSIZE", "1000"), ("HCCL_SIM_DEVICE_MB", "1500")];

#[test]
fn sync_updates_rollouts_on_the_trainers_npu() {
    let args = [&SYNC[..], &["--device", "npu:0", "--json"]].concat();
    for line in json(&run_with(Profile::Current, &args, &NO_ROOM)) {
        assert_eq!(line["verified"], true, "{line}");
        assert_eq!(line["rollouts"].as_array().map(Vec::len), Some(2), "{line}");
    }
}

#[test]
fn sync_updates_a_rollout_on_the_trainers_npu_and_another_one_elsewhere() {
    let args = [&SYNC[..], &["--rank-device", "1=npu:0", "--json"]].concat();
    for line in json(&run(Profile::Current, &args)) {
        assert_eq!(line["verified"], true, "{line}");
    }
    let output = run(Profile::Current, &[&SYNC[..], &["--rank-device", "3=npu:0"]].concat());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("no rank 3"), "{text}");
    // What it does not do: two rollouts on an NPU that is not the trainer's.
    let args = [&SYNC[..], &["--rank-device", "1=npu:2"]].concat();
    let output = run(Profile::Current, &args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("are both on NPU 2"), "{text}");
}

#[test]
fn what_runs_on_no_simulator_does_not_say_so() {
    let mut program = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
    let args = ["sync", "--synthetic", "tiny-moe", "--backend", "naive", "--json"];
    let lines = json(&program.args(args).output().expect("the program starts"));
    assert_eq!(lines[0]["simulated"], false);
}

/// The verdicts of the doctor's checks, by their names.
fn verdicts(profile: Profile) -> std::collections::BTreeMap<String, String> {
    let found = json(&run(profile, &["doctor", "--json"])).remove(0);
    assert_eq!(found["simulated"], true);
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let checks = found["checks"].as_array().expect("checks");
    checks.iter().map(|check| (word(&check["name"]), word(&check["verdict"]))).collect()
}

#[test]
fn the_doctor_broadcasts_rebuilds_and_shares_memory() {
    let found = verdicts(Profile::Current);
    for name in
        ["libraries", "functions", "config capability", "broadcast", "rebuilds", "sharing memory"]
    {
        assert_eq!(found.get(name).map(String::as_str), Some("pass"), "{name}: {found:?}");
    }
}

#[test]
fn the_doctor_skips_what_old_libraries_cannot_do_with_the_reason() {
    let text = text(&run(Profile::Cann81, &["doctor"]));
    assert!(text.lines().all(|line| line.starts_with("simulated: ")), "{text}");
    assert!(text.contains("skip sharing memory: the libraries lack the functions"), "{text}");
    assert!(text.contains("pass rebuilds: "), "{text}");
}

#[test]
fn libraries_that_are_not_there_are_an_error_that_says_what_to_install() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut program = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
    program.args(["doctor", "--backend", "hccl", "--hccl-lib"]).arg(folder.path());
    let output = program.output().expect("the program starts");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("FAIL libraries: there is no libascendcl.so in"), "{text}");
    assert!(text.contains("install the CANN toolkit"), "{text}");
}

//! `plan --simulate` as its users run it.

#![allow(clippy::unwrap_used, reason = "the helpers of tests may panic as tests do")]

use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
    let all = [&["plan", "--simulate"], arguments].concat();
    command.args(all).stdin(Stdio::null()).output().unwrap()
}

fn simulated(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or_else(|| panic!("{name} of {line}"))
}

#[test]
fn a_simulation_says_what_each_side_carries_and_how_long_that_takes() {
    let layouts =
        ["--trainer-layout", "fsdp=4", "--rollout-layout", "ep=4,ranks=8", "--unquantized"];
    let alone = ["--synthetic", "tiny-moe", "--ranks-per-node", "1", "--cards-per-node", "1"];
    let line = simulated(&[&alone[..], &layouts].concat());
    // A rank with all that is no expert and a quarter of the experts has more than a quarter of the model.
    let (bytes, received) = (number(&line, "bytes"), &line["received"]);
    assert!(received[1].as_f64().unwrap() > bytes / 4.0, "{line}");
    assert_eq!(received[0], received[2], "{line}");
    let sent = line["sent"][1].as_u64().unwrap() * 4;
    assert!(sent.abs_diff(received[1].as_u64().unwrap() * 8) < 4, "{line}");
    assert_eq!(number(&line, "busiest"), line["sent"][2].as_f64().unwrap(), "{line}");
    assert!(number(&line, "ratio") < 1.1, "{line}");
    assert!(number(&line, "seconds") >= number(&line, "floor_seconds"), "{line}");
    // At 400 Gbit/s.
    assert_eq!(number(&line, "floor_seconds"), number(&line, "busiest") / 50e9, "{line}");
    assert_eq!(number(&line, "maxima_bytes"), 0.0, "{line}");
    let slower = simulated(&[&alone[..], &["--network", "40"], &layouts].concat());
    assert_eq!(line["digest"], slower["digest"], "speeds are no part of the plan");
    assert!(number(&slower, "seconds") > number(&line, "seconds"), "{slower}");
    // What all ranks of a node want comes to it once.
    let together = simulated(&[&["--synthetic", "tiny-moe"], &layouts[..]].concat());
    assert!(number(&together, "busiest") < number(&line, "busiest") / 2.0, "{together}");
    assert!(number(&together, "within_nodes") > bytes, "{together}");
}

#[test]
fn the_largest_models_come_to_128_ranks_with_little_more_than_the_busiest_card_cannot_do_without() {
    let rollouts = ["--rollout-layout", "tp=8,ep=64,ranks=128"];
    for (model, trainers) in [("kimi-k2", "fsdp=256"), ("deepseek-v3", "ep=64,fsdp=256")] {
        let trainers = ["--synthetic", model, "--trainer-layout", trainers];
        let line = simulated(&[&trainers[..], &rollouts].concat());
        assert!(number(&line, "ratio") <= 1.1, "{line}");
        assert!(number(&line, "maxima_bytes") > 0.0, "rows of a block are on several trainers");
        let (crossed, kept) = (number(&line, "replan_crossed"), number(&line, "replan_kept"));
        assert!(crossed <= kept, "{line}");
    }
}

#[test]
fn names_alone_can_be_simulated_and_text_is_for_people() {
    let folder = tempfile::tempdir().unwrap();
    let names = folder.path().join("names");
    std::fs::write(&names, "model.layers.0.mlp.up_proj.weight\t256x512\n").unwrap();
    let names = names.to_str().unwrap();
    let layouts = ["--trainer-layout", "fsdp=4", "--rollout-layout", "tp=2"];
    let output = run(&[&["--names", names], &layouts[..]].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("1 tensors"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("busiest network card"), "{text}");
}

#[test]
fn layouts_that_do_not_fit_are_errors() {
    let fails = |layouts: &[&str], code: i32, words: &str| {
        let output = run(&[&["--synthetic", "tiny-moe"], layouts].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{errors}");
        assert!(errors.contains(words), "{errors}");
    };
    let rollouts = ["--rollout-layout", "tp=2"];
    fails(&rollouts, 2, "--trainer-layout");
    fails(&[&["--trainer-layout", "tp=3,ranks=4"], &rollouts[..]].concat(), 2, "do not divide");
    fails(&[&["--trainer-layout", "ep=32"], &rollouts[..]].concat(), 1, "ep=32 for 16 experts");
    let no_link = ["--trainer-layout", "tp=2", "--network", "0"];
    fails(&[&no_link[..], &rollouts].concat(), 2, "no speed above 0");
}

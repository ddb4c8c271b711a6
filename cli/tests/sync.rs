//! `ckpt-engine sync`, `trainer` and `rollout` as their users run them, and what is left when one of
//! their processes is killed.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use engine_core::ProcessStat;

/// Ctrl-C ends it also where the tests run in the background of a shell, whose children ignore it.
fn program() -> Command {
    // Another one where tests run on a machine that they were not built on.
    let other = std::env::var_os("CKPT_ENGINE_TEST_PROGRAM");
    let program = other.unwrap_or_else(|| env!("CARGO_BIN_EXE_ckpt-engine").into());
    let mut command = Command::new("env");
    command.arg("--default-signal=INT").arg(program).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    program().args(args).output().expect("the program starts")
}

fn json_lines(output: &Output) -> Vec<serde_json::Value> {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect()
}

fn children_of(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn is_alive(pid: u32) -> bool {
    ProcessStat::of(pid).is_some_and(|process| !process.has_ended)
}

fn kill(pid: u32) {
    let status = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
    assert!(status.expect("kill runs").success());
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < end, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A `sync` of many updates that take a while, after its first one.
fn long_sync(rollouts: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = program()
        .args(["sync", "--synthetic", "qwen2.5-0.5b", "--layers", "1", "--updates", "100000"])
        .args(["--rollouts", rollouts, "--verify", "--json", "--timeout", "10"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    output.read_line(&mut line).expect("a first update");
    assert!(line.contains("\"verified\":true"), "{line}");
    (child, output)
}

fn end_of(mut child: Child) -> (std::process::ExitStatus, String) {
    let mut errors = String::new();
    let mut stderr = child.stderr.take().expect("piped");
    stderr.read_to_string(&mut errors).expect("text");
    (child.wait().expect("it ends"), errors)
}

#[test]
fn every_update_is_verified_and_its_line_has_the_documented_keys() {
    for backend in ["naive", "ipc"] {
        let args = ["sync", "--synthetic", "tiny-moe", "--rollouts", "2", "--updates", "3"];
        let output = run(&[&args[..], &["--verify", "--json", "--backend", backend]].concat());
        let lines = json_lines(&output);
        assert_eq!(lines.len(), 3);
        for (version, line) in (1..).zip(&lines) {
            assert_eq!(line["version"], version);
            assert_eq!(line["backend"], backend);
            assert_eq!(line["verified"], true);
            assert_eq!(line["rollouts"].as_array().expect("rollouts").len(), 2);
            assert_eq!(line["source_bytes"], line["wire_bytes"]);
            for key in [
                "tensors",
                "quantized",
                "kept",
                "passed_through",
                "seconds",
                "gb_per_s",
                "memcpy_gb_per_s",
                "extra_peak_bytes",
            ] {
                assert!(line[key].is_number(), "{key}");
            }
            for rollout in line["rollouts"].as_array().expect("rollouts") {
                assert_eq!(rollout["state"], "active");
                assert_eq!(rollout["digest"].is_string(), backend == "ipc");
            }
        }
        assert_ne!(lines[0]["rollouts"][0]["digest"], serde_json::json!(""));
    }
}

#[test]
fn trainers_with_parts_of_a_model_write_what_rollouts_want_of_it_and_every_element_is_compared() {
    let sync =
        ["sync", "--synthetic", "tiny-moe", "--updates", "2", "--placed", "--verify", "--json"];
    let quantized = ["--trainer-quantize-fp8", "--receiver", "any", "--quant-block", "32x64"];
    for (trainers, rollouts, ranks) in [
        ("fsdp=2", "tp=2", [2, 3].as_slice()),
        ("tp=2", "fsdp=3", &[2, 3, 4]),
        ("fsdp=3", "ep=2", &[3, 4]),
    ] {
        let layouts = ["--trainer-layout", trainers, "--rollout-layout", rollouts];
        for more in [&[][..], &quantized] {
            let lines = json_lines(&run(&[&sync[..], &layouts, more].concat()));
            assert_eq!(lines.len(), 2);
            for line in &lines {
                assert_eq!(line["verified"], true, "{line}");
                assert_eq!(line["quantized"].as_u64() > Some(0), !more.is_empty(), "{line}");
                let rollouts = line["rollouts"].as_array().expect("rollouts");
                let of: Vec<_> = rollouts.iter().filter_map(|one| one["rank"].as_u64()).collect();
                assert_eq!(of, ranks);
            }
            assert_eq!(lines[1]["plan_reused"], true);
        }
    }
}

#[test]
fn trainers_write_over_nixl_what_rollouts_want_and_every_element_is_compared() {
    let sync = ["sync", "--backend", "nixl", "--synthetic", "tiny-moe", "--updates", "3"];
    let placed = ["--placed", "--trainer-layout", "fsdp=2", "--rollout-layout", "tp=2"];
    for more in [&[][..], &["--trainer-quantize-fp8", "--receiver", "any"]] {
        let output = run(&[&sync[..], &placed, &["--verify", "--json"], more].concat());
        let lines = json_lines(&output);
        assert_eq!(lines.len(), 3);
        for line in &lines {
            assert_eq!(
                (&line["verified"], &line["backend"]),
                (&true.into(), &"nixl".into()),
                "{line}"
            );
            assert_eq!(line["quantized"].as_u64() > Some(0), !more.is_empty(), "{line}");
            assert_eq!(line["rollouts"].as_array().map(Vec::len), Some(2), "{line}");
        }
        assert_eq!(lines[1]["plan_reused"], true);
    }
}

#[test]
fn what_cannot_be_placed_is_refused_in_words() {
    let sync = ["sync", "--synthetic", "tiny-moe", "--placed", "--trainer-layout", "fsdp=2"];
    for (more, words) in [
        (&["--rollout-layout", "tp=2", "--backend", "naive"][..], "naive has no placed updates"),
        (&["--rollout-layout", "tp=2", "--out", "out"], "--placed"),
        (&["--rollout-layout", "tp=2", "--quantize-on-receive"], "nothing is left to quantise"),
        (&["--rollout-layout", "ep=99"], "ep=99"),
        (&[], "--rollout-layout"),
    ] {
        let output = run(&[&sync[..], more].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(words), "{more:?}: {error}");
    }
}

#[test]
fn a_benchmark_of_placed_updates_says_the_layouts_and_that_it_compared_every_element() {
    let bench = ["bench", "transfer", "--synthetic", "qwen2.5-0.5b", "--layers", "1", "--json"];
    let placed = ["--placed", "--trainer-layout", "fsdp=2", "--rollout-layout", "tp=2"];
    let lines = json_lines(&run(&[&bench[..], &placed, &["--repeats", "1", "--verify"]].concat()));
    assert_eq!(lines.len(), 2, "with digests and without");
    for line in lines {
        assert_eq!(line["placed"], serde_json::json!(["fsdp=2,ranks=2", "tp=2,ranks=2"]));
        assert_eq!((line["verified"].as_bool(), line["rollouts"].as_u64()), (Some(true), Some(2)));
    }
}

#[test]
fn what_rollouts_write_is_what_the_trainer_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (first, second) = (path("first"), path("second"));
    json_lines(&run(&["sync", "--synthetic", "tiny-moe", "--out", &first, "--json"]));
    let model = format!("{first}/rollout-0");
    let sync = ["sync", "--model", &model, "--rollouts", "2", "--updates", "2", "--verify"];
    json_lines(&run(&[&sync[..], &["--out", &second, "--json", "--bucket-mb", "1"]].concat()));
    for rollout in ["rollout-0", "rollout-1"] {
        let output = run(&["verify", &model, &format!("{second}/{rollout}")]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn a_folder_that_rollouts_cannot_write_to_is_the_error_that_everyone_is_told() {
    let output =
        run(&["sync", "--synthetic", "tiny-moe", "--backend", "ipc", "--out", "/proc/nope"]);
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr);
    let cause = error.lines().filter(|line| line.contains("/proc/nope")).count();
    assert!(cause > 0, "{error}");
    // Each line is of the cause: no other one before it or after it.
    assert_eq!(error.lines().count(), cause, "{error}");
}

#[test]
fn a_killed_rollout_is_one_error_that_names_it_and_nothing_is_left() {
    // Between two updates only the trainer hears of it; within one, all ranks do, and only one of them says it.
    let mut was_within_an_update = false;
    for round in 0..20 {
        let (child, output) = long_sync("2");
        let pid = child.id();
        let rollouts = children_of(pid);
        assert_eq!(rollouts.len(), 2);
        // The line of an update is printed when the update is over.
        std::thread::sleep(Duration::from_millis(50 + 13 * round));
        kill(rollouts[1]);
        for line in output.lines() {
            line.expect("text");
        }
        let (status, errors) = end_of(child);
        assert_eq!(status.code(), Some(1), "{errors}");
        assert!(errors.contains("rank 1") || errors.contains("rank 2"), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        eventually("the other rollout ends", || !rollouts.iter().any(|pid| is_alive(*pid)));
        was_within_an_update |= errors.contains("bucket");
        if was_within_an_update {
            break;
        }
    }
    assert!(was_within_an_update, "no rollout was killed within an update");
    json_lines(&run(&["sync", "--synthetic", "tiny-moe", "--verify", "--json"]));
}

#[test]
fn rollouts_of_a_killed_trainer_end_by_themselves() {
    let (mut child, output) = long_sync("2");
    let rollouts = children_of(child.id());
    assert_eq!(rollouts.len(), 2);
    kill(child.id());
    drop(output);
    child.wait().expect("it was killed");
    eventually("the rollouts end", || !rollouts.iter().any(|pid| is_alive(*pid)));
    json_lines(&run(&["sync", "--synthetic", "tiny-moe", "--verify", "--json"]));
}

#[test]
fn an_interrupt_ends_all_processes() {
    let (child, output) = long_sync("1");
    let rollouts = children_of(child.id());
    let interrupt = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupt.expect("kill runs").success());
    drop(output);
    let (status, errors) = end_of(child);
    assert_eq!(status.code(), Some(130), "{errors}");
    eventually("the rollout ends", || !rollouts.iter().any(|pid| is_alive(*pid)));
}

#[test]
fn buckets_that_there_is_no_memory_for_are_an_error_in_words() {
    let output = run(&["sync", "--synthetic", "tiny-moe", "--bucket-mb", "4000000"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("no memory for"), "{errors}");
    assert!(errors.contains("update_weights_bucket_megabytes"), "{errors}");
}

#[test]
#[ignore = "needs root or unprivileged user namespaces, to have a /dev/shm of its own"]
fn a_sync_needs_no_room_in_dev_shm() {
    // As small as Docker makes it, and full.
    let script = "mount -t tmpfs -o size=1m none /dev/shm || exit 77
        head -c 1M /dev/zero > /dev/shm/others
        \"$0\" sync --synthetic tiny-moe --verify --bucket-mb 16
        echo \"status $?, in it: $(ls /dev/shm)\"";
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "bash", "-c", script])
        .arg(program().get_program())
        .output()
        .expect("unshare runs");
    assert_ne!(output.status.code(), Some(77), "there can be no /dev/shm of its own here");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(said.ends_with("status 0, in it: others\n"), "{said}{errors}");
}

#[test]
fn wrong_usage_is_told_with_what_would_be_right() {
    for (args, words) in [
        (&["sync"][..], "--synthetic"),
        (&["sync", "--synthetic", "gpt-9"], "tiny-moe"),
        (&["sync", "--synthetic", "tiny-moe", "--bucket-mb", "0"], "--bucket-mb"),
        (
            &["sync", "--synthetic", "tiny-moe", "--backend", "pigeons"],
            "known: naive, ipc, nccl, nixl, hccl, dir",
        ),
        (&["sync", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ] {
        let output = run(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?}");
        assert!(errors.contains(words), "{args:?}: {errors}");
    }
}

/// Starts a rollout by hand, as a scheduler would.
fn rollout(address: &str, token: &Path, extra: &[&str]) -> Child {
    program()
        .args(["rollout", "--rendezvous", address, "--timeout", "20"])
        .arg("--token-file")
        .arg(token)
        .args(extra)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts")
}

#[test]
fn roles_started_by_hand_find_each_other_and_a_stranger_is_kept_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let (token, other) = (folder.path().join("token"), folder.path().join("other"));
    let address = format!("unix:@ckpt-engine-test-{}", std::process::id());
    let trainer = program()
        .args(["trainer", "--rendezvous", &address, "--rollouts", "2", "--updates", "3"])
        .args(["--synthetic", "tiny-moe", "--json", "--timeout", "20", "--token-file"])
        .arg(&token)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    eventually("the trainer has made a token", || token.exists());
    control_plane::Token::create(&other).expect("another token");
    let stranger = rollout(&address, &other, &["--world-size", "3"]);
    let (status, errors) = end_of(stranger);
    assert_eq!(status.code(), Some(1));
    assert!(errors.contains("token"), "{errors}");
    let rollouts: Vec<Child> = (0..2).map(|_| rollout(&address, &token, &["--verify"])).collect();
    let output = trainer.wait_with_output().expect("it ends");
    for line in json_lines(&output) {
        assert_eq!(line["verified"], true);
    }
    for rollout in rollouts {
        let output = rollout.wait_with_output().expect("it ends");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(text.lines().count(), 3, "{text}");
    }
}

#[test]
fn a_trainer_goes_on_with_the_rollouts_that_are_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    let address = format!("unix:@ckpt-engine-left-{}", std::process::id());
    let mut trainer = program()
        .args(["trainer", "--rendezvous", &address, "--rollouts", "2", "--updates", "6"])
        .args(["--synthetic", "qwen2.5-0.5b", "--layers", "1", "--json", "--timeout", "10"])
        .args(["--interval", "0.2", "--token-file"])
        .arg(&token)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    eventually("the trainer has made a token", || token.exists());
    let mut rollouts: Vec<Child> =
        (0..2).map(|_| rollout(&address, &token, &["--verify", "--world-size", "3"])).collect();
    let mut output = BufReader::new(trainer.stdout.take().expect("piped"));
    let mut first = String::new();
    output.read_line(&mut first).expect("a first update");
    let mut lost = rollouts.remove(0);
    kill(lost.id());
    lost.wait().expect("it was killed");
    let mut rest = String::new();
    output.read_to_string(&mut rest).expect("text");
    let (_, errors) = end_of(trainer);
    let last: serde_json::Value =
        serde_json::from_str(rest.lines().last().expect("more updates")).expect("JSON");
    assert_eq!(last["version"], 6, "{errors}");
    assert_eq!(last["verified"], true);
    assert_eq!(last["rollouts"].as_array().expect("rollouts").len(), 1);
    let left = rollouts.remove(0).wait_with_output().expect("it ends");
    assert!(left.status.success(), "{}", String::from_utf8_lossy(&left.stderr));
}

#[test]
fn a_rollout_that_joins_later_takes_part_in_the_next_update() {
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    let address = format!("unix:@ckpt-engine-late-{}", std::process::id());
    let mut trainer = program()
        .args(["trainer", "--rendezvous", &address, "--rollouts", "1", "--updates", "60"])
        .args(["--synthetic", "tiny-moe", "--json", "--timeout", "10"])
        .args(["--interval", "0.1", "--token-file"])
        .arg(&token)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    eventually("the trainer has made a token", || token.exists());
    let early = rollout(&address, &token, &["--verify"]);
    let mut output = BufReader::new(trainer.stdout.take().expect("piped"));
    let mut first = String::new();
    output.read_line(&mut first).expect("a first update");
    let late = rollout(&address, &token, &["--verify"]);
    let mut rest = String::new();
    output.read_to_string(&mut rest).expect("text");
    let (status, errors) = end_of(trainer);
    assert!(status.success(), "{errors}");
    let last: serde_json::Value =
        serde_json::from_str(rest.lines().last().expect("more updates")).expect("JSON");
    assert_eq!(last["verified"], true);
    assert_eq!(last["rollouts"].as_array().expect("rollouts").len(), 2);
    for rollout in [early, late] {
        let output = rollout.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_rollout_that_joins_later_gets_the_version_at_once_from_one_that_holds_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    for backend in ["ipc", "nixl"] {
        let address = format!("unix:@ckpt-engine-held-{backend}-{}", std::process::id());
        // After the first update the trainer does nothing for as long as this takes.
        let mut trainer = program()
            .args(["trainer", "--rendezvous", &address, "--rollouts", "1", "--updates", "2"])
            .args(["--synthetic", "tiny-moe", "--json", "--timeout", "10", "--backend", backend])
            .args(["--interval", "600", "--trainer-quantize-fp8", "--token-file"])
            .arg(&token)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        eventually("the trainer has made a token", || token.exists());
        let options = ["--verify", "--backend", backend, "--hold", "127.0.0.1:0"];
        let mut rollouts = vec![rollout(&address, &token, &options)];
        let mut first = String::new();
        let output = trainer.stdout.take().expect("piped");
        BufReader::new(output).read_line(&mut first).expect("a first update");
        // The second one gets it from the first, or from the one before it.
        for _ in 0..2 {
            let mut late = rollout(&address, &token, &options);
            let mut line = String::new();
            let output = late.stdout.take().expect("piped");
            BufReader::new(output).read_line(&mut line).expect("a line");
            rollouts.push(late);
            assert!(line.starts_with("version 1: "), "{line}");
        }
        for mut process in rollouts.into_iter().chain([trainer]) {
            process.kill().expect("it runs");
            process.wait().expect("it ends");
        }
    }
}

#[test]
fn a_rollout_that_takes_the_version_from_a_holder_makes_no_update_whole_for_the_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    for (name, holds) in [("holds", &["--hold", "127.0.0.1:0"][..]), ("alone", &[])] {
        let address = format!("unix:@ckpt-engine-{name}-{}", std::process::id());
        let mut trainer = program()
            .args(["trainer", "--rendezvous", &address, "--rollouts", "1", "--updates", "1000"])
            .args(["--synthetic", "tiny-moe", "--json", "--timeout", "10", "--interval", "0.3"])
            .args(["--delta", "--change-rate", "0.01", "--trainer-quantize-fp8", "--token-file"])
            .arg(&token)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        eventually("the trainer has made a token", || token.exists());
        let options = [&["--verify", "--delta"], holds].concat();
        let first = rollout(&address, &token, &options);
        let lines = BufReader::new(trainer.stdout.take().expect("piped")).lines();
        let mut lines = lines.map(|line| -> serde_json::Value {
            serde_json::from_str(&line.expect("text")).expect("a JSON object a line")
        });
        let whole = |line: &serde_json::Value| !line["delta"]["whole"].is_null();
        let bytes = |line: &serde_json::Value| line["wire_bytes"].as_u64().expect("bytes");
        let one = lines.next().expect("an update");
        assert!(whole(&one), "{one}");
        let late = rollout(&address, &token, &options);
        let is_of_both =
            |line: &serde_json::Value| line["rollouts"].as_array().expect("rollouts").len() == 2;
        let before = std::iter::from_fn(|| lines.next()).find(|line| {
            assert!(is_of_both(line) || !whole(line), "{line}");
            is_of_both(line)
        });
        let both = before.expect("an update of both");
        // Without a holder, the one that has no version makes the update whole for both.
        assert_eq!(whole(&both), holds.is_empty(), "{both}");
        assert_eq!(bytes(&both) > bytes(&one) / 2, holds.is_empty(), "{both}");
        let next = lines.next().expect("an update");
        assert!(!whole(&next) && next["verified"] == true, "{next}");
        for mut process in [first, late, trainer] {
            process.kill().expect("it runs");
            process.wait().expect("it ends");
        }
        std::fs::remove_file(&token).expect("a token");
    }
}

#[test]
fn torchruns_environment_says_where_and_who() {
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    control_plane::Token::create(&token).expect("a token");
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port")
        .port()
        .to_string();
    let start = |rank: &str, args: &[&str]| {
        program()
            .args(args)
            .args(["--timeout", "10", "--token-file"])
            .arg(&token)
            .envs([("RANK", rank), ("WORLD_SIZE", "3")])
            .envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts")
    };
    let trainer = start("0", &["trainer", "--synthetic", "tiny-moe", "--json"]);
    let rollouts = ["1", "2"].map(|rank| start(rank, &["rollout", "--verify"]));
    let lines = json_lines(&trainer.wait_with_output().expect("it ends"));
    assert_eq!(lines[0]["verified"], true);
    assert_eq!(lines[0]["rollouts"].as_array().expect("rollouts").len(), 2);
    for rollout in rollouts {
        assert!(rollout.wait_with_output().expect("it ends").status.success());
    }
    // Another trainer takes part in a leader's updates, and there is none any more.
    let lost = start("1", &["trainer", "--synthetic", "tiny-moe"]);
    let (status, errors) = end_of(lost);
    assert_eq!(status.code(), Some(1));
    assert!(errors.contains("no leader at"), "{errors}");
}

//! Updates of servers that keep to SGLang's contract, over a library of collectives within the process.

mod support;

use std::time::{Duration, Instant};

use engine_core::{ErrorKind, Rank, Version, VersionState, ensure_async_iterator};
use receivers::ServerKind;
use serde_json::json;
use support::server::{Server, Started, Wrong, tensors};
use support::{drop_at, even, ignored_layers, model, plain, trainer, trainer_with};

/// A server that generates with a version, and with every byte of it.
fn has(server: &Server, version: u64) {
    let (said, weights) = server.generate().expect("it generates");
    assert_eq!(said, version.to_string());
    assert!(weights == tensors(&model(version)), "other bytes than version {version} has");
}

async fn start() -> Server {
    Server::start(&model(0), Started::sglang()).await
}

#[tokio::test]
async fn servers_of_several_workers_get_every_byte_of_every_update_and_say_its_version() {
    let two = Server::start(&model(0), Started { workers: 2, ..Started::sglang() }).await;
    let one = start().await;
    let mut trainer = trainer(&[&two, &one], plain()).await;
    for version in 1..=3 {
        let weights = ensure_async_iterator(model(version));
        let report = trainer.send_weights(weights, Version(version)).await.expect("an update");
        has(&two, version);
        has(&one, version);
        assert_eq!(report.receivers[0].state, VersionState::Active);
        assert_eq!(report.receivers[0].notes["server"], two.url());
        assert_eq!(report.receivers[0].notes["workers"], 2);
        assert!(report.buckets > 2, "one bucket shows nothing of the next");
        let bytes: u64 = model(version).iter().map(engine_core::Weight::byte_len).sum();
        let loaded =
            json!({ "buckets": report.buckets, "tensors": model(version).len(), "bytes": bytes });
        assert_eq!(report.receivers[0].notes["loaded"], loaded);
    }
    one.asked();
    trainer.finalize().await.expect("an end");
    assert_eq!(one.asked(), ["/destroy_weights_update_group"]);
    has(&one, 3);
}

#[tokio::test]
async fn servers_are_asked_everything_once_and_then_only_which_version_they_have() {
    let server = start().await;
    let mut trainer = trainer(&[&server], plain()).await;
    let mut asked = Vec::new();
    for version in 1..=2 {
        let sent = trainer.send_weights(ensure_async_iterator(model(version)), Version(version));
        sent.await.expect("an update");
        let mut of_update = server.asked();
        of_update.dedup();
        asked.push(of_update.join(" "));
    }
    let update = "/begin_weight_update /update_weights_from_distributed /end_weight_update /flush_cache \
                  /update_weight_version /model_info /continue_generation";
    let (looks, pause) = ("/server_info /model_info", "/pause_generation");
    assert_eq!(asked[0], format!("{looks} {pause} /init_weights_update_group {update}"));
    assert_eq!(asked[1], format!("/model_info {pause} {update}"));
}

#[tokio::test]
async fn a_server_of_several_replicas_is_an_error_that_says_how_to_start_it() {
    let started = Started { replicas: 2, ..Started::sglang() };
    let server = Server::start(&model(0), started).await;
    let mut trainer = trainer(&[&server], plain()).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    let error = sent.expect_err("it cannot be sent to");
    assert_eq!((error.kind(), error.report().rank), (ErrorKind::Config, Some(Rank(1))));
    assert!(error.to_string().contains("--dp-size 2"), "{error}");
    assert_eq!(server.generate().expect("as before").0, "default");
}

#[tokio::test]
async fn a_stream_that_fails_leaves_no_server_hanging_and_the_next_update_is_whole() {
    let server = start().await;
    let mut trainer = trainer(&[&server], plain()).await;
    for at in 0..model(1).len() {
        let mut weights: Vec<std::io::Result<_>> = model(1).into_iter().map(Ok).collect();
        weights.truncate(at);
        weights.push(Err(std::io::Error::other("the gather failed")));
        let begun = Instant::now();
        let sent = trainer.send_weights(ensure_async_iterator(weights), Version(1)).await;
        assert_eq!(sent.expect_err("it fails").kind(), ErrorKind::Source);
        assert!(begun.elapsed() < Duration::from_secs(2), "somebody waited");
        let next = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
        next.expect("the next update works");
        has(&server, 2);
    }
}

#[tokio::test]
async fn a_server_that_fails_anywhere_is_named_and_left_out_and_loaded_by_the_next_update() {
    let places = [
        ("/server_info", 0),
        ("/model_info", 0),
        ("/model_info", 1),
        ("/pause_generation", 0),
        ("/init_weights_update_group", 0),
        ("/begin_weight_update", 0),
        ("/update_weights_from_distributed", 0),
        ("/update_weights_from_distributed", 1),
        ("/end_weight_update", 0),
        ("/flush_cache", 0),
        ("/update_weight_version", 0),
        ("/continue_generation", 0),
    ];
    for (path, nth) in places {
        let what = format!("{path} {nth}");
        let good = Server::start(&model(0), Started { workers: 2, ..Started::sglang() }).await;
        let bad = start().await;
        let mut trainer = trainer(&[&good, &bad], plain()).await;
        bad.wrong(path, nth, Wrong::FailsAfterwards("CUDA out of memory"));
        let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
        let report = sent.unwrap_or_else(|error| panic!("{what}: {error}"));
        has(&good, 1);
        assert_eq!(report.absent, [Rank(2)], "{what}");
        assert_eq!(report.receivers[1].state, VersionState::Aborted, "{what}");
        let notes = report.receivers[1].notes["error"].to_string();
        assert!(notes.contains("CUDA out of memory") && notes.contains(&bad.url()), "{notes}");
        if path == "/update_weights_from_distributed" {
            let loaded = &report.receivers[1].notes["loaded"]["buckets"];
            assert_eq!(loaded, nth, "{what}: what it did not say that it loaded");
        }
        if ["/server_info", "/pause_generation", "/init_weights_update_group"].contains(&path) {
            let (version, weights) = bad.generate().expect("it was stopped for nothing");
            assert!(version == "default" && weights == tensors(&model(0)), "{what}");
        }
        // It generates with the old weights, with the whole new ones, or not at all.
        if let Ok((version, weights)) = bad.generate() {
            let of = if version == "1" { 1 } else { 0 };
            assert!(weights == tensors(&model(of)), "{what}: half loaded, and it generates");
        }
        let report = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
        let report = report.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(report.absent.is_empty(), "{what}: {report:?}");
        has(&good, 2);
        has(&bad, 2);
    }
}

#[tokio::test]
async fn a_server_that_dies_or_falls_silent_ends_no_update_of_the_others_between_buckets() {
    for path in
        ["/server_info", "/init_weights_update_group", "/begin_weight_update", "/flush_cache"]
    {
        for wrong in [Wrong::Dies, Wrong::Silent] {
            let what = format!("{wrong:?} at {path}");
            let good = start().await;
            let bad = start().await;
            let mut trainer = trainer_with(&[&bad, &good], plain(), 1.0).await.expect("a trainer");
            bad.wrong(path, 0, wrong);
            let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
            let report = sent.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(report.absent, [Rank(1)], "{what}");
            has(&good, 1);
            let bad = bad.start_anew(&model(0)).await;
            let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
            assert!(sent.expect("an update").absent.is_empty(), "{what}");
            has(&good, 2);
            has(&bad, 2);
        }
    }
}

#[tokio::test]
async fn a_server_that_takes_no_part_in_the_first_broadcast_hangs_no_trainer() {
    for wrong in [Wrong::Dies, Wrong::Silent, Wrong::Refuses("CUDA out of memory")] {
        let server = start().await;
        let mut trainer = trainer_with(&[&server], plain(), 1.0).await.expect("a trainer");
        server.wrong("/update_weights_from_distributed", 0, wrong.clone());
        let begun = Instant::now();
        let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
        let error = sent.expect_err("nobody has it");
        assert!(begun.elapsed() < Duration::from_secs(4), "{wrong:?}: {:?}", begun.elapsed());
        server.generate().expect_err("it stays paused, or is dead");
        if wrong == Wrong::Refuses("CUDA out of memory") {
            assert!(error.to_string().contains("CUDA out of memory"), "{error}");
        }
        let server = match wrong {
            Wrong::Dies => server.start_anew(&model(0)).await,
            _ => server,
        };
        let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
        sent.unwrap_or_else(|error| panic!("{wrong:?}: {error}"));
        has(&server, 2);
    }
}

#[tokio::test]
async fn a_server_that_was_started_anew_between_updates_joins_again() {
    let server = start().await;
    let mut trainer = trainer(&[&server], plain()).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    sent.expect("an update");
    let server = server.start_anew(&model(0)).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
    assert!(sent.expect("an update").absent.is_empty());
    has(&server, 2);
}

#[tokio::test]
async fn a_session_that_another_trainer_left_open_is_ended_first() {
    let server = start().await;
    {
        let mut first = trainer(&[&server], plain()).await;
        let part = model(1).into_iter().take(9).map(Ok);
        let gone: Vec<std::io::Result<_>> =
            part.chain([Err(std::io::Error::other("gone"))]).collect();
        let sent = first.send_weights(ensure_async_iterator(gone), Version(1)).await;
        sent.expect_err("it is gone");
    }
    server.generate().expect_err("a session is open");
    let mut second = trainer(&[&server], plain()).await;
    let sent = second.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
    sent.expect("an update");
    has(&server, 2);
}

#[tokio::test]
async fn no_bucket_of_a_dropped_update_is_taken_for_one_of_the_next() {
    for (started, options) in
        [(Started::sglang(), plain()), (Started::sglang(), json!({ "transport": "ipc" }))]
    {
        let server = Server::start(&even(0), started).await;
        let mut trainer = trainer(&[&server], options.clone()).await;
        let sent = trainer.send_weights(ensure_async_iterator(even(1)), Version(1)).await;
        sent.expect("an update");
        let path = match &options["transport"] {
            serde_json::Value::Null => "/update_weights_from_distributed",
            _ => "/update_weights_from_tensor",
        };
        for at in 0..even(1).len() {
            // The server gets to the bucket of that moment when the next update has sent all of its own. That one ends what
            // was open first, so its own end is the second.
            if at > 1 {
                server.wrong(path, at - 2, Wrong::Slow(Duration::from_millis(60)));
                server.wrong("/end_weight_update", 1, Wrong::Slow(Duration::from_millis(120)));
            }
            drop_at(&mut *trainer, even(1), at).await;
            let sent = trainer.send_weights(ensure_async_iterator(even(2)), Version(2)).await;
            sent.unwrap_or_else(|error| panic!("at {at}: {error}"));
            let (version, weights) = server.generate().expect("it generates");
            assert_eq!(version, "2");
            assert!(weights == tensors(&even(2)), "at {at}: bytes of the update that was dropped");
        }
    }
}

#[tokio::test]
async fn dropping_an_update_at_any_moment_leaves_the_next_one_whole() {
    let server = start().await;
    let mut trainer = trainer(&[&server], plain()).await;
    for micros in (0..40_000).step_by(1700) {
        let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1));
        drop(tokio::time::timeout(Duration::from_micros(micros), sent).await);
        let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
        sent.unwrap_or_else(|error| panic!("after {micros} µs: {error}"));
        has(&server, 2);
    }
}

#[tokio::test]
async fn what_is_cached_stays_and_nobody_is_paused_where_the_configuration_says_so() {
    for (pause, flushes, pauses) in [("in_place", false, true), ("none", true, false)] {
        let server = start().await;
        let mut trainer = trainer(&[&server], json!({ "pause": pause })).await;
        let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
        sent.expect("an update");
        has(&server, 1);
        let asked = server.asked();
        assert_eq!(asked.iter().any(|path| path == "/flush_cache"), flushes, "{pause}");
        assert_eq!(asked.iter().any(|path| path == "/pause_generation"), pauses, "{pause}");
    }
}

#[tokio::test]
async fn an_address_that_workers_do_not_reach_is_an_error_of_the_server_in_its_own_words() {
    let server = start().await;
    let options = json!({ "master_address": "nowhere.invalid" });
    let mut trainer = trainer(&[&server], options).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    let error = sent.expect_err("they do not meet");
    assert_eq!(error.report().rank, Some(Rank(1)));
    assert!(error.to_string().contains("Failed to initialize custom process group"), "{error}");
}

#[tokio::test]
async fn a_server_on_the_trainers_gpu_reads_every_byte_of_every_update_where_it_is() {
    let server = start().await;
    let mut trainer = trainer(&[&server], json!({ "transport": "ipc" })).await;
    for version in 1..=3 {
        let sent = trainer.send_weights(ensure_async_iterator(model(version)), Version(version));
        assert!(sent.await.expect("an update").buckets > 2);
        has(&server, version);
    }
    assert!(!server.asked().iter().any(|path| path.contains("group")));
    server.wrong("/update_weights_from_tensor", 1, Wrong::Refuses("CUDA out of memory"));
    let sent = trainer.send_weights(ensure_async_iterator(model(4)), Version(4)).await;
    assert!(sent.expect_err("nobody has it").to_string().contains("CUDA out of memory"));
    server.generate().expect_err("it is half loaded");
    let sent = trainer.send_weights(ensure_async_iterator(model(5)), Version(5)).await;
    assert!(sent.expect("an update").absent.is_empty());
    has(&server, 5);
}

#[tokio::test]
async fn a_server_of_several_workers_is_none_that_the_trainers_gpu_reaches() {
    let server = Server::start(&model(0), Started { workers: 2, ..Started::sglang() }).await;
    let mut trainer = trainer(&[&server], json!({ "transport": "ipc" })).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    let error = sent.expect_err("it cannot be sent to");
    assert!(
        error.kind() == ErrorKind::Config && error.to_string().contains("2 workers"),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_that_was_started_with_keys_is_shown_them_and_nobody_else_sees_them() {
    let folder = std::env::temp_dir().join(format!("ckpt-receivers-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let file = |name: &str, key: &str| {
        let file = folder.join(name);
        std::fs::write(&file, format!("{key}\n")).expect("a file");
        file
    };
    let (usual, admin) = (file("usual", "s3cret-usual"), file("admin", "s3cret-admin"));
    let keys = Some(("s3cret-usual", "s3cret-admin"));
    let server = Server::start(&model(0), Started { keys, ..Started::sglang() }).await;
    let mut keyless = trainer(&[&server], plain()).await;
    let sent = keyless.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    let error = sent.expect_err("it asks for a key");
    assert!(
        error.kind() == ErrorKind::Config && error.to_string().contains("api_key_file"),
        "{error}"
    );
    let mut halfway = trainer(&[&server], json!({ "api_key_file": usual })).await;
    let sent = halfway.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    assert!(sent.expect_err("of those who change it, another").to_string().contains("another key"));
    let options = json!({ "api_key_file": usual, "admin_api_key_file": admin });
    let mut trainer = trainer(&[&server], options).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    assert!(sent.expect("an update").absent.is_empty());
    has(&server, 1);
    assert!(!format!("{trainer:?}").contains("s3cret"));
    // A server that repeats what it was shown.
    server.wrong(
        "/begin_weight_update",
        0,
        Wrong::Refuses("no s3cret-admin, no s3cret-usual here"),
    );
    let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
    let error = sent.expect_err("it refuses");
    assert!(error.to_string().contains("no …, no … here"), "{error}");
    assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
    let (url, limit) = (server.url().parse().expect("an address"), Duration::from_secs(1));
    let (kind, checks) = receivers::examine(&url, None, limit).await;
    assert!(kind.is_none() && checks[0].details.contains("api_key_file"), "{checks:?}");
    let key = receivers::ApiKey::read(&usual).expect("a key");
    let (kind, checks) = receivers::examine(&url, Some(&key), limit).await;
    assert!(
        kind == Some(ServerKind::Sglang) && checks.iter().all(|check| check.passed),
        "{checks:?}"
    );
    std::fs::remove_dir_all(&folder).expect("it was there");
}

#[tokio::test]
async fn each_rank_of_tensor_parallelism_reads_on_its_own_gpu() {
    let two = Server::start(&model(0), Started { workers: 2, ..Started::sglang() }).await;
    let one = start().await;
    let options = json!({ "transport": "ipc", "devices": ["cuda:0", "cuda:1"] });
    let mut sends = trainer(&[&two, &one], options).await;
    for version in 1..=2 {
        let sent = sends.send_weights(ensure_async_iterator(model(version)), Version(version));
        assert!(sent.await.expect("an update").absent.is_empty());
        has(&two, version);
        has(&one, version);
    }
    // Listed in another order than that of its ranks.
    let options = json!({ "transport": "ipc", "devices": ["cuda:1", "cuda:0"] });
    let mut sends = trainer(&[&two], options).await;
    let sent = sends.send_weights(ensure_async_iterator(model(3)), Version(3)).await;
    assert!(sent.expect_err("no rank finds its own").to_string().contains("device_uuid"));
}

#[tokio::test]
async fn a_layer_that_a_servers_checkpoint_leaves_alone_is_not_sent_in_fp8() {
    ignored_layers::are_not_sent_in_fp8(Started::sglang).await;
}

#[tokio::test]
async fn a_doctor_tells_the_kinds_of_servers_apart_and_says_what_they_are() {
    let limit = Duration::from_secs(1);
    let server = Server::start(&model(0), Started { workers: 4, ..Started::sglang() }).await;
    let url = server.url().parse().expect("an address");
    let (kind, checks) = receivers::examine(&url, None, limit).await;
    assert_eq!(kind, Some(ServerKind::Sglang));
    assert!(checks.iter().all(|check| check.passed), "{checks:?}");
    assert!(checks[0].details.contains("0.5.23") && checks[1].details.contains("4 workers"));
    assert!(!server.asked().iter().any(|path| path.contains("update")));
    let server = Server::start(&model(0), Started::default()).await;
    let url = server.url().parse().expect("an address");
    assert_eq!(receivers::examine(&url, None, limit).await.0, Some(ServerKind::Vllm));
    let nobody = "http://127.0.0.1:1".parse().expect("an address");
    let (kind, checks) = receivers::examine(&nobody, None, limit).await;
    assert!(kind.is_none() && !checks[0].passed && checks[0].details.contains("not reached"));
}

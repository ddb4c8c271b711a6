//! Updates of servers that keep to vLLM's contract, over a library of collectives within the process.

mod support;

use std::time::{Duration, Instant};

use engine_core::{DType, ErrorKind, Rank, Version, VersionState, Weight, ensure_async_iterator};
use futures::TryStreamExt;
use quant_fp8::QuantizeFp8;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use serde_json::json;
use support::collectives::DEVICES;
use support::server::{Server, Started, Wrong, tensors};
use support::{
    config, drop_at, even, ignored_layers, join, model, plain, registry, trainer, trainer_with,
};

/// A server that generates with a version, and with every byte of it.
fn has(server: &Server, version: u64) {
    let (said, weights) = server.generate().expect("it generates");
    assert_eq!(said, version.to_string());
    assert!(weights == tensors(&model(version)), "other bytes than version {version} has");
}

#[tokio::test]
async fn a_server_gets_every_byte_of_every_update_and_says_its_version() {
    let server = Server::start(&model(0), Started { workers: 2, ..Default::default() }).await;
    let mut trainer = trainer(&[&server], plain()).await;
    for version in 1..=3 {
        let weights = ensure_async_iterator(model(version));
        let report = trainer.send_weights(weights, Version(version)).await.expect("an update");
        has(&server, version);
        assert_eq!(report.receivers[0].state, VersionState::Active);
        assert_eq!(report.receivers[0].notes["server"], server.url());
        assert_eq!(report.receivers[0].notes["workers"], 2);
        assert_eq!(report.counts.tensors, model(version).len() as u64);
        assert!(report.buckets > 2, "one bucket shows nothing of the next");
        let bytes: u64 = model(version).iter().map(engine_core::Weight::byte_len).sum();
        let loaded =
            json!({ "buckets": report.buckets, "tensors": model(version).len(), "bytes": bytes });
        assert_eq!(report.receivers[0].notes["loaded"], loaded);
    }
    server.asked();
    trainer.finalize().await.expect("an end");
    assert_eq!(server.asked(), ["/shutdown_weight_transfer_engine"]);
    has(&server, 3);
}

#[tokio::test]
async fn servers_are_asked_everything_once_and_then_only_which_version_they_have() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&server], plain()).await;
    let mut asked = Vec::new();
    for version in 1..=2 {
        let sent = trainer.send_weights(ensure_async_iterator(model(version)), Version(version));
        sent.await.expect("an update");
        let mut of_update = server.asked();
        of_update.dedup();
        asked.push(of_update.join(" "));
    }
    let update =
        "/pause /start_weight_update /update_weights /finish_weight_update /weight_info /resume";
    let looks = "/health /get_world_size /weight_info /v1/models /init_weight_transfer_engine";
    let forms = "/init_weight_transfer_engine";
    let (pause, rest) = update.split_once(' ').expect("words");
    assert_eq!(asked[0], format!("{looks} {pause} {forms} {rest}"));
    assert_eq!(asked[1], format!("/weight_info {update}"));
}

#[tokio::test]
async fn unpacked_each_weight_is_a_broadcast_of_its_own_and_whatever_fails_the_next_update_is_whole()
 {
    let good = Server::start(&model(0), Started { workers: 2, ..Default::default() }).await;
    let bad = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&good, &bad], json!({ "unpacked": true })).await;
    for version in 1..=2 {
        let sent = trainer.send_weights(ensure_async_iterator(model(version)), Version(version));
        let report = sent.await.expect("an update");
        assert!(report.buckets > 2 && report.absent.is_empty(), "{report:?}");
        has(&good, version);
        has(&bad, version);
    }
    bad.wrong("/update_weights", 1, Wrong::Refuses("CUDA out of memory"));
    let sent = trainer.send_weights(ensure_async_iterator(model(3)), Version(3)).await;
    assert_eq!(sent.expect("an update").absent, [Rank(2)]);
    has(&good, 3);
    let sent = trainer.send_weights(ensure_async_iterator(model(4)), Version(4)).await;
    assert!(sent.expect("an update").absent.is_empty());
    has(&good, 4);
    has(&bad, 4);
}

async fn refused(started: Started) -> engine_core::Error {
    let server = Server::start(&model(0), started).await;
    let mut trainer = trainer(&[&server], plain()).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    let error = sent.expect_err("it cannot be sent to");
    assert_eq!(error.report().rank, Some(Rank(1)));
    let (version, weights) = server.generate().expect("it generates as before");
    assert!(version == "default" && weights == tensors(&model(0)));
    error
}

#[tokio::test]
async fn a_server_that_was_not_started_for_it_is_an_error_that_says_how_to_start_it() {
    let error = refused(Started { dev_mode: false, ..Default::default() }).await;
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("VLLM_SERVER_DEV_MODE=1"), "{error}");
    for backend in [None, Some("ipc")] {
        let error = refused(Started { backend, ..Default::default() }).await;
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("--weight-transfer-config"), "{error}");
    }
}

#[tokio::test]
async fn a_stream_that_fails_leaves_no_server_hanging_and_the_next_update_is_whole() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&server], plain()).await;
    let broken = |at: usize| {
        let mut weights: Vec<std::io::Result<_>> = model(1).into_iter().map(Ok).collect();
        weights.truncate(at);
        weights.push(Err(std::io::Error::other("the gather failed")));
        ensure_async_iterator(weights)
    };
    // Nothing has begun anywhere when the first bucket fails.
    let error = trainer.send_weights(broken(0), Version(1)).await.expect_err("the stream fails");
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(server.asked().is_empty());
    // Every place that a bucket may end before, and within a layer.
    for at in 1..model(1).len() {
        let begun = Instant::now();
        let error = trainer.send_weights(broken(at), Version(1)).await.expect_err("it fails");
        assert_eq!(error.kind(), ErrorKind::Source);
        assert!(begun.elapsed() < Duration::from_secs(2), "somebody waited");
        let next = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
        next.expect("the next update works");
        has(&server, 2);
    }
}

#[tokio::test]
async fn a_server_that_fails_anywhere_is_named_and_left_out_and_loaded_by_the_next_update() {
    let paths = [
        "/pause",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/weight_info",
        "/resume",
        "/init_weight_transfer_engine",
        "/get_world_size",
    ];
    for path in paths {
        for nth in [0, 1] {
            // The first question to join is whether it is configured.
            let comes_twice = ["/update_weights", "/weight_info", "/init_weight_transfer_engine"];
            if nth == 1 && !comes_twice.contains(&path) {
                continue;
            }
            let what = format!("{path} {nth}");
            let good = Server::start(&model(0), Started { workers: 2, ..Default::default() }).await;
            let bad = Server::start(&model(0), Started::default()).await;
            let mut trainer = trainer(&[&good, &bad], plain()).await;
            bad.wrong(path, nth, Wrong::FailsAfterwards("CUDA out of memory"));
            let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
            let report = sent.unwrap_or_else(|error| panic!("{what}: {error}"));
            has(&good, 1);
            assert_eq!(report.absent, [Rank(2)], "{what}");
            assert_eq!(report.receivers[1].state, VersionState::Aborted, "{what}");
            let notes = report.receivers[1].notes["error"].to_string();
            assert!(notes.contains("CUDA out of memory") && notes.contains(&bad.url()), "{notes}");
            if ["/pause", "/init_weight_transfer_engine", "/get_world_size"].contains(&path) {
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
}

#[tokio::test]
async fn a_server_that_dies_or_falls_silent_ends_no_update_of_the_others_between_buckets() {
    for (path, nth) in [("/health", 0), ("/start_weight_update", 0), ("/finish_weight_update", 0)] {
        for wrong in [Wrong::Dies, Wrong::Silent] {
            let what = format!("{wrong:?} at {path} {nth}");
            let good = Server::start(&model(0), Started::default()).await;
            let bad = Server::start(&model(0), Started::default()).await;
            let mut trainer = trainer_with(&[&bad, &good], plain(), 1.0).await.expect("a trainer");
            bad.wrong(path, nth, wrong);
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
async fn a_server_that_dies_within_a_broadcast_is_an_end_in_time_and_those_that_hang_are_named() {
    let good = Server::start(&model(0), Started::default()).await;
    let bad = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer_with(&[&good, &bad], plain(), 1.0).await.expect("a trainer");
    bad.wrong("/update_weights", 1, Wrong::Dies);
    let begun = Instant::now();
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    // The other one has got its bytes, as with a chain of which the dead one is the end.
    let report = sent.expect("an update");
    assert_eq!(report.absent, [Rank(2)]);
    has(&good, 1);
    let bad = bad.start_anew(&model(0)).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
    assert!(sent.expect("an update").absent.is_empty());
    has(&good, 2);
    has(&bad, 2);
}

#[tokio::test]
async fn servers_that_hang_because_another_one_died_are_named_and_no_update_waits_for_them() {
    let hangs = Server::start(&model(0), Started::default()).await;
    let dies = Server::start(&model(0), Started::default()).await;
    let mut config = config(&[&hangs, &dies], plain());
    config.timeout_seconds = 1.0;
    let mut trainer = join(config, true).await.expect("a trainer");
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    assert!(sent.expect("an update").absent.is_empty());
    dies.wrong("/update_weights", 1, Wrong::Dies);
    let begun = Instant::now();
    let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
    let error = sent.expect_err("nobody has it");
    // The first cause, not what follows from it.
    assert_eq!((error.kind(), error.report().rank), (ErrorKind::PeerLost, Some(Rank(2))));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    hangs.generate().expect_err("it is half loaded");
    let dies = dies.start_anew(&model(0)).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(3)), Version(3)).await;
    assert_eq!(sent.expect("an update").absent, [Rank(1)]);
    has(&dies, 3);
    let hangs = hangs.start_anew(&model(0)).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(4)), Version(4)).await;
    assert!(sent.expect("an update").absent.is_empty());
    has(&dies, 4);
    has(&hangs, 4);
}

#[tokio::test]
async fn a_server_that_never_joins_is_an_end_in_time_and_the_others_are_not_believed_to_be_in_order()
 {
    let good = Server::start(&model(0), Started::default()).await;
    let bad = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer_with(&[&good, &bad], plain(), 1.0).await.expect("a trainer");
    // The first one is the question whether it is configured.
    bad.wrong("/init_weight_transfer_engine", 1, Wrong::Silent);
    let begun = Instant::now();
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    let error = sent.expect_err("nobody has joined");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    // Its workers wait in the collective without an end: only a new process helps.
    let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
    let report = sent.expect("the one whose engine is free");
    assert_eq!(report.absent, [Rank(1)]);
    has(&bad, 2);
    let good = good.start_anew(&model(0)).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(3)), Version(3)).await;
    assert!(sent.expect("an update").absent.is_empty());
    has(&good, 3);
    has(&bad, 3);
}

#[tokio::test]
async fn a_server_that_was_started_anew_between_updates_joins_again() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&server], plain()).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    sent.expect("an update");
    let server = server.start_anew(&model(0)).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
    assert!(sent.expect("an update").absent.is_empty());
    has(&server, 2);
}

#[tokio::test]
async fn an_update_that_another_trainer_left_open_is_ended_first() {
    let server = Server::start(&model(0), Started::default()).await;
    {
        let mut first = trainer(&[&server], plain()).await;
        let gone: Vec<std::io::Result<_>> = model(1)
            .into_iter()
            .take(9)
            .map(Ok)
            .chain([Err(std::io::Error::other("gone"))])
            .collect();
        let sent = first.send_weights(ensure_async_iterator(gone), Version(1)).await;
        sent.expect_err("it is gone");
    }
    let mut second = trainer(&[&server], plain()).await;
    let sent = second.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
    sent.expect("an update");
    has(&server, 2);
}

#[tokio::test]
async fn no_bucket_of_a_dropped_update_is_taken_for_one_of_the_next() {
    for (started, options) in
        [(Started::default(), plain()), (reads(), json!({ "transport": "ipc" }))]
    {
        let server = Server::start(&even(0), started).await;
        let mut trainer = trainer(&[&server], options).await;
        let sent = trainer.send_weights(ensure_async_iterator(even(1)), Version(1)).await;
        sent.expect("an update");
        for at in 0..even(1).len() {
            // The server gets to the bucket of that moment when the next update has sent all of its own. That one ends what
            // was open first, so its own end is the second.
            if at > 1 {
                server.wrong("/update_weights", at - 2, Wrong::Slow(Duration::from_millis(60)));
                server.wrong("/finish_weight_update", 1, Wrong::Slow(Duration::from_millis(120)));
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
    let server = Server::start(&model(0), Started::default()).await;
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
async fn a_broadcast_that_a_dropped_update_left_to_fail_costs_the_next_one_no_server() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer_with(&[&server], plain(), 1.0).await.expect("a trainer");
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    assert!(sent.expect("an update").absent.is_empty());
    // Nobody hears that it takes no part.
    server.wrong("/update_weights", 1, Wrong::Refuses("CUDA out of memory"));
    let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2));
    drop(tokio::time::timeout(Duration::from_millis(200), sent).await);
    let sent = trainer.send_weights(ensure_async_iterator(model(3)), Version(3)).await;
    sent.expect("an update");
    has(&server, 3);
}

#[tokio::test]
async fn a_server_that_refuses_a_bucket_costs_the_others_seconds_and_no_deadline() {
    let good = Server::start(&model(0), Started::default()).await;
    let bad = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer_with(&[&good, &bad], plain(), 30.0).await.expect("a trainer");
    bad.wrong("/update_weights", 1, Wrong::Refuses("CUDA out of memory"));
    let begun = Instant::now();
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    assert_eq!(sent.expect("an update").absent, [Rank(2)]);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    has(&good, 1);
}

#[tokio::test]
async fn a_slow_server_is_waited_for() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&server], plain()).await;
    server.wrong("/update_weights", 0, Wrong::Slow(Duration::from_millis(700)));
    server.wrong("/finish_weight_update", 0, Wrong::Slow(Duration::from_millis(700)));
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    sent.expect("an update");
    has(&server, 1);
}

#[tokio::test]
async fn nobody_is_paused_where_the_configuration_says_so() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&server], json!({ "pause": "none" })).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    sent.expect("an update");
    has(&server, 1);
    assert!(!server.asked().iter().any(|path| path == "/pause" || path == "/resume"));
}

#[tokio::test]
async fn options_that_cannot_be_used_are_errors_in_words() {
    let error = trainer_with(&[], plain(), 1.0).await.expect_err("no servers");
    assert!(error.to_string().contains("engine_kwargs.vllm.servers"), "{error}");
    let server = Server::start(&model(0), Started::default()).await;
    let error = trainer_with(&[&server, &server], plain(), 1.0).await.expect_err("one twice");
    assert!(error.to_string().contains("listed twice"), "{error}");
    let options = json!({ "unpacked": true, "transport": "ipc" });
    let error = trainer_with(&[&server], options, 1.0).await.expect_err("nothing is broadcast");
    assert!(error.to_string().contains("transport: nccl"), "{error}");
    let error = trainer_with(&[&server], json!({ "devices": ["cuda:1"] }), 1.0).await;
    let error = error.expect_err("nobody reads there").to_string();
    assert!(error.contains("`transport: ipc`"), "{error}");
    let error = trainer_with(&[&server], json!({ "transport": "pigeon" }), 1.0).await;
    let error = error.expect_err("no such transport");
    assert!(error.to_string().contains("`nccl`"), "{error}");
}

/// A server that reads buckets where they are.
fn reads() -> Started {
    Started { backend: Some("ipc"), ..Default::default() }
}

fn ipc() -> serde_json::Value {
    json!({ "transport": "ipc" })
}

#[tokio::test]
async fn a_server_on_the_trainers_gpu_reads_every_byte_of_every_update_where_it_is() {
    let server = Server::start(&model(0), reads()).await;
    let mut trainer = trainer(&[&server], ipc()).await;
    for version in 1..=3 {
        let sent = trainer.send_weights(ensure_async_iterator(model(version)), Version(version));
        assert!(sent.await.expect("an update").buckets > 2);
        has(&server, version);
    }
    let server = server.start_anew(&model(0)).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(4)), Version(4)).await;
    assert!(sent.expect("an update").absent.is_empty());
    has(&server, 4);
}

#[tokio::test]
async fn each_worker_reads_on_its_own_gpu_whichever_of_them_a_server_has() {
    let on = |workers, gpus| Started { workers, gpus, ..reads() };
    let two = Server::start(&model(0), on(2, &DEVICES)).await;
    let other = Server::start(&model(0), on(1, &DEVICES[1..])).await;
    let options = json!({ "transport": "ipc", "devices": ["cuda:0", "cuda:1"] });
    let mut sends = trainer(&[&two, &other], options).await;
    for version in 1..=2 {
        let sent = sends.send_weights(ensure_async_iterator(model(version)), Version(version));
        assert!(sent.await.expect("an update").absent.is_empty());
        has(&two, version);
        has(&other, version);
    }
    // Nobody is on the GPU of the trainer.
    let away = Server::start(&model(0), on(2, &DEVICES[1..])).await;
    let options = json!({ "transport": "ipc", "devices": ["cuda:2", "cuda:1"] });
    let mut sends = trainer(&[&away], options).await;
    let sent = sends.send_weights(ensure_async_iterator(model(3)), Version(3)).await;
    sent.expect("an update");
    has(&away, 3);
    // One of its GPUs is not listed.
    let options = json!({ "transport": "ipc", "devices": ["cuda:0", "cuda:1"] });
    let mut sends = trainer(&[&away], options).await;
    let sent = sends.send_weights(ensure_async_iterator(model(4)), Version(4)).await;
    let error = sent.expect_err("a worker finds no bucket").to_string();
    assert!(error.contains(DEVICES[2]) && error.contains("`devices`"), "{error}");
}

#[tokio::test]
async fn a_server_that_reads_where_it_is_and_fails_is_left_out_and_loaded_by_the_next_update() {
    let paths = [
        ("/init_weight_transfer_engine", 1),
        ("/start_weight_update", 0),
        ("/update_weights", 1),
        ("/finish_weight_update", 0),
    ];
    for (path, nth) in paths {
        let good = Server::start(&model(0), reads()).await;
        let bad = Server::start(&model(0), reads()).await;
        let mut trainer = trainer(&[&good, &bad], ipc()).await;
        bad.wrong(path, nth, Wrong::FailsAfterwards("CUDA out of memory"));
        let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
        assert_eq!(sent.expect("an update").absent, [Rank(2)], "{path}");
        has(&good, 1);
        if let Ok((version, weights)) = bad.generate() {
            assert!(version == "default" && weights == tensors(&model(0)), "{path}: half loaded");
        }
        let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
        assert!(sent.expect("an update").absent.is_empty(), "{path}");
        has(&good, 2);
        has(&bad, 2);
    }
}

#[tokio::test]
async fn a_server_that_was_started_for_the_other_transport_or_refuses_pickles_says_how_to_start_it()
{
    for (started, options, words) in [
        (reads(), plain(), "\"backend\": \"nccl\""),
        (Started::default(), ipc(), "\"backend\": \"ipc\""),
        (
            Started { insecure: false, ..reads() },
            ipc(),
            "VLLM_ALLOW_INSECURE_SERIALIZATION=1 where",
        ),
        (Started { workers: 2, ..reads() }, ipc(), "2 workers"),
    ] {
        let server = Server::start(&model(0), started).await;
        let mut trainer = trainer(&[&server], options).await;
        let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
        let error = sent.expect_err("it cannot be sent to");
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[tokio::test]
async fn a_layer_that_a_servers_checkpoint_leaves_alone_is_not_sent_in_fp8() {
    ignored_layers::are_not_sent_in_fp8(Started::default).await;
}

#[tokio::test]
async fn a_doctor_says_of_a_server_what_it_is_and_what_it_lacks() {
    let limit = Duration::from_secs(1);
    let examine = async |server: &Server| {
        let url = server.url().parse().expect("an address");
        receivers::examine(&url, None, limit).await.1
    };
    let server = Server::start(&model(0), Started { workers: 3, ..Default::default() }).await;
    let checks = examine(&server).await;
    assert!(checks.iter().all(|check| check.passed), "{checks:?}");
    assert!(checks[0].details.contains("0.33.0") && checks[1].details.contains("3 workers"));
    let server = Server::start(&model(0), Started { dev_mode: false, ..Default::default() }).await;
    let checks = examine(&server).await;
    assert!(checks[0].passed && !checks[1].passed, "{checks:?}");
    assert!(checks[1].details.contains("VLLM_SERVER_DEV_MODE"), "{checks:?}");
}

#[tokio::test]
async fn a_server_with_an_fp8_model_gets_the_codes_and_the_scales_that_the_layer_in_front_makes() {
    let source = |version: u64| {
        let tensor = |name: String, shape: &[u64]| {
            let numbers =
                (0..shape.iter().product::<u64>()).map(|at| (at * version % 253) as f32 - 100.0);
            let bytes: Vec<u8> =
                numbers.flat_map(|number| half::bf16::from_f32(number).to_le_bytes()).collect();
            Weight::new(name, DType::BF16, shape, bytes).expect("a weight")
        };
        let mut weights = vec![tensor("model.embed_tokens.weight".into(), &[64, 128])];
        for layer in 0..3 {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            weights.push(tensor(name("mlp.down_proj.weight"), &[128, 256]));
            weights.push(tensor(name("input_layernorm.weight"), &[127]));
        }
        weights
    };
    let mut rules = RulesConfig::default();
    rules.receiver = Receiver::Vllm;
    let rules = Rules::new(&rules).expect("rules");
    let quantized = async |version| -> Vec<Weight> {
        source(version).quantize_fp8(rules.clone()).try_collect().await.expect("weights")
    };
    let server = Server::start(&quantized(1).await, Started::default()).await;
    let mut config = config(&[&server], plain());
    config.layers.insert("trainer_quantize_fp8".into(), true.into());
    config.layers.insert("quantization".into(), json!({ "receiver": "vllm" }));
    let mut trainer = join(config, false).await.expect("a trainer");
    let report = trainer.send_weights(ensure_async_iterator(source(2)), Version(2)).await;
    assert_eq!(report.expect("an update").counts.converted, 3);
    let (version, weights) = server.generate().expect("it generates");
    assert!(version == "2" && weights == tensors(&quantized(2).await));
}

#[tokio::test]
async fn a_trainer_with_a_control_plane_forms_a_group_of_one() {
    let server = Server::start(&model(0), Started::default()).await;
    let address = format!("unix:@receivers-{}", std::process::id()).parse().expect("an address");
    let token = control_plane::Token::generate().expect("a token");
    let control = control_plane::ControlConfig::new(address, token);
    let control = control_plane::ControlPlane::lead(control).await.expect("a control plane");
    let (registry, config) = (registry(false), config(&[&server], plain()));
    let formed = control_plane::form_group(&registry, config, &control).world_size(1).trainer();
    let (mut trainer, _) = formed.await.expect("a group");
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    sent.expect("an update");
    has(&server, 1);
}

#[tokio::test]
async fn a_group_other_than_one_trainer_is_refused_with_what_to_do() {
    let error =
        receivers::VLLM.prepare_rollout(engine_core::EngineContext::new(Default::default()));
    let error = error.await.expect_err("there are no rollouts");
    assert!(error.to_string().contains("engine_kwargs.vllm.servers"), "{error}");
    let rank = |rank| {
        let role = engine_core::Role::Trainer;
        engine_core::WorkerMetadata::of_this_process("vllm", Rank(rank), role, json!(null))
    };
    let error = receivers::VLLM.build_topology(&[rank(0), rank(1)]).expect_err("two trainers");
    assert_eq!(error.kind(), ErrorKind::Mismatch);
}

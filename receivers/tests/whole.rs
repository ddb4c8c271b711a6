//! Updates that are one call, with servers that keep to vLLM's contract.

mod support;

use std::time::{Duration, Instant};

use engine_core::{
    ErrorKind, Rank, SendReport, TrainerEngine, Version, Weight, ensure_async_iterator,
};
use serde_json::{Value, json};
use support::server::{Server, Started, Wrong, tensors};
use support::{config, drop_at, even, join, layers, trainer, trainer_with};

/// A model whose buckets can all be parts of one call: every weight begins at a multiple of its element size.
fn model(version: u64) -> Vec<Weight> {
    layers(version, 9, [32, 136])
}

fn one_call() -> Value {
    json!({ "calls": "update" })
}

async fn send(trainer: &mut dyn TrainerEngine, version: u64) -> SendReport {
    let sent = trainer.send_weights(ensure_async_iterator(model(version)), Version(version)).await;
    sent.unwrap_or_else(|error| panic!("version {version}: {error}"))
}

#[track_caller]
fn has(server: &Server, version: u64) {
    let (said, weights) = server.generate().expect("it generates");
    assert_eq!(said, version.to_string());
    assert!(weights == tensors(&model(version)), "other bytes than version {version} has");
}

/// How many calls brought weights since the last time.
fn calls(server: &Server) -> usize {
    server.asked().iter().filter(|path| *path == "/update_weights").count()
}

#[tokio::test]
async fn from_the_second_update_on_one_call_brings_every_byte() {
    let first = Server::start(&model(0), Started { workers: 2, ..Default::default() }).await;
    let second = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&first, &second], one_call()).await;
    for version in 1..=4 {
        let report = send(&mut *trainer, version).await;
        let bytes: u64 = model(version).iter().map(Weight::byte_len).sum();
        let loaded = json!({
            "buckets": report.buckets, "tensors": model(version).len(), "bytes": bytes
        });
        for (server, line) in [&first, &second].into_iter().zip(&report.receivers) {
            has(server, version);
            assert_eq!(line.notes["loaded"], loaded);
            let buckets = calls(server);
            assert!(if version == 1 { buckets > 3 } else { buckets == 1 }, "{version}: {buckets}");
        }
        assert!(report.buckets > 3, "one bucket shows nothing of the next");
    }
}

#[tokio::test]
async fn a_stream_that_fails_anywhere_leaves_no_worker_waiting_and_the_next_update_is_whole() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&server], one_call()).await;
    for at in 0..model(1).len() {
        send(&mut *trainer, 1).await;
        let mut weights: Vec<std::io::Result<_>> = model(2).into_iter().map(Ok).collect();
        weights.truncate(at);
        weights.push(Err(std::io::Error::other("the gather failed")));
        let begun = Instant::now();
        let sent = trainer.send_weights(ensure_async_iterator(weights), Version(2)).await;
        assert_eq!(sent.expect_err("the stream fails").kind(), ErrorKind::Source);
        assert!(begun.elapsed() < Duration::from_secs(2), "somebody waited");
        server.is_idle().await;
        assert!(server.generate().is_err_and(|why| why != "dead") || is_old(&server));
        send(&mut *trainer, 3).await;
        has(&server, 3);
    }
}

/// Nothing was begun there.
fn is_old(server: &Server) -> bool {
    server.generate().is_ok_and(|(_, weights)| weights == tensors(&model(1)))
}

#[tokio::test]
async fn a_stream_that_stalls_is_an_error_in_time_and_leaves_no_worker_waiting() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer_with(&[&server], one_call(), 1.0).await.expect("a trainer");
    send(&mut *trainer, 1).await;
    let weights = futures::stream::unfold(model(2).into_iter(), |mut weights| async {
        if weights.len() == 4 {
            std::future::pending::<()>().await;
        }
        Some((weights.next()?, weights))
    });
    let begun = Instant::now();
    let sent = trainer.send_weights(ensure_async_iterator(Box::pin(weights)), Version(2)).await;
    assert_eq!(sent.expect_err("it stalls").kind(), ErrorKind::Timeout);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    server.is_idle().await;
    server.generate().expect_err("it has bytes of other weights");
    send(&mut *trainer, 3).await;
    has(&server, 3);
}

#[tokio::test]
async fn a_stream_that_is_slower_than_the_deadline_as_a_whole_is_waited_for() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer_with(&[&server], one_call(), 1.0).await.expect("a trainer");
    send(&mut *trainer, 1).await;
    let weights = futures::stream::unfold(model(2).into_iter(), |mut weights| async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        Some((weights.next()?, weights))
    });
    let begun = Instant::now();
    let sent = trainer.send_weights(ensure_async_iterator(Box::pin(weights)), Version(2)).await;
    sent.expect("an update");
    assert!(begun.elapsed() > Duration::from_secs(2), "the deadline was not reached");
    has(&server, 2);
}

#[tokio::test]
async fn other_weights_than_the_last_time_are_sent_by_a_call_for_each_bucket_or_named_in_an_error()
{
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&server], one_call()).await;
    // The order of names is that of the stream, which may change as a whole.
    let reversed = |version| model(version).into_iter().rev().collect::<Vec<_>>();
    send(&mut *trainer, 1).await;
    server.asked();
    let sent = trainer.send_weights(ensure_async_iterator(reversed(2)), Version(2)).await;
    sent.expect("nobody was told of the first bucket yet");
    has(&server, 2);
    assert!(calls(&server) > 3);
    let sent = trainer.send_weights(ensure_async_iterator(reversed(3)), Version(3)).await;
    sent.expect("an update");
    has(&server, 3);
    assert_eq!(calls(&server), 1);
    // What a server was told last is then its last bucket.
    for (version, expected) in [(4, 4..), (5, 1..)] {
        send(&mut *trainer, version).await;
        has(&server, version);
        assert!(expected.contains(&calls(&server)));
    }
    for version in [6, 7] {
        let weights = ensure_async_iterator(reversed(version));
        trainer.send_weights(weights, Version(version)).await.expect("an update");
    }
    // In a later bucket: one changed, one missing, one more.
    let changed = |change: &dyn Fn(&mut Vec<Weight>)| {
        let mut weights = reversed(8);
        change(&mut weights);
        weights
    };
    let swapped = changed(&|weights| weights.swap(20, 21));
    let shorter = changed(&|weights| drop(weights.pop()));
    let longer = changed(&|weights| weights.push(even(8).remove(0)));
    let longer_name = even(8)[0].name().to_owned();
    let names = [reversed(8)[21].name().to_owned(), "embed.weight".to_owned(), longer_name];
    for (weights, name) in [swapped, shorter, longer].into_iter().zip(names) {
        let sent = trainer.send_weights(ensure_async_iterator(weights), Version(8)).await;
        let error = sent.expect_err("other weights");
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        assert!(error.to_string().contains(&name), "{name}: {error}");
        server.is_idle().await;
        server.generate().expect_err("it is half loaded");
        for version in [9, 10] {
            let weights = ensure_async_iterator(reversed(version));
            trainer.send_weights(weights, Version(version)).await.expect("an update");
            has(&server, version);
        }
    }
}

#[tokio::test]
async fn dropping_an_update_anywhere_leaves_no_worker_waiting_and_the_next_one_whole() {
    let server = Server::start(&even(0), Started::default()).await;
    let mut trainer = trainer(&[&server], one_call()).await;
    for at in 0..even(1).len() {
        let sent = trainer.send_weights(ensure_async_iterator(even(1)), Version(1)).await;
        sent.unwrap_or_else(|error| panic!("before {at}: {error}"));
        drop_at(&mut *trainer, even(2), at).await;
        let sent = trainer.send_weights(ensure_async_iterator(even(3)), Version(3)).await;
        sent.unwrap_or_else(|error| panic!("at {at}: {error}"));
        let (version, weights) = server.generate().expect("it generates");
        assert!(version == "3" && weights == tensors(&even(3)), "at {at}");
    }
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer_with(&[&server], one_call(), 4.0).await.expect("a trainer");
    for micros in (0..20_000).step_by(1700) {
        send(&mut *trainer, 1).await;
        let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2));
        drop(tokio::time::timeout(Duration::from_micros(micros), sent).await);
        send(&mut *trainer, 3).await;
        has(&server, 3);
    }
}

#[tokio::test]
async fn a_server_that_fails_within_the_call_is_the_named_cause_and_a_later_update_is_whole() {
    for wrong in [Wrong::Refuses("CUDA out of memory"), Wrong::Dies, Wrong::Silent] {
        let hangs = Server::start(&model(0), Started::default()).await;
        let fails = Server::start(&model(0), Started::default()).await;
        let mut config = config(&[&hangs, &fails], one_call());
        config.timeout_seconds = 1.0;
        let mut trainer = join(config, true).await.expect("a trainer");
        send(&mut *trainer, 1).await;
        fails.wrong("/update_weights", 0, wrong.clone());
        let begun = Instant::now();
        let sent = trainer.send_weights(ensure_async_iterator(model(2)), Version(2)).await;
        let error = sent.expect_err("nobody has it");
        assert!(begun.elapsed() < Duration::from_secs(5), "{wrong:?}: {:?}", begun.elapsed());
        if !matches!(wrong, Wrong::Silent) {
            assert_eq!(error.report().rank, Some(Rank(2)), "{wrong:?}: {error}");
        }
        hangs.generate().expect_err("it is half loaded");
        // Its worker waits in a collective: only a new process helps.
        let hangs = hangs.start_anew(&model(0)).await;
        let fails = fails.start_anew(&model(0)).await;
        for version in [3, 4, 5] {
            assert!(send(&mut *trainer, version).await.absent.is_empty());
            has(&hangs, version);
            has(&fails, version);
        }
    }
}

#[tokio::test]
async fn a_server_that_fails_after_it_has_everything_costs_the_others_nothing() {
    let good = Server::start(&model(0), Started::default()).await;
    let bad = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&good, &bad], one_call()).await;
    send(&mut *trainer, 1).await;
    bad.wrong("/update_weights", 0, Wrong::FailsAfterwards("CUDA out of memory"));
    assert_eq!(send(&mut *trainer, 2).await.absent, [Rank(2)]);
    has(&good, 2);
    bad.generate().expect_err("it has not confirmed");
    for version in [3, 4] {
        assert!(send(&mut *trainer, version).await.absent.is_empty());
        has(&good, version);
        has(&bad, version);
    }
}

#[tokio::test]
async fn a_server_that_was_started_anew_is_told_the_whole_list() {
    let server = Server::start(&model(0), Started::default()).await;
    let mut trainer = trainer(&[&server], one_call()).await;
    for version in [1, 2, 3] {
        send(&mut *trainer, version).await;
    }
    let server = server.start_anew(&model(0)).await;
    send(&mut *trainer, 4).await;
    has(&server, 4);
    assert_eq!(calls(&server), 1);
}

#[tokio::test]
async fn one_call_is_refused_where_it_is_unsafe_or_means_nothing() {
    let server = Server::start(&model(0), Started::default()).await;
    for (options, words) in [
        (json!({ "calls": "update", "pause": "none" }), "`pause`"),
        (json!({ "calls": "update", "unpacked": true }), "`unpacked`"),
        (json!({ "calls": "update", "delta": true }), "`delta`"),
        (json!({ "calls": "update", "transport": "ipc" }), "`transport: nccl`"),
    ] {
        let error = trainer_with(&[&server], options, 1.0).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(words), "{error}");
    }
}

//! Updates of servers whose workers speak the protocol of Moonshot's checkpoint-engine: buckets are read where they are, and
//! ZeroMQ tells of them.

mod support;

use std::time::{Duration, Instant};

use engine_core::{ErrorKind, Rank, Version, Weight, ensure_async_iterator};
use serde_json::{Value, json};
use support::collectives::DEVICES;
use support::rep::BUCKET;
use support::server::{Contract, Server, Started, Wrong, tensors};
use support::{drop_at, even, model, trainer, trainer_with};

const KINDS: [Contract; 2] = [Contract::Vllm, Contract::Sglang];

/// Without the weight that is larger than a bucket.
fn small(version: u64) -> Vec<Weight> {
    model(version).split_off(1)
}

fn started(contract: Contract) -> Started {
    Started { contract, backend: None, ..Default::default() }
}

async fn start(contract: Contract) -> Server {
    Server::start(&small(0), started(contract)).await
}

fn zmq() -> Value {
    json!({ "transport": "zmq" })
}

/// Where a server hears of an update.
fn path(contract: Contract) -> &'static str {
    match contract {
        Contract::Vllm => "/collective_rpc",
        Contract::Sglang => "/update_weights_from_ipc",
    }
}

fn has(server: &Server, version: u64) {
    let (said, weights) = server.generate().expect("it generates");
    assert_eq!(said, version.to_string());
    assert!(weights == tensors(&small(version)), "other bytes than version {version} has");
}

#[tokio::test]
async fn a_server_reads_every_byte_of_every_update_and_is_asked_once_for_each() {
    for contract in KINDS {
        let server = start(contract).await;
        let mut trainer = trainer(&[&server], zmq()).await;
        for version in 1..=3 {
            let sent =
                trainer.send_weights(ensure_async_iterator(small(version)), Version(version));
            let report = sent.await.expect("an update");
            assert!(report.buckets > 2, "one bucket shows nothing of the next");
            has(&server, version);
            let asked = server.asked();
            // The first time it is looked at as well.
            let times = asked.iter().filter(|asked| *asked == path(contract)).count();
            assert_eq!(times, if version == 1 { 2 } else { 1 }, "{asked:?}");
        }
        let server = server.start_anew(&small(0)).await;
        let sent = trainer.send_weights(ensure_async_iterator(small(4)), Version(4)).await;
        assert!(sent.expect("an update").absent.is_empty());
        has(&server, 4);
    }
}

#[tokio::test]
async fn a_server_that_fails_anywhere_is_named_and_left_out_and_loaded_by_the_next_update() {
    for contract in KINDS {
        for (what, nth, wrong) in [
            (path(contract), 0, Wrong::Refuses("CUDA out of memory")),
            (path(contract), 1, Wrong::Refuses("CUDA out of memory")),
            (path(contract), 1, Wrong::FailsAfterwards("CUDA out of memory")),
            (BUCKET, 0, Wrong::Refuses("CUDA out of memory")),
            (BUCKET, 2, Wrong::Refuses("CUDA out of memory")),
            ("/update_weight_version", 0, Wrong::FailsAfterwards("CUDA out of memory")),
        ] {
            let good = start(contract).await;
            let bad = start(contract).await;
            let mut trainer = trainer(&[&good, &bad], zmq()).await;
            bad.wrong(what, nth, wrong.clone());
            let begun = Instant::now();
            let sent = trainer.send_weights(ensure_async_iterator(small(1)), Version(1)).await;
            let report = sent.unwrap_or_else(|error| panic!("{what} {nth}: {error}"));
            assert_eq!(report.absent, [Rank(2)], "{what} {nth}");
            assert!(begun.elapsed() < Duration::from_secs(2), "{what} {nth}: somebody waited");
            let notes = report.receivers[1].notes["error"].to_string();
            assert!(notes.contains("CUDA out of memory"), "{notes}");
            has(&good, 1);
            if (what, nth) == (path(contract), 0) {
                bad.generate().expect("it was stopped for nothing");
            }
            if let Ok((version, weights)) = bad.generate() {
                let of = if version == "1" { 1 } else { 0 };
                assert!(
                    weights == tensors(&small(of)),
                    "{what} {nth}: half loaded, and it generates"
                );
            }
            let sent = trainer.send_weights(ensure_async_iterator(small(2)), Version(2)).await;
            let report = sent.unwrap_or_else(|error| panic!("{what} {nth}: {error}"));
            assert!(report.absent.is_empty(), "{what} {nth}: {report:?}");
            has(&good, 2);
            has(&bad, 2);
        }
    }
}

fn on_three() -> Value {
    json!({ "transport": "zmq", "devices": ["cuda:0", "cuda:1", "cuda:2"] })
}

#[tokio::test]
async fn each_worker_connects_to_the_address_of_its_own_gpu_and_a_failure_of_one_holds_no_other() {
    for contract in KINDS {
        let on = |workers, gpus| Started { workers, gpus, ..started(contract) };
        let two = Server::start(&small(0), on(2, &DEVICES[1..])).await;
        let one = Server::start(&small(0), on(1, &DEVICES[1..])).await;
        let mut sends = trainer(&[&two, &one], on_three()).await;
        let sent = sends.send_weights(ensure_async_iterator(small(1)), Version(1)).await;
        assert!(sent.expect("an update").absent.is_empty());
        has(&two, 1);
        has(&one, 1);
        for (nth, wrong) in [
            (0, Wrong::Refuses("CUDA out of memory")),
            (3, Wrong::Refuses("CUDA out of memory")),
            (1, Wrong::Silent),
        ] {
            let mut sends = match wrong {
                Wrong::Silent => trainer_with(&[&two, &one], on_three(), 1.0).await.expect("one"),
                _ => trainer(&[&two, &one], on_three()).await,
            };
            two.wrong(BUCKET, nth, wrong.clone());
            let begun = Instant::now();
            let sent = sends.send_weights(ensure_async_iterator(small(2)), Version(2)).await;
            assert_eq!(sent.expect("an update").absent, [Rank(1)], "{wrong:?}");
            assert!(begun.elapsed() < Duration::from_secs(5), "{wrong:?}: {:?}", begun.elapsed());
            has(&one, 2);
            if wrong == Wrong::Silent {
                // Its engine waits for that worker, whatever the other one has heard.
                continue;
            }
            let sent = sends.send_weights(ensure_async_iterator(small(3)), Version(3)).await;
            assert!(sent.expect("an update").absent.is_empty(), "{wrong:?}");
            has(&two, 3);
        }
    }
}

#[tokio::test]
async fn a_worker_that_dies_or_falls_silent_within_an_update_is_an_end_in_time() {
    for contract in KINDS {
        for wrong in [Wrong::Dies, Wrong::Silent] {
            let good = start(contract).await;
            let bad = start(contract).await;
            let mut trainer = trainer_with(&[&bad, &good], zmq(), 1.0).await.expect("a trainer");
            bad.wrong(BUCKET, 1, wrong.clone());
            let begun = Instant::now();
            let sent = trainer.send_weights(ensure_async_iterator(small(1)), Version(1)).await;
            assert_eq!(sent.expect("an update").absent, [Rank(1)], "{wrong:?}");
            assert!(begun.elapsed() < Duration::from_secs(5), "{wrong:?}: {:?}", begun.elapsed());
            has(&good, 1);
            bad.generate().expect_err("it is half loaded");
            let bad = bad.start_anew(&small(0)).await;
            let sent = trainer.send_weights(ensure_async_iterator(small(2)), Version(2)).await;
            assert!(sent.expect("an update").absent.is_empty(), "{wrong:?}");
            has(&good, 2);
            has(&bad, 2);
        }
    }
}

#[tokio::test]
async fn an_update_that_fails_or_is_dropped_or_whose_trainer_ends_leaves_no_engine_waiting() {
    for contract in KINDS {
        let server = Server::start(&even(0), started(contract)).await;
        let mut sends = trainer(&[&server], zmq()).await;
        for at in 1..even(1).len() {
            let mut weights: Vec<std::io::Result<_>> = even(1).into_iter().map(Ok).collect();
            weights.truncate(at);
            weights.push(Err(std::io::Error::other("the gather failed")));
            let sent = sends.send_weights(ensure_async_iterator(weights), Version(1)).await;
            assert_eq!(sent.expect_err("it fails").kind(), ErrorKind::Source);
            // The engine answers at once: the next one is not the first to end it.
            server.is_idle().await;
            drop_at(&mut *sends, even(1), at).await;
            let sent = sends.send_weights(ensure_async_iterator(even(2)), Version(2)).await;
            sent.unwrap_or_else(|error| panic!("{at}: {error}"));
            let (version, weights) = server.generate().expect("it generates");
            assert!(version == "2" && weights == tensors(&even(2)), "{at}");
        }
        drop_at(&mut *sends, even(1), 4).await;
        sends.finalize().await.expect("an end");
        server.is_idle().await;
    }
}

#[tokio::test]
async fn a_weight_that_is_larger_than_a_bucket_is_an_error_that_names_it_and_what_to_raise() {
    let server = Server::start(&model(0), started(Contract::Sglang)).await;
    let mut trainer = trainer(&[&server], zmq()).await;
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    let error = sent.expect_err("there is no place for it");
    assert_eq!(error.report().tensor.as_deref(), Some("embed.weight"));
    assert!(error.to_string().contains("update_weights_bucket_megabytes"), "{error}");
    assert_eq!(server.generate().expect("as before").0, "default");
}

#[tokio::test]
async fn a_server_that_cannot_or_is_on_another_gpu_says_how_to_start_it() {
    let other = &DEVICES[1..];
    for (started, words) in [
        (Started { extension: false, ..started(Contract::Vllm) }, "--worker-extension-cls"),
        (
            Started { extension: false, ..started(Contract::Sglang) },
            "pip install checkpoint-engine",
        ),
        (Started { gpus: other, ..started(Contract::Vllm) }, other[0]),
        (Started { gpus: other, ..started(Contract::Sglang) }, other[0]),
        (Started { workers: 2, ..started(Contract::Sglang) }, "2 workers"),
        (Started { dev_mode: false, ..started(Contract::Vllm) }, "VLLM_SERVER_DEV_MODE=1"),
    ] {
        let server = Server::start(&small(0), started).await;
        let mut trainer = trainer(&[&server], zmq()).await;
        let sent = trainer.send_weights(ensure_async_iterator(small(1)), Version(1)).await;
        let error = sent.expect_err("it cannot be sent to");
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

//! A worker whose loop a test runs step by step.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::agent::notice::{Ask, Notice};
use crate::agent::tests::{BYTES, DEADLINE, answer, bare, fill, is_pattern};

#[tokio::test]
async fn a_write_that_is_late_is_finished_and_only_then_answered() {
    // Both without threads, so that only the test makes them progress.
    let transports = "tcp,self".to_owned();
    let options = AgentOptions { transports, error_handling: "peer", ..Default::default() };
    let from = Arc::new(Arena::of_host(2, BYTES).unwrap());
    fill(&from, 0, 7).await;
    let name = format!("writes-late-{}", std::process::id());
    let known = Arc::<Known>::default();
    let mut one = Worker::new(options, name, from, known.clone()).unwrap();
    let (mut two, own, arena) = bare("is-stopped", "tcp,self");
    let target = arena.place(1, BYTES).unwrap();
    let ask = Notice::Ask(Ask {
        id: 5,
        slot: 0,
        target: (target.address as u64, BYTES),
        device: None,
        metadata: own.metadata.clone(),
        era: 1,
        millis: 60_000,
    });
    let card = known.card().clone().unwrap();
    answer(&two, &card, &ask);
    let begun = Instant::now();
    while one.serving.is_empty() {
        assert!(begun.elapsed() < DEADLINE, "it was not asked");
        assert_eq!(two.notices().unwrap().len(), 0);
        one.poll();
    }
    // It processes nothing meanwhile, like one that is stopped.
    one.serving[0].until = Instant::now();
    for _ in 0..10 {
        one.poll();
    }
    assert_eq!(one.serving.len(), 1, "a write was dropped that UCX goes on with");
    let notice = loop {
        assert!(begun.elapsed() < 2 * DEADLINE, "no answer");
        one.poll();
        if let Some((_, bytes)) = two.notices().unwrap().pop() {
            break postcard::from_bytes::<Notice>(&bytes).unwrap();
        }
    };
    assert!(matches!(notice, Notice::Done { id: 5 }), "{notice:?}");
    assert!(is_pattern(arena.try_lock(1, BYTES).unwrap(), 7), "not all of it is there");
    one.close();
}

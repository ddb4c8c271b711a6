//! A trainer's thread whose loop a test runs step by step.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::mpsc::sync_channel;

use super::super::staging::Next;
use super::super::tests::{DEADLINE, Played, RANK, options};
use super::*;
use crate::host::pieces;

#[tokio::test]
async fn a_lease_is_let_go_of_when_its_last_write_has_ended_and_not_before() {
    // Both without threads, so that only the test makes them progress.
    let mut played = Played::over("tcp,self");
    let (staging, memory) = Staging::new(1).unwrap();
    let staging = Arc::new(staging);
    let options = options("tcp,self");
    let mut writer =
        Writer::new(options, Rank(0), staging.clone(), vec![memory], DEADLINE).unwrap();
    let offer = played.offer(3);
    let target = Arc::new(Target::new(RANK, &offer, Arc::default()).unwrap());
    let (told, is_told) = sync_channel(1);
    let until = Instant::now() + DEADLINE;
    writer.reach(vec![(target.clone(), offer.metadata.clone())], until, told);
    while is_told.try_recv().is_err() {
        assert!(Instant::now() < until, "it is not reached");
        for (from, said) in played.agent.notices().unwrap() {
            let ToLender::Accept { metadata, .. } = postcard::from_bytes(&said).unwrap() else {
                panic!("it lets go of what was not granted");
            };
            played.agent.load_peer(&metadata).unwrap();
            played.say(&from, &ToWriter::Granted { lease: 3 });
        }
        writer.poll();
    }
    let Next::Fill(mut staged) = staging.take(&target, DEADLINE, || Ok(())).unwrap() else {
        panic!("nothing is open");
    };
    let bytes: Vec<u8> = (0..300_000).map(|at| (at * 7 + at / 255) as u8).collect();
    let to = played.piece.address();
    assert_eq!(staged.add(to, to, &bytes), bytes.len());
    target.begun();
    writer.write(target.clone(), Parcel::Gathered(staged));
    writer.leave(&target);
    // The rollout processes nothing meanwhile, like one that is stopped.
    for _ in 0..100 {
        writer.poll();
    }
    assert_eq!(writer.leases.len(), 1, "it was let go of before the bytes were there");
    let said = loop {
        assert!(Instant::now() < until, "it is not let go of");
        writer.poll();
        if let Some((_, said)) = played.agent.notices().unwrap().pop() {
            break postcard::from_bytes::<ToLender>(&said).unwrap();
        }
    };
    assert_eq!(said, ToLender::LetGo { lease: 3 });
    assert!(played.piece.bytes()[..bytes.len()] == bytes, "not all of it is there");
    writer.close();
}

#[tokio::test]
async fn a_new_agent_has_only_the_memory_that_somebody_still_writes_from() {
    let (staging, memory) = Staging::new(1).unwrap();
    let options = options("tcp,self");
    let mut writer =
        Writer::new(options, Rank(0), Arc::new(staging), vec![memory], DEADLINE).unwrap();
    let more: Vec<_> = (0..2).map(|_| pieces(1, 4096).unwrap()).collect();
    for (memory, _) in &more {
        writer.register(memory.clone()).unwrap();
    }
    let kept = more.into_iter().next();
    for (worn, expected) in [(false, 3), (true, 2)] {
        writer.is_worn = worn;
        writer.renew().unwrap();
        assert_eq!(writer.memory.len(), expected);
    }
    drop(kept);
    writer.close();
}

//! Agents of this process that lend memory and write to it, and agents that a test plays.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine_core::{DeviceChoice, ErrorKind, Rank, Result};
use placed::{Lender, LentBytes, Reach, Reached};
use protocol::{decode, encode};

use super::memory::{LentMemory, allocate};
use super::notice::{Offer, OfferedPart, ToLender, ToWriter};
use super::reach::Writers;
use crate::agent::{AgentOptions, open_with, this_host};
use crate::engine::unique_name;
use crate::ffi::RawAgent;
use crate::host::{Piece, pieces};
use crate::lent::Process;

const BYTES: usize = 3 << 20;
pub(super) const DEADLINE: Duration = Duration::from_secs(20);
pub(super) const RANK: Rank = Rank(5);

pub(super) fn options(transports: &str) -> AgentOptions {
    AgentOptions { transports: transports.into(), error_handling: "peer", ..Default::default() }
}

/// Memory that is lent over these transports; over all of them by default.
async fn lender(transports: &str, deadline: Duration) -> LentMemory {
    let memory = allocate(BYTES as u64).unwrap();
    LentMemory::start(options(transports), unique_name("lends"), memory, deadline).await.unwrap()
}

/// A trainer with so many bytes of blocks.
async fn writers(transports: &str, bytes: u64, limit: Duration) -> Writers {
    Writers::start(options(transports), &DeviceChoice::default(), Rank(0), bytes, limit)
        .await
        .unwrap()
}

fn reach(writers: &Writers, terms: &Bytes) -> Result<Arc<dyn Reached>> {
    Ok(writers.reach(&[(RANK, terms.clone())])?.remove(0))
}

fn host(memory: &LentMemory) -> Vec<u8> {
    let LentBytes::Host(bytes) = memory.bytes(0, BYTES as u64).unwrap() else {
        panic!("of the host")
    };
    bytes.to_vec()
}

/// Whether memory is taken back within a time.
fn is_back(memory: &mut LentMemory, within: Duration) -> bool {
    let until = Instant::now() + within;
    while !memory.take_back().unwrap() {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

#[tokio::test]
async fn bytes_are_read_once_whoever_could_write_has_let_go_and_nobody_can_write_by_old_terms() {
    let mut memory = lender("", DEADLINE).await;
    let writers = writers("", 1 << 20, DEADLINE).await;
    assert!(memory.take_back().unwrap());
    let terms = memory.lend(&[]).unwrap();
    assert_eq!(memory.lend(&[]).unwrap_err().kind(), ErrorKind::State);
    let held = reach(&writers, &terms).unwrap();
    for (at, bytes) in [(3, &[1_u8; 20][..]), (23, &[2; 5]), (92, &[3; 8])] {
        held.put(at, bytes).unwrap();
    }
    let error = held.put(BYTES as u64 - 7, &[4; 8]).unwrap_err();
    assert_eq!((error.kind(), error.report().rank), (ErrorKind::Protocol, Some(RANK)), "{error}");
    held.flush().unwrap();
    assert!(!memory.take_back().unwrap());
    assert_eq!(memory.bytes(0, 100).unwrap_err().kind(), ErrorKind::State);
    drop(held);
    assert!(is_back(&mut memory, DEADLINE));
    let expected = [vec![0; 3], vec![1; 20], vec![2; 5], vec![0; 64], vec![3; 8]].concat();
    assert_eq!(host(&memory)[..100], expected);
    let error = reach(&writers, &terms).unwrap_err();
    assert_eq!(error.report().rank, Some(RANK), "{error}");
    assert!(error.to_string().contains("taken its tensors back"), "{error}");
    // The next update has new terms, and the same agents.
    let next = memory.lend(&[]).unwrap();
    let (old, new): (Offer, Offer) = (decode(&terms).unwrap(), decode(&next).unwrap());
    assert_eq!(old.agent, new.agent);
    assert_ne!(old.lease, new.lease);
    let held = reach(&writers, &next).unwrap();
    held.put(0, &[9]).unwrap();
    held.flush().unwrap();
    drop(held);
    assert!(is_back(&mut memory, DEADLINE));
    assert_eq!(host(&memory)[..4], [9, 0, 0, 1]);
}

#[tokio::test]
async fn what_several_threads_put_to_several_rollouts_is_there_with_fewer_blocks_than_they_fill() {
    const THREADS: usize = 4;
    const RUN: usize = 700;
    for transports in ["", "tcp,self"] {
        let mut lent = Vec::new();
        for _ in 0..3 {
            lent.push(lender(transports, DEADLINE).await);
        }
        // The least: two blocks.
        let writers = writers(transports, 1, DEADLINE).await;
        let terms: Vec<(Rank, Bytes)> =
            (5..).map(Rank).zip(lent.iter_mut().map(|memory| memory.lend(&[]).unwrap())).collect();
        let reached = writers.reach(&terms).unwrap();
        let value = |to: usize, at: usize| (to * 31 + at * 7 + at / 251) as u8;
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let reached = &reached;
                scope.spawn(move || {
                    // Rows of which every thread has one, and some bytes between them that nobody writes.
                    for row in (thread..BYTES / RUN).step_by(THREADS) {
                        for (to, memory) in reached.iter().enumerate() {
                            let at = row * RUN;
                            let bytes: Vec<u8> =
                                (at..at + RUN - 3).map(|at| value(to, at)).collect();
                            memory.put(at as u64, &bytes[..400]).unwrap();
                            memory.put(at as u64 + 400, &bytes[400..]).unwrap();
                        }
                    }
                });
            }
        });
        reached.iter().for_each(|memory| memory.flush().unwrap());
        drop(reached);
        for (to, memory) in lent.iter_mut().enumerate() {
            assert!(is_back(memory, DEADLINE));
            let bytes = host(memory);
            for (at, byte) in bytes.iter().enumerate().take(BYTES / RUN * RUN) {
                let expected = if at % RUN < RUN - 3 { value(to, at) } else { 0 };
                assert_eq!(*byte, expected, "byte {at} of rollout {to} over {transports:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_trainer_that_does_not_let_go_is_cut_off_where_that_keeps_it_from_writing() {
    // The grace is an eighth of it.
    let mut memory = lender("tcp,self", Duration::from_secs(2)).await;
    let writers = writers("tcp,self", 1 << 20, DEADLINE).await;
    let terms = memory.lend(&[]).unwrap();
    let held = reach(&writers, &terms).unwrap();
    held.put(0, &[1; 100]).unwrap();
    held.flush().unwrap();
    held.put(50, &[2; 100]).unwrap();
    assert!(!memory.take_back().unwrap());
    assert!(is_back(&mut memory, DEADLINE));
    // What it writes from now on arrives nowhere, and is an error.
    let error = held.flush().unwrap_err();
    assert_eq!(error.report().rank, Some(RANK), "{error}");
    assert!(held.put(0, &[3; 100]).is_err());
    assert_eq!(host(&memory)[..200], [[1; 100], [0; 100]].concat());
    drop(held);
    // The next update has another agent at both ends.
    let next = memory.lend(&[]).unwrap();
    let (old, new): (Offer, Offer) = (decode(&terms).unwrap(), decode(&next).unwrap());
    assert_ne!(old.agent, new.agent);
    let held = reach(&writers, &next).unwrap();
    held.put(10, &[4; 10]).unwrap();
    held.flush().unwrap();
    drop(held);
    assert!(is_back(&mut memory, DEADLINE));
    assert_eq!(host(&memory)[..30], [[1; 10], [4; 10], [1; 10]].concat());
}

#[tokio::test]
async fn a_trainer_that_can_write_by_itself_keeps_memory_lent_until_it_lets_go() {
    // The writer is a process of this host that is there: this one.
    let mut memory = lender("", Duration::from_secs(2)).await;
    let writers = writers("", 1 << 20, DEADLINE).await;
    let held = reach(&writers, &memory.lend(&[]).unwrap()).unwrap();
    assert!(!is_back(&mut memory, Duration::from_millis(800)));
    held.put(0, &[1; 10]).unwrap();
    held.flush().unwrap();
    drop(held);
    assert!(is_back(&mut memory, DEADLINE));
    assert_eq!(host(&memory)[..12], [[1; 10].to_vec(), vec![0; 2]].concat());
}

#[tokio::test]
async fn what_is_dropped_before_it_is_flushed_is_let_go_of_and_the_next_update_works() {
    let mut memory = lender("", DEADLINE).await;
    let writers = writers("", 1, DEADLINE).await;
    for version in 1..5 {
        let held = reach(&writers, &memory.lend(&[]).unwrap()).unwrap();
        held.put(0, &vec![200 + version; BYTES]).unwrap();
        drop(held);
        assert!(is_back(&mut memory, DEADLINE));
        let held = reach(&writers, &memory.lend(&[]).unwrap()).unwrap();
        held.put(0, &vec![version; BYTES]).unwrap();
        held.flush().unwrap();
        drop(held);
        assert!(is_back(&mut memory, DEADLINE));
        assert!(host(&memory).iter().all(|byte| *byte == version));
    }
}

/// An agent without a thread: it sends and processes only what a test makes it.
pub(super) struct Played {
    pub(super) agent: RawAgent,
    name: String,
    metadata: Vec<u8>,
    /// Its memory.
    pub(super) piece: Piece,
}

impl Played {
    fn new() -> Self {
        Self::over("")
    }

    /// One with these transports.
    pub(super) fn over(transports: &str) -> Self {
        let (memory, mut cut) = pieces(1, 1 << 20).unwrap();
        let name = unique_name("played");
        let (agent, metadata) = open_with(&options(transports), &name, vec![memory]).unwrap();
        Self { agent, name, metadata, piece: cut.pop().unwrap() }
    }

    /// Terms by which it lends its memory.
    pub(super) fn offer(&self, lease: u64) -> Offer {
        let (bytes, address) = (self.piece.len() as u64, self.piece.address() as u64);
        let parts = vec![OfferedPart { at: 0, bytes, address }];
        Offer {
            agent: self.name.clone(),
            metadata: self.metadata.clone(),
            lease,
            device: None,
            parts,
        }
    }

    pub(super) fn say(&self, to: &str, what: &impl serde::Serialize) {
        self.agent.notify(to, &postcard::to_stdvec(what).unwrap()).unwrap();
    }

    /// The next message that can be read as one of a kind, with its sender.
    async fn hears<T: serde::de::DeserializeOwned>(&mut self) -> (String, T) {
        let until = Instant::now() + DEADLINE;
        loop {
            if let Some((from, bytes)) = self.agent.notices().unwrap().pop() {
                return (from, postcard::from_bytes(&bytes).unwrap());
            }
            assert!(Instant::now() < until, "nothing was said");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Processes what arrives, for a while.
    async fn goes_on(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.agent.notices().unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn accept(&self, offer: &Offer) {
        self.agent.load_peer(&offer.metadata).unwrap();
        let accept = ToLender::Accept {
            lease: offer.lease,
            rank: Rank(0),
            metadata: self.metadata.clone(),
            host: this_host(),
            process: Process::this(),
        };
        self.say(&offer.agent, &accept);
    }
}

#[tokio::test]
async fn only_who_was_granted_a_lease_can_let_go_of_it() {
    let mut memory = lender("", DEADLINE).await;
    let offer: Offer = decode(&memory.lend(&[]).unwrap()).unwrap();
    let (mut one, mut other) = (Played::new(), Played::new());
    one.accept(&offer);
    let (from, answer): (_, ToWriter) = one.hears().await;
    assert_eq!((from, answer), (offer.agent.clone(), ToWriter::Granted { lease: offer.lease }));
    other.agent.load_peer(&offer.metadata).unwrap();
    other.say(&offer.agent, &ToLender::LetGo { lease: offer.lease });
    one.say(&offer.agent, &ToLender::LetGo { lease: offer.lease + 1 });
    other.goes_on(Duration::from_millis(100)).await;
    one.goes_on(Duration::from_millis(100)).await;
    assert!(!is_back(&mut memory, Duration::from_millis(50)));
    // The lease is closed by now.
    other.accept(&offer);
    let (_, answer): (_, ToWriter) = other.hears().await;
    assert_eq!(answer, ToWriter::Refused { lease: offer.lease });
    one.say(&offer.agent, &ToLender::LetGo { lease: offer.lease });
    one.goes_on(Duration::from_millis(100)).await;
    assert!(is_back(&mut memory, DEADLINE));
}

#[tokio::test]
async fn a_rollout_that_does_not_answer_is_named_and_a_grant_that_comes_late_is_let_go_of() {
    let mut silent = Played::new();
    let limit = Duration::from_secs(3);
    let writers = Arc::new(writers("", 1, limit).await);
    let terms = encode(&silent.offer(3)).unwrap();
    let reaching = {
        let writers = writers.clone();
        std::thread::spawn(move || reach(&writers, &terms).map(drop))
    };
    let (trainer, accept): (_, ToLender) = silent.hears().await;
    let ToLender::Accept { metadata, lease: 3, .. } = accept else { panic!("{accept:?}") };
    let error = reaching.join().unwrap().unwrap_err();
    assert_eq!((error.kind(), error.report().rank), (ErrorKind::Timeout, Some(RANK)), "{error}");
    silent.agent.load_peer(&metadata).unwrap();
    silent.say(&trainer, &ToWriter::Granted { lease: 3 });
    let (_, said): (_, ToLender) = silent.hears().await;
    assert_eq!(said, ToLender::LetGo { lease: 3 });
    // Others are reached, by another agent.
    let mut memory = lender("", DEADLINE).await;
    drop(reach(&writers, &memory.lend(&[]).unwrap()).unwrap());
    assert!(is_back(&mut memory, DEADLINE));
}

#[tokio::test]
async fn terms_that_cannot_be_read_or_that_no_memory_has_are_refused_by_rank() {
    let writers = writers("", 1, DEADLINE).await;
    let part = OfferedPart { at: 0, bytes: 4096, address: u64::MAX - 1 };
    let offer = Offer {
        agent: "a".into(),
        metadata: b"b".to_vec(),
        lease: 1,
        device: None,
        parts: vec![part],
    };
    let nowhere = Offer { parts: Vec::new(), ..offer.clone() };
    for terms in [Bytes::from_static(b"{}"), encode(&offer).unwrap()] {
        let error = reach(&writers, &terms).unwrap_err();
        assert_eq!(
            (error.kind(), error.report().rank),
            (ErrorKind::Protocol, Some(RANK)),
            "{error}"
        );
    }
    let error = reach(&writers, &encode(&nowhere).unwrap()).unwrap_err();
    assert_eq!(error.report().rank, Some(RANK), "{error}");
}

#[tokio::test]
async fn a_lender_that_is_gone_is_an_error_that_names_it() {
    for transports in ["", "tcp,self"] {
        let writers = writers(transports, 1 << 20, Duration::from_secs(4)).await;
        let mut memory = lender(transports, Duration::from_secs(2)).await;
        let held = reach(&writers, &memory.lend(&[]).unwrap()).unwrap();
        drop(memory);
        // Its agent ends when the trainer has had its time.
        let until = Instant::now() + DEADLINE;
        let error = loop {
            let wrote = held.put(0, &[1; 1000]).and_then(|()| held.flush());
            match wrote {
                Err(error) => break error,
                Ok(()) => assert!(Instant::now() < until, "writes go on to nowhere"),
            }
        };
        assert_eq!(error.report().rank, Some(RANK), "{error}");
    }
}

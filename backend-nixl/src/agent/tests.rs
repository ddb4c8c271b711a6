//! Agents of this process that fetch from one another, and peers that a test plays.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use engine_core::memory::{Job, Pool};
use engine_core::{DType, Weight};
use tokio::sync::oneshot;

use super::notice::{Ask, Notice};
use super::*;
use crate::arena::{Arena, Slot};
use crate::error::NixlError;
use crate::ffi::RawAgent;

impl Awaiting for oneshot::Sender<Result<Slot, NixlError>> {
    fn is_awaited(&self) -> bool {
        !self.is_closed()
    }

    fn tell(self: Box<Self>, result: Result<Slot, NixlError>) {
        drop(self.send(result));
    }
}

pub(super) const BYTES: u64 = 3 << 20;

pub(super) const DEADLINE: Duration = Duration::from_secs(20);

async fn agent(name: &str) -> (Agent, Arc<Arena>) {
    agent_that(name, false).await
}

async fn agent_with(name: &str, options: AgentOptions) -> (Agent, Arc<Arena>) {
    let arena = Arc::new(Arena::of_host(2, BYTES).unwrap());
    let name = format!("{name}-{}", std::process::id());
    (Agent::start(options, name, arena.clone()).await.unwrap(), arena)
}

async fn agent_that(name: &str, writes: bool) -> (Agent, Arc<Arena>) {
    agent_with(name, AgentOptions { error_handling: "peer", writes, ..Default::default() }).await
}

#[tokio::test]
async fn interfaces_that_are_not_there_are_named_and_no_peer_is_blamed() {
    let interface = "nowhere9".to_owned();
    let transports = "tcp,self".to_owned();
    let options =
        AgentOptions { error_handling: "peer", interface, transports, ..Default::default() };
    let arena = Arc::new(Arena::of_host(2, BYTES).unwrap());
    let error = Agent::start(options, "nowhere".into(), arena).await.unwrap_err().to_string();
    assert!(error.contains("NET_DEVICES=nowhere9"), "{error}");
    assert!(error.contains("TLS=tcp,self"), "{error}");
    assert!(!error.contains("peer"), "{error}");
}

#[tokio::test]
async fn an_agent_of_host_memory_has_no_file_in_dev_shm_that_a_kill_could_leave() {
    let agents = (agent("one").await, agent("other").await);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps.contains("libucp"), "UCX is not mapped");
    assert!(!maps.contains("ucx_shm_posix"), "{maps}");
    drop(agents);
}

/// Begins a transfer. Returns its result.
async fn begin(
    at: &(Agent, Arc<Arena>),
    slot: u32,
    peer: &Arc<Card>,
    from: u32,
) -> Result<oneshot::Receiver<Result<Slot, NixlError>>, NixlError> {
    let (tell, told) = oneshot::channel();
    at.0.transfer(Transfer {
        slot: at.1.lock(slot, BYTES, DEADLINE).await?,
        peer: peer.clone(),
        from,
        deadline: DEADLINE,
        done: Box::new(tell),
    });
    Ok(told)
}

async fn transfer(
    at: &(Agent, Arc<Arena>),
    slot: u32,
    peer: &Arc<Card>,
    from: u32,
) -> Result<Slot, NixlError> {
    begin(at, slot, peer, from).await?.await.unwrap()
}

/// Gives a peer up as soon as it was asked to write. Returns the transfer's error.
async fn give_up(at: &(Agent, Arc<Arena>), slot: u32, peer: &Arc<Card>, from: u32) -> NixlError {
    loop {
        let told = begin(at, slot, peer, from).await.unwrap();
        at.0.forget(peer);
        // It may have written already.
        if let Err(error) = told.await.unwrap() {
            return error;
        }
    }
}

fn pattern(seed: usize) -> impl Iterator<Item = u8> {
    (0..BYTES as usize).map(move |at| (at * 7 + seed) as u8)
}

/// Fills a slot with a pattern.
pub(super) async fn fill(arena: &Arena, slot: u32, seed: usize) {
    let slot = arena.lock(slot, BYTES, DEADLINE).await.unwrap();
    let bytes = pattern(seed).collect::<Vec<u8>>();
    let weight = Weight::new("w", DType::U8, [BYTES], bytes).unwrap();
    let job = Job { weight, start: 0, len: BYTES, offset: 0 };
    slot.fill(vec![job], &Pool::new(1).unwrap(), false).unwrap();
}

pub(super) fn is_pattern(slot: Slot, seed: usize) -> bool {
    slot.into_storage().unwrap().to_host().unwrap().iter().copied().eq(pattern(seed))
}

#[tokio::test]
async fn bytes_of_another_agents_slots_are_read_or_written_by_it() {
    for writes in [false, true] {
        let mut one = agent_that(&format!("one-{writes}"), writes).await;
        let mut two = agent_that(&format!("two-{writes}"), writes).await;
        let card = one.0.card().unwrap();
        for seed in 1..5 {
            fill(&one.1, 0, seed).await;
            let slot = transfer(&two, 1, &card, 0).await.unwrap();
            assert!(is_pattern(slot, seed), "other bytes arrived, {writes}");
        }
        two.0.close().await;
        one.0.close().await;
    }
}

/// An agent that has only these transports.
async fn agent_over(name: &str, transports: &str) -> (Agent, Arc<Arena>) {
    let transports = transports.into();
    let options = AgentOptions { transports, error_handling: "peer", ..Default::default() };
    agent_with(name, options).await
}

#[tokio::test]
async fn an_agent_that_cannot_be_read_from_is_asked_to_write() {
    // That the first has only TCP is known. For the second, it is found out.
    for (transports, known) in [("tcp,self", true), ("tcp,tcp,self,", false)] {
        let one = agent_over("unreadable", transports).await;
        let two = agent_over("reads", transports).await;
        assert_eq!(two.0.moves(), known, "{transports}");
        let card = one.0.card().unwrap();
        for seed in 1..4 {
            fill(&one.1, 0, seed).await;
            let slot = transfer(&two, 1, &card, 0).await.unwrap();
            assert!(is_pattern(slot, seed), "other bytes arrived");
            assert!(two.0.moves(), "{transports}");
        }
    }
}

#[tokio::test]
async fn one_that_cannot_be_read_from_and_does_not_answer_is_not_told_where_to_write() {
    let two = agent_over("greets", "tcp,tcp,self,").await;
    let before = two.1.place(1, BYTES).unwrap().address;
    // An agent without a thread, which processes nothing.
    let arena = Arena::of_host(2, BYTES).unwrap();
    let options = AgentOptions { error_handling: "peer", ..Default::default() };
    let name = format!("silent-{}", std::process::id());
    let (_silent, card) = open(&options, name, &arena, Vec::new()).unwrap();
    let card = Arc::new(card);
    let mut told = begin(&two, 1, &card, 0).await.unwrap();
    let waited = tokio::time::timeout(Duration::from_millis(300), &mut told).await;
    assert!(waited.is_err(), "it is still waited for: {waited:?}");
    two.0.forget(&card);
    let error = told.await.unwrap().unwrap_err();
    assert!(matches!(error, NixlError::Abandoned), "{error}");
    assert!(!two.0.moves());
    assert_eq!(two.1.place(1, BYTES).unwrap().address, before);
    // The slot can be used again in the same update.
    let other = agent_over("answers", "tcp,tcp,self,").await;
    fill(&other.1, 0, 1).await;
    let card = other.0.card().unwrap();
    assert!(is_pattern(transfer(&two, 1, &card, 0).await.unwrap(), 1));
}

#[tokio::test]
async fn a_slot_whose_writer_was_given_up_is_elsewhere_and_works() {
    let (one, two) = (agent_that("given-up", true).await, agent_that("waits", true).await);
    let three = agent_that("other", true).await;
    let card = one.0.card().unwrap();
    fill(&one.1, 0, 1).await;
    fill(&three.1, 0, 2).await;
    assert!(two.0.moves());
    for round in 0..3 {
        let before = two.1.place(1, BYTES).unwrap().address;
        let error = give_up(&two, 1, &card, 0).await;
        assert!(matches!(error, NixlError::Abandoned), "{error}");
        assert_ne!(two.1.place(1, BYTES).unwrap().address, before, "round {round}");
        assert!(are_disjoint(&two.1), "round {round}");
        // Another one is asked, which has to learn of the new memory, and then the first one again.
        let other = three.0.card().unwrap();
        assert!(is_pattern(transfer(&two, 1, &other, 0).await.unwrap(), 2), "round {round}");
        assert!(is_pattern(transfer(&two, 1, &card, 0).await.unwrap(), 1), "round {round}");
    }
}

#[tokio::test]
async fn nothing_is_fetched_to_a_slot_that_moved_before_anyone_was_told() {
    let (one, two) = (agent_that("writes", true).await, agent_that("untold", true).await);
    let card = one.0.card().unwrap();
    give_up(&two, 1, &card, 0).await;
    let error = transfer(&two, 1, &card, 0).await.unwrap_err();
    assert!(matches!(error, NixlError::Moved), "{error}");
    assert!(two.0.moves());
    drop(transfer(&two, 1, &card, 0).await.unwrap());
}

#[tokio::test]
async fn an_agent_that_is_asked_for_what_it_does_not_have_refuses_at_once() {
    let (one, two) = (agent_that("refuses", true).await, agent_that("asks", true).await);
    let card = Card { slots: 9, ..(*one.0.card().unwrap()).clone() };
    let error = transfer(&two, 0, &Arc::new(card), 7).await.unwrap_err();
    assert!(matches!(error, NixlError::Refused(_)), "{error}");
    let card = one.0.card().unwrap();
    drop(transfer(&two, 0, &card, 1).await.unwrap());
}

#[tokio::test]
async fn an_agent_that_is_gone_is_an_error_and_others_still_work() {
    let (one, two, mut gone) = (agent("a").await, agent("b").await, agent("c").await);
    let card = gone.0.card().unwrap();
    drop(transfer(&one, 0, &card, 0).await.unwrap());
    gone.0.close().await;
    // Its memory is still there, until the connection's end is noticed.
    let noticed = async { while transfer(&one, 0, &card, 0).await.is_ok() {} };
    tokio::time::timeout(DEADLINE, noticed).await.unwrap();
    // However often it is tried: an agent that was read from before is never asked to write.
    for _ in 0..3 {
        let error = transfer(&one, 0, &card, 0).await.unwrap_err();
        assert!(!matches!(error, NixlError::Slow(_)), "{error}");
    }
    assert!(!one.0.moves(), "one that is gone was asked to write");
    let card = two.0.card().unwrap();
    drop(transfer(&one, 0, &card, 0).await.unwrap());
}

#[tokio::test]
async fn what_is_not_a_card_is_an_error() {
    let one = agent("card").await;
    let card = Card { metadata: b"nonsense".to_vec(), ..(*one.0.card().unwrap()).clone() };
    assert!(card.range(2, 1).is_err() && card.range(0, BYTES + 1).is_err());
    let error = transfer(&one, 0, &Arc::new(card), 0).await;
    assert!(error.is_err());
}

#[tokio::test]
async fn transports_that_do_not_exist_are_an_error_that_names_them() {
    let arena = Arc::new(Arena::of_host(1, 4096).unwrap());
    let options = AgentOptions {
        transports: "carrier_pigeon".into(),
        error_handling: "peer",
        ..Default::default()
    };
    let error = Agent::start(options, "pigeon".into(), arena).await.unwrap_err();
    assert!(error.to_string().contains("carrier_pigeon"), "{error}");
}

#[tokio::test]
async fn a_slot_that_is_read_is_not_given_away() {
    let arena = Arena::of_host(1, 4096).unwrap();
    let view = arena.lock(0, 10, DEADLINE).await.unwrap().into_storage();
    let error = arena.lock(0, 10, Duration::from_millis(20)).await.unwrap_err();
    assert!(matches!(error, NixlError::InUse { .. }), "{error}");
    drop(view);
    drop(arena.lock(0, 10, DEADLINE).await.unwrap());
}

/// An agent without a thread: it sends and processes only what a test makes it.
pub(super) fn bare(name: &str, transports: &str) -> (RawAgent, Arc<Card>, Arena) {
    let arena = Arena::of_host(2, BYTES).unwrap();
    let transports = transports.into();
    let options = AgentOptions { transports, error_handling: "peer", ..Default::default() };
    let name = format!("{name}-{}", std::process::id());
    let (agent, card) = open(&options, name, &arena, Vec::new()).unwrap();
    (agent, Arc::new(card), arena)
}

/// Waits for a request to an agent without a thread.
async fn asked(agent: &mut RawAgent) -> (String, Ask) {
    loop {
        for (peer, bytes) in agent.notices().unwrap() {
            if let Ok(Notice::Ask(ask)) = postcard::from_bytes(&bytes) {
                return (peer, ask);
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Answers a request to an agent without a thread.
pub(super) fn answer(agent: &RawAgent, to: &Card, notice: &Notice) {
    agent.load_peer(&to.metadata).unwrap();
    agent.notify(&to.name, &postcard::to_stdvec(notice).unwrap()).unwrap();
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("it does not take that long")
}

/// Waits until the memory of this many slots is kept for peers, while an agent without a thread does its part.
async fn until_kept(at: &(Agent, Arc<Arena>), kept: usize, peer: &mut RawAgent) {
    soon(async {
        while at.0.known.retired.load(Ordering::SeqCst) != kept {
            peer.notices().unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

fn are_disjoint(arena: &Arena) -> bool {
    let mut starts: Vec<usize> =
        (0..arena.slots()).map(|slot| arena.place(slot, BYTES).unwrap().address).collect();
    starts.sort_unstable();
    starts.windows(2).all(|two| two[0] + BYTES as usize <= two[1])
}

#[tokio::test]
async fn slots_have_memory_of_their_own_after_peers_that_were_given_up_answer_late() {
    let two = agent_that("late", true).await;
    let (mut one, card, _arena) = bare("answers-late", "");
    for round in 0..4 {
        let mut told = begin(&two, 1, &card, 0).await.unwrap();
        let (_, ask) = soon(asked(&mut one)).await;
        two.0.forget(&card);
        let error = soon(&mut told).await.unwrap().unwrap_err();
        assert!(matches!(error, NixlError::Abandoned), "{error}");
        assert!(are_disjoint(&two.1), "round {round}");
        until_kept(&two, 1, &mut one).await;
        answer(&one, &two.0.card().unwrap(), &Notice::Done { id: ask.id });
        until_kept(&two, 0, &mut one).await;
        assert!(are_disjoint(&two.1), "round {round}");
    }
}

#[tokio::test]
async fn what_another_agent_says_is_no_answer() {
    let two = agent_that("listens", true).await;
    let (mut one, card, _arena) = bare("is-asked", "");
    let (mut three, _, _other) = bare("is-not-asked", "");
    let mut told = begin(&two, 1, &card, 0).await.unwrap();
    let (_, ask) = soon(asked(&mut one)).await;
    let own = two.0.card().unwrap();
    answer(&three, &own, &Notice::Done { id: ask.id });
    answer(&three, &own, &Notice::Refused { id: ask.id, begun: false, words: "no".into() });
    for _ in 0..200 {
        three.notices().unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(told.try_recv().is_err(), "the other agent's words were taken for an answer");
    answer(&one, &own, &Notice::Done { id: ask.id });
    let answered = async {
        loop {
            one.notices().unwrap();
            match told.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                told => return told,
            }
        }
    };
    drop(soon(answered).await.unwrap().unwrap());
}

#[tokio::test]
async fn a_slot_stays_where_it_is_only_if_the_refused_write_was_not_begun() {
    for begun in [false, true] {
        let two = agent_that(&format!("is-refused-{begun}"), true).await;
        let (mut one, card, _arena) = bare(&format!("begins-{begun}"), "");
        let before = two.1.place(1, BYTES).unwrap().address;
        let mut told = begin(&two, 1, &card, 0).await.unwrap();
        let (_, ask) = soon(asked(&mut one)).await;
        let words = "the write failed".into();
        answer(&one, &two.0.card().unwrap(), &Notice::Refused { id: ask.id, begun, words });
        let refused = async {
            loop {
                one.notices().unwrap();
                if let Ok(told) = told.try_recv() {
                    return told;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let error = soon(refused).await.unwrap_err();
        assert!(matches!(error, NixlError::Refused(_)), "{error}");
        let moved = two.1.place(1, BYTES).unwrap().address != before;
        assert_eq!(moved, begun);
        assert!(are_disjoint(&two.1));
    }
}

#[tokio::test]
async fn memory_kept_for_peers_is_used_again_after_the_connections_were_closed() {
    let two = agent_over("renews", "tcp,self").await;
    let three = agent_over("stays", "tcp,self").await;
    fill(&three.1, 0, 3).await;
    let before = two.0.card().unwrap();
    // Nothing to be done: the agent stays.
    two.0.renew(DEADLINE).await;
    assert_eq!(two.0.card().unwrap(), before);
    let mut places = BTreeSet::new();
    for round in 0..6 {
        let (mut one, card, _arena) = bare(&format!("dies-{round}"), "tcp,self");
        let mut told = begin(&two, 1, &card, 0).await.unwrap();
        soon(asked(&mut one)).await;
        two.0.forget(&card);
        assert!(soon(&mut told).await.unwrap().is_err());
        until_kept(&two, 1, &mut one).await;
        two.0.renew(DEADLINE).await;
        assert_eq!(two.0.known.retired.load(Ordering::SeqCst), 0, "round {round}");
        assert!(are_disjoint(&two.1), "round {round}");
        places.insert(two.1.place(1, BYTES).unwrap().address);
        let known = two.0.card().unwrap();
        assert_ne!(known.name, before.name);
        assert!(known.moves, "slots that moved stay moved");
        let card = three.0.card().unwrap();
        assert!(is_pattern(transfer(&two, 1, &card, 0).await.unwrap(), 3), "round {round}");
    }
    assert!(places.len() <= 2, "more memory with each peer: {places:?}");
}

#[tokio::test]
async fn memory_is_kept_for_a_peer_on_this_host_that_may_write_by_itself() {
    let two = agent_that("keeps", true).await;
    let (mut one, card, _arena) = bare("is-here", "");
    let mut told = begin(&two, 1, &card, 0).await.unwrap();
    soon(asked(&mut one)).await;
    two.0.forget(&card);
    assert!(soon(&mut told).await.unwrap().is_err());
    until_kept(&two, 1, &mut one).await;
    let before = two.0.card().unwrap();
    // The peer is in this process, which has not ended.
    two.0.renew(DEADLINE).await;
    assert_eq!(two.0.known.retired.load(Ordering::SeqCst), 1);
    assert_eq!(two.0.card().unwrap(), before);
}

#[tokio::test]
async fn an_end_waits_for_a_write_that_nobody_waits_for_any_more() {
    let mut two = agent_over("ends", "tcp,self").await;
    let (mut one, card, _arena) = bare("still-writes", "tcp,self");
    let mut told = begin(&two, 1, &card, 0).await.unwrap();
    let (_, ask) = soon(asked(&mut one)).await;
    two.0.forget(&card);
    assert!(soon(&mut told).await.unwrap().is_err());
    until_kept(&two, 1, &mut one).await;
    let own = two.0.card().unwrap();
    let written = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        answer(&one, &own, &Notice::Done { id: ask.id });
        let begun = Instant::now();
        // It goes on with what it has begun, like one with a thread.
        while begun.elapsed() < Duration::from_millis(400) {
            one.notices().unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let begun = Instant::now();
    let closed = async {
        two.0.close().await;
        begun.elapsed()
    };
    let (took, ()) = tokio::join!(closed, written);
    assert!(took >= Duration::from_millis(300), "it ended within the write, after {took:?}");
    assert_eq!(
        two.0.known.retired.load(Ordering::SeqCst),
        0,
        "the write ended, and was not waited for"
    );
}

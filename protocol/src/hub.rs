//! A group within a process: a [`Control`] of queues, without connections, tasks or heartbeats.
//!
//! The leader has a [`Hub`]. Every other rank has a [`Member`], which may exist before its leader does. Until
//! [`Hub::admit`] connects the two, the member cannot send. The owner of a rank has to say when the rank leaves or is
//! lost. Dropping its control tells nobody, because a control may live longer than its rank.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Notify;

#[cfg(test)]
use engine_core::control::Peer;
use engine_core::control::{Control, Event, Role};
use engine_core::{Error, ErrorKind, ErrorReport, Rank, Recovery, Result, clock};

/// The leader of a group within a process.
#[derive(Clone, Debug, Default)]
pub struct Hub(Arc<Leader>);

/// Another rank of a group within a process.
#[derive(Clone, Debug)]
pub struct Member(Arc<Seat>);

#[derive(Debug, Default)]
struct Leader {
    queue: Queue,
    /// The ranks that are connected. Locked before any queue.
    members: Mutex<BTreeMap<Rank, Member>>,
    updates: AtomicU64,
}

#[derive(Debug)]
struct Seat {
    rank: Rank,
    role: Role,
    queue: Queue,
    /// Set once, while the leader's members are locked.
    leader: Mutex<Option<Weak<Leader>>>,
}

/// The events for a rank, and whether more can come.
#[derive(Debug, Default)]
struct Queue {
    events: Mutex<Events>,
    /// Notified when the events change. At most one task waits for it.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Events {
    queued: VecDeque<Event>,
    /// Why nothing comes after these.
    ended: Option<ErrorReport>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Events> {
        lock(&self.events)
    }

    /// Queues an event. Returns whether the rank is still there to take it.
    fn push(&self, event: Event) -> bool {
        let mut events = self.lock();
        let is_there = events.ended.is_none();
        if is_there {
            events.queued.push_back(event);
            drop(events);
            self.changed.notify_one();
        }
        is_there
    }

    /// Ends the queue: with a last event, if there is one, and the error that follows it.
    fn end(&self, last: Option<Event>, why: ErrorReport) {
        let mut events = self.lock();
        if events.ended.is_none() {
            events.queued.extend(last);
            events.ended = Some(why);
        }
        drop(events);
        self.changed.notify_one();
    }

    fn has_ended(&self) -> bool {
        self.lock().ended.is_some()
    }

    fn look(&self) -> Option<Result<Event>> {
        let mut events = self.lock();
        match events.queued.pop_front() {
            Some(event) => Some(Ok(event)),
            None => events.ended.clone().map(|error| Err(error.into())),
        }
    }

    async fn recv(&self, deadline: Duration) -> Result<Option<Event>> {
        if let Some(found) = self.look() {
            return found.map(Some);
        }
        if deadline.is_zero() {
            return Ok(None);
        }
        let coming = async {
            loop {
                // An event that came after the look has left a permit: this returns at once.
                self.changed.notified().await;
                if let Some(found) = self.look() {
                    return found;
                }
            }
        };
        clock::within(deadline, coming).await.transpose()
    }
}

impl Hub {
    /// The leader of a group without other ranks.
    pub fn new() -> Self {
        Self::default()
    }

    /// The leader's end of the connections.
    pub fn control(&self) -> Arc<dyn Control> {
        self.0.clone()
    }

    /// Connects a member.
    ///
    /// # Errors
    ///
    /// `PeerLost` if the member has left or was lost. `Mismatch` if it is in a group already, if its rank is the
    /// leader's or taken, or if the leader has left.
    pub fn admit(&self, member: &Member) -> Result<()> {
        let rank = member.0.rank;
        let refuse =
            |kind, words: &str| Err(Error::new(kind, "joining the group", words).rank(rank));
        let mut members = self.0.members();
        let mut leader = lock(&member.0.leader);
        if self.0.queue.has_ended() || rank == Rank::LEADER || members.contains_key(&rank) {
            return refuse(ErrorKind::Mismatch, "the group has no place for its rank");
        }
        if leader.is_some() {
            return refuse(ErrorKind::Mismatch, "it is in a group already");
        }
        if member.0.queue.has_ended() {
            return refuse(ErrorKind::PeerLost, "its engine is gone");
        }
        *leader = Some(Arc::downgrade(&self.0));
        members.insert(rank, member.clone());
        Ok(())
    }

    /// Tells the leader that a rank has joined the existing group.
    #[cfg(test)]
    pub(crate) fn announce(&self, peer: Peer) {
        self.0.queue.push(Event::Joined(peer));
    }

    /// The leader leaves the group in order. Its members hear that.
    pub fn leave(&self) {
        let error = Error::new(ErrorKind::TrainerLeft, "being in the group", "the trainer left it");
        self.end(
            &Event::Left { rank: Rank::LEADER },
            &ErrorReport::from(&error.rank(Rank::LEADER)),
        );
    }

    /// The leader is lost, for this reason. Its members hear that.
    pub fn lose(&self, words: &str) {
        let error = lost(Rank::LEADER, words).recovery(Recovery::Reconnect);
        let error = ErrorReport::from(&error);
        self.end(&Event::Lost { rank: Rank::LEADER, error: error.clone() }, &error);
    }

    fn end(&self, event: &Event, why: &ErrorReport) {
        let mut members = self.0.members();
        self.0.queue.end(None, ErrorReport::from(&closed()));
        for (_, member) in std::mem::take(&mut *members) {
            member.0.queue.end(Some(event.clone()), why.clone());
        }
    }
}

impl Member {
    /// A rank without a leader.
    pub fn new(rank: Rank, role: Role) -> Self {
        Self(Arc::new(Seat { rank, role, queue: Queue::default(), leader: Mutex::default() }))
    }

    /// The rank's end of the connection.
    pub fn control(&self) -> Arc<dyn Control> {
        self.0.clone()
    }

    /// The rank leaves the group in order. Its leader hears that.
    pub fn leave(&self) {
        self.end(Event::Left { rank: self.0.rank });
    }

    /// The rank is lost, for this reason. Its leader hears that.
    pub fn lose(&self, words: &str) {
        let rank = self.0.rank;
        self.end(Event::Lost { rank, error: ErrorReport::from(&lost(rank, words)) });
    }

    fn end(&self, event: Event) {
        self.0.queue.end(None, ErrorReport::from(&closed()));
        let Some(leader) = self.0.leader() else { return };
        let mut members = leader.members();
        if leader.connects(&members, &self.0) {
            members.remove(&self.0.rank);
            leader.queue.push(event);
        }
    }
}

impl Leader {
    fn members(&self) -> MutexGuard<'_, BTreeMap<Rank, Member>> {
        lock(&self.members)
    }

    /// Whether this member is connected. An earlier or later member of the same rank does not count.
    fn connects(&self, members: &BTreeMap<Rank, Member>, member: &Seat) -> bool {
        members.get(&member.rank).is_some_and(|there| std::ptr::eq(&*there.0, member))
    }
}

impl Seat {
    fn leader(&self) -> Option<Arc<Leader>> {
        lock(&self.leader).as_ref().and_then(Weak::upgrade)
    }
}

#[async_trait]
impl Control for Leader {
    fn rank(&self) -> Rank {
        Rank::LEADER
    }

    fn role(&self) -> Role {
        Role::Trainer
    }

    fn send(&self, to: Rank, body: Bytes) -> Result<()> {
        let event = Event::Message { from: Rank::LEADER, body };
        match self.members().get(&to) {
            Some(member) if member.0.queue.push(event) => Ok(()),
            _ => Err(unconnected(to)),
        }
    }

    async fn recv(&self, deadline: Duration) -> Result<Option<Event>> {
        self.queue.recv(deadline).await
    }

    fn cut(&self, rank: Rank, reason: &Error) -> Result<()> {
        let mut members = self.members();
        let member = members.remove(&rank).ok_or_else(|| unconnected(rank))?;
        let error = lost(Rank::LEADER, "the trainer has ended the connection");
        let error = ErrorReport::from(&error.recovery(Recovery::Reconnect));
        let last = Event::Lost { rank: Rank::LEADER, error: error.clone() };
        member.0.queue.end(Some(last), error);
        let mut error = ErrorReport::from(reason);
        error.rank.get_or_insert(rank);
        self.queue.push(Event::Lost { rank, error });
        Ok(())
    }

    fn silence(&self, rank: Rank) -> Option<Duration> {
        self.members().contains_key(&rank).then_some(Duration::ZERO)
    }

    fn next_update(&self) -> u64 {
        self.updates.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn updates(&self) -> u64 {
        0 // A hub has one group, formed before all updates.
    }
}

#[async_trait]
impl Control for Seat {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn role(&self) -> Role {
        self.role
    }

    fn send(&self, to: Rank, body: Bytes) -> Result<()> {
        if to != Rank::LEADER {
            return Err(not_for_members("sending a message to another member"));
        }
        let leader = self.leader().ok_or_else(|| unconnected(to))?;
        let members = leader.members();
        let event = Event::Message { from: self.rank, body };
        if leader.connects(&members, self) && leader.queue.push(event) {
            Ok(())
        } else {
            Err(unconnected(to))
        }
    }

    async fn recv(&self, deadline: Duration) -> Result<Option<Event>> {
        self.queue.recv(deadline).await
    }

    fn cut(&self, _: Rank, _: &Error) -> Result<()> {
        Err(not_for_members("ending a connection"))
    }

    fn silence(&self, _: Rank) -> Option<Duration> {
        None
    }

    fn next_update(&self) -> u64 {
        self.leader().map_or(0, |leader| leader.next_update())
    }

    fn updates(&self) -> u64 {
        0
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lost(rank: Rank, words: &str) -> Error {
    Error::new(ErrorKind::PeerLost, "being in the group", words).rank(rank)
}

fn unconnected(rank: Rank) -> Error {
    let words = "there is no connection to it";
    Error::new(ErrorKind::PeerLost, "sending a message", words).rank(rank)
}

fn closed() -> Error {
    Error::new(ErrorKind::State, "being in the group", "this rank has left it")
}

fn not_for_members(operation: &str) -> Error {
    Error::new(ErrorKind::State, operation, "only the leader does that")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(hub: &Hub, rank: u32) -> Member {
        let member = Member::new(Rank(rank), Role::Rollout);
        hub.admit(&member).unwrap();
        member
    }

    async fn next(control: &Arc<dyn Control>) -> Option<Event> {
        control.recv(Duration::ZERO).await.unwrap()
    }

    fn message(from: u32, body: &'static [u8]) -> Option<Event> {
        Some(Event::Message { from: Rank(from), body: Bytes::from_static(body) })
    }

    #[tokio::test]
    async fn what_a_rank_said_comes_before_the_news_that_it_has_left_and_nothing_after_that() {
        let hub = Hub::new();
        let (leader, one, two) = (hub.control(), member(&hub, 1), member(&hub, 2));
        let said = one.control();
        said.send(Rank::LEADER, Bytes::from_static(b"a")).unwrap();
        one.leave();
        // A rank that has left cannot be lost later.
        one.lose("twice");
        // As when a view is dropped later.
        assert!(said.send(Rank::LEADER, Bytes::from_static(b"b")).is_err());
        two.lose("its engine is gone");
        assert_eq!(next(&leader).await, message(1, b"a"));
        assert_eq!(next(&leader).await, Some(Event::Left { rank: Rank(1) }));
        let lost = next(&leader).await;
        assert!(matches!(&lost, Some(Event::Lost { rank: Rank(2), .. })), "{lost:?}");
        assert_eq!(next(&leader).await, None);
        for rank in [1, 2, 3] {
            let error = leader.send(Rank(rank), Bytes::new()).unwrap_err();
            assert_eq!(
                (error.kind(), error.report().rank),
                (ErrorKind::PeerLost, Some(Rank(rank)))
            );
            assert_eq!(leader.silence(Rank(rank)), None);
        }
    }

    #[tokio::test]
    async fn members_hear_what_their_leader_said_and_that_it_has_left_and_then_nothing_else() {
        for in_order in [false, true] {
            let hub = Hub::new();
            let heard = member(&hub, 1).control();
            hub.control().send(Rank(1), Bytes::from_static(b"a")).unwrap();
            match in_order {
                true => hub.leave(),
                false => hub.lose("its engine is gone"),
            }
            assert_eq!(next(&heard).await, message(0, b"a"));
            let last = next(&heard).await;
            assert_eq!(last == Some(Event::Left { rank: Rank::LEADER }), in_order, "{last:?}");
            let kind = if in_order { ErrorKind::TrainerLeft } else { ErrorKind::PeerLost };
            for _ in 0..2 {
                let error = heard.recv(Duration::from_secs(60)).await.unwrap_err();
                let told = error.report();
                assert_eq!((told.kind, told.rank), (kind, Some(Rank::LEADER)), "{error}");
                assert_eq!(told.recovery, Recovery::Reconnect, "{error}");
            }
        }
    }

    #[test]
    fn a_rank_is_in_one_group_once_and_never_after_it_was_lost() {
        let (hub, other) = (Hub::new(), Hub::new());
        let one = member(&hub, 1);
        let refused = |hub: &Hub, member: &Member| hub.admit(member).unwrap_err().kind();
        assert_eq!(refused(&other, &one), ErrorKind::Mismatch);
        assert_eq!(refused(&hub, &Member::new(Rank(1), Role::Rollout)), ErrorKind::Mismatch);
        assert_eq!(refused(&hub, &Member::new(Rank::LEADER, Role::Rollout)), ErrorKind::Mismatch);
        let gone = Member::new(Rank(2), Role::Rollout);
        gone.lose("its engine is gone");
        assert_eq!(refused(&hub, &gone), ErrorKind::PeerLost);
        hub.leave();
        assert_eq!(refused(&hub, &Member::new(Rank(3), Role::Rollout)), ErrorKind::Mismatch);
    }

    #[tokio::test]
    async fn a_wait_ends_with_what_comes_and_one_that_is_dropped_loses_nothing() {
        let hub = Hub::new();
        let heard = member(&hub, 1).control();
        {
            let mut dropped = std::pin::pin!(heard.recv(Duration::from_secs(60)));
            assert!(futures::poll!(&mut dropped).is_pending());
            hub.control().send(Rank(1), Bytes::from_static(b"a")).unwrap();
        }
        let heard_next = async || heard.recv(Duration::from_secs(60)).await.unwrap();
        assert_eq!(heard_next().await, message(0, b"a"));
        let send = async {
            hub.control().send(Rank(1), Bytes::from_static(b"b")).unwrap();
            hub.control().send(Rank(1), Bytes::from_static(b"c")).unwrap();
        };
        let (event, ()) = futures::future::join(heard_next(), send).await;
        assert_eq!((event, heard_next().await), (message(0, b"b"), message(0, b"c")));
        assert_eq!(heard.recv(Duration::from_millis(1)).await.unwrap(), None);
    }

    #[test]
    fn no_two_updates_of_a_hub_have_one_number() {
        let hub = Hub::new();
        let (leader, again) = (hub.control(), hub.control());
        assert_eq!([leader.next_update(), again.next_update(), leader.next_update()], [1, 2, 3]);
    }
}

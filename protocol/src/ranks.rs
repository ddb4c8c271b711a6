//! A group within a process, for tests of what is said over a control plane: no sockets, and no clock but deadlines.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Notify;

use engine_core::control::{Control, Event, Peer, Role};
use engine_core::{Error, ErrorKind, ErrorReport, Rank, Result, clock};

/// A leader and members, all of them rollouts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Group(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    inboxes: Mutex<BTreeMap<Rank, Inbox>>,
    changed: Notify,
    updates: AtomicU64,
}

#[derive(Debug, Default)]
struct Inbox {
    events: VecDeque<Event>,
    /// What comes a moment later: who only looks what is there does not find it.
    later: VecDeque<Event>,
    ended: Option<ErrorReport>,
}

impl Group {
    /// The leader's connection.
    pub(crate) fn lead(&self) -> Arc<dyn Control> {
        self.enter(Rank::LEADER)
    }

    /// A member's connection, of which the leader hears.
    pub(crate) fn join(&self, rank: Rank) -> Arc<dyn Control> {
        let member = self.enter(rank);
        let payload = Bytes::new();
        self.0.tell(Rank::LEADER, Event::Joined(Peer { rank, role: Role::Rollout, payload }));
        member
    }

    /// A member's connection, which is there from the beginning.
    pub(crate) fn enter(&self, rank: Rank) -> Arc<dyn Control> {
        self.0.lock().insert(rank, Inbox::default());
        Arc::new(Member { group: Arc::clone(&self.0), rank })
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Rank, Inbox>> {
        self.inboxes.lock().expect("no test panics with it")
    }

    fn tell(&self, to: Rank, event: Event) {
        if let Some(inbox) = self.lock().get_mut(&to) {
            inbox.events.push_back(event);
        }
        self.changed.notify_waiters();
    }
}

#[derive(Debug)]
struct Member {
    group: Arc<Inner>,
    rank: Rank,
}

fn gone(rank: Rank) -> Error {
    Error::new(ErrorKind::PeerLost, "sending a message", "there is no connection to it").rank(rank)
}

#[async_trait]
impl Control for Member {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn role(&self) -> Role {
        if self.rank == Rank::LEADER { Role::Trainer } else { Role::Rollout }
    }

    fn send(&self, to: Rank, body: Bytes) -> Result<()> {
        let is_there = |inbox: &Inbox| inbox.ended.is_none();
        if !self.group.lock().get(&to).is_some_and(is_there) {
            return Err(gone(to));
        }
        self.group.tell(to, Event::Message { from: self.rank, body });
        Ok(())
    }

    async fn recv(&self, deadline: Duration) -> Result<Option<Event>> {
        let look = || {
            let mut inboxes = self.group.lock();
            let inbox = inboxes.get_mut(&self.rank)?;
            match inbox.events.pop_front() {
                Some(event) => Some(Ok(event)),
                None => inbox.ended.clone().map(|error| Err(error.into())),
            }
        };
        if deadline.is_zero() {
            return look().transpose();
        }
        if let Some(Inbox { events, later, .. }) = self.group.lock().get_mut(&self.rank) {
            events.append(later);
        }
        let waiting = async {
            loop {
                let changed = self.group.changed.notified();
                if let Some(found) = look() {
                    return found;
                }
                changed.await;
            }
        };
        clock::within(deadline, waiting).await.transpose()
    }

    fn cut(&self, rank: Rank, reason: &Error) -> Result<()> {
        let error = Error::new(ErrorKind::PeerLost, "being in the group", "the leader was lost");
        let error = ErrorReport::from(&error.rank(Rank::LEADER));
        match self.group.lock().get_mut(&rank) {
            Some(inbox) if inbox.ended.is_none() => inbox.ended = Some(error.clone()),
            _ => return Err(gone(rank)),
        }
        self.group.tell(rank, Event::Lost { rank: Rank::LEADER, error });
        let mut error = ErrorReport::from(reason);
        error.rank.get_or_insert(rank);
        if let Some(inbox) = self.group.lock().get_mut(&self.rank) {
            // A connection takes a moment to end.
            inbox.later.push_back(Event::Lost { rank, error });
        }
        Ok(())
    }

    fn silence(&self, rank: Rank) -> Option<Duration> {
        let is_there = |inbox: &Inbox| inbox.ended.is_none();
        self.group.lock().get(&rank).is_some_and(is_there).then_some(Duration::ZERO)
    }

    fn next_update(&self) -> u64 {
        self.group.updates.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn updates(&self) -> u64 {
        0 // It has one group, formed before all updates.
    }
}

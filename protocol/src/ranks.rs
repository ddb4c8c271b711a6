//! A [`Hub`] for tests: ranks may join an existing group, and a connection that is cut takes a moment to end.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::hub::{Hub, Member};
use engine_core::control::{Control, Event, Peer, Role};
use engine_core::{Error, Rank, Result};

/// A leader and members, all of them rollouts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Group(Hub);

impl Group {
    /// The leader's connection.
    pub(crate) fn lead(&self) -> Arc<dyn Control> {
        Arc::new(Slow { leader: self.0.control(), cut: Mutex::default(), later: Mutex::default() })
    }

    /// The connection of a member that joins the existing group. The leader hears of it.
    pub(crate) fn join(&self, rank: Rank) -> Arc<dyn Control> {
        let member = self.enter(rank);
        self.0.announce(Peer { rank, role: Role::Rollout, payload: Bytes::new() });
        member
    }

    /// The connection of a member that is there from the beginning.
    pub(crate) fn enter(&self, rank: Rank) -> Arc<dyn Control> {
        let member = Member::new(rank, Role::Rollout);
        self.0.admit(&member).expect("a place for it");
        member.control()
    }
}

/// The leader's connection. The loss of a rank that it cuts comes late: `recv` with a deadline of zero does not
/// return it.
#[derive(Debug)]
struct Slow {
    leader: Arc<dyn Control>,
    cut: Mutex<BTreeSet<Rank>>,
    later: Mutex<VecDeque<Event>>,
}

#[async_trait]
impl Control for Slow {
    fn rank(&self) -> Rank {
        self.leader.rank()
    }

    fn role(&self) -> Role {
        self.leader.role()
    }

    fn send(&self, to: Rank, body: Bytes) -> Result<()> {
        self.leader.send(to, body)
    }

    async fn recv(&self, deadline: Duration) -> Result<Option<Event>> {
        while let Some(event) = self.leader.recv(Duration::ZERO).await? {
            match event {
                Event::Lost { rank, .. } if self.cut.lock().expect("no panic").remove(&rank) => {
                    self.later.lock().expect("no panic").push_back(event);
                }
                event => return Ok(Some(event)),
            }
        }
        if deadline.is_zero() {
            return Ok(None);
        }
        let later = self.later.lock().expect("no panic").pop_front();
        match later {
            Some(event) => Ok(Some(event)),
            None => self.leader.recv(deadline).await,
        }
    }

    fn cut(&self, rank: Rank, reason: &Error) -> Result<()> {
        self.cut.lock().expect("no panic").insert(rank);
        self.leader.cut(rank, reason)
    }

    fn silence(&self, rank: Rank) -> Option<Duration> {
        self.leader.silence(rank)
    }

    fn next_update(&self) -> u64 {
        self.leader.next_update()
    }

    fn updates(&self) -> u64 {
        self.leader.updates()
    }
}

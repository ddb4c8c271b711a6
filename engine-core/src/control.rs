//! What an engine needs of its connection to the other ranks. The connections themselves are elsewhere: an engine takes
//! any [`Control`].

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorReport, Rank, RankSet, Result};

/// The version of what ranks say to one another: of the connection's frames, and of the messages of updates. Peers of
/// different versions refuse each other.
pub const PROTOCOL_VERSION: u32 = 14;

/// What a process of the group does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It has the weights.
    Trainer,
    /// It generates with them.
    Rollout,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trainer => "trainer",
            Self::Rollout => "rollout",
        })
    }
}

/// A rank of the group and the metadata that it contributed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its rank.
    pub rank: Rank,
    /// What it does.
    pub role: Role,
    /// What it gave when the group was formed, or when it joined.
    pub payload: Bytes,
}

/// What [`Control::recv`] yields.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A message, in the order in which its sender sent it.
    Message {
        /// Who sent it.
        from: Rank,
        /// What was given to [`Control::send`].
        body: Bytes,
    },
    /// A rank joined a group that exists. On the leader only.
    Joined(Peer),
    /// A rank of the group ended its connection in order. Members learn it of the leader only.
    Left {
        /// Which one.
        rank: Rank,
    },
    /// A rank of the group died, fell silent or broke the protocol. The error is `PeerLost`, or what was
    /// wrong with what it sent. Members learn it of the leader
    /// only.
    Lost {
        /// Which one.
        rank: Rank,
        /// How that was noticed.
        error: ErrorReport,
    },
}

/// What [`Control::recv_all`] yields.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// What happened, or a message of one rank.
    One(Event),
    /// The same message of several ranks.
    Alike {
        /// Who sent it, each of them once.
        from: RankSet,
        /// What each of them gave to [`Control::send`].
        body: Bytes,
    },
}

/// An engine's connection to the leader, or the leader's to all other ranks: messages of updates, and the news of who is
/// alive.
///
/// # Contract
///
/// Messages from one rank arrive in the order in which it sent them, exactly once, until it is lost. A rank has one
/// consumer of [`recv`](Self::recv).
#[async_trait]
pub trait Control: fmt::Debug + Send + Sync {
    /// This process's rank.
    fn rank(&self) -> Rank;

    /// This process's role; the leader is a trainer.
    fn role(&self) -> Role;

    /// Queues a message; never blocks. Members may send to rank 0 only.
    ///
    /// # Errors
    ///
    /// `PeerLost` when the rank is gone, `Config` when the body is larger than its receiver accepts, `State` for a rank
    /// that this one has no connection to, or when the connection was closed here. A message that was queued may still
    /// be lost with its receiver.
    fn send(&self, to: Rank, body: Bytes) -> Result<()>;

    /// Queues the same message for several ranks, in less than [`send`](Self::send) takes for each. On the leader only.
    ///
    /// The ranks that it could not be queued for, with the errors of [`send`](Self::send).
    fn send_all(&self, to: &RankSet, body: Bytes) -> Vec<(Rank, Error)> {
        let sent = to.iter().map(|rank| (rank, self.send(rank, body.clone())));
        sent.filter_map(|(rank, sent)| Some((rank, sent.err()?))).collect()
    }

    /// As [`send`](Self::send), for a message that the leader needs from all ranks before it goes on. On its way it may
    /// wait a moment for the equal messages of other ranks.
    ///
    /// # Errors
    ///
    /// As with [`send`](Self::send).
    fn send_with_others(&self, to: Rank, body: Bytes) -> Result<()> {
        self.send(to, body)
    }

    /// The next event; `None` when there is none within the deadline.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no event.
    ///
    /// # Errors
    ///
    /// After all events: `PeerLost` or `TrainerLeft` on a member whose leader is gone, `State` when the connection was closed here.
    async fn recv(&self, deadline: Duration) -> Result<Option<Event>>;

    /// As [`recv`](Self::recv), with the messages together that several ranks have sent alike, where that is known: in less
    /// than [`recv`](Self::recv) takes for each.
    ///
    /// # Cancel safety
    ///
    /// As with [`recv`](Self::recv).
    ///
    /// # Errors
    ///
    /// As with [`recv`](Self::recv).
    async fn recv_all(&self, deadline: Duration) -> Result<Option<Said>> {
        Ok(self.recv(deadline).await?.map(Said::One))
    }

    /// On the leader: ends the connection to a rank that does not keep to the protocol. The rank is
    /// [lost](Event::Lost) for this reason, and may join again.
    ///
    /// # Errors
    ///
    /// `PeerLost` when the rank is gone, `State` on a member.
    fn cut(&self, rank: Rank, reason: &Error) -> Result<()>;

    /// On the leader: how long nothing was heard of a rank although its heartbeats were due, two of them or more; zero
    /// while they come. `None` for a rank that there is no connection to, and on a member.
    fn silence(&self, rank: Rank) -> Option<Duration>;

    /// The number of the next update that the leader begins. No number is given twice, whatever engines and groups come
    /// and go on this connection: messages about an old update can never be taken for messages about a new one.
    fn next_update(&self) -> u64;

    /// How many updates had begun on the leader when this rank's group was formed: what still comes of those belongs to
    /// another group.
    fn updates(&self) -> u64;

    /// The leader's host and port as ranks reach it over a network; `None` within a host.
    fn leader_address(&self) -> Option<String> {
        None
    }
}

//! Channels: separate messages for different parts of a program, on one connection.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use engine_core::control::{Control, Said};
use engine_core::{Error, Rank, RankSet, Result};
use serde::{Deserialize, Serialize};

use crate::{ControlPlane, Event, Role};

/// The number of a channel, the same on both sides. Numbers below [`ChannelId::FIRST_FREE`] belong to this library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChannelId(pub u16);

/// The channel for the engines' messages of updates.
pub const UPDATES: ChannelId = ChannelId(0);

impl ChannelId {
    /// The first number that embedding programs may use.
    pub const FIRST_FREE: Self = Self(16);
}

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            UPDATES => f.write_str("the channel of updates"),
            Self(number) => write!(f, "channel {number}"),
        }
    }
}

/// One of the channels of a [control plane](ControlPlane): messages, and events about which ranks are alive.
///
/// It is a handle that keeps the connection open. Clones of it, and further handles with the same number, are the same
/// channel.
///
/// # Contract
///
/// Messages from one rank arrive on the channel on which it sent them, in their order, exactly once, until the rank is
/// lost. There is no order between channels. A channel has one consumer of [`recv`](Self::recv).
///
/// A message for a channel that is not open yet waits until it is opened. An [`Event::Joined`], [`Event::Left`] or
/// [`Event::Lost`] reaches every channel that is open when it happens. [`UPDATES`] is always open.
///
/// On channels other than [`UPDATES`], the unread bytes of a sender are bounded: by the `max_frame_bytes` of the other
/// side on each channel, and by twice that on all of them together. At the bound only [`send`](Self::send) fails: a
/// channel that nobody reads does not disturb updates.
#[derive(Clone, Debug)]
pub struct Channel {
    plane: ControlPlane,
    id: ChannelId,
}

impl Channel {
    pub(crate) fn new(plane: ControlPlane, id: ChannelId) -> Self {
        Self { plane, id }
    }

    /// The number of the channel.
    pub fn id(&self) -> ChannelId {
        self.id
    }

    /// Queues a message; never blocks. Members may send to rank 0 only.
    ///
    /// A queued message may still be lost with its receiver.
    ///
    /// # Errors
    ///
    /// `PeerLost` when there is no connection to the rank, or on a member when the leader is lost; `TrainerLeft` when
    /// the leader has left. `State` for a message to this rank itself or from member to member, or when the control
    /// plane is closed. `Config` when the body exceeds the receiver's `max_frame_bytes` or, on channels other than
    /// [`UPDATES`], this side's.
    ///
    /// On channels other than [`UPDATES`], `Resource` when too much waits to be sent or to be read. It names the
    /// channel. Nothing was queued, and the same message can be sent later. On [`UPDATES`], `Resource` when twice
    /// `max_frame_bytes` wait for a rank that does not read: its connection ends.
    pub fn send(&self, to: Rank, body: Bytes) -> Result<()> {
        self.plane.send(self.id, to, body, false)
    }

    /// The next event; `None` when there is none within the deadline.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no event.
    ///
    /// # Errors
    ///
    /// After all events: `PeerLost` or `TrainerLeft` on a member whose leader is gone, `State` when the control plane
    /// is closed.
    pub async fn recv(&self, deadline: Duration) -> Result<Option<Event>> {
        self.plane.recv(self.id, deadline).await
    }
}

#[async_trait]
impl Control for Channel {
    fn rank(&self) -> Rank {
        self.plane.rank()
    }

    fn role(&self) -> Role {
        self.plane.role()
    }

    fn send(&self, to: Rank, body: Bytes) -> Result<()> {
        Self::send(self, to, body)
    }

    fn send_with_others(&self, to: Rank, body: Bytes) -> Result<()> {
        self.plane.send(self.id, to, body, true)
    }

    async fn recv(&self, deadline: Duration) -> Result<Option<Event>> {
        Self::recv(self, deadline).await
    }

    async fn recv_all(&self, deadline: Duration) -> Result<Option<Said>> {
        self.plane.recv_all(self.id, deadline).await
    }

    fn send_all(&self, to: &RankSet, body: Bytes) -> Vec<(Rank, Error)> {
        self.plane.send_all(self.id, to, &body)
    }

    fn cut(&self, rank: Rank, reason: &Error) -> Result<()> {
        self.plane.cut(rank, reason)
    }

    fn silence(&self, rank: Rank) -> Option<Duration> {
        self.plane.silence(rank)
    }

    fn next_update(&self) -> u64 {
        self.plane.next_update()
    }

    fn updates(&self) -> u64 {
        self.plane.updates()
    }

    fn leader_address(&self) -> Option<String> {
        self.plane.address().as_tcp().map(str::to_owned)
    }
}

/// The channel of updates, for an engine.
impl From<ControlPlane> for Arc<dyn Control> {
    fn from(plane: ControlPlane) -> Self {
        Arc::new(plane.channel(UPDATES))
    }
}

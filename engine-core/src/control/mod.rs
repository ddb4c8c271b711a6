//! The control plane: metadata, barriers, messages and the news of who is alive.
//!
//! Every rank has one reliable connection to rank 0, the leader. Frames on it are
//! length-delimited, versioned in the first one, bounded in size, and encrypted with keys that only
//! those who know a shared [`Token`] can agree on (Noise `NNpsk0`). A peer that dies closes its connection and is lost at once; one
//! that is stopped or cut off is lost after [`ControlConfig::heartbeat_timeout`].
//!
//! All sockets live on one thread of the control plane's own, so heartbeats go on while the
//! embedder's executor is blocked, and any executor will do.
//!
//! # Examples
//!
//! ```
//! use std::time::Duration;
//!
//! use bytes::Bytes;
//! use engine_core::control::{ControlConfig, ControlPlane, Event, Role, Token};
//! use engine_core::Rank;
//!
//! # futures::executor::block_on(async {
//! let deadline = Duration::from_secs(10);
//! let token = Token::generate()?;
//! let config = ControlConfig::new("127.0.0.1:0".parse()?, token.clone());
//! let trainer = ControlPlane::lead(config).await?;
//! let config = ControlConfig::new(trainer.address().clone(), token);
//! let rollout = ControlPlane::join(config, Role::Rollout, None).await?;
//!
//! let (table, same_table) = futures::future::try_join(
//!     trainer.gather(2, Bytes::from_static(b"trainer's metadata"), deadline),
//!     rollout.gather(2, Bytes::from_static(b"rollout's metadata"), deadline),
//! )
//! .await?;
//! assert_eq!(table, same_table);
//!
//! trainer.send(Rank(1), Bytes::from_static(b"bucket 0 is full"))?;
//! let event = rollout.recv(deadline).await?;
//! assert!(matches!(event, Some(Event::Message { from: Rank(0), .. })));
//! rollout.close().await?;
//! trainer.close().await?;
//! # Ok::<(), engine_core::Error>(())
//! # }).unwrap();
//! ```

mod address;
mod env;
mod group;
mod handshake;
mod link;
mod plane;
mod seal;
mod shared;
mod token;
mod wire;

pub use address::{Address, UnixAddress};
pub use env::{TorchrunEnv, from_env, from_lookup};
pub use plane::ControlPlane;
pub use token::Token;
#[cfg(test)]
pub(crate) use wire::PROTOCOL_VERSION;

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, ErrorReport, Rank, Result};

/// What a process of the group does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It has the weights.
    Trainer,
    /// It generates with them.
    Rollout,
}

/// How to reach the group, and what counts as dead.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ControlConfig {
    /// Where the leader listens.
    pub address: Address,
    /// The secret of the group.
    pub token: Token,
    /// How often a rank that has nothing to say shows that it lives; less often than a third of
    /// the timeout of the rank it speaks to is never done. 1 s.
    pub heartbeat_interval: Duration,
    /// The silence after which a peer is lost, and the time that a close may take. 10 s.
    pub heartbeat_timeout: Duration,
    /// How long a member tries to reach the leader, which may start later. 60 s.
    pub connect_timeout: Duration,
    /// The longest frame that this rank accepts, in bytes: a message, or the metadata of all
    /// ranks together. At least 4096; 64 MiB. A leader ends the connection of a member of which it has
    /// twice this in messages that nobody has read, and every rank ends the connection to a peer for which
    /// twice this waits because it does not read.
    pub max_frame_bytes: usize,
    /// The largest group that the leader forms, in ranks: what a member says of the size is not believed
    /// beyond this. 65 536.
    pub max_world_size: u32,
}

impl ControlConfig {
    /// A configuration with the defaults that the fields name.
    pub fn new(address: Address, token: Token) -> Self {
        Self {
            address,
            token,
            heartbeat_interval: Duration::from_secs(1),
            heartbeat_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(60),
            max_frame_bytes: 64 << 20,
            max_world_size: 65_536,
        }
    }

    fn validate(&self) -> Result<()> {
        let refuse =
            |why: String| Err(Error::new(ErrorKind::Config, "starting the control plane", why));
        if self.heartbeat_interval.is_zero() || self.heartbeat_interval >= self.heartbeat_timeout {
            return refuse(format!(
                "heartbeat_interval {:?} must be above zero and below heartbeat_timeout {:?}",
                self.heartbeat_interval, self.heartbeat_timeout
            ));
        }
        let floor = link::FRAME_FLOOR as usize;
        if !(floor..=u32::MAX as usize).contains(&self.max_frame_bytes) {
            return refuse(format!(
                "max_frame_bytes {} must be between {} and {}",
                self.max_frame_bytes,
                floor,
                u32::MAX
            ));
        }
        Ok(())
    }
}

/// A rank of the group and the metadata that it contributed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its rank.
    pub rank: Rank,
    /// What it does.
    pub role: Role,
    /// What it gave to [`ControlPlane::gather`].
    pub payload: Bytes,
}

/// What [`ControlPlane::recv`] yields.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A message, in the order in which its sender sent it.
    Message {
        /// Who sent it.
        from: Rank,
        /// What was given to [`ControlPlane::send`].
        body: Bytes,
    },
    /// A rank joined a group that exists. On the leader only.
    Joined(Peer),
    /// A rank of the group closed its control plane. Members learn it of the leader only.
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

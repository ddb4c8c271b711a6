//! The control plane of a checkpoint engine: metadata, barriers, messages, and which ranks are alive.
//!
//! Every rank has one reliable connection to rank 0, the leader. Frames on it are length-delimited and bounded in
//! size. The first one states the protocol version. The connection is encrypted with keys that only peers who know the
//! shared [`Token`] can agree on (Noise `NNpsk0`). A peer that dies closes its connection and is lost at once. A peer
//! that is stopped or cut off is lost after [`ControlConfig::heartbeat_timeout`].
//!
//! Messages of engines and messages of the embedding program travel on separate [channels](Channel) of that one
//! connection.
//!
//! All sockets live on a thread of the control plane, so heartbeats go on while the embedder's executor is blocked.
//! Any executor will do.
//!
//! # Examples
//!
//! ```
//! use std::time::Duration;
//!
//! use bytes::Bytes;
//! use control_plane::{ChannelId, ControlConfig, ControlPlane, Event, Role, Token};
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
//! // A channel for messages of the program's own.
//! let [of_trainer, of_rollout] = [&trainer, &rollout].map(|plane| plane.channel(ChannelId::FIRST_FREE));
//! of_trainer.send(Rank(1), Bytes::from_static(b"the reward model is there"))?;
//! let event = of_rollout.recv(deadline).await?;
//! assert!(matches!(event, Some(Event::Message { from: Rank(0), .. })));
//! rollout.close().await?;
//! trainer.close().await?;
//! # Ok::<(), engine_core::Error>(())
//! # }).unwrap();
//! ```

mod address;
mod channel;
mod env;
mod ffi;
mod fork;
mod form;
#[cfg(fuzzing)]
pub mod fuzzing;
mod group;
mod handshake;
mod link;
mod plane;
mod relay;
mod seal;
mod shared;
mod token;
mod wire;

pub use address::{Address, UnixAddress};
pub use channel::{Channel, ChannelId, UPDATES};
pub use engine_core::control::{Control, Event, Peer, Role};
pub use env::{TorchrunEnv, from_env, from_lookup};
pub use form::{FormGroup, form_group, join_group};
pub use plane::ControlPlane;
pub use relay::Relay;
pub use token::Token;
pub use wire::TrafficCounts;

use std::time::Duration;

use engine_core::{Error, ErrorKind, Result};

/// How to reach the group, and the limits that it keeps.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ControlConfig {
    /// Where the leader listens.
    pub address: Address,
    /// The secret of the group.
    pub token: Token,
    /// How often a rank that has nothing else to say sends a heartbeat. Longer than a third of the peer's
    /// `heartbeat_timeout` counts as that third. Default: 1 s.
    pub heartbeat_interval: Duration,
    /// The silence after which a peer is lost, and the time that a close may take. Default: 10 s.
    pub heartbeat_timeout: Duration,
    /// How long a member tries to reach the leader, which may start later. Default: 60 s.
    pub connect_timeout: Duration,
    /// The longest frame that this rank accepts, in bytes: a message, or the metadata of all
    /// ranks together. At least 4096. Default: 64 MiB.
    ///
    /// Twice this is the bound of what waits. A leader ends the connection to a member whose unread messages of updates
    /// exceed it. Every rank ends the connection to a peer that does not read, once what waits for it exceeds the bound.
    /// The unread messages of a peer on all other channels together stay below it: see [`Channel`].
    pub max_frame_bytes: usize,
    /// The largest group that the leader forms, in ranks. A larger size from a member is refused, and so is a rank
    /// beyond this number. Default: 65 536.
    pub max_world_size: u32,
}

impl ControlConfig {
    /// A configuration with the defaults of the fields.
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

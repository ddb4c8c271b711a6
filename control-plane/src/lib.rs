//! The control plane of a checkpoint engine: metadata, barriers, messages and the news of who is alive.
//!
//! Every rank has one reliable connection to rank 0, the leader. Frames on it are
//! length-delimited, versioned in the first one, bounded in size, and encrypted with keys that only
//! those who know a shared [`Token`] can agree on (Noise `NNpsk0`). A peer that dies closes its connection and is lost at once; one
//! that is stopped or cut off is lost after [`ControlConfig::heartbeat_timeout`].
//!
//! What engines say of updates and what the embedding program says travels on [channels](Channel) of that one
//! connection, which do not meet.
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
    /// twice this in messages of updates that nobody has read, and every rank ends the connection to a peer for which
    /// twice this waits because it does not read. Of all other channels of a peer together twice this can be
    /// unread: see [`Channel`].
    pub max_frame_bytes: usize,
    /// The largest group that the leader forms, in ranks: what a member says of the size is not believed
    /// beyond this, and no rank that would be one more is let in. 65 536.
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

//! The control plane: one authenticated connection from every rank to rank 0.
//!
//! Rendezvous, metadata, barriers, acknowledgements, aborts and heartbeats travel over it; weights
//! never do. It is reliable and ordered (TCP, or a Unix socket on one host): a message that can get
//! lost desynchronises buckets.
//!
//! All sockets live on one thread of their own, so that heartbeats go on while the embedding
//! program's executor is busy training. A peer whose process died is noticed at once, one that hangs
//! (or whose network does) after the heartbeat timeout.

mod address;
mod auth;
mod connection;
mod frame;
mod leader;
mod member;
mod torchrun;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

pub use address::Address;
pub use auth::Token;
pub use torchrun::TorchrunEnv;

use crate::{Error, ErrorKind, ErrorReport, Rank, Result};
use frame::Frame;

/// What a rank does in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Has the weights and sends them.
    Trainer,
    /// Generates with the weights and receives them.
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

/// Where the leader listens, and how the connections behave.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Where rank 0 listens and the others connect.
    pub address: Address,
    /// The secret that all ranks share.
    pub token: Token,
    /// How often a sign of life is sent. 1 s.
    pub heartbeat_interval: Duration,
    /// How long a peer may be silent before it counts as lost. 10 s.
    pub heartbeat_timeout: Duration,
    /// How long to try to reach the leader, which may start later. 60 s.
    pub connect_timeout: Duration,
    /// The longest message, in bytes. 64 MiB.
    pub max_frame_bytes: usize,
}

impl ControlConfig {
    /// A configuration with the default times and limits.
    pub fn new(address: Address, token: Token) -> Self {
        Self {
            address,
            token,
            heartbeat_interval: Duration::from_secs(1),
            heartbeat_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(60),
            max_frame_bytes: 64 << 20,
        }
    }
}

/// A rank of the group and what it contributed to [`ControlPlane::gather`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its rank.
    pub rank: Rank,
    /// Its role.
    pub role: Role,
    /// What it contributed.
    pub payload: Bytes,
}

/// Something that happened in the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message of another rank.
    Message {
        /// Who sent it.
        from: Rank,
        /// What it says.
        body: Bytes,
    },
    /// A rank joined after the group had formed. Only the leader is told.
    Joined(Peer),
    /// A rank left in order.
    Left {
        /// Who left.
        rank: Rank,
    },
    /// A rank died, or cannot be reached any more.
    Lost {
        /// Who was lost.
        rank: Rank,
        /// How it showed.
        error: ErrorReport,
    },
}

/// A rank's connection to its group. Cloning shares it.
#[derive(Clone)]
pub struct ControlPlane(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    events: tokio::sync::Mutex<mpsc::UnboundedReceiver<Event>>,
    rank: Rank,
    role: Role,
    address: Address,
    /// Closed by the thread when it ends.
    done: tokio::sync::Mutex<Option<oneshot::Receiver<()>>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.shutdown.send_replace(true);
    }
}

/// What the handle and the thread share.
struct Shared {
    config: ControlConfig,
    state: Mutex<State>,
    /// Counts changes of the state, for those who wait for one.
    changed: watch::Sender<u64>,
    shutdown: watch::Sender<bool>,
    events: mpsc::UnboundedSender<Event>,
}

#[derive(Default)]
struct State {
    /// Every live connection, by the rank at its other end.
    links: BTreeMap<Rank, Link>,
    /// What each live rank contributed to the gather.
    gathered: BTreeMap<Rank, Peer>,
    /// The number of ranks of the group: the leader's word.
    world_size: Option<u32>,
    /// Whether that many have gathered.
    formed: bool,
    /// Who has arrived at which barrier.
    barriers: BTreeMap<String, BTreeSet<Rank>>,
    /// Members: barriers that the leader declared complete.
    passed: BTreeSet<String>,
    /// Members: why the leader refused the gather.
    refused: Option<ErrorReport>,
    /// Ranks that were lost, and their roles: late joiners take their places.
    lost: BTreeMap<Rank, Role>,
}

struct Link {
    /// Tells connections of the same rank apart, when one follows another.
    id: u64,
    role: Role,
    outbound: mpsc::UnboundedSender<Frame>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is consistent between statements: a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn emit(&self, event: Event) {
        if self.events.send(event).is_err() {
            tracing::debug!("nobody listens to the control plane any more");
        }
    }
}

impl ControlPlane {
    /// Listens for the other ranks, as rank 0.
    ///
    /// # Errors
    ///
    /// `Io` if the address is taken or cannot be used.
    pub async fn lead(config: ControlConfig) -> Result<Self> {
        Self::start(config, Role::Trainer, leader::run).await
    }

    /// Connects to the leader, waiting for it to start, and takes the rank asked for, or the next
    /// free one.
    ///
    /// # Errors
    ///
    /// `Timeout` if the leader cannot be reached within the connect timeout; `Authentication` if it
    /// has another token; `Protocol` if it speaks another version; `Mismatch` if the rank is taken.
    pub async fn join(config: ControlConfig, role: Role, rank: Option<Rank>) -> Result<Self> {
        Self::start(config, role, move |shared, ready| member::run(shared, role, rank, ready)).await
    }

    async fn start<F, R>(config: ControlConfig, role: Role, run: R) -> Result<Self>
    where
        R: FnOnce(Arc<Shared>, Ready) -> F + Send + 'static,
        F: Future<Output = ()>,
    {
        let (events_in, events) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            config,
            state: Mutex::new(State::default()),
            changed: watch::Sender::new(0),
            shutdown: watch::Sender::new(false),
            events: events_in,
        });
        let (ready_in, ready) = oneshot::channel();
        let (done_in, done) = oneshot::channel();
        let for_thread = shared.clone();
        let failed = |error| Error::io("starting the control plane's thread", error);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        std::thread::Builder::new()
            .name("ckpt-control".into())
            .spawn(move || {
                runtime.block_on(run(for_thread, ready_in));
                drop(runtime);
                drop(done_in);
            })
            .map_err(failed)?;
        // Whoever drops this future ends the thread.
        let cancel = CancelOnDrop(Some(shared));
        let (rank, address) = ready.await.map_err(|_| closed())??;
        let shared = cancel.keep()?;
        Ok(Self(Arc::new(Handle {
            shared,
            events: tokio::sync::Mutex::new(events),
            rank,
            role,
            address,
            done: tokio::sync::Mutex::new(Some(done)),
        })))
    }

    /// Where the leader listens; a port of 0 is resolved.
    pub fn address(&self) -> Address {
        self.0.address.clone()
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.0.rank
    }

    /// This rank's role.
    pub fn role(&self) -> Role {
        self.0.role
    }

    /// Forms the group: every rank contributes a payload, and gets those of all, by rank.
    ///
    /// Ends when `world_size` ranks, the leader included, have contributed. A rank that joins later
    /// gets the present table at once, and the leader sees [`Event::Joined`].
    ///
    /// # Errors
    ///
    /// `Timeout`, saying who is there; `Mismatch` if the leader expects another `world_size`;
    /// `PeerLost` if the leader is gone.
    pub async fn gather(
        &self,
        world_size: u32,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<Vec<Peer>> {
        let shared = &self.0.shared;
        let own = Peer { rank: self.0.rank, role: self.0.role, payload: payload.clone() };
        if self.0.rank == Rank::LEADER {
            shared.state().world_size = Some(world_size);
            leader::contribute(shared, own, world_size);
        } else {
            self.send_frame(Rank::LEADER, Frame::Gather { world_size, payload })?;
        }
        let formed = |state: &State| {
            if let Some(report) = &state.refused {
                return Some(Err(Error::from(report.clone())));
            }
            state.formed.then(|| Ok(state.gathered.values().cloned().collect()))
        };
        self.wait(deadline, "forming the group", formed, |state| {
            let there: Vec<String> = state.gathered.keys().map(ToString::to_string).collect();
            let connected = state.links.len() + 1;
            let message = if self.0.rank == Rank::LEADER {
                format!(
                    "after {:.1} s {} of {world_size} ranks are there (ready: {}; connected: \
                     {connected})",
                    deadline.as_secs_f64(),
                    there.len(),
                    there.join(", "),
                )
            } else {
                format!("the group is not complete after {:.1} s", deadline.as_secs_f64())
            };
            Error::new(ErrorKind::Timeout, "forming the group", message)
        })
        .await
    }

    /// Waits until every live rank of the group has called it with the same name.
    ///
    /// # Errors
    ///
    /// `Timeout`, on the leader naming the ranks that are missing; `PeerLost` if the leader is gone.
    pub async fn barrier(&self, name: &str, deadline: Duration) -> Result<()> {
        let shared = &self.0.shared;
        let operation = format!("waiting at the barrier `{name}`");
        if self.0.rank == Rank::LEADER {
            leader::arrive(shared, Rank::LEADER, name.to_owned());
        } else {
            self.send_frame(Rank::LEADER, Frame::Barrier { name: name.to_owned() })?;
        }
        let passed = |state: &State| state.passed.contains(name).then_some(Ok(()));
        let result = self
            .wait(deadline, &operation, passed, |state| {
                let missing: Vec<Rank> = if self.0.rank == Rank::LEADER {
                    leader::missing(state, name)
                } else {
                    vec![Rank::LEADER]
                };
                let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
                let message = format!(
                    "after {:.1} s still waiting for rank {}",
                    deadline.as_secs_f64(),
                    names.join(", ")
                );
                let error = Error::new(ErrorKind::Timeout, operation.clone(), message);
                missing.first().map_or_else(
                    || Error::new(ErrorKind::Timeout, operation.clone(), "too late"),
                    |rank| error.rank(*rank),
                )
            })
            .await;
        let mut state = shared.state();
        state.passed.remove(name);
        if result.is_err() {
            state.barriers.remove(name);
        }
        result
    }

    /// Waits for a condition of the state, for the loss of the leader, or for the deadline.
    async fn wait<T>(
        &self,
        deadline: Duration,
        operation: &str,
        mut condition: impl FnMut(&State) -> Option<Result<T>>,
        timeout: impl FnOnce(&State) -> Error,
    ) -> Result<T> {
        let shared = &self.0.shared;
        let mut changes = shared.changed.subscribe();
        let waiting = async {
            loop {
                {
                    let state = shared.state();
                    if let Some(result) = condition(&state) {
                        return result;
                    }
                    if self.0.rank != Rank::LEADER && !state.links.contains_key(&Rank::LEADER) {
                        return Err(Error::new(
                            ErrorKind::PeerLost,
                            operation,
                            "the connection to the leader is gone",
                        )
                        .rank(Rank::LEADER));
                    }
                }
                changes.changed().await.map_err(|_| closed())?;
            }
        };
        match tokio::time::timeout(deadline, waiting).await {
            Ok(result) => result,
            Err(_) => Err(timeout(&shared.state())),
        }
    }

    /// The ranks that have gathered and are alive.
    pub fn peers(&self) -> Vec<Peer> {
        self.0.shared.state().gathered.values().cloned().collect()
    }

    /// Sends a message. Never blocks: what a message says bounds how many are under way.
    ///
    /// # Errors
    ///
    /// `PeerLost` if the rank is not connected. A member is connected to rank 0 alone. `Protocol` if
    /// the message is longer than a frame may be.
    pub fn send(&self, to: Rank, body: Bytes) -> Result<()> {
        let limit = self.0.shared.config.max_frame_bytes;
        if body.len() >= limit {
            let message = format!("{} bytes exceed the limit of {limit}", body.len());
            return Err(Error::new(ErrorKind::Protocol, "sending a message", message).rank(to));
        }
        self.send_frame(to, Frame::Message { body })
    }

    fn send_frame(&self, to: Rank, frame: Frame) -> Result<()> {
        let state = self.0.shared.state();
        let sent = state.links.get(&to).is_some_and(|link| link.outbound.send(frame).is_ok());
        if sent {
            return Ok(());
        }
        Err(Error::new(ErrorKind::PeerLost, "sending a message", "the rank is not connected")
            .rank(to))
    }

    /// The next event. It has no deadline; callers know how long they can wait.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing. Events go to one caller at a time.
    ///
    /// # Errors
    ///
    /// `State` after [`close`](Self::close).
    pub async fn recv(&self) -> Result<Event> {
        let mut shutdown = self.0.shared.shutdown.subscribe();
        let mut events = self.0.events.lock().await;
        tokio::select! {
            biased;
            event = events.recv() => event.ok_or_else(closed),
            _ = shutdown.wait_for(|closing| *closing) => Err(closed()),
        }
    }

    /// The next event if there is one already.
    ///
    /// # Errors
    ///
    /// As [`recv`](Self::recv).
    pub fn try_recv(&self) -> Result<Option<Event>> {
        let Ok(mut events) = self.0.events.try_lock() else { return Ok(None) };
        match events.try_recv() {
            Ok(event) => Ok(Some(event)),
            Err(mpsc::error::TryRecvError::Empty) => Ok(None),
            Err(mpsc::error::TryRecvError::Disconnected) => Err(closed()),
        }
    }

    /// Says goodbye to the group and closes all connections.
    ///
    /// Dropping the last handle does the same without waiting for it.
    ///
    /// # Errors
    ///
    /// `Timeout` if the connections do not close within five seconds.
    pub async fn close(&self) -> Result<()> {
        self.0.shared.shutdown.send_replace(true);
        let Some(done) = self.0.done.lock().await.take() else { return Ok(()) };
        // The thread drops its end when it is done, which is what is waited for.
        match tokio::time::timeout(Duration::from_secs(5), done).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                "closing the control plane",
                "its connections did not close within 5 s",
            )),
        }
    }
}

impl fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlPlane")
            .field("rank", &self.0.rank)
            .field("role", &self.0.role)
            .field("address", &self.0.address)
            .finish_non_exhaustive()
    }
}

/// How the thread reports its start: its rank and the address, or why not.
type Ready = oneshot::Sender<Result<(Rank, Address)>>;

struct CancelOnDrop(Option<Arc<Shared>>);

impl CancelOnDrop {
    fn keep(mut self) -> Result<Arc<Shared>> {
        self.0.take().ok_or_else(closed)
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.shutdown.send_replace(true);
        }
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::State, "using the control plane", "it is closed")
}

//! The public handle of the control plane.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::address::Listener;
use crate::group::{Group, Link, Mailbox, Told};
use crate::link::{follow, join, knock, serve};
use crate::shared::{Shared, Side};
use crate::wire::{Call, Frame, Outcome, Signal};
use crate::{Address, Channel, ChannelId, ControlConfig, Event, Peer, Role, TrafficCounts};
use engine_core::control::Said;
use engine_core::{Error, ErrorKind, ErrorReport, Rank, RankSet, Result};

/// How long a rank that has given up a wait listens for the leader's list of the missing ranks.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// This process's membership in the group.
///
/// Cloning it is cheap, and all clones are the same membership. It needs no particular executor. When
/// the last clone is dropped, it says goodbye but does not wait. [`close`](Self::close) waits.
///
/// # Contract
///
/// Messages travel on [channels](Self::channel), with the contract of [`Channel`]. A rank has one call of
/// [`gather`](Self::gather) or [`barrier`](Self::barrier) under way at a time.
#[derive(Clone)]
pub struct ControlPlane {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    timers: Arc<Timers>,
    address: Address,
    rank: Rank,
    role: Role,
    close_timeout: Duration,
    thread: Mutex<Option<JoinHandle<()>>>,
    finished: CancellationToken,
    stop: CancellationToken,
}

impl ControlPlane {
    /// Listens at the configured address, as rank 0 and trainer.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the listener.
    ///
    /// # Errors
    ///
    /// `Config` when the configuration cannot be used, `Io` when the address cannot be bound, for
    /// example because another process listens there.
    pub async fn lead(config: ControlConfig) -> Result<Self> {
        Self::start(config, async |config, stop, ready| {
            let bound = async {
                let listener = Listener::bind(&config.address).await?;
                Ok((listener.address(&config.address)?, listener))
            };
            let (address, listener) = match bound.await {
                Ok(bound) => bound,
                Err(error) => return ready.tell(Err(error)),
            };
            let shared = Side::Leader(Group::new(config.max_world_size));
            let shared = Arc::new(Shared::new(shared, config.budget()));
            let _ending = Ending(Arc::clone(&shared));
            ready.tell(Ok(Place {
                shared: Arc::clone(&shared),
                address,
                rank: Rank::LEADER,
                role: Role::Trainer,
            }));
            serve(listener, config, shared, stop).await;
        })
        .await
    }

    /// Joins the group whose leader listens at the configured address. The leader may start later: this
    /// tries until the connect timeout.
    ///
    /// With `rank` the member gets that rank, if no live process has it. Without it, the member gets the
    /// lowest rank of its role whose process is gone, else the lowest new one.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the group again.
    ///
    /// # Errors
    ///
    /// `Config` when the configuration cannot be used, `Timeout` when no leader answers, `Authentication` when the
    /// tokens differ, `Protocol` when the leader speaks another version or something else listens there. `Mismatch`
    /// when another process has the rank and still has it after the heartbeat timeout, which is long enough to
    /// notice that a process has died.
    pub async fn join(config: ControlConfig, role: Role, rank: Option<Rank>) -> Result<Self> {
        Self::start(config, async move |config, stop, ready| {
            let admitted = tokio::select! {
                () = stop.cancelled() => return,
                admitted = knock(&config, async || join(&config, role, rank).await) => admitted,
            };
            let (rank, membership, traffic) = match admitted {
                Ok(admission) => admission,
                Err(error) => return ready.tell(Err(error)),
            };
            let shared = Arc::new(Shared::new(Side::Member(membership), config.budget()));
            let _ending = Ending(Arc::clone(&shared));
            let address = config.address.clone();
            ready.tell(Ok(Place { shared: Arc::clone(&shared), address, rank, role }));
            follow(traffic, config, shared, stop).await;
        })
        .await
    }

    /// The address for joining: the configured one, with port 0 resolved.
    pub fn address(&self) -> &Address {
        &self.inner.address
    }

    /// This process's rank.
    pub fn rank(&self) -> Rank {
        self.inner.rank
    }

    /// This process's role. The leader is a trainer.
    pub fn role(&self) -> Role {
        self.inner.role
    }

    /// The traffic over this process's connections so far. On a member, the handshake is not counted.
    pub fn traffic(&self) -> TrafficCounts {
        self.inner.shared.counters.read()
    }

    /// Forms the group. It contributes this rank's metadata, waits until `world_size` ranks have contributed, and
    /// returns the metadata of all of them on every rank, in the order of the ranks.
    ///
    /// # Contract
    ///
    /// The first gather needs the ranks below `world_size`. The leader's `world_size` decides. A member may pass `None`;
    /// another size than the leader's is refused. A member that joins after the first gather gets the current table at
    /// once, whatever size it passes, and the leader gets an [`Event::Joined`]. Ranks of the group may gather again:
    /// that takes `world_size` contributions, the leader's among them, and replaces their metadata.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future withdraws the contribution, unless the gather has ended meanwhile.
    ///
    /// # Errors
    ///
    /// `Timeout`, which names the missing ranks. `Config` on a leader without a world size. `Mismatch`, which names both
    /// sizes, when the world size differs from the leader's or exceeds its `max_world_size`. `PeerLost` or
    /// `TrainerLeft` when the leader is gone. `State` when this rank gathers or is in a barrier already, or when the
    /// control plane is closed. `Config` when the metadata exceed `max_frame_bytes`.
    pub async fn gather(
        &self,
        world_size: impl Into<Option<u32>>,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<Vec<Peer>> {
        let operation = "gathering the group";
        let (size, world_size) = (payload.len(), world_size.into());
        let call = Call::Gather { world_size, payload };
        match self.call(operation, call, size, deadline).await? {
            Outcome::Table { peers: table, updates } => {
                self.inner.shared.read(|_, side| {
                    if let Side::Member(membership) = side {
                        membership.table.clone_from(&table);
                        membership.updates = updates;
                    }
                });
                Ok(table)
            }
            other => Err(wrong_outcome(operation, &other)),
        }
    }

    /// The ranks of the group: on the leader those that are in it now, on a member those of its last gather.
    pub fn peers(&self) -> Vec<Peer> {
        self.inner.shared.read(|_, side| match side {
            Side::Leader(group) => group.table(),
            Side::Member(membership) => membership.table.clone(),
        })
    }

    /// Enters the barrier `name`, and waits until all expected ranks have entered it or said goodbye. Expected
    /// are the ranks that were in the group when the first rank entered.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the barrier, unless the barrier has ended meanwhile.
    ///
    /// # Errors
    ///
    /// `Timeout`, which names the missing ranks. `Mismatch` on all waiting ranks when two are in
    /// barriers of different names. `PeerLost` on all waiting ranks when an expected rank dies or
    /// the leader is lost, `TrainerLeft` when the leader has left. `State` before the first gather, when this rank
    /// gathers or is in a barrier already, or when the control plane is closed.
    pub async fn barrier(&self, name: &str, deadline: Duration) -> Result<()> {
        let operation = format!("waiting in barrier `{name}`");
        let call = Call::Barrier { name: name.to_owned() };
        match self.call(&operation, call, name.len(), deadline).await? {
            Outcome::Passed => Ok(()),
            other => Err(wrong_outcome(&operation, &other)),
        }
    }

    /// On the leader: a new number for the next update. No number is given twice on a control plane, even if
    /// engines and groups are formed anew. So a message of an old update is never taken for one of a new update.
    /// On a member: [`updates`](Self::updates).
    pub(crate) fn next_update(&self) -> u64 {
        self.inner.shared.read(|_, side| match side {
            Side::Leader(group) => {
                group.updates += 1;
                group.updates
            }
            Side::Member(membership) => membership.updates,
        })
    }

    /// How many updates had begun on the leader: until now on the leader itself, until the last gather on a member.
    /// Messages of those belong to an earlier group.
    pub(crate) fn updates(&self) -> u64 {
        self.inner.shared.read(|_, side| match side {
            Side::Leader(group) => group.updates,
            Side::Member(membership) => membership.updates,
        })
    }

    /// Opens a channel, which stays open as long as the control plane. Opening it again gives the same channel.
    ///
    /// From then on the channel gets the events of ranks that come and go. To get all of them, open it before the first
    /// [`gather`](Self::gather).
    pub fn channel(&self, id: ChannelId) -> Channel {
        self.inner.shared.read(|mailbox, _| mailbox.open(id));
        Channel::new(self.clone(), id)
    }

    /// A patient message may wait on its way for the equal messages of other ranks.
    pub(crate) fn send(
        &self,
        channel: ChannelId,
        to: Rank,
        body: Bytes,
        patient: bool,
    ) -> Result<()> {
        self.inner.shared.read(|mailbox, side| {
            if let Some(report) = &mailbox.ended {
                return Err(report.clone().into());
            }
            match side {
                Side::Leader(_) if to == Rank::LEADER => {
                    Err(misdirected("the leader cannot send to itself").rank(to))
                }
                Side::Leader(group) => group.link_mut(to)?.message(to, channel, body, false),
                Side::Member(_) if to != Rank::LEADER => {
                    Err(misdirected("members have a connection to rank 0 only").rank(to))
                }
                Side::Member(membership) => membership.leader.message(to, channel, body, patient),
            }
        })
    }

    /// Queues the same message for several ranks. Returns the ranks that it could not be queued for, and why.
    pub(crate) fn send_all(
        &self,
        channel: ChannelId,
        to: &RankSet,
        body: &Bytes,
    ) -> Vec<(Rank, Error)> {
        let all = |error: &dyn Fn() -> Error| to.iter().map(|rank| (rank, error())).collect();
        self.inner.shared.read(|mailbox, side| match (&mailbox.ended, side) {
            (Some(report), _) => all(&|| report.clone().into()),
            (None, Side::Leader(group)) => group.message_all(to, channel, body),
            (None, Side::Member(_)) => all(&|| misdirected("members have no members")),
        })
    }

    /// On the leader: ends the connection to a rank, for example one that breaks a protocol that runs over the control
    /// plane. The rank is [lost](Event::Lost) for this reason, and may join again.
    ///
    /// # Errors
    ///
    /// `PeerLost` when the rank is gone, `State` on a member.
    pub fn cut(&self, rank: Rank, reason: &Error) -> Result<()> {
        self.inner.shared.update(|mailbox, side| match side {
            Side::Leader(group) => group.cut(rank, ErrorReport::from(reason), mailbox),
            Side::Member(_) => Err(misdirected("members do not end connections").rank(rank)),
        })
    }

    /// On the leader: how long a rank has been silent, if two heartbeats or more are missing; else zero. `None` for a rank
    /// without a connection, and on a member.
    pub fn silence(&self, rank: Rank) -> Option<Duration> {
        self.inner.shared.read(|_, side| match side {
            Side::Leader(group) => group.link(rank).ok().map(Link::silence),
            Side::Member(_) => None,
        })
    }

    pub(crate) async fn recv(
        &self,
        channel: ChannelId,
        deadline: Duration,
    ) -> Result<Option<Event>> {
        self.wait_for(deadline, |mailbox| mailbox.take(channel)).await
    }

    pub(crate) async fn recv_all(
        &self,
        channel: ChannelId,
        deadline: Duration,
    ) -> Result<Option<Said>> {
        self.wait_for(deadline, |mailbox| mailbox.take_all(channel)).await
    }

    async fn wait_for<T>(
        &self,
        deadline: Duration,
        mut take: impl FnMut(&mut Mailbox) -> Option<(T, Told)>,
    ) -> Result<Option<T>> {
        let taken = self.wait(deadline, |mailbox, side| match take(mailbox) {
            Some((taken, told)) => {
                for (from, bytes) in told {
                    // A sender that is gone need not know.
                    if let Some(link) = side.link_mut(from) {
                        link.signal(Signal::Read { bytes });
                    }
                }
                Some(Ok(taken))
            }
            None => mailbox.ended.clone().map(|report| Err(report.into())),
        });
        taken.await.transpose()
    }

    /// Leaves the group: writes what was queued, says goodbye and ends the thread, within the
    /// heartbeat timeout. The waits of clones end with an error.
    ///
    /// # Cancel safety
    ///
    /// Closing goes on when the future is dropped.
    ///
    /// # Errors
    ///
    /// `Timeout` when the thread does not end in time.
    pub async fn close(self) -> Result<()> {
        let inner = self.inner;
        inner.stop.cancel();
        let grace = inner.close_timeout + LAST_WORDS;
        let thread = inner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if inner.timers.within(grace, inner.finished.cancelled()).await.is_none() {
            return Err(Error::new(
                ErrorKind::Timeout,
                "closing the control plane",
                format!("its thread did not end within {grace:?}"),
            ));
        }
        // The thread only has to return now, so `join` does not block.
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the control plane's thread panicked");
        }
        Ok(())
    }
}

impl ControlPlane {
    /// Starts the thread, and waits until `main` has joined the group.
    async fn start<M>(config: ControlConfig, main: M) -> Result<Self>
    where
        M: AsyncFnOnce(Arc<ControlConfig>, CancellationToken, Ready) + Send + 'static,
    {
        config.validate()?;
        let operation = "starting the control plane";
        let close_timeout = config.heartbeat_timeout;
        let timers = Arc::new(Timers::new().map_err(|error| Error::io(operation, error))?);
        let (stop, finished) = (CancellationToken::new(), CancellationToken::new());
        let (ready, place) = oneshot::channel();
        let thread = {
            let (timers, stop) = (Arc::clone(&timers), stop.clone());
            let finished = finished.clone().drop_guard();
            let main = move || {
                if let Some(runtime) = &timers.runtime {
                    runtime.block_on(main(Arc::new(config), stop, Ready(ready)));
                }
                drop(finished);
            };
            std::thread::Builder::new()
                .name("ckpt-control".into())
                .spawn(main)
                .map_err(|error| Error::io(operation, error))?
        };
        let cancelled = stop.clone().drop_guard();
        let place = place.await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::State, operation, "its thread ended before it began"))
        })?;
        let stop = cancelled.disarm();
        let Place { shared, address, rank, role } = place;
        let thread = Mutex::new(Some(thread));
        let inner =
            Inner { shared, timers, address, rank, role, close_timeout, thread, finished, stop };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes a call with other ranks, and waits for its outcome until the deadline.
    async fn call(
        &self,
        operation: &str,
        call: Call,
        size: usize,
        deadline: Duration,
    ) -> Result<Outcome> {
        let id = self.begin(call, size)?;
        let under_way = UnderWay { shared: &self.inner.shared, id };
        let outcome = |mailbox: &mut Mailbox, _: &mut Side| match mailbox
            .calls
            .get_mut(&id)
            .and_then(Option::take)
        {
            Some(Outcome::Failed(report)) => Some(Err(report.into())),
            Some(outcome) => Some(Ok(outcome)),
            None => mailbox.ended.clone().map(|report| Err(Error::from(report))),
        };
        if let Some(result) = self.wait(deadline, outcome).await {
            return result;
        }
        under_way.withdraw();
        let missing = match self.wait(LAST_WORDS, outcome).await {
            Some(Ok(Outcome::Missing(missing))) => missing,
            // The call ended at the last moment, also for the other ranks.
            Some(result) => return result,
            None => vec![Rank::LEADER],
        };
        let listed: Vec<_> = missing.iter().take(16).map(Rank::to_string).collect();
        let more = match missing.len().saturating_sub(listed.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let message = format!(
            "{} missing after {deadline:?}: {}{more}",
            if missing.len() == 1 {
                "a rank is".to_owned()
            } else {
                format!("{} ranks are", missing.len())
            },
            listed.join(", "),
        );
        let error = Error::new(ErrorKind::Timeout, operation, message);
        Err(match missing.first() {
            Some(rank) => error.rank(*rank),
            None => error,
        })
    }

    fn begin(&self, call: Call, size: usize) -> Result<u64> {
        self.inner.shared.update(|mailbox, side| {
            if let Some(report) = &mailbox.ended {
                return Err(report.clone().into());
            }
            let id = mailbox.next_call;
            mailbox.next_call += 1;
            if let Side::Member(membership) = &*side {
                let frame = Frame::Signal(Signal::Call { id, call: call.clone() });
                membership.leader.send(Rank::LEADER, size, frame)?;
            }
            mailbox.calls.insert(id, None);
            if let Side::Leader(group) = side {
                group.call(Rank::LEADER, id, call, mailbox);
            }
            Ok(id)
        })
    }

    /// Waits until `ready` finds something in the mailbox; `None` at the deadline.
    async fn wait<T>(
        &self,
        deadline: Duration,
        mut ready: impl FnMut(&mut Mailbox, &mut Side) -> Option<T>,
    ) -> Option<T> {
        let shared = &self.inner.shared;
        let waiting = async {
            loop {
                // Created before the look, so that no change between the two is missed.
                let changed = shared.changed.notified();
                if let Some(found) = shared.read(&mut ready) {
                    return found;
                }
                changed.await;
            }
        };
        self.inner.timers.within(deadline, waiting).await
    }
}

impl fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { address, rank, role, .. } = &*self.inner;
        f.debug_struct("ControlPlane")
            .field("address", address)
            .field("rank", rank)
            .field("role", role)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What the thread gives to the handle.
struct Place {
    shared: Arc<Shared>,
    address: Address,
    rank: Rank,
    role: Role,
}

struct Ready(oneshot::Sender<Result<Place>>);

impl Ready {
    fn tell(self, place: Result<Place>) {
        if self.0.send(place).is_err() {
            tracing::debug!("nobody waits for the control plane any more; it closes");
        }
    }
}

/// Ends every wait when the thread ends, however it ends.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A call that is withdrawn when its future is dropped.
struct UnderWay<'a> {
    shared: &'a Shared,
    id: u64,
}

impl UnderWay<'_> {
    fn withdraw(&self) {
        let id = self.id;
        self.shared.update(|mailbox, side| match side {
            Side::Leader(group) => group.withdraw(Rank::LEADER, id, mailbox),
            Side::Member(membership) => {
                let frame = Frame::Signal(Signal::Withdraw { id });
                if membership.leader.send(Rank::LEADER, 0, frame).is_err() {
                    tracing::trace!("the leader is gone; there is nothing to withdraw");
                }
            }
        });
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        // Removed before the withdrawal, because nobody reads its answer.
        let slot = self
            .shared
            .read(|mailbox, _| (mailbox.calls.remove(&self.id), mailbox.ended.is_some()));
        if slot == (Some(None), false) {
            self.withdraw();
        }
    }
}

/// The thread's runtime. Its clock also times the waits of handles on other executors.
#[derive(Debug)]
struct Timers {
    runtime: Option<Runtime>,
}

impl Timers {
    fn new() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// The future's value; `None` when the deadline passes first. After the thread has ended, nothing
    /// drives the clock, so the future has to end by itself.
    async fn within<T>(&self, deadline: Duration, future: impl Future<Output = T>) -> Option<T> {
        if deadline.is_zero() {
            // Even a timer of zero waits for the clock's next tick.
            return future.now_or_never();
        }
        let timed = {
            let _context = self.runtime.as_ref().map(Runtime::enter);
            tokio::time::timeout(deadline, future)
        };
        timed.await.ok()
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        // The last handle may be dropped on an executor's thread, where an ordinary drop of a runtime panics.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn misdirected(why: &str) -> Error {
    Error::new(ErrorKind::State, "sending a message", why)
}

fn wrong_outcome(operation: &str, outcome: &Outcome) -> Error {
    Error::new(
        ErrorKind::Protocol,
        operation,
        format!("the leader answered with another call's outcome: {outcome:?}"),
    )
    .rank(Rank::LEADER)
}

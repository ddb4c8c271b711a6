//! The engine, the same for every library.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::group::{Change, Joined, Step, Ticket, groups_of};
use super::parts::{Details, First, Parts, first};
use super::thread::{Attachment, Awaiting, Begun, Broadcast};
use super::{Communicator, Library, Opened, Shape, SlotGuard, SlotLocks, Slots, Thread, Wait};
use engine_core::clock::within;
use engine_core::memory::{Job, Pool};
use engine_core::plan::ALIGNMENT;
use engine_core::{
    Control, EngineContext, Error, ErrorKind, ErrorReport, Placement, Prepared, PreparedRollout,
    PreparedTrainer, Rank, Result, Role, RolloutEngine, Storage, TrainerEngine, WorkerMetadata,
};
use protocol::{
    Arrival, CoSender, Fetch, FetchLink, Members, Part, Receiver, Relay, SendLink, Sender,
    Ticket as JoinTicket, Witness,
};

/// Slots of a rank with one sender. Together they are as large as the two buckets of the configuration. With four, one is filled and one
/// installed while others travel.
const SLOTS: u32 = 4;

/// Options that all collective backends have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectiveOptions {
    /// The number of trainers that send, each a part of the buckets: those of the lowest ranks.
    pub senders: u32,
    /// Whether other trainers on the leader's host take part as relays, so that the library can pass buckets on from there.
    pub relays: bool,
    /// Whether to form new groups for every update.
    pub rebuild_group: bool,
}

impl Default for CollectiveOptions {
    fn default() -> Self {
        Self { senders: 1, relays: true, rebuild_group: false }
    }
}

/// Prepares the ranks of a collective transport over one library.
///
/// # Contract
///
/// A library that works while the process ends may crash it. So the engine waits until the library has freed its groups, which may happen
/// only when the last rank of the process leaves them. `finalize` waits without blocking. If the engine is dropped without it, a task of
/// the tokio runtime waits, up to `timeout_seconds`, and the runtime waits for that task when it ends (except with `shutdown_background`).
/// Outside a runtime, the drop itself blocks for up to that time.
#[derive(Debug)]
pub struct CollectiveEngine<L> {
    library: L,
    context: EngineContext,
    options: CollectiveOptions,
    control: Arc<dyn Control>,
    role: Role,
    pool: Pool,
}

impl<L: Library> CollectiveEngine<L> {
    /// Prepares a trainer.
    ///
    /// # Errors
    ///
    /// `Config` for options that cannot be used, or without a control plane; `Resource` if its threads
    /// cannot be started; those of [`Library::open`].
    pub async fn prepare_trainer(
        library: L,
        context: EngineContext,
        options: CollectiveOptions,
    ) -> Result<PreparedTrainer> {
        let engine = Self::new(library, context, options, Role::Trainer)?;
        let (node, metadata) = engine.open().await?;
        Ok(Prepared::new(metadata, move |place| engine.join_trainer(node, place)))
    }

    /// Prepares a rollout.
    ///
    /// # Errors
    ///
    /// Those of [`prepare_trainer`](Self::prepare_trainer).
    pub async fn prepare_rollout(
        library: L,
        context: EngineContext,
        options: CollectiveOptions,
    ) -> Result<PreparedRollout> {
        let engine = Self::new(library, context, options, Role::Rollout)?;
        let (node, metadata) = engine.open().await?;
        Ok(Prepared::new(metadata, move |place| engine.join_rollout(node, place)))
    }

    fn new(
        library: L,
        context: EngineContext,
        options: CollectiveOptions,
        role: Role,
    ) -> Result<Self> {
        if options.senders == 0 {
            let message = "senders: 0: one trainer has to send";
            return Err(Error::new(ErrorKind::Config, "preparing", message));
        }
        let control = context.require_control()?;
        let pool = Pool::new(context.threads(role))?;
        Ok(Self { library, context, options, control, role, pool })
    }

    /// The number and the size of a rank's slots. Each sender needs two slots of its own: it fills one while the other travels.
    fn shape(&self) -> Result<Shape> {
        let config = &self.context.config;
        let bucket = config.bucket_bytes().unwrap_or(self.library.default_bucket_bytes());
        let slots = self.options.senders.saturating_mul(2).max(SLOTS);
        let slot_bytes = bucket.saturating_mul(2) / u64::from(slots) / ALIGNMENT * ALIGNMENT;
        if slot_bytes == 0 {
            let message = format!("buckets of {bucket} bytes are too small for {slots} slots");
            return Err(Error::new(ErrorKind::Config, "preparing", message));
        }
        Ok(Shape { slots, slot_bytes })
    }

    async fn open(&self) -> Result<(Owned<L::Communicator>, WorkerMetadata)> {
        let shape = self.shape()?;
        let Opened { thread, slots, version, share } =
            self.library.open(&self.context, shape, &self.pool).await?;
        let (rank, senders) = (self.control.rank(), self.options.senders);
        let first = match rank == Rank::LEADER && !self.options.rebuild_group {
            true => {
                let ids = move |library: &mut L::Communicator, _: &Wait<'_>| {
                    let count = if library.can_give_up_joining() { senders } else { 0 };
                    (0..count).map(|_| library.new_group()).collect::<Result<Vec<Bytes>>>()
                };
                let ids = thread.run(self.context.deadline(), ids).await?;
                let updates = self.control.updates();
                Some(First { ids, updates }).filter(|first| !first.ids.is_empty())
            }
            false => None,
        };
        let details = Details { shape, version, senders, share, first };
        let node = Node {
            thread,
            slots,
            shape,
            locks: SlotLocks::new(shape.slots),
            rank,
            // Shorter than the protocol's deadline, so that the error names the broadcast that hangs.
            deadline: self.context.deadline().mul_f64(0.75),
            joined: Mutex::default(),
            forming: Mutex::default(),
            failed: Mutex::default(),
        };
        let node = Owned { node: Arc::new(node), limit: self.context.deadline() };
        let (name, details) = (self.library.name(), serde_json::json!(details));
        Ok((node, WorkerMetadata::of_this_process(name, rank, self.role, details)))
    }

    /// Makes a rank's end of the groups, and the duties of the group's ranks.
    async fn link(
        &self,
        node: Owned<L::Communicator>,
        place: &Placement,
    ) -> Result<(Link<L::Communicator>, Parts)> {
        let can_shrink =
            node.thread.run(node.deadline, |library, _| Ok(library.can_shrink())).await?;
        let parts = Parts::new(self.options, &place.peers);
        let mut leaders = None;
        if parts.of(place.rank) == Some(Part::Colocated) {
            let key = parts.key()?;
            // Attached once now, so that a failure shows before any update, and the rank's own slots are freed.
            drop(node.thread.attach(key.clone()).await.map_err(|error| error.rank(node.rank))?);
            leaders = Some(Leaders { key, held: None });
        }
        let early = first(&place.peers).filter(|first| first.updates == self.control.updates());
        let epochs = u64::from(early.is_some());
        if let Some(First { ids, .. }) = early {
            node.form_early(parts.members(), ids)?;
        }
        let link = Link {
            node,
            pool: self.pool.clone(),
            can_shrink,
            slower: None,
            rebuild: self.options.rebuild_group,
            clean: true,
            epochs,
            is_read: false,
            leaders,
        };
        Ok((link, parts))
    }

    async fn join_trainer(
        self,
        node: Owned<L::Communicator>,
        place: Placement,
    ) -> Result<Box<dyn TrainerEngine>> {
        let (mut link, parts) = self.link(node, &place).await?;
        let Self { context, control, pool, .. } = self;
        let context = &context;
        if place.rank == Rank::LEADER {
            let others: Vec<_> = parts.iter().collect();
            let sender = Sender::new(link, context, control, []);
            let sender = sender.with_parts(others, move |peer| parts.of_newcomer(peer));
            return Ok(Box::new(sender));
        }
        Ok(match parts.of(place.rank) {
            Some(Part::Sender) => Box::new(CoSender::new(link, context, control)),
            Some(Part::Relay) => Box::new(Relay::new(link, context, control, pool)),
            _ => {
                // Its slots are unused, and a rollout on the device can use the memory.
                FetchLink::close(&mut link).await;
                Box::new(Witness::new(context, control))
            }
        })
    }

    async fn join_rollout(
        self,
        node: Owned<L::Communicator>,
        place: Placement,
    ) -> Result<Box<dyn RolloutEngine>> {
        let (link, _) = self.link(node, &place).await?;
        Ok(Box::new(Receiver::new(link, &self.context, self.control, self.pool)))
    }
}

/// A rank's slots and its thread, which ends when this is dropped.
#[derive(Debug)]
struct Owned<C: Communicator> {
    node: Arc<Node<C>>,
    limit: Duration,
}

impl<C: Communicator> Deref for Owned<C> {
    type Target = Arc<Node<C>>;

    fn deref(&self) -> &Self::Target {
        &self.node
    }
}

impl<C: Communicator> Drop for Owned<C> {
    fn drop(&mut self) {
        self.node.give_up_forming();
        self.node.thread.close_later(self.limit);
    }
}

/// A rank's slots, and its thread.
#[derive(Debug)]
struct Node<C> {
    thread: Thread<C>,
    slots: Arc<dyn Slots>,
    shape: Shape,
    locks: SlotLocks,
    rank: Rank,
    deadline: Duration,
    joined: Mutex<Joined>,
    /// The groups that this rank has begun to join before the first update.
    forming: Mutex<Option<Forming>>,
    /// The error of a broadcast of the present update.
    failed: Mutex<Option<ErrorReport>>,
}

/// Groups that are being joined, and will be those of epoch 1.
#[derive(Debug)]
struct Forming {
    members: Members,
    begun: Begun<()>,
}

impl<C: Communicator> Node<C> {
    fn joined(&self) -> std::sync::MutexGuard<'_, Joined> {
        // Every change is one assignment.
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self) -> std::sync::MutexGuard<'_, Option<ErrorReport>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self) -> Result<()> {
        self.failure().clone().map_or(Ok(()), |report| Err(report.into()))
    }

    /// Locks a slot, once nobody else uses it.
    async fn lock(&self, slot: u32, filled: u64) -> Result<SlotGuard> {
        let Shape { slots, slot_bytes } = self.shape;
        if slot >= slots || filled > slot_bytes {
            let message = format!("bytes 0..{filled} of slot {slot} of {slots} × {slot_bytes}");
            return Err(Error::new(ErrorKind::Protocol, "using a slot", message));
        }
        let lock = within(self.deadline, self.locks.lock(slot)).await.flatten();
        lock.ok_or_else(|| {
            let seconds = self.deadline.as_secs_f64();
            let message = format!("it is still in use after {seconds:.1} s");
            Error::new(ErrorKind::Timeout, "using a slot", message).rank(self.rank)
        })
    }

    fn forming(&self) -> std::sync::MutexGuard<'_, Option<Forming>> {
        // Every change is one assignment.
        self.forming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to join groups with these members.
    fn form(&self, limit: Duration, members: &Members, ids: Vec<Bytes>) -> Result<Begun<()>> {
        let groups = groups_of(members, self.rank);
        let size = members.others.len() as u32 + 1;
        info!(ranks = size, "joining a group");
        self.thread.regroup(limit, true, move |library, wait| {
            for &(group, place) in &groups {
                library.join(group, &ids[group], size, place, wait)?;
                library.connect_members(group, wait)?;
            }
            Ok(groups.into_iter().map(|(group, _)| group).collect())
        })
    }

    /// Begins to join the groups of the first update, if the rank is a member. A failure shows when that update needs them.
    fn form_early(&self, members: Members, ids: Vec<Bytes>) -> Result<()> {
        let is_member = !groups_of(&members, self.rank).is_empty() && !members.others.is_empty();
        if is_member && ids.len() == members.senders.len() {
            let begun = self.form(self.deadline, &members, ids)?;
            *self.forming() = Some(Forming { members, begun });
        }
        Ok(())
    }

    /// Waits for no groups of the first update any more.
    fn give_up_forming(&self) {
        drop(self.forming().take());
    }

    /// Takes in that the groups of the first update have been joined, or could not be. Returns whether they are still being joined by these
    /// members. If it is by others, they are given up.
    fn is_forming(&self, members: &Members) -> bool {
        let mut forming = self.forming();
        let Some(present) = &mut *forming else { return false };
        match present.begun.ended() {
            None if present.members == *members => return true,
            None => {}
            Some(Ok(())) => {
                *self.joined() = Joined { epoch: 1, members: present.members.clone() };
            }
            Some(Err(error)) => warn!(%error, "the first groups could not be joined early"),
        }
        *forming = None;
        false
    }

    /// Waits for the groups of the first update, if they are being joined.
    async fn formed(&self, limit: Duration) -> Result<()> {
        let Some(Forming { members, begun }) = self.forming().take() else { return Ok(()) };
        within(limit, begun).await.ok_or_else(|| {
            let message = format!("nothing within {:.1} s", limit.as_secs_f64());
            Error::new(ErrorKind::Timeout, JOINING, message).rank(self.rank)
        })??;
        *self.joined() = Joined { epoch: 1, members };
        Ok(())
    }

    /// Changes groups as a ticket says, together with all other ranks.
    async fn join(&self, ticket: &[u8]) -> Result<()> {
        // The leader joins when all others have entered the update, which may take them as long as any wait. If they do not come, the
        // leader reports it.
        let limit = if self.rank == Rank::LEADER { self.deadline } else { self.deadline * 3 };
        let Ticket { epoch, members, change } = Ticket::from_bytes(ticket)?;
        let groups = groups_of(&members, self.rank);
        let refuse = |message: String| {
            Error::new(ErrorKind::State, JOINING, message)
                .rank(self.rank)
                .recovery(engine_core::Recovery::Retry)
        };
        if groups.is_empty() {
            return Err(refuse("this rank is not among the members".into()));
        }
        match change {
            Change::Form { .. } => self.give_up_forming(),
            Change::Keep | Change::Shrink { .. } => self.formed(limit).await?,
        }
        let joined = self.joined().clone();
        match change {
            Change::Keep => {
                if (joined.epoch, &joined.members) != (epoch, &members) {
                    return Err(refuse("this rank is not in the groups of the others".into()));
                }
                return self.check();
            }
            Change::Form { ids } => {
                *self.joined() = Joined::default();
                self.form(limit, &members, ids)?.await?;
                // Reset only now: the thread has given up all broadcasts of the previous update.
                *self.failure() = None;
            }
            Change::Shrink { gone } => {
                if joined.epoch + 1 != epoch || joined.members.senders != members.senders {
                    return Err(refuse("this rank is not in the groups of the others".into()));
                }
                let places = joined.places(&gone);
                *self.joined() = Joined::default();
                info!(%epoch, ?gone, "leaving ranks out of the group");
                self.thread
                    .regroup(limit, false, move |library, wait| {
                        for &(group, _) in &groups {
                            library.shrink(group, &places, wait)?;
                        }
                        Ok(groups.into_iter().map(|(group, _)| group).collect())
                    })?
                    .await?;
            }
        }
        *self.joined() = Joined { epoch, members };
        Ok(())
    }
}

const JOINING: &str = "joining the group of an update";

/// A rank's end of the groups, as the update protocol uses it.
#[derive(Debug)]
struct Link<C: Communicator> {
    node: Owned<C>,
    pool: Pool,
    can_shrink: bool,
    /// Why the groups can no longer shrink, if the library could do it.
    slower: Option<String>,
    rebuild: bool,
    /// Whether the last update was committed. If not, ranks may have enqueued different broadcasts.
    clean: bool,
    epochs: u64,
    /// Whether colocated ranks read the slots in place in the present update.
    is_read: bool,
    /// Only on a rank that is colocated with the leader.
    leaders: Option<Leaders<C>>,
}

/// The leader's slots on a colocated rank. They are mapped again for every update, so that they are unmapped when the leader frees them.
#[derive(Debug)]
struct Leaders<C: Communicator> {
    key: Bytes,
    /// Held during an update. Views hold it longer.
    held: Option<Arc<Attachment<C>>>,
}

#[async_trait]
impl<C: Communicator> SendLink for Link<C> {
    fn slots(&self) -> usize {
        self.node.shape.slots as usize
    }

    fn bucket_bytes(&self) -> u64 {
        self.node.shape.slot_bytes
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        self.node.check()?;
        // The slot is free when its previous bucket has left it.
        let guard = self.node.lock(slot as u32, 0).await?;
        self.node.slots.fill(guard, jobs, &self.pool, digests).await
    }

    async fn publish(&mut self, slot: usize, filled: u64) -> Result<()> {
        let node = &self.node;
        node.check()?;
        let guard = node.lock(slot as u32, filled).await?;
        if filled == 0 {
            return Ok(());
        }
        let (limit, slot) = (node.deadline, slot as u32);
        let groups = groups_of(&node.joined().members, node.rank);
        if let Some(&(group, _)) = groups.first() {
            let done = Box::new(Sent { node: Arc::clone(node), slot: guard });
            node.thread.broadcast(Broadcast { group, slot, len: filled, limit, done });
        }
        if self.is_read {
            node.thread.run(limit, move |library, wait| library.settle(slot, wait)).await?;
        }
        Ok(())
    }

    async fn begin(&mut self, members: &Members, colocated: usize) -> Result<Option<JoinTicket>> {
        self.is_read = colocated > 0;
        if members.others.is_empty() {
            // There is nobody to form a group with. The members of an old group are gone.
            self.node.give_up_forming();
            *self.node.joined() = Joined::default();
            self.node.thread.regroup(self.node.deadline, true, |_, _| Ok(Vec::new()))?.await?;
            *self.node.failure() = None;
            return Ok(None);
        }
        let forms = self.node.is_forming(members);
        let joined = self.node.joined().clone();
        let reuse = self.clean && !self.rebuild && self.node.failure().is_none();
        let step = match reuse {
            true if forms => Step::Keep,
            true => joined.step(members, self.can_shrink),
            false => Step::Form,
        };
        let change = match step {
            Step::Keep => Change::Keep,
            Step::Shrink => Change::Shrink { gone: joined.gone(members) },
            Step::Form => {
                let count = members.senders.len();
                let ids = move |library: &mut C| (0..count).map(|_| library.new_group()).collect();
                let limit = self.node.deadline;
                let ids = self.node.thread.run(limit, move |library, _| ids(library)).await?;
                Change::Form { ids }
            }
        };
        if step != Step::Keep {
            self.epochs += 1;
        }
        self.clean = false;
        let ticket = Ticket { epoch: self.epochs, members: members.clone(), change };
        let together = forms || step != Step::Keep;
        Ok(Some(JoinTicket { bytes: ticket.to_bytes()?, together }))
    }

    async fn join(&mut self, ticket: &JoinTicket) -> Result<()> {
        let result = self.node.join(&ticket.bytes).await;
        if result.is_err() && self.can_shrink && is_shrink(&ticket.bytes) {
            let why = "members could not be left out of a group: from now on groups form anew when members go";
            warn!("{why}");
            self.slower = Some(why.to_owned());
            self.can_shrink = false;
        }
        result
    }

    fn end(&mut self, committed: bool) {
        self.clean = committed;
        match committed {
            true => self.node.slots.settle(),
            false => self.node.thread.leave_all(),
        }
    }

    fn slower(&self) -> Vec<String> {
        self.slower.iter().cloned().chain(self.node.slots.slower()).collect()
    }

    async fn close(&mut self, _: Duration) {
        self.node.give_up_forming();
        self.node.thread.close().await;
    }
}

fn is_shrink(ticket: &[u8]) -> bool {
    let ticket = Ticket::from_bytes(ticket);
    ticket.is_ok_and(|ticket| matches!(ticket.change, Change::Shrink { .. }))
}

/// A bucket that is being sent.
struct Sent<C> {
    node: Arc<Node<C>>,
    slot: SlotGuard,
}

impl<C: Communicator> Awaiting for Sent<C> {
    fn is_awaited(&self) -> bool {
        true // The engine leaves the group when the update has failed.
    }

    fn arrived(self: Box<Self>) {}

    fn failed(self: Box<Self>, error: Error) -> SlotGuard {
        let report = ErrorReport::from(&error.rank(self.node.rank));
        self.node.failure().get_or_insert(report);
        self.slot
    }
}

/// A bucket that is being received.
struct Expected<C> {
    node: Arc<Node<C>>,
    slot: SlotGuard,
    filled: u64,
    from: Rank,
    arrival: Arrival,
}

impl<C: Communicator> Awaiting for Expected<C> {
    fn is_awaited(&self) -> bool {
        self.arrival.is_awaited()
    }

    fn arrived(self: Box<Self>) {
        let Self { node, slot, filled, arrival, .. } = *self;
        arrival.tell(node.slots.view(slot, filled));
    }

    fn failed(self: Box<Self>, error: Error) -> SlotGuard {
        let Self { slot, from, arrival, .. } = *self;
        arrival.tell(Err(match error.kind() {
            // A timeout is the sender's. The cause of other errors is unknown.
            ErrorKind::Timeout => error.rank(from),
            _ => error,
        }));
        slot
    }
}

#[async_trait]
impl<C: Communicator> FetchLink for Link<C> {
    fn card(&self) -> Bytes {
        Bytes::new()
    }

    async fn fetch(&mut self, fetch: Fetch, arrival: Arrival) {
        let Fetch { from, slot, filled, .. } = fetch;
        if self.leaders.is_some() {
            let view = self.read_in_place(slot, filled).await;
            return arrival.tell(view.map_err(|error| error.rank(self.node.rank)));
        }
        let node = &self.node;
        let group = node.joined().members.senders.iter().position(|sender| *sender == from);
        let guard = match (group, node.lock(slot, filled).await) {
            (Some(_), Ok(guard)) => guard,
            (_, Err(error)) => return arrival.tell(Err(error)),
            (None, _) => {
                let message = "the bucket comes from a rank that is no sender of the group";
                let error = Error::new(ErrorKind::Protocol, "fetching a bucket", message);
                return arrival.tell(Err(error.rank(from)));
            }
        };
        let done =
            Box::new(Expected { node: Arc::clone(node), slot: guard, filled, from, arrival });
        match group.filter(|_| filled > 0) {
            // An empty bucket does not travel.
            None => done.arrived(),
            Some(group) => {
                let limit = node.deadline;
                node.thread.broadcast(Broadcast { group, slot, len: filled, limit, done });
            }
        }
    }

    fn abandon(&mut self, _: Rank) {}

    async fn join(&mut self, ticket: &JoinTicket) -> Result<()> {
        if self.leaders.is_none() {
            return self.node.join(&ticket.bytes).await;
        }
        let Ticket { members, .. } = Ticket::from_bytes(&ticket.bytes)?;
        if groups_of(&members, self.node.rank).is_empty() {
            return Ok(());
        }
        let message = "it is on the leader's device, and the leader does not know that: what a rank that joins \
                       late gives to the control plane has to be its metadata";
        Err(Error::new(ErrorKind::Mismatch, JOINING, message).rank(self.node.rank))
    }

    fn end(&mut self) {
        if let Some(leaders) = &mut self.leaders {
            leaders.held = None;
        }
    }

    async fn close(&mut self) {
        self.node.give_up_forming();
        self.node.thread.close().await;
    }
}

impl<C: Communicator> Link<C> {
    /// The first bytes of one of the leader's slots.
    async fn read_in_place(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        let Self { node, leaders, .. } = self;
        let Some(Leaders { key, held }) = leaders else {
            let message = "this rank is not colocated with the leader";
            return Err(Error::new(ErrorKind::State, "reading a slot in place", message));
        };
        let attachment = match held {
            Some(attachment) => attachment.clone(),
            None => held.insert(Arc::new(node.thread.attach(key.clone()).await?)).clone(),
        };
        let guard = node.lock(slot, filled).await?;
        Ok(node.slots.view(guard, filled)?.guarded(attachment))
    }
}

//! The trainer's side of an update.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use serde::{Deserialize, Serialize};
use tracing::{Instrument, debug, debug_span, info, warn};

use super::collect::{Bucket, Collector};
use super::message::{Begin, Layout, Ticket, ToReceiver, ToSender, decode, encode, sender_of};
use super::route::{Due, Gap, Route, Topology};
use super::{LONG, arrived_event, settle, too_late, within};
use crate::control::{Control, Event, Peer, Role};
use crate::memory::Job;
use crate::observe::{Observer as _, Progress};
use crate::plan::{BucketLayout, Plan};
use crate::report::{ReceiverReport, SendReport, StageTimes, VersionState};
use crate::telemetry::Meter;
use crate::{
    EngineContext, Error, ErrorKind, ErrorReport, Rank, Recovery, Result, Version, WeightStream,
    digest,
};

/// A transport's sending side: the memory of its buckets, and how a filled one gets out.
#[async_trait]
pub trait SendLink: std::fmt::Debug + Send {
    /// The number of buckets: two for double buffering.
    fn slots(&self) -> usize;

    /// The size of each in bytes.
    fn bucket_bytes(&self) -> u64;

    /// Encodes all jobs into a bucket, and returns its digest sum if it is wanted, else 0.
    ///
    /// # Contract
    ///
    /// Called for a slot only when all receivers have released it. When the future has ended, with
    /// an error or without, nothing reads the weights of the jobs any more.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, work on the bucket may go on, and keeps clones of its weights until
    /// it ends; a later call for the same slot waits for its end.
    ///
    /// # Errors
    ///
    /// Those of the weights, naming them.
    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64>;

    /// Makes the first `filled` bytes of a bucket visible to the receivers, before they are told of
    /// it. Transports that push bytes do it here.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    async fn publish(&mut self, slot: usize, filled: u64) -> Result<()>;

    /// For transports whose receivers fetch buckets from any rank that has them: who fetches from
    /// whom in the next update, among so many receivers. `buckets` is the number of the last update's
    /// buckets, 0 if there was none.
    ///
    /// With a topology, receivers need to be [`FetchLink`](super::FetchLink)s; a slot is filled again
    /// when those that fetch from it have its bucket; and an update goes on without receivers that die.
    /// Without one, every receiver uses the trainer's own slot, which is filled again when all have
    /// released it.
    fn topology(&self, receivers: usize, buckets: usize) -> Option<Topology> {
        let _ = (receivers, buckets);
        None
    }

    /// What receivers need to fetch from this rank.
    fn card(&self) -> Bytes {
        Bytes::new()
    }

    /// Begins an update of these ranks, on the leader, and of so many [`Part::Colocated`] ones beside them. A
    /// transport whose ranks have to join one another for it returns a ticket, which travels to all of them.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    async fn begin(&mut self, members: &Members, colocated: usize) -> Result<Option<Ticket>> {
        let _ = (members, colocated);
        Ok(None)
    }

    /// Joins the others, who do the same now. Called before anything is published, if
    /// [`begin`](Self::begin) returned this ticket on the leader.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the rank gives up joining.
    ///
    /// # Errors
    ///
    /// Those of the transport; `Timeout`.
    async fn join(&mut self, ticket: &Ticket) -> Result<()> {
        let _ = ticket;
        Ok(())
    }

    /// The update has ended here, with the version or without.
    fn end(&mut self, committed: bool) {
        let _ = committed;
    }
}

/// The ranks of an update.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// The trainers that send, the leader first. Bucket `n` comes from the one at `n` modulo their number.
    pub senders: Vec<Rank>,
    /// Those that get buckets from them, in the order of their ranks: receivers and relays.
    pub others: Vec<Rank>,
}

/// What a rank does in updates, beside the leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// A rollout.
    #[default]
    Receiver,
    /// A rollout that reads the leader's buckets where they are, because it is on the leader's device. It is
    /// none of the [`Members`].
    Colocated,
    /// A trainer that receives, for the transport to pass on from there, and keeps nothing.
    Relay,
    /// A trainer that sends a part of the buckets.
    Sender,
    /// A trainer that neither sends nor receives: it hears of updates and how they end
    /// ([`Witness`](super::Witness)), and nobody waits for it. It is none of the [`Members`].
    Idle,
}

impl Part {
    fn is_rollout(self) -> bool {
        matches!(self, Self::Receiver | Self::Colocated)
    }
}

/// What a rank does that joins a group which is there; nothing, if it has no part in updates.
struct Newcomers(Box<PartOf>);

type PartOf = dyn Fn(&Peer) -> Option<Part> + Send + Sync;

impl std::fmt::Debug for Newcomers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Newcomers").finish_non_exhaustive()
    }
}

#[async_trait]
impl<L: SendLink + ?Sized> SendLink for Box<L> {
    fn slots(&self) -> usize {
        (**self).slots()
    }

    fn bucket_bytes(&self) -> u64 {
        (**self).bucket_bytes()
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        (**self).fill(slot, jobs, digests).await
    }

    async fn publish(&mut self, slot: usize, filled: u64) -> Result<()> {
        (**self).publish(slot, filled).await
    }

    fn topology(&self, receivers: usize, buckets: usize) -> Option<Topology> {
        (**self).topology(receivers, buckets)
    }

    fn card(&self) -> Bytes {
        (**self).card()
    }

    async fn begin(&mut self, members: &Members, colocated: usize) -> Result<Option<Ticket>> {
        (**self).begin(members, colocated).await
    }

    async fn join(&mut self, ticket: &Ticket) -> Result<()> {
        (**self).join(ticket).await
    }

    fn end(&mut self, committed: bool) {
        (**self).end(committed);
    }
}

/// What all ranks do before anything is sent, where they have to join one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Enter,
    Join,
}

const FILLING: &str = "waiting for a trainer to fill a bucket";
pub(super) const ENCODING: &str = "encoding a bucket";

/// How often the trainer says that it is alive, while it waits for something.
const ALIVE: Duration = Duration::from_secs(1);

/// Whether an error may be what a transport sees of a rank that died.
pub(super) fn is_of_transport(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::Io)
}

/// `silence` is that of [`Control::silence`].
fn not_entered(operation: &str, deadline: Duration, silence: Option<Duration>) -> Error {
    let why = match silence {
        Some(Duration::ZERO) => {
            "its process lives, as its heartbeats come, and has not called receive_weights \
             (send_weights, if it is a trainer)"
                .to_owned()
        }
        Some(silence) => format!(
            "not even a heartbeat came from the rank for {:.1} s: its process is stopped, or the network \
             between is cut",
            silence.as_secs_f64()
        ),
        None => "the connection to the rank has ended".to_owned(),
    };
    let message = format!("nothing within {:.1} s: {why}", deadline.as_secs_f64());
    Error::new(ErrorKind::Timeout, operation, message)
}

/// The trainer's side of the protocol, over a transport's link.
#[derive(Debug)]
pub struct Sender<L> {
    link: L,
    group: Box<Group>,
    plan: Plan,
    digests: bool,
    deadline: Duration,
    meter: Meter,
}

/// The receivers as the trainer sees them.
#[derive(Debug)]
struct Group {
    control: Arc<dyn Control>,
    /// How long a rank may take for its next step.
    deadline: Duration,
    /// When the ranks of the update hear next that this one is alive.
    next_alive: Instant,
    members: BTreeMap<Rank, Member>,
    /// The ranks that hear of updates and have no other part in them.
    idle: BTreeSet<Rank>,
    absent: BTreeSet<Rank>,
    newcomers: Newcomers,
    /// Those that send in the present update, this rank first.
    senders: Vec<Rank>,
    /// Buckets that were begun and not announced yet, in their order.
    outgoing: VecDeque<Outgoing>,
    /// Of the buckets that were announced.
    version_digest: u64,
    /// The number of the present update, or of the last one; tags its messages.
    update: u64,
    version: Version,
    begun: Instant,
    /// Who may still read which slot, and the bucket that is in it. Unused with a route.
    slots: Vec<Held>,
    /// The way of the present update's buckets, if receivers fetch them.
    route: Option<Route>,
    /// How receivers fetch from this rank.
    card: Bytes,
    meter: Meter,
}

/// A bucket that is being filled, here or by another trainer.
#[derive(Debug)]
struct Outgoing {
    index: u64,
    slot: usize,
    layout: Arc<BucketLayout>,
    known: Option<u64>,
    source_bytes: u64,
    /// Known when it is filled.
    digest: Option<u64>,
}

#[derive(Debug, Default)]
struct Member {
    part: Part,
    /// Whether it takes part in the present update.
    active: bool,
    /// What it said when it entered the present update.
    entered: Option<Entry>,
    /// What it will be told when it has entered.
    unsent: Vec<Unsent>,
    /// Whether it has joined the others for the present update.
    joined: bool,
    /// Its confirmation of the present update.
    confirmed: Option<ReceiverReport>,
    /// When it was given its present task, or made its last step: a deadline for it begins there.
    since: Option<Instant>,
}

/// What a rank says of itself when it enters an update; nothing of it is remembered for the next one.
#[derive(Debug)]
struct Entry {
    /// The digest of the plan that the rank knows.
    plan: Option<u64>,
    /// How others fetch from it.
    card: Bytes,
}

/// A message of an update to a rank that has not entered it.
#[derive(Clone, Debug)]
enum Unsent {
    Bucket(Arc<Announcement>),
    Other(Bytes),
}

/// A bucket that is there, as it is announced: in few bytes to those that know the plan.
#[derive(Debug)]
struct Announcement {
    update: u64,
    index: u64,
    slot: usize,
    digest: u64,
    layout: Arc<BucketLayout>,
    /// The digest of the plan in which the layout stands at this place.
    known: Option<u64>,
    short: OnceLock<Bytes>,
    full: OnceLock<Bytes>,
}

impl Announcement {
    /// The message for a rank that knows this plan.
    fn body(&self, plan: Option<u64>) -> Result<Bytes> {
        let knows = self.known.is_some() && plan == self.known;
        let cached = if knows { &self.short } else { &self.full };
        if let Some(body) = cached.get() {
            return Ok(body.clone());
        }
        let layout = if knows {
            Layout::Known { digest: self.layout.digest() }
        } else {
            Layout::Explicit { pieces: self.layout.pieces().to_vec() }
        };
        let Self { update, index, slot, digest, .. } = *self;
        let body =
            encode(&ToReceiver::Bucket { update, index, slot: slot as u32, digest, layout })?;
        Ok(cached.get_or_init(|| body).clone())
    }
}

/// What a wait of the trainer waits for.
#[derive(Debug)]
struct Awaited {
    /// The rank, if it is one.
    rank: Option<Rank>,
    /// The bucket, for the error.
    bucket: Option<u64>,
    operation: &'static str,
}

#[derive(Debug, Default)]
struct Held {
    update: u64,
    bucket: u64,
    by: BTreeSet<Rank>,
}

impl<L: SendLink> Sender<L> {
    /// The sender of a group whose receivers are given.
    pub fn new(
        link: L,
        context: &EngineContext,
        control: Arc<dyn Control>,
        receivers: impl IntoIterator<Item = Rank>,
    ) -> Self {
        let slots = (0..link.slots()).map(|_| Held::default()).collect();
        let meter = Meter::new(control.rank(), context.observer.clone());
        Self {
            group: Box::new(Group {
                control,
                members: receivers.into_iter().map(|rank| (rank, Member::default())).collect(),
                idle: BTreeSet::new(),
                absent: BTreeSet::new(),
                newcomers: Newcomers(Box::new(|peer| {
                    (peer.role == Role::Rollout).then_some(Part::Receiver)
                })),
                senders: vec![Rank::LEADER],
                outgoing: VecDeque::new(),
                version_digest: 0,
                update: 0,
                deadline: context.deadline(),
                next_alive: Instant::now(),
                version: Version(0),
                begun: Instant::now(),
                slots,
                route: None,
                card: link.card(),
                meter: meter.clone(),
            }),
            link,
            plan: Plan::default(),
            digests: context.config.digests,
            deadline: context.deadline(),
            meter,
        }
    }

    /// With what other ranks do that are no mere receivers, and what those do that join later.
    #[must_use]
    pub fn with_parts(
        mut self,
        parts: impl IntoIterator<Item = (Rank, Part)>,
        newcomers: impl Fn(&Peer) -> Option<Part> + Send + Sync + 'static,
    ) -> Self {
        self.group.newcomers = Newcomers(Box::new(newcomers));
        for (rank, part) in parts {
            self.group.admit(rank, part);
        }
        self
    }

    /// Sends one update; see
    /// [`CheckpointEngine::send_weights`](crate::CheckpointEngine::send_weights).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future aborts the update on every rank; the next one works.
    ///
    /// # Errors
    ///
    /// The first failure of any rank, naming rank, bucket and version.
    #[tracing::instrument(skip_all, fields(version = %version))]
    pub async fn send(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        self.group.begin(version).await?;
        let receivers = self.group.receivers().count();
        self.group.route = self
            .link
            .topology(receivers, self.plan.buckets.len())
            .map(|topology| Route::new(topology, self.link.slots() as u64, self.group.active()));
        // Until it is disarmed, whatever ends this function ends the update on every rank.
        let (control, meter) = (self.group.control.clone(), self.meter.clone());
        let mut guard = AbortGuard { control, meter, abort: None };
        guard.arm(&self.group);
        let ending = Ending::new(self);
        let result = ending.sender.run(weights, &mut guard).await;
        ending.end(result.is_ok());
        let result = match result {
            Err(error) if is_of_transport(&error) => Err(self.group.cause_of(error).await),
            result => result,
        };
        match result {
            Ok(report) => {
                guard.disarm();
                self.meter.sent(&report);
                info!(
                    tensors = report.counts.tensors,
                    buckets = report.buckets,
                    gb_per_s = report.gb_per_s(),
                    "update committed"
                );
                Ok(report)
            }
            Err(error) => {
                let error = error.version(version);
                guard.abort_with(&error);
                self.group.end();
                warn!(%error, "update aborted");
                Err(error)
            }
        }
    }

    /// Waits until colocated ranks have released all buckets, but no longer than that; whether they have. After
    /// the last update: before the slots are freed.
    pub async fn wait_until_released(&mut self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while self.group.is_read_in_place() {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(Some(event)) = self.group.control.recv(left).await else { return false };
            if let Err(error) = self.group.handle(event, 0) {
                debug!(%error, "after the last update");
            }
        }
        true
    }

    async fn run(
        &mut self,
        mut weights: WeightStream<'_>,
        guard: &mut AbortGuard,
    ) -> Result<SendReport> {
        let (members, colocated) = self.group.who();
        let ticket = self.link.begin(&members, colocated).await?;
        let slots = self.link.slots();
        self.group.announce_update(&self.link, self.digests, ticket.clone())?;
        let mut stages = StageTimes::default();
        let mut collector = Collector::new(&self.plan, self.link.bucket_bytes())?;
        let mut layouts: Vec<Arc<BucketLayout>> = Vec::new();

        let started = Instant::now();
        let mut next = {
            let bucket = collector
                .next_bucket(&mut weights, self.deadline)
                .instrument(debug_span!("collect", bucket = 0));
            self.group.watch(0, bucket).await??
        };
        stages.source += started.elapsed();
        if let Some(ticket) = &ticket {
            let joining = Instant::now();
            self.group.wait_for_all(Step::Enter).await?;
            if ticket.together {
                self.group.broadcast(&ToReceiver::Join { update: self.group.update })?;
            }
            let join = self.link.join(ticket).instrument(debug_span!("join"));
            self.group.watch(0, join).await??;
            if ticket.together {
                self.group.wait_for_all(Step::Join).await?;
            }
            stages.release += joining.elapsed();
        }
        while let Some(bucket) = next {
            let index = layouts.len() as u64;
            let slot = layouts.len() % slots;
            let released = Instant::now();
            self.group.wait_for_slot(slot, index).await?;
            stages.release += released.elapsed();

            let Bucket { jobs, layout, known, source_bytes } = bucket;
            let filled = layout.filled();
            self.group.begin_bucket(Outgoing {
                index,
                slot,
                layout: layout.clone(),
                known,
                source_bytes,
                digest: None,
            })?;
            let own = sender_of(&self.group.senders, index) == Rank::LEADER;
            // The next bucket is collected from the trainer's stream while this one is encoded.
            let encoded = Instant::now();
            let mut collected = Duration::ZERO;
            let collect = async {
                let started = Instant::now();
                let bucket = collector.next_bucket(&mut weights, self.deadline).await;
                collected = started.elapsed();
                bucket
            }
            .instrument(debug_span!("collect", bucket = index + 1));
            let (sum, following) = {
                let fill = async {
                    if !own {
                        return Ok(None);
                    }
                    self.link.fill(slot, jobs, self.digests).await.map(Some)
                }
                .instrument(debug_span!("encode", bucket = index))
                .fuse();
                let mut fill = std::pin::pin!(fill);
                let filled_in_time =
                    within(self.deadline, ENCODING, fill.as_mut()).map(Result::flatten);
                let both = futures::future::try_join(filled_in_time, collect);
                let both = self.group.watch(index, both).await.flatten();
                match both.map_err(|error| error.bucket(index)) {
                    Ok(both) => both,
                    Err(error) => {
                        let error = error.version(self.group.version);
                        guard.abort_with(&error);
                        return Err(settle(fill, self.deadline, error).await);
                    }
                }
            };
            next = following;
            let both = encoded.elapsed();
            stages.source += collected.min(both);

            if let Some(sum) = sum {
                stages.encode += both;
                let published = Instant::now();
                let publish = self.link.publish(slot, filled);
                let publish = publish.instrument(debug_span!("publish", bucket = index));
                self.group.alive_while(publish).await.map_err(|error| error.bucket(index))?;
                stages.publish += published.elapsed();
                self.group.filled(index, digest::finish(sum, filled))?;
            }
            layouts.push(layout);
        }
        let filling = Instant::now();
        self.group.wait_until_filled().await?;
        stages.encode += filling.elapsed();

        let plan_reused = collector.reused(layouts.len());
        let counts = collector.counts;
        let plan = Plan { buckets: layouts };
        let buckets = plan.buckets.len() as u64;
        let plan_digest = plan.digest();
        self.plan = plan;
        let confirming = Instant::now();
        self.group.finish(buckets, plan_digest).instrument(debug_span!("confirm")).await?;
        stages.confirm = confirming.elapsed();
        let elapsed = self.group.begun.elapsed();
        let receivers = self.group.commit(self.digests)?;
        Ok(SendReport {
            version: self.group.version,
            counts,
            buckets,
            plan_reused,
            elapsed,
            stages,
            digest: self.digests.then_some(self.group.version_digest),
            receivers,
            absent: self.group.absent.iter().copied().collect(),
        })
    }
}

impl Group {
    fn admit(&mut self, rank: Rank, part: Part) {
        if part == Part::Idle {
            self.idle.insert(rank);
        } else {
            self.members.insert(rank, Member { part, ..Member::default() });
        }
    }

    /// Tells the ranks that only hear of updates.
    fn tell_idle(&self, body: &Bytes) {
        for rank in &self.idle {
            if let Err(error) = self.control.send(*rank, body.clone()) {
                debug!(%rank, %error, "an idle trainer could not be told");
            }
        }
    }

    /// Starts an update with the receivers that are there.
    async fn begin(&mut self, version: Version) -> Result<()> {
        self.end();
        while let Some(event) = arrived_event(&self.control).await? {
            // Losses between updates are no failure: the rank takes no part in this one.
            if let Err(error) = self.handle(event, 0) {
                debug!(%error, "before the update");
            }
        }
        if !self.members.values().any(|member| member.part.is_rollout()) {
            return Err(Error::new(
                ErrorKind::PeerLost,
                "beginning an update",
                "no receiver is left in the group",
            )
            .recovery(Recovery::Reconnect)
            .version(version));
        }
        self.update = self.control.next_update();
        self.version = version;
        self.begun = Instant::now();
        self.next_alive = self.begun;
        self.version_digest = 0;
        self.senders = vec![Rank::LEADER];
        for (&rank, member) in &mut self.members {
            let part = member.part;
            *member = Member { part, active: true, since: Some(self.begun), ..Member::default() };
            if part == Part::Sender {
                self.senders.push(rank);
            }
        }
        Ok(())
    }

    /// The ranks of the present update, and how many are colocated with the leader.
    fn who(&self) -> (Members, usize) {
        let readers = self.active_parts().filter(|(_, part)| *part != Part::Sender);
        let (colocated, others): (Vec<_>, Vec<_>) =
            readers.partition(|(_, part)| *part == Part::Colocated);
        let others = others.into_iter().map(|(rank, _)| rank).collect();
        (Members { senders: self.senders.clone(), others }, colocated.len())
    }

    fn announce_update(
        &self,
        link: &impl SendLink,
        digests: bool,
        ticket: Option<Ticket>,
    ) -> Result<()> {
        let version = self.version;
        let begin = encode(&ToReceiver::Begin(Begin {
            update: self.update,
            version,
            bucket_bytes: link.bucket_bytes(),
            slots: link.slots() as u32,
            digests,
            routed: self.route.is_some(),
            senders: self.senders.clone(),
            ticket,
        }))?;
        self.active().try_for_each(|rank| self.send(rank, begin.clone()))?;
        self.tell_idle(&begin);
        let receivers = self.receivers().collect();
        self.meter.observe(&Progress::Began { version, receivers });
        Ok(())
    }

    /// Why an update failed whose transport has failed: what a transport sees of a rank that died is
    /// that something broke, and the control plane knows which rank it was, a moment later.
    async fn cause_of(&mut self, error: Error) -> Error {
        const MOMENT: Duration = Duration::from_millis(300);
        if error.report().rank.is_some_and(|rank| self.absent.contains(&rank)) {
            return error;
        }
        let until = Instant::now() + MOMENT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(Some(event)) = self.control.recv(left).await else { return error };
            let gone = match &event {
                Event::Left { rank } | Event::Lost { rank, .. } => Some(*rank),
                _ => None,
            };
            let bucket = error.report().bucket.unwrap_or(0);
            // A rank without a part in the update is no cause.
            match self.handle(event, bucket) {
                Err(cause) if gone.is_some() => return cause.with_source(error),
                _ => {}
            }
        }
    }

    fn end(&mut self) {
        self.route = None;
        // Nobody was told of them, and so nobody will release them.
        for bucket in self.outgoing.drain(..) {
            self.slots[bucket.slot].by.clear();
        }
        for (rank, member) in &mut self.members {
            member.active = false;
            for unsent in member.unsent.drain(..) {
                if let Unsent::Bucket(bucket) = unsent {
                    self.slots[bucket.slot].by.remove(rank);
                }
            }
        }
    }

    fn active(&self) -> impl Iterator<Item = Rank> + '_ {
        self.members.iter().filter(|(_, member)| member.active).map(|(rank, _)| *rank)
    }

    /// The rollouts of the present update.
    fn receivers(&self) -> impl Iterator<Item = Rank> + '_ {
        self.active_parts().filter(|(_, part)| part.is_rollout()).map(|(rank, _)| rank)
    }

    /// Those that get buckets in the present update: rollouts and relays.
    fn readers(&self) -> impl Iterator<Item = Rank> + '_ {
        self.active_parts().filter(|(_, part)| *part != Part::Sender).map(|(rank, _)| rank)
    }

    fn active_parts(&self) -> impl Iterator<Item = (Rank, Part)> + '_ {
        let active = self.members.iter().filter(|(_, member)| member.active);
        active.map(|(rank, member)| (*rank, member.part))
    }

    fn broadcast(&mut self, message: &ToReceiver) -> Result<()> {
        let body = Unsent::Other(encode(message)?);
        let ranks: Vec<Rank> = self.active().collect();
        ranks.into_iter().try_for_each(|rank| self.tell(rank, body.clone()))
    }

    /// Tells a rank something of the present update, as soon as it has entered it. It is something
    /// for the rank to do: its deadline begins anew.
    fn tell(&mut self, rank: Rank, message: Unsent) -> Result<()> {
        let Some(member) = self.members.get_mut(&rank) else { return Ok(()) };
        let Some(entry) = &member.entered else {
            member.unsent.push(message);
            return Ok(());
        };
        member.since = Some(Instant::now());
        let body = match message {
            Unsent::Bucket(bucket) => bucket.body(entry.plan)?,
            Unsent::Other(body) => body,
        };
        self.send(rank, body)
    }

    fn send(&self, rank: Rank, body: Bytes) -> Result<()> {
        match self.control.send(rank, body) {
            // The event that says so is on its way, and tells whether the update survives it.
            Err(error) if self.route.is_some() && error.kind() == ErrorKind::PeerLost => Ok(()),
            result => result,
        }
    }

    /// Tells receivers to fetch what they can by now.
    fn route_on(&mut self) -> Result<()> {
        let Some(route) = &mut self.route else { return Ok(()) };
        let mut all = Vec::new();
        while let Some(due) = route.next_due() {
            all.push(due);
        }
        for Due { by, from, bucket } in all {
            let card = match self.members.get(&from).and_then(|member| member.entered.as_ref()) {
                _ if from == Rank::LEADER => self.card.clone(),
                Some(entry) => entry.card.clone(),
                None => continue,
            };
            let fetch = ToReceiver::Fetch { update: self.update, index: bucket, from, card };
            self.tell(by, Unsent::Other(encode(&fetch)?))?;
        }
        Ok(())
    }

    /// Whether a slot may be filled with a bucket; if not, whom that waits for.
    fn is_free(&self, slot: usize, bucket: u64) -> Result<(), Option<Rank>> {
        match &self.route {
            Some(route) if route.may_fill(bucket) => Ok(()),
            Some(_) => Err(self.awaited()),
            None => match self.slots[slot].by.first() {
                None => Ok(()),
                // A bucket that was not announced yet is held by whoever fills it.
                Some(reader) => Err(Some(self.late_sender().unwrap_or(*reader))),
            },
        }
    }

    /// Whether a colocated rank has not released all buckets.
    fn is_read_in_place(&self) -> bool {
        let colocated = |rank| self.members.get(rank).is_some_and(|m| m.part == Part::Colocated);
        self.slots.iter().any(|slot| slot.by.iter().any(colocated))
    }

    /// The trainer that the bucket which is announced next is waited for from.
    fn late_sender(&self) -> Option<Rank> {
        let rank = sender_of(&self.senders, self.outgoing.front()?.index);
        (rank != Rank::LEADER).then_some(rank)
    }

    /// The receiver that the others wait for.
    fn awaited(&self) -> Option<Rank> {
        let late = self.active().find(|rank| !self.has_entered(*rank));
        late.or_else(|| self.late_sender()).or_else(|| self.route.as_ref()?.awaited())
    }

    fn has_entered(&self, rank: Rank) -> bool {
        self.members.get(&rank).is_some_and(|member| member.entered.is_some())
    }

    /// Waits until something is met; `met` says for whom or what until then.
    ///
    /// Only steps of the rank that is waited for, and tasks that it was given meanwhile, begin its
    /// deadline anew: slow is not dead, but others that come and go are no progress. Every rank takes
    /// a finite number of steps in an update, so that every wait ends.
    async fn wait(&mut self, met: impl Fn(&Self) -> Result<(), Awaited>) -> Result<()> {
        let begun = Instant::now();
        loop {
            let Err(Awaited { rank, bucket, operation }) = met(self) else { return Ok(()) };
            let since = match rank {
                Some(rank) => self.members.get(&rank).and_then(|member| member.since),
                None => self.members.values().filter_map(|member| member.since).max(),
            };
            let until = since.map_or(begun, |since| since.max(begun)) + self.deadline;
            match self.event_until(until, rank).await? {
                Some(event) => self.handle(event, bucket.unwrap_or(0))?,
                None => {
                    let late = match rank {
                        Some(rank) if !self.has_entered(rank) => {
                            not_entered(operation, self.deadline, self.control.silence(rank))
                        }
                        _ => too_late(self.deadline, operation),
                    };
                    let late = rank.into_iter().fold(late, Error::rank);
                    return Err(bucket.into_iter().fold(late, Error::bucket));
                }
            }
        }
    }

    /// The next event; `None` if there is none until then. Meanwhile the ranks of the update hear that
    /// this one is alive.
    async fn event_until(
        &mut self,
        until: Instant,
        awaited: Option<Rank>,
    ) -> Result<Option<Event>> {
        loop {
            let left = |until: Instant| until.saturating_duration_since(Instant::now());
            let next = until.min(self.next_alive);
            if let Some(event) = self.control.recv(left(next)).await? {
                return Ok(Some(event));
            }
            if left(self.next_alive).is_zero() {
                self.tell_alive(awaited);
            }
            if left(until).is_zero() {
                return Ok(None);
            }
        }
    }

    /// Tells the ranks that are in the update that this one is alive, and whom it waits for.
    fn tell_alive(&mut self, awaited: Option<Rank>) {
        let interval = ALIVE.min(self.deadline / 4);
        self.next_alive = Instant::now() + interval;
        let Ok(body) = encode(&ToReceiver::Alive { update: self.update, awaited }) else { return };
        for rank in self.active().filter(|rank| self.has_entered(*rank)) {
            if let Err(error) = self.control.send(rank, body.clone()) {
                debug!(%rank, %error, "could not be told that the trainer is alive");
            }
        }
        self.tell_idle(&body);
    }

    /// Awaits work of this rank that has a deadline of its own, and that events do not end.
    async fn alive_while<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            let left = self.next_alive.saturating_duration_since(Instant::now());
            match within(left, "", work.as_mut()).await {
                Ok(done) => return done,
                Err(_) => self.tell_alive(None),
            }
        }
    }

    /// Awaits work of this rank while listening to the others: the first failure anywhere ends it.
    async fn watch<T>(&mut self, bucket: u64, work: impl Future<Output = T>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                event = self.event_until(Instant::now() + LONG, None) => {
                    if let Some(event) = event? {
                        self.handle(event, bucket)?;
                    }
                }
            }
        }
    }

    /// Waits until a slot may be filled with a bucket.
    async fn wait_for_slot(&mut self, slot: usize, bucket: u64) -> Result<()> {
        self.wait(|group| {
            let Err(rank) = group.is_free(slot, bucket) else { return Ok(()) };
            let operation = match group.route {
                Some(_) => "waiting for a receiver to fetch or release a bucket",
                None if group.late_sender().is_some() => FILLING,
                None => "waiting for a receiver to release a bucket",
            };
            let held = match group.route {
                Some(_) => bucket.saturating_sub(group.slots.len() as u64),
                None => group.slots[slot].bucket,
            };
            Err(Awaited { rank, bucket: Some(held), operation })
        })
        .await
    }

    /// Waits until every rank has taken a step.
    async fn wait_for_all(&mut self, step: Step) -> Result<()> {
        let operation = match step {
            Step::Enter => "waiting for every rank to enter the update",
            Step::Join => "waiting for every rank to join the others",
        };
        self.wait(|group| {
            let missing = group.active().find(|rank| match step {
                Step::Enter => !group.has_entered(*rank),
                Step::Join => !group.members.get(rank).is_some_and(|member| member.joined),
            });
            match missing {
                None => Ok(()),
                rank => Err(Awaited { rank, bucket: None, operation }),
            }
        })
        .await
    }

    /// Takes a slot for a bucket, and has it filled if another trainer does that.
    fn begin_bucket(&mut self, bucket: Outgoing) -> Result<()> {
        let Outgoing { index, slot, .. } = bucket;
        match &mut self.route {
            Some(route) => route.filling(index),
            None => {
                let by = self.readers().collect();
                self.slots[slot] = Held { update: self.update, bucket: index, by };
            }
        }
        let (sender, layout) = (sender_of(&self.senders, index), bucket.layout.digest());
        // First, so that the slot is free again if the sender cannot be told.
        self.outgoing.push_back(bucket);
        if sender != Rank::LEADER {
            let update = self.update;
            let fill = ToReceiver::Fill { update, index, slot: slot as u32, layout };
            self.tell(sender, Unsent::Other(encode(&fill)?))?;
        }
        Ok(())
    }

    /// A bucket is filled: it is announced, once all before it are.
    fn filled(&mut self, index: u64, digest: u64) -> Result<()> {
        if let Some(bucket) = self.outgoing.iter_mut().find(|bucket| bucket.index == index) {
            bucket.digest = Some(digest);
        }
        while let Some(digest) = self.outgoing.front().and_then(|bucket| bucket.digest) {
            let Some(bucket) = self.outgoing.pop_front() else { break };
            self.version_digest = digest::chain(self.version_digest, digest);
            let (index, bytes) = (bucket.index, bucket.source_bytes);
            self.announce(bucket, digest)?;
            self.meter.observe(&Progress::Bucket { index, bytes });
        }
        Ok(())
    }

    /// Waits until all buckets are filled.
    async fn wait_until_filled(&mut self) -> Result<()> {
        self.wait(|group| {
            let Some(bucket) = group.outgoing.front().map(|bucket| bucket.index) else {
                return Ok(());
            };
            let rank = Some(sender_of(&group.senders, bucket));
            Err(Awaited { rank, bucket: Some(bucket), operation: FILLING })
        })
        .await
    }

    /// Tells the receivers of a bucket.
    fn announce(&mut self, bucket: Outgoing, digest: u64) -> Result<()> {
        let Outgoing { index, slot, layout, known, .. } = bucket;
        let (short, full) = (OnceLock::new(), OnceLock::new());
        let update = self.update;
        let bucket =
            Arc::new(Announcement { update, index, slot, digest, layout, known, short, full });
        let mut readers: Vec<Rank> = self.readers().collect();
        readers.reverse();
        while let Some(rank) = readers.last() {
            if let Err(error) = self.tell(*rank, Unsent::Bucket(bucket.clone())) {
                // Those that were not told will not release it.
                readers.iter().for_each(|rank| {
                    self.slots[slot].by.remove(rank);
                });
                return Err(error);
            }
            readers.pop();
        }
        if let Some(route) = &mut self.route {
            route.filled(index);
        }
        self.route_on()
    }

    /// Ends the update's data and waits for every receiver's confirmation.
    async fn finish(&mut self, buckets: u64, plan: u64) -> Result<()> {
        let digest = self.version_digest;
        self.broadcast(&ToReceiver::End { update: self.update, buckets, digest, plan })?;
        self.wait(|group| {
            let unconfirmed =
                |(_, member): &(&Rank, &Member)| member.active && member.confirmed.is_none();
            let Some((missing, _)) = group.members.iter().find(unconfirmed) else { return Ok(()) };
            Err(Awaited {
                rank: group.awaited().or(Some(*missing)),
                bucket: Some(buckets.saturating_sub(1)),
                operation: "waiting for a receiver to confirm the version",
            })
        })
        .await
    }

    /// Makes the version active everywhere.
    fn commit(&mut self, digests: bool) -> Result<Vec<ReceiverReport>> {
        // From here on the update has happened: a receiver that cannot be told any more is lost, which
        // the next update will see.
        let body = encode(&ToReceiver::Commit { update: self.update })?;
        self.tell_idle(&body);
        let mut reports = Vec::new();
        for (&rank, member) in self.members.iter_mut().filter(|(_, member)| member.active) {
            if let Err(error) = self.control.send(rank, body.clone()) {
                warn!(%rank, %error, "a receiver left before the commit reached it");
            }
            member.active = false;
            if let Some(mut report) = member.confirmed.take()
                && member.part.is_rollout()
            {
                report.state = VersionState::Active;
                report.digest = report.digest.filter(|_| digests);
                reports.push(report);
            }
            self.meter.observe(&Progress::State { rank, state: VersionState::Active });
        }
        Ok(reports)
    }

    /// Takes in what happened; an error if it ends the present update.
    fn handle(&mut self, event: Event, bucket: u64) -> Result<()> {
        match event {
            Event::Message { from, body } => {
                self.message(from, &body)?;
                self.route_on()
            }
            Event::Joined(peer) => {
                if let Some(part) = (self.newcomers.0)(&peer) {
                    info!(rank = %peer.rank, ?part, "a rank joined; it takes part in the next update");
                    self.absent.remove(&peer.rank);
                    self.admit(peer.rank, part);
                }
                Ok(())
            }
            Event::Left { rank } => {
                let error = Error::new(
                    ErrorKind::PeerLost,
                    "sending weights",
                    "the receiver left the group",
                );
                self.remove(rank, error.rank(rank).bucket(bucket))
            }
            Event::Lost { rank, error } => {
                let error = Error::from(error).recovery(Recovery::Retry);
                self.remove(rank, error.rank(rank).bucket(bucket))
            }
        }
    }

    fn remove(&mut self, rank: Rank, error: Error) -> Result<()> {
        for slot in &mut self.slots {
            slot.by.remove(&rank);
        }
        self.idle.remove(&rank);
        let Some(member) = self.members.remove(&rank) else { return Ok(()) };
        self.absent.insert(rank);
        if !member.active {
            return Ok(());
        }
        self.meter.observe(&Progress::State { rank, state: VersionState::Aborted });
        let Some(route) = &mut self.route else { return Err(error) };
        if let Err(Gap { rank: left, bucket }) = route.remove(rank) {
            let message = format!(
                "rank {rank} was lost, and with it bucket {bucket}, which rank {left} needs and no \
                 other rank has any more"
            );
            return Err(Error::new(ErrorKind::PeerLost, "sending weights", message)
                .rank(rank)
                .bucket(bucket)
                .with_source(error));
        }
        if self.active().next().is_none() {
            return Err(error);
        }
        warn!(%rank, %error, "a receiver was lost; the update goes on without it");
        self.route_on()
    }

    /// Takes in what a rank says; its steps begin its deadline anew.
    fn message(&mut self, from: Rank, body: &[u8]) -> Result<()> {
        // A rank without a part in updates can neither help nor disturb them.
        let Some(active) = self.members.get(&from).map(|member| member.active) else {
            debug!(rank = %from, "a message of a rank without a part in updates");
            return Ok(());
        };
        let message = match decode::<ToSender>(body) {
            Ok(message) => message,
            Err(error) => {
                self.cut(from, &error.rank(from));
                return Ok(());
            }
        };
        if self.take(from, active, message)?
            && let Some(member) = self.members.get_mut(&from)
        {
            member.since = Some(Instant::now());
        }
        Ok(())
    }

    /// Ends the connection to a member that does not keep to the protocol: nothing that it says can be relied on.
    /// That it is lost, for this reason, is an event as of any other rank. It ends the update, or leaves the rank out
    /// where that can be.
    fn cut(&self, rank: Rank, reason: &Error) {
        warn!(%rank, error = %reason, "a rank does not keep to the protocol: its connection is ended");
        if let Err(error) = self.control.cut(rank, reason) {
            debug!(%rank, %error, "it is gone already");
        }
    }

    /// Takes in a message of a member; whether it is a step of the present update.
    fn take(&mut self, from: Rank, active: bool, message: ToSender) -> Result<bool> {
        let present = self.update;
        // A late release of an aborted update frees its slot all the same.
        if let ToSender::Release { update, index } = message {
            return Ok(self.released(from, update, index));
        }
        let Some(member) = self.members.get_mut(&from).filter(|_| active) else { return Ok(false) };
        match message {
            ToSender::Entered { update, card, plan, held } if update == present => {
                if member.entered.is_some() {
                    return Ok(false);
                }
                member.entered = Some(Entry { plan, card });
                let unsent = std::mem::take(&mut member.unsent);
                self.meter.observe(&Progress::State { rank: from, state: VersionState::Staging });
                // It reads what it says that it reads, whatever was lost on the way; and what it
                // has not been told of, which follows now.
                for slot in &mut self.slots {
                    if slot.update != present && !held.contains(&(slot.update, slot.bucket)) {
                        slot.by.remove(&from);
                    }
                }
                unsent.into_iter().try_for_each(|unsent| self.tell(from, unsent))?;
                Ok(true)
            }
            ToSender::Joined { update } if update == present => {
                Ok(!std::mem::replace(&mut member.joined, true))
            }
            ToSender::Fetched { update, index } if update == present => {
                Ok(self.route.as_mut().is_some_and(|route| route.arrived(from, index)))
            }
            ToSender::Missed { update, index, from: source, error } if update == present => {
                warn!(rank = %from, %source, bucket = index, %error, "a fetch failed");
                let Some(route) = &mut self.route else { return Ok(false) };
                if route.missed(from, source).is_err() {
                    return Err(Error::from(error).rank(source).bucket(index));
                }
                Ok(false)
            }
            ToSender::Filled { update, index, digest } if update == present => {
                let expected = self.outgoing.iter().any(|b| b.index == index && b.digest.is_none());
                if !expected || sender_of(&self.senders, index) != from {
                    let message = format!("it was not asked to fill bucket {index}");
                    self.cut(from, &Error::new(ErrorKind::Protocol, FILLING, message).rank(from));
                    return Ok(false);
                }
                self.filled(index, digest)?;
                Ok(true)
            }
            ToSender::Confirm { update, digest, seconds, notes } if update == present => {
                let report = ReceiverReport {
                    rank: from,
                    state: VersionState::Ready,
                    seconds,
                    digest: Some(digest),
                    notes: serde_json::from_str(&notes).unwrap_or_default(),
                };
                let first = member.confirmed.replace(report).is_none();
                self.meter.observe(&Progress::State { rank: from, state: VersionState::Ready });
                Ok(first)
            }
            ToSender::Failed { update, error } if update == present => {
                member.active = false;
                self.meter.observe(&Progress::State { rank: from, state: VersionState::Aborted });
                Err(Error::from(error).rank(from))
            }
            // Of another update.
            _ => Ok(false),
        }
    }

    /// A rank does not read a bucket any more; whether it did.
    fn released(&mut self, rank: Rank, update: u64, bucket: u64) -> bool {
        if let Some(route) = &mut self.route {
            return update == self.update && route.released(rank, bucket);
        }
        let mut slots = self.slots.iter_mut();
        let slot = slots.find(|slot| (slot.update, slot.bucket) == (update, bucket));
        slot.is_some_and(|slot| slot.by.remove(&rank))
    }
}

impl<L: SendLink> Ends for Sender<L> {
    fn end(&mut self, committed: bool) {
        self.link.end(committed);
    }
}

/// A side of the protocol whose link is told of the end of an update.
pub(super) trait Ends {
    fn end(&mut self, committed: bool);
}

/// Tells a link that an update is over, also when the future that sends it is dropped.
pub(super) struct Ending<'a, S: Ends> {
    pub(super) sender: &'a mut S,
    committed: bool,
}

impl<'a, S: Ends> Ending<'a, S> {
    pub(super) fn new(sender: &'a mut S) -> Self {
        Self { sender, committed: false }
    }

    pub(super) fn end(mut self, committed: bool) {
        self.committed = committed;
    }
}

impl<S: Ends> Drop for Ending<'_, S> {
    fn drop(&mut self) {
        self.sender.end(self.committed);
    }
}

/// Tells the receivers that an update is over, however it ends.
struct AbortGuard {
    control: Arc<dyn Control>,
    meter: Meter,
    abort: Option<(u64, Version, Vec<Rank>)>,
}

impl AbortGuard {
    fn arm(&mut self, group: &Group) {
        let ranks = group.active().chain(group.idle.iter().copied()).collect();
        self.abort = Some((group.update, group.version, ranks));
    }

    fn disarm(&mut self) {
        self.abort = None;
    }

    fn abort_with(&mut self, error: &Error) {
        let Some((update, _, receivers)) = self.abort.take() else { return };
        self.meter.aborted(&receivers);
        let error = ErrorReport::from(error);
        match encode(&ToReceiver::Abort { update, error }) {
            Ok(body) => {
                for rank in receivers {
                    // A receiver that is gone needs no telling.
                    if let Err(error) = self.control.send(rank, body.clone()) {
                        debug!(%rank, %error, "could not be told of the abort");
                    }
                }
            }
            Err(error) => warn!(%error, "the abort could not be written"),
        }
    }
}

impl Drop for AbortGuard {
    fn drop(&mut self) {
        if let Some((_, version, _)) = &self.abort {
            let words = "the trainer dropped the update";
            let error = Error::new(ErrorKind::Aborted, "sending weights", words).version(*version);
            self.abort_with(&error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_has_not_entered_is_told_apart_from_one_that_is_stopped() {
        let words = |silence| not_entered("waiting", Duration::from_secs(5), silence).to_string();
        let (lives, silent) = (words(Some(Duration::ZERO)), words(Some(Duration::from_secs(3))));
        assert!(lives.contains("receive_weights") && !lives.contains("stopped"), "{lives}");
        assert!(silent.contains("for 3.0 s: its process is stopped"), "{silent}");
        assert!(!silent.contains("receive_weights"), "{silent}");
    }
}

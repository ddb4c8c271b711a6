//! The trainer's side of an update.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use tracing::{Instrument, debug, debug_span, info, warn};

use super::message::{Layout, ToReceiver, ToSender, decode, encode};
use super::route::{Due, Gap, Route, Topology};
use super::{arrived_event, next_event, within};
use crate::control::{ControlPlane, Event, Role};
use crate::memory::Job;
use crate::observe::{Observer as _, Progress};
use crate::plan::{BucketLayout, BucketPlanner, Piece, Place, Plan};
use crate::report::{ReceiverReport, SendReport, StageTimes, TensorCounts, VersionState};
use crate::telemetry::Meter;
use crate::{
    EngineContext, Error, ErrorKind, ErrorReport, Rank, Recovery, Result, Version, Weight,
    WeightStream, digest,
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
    /// Called for a slot only when all receivers have released it.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, work on the bucket may go on; a later call for the same slot
    /// waits for its end.
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
}

/// A wait for events that something else ends.
const LONG: Duration = Duration::from_secs(3600);

/// The trainer's side of the protocol, over a transport's link.
#[derive(Debug)]
pub struct Sender<L> {
    link: L,
    group: Group,
    plan: Plan,
    digests: bool,
    deadline: Duration,
    meter: Meter,
}

/// The receivers as the trainer sees them.
#[derive(Debug)]
struct Group {
    control: ControlPlane,
    members: BTreeMap<Rank, Member>,
    absent: BTreeSet<Rank>,
    /// Counts updates; tags their messages.
    update: u64,
    version: Version,
    begun: Instant,
    /// Who still reads which slot, and the bucket that is in it. Unused with a route.
    slots: Vec<Held>,
    /// The way of the present update's buckets, if receivers fetch them.
    route: Option<Route>,
    /// How receivers fetch from this rank.
    card: Bytes,
    meter: Meter,
}

#[derive(Debug, Default)]
struct Member {
    /// The digest of the plan that the receiver knows.
    plan: Option<u64>,
    /// The update that the receiver is in.
    entered: Option<u64>,
    /// Its confirmation of the present update.
    confirmed: Option<ReceiverReport>,
    /// Whether it takes part in the present update.
    active: bool,
    /// How others fetch from it.
    card: Bytes,
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
        control: ControlPlane,
        receivers: impl IntoIterator<Item = Rank>,
    ) -> Self {
        let slots = (0..link.slots()).map(|_| Held::default()).collect();
        let meter = Meter::new(control.rank(), context.observer.clone());
        Self {
            group: Group {
                control,
                members: receivers.into_iter().map(|rank| (rank, Member::default())).collect(),
                absent: BTreeSet::new(),
                update: 0,
                version: Version(0),
                begun: Instant::now(),
                slots,
                route: None,
                card: link.card(),
                meter: meter.clone(),
            },
            link,
            plan: Plan::default(),
            digests: context.config.digests,
            deadline: context.deadline(),
            meter,
        }
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
        let receivers = self.group.active().count();
        self.group.route = self
            .link
            .topology(receivers, self.plan.buckets.len())
            .map(|topology| Route::new(topology, self.link.slots() as u64, self.group.active()));
        // Until it is disarmed, whatever ends this function ends the update on every rank.
        let (control, meter) = (self.group.control.clone(), self.meter.clone());
        let mut guard = AbortGuard { control, meter, abort: None };
        guard.arm(&self.group);
        let result = self.run(weights).await;
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

    async fn run(&mut self, mut weights: WeightStream<'_>) -> Result<SendReport> {
        self.group.announce_update(self.link.bucket_bytes(), self.digests)?;
        let mut stages = StageTimes::default();
        let mut collector = Collector::new(&self.plan, self.link.bucket_bytes())?;
        let mut layouts: Vec<Arc<BucketLayout>> = Vec::new();
        let mut version_digest = 0;

        let started = Instant::now();
        let mut next = {
            let bucket = collector
                .next_bucket(&mut weights, self.deadline)
                .instrument(debug_span!("collect", bucket = 0));
            self.group.watch(0, bucket).await??
        };
        stages.source += started.elapsed();
        while let Some(bucket) = next {
            let index = layouts.len() as u64;
            let slot = layouts.len() % self.link.slots();
            let released = Instant::now();
            self.group.wait_for_slot(slot, index, self.deadline).await?;
            stages.release += released.elapsed();

            if let Some(route) = &mut self.group.route {
                route.filling(index);
            }
            // The next bucket is collected from the trainer's stream while this one is encoded.
            let Bucket { jobs, layout, known, source_bytes } = bucket;
            let encoded = Instant::now();
            let mut collected = Duration::ZERO;
            let span = debug_span!("encode", bucket = index);
            let fill = self.link.fill(slot, jobs, self.digests).instrument(span);
            let collect = async {
                let started = Instant::now();
                let bucket = collector.next_bucket(&mut weights, self.deadline).await;
                collected = started.elapsed();
                bucket
            }
            .instrument(debug_span!("collect", bucket = index + 1));
            let both = self.group.watch(index, futures::future::try_join(fill, collect)).await?;
            let (sum, following) = both.map_err(|error| error.bucket(index))?;
            next = following;
            let both = encoded.elapsed();
            stages.encode += both;
            stages.source += collected.min(both);

            let filled = layout.filled();
            let published = Instant::now();
            self.link
                .publish(slot, filled)
                .instrument(debug_span!("publish", bucket = index))
                .await
                .map_err(|error| error.bucket(index))?;
            stages.publish += published.elapsed();
            let digest = digest::finish(sum, filled);
            version_digest = digest::chain(version_digest, digest);
            self.group.announce(slot, index, digest, &layout, known)?;
            self.meter.observe(&Progress::Bucket { index, bytes: source_bytes });
            layouts.push(layout);
        }

        let plan_reused = collector.reused(layouts.len());
        let counts = collector.counts;
        let plan = Plan { buckets: layouts };
        let buckets = plan.buckets.len() as u64;
        let plan_digest = plan.digest();
        self.plan = plan;
        let confirming = Instant::now();
        self.group
            .finish(buckets, version_digest, plan_digest, self.deadline)
            .instrument(debug_span!("confirm"))
            .await?;
        stages.confirm = confirming.elapsed();
        let elapsed = self.group.begun.elapsed();
        let receivers = self.group.commit(plan_digest, self.digests)?;
        Ok(SendReport {
            version: self.group.version,
            counts,
            buckets,
            plan_reused,
            elapsed,
            stages,
            digest: self.digests.then_some(version_digest),
            receivers,
            absent: self.group.absent.iter().copied().collect(),
        })
    }
}

impl Group {
    /// Starts an update with the receivers that are there.
    async fn begin(&mut self, version: Version) -> Result<()> {
        self.end();
        while let Some(event) = arrived_event(&self.control).await? {
            // Losses between updates are no failure: the rank takes no part in this one.
            if let Err(error) = self.handle(event, 0) {
                debug!(%error, "before the update");
            }
        }
        if self.members.is_empty() {
            return Err(Error::new(
                ErrorKind::PeerLost,
                "beginning an update",
                "no receiver is left in the group",
            )
            .recovery(Recovery::Reconnect)
            .version(version));
        }
        self.update += 1;
        self.version = version;
        self.begun = Instant::now();
        for member in self.members.values_mut() {
            member.active = true;
            member.confirmed = None;
        }
        Ok(())
    }

    fn announce_update(&self, bucket_bytes: u64, digests: bool) -> Result<()> {
        let (update, version) = (self.update, self.version);
        let routed = self.route.is_some();
        self.broadcast(&ToReceiver::Begin { update, version, bucket_bytes, digests, routed })?;
        let receivers = self.active().collect();
        self.meter.observe(&Progress::Began { version, receivers });
        Ok(())
    }

    fn end(&mut self) {
        self.route = None;
        for member in self.members.values_mut() {
            member.active = false;
        }
    }

    fn active(&self) -> impl Iterator<Item = Rank> + '_ {
        self.members.iter().filter(|(_, member)| member.active).map(|(rank, _)| *rank)
    }

    fn broadcast(&self, message: &ToReceiver) -> Result<()> {
        let body = encode(message)?;
        self.active().try_for_each(|rank| self.tell(rank, body.clone()))
    }

    fn tell(&self, rank: Rank, body: Bytes) -> Result<()> {
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
            let card = match self.members.get(&from) {
                _ if from == Rank::LEADER => self.card.clone(),
                Some(member) => member.card.clone(),
                None => continue,
            };
            let fetch = ToReceiver::Fetch { update: self.update, index: bucket, from, card };
            self.tell(by, encode(&fetch)?)?;
        }
        Ok(())
    }

    /// Whether a slot may be filled with a bucket; if not, whom that waits for.
    fn is_free(&self, slot: usize, bucket: u64) -> Result<(), Option<Rank>> {
        match &self.route {
            Some(route) if route.may_fill(bucket) => Ok(()),
            Some(_) => Err(self.awaited()),
            None => self.slots[slot].by.first().map_or(Ok(()), |rank| Err(Some(*rank))),
        }
    }

    /// The receiver that the others wait for.
    fn awaited(&self) -> Option<Rank> {
        let late = self.active().find(|rank| !self.has_entered(*rank));
        late.or_else(|| self.route.as_ref()?.awaited())
    }

    fn has_entered(&self, rank: Rank) -> bool {
        self.members.get(&rank).is_some_and(|member| member.entered >= Some(self.update))
    }

    /// Awaits work of this rank while listening to the others: the first failure anywhere ends it.
    async fn watch<T>(&mut self, bucket: u64, work: impl Future<Output = T>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                event = self.control.recv(LONG) => {
                    if let Some(event) = event? {
                        self.handle(event, bucket)?;
                    }
                }
            }
        }
    }

    /// Waits until a slot may be filled with a bucket.
    async fn wait_for_slot(&mut self, slot: usize, bucket: u64, deadline: Duration) -> Result<()> {
        // The deadline starts anew with every event: slow is not dead.
        while let Err(rank) = self.is_free(slot, bucket) {
            let operation = match self.route {
                Some(_) => "waiting for a receiver to fetch or release a bucket",
                None => "waiting for a receiver to release a bucket",
            };
            match next_event(&self.control, deadline, operation).await {
                Ok(event) => self.handle(event, bucket)?,
                Err(error) if error.kind() != ErrorKind::Timeout => return Err(error),
                Err(mut error) => {
                    if rank.is_some_and(|rank| !self.has_entered(rank)) {
                        let message = format!(
                            "nothing within {:.1} s: the receiver has not called receive_weights",
                            deadline.as_secs_f64()
                        );
                        error = Error::new(ErrorKind::Timeout, operation, message);
                    }
                    let held = match self.route {
                        Some(_) => bucket.saturating_sub(self.slots.len() as u64),
                        None => self.slots[slot].bucket,
                    };
                    return Err(rank.into_iter().fold(error, Error::rank).bucket(held));
                }
            }
        }
        Ok(())
    }

    /// Tells the receivers of a bucket.
    fn announce(
        &mut self,
        slot: usize,
        index: u64,
        digest: u64,
        layout: &BucketLayout,
        known: Option<u64>,
    ) -> Result<()> {
        let message = |layout| {
            let (update, slot) = (self.update, slot as u32);
            encode(&ToReceiver::Bucket { update, index, slot, digest, layout })
        };
        let mut short: Option<Bytes> = None;
        let mut full: Option<Bytes> = None;
        let active: Vec<Rank> = self.active().collect();
        for &rank in &active {
            // A receiver that joined later does not know the plan that the others know.
            let knows = known.is_some()
                && self.members.get(&rank).is_some_and(|member| member.plan == known);
            let cached = if knows { &mut short } else { &mut full };
            let body = match cached {
                Some(body) => body.clone(),
                None => {
                    let layout = if knows {
                        Layout::Known { digest: layout.digest() }
                    } else {
                        Layout::Explicit { pieces: layout.pieces().to_vec() }
                    };
                    cached.insert(message(layout)?).clone()
                }
            };
            self.tell(rank, body)?;
        }
        match &mut self.route {
            Some(route) => route.filled(index),
            None => {
                let by = active.into_iter().collect();
                self.slots[slot] = Held { update: self.update, bucket: index, by };
            }
        }
        self.route_on()
    }

    /// Ends the update's data and waits for every receiver's confirmation.
    async fn finish(
        &mut self,
        buckets: u64,
        digest: u64,
        plan: u64,
        deadline: Duration,
    ) -> Result<()> {
        self.broadcast(&ToReceiver::End { update: self.update, buckets, digest, plan })?;
        loop {
            let missing = self
                .members
                .iter()
                .find(|(_, member)| member.active && member.confirmed.is_none())
                .map(|(rank, _)| *rank);
            let Some(missing) = missing else { return Ok(()) };
            let rank = self.awaited().unwrap_or(missing);
            let operation = "waiting for a receiver to confirm the version";
            let event = next_event(&self.control, deadline, operation)
                .await
                .map_err(|error| error.rank(rank).bucket(buckets.saturating_sub(1)))?;
            self.handle(event, buckets.saturating_sub(1))?;
        }
    }

    /// Makes the version active everywhere.
    fn commit(&mut self, plan: u64, digests: bool) -> Result<Vec<ReceiverReport>> {
        // From here on the update has happened: a receiver that cannot be told any more is lost, which
        // the next update will see.
        let body = encode(&ToReceiver::Commit { update: self.update })?;
        let mut reports = Vec::new();
        for (&rank, member) in self.members.iter_mut().filter(|(_, member)| member.active) {
            if let Err(error) = self.control.send(rank, body.clone()) {
                warn!(%rank, %error, "a receiver left before the commit reached it");
            }
            member.active = false;
            member.plan = Some(plan);
            if let Some(mut report) = member.confirmed.take() {
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
                if peer.role == Role::Rollout {
                    info!(rank = %peer.rank, "a rollout joined; it takes part in the next update");
                    self.absent.remove(&peer.rank);
                    self.members.insert(peer.rank, Member::default());
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

    fn message(&mut self, from: Rank, body: &[u8]) -> Result<()> {
        let message = decode::<ToSender>(body).map_err(|error| error.rank(from))?;
        let present = self.update;
        let Some(member) = self.members.get_mut(&from) else { return Ok(()) };
        match message {
            ToSender::Entered { update, card } => {
                member.entered = Some(update);
                member.card = card;
                if update == present {
                    self.meter
                        .observe(&Progress::State { rank: from, state: VersionState::Staging });
                }
            }
            ToSender::Fetched { update, index } if update == present => {
                if let Some(route) = &mut self.route {
                    route.arrived(from, index);
                }
            }
            ToSender::Missed { update, index, from: source, error } if update == present => {
                warn!(rank = %from, %source, bucket = index, %error, "a fetch failed");
                let Some(route) = &mut self.route else { return Ok(()) };
                if route.missed(from, source).is_err() {
                    return Err(Error::from(error).rank(source).bucket(index));
                }
            }
            ToSender::Release { update, index } if self.route.is_some() => {
                if let Some(route) = self.route.as_mut().filter(|_| update == present) {
                    route.released(from, index);
                }
            }
            ToSender::Release { update, index } => {
                // A late release of an aborted update frees its slot all the same.
                for slot in &mut self.slots {
                    if slot.update == update && slot.bucket == index {
                        slot.by.remove(&from);
                    }
                }
            }
            ToSender::Confirm { update, digest, seconds, notes } if update == present => {
                if !member.active {
                    return Ok(());
                }
                member.confirmed = Some(ReceiverReport {
                    rank: from,
                    state: VersionState::Ready,
                    seconds,
                    digest: Some(digest),
                    notes: serde_json::from_str(&notes).unwrap_or_default(),
                });
                self.meter.observe(&Progress::State { rank: from, state: VersionState::Ready });
            }
            ToSender::Failed { update, error } if update == present && member.active => {
                member.active = false;
                self.meter.observe(&Progress::State { rank: from, state: VersionState::Aborted });
                return Err(Error::from(error).rank(from));
            }
            ToSender::Confirm { .. }
            | ToSender::Failed { .. }
            | ToSender::Fetched { .. }
            | ToSender::Missed { .. } => {}
        }
        Ok(())
    }
}

/// Tells the receivers that an update is over, however it ends.
struct AbortGuard {
    control: ControlPlane,
    meter: Meter,
    abort: Option<(u64, Version, Vec<Rank>)>,
}

impl AbortGuard {
    fn arm(&mut self, group: &Group) {
        self.abort = Some((group.update, group.version, group.active().collect()));
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

/// The weights of one bucket, collected from the trainer's stream.
struct Bucket {
    jobs: Vec<Job>,
    layout: Arc<BucketLayout>,
    /// The digest of the plan in which the layout stands at this bucket's place.
    known: Option<u64>,
    source_bytes: u64,
}

/// Packs the stream into buckets, following the last update's plan as long as it fits.
struct Collector {
    planner: BucketPlanner,
    last: Plan,
    last_digest: Option<u64>,
    buckets: usize,
    /// The weight that the last bucket had no room for, or no room for all of.
    pending: Option<(Weight, u64)>,
    /// All names so far, unless they are those of the last plan, which has no name twice.
    names: Option<HashSet<Arc<str>>>,
    differs: bool,
    counts: TensorCounts,
}

impl Collector {
    fn new(last: &Plan, bucket_bytes: u64) -> Result<Self> {
        let last = last.clone();
        let last_digest = (!last.buckets.is_empty()).then(|| last.digest());
        Ok(Self {
            planner: BucketPlanner::new(bucket_bytes)?,
            names: last_digest.is_none().then(HashSet::new),
            last,
            last_digest,
            buckets: 0,
            pending: None,
            differs: false,
            counts: TensorCounts::default(),
        })
    }

    /// Whether all buckets were those of the last plan.
    fn reused(&self, buckets: usize) -> bool {
        !self.differs && self.last_digest.is_some() && self.last.buckets.len() == buckets
    }

    /// The weights of the next bucket, or `None` at the end of the stream.
    async fn next_bucket(
        &mut self,
        weights: &mut WeightStream<'_>,
        deadline: Duration,
    ) -> Result<Option<Bucket>> {
        let mut jobs: Vec<Job> = Vec::new();
        let mut source_bytes = 0;
        loop {
            let (weight, mut start) = match self.pending.take() {
                Some(pending) => pending,
                None => {
                    let operation = "waiting for the trainer's next weight";
                    // A timer for each of eighteen thousand weights that are there would be felt.
                    let weight = match weights.next().now_or_never() {
                        Some(weight) => weight,
                        None => within(deadline, operation, weights.next())
                            .await
                            .map_err(|error| error.bucket(self.buckets as u64))?,
                    };
                    match weight.transpose()? {
                        Some(weight) => {
                            self.admit(&weight, jobs.len())?;
                            self.counts.add(&weight);
                            (weight, 0)
                        }
                        None if jobs.is_empty() => return Ok(None),
                        None => break,
                    }
                }
            };
            let total = weight.byte_len();
            let name = weight.name().len();
            match self.planner.place(name, total, total - start, weight.granule()) {
                Some(Place { offset, len }) => {
                    source_bytes += share(weight.source_bytes(), len, total);
                    let job = Job { weight: weight.clone(), start, len, offset };
                    self.compare(&job, jobs.len());
                    jobs.push(job);
                    start += len;
                    if start < total {
                        self.pending = Some((weight, start));
                        break;
                    }
                }
                None => {
                    self.pending = Some((weight, start));
                    break;
                }
            }
        }
        self.planner.close();
        let known = match self.last.buckets.get(self.buckets) {
            Some(layout) if !self.differs && layout.pieces().len() == jobs.len() => {
                Some(layout.clone())
            }
            _ => None,
        };
        if known.is_none() {
            // What follows stands at another place than in the last plan.
            self.diverge(jobs.len());
            if let (Some(names), Some((weight, _))) = (&mut self.names, &self.pending) {
                names.insert(weight.meta.name.clone());
            }
        }
        self.buckets += 1;
        let plan = known.is_some().then_some(self.last_digest).flatten();
        let layout = known.unwrap_or_else(|| {
            let pieces = jobs.iter().map(|job| Piece {
                meta: job.weight.meta().clone(),
                start: job.start,
                len: job.len,
                offset: job.offset,
            });
            Arc::new(BucketLayout::new(pieces.collect()))
        });
        Ok(Some(Bucket { jobs, layout, known: plan, source_bytes }))
    }

    /// Checks that a weight's name is new.
    fn admit(&mut self, weight: &Weight, placed: usize) -> Result<()> {
        if self.names.is_none() {
            let expected = self.last.buckets.get(self.buckets).and_then(|bucket| {
                bucket.pieces().get(placed).or_else(|| {
                    self.last.buckets.get(self.buckets + 1).and_then(|next| next.pieces().first())
                })
            });
            if expected.is_some_and(|piece| piece.meta.name == weight.meta.name) {
                return Ok(());
            }
            self.diverge(placed);
        }
        let Some(names) = &mut self.names else { return Ok(()) };
        if names.insert(weight.meta.name.clone()) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Weight,
            "reading the trainer's weights",
            "the stream has a weight of this name already",
        )
        .tensor(weight.name()))
    }

    fn compare(&mut self, job: &Job, placed: usize) {
        if self.differs {
            return;
        }
        let same = self
            .last
            .buckets
            .get(self.buckets)
            .and_then(|bucket| bucket.pieces().get(placed))
            .is_some_and(|piece| {
                (piece.start, piece.len, piece.offset) == (job.start, job.len, job.offset)
                    && piece.meta == *job.weight.meta()
            });
        if !same {
            self.diverge(placed);
            if let Some(names) = &mut self.names {
                names.insert(job.weight.meta.name.clone());
            }
        }
    }

    /// Leaves the last plan: from here on every name is compared with all before it.
    fn diverge(&mut self, placed: usize) {
        self.differs = true;
        if self.names.is_some() {
            return;
        }
        let before = self.last.buckets.iter().take(self.buckets);
        let mut names: HashSet<Arc<str>> =
            before.flat_map(|bucket| bucket.pieces()).map(|p| p.meta.name.clone()).collect();
        if let Some(bucket) = self.last.buckets.get(self.buckets) {
            names.extend(bucket.pieces().iter().take(placed).map(|p| p.meta.name.clone()));
        }
        self.names = Some(names);
    }
}

/// The part of a weight's source bytes that belongs to `len` of its `total` bytes.
fn share(source: u64, len: u64, total: u64) -> u64 {
    if total == 0 {
        return source;
    }
    (u128::from(source) * u128::from(len) / u128::from(total)) as u64
}

//! The loops that drive the state machines of trainers: the leader, and the other trainers that send. They make no
//! decisions.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::BoxFuture;
use tracing::{Instrument, debug, debug_span, info, warn};

use super::collect::{Bucket, Collector};
use super::leader::{self, Leader};
use super::link::{Part, SendLink};
use super::secondary::{self, Secondary};
use super::work::{Act, Collected, Done, Machine};
use super::{LONG, arrived_event};
use engine_core::SendReport;
use engine_core::control::{Control, Peer, Role, Said};
use engine_core::memory::Job;
use engine_core::observe::Observer as _;
use engine_core::plan::{BucketKind, BucketPlanner};
use engine_core::telemetry::Meter;
use engine_core::{
    Bases, CheckpointEngine, EngineContext, Error, ErrorKind, Parts, Rank, Result, TrainerEngine,
    Version, WeightStream, no_copies,
};

/// How long a trainer that leaves the group waits for rollouts to release its buckets before it frees them.
const CLOSING: Duration = Duration::from_secs(2);

/// The leader's side of the protocol, over a transport's link.
#[derive(Debug)]
pub struct Sender<L> {
    link: L,
    leader: Box<Leader>,
    control: Arc<dyn Control>,
    deadline: Duration,
    meter: Meter,
    /// Tells a layer in front of this engine which versions the rollouts have.
    bases: Bases,
    parts: Parts,
}

impl<L: SendLink> Sender<L> {
    /// The leader of a group with these receivers.
    pub fn new(
        link: L,
        context: &EngineContext,
        control: Arc<dyn Control>,
        receivers: impl IntoIterator<Item = Rank>,
    ) -> Self {
        // Lists do not travel, so there is nothing to verify.
        let digests = context.config.digests && link.bucket_kind() == BucketKind::Buffer;
        let parts = parts_of(context);
        let settings = leader::Settings {
            deadline: context.deadline(),
            slots: link.slots(),
            bucket_bytes: link.bucket_bytes(),
            digests,
            card: link.card(),
            asks_bases: context.bases.is_wanted(),
            needs_receivers: link.needs_receivers(),
            parts: parts.clone(),
            keeps_all: link.keeps_all(),
        };
        let newcomers = |peer: &Peer| (peer.role == Role::Rollout).then_some(Part::Receiver);
        let heartbeats = control.clone();
        let silence = move |rank| heartbeats.silence(rank);
        let mut leader = Leader::new(settings, Box::new(newcomers), Box::new(silence));
        for rank in receivers {
            leader.admit(rank, Part::Receiver);
        }
        let meter = Meter::new(control.rank(), context.observer.clone());
        let leader = Box::new(leader);
        let (deadline, bases) = (context.deadline(), context.bases.clone());
        Self { link, leader, control, deadline, meter, bases, parts }
    }

    /// Sets the part of each rank that is not a plain receiver, and the parts of ranks that join later. A newcomer for
    /// which `newcomers` returns `None` takes no part in updates.
    #[must_use]
    pub fn with_parts(
        mut self,
        parts: impl IntoIterator<Item = (Rank, Part)>,
        newcomers: impl Fn(&Peer) -> Option<Part> + Send + Sync + 'static,
    ) -> Self {
        self.leader.set_newcomers(Box::new(newcomers));
        for (rank, part) in parts {
            self.leader.admit(rank, part);
        }
        self
    }

    /// Sets the host of each rank, this one included, for [`Topology::Fastest`]. Ranks of one host have the same name
    /// here. Ranks that join later have their host in their metadata.
    ///
    /// [`Topology::Fastest`]: super::Topology::Fastest
    #[must_use]
    pub fn with_hosts<'a>(mut self, hosts: impl IntoIterator<Item = (Rank, &'a str)>) -> Self {
        for (rank, host) in hosts {
            self.leader.locate(rank, host);
        }
        self
    }

    /// Waits at most `limit` until colocated ranks have released all buckets, and returns whether they have. Called
    /// after the last update, before the slots are freed.
    async fn wait_until_released(&mut self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while self.leader.is_read_in_place() {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(Some(event)) = self.control.recv(left).await else { return false };
            self.leader.event(event, Instant::now());
            flush(&mut *self.leader, &*self.control, &self.meter);
        }
        true
    }
}

#[async_trait]
impl<L: SendLink> CheckpointEngine for Sender<L> {
    async fn finalize(mut self: Box<Self>) -> Result<()> {
        let limit = self.deadline.min(CLOSING);
        if !self.wait_until_released(limit).await {
            warn!("colocated rollouts hold buckets of the last update, which are gone now");
        }
        self.link.close(limit).await;
        Ok(())
    }
}

#[async_trait]
impl<L: SendLink> TrainerEngine for Sender<L> {
    #[tracing::instrument(name = "send", skip_all, fields(version = %version))]
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let Self { link, leader, control, deadline, meter, bases, parts } = self;
        let control: &dyn Control = &**control;
        // A rank that was lost between updates fails nothing: it takes no part in this update.
        while let Some(event) = arrived_event(control).await? {
            leader.event(event, Instant::now());
            flush(&mut **leader, control, meter);
        }
        let buckets = leader.plan().buckets.len();
        let topology = link.topology(leader.rollouts(), buckets);
        let collector = Collector::new(leader.plan(), planner(link)?, parts.clone());
        leader.begin(control.next_update(), version, topology, Instant::now())?;
        let work = Trainer { control, meter, deadline: *deadline, bases: Some(bases) };
        let sent = work.update(&mut **leader, link, collector, weights).await;
        let report = sent.inspect_err(|error| warn!(%error, "update aborted"))?;
        info!(
            tensors = report.counts.tensors,
            buckets = report.buckets,
            gb_per_s = report.gb_per_s(),
            "update committed"
        );
        Ok(report)
    }

    async fn send_part(&mut self, _: WeightStream<'_>, _: Version) -> Result<SendReport> {
        Err(no_copies("sending a part of a version"))
    }

    async fn attest(&mut self) -> Result<SendReport> {
        Err(no_copies("attesting a version"))
    }
}

/// A sending trainer other than the leader: its side of the protocol, over a transport's link.
///
/// Its stream must have the same weights as the leader's, in the same order. It sends a part of the buckets of the
/// leader's next update, which must have the same version. A different stream is a `Mismatch`. The report counts the
/// weights of the whole stream. It lists no receivers, because they report to the leader.
#[derive(Debug)]
pub struct CoSender<L> {
    link: L,
    secondary: Box<Secondary>,
    control: Arc<dyn Control>,
    deadline: Duration,
    meter: Meter,
}

impl<L: SendLink> CoSender<L> {
    /// A sender in a group whose leader gave this rank [`Part::Sender`].
    pub fn new(link: L, context: &EngineContext, control: Arc<dyn Control>) -> Self {
        let meter = Meter::new(control.rank(), context.observer.clone());
        let deadline = context.deadline();
        let settings = secondary::Settings {
            rank: control.rank(),
            deadline,
            slots: link.slots(),
            bucket_bytes: link.bucket_bytes(),
            card: link.card(),
        };
        Self {
            link,
            secondary: Box::new(Secondary::new(settings, control.updates())),
            control,
            deadline,
            meter,
        }
    }
}

#[async_trait]
impl<L: SendLink> CheckpointEngine for CoSender<L> {
    async fn finalize(mut self: Box<Self>) -> Result<()> {
        self.link.close(self.deadline.min(CLOSING)).await;
        Ok(())
    }
}

#[async_trait]
impl<L: SendLink> TrainerEngine for CoSender<L> {
    #[tracing::instrument(name = "send", skip_all, fields(version = %version))]
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let Self { link, secondary, control, deadline, meter } = self;
        let control: &dyn Control = &**control;
        let collector = Collector::new(secondary.plan(), planner(link)?, Parts::default());
        secondary.begin(version, Instant::now());
        let work = Trainer { control, meter, deadline: *deadline, bases: None };
        work.update(&mut **secondary, link, collector, weights).await
    }

    async fn send_part(&mut self, _: WeightStream<'_>, _: Version) -> Result<SendReport> {
        Err(no_copies("sending a part of a version"))
    }

    async fn attest(&mut self) -> Result<SendReport> {
        Err(no_copies("attesting a version"))
    }
}

/// The parts of versions. What a configuration cannot name was refused before there was an engine.
fn parts_of(context: &EngineContext) -> Parts {
    Parts::of(&context.config).unwrap_or_default()
}

/// The planner for a link's buckets.
fn planner(link: &impl SendLink) -> Result<BucketPlanner> {
    Ok(BucketPlanner::new(link.bucket_bytes())?.of_kind(link.bucket_kind()))
}

/// Tells a link that an update is over, even if the future that sends the update is dropped.
struct Ending<'a, L: SendLink> {
    link: &'a mut L,
    committed: bool,
}

impl<L: SendLink> Drop for Ending<'_, L> {
    fn drop(&mut self) {
        self.link.end(self.committed);
    }
}

/// What the loop needs beside the machine, its link and its stream.
struct Trainer<'a> {
    control: &'a dyn Control,
    meter: &'a Meter,
    deadline: Duration,
    /// Only the leader has them.
    bases: Option<&'a Bases>,
}

/// What happens next.
enum Step {
    Done(Done),
    Said(Said),
    Ended(Error),
    Nothing,
}

/// The link, or its work in progress.
enum Link<'a, L> {
    Idle(&'a mut L),
    Busy(BoxFuture<'a, (&'a mut L, Done)>),
    /// Its work was dropped, and the borrow of the link with it.
    Gone,
}

type Next<'a, 'w> = (&'a mut Collector, &'a mut WeightStream<'w>, Result<Option<Bucket>>);

/// The stream, or the bucket that is being collected from it.
enum Stream<'a, 'w> {
    Idle(&'a mut Collector, &'a mut WeightStream<'w>),
    Busy(BoxFuture<'a, Next<'a, 'w>>),
    Gone,
}

impl Trainer<'_> {
    /// Drives a machine to the end of its update.
    async fn update<L: SendLink>(
        &self,
        machine: &mut impl Machine,
        link: &mut L,
        mut collector: Collector,
        mut weights: WeightStream<'_>,
    ) -> Result<SendReport> {
        let ending = &mut Ending { link, committed: false };
        let mut driven = Driven { machine, control: self.control, meter: self.meter };
        self.run(&mut driven, ending.link, &mut collector, &mut weights).await;
        let never = || Error::new(ErrorKind::State, "sending weights", "the update has no end");
        let ended = driven.machine.end().unwrap_or_else(|| Err(never()))?;
        ending.committed = true;
        let mut report = SendReport::new(ended.version);
        report.plan_reused = collector.reused(ended.buckets as usize);
        report.counts = collector.counts;
        report.buckets = ended.buckets;
        report.elapsed = ended.elapsed;
        report.stages = ended.stages;
        report.digest = ended.digest;
        report.receivers = ended.receivers;
        report.absent = ended.absent;
        report.slower = ending.link.slower();
        self.meter.sent(&report);
        Ok(report)
    }

    async fn run<'a, L: SendLink, M: Machine>(
        &self,
        driven: &mut Driven<'_, M>,
        link: &'a mut L,
        collector: &'a mut Collector,
        weights: &'a mut WeightStream<'_>,
    ) {
        let (mut link, mut stream) = (Link::Idle(link), Stream::Idle(collector, weights));
        // The jobs of the bucket that was collected last.
        let mut collected: Vec<Job> = Vec::new();
        let mut has_ended = false;
        loop {
            while let Some(act) = driven.machine.act() {
                match act {
                    Act::Collect { index } => self.collect(&mut stream, index),
                    Act::Bases(said) => self.bases.into_iter().for_each(|b| b.hear(said.clone())),
                    Act::Apart(classes) => {
                        if let Stream::Idle(collector, _) = &mut stream {
                            collector.keep_apart(classes);
                        }
                    }
                    Act::Skip => collected.clear(),
                    Act::Cancel => link = Link::Gone,
                    act @ (Act::Begin { .. }
                    | Act::Join(_)
                    | Act::Fill { .. }
                    | Act::Publish { .. }) => {
                        link = link.put_to(act, &mut collected);
                    }
                    act => driven.perform(act),
                }
            }
            if driven.machine.is_over() {
                return;
            }
            let timer = driven.machine.timer();
            let left = timer.map_or(LONG, |at| at.saturating_duration_since(Instant::now()));
            let is_deaf = has_ended;
            let mut listening = std::pin::pin!(async move {
                if is_deaf {
                    engine_core::clock::sleep(left).await;
                    return Ok(None);
                }
                self.control.recv_all(left).await
            });
            let step = poll_fn(|cx| {
                if let Link::Busy(work) = &mut link
                    && let Poll::Ready((idle, done)) = work.poll_unpin(cx)
                {
                    link = Link::Idle(idle);
                    return Poll::Ready(Step::Done(done));
                }
                if let Stream::Busy(work) = &mut stream
                    && let Poll::Ready((collector, weights, next)) = work.poll_unpin(cx)
                {
                    stream = Stream::Idle(collector, weights);
                    let next = next.map(|bucket| {
                        bucket.map(|Bucket { jobs, layout, known, source_bytes, class }| {
                            collected = jobs;
                            Collected { layout, known, source_bytes, class }
                        })
                    });
                    return Poll::Ready(Step::Done(Done::Collected(next)));
                }
                listening.as_mut().poll(cx).map(|heard| match heard {
                    Ok(Some(said)) => Step::Said(said),
                    Ok(None) => Step::Nothing,
                    Err(error) => Step::Ended(error),
                })
            });
            let (step, now) = (step.await, Instant::now());
            match step {
                Step::Done(done) => driven.machine.done(done, now),
                Step::Said(said) => driven.machine.said(said, now),
                Step::Ended(error) => {
                    has_ended = true;
                    driven.machine.refused(error, now);
                }
                // Only here: no rank is late while something waits to be taken in.
                Step::Nothing if timer.is_some_and(|at| now >= at) => driven.machine.tick(now),
                Step::Nothing => {}
            }
        }
    }

    fn collect<'a, 'w: 'a>(&self, stream: &mut Stream<'a, 'w>, index: u64) {
        let deadline = self.deadline;
        *stream = match std::mem::replace(stream, Stream::Gone) {
            Stream::Idle(collector, weights) => {
                let work = async move {
                    let next = collector.next_bucket(weights, deadline).await;
                    (collector, weights, next)
                };
                Stream::Busy(work.instrument(debug_span!("collect", bucket = index)).boxed())
            }
            other => other,
        };
    }
}

impl<'a, L: SendLink> Link<'a, L> {
    /// Gives an idle link something to do.
    fn put_to(self, act: Act, collected: &mut Vec<Job>) -> Self {
        let Self::Idle(link) = self else {
            debug!(?act, "the link is at work already");
            return self;
        };
        Self::Busy(match act {
            Act::Begin { members, colocated } => async move {
                let begun = link.begin(&members, colocated).await;
                (link, Done::Begun(begun))
            }
            .boxed(),
            Act::Join(ticket) => async move {
                let joined = link.join(&ticket).await;
                (link, Done::Joined(joined))
            }
            .instrument(debug_span!("join"))
            .boxed(),
            Act::Fill { index, slot, digests } => {
                let jobs = std::mem::take(collected);
                async move {
                    let filled = link.fill(slot, jobs, digests).await;
                    (link, Done::Filled(filled))
                }
                .instrument(debug_span!("encode", bucket = index))
                .boxed()
            }
            Act::Publish { index, slot, filled } => async move {
                let published = link.publish(slot, filled).await;
                (link, Done::Published(published))
            }
            .instrument(debug_span!("publish", bucket = index))
            .boxed(),
            act => {
                debug!(?act, "nothing for a link");
                return Self::Idle(link);
            }
        })
    }
}

/// A machine that is being driven. If this is dropped before the update is over, the other ranks are told that the
/// update was dropped.
struct Driven<'a, M: Machine> {
    machine: &'a mut M,
    control: &'a dyn Control,
    meter: &'a Meter,
}

impl<M: Machine> Driven<'_, M> {
    fn perform(&mut self, act: Act) {
        perform(self.machine, act, self.control, self.meter);
    }
}

impl<M: Machine> Drop for Driven<'_, M> {
    fn drop(&mut self) {
        if !self.machine.is_over() {
            self.machine.abandon(Instant::now());
        }
        flush(self.machine, self.control, self.meter);
    }
}

/// Performs all acts that need neither a link nor a stream.
fn flush(machine: &mut impl Machine, control: &dyn Control, meter: &Meter) {
    while let Some(act) = machine.act() {
        perform(machine, act, control, meter);
    }
}

fn perform(machine: &mut impl Machine, act: Act, control: &dyn Control, meter: &Meter) {
    match act {
        Act::Send { to, body } => match control.send(to, body) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::TrainerLeft) => {
                machine.unreachable(to, error, Instant::now());
            }
            Err(error) => machine.refused(error, Instant::now()),
        },
        Act::SendAll { to, body } => {
            for (rank, error) in control.send_all(&to, body) {
                match error.kind() {
                    ErrorKind::PeerLost | ErrorKind::TrainerLeft => {
                        machine.unreachable(rank, error, Instant::now());
                    }
                    _ => machine.refused(error, Instant::now()),
                }
            }
        }
        Act::Cut { rank, reason } => {
            if let Err(error) = control.cut(rank, &reason) {
                debug!(%rank, %error, "it is gone already");
            }
        }
        Act::Observe(progress) => meter.observe(&progress),
        Act::Aborted(ranks) => meter.aborted(&ranks),
        act => debug!(?act, "nothing that can be done without a link"),
    }
}

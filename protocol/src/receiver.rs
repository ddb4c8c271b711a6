//! The loop that drives the state machine of a receiving rank. It makes no decisions.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::sync::oneshot;
use tracing::{Span, debug, debug_span, info};

use super::announced::Unread;
use super::follower::{Act, Follower, told_of_fetch};
use super::link::{Fetch, FetchLink};
use super::message::{Begin, ToSender, encode};
use super::{LONG, arrived_event};
use engine_core::control::{Control, Event};
use engine_core::memory::{Pool, Work};
use engine_core::observe::Observer as _;
use engine_core::plan::BucketLayout;
use engine_core::telemetry::{Meter, ReceiveStages};
use engine_core::{Base, Bases, CheckpointEngine, RolloutEngine};
use engine_core::{BucketContent, CopiedOut, OnePass, Outcome, ReceivedBucket, ReceivedWeights};
use engine_core::{EngineContext, Error, ErrorKind, Rank, Result, Storage, Version};

/// A fetch whose end the link has to report here. The rest of the protocol then happens by itself, even
/// while nobody polls the receiver.
#[derive(Debug)]
pub struct Arrival {
    index: u64,
    from: Rank,
    /// Whether the trainer wants to know the end.
    routed: bool,
    /// The layout, if the digest is to be checked.
    check: Option<Arc<BucketLayout>>,
    /// Copies the bucket to its destination while it verifies it, where that is possible.
    one_pass: OnePass,
    held: Hold,
    pool: Pool,
    session: oneshot::Sender<Result<Arrived>>,
    /// The span of the fetch, and when it began.
    stage: (Span, Instant),
}

/// The content of a bucket, and the work that verifies it.
#[derive(Debug)]
struct Arrived {
    content: BucketContent,
    /// Only for a list: the memory of its weights does not hold the bucket.
    held: Option<Hold>,
    sum: Option<Work<Verified>>,
    /// How long the fetch took.
    fetch: Duration,
}

/// The result of verifying a bucket.
#[derive(Debug)]
struct Verified {
    sum: u64,
    took: Duration,
    /// Set if it was copied to its destination.
    copied: Option<CopiedOut>,
}

/// A bucket that is here.
struct Here {
    content: BucketContent,
    held: Option<Hold>,
    took: ReceiveStages,
    copied: Option<CopiedOut>,
}

impl Arrival {
    /// Whether the update that the bucket belongs to is still being received. If not, a fetch that
    /// has not begun need not begin.
    pub fn is_awaited(&self) -> bool {
        !self.session.is_closed()
    }

    /// Reports that the bytes are here, or why they cannot come.
    pub fn tell(self, result: Result<Storage>) {
        self.end(result.map(BucketContent::Buffer));
    }

    /// Reports that all weights of a list are here, or why they cannot come.
    ///
    /// The bucket is held until the receiver asks for the next one, however long it keeps the weights.
    pub fn tell_list(self, result: Result<Arc<[Storage]>>) {
        self.end(result.map(BucketContent::List));
    }

    fn end(self, result: Result<BucketContent>) {
        let Self { index, from, routed, check, one_pass, held, pool, session, stage } = self;
        let (span, begun) = stage;
        let fetch = begun.elapsed();
        let update = held.update;
        if let Some(message) = told_of_fetch(routed, update, index, from, &result) {
            tell_leader(&*held.ledger.control, &message);
        }
        let result = result.map(|content| {
            let bytes = match content {
                // From here on the bucket is released when the last view of it is dropped.
                BucketContent::Buffer(bytes) => bytes.guarded(held),
                content @ BucketContent::List(_) => {
                    return Arrived { content, held: Some(held), sum: None, fetch };
                }
            };
            let sum = check.map(|layout| {
                let (threads, bytes) = (pool.clone(), bytes.clone());
                let verify = debug_span!(parent: &span, "verify", bucket = index);
                pool.start(move || {
                    let (_entered, begun) = (verify.entered(), Instant::now());
                    let copied = one_pass.copy_out(&layout, &bytes)?;
                    let sum = match &copied {
                        Some(copied) => copied.sum(),
                        None => threads.digest(layout.pieces(), &bytes)?,
                    };
                    Ok(Verified { sum, took: begun.elapsed(), copied })
                })
            });
            Arrived { content: bytes.into(), held: None, sum, fetch }
        });
        if session.send(result).is_err() {
            debug!(index, "a bucket arrived that nobody waits for any more");
        }
    }
}

/// A rollout's side of the protocol, over a transport's link.
#[derive(Debug)]
pub struct Receiver<L> {
    link: L,
    follower: Box<Follower>,
    control: Arc<dyn Control>,
    pool: Pool,
    ledger: Ledger,
    deadline: Duration,
    meter: Meter,
    /// Tells the version that this rank has.
    bases: Bases,
}

impl<L: FetchLink> Receiver<L> {
    /// A receiver in the group of this control plane.
    pub fn new(link: L, context: &EngineContext, control: Arc<dyn Control>, pool: Pool) -> Self {
        let meter = Meter::new(control.rank(), context.observer.clone());
        let follower = Follower::new(control.rank(), context.deadline(), control.updates());
        Self {
            follower: Box::new(
                follower.of_kind(link.bucket_kind()).wanting(context.config.wants.clone()),
            ),
            link,
            ledger: Ledger {
                control: control.clone(),
                held: Arc::default(),
                all_want_all: context.config.parts.is_empty() && context.config.wants.is_none(),
            },
            control,
            pool,
            deadline: context.deadline(),
            meter,
            bases: context.bases.clone(),
        }
    }

    /// Tells the leader that this rank enters an update.
    fn enter(&mut self, update: u64, plan: Option<u64>, wants: Option<Vec<String>>) {
        let (card, base) = (self.link.card(), self.bases.own());
        if let Err(error) = self.ledger.enter(update, card, plan, base, wants) {
            self.follower.lost(error);
        }
    }
}

#[async_trait]
impl<L: FetchLink> CheckpointEngine for Receiver<L> {
    async fn finalize(mut self: Box<Self>) -> Result<()> {
        self.link.close().await;
        Ok(())
    }
}

#[async_trait]
impl<L: FetchLink> RolloutEngine for Receiver<L> {
    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>> {
        // Before the wait: the trainer may have begun the update already.
        self.link.listen(self.deadline / 4).await;
        self.follower.wait(version, "waiting for an update to begin", Instant::now());
        let begin = Waiting(self).until_entered().await?;
        let version = begin.version;
        let (outcome, one_pass) = (Outcome::default(), OnePass::default());
        let session = Session {
            begin,
            arrivals: FuturesUnordered::new(),
            here: BTreeMap::new(),
            at_work: None,
            stages: ReceiveStages::default(),
            installing: None,
            span: tracing::info_span!("receive", %version),
            outcome: outcome.clone(),
            one_pass: one_pass.clone(),
            receiver: self,
        };
        let buckets = futures::stream::try_unfold(session, |mut session| async move {
            let bucket = session.next().await?;
            Ok(bucket.map(|bucket| (bucket, session)))
        });
        Ok(ReceivedWeights::new(version, outcome, buckets).in_one_pass(one_pass))
    }

    fn adopt<'a>(&'a mut self, received: ReceivedWeights<'a>) -> ReceivedWeights<'a> {
        received
    }
}

/// The wait for an update, until this is dropped.
struct Waiting<'a, L: FetchLink>(&'a mut Receiver<L>);

impl<L: FetchLink> Waiting<'_, L> {
    async fn until_entered(self) -> Result<Begin> {
        let receiver = &mut *self.0;
        loop {
            while let Some(act) = receiver.follower.act() {
                match act {
                    Act::Enter { update, plan, wants } => {
                        receiver.enter(update, plan, wants);
                        // Further acts belong to the update: the session does them.
                        break;
                    }
                    Act::Send(message) => tell_leader(&*receiver.control, &message),
                    Act::Unread(unread) => receiver.ledger.pass_over(unread),
                    act => debug!(?act, "nothing that is done before an update"),
                }
            }
            if let Some(entered) = receiver.follower.entered() {
                return entered;
            }
            let timer = receiver.follower.timer();
            let left = timer.map_or(LONG, |at| at.saturating_duration_since(Instant::now()));
            let event = receiver.control.recv(left).await;
            let now = Instant::now();
            match event {
                Ok(Some(event)) => receiver.follower.event(event, now),
                Ok(None) => {}
                Err(error) => receiver.follower.lost(error),
            }
            if receiver.follower.timer().is_some_and(|at| now >= at) {
                receiver.follower.tick(now);
            }
        }
    }
}

impl<L: FetchLink> Drop for Waiting<'_, L> {
    fn drop(&mut self) {
        self.0.follower.stop();
    }
}

/// The number of a bucket, and the bucket with its digest sum or the error of its fetch.
type Came = (u64, Result<(Here, Option<u64>)>);

/// One update, from entering it to its end.
struct Session<'a, L: FetchLink> {
    begin: Begin,
    arrivals: FuturesUnordered<BoxFuture<'static, Came>>,
    /// The fetched buckets that have not been handed over yet.
    here: BTreeMap<u64, Here>,
    /// Holds the list that the caller was given last. It is released when the caller asks for more, so no more buckets
    /// are on the way than there are slots.
    at_work: Option<Hold>,
    stages: ReceiveStages,
    /// The caller's work on the bucket that it was given last.
    installing: Option<(Span, Instant)>,
    span: Span,
    /// Where the caller may leave its reason for giving up.
    outcome: Outcome,
    one_pass: OnePass,
    receiver: &'a mut Receiver<L>,
}

/// The link, or its attempt to join the others.
enum Link<'a, L> {
    Idle(&'a mut L),
    Joining(BoxFuture<'a, (&'a mut L, Result<()>)>),
    /// The attempt was dropped, and the borrow of the link with it.
    Gone,
}

/// What happens next.
enum Step {
    Came(Came),
    Joined(Result<()>),
    Event(Event),
    Ended(Error),
    Nothing,
}

impl<L: FetchLink> Session<'_, L> {
    /// The next verified bucket; `None` when the version is active.
    async fn next(&mut self) -> Result<Option<ReceivedBucket>> {
        if let Some((span, begun)) = self.installing.take() {
            self.stages.install += begun.elapsed();
            drop(span);
        }
        self.at_work = None;
        let Self { begin, arrivals, here, stages, span, outcome, one_pass, receiver, .. } = self;
        let Receiver { link, follower, control, pool, ledger, meter, .. } = &mut **receiver;
        let control: &dyn Control = &**control;
        let mut link = Link::Idle(link);
        let mut given = None;
        while let Some(event) = arrived_event(control).await? {
            follower.event(event, Instant::now());
        }
        follower.want(Instant::now());
        loop {
            while let Some(act) = follower.act() {
                match act {
                    Act::Fetch { index, from, card, slot, layout } => {
                        let held = ledger.hold(begin.update, index, begin.routed);
                        let (session, arrival) = oneshot::channel();
                        arrivals.push(came(index, arrival).boxed());
                        let (filled, of) = (layout.filled(), layout.clone());
                        let fetch = Fetch { from, card, index, slot, filled, layout: of };
                        let fetching = debug_span!(parent: &*span, "fetch", bucket = index, %from);
                        let arrival = Arrival {
                            index,
                            from,
                            routed: begin.routed,
                            check: begin.digests.then_some(layout),
                            one_pass: one_pass.clone(),
                            held,
                            pool: pool.clone(),
                            session,
                            stage: (fetching, Instant::now()),
                        };
                        if let Link::Idle(link) = &mut link {
                            link.fetch(fetch, arrival).await;
                        }
                    }
                    Act::Abandon { from } => {
                        if let Link::Idle(link) = &mut link {
                            link.abandon(from);
                        }
                    }
                    Act::Join(ticket) => {
                        link = match link {
                            Link::Idle(link) => Link::Joining(
                                async move {
                                    let joined = link.join(&ticket).await;
                                    (link, joined)
                                }
                                .boxed(),
                            ),
                            other => other,
                        }
                    }
                    Act::Cancel => link = Link::Gone,
                    Act::Give { index, layout } => {
                        let Some(Here { content, held, took, copied }) = here.remove(&index) else {
                            continue;
                        };
                        stages.fetch += took.fetch;
                        stages.verify += took.verify;
                        let bucket = ReceivedBucket::new(index, layout, content)?;
                        let bucket = bucket.with_pool(pool.clone());
                        self.at_work = held;
                        given = Some(match copied {
                            Some(copied) => bucket.copied(copied),
                            None => bucket,
                        });
                    }
                    Act::Check => {
                        let checked = outcome.check().map(|()| outcome.take_notes().to_string());
                        follower.checked(checked, Instant::now());
                    }
                    Act::Send(message) => tell_leader(control, &message),
                    Act::Unread(unread) => ledger.pass_over(unread),
                    Act::Observe(progress) => meter.observe(&progress),
                    Act::Aborted => meter.aborted(&[]),
                    Act::Enter { .. } => debug!("this rank is in an update already"),
                }
            }
            if let Some(bucket) = given.take() {
                // If the next bucket is announced already, its fetch starts now and runs while the caller works.
                if let Some(event) = arrived_event(control).await? {
                    given = Some(bucket);
                    follower.event(event, Instant::now());
                    continue;
                }
                let span = debug_span!(parent: &*span, "install", bucket = bucket.index());
                self.installing = Some((span, Instant::now()));
                return Ok(Some(bucket));
            }
            if let Some(end) = follower.end() {
                let report = end?;
                meter.received(report.bytes, report.elapsed, *stages);
                info!(
                    version = %report.version, tensors = report.tensors, bytes = report.bytes,
                    "version is active"
                );
                outcome.complete(report);
                return Ok(None);
            }
            let timer = follower.timer();
            let left = timer.map_or(LONG, |at| at.saturating_duration_since(Instant::now()));
            let mut listening = std::pin::pin!(control.recv(left));
            let step = poll_fn(|cx| {
                if let Poll::Ready(Some(came)) = arrivals.poll_next_unpin(cx) {
                    return Poll::Ready(Step::Came(came));
                }
                if let Link::Joining(joining) = &mut link
                    && let Poll::Ready((idle, joined)) = joining.poll_unpin(cx)
                {
                    link = Link::Idle(idle);
                    return Poll::Ready(Step::Joined(joined));
                }
                listening.as_mut().poll(cx).map(|heard| match heard {
                    Ok(Some(event)) => Step::Event(event),
                    Ok(None) => Step::Nothing,
                    Err(error) => Step::Ended(error),
                })
            });
            let (step, now) = (step.await, Instant::now());
            match step {
                Step::Came((index, came)) => {
                    let sum = came.map(|(bucket, sum)| {
                        here.insert(index, bucket);
                        sum
                    });
                    follower.arrived(index, sum, now);
                }
                Step::Joined(joined) => follower.joined(joined, now),
                Step::Event(event) => follower.event(event, now),
                Step::Ended(error) => follower.lost(error),
                // Only here: no rank is late while something waits to be taken in.
                Step::Nothing if timer.is_some_and(|at| now >= at) => follower.tick(now),
                Step::Nothing => {}
            }
        }
    }
}

/// Waits until a bucket's bytes are here and verified.
async fn came(index: u64, arrival: oneshot::Receiver<Result<Arrived>>) -> Came {
    let came = async {
        let gone = || {
            let message = "the transport dropped the fetch";
            Err(Error::new(ErrorKind::Aborted, "fetching a bucket", message))
        };
        let Arrived { content, held, sum, fetch } = arrival.await.unwrap_or_else(|_| gone())?;
        let (sum, verify, copied) = match sum {
            None => (None, Duration::ZERO, None),
            Some(sum) => {
                let Verified { sum, took, copied } = sum.await?;
                (Some(sum), took, copied)
            }
        };
        let mut took = ReceiveStages::default();
        (took.fetch, took.verify) = (fetch, verify);
        Ok((Here { content, held, took, copied }, sum))
    };
    (index, came.await)
}

impl<L: FetchLink> Drop for Session<'_, L> {
    fn drop(&mut self) {
        let Receiver { link, follower, control, ledger, meter, .. } = &mut *self.receiver;
        let control: &dyn Control = &**control;
        link.end();
        follower.abandon(|| {
            let words = "the receiver dropped the stream before its end";
            let unsaid = || Error::new(ErrorKind::Aborted, "in an update", words);
            self.outcome.take_failure().unwrap_or_else(unsaid)
        });
        while let Some(act) = follower.act() {
            match act {
                Act::Send(message) => tell_leader(control, &message),
                Act::Unread(unread) => ledger.pass_over(unread),
                Act::Observe(progress) => meter.observe(&progress),
                Act::Aborted => meter.aborted(&[]),
                act => debug!(?act, "after the end of an update"),
            }
        }
    }
}

pub(super) fn tell_leader(control: &dyn Control, message: &ToSender) {
    let told = encode(message).and_then(|body| match message {
        // The leader goes on when all ranks have said it.
        ToSender::Joined { .. } => control.send_with_others(Rank::LEADER, body),
        _ => control.send(Rank::LEADER, body),
    });
    if let Err(error) = told {
        // The trainer is gone, so it need not know.
        debug!(?message, %error, "the trainer could not be told");
    }
}

/// The buckets that this rank reads or may read. The trainer must not overwrite them.
#[derive(Clone, Debug)]
struct Ledger {
    control: Arc<dyn Control>,
    /// The update and index of each, and the number of its holds.
    held: Arc<Mutex<BTreeMap<(u64, u64), usize>>>,
    /// Whether versions have no named parts, as far as this rank knows, so that all ranks get every bucket.
    all_want_all: bool,
}

impl Ledger {
    /// Holds a bucket that the trainer has announced.
    fn hold(&self, update: u64, index: u64, routed: bool) -> Hold {
        *self.lock().entry((update, index)).or_default() += 1;
        Hold { ledger: self.clone(), update, index, routed }
    }

    /// Releases a bucket that nobody here will read, unless it is held.
    fn pass_over(&self, unread: Unread) {
        drop(self.hold(unread.update, unread.index, false));
    }

    /// Tells the trainer that this rank enters an update, and what this rank has and holds.
    fn enter(
        &self,
        update: u64,
        card: Bytes,
        plan: Option<u64>,
        base: Base,
        wants: Option<Vec<String>>,
    ) -> Result<()> {
        // Sent under the lock, so that a bucket in this list is released only by a later message.
        let held = self.lock();
        let buckets = held.keys().copied().collect();
        let entered = ToSender::Entered { update, card, plan, held: buckets, base, wants };
        self.control.send_with_others(Rank::LEADER, encode(&entered)?)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(u64, u64), usize>> {
        // Every change is complete before anything can panic.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hold on a bucket. The bucket is released, and the trainer told, when its last hold is dropped.
#[derive(Debug)]
struct Hold {
    ledger: Ledger,
    update: u64,
    index: u64,
    /// Whether others fetch the bucket from ranks that have it. Then each release may let one of them go on.
    routed: bool,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let (update, index) = (self.update, self.index);
        let mut held = self.ledger.lock();
        if let Entry::Occupied(mut entry) = held.entry((update, index)) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
                let control = &self.ledger.control;
                let told = encode(&ToSender::Release { update, index }).and_then(|body| {
                    match self.routed || !self.ledger.all_want_all {
                        true => control.send(Rank::LEADER, body),
                        // The slot is free when all ranks have released it.
                        false => control.send_with_others(Rank::LEADER, body),
                    }
                });
                if let Err(error) = told {
                    debug!(update, index, %error, "the trainer could not be told of a release");
                }
            }
        }
    }
}

//! A rollout's side of an update.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::oneshot;
use tracing::{Span, debug, debug_span, info, warn};

use super::message::{Begin, Layout, Ticket, ToReceiver, ToSender, decode, encode};
use super::sender::is_of_transport;
use super::{LONG, arrived_event, next_event, within};
use crate::control::{Control, Event};
use crate::memory::{Pool, Work};
use crate::observe::{Observer as _, Progress};
use crate::plan::{BucketLayout, LayoutChecker, Plan};
use crate::received::{Outcome, ReceivedBucket, ReceivedWeights};
use crate::report::{ReceiveReport, VersionState};
use crate::telemetry::{Meter, ReceiveStages};
use crate::{
    EngineContext, Error, ErrorKind, ErrorReport, Rank, Recovery, Result, Storage, Version, clock,
    digest,
};

/// A transport's receiving side: how the bytes of a bucket get here.
#[async_trait]
pub trait ReceiveLink: std::fmt::Debug + Send {
    /// The first `filled` bytes of a slot, in place.
    ///
    /// # Contract
    ///
    /// The sender does not write to the slot before the receiver has released the bucket, which
    /// happens when the returned bytes and everything shared from them are dropped.
    ///
    /// # Errors
    ///
    /// `Protocol` if there is no such slot or it is smaller; those of the transport.
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage>;
}

#[async_trait]
impl<L: ReceiveLink + ?Sized> ReceiveLink for Box<L> {
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        (**self).fetch(slot, filled).await
    }
}

/// A receiving side that fetches each bucket from a rank that it is told, the trainer or another
/// receiver, while other things go on.
///
/// Every [`ReceiveLink`] is one: it takes all buckets from the trainer.
#[async_trait]
pub trait FetchLink: std::fmt::Debug + Send {
    /// What others need to fetch from this rank.
    fn card(&self) -> Bytes;

    /// Starts to fetch a bucket into the slot of the same number.
    ///
    /// # Contract
    ///
    /// `arrival` is told once, from any thread, when the bytes are here or cannot come. The slot is
    /// used for nothing else before the bytes given to it and everything shared from them are
    /// dropped. Others may fetch the bucket from here until the slot's next bucket is fetched.
    ///
    async fn fetch(&mut self, fetch: Fetch, arrival: Arrival);

    /// Gives up all fetches from a rank that failed; those that have not ended end with an error, soon.
    fn abandon(&mut self, from: Rank);

    /// Joins the update's other ranks, with the ticket that the leader's
    /// [`SendLink::begin`](super::SendLink::begin) returned, if it did. All of them do at the same time.
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

    /// The update has ended here, with the version or without. Its bytes may still be held.
    fn end(&mut self) {}
}

/// A bucket to be fetched.
#[derive(Clone, Debug)]
pub struct Fetch {
    /// Who has it.
    pub from: Rank,
    /// That rank's [`SendLink::card`](super::SendLink::card) or [`FetchLink::card`].
    pub card: Bytes,
    /// The slot that it is in.
    pub slot: u32,
    /// Its length in bytes.
    pub filled: u64,
}

#[async_trait]
impl<L: ReceiveLink> FetchLink for L {
    fn card(&self) -> Bytes {
        Bytes::new()
    }

    async fn fetch(&mut self, fetch: Fetch, arrival: Arrival) {
        arrival.tell(ReceiveLink::fetch(self, fetch.slot, fetch.filled).await);
    }

    fn abandon(&mut self, _: Rank) {}
}

/// The end of a fetch, to be told: the rest of the protocol happens by itself, whether or not the
/// receiver looks.
#[derive(Debug)]
pub struct Arrival {
    index: u64,
    from: Rank,
    /// Whether the trainer wants to know.
    routed: bool,
    /// With the layout, if digests are wanted.
    check: Option<Arc<BucketLayout>>,
    held: Hold,
    pool: Pool,
    session: oneshot::Sender<Result<Arrived>>,
    /// The update's stage that ends with the arrival, and when it began.
    stage: (Span, Instant),
}

/// The bytes of a bucket, and the digest sum of what they are.
#[derive(Debug)]
struct Arrived {
    bytes: Storage,
    sum: Option<Work<(u64, Duration)>>,
    /// What it took to get them.
    fetch: Duration,
}

impl Arrival {
    /// Whether the update that the bucket belongs to is still being received. If not, a fetch that
    /// has not begun need not begin.
    pub fn is_awaited(&self) -> bool {
        !self.session.is_closed()
    }

    /// The bytes are here, or cannot come.
    pub fn tell(self, result: Result<Storage>) {
        let Self { index, from, routed, check, held, pool, session, stage } = self;
        let (span, begun) = stage;
        let fetch = begun.elapsed();
        let update = held.update;
        let told = match &result {
            Ok(_) if routed => Some(ToSender::Fetched { update, index }),
            Err(error) if routed && from != Rank::LEADER => {
                Some(ToSender::Missed { update, index, from, error: error.into() })
            }
            _ => None,
        };
        if let Some(message) = told {
            tell_leader(&held.ledger.control, &message);
        }
        let result = result.map(|bytes| {
            // From here on the bucket is released when the last view of it is dropped.
            let bytes = bytes.guarded(held);
            let sum = check.map(|layout| {
                let (threads, bytes) = (pool.clone(), bytes.clone());
                let verify = debug_span!(parent: &span, "verify", bucket = index);
                pool.start(move || {
                    let (_entered, begun) = (verify.entered(), Instant::now());
                    let sum = threads.digest(layout.pieces(), &bytes)?;
                    Ok((sum, begun.elapsed()))
                })
            });
            Arrived { bytes, sum, fetch }
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
    control: Arc<dyn Control>,
    pool: Pool,
    /// The layouts of the last complete update, and their digest.
    plan: Plan,
    known: Option<u64>,
    /// An update that was announced, and that nobody has received yet.
    announced: Option<Begin>,
    ledger: Ledger,
    deadline: Duration,
    meter: Meter,
}

impl<L: FetchLink> Receiver<L> {
    /// The receiver of a group that the control plane connects to.
    pub fn new(link: L, context: &EngineContext, control: Arc<dyn Control>, pool: Pool) -> Self {
        let meter = Meter::new(control.rank(), context.observer.clone());
        Self {
            link,
            ledger: Ledger { control: control.clone(), held: Arc::default() },
            control,
            pool,
            plan: Plan::default(),
            known: None,
            announced: None,
            deadline: context.deadline(),
            meter,
        }
    }

    /// Waits for the next update; see
    /// [`CheckpointEngine::receive_weights`](crate::CheckpointEngine::receive_weights).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// `Timeout` if no update begins within the deadline, `PeerLost` if the trainer is gone,
    /// `Mismatch` if the update has another version than the one expected.
    pub async fn receive(&mut self, expected: Option<Version>) -> Result<ReceivedWeights<'_>> {
        let operation = "waiting for an update to begin";
        let begun = wait_for(&self.control, &mut self.announced, expected);
        let begin = within(self.deadline, operation, begun)
            .await
            .map_err(|error| error.rank(Rank::LEADER))??;
        let Begin { update, version, bucket_bytes, .. } = begin;
        self.ledger.enter(update, self.link.card(), self.known)?;
        self.meter.observe(&Progress::Began { version, receivers: vec![self.control.rank()] });
        let outcome = Outcome::default();
        let guard = Guard {
            control: self.control.clone(),
            meter: self.meter.clone(),
            update,
            version,
            outcome,
            armed: true,
            unsaid: "the receiver dropped the stream before its end",
        };
        let session = Session {
            joining: begin.ticket.clone(),
            may_join: false,
            begin,
            begun: Instant::now(),
            coming: VecDeque::new(),
            layouts: Vec::new(),
            checker: LayoutChecker::new(bucket_bytes),
            taken: 0,
            committed: false,
            version_digest: 0,
            counts: (0, 0),
            stages: ReceiveStages::default(),
            installing: None,
            span: tracing::info_span!("receive", %version),
            guard,
            receiver: self,
        };
        let outcome = session.guard.outcome.clone();
        let buckets = futures::stream::try_unfold(session, |mut session| async move {
            match session.next().await {
                Ok(Some(bucket)) => Ok(Some((bucket, session))),
                Ok(None) => Ok(None),
                Err(error) => {
                    let error = error.version(session.begin.version);
                    session.guard.fail(&error);
                    Err(error)
                }
            }
        });
        Ok(ReceivedWeights::new(version, outcome, buckets))
    }
}

/// The announcement of the next update; of this version, if one is expected. What is left of dead
/// updates is thrown away, their buckets are released.
///
/// # Cancel safety
///
/// An announcement stays in `announced` until it is returned, or known to be over.
pub(super) async fn wait_for(
    control: &Arc<dyn Control>,
    announced: &mut Option<Begin>,
    expected: Option<Version>,
) -> Result<Begin> {
    /// How much later than the leader's next step its abort may come here.
    const MOMENT: Duration = Duration::from_millis(300);
    let mut until = Instant::now() + MOMENT;
    loop {
        let is_other = |begin: &mut Begin| expected.is_some_and(|version| version != begin.version);
        // One that is over by now is returned as well: the caller hears why it has failed.
        if let Some(begin) = announced.take_if(|begin| !is_other(begin)) {
            return Ok(begin);
        }
        let wait = match announced {
            // The update may have been aborted long ago, while nobody listened here, or just now.
            Some(_) => until.saturating_duration_since(Instant::now()),
            None => LONG,
        };
        match control.recv(wait).await? {
            Some(event) => {
                if announced.as_ref().is_some_and(|begin| is_abort(&event, begin.update)) {
                    *announced = None;
                } else if let Some(begin) = between(control, event)? {
                    *announced = Some(begin);
                    until = Instant::now() + MOMENT;
                }
            }
            None => {
                if let (Some(begin), Some(expected)) = (announced.take(), expected) {
                    return Err(mismatch(control, &begin, expected)?);
                }
            }
        }
    }
}

/// Tells the trainer that this rank expects another version.
fn mismatch(control: &Arc<dyn Control>, begin: &Begin, expected: Version) -> Result<Error> {
    let message =
        format!("the trainer sends version {}, this rank expects {expected}", begin.version);
    let error = Error::new(ErrorKind::Mismatch, "entering an update", message).rank(control.rank());
    let (update, report) = (begin.update, ErrorReport::from(&error));
    control.send(Rank::LEADER, encode(&ToSender::Failed { update, error: report })?)?;
    Ok(error)
}

/// Releases the bucket that an event tells of, if it does: nothing here will use it.
fn release(control: &Arc<dyn Control>, announced: &mut Option<Begin>, event: Event) {
    match between(control, event) {
        Ok(Some(begin)) => *announced = Some(begin),
        Ok(None) => {}
        Err(error) => debug!(%error, "after the failure"),
    }
}

/// Takes in an event while no update is being received.
fn between(control: &Arc<dyn Control>, event: Event) -> Result<Option<Begin>> {
    match message(event)? {
        Some(ToReceiver::Begin(begin)) => Ok(Some(begin)),
        Some(ToReceiver::Bucket { update, index, .. }) => {
            control.send(Rank::LEADER, encode(&ToSender::Release { update, index })?)?;
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// What the trainer says next within an update.
pub(super) async fn event_of_update(
    control: &Arc<dyn Control>,
    deadline: Duration,
    operation: &str,
) -> Result<Event> {
    // Longer than the trainer's own deadline, so that it can name the cause first.
    let event = next_event(control, deadline + deadline / 4, operation).await;
    event.map_err(|error| error.rank(Rank::LEADER))
}

/// The trainer's message of an event; an error if the trainer is gone.
pub(super) fn message(event: Event) -> Result<Option<ToReceiver>> {
    match event {
        Event::Message { from: Rank::LEADER, body } => decode(&body)
            .map(Some)
            .map_err(|error| error.rank(Rank::LEADER).recovery(Recovery::Retry)),
        Event::Lost { rank: Rank::LEADER, error } => {
            Err(Error::from(error).rank(Rank::LEADER).recovery(Recovery::Reconnect))
        }
        Event::Left { rank: Rank::LEADER } => {
            Err(Error::new(ErrorKind::PeerLost, "receiving weights", "the trainer left the group")
                .rank(Rank::LEADER)
                .recovery(Recovery::Reconnect))
        }
        _ => Ok(None),
    }
}

/// Whether an event ends an update here, before it has come to its end.
fn ends(event: &Event, update: u64) -> bool {
    !matches!(event, Event::Message { .. }) || is_abort(event, update)
}

fn is_abort(event: &Event, of: u64) -> bool {
    let Event::Message { body, .. } = event else { return false };
    matches!(decode(body), Ok(ToReceiver::Abort { update, .. }) if update == of)
}

/// One update, from its announcement to its end.
struct Session<'a, L: FetchLink> {
    receiver: &'a mut Receiver<L>,
    /// What it takes to join the other ranks, until that is done.
    joining: Option<Ticket>,
    /// Whether all of them are in the update: joining may not end before they do, nor before its time.
    may_join: bool,
    begin: Begin,
    begun: Instant,
    /// Buckets that are being fetched and verified, and what came after them.
    coming: VecDeque<Coming>,
    layouts: Vec<Arc<BucketLayout>>,
    checker: LayoutChecker,
    taken: u64,
    /// Whether the leader has made the version active.
    committed: bool,
    version_digest: u64,
    /// Tensors and bytes so far.
    counts: (u64, u64),
    stages: ReceiveStages,
    /// The caller's work on the bucket that it was given last.
    installing: Option<(Span, Instant)>,
    span: Span,
    guard: Guard,
}

impl<L: FetchLink> Drop for Session<'_, L> {
    fn drop(&mut self) {
        self.receiver.link.end();
    }
}

enum Coming {
    Bucket { index: u64, slot: u32, digest: u64, stage: Stage },
    End { buckets: u64, digest: u64, plan: u64 },
}

/// How far a bucket has come.
enum Stage {
    /// Nobody has it yet, or the one that had it failed.
    Announced,
    Fetching {
        from: Rank,
        arrival: oneshot::Receiver<Result<Arrived>>,
    },
    Here(Arrived),
}

impl Stage {
    /// Waits until the bytes are here and their digest is known.
    async fn ready(&mut self, routed: bool) -> Result<(Storage, Option<u64>, ReceiveStages)> {
        loop {
            match self {
                Self::Announced => std::future::pending().await,
                Self::Fetching { from, arrival } => {
                    let gone = || {
                        let message = "the transport dropped the fetch";
                        Err(Error::new(ErrorKind::Aborted, "fetching a bucket", message))
                    };
                    match arrival.await.unwrap_or_else(|_| gone()) {
                        Ok(arrived) => *self = Self::Here(arrived),
                        Err(error) if !routed || *from == Rank::LEADER => return Err(error),
                        Err(error) => {
                            debug!(%from, %error, "a bucket could not be fetched");
                            *self = Self::Announced;
                        }
                    }
                }
                Self::Here(arrived) => {
                    let (sum, verify) = match &mut arrived.sum {
                        None => (None, Duration::ZERO),
                        Some(sum) => sum.await.map(|(sum, verify)| (Some(sum), verify))?,
                    };
                    let stages =
                        ReceiveStages { fetch: arrived.fetch, verify, ..Default::default() };
                    return Ok((arrived.bytes.clone(), sum, stages));
                }
            }
        }
    }
}

/// What ranks do that wait for all others, before they join them.
pub(super) const JOINING: &str = "waiting for all ranks to enter the update";

impl<L: FetchLink> Session<'_, L> {
    /// The next verified bucket; `None` when the version is active.
    async fn next(&mut self) -> Result<Option<ReceivedBucket>> {
        if let Some(ticket) = self.joining.take() {
            while ticket.together && !self.may_join {
                // The trainer says who does not come, and takes a deadline to find out.
                let Receiver { control, deadline, .. } = &*self.receiver;
                let event = event_of_update(control, *deadline * 3, JOINING).await?;
                self.take(event).await?;
            }
            self.join(&ticket).await?;
            if ticket.together {
                let update = self.begin.update;
                tell_leader(&self.receiver.control, &ToSender::Joined { update });
            }
        }
        if let Some((span, begun)) = self.installing.take() {
            self.stages.install += begun.elapsed();
            drop(span);
        }
        loop {
            self.take_arrived().await?;
            match self.coming.front_mut() {
                None => self.await_event("waiting for the next bucket").await?,
                Some(Coming::Bucket { index, digest, stage, .. }) => {
                    let (index, digest) = (*index, *digest);
                    let Receiver { control, deadline, .. } = &*self.receiver;
                    let operation = "waiting for a bucket's bytes";
                    // What happens meanwhile, happens now: further fetches, or the update's end.
                    let (bytes, sum, stages) = tokio::select! {
                        biased;
                        ready = stage.ready(self.begin.routed) => match ready {
                            Ok(ready) => ready,
                            Err(error) => return Err(self.first_cause(error.bucket(index)).await),
                        },
                        event = event_of_update(control, *deadline, operation) => {
                            let event = event.map_err(|error| error.bucket(index))?;
                            self.take(event).await?;
                            continue;
                        }
                    };
                    // With the bytes goes this stage's share of them.
                    self.coming.pop_front();
                    self.stages.fetch += stages.fetch;
                    self.stages.verify += stages.verify;
                    let bucket = self.verified(index, bytes, digest, sum)?;
                    // The next bucket, if it is announced, comes while the caller works on this one.
                    self.take_arrived().await?;
                    let span = debug_span!(parent: &self.span, "install", bucket = index);
                    self.installing = Some((span, Instant::now()));
                    return Ok(Some(bucket));
                }
                Some(Coming::End { buckets, digest, plan }) => {
                    let (buckets, digest, plan) = (*buckets, *digest, *plan);
                    self.finish(buckets, digest, plan).await?;
                    return Ok(None);
                }
            }
        }
    }

    /// Why the update failed here: what a transport sees of a rank that died is that something broke,
    /// and the trainer says which rank it was.
    async fn first_cause(&mut self, error: Error) -> Error {
        const MOMENT: Duration = Duration::from_secs(1);
        if !is_of_transport(&error) {
            return error;
        }
        let version = self.begin.version;
        self.guard.fail(&error.report().clone().into());
        let cause = async {
            loop {
                let control = &self.receiver.control;
                let event = event_of_update(control, MOMENT, "hearing of the cause").await?;
                if is_abort(&event, self.begin.update)
                    && let Some(ToReceiver::Abort { error, .. }) = message(event.clone())?
                {
                    return Err::<(), _>(Error::from(error));
                }
                // The trainer is gone, or it has told of a bucket before it knew.
                if let Some(begin) = between(control, event)? {
                    self.receiver.announced = Some(begin);
                }
            }
        };
        match clock::within(MOMENT, cause).await {
            Some(Err(cause)) if cause.kind() != ErrorKind::Timeout => cause.with_source(error),
            _ => error.version(version),
        }
    }

    /// Joins the other ranks, unless one of them ends the update meanwhile.
    async fn join(&mut self, ticket: &Ticket) -> Result<()> {
        let mut early = Vec::new();
        let Receiver { link, control, announced, .. } = &mut *self.receiver;
        {
            let mut joining = std::pin::pin!(link.join(ticket));
            loop {
                tokio::select! {
                    biased;
                    joined = &mut joining => {
                        if let Err(error) = joined {
                            for event in early {
                                release(control, announced, event);
                            }
                            return Err(error);
                        }
                        break;
                    }
                    event = control.recv(LONG) => match event? {
                        Some(event) if ends(&event, self.begin.update) => {
                            early.push(event);
                            break;
                        }
                        event => early.extend(event),
                    }
                }
            }
        }
        for event in early {
            self.take(event).await?;
        }
        Ok(())
    }

    fn verified(
        &mut self,
        index: u64,
        bytes: Storage,
        digest: u64,
        sum: Option<u64>,
    ) -> Result<ReceivedBucket> {
        let layout = self.layouts[index as usize].clone();
        let bucket = ReceivedBucket::new(index, layout.clone(), bytes)?
            .with_pool(self.receiver.pool.clone());
        let (sent, filled) = (digest, layout.filled());
        if let Some(sum) = sum {
            let here = digest::finish(sum, filled);
            if here != sent {
                let message = format!("its digest is {here:016x}, the trainer sent {sent:016x}");
                return Err(Error::new(ErrorKind::Digest, "verifying a bucket", message)
                    .rank(self.receiver.control.rank())
                    .bucket(index));
            }
        }
        self.version_digest = digest::chain(self.version_digest, sent);
        let mut bytes = 0;
        for piece in layout.pieces() {
            bytes += piece.len;
            self.counts.0 += u64::from(piece.start == 0);
        }
        self.counts.1 += bytes;
        self.receiver.meter.observe(&Progress::Bucket { index, bytes });
        Ok(bucket)
    }

    /// Waits for the trainer.
    async fn await_event(&mut self, operation: &str) -> Result<()> {
        let Receiver { control, deadline, .. } = &*self.receiver;
        let event = event_of_update(control, *deadline, operation).await;
        self.take(event.map_err(|error| error.bucket(self.taken))?).await
    }

    async fn take_arrived(&mut self) -> Result<()> {
        while let Some(event) = arrived_event(&self.receiver.control).await? {
            self.take(event).await?;
        }
        Ok(())
    }

    async fn take(&mut self, event: Event) -> Result<()> {
        let present = self.begin.update;
        let bucket = self.taken;
        match message(event).map_err(|error| error.bucket(bucket))? {
            Some(ToReceiver::Bucket { update, index, slot, digest, layout })
                if update == present =>
            {
                // From here on the bucket is released when this is dropped, whatever happens. Where
                // buckets are routed, that begins with the fetch.
                let routed = self.begin.routed;
                let held = (!routed).then(|| self.receiver.ledger.hold(update, index));
                self.take_bucket(index, slot, digest, layout, held)
                    .await
                    .map_err(|error| error.bucket(index))
            }
            Some(ToReceiver::Bucket { update, index, .. }) => {
                drop(self.receiver.ledger.hold(update, index));
                Ok(())
            }
            Some(ToReceiver::Fetch { update, index, from, card }) if update == present => {
                self.fetch(index, from, card).await;
                Ok(())
            }
            Some(ToReceiver::End { update, buckets, digest, plan }) if update == present => {
                self.coming.push_back(Coming::End { buckets, digest, plan });
                Ok(())
            }
            Some(ToReceiver::Join { update }) if update == present => {
                self.may_join = true;
                Ok(())
            }
            Some(ToReceiver::Abort { update, error }) if update == present => {
                self.guard.disarm(false);
                Err(Error::from(error))
            }
            Some(ToReceiver::Commit { update }) if update == present => {
                self.committed = true;
                Ok(())
            }
            Some(ToReceiver::Begin(begin)) if begin.update != present => {
                // This one has ended at the trainer, and its end did not come here.
                self.receiver.announced = Some(begin);
                let message = "another update began within this one";
                Err(Error::new(ErrorKind::Protocol, "receiving weights", message)
                    .recovery(Recovery::Retry))
            }
            Some(ToReceiver::Alive { .. }) => Ok(()),
            Some(other) => {
                debug!(?other, "a message of another update");
                Ok(())
            }
            None => Ok(()),
        }
    }

    async fn take_bucket(
        &mut self,
        index: u64,
        slot: u32,
        digest: u64,
        layout: Layout,
        held: Option<Hold>,
    ) -> Result<()> {
        let refuse = |message: String| Error::new(ErrorKind::Protocol, "taking a bucket", message);
        if index != self.taken {
            return Err(refuse(format!("bucket {} was expected", self.taken)));
        }
        let layout = match layout {
            Layout::Explicit { pieces } => {
                self.checker.check(&pieces)?;
                Arc::new(BucketLayout::new(pieces))
            }
            Layout::Known { digest } => {
                let known = self.receiver.plan.buckets.get(index as usize);
                let layout = known.filter(|layout| layout.digest() == digest).cloned();
                let layout = layout
                    .ok_or_else(|| refuse("its layout is not the one of the last update".into()))?;
                self.checker.check(layout.pieces())?;
                layout
            }
        };
        self.layouts.push(layout);
        self.taken += 1;
        self.coming.push_back(Coming::Bucket { index, slot, digest, stage: Stage::Announced });
        if let Some(held) = held {
            self.start_fetch(index, self.begin.sender_of(index), Bytes::new(), held).await;
        }
        Ok(())
    }

    /// Starts to fetch a bucket from where the trainer says, unless it is here already.
    async fn fetch(&mut self, index: u64, from: Rank, card: Bytes) {
        let held = self.receiver.ledger.hold(self.begin.update, index);
        self.start_fetch(index, from, card, held).await;
    }

    async fn start_fetch(&mut self, index: u64, from: Rank, card: Bytes, held: Hold) {
        let found = self.coming.iter_mut().find_map(|coming| match coming {
            Coming::Bucket { index: at, slot, stage, .. } if *at == index => Some((slot, stage)),
            _ => None,
        });
        let Some((&mut slot, stage)) = found else { return };
        match stage {
            Stage::Here(_) => return,
            // The trainer has given up on the rank that it named before.
            Stage::Fetching { from, arrival } => {
                self.receiver.link.abandon(*from);
                if let Ok(Ok(arrived)) = arrival.await {
                    *stage = Stage::Here(arrived);
                    return;
                }
            }
            Stage::Announced => {}
        }
        let (session, arrival) = oneshot::channel();
        *stage = Stage::Fetching { from, arrival };
        let layout = &self.layouts[index as usize];
        let fetch = Fetch { from, card, slot, filled: layout.filled() };
        let arrival = Arrival {
            index,
            from,
            routed: self.begin.routed,
            check: self.begin.digests.then(|| layout.clone()),
            held,
            pool: self.receiver.pool.clone(),
            session,
            stage: (
                debug_span!(parent: &self.span, "fetch", bucket = index, %from),
                Instant::now(),
            ),
        };
        self.receiver.link.fetch(fetch, arrival).await;
    }

    /// Verifies the version as a whole, confirms it, and waits until it is active everywhere.
    async fn finish(&mut self, buckets: u64, digest: u64, plan: u64) -> Result<()> {
        let rank = self.receiver.control.rank();
        let layouts = Plan { buckets: std::mem::take(&mut self.layouts) };
        let bucket_bytes = self.begin.bucket_bytes;
        std::mem::replace(&mut self.checker, LayoutChecker::new(bucket_bytes)).finish()?;
        let here = (self.taken, self.version_digest, layouts.digest());
        if here != (buckets, digest, plan) {
            let message = format!(
                "{} buckets of digest {:016x} and plan {:016x} arrived, the trainer sent {buckets} \
                 of {digest:016x} and {plan:016x}",
                here.0, here.1, here.2
            );
            return Err(Error::new(ErrorKind::Digest, "verifying a version", message).rank(rank));
        }
        self.guard.outcome.check()?;
        self.receiver.meter.observe(&Progress::State { rank, state: VersionState::Ready });
        self.receiver.control.send(
            Rank::LEADER,
            encode(&ToSender::Confirm {
                update: self.begin.update,
                digest,
                seconds: self.begun.elapsed().as_secs_f64(),
                notes: self.guard.outcome.take_notes().to_string(),
            })?,
        )?;
        while !self.committed {
            let operation = "waiting for the trainer to commit the version";
            let Receiver { control, deadline, .. } = &*self.receiver;
            let event = event_of_update(control, *deadline, operation).await?;
            self.take(event).await.map_err(|error| error.rank(Rank::LEADER))?;
        }
        self.guard.disarm(true);
        self.receiver.plan = layouts;
        self.receiver.known = Some(plan);
        self.receiver.meter.observe(&Progress::State { rank, state: VersionState::Active });
        let report = ReceiveReport {
            version: self.begin.version,
            state: VersionState::Active,
            tensors: self.counts.0,
            bytes: self.counts.1,
            buckets,
            elapsed: self.begun.elapsed(),
            digest: self.begin.digests.then_some(digest),
        };
        self.receiver.meter.received(report.bytes, report.elapsed, self.stages);
        info!(
            version = %report.version, tensors = report.tensors, bytes = report.bytes,
            "version is active"
        );
        self.guard.outcome.complete(report);
        Ok(())
    }
}

pub(super) fn tell_leader(control: &Arc<dyn Control>, message: &ToSender) {
    let told = encode(message).and_then(|body| control.send(Rank::LEADER, body));
    if let Err(error) = told {
        // The trainer is gone, and with it the need to tell it.
        debug!(?message, %error, "the trainer could not be told");
    }
}

/// The buckets that this rank reads, or may read: those that the trainer must not write to.
#[derive(Clone, Debug)]
struct Ledger {
    control: Arc<dyn Control>,
    /// Update and index of each, and how many hold it.
    held: Arc<Mutex<BTreeMap<(u64, u64), usize>>>,
}

impl Ledger {
    /// Holds a bucket that the trainer has told of.
    fn hold(&self, update: u64, index: u64) -> Hold {
        *self.lock().entry((update, index)).or_default() += 1;
        Hold { ledger: self.clone(), update, index }
    }

    /// Tells the trainer that this rank enters an update, and what it has.
    fn enter(&self, update: u64, card: Bytes, plan: Option<u64>) -> Result<()> {
        // Sent under the lock: a release comes before it, or after it and is not among these.
        let held = self.lock();
        let buckets = held.keys().copied().collect();
        let entered = ToSender::Entered { update, card, plan, held: buckets };
        self.control.send(Rank::LEADER, encode(&entered)?)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(u64, u64), usize>> {
        // Every change is complete before anything can panic.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A bucket that is held, until this and everything that shares it is dropped: then the trainer is told.
#[derive(Debug)]
struct Hold {
    ledger: Ledger,
    update: u64,
    index: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let (update, index) = (self.update, self.index);
        let mut held = self.ledger.lock();
        if let Entry::Occupied(mut entry) = held.entry((update, index)) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
                tell_leader(&self.ledger.control, &ToSender::Release { update, index });
            }
        }
    }
}

/// Tells the leader, when dropped before the end, that this rank gave up.
pub(super) struct Guard {
    pub(super) control: Arc<dyn Control>,
    pub(super) meter: Meter,
    pub(super) update: u64,
    pub(super) version: Version,
    /// Where the reason may have been left.
    pub(super) outcome: Outcome,
    pub(super) armed: bool,
    /// The reason, if nobody says one.
    pub(super) unsaid: &'static str,
}

impl Guard {
    /// The update has ended here, with the version or without.
    pub(super) fn disarm(&mut self, committed: bool) {
        if std::mem::take(&mut self.armed) && !committed {
            self.meter.aborted(&[]);
        }
    }

    pub(super) fn fail(&mut self, error: &Error) {
        if !self.armed {
            return;
        }
        self.disarm(false);
        warn!(version = %self.version, %error, "update given up");
        let (update, error) = (self.update, ErrorReport::from(error));
        tell_leader(&self.control, &ToSender::Failed { update, error });
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let unsaid = || Error::new(ErrorKind::Aborted, "in an update", self.unsaid);
        let error = self.outcome.take_failure().unwrap_or_else(unsaid);
        self.fail(&error.rank(self.control.rank()).version(self.version));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::memory::Group;
    use crate::update::message::ToReceiver::{Abort, Begin as Beginning};

    fn begin(update: u64) -> Bytes {
        let begin = Begin {
            update,
            version: Version(update),
            bucket_bytes: 256,
            slots: 2,
            digests: true,
            routed: false,
            senders: vec![Rank::LEADER],
            ticket: None,
        };
        encode(&Beginning(begin)).unwrap()
    }

    #[tokio::test]
    async fn an_update_that_is_over_is_no_mismatch_even_if_its_end_comes_a_little_later() {
        let limit = Duration::from_secs(10);
        let group = Group::default();
        let (leader, rollout) = (group.lead(), group.enter(Rank(1)));

        leader.send(Rank(1), begin(1)).unwrap();
        let later = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let error = ErrorReport::from(&Error::new(ErrorKind::Timeout, "sending", "too slow"));
            leader.send(Rank(1), encode(&Abort { update: 1, error }).unwrap()).unwrap();
            leader.send(Rank(1), begin(2)).unwrap();
        };
        let mut announced = None;
        let wait = within(limit, "waiting", wait_for(&rollout, &mut announced, Some(Version(2))));
        let (found, ()) = futures::future::join(wait, later).await;
        assert_eq!(found.unwrap().unwrap().update, 2);

        // One that goes on is a mismatch, soon.
        leader.send(Rank(1), begin(3)).unwrap();
        let mut announced = None;
        let wait = within(limit, "waiting", wait_for(&rollout, &mut announced, Some(Version(4))));
        let error = wait.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
    }
}

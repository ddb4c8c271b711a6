//! A rollout's side of an update.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use tracing::{debug, info, warn};

use super::message::{Layout, ToReceiver, ToSender, decode, encode};
use super::{arrived_event, next_event, within};
use crate::control::{ControlPlane, Event};
use crate::memory::{Pool, Work};
use crate::observe::{Observer, Progress};
use crate::plan::{BucketLayout, LayoutChecker, Plan};
use crate::received::{Outcome, ReceivedBucket, ReceivedWeights};
use crate::report::{ReceiveReport, VersionState};
use crate::{
    EngineContext, Error, ErrorKind, ErrorReport, Rank, Recovery, Result, Version, digest,
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
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Bytes>;
}

/// A rollout's side of the protocol, over a transport's link.
#[derive(Debug)]
pub struct Receiver<L> {
    link: L,
    control: ControlPlane,
    pool: Pool,
    /// The layouts of the last complete update.
    plan: Plan,
    deadline: Duration,
    observer: Arc<dyn Observer>,
}

/// The announcement of an update.
#[derive(Clone, Copy, Debug)]
struct Begin {
    update: u64,
    version: Version,
    bucket_bytes: u64,
    digests: bool,
}

impl<L: ReceiveLink> Receiver<L> {
    /// The receiver of a group that the control plane connects to.
    pub fn new(link: L, context: &EngineContext, control: ControlPlane, pool: Pool) -> Self {
        Self {
            link,
            control,
            pool,
            plan: Plan::default(),
            deadline: context.deadline(),
            observer: context.observer.clone(),
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
        let begin = within(self.deadline, operation, self.wait_for(expected))
            .await
            .map_err(|error| error.rank(Rank::LEADER))??;
        let Begin { update, version, bucket_bytes, .. } = begin;
        self.control.send(Rank::LEADER, encode(&ToSender::Entered { update })?)?;
        self.observer.observe(&Progress::Began { version, receivers: vec![self.control.rank()] });
        let outcome = Outcome::default();
        let session = Session {
            begin,
            begun: Instant::now(),
            arrived: VecDeque::new(),
            layouts: Vec::new(),
            checker: LayoutChecker::new(bucket_bytes),
            taken: 0,
            version_digest: 0,
            counts: (0, 0),
            guard: Guard { control: self.control.clone(), begin, outcome, armed: true },
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

    async fn wait_for(&mut self, expected: Option<Version>) -> Result<Begin> {
        loop {
            let Some(event) = self.control.recv(self.deadline).await? else { continue };
            let Some(mut begin) = self.between(event)? else { continue };
            loop {
                let Some(expected) = expected.filter(|&version| version != begin.version) else {
                    return Ok(begin);
                };
                // The update may have been aborted long ago, while nobody listened here.
                match arrived_event(&self.control).await? {
                    Some(event) if is_abort(&event, begin.update) => break,
                    Some(event) => begin = self.between(event)?.unwrap_or(begin),
                    None => return Err(self.mismatch(&begin, expected)?),
                }
            }
        }
    }

    /// Tells the trainer that this rank expects another version.
    fn mismatch(&self, begin: &Begin, expected: Version) -> Result<Error> {
        let message =
            format!("the trainer sends version {}, this rank expects {expected}", begin.version);
        let error =
            Error::new(ErrorKind::Mismatch, "receiving weights", message).rank(self.control.rank());
        let (update, report) = (begin.update, ErrorReport::from(&error));
        self.control.send(Rank::LEADER, encode(&ToSender::Failed { update, error: report })?)?;
        Ok(error)
    }

    /// Takes in an event while no update is being received: what is left of a dead update is thrown
    /// away, its buckets are released.
    fn between(&mut self, event: Event) -> Result<Option<Begin>> {
        match message(event)? {
            Some(ToReceiver::Begin { update, version, bucket_bytes, digests }) => {
                Ok(Some(Begin { update, version, bucket_bytes, digests }))
            }
            Some(ToReceiver::Bucket { update, index, .. }) => {
                self.control.send(Rank::LEADER, encode(&ToSender::Release { update, index })?)?;
                Ok(None)
            }
            _ => Ok(None),
        }
    }
}

/// The trainer's message of an event; an error if the trainer is gone.
fn message(event: Event) -> Result<Option<ToReceiver>> {
    match event {
        Event::Message { from: Rank::LEADER, body } => {
            decode(&body).map(Some).map_err(|error| error.rank(Rank::LEADER))
        }
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

fn is_abort(event: &Event, of: u64) -> bool {
    let Event::Message { body, .. } = event else { return false };
    matches!(decode(body), Ok(ToReceiver::Abort { update, .. }) if update == of)
}

/// One update, from its announcement to its end.
struct Session<'a, L> {
    receiver: &'a mut Receiver<L>,
    begin: Begin,
    begun: Instant,
    /// Buckets that are being verified, and what came after them.
    arrived: VecDeque<Arrived>,
    layouts: Vec<Arc<BucketLayout>>,
    checker: LayoutChecker,
    taken: u64,
    version_digest: u64,
    /// Tensors and bytes so far.
    counts: (u64, u64),
    guard: Guard,
}

enum Arrived {
    Bucket { bucket: ReceivedBucket, digest: u64, check: Option<Work<u64>> },
    End { buckets: u64, digest: u64, plan: u64 },
}

impl<L: ReceiveLink> Session<'_, L> {
    /// The next verified bucket; `None` when the version is active.
    async fn next(&mut self) -> Result<Option<ReceivedBucket>> {
        loop {
            self.take_arrived().await?;
            match self.arrived.pop_front() {
                None => self.await_event("waiting for the next bucket").await?,
                Some(Arrived::Bucket { bucket, digest, check }) => {
                    let sum = match check {
                        None => None,
                        Some(check) => Some(check.await?),
                    };
                    let bucket = self.verified(bucket, digest, sum)?;
                    // The next bucket, if it is here, is verified while the caller works on this one.
                    self.take_arrived().await?;
                    return Ok(Some(bucket));
                }
                Some(Arrived::End { buckets, digest, plan }) => {
                    self.finish(buckets, digest, plan).await?;
                    return Ok(None);
                }
            }
        }
    }

    fn verified(
        &mut self,
        bucket: ReceivedBucket,
        digest: u64,
        sum: Option<u64>,
    ) -> Result<ReceivedBucket> {
        let index = bucket.index();
        let layout = &self.layouts[index as usize];
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
        self.receiver.observer.observe(&Progress::Bucket { index, bytes });
        Ok(bucket)
    }

    /// Waits for the trainer.
    async fn await_event(&mut self, operation: &str) -> Result<()> {
        // Longer than the trainer's own deadline, so that it can name the cause first.
        let deadline = self.receiver.deadline + self.receiver.deadline / 4;
        let event = next_event(&self.receiver.control, deadline, operation)
            .await
            .map_err(|error| error.rank(Rank::LEADER).bucket(self.taken))?;
        self.take(event).await
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
                self.take_bucket(index, slot, digest, layout)
                    .await
                    .map_err(|error| error.bucket(index))
            }
            Some(ToReceiver::End { update, buckets, digest, plan }) if update == present => {
                self.arrived.push_back(Arrived::End { buckets, digest, plan });
                Ok(())
            }
            Some(ToReceiver::Abort { update, error }) if update == present => {
                self.guard.armed = false;
                Err(Error::from(error))
            }
            Some(ToReceiver::Begin { update, .. }) if update != present => Err(Error::new(
                ErrorKind::Protocol,
                "receiving weights",
                "another update began within this one",
            )),
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
    ) -> Result<()> {
        let release =
            Release { control: self.receiver.control.clone(), update: self.begin.update, index };
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
        let bytes = self.receiver.link.fetch(slot, layout.filled()).await?;
        // From here on the bucket is released when the last view of it is dropped.
        let bytes = Bytes::from_owner(Lease { bytes, _release: release });
        let check = self.begin.digests.then(|| {
            let (pool, layout, bytes) = (self.receiver.pool.clone(), layout.clone(), bytes.clone());
            self.receiver.pool.start(move || Ok(pool.digest(layout.pieces(), &bytes)))
        });
        let bucket = ReceivedBucket::new(index, layout.clone(), bytes)?;
        self.arrived.push_back(Arrived::Bucket { bucket, digest, check });
        self.layouts.push(layout);
        self.taken += 1;
        Ok(())
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
        self.receiver.observer.observe(&Progress::State { rank, state: VersionState::Ready });
        self.receiver.control.send(
            Rank::LEADER,
            encode(&ToSender::Confirm {
                update: self.begin.update,
                digest,
                seconds: self.begun.elapsed().as_secs_f64(),
                notes: self.guard.outcome.take_notes().to_string(),
            })?,
        )?;
        let deadline = self.receiver.deadline + self.receiver.deadline / 4;
        let committed = async {
            loop {
                let operation = "waiting for the trainer to commit the version";
                let event = next_event(&self.receiver.control, deadline, operation);
                match message(event.await?)? {
                    Some(ToReceiver::Commit { update }) if update == self.begin.update => {
                        return Ok(());
                    }
                    Some(ToReceiver::Abort { update, error }) if update == self.begin.update => {
                        return Err(Error::from(error));
                    }
                    other => debug!(?other, "while waiting for the commit"),
                }
            }
        };
        committed.await.map_err(|error: Error| error.rank(Rank::LEADER))?;
        self.guard.armed = false;
        self.receiver.plan = layouts;
        self.receiver.observer.observe(&Progress::State { rank, state: VersionState::Active });
        let report = ReceiveReport {
            version: self.begin.version,
            state: VersionState::Active,
            tensors: self.counts.0,
            bytes: self.counts.1,
            buckets,
            elapsed: self.begun.elapsed(),
            digest: self.begin.digests.then_some(digest),
        };
        info!(
            version = %report.version, tensors = report.tensors, bytes = report.bytes,
            "version is active"
        );
        self.guard.outcome.complete(report);
        Ok(())
    }
}

/// Bytes of a bucket; dropping them releases it.
struct Lease {
    bytes: Bytes,
    _release: Release,
}

impl AsRef<[u8]> for Lease {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Tells the trainer, when dropped, that this rank does not read a bucket any more.
struct Release {
    control: ControlPlane,
    update: u64,
    index: u64,
}

impl Drop for Release {
    fn drop(&mut self) {
        let (update, index) = (self.update, self.index);
        let told = encode(&ToSender::Release { update, index })
            .and_then(|body| self.control.send(Rank::LEADER, body));
        if let Err(error) = told {
            // The trainer is gone, and with it the need to tell it.
            debug!(index, %error, "a bucket could not be released");
        }
    }
}

/// Tells the trainer, when dropped before the end, that this rank gave up.
struct Guard {
    control: ControlPlane,
    begin: Begin,
    outcome: Outcome,
    armed: bool,
}

impl Guard {
    fn fail(&mut self, error: &Error) {
        if !std::mem::take(&mut self.armed) {
            return;
        }
        warn!(version = %self.begin.version, %error, "update given up");
        let (update, error) = (self.begin.update, ErrorReport::from(error));
        let told = encode(&ToSender::Failed { update, error })
            .and_then(|body| self.control.send(Rank::LEADER, body));
        if let Err(error) = told {
            debug!(%error, "the trainer could not be told of a failure");
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let error = self.outcome.take_failure().unwrap_or_else(|| {
            let words = "the receiver dropped the stream before its end";
            Error::new(ErrorKind::Aborted, "receiving weights", words)
        });
        self.fail(&error.rank(self.control.rank()).version(self.begin.version));
    }
}

//! A trainer that sends a part of the buckets, beside the leader.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use tracing::{Instrument, debug, debug_span};

use super::collect::{Bucket, Collector};
use super::message::{Begin, ToReceiver, ToSender, encode};
use super::receiver::{Guard, JOINING, event_of_update, message, tell_leader, wait_for};
use super::sender::{ENCODING, Ending, Ends};
use super::{LONG, SendLink, settle, within};
use crate::control::{Control, Event};
use crate::observe::{Observer as _, Progress};
use crate::plan::Plan;
use crate::received::Outcome;
use crate::report::{SendReport, StageTimes, VersionState};
use crate::telemetry::Meter;
use crate::{
    EngineContext, Error, ErrorKind, Rank, Recovery, Result, Version, WeightStream, digest,
};

/// The side of the protocol of a trainer other than the leader, over a transport's link.
///
/// Its stream has the same weights as the leader's, in the same order.
#[derive(Debug)]
pub struct CoSender<L> {
    link: L,
    control: Arc<dyn Control>,
    plan: Plan,
    /// An update that was announced, and that this rank has no part in yet.
    announced: Option<Begin>,
    deadline: Duration,
    meter: Meter,
}

impl<L: SendLink> CoSender<L> {
    /// A sender in a group whose leader counts this rank among the senders.
    pub fn new(link: L, context: &EngineContext, control: Arc<dyn Control>) -> Self {
        let meter = Meter::new(control.rank(), context.observer.clone());
        let deadline = context.deadline();
        Self { link, control, plan: Plan::default(), announced: None, deadline, meter }
    }

    /// Sends this rank's part of the leader's next update, which has to be of this version.
    ///
    /// The report counts the weights of the whole stream, and has no receivers: they report to the leader.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future aborts the update on every rank; the next one works.
    ///
    /// # Errors
    ///
    /// The first failure of any rank; `Mismatch` if the leader sends another version or has another
    /// stream.
    #[tracing::instrument(skip_all, fields(version = %version))]
    pub async fn send(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let operation = "waiting for the leader to begin the update";
        let begun = wait_for(&self.control, &mut self.announced, Some(version));
        let begin = within(self.deadline, operation, begun)
            .await
            .map_err(|error| error.rank(Rank::LEADER).version(version))??;
        let mut guard = Guard {
            control: self.control.clone(),
            meter: self.meter.clone(),
            update: begin.update,
            version,
            outcome: Outcome::default(),
            armed: true,
            unsaid: "the trainer dropped the update",
        };
        let ending = Ending::new(self);
        let result = ending.sender.run(&begin, weights).await;
        ending.end(result.is_ok());
        match result {
            Ok(report) => {
                guard.disarm(true);
                self.meter.sent(&report);
                Ok(report)
            }
            Err(Failure::Here(error)) => {
                let error = error.version(version);
                guard.fail(&error);
                Err(error)
            }
            Err(Failure::Elsewhere(error)) => {
                guard.disarm(false);
                Err(error)
            }
        }
    }

    async fn run(
        &mut self,
        begin: &Begin,
        mut weights: WeightStream<'_>,
    ) -> Result<SendReport, Failure> {
        let Self { link, control, announced, deadline, meter, plan: last } = self;
        let (deadline, begun) = (*deadline, Instant::now());
        let rank = control.rank();
        let mut listener = Listener {
            control,
            update: begin.update,
            deadline,
            fills: Vec::new(),
            end: None,
            may_join: false,
            committed: false,
            announced,
        };
        let here = (link.bucket_bytes(), link.slots());
        if here != (begin.bucket_bytes, begin.slots as usize) {
            let message = format!(
                "it has {} slots of {} bytes, the leader {} of {}",
                here.1, here.0, begin.slots, begin.bucket_bytes
            );
            return Err(Error::new(ErrorKind::Mismatch, SENDING, message).rank(rank).into());
        }
        let (update, card) = (begin.update, link.card());
        let entered = ToSender::Entered { update, card, plan: None, held: Vec::new() };
        control.send(Rank::LEADER, encode(&entered)?)?;
        meter.observe(&Progress::Began { version: begin.version, receivers: Vec::new() });
        if let Some(ticket) = &begin.ticket {
            while ticket.together && !listener.may_join {
                // The leader says who does not come, and takes a deadline to find out.
                listener.take(event_of_update(control, deadline * 3, JOINING).await?)?;
            }
            listener.watch(link.join(ticket)).await??;
            if ticket.together {
                tell_leader(control, &ToSender::Joined { update: begin.update });
            }
        }

        let mut stages = StageTimes::default();
        let mut collector = Collector::new(last, begin.bucket_bytes)?;
        let mut layouts = Vec::new();
        loop {
            let index = layouts.len() as u64;
            let started = Instant::now();
            let collect = collector.next_bucket(&mut weights, deadline);
            let next = listener.watch(collect.instrument(debug_span!("collect", bucket = index)));
            let next = next.await??;
            stages.source += started.elapsed();
            let Some(Bucket { jobs, layout, .. }) = next else { break };
            if begin.sender_of(index) == rank {
                let waiting = Instant::now();
                let slot = listener.wait_for_slot(index, layout.digest()).await?;
                stages.release += waiting.elapsed();

                let encoding = Instant::now();
                let sum = {
                    let fill = link.fill(slot, jobs, begin.digests);
                    let fill = fill.instrument(debug_span!("encode", bucket = index)).fuse();
                    let mut fill = std::pin::pin!(fill);
                    let in_time = within(deadline, ENCODING, fill.as_mut()).map(Result::flatten);
                    match listener.watch(in_time).await {
                        Ok(Ok(sum)) => sum,
                        Ok(Err(error)) => {
                            return Err(settle(fill, deadline, error.bucket(index)).await.into());
                        }
                        Err(Failure::Here(error)) => {
                            return Err(settle(fill, deadline, error).await.into());
                        }
                        Err(Failure::Elsewhere(error)) => {
                            return Err(Failure::Elsewhere(settle(fill, deadline, error).await));
                        }
                    }
                };
                stages.encode += encoding.elapsed();
                let (publishing, filled) = (Instant::now(), layout.filled());
                link.publish(slot, filled).await.map_err(|error| error.bucket(index))?;
                stages.publish += publishing.elapsed();
                let digest = digest::finish(sum, filled);
                tell_leader(control, &ToSender::Filled { update: begin.update, index, digest });
            }
            layouts.push(layout);
        }

        let plan_reused = collector.reused(layouts.len());
        let plan = Plan { buckets: layouts };
        let confirming = Instant::now();
        let (buckets, version_digest, plan_digest) = listener.wait_for_end().await?;
        if (buckets, plan_digest) != (plan.buckets.len() as u64, plan.digest()) {
            return Err(other_stream(rank).into());
        }
        control.send(
            Rank::LEADER,
            encode(&ToSender::Confirm {
                update: begin.update,
                digest: version_digest,
                seconds: begun.elapsed().as_secs_f64(),
                notes: "null".into(),
            })?,
        )?;
        listener.wait_for_commit().await?;
        stages.confirm = confirming.elapsed();
        meter.observe(&Progress::State { rank, state: VersionState::Active });
        *last = plan;
        Ok(SendReport {
            version: begin.version,
            counts: collector.counts,
            buckets,
            plan_reused,
            elapsed: begun.elapsed(),
            stages,
            digest: begin.digests.then_some(version_digest),
            receivers: Vec::new(),
            absent: Vec::new(),
        })
    }
}

const SENDING: &str = "sending a part of the buckets";

fn other_stream(rank: Rank) -> Error {
    let message = "its weights, or their order, are not the leader's";
    Error::new(ErrorKind::Mismatch, SENDING, message).rank(rank)
}

impl<L: SendLink> Ends for CoSender<L> {
    fn end(&mut self, committed: bool) {
        self.link.end(committed);
    }
}

/// Why an update failed.
#[derive(Debug)]
enum Failure {
    /// For a reason that the leader does not know yet.
    Here(Error),
    /// The leader has ended it.
    Elsewhere(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Here(error)
    }
}

/// Hears what the leader says within an update.
struct Listener<'a> {
    control: &'a Arc<dyn Control>,
    update: u64,
    deadline: Duration,
    /// The buckets that it wants filled: their slots and layouts.
    fills: Vec<(u64, u32, u64)>,
    end: Option<End>,
    /// Whether all ranks are in the update.
    may_join: bool,
    committed: bool,
    /// Where the announcement of another update is kept.
    announced: &'a mut Option<Begin>,
}

/// What ends an update's data: the number of buckets, and the digests of the version and of the plan.
type End = (u64, u64, u64);

impl Listener<'_> {
    /// Awaits work of this rank, unless the leader ends the update meanwhile.
    async fn watch<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Failure> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                event = self.control.recv(LONG) => {
                    if let Some(event) = event? {
                        self.take(event)?;
                    }
                }
            }
        }
    }

    async fn wait_for_slot(&mut self, bucket: u64, layout: u64) -> Result<usize, Failure> {
        loop {
            if let Some(at) = self.fills.iter().position(|(index, ..)| *index == bucket) {
                let (_, slot, expected) = self.fills.swap_remove(at);
                if layout != expected {
                    return Err(other_stream(self.control.rank()).bucket(bucket).into());
                }
                return Ok(slot as usize);
            }
            if self.end.is_some() {
                // The leader's stream has ended before this one.
                return Err(other_stream(self.control.rank()).bucket(bucket).into());
            }
            match self.next("waiting for the leader to free a slot").await {
                Err(Failure::Here(error)) => return Err(error.bucket(bucket).into()),
                result => result?,
            }
        }
    }

    async fn wait_for_end(&mut self) -> Result<End, Failure> {
        loop {
            if !self.fills.is_empty() {
                // The leader's stream has more than this one.
                return Err(other_stream(self.control.rank()).into());
            }
            match self.end {
                Some(end) => return Ok(end),
                None => self.next("waiting for the end of the update").await?,
            }
        }
    }

    async fn wait_for_commit(&mut self) -> Result<(), Failure> {
        while !self.committed {
            self.next("waiting for the leader to commit the version").await?;
        }
        Ok(())
    }

    async fn next(&mut self, operation: &str) -> Result<(), Failure> {
        self.take(event_of_update(self.control, self.deadline, operation).await?)
    }

    fn take(&mut self, event: Event) -> Result<(), Failure> {
        match message(event)? {
            Some(ToReceiver::Fill { update, index, slot, layout }) if update == self.update => {
                self.fills.push((index, slot, layout));
            }
            Some(ToReceiver::End { update, buckets, digest, plan }) if update == self.update => {
                self.end = Some((buckets, digest, plan));
            }
            Some(ToReceiver::Join { update }) if update == self.update => self.may_join = true,
            Some(ToReceiver::Commit { update }) if update == self.update => self.committed = true,
            Some(ToReceiver::Abort { update, error }) if update == self.update => {
                return Err(Failure::Elsewhere(error.into()));
            }
            Some(ToReceiver::Begin(begin)) if begin.update != self.update => {
                // This one has ended at the leader, and its end did not come here.
                *self.announced = Some(begin);
                let message = "another update began within this one";
                return Err(Error::new(ErrorKind::Protocol, SENDING, message)
                    .rank(Rank::LEADER)
                    .recovery(Recovery::Retry)
                    .into());
            }
            Some(ToReceiver::Alive { .. }) => {}
            other => debug!(?other, "a message of another update"),
        }
        Ok(())
    }
}

//! Trainers that send no weights of their own: idle ones, and relays that pass buckets on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use futures::future::try_join;

use super::follower::{Act, Follower};
use super::link::FetchLink;
use super::receiver::Receiver;
use super::{LONG, within};
use engine_core::control::Control;
use engine_core::memory::Pool;
use engine_core::{
    CheckpointEngine, EngineContext, ErrorReport, Result, RolloutEngine as _, SendReport,
    TrainerEngine, Version, WeightStream, no_copies,
};

/// An idle trainer's side of the protocol.
///
/// It reads its stream to the end, because that may be what gathers the weights of other ranks. The leader tells it
/// how the update ends; the update must have the same version. The report counts the weights of this rank's stream.
/// It lists no receivers, because they report to the leader.
#[derive(Debug)]
pub struct Witness {
    control: Arc<dyn Control>,
    follower: Box<Follower>,
    deadline: Duration,
}

impl Witness {
    /// A trainer to which the leader gave [`Part::Idle`](super::Part::Idle).
    pub fn new(context: &EngineContext, control: Arc<dyn Control>) -> Self {
        let deadline = context.deadline();
        Self {
            follower: Box::new(Follower::idle(control.rank(), deadline, control.updates())),
            control,
            deadline,
        }
    }
}

#[async_trait]
impl CheckpointEngine for Witness {
    async fn finalize(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl TrainerEngine for Witness {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let drained = drain(weights, version, self.deadline);
        let operation = "waiting for the leader to begin the update";
        self.follower.wait(Some(version), operation, Instant::now());
        let witnessed = Witnessed(&mut self.follower);
        let both = try_join(drained, witnessed.end(&*self.control)).await;
        both.map(|(report, ())| report).map_err(|error| error.version(version))
    }

    async fn send_part(&mut self, _: WeightStream<'_>, _: Version) -> Result<SendReport> {
        Err(no_copies("sending a part of a version"))
    }

    async fn attest(&mut self) -> Result<SendReport> {
        Err(no_copies("attesting a version"))
    }
}

/// A trainer that receives the leader's buckets so that the transport can pass them on from here. It keeps nothing.
#[derive(Debug)]
pub struct Relay<L> {
    receiver: Receiver<L>,
    deadline: Duration,
}

impl<L: FetchLink> Relay<L> {
    /// A trainer to which the leader gave [`Part::Relay`](super::Part::Relay).
    pub fn new(link: L, context: &EngineContext, control: Arc<dyn Control>, pool: Pool) -> Self {
        // It passes on what others want.
        let mut context = context.clone();
        context.config.wants = None;
        let receiver = Receiver::new(link, &context, control, pool);
        Self { receiver, deadline: context.deadline() }
    }
}

#[async_trait]
impl<L: FetchLink> CheckpointEngine for Relay<L> {
    async fn finalize(self: Box<Self>) -> Result<()> {
        Box::new(self.receiver).finalize().await
    }
}

#[async_trait]
impl<L: FetchLink> TrainerEngine for Relay<L> {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        // Before this rank reads its stream: the leader begins the update before it reads its own, and the ranks may
        // have to read together.
        let mut received = self.receiver.receive_weights(Some(version)).await?;
        let passed_on = async {
            while received.next_bucket().await?.is_some() {}
            Ok(())
        };
        let drained = drain(weights, version, self.deadline);
        let mut report = match try_join(drained, passed_on).await {
            Ok((report, ())) => report,
            Err(error) => {
                let report = ErrorReport::from(&error);
                received.fail(error);
                return Err(report.into());
            }
        };
        let received = received.finish().await?;
        report.buckets = received.buckets;
        report.digest = received.digest;
        report.elapsed = report.elapsed.max(received.elapsed);
        Ok(report)
    }

    async fn send_part(&mut self, _: WeightStream<'_>, _: Version) -> Result<SendReport> {
        Err(no_copies("sending a part of a version"))
    }

    async fn attest(&mut self) -> Result<SendReport> {
        Err(no_copies("attesting a version"))
    }
}

/// The wait for an update and its end, until this is dropped.
struct Witnessed<'a>(&'a mut Follower);

impl Witnessed<'_> {
    async fn end(self, control: &dyn Control) -> Result<()> {
        let follower = &mut *self.0;
        loop {
            while let Some(act) = follower.act() {
                if let Act::Send(message) = act {
                    super::receiver::tell_leader(control, &message);
                }
            }
            if let Some(entered) = follower.entered() {
                entered?;
            }
            if let Some(end) = follower.end() {
                return end.map(drop);
            }
            let timer = follower.timer();
            let left = timer.map_or(LONG, |at| at.saturating_duration_since(Instant::now()));
            match control.recv(left).await {
                Ok(Some(event)) => follower.event(event, Instant::now()),
                Ok(None) => {}
                Err(error) => follower.lost(error),
            }
            let now = Instant::now();
            if follower.timer().is_some_and(|at| now >= at) {
                follower.tick(now);
            }
        }
    }
}

impl Drop for Witnessed<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Reads a stream to its end and counts its weights: reading it may be what gathers the weights of other ranks.
async fn drain(
    mut weights: WeightStream<'_>,
    version: Version,
    deadline: Duration,
) -> Result<SendReport> {
    let begun = Instant::now();
    let mut report = SendReport::new(version);
    let operation = "waiting for the trainer's next weight";
    while let Some(weight) = within(deadline, operation, weights.next()).await? {
        report.counts.add(&weight?);
    }
    report.elapsed = begun.elapsed();
    Ok(report)
}

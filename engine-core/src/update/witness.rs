//! A trainer that sends none of the weights and receives none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;

use super::message::{Begin, ToReceiver};
use super::receiver::{event_of_update, message, wait_for};
use super::within;
use crate::control::Control;
use crate::report::{SendReport, StageTimes, TensorCounts};
use crate::{EngineContext, Error, ErrorKind, Rank, Recovery, Result, Version, WeightStream};

/// The side of the protocol of an idle trainer: it takes its stream to the end, which may be what
/// gathers the weights of others, and hears from the leader whether the update has happened.
#[derive(Debug)]
pub struct Witness {
    control: Arc<dyn Control>,
    announced: Option<Begin>,
    deadline: Duration,
}

impl Witness {
    /// A trainer that the leader counts among the [idle](super::Part::Idle) ones.
    pub fn new(context: &EngineContext, control: Arc<dyn Control>) -> Self {
        Self { control, announced: None, deadline: context.deadline() }
    }

    /// Takes part in the leader's next update, which has to be of this version.
    ///
    /// The report counts the weights of this rank's stream, and has no receivers: they report to the leader.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing for other ranks, unless they need this rank's stream.
    ///
    /// # Errors
    ///
    /// The first failure of any rank, or of this rank's stream; `Timeout` if the leader begins no update;
    /// `Mismatch` if it begins one of another version.
    pub async fn send(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let Self { control, announced, deadline } = self;
        let deadline = *deadline;
        let end = async {
            let operation = "waiting for the leader to begin the update";
            let begin = within(deadline, operation, wait_for(control, announced, Some(version)));
            let begin = begin.await.map_err(|error| error.rank(Rank::LEADER))??;
            loop {
                let operation = "waiting for the leader to commit the version";
                match message(event_of_update(control, deadline, operation).await?)? {
                    Some(ToReceiver::Commit { update }) if update == begin.update => return Ok(()),
                    Some(ToReceiver::Abort { update, error }) if update == begin.update => {
                        return Err(Error::from(error));
                    }
                    Some(ToReceiver::Begin(other)) if other.update != begin.update => {
                        *announced = Some(other);
                        let message = "another update began within this one";
                        return Err(Error::new(ErrorKind::Protocol, "sending weights", message)
                            .rank(Rank::LEADER)
                            .recovery(Recovery::Retry));
                    }
                    _ => {}
                }
            }
        };
        let both = futures::future::try_join(drain(weights, version, deadline), end).await;
        both.map(|(report, ())| report).map_err(|error| error.version(version))
    }
}

/// The weights of a trainer that sends none of them: its stream may be what gathers those of others.
pub(crate) async fn drain(
    mut weights: WeightStream<'_>,
    version: Version,
    deadline: Duration,
) -> Result<SendReport> {
    let begun = Instant::now();
    let mut counts = TensorCounts::default();
    let operation = "waiting for the trainer's next weight";
    while let Some(weight) = within(deadline, operation, weights.next()).await? {
        counts.add(&weight?);
    }
    Ok(SendReport {
        version,
        counts,
        buckets: 0,
        plan_reused: false,
        elapsed: begun.elapsed(),
        stages: StageTimes::default(),
        digest: None,
        receivers: Vec::new(),
        absent: Vec::new(),
    })
}

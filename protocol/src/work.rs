//! The interface of a trainer's state machine: what it asks the loop to do, and what the loop tells it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::link::Members;
use super::message::Ticket;
use engine_core::control::{Event, Said};
use engine_core::observe::Progress;
use engine_core::plan::{BucketLayout, Plan};
use engine_core::{Entrant, Error, Rank, RankSet, ReceiverReport, Result, StageTimes, Version};

/// Something for the loop to do.
#[derive(Debug)]
pub(super) enum Act {
    /// Queue a message. If the rank is gone, that is an event.
    Send { to: Rank, body: Bytes },
    /// Queue the same message for several ranks. If one is gone, that is an event.
    SendAll { to: RankSet, body: Bytes },
    /// End the connection to a rank.
    Cut { rank: Rank, reason: Error },
    /// Have the link begin an update: answered by [`Done::Begun`].
    Begin { members: Members, colocated: usize },
    /// Have the link join the others: answered by [`Done::Joined`].
    Join(Ticket),
    /// Tell the layer in front which versions the rollouts of the update have, before the stream is read.
    Bases(Vec<Entrant>),
    /// Keep weights of these classes in buckets of their own: the class of each part of the version. A part without one is left out.
    Apart(Vec<Option<u32>>),
    /// Read the stream up to the end of a bucket: answered by [`Done::Collected`].
    Collect { index: u64 },
    /// Have the link encode the bucket that was collected last: answered by [`Done::Filled`].
    Fill { index: u64, slot: usize, digests: bool },
    /// Drop the bucket that was collected last: another trainer fills it.
    Skip,
    /// Have the link make the bucket visible to receivers: answered by [`Done::Published`].
    Publish { index: u64, slot: usize, filled: u64 },
    /// Drop the link's work. No answer follows.
    Cancel,
    /// Tell the observer.
    Observe(Progress),
    /// The update has failed for these ranks.
    Aborted(Vec<Rank>),
}

/// What the link is doing: one thing at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Begin,
    Join,
    Fill {
        index: u64,
    },
    /// With the digest of the bucket.
    Publish {
        index: u64,
        digest: u64,
    },
}

/// Work that has ended.
#[derive(Debug)]
pub(super) enum Done {
    /// With the ticket that other ranks need to join, if they have to join.
    Begun(Result<Option<Ticket>>),
    Joined(Result<()>),
    /// The next bucket of the stream, or its end.
    Collected(Result<Option<Collected>>),
    /// With the digest sum of the bucket.
    Filled(Result<u64>),
    Published(Result<()>),
}

/// The weights of a bucket, without their memory.
#[derive(Clone, Debug)]
pub(super) struct Collected {
    pub(super) layout: Arc<BucketLayout>,
    /// The digest of the last plan, if that has the same layout for this bucket.
    pub(super) known: Option<u64>,
    pub(super) source_bytes: u64,
    /// The class of its weights, if parts travel apart; else 0.
    pub(super) class: u32,
}

/// An update that is complete, as one of its trainers knows it.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) version: Version,
    pub(super) buckets: u64,
    pub(super) elapsed: Duration,
    pub(super) stages: StageTimes,
    /// Of the whole version, if digests are on.
    pub(super) digest: Option<u64>,
    /// The receivers that reported to this rank.
    pub(super) receivers: Vec<ReceiverReport>,
    pub(super) absent: Vec<Rank>,
}

/// A trainer's side of an update.
pub(super) trait Machine {
    /// The plan of the last update.
    fn plan(&self) -> &Plan;

    /// The end of the present update, returned once.
    fn end(&mut self) -> Option<Result<Ended>>;

    /// The next thing to be done.
    fn act(&mut self) -> Option<Act>;

    /// When to [`tick`](Self::tick) if nothing else happens before.
    fn timer(&self) -> Option<Instant>;

    /// Time has passed.
    fn tick(&mut self, now: Instant);

    /// Something came over the control plane.
    fn event(&mut self, event: Event, now: Instant);

    /// Several ranks have sent the same message.
    fn alike(&mut self, from: &RankSet, body: &Bytes, now: Instant) {
        for from in from.iter() {
            self.event(Event::Message { from, body: body.clone() }, now);
        }
    }

    /// Something came over the control plane: one event, or the same message from several ranks.
    fn said(&mut self, said: Said, now: Instant) {
        match said {
            Said::One(event) => self.event(event, now),
            Said::Alike { from, body } => self.alike(&from, &body, now),
        }
    }

    /// Work of this rank has ended.
    fn done(&mut self, done: Done, now: Instant);

    /// A message could not be sent because its receiver is gone. An event says why; it may come later.
    fn unreachable(&mut self, rank: Rank, error: Error, now: Instant);

    /// A message could not be sent although its receiver is there, or the control plane has ended.
    fn refused(&mut self, error: Error, now: Instant);

    /// Whether the update has come to its end.
    fn is_over(&self) -> bool;

    /// Nobody waits for the update any more.
    fn abandon(&mut self, now: Instant);
}

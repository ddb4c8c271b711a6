//! A trainer beside the leader that sends a part of the buckets, as a state machine: no IO, no clock, no tasks.
//!
//! It has the same weights as the leader, in the same order, so it collects the same buckets. It fills those whose
//! turn it is, when the leader says that the slot is free.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::{debug, warn};

use super::announced::{Announced, Found, another_began};
use super::follower::{JOINING, message, patience, patience_to_join};
use super::leader::still_read;
use super::message::{Begin, Ticket, ToReceiver, ToSender, encode};
use super::work::{Act, Collected, Done, Ended, Machine, Work};
use super::{ENCODING, too_late};
use engine_core::control::Event;
use engine_core::observe::Progress;
use engine_core::plan::{BucketLayout, Plan};
use engine_core::{Base, Error, ErrorKind, ErrorReport, Rank, Result, Version, digest};
use engine_core::{StageTimes, VersionState};

const SENDING: &str = "sending a part of the buckets";

/// What does not change between updates.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) rank: Rank,
    pub(super) deadline: Duration,
    pub(super) slots: usize,
    pub(super) bucket_bytes: u64,
    /// How receivers fetch from this rank.
    pub(super) card: Bytes,
}

/// A trainer beside the leader.
#[derive(Debug)]
pub(super) struct Secondary {
    settings: Settings,
    announced: Announced,
    /// The layouts of the last complete update.
    plan: Plan,
    update: Option<Box<Update>>,
    /// The end of the last update, or of the wait for one.
    end: Option<Result<Ended>>,
    acts: VecDeque<Act>,
}

#[derive(Debug)]
struct Update {
    begin: Begin,
    begun: Instant,
    stage: Stage,
    may_join: bool,
    /// The buckets that the leader asked for: index, slot, and the digest of the leader's layout.
    fills: Vec<(u64, u32, u64)>,
    /// What the leader sent at the end: the number of buckets, and the digests of the version and of the plan.
    sent: Option<(u64, u64, u64)>,
    next: Next,
    link: Option<(Work, Instant)>,
    layouts: Vec<Arc<BucketLayout>>,
    /// When the leader said something last, or the wait for it began.
    since: Instant,
    stages: StageTimes,
}

#[derive(Debug)]
enum Next {
    Pending(Instant),
    /// A bucket for this rank to fill. The leader has not named its slot yet.
    Bucket(Collected, Instant),
    End,
}

#[derive(Debug)]
enum Stage {
    Entering(Ticket),
    Joining {
        together: bool,
    },
    Streaming,
    Confirming(Instant, u64),
    /// The error, and how long to wait for the link's work.
    Failing(Error, Instant),
}

impl Secondary {
    /// A trainer of a group that was formed when `updates` updates had begun on the control plane.
    pub(super) fn new(settings: Settings, updates: u64) -> Self {
        Self {
            settings,
            announced: Announced::after(updates),
            plan: Plan::default(),
            update: None,
            end: None,
            acts: VecDeque::new(),
        }
    }

    /// Begins to wait for the next update, which must have this version.
    pub(super) fn begin(&mut self, version: Version, now: Instant) {
        let operation = "waiting for the leader to begin the update";
        self.end = None;
        self.announced.wait(Some(version), self.settings.deadline, operation, now);
        self.look(now);
    }

    /// Whether the update has failed, and the link is still at work.
    fn is_failing(&self) -> bool {
        self.update.as_ref().is_some_and(|update| matches!(update.stage, Stage::Failing(..)))
    }

    fn look(&mut self, now: Instant) {
        if self.update.is_some() || self.end.is_some() {
            return;
        }
        match self.announced.found(self.settings.rank, now) {
            None => {}
            Some(Found::Late(error)) => self.end = Some(Err(error)),
            Some(Found::Other(begin, error)) => {
                let report = ErrorReport::from(&error);
                self.tell(&ToSender::Failed { update: begin.update, error: report });
                self.end = Some(Err(error));
            }
            Some(Found::Update(begin)) => self.enter(begin, now),
        }
    }

    fn enter(&mut self, begin: Begin, now: Instant) {
        let Settings { slots, bucket_bytes, card, rank, .. } = self.settings.clone();
        let there = (begin.bucket_bytes, begin.slots as usize);
        let (number, version) = (begin.update, begin.version);
        self.update = Some(Box::new(Update {
            stage: match &begin.ticket {
                Some(ticket) => Stage::Entering(ticket.clone()),
                None => Stage::Streaming,
            },
            begin,
            begun: now,
            may_join: false,
            fills: Vec::new(),
            sent: None,
            next: Next::Pending(now),
            link: None,
            layouts: Vec::new(),
            since: now,
            stages: StageTimes::default(),
        }));
        if (bucket_bytes, slots) != there {
            let message = format!(
                "it has {slots} slots of {bucket_bytes} bytes, the leader {} of {}",
                there.1, there.0
            );
            let error = Error::new(ErrorKind::Mismatch, SENDING, message).rank(rank);
            return self.fail(error, true, now);
        }
        self.tell(&ToSender::Entered {
            update: number,
            card,
            plan: None,
            held: Vec::new(),
            base: Base::Unable,
            wants: None,
        });
        self.acts.push_back(Act::Observe(Progress::Began { version, receivers: Vec::new() }));
        self.acts.push_back(Act::Collect { index: 0 });
    }

    fn tell(&mut self, message: &ToSender) {
        match encode(message) {
            Ok(body) => self.acts.push_back(Act::Send { to: Rank::LEADER, body }),
            Err(error) => warn!(%error, "a message could not be written"),
        }
    }

    fn take_event(&mut self, event: Event, now: Instant) -> Result<()> {
        let Some(message) = message(event)? else { return Ok(()) };
        let Some(update) = &mut self.update else {
            // No rank sends buckets to this one.
            if let Some(unread) = self.announced.take(message, now) {
                debug!(?unread, "a bucket for a trainer");
            }
            return Ok(());
        };
        update.since = now;
        let present = update.begin.update;
        match message {
            ToReceiver::Fill { update: of, index, slot, layout } if of == present => {
                update.fills.push((index, slot, layout));
            }
            ToReceiver::End { update: of, buckets, digest, plan } if of == present => {
                update.sent = Some((buckets, digest, plan));
            }
            ToReceiver::Join { update: of } if of == present => update.may_join = true,
            ToReceiver::Commit { update: of } if of == present => self.committed(now),
            ToReceiver::Abort { update: of, error } if of == present => {
                self.fail(error.into(), false, now);
            }
            ToReceiver::Begin(begin) if begin.update != present => {
                if self.announced.keep_new(begin, now) {
                    another_began(SENDING)?;
                }
            }
            ToReceiver::Alive { .. } => {}
            other => debug!(?other, "a message of another update"),
        }
        Ok(())
    }

    fn advance(&mut self, now: Instant) {
        self.look(now);
        if let Err(error) = self.try_advance(now) {
            self.fail(error, true, now);
        }
    }

    fn try_advance(&mut self, now: Instant) -> Result<()> {
        let rank = self.settings.rank;
        let other_stream = || {
            let message = "its weights, or their order, are not the leader's";
            Error::new(ErrorKind::Mismatch, SENDING, message).rank(rank)
        };
        let Some(update) = &mut self.update else { return Ok(()) };
        match &update.stage {
            Stage::Entering(ticket) => {
                if ticket.together && !update.may_join {
                    return Ok(());
                }
                let ticket = ticket.clone();
                update.stage = Stage::Joining { together: ticket.together };
                update.link = Some((Work::Join, now));
                self.acts.push_back(Act::Join(ticket));
                return Ok(());
            }
            Stage::Joining { .. } | Stage::Confirming(..) => return Ok(()),
            Stage::Failing(..) => {
                self.settle(now);
                return Ok(());
            }
            Stage::Streaming if update.link.is_some() => return Ok(()),
            Stage::Streaming => {}
        }
        match &update.next {
            Next::Pending(_) => {}
            Next::Bucket(bucket, since) => {
                let index = update.layouts.len() as u64;
                let at = update.fills.iter().position(|(fill, ..)| *fill == index);
                let Some(at) = at else {
                    // The leader's stream has fewer buckets than this one.
                    return match update.sent {
                        Some(_) => Err(other_stream().bucket(index)),
                        None => Ok(()),
                    };
                };
                if bucket.layout.digest() != update.fills[at].2 {
                    return Err(other_stream().bucket(index));
                }
                let (_, slot, _) = update.fills.swap_remove(at);
                update.stages.release += now.saturating_duration_since(*since);
                update.layouts.push(bucket.layout.clone());
                update.next = Next::Pending(now);
                update.link = Some((Work::Fill { index }, now));
                let (slot, digests) = (slot as usize, update.begin.digests);
                self.acts.push_back(Act::Fill { index, slot, digests });
                self.acts.push_back(Act::Collect { index: index + 1 });
            }
            Next::End => {
                if !update.fills.is_empty() {
                    // The leader's stream has more buckets than this one.
                    return Err(other_stream());
                }
                let Some((buckets, digest, plan)) = update.sent else { return Ok(()) };
                let here = Plan { buckets: update.layouts.clone() };
                if (buckets, plan) != (here.buckets.len() as u64, here.digest()) {
                    return Err(other_stream());
                }
                update.stage = Stage::Confirming(now, digest);
                update.since = now;
                let (number, seconds) =
                    (update.begin.update, now.saturating_duration_since(update.begun));
                let (seconds, notes) = (seconds.as_secs_f64(), "null".into());
                self.tell(&ToSender::Confirm { update: number, digest, seconds, notes });
            }
        }
        Ok(())
    }

    /// The leader has made the version active.
    fn committed(&mut self, now: Instant) {
        let Some(mut update) = self.update.take() else { return };
        let Stage::Confirming(since, digest) = update.stage else {
            debug!("a commit of what this rank has not confirmed");
            self.update = Some(update);
            return;
        };
        update.stages.confirm = now.saturating_duration_since(since);
        let (rank, state) = (self.settings.rank, VersionState::Active);
        self.acts.push_back(Act::Observe(Progress::State { rank, state }));
        self.plan = Plan { buckets: update.layouts };
        self.end = Some(Ok(Ended {
            version: update.begin.version,
            buckets: self.plan.buckets.len() as u64,
            elapsed: now.saturating_duration_since(update.begun),
            stages: update.stages,
            digest: update.begin.digests.then_some(digest),
            receivers: Vec::new(),
            absent: Vec::new(),
        }));
    }

    /// Fails the update. `is_own` says that the leader does not know the error yet.
    fn fail(&mut self, error: Error, is_own: bool, now: Instant) {
        let Some(update) = &mut self.update else {
            self.announced.stop();
            self.end.get_or_insert(Err(error));
            return;
        };
        if matches!(update.stage, Stage::Failing(..)) {
            return;
        }
        let error = if is_own { error.version(update.begin.version) } else { error };
        let (number, version) = (update.begin.update, update.begin.version);
        let report = ErrorReport::from(&error);
        if matches!(update.link, Some((Work::Join, _))) {
            // `SendLink::join` may be dropped, so its end is not waited for.
            update.link = None;
            self.acts.push_back(Act::Cancel);
        }
        update.stage = Stage::Failing(error, now + self.settings.deadline);
        if is_own {
            warn!(%version, error = %report, "update given up");
            self.tell(&ToSender::Failed { update: number, error: report });
        }
        self.acts.push_back(Act::Aborted(Vec::new()));
        self.settle(now);
    }

    /// The update has failed. It is over when the link's work has ended.
    fn settle(&mut self, now: Instant) {
        let Some(update) = &self.update else { return };
        let Stage::Failing(_, until) = &update.stage else { return };
        if update.link.is_some() && now < *until {
            return;
        }
        let Some(update) = self.update.take() else { return };
        let Stage::Failing(error, _) = update.stage else { return };
        if update.link.is_some() {
            self.acts.push_back(Act::Cancel);
        }
        self.end = Some(Err(match update.link {
            Some((Work::Fill { .. }, _)) => still_read(error, self.settings.deadline),
            _ => error,
        }));
    }

    fn take_done(&mut self, done: Done, now: Instant) -> Result<()> {
        let rank = self.settings.rank;
        let Some(update) = &mut self.update else { return Ok(()) };
        if let Done::Collected(collected) = done {
            if update.link.is_none()
                && let Next::Pending(since) = update.next
            {
                update.stages.source += now.saturating_duration_since(since);
            }
            match collected? {
                None => update.next = Next::End,
                Some(bucket) => {
                    let index = update.layouts.len() as u64;
                    if update.begin.sender_of(index) == rank {
                        update.next = Next::Bucket(bucket, now);
                    } else {
                        update.layouts.push(bucket.layout);
                        update.next = Next::Pending(now);
                        self.acts.push_back(Act::Skip);
                        self.acts.push_back(Act::Collect { index: index + 1 });
                    }
                }
            }
            return Ok(());
        }
        let Some((work, since)) = update.link.take() else { return Ok(()) };
        let took = now.saturating_duration_since(since);
        let number = update.begin.update;
        match (work, done) {
            (Work::Join, Done::Joined(joined)) => {
                joined?;
                if let Stage::Joining { together } = update.stage {
                    update.stage = Stage::Streaming;
                    update.since = now;
                    if together {
                        self.tell(&ToSender::Joined { update: number });
                    }
                }
            }
            (Work::Fill { index }, Done::Filled(sum)) => {
                let sum = sum.map_err(|error| error.bucket(index))?;
                update.stages.encode += took;
                if matches!(update.stage, Stage::Failing(..)) {
                    return Ok(());
                }
                let layout = &update.layouts[index as usize];
                let (slot, filled) = (index as usize % self.settings.slots, layout.filled());
                let digest = digest::finish(sum, filled);
                update.link = Some((Work::Publish { index, digest }, now));
                self.acts.push_back(Act::Publish { index, slot, filled });
            }
            (Work::Publish { index, digest }, Done::Published(published)) => {
                published.map_err(|error| error.bucket(index))?;
                update.stages.publish += took;
                update.since = now;
                if !matches!(update.stage, Stage::Failing(..)) {
                    self.tell(&ToSender::Filled { update: number, index, digest });
                }
            }
            (work, done) => debug!(?work, ?done, "work that nobody asked for"),
        }
        Ok(())
    }

    /// The end of the present wait, its length, and what is waited for: the leader, or this rank's own work.
    fn limit(&self) -> Option<(Instant, Duration, &'static str)> {
        let update = self.update.as_ref()?;
        let deadline = self.settings.deadline;
        let (limit, operation) = match (&update.stage, &update.link, &update.next) {
            (Stage::Entering(_), ..) => (patience_to_join(deadline), JOINING),
            (Stage::Confirming(..), ..) => {
                (patience(deadline), "waiting for the leader to commit the version")
            }
            (Stage::Streaming, Some((Work::Fill { .. }, since)), _) => {
                return Some((*since + deadline, deadline, ENCODING));
            }
            (Stage::Streaming, None, Next::Bucket(..)) => {
                (patience(deadline), "waiting for the leader to free a slot")
            }
            (Stage::Streaming, None, Next::End) => {
                (patience(deadline), "waiting for the end of the update")
            }
            _ => return None,
        };
        Some((update.since + limit, limit, operation))
    }
}

impl Machine for Secondary {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn end(&mut self) -> Option<Result<Ended>> {
        self.end.take()
    }

    fn act(&mut self) -> Option<Act> {
        self.acts.pop_front()
    }

    fn timer(&self) -> Option<Instant> {
        match &self.update {
            None => self.announced.timer(),
            Some(update) => match &update.stage {
                Stage::Failing(_, until) => Some(*until),
                _ => self.limit().map(|(until, ..)| until),
            },
        }
    }

    fn tick(&mut self, now: Instant) {
        if self.is_failing() {
            return self.settle(now);
        }
        if let Some((until, limit, operation)) = self.limit()
            && now >= until
            && let Some(update) = &self.update
        {
            let late = too_late(limit, operation);
            let late = match update.link {
                Some((Work::Fill { index }, _)) => late.bucket(index),
                _ => late.rank(Rank::LEADER).bucket(update.layouts.len() as u64),
            };
            self.fail(late, true, now);
        }
        self.look(now);
    }

    fn event(&mut self, event: Event, now: Instant) {
        if let Err(error) = self.take_event(event, now) {
            self.fail(error, true, now);
        }
        self.advance(now);
    }

    fn done(&mut self, done: Done, now: Instant) {
        if let Err(error) = self.take_done(done, now) {
            self.fail(error, true, now);
        }
        self.advance(now);
    }

    fn unreachable(&mut self, rank: Rank, error: Error, now: Instant) {
        self.refused(error.rank(rank), now);
    }

    fn refused(&mut self, error: Error, now: Instant) {
        self.fail(error, true, now);
        self.advance(now);
    }
    fn is_over(&self) -> bool {
        self.end.is_some()
    }

    fn abandon(&mut self, now: Instant) {
        self.announced.stop();
        let words = "the trainer dropped the update";
        let error = Error::new(ErrorKind::Aborted, "in an update", words).rank(self.settings.rank);
        if self.update.is_some() {
            self.fail(error, true, now);
        }
        self.update = None;
        self.end = None;
    }
}

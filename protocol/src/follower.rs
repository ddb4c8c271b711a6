//! A rank that receives, as a state machine: no IO, no clock, no tasks.
//!
//! The loop in `receiver.rs` tells it what happens and when. It answers with things to do ([`Follower::act`]) and with
//! the time of its next tick ([`Follower::timer`]). The bytes of buckets never come here: to this machine a bucket is
//! a number, a layout and a digest.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::{debug, warn};

use super::announced::{Announced, Found, Unread, another_began};
use super::message::{Begin, Layout, Ticket, ToReceiver, ToSender, decode};
use super::{because, is_of_transport, too_late};
use engine_core::control::Event;
use engine_core::observe::Progress;
use engine_core::plan::{BucketKind, BucketLayout, LayoutChecker, Plan};
use engine_core::{Error, ErrorKind, ErrorReport, Rank, Recovery, Result, Version, digest};
use engine_core::{ReceiveReport, VersionState};

/// The operation of a rank that waits to join the others, in errors.
pub(super) const JOINING: &str = "waiting for all ranks to enter the update";

/// How long after a transport's error the leader may name the rank that has died.
const MOMENT: Duration = Duration::from_secs(1);

/// How long the leader may say nothing: longer than its own deadline, so that it can name the cause first.
pub(super) fn patience(deadline: Duration) -> Duration {
    deadline + deadline / 4
}

/// How long the leader may say nothing before the ranks join: it takes a deadline to find out which rank does not enter.
pub(super) fn patience_to_join(deadline: Duration) -> Duration {
    deadline * 3
}

/// Something for the loop to do.
#[derive(Debug)]
pub(super) enum Act {
    /// Tell the leader that this rank enters an update, with the plan that it knows, the parts that it wants and the buckets
    /// that are held.
    Enter { update: u64, plan: Option<u64>, wants: Option<Vec<String>> },
    /// Tell the leader.
    Send(ToSender),
    /// Have the link join the others: answered by [`Follower::joined`].
    Join(Ticket),
    /// Drop the link's attempt to join. No answer follows.
    Cancel,
    /// Have the link fetch a bucket, and hold the bucket from now on: answered by [`Follower::arrived`].
    Fetch { index: u64, from: Rank, card: Bytes, slot: u32, layout: Arc<BucketLayout> },
    /// Have the link give up its fetches from a rank. They then end soon.
    Abandon { from: Rank },
    /// Release a bucket that nobody here reads.
    Unread(Unread),
    /// Ask the caller whether it accepts the version: answered by [`Follower::checked`].
    Check,
    /// Hand a verified bucket to the caller.
    Give { index: u64, layout: Arc<BucketLayout> },
    /// Tell the observer.
    Observe(Progress),
    /// The update has failed here.
    Aborted,
}

/// A receiving rank.
#[derive(Debug)]
pub(super) struct Follower {
    rank: Rank,
    deadline: Duration,
    kind: BucketKind,
    /// The parts of versions that it wants, by their names; `None` for all.
    wants: Option<Vec<String>>,
    /// Whether the rank only hears of updates: it enters none and gets no buckets.
    is_idle: bool,
    announced: Announced,
    /// The layouts of the last complete update, and their digest.
    plan: Plan,
    known: Option<u64>,
    session: Option<Session>,
    entered: Option<Result<Begin>>,
    acts: VecDeque<Act>,
}

/// One update, from entering it to its end.
#[derive(Debug)]
struct Session {
    begin: Begin,
    begun: Instant,
    join: Join,
    /// Whether the leader has said that all ranks are in the update. Only then may ranks join at the same time.
    may_join: bool,
    /// The announced buckets that were not handed over yet, then the end of the update, in their order.
    coming: VecDeque<Coming>,
    /// The layouts of the buckets that were announced to this rank.
    layouts: Vec<Arc<BucketLayout>>,
    checker: LayoutChecker,
    /// The number of the next bucket, or of a later one if this rank does not want all.
    next: u64,
    /// Whether the caller waits for the next bucket.
    wants: bool,
    /// When the leader said something last, or the wait for it began.
    since: Instant,
    confirm: Confirm,
    version_digest: u64,
    /// The tensors and bytes so far.
    counts: (u64, u64),
    end: End,
}

#[derive(Debug, PartialEq)]
enum Join {
    Waiting(Ticket),
    Busy { together: bool },
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Confirm {
    No,
    Asking(u64, u64),
    Yes(u64, u64),
}

#[derive(Debug)]
enum End {
    /// The update goes on.
    No,
    /// The transport failed. Until this time the leader may name the cause.
    Seeking(Error, Instant),
    Over(Option<Result<ReceiveReport>>),
}

#[derive(Debug)]
enum Coming {
    Bucket { index: u64, slot: u32, digest: u64, layout: Arc<BucketLayout>, stage: Stage },
    End { buckets: u64, digest: u64, plan: u64 },
}

/// How far a bucket has come.
#[derive(Debug)]
enum Stage {
    /// No source is known yet, or the fetch from the last one failed.
    Announced,
    /// It can be fetched from there, once this rank has joined the others.
    Due { from: Rank, card: Bytes },
    /// It is being fetched. If that fails, it is fetched from `next`.
    Fetching { from: Rank, next: Option<(Rank, Bytes)> },
    /// It is here, with its digest sum.
    Here(Option<u64>),
}

/// What to tell the leader when a fetch has ended. It is told at once, from any thread, even while nobody polls the
/// receiver.
pub(super) fn told_of_fetch<T>(
    routed: bool,
    update: u64,
    index: u64,
    from: Rank,
    result: &Result<T>,
) -> Option<ToSender> {
    match result {
        Ok(_) if routed => Some(ToSender::Fetched { update, index }),
        Err(error) if routed && from != Rank::LEADER => {
            Some(ToSender::Missed { update, index, from, error: error.into() })
        }
        _ => None,
    }
}

/// The leader's message in an event.
///
/// # Errors
///
/// The leader is gone, or its message cannot be decoded.
pub(super) fn message(event: Event) -> Result<Option<ToReceiver>> {
    match event {
        Event::Message { from: Rank::LEADER, body } => decode(&body)
            .map(Some)
            .map_err(|error| error.rank(Rank::LEADER).recovery(Recovery::Retry)),
        Event::Lost { rank: Rank::LEADER, error } => {
            Err(Error::from(error).rank(Rank::LEADER).recovery(Recovery::Reconnect))
        }
        Event::Left { rank: Rank::LEADER } => Err(Error::new(
            ErrorKind::TrainerLeft,
            "receiving weights",
            "the trainer left the group",
        )
        .rank(Rank::LEADER)),
        _ => Ok(None),
    }
}

impl Follower {
    /// A rank of a group that was formed when `updates` updates had begun on the control plane.
    pub(super) fn new(rank: Rank, deadline: Duration, updates: u64) -> Self {
        Self {
            rank,
            deadline,
            kind: BucketKind::Buffer,
            wants: None,
            is_idle: false,
            announced: Announced::after(updates),
            plan: Plan::default(),
            known: None,
            session: None,
            entered: None,
            acts: VecDeque::new(),
        }
    }

    /// Sets the kind of its buckets.
    pub(super) fn of_kind(self, kind: BucketKind) -> Self {
        Self { kind, ..self }
    }

    /// Sets the parts of versions that it wants, by their names; `None` for all.
    pub(super) fn wanting(self, wants: Option<Vec<String>>) -> Self {
        Self { wants, ..self }
    }

    /// A rank that only hears of updates and how they end.
    pub(super) fn idle(rank: Rank, deadline: Duration, updates: u64) -> Self {
        Self { is_idle: true, ..Self::new(rank, deadline, updates) }
    }

    /// The next thing to be done.
    pub(super) fn act(&mut self) -> Option<Act> {
        self.acts.pop_front()
    }

    /// Begins to wait for the next update.
    pub(super) fn wait(&mut self, version: Option<Version>, operation: &'static str, now: Instant) {
        self.announced.wait(version, self.deadline, operation, now);
        self.look(now);
    }

    /// The caller no longer waits. An announcement that came is kept.
    pub(super) fn stop(&mut self) {
        self.announced.stop();
        if self.is_idle {
            self.session = None;
        }
    }

    /// How the wait has ended: with an update, which this rank has entered, or with an error.
    pub(super) fn entered(&mut self) -> Option<Result<Begin>> {
        self.entered.take()
    }

    /// The caller waits for the next bucket.
    pub(super) fn want(&mut self, now: Instant) {
        if let Some(session) = &mut self.session {
            session.wants = true;
            session.since = session.since.max(now);
        }
        self.advance(now);
    }

    /// The end of the update, returned once.
    pub(super) fn end(&mut self) -> Option<Result<ReceiveReport>> {
        let session = self.session.as_mut()?;
        let End::Over(result) = &mut session.end else { return None };
        let result = result.take();
        self.session = None;
        result
    }

    /// The caller gives the update up, for this reason.
    pub(super) fn abandon(&mut self, reason: impl FnOnce() -> Error) {
        let Some(session) = &self.session else { return };
        if let End::No = session.end {
            let version = session.begin.version;
            self.fail(reason().rank(self.rank).version(version));
        }
        self.session = None;
    }

    /// When to [`tick`](Self::tick) if nothing else happens before.
    pub(super) fn timer(&self) -> Option<Instant> {
        let Some(session) = &self.session else { return self.announced.timer() };
        match &session.end {
            End::Over(_) => None,
            End::Seeking(_, until) => Some(*until),
            End::No => session.limit(self.deadline).map(|(limit, _)| session.since + limit),
        }
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, now: Instant) {
        let Some(session) = &mut self.session else { return self.look(now) };
        match &mut session.end {
            End::Over(_) => {}
            End::Seeking(error, until) => {
                if now >= *until {
                    let error = std::mem::replace(error, gone());
                    session.end = End::Over(Some(Err(error)));
                }
            }
            End::No => {
                if let Some((limit, operation)) = session.limit(self.deadline)
                    && now >= session.since + limit
                {
                    let bucket = session.coming.front().map_or(session.next, Coming::index);
                    let late = too_late(limit, operation).rank(Rank::LEADER);
                    let late =
                        if session.is_waiting_for_buckets() { late.bucket(bucket) } else { late };
                    self.fail(late);
                }
            }
        }
    }

    /// Something came over the control plane.
    pub(super) fn event(&mut self, event: Event, now: Instant) {
        if let Err(error) = self.take_event(event, now) {
            self.fail_or_say(error);
        }
        self.look(now);
        self.advance(now);
    }

    /// The control plane has ended.
    pub(super) fn lost(&mut self, error: Error) {
        self.fail_or_say(error);
    }

    /// The link has joined the others, or cannot.
    pub(super) fn joined(&mut self, joined: Result<()>, now: Instant) {
        let Some(session) = &mut self.session else { return };
        let Join::Busy { together } = session.join else { return };
        session.join = Join::Done;
        session.since = now;
        match joined {
            Ok(()) if together => {
                let update = session.begin.update;
                self.acts.push_back(Act::Send(ToSender::Joined { update }));
            }
            Ok(()) => {}
            Err(error) => self.fail(error),
        }
        self.advance(now);
    }

    /// A fetch has ended, with the digest sum of the bytes if digests are wanted.
    pub(super) fn arrived(&mut self, index: u64, result: Result<Option<u64>>, now: Instant) {
        let Some(session) = &mut self.session else { return };
        let routed = session.begin.routed;
        let Some((slot, layout, stage)) = session.find(index) else { return };
        let Stage::Fetching { from, next } = stage else { return };
        let from = *from;
        match (result, next.take()) {
            (Ok(sum), _) => *stage = Stage::Here(sum),
            (Err(error), Some((next, card))) => {
                debug!(%from, %error, "a bucket could not be fetched");
                *stage = Stage::Fetching { from: next, next: None };
                let layout = layout.clone();
                self.acts.push_back(Act::Fetch { index, from: next, card, slot, layout });
            }
            (Err(error), None) if !routed || from == Rank::LEADER => {
                *stage = Stage::Announced;
                self.fail_to_fetch(error.bucket(index), now);
            }
            (Err(error), None) => {
                debug!(%from, %error, "a bucket could not be fetched");
                *stage = Stage::Announced;
            }
        }
        self.advance(now);
    }

    /// The caller's check of the version: its notes for the leader, or why it refuses the version.
    pub(super) fn checked(&mut self, checked: Result<String>, now: Instant) {
        let Some(session) = &mut self.session else { return };
        let (Confirm::Asking(digest, plan), End::No) = (session.confirm, &session.end) else {
            return;
        };
        match checked {
            Ok(notes) => {
                session.confirm = Confirm::Yes(digest, plan);
                session.since = now;
                let update = session.begin.update;
                let seconds = now.saturating_duration_since(session.begun).as_secs_f64();
                let state = VersionState::Ready;
                self.acts.push_back(Act::Observe(Progress::State { rank: self.rank, state }));
                let confirm = ToSender::Confirm { update, digest, seconds, notes };
                self.acts.push_back(Act::Send(confirm));
            }
            Err(error) => self.fail(error),
        }
        self.advance(now);
    }

    /// Enters an update if one may be entered.
    fn look(&mut self, now: Instant) {
        if self.session.is_some() {
            return;
        }
        let entered = match self.announced.found(self.rank, now) {
            None => return,
            Some(Found::Late(error)) => Err(error),
            Some(Found::Other(begin, error)) => {
                let report = ErrorReport::from(&error);
                if !self.is_idle {
                    let failed = ToSender::Failed { update: begin.update, error: report };
                    self.acts.push_back(Act::Send(failed));
                }
                Err(error)
            }
            Some(Found::Update(begin)) => {
                self.enter(&begin, now);
                Ok(begin)
            }
        };
        self.entered = Some(entered);
    }

    fn enter(&mut self, begin: &Begin, now: Instant) {
        let version = begin.version;
        if !self.is_idle {
            let (update, plan, wants) = (begin.update, self.known, self.wants.clone());
            self.acts.push_back(Act::Enter { update, plan, wants });
            self.acts
                .push_back(Act::Observe(Progress::Began { version, receivers: vec![self.rank] }));
        }
        self.session = Some(Session {
            join: match &begin.ticket {
                Some(ticket) if !self.is_idle => Join::Waiting(ticket.clone()),
                _ => Join::Done,
            },
            may_join: false,
            begun: now,
            coming: VecDeque::new(),
            layouts: Vec::new(),
            checker: LayoutChecker::new(begin.bucket_bytes).of_kind(self.kind),
            next: 0,
            wants: false,
            since: now,
            // An idle rank confirms nothing: it waits for the commit from the start.
            confirm: if self.is_idle { Confirm::Yes(0, 0) } else { Confirm::No },
            version_digest: 0,
            counts: (0, 0),
            end: End::No,
            begin: begin.clone(),
        });
    }

    fn take_event(&mut self, event: Event, now: Instant) -> Result<()> {
        let message = message(event).map_err(|error| match &self.session {
            Some(session) => error.bucket(session.next),
            None => error,
        })?;
        let Some(message) = message else { return Ok(()) };
        match &mut self.session {
            Some(session) => {
                session.since = now;
                self.take(message, now)
            }
            None => {
                self.acts.extend(self.announced.take(message, now).map(Act::Unread));
                Ok(())
            }
        }
    }

    /// Takes in a message of the leader within an update.
    fn take(&mut self, message: ToReceiver, now: Instant) -> Result<()> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let (present, is_over) = (session.begin.update, !matches!(session.end, End::No));
        match message {
            ToReceiver::Bucket { update, index, slot, digest, layout }
                if update == present && !is_over && !self.is_idle =>
            {
                let taken = self.take_bucket(index, slot, digest, layout);
                taken.map_err(|error| {
                    // A refused bucket will not be read.
                    self.acts.push_back(Act::Unread(Unread { update, index }));
                    error.bucket(index)
                })
            }
            ToReceiver::Bucket { update, index, .. } => {
                self.acts.push_back(Act::Unread(Unread { update, index }));
                Ok(())
            }
            ToReceiver::Abort { update, error } if update == present => {
                self.aborted(Error::from(error));
                Ok(())
            }
            ToReceiver::Begin(begin) if begin.update != present => {
                if !self.announced.keep_new(begin, now) || is_over {
                    return Ok(());
                }
                another_began("receiving weights")
            }
            _ if is_over => Ok(()),
            ToReceiver::Fetch { update, index, from, card } if update == present => {
                self.fetch(index, from, card);
                Ok(())
            }
            ToReceiver::End { update, buckets, digest, plan } if update == present => {
                session.coming.push_back(Coming::End { buckets, digest, plan });
                Ok(())
            }
            ToReceiver::Join { update } if update == present => {
                session.may_join = true;
                Ok(())
            }
            ToReceiver::Commit { update } if update == present => {
                self.committed(now);
                Ok(())
            }
            ToReceiver::Alive { .. } => Ok(()),
            other => {
                debug!(?other, "a message of another update");
                Ok(())
            }
        }
    }

    fn take_bucket(&mut self, index: u64, slot: u32, digest: u64, layout: Layout) -> Result<()> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let refuse = |message: String| Error::new(ErrorKind::Protocol, "taking a bucket", message);
        // Between those that it wants, others hear of other buckets. If one is missing, the version is not complete.
        let is_next =
            if self.wants.is_some() { index >= session.next } else { index == session.next };
        if !is_next {
            return Err(refuse(format!("bucket {} was expected", session.next)));
        }
        let layout = match layout {
            Layout::Explicit { pieces } => {
                session.checker.check(&pieces)?;
                Arc::new(BucketLayout::new(pieces))
            }
            Layout::Known { digest } => {
                let known = self.plan.buckets.get(session.layouts.len());
                let layout = known.filter(|layout| layout.digest() == digest).cloned();
                let layout = layout
                    .ok_or_else(|| refuse("its layout is not the one of the last update".into()))?;
                session.checker.check(layout.pieces())?;
                layout
            }
        };
        session.layouts.push(layout.clone());
        session.next = index + 1;
        let stage = if session.begin.routed {
            Stage::Announced
        } else {
            Stage::Due { from: session.begin.sender_of(index), card: Bytes::new() }
        };
        session.coming.push_back(Coming::Bucket { index, slot, digest, layout, stage });
        Ok(())
    }

    /// A bucket can be fetched from a rank. Nothing to do if it is here already.
    fn fetch(&mut self, index: u64, source: Rank, card: Bytes) {
        let Some(session) = &mut self.session else { return };
        let Some((.., stage)) = session.find(index) else { return };
        match stage {
            Stage::Here(_) => {}
            // The leader has given up the source that it named before.
            Stage::Fetching { from, next } => {
                let from = *from;
                *next = Some((source, card));
                self.acts.push_back(Act::Abandon { from });
            }
            Stage::Announced | Stage::Due { .. } => *stage = Stage::Due { from: source, card },
        }
    }

    /// Does everything that is possible now.
    fn advance(&mut self, now: Instant) {
        if let Err(error) = self.try_advance(now) {
            self.fail(error);
        }
    }

    fn try_advance(&mut self, now: Instant) -> Result<()> {
        let Some(session) = &mut self.session else { return Ok(()) };
        if !matches!(session.end, End::No) {
            return Ok(());
        }
        if let Join::Waiting(ticket) = &session.join {
            if ticket.together && !session.may_join {
                return Ok(());
            }
            let ticket = ticket.clone();
            session.join = Join::Busy { together: ticket.together };
            self.acts.push_back(Act::Join(ticket));
        }
        if session.join != Join::Done {
            return Ok(());
        }
        for coming in &mut session.coming {
            let Coming::Bucket { index, slot, layout, stage, .. } = coming else { continue };
            let Stage::Due { from, card } = stage else { continue };
            let (from, card, layout) = (*from, std::mem::take(card), layout.clone());
            *stage = Stage::Fetching { from, next: None };
            self.acts.push_back(Act::Fetch { index: *index, from, card, slot: *slot, layout });
        }
        if !session.wants {
            return Ok(());
        }
        match session.coming.front() {
            Some(Coming::Bucket { index, digest, layout, stage: Stage::Here(sum), .. }) => {
                let (index, sent, layout, sum) = (*index, *digest, layout.clone(), *sum);
                session.coming.pop_front();
                session.wants = false;
                self.verified(index, layout, sent, sum)
            }
            Some(Coming::End { buckets, digest, plan }) if session.confirm == Confirm::No => {
                let sent = (*buckets, *digest, *plan);
                self.complete(sent, now)
            }
            _ => Ok(()),
        }
    }

    /// The next bucket is here. Hands it over if its digest is the one that was sent.
    fn verified(
        &mut self,
        index: u64,
        layout: Arc<BucketLayout>,
        sent: u64,
        sum: Option<u64>,
    ) -> Result<()> {
        let Some(session) = &mut self.session else { return Ok(()) };
        if let Some(sum) = sum {
            let here = digest::finish(sum, layout.filled());
            if here != sent {
                let message = format!("its digest is {here:016x}, the trainer sent {sent:016x}");
                return Err(Error::new(ErrorKind::Digest, "verifying a bucket", message)
                    .rank(self.rank)
                    .bucket(index));
            }
        }
        session.version_digest = digest::chain(session.version_digest, sent);
        let mut bytes = 0;
        for piece in layout.pieces() {
            bytes += piece.len;
            session.counts.0 += u64::from(piece.start == 0);
        }
        session.counts.1 += bytes;
        self.acts.push_back(Act::Observe(Progress::Bucket { index, bytes }));
        self.acts.push_back(Act::Give { index, layout });
        Ok(())
    }

    /// Verifies the version as a whole.
    fn complete(&mut self, sent: (u64, u64, u64), now: Instant) -> Result<()> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let next = LayoutChecker::new(session.begin.bucket_bytes).of_kind(self.kind);
        std::mem::replace(&mut session.checker, next).finish()?;
        let plan = Plan { buckets: session.layouts.clone() }.digest();
        let here = (session.layouts.len() as u64, session.version_digest, plan);
        if here != sent {
            let message = format!(
                "{} buckets of digest {:016x} and plan {:016x} arrived, the trainer sent {} \
                 of {:016x} and {:016x}",
                here.0, here.1, here.2, sent.0, sent.1, sent.2
            );
            return Err(
                Error::new(ErrorKind::Digest, "verifying a version", message).rank(self.rank)
            );
        }
        session.confirm = Confirm::Asking(sent.1, sent.2);
        session.since = now;
        self.acts.push_back(Act::Check);
        Ok(())
    }

    /// The leader has made the version active.
    fn committed(&mut self, now: Instant) {
        let Some(session) = &mut self.session else { return };
        // The leader commits only confirmed versions; anything else breaks the protocol.
        let Confirm::Yes(digest, plan) = session.confirm else {
            return debug!("a commit of what this rank has not confirmed");
        };
        let begin = &session.begin;
        let mut report = ReceiveReport::new(begin.version, VersionState::Active);
        (report.tensors, report.bytes) = session.counts;
        report.buckets = session.layouts.len() as u64;
        report.wants.clone_from(&self.wants);
        report.elapsed = now.saturating_duration_since(session.begun);
        report.digest = (begin.digests && !self.is_idle).then_some(digest);
        if !self.is_idle {
            self.plan = Plan { buckets: std::mem::take(&mut session.layouts) };
            self.known = Some(plan);
            let state = VersionState::Active;
            self.acts.push_back(Act::Observe(Progress::State { rank: self.rank, state }));
        }
        session.end = End::Over(Some(Ok(report)));
    }

    /// The leader has ended the update.
    fn aborted(&mut self, error: Error) {
        let Some(session) = &mut self.session else { return };
        let error = match std::mem::replace(&mut session.end, End::Over(None)) {
            End::No => {
                self.acts.push_back(Act::Aborted);
                error
            }
            // The transport's error was the consequence.
            End::Seeking(seen, _) => because(error, seen),
            over @ End::Over(_) => {
                session.end = over;
                return;
            }
        };
        session.end = End::Over(Some(Err(error)));
        self.let_go();
    }

    fn fail_or_say(&mut self, error: Error) {
        match &mut self.session {
            Some(session) if matches!(session.end, End::Seeking(..)) => {
                if let End::Seeking(seen, _) = std::mem::replace(&mut session.end, End::Over(None))
                {
                    session.end = End::Over(Some(Err(because(error, seen))));
                }
            }
            Some(_) => self.fail(error),
            None => {
                self.announced.stop();
                self.entered = Some(Err(error));
            }
        }
    }

    /// Fails the update on this rank, and tells the leader.
    fn fail(&mut self, error: Error) {
        let Some(session) = &mut self.session else { return };
        if !matches!(session.end, End::No) {
            return;
        }
        let error = error.version(session.begin.version);
        let update = session.begin.update;
        if !self.is_idle {
            warn!(version = %session.begin.version, %error, "update given up");
            let report = ErrorReport::from(&error);
            self.acts.push_back(Act::Send(ToSender::Failed { update, error: report }));
        }
        self.acts.push_back(Act::Aborted);
        session.end = End::Over(Some(Err(error)));
        self.let_go();
    }

    /// A bucket cannot be fetched. When a rank dies, a transport only reports that something broke. The leader names the
    /// rank, so the end waits a moment for that.
    fn fail_to_fetch(&mut self, error: Error, now: Instant) {
        let is_of_transport = is_of_transport(&error);
        self.fail(error);
        if let Some(session) = &mut self.session
            && is_of_transport
            && let End::Over(Some(Err(error))) = &mut session.end
        {
            let error = std::mem::replace(error, gone());
            session.end = End::Seeking(error, now + MOMENT);
        }
    }

    /// The update has ended here. Releases the buckets that were announced and not fetched.
    fn let_go(&mut self) {
        let Some(session) = &mut self.session else { return };
        if matches!(session.join, Join::Busy { .. }) {
            session.join = Join::Done;
            self.acts.push_back(Act::Cancel);
        }
        let (update, routed) = (session.begin.update, session.begin.routed);
        for coming in session.coming.drain(..) {
            if let Coming::Bucket { index, stage: Stage::Due { .. }, .. } = coming
                && !routed
            {
                self.acts.push_back(Act::Unread(Unread { update, index }));
            }
        }
    }
}

impl Session {
    fn find(&mut self, index: u64) -> Option<(u32, &Arc<BucketLayout>, &mut Stage)> {
        self.coming.iter_mut().find_map(|coming| match coming {
            Coming::Bucket { index: at, slot, layout, stage, .. } if *at == index => {
                Some((*slot, &*layout, stage))
            }
            _ => None,
        })
    }

    fn is_waiting_for_buckets(&self) -> bool {
        self.join == Join::Done && self.confirm == Confirm::No
    }

    /// How long the leader may say nothing, and what this rank waits for. `None` if this rank is at work itself.
    fn limit(&self, deadline: Duration) -> Option<(Duration, &'static str)> {
        let patience = patience(deadline);
        match (&self.join, self.confirm) {
            (Join::Waiting(_), _) => Some((patience_to_join(deadline), JOINING)),
            (Join::Busy { .. }, _) | (_, Confirm::Asking(..)) => None,
            (_, Confirm::Yes(..)) => {
                Some((patience, "waiting for the trainer to commit the version"))
            }
            _ if !self.wants => None,
            (_, Confirm::No) => match self.coming.front() {
                Some(Coming::Bucket { .. }) => Some((patience, "waiting for a bucket's bytes")),
                _ => Some((patience, "waiting for the next bucket")),
            },
        }
    }
}

impl Coming {
    fn index(&self) -> u64 {
        match self {
            Self::Bucket { index, .. } => *index,
            Self::End { buckets, .. } => buckets.saturating_sub(1),
        }
    }
}

/// A placeholder while an error is moved.
fn gone() -> Error {
    Error::new(ErrorKind::Aborted, "receiving weights", "the update has failed")
}

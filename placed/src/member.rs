//! A rank's part in a placed update, as a state machine. No IO and no clock: it is told the time and the results of its
//! work.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine_core::{Error, ErrorKind, ErrorReport, Rank, Result, Role, Version};

use crate::message::{Batch, Declared, Digest, ToLeader, ToMember};

/// What a rank does that refuses an update of another version.
pub(crate) const ENTERING: &str = "entering an update";

/// Something for the loop to do. Acts are done in their order.
#[derive(Debug)]
pub(crate) enum Act {
    Send(ToLeader),
    Start(Task),
    /// Tell the present work to stop. Its end is reported as that of any work.
    Stop,
    /// The update has ended here. No work goes on.
    End(Result<Version>),
}

/// Work of a rank. One task runs at a time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Task {
    /// Wait until no earlier update can touch memory any more. A trainer may take the boxes of its last update for those of this one, unless
    /// it has to be `sure`.
    Prepare { sure: bool },
    /// Make the plan. A trainer also finds the maxima that others need; a rollout lends its tensors.
    Plan { set: Digest, declared: Option<Vec<Declared>> },
    /// A trainer writes its pieces of the plan.
    Write { terms: Vec<(Rank, Bytes)>, maxima: Vec<(Rank, Vec<u32>)>, digests: bool },
    /// A rollout compares digests of what a trainer has written with those of the trainer. Meanwhile trainers write elsewhere in its tensors.
    Check { from: Rank, batch: Batch },
    /// A rollout takes its tensors back, and makes sure that all of them were compared.
    Verify { version: Version, digests: bool },
}

/// The result of a task.
#[derive(Debug)]
pub(crate) enum Done {
    Prepared {
        digest: Digest,
        body: Bytes,
        known: Option<Digest>,
        guessed: bool,
    },
    Planned {
        plan: Digest,
        terms: Bytes,
        maxima: Vec<(Rank, Vec<u32>)>,
    },
    Written {
        source_bytes: u64,
    },
    Checked,
    /// A trainer holds other boxes than it said. It writes no more.
    Differs {
        wrote: bool,
    },
    Verified {
        digest: u64,
        bytes: u64,
        inspected: u64,
        slower: Vec<String>,
    },
}

/// What a rollout's tensors hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum TensorState {
    /// No version has been written yet.
    #[default]
    Empty,
    /// They hold no usable version: an update may write to them, or a failed one may have written.
    Updating {
        /// The version of that update.
        version: Version,
        /// The error of the update, if it has failed.
        failed: Option<ErrorReport>,
    },
    /// They hold a whole version, which every rollout has verified.
    Active(Version),
}

/// The state machine of a rank.
#[derive(Debug)]
pub(crate) struct Member {
    rank: Rank,
    role: Role,
    deadline: Duration,
    state: TensorState,
    /// An update that has begun and that this rank has not entered.
    begun: Option<Begun>,
    /// Set while the program waits for an update, with the version that it expects.
    called: Option<Option<Version>>,
    /// An update of another version than the program expects, which the leader has been told. If it had failed before, the
    /// expected one is still to come.
    refused: Option<(u64, Error)>,
    taking: Option<Taking>,
    /// The digest of this rank's declaration that the leader knows.
    told: Option<Digest>,
}

#[derive(Clone, Copy, Debug)]
struct Begun {
    update: u64,
    version: Version,
    digests: bool,
}

/// An update that the rank takes part in.
#[derive(Debug)]
struct Taking {
    begun: Begun,
    /// The state that the tensors go back to if nothing was written.
    before: TensorState,
    heard: Instant,
    works: bool,
    /// What a rollout has to do when its present work has ended.
    next: VecDeque<Task>,
    declared: Option<Digest>,
    maxima: Vec<(Rank, Vec<u32>)>,
    step: Step,
    /// Whether it has planned, so that tensors may have been written, unless the leader says that they have not.
    lent: bool,
    /// Set once it has failed, with whether tensors may have been written.
    failed: Option<(Error, bool)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Enter,
    Plan,
    /// From here on a rollout's tensors may be written.
    Write,
    Last,
}

impl Member {
    pub(crate) fn new(rank: Rank, role: Role, deadline: Duration) -> Self {
        Self {
            rank,
            role,
            deadline,
            state: TensorState::Empty,
            begun: None,
            called: None,
            refused: None,
            taking: None,
            told: None,
        }
    }

    pub(crate) fn state(&self) -> &TensorState {
        &self.state
    }

    /// The program begins to wait for an update.
    pub(crate) fn call(&mut self, now: Instant, version: Option<Version>) -> Vec<Act> {
        self.called = Some(version);
        self.refused = None;
        match self.begun.take() {
            Some(begun) => self.enter(now, begun),
            None => Vec::new(),
        }
    }

    /// Whether the rank takes part in an update.
    pub(crate) fn takes_part(&self) -> bool {
        self.taking.is_some()
    }

    /// Why the program's call has not taken part in the update that began last, if it was of another version.
    pub(crate) fn refusal(&mut self) -> Option<Error> {
        self.refused.take().map(|(_, error)| error)
    }

    fn enter(&mut self, now: Instant, begun: Begun) -> Vec<Act> {
        let Some(expected) = self.called else {
            self.begun = Some(begun);
            return Vec::new();
        };
        if let Some(expected) = expected.filter(|version| *version != begun.version) {
            let message = format!("version {} began, {expected} was expected", begun.version);
            let error = Error::new(ErrorKind::Mismatch, ENTERING, message);
            let error = error.version(begun.version);
            let report = ErrorReport::from(&error);
            self.refused = Some((begun.update, error));
            return vec![Act::Send(ToLeader::Failed { update: begun.update, error: report })];
        }
        self.called = None;
        self.refused = None;
        self.taking = Some(Taking {
            begun,
            before: self.state.clone(),
            heard: now,
            works: false,
            next: VecDeque::new(),
            declared: None,
            maxima: Vec::new(),
            step: Step::Enter,
            lent: false,
            failed: None,
        });
        self.start(Task::Prepare { sure: false })
    }

    /// Starts a task, or does so when the present one has ended.
    fn queue(&mut self, task: Task) -> Vec<Act> {
        if let Some(taking) = &mut self.taking {
            taking.next.push_back(task);
        }
        self.start_next()
    }

    fn start_next(&mut self) -> Vec<Act> {
        let idle = self.taking.as_mut().filter(|taking| !taking.works);
        let next = idle.and_then(|taking| taking.next.pop_front());
        next.map_or_else(Vec::new, |task| self.start(task))
    }

    fn start(&mut self, task: Task) -> Vec<Act> {
        if let Some(taking) = &mut self.taking {
            taking.works = true;
        }
        vec![Act::Start(task)]
    }

    /// A message of the leader.
    pub(crate) fn heard(&mut self, now: Instant, message: ToMember) -> Vec<Act> {
        let update = message.update();
        if let ToMember::Begin { update, version, digests } = message {
            let begun = Begun { update, version, digests };
            let Some(taking) = &self.taking else { return self.enter(now, begun) };
            if taking.begun.update >= update {
                return Vec::new();
            }
            self.begun = Some(begun);
            let message = "the trainer has begun another update";
            return self.ended_by(Error::new(ErrorKind::Aborted, "updating", message), true);
        }
        if self.begun.is_some_and(|begun| begun.update == update) {
            if let ToMember::Abort { .. } = message {
                self.begun = None;
            }
            return Vec::new();
        }
        if let Some((_, refusal)) = self.refused.take_if(|(refused, _)| *refused == update) {
            let is_own =
                |error: &ErrorReport| error.rank == Some(self.rank) && error.operation == ENTERING;
            match message {
                ToMember::Abort { error, .. } if is_own(&error) => {
                    self.called = None;
                    return vec![Act::End(Err(refusal))];
                }
                // It has failed for another reason, before the leader heard that it was refused.
                ToMember::Abort { .. } => {}
                _ => self.refused = Some((update, refusal)),
            }
            return Vec::new();
        }
        let Some(taking) = &mut self.taking else { return Vec::new() };
        if taking.begun.update != update {
            return Vec::new();
        }
        taking.heard = now;
        if let ToMember::Abort { touched, error, .. } = message {
            return self.ended_by(error.into(), touched);
        }
        if taking.failed.is_some() {
            return Vec::new();
        }
        let Begun { digests, version, .. } = taking.begun;
        let (step, works, role) = (taking.step, taking.works, self.role);
        // A rollout's work while trainers write is checking what they have written.
        let checks = step == Step::Write && role == Role::Rollout;
        match message {
            ToMember::Alive { .. } => Vec::new(),
            ToMember::Plan { set, declared, .. } if step == Step::Enter && !works => {
                taking.step = Step::Plan;
                self.start(Task::Plan { set, declared })
            }
            // Another trainer may have planned earlier, so its maxima may come at any step up to `Write`.
            ToMember::Maxima { from, values, .. } if step <= Step::Write => {
                taking.maxima.push((from, values));
                Vec::new()
            }
            ToMember::Write { terms, .. }
                if step == Step::Write && !works && role == Role::Trainer =>
            {
                taking.step = Step::Last;
                let maxima = std::mem::take(&mut taking.maxima);
                self.start(Task::Write { terms, maxima, digests })
            }
            ToMember::Batch { from, batch, .. } if checks => {
                self.queue(Task::Check { from, batch })
            }
            ToMember::Verify { .. } if checks => {
                taking.step = Step::Last;
                self.queue(Task::Verify { version, digests })
            }
            ToMember::Again { .. } if !works || checks => {
                taking.step = Step::Enter;
                taking.maxima.clear();
                taking.next.clear();
                self.queue(Task::Prepare { sure: true })
            }
            ToMember::Commit { .. } if step == Step::Last && !works => {
                let (version, declared) = (taking.begun.version, taking.declared);
                self.told = declared;
                self.state = TensorState::Active(version);
                self.taking = None;
                vec![Act::End(Ok(version))]
            }
            _ => {
                let message = "a message of the trainer that does not fit";
                self.fail(Error::new(ErrorKind::Protocol, "updating", message).rank(Rank::LEADER))
            }
        }
    }

    /// A task has ended.
    pub(crate) fn done(&mut self, result: Result<Done>) -> Vec<Act> {
        let Some(taking) = &mut self.taking else { return Vec::new() };
        taking.works = false;
        if taking.failed.is_some() {
            return self.end();
        }
        let update = taking.begun.update;
        match result {
            Err(error) => self.fail(error),
            Ok(Done::Prepared { digest, body, known, guessed }) => {
                taking.declared = Some(digest);
                let body = (self.told != Some(digest)).then_some(body);
                vec![Act::Send(ToLeader::Entered { update, digest, body, known, guessed })]
            }
            Ok(Done::Planned { plan, terms, maxima }) => {
                taking.step = Step::Write;
                taking.lent = true;
                if self.role == Role::Rollout {
                    let version = taking.begun.version;
                    self.state = TensorState::Updating { version, failed: None };
                }
                let maxima = maxima
                    .into_iter()
                    .map(|(to, values)| Act::Send(ToLeader::Maxima { update, to, values }));
                let planned = Act::Send(ToLeader::Planned { update, plan, terms });
                maxima.chain([planned]).collect()
            }
            Ok(Done::Written { source_bytes }) => {
                vec![Act::Send(ToLeader::Written { update, source_bytes })]
            }
            Ok(Done::Checked) => self.start_next(),
            Ok(Done::Differs { wrote }) => {
                vec![Act::Send(ToLeader::Differs { update, wrote })]
            }
            Ok(Done::Verified { digest, bytes, inspected, slower }) => {
                vec![Act::Send(ToLeader::Verified { update, digest, bytes, inspected, slower })]
            }
        }
    }

    /// A trainer's task has written a batch to a rollout.
    pub(crate) fn wrote(&self, to: Rank, batch: Batch) -> Vec<Act> {
        let works = self.taking.as_ref().filter(|taking| taking.works && taking.failed.is_none());
        let update = works.map(|taking| taking.begun.update);
        let told = update.map(|update| Act::Send(ToLeader::Batch { update, to, batch }));
        told.into_iter().collect()
    }

    /// The present task goes on: tells the leader.
    pub(crate) fn progress(&self) -> Vec<Act> {
        let works = self.taking.as_ref().filter(|taking| taking.works && taking.failed.is_none());
        let update = works.map(|taking| taking.begun.update);
        update.map(|update| Act::Send(ToLeader::Progress { update })).into_iter().collect()
    }

    /// The rank cannot go on. Tells the leader.
    pub(crate) fn fail(&mut self, error: Error) -> Vec<Act> {
        let Some(taking) = &self.taking else { return Vec::new() };
        if taking.failed.is_some() {
            return Vec::new();
        }
        let update = taking.begun.update;
        let report = ErrorReport::from(&error);
        let mut acts = vec![Act::Send(ToLeader::Failed { update, error: report })];
        acts.extend(self.ended_by(error, true));
        acts
    }

    /// The leader, or the connection to it, is lost.
    pub(crate) fn lost(&mut self, error: Error) -> Vec<Act> {
        self.told = None;
        self.begun = None;
        self.refused = None;
        self.ended_by(error, true)
    }

    fn ended_by(&mut self, error: Error, touched: bool) -> Vec<Act> {
        let Some(taking) = &mut self.taking else { return Vec::new() };
        // The leader may have lost the declaration, and sending it again costs little.
        self.told = None;
        let stop = taking.works && taking.failed.is_none();
        if taking.failed.is_none() {
            taking.failed = Some((error.version(taking.begun.version), touched));
        } else if let Some((_, before)) = &mut taking.failed {
            *before &= touched;
        }
        let works = taking.works;
        match (works, stop) {
            (true, true) => vec![Act::Stop],
            (true, false) => Vec::new(),
            (false, _) => self.end(),
        }
    }

    fn end(&mut self) -> Vec<Act> {
        let Some(taking) = self.taking.take() else { return Vec::new() };
        let Some((error, touched)) = taking.failed else { return Vec::new() };
        if let TensorState::Updating { failed, .. } = &mut self.state
            && taking.lent
        {
            match touched || self.role == Role::Trainer {
                true => *failed = Some(ErrorReport::from(&error)),
                false => self.state = taking.before,
            }
        }
        vec![Act::End(Err(error))]
    }

    /// The program no longer waits. The present task is told to stop, and its end need not be reported.
    pub(crate) fn cancel(&mut self) -> Vec<Act> {
        self.called = None;
        self.refused = None;
        let message = "the call was given up";
        let mut acts = self.fail(Error::new(ErrorKind::Aborted, "updating", message));
        acts.extend(self.done(Err(Error::new(ErrorKind::Aborted, "updating", message))));
        acts
    }

    /// When to [`tick`](Self::tick) if nothing else happens before.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        self.taking.as_ref().filter(|t| t.failed.is_none()).map(|t| t.heard + self.deadline)
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<Act> {
        if self.wakes_at().is_none_or(|at| now < at) {
            return Vec::new();
        }
        let message = format!("nothing within {:.1} s", self.deadline.as_secs_f64());
        let error = Error::new(ErrorKind::Timeout, "waiting for the trainer", message);
        self.fail(error.rank(Rank::LEADER))
    }
}

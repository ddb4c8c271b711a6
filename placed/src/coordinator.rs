//! The decisions of the leading trainer in a placed update: when ranks go on to the next stage, and when the update has
//! failed. No IO and no clock: it is told the time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine_core::{
    Error, ErrorKind, ErrorReport, Rank, ReceiverReport, Result, Role, Version, VersionState,
};
use sha2::{Digest as _, Sha256};

use crate::message::{Declared, Digest, ToLeader, ToMember};

/// Something for the loop to do. Acts are done in their order.
#[derive(Debug)]
pub(crate) enum Act {
    Send(Rank, ToMember),
    /// The update has ended.
    End(Result<Committed>),
}

/// An update that every rollout has verified.
#[derive(Debug)]
pub(crate) struct Committed {
    pub(crate) receivers: Vec<ReceiverReport>,
    /// The bytes of weights that trainers have written from.
    pub(crate) source_bytes: u64,
    /// The bytes that rollouts have verified.
    pub(crate) bytes: u64,
    /// Whether all ranks knew all declarations already.
    pub(crate) plan_reused: bool,
    /// What made writing to rollouts slower than possible, with the rollout and the reason.
    pub(crate) slower: Vec<String>,
}

/// What the leader waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Enter,
    Plan,
    Write,
    Verify,
}

impl Stage {
    fn waiting(self) -> &'static str {
        match self {
            Self::Enter => "waiting for a rank to enter the update",
            Self::Plan => "waiting for a rank's plan",
            Self::Write => "waiting for a trainer to write",
            Self::Verify => "waiting for a rollout to verify",
        }
    }

    fn awaits(self, role: Role) -> bool {
        match self {
            Self::Enter | Self::Plan => true,
            Self::Write => role == Role::Trainer,
            Self::Verify => role == Role::Rollout,
        }
    }
}

/// The leader's state machine.
#[derive(Debug)]
pub(crate) struct Coordinator {
    deadline: Duration,
    ranks: BTreeMap<Rank, Role>,
    /// The last declaration of each rank, with its digest.
    declared: BTreeMap<Rank, (Digest, Bytes)>,
    /// The digest of the set of declarations of the last update that has succeeded.
    proven: Option<Digest>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    update: u64,
    version: Version,
    begun: Instant,
    stage: Stage,
    ranks: BTreeMap<Rank, Role>,
    /// The awaited ranks, and when each was heard last or its wait began.
    awaited: BTreeMap<Rank, Instant>,
    /// The digest of the set of declarations that each rank knows.
    known: BTreeMap<Rank, Option<Digest>>,
    plan_reused: bool,
    plan: Option<(Rank, Digest)>,
    /// The digest of the set of declarations.
    set: Option<Digest>,
    /// Whether a trainer has entered before it has read its stream to the end.
    guessed: bool,
    /// Whether a trainer holds other boxes than it said.
    differs: bool,
    /// Whether a trainer has written.
    touched: bool,
    terms: Vec<(Rank, Bytes)>,
    verified: Vec<ReceiverReport>,
    source_bytes: u64,
    bytes: u64,
    slower: Vec<String>,
    alive_at: Instant,
}

/// The digest of a set of declarations, with their ranks and roles.
pub(crate) fn set_of<'a>(declared: impl Iterator<Item = (Rank, Role, &'a Digest)>) -> Digest {
    let mut hash = Sha256::new();
    for (rank, role, digest) in declared {
        hash.update(rank.0.to_le_bytes());
        hash.update([u8::from(role == Role::Trainer)]);
        hash.update(digest);
    }
    hash.finalize().into()
}

pub(crate) fn digest_of(body: &[u8]) -> Digest {
    Sha256::digest(body).into()
}

impl Coordinator {
    /// A coordinator for these ranks, the leader among them.
    pub(crate) fn new(ranks: BTreeMap<Rank, Role>, deadline: Duration) -> Self {
        Self { deadline, ranks, declared: BTreeMap::new(), proven: None, running: None }
    }

    /// A rank has joined: it takes part from the next update on.
    pub(crate) fn joined(&mut self, rank: Rank, role: Role) {
        self.ranks.insert(rank, role);
        self.declared.remove(&rank);
    }

    /// A rank is gone. While ranks enter an update, it goes on without a rollout: nobody has planned yet to write to it. What a trainer holds
    /// may be missing, and later the plan has all ranks in it.
    pub(crate) fn gone(&mut self, now: Instant, rank: Rank, error: Error) -> Vec<Act> {
        self.ranks.remove(&rank);
        self.declared.remove(&rank);
        let Some(running) = &mut self.running else { return Vec::new() };
        let Some(role) = running.ranks.get(&rank).copied() else { return Vec::new() };
        let is_other = |(other, of): (&Rank, &Role)| *other != rank && *of == Role::Rollout;
        let is_spared = running.stage == Stage::Enter
            && role == Role::Rollout
            && running.ranks.iter().any(is_other);
        if !is_spared {
            return self.fail(error.rank(rank));
        }
        running.ranks.remove(&rank);
        running.known.remove(&rank);
        running.awaited.remove(&rank);
        if running.awaited.is_empty() { self.go_on(now) } else { Vec::new() }
    }

    /// Begins an update.
    pub(crate) fn begin(
        &mut self,
        now: Instant,
        update: u64,
        version: Version,
        digests: bool,
    ) -> Vec<Act> {
        let ranks = self.ranks.clone();
        let begin = |rank: &Rank| Act::Send(*rank, ToMember::Begin { update, version, digests });
        let mut acts: Vec<Act> = ranks.keys().map(begin).collect();
        let without_rollouts = !ranks.values().any(|role| *role == Role::Rollout);
        self.running = Some(Running {
            update,
            version,
            begun: now,
            stage: Stage::Enter,
            awaited: ranks.keys().map(|rank| (*rank, now)).collect(),
            ranks,
            known: BTreeMap::new(),
            plan_reused: true,
            plan: None,
            set: None,
            guessed: false,
            differs: false,
            touched: false,
            terms: Vec::new(),
            verified: Vec::new(),
            source_bytes: 0,
            bytes: 0,
            slower: Vec::new(),
            alive_at: now + self.deadline / 4,
        });
        if without_rollouts {
            let message = "no rollout is left in the group";
            acts.extend(self.fail(Error::new(ErrorKind::PeerLost, "updating", message)));
        }
        acts
    }

    /// A message of a rank.
    pub(crate) fn heard(&mut self, now: Instant, from: Rank, message: ToLeader) -> Vec<Act> {
        let Some(running) = &mut self.running else { return Vec::new() };
        if message.update() != running.update || !running.ranks.contains_key(&from) {
            return Vec::new();
        }
        if let Some(since) = running.awaited.get_mut(&from) {
            *since = now;
        }
        let expected: &[Stage] = match &message {
            ToLeader::Entered { .. } => &[Stage::Enter],
            ToLeader::Maxima { .. } | ToLeader::Planned { .. } => &[Stage::Plan],
            ToLeader::Batch { .. } | ToLeader::Written { .. } => &[Stage::Write],
            ToLeader::Differs { .. } => &[Stage::Plan, Stage::Write],
            ToLeader::Verified { .. } => &[Stage::Verify],
            ToLeader::Progress { .. } | ToLeader::Failed { .. } => &[],
        };
        let is_expected = expected.is_empty()
            || expected.contains(&running.stage) && running.awaited.contains_key(&from);
        if !is_expected {
            return self.fail(broken("a message that nobody waits for").rank(from));
        }
        match message {
            ToLeader::Progress { .. } => return Vec::new(),
            ToLeader::Failed { error, .. } => {
                let mut error = error;
                error.rank.get_or_insert(from);
                return self.fail(error.into());
            }
            ToLeader::Entered { digest, body, known, guessed, .. } => {
                if let Some(body) = body {
                    if digest_of(&body) != digest {
                        return self.fail(broken("a declaration of another digest").rank(from));
                    }
                    self.declared.insert(from, (digest, body));
                } else if self.declared.get(&from).is_none_or(|(own, _)| *own != digest) {
                    return self.fail(broken("a declaration that it never made").rank(from));
                }
                running.known.insert(from, known);
                running.guessed |= guessed;
            }
            ToLeader::Maxima { update, to, values } => {
                if running.ranks.get(&to) != Some(&Role::Trainer) {
                    return self.fail(broken("maxima for a rank that is no trainer").rank(from));
                }
                return vec![Act::Send(to, ToMember::Maxima { update, from, values })];
            }
            ToLeader::Planned { plan, terms, .. } => {
                match running.plan {
                    Some((_, other)) if other == plan => {}
                    None => running.plan = Some((from, plan)),
                    Some((other, _)) => {
                        let message = format!("its plan is not that of rank {other}");
                        let error = Error::new(ErrorKind::Mismatch, "comparing plans", message);
                        return self.fail(error.rank(from));
                    }
                }
                if running.ranks.get(&from) == Some(&Role::Rollout) {
                    running.terms.push((from, terms));
                }
            }
            ToLeader::Batch { update, to, batch } => {
                if running.ranks.get(&to) != Some(&Role::Rollout) {
                    return self.fail(broken("a batch for a rank that is no rollout").rank(from));
                }
                running.touched = true;
                return vec![Act::Send(to, ToMember::Batch { update, from, batch })];
            }
            ToLeader::Written { source_bytes, .. } => {
                running.source_bytes = running.source_bytes.saturating_add(source_bytes);
                running.touched = true;
            }
            ToLeader::Differs { wrote, .. } => {
                running.differs = true;
                running.touched |= wrote;
            }
            ToLeader::Verified { digest, bytes, inspected, slower, .. } => {
                running.bytes = running.bytes.saturating_add(bytes);
                let mut report = ReceiverReport::new(from, VersionState::Active);
                report.seconds = (now - running.begun).as_secs_f64();
                report.digest = Some(digest);
                report.notes = serde_json::json!({ "bytes": bytes, "inspected": inspected });
                let of_rank = slower.into_iter().map(|why| format!("rank {from}: {why}"));
                running.slower.extend(of_rank);
                running.verified.push(report);
            }
        }
        running.awaited.remove(&from);
        if running.awaited.is_empty() { self.go_on(now) } else { Vec::new() }
    }

    /// All awaited ranks have answered: goes on to the next stage.
    fn go_on(&mut self, now: Instant) -> Vec<Act> {
        let Some(running) = &mut self.running else { return Vec::new() };
        let update = running.update;
        let of = |role: Role| {
            let ranks = running.ranks.iter().filter(move |(_, other)| **other == role);
            ranks.map(|(rank, _)| *rank)
        };
        let mut acts = Vec::new();
        if running.stage == Stage::Enter {
            let declared = running.ranks.iter().filter_map(|(rank, role)| {
                let (digest, _) = self.declared.get(rank)?;
                Some((*rank, *role, digest))
            });
            running.set = Some(set_of(declared));
            // If one rank declares something else than in the last update, others may do so as well.
            running.differs = running.guessed && running.set != self.proven;
        }
        let next = match running.stage {
            _ if running.differs => {
                for rank in running.ranks.keys() {
                    acts.push(Act::Send(*rank, ToMember::Again { update }));
                }
                (running.differs, running.guessed) = (false, false);
                running.plan = None;
                running.known.clear();
                running.terms.clear();
                running.source_bytes = 0;
                Stage::Enter
            }
            Stage::Enter => {
                let set = running.set.unwrap_or_default();
                let declared = running.ranks.iter().filter_map(|(&rank, &role)| {
                    let (_, body) = self.declared.get(&rank)?;
                    Some(Declared { rank, role, body: body.clone() })
                });
                let all: Vec<Declared> = declared.collect();
                for rank in running.ranks.keys() {
                    let knows = running.known.get(rank) == Some(&Some(set));
                    running.plan_reused &= knows;
                    let declared = (!knows).then(|| all.clone());
                    acts.push(Act::Send(*rank, ToMember::Plan { update, set, declared }));
                }
                Stage::Plan
            }
            Stage::Plan => {
                for rank in of(Role::Trainer) {
                    let terms = running.terms.clone();
                    acts.push(Act::Send(rank, ToMember::Write { update, terms }));
                }
                Stage::Write
            }
            Stage::Write => {
                for rollout in of(Role::Rollout) {
                    acts.push(Act::Send(rollout, ToMember::Verify { update }));
                }
                Stage::Verify
            }
            Stage::Verify => {
                for rank in running.ranks.keys() {
                    acts.push(Act::Send(*rank, ToMember::Commit { update }));
                }
                running.verified.sort_by_key(|receiver| receiver.rank);
                running.slower.sort();
                self.proven = running.set;
                acts.push(Act::End(Ok(Committed {
                    receivers: std::mem::take(&mut running.verified),
                    source_bytes: running.source_bytes,
                    bytes: running.bytes,
                    plan_reused: running.plan_reused,
                    slower: std::mem::take(&mut running.slower),
                })));
                self.running = None;
                return acts;
            }
        };
        let awaited = running.ranks.iter().filter(|(_, role)| next.awaits(**role));
        running.awaited = awaited.map(|(rank, _)| (*rank, now)).collect();
        running.stage = next;
        acts
    }

    /// Fails the update, and tells every rank this first cause.
    pub(crate) fn fail(&mut self, error: Error) -> Vec<Act> {
        let Some(running) = self.running.take() else { return Vec::new() };
        let error = error.version(running.version);
        let touched = running.touched || matches!(running.stage, Stage::Write | Stage::Verify);
        let report = ErrorReport::from(&error);
        let abort = |rank: &Rank| {
            let (update, error) = (running.update, report.clone());
            Act::Send(*rank, ToMember::Abort { update, touched, error })
        };
        let mut acts: Vec<Act> = running.ranks.keys().map(abort).collect();
        acts.push(Act::End(Err(error)));
        acts
    }

    /// The ranks of the present update.
    #[cfg(test)]
    pub(crate) fn present(&self) -> Vec<Rank> {
        self.running.iter().flat_map(|running| running.ranks.keys().copied()).collect()
    }

    /// When to [`tick`](Self::tick) if nothing else happens before.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        let running = self.running.as_ref()?;
        let late = running.awaited.values().min().map(|since| *since + self.deadline);
        late.into_iter().chain([running.alive_at]).min()
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<Act> {
        let Some(running) = &mut self.running else { return Vec::new() };
        let late = |(_, since): &(&Rank, &Instant)| now >= **since + self.deadline;
        if let Some((rank, _)) = running.awaited.iter().filter(late).min_by_key(|(_, at)| **at) {
            let message = format!("nothing within {:.1} s", self.deadline.as_secs_f64());
            let error = Error::new(ErrorKind::Timeout, running.stage.waiting(), message);
            let rank = *rank;
            return self.fail(error.rank(rank));
        }
        if now < running.alive_at {
            return Vec::new();
        }
        running.alive_at = now + self.deadline / 4;
        let update = running.update;
        running.ranks.keys().map(|rank| Act::Send(*rank, ToMember::Alive { update })).collect()
    }
}

fn broken(message: &str) -> Error {
    Error::new(ErrorKind::Protocol, "updating", message)
}

//! Runs whole groups of the state machines without IO. Lists of numbers choose what happens next.
//!
//! Messages are read and repeated, work goes on step by step, calls are given up, time passes. Ranks die, stop and go on,
//! count as lost although they live, and join again. After every step:
//!
//! 1. A rollout whose version is active has every part of that version, and nobody can write to its tensors.
//! 2. Trainers write to a rollout's tensors only while the rollout says that it is being updated.
//! 3. If the leader reports a version as active, every rollout that it names has verified it, and has what each trainer holds in this update,
//!    not what it said that it holds.
//! 4. A trainer whose program expects the version that the leader has begun takes part, also if updates before it have failed meanwhile.
//!
//! At the end, every call ends in a bounded time if the ranks that are not stopped go on, and an update with the remaining
//! ranks succeeds.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine_core::{Error, ErrorKind, ErrorReport, Rank, Result, Role, Version};
use proptest::prelude::*;

use crate::coordinator::{self, Coordinator, digest_of};
use crate::member::{self, Done, Member, Task, TensorState};
use crate::message::{Batch, ToLeader, ToMember};

const DEADLINE: Duration = Duration::from_secs(8);
const TRAINERS: u32 = 3;
const RANKS: u32 = 5;

type Broken = String;

/// A fault that tests put back, to show that the promises catch it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Planted {
    None,
    /// A rollout enters an update although a trainer may still write.
    NoLease,
    /// The leader says that nothing was written, even if something was.
    NotTouched,
    /// A trainer that holds other boxes than it said goes on as if it had written.
    Differs,
    /// The call of a trainer ends when an update of another version begins, although that one may have failed long ago.
    EndsAtOnce,
}

struct Work {
    task: Task,
    since: Instant,
    stop: bool,
    /// The rollouts that are still to be written, set once their memory was reached.
    left: Option<VecDeque<(Rank, u64)>>,
}

struct Process {
    role: Role,
    member: Member,
    update: u64,
    called: bool,
    /// The version that the program expects.
    expects: Option<Version>,
    ended: Option<Result<Version>>,
    work: Option<Work>,
    stopped: bool,
    /// Whether it is connected to the leader.
    connected: bool,
    inbox: VecDeque<ToMember>,
    memory: Memory,
    /// Which of two sets of boxes a trainer holds, and which it said last.
    holds: u64,
    said: Option<u64>,
}

/// A rollout's tensors: for each trainer, the update whose values its part holds, twice that, and one more if it holds its second set of
/// boxes.
#[derive(Default)]
struct Memory {
    parts: BTreeMap<Rank, u64>,
    /// What trainers have said in this update to have written.
    said: BTreeMap<Rank, u64>,
    lent: Option<u64>,
    holders: BTreeSet<Rank>,
}

struct World {
    now: Instant,
    begun: Instant,
    coordinator: Coordinator,
    processes: BTreeMap<Rank, Process>,
    to_leader: BTreeMap<Rank, VecDeque<ToLeader>>,
    committed: Option<Result<coordinator::Committed>>,
    sending: bool,
    updates: u64,
    tokens: u64,
    versions: BTreeMap<u64, Version>,
    old: Vec<(Rank, ToMember)>,
    planted: Planted,
}

struct Choices<'a>(std::slice::Iter<'a, u16>);

impl Choices<'_> {
    fn of(&mut self, options: usize) -> usize {
        self.0.next().map_or(0, |number| usize::from(*number) % options.max(1))
    }
}

fn role(rank: u32) -> Role {
    if rank < TRAINERS { Role::Trainer } else { Role::Rollout }
}

fn failed(words: &str) -> Error {
    Error::new(ErrorKind::Io, "working", words)
}

/// Whether this is the error of the rank that has refused an update of another version, as it has it.
fn is_refusal(error: &ErrorReport) -> bool {
    error.rank.is_none() && error.operation == member::ENTERING
}

impl Process {
    fn new(rank: u32) -> Self {
        Self {
            role: role(rank),
            member: Member::new(Rank(rank), role(rank), DEADLINE),
            update: 0,
            called: false,
            expects: None,
            ended: None,
            work: None,
            stopped: false,
            connected: true,
            inbox: VecDeque::new(),
            memory: Memory::default(),
            holds: 0,
            said: None,
        }
    }
}

impl World {
    fn new(planted: Planted) -> Self {
        let now = Instant::now();
        let ranks: BTreeMap<Rank, Role> = (0..RANKS).map(|rank| (Rank(rank), role(rank))).collect();
        Self {
            now,
            begun: now,
            coordinator: Coordinator::new(ranks.clone(), DEADLINE),
            processes: ranks.keys().map(|rank| (*rank, Process::new(rank.0))).collect(),
            to_leader: BTreeMap::new(),
            committed: None,
            sending: false,
            updates: 0,
            tokens: 0,
            versions: BTreeMap::new(),
            old: Vec::new(),
            planted,
        }
    }

    /// Every rank that does not wait yet calls for an update, and the leader begins one.
    fn call(&mut self) -> std::result::Result<(), Broken> {
        self.updates += 1;
        let version = Version(self.updates * 10);
        self.versions.insert(self.updates, version);
        self.begun = self.now;
        for rank in self.processes.keys().copied().collect::<Vec<_>>() {
            let waits = |p: &&mut Process| !p.stopped && p.called && !p.member.takes_part();
            let waiting = self.processes.get_mut(&rank).filter(waits);
            if let Some(process) = waiting.filter(|process| process.expects.is_some()) {
                // Its program has waited long enough for an update that has ended without it.
                process.member.cancel();
                process.called = false;
            }
            self.call_of(rank)?;
        }
        self.sending = true;
        let acts = self.coordinator.begin(self.now, self.updates, version, true);
        self.leader_acts(acts)
    }

    /// A rank's program begins to wait for an update, unless it waits already.
    fn call_of(&mut self, rank: Rank) -> std::result::Result<(), Broken> {
        let now = self.now;
        let waits = |process: &&mut Process| !process.called && !process.stopped;
        let Some(process) = self.processes.get_mut(&rank).filter(waits) else { return Ok(()) };
        if process.work.is_some() {
            return Ok(());
        }
        (process.called, process.ended) = (true, None);
        // Messages since the last call may belong to updates that have ended. Some of them are still on their way.
        for message in process.inbox.drain(..process.inbox.len() / 2).collect::<Vec<_>>() {
            let acts = process.member.heard(now, message);
            assert!(acts.is_empty(), "nothing is entered without a call");
        }
        let version = self.versions.get(&self.updates).copied();
        process.expects = version.filter(|_| process.role == Role::Trainer);
        let acts = process.member.call(now, process.expects);
        self.member_acts(rank, acts)
    }

    fn leader_acts(&mut self, acts: Vec<coordinator::Act>) -> std::result::Result<(), Broken> {
        for mut act in acts {
            if let coordinator::Act::Send(_, ToMember::Abort { touched, .. }) = &mut act {
                *touched &= self.planted != Planted::NotTouched;
            }
            match act {
                coordinator::Act::Send(Rank::LEADER, message) => {
                    let now = self.now;
                    if let Some(process) = self.processes.get_mut(&Rank::LEADER) {
                        let acts = process.member.heard(now, message);
                        self.member_acts(Rank::LEADER, acts)?;
                    }
                }
                coordinator::Act::Send(to, message) => {
                    if let Some(process) = self.processes.get_mut(&to).filter(|p| p.connected) {
                        process.inbox.push_back(message.clone());
                        self.old.push((to, message));
                    }
                }
                coordinator::Act::End(result) => {
                    if let Ok(committed) = &result {
                        for receiver in &committed.receivers {
                            let process = self.processes.get(&receiver.rank);
                            let holds =
                                |rank: &Rank| self.processes.get(rank).map_or(0, |p| p.holds);
                            let of_update = |(rank, part): (&Rank, &u64)| {
                                *part == self.updates * 2 + holds(rank)
                            };
                            let whole =
                                process.is_none_or(|p| p.memory.parts.iter().all(of_update));
                            if !whole {
                                return Err(format!(
                                    "rank {} has not all that is reported",
                                    receiver.rank
                                ));
                            }
                        }
                    }
                    self.committed = Some(result);
                    self.sending = false;
                }
            }
        }
        Ok(())
    }

    fn member_acts(
        &mut self,
        rank: Rank,
        acts: Vec<member::Act>,
    ) -> std::result::Result<(), Broken> {
        for act in acts {
            match act {
                member::Act::Send(message) if rank == Rank::LEADER => {
                    let acts = self.coordinator.heard(self.now, rank, message);
                    self.leader_acts(acts)?;
                }
                member::Act::Send(message) => {
                    if let ToLeader::Failed { error, .. } = &message
                        && is_refusal(error)
                        && self.planted == Planted::EndsAtOnce
                    {
                        return self
                            .member_acts(rank, vec![member::Act::End(Err(error.clone().into()))]);
                    }
                    if self.processes.get(&rank).is_some_and(|process| process.connected) {
                        self.to_leader.entry(rank).or_default().push_back(message);
                    }
                }
                member::Act::Start(task) => {
                    let since = self.now;
                    if let Some(process) = self.processes.get_mut(&rank) {
                        if process.work.is_some() {
                            return Err(format!("rank {rank} begins work beside other work"));
                        }
                        process.work = Some(Work { task, since, stop: false, left: None });
                    }
                }
                member::Act::Stop => {
                    if let Some(work) = self.processes.get_mut(&rank).and_then(|p| p.work.as_mut())
                    {
                        work.stop = true;
                    }
                }
                member::Act::End(result) => {
                    if let Some(process) = self.processes.get_mut(&rank) {
                        let works = process.work.is_some();
                        if works {
                            return Err(format!("the call of rank {rank} ends while it works"));
                        }
                        let refused =
                            result.as_ref().is_err_and(|error| is_refusal(error.report()));
                        let begun = self.versions.get(&self.updates).copied();
                        if refused && process.expects == begun {
                            return Err(format!("rank {rank} refuses the version that it expects"));
                        }
                        (process.called, process.ended) = (false, Some(result));
                    }
                }
            }
        }
        Ok(())
    }

    /// Does a step of a rank's work. Returns whether there was something to do.
    fn work(&mut self, rank: Rank) -> std::result::Result<bool, Broken> {
        let Some(process) = self.processes.get_mut(&rank).filter(|p| !p.stopped) else {
            return Ok(false);
        };
        let Some(mut work) = process.work.take() else { return Ok(false) };
        let (update, late) = (self.updates, self.now >= work.since + DEADLINE / 2);
        let done = match &mut work.task {
            Task::Prepare { sure } => {
                let lent = !process.memory.holders.is_empty() && self.planted != Planted::NoLease;
                match (lent, late) {
                    (true, false) => None,
                    (true, true) => {
                        Some(Err(Error::new(ErrorKind::Timeout, "taking back", "late")))
                    }
                    (false, _) => {
                        process.memory.lent = None;
                        let said = process.said.filter(|_| !*sure).unwrap_or(process.holds);
                        let guessed = !*sure && process.said.is_some();
                        process.said = Some(said);
                        let body = [&rank.0.to_le_bytes()[..], &said.to_le_bytes()].concat();
                        let body = Bytes::from(body);
                        let digest = digest_of(&body);
                        Some(Ok(Done::Prepared { digest, body, known: None, guessed }))
                    }
                }
            }
            Task::Plan { set, declared } => {
                let known = declared.as_ref().is_some_and(|all| !all.is_empty());
                if !known {
                    return Err(format!("rank {rank} has nothing to plan with"));
                }
                let mut terms = Bytes::new();
                if process.role == Role::Rollout {
                    self.tokens += 1;
                    process.memory.lent = Some(self.tokens);
                    process.memory.said.clear();
                    terms = Bytes::copy_from_slice(&self.tokens.to_le_bytes());
                }
                let maxima = match process.role {
                    Role::Trainer if rank != Rank::LEADER => vec![(Rank::LEADER, vec![rank.0])],
                    _ => Vec::new(),
                };
                process.update = update;
                // With maxima to find, a trainer has read its stream before it has planned.
                let differs = process.said != Some(process.holds) && rank != Rank::LEADER;
                match differs && process.role == Role::Trainer && update.is_multiple_of(2) {
                    true => Some(Ok(Done::Differs { wrote: false })),
                    false => Some(Ok(Done::Planned { plan: *set, terms, maxima })),
                }
            }
            Task::Write { terms, maxima, .. } => {
                let update = process.update;
                let live = self.coordinator_trainers();
                let expected = if rank == Rank::LEADER { live.saturating_sub(1) } else { 0 };
                if work.left.is_none() && maxima.len() != expected && self.sending {
                    return Err(format!("rank {rank} has {} maxima of {expected}", maxima.len()));
                }
                self.write(rank, update, terms, &mut work.left, work.stop)?
            }
            Task::Check { from, batch } => {
                let said = process.memory.said.insert(*from, batch.digests[0]);
                match process.memory.parts.get(from) == batch.digests.first() && said.is_none() {
                    true => Some(Ok(Done::Checked)),
                    false => Some(Err(Error::new(ErrorKind::Digest, "checking", "other bytes"))),
                }
            }
            Task::Verify { .. } => {
                let memory = &mut process.memory;
                match (memory.holders.is_empty() || self.planted == Planted::NoLease, late) {
                    (false, false) => None,
                    (false, true) => {
                        Some(Err(Error::new(ErrorKind::Timeout, "taking back", "late")))
                    }
                    (true, _) => {
                        memory.lent = None;
                        memory.parts.retain(|from, _| memory.said.contains_key(from));
                        match memory.parts == memory.said {
                            true => Some(Ok(Done::Verified {
                                digest: 1,
                                bytes: 1,
                                inspected: 0,
                                slower: Vec::new(),
                            })),
                            false => {
                                Some(Err(Error::new(ErrorKind::Digest, "verifying", "other bytes")))
                            }
                        }
                    }
                }
            }
        };
        let Some(process) = self.processes.get_mut(&rank) else { return Ok(false) };
        match done {
            None => {
                let acts = process.member.progress();
                process.work = Some(work);
                self.member_acts(rank, acts)?;
            }
            Some(result) => {
                let result = match result {
                    Ok(Done::Differs { .. }) if self.planted == Planted::Differs => {
                        Ok(Done::Written { source_bytes: 1 })
                    }
                    result => result,
                };
                let acts = process.member.done(result);
                self.member_acts(rank, acts)?;
            }
        }
        Ok(true)
    }

    fn coordinator_trainers(&self) -> usize {
        let known = self.coordinator.present();
        known.iter().filter(|rank| rank.0 < TRAINERS).count()
    }

    fn write(
        &mut self,
        rank: Rank,
        update: u64,
        terms: &[(Rank, Bytes)],
        left: &mut Option<VecDeque<(Rank, u64)>>,
        stop: bool,
    ) -> std::result::Result<Option<Result<Done>>, Broken> {
        let let_go = |world: &mut Self| {
            for process in world.processes.values_mut() {
                process.memory.holders.remove(&rank);
            }
        };
        let Some(rest) = left else {
            let mut found = VecDeque::new();
            for (to, terms) in terms {
                let token = u64::from_le_bytes(terms[..].try_into().unwrap_or_default());
                let there = self.processes.get_mut(to).filter(|p| p.memory.lent == Some(token));
                let Some(process) = there else {
                    let_go(self);
                    return Ok(Some(Err(failed("it is lent no more"))));
                };
                process.memory.holders.insert(rank);
                found.push_back((*to, token));
            }
            *left = Some(found);
            return Ok(None);
        };
        if stop {
            let_go(self);
            return Ok(Some(Err(failed("stopped"))));
        }
        let own = self.processes.get(&rank).map(|process| (process.holds, process.said));
        let (holds, said) = own.unwrap_or_default();
        if said != Some(holds) && rest.len() < terms.len() {
            // It sees in the midst of its stream that this is another one.
            let wrote = rest.len() + 1 < terms.len();
            let_go(self);
            return Ok(Some(Ok(Done::Differs { wrote })));
        }
        if let Some((to, _)) = rest.pop_front() {
            // The rank may have joined again meanwhile, with new memory.
            let holds = |process: &&mut Process| process.memory.holders.contains(&rank);
            let written = update * 2 + said.unwrap_or(0);
            if let Some(process) = self.processes.get_mut(&to).filter(holds) {
                if !matches!(process.member.state(), TensorState::Updating { .. }) {
                    let state = process.member.state();
                    return Err(format!("rank {rank} writes to {to}, which is {state:?}"));
                }
                process.memory.parts.insert(rank, written);
            }
            let batch = Batch { until: 1, digests: vec![written] };
            let acts = self.processes.get(&rank).map(|process| process.member.wrote(to, batch));
            self.member_acts(rank, acts.unwrap_or_default())?;
            return Ok(None);
        }
        let_go(self);
        Ok(Some(Ok(Done::Written { source_bytes: 1 })))
    }

    fn member_hears(&mut self, rank: Rank) -> std::result::Result<bool, Broken> {
        let now = self.now;
        if self.sending && rank != Rank::LEADER {
            // The programs of other ranks call again when a call has ended.
            self.call_of(rank)?;
        }
        let Some(process) = self.processes.get_mut(&rank).filter(|p| !p.stopped && p.called) else {
            return Ok(false);
        };
        let Some(message) = process.inbox.pop_front() else {
            if process.connected || !process.member.takes_part() {
                if !process.connected {
                    (process.called, process.ended) = (false, Some(Err(failed("no leader"))));
                    return Ok(true);
                }
                return Ok(false);
            }
            let acts = process.member.lost(failed("the leader is gone").rank(Rank::LEADER));
            let did = !acts.is_empty();
            self.member_acts(rank, acts)?;
            return Ok(did);
        };
        let acts = process.member.heard(now, message);
        self.member_acts(rank, acts)?;
        Ok(true)
    }

    fn coordinator_hears(&mut self, rank: Rank) -> std::result::Result<bool, Broken> {
        let Some(message) = self.to_leader.get_mut(&rank).and_then(VecDeque::pop_front) else {
            return Ok(false);
        };
        let acts = self.coordinator.heard(self.now, rank, message);
        self.leader_acts(acts)?;
        Ok(true)
    }

    /// Does the next thing that can happen at this rank, or at the next rank where something can.
    fn go_on(&mut self, rank: Rank, what: usize) -> std::result::Result<(), Broken> {
        for rank in (0..RANKS).map(|n| Rank((rank.0 + n) % RANKS)) {
            let happened = match what % 3 {
                0 => {
                    self.member_hears(rank)? || self.work(rank)? || self.coordinator_hears(rank)?
                }
                1 => {
                    self.coordinator_hears(rank)? || self.member_hears(rank)? || self.work(rank)?
                }
                _ => {
                    self.work(rank)? || self.coordinator_hears(rank)? || self.member_hears(rank)?
                }
            };
            if happened {
                break;
            }
        }
        Ok(())
    }

    fn pass(&mut self, time: Duration) -> std::result::Result<(), Broken> {
        self.now += time;
        let acts = self.coordinator.tick(self.now);
        self.leader_acts(acts)?;
        for rank in self.processes.keys().copied().collect::<Vec<_>>() {
            let now = self.now;
            let Some(process) = self.processes.get_mut(&rank).filter(|p| !p.stopped) else {
                continue;
            };
            let acts = process.member.tick(now);
            self.member_acts(rank, acts)?;
        }
        Ok(())
    }

    /// A rank counts as lost at the leader. If its process has ended, the system has released its leases.
    fn lose(&mut self, rank: Rank, dies: bool) -> std::result::Result<(), Broken> {
        if dies {
            self.processes.remove(&rank);
            for process in self.processes.values_mut() {
                process.memory.holders.remove(&rank);
            }
        } else if let Some(process) = self.processes.get_mut(&rank) {
            process.connected = false;
            process.inbox.clear();
        }
        self.to_leader.remove(&rank);
        let error = Error::new(ErrorKind::PeerLost, "being in the group", "it is lost");
        let acts = self.coordinator.gone(self.now, rank, error);
        self.leader_acts(acts)
    }

    fn give_up(&mut self, rank: Rank) -> std::result::Result<(), Broken> {
        let Some(process) = self.processes.get_mut(&rank).filter(|p| p.called && !p.stopped) else {
            return Ok(());
        };
        let mut acts = process.member.cancel();
        process.called = false;
        // The work goes on until it can stop, and the next call waits for that.
        if let Some(work) = &mut process.work {
            work.stop = true;
        }
        acts.retain(|act| matches!(act, member::Act::Send(_)));
        self.member_acts(rank, acts)
    }

    fn check(&self) -> std::result::Result<(), Broken> {
        for (rank, process) in &self.processes {
            let TensorState::Active(version) = process.member.state() else { continue };
            if process.role == Role::Trainer {
                continue;
            }
            let all =
                process.memory.parts.values().all(|part| self.versions[&(part / 2)] == *version);
            if !all {
                return Err(format!("rank {rank} serves a mixture as {version}"));
            }
            if !process.memory.holders.is_empty() && process.memory.lent.is_none() {
                return Err(format!("somebody can write to rank {rank}, which serves {version}"));
            }
        }
        Ok(())
    }

    /// All ranks that are not stopped go on until all calls have ended.
    fn settle(&mut self) -> std::result::Result<(), Broken> {
        let until = self.now + DEADLINE * 40;
        loop {
            let mut did = false;
            for rank in (0..RANKS).map(Rank) {
                did |= self.coordinator_hears(rank)?;
                did |= self.member_hears(rank)?;
                did |= self.work(rank)?;
                self.check()?;
            }
            let waits = |process: &Process| process.member.takes_part() && !process.stopped;
            if !self.sending && !self.processes.values().any(waits) {
                // Ranks that still wait for an update to begin wait for the next one.
                return Ok(());
            }
            self.pass(if did { Duration::from_millis(1) } else { DEADLINE / 10 })?;
            if self.now > until {
                let waiting: Vec<_> = self
                    .processes
                    .iter()
                    .filter(|(_, p)| waits(p))
                    .map(|(rank, _)| rank.0)
                    .collect();
                return Err(format!("calls do not end: {waiting:?}, the leader {}", self.sending));
            }
        }
    }
}

fn play(numbers: &[u16], planted: Planted) -> std::result::Result<usize, Broken> {
    let mut choices = Choices(numbers.iter());
    let mut world = World::new(planted);
    let mut succeeded = 0;
    world.call()?;
    while choices.0.len() > 0 {
        let what = choices.of(240);
        let rank = Rank(choices.of(RANKS as usize) as u32);
        match what {
            40.. => world.go_on(rank, what)?,
            30 | 31 => world.pass(DEADLINE / 20)?,
            32 => world.pass(DEADLINE / 2)?,
            33 if rank != Rank::LEADER => world.lose(rank, true)?,
            34 if rank != Rank::LEADER => {
                if world.processes.get(&rank).is_some_and(|process| process.connected) {
                    world.lose(rank, false)?;
                }
            }
            35 => {
                if let Some(process) =
                    world.processes.get_mut(&rank).filter(|_| rank != Rank::LEADER)
                {
                    process.stopped = !process.stopped;
                }
            }
            36 if rank != Rank::LEADER => {
                // A rank whose process has ended joins again as a new process.
                if let Entry::Vacant(free) = world.processes.entry(rank) {
                    free.insert(Process::new(rank.0));
                    world.coordinator.joined(rank, role(rank.0));
                }
            }
            37 => world.give_up(rank)?,
            39 => {
                let works = world.sending;
                let trainer = world.processes.get_mut(&rank).filter(|p| p.role == Role::Trainer);
                if let Some(process) = trainer.filter(|process| !works && process.work.is_none()) {
                    process.holds ^= 1;
                }
            }
            38 => {
                if !world.old.is_empty() {
                    let at = choices.of(world.old.len());
                    let (to, message) = world.old[at].clone();
                    let old = message.update() < world.updates;
                    if let Some(process) =
                        world.processes.get_mut(&to).filter(|p| p.connected && old)
                    {
                        process.inbox.push_back(message);
                    }
                }
            }
            _ => {
                let leader = &world.processes[&Rank::LEADER];
                if !world.sending && !leader.called && leader.work.is_none() {
                    succeeded += usize::from(matches!(world.committed, Some(Ok(_))));
                    world.call()?;
                }
            }
        }
        world.check()?;
    }
    // First without the stopped ranks, which the deadlines make count as lost. Then they go on.
    world.settle()?;
    let all: Vec<Rank> = world.processes.keys().copied().collect();
    for rank in all {
        if let Some(process) = world.processes.get_mut(&rank) {
            process.stopped = false;
        }
    }
    world.settle()?;
    for rank in (1..RANKS).map(Rank) {
        if world.processes.get(&rank).is_some_and(|process| !process.connected) {
            // The rank hears that it was lost, and joins again.
            world.settle()?;
            world.processes.remove(&rank);
        }
        if !world.processes.contains_key(&rank) && rank.0 >= TRAINERS {
            world.processes.insert(rank, Process::new(rank.0));
            world.coordinator.joined(rank, role(rank.0));
        }
    }
    world.call()?;
    world.settle()?;
    match &world.committed {
        Some(Ok(_)) => Ok(succeeded),
        Some(Err(error)) => Err(format!("an update with those that are left fails: {error}")),
        None => Err("an update has not ended".into()),
    }
}

fn schedules(length: usize) -> impl Strategy<Value = Vec<u16>> {
    prop::collection::vec(any::<u16>(), 0..length)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn promises_are_kept_whatever_happens(numbers in schedules(600)) {
        if let Err(broken) = play(&numbers, Planted::None) {
            prop_assert!(false, "{broken}");
        }
    }
}

#[test]
fn faults_that_are_put_back_are_found() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    for planted in [Planted::NoLease, Planted::NotTouched, Planted::Differs, Planted::EndsAtOnce] {
        let mut runner = TestRunner::deterministic();
        let strategy = schedules(600);
        let found = (0..60_000).any(|_| {
            let numbers = strategy.new_tree(&mut runner).map(|tree| tree.current());
            numbers.is_ok_and(|numbers| play(&numbers, planted).is_err())
        });
        assert!(found, "{planted:?} is not found");
    }
}

#[test]
fn updates_succeed_in_schedules_at_all() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let strategy = schedules(600);
    let succeeded: usize = (0..500)
        .filter_map(|_| {
            let numbers = strategy.new_tree(&mut runner).ok()?.current();
            play(&numbers, Planted::None).ok()
        })
        .sum();
    assert!(succeeded > 20, "{succeeded}");
}

#[test]
fn a_rollout_that_is_gone_before_there_is_a_plan_is_left_out_and_another_rank_fails_the_update() {
    for (lost, has_entered) in (1..RANKS).flat_map(|rank| [(rank, false), (rank, true)]) {
        let mut world = World::new(Planted::None);
        world.call().unwrap();
        if has_entered {
            for step in [World::member_hears, World::work, World::coordinator_hears] {
                step(&mut world, Rank(lost)).unwrap();
            }
        }
        world.lose(Rank(lost), true).unwrap();
        world.settle().unwrap();
        match (world.committed.unwrap(), role(lost)) {
            (Ok(committed), Role::Rollout) => {
                let ranks: Vec<u32> = committed.receivers.iter().map(|one| one.rank.0).collect();
                let left: Vec<u32> = (TRAINERS..RANKS).filter(|rank| *rank != lost).collect();
                assert_eq!(ranks, left, "without {lost}");
            }
            (Err(error), Role::Trainer) => {
                assert_eq!(error.report().rank, Some(Rank(lost)), "{error}");
            }
            (ended, _) => panic!("without {lost}, which has entered: {has_entered}: {ended:?}"),
        }
    }
}

//! The leader of an update, as a state machine: no IO, no clock, no tasks.
//!
//! The loop in `sender.rs` tells it what happens and when ([`Leader::event`], [`Leader::done`], [`Leader::tick`]). It
//! answers with things to do ([`Leader::act`]) and with the time of its next tick ([`Leader::timer`]).

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::{debug, info, warn};

use super::link::{Members, Part};
use super::message::{Begin, Layout, Ticket, ToReceiver, ToSender, decode, encode, sender_of};
use super::paths::Paths;
use super::route::{Due, Gap, Route, Topology};
use super::tree::{self, Site};
use super::work::{Act, Collected, Done, Ended, Machine, Work};
use super::{ENCODING, because, is_of_transport, too_late};
use engine_core::control::{Event, Peer};
use engine_core::observe::Progress;
use engine_core::plan::{BucketLayout, Plan};
use engine_core::{
    Entrant, Error, ErrorKind, ErrorReport, Rank, Recovery, Result, Version, digest,
};
use engine_core::{PartSet, Parts};
use engine_core::{RankMap, RankSet, ReceiverReport, StageTimes, VersionState, WorkerMetadata};

const ENTERING: &str = "entering an update";
pub(super) const RELEASING: &str = "waiting for a receiver to release a bucket";
const FILLING: &str = "waiting for a trainer to fill a bucket";

/// How often the leader says that it is alive, at the least.
const ALIVE: Duration = Duration::from_secs(1);

/// How many updates have to fail because of the same rank until it is expelled.
const PATIENCE: u32 = 3;

/// How long after a transport's error the control plane may name the rank that has died.
const MOMENT: Duration = Duration::from_millis(300);

/// The part of a rank that joins the existing group; `None` if it has no part in updates.
pub(super) type PartOf = dyn Fn(&Peer) -> Option<Part> + Send + Sync;

/// The silence of a rank: [`Control::silence`](engine_core::control::Control::silence).
pub(super) type Silence = dyn Fn(Rank) -> Option<Duration> + Send + Sync;

/// What does not change between updates.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// The longest time that a rank may take for a step.
    pub(super) deadline: Duration,
    pub(super) slots: usize,
    pub(super) bucket_bytes: u64,
    pub(super) digests: bool,
    /// How receivers fetch from this rank.
    pub(super) card: Bytes,
    /// Whether the stream depends on the versions that the rollouts have. It is read when all have told theirs.
    pub(super) asks_bases: bool,
    /// Whether an update without a rollout is an error.
    pub(super) needs_receivers: bool,
    /// The parts of versions, which rollouts may want or not.
    pub(super) parts: Parts,
    /// Whether parts that no rollout wants are sent all the same.
    pub(super) keeps_all: bool,
}

/// The leader, and the other ranks as it sees them.
pub(super) struct Leader {
    settings: Settings,
    members: BTreeMap<Rank, Member>,
    steps: Steps,
    /// The ranks that only hear of updates.
    idle: RankSet,
    absent: RankSet,
    /// The hosts of ranks, as far as they are known.
    hosts: BTreeMap<Rank, String>,
    /// The paths between receivers on which fetches failed.
    paths: Paths,
    /// How many updates have failed because of each rank since it was last in one that succeeded.
    blamed: BTreeMap<Rank, u32>,
    newcomers: Box<PartOf>,
    silence: Box<Silence>,
    /// The bucket in each slot, and the ranks that may still read it. Unused with a route.
    slots: Vec<Held>,
    /// The layouts of the last update whose buckets were all announced, and the parts that each has.
    plan: Arc<Sent>,
    update: Option<Box<Update>>,
    acts: VecDeque<Act>,
}

impl std::fmt::Debug for Leader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { settings, members, update, .. } = self;
        f.debug_struct("Leader")
            .field("settings", settings)
            .field("members", members)
            .field("update", update)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Member {
    part: Part,
    /// Its message when it entered the present update.
    entered: Option<Entry>,
    /// The messages for it that wait until it has entered.
    unsent: Vec<Unsent>,
    /// Its confirmation of the present update.
    confirmed: Option<ReceiverReport>,
}

/// How far the ranks of the present update are. Ranks take most steps together, and a set of them costs little more than
/// one.
#[derive(Debug, Default)]
struct Steps {
    /// The ranks that take part in the update. The next three sets are those of them that have not taken a step yet.
    active: RankSet,
    to_enter: RankSet,
    to_join: RankSet,
    to_confirm: RankSet,
    /// The ranks that have entered and know what they got of the last plan.
    informed: RankSet,
    /// When each rank was given its last task or took its last step. Its deadline begins there.
    since: RankMap<Instant>,
    /// When each rank took its last step. The update's begin is the first.
    moved: RankMap<Instant>,
}

impl Steps {
    fn new(active: RankSet, now: Instant) -> Self {
        let mut since = RankMap::default();
        since.set(&active, &now);
        let [to_enter, to_join, to_confirm] = [(); 3].map(|()| active.clone());
        let moved = since.clone();
        Self { active, to_enter, to_join, to_confirm, informed: RankSet::new(), since, moved }
    }

    /// These ranks took a step.
    fn step(&mut self, ranks: &RankSet, now: Instant) {
        self.since.set(ranks, &now);
        self.moved.set(ranks, &now);
    }

    /// A rank takes no further part in the update.
    fn leave(&mut self, rank: Rank) {
        let Self { active, to_enter, to_join, to_confirm, informed, since, moved } = self;
        for set in [active, to_enter, to_join, to_confirm, informed] {
            set.remove(rank);
        }
        for times in [since, moved] {
            times.update(&RankSet::from([rank]), |_| None);
        }
    }
}

/// What a rank says of itself when it enters an update. It is forgotten before the next one.
#[derive(Debug)]
struct Entry {
    /// How others fetch from it.
    card: Bytes,
    /// What a layer has to know of it.
    said: Entrant,
}

/// The buckets of an update that were announced.
#[derive(Debug, Default)]
struct Sent {
    plan: Plan,
    /// The parts of the version in each bucket.
    parts: Vec<PartSet>,
}

impl Sent {
    /// The digest of the plan as a rank knows it that wants these parts.
    fn known_to(&self, wants: &PartSet) -> u64 {
        let all = self.plan.buckets.iter().zip(&self.parts);
        let got = all.filter(|(_, parts)| !parts.common(wants).is_empty());
        Plan { buckets: got.map(|(layout, _)| layout.clone()).collect() }.digest()
    }
}

/// Parts of a version that the same ranks want.
#[derive(Debug)]
struct Class {
    parts: PartSet,
    readers: RankSet,
}

/// A message of an update to a rank that has not entered it.
#[derive(Clone, Debug)]
enum Unsent {
    Bucket(Arc<Announcement>),
    Other(Bytes),
}

/// A slot's bucket and its readers.
#[derive(Debug, Default)]
struct Held {
    update: u64,
    bucket: u64,
    by: RankSet,
}

/// The present update.
#[derive(Debug)]
struct Update {
    /// All messages of the update have this number.
    number: u64,
    version: Version,
    begun: Instant,
    stage: Stage,
    /// The trainers that send, the leader first.
    senders: Vec<Rank>,
    /// The ranks that are told if the update fails.
    told: RankSet,
    ticket: Option<Ticket>,
    topology: Option<Topology>,
    /// The routes of the buckets, if receivers fetch from one another.
    route: Option<Route>,
    /// What the stream gives next.
    next: Next,
    /// What the link is doing.
    link: Option<Linked>,
    /// The buckets that were begun and are not announced yet, in their order.
    outgoing: VecDeque<Outgoing>,
    layouts: Vec<Arc<BucketLayout>>,
    /// The class of each bucket that was begun.
    classes: Vec<u32>,
    /// The digest of each bucket that was announced.
    digests: Vec<u64>,
    /// What was sent in the last update, and the digests of it by what ranks want.
    last: Arc<Sent>,
    known: BTreeMap<PartSet, u64>,
    /// The parts that are sent and who wants them, where not all ranks want all.
    apart: Option<Vec<Class>>,
    /// What is waited for, and since when.
    wait: Option<(Wait, Instant)>,
    /// When to tell the ranks of the update next that the leader is alive.
    next_alive: Instant,
    stages: StageTimes,
}

#[derive(Debug)]
enum Stage {
    /// The link begins the update.
    Beginning,
    /// Ranks enter. They join one another when all have entered.
    Entering,
    /// The leader joins the others.
    Joining,
    /// The leader has joined, and waits for the others.
    Joined,
    /// Buckets are filled and announced.
    Streaming,
    /// The last buckets are filled.
    Draining,
    /// Ranks confirm the version.
    Confirming,
    Failing(Failing),
    Over(Option<Result<Ended>>),
}

/// The end of a failed update: the leader waits for the cause, and for the end of its own work.
#[derive(Debug)]
struct Failing {
    error: Error,
    /// How long to wait for the control plane to name a rank that died.
    cause_until: Option<Instant>,
    /// How long to wait for the link's work.
    work_until: Option<Instant>,
    /// Whether the others were told.
    told: bool,
}

#[derive(Debug)]
enum Next {
    /// The stream is read when every rank has entered.
    Unasked,
    /// A bucket is being collected, since this time.
    Pending(Instant),
    /// A bucket is here, since this time.
    Bucket(Collected, Instant),
    End,
}

/// What the link is doing, and since when.
#[derive(Debug)]
struct Linked {
    work: Work,
    since: Instant,
}

/// A bucket that is being filled, by the leader or by another trainer.
#[derive(Debug)]
struct Outgoing {
    index: u64,
    slot: usize,
    layout: Arc<BucketLayout>,
    is_known: bool,
    source_bytes: u64,
    /// `None` until it is filled.
    digest: Option<u64>,
}

/// What the leader waits for. Each wait has a deadline of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Enter,
    Join,
    /// Until the slot of this bucket is free.
    Slot(u64),
    /// Until the last buckets are filled.
    Filled,
    Confirm,
    /// Until the leader has encoded this bucket.
    Encode(u64),
}

/// The rank or the bucket that is awaited now.
#[derive(Debug)]
struct Awaited {
    /// The awaited rank, if it is a rank.
    rank: Option<Rank>,
    /// The bucket, for the error.
    bucket: Option<u64>,
    operation: &'static str,
}

/// The announcement of a filled bucket. Ranks that know the plan get a short one.
#[derive(Debug)]
struct Announcement {
    update: u64,
    index: u64,
    slot: usize,
    digest: u64,
    layout: Arc<BucketLayout>,
    /// Whether the last plan has the same layout for this bucket.
    is_known: bool,
    short: OnceLock<Bytes>,
    full: OnceLock<Bytes>,
}

impl Announcement {
    /// The message: with the layout's digest if the receiver knows the layout, else with the layout.
    fn encoded(&self, knows: bool) -> Result<Bytes> {
        let cached = if knows { &self.short } else { &self.full };
        if let Some(body) = cached.get() {
            return Ok(body.clone());
        }
        let layout = if knows {
            Layout::Known { digest: self.layout.digest() }
        } else {
            Layout::Explicit { pieces: self.layout.pieces().to_vec() }
        };
        let Self { update, index, slot, digest, .. } = *self;
        let body =
            encode(&ToReceiver::Bucket { update, index, slot: slot as u32, digest, layout })?;
        Ok(cached.get_or_init(|| body).clone())
    }
}

impl Settings {
    /// Whether the stream is read only when all ranks have said what they have and want.
    fn asks(&self) -> bool {
        self.asks_bases || self.parts.names().count() > 1
    }
}

impl Leader {
    pub(super) fn new(settings: Settings, newcomers: Box<PartOf>, silence: Box<Silence>) -> Self {
        Self {
            slots: (0..settings.slots).map(|_| Held::default()).collect(),
            settings,
            members: BTreeMap::new(),
            steps: Steps::default(),
            idle: RankSet::new(),
            absent: RankSet::new(),
            hosts: BTreeMap::new(),
            paths: Paths::default(),
            blamed: BTreeMap::new(),
            newcomers,
            silence,
            plan: Arc::default(),
            update: None,
            acts: VecDeque::new(),
        }
    }

    /// Sets how ranks that join later get their parts.
    pub(super) fn set_newcomers(&mut self, newcomers: Box<PartOf>) {
        self.newcomers = newcomers;
    }

    /// Adds a rank to the next update.
    pub(super) fn admit(&mut self, rank: Rank, part: Part) {
        self.absent.remove(rank);
        // Whatever had the rank before is no longer waited for.
        self.steps.leave(rank);
        if part == Part::Idle {
            self.idle.insert(rank);
        } else {
            self.members.insert(rank, Member { part, ..Member::default() });
        }
    }

    /// Sets the host of a rank. All ranks of a host have the same name here.
    pub(super) fn locate(&mut self, rank: Rank, host: &str) {
        self.hosts.insert(rank, host.to_owned());
    }

    /// The routes of buckets to receivers in an update with this topology.
    fn route(&self, topology: Topology, first: u64, receivers: &RankSet, now: Instant) -> Route {
        let mut numbers = BTreeMap::new();
        let mut site = |rank: Rank| {
            // A rank whose host is not known counts as alone on its host.
            let host = self.hosts.get(&rank).map(String::as_str).ok_or(rank);
            let next = numbers.len() as u32;
            Site { rank, host: *numbers.entry(host).or_insert(next) }
        };
        let here = site(Rank::LEADER).host;
        let sites: Vec<Site> = receivers.iter().map(&mut site).collect();
        let (buckets, failed) = (self.plan.plan.buckets.len() as u64, self.paths.avoided(now));
        let tree = tree::plan(topology, buckets, here, &sites, &failed);
        debug!(?topology, buckets, ?tree, ?failed, "who fetches from whom");
        Route::new(self.settings.slots as u64, first, tree)
    }

    /// How many rollouts the next update has.
    pub(super) fn rollouts(&self) -> usize {
        self.members.values().filter(|member| member.part.is_rollout()).count()
    }

    /// Whether a colocated rank still holds a bucket.
    pub(super) fn is_read_in_place(&self) -> bool {
        let colocated = |rank| self.members.get(&rank).is_some_and(|m| m.part == Part::Colocated);
        self.slots.iter().any(|slot| slot.by.iter().any(colocated))
    }

    /// Starts an update with all present members. `number` is unique to it.
    ///
    /// # Errors
    ///
    /// `PeerLost` if there is no rollout, and one is needed.
    pub(super) fn begin(
        &mut self,
        number: u64,
        version: Version,
        topology: Option<Topology>,
        now: Instant,
    ) -> Result<()> {
        self.close();
        if self.rollouts() == 0 && self.settings.needs_receivers {
            let message = "no receiver is left in the group";
            return Err(Error::new(ErrorKind::PeerLost, "beginning an update", message)
                .recovery(Recovery::Reconnect)
                .version(version));
        }
        let mut senders = vec![Rank::LEADER];
        for (&rank, member) in &mut self.members {
            let part = member.part;
            *member = Member { part, ..Member::default() };
            if part == Part::Sender {
                senders.push(rank);
            }
        }
        self.steps = Steps::new(self.members.keys().copied().collect(), now);
        let told = self.with_idle(&self.steps.active);
        let work = Work::Begin;
        self.update = Some(Box::new(Update {
            number,
            version,
            begun: now,
            stage: Stage::Beginning,
            senders,
            told,
            ticket: None,
            topology,
            route: None,
            next: Next::Pending(now),
            link: Some(Linked { work, since: now }),
            outgoing: VecDeque::new(),
            layouts: Vec::new(),
            classes: Vec::new(),
            digests: Vec::new(),
            last: self.plan.clone(),
            known: BTreeMap::new(),
            apart: None,
            wait: None,
            next_alive: now,
            stages: StageTimes::default(),
        }));
        let (members, colocated) = self.who();
        self.acts.push_back(Act::Begin { members, colocated });
        Ok(())
    }

    /// The ranks of the present update, and how many are colocated with the leader.
    fn who(&self) -> (Members, usize) {
        let readers = self.active_parts().filter(|(_, part)| *part != Part::Sender);
        let (colocated, others): (Vec<_>, Vec<_>) =
            readers.partition(|(_, part)| *part == Part::Colocated);
        let others = others.into_iter().map(|(rank, _)| rank).collect();
        let senders = self.update.as_ref().map(|update| update.senders.clone());
        (Members { senders: senders.unwrap_or_default(), others }, colocated.len())
    }

    /// Forgets the update. Nobody releases a bucket that was not announced, so those slots are freed here.
    fn close(&mut self) {
        let Some(update) = self.update.take() else { return };
        if update.route.is_none() {
            for bucket in &update.outgoing {
                self.slots[bucket.slot].by = RankSet::new();
            }
        }
        self.steps = Steps::default();
        for (rank, member) in &mut self.members {
            for unsent in member.unsent.drain(..) {
                if let Unsent::Bucket(bucket) = unsent {
                    self.slots[bucket.slot].by.remove(*rank);
                }
            }
        }
    }

    /// The rollouts of the present update.
    fn receivers(&self) -> impl Iterator<Item = Rank> + '_ {
        self.active_parts().filter(|(_, part)| part.is_rollout()).map(|(rank, _)| rank)
    }

    /// The ranks that get buckets in the present update: rollouts and relays.
    fn readers(&self) -> RankSet {
        let mut readers = self.steps.active.clone();
        for sender in self.update.iter().flat_map(|update| &update.senders) {
            readers.remove(*sender);
        }
        readers
    }

    /// The ranks that get the buckets of a class.
    fn readers_of(&self, class: u32) -> RankSet {
        let apart = self.update.as_ref().and_then(|update| update.apart.as_ref());
        let class = apart.and_then(|classes| classes.get(class as usize));
        match class {
            Some(class) => class.readers.common(&self.steps.active),
            None => self.readers(),
        }
    }

    fn active_parts(&self) -> impl Iterator<Item = (Rank, Part)> + '_ {
        let active = self.steps.active.iter();
        active.filter_map(|rank| Some((rank, self.members.get(&rank)?.part)))
    }

    fn has_entered(&self, rank: Rank) -> bool {
        self.members.get(&rank).is_some_and(|member| member.entered.is_some())
    }

    fn observe(&mut self, progress: Progress) {
        self.acts.push_back(Act::Observe(progress));
    }

    fn send(&mut self, to: Rank, body: Bytes) {
        self.acts.push_back(Act::Send { to, body });
    }

    fn send_all(&mut self, to: RankSet, body: Bytes) {
        if !to.is_empty() {
            self.acts.push_back(Act::SendAll { to, body });
        }
    }

    /// These ranks, and the idle ones.
    fn with_idle(&self, ranks: &RankSet) -> RankSet {
        let mut all = ranks.clone();
        all.unite(&self.idle);
        all
    }

    fn broadcast(&mut self, message: &ToReceiver, now: Instant) -> Result<()> {
        let all = self.steps.active.clone();
        self.tell_all(all, &Unsent::Other(encode(message)?), now)
    }

    /// [`tell`](Self::tell)s the same to ranks of the update. After an error, no rank that has entered was told.
    fn tell_all(&mut self, to: RankSet, message: &Unsent, now: Instant) -> Result<()> {
        for rank in to.common(&self.steps.to_enter).iter() {
            if let Some(member) = self.members.get_mut(&rank) {
                member.unsent.push(message.clone());
            }
        }
        let mut short = to;
        short.subtract(&self.steps.to_enter);
        self.steps.since.set(&short, &now);
        // A bucket has two messages: ranks that know the plan get the short one.
        let mut full = RankSet::new();
        if let Unsent::Bucket(bucket) = message {
            let known = match bucket.is_known {
                true => short.common(&self.steps.informed),
                false => RankSet::new(),
            };
            full = std::mem::replace(&mut short, known);
            full.subtract(&short);
        }
        let bodies = [(short, true), (full, false)].map(|(ranks, is_short)| {
            let body = match message {
                _ if ranks.is_empty() => Ok(Bytes::new()),
                Unsent::Bucket(bucket) => bucket.encoded(is_short),
                Unsent::Other(body) => Ok(body.clone()),
            };
            (ranks, body)
        });
        let [(short, short_body), (full, full_body)] = bodies;
        let (short_body, full_body) = (short_body?, full_body?);
        self.send_all(short, short_body);
        self.send_all(full, full_body);
        Ok(())
    }

    /// Sends a rank a message of the present update, as soon as it has entered the update. Each message gives the rank
    /// something to do, so its deadline restarts.
    fn tell(&mut self, rank: Rank, message: Unsent, now: Instant) -> Result<()> {
        let Some(member) = self.members.get_mut(&rank) else { return Ok(()) };
        if member.entered.is_none() {
            member.unsent.push(message);
            return Ok(());
        }
        self.steps.since.set(&RankSet::from([rank]), &now);
        let body = match message {
            Unsent::Bucket(bucket) => {
                bucket.encoded(bucket.is_known && self.steps.informed.contains(rank))?
            }
            Unsent::Other(body) => body,
        };
        self.send(rank, body);
        Ok(())
    }

    /// The link has begun the update. Announces it to the other ranks.
    fn announce_update(&mut self, ticket: Option<Ticket>, now: Instant) -> Result<()> {
        let receivers: Vec<Rank> = self.receivers().collect();
        let topology = self.update.as_ref().and_then(|update| update.topology);
        let route = topology.map(|topology| self.route(topology, 0, &self.steps.active, now));
        let Some(update) = &mut self.update else { return Ok(()) };
        update.route = route;
        update.ticket.clone_from(&ticket);
        update.stage = if ticket.is_some() { Stage::Entering } else { Stage::Streaming };
        // Not with several senders: only this stream could follow the bases, and all streams have to be the same.
        let asks = self.settings.asks() && update.senders.len() <= 1;
        update.next = match asks {
            true => Next::Unasked,
            false => Next::Pending(now),
        };
        let begin = encode(&ToReceiver::Begin(Begin {
            update: update.number,
            version: update.version,
            bucket_bytes: self.settings.bucket_bytes,
            slots: self.settings.slots as u32,
            digests: self.settings.digests,
            routed: update.route.is_some(),
            senders: update.senders.clone(),
            ticket,
        }))?;
        let version = update.version;
        let all = self.with_idle(&self.steps.active);
        self.send_all(all, begin);
        self.observe(Progress::Began { version, receivers });
        if !asks {
            self.acts.push_back(Act::Collect { index: 0 });
        }
        Ok(())
    }

    /// Does everything that is possible now.
    fn advance(&mut self, now: Instant) {
        if let Err(error) = self.try_advance(now) {
            self.fail(error, now);
        }
        self.mind_wait(now);
    }

    /// Starts to read a stream that depends on what the rollouts have and want, once all ranks have entered.
    fn ask_stream(&mut self, now: Instant) {
        let waits = |update: &Update| matches!(update.next, Next::Unasked);
        if !self.update.as_deref().is_some_and(waits) || !self.steps.to_enter.is_empty() {
            return;
        }
        let entry = |rank| Some(self.members.get(&rank)?.entered.as_ref()?.said.clone());
        let said = self.receivers().filter_map(entry).collect();
        let apart = self.apart();
        if let Some(update) = &mut self.update
            && !matches!(update.stage, Stage::Beginning | Stage::Failing(_) | Stage::Over(_))
        {
            update.next = Next::Pending(now);
            if self.settings.asks_bases {
                self.acts.push_back(Act::Bases(said));
            }
            if let Some(classes) = apart {
                let class = |part| {
                    let at = classes.iter().position(|class| class.parts.contains(part));
                    at.map(|at| at as u32)
                };
                let parts = self.settings.parts.all();
                self.acts.push_back(Act::Apart(parts.iter().map(class).collect()));
                update.apart = Some(classes);
            }
            self.acts.push_back(Act::Collect { index: 0 });
        }
    }

    /// The parts that are sent and who wants them, from what all ranks have said; `None` if all want all.
    fn apart(&self) -> Option<Vec<Class>> {
        let (readers, mut classes) = (self.readers(), Vec::<Class>::new());
        let mut is_apart = false;
        for part in self.settings.parts.all().iter() {
            let wants = |rank: &Rank| {
                let entry = self.members.get(rank).and_then(|member| member.entered.as_ref());
                entry.is_some_and(|entry| entry.said.wants.contains(part))
            };
            let wanting: RankSet = readers.iter().filter(wants).collect();
            is_apart |= wanting != readers;
            if wanting.is_empty() && !self.settings.keeps_all {
                continue;
            }
            match classes.iter_mut().find(|class| class.readers == wanting) {
                Some(class) => drop(class.parts.insert(part)),
                None => classes.push(Class { parts: [part].into(), readers: wanting }),
            }
        }
        is_apart.then_some(classes)
    }

    fn try_advance(&mut self, now: Instant) -> Result<()> {
        self.route_on(now)?;
        self.ask_stream(now);
        loop {
            let Some(update) = &mut self.update else { return Ok(()) };
            let link_is_free = update.link.is_none();
            match &update.stage {
                Stage::Beginning | Stage::Joining | Stage::Over(_) => return Ok(()),
                Stage::Failing(_) => {
                    self.settle(now);
                    return Ok(());
                }
                Stage::Entering => {
                    if !self.steps.to_enter.is_empty() {
                        return Ok(());
                    }
                    self.begin_joining(now)?;
                }
                Stage::Joined => {
                    if !self.steps.to_join.is_empty() {
                        return Ok(());
                    }
                    self.to(Stage::Streaming);
                }
                Stage::Streaming => {
                    if !link_is_free {
                        return Ok(());
                    }
                    match &update.next {
                        Next::Unasked | Next::Pending(_) => return Ok(()),
                        Next::End => self.to(Stage::Draining),
                        Next::Bucket(..) => {
                            let index = update.layouts.len() as u64;
                            if self.is_free(index).is_err() {
                                return Ok(());
                            }
                            self.begin_bucket(now)?;
                        }
                    }
                }
                Stage::Draining => {
                    if !update.outgoing.is_empty() {
                        return Ok(());
                    }
                    self.finish(now)?;
                }
                Stage::Confirming => {
                    if !self.steps.to_confirm.is_empty() {
                        return Ok(());
                    }
                    self.commit(now)?;
                }
            }
        }
    }

    fn to(&mut self, stage: Stage) {
        if let Some(update) = &mut self.update {
            update.stage = stage;
        }
    }

    /// All ranks have entered the update: they join one another.
    fn begin_joining(&mut self, now: Instant) -> Result<()> {
        let Some(update) = &mut self.update else { return Ok(()) };
        let Some(ticket) = update.ticket.clone() else { return Ok(()) };
        update.link = Some(Linked { work: Work::Join, since: now });
        update.stage = Stage::Joining;
        update.stages.release += now.saturating_duration_since(update.begun);
        let number = update.number;
        if ticket.together {
            self.broadcast(&ToReceiver::Join { update: number }, now)?;
        }
        self.acts.push_back(Act::Join(ticket));
        Ok(())
    }

    /// Takes the slot for the collected bucket, and starts to fill it.
    fn begin_bucket(&mut self, now: Instant) -> Result<()> {
        let Some(update) = &mut self.update else { return Ok(()) };
        let pending = Next::Pending(now);
        let Next::Bucket(bucket, since) = std::mem::replace(&mut update.next, pending) else {
            return Ok(());
        };
        update.stages.release += now.saturating_duration_since(since);
        let Collected { layout, known, source_bytes, class } = bucket;
        let is_known = known.is_some();
        let readers = self.readers_of(class);
        let Some(update) = &mut self.update else { return Ok(()) };
        let (number, index) = (update.number, update.layouts.len() as u64);
        let slot = index as usize % self.settings.slots;
        if let Some(topology) = update.topology.filter(|_| update.changes_class(class)) {
            // Whoever does not want it is no source of it.
            let route = self.route(topology, index, &readers, now);
            if let Some(update) = &mut self.update {
                update.route = Some(route);
            }
        }
        let Some(update) = &mut self.update else { return Ok(()) };
        match &mut update.route {
            Some(route) => route.filling(index),
            None => self.slots[slot] = Held { update: number, bucket: index, by: readers },
        }
        let (sender, digest) = (sender_of(&update.senders, index), layout.digest());
        update.layouts.push(layout.clone());
        update.classes.push(class);
        let outgoing = Outgoing { index, slot, layout, is_known, source_bytes, digest: None };
        // Before the sender is told: if that fails, `close` finds the bucket here and frees its slot.
        update.outgoing.push_back(outgoing);
        if sender == Rank::LEADER {
            update.link = Some(Linked { work: Work::Fill { index }, since: now });
            self.acts.push_back(Act::Fill { index, slot, digests: self.settings.digests });
        } else {
            let slot = slot as u32;
            let fill = ToReceiver::Fill { update: number, index, slot, layout: digest };
            self.tell(sender, Unsent::Other(encode(&fill)?), now)?;
            self.acts.push_back(Act::Skip);
        }
        self.acts.push_back(Act::Collect { index: index + 1 });
        Ok(())
    }

    /// A bucket is filled. It is announced once all buckets before it are.
    fn filled(&mut self, index: u64, digest: u64, now: Instant) -> Result<()> {
        let Some(update) = &mut self.update else { return Ok(()) };
        if let Some(bucket) = update.outgoing.iter_mut().find(|bucket| bucket.index == index) {
            bucket.digest = Some(digest);
        }
        loop {
            let Some(update) = &mut self.update else { return Ok(()) };
            let Some(digest) = update.outgoing.front().and_then(|bucket| bucket.digest) else {
                return Ok(());
            };
            let Some(bucket) = update.outgoing.pop_front() else { return Ok(()) };
            update.digests.push(digest);
            let (index, bytes) = (bucket.index, bucket.source_bytes);
            self.announce(bucket, digest, now)?;
            self.observe(Progress::Bucket { index, bytes });
        }
    }

    /// Announces a bucket to its receivers.
    fn announce(&mut self, bucket: Outgoing, digest: u64, now: Instant) -> Result<()> {
        let Outgoing { index, slot, layout, is_known, .. } = bucket;
        let Some(update) = &self.update else { return Ok(()) };
        let (short, full) = (OnceLock::new(), OnceLock::new());
        let class = update.classes.get(index as usize).copied().unwrap_or_default();
        let update = update.number;
        let bucket =
            Arc::new(Announcement { update, index, slot, digest, layout, is_known, short, full });
        if let Err(error) = self.tell_all(self.readers_of(class), &Unsent::Bucket(bucket), now) {
            // Ranks that were not told will not release it.
            self.slots[slot].by = RankSet::new();
            return Err(error);
        }
        if let Some(route) = self.update.as_mut().and_then(|update| update.route.as_mut()) {
            route.filled(index);
        }
        self.route_on(now)
    }

    /// Tells receivers to fetch what they can fetch now.
    fn route_on(&mut self, now: Instant) -> Result<()> {
        let Some(update) = &mut self.update else { return Ok(()) };
        let number = update.number;
        if matches!(update.stage, Stage::Failing(_) | Stage::Over(_)) {
            return Ok(());
        }
        let Some(route) = &mut update.route else { return Ok(()) };
        let mut all = Vec::new();
        while let Some(due) = route.next_due() {
            all.push(due);
        }
        for Due { by, from, bucket } in all {
            let card = match self.members.get(&from).and_then(|member| member.entered.as_ref()) {
                _ if from == Rank::LEADER => self.settings.card.clone(),
                Some(entry) => entry.card.clone(),
                None => continue,
            };
            let fetch = ToReceiver::Fetch { update: number, index: bucket, from, card };
            self.tell(by, Unsent::Other(encode(&fetch)?), now)?;
        }
        Ok(())
    }

    /// `Ok` if a bucket's slot may be filled with it. The error is the awaited rank, if there is one.
    fn is_free(&self, bucket: u64) -> Result<(), Option<Rank>> {
        let update = self.update.as_deref();
        let changes_class = update.is_some_and(|update| match &update.next {
            Next::Bucket(next, _) => update.changes_class(next.class),
            _ => false,
        });
        match update.and_then(|update| update.route.as_ref()) {
            // The buckets before have other routes, which end first.
            Some(route) if changes_class => match route.is_quiet() {
                true => Ok(()),
                false => Err(self.awaited_elsewhere().or_else(|| route.unquiet())),
            },
            Some(route) if route.may_fill(bucket) => Ok(()),
            Some(_) => Err(self.awaited_elsewhere()),
            None => match self.slots[bucket as usize % self.settings.slots].by.first() {
                None => Ok(()),
                // If a bucket is not announced yet, its sender is awaited, not its readers.
                Some(reader) => Err(Some(self.late_sender().unwrap_or(reader))),
            },
        }
    }

    /// The trainer, other than the leader, that fills the bucket which is announced next.
    fn late_sender(&self) -> Option<Rank> {
        let update = self.update.as_ref()?;
        let rank = sender_of(&update.senders, update.outgoing.front()?.index);
        (rank != Rank::LEADER).then_some(rank)
    }

    /// The rank that the others wait for.
    fn awaited_elsewhere(&self) -> Option<Rank> {
        let late = self.steps.to_enter.first();
        let routed = || self.update.as_ref()?.route.as_ref()?.awaited();
        late.or_else(|| self.late_sender()).or_else(routed)
    }

    /// What is waited for now.
    fn waiting(&self) -> Option<Wait> {
        let update = self.update.as_ref()?;
        match &update.stage {
            Stage::Entering => Some(Wait::Enter),
            Stage::Joined => Some(Wait::Join),
            Stage::Streaming => match (&update.link, &update.next) {
                (Some(Linked { work: Work::Fill { index }, .. }), _) => Some(Wait::Encode(*index)),
                (_, Next::Unasked) => Some(Wait::Enter),
                (None, Next::Bucket(..)) => Some(Wait::Slot(update.layouts.len() as u64)),
                _ => None,
            },
            Stage::Draining => Some(Wait::Filled),
            Stage::Confirming => Some(Wait::Confirm),
            Stage::Beginning | Stage::Joining | Stage::Failing(_) | Stage::Over(_) => None,
        }
    }

    /// Starts a new deadline if the leader now waits for something else.
    fn mind_wait(&mut self, now: Instant) {
        let waiting = self.waiting();
        if let Some(update) = &mut self.update
            && update.wait.map(|(wait, _)| wait) != waiting
        {
            update.wait = waiting.map(|wait| (wait, now));
        }
    }

    /// Which rank and bucket a wait waits for now.
    fn awaited(&self, wait: Wait) -> Awaited {
        let update = self.update.as_ref();
        let front = update.and_then(|update| update.outgoing.front()).map(|bucket| bucket.index);
        match wait {
            Wait::Enter => Awaited {
                rank: self.steps.to_enter.first(),
                bucket: None,
                operation: "waiting for every rank to enter the update",
            },
            Wait::Join => Awaited {
                rank: self.steps.to_join.first(),
                bucket: None,
                operation: "waiting for every rank to join the others",
            },
            Wait::Slot(bucket) => {
                let route = update.and_then(|update| update.route.as_ref());
                let held = match route {
                    Some(_) => bucket.saturating_sub(self.settings.slots as u64),
                    None => self.slots[bucket as usize % self.settings.slots].bucket,
                };
                let operation = match route {
                    Some(_) => "waiting for a receiver to fetch or release a bucket",
                    None if self.late_sender().is_some() => FILLING,
                    None => RELEASING,
                };
                let rank = self.is_free(bucket).err().flatten();
                Awaited { rank, bucket: Some(held), operation }
            }
            Wait::Filled => {
                let rank = front
                    .and_then(|bucket| update.map(|update| sender_of(&update.senders, bucket)));
                Awaited { rank, bucket: front, operation: FILLING }
            }
            Wait::Confirm => {
                let last = update.map(|update| (update.layouts.len() as u64).saturating_sub(1));
                Awaited {
                    rank: self.awaited_elsewhere().or(self.steps.to_confirm.first()),
                    bucket: last,
                    operation: "waiting for a receiver to confirm the version",
                }
            }
            Wait::Encode(bucket) => {
                Awaited { rank: None, bucket: Some(bucket), operation: ENCODING }
            }
        }
    }

    /// The end of the present wait's deadline. It restarts only with a step of the awaited rank, or with a task given to
    /// it: a slow rank is not dead, but other ranks that come and go are no progress. Each rank takes a finite number
    /// of steps in an update, so every wait ends. A rank that is silent gets no more time: [`is_late`](Self::is_late).
    fn wait_until(&self) -> Option<Instant> {
        let update = self.update.as_ref()?;
        let (wait, begun) = update.wait?;
        let since = match (wait, self.awaited(wait).rank) {
            (Wait::Encode(_), _) => None,
            (_, Some(rank)) => self.steps.since.get(rank).copied(),
            (_, None) => self.steps.since.values().max().copied(),
        };
        Some(since.map_or(begun, |since| since.max(begun)) + self.settings.deadline)
    }

    /// Whether the present wait is too long: its deadline is over, or the awaited rank is silent. Other ranks may go on for a
    /// while beside a rank that is stopped, which gives it tasks and begins waits. So these count only for ranks that live.
    fn is_late(&self, now: Instant) -> bool {
        let deadline = self.settings.deadline;
        let wait = self.update.as_ref().and_then(|update| update.wait);
        let is_silent = |rank| {
            let rests = self.steps.moved.get(rank).is_some_and(|step| *step + deadline <= now);
            rests && (self.silence)(rank).is_some_and(|silence| silence >= deadline)
        };
        self.wait_until().is_some_and(|until| until <= now)
            || wait.and_then(|(wait, _)| self.awaited(wait).rank).is_some_and(is_silent)
    }

    /// The error of a wait that was too long.
    fn late(&self, wait: Wait) -> Error {
        let Awaited { rank, bucket, operation } = self.awaited(wait);
        let deadline = self.settings.deadline;
        let silence = rank.and_then(self.silence.as_ref());
        let late = match (rank, silence) {
            (_, Some(silence)) if !silence.is_zero() => silent(operation, deadline, silence),
            (Some(rank), _) if !self.has_entered(rank) && self.members.contains_key(&rank) => {
                not_entered(operation, deadline, silence.is_some())
            }
            _ => too_late(deadline, operation),
        };
        let late = rank.into_iter().fold(late, Error::rank);
        bucket.into_iter().fold(late, Error::bucket)
    }

    /// Tells the ranks of the update that the leader is alive, and which rank it waits for.
    fn tell_alive(&mut self, now: Instant) {
        let awaited = self.waiting().and_then(|wait| self.awaited(wait).rank);
        let mut entered = self.steps.active.clone();
        entered.subtract(&self.steps.to_enter);
        let Some(update) = &mut self.update else { return };
        update.next_alive = now + ALIVE.min(self.settings.deadline / 4);
        let Ok(body) = encode(&ToReceiver::Alive { update: update.number, awaited }) else {
            return;
        };
        let all = self.with_idle(&entered);
        self.send_all(all, body);
    }

    /// Ends the update's data.
    fn finish(&mut self, now: Instant) -> Result<()> {
        // Ranks that want the same are told the same: what they got, and its digests.
        let mut all = BTreeMap::<PartSet, RankSet>::new();
        for rank in self.steps.active.iter() {
            let entry = self.members.get(&rank).and_then(|member| member.entered.as_ref());
            let wants = entry.map(|entry| entry.said.wants.clone());
            all.entry(wants.unwrap_or_else(|| self.settings.parts.all())).or_default().insert(rank);
        }
        let Some(update) = &mut self.update else { return Ok(()) };
        update.stage = Stage::Confirming;
        let sent = Arc::new(update.sent(&self.settings.parts));
        let mut ends = Vec::with_capacity(all.len());
        for (wants, ranks) in all {
            let got = sent.parts.iter().zip(&update.digests);
            let got = got.filter(|(parts, _)| !parts.common(&wants).is_empty());
            let (buckets, digest) = got.fold((0, 0), |(count, version), (_, digest)| {
                (count + 1, digest::chain(version, *digest))
            });
            let (update, plan) = (update.number, sent.known_to(&wants));
            ends.push((ranks, encode(&ToReceiver::End { update, buckets, digest, plan })?));
        }
        self.plan = sent;
        for (ranks, end) in ends {
            self.tell_all(ranks, &Unsent::Other(end), now)?;
        }
        self.mind_wait(now);
        Ok(())
    }

    /// Makes the version active everywhere.
    fn commit(&mut self, now: Instant) -> Result<()> {
        let Some(update) = &mut self.update else { return Ok(()) };
        if let Some((Wait::Confirm, since)) = update.wait {
            update.stages.confirm = now.saturating_duration_since(since);
        }
        let (version, elapsed) = (update.version, now.saturating_duration_since(update.begun));
        let (buckets, digest) = (update.layouts.len() as u64, update.digest());
        let stages = update.stages;
        // From here on the update has happened. A receiver that cannot be told is lost, and the next update
        // goes without it.
        let body = encode(&ToReceiver::Commit { update: update.number })?;
        let active = std::mem::take(&mut self.steps).active;
        let all = self.with_idle(&active);
        self.send_all(all, body);
        let mut receivers = Vec::new();
        let parts = self.settings.parts.clone();
        let has_parts = parts.names().count() > 1;
        for rank in active.iter() {
            self.blamed.remove(&rank);
            let Some(member) = self.members.get_mut(&rank) else { continue };
            if let Some(mut report) = member.confirmed.take()
                && member.part.is_rollout()
            {
                report.state = VersionState::Active;
                if let Some(entry) = member.entered.as_ref().filter(|_| has_parts) {
                    report.parts = parts.named(&entry.said.wants);
                }
                report.digest = report.digest.filter(|_| self.settings.digests);
                receivers.push(report);
            }
            self.observe(Progress::State { rank, state: VersionState::Active });
        }
        let absent = self.absent.iter().collect();
        let digest = self.settings.digests.then_some(digest);
        let ended = Ended { version, buckets, elapsed, stages, digest, receivers, absent };
        self.to(Stage::Over(Some(Ok(ended))));
        Ok(())
    }

    /// Fails the update. When a rank dies, a transport only reports that something broke. The control plane names the
    /// rank a moment later, so the end of the update waits for that.
    fn fail(&mut self, error: Error, now: Instant) {
        let Some(update) = &mut self.update else { return };
        if matches!(update.stage, Stage::Failing(_) | Stage::Over(_)) {
            return;
        }
        let error = error.version(update.version);
        self.blame(&error);
        let Some(update) = &mut self.update else { return };
        let is_named = error.report().rank.is_some_and(|rank| self.absent.contains(rank));
        let cause_until = (is_of_transport(&error) && !is_named).then_some(now + MOMENT);
        let work_until = match &update.link {
            None => None,
            Some(Linked { work: Work::Join, .. }) => {
                // `SendLink::join` may be dropped, so its end is not waited for.
                update.link = None;
                self.acts.push_back(Act::Cancel);
                None
            }
            Some(_) => Some(now + self.settings.deadline),
        };
        update.stage = Stage::Failing(Failing { error, cause_until, work_until, told: false });
        update.wait = None;
        self.settle(now);
    }

    /// Counts a failure against the rank that caused it, if a member did. A rank that makes one update after the other
    /// fail would keep all others from their updates, so it is expelled. It may join again, but then one more failure
    /// expels it, until an update with it succeeds.
    fn blame(&mut self, error: &Error) {
        let Some(rank) = error.report().rank.filter(|rank| self.members.contains_key(rank)) else {
            return;
        };
        let is_its_fault = matches!(
            error.kind(),
            ErrorKind::Timeout
                | ErrorKind::Digest
                | ErrorKind::Io
                | ErrorKind::Resource
                | ErrorKind::Backend
        );
        if !is_its_fault {
            return;
        }
        let failures = self.blamed.entry(rank).or_default();
        *failures = (*failures + 1).min(PATIENCE);
        if *failures == PATIENCE {
            let words = format!("updates fail because of it, one after the other: {error}");
            self.cut(rank, Error::new(error.kind(), "expelling a rank", words).rank(rank));
        }
    }

    /// Goes on with the end of a failed update: the other ranks are told when the cause is known, and the update is over
    /// when the link's work has ended.
    fn settle(&mut self, now: Instant) {
        let Some(update) = &mut self.update else { return };
        let Stage::Failing(failing) = &mut update.stage else { return };
        if failing.cause_until.is_some_and(|until| now < until) {
            return;
        }
        failing.cause_until = None;
        self.tell_abort();
        let Some(update) = &mut self.update else { return };
        let Stage::Failing(failing) = &mut update.stage else { return };
        let late = match (&update.link, failing.work_until) {
            (Some(_), Some(until)) if now < until => return,
            (Some(Linked { work, .. }), _) => Some(*work),
            (None, _) => None,
        };
        let dropped = Error::new(ErrorKind::Aborted, "sending weights", "the update has failed");
        let mut error = std::mem::replace(&mut failing.error, dropped);
        if let Some(work) = late {
            update.link = None;
            self.acts.push_back(Act::Cancel);
            if let Work::Fill { .. } = work {
                error = still_read(error, self.settings.deadline);
            }
        }
        self.to(Stage::Over(Some(Err(error))));
    }

    /// Tells all ranks of the update that it has failed, once.
    fn tell_abort(&mut self) {
        let Some(update) = &mut self.update else { return };
        let (number, told) = (update.number, update.told.clone());
        let Stage::Failing(failing) = &mut update.stage else { return };
        if std::mem::replace(&mut failing.told, true) {
            return;
        }
        let error = ErrorReport::from(&failing.error);
        self.acts.push_back(Act::Aborted(told.iter().collect()));
        match encode(&ToReceiver::Abort { update: number, error }) {
            Ok(body) => {
                self.send_all(told, body);
            }
            Err(error) => warn!(%error, "the abort could not be written"),
        }
    }

    /// Takes in an event. An error ends the present update.
    fn take_event(&mut self, event: Event, now: Instant) -> Result<()> {
        let bucket = self.update.as_ref().map_or(0, |update| update.present_bucket());
        match event {
            Event::Message { from, body } => {
                self.messages(&RankSet::from([from]), &body, now);
                Ok(())
            }
            Event::Joined(peer) => {
                if let Some(part) = (self.newcomers)(&peer) {
                    info!(rank = %peer.rank, ?part, "a rank joined; it takes part in the next update");
                    // The metadata may travel by another way than the control plane. Such a rank counts as alone on its host.
                    if let Ok(worker) = serde_json::from_slice::<WorkerMetadata>(&peer.payload) {
                        self.locate(peer.rank, &worker.host);
                    }
                    self.admit(peer.rank, part);
                }
                Ok(())
            }
            Event::Left { rank } => {
                let error = Error::new(
                    ErrorKind::PeerLost,
                    "sending weights",
                    "the receiver left the group",
                );
                self.remove(rank, error.rank(rank).bucket(bucket))
            }
            Event::Lost { rank, error } => {
                let error = Error::from(error).recovery(Recovery::Retry);
                self.remove(rank, error.rank(rank).bucket(bucket))
            }
            // Other events do not concern updates.
            _ => Ok(()),
        }
    }

    fn remove(&mut self, rank: Rank, error: Error) -> Result<()> {
        for slot in &mut self.slots {
            slot.by.remove(rank);
        }
        self.idle.remove(rank);
        self.hosts.remove(&rank);
        self.paths.forget(rank);
        if let Some(update) = &mut self.update {
            update.told.remove(rank);
        }
        if self.members.remove(&rank).is_none() {
            return Ok(());
        }
        self.absent.insert(rank);
        let was_active = self.steps.active.contains(rank);
        self.steps.leave(rank);
        if !was_active {
            return Ok(());
        }
        self.observe(Progress::State { rank, state: VersionState::Aborted });
        let bucket = error.report().bucket.unwrap_or(0);
        let update = self.update.as_mut();
        let Some(route) = update.and_then(|update| update.route.as_mut()) else {
            return Err(error);
        };
        if let Err(Gap { rank: left, bucket: gap }) = route.remove(rank) {
            let message = format!(
                "rank {rank} was lost, and with it bucket {gap}, which rank {left} needs and no \
                 other rank has any more"
            );
            return Err(Error::new(ErrorKind::PeerLost, "sending weights", message)
                .rank(rank)
                .bucket(bucket)
                .with_source(error));
        }
        if self.steps.active.is_empty() {
            return Err(error);
        }
        warn!(%rank, %error, "a receiver was lost; the update goes on without it");
        Ok(())
    }

    /// Takes in a message that these ranks have sent alike. A step of a rank restarts its deadline.
    fn messages(&mut self, from: &RankSet, body: &[u8], now: Instant) {
        match decode::<ToSender>(body) {
            Ok(message) => {
                let moved = self.take(from, &message, now);
                self.steps.step(&moved, now);
            }
            Err(error) => {
                // A rank without a part in updates cannot disturb them.
                let members = from.iter().filter(|rank| self.members.contains_key(rank));
                for rank in members.collect::<Vec<_>>() {
                    self.cut(rank, Error::from(ErrorReport::from(&error)).rank(rank));
                }
            }
        }
    }

    /// Fails the update because of an event. If it is failing already, a lost rank may be the cause that is waited for.
    fn fail_for(&mut self, error: Error, names_a_rank: bool, now: Instant) {
        let failing = match self.update.as_mut().map(|update| &mut update.stage) {
            Some(Stage::Failing(failing)) => Some(failing),
            _ => None,
        };
        match failing {
            // The loss of a rank without a part in the update is no error, so this rank had one.
            Some(failing) if names_a_rank && failing.cause_until.is_some() => {
                failing.cause_until = None;
                let version = failing.error.report().version;
                let broke = std::mem::replace(&mut failing.error, error);
                let cause = std::mem::replace(&mut failing.error, lost_in_words());
                let cause = version.into_iter().fold(cause, Error::version);
                failing.error = because(cause, broke);
            }
            Some(_) => debug!(%error, "after the failure"),
            None => self.fail(error, now),
        }
    }

    /// Ends the connection to a member that breaks the protocol or makes every update fail. Its loss arrives as an event
    /// like any other, with this reason: it ends the update, or the update goes on without the rank where that is
    /// possible.
    fn cut(&mut self, rank: Rank, reason: Error) {
        warn!(%rank, error = %reason, "a rank is expelled: its connection is ended");
        self.acts.push_back(Act::Cut { rank, reason });
    }

    /// Takes in a message of ranks. Returns those for which it is a step of the present update.
    fn take(&mut self, from: &RankSet, message: &ToSender, now: Instant) -> RankSet {
        let number = self.update.as_ref().map(|update| update.number);
        match *message {
            // A late release of an aborted update still frees its slot.
            ToSender::Release { update, index } => self.released(from, update, index),
            ToSender::Joined { update } if Some(update) == number => {
                let joined = from.common(&self.steps.to_join);
                self.steps.to_join.subtract(&joined);
                joined
            }
            // What else ranks say is about each of them.
            _ => {
                let mut moved = RankSet::new();
                for rank in from.common(&self.steps.active).iter() {
                    match self.take_one(rank, message, now) {
                        Ok(true) => drop(moved.insert(rank)),
                        Ok(false) => {}
                        Err(error) => self.fail_for(error, false, now),
                    }
                }
                moved
            }
        }
    }

    /// Takes in a message of a rank of the present update. Returns whether it is a step of it.
    fn take_one(&mut self, from: Rank, message: &ToSender, now: Instant) -> Result<bool> {
        let Some(present) = &mut self.update else { return Ok(false) };
        let Some(member) = self.members.get_mut(&from) else { return Ok(false) };
        let number = present.number;
        match message.clone() {
            ToSender::Entered { update, card, plan, held, base, wants } if update == number => {
                if member.entered.is_some() {
                    return Ok(false);
                }
                let parts = &self.settings.parts;
                let wants = parts.wanted(wants.as_deref()).map_err(|error| error.rank(from))?;
                if wants != parts.all() && present.senders.len() > 1 {
                    let message =
                        "several trainers share the sending, so all rollouts get all parts";
                    return Err(Error::new(ErrorKind::Config, ENTERING, message).rank(from));
                }
                if plan.is_some_and(|plan| plan == present.known_to(&wants)) {
                    self.steps.informed.insert(from);
                }
                member.entered = Some(Entry { card, said: Entrant::new(from, base, wants) });
                self.steps.to_enter.remove(from);
                let unsent = std::mem::take(&mut member.unsent);
                self.observe(Progress::State { rank: from, state: VersionState::Staging });
                // Of earlier updates the rank holds only the buckets that it names, even if a release was lost. Of this
                // one it holds those that it is told of now.
                for slot in &mut self.slots {
                    if slot.update != number && !held.contains(&(slot.update, slot.bucket)) {
                        slot.by.remove(from);
                    }
                }
                unsent.into_iter().try_for_each(|unsent| self.tell(from, unsent, now))?;
                Ok(true)
            }
            ToSender::Fetched { update, index } if update == number => {
                Ok(present.route.as_mut().is_some_and(|route| route.arrived(from, index)))
            }
            ToSender::Missed { update, index, from: source, error } if update == number => {
                warn!(rank = %from, %source, bucket = index, %error, "a fetch failed");
                let Some(route) = &mut present.route else { return Ok(false) };
                self.paths.fail(from, source, self.settings.deadline, now);
                if route.missed(from, source).is_err() {
                    return Err(Error::from(error).rank(source).bucket(index));
                }
                Ok(false)
            }
            ToSender::Filled { update, index, digest } if update == number => {
                let is_asked =
                    present.outgoing.iter().any(|b| b.index == index && b.digest.is_none());
                if !is_asked || sender_of(&present.senders, index) != from {
                    let message = format!("it was not asked to fill bucket {index}");
                    self.cut(from, Error::new(ErrorKind::Protocol, FILLING, message).rank(from));
                    return Ok(false);
                }
                self.filled(index, digest, now)?;
                Ok(true)
            }
            ToSender::Confirm { update, digest, seconds, notes } if update == number => {
                let mut report = ReceiverReport::new(from, VersionState::Ready);
                (report.seconds, report.digest) = (seconds, Some(digest));
                report.notes = serde_json::from_str(&notes).unwrap_or_default();
                member.confirmed = Some(report);
                self.observe(Progress::State { rank: from, state: VersionState::Ready });
                Ok(self.steps.to_confirm.remove(from))
            }
            ToSender::Failed { update, error } if update == number => {
                self.steps.leave(from);
                self.observe(Progress::State { rank: from, state: VersionState::Aborted });
                Err(Error::from(error).rank(from))
            }
            // A message of another update.
            _ => Ok(false),
        }
    }

    /// Ranks no longer read a bucket. Returns those that did.
    fn released(&mut self, from: &RankSet, number: u64, bucket: u64) -> RankSet {
        if let Some(update) = &mut self.update
            && let Some(route) = &mut update.route
        {
            let is_present = number == update.number;
            return from
                .iter()
                .filter(|rank| is_present && route.released(*rank, bucket))
                .collect();
        }
        let mut slots = self.slots.iter_mut();
        let slot = slots.find(|slot| (slot.update, slot.bucket) == (number, bucket));
        slot.map_or_else(RankSet::new, |slot| {
            let released = slot.by.common(from);
            slot.by.subtract(&released);
            released
        })
    }

    fn take_done(&mut self, done: Done, now: Instant) -> Result<()> {
        let Some(update) = &mut self.update else { return Ok(()) };
        if let Done::Collected(collected) = done {
            let since = match &update.next {
                Next::Pending(since) => *since,
                _ => now,
            };
            // Counted only while the leader waited for nothing but the stream.
            if update.link.is_none() {
                update.stages.source += now.saturating_duration_since(since);
            }
            update.next = match collected? {
                Some(bucket) => Next::Bucket(bucket, now),
                None => Next::End,
            };
            return Ok(());
        }
        let Some(Linked { work, since }) = update.link.take() else { return Ok(()) };
        let took = now.saturating_duration_since(since);
        match (work, done) {
            (Work::Begin, Done::Begun(ticket)) => {
                let ticket = ticket?;
                if matches!(update.stage, Stage::Beginning) {
                    self.announce_update(ticket, now)?;
                }
            }
            (Work::Join, Done::Joined(joined)) => {
                joined?;
                update.stages.release += took;
                let together = update.ticket.as_ref().is_some_and(|ticket| ticket.together);
                if matches!(update.stage, Stage::Joining) {
                    update.stage = if together { Stage::Joined } else { Stage::Streaming };
                }
            }
            (Work::Fill { index }, Done::Filled(sum)) => {
                let sum = sum.map_err(|error| error.bucket(index))?;
                update.stages.encode += took;
                if matches!(update.stage, Stage::Failing(_)) {
                    return Ok(());
                }
                let Some(bucket) = update.outgoing.iter().find(|bucket| bucket.index == index)
                else {
                    return Ok(());
                };
                let (slot, filled) = (bucket.slot, bucket.layout.filled());
                let digest = digest::finish(sum, filled);
                update.link = Some(Linked { work: Work::Publish { index, digest }, since: now });
                self.acts.push_back(Act::Publish { index, slot, filled });
            }
            (Work::Publish { index, digest }, Done::Published(published)) => {
                published.map_err(|error| error.bucket(index))?;
                update.stages.publish += took;
                if !matches!(update.stage, Stage::Failing(_)) {
                    self.filled(index, digest, now)?;
                }
            }
            (work, done) => debug!(?work, ?done, "work that nobody asked for"),
        }
        Ok(())
    }
}

impl Update {
    /// The digest of the last plan as a rank knows it that wants these parts.
    fn known_to(&mut self, wants: &PartSet) -> u64 {
        if let Some(digest) = self.known.get(wants) {
            return *digest;
        }
        let digest = self.last.known_to(wants);
        self.known.insert(wants.clone(), digest);
        digest
    }

    /// Whether a bucket of this class is wanted by other ranks than the one before it.
    fn changes_class(&self, class: u32) -> bool {
        self.apart.is_some() && self.classes.last() != Some(&class)
    }

    /// The buckets that were begun.
    fn sent(&self, parts: &Parts) -> Sent {
        let parts = self.classes.iter().map(|class| {
            let apart = self.apart.as_ref().and_then(|classes| classes.get(*class as usize));
            apart.map_or_else(|| parts.all(), |class| class.parts.clone())
        });
        Sent { plan: Plan { buckets: self.layouts.clone() }, parts: parts.collect() }
    }

    /// The digest of all buckets that were announced.
    fn digest(&self) -> u64 {
        self.digests.iter().fold(0, |version, digest| digest::chain(version, *digest))
    }

    /// The bucket that was begun last, for errors.
    fn present_bucket(&self) -> u64 {
        (self.layouts.len() as u64).saturating_sub(1)
    }
}

impl Machine for Leader {
    fn plan(&self) -> &Plan {
        &self.plan.plan
    }

    fn end(&mut self) -> Option<Result<Ended>> {
        match &mut self.update.as_mut()?.stage {
            Stage::Over(result) => {
                let result = result.take();
                // Only the slots that are still read remain of it.
                self.close();
                result
            }
            _ => None,
        }
    }

    fn act(&mut self) -> Option<Act> {
        self.acts.pop_front()
    }

    fn timer(&self) -> Option<Instant> {
        let update = self.update.as_ref()?;
        match &update.stage {
            Stage::Over(_) => None,
            Stage::Failing(failing) => {
                failing.cause_until.into_iter().chain(failing.work_until).min()
            }
            _ => {
                Some(self.wait_until().map_or(update.next_alive, |end| end.min(update.next_alive)))
            }
        }
    }

    fn tick(&mut self, now: Instant) {
        let Some(update) = &self.update else { return };
        match &update.stage {
            Stage::Over(_) => return,
            Stage::Failing(_) => return self.settle(now),
            _ => {}
        }
        if now >= update.next_alive {
            self.tell_alive(now);
        }
        if self.is_late(now)
            && let Some((wait, _)) = self.update.as_ref().and_then(|update| update.wait)
        {
            let late = self.late(wait);
            self.fail(late, now);
        }
    }

    fn event(&mut self, event: Event, now: Instant) {
        let names_a_rank = matches!(event, Event::Left { .. } | Event::Lost { .. });
        if let Err(error) = self.take_event(event, now) {
            self.fail_for(error, names_a_rank, now);
        }
        self.advance(now);
    }

    fn alike(&mut self, from: &RankSet, body: &Bytes, now: Instant) {
        self.messages(from, body, now);
        self.advance(now);
    }

    fn done(&mut self, done: Done, now: Instant) {
        if let Err(error) = self.take_done(done, now) {
            self.fail(error, now);
        }
        self.advance(now);
    }

    fn unreachable(&mut self, rank: Rank, error: Error, now: Instant) {
        // Where receivers fetch buckets, the event tells whether the update survives it.
        let routed = self.update.as_ref().is_some_and(|update| update.route.is_some());
        if !routed && self.steps.active.contains(rank) {
            self.fail(error.rank(rank), now);
        }
        self.advance(now);
    }

    fn refused(&mut self, error: Error, now: Instant) {
        self.fail(error, now);
        self.advance(now);
    }

    fn is_over(&self) -> bool {
        self.update.as_ref().is_none_or(|update| matches!(update.stage, Stage::Over(_)))
    }

    fn abandon(&mut self, now: Instant) {
        let Some(update) = &self.update else { return };
        let words = "the trainer dropped the update";
        let error =
            Error::new(ErrorKind::Aborted, "sending weights", words).version(update.version);
        self.fail(error, now);
        self.tell_abort();
        self.close();
    }
}

/// A placeholder while an error is moved out and put together again.
fn lost_in_words() -> Error {
    Error::new(ErrorKind::PeerLost, "sending weights", "a rank was lost")
}

/// The error of a failed update whose last bucket is still being encoded after the deadline.
pub(super) fn still_read(error: Error, deadline: Duration) -> Error {
    let message = format!(
        "it goes on after {:.1} s; the weights of the bucket must not be changed before they are dropped",
        deadline.as_secs_f64()
    );
    Error::new(ErrorKind::Timeout, "encoding a bucket of an update that failed", message)
        .recovery(Recovery::Abort)
        .with_source(error)
}

/// The error of a wait for a rank that is connected or not, and has not entered the update.
fn not_entered(operation: &str, deadline: Duration, is_connected: bool) -> Error {
    let why = match is_connected {
        true => {
            "its process lives, as its heartbeats come, and has not called receive_weights \
             (send_weights, if it is a trainer)"
        }
        false => "the connection to the rank has ended",
    };
    let message = format!("nothing within {:.1} s: {why}", deadline.as_secs_f64());
    Error::new(ErrorKind::Timeout, operation, message)
}

/// The error of a wait for a rank whose heartbeats do not come.
fn silent(operation: &str, deadline: Duration, silence: Duration) -> Error {
    let message = format!(
        "nothing within {:.1} s: not even a heartbeat came from the rank for {:.1} s: its process is stopped, or the \
         network between is cut",
        deadline.as_secs_f64(),
        silence.as_secs_f64()
    );
    Error::new(ErrorKind::Timeout, operation, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::plan::Piece;
    use engine_core::{Base, DType, TensorMeta};
    use proptest::prelude::*;

    /// A leader with receivers 1 to `ranks`.
    fn leader_of(ranks: u32, slots: usize) -> Leader {
        let settings = Settings {
            deadline: Duration::from_secs(5),
            slots,
            bucket_bytes: 256,
            digests: false,
            card: Bytes::new(),
            asks_bases: false,
            needs_receivers: true,
            parts: Parts::default(),
            keeps_all: false,
        };
        let mut leader = Leader::new(settings, Box::new(|_| None), Box::new(|_| None));
        (1..=ranks).for_each(|rank| leader.admit(Rank(rank), Part::Receiver));
        leader
    }

    fn collected(index: u64) -> Done {
        let meta = TensorMeta::new(format!("weight{index}"), DType::U8, [8]).into();
        let piece = Piece { meta, start: 0, len: 8, offset: 0 };
        let layout = Arc::new(BucketLayout::new(vec![piece]));
        Done::Collected(Ok(Some(Collected { layout, known: None, source_bytes: 8, class: 0 })))
    }

    /// A leader with receivers 1 to 3 in a ring, and its clock.
    struct Ring {
        leader: Leader,
        now: Instant,
        updates: u64,
    }

    impl Ring {
        fn new() -> Self {
            Self { leader: leader_of(3, 4), now: Instant::now(), updates: 0 }
        }

        fn hear(&mut self, from: u32, message: &ToSender) {
            let body = encode(message).expect("a message");
            self.leader.event(Event::Message { from: Rank(from), body }, self.now);
        }

        /// Does what the leader asks for. Returns the fetches that it told ranks to do: by whom, from whom.
        fn told(&mut self) -> Vec<(u32, u32)> {
            let mut fetches = Vec::new();
            while let Some(act) = self.leader.act() {
                let done = match act {
                    Act::Send { to, body } => {
                        if let Ok(ToReceiver::Fetch { from, .. }) = decode(&body) {
                            fetches.push((to.0, from.0));
                        }
                        continue;
                    }
                    Act::Begin { .. } => Done::Begun(Ok(None)),
                    Act::Collect { index: 0 } => collected(0),
                    Act::Collect { .. } => Done::Collected(Ok(None)),
                    Act::Fill { .. } => Done::Filled(Ok(0)),
                    Act::Publish { .. } => Done::Published(Ok(())),
                    _ => continue,
                };
                self.leader.done(done, self.now);
            }
            fetches
        }

        /// Runs an update of one bucket, in which a fetch may fail. Returns all fetches: by whom, from whom.
        fn update(&mut self, fails: Option<(u32, u32)>) -> Vec<(u32, u32)> {
            self.updates += 1;
            let update = self.updates;
            self.leader
                .begin(update, Version(update), Some(Topology::Ring), self.now)
                .expect("there are receivers");
            let (mut all, mut due) = (Vec::new(), VecDeque::new());
            for rank in 1..=3 {
                due.extend(self.told());
                let (card, plan, held) = (Bytes::new(), None, Vec::new());
                let base = Base::Has(u64::from(rank));
                self.hear(rank, &ToSender::Entered { update, card, plan, held, base, wants: None });
            }
            loop {
                due.extend(self.told());
                let Some((by, from)) = due.pop_front() else { break };
                all.push((by, from));
                if fails == Some((by, from)) {
                    let error = ErrorReport::from(&too_late(Duration::ZERO, "fetching"));
                    let message = ToSender::Missed { update, index: 0, from: Rank(from), error };
                    self.hear(by, &message);
                } else {
                    self.hear(by, &ToSender::Fetched { update, index: 0 });
                    self.hear(by, &ToSender::Release { update, index: 0 });
                }
            }
            for rank in 1..=3 {
                let (digest, seconds, notes) = (0, 0.0, "{}".to_owned());
                self.hear(rank, &ToSender::Confirm { update, digest, seconds, notes });
            }
            drop(self.told());
            assert!(self.leader.end().is_some_and(|ended| ended.is_ok()), "update {update}");
            all
        }
    }

    /// Does what a leader of an update of four buckets asks for. Returns what each rank was told.
    fn serve(leader: &mut Leader, now: Instant) -> BTreeMap<Rank, Vec<Bytes>> {
        let mut told = BTreeMap::<Rank, Vec<Bytes>>::new();
        while let Some(act) = leader.act() {
            let done = match act {
                Act::Send { to, body } => {
                    told.entry(to).or_default().push(body);
                    continue;
                }
                Act::SendAll { to, body } => {
                    to.iter().for_each(|to| told.entry(to).or_default().push(body.clone()));
                    continue;
                }
                Act::Begin { .. } => Done::Begun(Ok(None)),
                Act::Collect { index } if index < 4 => collected(index),
                Act::Collect { .. } => Done::Collected(Ok(None)),
                Act::Fill { .. } => Done::Filled(Ok(0)),
                Act::Publish { .. } => Done::Published(Ok(())),
                _ => continue,
            };
            leader.done(done, now);
        }
        told
    }

    const RANKS: u32 = 5;

    /// Something that ranks say in update 1.
    fn said() -> impl Strategy<Value = ToSender> {
        let (update, error) = (1, ErrorReport::from(&lost_in_words()));
        let entered = move |plan| {
            let (card, held, base) = (Bytes::new(), Vec::new(), Base::Unable);
            ToSender::Entered { update, card, plan, held, base, wants: None }
        };
        let confirm = ToSender::Confirm { update, digest: 0, seconds: 0.5, notes: "{}".into() };
        prop_oneof![
            4 => prop::option::of(0..2_u64).prop_map(entered),
            8 => (0..4_u64).prop_map(|index| ToSender::Release { update: 1, index }),
            4 => Just(confirm),
            1 => Just(ToSender::Joined { update }),
            1 => Just(ToSender::Failed { update, error }),
            1 => Just(ToSender::Release { update: 0, index: 0 }),
        ]
    }

    proptest! {
        /// What each rank is told, when the leader wants to be called again, and how the update ends.
        #[test]
        fn what_ranks_say_together_is_what_each_of_them_says(
            rounds in prop::collection::vec((said(), 1..1_u32 << RANKS, 0..3_u64), 1..24),
        ) {
            let mut now = Instant::now();
            let mut both = [leader_of(RANKS, 2), leader_of(RANKS, 2)];
            for leader in &mut both {
                leader.begin(1, Version(1), None, now).expect("there are receivers");
            }
            let mut ended = [None, None];
            for (message, ranks, seconds) in rounds {
                now += Duration::from_secs(seconds);
                let ranks: RankSet = (0..RANKS).filter(|at| ranks >> at & 1 == 1).map(|at| Rank(at + 1)).collect();
                let body = encode(&message).expect("a message");
                let mut told = [BTreeMap::new(), BTreeMap::new()];
                for (at, leader) in both.iter_mut().enumerate() {
                    told[at] = serve(leader, now);
                    if leader.timer().is_some_and(|timer| timer <= now) {
                        leader.tick(now);
                    }
                    match at {
                        0 => leader.alike(&ranks, &body, now),
                        _ => ranks.iter().for_each(|from| {
                            leader.event(Event::Message { from, body: body.clone() }, now);
                        }),
                    }
                    for (rank, more) in serve(leader, now) {
                        told[at].entry(rank).or_default().extend(more);
                    }
                    if let Some(end) = leader.end() {
                        ended[at] = Some(end.map(|ended| ended.receivers));
                    }
                }
                prop_assert_eq!(&told[0], &told[1], "{:?} of {:?}", message, ranks);
                prop_assert_eq!(both[0].timer(), both[1].timer(), "{:?} of {:?}", message, ranks);
                prop_assert_eq!(format!("{:?}", ended[0]), format!("{:?}", ended[1]));
            }
        }
    }

    #[test]
    fn the_one_of_many_ranks_that_is_late_is_named() {
        let (mut now, mut leader) = (Instant::now(), leader_of(1000, 2));
        leader.begin(1, Version(1), None, now).expect("there are receivers");
        let all: RankSet = (1..=1000).map(Rank).collect();
        let mut others = all.clone();
        others.remove(Rank(777));
        let (card, held, base) = (Bytes::new(), Vec::new(), Base::Unable);
        let entered = ToSender::Entered { update: 1, card, plan: None, held, base, wants: None };
        drop(serve(&mut leader, now));
        for (from, message) in [
            (&all, entered),
            (&all, ToSender::Release { update: 1, index: 0 }),
            (&others, ToSender::Release { update: 1, index: 1 }),
        ] {
            now += Duration::from_secs(1);
            leader.alike(from, &encode(&message).expect("a message"), now);
            drop(serve(&mut leader, now));
        }
        // All ranks have released the first bucket after two seconds, and have five more.
        while leader.timer().is_some_and(|timer| timer < now + Duration::from_secs(4)) {
            leader.tick(leader.timer().expect("a timer"));
            drop(serve(&mut leader, now));
        }
        assert!(leader.end().is_none());
        now += Duration::from_secs(5);
        leader.tick(now);
        drop(serve(&mut leader, now));
        let error = leader.end().expect("an end").expect_err("late");
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert_eq!(
            (error.report().rank, error.report().bucket),
            (Some(Rank(777)), Some(1)),
            "{error}"
        );
    }

    /// After how long an update fails in which rank 1 takes no step once it has entered. The deadline is 5 s, and a second bucket is given to
    /// it after 4. `silence` tells, by the time, for how long nothing has been heard of it.
    fn fails_after(
        silence: impl Fn(Duration) -> Option<Duration> + Send + Sync + 'static,
    ) -> Duration {
        let begun = Instant::now();
        let clock = Arc::new(std::sync::Mutex::new(Duration::ZERO));
        let of_rank = clock.clone();
        let mut leader = leader_of(2, 2);
        leader.silence = Box::new(move |rank| match rank {
            Rank(1) => silence(*of_rank.lock().expect("no panic")),
            _ => Some(Duration::ZERO),
        });
        leader.begin(1, Version(1), None, begun).expect("there are receivers");
        let steps = RankSet::from([Rank(1), Rank(2)]);
        let (card, held, base) = (Bytes::new(), Vec::new(), Base::Unable);
        let entered = ToSender::Entered { update: 1, card, plan: None, held, base, wants: None };
        leader.alike(&steps, &encode(&entered).expect("a message"), begun);
        let (mut late, mut at) = (None, Duration::ZERO);
        while at < Duration::from_secs(20) {
            let now = begun + at;
            while let Some(act) = leader.act() {
                let done = match act {
                    Act::Begin { .. } => Done::Begun(Ok(None)),
                    Act::Collect { index: 1 } => {
                        late = Some(Duration::from_secs(4));
                        continue;
                    }
                    Act::Collect { index } => collected(index),
                    Act::Fill { .. } => Done::Filled(Ok(0)),
                    Act::Publish { .. } => Done::Published(Ok(())),
                    _ => continue,
                };
                leader.done(done, now);
            }
            if let Some(end) = leader.end() {
                let error = end.expect_err("rank 1 releases nothing");
                assert_eq!(error.report().rank, Some(Rank(1)), "{error}");
                return at;
            }
            if late.is_some_and(|late| late <= at) {
                late = None;
                leader.done(collected(1), now);
                continue;
            }
            *clock.lock().expect("no panic") = at;
            at += Duration::from_millis(250);
            if leader.timer().is_some_and(|timer| timer <= begun + at) {
                leader.tick(begun + at);
            }
        }
        panic!("it never fails");
    }

    #[test]
    fn tasks_give_time_to_a_rank_that_lives_and_none_to_one_that_is_silent() {
        let second = Duration::from_secs(1);
        let lives = fails_after(|_| Some(Duration::ZERO));
        assert!(lives > 8 * second, "{lives:?}");
        let stopped = fails_after(Some);
        assert!(stopped > 4 * second && stopped < 7 * second, "{stopped:?}");
        // It was silent before, and is heard of again.
        let cut_off = fails_after(move |now| {
            Some(if now < 3 * second { now + 4 * second } else { Duration::ZERO })
        });
        assert_eq!(cut_off, lives);
    }

    #[test]
    fn the_updates_after_a_fetch_that_failed_go_around_its_path_for_a_while() {
        let mut ring = Ring::new();
        assert_eq!(ring.update(None), [(1, 0), (2, 1), (3, 2)]);
        assert_eq!(ring.update(Some((3, 2))), [(1, 0), (2, 1), (3, 2), (3, 1)]);
        assert_eq!(ring.update(None), [(1, 0), (2, 1), (3, 1)]);
        ring.now += Duration::from_secs(5 * 16);
        assert_eq!(ring.update(None), [(1, 0), (2, 1), (3, 2)]);
    }

    #[test]
    fn a_path_that_failed_is_forgotten_with_its_rank() {
        let mut ring = Ring::new();
        ring.update(Some((3, 2)));
        let error = ErrorReport::from(&lost_in_words());
        ring.leader.event(Event::Lost { rank: Rank(2), error }, ring.now);
        ring.leader.admit(Rank(2), Part::Receiver);
        assert_eq!(ring.update(None), [(1, 0), (2, 1), (3, 2)]);
    }

    #[test]
    fn a_rank_that_has_not_entered_is_told_apart_from_one_that_is_stopped() {
        let deadline = Duration::from_secs(5);
        let lives = not_entered("waiting", deadline, true).to_string();
        let silent = silent("waiting", deadline, Duration::from_secs(3)).to_string();
        assert!(lives.contains("receive_weights") && !lives.contains("stopped"), "{lives}");
        assert!(silent.contains("for 3.0 s: its process is stopped"), "{silent}");
        assert!(!silent.contains("receive_weights"), "{silent}");
    }
}

//! The plan: which box goes from whom to whom, and when.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::iter;
use std::sync::Arc;

use engine_core::{Error, ErrorKind, Rank, Result, TensorBox, TensorMeta};
use sha2::{Digest, Sha256};

use crate::crossing::{Crossing, cut};
use crate::deal::{Spread, fill};
use crate::links::{Links, Place};
use crate::rounds::rounds;
use crate::sharding::{ShardedTensor, Sharding};

/// How many parts of about the same size the tensors that the same ranks hold are divided into, in their order. Layers are not
/// cut.
pub const WAVES: u32 = 16;

/// A box that replicas share is cut so that the largest part is about this fraction of what each rank sends.
const CUTS_OF_A_LOAD: u64 = 64;
/// No box is cut in parts smaller than this, in bytes, for the sake of even loads.
const LEAST_CUT: u64 = 64 << 10;

/// Who sends which box to whom: the same on every rank that knows the same boxes and links.
///
/// Every box that a rank wants comes to it exactly once, in parts that one rank each sends. It is kept compactly: a box that the same
/// ranks hold and want of many tensors is there once.
#[derive(Debug)]
pub struct ReshardPlan {
    tensors: Vec<Planned>,
    groups: Vec<Group>,
    /// All (sender, receiver) with their bytes and round, ascending.
    pairs: Vec<Pair>,
    loads: BTreeMap<Rank, Load>,
    cards: BTreeMap<(u8, u32), CardLoad>,
    card_of: BTreeMap<Rank, (u8, u32)>,
    bound: u64,
    digest: [u8; 32],
}

#[derive(Debug)]
struct Planned {
    meta: TensorMeta,
    wave: u32,
    /// Its group, and its number there.
    group: u32,
    number: u32,
}

/// Tensors of the same shape and type that are held and wanted in the same way.
#[derive(Debug)]
struct Group {
    crossing: Arc<Crossing>,
    bits: u64,
    /// Places among all tensors, ascending.
    tensors: Vec<u32>,
    tasks: Vec<Task>,
}

/// Elements of every tensor of a group that one rank gets, each time from one of some replicas.
#[derive(Debug)]
struct Task {
    cell: u32,
    /// The cell is cut in `parts`, of which this is `part`.
    part: u32,
    parts: u32,
    to: Rank,
    senders: Senders,
}

#[derive(Debug)]
enum Senders {
    One(Rank),
    /// Who sends of how many tensors, counted in their [spread](Spread) order up to here.
    Many(Box<[(u64, Rank)]>),
}

impl Senders {
    fn of(&self, number: u64, spread: Spread) -> Rank {
        match self {
            Self::One(rank) => *rank,
            Self::Many(ends) => {
                let place = spread.place(number);
                ends[ends.partition_point(|&(end, _)| end <= place).min(ends.len() - 1)].1
            }
        }
    }

    fn may_be(&self, rank: Rank) -> bool {
        match self {
            Self::One(only) => *only == rank,
            Self::Many(ends) => ends.iter().any(|&(_, sender)| sender == rank),
        }
    }

    /// Each sender, with how many tensors it sends of `count`.
    fn counts(&self, count: u64) -> impl Iterator<Item = (Rank, u64)> + '_ {
        let (one, many) = match self {
            Self::One(rank) => (Some((*rank, count)), None),
            Self::Many(ends) => (None, Some(ends)),
        };
        let many = many
            .into_iter()
            .flatten()
            .scan(0, |before, &(end, rank)| Some((rank, end - std::mem::replace(before, end))));
        one.into_iter().chain(many)
    }
}

impl Group {
    fn region(&self, task: &Task) -> TensorBox {
        let region = &self.crossing.cells[task.cell as usize].region;
        match task.parts {
            1 => region.clone(),
            parts => cut(region, &self.crossing.granule, parts).swap_remove(task.part as usize),
        }
    }

    fn spread(&self) -> Spread {
        Spread::new(self.tensors.len() as u64)
    }

    fn bytes(&self, region: &TensorBox) -> u64 {
        bytes_of(region, self.bits)
    }
}

/// Bytes of a box of elements of so many bits.
fn bytes_of(region: &TensorBox, bits: u64) -> u64 {
    (u128::from(region.elements()) * u128::from(bits)).div_ceil(8) as u64
}

/// A box on its way from one rank to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Which [tensor](ReshardPlan::tensor).
    pub tensor: u32,
    /// The part of the full tensor.
    pub region: TensorBox,
    /// The rank that sends it.
    pub from: Rank,
    /// The rank that wants it; a rank that holds what it wants is both.
    pub to: Rank,
    /// Tensors travel in waves, in their order.
    pub wave: u32,
    /// Within a wave a rank goes by rounds: in each it sends to one rank at most, and gets from one at most.
    pub round: u32,
}

/// Largest magnitudes of blocks that one rank tells another, because both have a part of each block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaximaExchange {
    /// Which [tensor](ReshardPlan::tensor).
    pub tensor: u32,
    /// The rank that tells what it finds in its part.
    pub from: Rank,
    /// The rank that sends elements of the blocks, and needs their maxima before.
    pub to: Rank,
    /// The blocks, counted in granules.
    pub blocks: TensorBox,
}

/// What a rank sends and gets in an update, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// To ranks of other nodes.
    pub sent: u64,
    /// From ranks of other nodes.
    pub received: u64,
    /// To ranks of its node.
    pub sent_within: u64,
    /// From ranks of its node.
    pub received_within: u64,
    /// What it has itself.
    pub kept: u64,
}

/// Bytes of one network card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CardLoad {
    /// To other nodes.
    pub sent: u64,
    /// From other nodes.
    pub received: u64,
}

/// A rank that sends to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The sender.
    pub from: Rank,
    /// The receiver.
    pub to: Rank,
    /// All bytes of an update between the two.
    pub bytes: u64,
    /// When in each wave.
    pub round: u32,
    /// Whether they are on one node.
    pub within_node: bool,
}

/// Plans, and keeps what the next plan can use.
///
/// What two layouts have in common takes the time of a plan that does not depend on the number of tensors. It is kept as long as
/// tensors have the two layouts, so that after a change only layouts that are new are crossed. Who of several
/// replicas sends is decided anew, since it depends on the loads of all.
#[derive(Debug, Default)]
pub struct Planner {
    crossings: HashMap<CrossingKey, Arc<Crossing>>,
    last: Option<([u8; 32], Arc<ReshardPlan>)>,
    work: Work,
}

type CrossingKey = ([u8; 32], [u8; 32], Arc<[u64]>);

/// What a [`Planner`] did for its last plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Pairs of layouts that were crossed.
    pub crossed: usize,
    /// Pairs of layouts whose crossing was kept from the plan before.
    pub kept: usize,
    /// Whether it was the plan before.
    pub same: bool,
}

/// The plan for what trainers hold and rollouts want.
///
/// A rank gets each element that it wants from a rank that holds it: from itself, else from one of its node, else from
/// any. Among several the one is taken whose card, and then which itself, has least to send.
///
/// # Errors
///
/// `Weight`, naming tensor and rank, if something is wanted that nobody holds; `Mismatch` if full shapes differ.
pub fn plan(held: &Sharding, wanted: &Sharding, links: &Links) -> Result<Arc<ReshardPlan>> {
    Planner::default().plan(held, wanted, links)
}

impl Planner {
    /// Nothing planned yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same as [`plan`], in less time where boxes are those of the last plan.
    ///
    /// # Errors
    ///
    /// As [`plan`]; what was kept stays.
    pub fn plan(
        &mut self,
        held: &Sharding,
        wanted: &Sharding,
        links: &Links,
    ) -> Result<Arc<ReshardPlan>> {
        let mut work = Work::default();
        let matched = matched(held, wanted)?;
        let asked = digest_of(&matched, links);
        if let Some((last, plan)) = &self.last
            && *last == asked
        {
            work.same = true;
            self.work = work;
            return Ok(plan.clone());
        }
        let mut crossings = HashMap::new();
        let mut groups: Vec<Group> = Vec::new();
        let mut group_of: HashMap<(CrossingKey, u64), u32> = HashMap::new();
        let mut tensors = Vec::with_capacity(matched.len());
        for (place, (held, wanted)) in (0..).zip(&matched) {
            let layouts = (held.layout.digest(), wanted.layout.digest());
            let key = (layouts.0, layouts.1, wanted.granule.clone());
            let bits = wanted.meta.dtype.bits();
            let group = match group_of.get(&(key.clone(), bits)) {
                Some(&group) => group,
                None => {
                    let crossing = match self.crossings.get(&key) {
                        Some(kept) => kept.clone(),
                        None => Crossing::new(&held.layout, &wanted.layout, &wanted.granule)
                            .map_err(|error| error.tensor(&*wanted.meta.name))?
                            .into(),
                    };
                    crossings.entry(key.clone()).or_insert_with(|| {
                        let kept = self.crossings.contains_key(&key);
                        *(if kept { &mut work.kept } else { &mut work.crossed }) += 1;
                        crossing.clone()
                    });
                    let tasks = Vec::new();
                    groups.push(Group { crossing, bits, tensors: Vec::new(), tasks });
                    let group = groups.len() as u32 - 1;
                    group_of.insert((key, bits), group);
                    group
                }
            };
            let members = &mut groups[group as usize].tensors;
            members.push(place);
            let number = members.len() as u32 - 1;
            tensors.push(Planned { meta: wanted.meta.clone(), wave: 0, group, number });
        }
        let plan = Arc::new(Dealer::new(links, groups).deal(tensors, &asked));
        self.crossings = crossings;
        self.last = Some((asked, plan.clone()));
        self.work = work;
        Ok(plan)
    }

    /// What the last plan took.
    pub fn work(&self) -> Work {
        self.work
    }
}

/// What is wanted, beside who holds it.
fn matched<'a>(
    held: &'a Sharding,
    wanted: &'a Sharding,
) -> Result<Vec<(&'a ShardedTensor, &'a ShardedTensor)>> {
    let refuse = |kind, wanted: &ShardedTensor, message: String| {
        let error = Error::new(kind, "planning who sends what", message).tensor(&*wanted.meta.name);
        match wanted.layout.shares().first() {
            Some(share) => error.rank(share.ranks[0]),
            None => error,
        }
    };
    let mut matched = Vec::with_capacity(wanted.tensors().len());
    for (wanted, held) in wanted.tensors().zip(held.aligned_with(wanted)) {
        let Some(held) = held else {
            return Err(refuse(ErrorKind::Weight, wanted, "no trainer holds it".into()));
        };
        if held.meta.shape != wanted.meta.shape {
            let (own, other) = (&wanted.meta.shape, &held.meta.shape);
            let message = format!("its full shape is {own:?}, that of the trainers {other:?}");
            return Err(refuse(ErrorKind::Mismatch, wanted, message));
        }
        matched.push((held, wanted));
    }
    Ok(matched)
}

/// A digest of all that a plan depends on.
fn digest_of(matched: &[(&ShardedTensor, &ShardedTensor)], links: &Links) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut ranks = HashSet::new();
    let mut seen = HashSet::new();
    for (held, wanted) in matched {
        hash.update((wanted.meta.name.len() as u64).to_le_bytes());
        hash.update(wanted.meta.name.as_bytes());
        hash.update(wanted.meta.dtype.name());
        hash.update((wanted.granule.len() as u64).to_le_bytes());
        wanted.granule.iter().for_each(|side| hash.update(side.to_le_bytes()));
        for layout in [&held.layout, &wanted.layout] {
            hash.update(layout.digest());
            if seen.insert(layout.digest()) {
                ranks.extend(layout.shares().iter().flat_map(|share| share.ranks.iter().copied()));
            }
        }
    }
    let mut ranks: Vec<Rank> = ranks.into_iter().collect();
    ranks.sort_unstable();
    for rank in ranks {
        let place = links.place(rank);
        for site in [place.node.number(), place.card.number()] {
            hash.update([site.0]);
            hash.update(site.1.to_le_bytes());
        }
    }
    hash.finalize().into()
}

/// Decides who sends.
struct Dealer<'a> {
    links: &'a Links,
    groups: Vec<Group>,
    places: HashMap<Rank, Place>,
    loads: BTreeMap<Rank, Load>,
    cards: BTreeMap<(u8, u32), CardLoad>,
    pairs: HashMap<(Rank, Rank), u64>,
    /// What only these cards can send, in bytes.
    demands: HashMap<Arc<[(u8, u32)]>, u64>,
}

/// Who can send to a rank, and over what.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Itself,
    Node,
    Network,
}

impl<'a> Dealer<'a> {
    fn new(links: &'a Links, groups: Vec<Group>) -> Self {
        Self {
            links,
            groups,
            places: HashMap::new(),
            loads: BTreeMap::new(),
            cards: BTreeMap::new(),
            pairs: HashMap::new(),
            demands: HashMap::new(),
        }
    }

    fn place(&mut self, rank: Rank) -> Place {
        *self.places.entry(rank).or_insert_with(|| self.links.place(rank))
    }

    fn deal(mut self, mut tensors: Vec<Planned>, asked: &[u8; 32]) -> ReshardPlan {
        let mut groups = std::mem::take(&mut self.groups);
        // All that is wanted over all that can send: about what each will send.
        let (mut total, mut senders, mut bytes) =
            (0_u128, HashSet::new(), vec![0_u64; tensors.len()]);
        for group in &groups {
            let of_one: u64 = group
                .crossing
                .cells
                .iter()
                .map(|cell| {
                    let wanted = &group.crossing.wanted.shares()[cell.wanted as usize];
                    group.bytes(&cell.region) * wanted.ranks.len() as u64
                })
                .sum();
            total += u128::from(of_one) * group.tensors.len() as u128;
            group.tensors.iter().for_each(|&tensor| bytes[tensor as usize] = of_one);
            senders.extend(group.crossing.held.iter().flat_map(|s| s.ranks.iter().copied()));
        }
        let most = (total / (senders.len() as u128).max(1)) as u64 / CUTS_OF_A_LOAD;
        let most = most.max(LEAST_CUT);
        let families = families(&groups, &tensors);
        let mut progress: HashMap<u32, Progress<'_>> = HashMap::new();
        for (&family, &bytes) in families.iter().zip(&bytes) {
            progress.entry(family).or_default().total += u128::from(bytes);
        }
        let mut waves = Vec::with_capacity(tensors.len());
        for ((tensor, family), bytes) in tensors.iter().zip(families).zip(bytes) {
            let own = progress.entry(family).or_default();
            waves.push(own.wave(layer_of(&tensor.meta.name), bytes));
        }
        tensors.iter_mut().zip(waves).for_each(|(tensor, wave)| tensor.wave = wave);

        let mut shared = Vec::new();
        for (at, group) in groups.iter_mut().enumerate() {
            self.tasks(at, group, most, &mut shared);
        }
        // Who has little choice comes first, and what is large: that is what is hard to even out.
        shared.sort_by_key(|task: &Shared| (task.holders.len(), Reverse(task.bytes), task.at));
        for task in shared {
            let (group, place) = task.at;
            let count = groups[group].tensors.len() as u64;
            let senders = self.share(&task, count);
            groups[group].tasks[place].senders = senders;
        }

        let mut pairs: Vec<((Rank, Rank), u64)> =
            std::mem::take(&mut self.pairs).into_iter().collect();
        // Pairs of about the same size meet in a round, and each sender begins with another receiver.
        pairs.sort_unstable_by_key(|&((from, to), bytes)| {
            (Reverse(bytes), to.0.wrapping_sub(from.0), from)
        });
        let numbers = |of: fn(&(Rank, Rank)) -> Rank| number(pairs.iter().map(|(p, _)| of(p)));
        let (from, to) = (numbers(|pair| pair.0), numbers(|pair| pair.1));
        // Sizes within a factor of two have rounds of their own, so that nobody waits for one that has far more to send.
        let most = pairs.first().map_or(0, |&(_, bytes)| bytes);
        let (mut first, mut planned) = (0, Vec::with_capacity(pairs.len()));
        for alike in pairs.chunk_by(|one, other| size(most, one.1) == size(most, other.1)) {
            let edges: Vec<_> = alike.iter().map(|((f, t), _)| (from[f], to[t])).collect();
            let rounds = rounds(&edges);
            for (&((from, to), bytes), round) in alike.iter().zip(&rounds) {
                let within_node = self.places[&from].node == self.places[&to].node;
                planned.push(Pair { from, to, bytes, round: first + round, within_node });
            }
            first += rounds.iter().max().map_or(0, |last| last + 1);
        }
        let mut pairs = planned;
        pairs.sort_unstable_by_key(|pair| (pair.from, pair.to));
        let bound = self.bound();
        let digest = digest(asked, &groups, &pairs);
        let card_of =
            self.places.iter().map(|(&rank, place)| (rank, place.card.number())).collect();
        let (loads, cards) = (self.loads, self.cards);
        ReshardPlan { tensors, groups, pairs, loads, cards, card_of, bound, digest }
    }

    /// The tasks of a group. Those that have one possible sender are dealt, the others returned.
    fn tasks(&mut self, at: usize, group: &mut Group, most: u64, shared: &mut Vec<Shared>) {
        let crossing = group.crossing.clone();
        let count = group.tensors.len() as u64;
        for (place, cell) in (0..).zip(&crossing.cells) {
            let holders = &crossing.held[cell.held as usize].ranks;
            let wanted = &crossing.wanted.shares()[cell.wanted as usize].ranks;
            let bytes = group.bytes(&cell.region);
            for &to in wanted.iter() {
                let (way, candidates) = self.candidates(holders, to);
                let parts = match candidates.len() {
                    1 => vec![bytes],
                    _ => cut(&cell.region, &crossing.granule, parts_of(bytes, most))
                        .iter()
                        .map(|part| group.bytes(part))
                        .collect(),
                };
                let all = parts.len() as u32;
                for (part, bytes) in (0..).zip(parts) {
                    if let [only] = *candidates {
                        self.load(only, to, way, bytes * count);
                    } else {
                        let at = (at, group.tasks.len());
                        shared.push(Shared { at, to, way, holders: candidates.clone(), bytes });
                    }
                    let senders = Senders::One(candidates[0]);
                    group.tasks.push(Task { cell: place, part, parts: all, to, senders });
                }
                if way == Way::Network {
                    let mut cards: Vec<_> =
                        candidates.iter().map(|&rank| self.place(rank).card.number()).collect();
                    cards.sort_unstable();
                    cards.dedup();
                    *self.demands.entry(cards.into()).or_default() += bytes * count;
                }
            }
        }
    }

    fn candidates(&mut self, holders: &Arc<[Rank]>, to: Rank) -> (Way, Arc<[Rank]>) {
        if holders.binary_search(&to).is_ok() {
            return (Way::Itself, [to].into());
        }
        let node = self.place(to).node;
        let near: Vec<Rank> =
            holders.iter().copied().filter(|&rank| self.place(rank).node == node).collect();
        match near.is_empty() {
            true => (Way::Network, holders.clone()),
            false => (Way::Node, near.into()),
        }
    }

    fn share(&mut self, task: &Shared, count: u64) -> Senders {
        let mut given: Vec<(Rank, u64)> = Vec::new();
        if task.way == Way::Node {
            let mut loads: Vec<u64> = task
                .holders
                .iter()
                .map(|rank| self.loads.entry(*rank).or_default().sent_within)
                .collect();
            given.extend(task.holders.iter().copied().zip(fill(&mut loads, count, task.bytes)));
        } else {
            // First among cards, then among the ranks of each.
            let mut cards: BTreeMap<(u8, u32), Vec<Rank>> = BTreeMap::new();
            for &rank in task.holders.iter() {
                cards.entry(self.place(rank).card.number()).or_default().push(rank);
            }
            let mut loads: Vec<u64> =
                cards.keys().map(|card| self.cards.entry(*card).or_default().sent).collect();
            let counts = fill(&mut loads, count, task.bytes);
            for (ranks, count) in cards.values().zip(counts) {
                let mut loads: Vec<u64> =
                    ranks.iter().map(|rank| self.loads.entry(*rank).or_default().sent).collect();
                given.extend(ranks.iter().copied().zip(fill(&mut loads, count, task.bytes)));
            }
        }
        given.retain(|&(_, count)| count > 0);
        for &(from, count) in &given {
            self.load(from, task.to, task.way, count * task.bytes);
        }
        match *given {
            [(only, _)] => Senders::One(only),
            _ => {
                let ends = given.into_iter().scan(0, |end, (rank, count)| {
                    *end += count;
                    Some((*end, rank))
                });
                Senders::Many(ends.collect())
            }
        }
    }

    fn load(&mut self, from: Rank, to: Rank, way: Way, bytes: u64) {
        if way == Way::Itself {
            self.loads.entry(to).or_default().kept += bytes;
            return;
        }
        *self.pairs.entry((from, to)).or_default() += bytes;
        let (one, other) = (self.place(from), self.place(to));
        if way == Way::Node {
            self.loads.entry(from).or_default().sent_within += bytes;
            self.loads.entry(to).or_default().received_within += bytes;
            return;
        }
        self.loads.entry(from).or_default().sent += bytes;
        self.loads.entry(to).or_default().received += bytes;
        self.cards.entry(one.card.number()).or_default().sent += bytes;
        self.cards.entry(other.card.number()).or_default().received += bytes;
    }

    /// Bytes that the busiest card cannot do without: a card gets all that its ranks want, and the cards of some replicas have
    /// to send between them what nobody else can.
    fn bound(&self) -> u64 {
        /// Beyond so many sets of cards only those of single demands are looked at.
        const MOST_SETS: usize = 2048;

        let received = self.cards.values().map(|card| card.received).max().unwrap_or(0);
        let sets: Vec<_> = self.demands.iter().collect();
        let within = |inner: &[(u8, u32)], outer: &[(u8, u32)]| {
            inner.iter().all(|card| outer.binary_search(card).is_ok())
        };
        let all: HashSet<_> = sets.iter().flat_map(|(cards, _)| cards.iter()).collect();
        let total: u64 = sets.iter().map(|(_, bytes)| **bytes).sum();
        let sent = sets.iter().map(|(cards, bytes)| {
            let inner = sets.iter().filter(|(other, _)| {
                sets.len() <= MOST_SETS && other.len() < cards.len() && within(other, cards)
            });
            (inner.map(|(_, bytes)| **bytes).sum::<u64>() + **bytes).div_ceil(cards.len() as u64)
        });
        let together = total.div_ceil((all.len() as u64).max(1));
        sent.chain([received, together]).max().unwrap_or(0)
    }
}

/// A task that several ranks could do.
struct Shared {
    /// Its group, and its place among the tasks of that.
    at: (usize, usize),
    to: Rank,
    way: Way,
    holders: Arc<[Rank]>,
    bytes: u64,
}

fn parts_of(bytes: u64, most: u64) -> u32 {
    u32::try_from(bytes.div_ceil(most).max(1)).unwrap_or(u32::MAX)
}

/// How often a number of bytes can be doubled until it exceeds the most.
fn size(most: u64, bytes: u64) -> u32 {
    (most / bytes.max(1)).max(1).ilog2()
}

/// Of each tensor a number that those have in common which the same ranks hold.
fn families(groups: &[Group], tensors: &[Planned]) -> Vec<u32> {
    let mut numbers: HashMap<Vec<Rank>, u32> = HashMap::new();
    let of_group: Vec<u32> = groups
        .iter()
        .map(|group| {
            let holders = group.crossing.held.iter().flat_map(|share| share.ranks.iter().copied());
            let mut holders: Vec<Rank> = holders.collect();
            holders.sort_unstable();
            holders.dedup();
            let next = numbers.len() as u32;
            *numbers.entry(holders).or_insert(next)
        })
        .collect();
    tensors.iter().map(|tensor| of_group[tensor.group as usize]).collect()
}

/// How far the tensors of a family are dealt out to waves. Each family fills all waves, so that nobody waits for the stages of a
/// pipeline that come before its own.
#[derive(Default)]
struct Progress<'a> {
    total: u128,
    before: u128,
    wave: u32,
    layer: Option<&'a str>,
}

impl<'a> Progress<'a> {
    fn wave(&mut self, layer: Option<&'a str>, bytes: u64) -> u32 {
        if layer.is_none() || layer != self.layer {
            let at = self.before * u128::from(WAVES) / self.total.max(1);
            (self.wave, self.layer) = (at.min(u128::from(WAVES) - 1) as u32, layer);
        }
        self.before += u128::from(bytes);
        self.wave
    }
}

/// A name up to its first number: tensors that have the same are of one layer. All ranks get about as much of a whole layer, and
/// not of a part of it.
fn layer_of(name: &str) -> Option<&str> {
    let start = name.find(|c: char| c.is_ascii_digit())?;
    let digits = name[start..].find(|c: char| !c.is_ascii_digit());
    Some(&name[..digits.map_or(name.len(), |end| start + end)])
}

/// Ranks, numbered from 0 in their order.
fn number(ranks: impl Iterator<Item = Rank>) -> HashMap<Rank, u32> {
    let mut ranks: Vec<Rank> = ranks.collect();
    ranks.sort_unstable();
    ranks.dedup();
    ranks.into_iter().zip(0..).collect()
}

fn digest(asked: &[u8; 32], groups: &[Group], pairs: &[Pair]) -> [u8; 32] {
    let mut bytes: Vec<u8> = asked.to_vec();
    let mut add = |number: u64| bytes.extend(number.to_le_bytes());
    for group in groups {
        add(group.tasks.len() as u64);
        for task in &group.tasks {
            add(u64::from(task.cell) << 32 | u64::from(task.to.0));
            add(u64::from(task.part) << 32 | u64::from(task.parts));
            for (rank, count) in task.senders.counts(group.tensors.len() as u64) {
                add(u64::from(rank.0));
                add(count);
            }
        }
    }
    for pair in pairs {
        add(u64::from(pair.from.0) << 32 | u64::from(pair.to.0));
        add(u64::from(pair.round));
    }
    Sha256::digest(&bytes).into()
}

impl ReshardPlan {
    /// A digest of all that the plan says and depends on: ranks that have the same digest have the same plan.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The tensors that somebody wants, in the order in which they travel.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorMeta> {
        self.tensors.iter().map(|tensor| &tensor.meta)
    }

    /// A tensor, as it travels, by its number.
    ///
    /// # Panics
    ///
    /// If there are not that many.
    pub fn tensor(&self, number: u32) -> &TensorMeta {
        &self.tensors[number as usize].meta
    }

    /// Who sends to whom, ordered by ranks. What a rank has itself does not count.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// What a rank sends and gets.
    pub fn load(&self, rank: Rank) -> Load {
        self.loads.get(&rank).copied().unwrap_or_default()
    }

    /// Every rank that sends or gets anything, with its load.
    pub fn loads(&self) -> impl ExactSizeIterator<Item = (Rank, Load)> {
        self.loads.iter().map(|(&rank, &load)| (rank, load))
    }

    /// The load of every network card, in no order that means anything.
    pub fn cards(&self) -> impl ExactSizeIterator<Item = CardLoad> {
        self.cards.values().copied()
    }

    /// Bytes of the busiest network card in one direction.
    pub fn busiest(&self) -> u64 {
        self.cards().map(|card| card.sent.max(card.received)).max().unwrap_or(0)
    }

    /// Bytes that the busiest network card has in every plan in which who wants something gets it from who holds it, within
    /// its node where it can.
    pub fn lower_bound(&self) -> u64 {
        self.bound
    }

    /// What a rank sends, in the order in which it should.
    pub fn transfers_from(&self, rank: Rank) -> Vec<Transfer> {
        self.collect(|task| task.senders.may_be(rank), |transfer| transfer.from == rank)
    }

    /// What a rank gets, in the order in which it is sent.
    pub fn transfers_to(&self, rank: Rank) -> Vec<Transfer> {
        self.collect(|task| task.to == rank, |_| true)
    }

    /// How many transfers there are.
    pub fn transfers(&self) -> u64 {
        let of = |group: &Group| group.tasks.len() as u64 * group.tensors.len() as u64;
        self.groups.iter().map(of).sum()
    }

    fn collect(
        &self,
        task: impl Fn(&Task) -> bool,
        transfer: impl Fn(&Transfer) -> bool,
    ) -> Vec<Transfer> {
        let mut all = Vec::new();
        for group in &self.groups {
            let spread = group.spread();
            for task in group.tasks.iter().filter(|t| task(t)) {
                let region = group.region(task);
                for (number, &tensor) in (0..).zip(&group.tensors) {
                    let (from, to) = (task.senders.of(number, spread), task.to);
                    let wave = self.tensors[tensor as usize].wave;
                    let round = self.round(from, to);
                    let found = Transfer { tensor, region: region.clone(), from, to, wave, round };
                    if transfer(&found) {
                        all.push(found);
                    }
                }
            }
        }
        // Stable, so that boxes of a tensor stay in their order.
        all.sort_by_key(|transfer| {
            (transfer.wave, transfer.round, transfer.from, transfer.to, transfer.tensor)
        });
        all
    }

    fn round(&self, from: Rank, to: Rank) -> u32 {
        let found = self.pairs.binary_search_by_key(&(from, to), |pair| (pair.from, pair.to));
        found.map_or(0, |at| self.pairs[at].round)
    }

    /// The card of a rank that sends or gets something.
    pub(crate) fn card_of(&self, rank: Rank) -> (u8, u32) {
        self.card_of.get(&rank).copied().unwrap_or((1, rank.0))
    }

    /// Bytes of maxima that the rank sends which sends most, at four bytes for each block and rank that needs it. Of
    /// tensors that are planned together the first stands for all.
    pub(crate) fn maxima_bytes(&self) -> u64 {
        let mut sent: HashMap<Rank, u64> = HashMap::new();
        for group in &self.groups {
            for telling in group.tensors.first().map(|&t| self.maxima(t)).unwrap_or_default() {
                let bytes = telling.blocks.elements() * 4 * group.tensors.len() as u64;
                *sent.entry(telling.from).or_default() += bytes;
            }
        }
        sent.into_values().max().unwrap_or(0)
    }

    /// What goes between each two ranks in each wave.
    pub(crate) fn traffic(&self) -> HashMap<(Rank, Rank), Vec<Traffic>> {
        let mut traffic: HashMap<(Rank, Rank), Vec<Traffic>> = HashMap::new();
        for group in &self.groups {
            let spread = group.spread();
            let waves: Vec<u32> =
                group.tensors.iter().map(|&tensor| self.tensors[tensor as usize].wave).collect();
            let mut of_wave: Vec<(u32, u64)> = Vec::new();
            for &wave in &waves {
                match of_wave.last_mut() {
                    Some((last, count)) if *last == wave => *count += 1,
                    _ => of_wave.push((wave, 1)),
                }
            }
            for task in &group.tasks {
                let region = group.region(task);
                let (bytes, runs) =
                    (group.bytes(&region), region.runs(group.crossing.wanted.shape()));
                let mut add = |from: Rank, wave: u32, count: u64| {
                    if from == task.to {
                        return;
                    }
                    let waves = traffic.entry((from, task.to));
                    let waves = waves.or_insert_with(|| vec![Traffic::default(); WAVES as usize]);
                    let of = &mut waves[wave as usize];
                    of.bytes += bytes * count;
                    of.writes += runs * count;
                };
                match &task.senders {
                    Senders::One(from) => {
                        of_wave.iter().for_each(|&(wave, count)| add(*from, wave, count));
                    }
                    many @ Senders::Many(_) => {
                        for (number, &wave) in (0..).zip(&waves) {
                            add(many.of(number, spread), wave, 1);
                        }
                    }
                }
            }
        }
        traffic
    }

    /// The maxima that ranks have to tell one another before a tensor can be encoded in blocks of its granule: for each block
    /// of which several ranks have a part, each rank that sends a part is told what the others find in theirs.
    ///
    /// A part that several ranks hold is looked at by one of those that send it.
    pub fn maxima(&self, tensor: u32) -> Vec<MaximaExchange> {
        let Planned { group, number, .. } = &self.tensors[tensor as usize];
        let group = &self.groups[*group as usize];
        let crossing = &group.crossing;
        if crossing.straddling.is_empty() {
            return Vec::new();
        }
        let spread = group.spread();
        // Of each held box who sends which part of it.
        let mut senders: Vec<Vec<(Rank, TensorBox)>> = vec![Vec::new(); crossing.held.len()];
        for task in &group.tasks {
            let held = crossing.cells[task.cell as usize].held as usize;
            let blocks = group.region(task).in_granules(&crossing.granule);
            senders[held].push((task.senders.of((*number).into(), spread), blocks));
        }
        let mut found = Vec::new();
        for straddling in &crossing.straddling {
            let [one, other] = straddling.pair;
            for (own, theirs) in [(one, other), (other, one)] {
                let holders = &crossing.held[theirs as usize].ranks;
                let from = senders[theirs as usize].iter().map(|(rank, _)| *rank);
                let from = from.min().unwrap_or(holders[0]);
                let touching = senders[own as usize]
                    .iter()
                    .filter(|(_, blocks)| blocks.intersects(&straddling.blocks));
                let mut to: Vec<Rank> = touching.map(|(rank, _)| *rank).collect();
                to.sort_unstable();
                to.dedup();
                // Who holds both parts needs not be told.
                to.retain(|rank| holders.binary_search(rank).is_err());
                found.extend(to.into_iter().zip(iter::repeat(from)).map(|(to, from)| {
                    let blocks = straddling.blocks.clone();
                    MaximaExchange { tensor, from, to, blocks }
                }));
            }
        }
        found
    }
}

/// What goes from one rank to another in a wave.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) bytes: u64,
    /// Runs of bytes that are neighbours in the full tensor.
    pub(crate) writes: u64,
}

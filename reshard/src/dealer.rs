//! Decides who sends each box, in which wave and in which round.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use engine_core::Rank;
use sha2::{Digest, Sha256};

use crate::deal::{Dealt, fill};
use crate::links::{Links, Place, Site};
use crate::plan::{
    CardId, CardLoad, Group, Load, Pair, Planned, Receivers, ReshardPlan, Task, WAVES,
};
use crate::rounds::rounds;

/// A box that replicas share is cut so that a part is at most about one in this many of the bytes that a rank sends on average.
const CUTS_OF_A_LOAD: u64 = 64;
/// A box of at most this many bytes is not cut to even out loads.
const LEAST_CUT: u64 = 64 << 10;

pub(crate) struct Dealer<'a> {
    links: &'a Links,
    places: HashMap<Rank, Place>,
    loads: BTreeMap<Rank, Load>,
    cards: BTreeMap<CardId, CardLoad>,
    pairs: HashMap<(Rank, Rank), u64>,
    sending: Demands,
    receiving: Demands,
}

/// For each set of cards, the bytes that only these can carry.
type Demands = HashMap<Arc<[CardId]>, u64>;

/// How a rank gets a box.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Itself,
    Node,
    Network,
}

/// A task for which there is a choice of senders or of receivers.
struct Pending {
    /// Its group, and its index among the tasks of the group.
    at: (usize, usize),
    way: Way,
    holders: Arc<[Rank]>,
    /// Of one tensor.
    bytes: u64,
}

#[derive(Clone, Copy)]
enum Direction {
    Out,
    In,
}

impl<'a> Dealer<'a> {
    pub(crate) fn new(links: &'a Links) -> Self {
        Self {
            links,
            places: HashMap::new(),
            loads: BTreeMap::new(),
            cards: BTreeMap::new(),
            pairs: HashMap::new(),
            sending: HashMap::new(),
            receiving: HashMap::new(),
        }
    }

    pub(crate) fn deal(
        mut self,
        mut groups: Vec<Group>,
        mut tensors: Vec<Planned>,
        asked: &[u8; 32],
    ) -> ReshardPlan {
        // The wanted bytes divided by the number of ranks that can send: about what each will send.
        let (mut total, mut senders) = (0_u128, HashSet::new());
        let mut bytes = vec![0_u64; tensors.len()];
        for group in &groups {
            let of_cells = group.crossing.cells.iter().map(|cell| {
                let wanted = &group.crossing.wanted.shares()[cell.wanted as usize];
                group.bytes(&cell.region) * wanted.ranks.len() as u64
            });
            let of_one: u64 = of_cells.sum();
            total += u128::from(of_one) * group.tensors.len() as u128;
            group.tensors.iter().for_each(|&tensor| bytes[tensor as usize] = of_one);
            senders.extend(group.crossing.held.iter().flat_map(|s| s.ranks.iter().copied()));
        }
        let most = (total / (senders.len() as u128).max(1)) as u64 / CUTS_OF_A_LOAD;
        waves(&groups, &mut tensors, &bytes);

        let mut pending = Vec::new();
        for (at, group) in groups.iter_mut().enumerate() {
            self.tasks(at, group, most.max(LEAST_CUT), &mut pending);
        }
        // Tasks with few holders and large tasks come first, because they are the hardest to even out.
        pending.sort_by_key(|task: &Pending| (task.holders.len(), Reverse(task.bytes), task.at));
        for Pending { at: (group, place), way, holders, bytes } in pending {
            let count = groups[group].tensors.len() as u64;
            let task = &mut groups[group].tasks[place];
            task.senders = self.share(&holders, way, Direction::Out, count, bytes);
            if let Receivers::Node { entries, all } = &mut task.to {
                *entries = self.share(all, way, Direction::In, count, bytes);
            }
            task.flows(count, |from, to, passed_on, count| {
                self.flow(from, to, if passed_on { Way::Node } else { way }, bytes * count);
            });
        }

        let pairs = self.rounds();
        let bound = bound(&self.sending).max(bound(&self.receiving));
        let digest = digest(asked, &groups, &pairs);
        let card_of =
            self.places.iter().map(|(&rank, place)| (rank, place.card.number())).collect();
        let (loads, cards) = (self.loads, self.cards);
        ReshardPlan { tensors, groups, pairs, loads, cards, card_of, bound, digest }
    }

    fn place(&mut self, rank: Rank) -> Place {
        *self.places.entry(rank).or_insert_with(|| self.links.place(rank))
    }

    /// Makes the tasks of a group. Tasks that leave a choice become pending.
    fn tasks(&mut self, at: usize, group: &mut Group, most: u64, pending: &mut Vec<Pending>) {
        let crossing = group.crossing.clone();
        let mut add = |dealer: &mut Self, cell, way, holders: &Arc<[Rank]>, to: &[Rank]| {
            dealer.add((at, group), (cell, way), holders, to, most, pending);
        };
        for (number, cell) in (0..).zip(&crossing.cells) {
            let holders = &crossing.held[cell.held as usize].ranks;
            let wanted = &crossing.wanted.shares()[cell.wanted as usize].ranks;
            // A box that several ranks of a node want crosses the network once.
            let mut far: BTreeMap<Site, Vec<Rank>> = BTreeMap::new();
            for &to in wanted.iter() {
                match self.candidates(holders, to) {
                    (Way::Network, _) => far.entry(self.place(to).node).or_default().push(to),
                    (way, near) => add(self, number, way, &near, &[to]),
                }
            }
            for ranks in far.into_values() {
                add(self, number, Way::Network, holders, &ranks);
            }
        }
    }

    /// The ranks that can send to a rank: itself, else the holders on its node, else all holders.
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

    /// Adds the tasks of a cell for ranks that get it in the same way.
    fn add(
        &mut self,
        (at, group): (usize, &mut Group),
        (cell, way): (u32, Way),
        holders: &Arc<[Rank]>,
        to: &[Rank],
        most: u64,
        pending: &mut Vec<Pending>,
    ) {
        let count = group.tensors.len() as u64;
        let whole = group.bytes(&group.crossing.cells[cell as usize].region);
        let mut parts = if holders.len() > 1 { parts_of(whole, most) } else { 1 };
        if to.len() as u64 > count {
            // With fewer tensors than ranks of the node that want them, each rank takes a part from the network.
            parts = parts.max(parts_of(whole, LEAST_CUT).min(to.len() as u32));
        }
        if way == Way::Network {
            let all = whole * count;
            let senders = self.cards_of(holders);
            *self.sending.entry(senders).or_default() += all;
            let receivers = self.cards_of(to);
            *self.receiving.entry(receivers).or_default() += all;
        }
        let regions = group.cut(cell, parts);
        let parts = regions.len() as u32;
        for (part, region) in (0..).zip(regions) {
            let bytes = group.bytes(&region);
            let receivers = match *to {
                [only] => Receivers::One(only),
                _ => Receivers::Node { entries: Dealt::One(to[0]), all: to.into() },
            };
            if let ([from], [to]) = (&**holders, to) {
                self.flow(*from, *to, way, bytes * count);
            } else {
                let at = (at, group.tasks.len());
                pending.push(Pending { at, way, holders: holders.clone(), bytes });
            }
            let senders = Dealt::One(holders[0]);
            group.tasks.push(Task { cell, part, parts, senders, to: receivers });
        }
    }

    fn cards_of(&mut self, ranks: &[Rank]) -> Arc<[CardId]> {
        let mut cards: Vec<CardId> =
            ranks.iter().map(|&rank| self.place(rank).card.number()).collect();
        cards.sort_unstable();
        cards.dedup();
        cards.into()
    }

    /// Distributes a task of `count` tensors over ranks: on the network first over their cards, then over the ranks of each card.
    fn share(
        &mut self,
        ranks: &[Rank],
        way: Way,
        direction: Direction,
        count: u64,
        bytes: u64,
    ) -> Dealt {
        let mut sharing: BTreeMap<CardId, Vec<Rank>> = BTreeMap::new();
        for &rank in ranks {
            let card = if way == Way::Network { self.place(rank).card.number() } else { (0, 0) };
            sharing.entry(card).or_default().push(rank);
        }
        let of_card = |card: &CardId| {
            let load = self.cards.get(card).copied().unwrap_or_default();
            match direction {
                Direction::Out => load.sent,
                Direction::In => load.received,
            }
        };
        let of_rank = |rank: &Rank| {
            let load = self.loads.get(rank).copied().unwrap_or_default();
            match (way, direction) {
                (Way::Network, Direction::Out) => load.sent,
                (Way::Network, Direction::In) => load.received,
                (_, Direction::Out) => load.sent_within,
                (_, Direction::In) => load.received_within,
            }
        };
        let mut loads: Vec<u64> = sharing.keys().map(of_card).collect();
        let counts = fill(&mut loads, count, bytes);
        let mut given = Vec::with_capacity(ranks.len());
        for (ranks, count) in sharing.values().zip(counts) {
            let mut loads: Vec<u64> = ranks.iter().map(of_rank).collect();
            given.extend(ranks.iter().copied().zip(fill(&mut loads, count, bytes)));
        }
        Dealt::new(given)
    }

    fn flow(&mut self, from: Rank, to: Rank, way: Way, bytes: u64) {
        if way == Way::Itself {
            self.loads.entry(to).or_default().kept += bytes;
            return;
        }
        *self.pairs.entry((from, to)).or_default() += bytes;
        if way == Way::Node {
            self.loads.entry(from).or_default().sent_within += bytes;
            self.loads.entry(to).or_default().received_within += bytes;
            return;
        }
        let (one, other) = (self.place(from), self.place(to));
        self.loads.entry(from).or_default().sent += bytes;
        self.loads.entry(to).or_default().received += bytes;
        self.cards.entry(one.card.number()).or_default().sent += bytes;
        self.cards.entry(other.card.number()).or_default().received += bytes;
    }

    /// All pairs of ranks with their rounds.
    fn rounds(&mut self) -> Vec<Pair> {
        let mut pairs: Vec<_> = std::mem::take(&mut self.pairs).into_iter().collect();
        // Pairs of about the same size share a round, and each sender begins with a different receiver.
        pairs.sort_unstable_by_key(|&((from, to), bytes)| {
            (Reverse(bytes), to.0.wrapping_sub(from.0), from)
        });
        let numbers = |of: fn(&(Rank, Rank)) -> Rank| number(pairs.iter().map(|(p, _)| of(p)));
        let (from, to) = (numbers(|pair| pair.0), numbers(|pair| pair.1));
        // A round contains only pairs whose sizes are within a factor of two, so that no pair waits for one that has far more to send.
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
        planned.sort_unstable_by_key(|pair| (pair.from, pair.to));
        planned
    }
}

/// The bytes that the busiest card carries at least: the cards of each set share what no other card can carry.
fn bound(demands: &Demands) -> u64 {
    /// With more sets than this, subsets are not searched for: the search is quadratic.
    const MOST_SETS: usize = 2048;

    let within = |inner: &[CardId], outer: &[CardId]| {
        inner.len() < outer.len() && inner.iter().all(|card| outer.binary_search(card).is_ok())
    };
    let all: HashSet<_> = demands.keys().flat_map(|cards| cards.iter()).collect();
    let together = demands.values().sum::<u64>().div_ceil((all.len() as u64).max(1));
    let of_sets = demands.iter().map(|(cards, bytes)| {
        let inner = demands
            .iter()
            .filter(|(other, _)| demands.len() <= MOST_SETS && within(other, cards))
            .map(|(_, bytes)| bytes);
        (inner.sum::<u64>() + bytes).div_ceil(cards.len() as u64)
    });
    of_sets.chain([together]).max().unwrap_or(0)
}

fn parts_of(bytes: u64, most: u64) -> u32 {
    u32::try_from(bytes.div_ceil(most).max(1)).unwrap_or(u32::MAX)
}

/// How many times `bytes` can be doubled without exceeding `most`.
fn size(most: u64, bytes: u64) -> u32 {
    (most / bytes.max(1)).max(1).ilog2()
}

/// Gives each tensor its wave.
fn waves(groups: &[Group], tensors: &mut [Planned], bytes: &[u64]) {
    let families = families(groups, tensors);
    let mut progress: HashMap<u32, Progress> = HashMap::new();
    for (&family, &bytes) in families.iter().zip(bytes) {
        progress.entry(family).or_default().total += u128::from(bytes);
    }
    for ((tensor, family), &bytes) in tensors.iter_mut().zip(families).zip(bytes) {
        let own = progress.entry(family).or_default();
        tensor.wave = own.wave(&tensor.meta.name, bytes);
    }
}

/// The family of each tensor. Tensors that the same ranks hold are of one family.
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

/// How far the tensors of a family are assigned to waves. Each family fills all waves, so that no stage of a pipeline waits for the stages
/// before it.
#[derive(Default)]
struct Progress {
    total: u128,
    before: u128,
    wave: u32,
    /// The layer of the last tensor.
    layer: Option<String>,
}

impl Progress {
    fn wave(&mut self, name: &str, bytes: u64) -> u32 {
        let layer = layer_of(name);
        if layer.is_none() || layer != self.layer.as_deref() {
            let at = self.before * u128::from(WAVES) / self.total.max(1);
            self.wave = at.min(u128::from(WAVES) - 1) as u32;
            self.layer = layer.map(str::to_owned);
        }
        self.before += u128::from(bytes);
        self.wave
    }
}

/// A name up to and including its first number. Tensors that share it are of one layer. A layer stays in one wave, because the ranks get
/// about equal amounts of a whole layer, but not of a part of it.
fn layer_of(name: &str) -> Option<&str> {
    let start = name.find(|c: char| c.is_ascii_digit())?;
    let digits = name[start..].find(|c: char| !c.is_ascii_digit());
    Some(&name[..digits.map_or(name.len(), |end| start + end)])
}

/// Numbers the ranks from 0, in ascending order.
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
            add(task.cell.into());
            add(u64::from(task.part) << 32 | u64::from(task.parts));
            let count = group.tensors.len() as u64;
            let mut dealt = |dealt: &Dealt| {
                for (end, rank) in dealt.ends(count) {
                    add(end);
                    add(rank.0.into());
                }
            };
            dealt(&task.senders);
            match &task.to {
                Receivers::One(to) => dealt(&Dealt::One(*to)),
                Receivers::Node { entries, all } => {
                    dealt(entries);
                    all.iter().for_each(|rank| add(rank.0.into()));
                }
            }
        }
    }
    for pair in pairs {
        add(u64::from(pair.from.0) << 32 | u64::from(pair.to.0));
        add(pair.round.into());
    }
    Sha256::digest(&bytes).into()
}

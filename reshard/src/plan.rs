//! The plan: which box goes from whom to whom, and when.

use std::collections::{BTreeMap, HashMap};
use std::iter;
use std::sync::Arc;

use engine_core::{Rank, TensorBox, TensorMeta};

use crate::crossing::{Crossing, cut};
use crate::deal::{Dealt, Spread};

/// The number of waves. The tensors that the same ranks hold are divided, in their order, into waves of about equal size. A layer is not
/// split between waves.
pub const WAVES: u32 = 16;

/// Who sends which box to whom: the same on every rank that knows the same boxes and links.
///
/// Every element that a rank wants reaches it exactly once. The plan is compact: a box that the same ranks hold and want in many tensors is
/// stored once.
#[derive(Debug)]
pub struct ReshardPlan {
    pub(crate) tensors: Vec<Planned>,
    pub(crate) groups: Vec<Group>,
    /// All (sender, receiver) with their bytes and round, ascending.
    pub(crate) pairs: Vec<Pair>,
    pub(crate) loads: BTreeMap<Rank, Load>,
    pub(crate) cards: BTreeMap<CardId, CardLoad>,
    pub(crate) card_of: BTreeMap<Rank, CardId>,
    pub(crate) bound: u64,
    pub(crate) digest: [u8; 32],
}

#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) meta: TensorMeta,
    pub(crate) wave: u32,
    /// Its group, and its number there.
    pub(crate) group: u32,
    pub(crate) number: u32,
}

/// Tensors of the same shape and type that are held and wanted in the same way.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) crossing: Arc<Crossing>,
    pub(crate) bits: u64,
    /// Indices among all tensors, ascending.
    pub(crate) tensors: Vec<u32>,
    pub(crate) tasks: Vec<Task>,
}

/// A box of every tensor of a group, which one rank, or several ranks of a node, get from one of several replicas.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) cell: u32,
    /// The cell is cut in `parts`, of which this is `part`.
    pub(crate) part: u32,
    pub(crate) parts: u32,
    pub(crate) senders: Dealt,
    pub(crate) to: Receivers,
}

#[derive(Debug)]
pub(crate) enum Receivers {
    One(Rank),
    /// One of the ranks gets the box, and passes it on to the others.
    Node {
        entries: Dealt,
        all: Arc<[Rank]>,
    },
}

impl Task {
    /// Calls `each` with the sender, the receiver and whether the sender passes on what it received, for one tensor of the group.
    fn of(&self, number: u64, spread: Spread, mut each: impl FnMut(Rank, Rank, bool)) {
        let from = self.senders.of(number, spread);
        match &self.to {
            Receivers::One(to) => each(from, *to, false),
            Receivers::Node { entries, all } => {
                let entry = entries.of(number, spread);
                each(from, entry, false);
                all.iter().filter(|to| **to != entry).for_each(|to| each(entry, *to, true));
            }
        }
    }

    /// As `of`, for all `count` tensors of the group. `each` also gets the number of tensors that take this way.
    pub(crate) fn flows(&self, count: u64, mut each: impl FnMut(Rank, Rank, bool, u64)) {
        match &self.to {
            Receivers::One(to) => {
                let flows = self.senders.beside(&Dealt::One(*to), count);
                flows.into_iter().for_each(|(from, to, count)| each(from, to, false, count));
            }
            Receivers::Node { entries, all } => {
                for (from, entry, count) in self.senders.beside(entries, count) {
                    each(from, entry, false, count);
                    let others = all.iter().filter(|to| **to != entry);
                    others.for_each(|to| each(entry, *to, true, count));
                }
            }
        }
    }

    fn may_send(&self, rank: Rank) -> bool {
        let passes_on = match &self.to {
            Receivers::One(_) => false,
            Receivers::Node { entries, .. } => entries.has(rank),
        };
        passes_on || self.senders.has(rank)
    }

    fn gets(&self, rank: Rank) -> bool {
        self.receivers().contains(&rank)
    }

    fn receivers(&self) -> &[Rank] {
        match &self.to {
            Receivers::One(to) => std::slice::from_ref(to),
            Receivers::Node { all, .. } => all,
        }
    }
}

impl Group {
    /// Cuts a cell into at most `parts` boxes.
    pub(crate) fn cut(&self, cell: u32, parts: u32) -> Vec<TensorBox> {
        cut(&self.crossing.cells[cell as usize].region, &self.crossing.granule, parts, self.bits)
    }

    fn region(&self, task: &Task) -> TensorBox {
        self.cut(task.cell, task.parts).swap_remove(task.part as usize)
    }

    fn spread(&self) -> Spread {
        Spread::new(self.tensors.len() as u64)
    }

    /// Bytes of a box of one tensor.
    pub(crate) fn bytes(&self, region: &TensorBox) -> u64 {
        (u128::from(region.elements()) * u128::from(self.bits)).div_ceil(8) as u64
    }
}

/// The unique number of a network card.
pub(crate) type CardId = (u8, u32);

/// A box on its way from one rank to another.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transfer {
    /// Which [tensor](ReshardPlan::tensor).
    pub tensor: u32,
    /// The part of the full tensor.
    pub region: TensorBox,
    /// The rank that sends it.
    pub from: Rank,
    /// The rank that wants it. It equals `from` if the rank holds what it wants.
    pub to: Rank,
    /// Whether the sender receives the box from another rank first and passes it on within its node, encoded as it arrived.
    pub passed_on: bool,
    /// Tensors travel in waves, in their order. A box is passed on one wave after it arrives.
    pub wave: u32,
    /// The round within the wave. In each round a rank sends to at most one rank, and receives from at most one.
    pub round: u32,
}

/// Largest magnitudes of blocks that one rank sends to another, because both hold a part of each block.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MaximaExchange {
    /// Which [tensor](ReshardPlan::tensor).
    pub tensor: u32,
    /// The rank that sends the maxima of its part.
    pub from: Rank,
    /// The rank that sends elements of the blocks, and needs the maxima first.
    pub to: Rank,
    /// The blocks, counted in granules.
    pub blocks: TensorBox,
}

/// Bytes that a rank sends and receives in an update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Load {
    /// To ranks of other nodes.
    pub sent: u64,
    /// From ranks of other nodes.
    pub received: u64,
    /// To ranks of its node.
    pub sent_within: u64,
    /// From ranks of its node.
    pub received_within: u64,
    /// Wanted bytes that the rank holds itself.
    pub kept: u64,
}

/// Bytes of one network card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CardLoad {
    /// To other nodes.
    pub sent: u64,
    /// From other nodes.
    pub received: u64,
}

/// A rank that sends to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pair {
    /// The sender.
    pub from: Rank,
    /// The receiver.
    pub to: Rank,
    /// Bytes that the sender sends to the receiver in an update.
    pub bytes: u64,
    /// The round of each wave in which the pair transfers.
    pub round: u32,
    /// Whether they are on one node.
    pub within_node: bool,
}

impl ReshardPlan {
    /// A digest of the plan and of all that it depends on. Ranks with the same digest have the same plan.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The tensors that somebody wants, in the order in which they travel.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorMeta> {
        self.tensors.iter().map(|tensor| &tensor.meta)
    }

    /// The tensor of this number, with the type in which it travels.
    ///
    /// # Panics
    ///
    /// If the plan has no tensor of this number.
    pub fn tensor(&self, number: u32) -> &TensorMeta {
        &self.tensors[number as usize].meta
    }

    /// The pairs of ranks that transfer, ordered by sender and receiver. What a rank holds itself is not included.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// The load of a rank.
    pub fn load(&self, rank: Rank) -> Load {
        self.loads.get(&rank).copied().unwrap_or_default()
    }

    /// Every rank that sends or receives anything, with its load.
    pub fn loads(&self) -> impl ExactSizeIterator<Item = (Rank, Load)> {
        self.loads.iter().map(|(&rank, &load)| (rank, load))
    }

    /// The load of every network card, in no particular order.
    pub fn cards(&self) -> impl ExactSizeIterator<Item = CardLoad> {
        self.cards.values().copied()
    }

    /// Bytes of the busiest network card in one direction.
    pub fn busiest(&self) -> u64 {
        self.cards().map(|card| card.sent.max(card.received)).max().unwrap_or(0)
    }

    /// A lower bound on [`busiest`](Self::busiest): bytes that the busiest network card carries in every plan with these rules. A rank gets
    /// a box from a rank that holds it, or from a rank of its node that wants it, too. It gets the box within its node if a rank there
    /// holds it.
    pub fn lower_bound(&self) -> u64 {
        self.bound
    }

    /// The transfers from a rank, in the order in which it should send them.
    pub fn transfers_from(&self, rank: Rank) -> Vec<Transfer> {
        self.collect(|task| task.may_send(rank), |transfer| transfer.from == rank)
    }

    /// The transfers to a rank, in the order in which they are sent.
    pub fn transfers_to(&self, rank: Rank) -> Vec<Transfer> {
        self.collect(|task| task.gets(rank), |transfer| transfer.to == rank)
    }

    /// The number of transfers, including those from a rank to itself.
    pub fn transfers(&self) -> u64 {
        let of = |group: &Group| {
            let tasks = group.tasks.iter().map(|task| task.receivers().len() as u64);
            tasks.sum::<u64>() * group.tensors.len() as u64
        };
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
                    let wave = self.tensors[tensor as usize].wave;
                    task.of(number, spread, |from, to, passed_on| {
                        let wave = wave + u32::from(passed_on);
                        let (region, round) = (region.clone(), self.round(from, to));
                        let found = Transfer { tensor, region, from, to, passed_on, wave, round };
                        if transfer(&found) {
                            all.push(found);
                        }
                    });
                }
            }
        }
        // The sort is stable, so that boxes of a tensor keep their order.
        all.sort_by_key(|transfer| {
            (transfer.wave, transfer.round, transfer.from, transfer.to, transfer.tensor)
        });
        all
    }

    fn round(&self, from: Rank, to: Rank) -> u32 {
        let found = self.pairs.binary_search_by_key(&(from, to), |pair| (pair.from, pair.to));
        found.map_or(0, |at| self.pairs[at].round)
    }

    /// The card of a rank that sends or receives something.
    pub(crate) fn card_of(&self, rank: Rank) -> CardId {
        self.card_of.get(&rank).copied().unwrap_or((1, rank.0))
    }

    /// Bytes of maxima that the busiest rank sends, at four bytes for each block and each rank that needs it. The first tensor of a group
    /// stands for all its tensors.
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

    /// What each rank sends to each other rank in each wave.
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
                let mut add = |from: Rank, to: Rank, wave: u32, count: u64| {
                    if from == to {
                        return;
                    }
                    let waves = traffic.entry((from, to));
                    let waves =
                        waves.or_insert_with(|| vec![Traffic::default(); WAVES as usize + 1]);
                    let of = &mut waves[wave as usize];
                    of.bytes += bytes * count;
                    of.writes += runs * count;
                };
                if let (Dealt::One(from), Receivers::One(to)) = (&task.senders, &task.to) {
                    of_wave.iter().for_each(|&(wave, count)| add(*from, *to, wave, count));
                    continue;
                }
                for (number, &wave) in (0..).zip(&waves) {
                    task.of(number, spread, |from, to, passed_on| {
                        add(from, to, wave + u32::from(passed_on), 1);
                    });
                }
            }
        }
        traffic
    }

    /// The maxima that ranks must exchange before a tensor can be encoded in blocks of its granule. For each block of which several ranks
    /// hold a part, each rank that sends a part needs the maxima of the other parts.
    ///
    /// If several ranks hold a part, the lowest rank that sends it computes its maxima, or the lowest holder if none sends it.
    pub fn maxima(&self, tensor: u32) -> Vec<MaximaExchange> {
        let Planned { group, number, .. } = &self.tensors[tensor as usize];
        let group = &self.groups[*group as usize];
        let crossing = &group.crossing;
        if crossing.straddling.is_empty() {
            return Vec::new();
        }
        let spread = group.spread();
        // For each held box, the senders and the blocks that each of them sends.
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
                // A rank that holds both parts needs no message.
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

/// What one rank sends to another in a wave.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) bytes: u64,
    /// Runs of bytes that are contiguous in the full tensor.
    pub(crate) writes: u64,
}

//! Sets of ranks and values of ranks. Their costs grow with blocks of 64 neighbouring ranks, not with ranks.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::{Deserialize, Serialize};

use crate::Rank;

/// The members of a block.
const BLOCK: u32 = u64::BITS;

/// A set of ranks.
pub type RankSet = BitSet<Rank>;

/// A set of ranks, or of other numbers of 32 bits, with a bit for each number. Blocks of 64 numbers without a member take
/// no memory, so members may lie anywhere.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(
    try_from = "Vec<(u32, u64)>",
    into = "Vec<(u32, u64)>",
    bound(serialize = "T: Clone", deserialize = "")
)]
pub struct BitSet<T> {
    /// The blocks that have members, in ascending order.
    blocks: Vec<(u32, u64)>,
    of: PhantomData<T>,
}

impl<T> Default for BitSet<T> {
    fn default() -> Self {
        Self { blocks: Vec::new(), of: PhantomData }
    }
}

fn place(number: u32) -> (u32, u64) {
    (number / BLOCK, 1 << (number % BLOCK))
}

fn numbers((block, mut bits): (u32, u64)) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let next = (bits != 0).then(|| block * BLOCK + bits.trailing_zeros());
        bits &= bits.wrapping_sub(1);
        next
    })
}

impl<T: Copy + From<u32> + Into<u32>> BitSet<T> {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether it has no member.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// How many members it has.
    pub fn len(&self) -> usize {
        self.blocks.iter().map(|(_, bits)| bits.count_ones() as usize).sum()
    }

    /// Whether this is a member.
    pub fn contains(&self, member: T) -> bool {
        let (block, bit) = place(member.into());
        self.at(block).is_ok_and(|at| self.blocks[at].1 & bit != 0)
    }

    /// The least member.
    pub fn first(&self) -> Option<T> {
        self.iter().next()
    }

    /// The members, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = T> + '_ {
        self.blocks.iter().copied().flat_map(numbers).map(T::from)
    }

    /// Adds a member. Returns whether it is new.
    pub fn insert(&mut self, member: T) -> bool {
        let (block, bit) = place(member.into());
        match self.at(block) {
            Ok(at) => {
                let is_new = self.blocks[at].1 & bit == 0;
                self.blocks[at].1 |= bit;
                is_new
            }
            Err(at) => {
                self.blocks.insert(at, (block, bit));
                true
            }
        }
    }

    /// Removes a member. Returns whether it was one.
    pub fn remove(&mut self, member: T) -> bool {
        let (block, bit) = place(member.into());
        let Ok(at) = self.at(block) else { return false };
        let was_there = self.blocks[at].1 & bit != 0;
        self.blocks[at].1 &= !bit;
        if self.blocks[at].1 == 0 {
            self.blocks.remove(at);
        }
        was_there
    }

    /// Removes the least member.
    pub fn pop_first(&mut self) -> Option<T> {
        let first = self.first()?;
        self.remove(first);
        Some(first)
    }

    /// The members of both sets.
    #[must_use]
    pub fn common(&self, other: &Self) -> Self {
        // Each block of the smaller set is looked up in the larger one.
        let (few, many) =
            if self.blocks.len() <= other.blocks.len() { (self, other) } else { (other, self) };
        let both = few.blocks.iter().filter_map(|(block, bits)| {
            let bits = bits & many.blocks[many.at(*block).ok()?].1;
            (bits != 0).then_some((*block, bits))
        });
        Self { blocks: both.collect(), of: PhantomData }
    }

    /// Removes the members of another set.
    pub fn subtract(&mut self, other: &Self) {
        let mut is_emptied = false;
        for (block, bits) in &other.blocks {
            if let Ok(at) = self.at(*block) {
                self.blocks[at].1 &= !bits;
                is_emptied |= self.blocks[at].1 == 0;
            }
        }
        if is_emptied {
            self.blocks.retain(|(_, bits)| *bits != 0);
        }
    }

    /// Adds the members of another set.
    pub fn unite(&mut self, other: &Self) {
        for &(block, bits) in &other.blocks {
            match self.at(block) {
                Ok(at) => self.blocks[at].1 |= bits,
                Err(at) => self.blocks.insert(at, (block, bits)),
            }
        }
    }

    /// The number of blocks of 64 that have members. The set's memory and its written form grow with it.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The set in parts of at most so many blocks.
    pub fn parts(&self, blocks: usize) -> impl Iterator<Item = Self> + '_ {
        let parts = self.blocks.chunks(blocks.max(1));
        parts.map(|part| Self { blocks: part.to_vec(), of: PhantomData })
    }

    fn at(&self, block: u32) -> Result<usize, usize> {
        self.blocks.binary_search_by_key(&block, |(block, _)| *block)
    }
}

impl<T: Copy + From<u32> + Into<u32> + fmt::Debug> fmt::Debug for BitSet<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl<T: Copy + From<u32> + Into<u32>> Extend<T> for BitSet<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, members: I) {
        for member in members {
            self.insert(member);
        }
    }
}

impl<T: Copy + From<u32> + Into<u32>> FromIterator<T> for BitSet<T> {
    fn from_iter<I: IntoIterator<Item = T>>(members: I) -> Self {
        let mut set = Self::default();
        set.extend(members);
        set
    }
}

impl<T: Copy + From<u32> + Into<u32>, const N: usize> From<[T; N]> for BitSet<T> {
    fn from(members: [T; N]) -> Self {
        members.into_iter().collect()
    }
}

impl<T> From<BitSet<T>> for Vec<(u32, u64)> {
    fn from(set: BitSet<T>) -> Self {
        set.blocks
    }
}

impl<T> TryFrom<Vec<(u32, u64)>> for BitSet<T> {
    type Error = &'static str;

    fn try_from(blocks: Vec<(u32, u64)>) -> Result<Self, Self::Error> {
        let is_ascending = blocks.is_sorted_by(|(a, _), (b, _)| a < b);
        let are_possible =
            blocks.iter().all(|(block, bits)| *block <= u32::MAX / BLOCK && *bits != 0);
        match is_ascending && are_possible {
            true => Ok(Self { blocks, of: PhantomData }),
            false => Err("blocks of a set that are empty, too high or not in ascending order"),
        }
    }
}

/// A value for each of many ranks. Ranks of a block that have the same value share it, so what happens to all of them
/// costs as much as what happens to one.
#[derive(Clone, Debug)]
pub struct RankMap<V> {
    /// The values of each block, with the ranks that have them. No rank has two.
    blocks: BTreeMap<u32, Vec<(V, u64)>>,
}

impl<V> Default for RankMap<V> {
    fn default() -> Self {
        Self { blocks: BTreeMap::new() }
    }
}

impl<V: Clone + PartialEq> RankMap<V> {
    /// The value of a rank.
    pub fn get(&self, rank: Rank) -> Option<&V> {
        let (block, bit) = place(rank.0);
        let values = self.blocks.get(&block)?;
        values.iter().find(|(_, bits)| bits & bit != 0).map(|(value, _)| value)
    }

    /// The values that ranks have. Ranks of different blocks may have equal ones.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.blocks.values().flatten().map(|(value, _)| value)
    }

    /// Gives ranks a value.
    pub fn set(&mut self, ranks: &RankSet, value: &V) {
        self.update(ranks, |_| Some(value.clone()));
    }

    /// Gives each of these ranks the value that `next` makes of its value. `None` is no value.
    pub fn update(&mut self, ranks: &RankSet, mut next: impl FnMut(Option<&V>) -> Option<V>) {
        for &(block, changed) in &ranks.blocks {
            let old = self.blocks.remove(&block).unwrap_or_default();
            let mut new: Vec<(V, u64)> = Vec::with_capacity(old.len() + 1);
            let mut add = |value: V, bits: u64| match new.iter_mut().find(|(v, _)| *v == value) {
                _ if bits == 0 => {}
                Some((_, all)) => *all |= bits,
                None => new.push((value, bits)),
            };
            let mut without = changed;
            for (value, bits) in old {
                without &= !bits;
                if bits & changed != 0
                    && let Some(value) = next(Some(&value))
                {
                    add(value, bits & changed);
                }
                add(value, bits & !changed);
            }
            if without != 0
                && let Some(value) = next(None)
            {
                add(value, without);
            }
            if !new.is_empty() {
                self.blocks.insert(block, new);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Ranks of few blocks, one of them the last.
    fn rank() -> impl Strategy<Value = Rank> {
        prop_oneof![0..200_u32, u32::MAX - 70..=u32::MAX].prop_map(Rank)
    }

    fn ranks() -> impl Strategy<Value = BTreeSet<Rank>> {
        prop::collection::btree_set(rank(), 0..40)
    }

    fn set(ranks: &BTreeSet<Rank>) -> RankSet {
        ranks.iter().copied().collect()
    }

    fn members(set: &RankSet) -> BTreeSet<Rank> {
        let members: Vec<_> = set.iter().collect();
        assert!(members.is_sorted());
        members.into_iter().collect()
    }

    proptest! {
        #[test]
        fn a_set_is_what_a_tree_of_its_members_is(a in ranks(), b in ranks(), one in rank()) {
            let (mut left, right) = (set(&a), set(&b));
            prop_assert_eq!(members(&left), a.clone());
            prop_assert_eq!((left.len(), left.is_empty(), left.first()), (a.len(), a.is_empty(), a.first().copied()));
            prop_assert_eq!(left.contains(one), a.contains(&one));
            let parts: Vec<_> = left.parts(2).collect();
            prop_assert!(parts.iter().all(|part| (1..=2).contains(&part.blocks())));
            prop_assert_eq!(parts.iter().flat_map(RankSet::iter).collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(members(&left.common(&right)), &a & &b);
            let mut both = left.clone();
            both.unite(&right);
            prop_assert_eq!(members(&both), &a | &b);
            both.subtract(&right);
            prop_assert_eq!(&both, &set(&(&a - &b)));
            let mut tree = a;
            prop_assert_eq!(left.remove(one), tree.remove(&one));
            prop_assert_eq!(&left, &set(&tree));
            prop_assert_eq!(left.pop_first(), tree.pop_first());
            prop_assert_eq!(left.insert(one), tree.insert(one));
            prop_assert_eq!(members(&left), tree);
        }

        #[test]
        fn a_set_survives_being_written_and_read(a in ranks()) {
            let json = serde_json::to_string(&set(&a)).unwrap();
            prop_assert_eq!(serde_json::from_str::<RankSet>(&json).unwrap(), set(&a));
        }

        #[test]
        fn a_set_that_is_read_from_any_blocks_is_a_set_or_refused(
            blocks in prop::collection::vec((prop_oneof![0..3_u32, (1_u32 << 26) - 2..=1 << 26], 0..3_u64), 0..4),
        ) {
            if let Ok(read) = RankSet::try_from(blocks) {
                prop_assert_eq!(&read, &set(&members(&read)));
            }
        }

        #[test]
        fn each_rank_has_the_value_that_it_was_given_last(
            given in prop::collection::vec((ranks(), 0..4_u8), 0..12),
        ) {
            let (mut map, mut tree) = (RankMap::default(), BTreeMap::<Rank, u8>::new());
            for (ranks, with) in &given {
                // Each value is increased, or taken away if it is large.
                let next = |value: Option<&u8>| Some(value.map_or(*with, |v| v + with)).filter(|v| *v < 5);
                map.update(&set(ranks), next);
                for rank in ranks {
                    match next(tree.get(rank)) {
                        Some(value) => drop(tree.insert(*rank, value)),
                        None => drop(tree.remove(rank)),
                    }
                }
                for rank in given.iter().flat_map(|(ranks, _)| ranks) {
                    prop_assert_eq!(map.get(*rank), tree.get(rank));
                }
                let values = |values: &mut dyn Iterator<Item = &u8>| values.copied().collect::<BTreeSet<_>>();
                prop_assert_eq!(values(&mut map.values()), values(&mut tree.values()));
            }
        }
    }
}

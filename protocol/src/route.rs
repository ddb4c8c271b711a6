//! Who fetches which bucket from whom, and when: for transports whose receivers fetch a bucket from any
//! rank that has it.
//!
//! No IO and no clock: the leader tells it what happened, and it says which fetches are due.
//!
//! The ranks form a tree with the trainer at its root (`tree.rs`): a star, a chain (the part of a ring that is left
//! when all bytes have one origin), or something in between. A bucket lies in the same slot on every rank. A rank
//! keeps a bucket until nobody on it reads the bucket any more and its children *and their children* have it. So when
//! a rank dies, its children find the buckets that they lack at its parent, and go on there.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use engine_core::Rank;

/// The shape of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Topology {
    /// Every receiver fetches from the trainer.
    Star,
    /// Every receiver fetches from the one before it, the first from the trainer: the time of an
    /// update hardly grows with the number of receivers.
    Ring,
    /// The tree that a model of an update's time finds fastest, from the number of buckets in the last update, the
    /// receivers and their hosts: a chain for many buckets, a wider tree for few, within hosts wherever possible.
    Fastest,
}

/// A fetch that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) by: Rank,
    pub(super) from: Rank,
    pub(super) bucket: u64,
}

/// A bucket that a rank needs and its new parent no longer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub(super) rank: Rank,
    pub(super) bucket: u64,
}

/// The state of one update.
#[derive(Debug)]
pub(super) struct Route {
    slots: u64,
    nodes: BTreeMap<Rank, Node>,
}

#[derive(Debug, Default)]
struct Node {
    /// `None` for the trainer.
    parent: Option<Rank>,
    children: Vec<Rank>,
    /// The buckets below this number were begun: the rank was told to fetch them, or the trainer to fill them.
    begun: u64,
    /// The buckets below this number are here, or were.
    has: u64,
    /// The buckets above that number that are here already.
    early: BTreeSet<u64>,
    /// The highest value that `begun` ever had: below it, slots are known to be free for their buckets.
    given: u64,
    /// The buckets that are read on this rank.
    viewed: BTreeSet<u64>,
}

impl Route {
    /// The routes along a tree: pairs of a receiver and its source, parents first. `first` is the first bucket that takes them.
    /// Nothing of the buckets before it is fetched or read any more.
    pub(super) fn new(
        slots: u64,
        first: u64,
        tree: impl IntoIterator<Item = (Rank, Rank)>,
    ) -> Self {
        let node =
            |parent| Node { parent, begun: first, has: first, given: first, ..Node::default() };
        let mut nodes = BTreeMap::from([(Rank::LEADER, node(None))]);
        for (rank, parent) in tree {
            nodes.insert(rank, node(Some(parent)));
            if let Some(node) = nodes.get_mut(&parent) {
                node.children.push(rank);
            }
        }
        Self { slots, nodes }
    }

    /// Whether every rank has all buckets so far and reads none of them, so that later ones may take other routes.
    pub(super) fn is_quiet(&self) -> bool {
        let filled = self.nodes.get(&Rank::LEADER).map_or(0, |leader| leader.begun);
        self.nodes.values().all(|node| node.has == filled && node.viewed.is_empty())
    }

    /// A receiver that has not fetched or still reads a bucket.
    pub(super) fn unquiet(&self) -> Option<Rank> {
        let filled = self.nodes.get(&Rank::LEADER).map_or(0, |leader| leader.begun);
        let mut receivers = self.nodes.iter().filter(|(_, node)| node.parent.is_some());
        receivers
            .find(|(_, node)| node.has < filled || !node.viewed.is_empty())
            .map(|(rank, _)| *rank)
    }

    /// Whether the trainer may write this bucket to its slot.
    pub(super) fn may_fill(&self, bucket: u64) -> bool {
        self.nodes.get(&Rank::LEADER).is_some_and(|leader| self.is_free(leader, bucket))
    }

    /// The trainer begins to write a bucket to its slot.
    pub(super) fn filling(&mut self, bucket: u64) {
        if let Some(leader) = self.nodes.get_mut(&Rank::LEADER) {
            leader.begun = bucket + 1;
        }
    }

    /// The trainer has a bucket.
    pub(super) fn filled(&mut self, bucket: u64) {
        if let Some(leader) = self.nodes.get_mut(&Rank::LEADER) {
            leader.has = bucket + 1;
        }
    }

    /// A receiver has a bucket, and reads it. Returns whether that is new.
    pub(super) fn arrived(&mut self, rank: Rank, bucket: u64) -> bool {
        let Some(node) = self.nodes.get_mut(&rank) else { return false };
        // A bucket that it was never told to fetch, or has had already, is not new.
        if bucket >= node.given || bucket < node.has || !node.early.insert(bucket) {
            return false;
        }
        node.viewed.insert(bucket);
        while node.early.remove(&node.has) {
            node.has += 1;
        }
        node.begun = node.begun.max(node.has);
        true
    }

    /// A receiver no longer reads a bucket. Returns whether it did.
    pub(super) fn released(&mut self, rank: Rank, bucket: u64) -> bool {
        self.nodes.get_mut(&rank).is_some_and(|node| node.viewed.remove(&bucket))
    }

    /// A fetch failed. If its source is still the receiver's parent, the receiver goes on at the
    /// parent of the source.
    ///
    /// # Errors
    ///
    /// The gap, if the new parent no longer has the bucket that the receiver needs, or if the source
    /// was the trainer, which has no parent.
    pub(super) fn missed(&mut self, rank: Rank, from: Rank) -> Result<(), Gap> {
        let Some(node) = self.nodes.get(&rank) else { return Ok(()) };
        if node.parent != Some(from) {
            return Ok(());
        }
        let gap = Gap { rank, bucket: node.has };
        let above = self.nodes.get(&from).and_then(|source| source.parent).ok_or(gap)?;
        if let Some(source) = self.nodes.get_mut(&from) {
            source.children.retain(|child| *child != rank);
        }
        self.adopt(above, rank)
    }

    /// A receiver is gone: its children go on at its parent.
    ///
    /// # Errors
    ///
    /// The first gap, if the new parent no longer has the buckets that they need.
    pub(super) fn remove(&mut self, rank: Rank) -> Result<(), Gap> {
        let Some(node) = self.nodes.remove(&rank) else { return Ok(()) };
        let Some(parent) = node.parent else { return Ok(()) };
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children.retain(|child| *child != rank);
        }
        node.children.into_iter().try_for_each(|child| self.adopt(parent, child))
    }

    fn adopt(&mut self, parent: Rank, child: Rank) -> Result<(), Gap> {
        let slots = self.slots;
        let Some(node) = self.nodes.get_mut(&child) else { return Ok(()) };
        node.parent = Some(parent);
        // Fetches under way have to start again at the new parent.
        node.begun = node.has;
        let needed = node.has;
        let Some(parent) = self.nodes.get_mut(&parent) else { return Ok(()) };
        parent.children.push(child);
        // The slot of the needed bucket may hold a later one already.
        if parent.begun > needed + slots {
            return Err(Gap { rank: child, bucket: needed });
        }
        Ok(())
    }

    /// The next fetch that is due. It counts as begun from now on.
    pub(super) fn next_due(&mut self) -> Option<Due> {
        let due = self.nodes.iter().find_map(|(&by, node)| {
            let from = node.parent?;
            let source = self.nodes.get(&from)?;
            let bucket = (node.begun..).find(|bucket| !node.early.contains(bucket))?;
            let there = bucket < source.has || source.early.contains(&bucket);
            let here = bucket < node.given || self.is_free(node, bucket);
            (there && here).then_some(Due { by, from, bucket })
        })?;
        let node = self.nodes.get_mut(&due.by)?;
        node.begun = due.bucket + 1;
        node.given = node.given.max(node.begun);
        Some(due)
    }

    /// Whether a bucket's slot on a rank is free for it.
    fn is_free(&self, node: &Node, bucket: u64) -> bool {
        let Some(old) = bucket.checked_sub(self.slots) else { return true };
        let has = |rank: &Rank| self.nodes.get(rank).is_none_or(|node| old < node.has);
        let below = |rank: &Rank| self.nodes.get(rank).map_or(&[][..], |node| &node.children);
        !node.viewed.contains(&old)
            && node.children.iter().all(|child| has(child) && below(child).iter().all(has))
    }

    /// The receiver that the others wait for: one that is fetching, else one that reads the bucket
    /// whose slot its next bucket needs.
    pub(super) fn awaited(&self) -> Option<Rank> {
        let receivers = || self.nodes.iter().filter(|(_, node)| node.parent.is_some());
        let fetches = receivers().find(|(_, node)| node.has < node.begun);
        let reads = || {
            receivers().find(|(_, node)| {
                let next = node.begun.checked_sub(self.slots);
                next.is_some_and(|old| node.viewed.contains(&old))
            })
        };
        fetches.or_else(reads).map(|(rank, _)| *rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Site, plan};
    use proptest::prelude::*;

    const SLOTS: u64 = 4;

    fn any_topology() -> impl Strategy<Value = Topology> {
        prop_oneof![Just(Topology::Star), Just(Topology::Ring), Just(Topology::Fastest)]
    }

    fn route(topology: Topology, slots: u64, buckets: u64, receivers: u32) -> Route {
        let sites = (1..=receivers).map(|rank| Site { rank: Rank(rank), host: rank % 3 });
        let sites: Vec<Site> = sites.collect();
        Route::new(slots, 0, plan(topology, buckets, 0, &sites, &BTreeSet::new()))
    }

    /// Ranks with slots. Each fetch copies the number of a bucket, and checks that it is the
    /// one that was due.
    struct World {
        route: Route,
        slots: BTreeMap<Rank, Vec<Option<u64>>>,
        received: BTreeMap<Rank, Vec<u64>>,
        under_way: Vec<Due>,
        reading: Vec<(Rank, u64)>,
        filled: u64,
    }

    impl World {
        fn new(topology: Topology, buckets: u64, receivers: u32) -> Self {
            let ranks = || (0..=receivers).map(Rank);
            Self {
                route: route(topology, SLOTS, buckets, receivers),
                slots: ranks().map(|rank| (rank, vec![None; SLOTS as usize])).collect(),
                received: ranks().skip(1).map(|rank| (rank, Vec::new())).collect(),
                under_way: Vec::new(),
                reading: Vec::new(),
                filled: 0,
            }
        }

        fn pump(&mut self) {
            while let Some(due) = self.route.next_due() {
                let reads = (due.by, due.bucket.wrapping_sub(SLOTS));
                assert!(!self.reading.contains(&reads), "{due:?} overwrites what is read");
                self.under_way.retain(|old| (old.by, old.bucket) != (due.by, due.bucket));
                self.under_way.push(due);
            }
        }

        /// Lets one thing happen, picked by `choice`. Returns false if nothing can happen.
        fn step(&mut self, choice: usize, buckets: u64) -> bool {
            let may_fill = self.filled < buckets && self.route.may_fill(self.filled);
            let options = usize::from(may_fill) + self.under_way.len() + self.reading.len();
            if options == 0 {
                return false;
            }
            let mut choice = choice % options;
            if may_fill && choice == 0 {
                let bucket = self.filled;
                self.route.filling(bucket);
                self.slots.get_mut(&Rank::LEADER).unwrap()[(bucket % SLOTS) as usize] =
                    Some(bucket);
                self.route.filled(bucket);
                self.filled += 1;
            } else {
                choice -= usize::from(may_fill);
                if choice < self.under_way.len() {
                    let due = self.under_way.remove(choice);
                    let slot = (due.bucket % SLOTS) as usize;
                    let bytes = self.slots[&due.from][slot];
                    assert_eq!(bytes, Some(due.bucket), "{due:?} finds another bucket");
                    self.slots.get_mut(&due.by).unwrap()[slot] = bytes;
                    self.received.get_mut(&due.by).unwrap().push(due.bucket);
                    self.route.arrived(due.by, due.bucket);
                    self.reading.push((due.by, due.bucket));
                } else {
                    let (rank, bucket) = self.reading.remove(choice - self.under_way.len());
                    self.route.released(rank, bucket);
                }
            }
            self.pump();
            true
        }

        fn kill(&mut self, rank: Rank) -> Result<(), Gap> {
            self.slots.remove(&rank);
            self.received.remove(&rank);
            self.reading.retain(|(reader, _)| *reader != rank);
            self.under_way.retain(|due| due.by != rank && due.from != rank);
            self.route.remove(rank)?;
            self.pump();
            Ok(())
        }

        fn finish(mut self, mut choices: impl Iterator<Item = usize>, buckets: u64) {
            while self.step(choices.next().unwrap_or(0), buckets) {}
            let all: BTreeSet<u64> = (0..buckets).collect();
            for (rank, received) in &self.received {
                assert_eq!(received.len() as u64, buckets, "rank {rank} got one twice");
                assert_eq!(received.iter().copied().collect::<BTreeSet<_>>(), all, "rank {rank}");
            }
            assert_eq!(self.route.awaited(), None);
        }
    }

    proptest! {
        #[test]
        fn every_receiver_gets_every_bucket_once_whatever_the_order_of_events(
            topology in any_topology(),
            receivers in 1_u32..6,
            buckets in 0_u64..20,
            choices in proptest::collection::vec(any::<usize>(), 0..300),
        ) {
            World::new(topology, buckets, receivers).finish(choices.into_iter(), buckets);
        }

        #[test]
        fn survivors_of_a_death_get_every_bucket_whenever_it_happens(
            topology in any_topology(),
            planned in 1_u64..20,
            receivers in 2_u32..7,
            dead in 1_u32..7,
            after in 0_usize..150,
            choices in proptest::collection::vec(any::<usize>(), 0..400),
        ) {
            let mut world = World::new(topology, planned, receivers);
            let mut choices = choices.into_iter();
            for _ in 0..after {
                world.step(choices.next().unwrap_or(0), 16);
            }
            prop_assert_eq!(world.kill(Rank(1 + dead % receivers)), Ok(()));
            world.finish(choices, 16);
        }

        #[test]
        fn a_second_death_is_survived_or_is_a_gap_but_never_other_bytes(
            topology in any_topology(),
            planned in 1_u64..20,
            receivers in 3_u32..7,
            dead in (1_u32..7, 1_u32..7),
            pause in (0_usize..100, 0_usize..30),
            choices in proptest::collection::vec(any::<usize>(), 0..400),
        ) {
            let mut world = World::new(topology, planned, receivers);
            let mut choices = choices.into_iter();
            for (dead, pause) in [(dead.0, pause.0), (dead.1, pause.1)] {
                for _ in 0..pause {
                    world.step(choices.next().unwrap_or(0), 16);
                }
                if world.kill(Rank(1 + dead % receivers)).is_err() {
                    return Ok(());
                }
            }
            world.finish(choices, 16);
        }
    }

    #[test]
    fn a_fetch_that_fails_goes_on_one_rank_further_up_and_at_the_trainer_it_ends() {
        let mut route = route(Topology::Ring, 2, 2, 2);
        route.filling(0);
        route.filled(0);
        assert_eq!(route.next_due(), Some(Due { by: Rank(1), from: Rank(0), bucket: 0 }));
        route.arrived(Rank(1), 0);
        assert_eq!(route.next_due(), Some(Due { by: Rank(2), from: Rank(1), bucket: 0 }));
        assert_eq!(route.awaited(), Some(Rank(2)));
        assert_eq!(route.missed(Rank(2), Rank(1)), Ok(()));
        assert_eq!(route.next_due(), Some(Due { by: Rank(2), from: Rank(0), bucket: 0 }));
        // The old fetch fails once more, which changes nothing.
        assert_eq!(route.missed(Rank(2), Rank(1)), Ok(()));
        assert_eq!(route.next_due(), None);
        assert_eq!(route.missed(Rank(2), Rank(0)), Err(Gap { rank: Rank(2), bucket: 0 }));
    }

    #[test]
    fn a_reader_that_keeps_a_bucket_is_the_one_that_is_awaited() {
        let mut route = route(Topology::Star, 1, 2, 2);
        route.filling(0);
        route.filled(0);
        while let Some(due) = route.next_due() {
            route.arrived(due.by, due.bucket);
        }
        route.released(Rank(1), 0);
        assert!(route.may_fill(1), "the trainer's slot is free when everyone has the bucket");
        assert_eq!(route.awaited(), Some(Rank(2)));
    }
}

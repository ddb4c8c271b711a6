//! Who fetches from whom: the tree of an update, chosen by how long the update would take. No IO and no clock.
//!
//! The model: between hosts, a bucket occupies the links of both hosts for [`BETWEEN_HOSTS`]. Between ranks of one host
//! it takes [`WITHIN_HOST`], and a rank serves one other rank at a time. A rank can pass a bucket on [`STEP`] after it
//! has it, because the trainer has to tell the next rank.
//!
//! The candidates: one rank of each host fetches from another host, all others fetch within their host. Two limits,
//! one among hosts and one within them, say how many others a rank serves at most. Each rank is placed where it gets
//! its first bucket soonest. A limit of one gives a chain. That is best for many buckets, because all its links work at
//! the same time. No limit gives the tree in which each step doubles the ranks that have a bucket. That is best for a
//! single bucket. So choosing a tree is choosing the two limits.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use engine_core::Rank;

use super::route::Topology;

/// The time of a bucket between hosts. All times are in the same arbitrary unit.
const BETWEEN_HOSTS: u64 = 80;
const WITHIN_HOST: u64 = 20;
const STEP: u64 = 8;

/// The assumed number of buckets of an update if there was none before it.
const BUCKETS: u64 = 16;

/// The limits that are tried, beside no limit.
const LIMITS: std::ops::RangeInclusive<usize> = 1..=8;

/// Two ranks between which a fetch failed, the lower one first.
pub(super) type Path = (Rank, Rank);

pub(super) fn path(one: Rank, other: Rank) -> Path {
    (one.min(other), one.max(other))
}

/// A receiver and its host. The caller numbers the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Site {
    pub(super) rank: Rank,
    pub(super) host: u32,
}

/// Each receiver and the rank that it fetches from, parents before their children. The trainer's host is `host`. No
/// receiver fetches over a failed path, unless it is the path to the trainer.
pub(super) fn plan(
    topology: Topology,
    buckets: u64,
    host: u32,
    receivers: &[Site],
    failed: &BTreeSet<Path>,
) -> Vec<(Rank, Rank)> {
    let ranks = || receivers.iter().map(|site| site.rank);
    let before = || std::iter::once(Rank::LEADER).chain(ranks());
    let parents = match topology {
        Topology::Star => ranks().map(|rank| (rank, Rank::LEADER)).collect(),
        Topology::Ring => ranks().zip(before()).collect(),
        Topology::Fastest => fastest(buckets, host, receivers),
    };
    around(parents, failed)
}

/// Moves each rank with a failed path to its parent further up the tree.
fn around(mut parents: Vec<(Rank, Rank)>, failed: &BTreeSet<Path>) -> Vec<(Rank, Rank)> {
    let mut above: BTreeMap<Rank, Rank> = BTreeMap::new();
    for (child, parent) in &mut parents {
        while *parent != Rank::LEADER && failed.contains(&path(*child, *parent)) {
            *parent = above.get(parent).copied().unwrap_or(Rank::LEADER);
        }
        above.insert(*child, *parent);
    }
    parents
}

fn fastest(buckets: u64, host: u32, receivers: &[Site]) -> Vec<(Rank, Rank)> {
    let buckets = if buckets == 0 { BUCKETS } else { buckets };
    // The ranks of each host. The first one fetches from another host; on the trainer's host it is the trainer.
    let mut hosts = vec![vec![Rank::LEADER]];
    let mut places = BTreeMap::from([(host, 0)]);
    for site in receivers {
        let place = *places.entry(site.host).or_insert(hosts.len());
        match hosts.get_mut(place) {
            Some(ranks) => ranks.push(site.rank),
            None => hosts.push(vec![site.rank]),
        }
    }
    // Hosts with more ranks come first, because they need more time after their first rank has a bucket.
    hosts[1..].sort_by_key(|ranks| Reverse(ranks.len()));
    let largest = hosts.iter().map(Vec::len).max().unwrap_or(1);
    let among = candidates(hosts.len(), BETWEEN_HOSTS);
    let within = candidates(largest, WITHIN_HOST);
    let time = |among: &Grown, within: &Grown| {
        let first = hosts.iter().zip(&among.ready);
        let first = first.map(|(ranks, ready)| ready + within.ready[ranks.len() - 1]).max();
        first.unwrap_or(0) + (buckets - 1) * among.interval.max(within.interval)
    };
    let pairs = among.iter().flat_map(|among| within.iter().map(move |within| (among, within)));
    let Some((among, within)) = pairs.min_by_key(|(among, within)| time(among, within)) else {
        return Vec::new();
    };
    let first_of = |host: usize| hosts[host][0];
    let mut parents: Vec<(Rank, Rank)> =
        (1..hosts.len()).map(|host| (first_of(host), first_of(among.parents[host]))).collect();
    for ranks in &hosts {
        parents.extend((1..ranks.len()).map(|at| (ranks[at], ranks[within.parents[at]])));
    }
    parents
}

/// A tree of numbered nodes. Node 0 is the root.
struct Grown {
    /// The parent of each node, which comes before the node. The root is its own parent.
    parents: Vec<usize>,
    /// When each node has its first bucket. The times do not decrease.
    ready: Vec<u64>,
    /// The time between two buckets at a node: what the busiest node needs to send one bucket to all its children.
    interval: u64,
}

/// The trees of all limits, the smallest first.
fn candidates(count: usize, cost: u64) -> Vec<Grown> {
    let limits = LIMITS.take_while(|limit| *limit < count).chain([usize::MAX]);
    limits.map(|limit| grow(count, limit, cost)).collect()
}

fn grow(count: usize, limit: usize, cost: u64) -> Grown {
    let (mut parents, mut ready, mut served) = (vec![0], vec![0], vec![0]);
    // For each node that may serve another one: when it would be done with that.
    let mut next = BinaryHeap::from([Reverse((cost, 0))]);
    while parents.len() < count
        && let Some(Reverse((at, parent))) = next.pop()
    {
        served[parent] += 1;
        if served[parent] < limit {
            next.push(Reverse((at + cost, parent)));
        }
        next.push(Reverse((at + STEP + cost, parents.len())));
        parents.push(parent);
        ready.push(at);
        served.push(0);
    }
    let most = served.into_iter().max().unwrap_or(0);
    Grown { parents, ready, interval: most as u64 * cost }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sites(hosts: &[u32]) -> Vec<Site> {
        (1..).map(Rank).zip(hosts).map(|(rank, host)| Site { rank, host: *host }).collect()
    }

    /// The time of an update along a tree. Each transfer starts as soon as the parent has the bucket, the child has the
    /// bucket before it, and both links are free.
    fn simulate(parents: &[(Rank, Rank)], host_of: impl Fn(Rank) -> u32, buckets: u64) -> u64 {
        let mut has: BTreeMap<(Rank, u64), u64> = BTreeMap::new();
        let mut free: BTreeMap<(bool, Option<u32>, Option<Rank>), u64> = BTreeMap::new();
        let mut left: Vec<(u64, Rank, Rank)> = (0..buckets)
            .flat_map(|bucket| parents.iter().map(move |(child, parent)| (bucket, *child, *parent)))
            .collect();
        let links = |child: Rank, parent: Rank| {
            let (to, from) = (host_of(child), host_of(parent));
            if to == from {
                // A rank serves one at a time.
                return ([(false, None, Some(parent)), (true, None, Some(child))], WITHIN_HOST);
            }
            ([(false, Some(from), None), (true, Some(to), None)], BETWEEN_HOSTS)
        };
        while !left.is_empty() {
            let start = |&(bucket, child, parent): &(u64, Rank, Rank)| {
                let there = match parent {
                    Rank::LEADER => Some(0),
                    _ => has.get(&(parent, bucket)).map(|at| at + STEP),
                };
                let before = match bucket {
                    0 => Some(0),
                    _ => has.get(&(child, bucket - 1)).copied(),
                };
                let (links, _) = links(child, parent);
                let free = links.iter().map(|link| free.get(link).copied().unwrap_or(0)).max();
                Some(there?.max(before?).max(free.unwrap_or(0)))
            };
            let able =
                left.iter().enumerate().filter_map(|(at, task)| Some((start(task)?, task.0, at)));
            let (begun, _, at) = able.min().expect("a tree");
            let (bucket, child, parent) = left.remove(at);
            let (links, cost) = links(child, parent);
            for link in links {
                free.insert(link, begun + cost);
            }
            has.insert((child, bucket), begun + cost);
        }
        has.into_values().max().unwrap_or(0)
    }

    /// All trees with this number of receivers.
    fn all_trees(receivers: u32) -> Vec<Vec<(Rank, Rank)>> {
        let mut trees = vec![Vec::new()];
        for child in 1..=receivers {
            let others = (0..=receivers).filter(|parent| *parent != child);
            let more = others.flat_map(|parent| {
                trees.iter().map(move |tree: &Vec<_>| {
                    tree.iter().copied().chain([(Rank(child), Rank(parent))]).collect()
                })
            });
            trees = more.collect();
        }
        trees.retain(|tree| is_tree(tree));
        trees
    }

    fn is_tree(parents: &[(Rank, Rank)]) -> bool {
        let above: BTreeMap<Rank, Rank> = parents.iter().copied().collect();
        above.len() == parents.len()
            && above.keys().all(|rank| {
                let mut at = *rank;
                for _ in 0..=above.len() {
                    match above.get(&at) {
                        Some(parent) => at = *parent,
                        None => return at == Rank::LEADER,
                    }
                }
                false
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_tree_of_a_small_group_is_much_faster_than_the_one_that_is_chosen(
            hosts in proptest::collection::vec(0_u32..4, 1..=5),
            buckets in 1_u64..9,
        ) {
            let host_of = |rank: Rank| if rank == Rank::LEADER { 0 } else { hosts[rank.0 as usize - 1] };
            let time = |tree: &[(Rank, Rank)]| simulate(tree, host_of, buckets);
            let chosen = plan(Topology::Fastest, buckets, 0, &sites(&hosts), &BTreeSet::new());
            let best = all_trees(hosts.len() as u32).into_iter().min_by_key(|tree| time(tree)).unwrap();
            prop_assert!(
                time(&chosen) * 10 <= time(&best) * 11,
                "{chosen:?} takes {}, {best:?} {}", time(&chosen), time(&best)
            );
        }
    }

    proptest! {
        #[test]
        fn every_receiver_has_one_way_to_the_trainer_and_none_over_a_path_that_failed(
            shape in 0..3_usize,
            hosts in proptest::collection::vec(0_u32..5, 0..40),
            buckets in 0_u64..100,
            failed in proptest::collection::btree_set((1_u32..40, 1_u32..40), 0..30),
        ) {
            let topology = [Topology::Star, Topology::Ring, Topology::Fastest][shape];
            let failed = failed.into_iter().map(|(one, other)| path(Rank(one), Rank(other))).collect();
            let parents = plan(topology, buckets, 0, &sites(&hosts), &failed);
            prop_assert_eq!(parents.len(), hosts.len());
            prop_assert!(is_tree(&parents));
            let mut known = BTreeSet::from([Rank::LEADER]);
            for (child, parent) in parents {
                prop_assert!(known.contains(&parent), "{} comes before its parent", child);
                prop_assert!(!failed.contains(&path(child, parent)));
                known.insert(child);
            }
        }
    }

    #[test]
    fn many_buckets_go_along_a_chain_and_a_single_one_down_a_tree_and_hosts_are_entered_once() {
        let far = sites(&(1..=64).collect::<Vec<_>>());
        let chosen =
            |buckets, sites: &[Site]| plan(Topology::Fastest, buckets, 0, sites, &BTreeSet::new());
        let children = |parents: &[(Rank, Rank)]| {
            let mut counts: BTreeMap<Rank, usize> = BTreeMap::new();
            parents.iter().for_each(|(_, parent)| *counts.entry(*parent).or_default() += 1);
            counts.into_values().max()
        };
        assert_eq!(children(&chosen(1000, &far)), Some(1));
        assert!(children(&chosen(1, &far)) > Some(4));

        // Eight ranks on each of eight hosts: only one of each host fetches from another host.
        let near = sites(&(0..64).map(|rank| rank / 8).collect::<Vec<_>>());
        let host = |rank: Rank| if rank == Rank::LEADER { 0 } else { (rank.0 - 1) / 8 };
        let between =
            chosen(20, &near).into_iter().filter(|(child, parent)| host(*child) != host(*parent));
        assert_eq!(between.count(), 7);
    }

    #[test]
    fn the_time_of_a_chain_and_of_a_star_are_what_they_are_on_paper() {
        let chain =
            |ranks: u32| (1..=ranks).map(|rank| (Rank(rank), Rank(rank - 1))).collect::<Vec<_>>();
        let star =
            |ranks: u32| (1..=ranks).map(|rank| (Rank(rank), Rank::LEADER)).collect::<Vec<_>>();
        let apart = |rank: Rank| rank.0;
        assert_eq!(simulate(&chain(1), apart, 5), 5 * BETWEEN_HOSTS);
        assert_eq!(simulate(&chain(3), apart, 5), 7 * BETWEEN_HOSTS + 2 * STEP);
        assert_eq!(simulate(&star(3), apart, 5), 15 * BETWEEN_HOSTS);
    }
}

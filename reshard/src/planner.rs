//! Makes plans from layouts, and keeps what the next plan can reuse.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use engine_core::{Error, ErrorKind, Rank, Result};
use sha2::{Digest, Sha256};

use crate::crossing::Crossing;
use crate::dealer::Dealer;
use crate::links::Links;
use crate::plan::{Group, Planned, ReshardPlan};
use crate::sharding::{ShardedTensor, Sharding};

/// Makes plans, and keeps what the next plan can reuse.
///
/// The common boxes of two layouts depend on these two and the granule alone. They are kept as long as tensors have both, so that after a
/// change only new pairs of layouts are crossed. Which of several replicas sends is decided for each plan, because it depends on all loads.
#[derive(Debug, Default)]
pub struct Planner {
    crossings: HashMap<CrossingKey, Arc<Crossing>>,
    last: Option<([u8; 32], Arc<ReshardPlan>)>,
    work: Work,
}

type CrossingKey = ([u8; 32], [u8; 32], Arc<[u64]>);

/// What a [`Planner`] did for its last plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Work {
    /// Pairs of layouts that were crossed.
    pub crossed: usize,
    /// Pairs of layouts whose crossing was kept from the previous plan.
    pub kept: usize,
    /// Whether the previous plan was returned again.
    pub same: bool,
}

/// The plan for what trainers hold and rollouts want.
///
/// A rank gets each element that it wants from itself if it holds it, else from a rank of its node, else from any rank that holds it. Of
/// several such ranks, the planner takes the one whose card has the least to send, and among the ranks of a card the one that has the least
/// to send. An element that several ranks of a node want and no rank of the node holds is sent to one of them, which passes it on within
/// the node.
///
/// # Errors
///
/// `Weight`, naming tensor and rank, if something is wanted that nobody holds; `Mismatch` if full shapes differ.
pub fn plan(held: &Sharding, wanted: &Sharding, links: &Links) -> Result<Arc<ReshardPlan>> {
    Planner::default().plan(held, wanted, links)
}

impl Planner {
    /// A planner without a previous plan.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same as [`plan`], in less time where boxes are those of the last plan.
    ///
    /// # Errors
    ///
    /// As [`plan`]. After an error, everything that was kept is still kept.
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
        let plan = Arc::new(Dealer::new(links).deal(groups, tensors, &asked));
        self.crossings = crossings;
        self.last = Some((asked, plan.clone()));
        self.work = work;
        Ok(plan)
    }

    /// What the planner did for its last plan.
    pub fn work(&self) -> Work {
        self.work
    }
}

/// Each wanted tensor with the held tensor of the same name, as (held, wanted).
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

//! Plans of arbitrary boxes, beside a naive copy of every element.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};

use engine_core::{DType, ErrorKind, Rank, Result, TensorBox, TensorMeta};
use proptest::prelude::*;
use reshard::{
    Declarations, Layout, Links, Planner, ReshardPlan, ShardedTensor, Sharding, Transfer, plan,
};

/// What one rank says of a tensor.
type Said = (Rank, TensorMeta, Vec<u64>, TensorBox);

#[derive(Clone, Debug)]
struct Case {
    held: Vec<Said>,
    wanted: Vec<Said>,
    links: Links,
}

impl Case {
    fn shardings(&self) -> (Sharding, Sharding) {
        (collect(&self.held).unwrap(), collect(&self.wanted).unwrap())
    }

    fn plan(&self) -> std::sync::Arc<ReshardPlan> {
        let (held, wanted) = self.shardings();
        plan(&held, &wanted, &self.links).unwrap()
    }

    fn ranks(&self) -> BTreeSet<Rank> {
        self.held.iter().chain(&self.wanted).map(|said| said.0).collect()
    }

    /// The elements of a tensor that a rank holds, or wants.
    fn elements(of: &[Said], rank: Rank, name: &str) -> BTreeSet<Vec<u64>> {
        let own = of.iter().filter(|said| said.0 == rank && *said.1.name == *name);
        own.flat_map(|said| indices(&said.3)).collect()
    }
}

fn collect(said: &[Said]) -> Result<Sharding> {
    let mut all = Declarations::new();
    for (rank, meta, granule, region) in said {
        all.add(*rank, meta, granule, region.clone())?;
    }
    all.finish()
}

/// The indices of all elements of a box.
fn indices(region: &TensorBox) -> Vec<Vec<u64>> {
    region.ranges().iter().fold(vec![Vec::new()], |all, range| {
        all.iter()
            .flat_map(|index| range.clone().map(|at| [index.clone(), vec![at]].concat()))
            .collect()
    })
}

/// A tensor cut along each dimension, in all boxes that this gives.
fn grid(shape: &[u64], cuts: &[Vec<u64>]) -> Vec<TensorBox> {
    let mut boxes = vec![TensorBox::whole(shape)];
    for (dimension, (&n, cuts)) in shape.iter().zip(cuts).enumerate() {
        let mut at: Vec<u64> = cuts.iter().map(|cut| cut % (n + 1)).chain([0, n]).collect();
        at.sort_unstable();
        at.dedup();
        boxes = boxes
            .iter()
            .flat_map(|part| at.windows(2).map(|ends| part.narrowed(dimension, ends[0]..ends[1])))
            .collect();
    }
    boxes
}

/// A tensor: half of the trainers hold every element, each box of a grid on any number of them; the others hold any
/// boxes of another grid; each rollout wants any boxes of a grid of its own.
fn tensor(index: usize, trainers: u32, rollouts: u32) -> impl Strategy<Value = [Vec<Said>; 2]> {
    let cuts = || prop::collection::vec(prop::collection::vec(0_u64..100, 0..3), 3);
    let choices = || prop::collection::vec(any::<u32>(), 64);
    let shape = prop::collection::vec(1_u64..9, 0..4);
    let granule = prop_oneof![Just(vec![]), Just(vec![2]), Just(vec![3, 2])];
    let rollout_cuts = prop::collection::vec((cuts(), choices()), rollouts as usize);
    (shape, granule, cuts(), choices(), cuts(), choices(), rollout_cuts).prop_map(
        move |(shape, granule, one, some, other, more, wanted)| {
            let name = format!("layers.{index}.w");
            let meta = TensorMeta::new(name, DType::BF16, shape.clone());
            let say = |rank, region| (Rank(rank), meta.clone(), granule.clone(), region);
            let first = trainers.div_ceil(2);
            let mut held = Vec::new();
            for (region, choice) in grid(&shape, &one).into_iter().zip(some.iter().cycle()) {
                let own = |rank: &u32| choice >> rank & 1 == 1 || choice % first == *rank;
                held.extend((0..first).filter(own).map(|rank| say(rank, region.clone())));
            }
            for (region, choice) in grid(&shape, &other).into_iter().zip(more.iter().cycle()) {
                let own = |rank: &u32| choice >> rank & 1 == 1;
                held.extend((first..trainers).filter(own).map(|rank| say(rank, region.clone())));
            }
            let mut all = Vec::new();
            for (rank, (cuts, choices)) in (trainers..).zip(&wanted) {
                let boxes = grid(&shape, cuts).into_iter().zip(choices.iter().cycle());
                all.extend(boxes.filter(|(_, c)| *c % 3 > 0).map(|(region, _)| say(rank, region)));
            }
            [held, all]
        },
    )
}

fn cases() -> impl Strategy<Value = Case> {
    (1_u32..6, 1_u32..5, 1_u32..4, 1_u32..4).prop_flat_map(|(trainers, rollouts, node, cards)| {
        let tensors: Vec<_> = (0..3).map(|index| tensor(index, trainers, rollouts)).collect();
        tensors.prop_map(move |tensors| {
            let mut links = Links::new();
            if node > 1 {
                links.add_nodes(0..trainers + rollouts, node, cards);
            }
            let [mut held, mut wanted] = [Vec::new(), Vec::new()];
            for [some, more] in tensors {
                held.extend(some);
                wanted.extend(more);
            }
            // Sometimes a rank is both: rollout and trainer on one.
            if cards == 3 {
                wanted.iter_mut().for_each(|said| said.0 = Rank(said.0.0 - 1));
            }
            Case { held, wanted, links }
        })
    })
}

fn sent(case: &Case, plan: &ReshardPlan) -> Vec<Transfer> {
    case.ranks().into_iter().flat_map(|rank| plan.transfers_from(rank)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_element_that_is_wanted_comes_once_from_a_rank_that_holds_it_and_no_other(case in cases()) {
        let plan = case.plan();
        let mut arrived: BTreeMap<(Rank, u32), Vec<Vec<u64>>> = BTreeMap::new();
        let all = sent(&case, &plan);
        for transfer in &all {
            let name = &plan.tensor(transfer.tensor).name;
            let mut has = Case::elements(&case.held, transfer.from, name);
            let moved = indices(&transfer.region);
            if transfer.passed_on {
                // It came to the sender before, and not as something passed on.
                let came = all.iter().filter(|other| {
                    (other.to, other.tensor) == (transfer.from, transfer.tensor)
                        && !other.passed_on
                        && other.wave < transfer.wave
                });
                has = came.flat_map(|other| indices(&other.region)).collect();
            }
            prop_assert!(moved.iter().all(|at| has.contains(at)), "{transfer:?}");
            arrived.entry((transfer.to, transfer.tensor)).or_default().extend(moved);
        }
        for (tensor, meta) in (0..).zip(plan.tensors()) {
            for rank in case.ranks() {
                let mut got = arrived.remove(&(rank, tensor)).unwrap_or_default();
                got.sort_unstable();
                let wants: Vec<_> = Case::elements(&case.wanted, rank, &meta.name).into_iter().collect();
                prop_assert_eq!(got, wants, "{} of rank {}", meta.name, rank);
            }
        }
        prop_assert!(arrived.is_empty());
    }

    #[test]
    fn receivers_expect_what_senders_send_and_loads_are_those_of_the_transfers(case in cases()) {
        let plan = case.plan();
        let key = |t: &Transfer| (t.from, t.to, t.wave, t.round, t.tensor, format!("{}", t.region));
        let mut sent = sent(&case, &plan);
        let mut got: Vec<Transfer> =
            case.ranks().into_iter().flat_map(|rank| plan.transfers_to(rank)).collect();
        prop_assert_eq!(plan.transfers(), sent.len() as u64);
        let mut pairs: BTreeMap<(Rank, Rank), u64> = BTreeMap::new();
        for transfer in sent.iter().filter(|transfer| transfer.from != transfer.to) {
            *pairs.entry((transfer.from, transfer.to)).or_default() += transfer.region.elements() * 2;
        }
        let planned: BTreeMap<_, _> =
            plan.pairs().iter().map(|pair| ((pair.from, pair.to), pair.bytes)).collect();
        prop_assert_eq!(&planned, &pairs);
        for (rank, load) in plan.loads() {
            let of = |end: fn(&(Rank, Rank)) -> Rank| -> u64 {
                pairs.iter().filter(|(pair, _)| end(pair) == rank).map(|(_, bytes)| bytes).sum()
            };
            prop_assert_eq!(load.sent + load.sent_within, of(|pair| pair.0));
            prop_assert_eq!(load.received + load.received_within, of(|pair| pair.1));
        }
        prop_assert!(plan.busiest() >= plan.lower_bound());
        sent.sort_by_key(key);
        got.sort_by_key(key);
        prop_assert_eq!(sent, got);
    }

    #[test]
    fn in_a_round_no_rank_sends_to_two_or_gets_from_two_and_tensors_come_in_their_order(case in cases()) {
        let plan = case.plan();
        let mut ends = BTreeSet::new();
        for pair in plan.pairs() {
            prop_assert!(ends.insert((0, pair.from, pair.round)));
            prop_assert!(ends.insert((1, pair.to, pair.round)));
        }
        for rank in case.ranks() {
            let sent = plan.transfers_from(rank);
            prop_assert!(sent.is_sorted_by_key(|transfer| (transfer.wave, transfer.round)));
        }
        // Of what the same ranks hold.
        let mut waves: BTreeMap<BTreeSet<Rank>, BTreeMap<u32, u32>> = BTreeMap::new();
        for transfer in sent(&case, &plan).into_iter().filter(|transfer| !transfer.passed_on) {
            let name = &plan.tensor(transfer.tensor).name;
            let held = case.held.iter().filter(|said| said.1.name == *name && !said.3.is_empty());
            let holders = held.map(|said| said.0).collect();
            waves.entry(holders).or_default().insert(transfer.tensor, transfer.wave);
        }
        prop_assert!(waves.values().all(|waves| waves.values().is_sorted()));
    }

    #[test]
    fn who_encodes_a_block_knows_the_maximum_of_all_of_it(case in cases()) {
        let plan = case.plan();
        let ranks = case.ranks();
        for (tensor, meta) in (0..).zip(plan.tensors()) {
            let granule = &case.wanted.iter().find(|said| said.1.name == meta.name).unwrap().2;
            let block = |index: &[u64]| -> Vec<u64> {
                let first = index.len().saturating_sub(granule.len());
                let skipped = granule.len().saturating_sub(index.len());
                let side = |at: usize| at.checked_sub(first).map_or(1, |at| granule[at + skipped]);
                index.iter().enumerate().map(|(at, index)| index / side(at)).collect()
            };
            let held: BTreeMap<Rank, BTreeSet<Vec<u64>>> =
                ranks.iter().map(|&r| (r, Case::elements(&case.held, r, &meta.name))).collect();
            let told = plan.maxima(tensor);
            for transfer in sent(&case, &plan).iter().filter(|t| t.tensor == tensor && !t.passed_on) {
                for index in indices(&transfer.region) {
                    let block_of = block(&index);
                    let whole = indices(&TensorBox::whole(&meta.shape));
                    let mut known = held[&transfer.from].clone();
                    for telling in told.iter().filter(|m| m.to == transfer.from) {
                        if indices(&telling.blocks).contains(&block_of) {
                            known.extend(held[&telling.from].iter().cloned());
                        }
                    }
                    for other in whole.iter().filter(|other| block(other) == block_of) {
                        prop_assert!(known.contains(other), "{transfer:?} {other:?}");
                    }
                }
            }
            for telling in &told {
                let blocks: BTreeSet<_> = held[&telling.from].iter().map(|at| block(at)).collect();
                prop_assert!(indices(&telling.blocks).iter().all(|at| blocks.contains(at)));
                prop_assert!(telling.from != telling.to);
            }
        }
    }

    #[test]
    fn the_order_of_declarations_does_not_matter(case in cases()) {
        let mut other = case.clone();
        other.held.reverse();
        other.wanted.reverse();
        prop_assert_eq!(case.plan().digest(), other.plan().digest());
    }

    #[test]
    fn a_plan_after_a_change_is_the_plan_of_a_planner_that_knew_nothing(
        before in cases(), after in cases(), kept in 0_usize..4,
    ) {
        // Some tensors stay as they were.
        let mut after = after;
        let stays = |said: &Said| (0..kept).any(|n| *said.1.name == format!("layers.{n}.w"));
        for (now, old) in [(&mut after.held, &before.held), (&mut after.wanted, &before.wanted)] {
            now.retain(|said| !stays(said));
            now.extend(old.iter().filter(|said| stays(said)).cloned());
        }
        let mut planner = Planner::new();
        let (held, wanted) = before.shardings();
        planner.plan(&held, &wanted, &before.links).unwrap();
        let (held, wanted) = after.shardings();
        let next = planner.plan(&held, &wanted, &after.links).unwrap();
        let fresh = after.plan();
        prop_assert_eq!(next.digest(), fresh.digest());
        prop_assert_eq!(sent(&after, &next), sent(&after, &fresh));
        let again = planner.plan(&held, &wanted, &after.links).unwrap();
        prop_assert!(std::sync::Arc::ptr_eq(&again, &next) && planner.work().same);
    }
}

fn meta(name: &str, shape: &[u64]) -> TensorMeta {
    TensorMeta::new(name, DType::BF16, shape)
}

fn part(offset: &[u64], extent: &[u64]) -> TensorBox {
    TensorBox::new(offset, extent).unwrap()
}

#[test]
fn only_layouts_that_changed_are_crossed_again() {
    let shard = |ranks: std::ops::Range<u32>, n: u64| {
        let len = n / ranks.len() as u64;
        let boxes =
            ranks.enumerate().map(|(at, rank)| (Rank(rank), part(&[at as u64 * len], &[len])));
        std::sync::Arc::new(Layout::new(&[n], boxes).unwrap())
    };
    let sharding = |layouts: &[std::sync::Arc<Layout>]| {
        let mut sharding = Sharding::new();
        for (index, layout) in layouts.iter().enumerate() {
            let meta = meta(&format!("w.{index}"), layout.shape());
            sharding
                .add(ShardedTensor { meta, granule: [].into(), layout: layout.clone() })
                .unwrap();
        }
        sharding
    };
    let (short, long) = (shard(0..4, 16), shard(0..4, 32));
    let held = sharding(&[short.clone(), long.clone(), short.clone()]);
    let wanted = sharding(&[shard(4..6, 16), shard(4..6, 32), shard(4..6, 16)]);
    let mut planner = Planner::new();
    planner.plan(&held, &wanted, &Links::new()).unwrap();
    assert_eq!((planner.work().crossed, planner.work().kept), (2, 0));
    // The last tensor goes to other ranks.
    let moved = sharding(&[shard(4..6, 16), shard(4..6, 32), shard(6..8, 16)]);
    let next = planner.plan(&held, &moved, &Links::new()).unwrap();
    assert_eq!((planner.work().crossed, planner.work().kept), (1, 2));
    assert_eq!(next.digest(), plan(&held, &moved, &Links::new()).unwrap().digest());
}

#[test]
fn replicas_share_what_there_is_to_send() {
    // Four trainers have everything, in two nodes; eight rollouts want a half each.
    let shape = [64_u64, 4096];
    let all = (0..4).map(|rank| (Rank(rank), TensorBox::whole(&shape)));
    let held = std::sync::Arc::new(Layout::new(&shape, all).unwrap());
    let halves =
        (4..12).map(|rank| (Rank(rank), part(&[u64::from(rank % 2) * 32, 0], &[32, 4096])));
    let wanted = std::sync::Arc::new(Layout::new(&shape, halves).unwrap());
    for tensors in [1, 3, 40] {
        let of = |layout: &std::sync::Arc<Layout>| {
            let mut sharding = Sharding::new();
            for n in 0..tensors {
                let (meta, layout) = (meta(&format!("w.{n}"), &shape), layout.clone());
                sharding.add(ShardedTensor { meta, granule: [16, 128].into(), layout }).unwrap();
            }
            sharding
        };
        let mut links = Links::new();
        links.add_nodes(0..4, 2, 2);
        links.add_nodes(4..12, 1, 1);
        let plan = plan(&of(&held), &of(&wanted), &links).unwrap();
        let total: u64 = plan.pairs().iter().map(|pair| pair.bytes).sum();
        assert_eq!(total, tensors * 8 * 32 * 4096 * 2);
        let sent: Vec<u64> = (0..4).map(|rank| plan.load(Rank(rank)).sent).collect();
        assert!(sent.iter().all(|&bytes| bytes == total / 4), "{sent:?} of {total}");
        assert_eq!(plan.busiest(), plan.lower_bound());
        assert_eq!(plan.maxima(0), [], "each holds whole blocks");
    }
}

#[test]
fn what_a_node_has_does_not_come_over_the_network() {
    let shape = [8_u64];
    let layout = |ranks: &[u32]| {
        let boxes = ranks.iter().map(|&rank| (Rank(rank), TensorBox::whole(&shape)));
        std::sync::Arc::new(Layout::new(&shape, boxes).unwrap())
    };
    let mut links = Links::new();
    links.add_nodes(0..4, 2, 1);
    let of = |layout| {
        let mut sharding = Sharding::new();
        sharding
            .add(ShardedTensor { meta: meta("w", &shape), granule: [].into(), layout })
            .unwrap();
        sharding
    };
    let plan = plan(&of(layout(&[0, 2])), &of(layout(&[0, 1, 3, 9])), &links).unwrap();
    let load = |rank| plan.load(Rank(rank));
    assert_eq!(load(0).kept, 16);
    assert_eq!((load(1).received_within, load(3).received_within, load(9).received), (16, 16, 16));
    assert_eq!((load(0).sent_within, load(2).sent_within), (16, 16));
    assert_eq!(plan.busiest(), 16);
}

#[test]
fn what_several_ranks_of_a_node_want_comes_once_over_the_network_and_over_all_of_their_cards() {
    // One trainer, two nodes of four that all want everything, and a rank that is alone and wants a half.
    let shape = [256_u64, 1024];
    let layout =
        |boxes: Vec<(Rank, TensorBox)>| std::sync::Arc::new(Layout::new(&shape, boxes).unwrap());
    let held = layout(vec![(Rank(0), TensorBox::whole(&shape))]);
    let mut wants: Vec<_> = (1..9).map(|rank| (Rank(rank), TensorBox::whole(&shape))).collect();
    wants.push((Rank(9), part(&[0, 0], &[128, 1024])));
    let wanted = layout(wants);
    let mut links = Links::new();
    links.add_nodes(1..9, 4, 4);
    for tensors in [1, 5, 8] {
        let of = |layout: &std::sync::Arc<Layout>| {
            let mut sharding = Sharding::new();
            for n in 0..tensors {
                let (meta, layout) = (meta(&format!("w.{n}"), &shape), layout.clone());
                sharding.add(ShardedTensor { meta, granule: [128, 128].into(), layout }).unwrap();
            }
            sharding
        };
        let plan = plan(&of(&held), &of(&wanted), &links).unwrap();
        let size = tensors * 256 * 1024 * 2;
        assert_eq!(plan.load(Rank(0)).sent, 2 * size + size / 2);
        for node in [1..5, 5..9] {
            let loads = node.map(|rank| plan.load(Rank(rank)));
            let received: Vec<u64> = loads.clone().map(|load| load.received).collect();
            assert_eq!(received.iter().sum::<u64>(), size);
            assert!(received.iter().max().unwrap() * 4 <= size * 8 / 5, "{received:?} of {size}");
            assert!(loads.clone().all(|load| load.received + load.received_within == size));
        }
        assert_eq!(plan.busiest(), plan.lower_bound(), "the trainer's card");
    }
}

#[test]
fn what_nobody_holds_is_an_error_that_names_tensor_and_rank() {
    let say = |rank, shape: &[u64], granule: &[u64], region| {
        vec![(Rank(rank), meta("layers.3.w", shape), granule.to_vec(), region)]
    };
    let held = collect(&say(0, &[4, 6], &[], part(&[0, 0], &[4, 5]))).unwrap();
    let refused = |wanted: &Sharding| {
        let error = plan(&held, wanted, &Links::new()).unwrap_err();
        assert_eq!(error.report().tensor.as_deref().unwrap(), "layers.3.w");
        assert_eq!(error.report().rank, Some(Rank(7)));
        error
    };
    let all = collect(&say(7, &[4, 6], &[], part(&[0, 0], &[4, 6]))).unwrap();
    let error = refused(&all);
    assert!(error.to_string().contains("4 of 24 elements"), "{error}");
    assert!(error.to_string().contains("such as [0..4, 5..6]"), "{error}");
    // The blocks of what it wants reach to where nobody has anything.
    let block = collect(&say(7, &[4, 6], &[2, 4], part(&[0, 4], &[1, 1]))).unwrap();
    let error = refused(&block);
    assert!(error.to_string().contains("[0..2, 4..6]"), "{error}");
    let other = collect(&say(7, &[4, 7], &[], part(&[0, 0], &[4, 5]))).unwrap();
    assert_eq!(refused(&other).kind(), ErrorKind::Mismatch);
    let mut unknown = say(7, &[4, 6], &[], part(&[0, 0], &[4, 5]));
    unknown[0].1.name = "other".into();
    let error = plan(&held, &collect(&unknown).unwrap(), &Links::new()).unwrap_err();
    assert_eq!(error.report().tensor.as_deref(), Some("other"));
    assert_eq!(error.report().rank, Some(Rank(7)));
}

#[test]
fn boxes_that_contradict_are_errors_that_name_tensor_and_rank() {
    let mut said = vec![
        (Rank(0), meta("w", &[4]), vec![], part(&[0], &[4])),
        (Rank(1), meta("w", &[4]), vec![], part(&[0], &[3])),
        (Rank(1), meta("w", &[4]), vec![], part(&[2], &[2])),
    ];
    let check = |said: &[Said], kind: ErrorKind, words: &str| {
        let error = collect(said).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(error.report().tensor.as_deref(), Some("w"), "{error}");
        assert_eq!(error.report().rank, Some(Rank(1)), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    check(&said, ErrorKind::Weight, "overlap");
    said[2].3 = part(&[3], &[2]);
    check(&said, ErrorKind::Weight, "not within the shape [4]");
    said[2] = (Rank(1), meta("w", &[5]), vec![], part(&[3], &[1]));
    check(&said, ErrorKind::Mismatch, "for rank 0");
    said[2] = (Rank(1), meta("w", &[4]), vec![128], part(&[3], &[1]));
    check(&said, ErrorKind::Mismatch, "blocks of [128]");
    said[2] = (Rank(1), TensorMeta::new("w", DType::F32, [4]), vec![], part(&[3], &[1]));
    check(&said, ErrorKind::Mismatch, "F32");
    let halves = [(0, part(&[0], &[4])), (1, part(&[3], &[1]))]
        .map(|(rank, region)| (Rank(rank), TensorMeta::new("w", DType::F4, [4]), vec![], region));
    check(&halves, ErrorKind::Weight, "cuts a byte");
}

#[test]
fn replicas_never_share_a_byte_of_elements_smaller_than_one() {
    let shape = [3_u64, 1 << 20];
    let holders = (0..3).map(|rank| (Rank(rank), TensorBox::whole(&shape)));
    let layout = |boxes: Vec<(Rank, TensorBox)>| {
        let mut sharding = Sharding::new();
        let layout = std::sync::Arc::new(Layout::new(&shape, boxes).unwrap());
        let meta = TensorMeta::new("w", DType::F4, shape);
        sharding.add(ShardedTensor { meta, granule: [].into(), layout }).unwrap();
        sharding
    };
    let wanted = layout(vec![(Rank(9), TensorBox::whole(&shape))]);
    let plan = plan(&layout(holders.collect()), &wanted, &Links::new()).unwrap();
    let sent: Vec<u64> = (0..3).map(|rank| plan.load(Rank(rank)).sent).collect();
    assert_eq!(sent, [1 << 19; 3], "a row of each");
}

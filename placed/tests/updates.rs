//! Whole groups in one process: what rollouts have after an update is what the unsharded tensors have there.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod group;

use engine_core::{
    DType, ErrorKind, Rank, Recovery, Result, TensorBox, TensorMeta, Version, Weight,
};
use group::{Boxes, Group, Model, Tensor};
use placed::{TensorState, Wanted};
use proptest::prelude::*;
use quant_fp8::{Fp8Format, Granularity, Mode, NonFinite};

fn part(offset: &[u64], extent: &[u64]) -> TensorBox {
    TensorBox::new(offset, extent).unwrap()
}

/// Cuts of a shape into boxes along each dimension.
fn grid(shape: &[u64], cuts: &[Vec<u64>]) -> Vec<TensorBox> {
    let mut parts = vec![TensorBox::whole(shape)];
    for (at, cuts) in cuts.iter().enumerate().take(shape.len()) {
        for cut in cuts {
            let cut = cut % (shape[at] + 1);
            parts = parts
                .iter()
                .flat_map(|part| [part.narrowed(at, 0..cut), part.narrowed(at, cut..shape[at])])
                .filter(|part| !part.is_empty())
                .collect();
        }
    }
    parts
}

#[derive(Clone, Debug)]
struct Case {
    shape: Vec<u64>,
    quantized: bool,
    held: Vec<Vec<u64>>,
    wanted: Vec<Vec<u64>>,
    owners: Vec<u8>,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Vec<Case>> {
    let cuts = || prop::collection::vec(prop::collection::vec(0_u64..400, 0..3), 3);
    let shape = prop_oneof![
        Just(vec![]),
        prop::collection::vec(1_u64..600, 1..2),
        prop::collection::vec(1_u64..300, 2..3),
        (1_u64..4, 1_u64..200, 1_u64..200).prop_map(|(e, r, c)| vec![e, r, c]),
    ];
    let case = (
        shape,
        any::<bool>(),
        cuts(),
        cuts(),
        prop::collection::vec(any::<u8>(), 64),
        any::<u64>(),
    );
    let case = case.prop_map(|(shape, quantized, held, wanted, owners, seed)| Case {
        quantized: quantized && shape.len() >= 2,
        shape,
        held,
        wanted,
        owners,
        seed,
    });
    prop::collection::vec(case, 1..5)
}

fn formats() -> impl Strategy<Value = Fp8Format> {
    let granularity = prop_oneof![
        Just(Granularity::default()),
        Just(Granularity::Block { rows: 32, cols: 64 }),
        Just(Granularity::PerRow)
    ];
    let mode = prop_oneof![Just(Mode::Triton), Just(Mode::Pytorch), Just(Mode::Ue8m0)];
    (granularity, mode).prop_map(|(granularity, mode)| Fp8Format {
        granularity,
        mode,
        ..Fp8Format::default()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_element_of_every_box_is_that_of_the_unsharded_tensor_however_both_sides_are_cut(
        cases in cases(), format in formats(), trainers in 1_u32..4, rollouts in 1_u32..4,
    ) {
        let mut model = Model::default();
        let mut holds = vec![Vec::new(); trainers as usize];
        let mut wants = vec![Vec::new(); rollouts as usize];
        for (number, case) in cases.iter().enumerate() {
            let meta = TensorMeta::new(format!("t{number}"), DType::BF16, &*case.shape);
            model.add(Tensor::new(meta.clone(), case.seed));
            let mut owners = case.owners.iter().cycle();
            for region in grid(&case.shape, &case.held) {
                // One holder or two.
                let owner = usize::from(*owners.next().unwrap());
                holds[owner % trainers as usize].push((meta.clone(), region.clone()));
                let other = usize::from(*owners.next().unwrap());
                if other.is_multiple_of(3) && other % trainers as usize != owner % trainers as usize {
                    holds[other % trainers as usize].push((meta.clone(), region));
                }
            }
            for region in grid(&case.shape, &case.wanted) {
                let wanted = Wanted::whole(meta.clone()).part(region);
                let wanted = if case.quantized { wanted.quantized(format) } else { wanted };
                let wants = &mut wants[usize::from(*owners.next().unwrap()) % rollouts as usize];
                wants.push(wanted);
            }
        }
        let mut group = Group::new(&model, &holds, &wants);
        for version in [1, 2] {
            group.update(version).unwrap();
            group.check(version);
        }
    }
}

fn halves() -> (Model, Vec<Boxes>, Vec<Vec<Wanted>>) {
    let mut model = Model::default();
    let meta = TensorMeta::new("w", DType::BF16, [300, 200]);
    model.add(Tensor::new(meta.clone(), 5));
    let rows = |start, n| (meta.clone(), part(&[start, 0], &[n, 200]));
    let cols = |start, n| Wanted::whole(meta.clone()).part(part(&[0, start], &[300, n]));
    let wants = vec![vec![cols(0, 100)], vec![cols(100, 100)]];
    (model, vec![vec![rows(0, 150)], vec![rows(150, 150)]], wants)
}

#[test]
fn what_nobody_holds_or_does_not_fit_is_named_and_leaves_the_version_that_is_there() {
    let (model, holds, wants) = halves();
    let mut group = Group::new(&model, &holds, &wants);
    group.update(1).unwrap();
    let lower = holds[1][0].clone();
    let hole = (lower.0.clone(), part(&[160, 0], &[140, 200]));
    let other = (TensorMeta::new("w", DType::BF16, [300, 201]), part(&[150, 0], &[150, 201]));
    let f32 = (TensorMeta::new("w", DType::F32, [300, 200]), lower.1.clone());
    for (held, kind, words) in [
        (vec![hole], ErrorKind::Weight, "hold"),
        (vec![other], ErrorKind::Mismatch, "w"),
        (vec![f32], ErrorKind::Mismatch, "F32"),
        (vec![lower.clone(), lower.clone()], ErrorKind::Weight, "overlap"),
    ] {
        group.holds[1] = held;
        let errors = group.update(2).unwrap_err();
        for error in &errors {
            assert_eq!(error.kind(), kind, "{error}");
            assert_eq!(error.report().tensor.as_deref(), Some("w"), "{error}");
            assert!(error.report().rank.is_some() && error.to_string().contains(words), "{error}");
        }
        assert_eq!(errors.len(), 4, "every rank hears of it");
        for rollout in &group.rollouts {
            assert_eq!(rollout.state(), &TensorState::Active(Version(1)), "nothing was written");
        }
        group.check(1);
    }
    group.holds[1] = vec![lower];
    group.update(3).unwrap();
    group.check(3);
}

#[test]
fn a_weight_that_fails_while_tensors_are_written_leaves_them_without_a_version_until_the_next_update()
 {
    let (model, holds, wants) = halves();
    let mut group = Group::new(&model, &holds, &wants);
    group.update(1).unwrap();
    group.fails = Some(Rank(1));
    let errors = group.update(2).unwrap_err();
    let named = errors.iter().filter(|error| error.report().rank == Some(Rank(1))).count();
    assert_eq!((errors.len(), named), (4, 3), "all but itself hear who: {errors:?}");
    for rollout in &group.rollouts {
        let TensorState::Updating { version: Version(2), failed: Some(_) } = rollout.state() else {
            panic!("{:?}", rollout.state())
        };
        let error = rollout.read(|_| Ok(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::State);
        assert!(error.to_string().contains("version 2 failed, and they have to be updated again"));
    }
    group.fails = None;
    group.update(3).unwrap();
    group.check(3);
}

/// Many tensors, which one trainer holds and one rollout wants: as many bytes as two batches have at least.
fn many() -> (Model, Vec<Boxes>, Vec<Vec<Wanted>>) {
    let metas: Vec<TensorMeta> =
        (0..264).map(|at| TensorMeta::new(format!("w.{at}"), DType::BF16, [260, 512])).collect();
    let mut model = Model::default();
    for (meta, seed) in metas.iter().zip(0..) {
        model.add(Tensor::new(meta.clone(), seed));
    }
    let whole = |meta: &TensorMeta| (meta.clone(), TensorBox::whole(&meta.shape));
    let holds = metas.iter().map(whole).collect();
    (model, vec![holds], vec![metas.into_iter().map(Wanted::whole).collect()])
}

#[test]
fn ranks_that_are_finalized_have_ended_what_the_transport_does_for_them() {
    let (model, holds, wants) = halves();
    let mut group = Group::new(&model, &holds, &wants);
    group.update(1).unwrap();
    assert_eq!(group.finalize(), 4);
}

#[test]
fn a_trainer_writes_while_its_stream_is_read_once_it_has_sent_the_same_before() {
    let (model, holds, wants) = many();
    let mut group = Group::new(&model, &holds, &wants);
    group.update(1).unwrap();
    group.stops_at = Some(263);
    for version in [2, 3] {
        assert!(group.update(version).unwrap().plan_reused);
        group.check(version);
    }
}

#[test]
fn a_rollout_whose_memory_digests_itself_verifies_what_is_written_while_trainers_still_write() {
    let (model, holds, wants) = many();
    let mut group = Group::new(&model, &holds, &wants);
    group.digest_in_place();
    group.update(1).unwrap();
    group.stops_at = Some(263);
    for version in [2, 3] {
        group.update(version).unwrap();
        group.check(version);
    }
    // The stream goes on only when the first bytes have been found to be others.
    group.garble(true);
    let errors = group.update(4).unwrap_err();
    for error in errors {
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::Digest, Some(Rank(0))));
        assert!(error.report().tensor.is_some(), "{error}");
    }
    group.garble(false);
    group.update(5).unwrap();
    group.check(5);
}

#[test]
fn a_stream_that_is_another_one_only_at_its_end_is_planned_again_within_the_update() {
    let (model, holds, wants) = many();
    let mut group = Group::new(&model, &holds, &wants);
    group.update(1).unwrap();
    let whole = group.holds[0].pop().unwrap();
    // Cut in two, so that its box differs and there is one more; found before and after something was written.
    let halves = [part(&[0, 0], &[100, 512]), part(&[100, 0], &[160, 512])]
        .map(|half| (whole.0.clone(), half));
    group.holds[0].extend(halves);
    for (version, stops_at, reused) in [(2, None, false), (3, Some(263), true)] {
        group.stops_at = stops_at;
        assert_eq!(group.update(version).unwrap().plan_reused, reused, "version {version}");
        group.check(version);
    }
    group.holds[0].truncate(263);
    group.holds[0].push(whole);
    assert!(!group.update(4).unwrap().plan_reused);
    group.check(4);
    // A tensor that nobody holds any more, seen after something was written: the rollout has to be updated again.
    let last = group.holds[0].pop().unwrap();
    group.stops_at = Some(262);
    let errors = group.update(5).unwrap_err();
    assert!(errors.iter().all(|error| error.report().tensor.as_deref() == Some("w.263")));
    let TensorState::Updating { version: Version(5), failed: Some(_) } = group.rollouts[0].state()
    else {
        panic!("{:?}", group.rollouts[0].state())
    };
    group.holds[0].push(last);
    group.stops_at = None;
    group.update(6).unwrap();
    group.check(6);
}

#[test]
fn a_stream_that_breaks_off_fails_the_update_on_every_rank_at_once_and_leaves_the_version() {
    let (model, holds, wants) = halves();
    let mut group = Group::new(&model, &holds, &wants);
    group.update(1).unwrap();
    for rank in [Rank(0), Rank(1)] {
        group.breaks_off = Some(rank);
        let begun = std::time::Instant::now();
        let errors = group.update(2).unwrap_err();
        assert!(begun.elapsed().as_secs() < 5, "nobody waits for a deadline");
        assert_eq!(errors.len(), 4, "{errors:?}");
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Source, "{error}");
        }
        for rollout in &group.rollouts {
            assert_eq!(rollout.state(), &TensorState::Active(Version(1)));
        }
    }
    group.breaks_off = None;
    group.update(3).unwrap();
    group.check(3);
}

#[test]
fn a_trainer_that_sends_another_version_fails_the_update_on_every_rank_at_once() {
    let (model, holds, wants) = halves();
    let mut group = Group::new(&model, &holds, &wants);
    group.update(1).unwrap();
    for (version, own) in [(2, 1), (2, 3)] {
        group.behind = Some((Rank(1), own));
        let begun = std::time::Instant::now();
        let errors = group.update(version).unwrap_err();
        assert!(begun.elapsed().as_secs() < 5, "nobody waits for a deadline");
        assert_eq!(errors.len(), 4, "{errors:?}");
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
            let expected = format!("version {version} began, {own} was expected");
            assert!(error.to_string().contains(&expected), "{error}");
        }
        for rollout in &group.rollouts {
            assert_eq!(rollout.state(), &TensorState::Active(Version(1)));
        }
    }
    group.behind = None;
    group.update(4).unwrap();
    group.check(4);
}

#[test]
fn bytes_that_changed_on_their_way_are_found_and_named() {
    let (model, holds, wants) = halves();
    let mut group = Group::new(&model, &holds, &wants);
    group.update(1).unwrap();
    group.garble(true);
    let errors = group.update(2).unwrap_err();
    for error in errors {
        assert_eq!((error.kind(), error.report().recovery), (ErrorKind::Digest, Recovery::Retry));
        assert_eq!(error.report().tensor.as_deref(), Some("w"), "{error}");
        assert!(error.report().rank.is_some(), "{error}");
    }
    group.garble(false);
    group.update(3).unwrap();
    group.check(3);
}

#[test]
fn what_is_not_finite_fails_on_every_rank_with_the_tensors_name() {
    let mut model = Model::default();
    let meta = TensorMeta::new("w", DType::BF16, [130, 64]);
    let mut tensor = Tensor::new(meta.clone(), 5);
    tensor.nan_at = Some(129 * 64);
    model.add(tensor);
    let rows = |start, n| vec![(meta.clone(), part(&[start, 0], &[n, 64]))];
    let format = Fp8Format { non_finite: NonFinite::Error, ..Fp8Format::default() };
    let wants = vec![vec![Wanted::whole(meta.clone()).quantized(format)]];
    let mut group = Group::new(&model, &[rows(0, 100), rows(100, 30)], &wants);
    let errors = group.update(1).unwrap_err();
    assert!(errors.iter().all(|error| error.report().tensor.as_deref() == Some("w")), "{errors:?}");
}

#[test]
fn the_plan_is_kept_as_long_as_nobody_declares_anything_else() {
    let (model, holds, wants) = halves();
    let mut group = Group::new(&model, &holds, &wants);
    assert!(!group.update(1).unwrap().plan_reused);
    assert!(group.update(2).unwrap().plan_reused);
    let swapped: Vec<_> = holds.iter().rev().cloned().collect();
    group.holds = swapped;
    assert!(!group.update(3).unwrap().plan_reused);
    group.check(3);
    assert!(group.update(4).unwrap().plan_reused);
    group.check(4);
}

#[test]
fn what_cannot_be_placed_is_refused_by_name() -> Result<()> {
    let meta = TensorMeta::new("w", DType::BF16, [4, 4]);
    let per_tensor = Fp8Format { granularity: Granularity::PerTensor, ..Fp8Format::default() };
    let on_gpus = Fp8Format { mode: Mode::TritonGpu, ..Fp8Format::default() };
    for wanted in [
        Wanted::whole(meta.clone()).part(part(&[2, 0], &[3, 4])),
        Wanted::whole(TensorMeta::new("w", DType::F4, [4, 4])),
        Wanted::whole(meta.clone()).quantized(per_tensor),
        Wanted::whole(meta.clone()).quantized(on_gpus),
        Wanted::whole(TensorMeta::new("w", DType::BF16, [4])).quantized(Fp8Format::default()),
    ] {
        let error = placed::Layout::new([wanted]).unwrap_err();
        assert_eq!(error.report().tensor.as_deref(), Some("w"), "{error}");
    }
    let box_of_it = Weight::from_meta(TensorMeta::new("w", DType::BF16, [2, 4]), vec![0; 16])?;
    box_of_it.of_box([4, 4], part(&[2, 0], &[2, 4]))?;
    Ok(())
}

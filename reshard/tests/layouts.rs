//! Layouts of frameworks, beside what their definitions say of each element.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_core::{DType, ErrorKind, Rank, TensorBox, TensorMeta};
use proptest::prelude::*;
use reshard::{
    FusedPart, FusedTensor, Layout, Links, Mesh, Parallelism, Placement, Sharding, plan,
};

fn meta(name: &str, shape: &[u64]) -> TensorMeta {
    TensorMeta::new(name, DType::BF16, shape)
}

fn mesh(shape: &[u32]) -> Mesh {
    Mesh::new(shape, (0..shape.iter().product()).map(Rank)).unwrap()
}

/// The boxes of each rank as text.
fn text(layout: &Layout) -> Vec<String> {
    let ranks = layout.shares().iter().flat_map(|share| share.ranks.iter().copied());
    let all: BTreeMap<Rank, Vec<String>> = ranks
        .map(|rank| (rank, layout.boxes_of(rank).map(ToString::to_string).collect()))
        .collect();
    all.into_iter().map(|(rank, boxes)| format!("{rank}: {}", boxes.join(" "))).collect()
}

#[test]
fn chunks_are_those_of_torch_uneven_and_empty_ones_too() {
    use Placement::{Replicate, Shard};
    let rows = |n: u64, ranks: u32| {
        let layout = mesh(&[ranks]).layout(&[n, 2], &[Shard(0)]).unwrap();
        let rows = layout.shares().iter().map(|share| share.region.ranges()[0].clone());
        rows.map(|range| range.end - range.start).collect::<Vec<_>>()
    };
    assert_eq!(rows(10, 4), [3, 3, 3, 1]);
    // torch.chunk(5 rows, 4) has three chunks: the last rank has nothing.
    assert_eq!(rows(5, 4), [2, 2, 1]);
    assert_eq!(rows(2, 4), [1, 1]);

    // Two dimensions of a mesh that shard one of the tensor divide one after the other.
    let both = mesh(&[2, 2]).layout(&[6, 4], &[Shard(0), Shard(0)]).unwrap();
    assert_eq!(
        text(&both),
        ["0: [0..2, 0..4]", "1: [2..3, 0..4]", "2: [3..5, 0..4]", "3: [5..6, 0..4]"]
    );
    let columns = mesh(&[2, 2]).layout(&[6, 4], &[Replicate, Shard(1)]).unwrap();
    assert_eq!(
        text(&columns),
        ["0: [0..6, 0..2]", "1: [0..6, 2..4]", "2: [0..6, 0..2]", "3: [0..6, 2..4]"]
    );
    assert_eq!(columns.shares().len(), 2);
}

#[test]
fn fsdp_over_tensor_parallelism_divides_what_a_rank_would_have() {
    use Placement::{Shard, StridedShard};
    // FSDP2's mesh is (data parallel, tensor parallel): rank 1 has the first half of the second half.
    let layout = mesh(&[2, 2]).layout(&[8, 4], &[StridedShard(0), Shard(0)]).unwrap();
    assert_eq!(
        text(&layout),
        ["0: [0..2, 0..4]", "1: [4..6, 0..4]", "2: [2..4, 0..4]", "3: [6..8, 0..4]"]
    );
    let same: Parallelism = "tp=2,fsdp=2".parse().unwrap();
    let q = meta("model.layers.0.self_attn.q_proj.weight", &[8, 4]);
    let sharding = same.sharding(Rank(0), [(q.clone(), [].into())]).unwrap();
    assert_eq!(text(&sharding.get(&q.name).unwrap().layout), text(&layout));
}

#[test]
fn meshes_that_contradict_are_refused() {
    let mesh = mesh(&[2, 2]);
    assert!(mesh.layout(&[4], &[Placement::Shard(0)]).is_err());
    assert!(mesh.layout(&[4], &[Placement::Shard(1), Placement::Replicate]).is_err());
    assert!(Mesh::new(&[2, 2], (0..3).map(Rank)).is_err());
    let twice = Mesh::new(&[3], [Rank(0), Rank(5), Rank(5)]).unwrap_err();
    assert_eq!(twice.report().rank, Some(Rank(5)));
}

/// A model of two layers with four experts each.
fn model() -> Vec<(TensorMeta, Arc<[u64]>)> {
    let mut metas =
        vec![meta("model.embed_tokens.weight", &[32, 8]), meta("lm_head.weight", &[32, 8])];
    metas.push(meta("model.norm.weight", &[8]));
    for layer in 0..2 {
        let at = format!("model.layers.{layer}");
        metas.push(meta(&format!("{at}.self_attn.q_proj.weight"), &[16, 8]));
        metas.push(meta(&format!("{at}.self_attn.k_proj.weight"), &[4, 8]));
        metas.push(meta(&format!("{at}.self_attn.o_proj.weight"), &[8, 16]));
        metas.push(meta(&format!("{at}.self_attn.q_proj.bias"), &[16]));
        metas.push(meta(&format!("{at}.self_attn.o_proj.bias"), &[8]));
        metas.push(meta(&format!("{at}.mlp.gate.weight"), &[4, 8]));
        for expert in 0..4 {
            metas.push(meta(&format!("{at}.mlp.experts.{expert}.up_proj.weight"), &[12, 8]));
            metas.push(meta(&format!("{at}.mlp.experts.{expert}.down_proj.weight"), &[8, 12]));
        }
    }
    metas.into_iter().map(|meta| (meta, [].into())).collect()
}

fn sharding(layout: &str, first: u32) -> Sharding {
    layout.parse::<Parallelism>().unwrap().sharding(Rank(first), model()).unwrap()
}

#[test]
fn megatrons_ranks_have_the_parts_of_its_order_of_parallelisms() {
    // Ranks are tp + 2 (dp + 2 pp) for all but experts, and etp + 2 (ep + 2 pp) for these.
    let sharding = sharding("tp=2,pp=2,ep=2,etp=2,ranks=8", 0);
    let of = |name: &str| text(&sharding.get(name).unwrap().layout);
    assert_eq!(
        of("model.layers.0.self_attn.q_proj.weight"),
        ["0: [0..8, 0..8]", "1: [8..16, 0..8]", "2: [0..8, 0..8]", "3: [8..16, 0..8]"]
    );
    assert_eq!(
        of("model.layers.1.self_attn.o_proj.weight"),
        ["4: [0..8, 0..8]", "5: [0..8, 8..16]", "6: [0..8, 0..8]", "7: [0..8, 8..16]"]
    );
    assert_eq!(of("model.layers.0.self_attn.q_proj.bias")[1], "1: [8..16]");
    assert_eq!(of("model.layers.0.self_attn.o_proj.bias")[1], "1: [0..8]");
    assert_eq!(of("model.layers.0.mlp.gate.weight")[3], "3: [0..4, 0..8]");
    // Experts 0 and 1 are on the first ranks of the group, 2 and 3 on the others.
    let up = |expert: u32| of(&format!("model.layers.0.mlp.experts.{expert}.up_proj.weight"));
    assert_eq!(up(1), ["0: [0..6, 0..8]", "1: [6..12, 0..8]"]);
    assert_eq!(up(2), ["2: [0..6, 0..8]", "3: [6..12, 0..8]"]);
    let down = of("model.layers.1.mlp.experts.3.down_proj.weight");
    assert_eq!(down, ["6: [0..8, 0..6]", "7: [0..8, 6..12]"]);
    // The embedding is on the first stage, the head and what is in no layer on the last.
    assert_eq!(of("model.embed_tokens.weight")[0], "0: [0..16, 0..8]");
    assert_eq!(of("lm_head.weight")[0], "4: [0..16, 0..8]");
    assert_eq!(of("model.norm.weight")[3], "7: [0..8]");
}

#[test]
fn heads_of_keys_that_are_fewer_than_ranks_are_on_several() {
    let sharding = sharding("tp=4,kv-heads=2", 10);
    let of = |name: &str| text(&sharding.get(name).unwrap().layout);
    assert_eq!(
        of("model.layers.0.self_attn.k_proj.weight"),
        ["10: [0..2, 0..8]", "11: [0..2, 0..8]", "12: [2..4, 0..8]", "13: [2..4, 0..8]"]
    );
    assert_eq!(of("model.layers.0.self_attn.q_proj.weight")[1], "11: [4..8, 0..8]");
}

#[test]
fn layouts_are_read_from_text_and_wrong_ones_are_refused() {
    let read = |text: &str| text.parse::<Parallelism>();
    assert_eq!(read("tp=8,ep=64").unwrap().ranks, 64);
    assert_eq!(read("tp=8,pp=2,fsdp=4").unwrap().ranks, 64);
    let text = "tp=2,pp=2,ep=2,etp=2,fsdp=2,kv-heads=4,ranks=16";
    assert_eq!(read(text).unwrap().to_string(), text);
    // Tensor parallelism divides experts too, unless they are divided in another way.
    for (text, etp) in [("tp=4", 4), ("tp=4,etp=1", 1), ("tp=4,ep=8", 1), ("tp=4,ep=2,etp=2", 2)] {
        assert_eq!(read(text).unwrap().etp, etp, "{text}");
    }
    for wrong in
        ["", "tp", "tp=x", "tp=0", "np=2", "tp=3,ranks=8", "tp=65536,fsdp=65536", "ep=2,ranks=7"]
    {
        assert_eq!(read(wrong).unwrap_err().kind(), ErrorKind::Config, "{wrong}");
    }
    let too_many = read("ep=8").unwrap().sharding(Rank(0), model()).unwrap_err();
    assert!(too_many.to_string().contains("ep=8 for 4 experts"), "{too_many}");
}

fn layouts() -> impl Strategy<Value = Parallelism> {
    let two = || prop::sample::select(&[1_u32, 2, 4][..]);
    (two(), 1_u32..3, two(), 1_u32..3, two(), 1_u32..3, 0_u32..3).prop_filter_map(
        "the sizes have to divide the ranks",
        |(tp, pp, ep, etp, fsdp, more, kv_heads)| {
            let ranks = pp * (tp * fsdp).max(ep * etp) * more;
            let layout = Parallelism { ranks, tp, pp, ep, etp, fsdp, kv_heads };
            layout.sharding(Rank(0), model()).ok().map(|_| layout)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_model_in_any_layout_has_all_elements_and_comes_whole_to_any_other(
        one in layouts(), other in layouts(),
    ) {
        let held = one.sharding(Rank(0), model()).unwrap();
        let wanted = other.sharding(Rank(one.ranks), model()).unwrap();
        let plan = plan(&held, &wanted, &Links::new()).unwrap();
        for rank in (one.ranks..one.ranks + other.ranks).map(Rank) {
            let wants: u64 = wanted
                .tensors()
                .flat_map(|tensor| tensor.layout.boxes_of(rank).map(|region| region.elements() * 2))
                .sum();
            prop_assert_eq!(plan.load(rank).received, wants);
        }
        // Ranks of a stage hold the same number of elements of each layer, or FSDP made them uneven.
        if one.fsdp == 1 {
            let load = |rank: u32| -> u64 {
                let tensors = held.tensors().filter(|t| t.meta.name.contains("layers.0"));
                tensors.flat_map(|t| t.layout.boxes_of(Rank(rank)).map(TensorBox::elements)).sum()
            };
            prop_assert!((1..one.ranks / one.pp).all(|rank| load(rank) == load(0)));
        }
    }

    #[test]
    fn any_text_is_a_layout_or_an_error_and_layouts_survive_being_written(
        text in prop_oneof![".{0,30}", "((tp|pp|ep|etp|fsdp|kv-heads|ranks)=[0-9]{1,12},?){1,6}"],
    ) {
        if let Ok(layout) = text.parse::<Parallelism>() {
            prop_assert_eq!(layout.to_string().parse::<Parallelism>().unwrap(), layout);
        }
    }

    #[test]
    fn a_box_of_a_fused_tensor_is_the_elements_that_fusing_puts_there(
        kind in 0..4_u8, groups in 1_u64..4, rows in 1_u64..4, cols in 1_u64..4,
        cuts in prop::collection::vec(0_u64..30, 6),
    ) {
        let rows = rows * groups;
        let q = meta("q", &[rows * 2, cols]);
        let (k, v) = (meta("k", &[rows, cols]), meta("v", &[rows, cols]));
        // Each element is its tensor and its place in it.
        let elements = |meta: &TensorMeta| -> Vec<(String, u64)> {
            (0..meta.elements().unwrap()).map(|at| (meta.name.to_string(), at)).collect()
        };
        let part = |meta: &TensorMeta, group: u64| {
            let all = elements(meta);
            let size = all.len() / groups as usize;
            all[group as usize * size..][..size].to_vec()
        };
        let three = [q.clone(), k.clone(), v.clone()];
        let (fused, naive) = match kind {
            0 => (
                FusedTensor::concatenated(&three).unwrap(),
                three.iter().flat_map(elements).collect::<Vec<_>>(),
            ),
            1 => (
                FusedTensor::interleaved(&three, groups).unwrap(),
                (0..groups).flat_map(|g| three.iter().flat_map(move |m| part(m, g)).collect::<Vec<_>>()).collect(),
            ),
            2 => {
                let experts = [k.clone(), v.clone()].map(FusedTensor::from).to_vec();
                let fused = FusedTensor::stacked(experts).unwrap();
                (fused, [&k, &v].into_iter().flat_map(elements).collect())
            }
            _ => {
                let pairs = ["a", "b", "c"].map(|expert| {
                    ["gate", "up"].map(|name| meta(&format!("{expert}.{name}"), &[rows, cols]))
                });
                let members = pairs.iter().map(|pair| FusedTensor::concatenated(pair).unwrap());
                let fused = FusedTensor::stacked(members.collect()).unwrap();
                (fused, pairs.iter().flatten().flat_map(elements).collect())
            }
        };
        let whole = TensorBox::whole(fused.shape());
        prop_assert_eq!(whole.elements(), naive.len() as u64);
        let region = (0..fused.shape().len()).fold(whole.clone(), |region, dimension| {
            let n = fused.shape()[dimension];
            let (a, b) = (cuts[dimension] % n, cuts[dimension + 3] % n);
            region.narrowed(dimension, a.min(b)..a.max(b) + 1)
        });
        let places = |region: &TensorBox, shape: &[u64]| -> Vec<u64> {
            region.ranges().iter().zip(shape).fold(vec![0], |all, (range, n)| {
                all.iter().flat_map(|at| range.clone().map(move |i| at * n + i)).collect()
            })
        };
        let mut found: Vec<(u64, (String, u64))> = Vec::new();
        for FusedPart { meta, region, at } in fused.parts_of(&region) {
            let inner = places(&region, &meta.shape).into_iter();
            let outer = places(&at, fused.shape()).into_iter();
            found.extend(outer.zip(inner.map(|at| (meta.name.to_string(), at))));
        }
        found.sort_unstable();
        let expected: Vec<_> = places(&region, fused.shape())
            .into_iter()
            .map(|at| (at, naive[at as usize].clone()))
            .collect();
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn a_shard_of_megatrons_fused_attention_is_a_shard_of_each_part() {
    // Four groups of two queries, heads of three rows: linear_qkv over two ranks.
    let parts = [meta("q", &[24, 5]), meta("k", &[12, 5]), meta("v", &[12, 5])];
    let fused = FusedTensor::interleaved(&parts, 4).unwrap();
    assert_eq!(fused.shape(), [48, 5]);
    let layout = mesh(&[2]).layout(fused.shape(), &[Placement::Shard(0)]).unwrap();
    for (meta, layout) in fused.layouts(&layout).unwrap() {
        let rows = meta.shape[0];
        let of = |rank| {
            let boxes = layout.boxes_of(Rank(rank)).map(|region| region.ranges()[0].clone());
            let mut rows: Vec<u64> = boxes.flatten().collect();
            rows.sort_unstable();
            rows
        };
        assert_eq!(of(0), (0..rows / 2).collect::<Vec<_>>(), "{}", meta.name);
        assert_eq!(of(1), (rows / 2..rows).collect::<Vec<_>>(), "{}", meta.name);
    }
}

#[test]
fn experts_in_one_stack_are_on_the_ranks_that_fsdp_gives_their_rows() {
    let experts: Vec<TensorMeta> =
        (0..4).map(|e| meta(&format!("experts.{e}.up"), &[6, 5])).collect();
    let stack = experts.iter().cloned().map(FusedTensor::from).collect();
    let fused = FusedTensor::stacked(stack).unwrap();
    let layout = mesh(&[2]).layout(fused.shape(), &[Placement::Shard(0)]).unwrap();
    let layouts = fused.layouts(&layout).unwrap();
    assert_eq!(text(&layouts[1].1), ["0: [0..6, 0..5]"]);
    assert_eq!(text(&layouts[2].1), ["1: [0..6, 0..5]"]);
}

#[test]
fn fused_tensors_that_do_not_add_up_are_refused() {
    let (a, b) = (meta("a", &[2, 3]), meta("b", &[2, 4]));
    let named = |error: engine_core::Error| error.report().tensor.clone();
    assert_eq!(
        named(FusedTensor::concatenated(&[a.clone(), b.clone()]).unwrap_err()).unwrap(),
        "b"
    );
    assert_eq!(
        named(FusedTensor::interleaved(std::slice::from_ref(&a), 3).unwrap_err()).unwrap(),
        "a"
    );
    let scalar = meta("scalar", &[]);
    assert!(FusedTensor::concatenated(std::slice::from_ref(&scalar)).is_err());
    for (tensors, groups) in
        [(vec![scalar], 1), (vec![a.clone()], 0), (vec![meta("none", &[0, 3])], 1 << 60)]
    {
        let error = FusedTensor::interleaved(&tensors, groups).unwrap_err();
        assert_eq!(named(error).unwrap(), *tensors[0].name, "{groups} groups");
    }
    let stack = vec![FusedTensor::from(a.clone()), FusedTensor::from(b)];
    assert!(FusedTensor::stacked(stack).is_err());
    let whole = TensorBox::whole(&[2, 3]);
    let part = |at: TensorBox| FusedPart { meta: a.clone(), region: whole.clone(), at };
    assert!(FusedTensor::new(&[3, 3], vec![part(whole.clone())]).is_err(), "a hole");
    let twice = FusedTensor::new(&[2, 3], vec![part(whole.clone()), part(whole.clone())]);
    assert_eq!(named(twice.unwrap_err()).unwrap(), "a");
}

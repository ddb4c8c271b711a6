//! Boxes of a tensor, quantised by ranks that each have one, are the bytes of the tensor quantised whole.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_core::{DType, Rank, TensorBox, TensorMeta};
use half::{bf16, f16};
use proptest::prelude::*;
use quant_fp8::{
    BlockMaxima, BoxSource, Codec, Fp8Format, Granularity, Mode, NonFinite, Precast, QuantError,
    Source, SourceType, Store,
};
use reshard::{Layout, Links, Mesh, Placement, ShardedTensor, Sharding, plan};

const TYPES: [SourceType; 3] = [SourceType::Bf16, SourceType::F16, SourceType::F32];

#[derive(Clone, Debug)]
struct Tensor {
    ty: SourceType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    fn whole(&self) -> TensorBox {
        TensorBox::whole(&self.sides())
    }

    fn sides(&self) -> Vec<u64> {
        self.shape.iter().map(|&side| side as u64).collect()
    }

    /// The bytes that a rank has which holds a box.
    fn part(&self, region: &TensorBox) -> Vec<u8> {
        let size = self.ty.size();
        let places = places(region, &self.whole());
        places.into_iter().flat_map(|at| self.bytes[at * size..(at + 1) * size].to_vec()).collect()
    }

    fn quantized(&self, codec: Codec, format: &Fp8Format) -> Result<Quantized, QuantError> {
        let source = Source::new(&self.bytes, self.ty, &self.shape).unwrap();
        let grid = format.granularity.grid(&self.shape).unwrap();
        let mut codes = vec![0xaa; grid.elements()];
        let mut scales = vec![-1_f32; grid.scales()];
        let (elements, store) = (0..grid.elements(), Store::NonTemporal);
        codec.quantize(&source, format, elements, &mut codes, &mut scales, store)?;
        Ok((codes, scales.into_iter().map(f32::to_bits).collect()))
    }
}

type Quantized = (Vec<u8>, Vec<u32>);

/// Where the elements of a box lie in the row-major elements of another one around it.
fn places(region: &TensorBox, around: &TensorBox) -> Vec<usize> {
    region.ranges().iter().zip(around.ranges()).fold(vec![0], |places, (range, outer)| {
        let step = |place: &usize| {
            let first = place * (outer.end - outer.start) as usize;
            let inner = range.start - outer.start..range.end - outer.start;
            inner.map(move |at| first + at as usize).collect::<Vec<_>>()
        };
        places.iter().flat_map(step).collect()
    })
}

/// What all boxes together have, each quantised by itself after the maxima were exchanged.
fn quantized_in_boxes(
    tensor: &Tensor,
    boxes: &[TensorBox],
    codec: Codec,
    format: &Fp8Format,
) -> Result<Quantized, QuantError> {
    let held: Vec<Vec<u8>> = boxes.iter().map(|region| tensor.part(region)).collect();
    let source = |at: usize| BoxSource::new(&held[at], tensor.ty, &tensor.shape, &boxes[at]);
    let partial: Vec<BlockMaxima> = (0..boxes.len())
        .map(|at| codec.box_maxima(&source(at)?, format))
        .collect::<Result<_, _>>()?;
    let grid = format.granularity.grid(&tensor.shape)?;
    let all_blocks = tensor.whole().in_granules(&grid.block().map(|side| side as u64));
    let mut codes = vec![0x55; grid.elements()];
    let mut scales = vec![0; grid.scales()];
    for at in 0..boxes.len() {
        let mut maxima = partial[at].clone();
        for (other, theirs) in partial.iter().enumerate() {
            if let Some(shared) = maxima.blocks().intersection(theirs.blocks())
                && other != at
            {
                maxima.merge(&shared, &theirs.of(&shared)?)?;
            }
        }
        let mut own = vec![0xaa; boxes[at].elements() as usize];
        let mut own_scales = vec![-1_f32; maxima.blocks().elements() as usize];
        let (out, store) = (&mut own[..], Store::NonTemporal);
        codec.quantize_box(&source(at)?, format, &maxima, out, &mut own_scales, store)?;
        for (place, code) in places(&boxes[at], &tensor.whole()).into_iter().zip(own) {
            codes[place] = code;
        }
        for (place, scale) in places(maxima.blocks(), &all_blocks).into_iter().zip(own_scales) {
            scales[place] = scale.to_bits();
        }
    }
    Ok((codes, scales))
}

fn any_format() -> impl Strategy<Value = Fp8Format> {
    let granularity = prop_oneof![
        Just(Granularity::default()),
        Just(Granularity::Block { rows: 32, cols: 32 }),
        Just(Granularity::Block { rows: 64, cols: 96 }),
        Just(Granularity::PerRow),
        Just(Granularity::PerTensor),
    ];
    (
        prop::sample::select(&[Mode::Triton, Mode::Pytorch, Mode::Ue8m0][..]),
        granularity,
        prop::sample::select(&[Precast::Bf16, Precast::None][..]),
        prop::sample::select(&[NonFinite::Error, NonFinite::Reproduce][..]),
    )
        .prop_map(|(mode, granularity, precast, non_finite)| Fp8Format {
            mode,
            granularity,
            precast,
            non_finite,
            ..Fp8Format::default()
        })
}

/// Weights, small ones, or any bits: NaN and infinity among them.
fn any_tensor() -> impl Strategy<Value = Tensor> {
    let shape = prop_oneof![
        (1..200_usize, 1..300_usize).prop_map(|(rows, cols)| vec![rows, cols]),
        (1..4_usize, 1..100_usize, 1..200_usize).prop_map(|(n, rows, cols)| vec![n, rows, cols]),
    ];
    (prop::sample::select(&TYPES[..]), shape, any::<u64>(), 0..4_u8).prop_map(
        |(ty, shape, seed, kind)| {
            let mut state = seed | 1;
            let mut next = || {
                state = state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
                state
            };
            let elements: usize = shape.iter().product();
            let element = |bits: u64| {
                let value = (bits >> 40) as f32 / 16_777_216.0 - 0.5;
                let value = match (kind, bits % 4001) {
                    (1, 0) => f32::NAN,
                    (1, 1) => f32::NEG_INFINITY,
                    (2, _) => value * 1e-30,
                    _ => value,
                };
                match (ty, kind) {
                    (_, 3) => bits.to_be_bytes()[..ty.size()].to_vec(),
                    (SourceType::Bf16, _) => bf16::from_f32(value).to_le_bytes().to_vec(),
                    (SourceType::F16, _) => f16::from_f32(value).to_le_bytes().to_vec(),
                    (SourceType::F32, _) => value.to_le_bytes().to_vec(),
                }
            };
            let bytes = (0..elements).flat_map(|_| element(next())).collect();
            Tensor { ty, shape, bytes }
        },
    )
}

/// A tensor cut along each side in any number of places.
fn cut(shape: &[u64], cuts: &[Vec<u64>]) -> Vec<TensorBox> {
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn boxes_of_a_tensor_have_its_codes_and_scales_however_it_is_cut(
        tensor in any_tensor(),
        format in any_format(),
        cuts in prop::collection::vec(prop::collection::vec(any::<u64>(), 0..3), 3),
    ) {
        let boxes = cut(&tensor.sides(), &cuts);
        for codec in Codec::available() {
            let expected = tensor.quantized(codec, &format);
            match (expected, quantized_in_boxes(&tensor, &boxes, codec, &format)) {
                (Ok(expected), Ok(found)) => {
                    prop_assert!(found == expected, "{} {format:?} {boxes:?}", codec.name());
                }
                (Err(QuantError::NonFinite { .. }), Err(QuantError::NonFinite { .. })) => {}
                (expected, found) => {
                    prop_assert!(false, "{:?} and {:?}", expected.is_ok(), found.is_ok());
                }
            }
        }
    }

    #[test]
    fn a_plans_exchanges_of_maxima_are_all_that_senders_need(
        tensor in any_tensor(),
        format in any_format(),
        (trainers, replicas, rollouts) in (1_u32..7, 1_u32..3, 1_u32..4),
        (held, wanted) in (0..2_usize, 0..2_usize),
    ) {
        let codec = Codec::best();
        let format = Fp8Format { non_finite: NonFinite::Reproduce, ..format };
        let Ok(expected) = tensor.quantized(codec, &format) else { return Ok(()) };
        let sides = tensor.sides();
        let mesh = Mesh::new(&[replicas, trainers], (0..replicas * trainers).map(Rank)).unwrap();
        let held = mesh.layout(&sides, &[Placement::Replicate, Placement::Shard(held)]).unwrap();
        let first = replicas * trainers;
        let mesh = Mesh::new(&[rollouts], (first..first + rollouts).map(Rank)).unwrap();
        let wanted = mesh.layout(&sides, &[Placement::Shard(wanted)]).unwrap();

        let grid = format.granularity.grid(&tensor.shape).unwrap();
        let granule = grid.block().map(|side| side as u64);
        let of = |layout: &Layout| {
            let mut sharding = Sharding::new();
            let meta = TensorMeta::new("w", DType::F8_E4M3, &sides[..]);
            let layout = Arc::new(layout.clone());
            sharding.add(ShardedTensor { meta, granule: Arc::new(granule), layout }).unwrap();
            sharding
        };
        let plan = plan(&of(&held), &of(&wanted), &Links::new()).unwrap();

        // Every sender looks at what it holds, hears what the plan says that it does, and quantises.
        let mut senders: BTreeMap<Rank, (TensorBox, Vec<u8>, BlockMaxima)> = BTreeMap::new();
        for rank in (0..first).map(Rank) {
            let Some(region) = held.boxes_of(rank).next() else { continue };
            let bytes = tensor.part(region);
            let source = BoxSource::new(&bytes, tensor.ty, &tensor.shape, region).unwrap();
            let maxima = codec.box_maxima(&source, &format).unwrap();
            senders.insert(rank, (region.clone(), bytes, maxima));
        }
        let partial: BTreeMap<Rank, BlockMaxima> =
            senders.iter().map(|(&rank, sender)| (rank, sender.2.clone())).collect();
        for telling in plan.maxima(0) {
            let told = partial[&telling.from].of(&telling.blocks).unwrap();
            senders.get_mut(&telling.to).unwrap().2.merge(&telling.blocks, &told).unwrap();
        }
        let all_blocks = tensor.whole().in_granules(&granule);
        for rank in (first..first + rollouts).map(Rank) {
            for transfer in plan.transfers_to(rank) {
                let (region, bytes, maxima) = &senders[&transfer.from];
                let source = BoxSource::new(bytes, tensor.ty, &tensor.shape, region).unwrap();
                let mut codes = vec![0; region.elements() as usize];
                let mut scales = vec![0_f32; maxima.blocks().elements() as usize];
                let (out, store) = (&mut codes[..], Store::Cached);
                codec.quantize_box(&source, &format, maxima, out, &mut scales, store).unwrap();
                let inside = places(&transfer.region, region);
                let outside = places(&transfer.region, &tensor.whole());
                for (inside, outside) in inside.into_iter().zip(outside) {
                    prop_assert_eq!(codes[inside], expected.0[outside], "{:?}", transfer);
                }
                let blocks = transfer.region.in_granules(&granule);
                let inside = places(&blocks, maxima.blocks());
                for (inside, outside) in inside.into_iter().zip(places(&blocks, &all_blocks)) {
                    prop_assert_eq!(scales[inside].to_bits(), expected.1[outside]);
                }
            }
        }
    }
}

#[test]
fn boxes_and_maxima_that_contradict_are_errors() {
    let (codec, format) = (Codec::best(), Fp8Format::default());
    let region = TensorBox::new(&[100, 0], &[100, 64]).unwrap();
    let bytes = vec![0; 100 * 64 * 2];
    let source =
        |shape: &[usize], bytes| BoxSource::new(bytes, SourceType::Bf16, shape, &region).is_err();
    assert!(
        source(&[199, 64], &bytes) && source(&[200], &bytes) && source(&[200, 64], &bytes[2..])
    );
    let source = BoxSource::new(&bytes, SourceType::Bf16, &[200, 64], &region).unwrap();
    let mut maxima = codec.box_maxima(&source, &format).unwrap();
    assert_eq!(maxima.blocks().to_string(), "[0..2, 0..1]");
    assert!(maxima.of(&TensorBox::new(&[1, 0], &[2, 1]).unwrap()).is_err());
    assert!(maxima.merge(&TensorBox::new(&[1, 0], &[1, 1]).unwrap(), &[1, 2]).is_err());
    let mut codes = vec![0; 100 * 64];
    let short =
        codec.quantize_box(&source, &format, &maxima, &mut codes, &mut [0.0], Store::Cached);
    assert!(short.is_err());
    let gpu = Fp8Format { mode: Mode::TritonGpu, ..format };
    assert!(matches!(codec.box_maxima(&source, &gpu), Err(QuantError::CudaOnly)));
}

#[test]
fn a_block_that_is_not_finite_is_named_to_every_rank_that_has_a_part_of_it() {
    let (codec, format) = (Codec::best(), Fp8Format::default());
    let mut bytes = vec![0; 256 * 128 * 2];
    bytes[150 * 128 * 2..][..2].copy_from_slice(&bf16::NAN.to_le_bytes());
    let tensor = Tensor { ty: SourceType::Bf16, shape: vec![256, 128], bytes };
    let boxes =
        [0, 200].map(|row| TensorBox::new(&[row, 0], &[if row == 0 { 200 } else { 56 }, 128]));
    let boxes = boxes.map(Result::unwrap);
    for order in [[0, 1], [1, 0]] {
        let boxes = order.map(|at| boxes[at].clone());
        let error = quantized_in_boxes(&tensor, &boxes, codec, &format).unwrap_err();
        let QuantError::NonFinite { block_row, .. } = error else { panic!("{error}") };
        assert_eq!(block_row, 1);
    }
}

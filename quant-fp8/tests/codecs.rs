//! Every codec gives the bytes of the formula, whatever the shape, range, alignment and type.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::HashSet;
use std::ops::Range;

use engine_core::memory::Pool;
use half::{bf16, f16};
use proptest::prelude::*;
use quant_fp8::{
    Codec, Fp8Format, Granularity, Mode, NonFinite, Precast, QuantError, Source, SourceType, Store,
    copy_non_temporal,
};

const MODES: [Mode; 3] = [Mode::Triton, Mode::Pytorch, Mode::Ue8m0];
const TYPES: [SourceType; 3] = [SourceType::Bf16, SourceType::F16, SourceType::F32];

type Quantized = Result<(Vec<u8>, Vec<u32>), QuantError>;

/// Quantises a range; scales as bits, because NaN is unlike itself.
fn quantize_range(
    codec: Codec,
    source: &Source<'_>,
    format: &Fp8Format,
    elements: Range<usize>,
    store: Store,
) -> Quantized {
    let grid = format.granularity.grid(source.shape()).unwrap();
    let mut codes = vec![0xaa; elements.len()];
    let mut scales = vec![-1f32; grid.scales_of(&elements).len()];
    codec.quantize(source, format, elements, &mut codes, &mut scales, store)?;
    Ok((codes, scales.into_iter().map(f32::to_bits).collect()))
}

fn quantize(codec: Codec, source: &Source<'_>, format: &Fp8Format) -> Quantized {
    let elements = source.shape().iter().product();
    quantize_range(codec, source, format, 0..elements, Store::NonTemporal)
}

fn to_bytes(values: &[f32], ty: SourceType) -> Vec<u8> {
    let bytes = |value: &f32| match ty {
        SourceType::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        SourceType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        SourceType::F32 => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

/// An independent, slow reference: the nearest of the finite codes, by comparing distances.
fn nearest_code(value: f32) -> u8 {
    let values = (0..0x7fu8).map(|code| {
        let (exponent, mantissa) = (i32::from(code >> 3), f64::from(code & 7));
        if exponent == 0 {
            mantissa * 2f64.powi(-9)
        } else {
            (8.0 + mantissa) * 2f64.powi(exponent - 10)
        }
    });
    let magnitude = f64::from(value.abs());
    let distance = |(code, value): &(u8, f64)| ((value - magnitude).abs(), code & 1);
    let (code, _) = (0..0x7fu8)
        .zip(values)
        .min_by(|a, b| distance(a).partial_cmp(&distance(b)).unwrap())
        .unwrap();
    code | if value.is_sign_negative() { 0x80 } else { 0 }
}

/// Codes and scales of one matrix, written as differently from the crate as possible.
fn reference(values: &[f32], [rows, cols]: [usize; 2], format: &Fp8Format) -> (Vec<u8>, Vec<u32>) {
    let (high, wide) = match format.granularity {
        Granularity::Block { rows, cols } => (rows, cols),
        Granularity::PerRow => (1, cols),
        Granularity::PerTensor => (rows, cols),
    };
    let grid_cols = cols.div_ceil(wide);
    let block = |i: usize| i / cols / high * grid_cols + i % cols / wide;
    let values: Vec<f32> = match format.precast {
        Precast::Bf16 => values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
        Precast::None => values.to_vec(),
    };
    let mut maxima = vec![0f32; rows.div_ceil(high) * grid_cols];
    for (i, value) in values.iter().enumerate() {
        maxima[block(i)] = maxima[block(i)].max(value.abs());
    }
    let scales: Vec<(f32, f32)> = maxima
        .iter()
        .map(|&max| match format.mode {
            Mode::Pytorch if max == 0.0 => (1.0, 1.0),
            Mode::Pytorch => (1.0 / (448.0 / max), 448.0 / max),
            Mode::Ue8m0 => {
                let scale = f64::from(max.max(1e-4) / 448.0).log2().ceil().exp2() as f32;
                (scale, 1.0 / scale)
            }
            _ => (max.max(1e-10) / 448.0, 1.0 / (max.max(1e-10) / 448.0)),
        })
        .collect();
    let code = |(i, value): (usize, &f32)| nearest_code(value * scales[block(i)].1);
    let codes = values.iter().enumerate().map(code).collect();
    (codes, scales.into_iter().map(|(scale, _)| scale.to_bits()).collect())
}

/// Deterministic values that look like weights: about normal, with a few outliers, zeros of both
/// signs and subnormals.
fn weights(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut value = || {
        let sum: f32 = (0..4).map(|_| next() as u16).map(f32::from).sum();
        let normal = (sum / 65536.0 - 2.0) * 1.732;
        match next() % 500 {
            0 => 0.0,
            1 => -0.0,
            2 => normal * 1e-8,
            3 => normal * 20.0,
            _ => normal * 0.02,
        }
    };
    (0..n).map(|_| value()).collect()
}

/// All magnitudes up to each maximum, in both signs: every pattern of 16 bits, as one block or several. They are in a mixed order, so that small
/// and large ones are neighbours.
fn all_patterns_are_as_in_the_scalar_codec(
    ty: SourceType,
    maxima: impl IntoIterator<Item = u16>,
    precasts: &[Precast],
) {
    for max in maxima {
        let mut magnitudes: Vec<u16> = (0..=max).collect();
        magnitudes.sort_by_key(|bits| bits.wrapping_mul(0x9e37));
        let both = |bits: u16| [bits, bits | 0x8000];
        let bytes: Vec<u8> =
            magnitudes.into_iter().flat_map(both).flat_map(u16::to_le_bytes).collect();
        let shape = [1, bytes.len() / 2];
        let source = Source::new(&bytes, ty, &shape).unwrap();
        for (mode, &precast) in
            MODES.iter().flat_map(|mode| precasts.iter().map(move |p| (*mode, p)))
        {
            let (non_finite, granularity) = (NonFinite::Reproduce, Granularity::PerTensor);
            let format =
                Fp8Format { mode, granularity, non_finite, precast, ..Fp8Format::default() };
            let expected = quantize(Codec::named("scalar").unwrap(), &source, &format).unwrap();
            for codec in Codec::available() {
                let got = quantize(codec, &source, &format).unwrap();
                assert!(got == expected, "{} {mode:?} {precast:?} up to {max:#x}", codec.name());
            }
        }
    }
}

#[test]
fn all_bf16_patterns_under_many_scales_are_as_in_the_scalar_codec() {
    let maxima =
        (0..64).map(|i| 0x0081 + i * 509).chain((0..128).map(|mantissa| 0x3f80 | mantissa));
    let maxima = maxima.chain([0x0001, 0x007f, 0x0080, 0x7f7f]);
    all_patterns_are_as_in_the_scalar_codec(SourceType::Bf16, maxima, &[Precast::Bf16]);
}

#[test]
fn all_f16_patterns_under_many_scales_are_as_in_the_scalar_codec() {
    let maxima =
        (0..32).map(|i| 0x0401 + i * 979).chain((0..64).map(|mantissa| 0x2c00 | mantissa << 4));
    let maxima = maxima.chain([0x0001, 0x03ff, 0x0400, 0x7bff]);
    let precasts = [Precast::Bf16, Precast::None];
    all_patterns_are_as_in_the_scalar_codec(SourceType::F16, maxima, &precasts);
}

#[test]
fn the_scalar_codec_agrees_with_a_reference_that_compares_distances() {
    let scalar = Codec::named("scalar").unwrap();
    for ty in TYPES {
        for (rows, cols) in [(1, 1), (3, 200), (130, 140), (64, 1)] {
            let values = weights(rows * cols, (rows * cols) as u64);
            let bytes = to_bytes(&values, ty);
            let stored: Vec<f32> = match ty {
                SourceType::Bf16 => values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
                SourceType::F16 => values.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
                SourceType::F32 => values,
            };
            let source = Source::new(&bytes, ty, &[rows, cols]).unwrap();
            for mode in MODES {
                for precast in [Precast::Bf16, Precast::None] {
                    for granularity in [
                        Granularity::default(),
                        Granularity::Block { rows: 32, cols: 64 },
                        Granularity::PerRow,
                        Granularity::PerTensor,
                    ] {
                        let format =
                            Fp8Format { mode, precast, granularity, ..Fp8Format::default() };
                        let got = quantize(scalar, &source, &format).unwrap();
                        let expected = reference(&stored, [rows, cols], &format);
                        assert_eq!(got, expected, "{ty:?} {rows}x{cols} {format:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn edge_shapes_are_as_in_the_scalar_codec() {
    let sides = [1, 2, 31, 33, 63, 64, 65, 127, 128, 129, 257];
    for ty in TYPES {
        for rows in sides {
            for cols in sides {
                let bytes = to_bytes(&weights(rows * cols, 7), ty);
                let source = Source::new(&bytes, ty, &[rows, cols]).unwrap();
                let format = Fp8Format::default();
                let expected = quantize(Codec::named("scalar").unwrap(), &source, &format).unwrap();
                for codec in Codec::available() {
                    let got = quantize(codec, &source, &format).unwrap();
                    assert!(got == expected, "{} {ty:?} {rows}x{cols}", codec.name());
                }
            }
        }
    }
}

fn any_format() -> impl Strategy<Value = Fp8Format> {
    let granularity = prop_oneof![
        Just(Granularity::default()),
        Just(Granularity::Block { rows: 32, cols: 96 }),
        Just(Granularity::Block { rows: 256, cols: 64 }),
        Just(Granularity::PerRow),
        Just(Granularity::PerTensor),
    ];
    let precast = prop_oneof![Just(Precast::Bf16), Just(Precast::None)];
    (prop::sample::select(&MODES[..]), granularity, precast).prop_map(
        |(mode, granularity, precast)| Fp8Format {
            mode,
            granularity,
            precast,
            ..Fp8Format::default()
        },
    )
}

/// Bytes of any finite elements, or of weights.
fn any_tensor() -> impl Strategy<Value = (SourceType, [usize; 3], Vec<u8>)> {
    let shape = (1..3usize, 1..300usize, 1..600usize);
    (prop::sample::select(&TYPES[..]), shape, any::<u64>(), any::<bool>()).prop_map(
        |(ty, (experts, rows, cols), seed, wild)| {
            let n = experts * rows * cols;
            let mut bytes = to_bytes(&weights(n, seed), ty);
            if wild {
                let mut bits = seed | 1;
                for element in bytes.chunks_exact_mut(ty.size()) {
                    bits = bits.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
                    element.copy_from_slice(&bits.to_be_bytes()[..ty.size()]);
                    // Clearing one exponent bit makes every pattern finite, also after a cast.
                    element[ty.size() - 1] &= !0x40;
                }
            }
            (ty, [experts, rows, cols], bytes)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_tensors_are_as_in_the_scalar_codec(
        (ty, shape, bytes) in any_tensor(),
        format in any_format(),
    ) {
        let source = Source::new(&bytes, ty, &shape).unwrap();
        let expected = quantize(Codec::named("scalar").unwrap(), &source, &format);
        for codec in Codec::available() {
            match (&expected, quantize(codec, &source, &format)) {
                (Ok(expected), Ok(got)) => {
                    prop_assert!(&got == expected, "{} {ty:?} {shape:?} {format:?}", codec.name());
                }
                (Err(expected), Err(got)) => {
                    prop_assert_eq!(expected.to_string(), got.to_string());
                }
                (expected, got) => prop_assert!(
                    false, "{}: {:?} but {:?}", codec.name(), expected.is_ok(), got.is_ok()
                ),
            }
        }
    }

    #[test]
    fn any_range_and_alignment_gives_the_slice_of_the_whole(
        (ty, shape, bytes) in any_tensor(),
        format in any_format(),
        cut in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        (source_offset, offset) in (0..4usize, 0..70usize),
        store in prop_oneof![Just(Store::Cached), Just(Store::NonTemporal)],
    ) {
        let format = Fp8Format { non_finite: NonFinite::Reproduce, ..format };
        let n = shape.iter().product::<usize>();
        let (a, b) = (cut.0.index(n + 1), cut.1.index(n + 1));
        let elements = a.min(b)..a.max(b);
        let moved = [vec![0; source_offset], bytes.clone()].concat();
        let source = Source::new(&moved[source_offset..], ty, &shape).unwrap();
        let grid = format.granularity.grid(&shape).unwrap();
        let whole = Source::new(&bytes, ty, &shape).unwrap();
        let (codes, scales) = quantize(Codec::named("scalar").unwrap(), &whole, &format).unwrap();
        let (high, wide) = match format.granularity {
            Granularity::Block { rows, cols } => (rows, cols),
            Granularity::PerRow => (1, shape[2]),
            Granularity::PerTensor => (shape[1], shape[2]),
        };
        let touched: HashSet<usize> = elements
            .clone()
            .map(|element| {
                let (row, col) = (element / shape[2], element % shape[2]);
                let band = row / shape[1] * shape[1].div_ceil(high) + row % shape[1] / high;
                band * shape[2].div_ceil(wide) + col / wide
            })
            .collect();
        for codec in Codec::available() {
            let mut buffer = vec![0xaa; offset + elements.len() + 64];
            let mut some = vec![-1f32; grid.scales_of(&elements).len()];
            codec.quantize(
                &source,
                &format,
                elements.clone(),
                &mut buffer[offset..offset + elements.len()],
                &mut some,
                store,
            ).unwrap();
            let (before, rest) = buffer.split_at(offset);
            let (got, after) = rest.split_at(elements.len());
            prop_assert!(got == &codes[elements.clone()], "{}", codec.name());
            prop_assert!(before.iter().chain(after).all(|&b| b == 0xaa), "wrote outside");
            let of_range = grid.scales_of(&elements);
            for (index, (&got, &expected)) in
                of_range.clone().zip(some.iter().zip(&scales[of_range]))
            {
                let untouched = got == -1.0 && !touched.contains(&index);
                prop_assert!(untouched || got.to_bits() == expected);
            }
        }
    }

    #[test]
    fn pieces_and_threads_put_together_are_the_whole(
        (ty, shape, bytes) in any_tensor(),
        format in any_format(),
        cut in any::<prop::sample::Index>(),
    ) {
        let format = Fp8Format { non_finite: NonFinite::Reproduce, ..format };
        let n = shape.iter().product::<usize>();
        let cut = cut.index(n + 1);
        let source = Source::new(&bytes, ty, &shape).unwrap();
        let grid = format.granularity.grid(&shape).unwrap();
        let codec = Codec::best();
        let (codes, scales) = quantize(codec, &source, &format).unwrap();

        let mut pieced = vec![0xaa; n];
        let mut all = vec![-1f32; grid.scales()];
        for piece in [0..cut, cut..n].into_iter().flat_map(|half| grid.split(half, 10_000)) {
            let scales = &mut all[grid.scales_of(&piece)];
            codec
                .quantize(
                    &source, &format, piece.clone(), &mut pieced[piece], scales, Store::Cached,
                )
                .unwrap();
        }
        prop_assert!(pieced == codes);
        prop_assert!(all.iter().map(|s| s.to_bits()).eq(scales.iter().copied()));

        let pool = Pool::new(3).unwrap();
        let mut threaded = vec![0xaa; n];
        let mut all = vec![-1f32; grid.scales()];
        codec
            .quantize_parallel(&pool, &source, &format, &mut threaded, &mut all, Store::default())
            .unwrap();
        prop_assert!(threaded == codes);
        prop_assert!(all.iter().map(|s| s.to_bits()).eq(scales));
    }

    #[test]
    fn every_codec_dequantises_like_the_scalar_one(
        codes in prop::collection::vec(any::<u8>(), 300 * 200),
        scales in prop::collection::vec(-1e30f32..1e30, 6),
        start in 0..30_000usize,
        ty in prop::sample::select(&TYPES[..]),
    ) {
        let grid = Granularity::default().grid(&[300, 200]).unwrap();
        let elements = start..start + 29_999;
        let scales = &scales[grid.scales_of(&elements)];
        let run = |codec: Codec| {
            let mut out = vec![0; elements.len() * ty.size()];
            codec
                .dequantize(&codes[elements.clone()], &grid, elements.clone(), scales, ty, &mut out)
                .unwrap();
            out
        };
        let expected = run(Codec::named("scalar").unwrap());
        for codec in Codec::available() {
            let got = run(codec);
            // NaNs may differ in their payload.
            let same = |(a, b): (&[u8], &[u8])| a == b || (is_nan(a, ty) && is_nan(b, ty));
            prop_assert!(
                got.chunks_exact(ty.size()).zip(expected.chunks_exact(ty.size())).all(same),
                "{}", codec.name()
            );
        }
    }

    #[test]
    fn a_non_temporal_copy_copies_at_any_alignment(
        bytes in prop::collection::vec(any::<u8>(), 0..1000),
        offset in 0..70usize,
    ) {
        let mut buffer = vec![0xaa; offset + bytes.len() + 64];
        copy_non_temporal(&bytes, &mut buffer[offset..offset + bytes.len()]);
        let (before, rest) = buffer.split_at(offset);
        let (got, after) = rest.split_at(bytes.len());
        prop_assert_eq!(got, &bytes[..]);
        prop_assert!(before.iter().chain(after).all(|&b| b == 0xaa));
    }
}

fn is_nan(element: &[u8], ty: SourceType) -> bool {
    match (ty, element) {
        (SourceType::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).is_nan(),
        (SourceType::F16, &[a, b]) => f16::from_le_bytes([a, b]).is_nan(),
        (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).is_nan(),
        _ => unreachable!("chunks have the size of the type"),
    }
}

#[test]
fn gaussian_weights_come_back_within_2_65_percent() {
    let (rows, cols) = (512, 1024);
    // Twelve uniform numbers add up to a normal one.
    let uniform = weights_uniform(12 * rows * cols);
    let values: Vec<f32> =
        uniform.chunks_exact(12).map(|u| (u.iter().sum::<f32>() - 6.0) * 0.02).collect();
    let bytes = to_bytes(&values, SourceType::F32);
    let source = Source::new(&bytes, SourceType::F32, &[rows, cols]).unwrap();
    for codec in Codec::available() {
        let format = Fp8Format { precast: Precast::None, ..Fp8Format::default() };
        let (codes, scales) = quantize(codec, &source, &format).unwrap();
        let scales: Vec<f32> = scales.into_iter().map(f32::from_bits).collect();
        let grid = format.granularity.grid(&[rows, cols]).unwrap();
        let mut back = vec![0; bytes.len()];
        let all = 0..grid.elements();
        codec.dequantize(&codes, &grid, all, &scales, SourceType::F32, &mut back).unwrap();
        let (mut error, mut total) = (0f64, 0f64);
        for (value, back) in values.iter().zip(back.chunks_exact(4)) {
            let back = f32::from_le_bytes(back.try_into().unwrap());
            error += f64::from(back - value).powi(2);
            total += f64::from(*value).powi(2);
        }
        let relative = (error / total).sqrt();
        assert!((0.0255..0.0275).contains(&relative), "{}: {relative}", codec.name());
    }
}

fn weights_uniform(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n).map(|_| next()).collect()
}

/// A stack of matrices of ones with one element set.
fn with_one(ty: SourceType, at: usize, element: f32) -> Vec<u8> {
    let mut values = vec![1f32; 2 * 300 * 300];
    values[at] = element;
    to_bytes(&values, ty)
}

#[test]
fn nan_and_infinity_are_errors_that_name_the_block() {
    // Matrix 1, row 200, column 299: block (1, 2).
    let at = 300 * 300 + 200 * 300 + 299;
    for codec in Codec::available() {
        for ty in TYPES {
            for element in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let bytes = with_one(ty, at, element);
                let source = Source::new(&bytes, ty, &[2, 300, 300]).unwrap();
                for mode in MODES {
                    let format = Fp8Format { mode, ..Fp8Format::default() };
                    let error = quantize(codec, &source, &format).unwrap_err();
                    assert!(
                        matches!(
                            error,
                            QuantError::NonFinite { expert: 1, block_row: 1, block_col: 2, .. }
                        ),
                        "{} {ty:?} {element} {mode:?}: {error}",
                        codec.name()
                    );
                    let error = error.in_tensor("a.weight").to_string();
                    assert!(error.starts_with("a.weight: block (1, 2) of matrix 1"), "{error}");
                }
            }
        }
    }
}

#[test]
fn an_f32_that_becomes_infinite_as_bf16_is_an_error_only_with_the_precast() {
    let bytes = with_one(SourceType::F32, 0, f32::MAX);
    let source = Source::new(&bytes, SourceType::F32, &[2, 300, 300]).unwrap();
    for codec in Codec::available() {
        let format = Fp8Format::default();
        assert!(matches!(quantize(codec, &source, &format), Err(QuantError::NonFinite { .. })));
        quantize(codec, &source, &Fp8Format { precast: Precast::None, ..format }).unwrap();
    }
}

#[test]
fn a_block_too_small_for_mode_pytorch_is_an_error_because_its_multiplier_is_infinite() {
    let bytes = to_bytes(&[1e-37; 4], SourceType::F32);
    let source = Source::new(&bytes, SourceType::F32, &[2, 2]).unwrap();
    for codec in Codec::available() {
        let format = Fp8Format { mode: Mode::Pytorch, ..Fp8Format::default() };
        assert!(matches!(quantize(codec, &source, &format), Err(QuantError::NonFinite { .. })));
        let (codes, scales) =
            quantize(codec, &source, &Fp8Format { non_finite: NonFinite::Reproduce, ..format })
                .unwrap();
        assert_eq!((codes, scales), (vec![0x7e; 4], vec![0]));
    }
}

#[test]
fn reproducing_verl_gives_nan_codes_as_its_formulas_do() {
    let nan = f32::NAN;
    let one_block = |element: f32| to_bytes(&[1.0, -1.0, element, 0.0], SourceType::F32);
    let run = |mode, element| {
        let bytes = one_block(element);
        let source = Source::new(&bytes, SourceType::F32, &[2, 2]).unwrap();
        let format = Fp8Format { mode, non_finite: NonFinite::Reproduce, ..Fp8Format::default() };
        let results: Vec<_> = Codec::available()
            .into_iter()
            .map(|codec| quantize(codec, &source, &format).unwrap())
            .collect();
        assert!(results.iter().all(|result| *result == results[0]));
        (results[0].0.clone(), f32::from_bits(results[0].1[0]))
    };
    assert_eq!(run(Mode::Triton, nan), (vec![0x7e, 0xfe, 0x7f, 0], 1.0 / 448.0));
    assert_eq!(run(Mode::Ue8m0, nan).0, [0x78, 0xf8, 0x7f, 0]);
    let (codes, scale) = run(Mode::Pytorch, nan);
    assert_eq!(codes, [0x7f, 0xff, 0x7f, 0x7f]);
    assert!(scale.is_nan());
    // An infinite scale multiplies by zero, and infinity by zero is NaN.
    assert_eq!(run(Mode::Triton, f32::INFINITY), (vec![0, 0x80, 0x7f, 0], f32::INFINITY));
    assert_eq!(run(Mode::Pytorch, f32::NEG_INFINITY), (vec![0x38, 0xb8, 0xfe, 0], 1.0));
}

#[test]
fn minus_zero_keeps_its_sign_in_blocks_of_zeros_and_of_weights() {
    for codec in Codec::available() {
        for ty in TYPES {
            for other in [0.0, 1.0] {
                let mut values = vec![other; 128 * 128];
                values[5] = -0.0;
                let bytes = to_bytes(&values, ty);
                let source = Source::new(&bytes, ty, &[128, 128]).unwrap();
                for mode in MODES {
                    let format = Fp8Format { mode, ..Fp8Format::default() };
                    let (codes, _) = quantize(codec, &source, &format).unwrap();
                    assert_eq!(codes[5], 0x80, "{} {ty:?} {mode:?}", codec.name());
                    assert_ne!(codes[6], 0x80);
                }
            }
        }
    }
}

#[test]
fn sizes_that_contradict_each_other_are_errors() {
    let bytes = [0u8; 2 * 6];
    let ty = SourceType::Bf16;
    assert!(Source::new(&bytes, ty, &[6]).is_err());
    assert!(Source::new(&bytes, ty, &[1, 1, 2, 3]).is_err());
    assert!(Source::new(&bytes, ty, &[2, 4]).is_err());
    assert!(Source::new(&bytes, ty, &[usize::MAX, 2]).is_err());
    assert!(Source::new(&bytes, ty, &[1 << 63, 1]).is_err());
    let source = Source::new(&bytes, ty, &[2, 3]).unwrap();
    assert_eq!((source.shape(), source.source_type()), (&[2, 3][..], ty));
    let format = Fp8Format::default();
    let codec = Codec::best();
    let (codes, scales) = (&mut [0u8; 7][..], &mut [0f32; 2][..]);
    let store = Store::Cached;
    assert!(codec.quantize(&source, &format, 0..6, codes, &mut scales[..1], store).is_err());
    assert!(codec.quantize(&source, &format, 0..6, &mut codes[..6], scales, store).is_err());
    assert!(codec.quantize(&source, &format, 0..7, codes, &mut scales[..1], store).is_err());
    let grid = format.granularity.grid(&[2, 3]).unwrap();
    let out = &mut [0u8; 13];
    assert!(codec.dequantize(&codes[..6], &grid, 0..6, &scales[..1], ty, out).is_err());
    assert!(codec.dequantize(&codes[..5], &grid, 0..6, &scales[..1], ty, &mut out[..12]).is_err());
}

#[test]
fn empty_tensors_and_empty_ranges_are_quantised_to_nothing() {
    let store = Store::NonTemporal;
    let pool = Pool::new(2).unwrap();
    for codec in Codec::available() {
        for granularity in [Granularity::default(), Granularity::PerRow, Granularity::PerTensor] {
            let format = Fp8Format { granularity, ..Fp8Format::default() };
            for shape in [[0, 5], [5, 0], [0, 0]] {
                let source = Source::new(&[], SourceType::F32, &shape).unwrap();
                codec.quantize(&source, &format, 0..0, &mut [], &mut [], store).unwrap();
                codec.quantize_parallel(&pool, &source, &format, &mut [], &mut [], store).unwrap();
            }
            let bytes = [0; 16];
            let source = Source::new(&bytes, SourceType::F32, &[2, 2]).unwrap();
            codec.quantize(&source, &format, 3..3, &mut [], &mut [], store).unwrap();
        }
    }
}

#[test]
fn the_mode_of_the_gpu_and_unknown_codecs_are_clear_errors() {
    let source = Source::new(&[0, 0], SourceType::Bf16, &[1, 1]).unwrap();
    let format = Fp8Format { mode: Mode::TritonGpu, ..Fp8Format::default() };
    assert!(matches!(quantize(Codec::best(), &source, &format), Err(QuantError::CudaOnly)));
    let error = Codec::named("avx1024").unwrap_err().to_string();
    assert!(error.contains("avx1024") && error.contains("scalar"), "{error}");
    let best = Codec::available()[0];
    assert_eq!(Codec::best().name(), best.name());
}

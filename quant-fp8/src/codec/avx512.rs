//! AVX-512 (F, BW, VL): 64 elements at a time.
#![allow(unsafe_code, reason = "the intrinsics that touch memory are unsafe")]

use std::arch::x86_64::*;

use super::panel::{MOST_BLOCKS, Panel, Target};
use super::staircase::Staircase;
use super::x86::{self, parts};
use super::{Kernel, Store};
use crate::{Precast, SourceType};

/// Codes per step.
const STEP: usize = 64;

/// Steps in a row of a block of 128 columns.
const BLOCK: usize = 2;

/// Proof that the processor has the features; only [`detect`] hands it out.
#[derive(Debug)]
struct Avx512(());

/// The kernel, if this processor can run it.
pub(super) fn detect() -> Option<&'static dyn Kernel> {
    let found = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    found.then_some(&Avx512(()))
}

impl Kernel for Avx512 {
    fn name(&self) -> &'static str {
        "avx512"
    }

    fn scan(&self, panel: &Panel<'_>, maxima: &mut [u32]) {
        // SAFETY: `self` exists, so the processor has the features.
        unsafe { scan(panel, maxima) }
    }

    fn encode(
        &self,
        panel: &Panel<'_>,
        stairs: &[Staircase],
        target: &mut Target<'_>,
        store: Store,
        next: Option<&Panel<'_>>,
    ) {
        // SAFETY: as in `scan`.
        unsafe { encode(panel, stairs, target, store, next) }
    }

    fn decode(&self, codes: &[u8], scale: f32, ty: SourceType, out: &mut [u8]) {
        // SAFETY: as in `scan`.
        unsafe { decode(codes, scale, ty, out) }
    }

    fn copy(&self, source: &[u8], out: &mut [u8]) {
        // SAFETY: as in `scan`.
        unsafe { copy(source, out) }
    }

    fn fence(&self) {
        x86::fence();
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn scan(panel: &Panel<'_>, maxima: &mut [u32]) {
    let wide = panel.ty == SourceType::F32;
    let mut tops = [_mm512_setzero_si512(); MOST_BLOCKS];
    for row in panel.rows() {
        // Blocks inside: memory is read in order.
        for (run, top) in panel.runs(row).zip(&mut tops) {
            *top = highest(*top, run, wide);
        }
    }
    fold(tops, wide, maxima);
}

/// `top`, or the magnitudes of a run where they are higher: of 16-bit elements, or of F32 if
/// `wide`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn highest(mut top: __m512i, run: &[u8], wide: bool) -> __m512i {
    let (vectors, rest) = run.as_chunks();
    for vector in vectors {
        top = higher(top, vector, wide);
    }
    if !rest.is_empty() {
        top = higher(top, &x86::padded(rest), wide);
    }
    top
}

/// [`highest`] of one vector.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn higher(top: __m512i, vector: &[u8; 64], wide: bool) -> __m512i {
    let positive = if wide { _mm512_set1_epi32(i32::MAX) } else { _mm512_set1_epi16(i16::MAX) };
    let magnitude = _mm512_and_si512(load(vector), positive);
    if wide { _mm512_max_epu32(top, magnitude) } else { _mm512_max_epu16(top, magnitude) }
}

/// The highest lane of each vector.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn fold(tops: [__m512i; MOST_BLOCKS], wide: bool, maxima: &mut [u32]) {
    for (mut top, max) in tops.into_iter().zip(maxima) {
        if !wide {
            let even = _mm512_and_si512(top, _mm512_set1_epi32(0xffff));
            top = _mm512_max_epu32(even, _mm512_srli_epi32::<16>(top));
        }
        *max = _mm512_reduce_max_epu32(top);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn encode(
    panel: &Panel<'_>,
    stairs: &[Staircase],
    target: &mut Target<'_>,
    store: Store,
    next: Option<&Panel<'_>>,
) {
    let precast = panel.precast;
    match panel.ty {
        SourceType::Bf16 => encode_rows::<128, 4, _>(
            panel,
            stairs,
            target,
            store,
            next,
            |stair| WordSteps::new(stair),
            {
                |source: &[u8; 128], steps: &WordSteps| {
                    encode_words::<3, 4>(source, steps)
                        .unwrap_or_else(|| arithmetic(bf16_values(source), steps.multiplier))
                }
            },
        ),
        SourceType::F16 => encode_rows::<128, 4, _>(
            panel,
            stairs,
            target,
            store,
            next,
            |stair| WordSteps::new(stair),
            {
                |source: &[u8; 128], steps: &WordSteps| {
                    encode_words::<6, 7>(source, steps).unwrap_or_else(|| {
                        arithmetic(cast(f16_values(source), precast), steps.multiplier)
                    })
                }
            },
        ),
        SourceType::F32 => encode_rows::<256, 8, _>(
            panel,
            stairs,
            target,
            store,
            next,
            |stair| FloatSteps::new(stair),
            {
                |source: &[u8; 256], steps: &FloatSteps| {
                    encode_floats(source, steps).unwrap_or_else(|| {
                        arithmetic(cast(f32_values(source), precast), steps.multiplier)
                    })
                }
            },
        ),
    }
}

/// Encodes a panel, `N` bytes to 64 codes at a time, and prefetches the next, whose blocks of 128
/// columns have `L` cache lines in a row. `prepare` is called once per block and its result is
/// handed to `step`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn encode_rows<const N: usize, const L: usize, Steps: Copy>(
    panel: &Panel<'_>,
    stairs: &[Staircase],
    target: &mut Target<'_>,
    store: Store,
    next: Option<&Panel<'_>>,
    prepare: impl Fn(&Staircase) -> Steps,
    step: impl Fn(&[u8; N], &Steps) -> __m512i,
) {
    let mut prepared = [prepare(&stairs[0]); MOST_BLOCKS];
    for (prepared, stair) in prepared.iter_mut().zip(stairs) {
        *prepared = prepare(stair);
    }
    for (index, row) in panel.rows().enumerate() {
        let mut part = target.part(panel, row);
        let next_row = next.map_or(&[][..], |next| next.nth_row(index));

        // Nearly all there is, in nearly all formats: lengths are constants.
        let (first, source, codes) = part.whole_blocks(panel, BLOCK * STEP);
        let stream = store == Store::NonTemporal && codes.as_ptr().addr().is_multiple_of(STEP);
        let codes = codes.as_chunks_mut::<STEP>().0.as_chunks_mut::<BLOCK>().0;
        let mut ahead = blocks::<64, L>(next_row).iter();
        for ((source, codes), prepared) in
            blocks::<N, BLOCK>(source).iter().zip(codes).zip(&prepared[first..])
        {
            for line in ahead.next().into_iter().flatten() {
                x86::prefetch(line);
            }
            for (source, codes) in source.iter().zip(codes) {
                let vector = step(source, prepared);
                if stream { stream_store(codes, vector) } else { store_unaligned(codes, vector) }
            }
        }

        // Blocks of other widths, and those that are cut.
        while let Some((block, source, codes)) = part.next_block(panel) {
            encode_run(source, codes, store, |source| step(source, &prepared[block]));
        }
    }
}

/// As many whole blocks of `V` vectors as there are.
fn blocks<const N: usize, const V: usize>(bytes: &[u8]) -> &[[[u8; N]; V]] {
    bytes.as_chunks().0.as_chunks().0
}

/// Encodes elements that share a scale, `N` bytes to 64 codes at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn encode_run<const N: usize>(
    source: &[u8],
    codes: &mut [u8],
    store: Store,
    step: impl Fn(&[u8; N]) -> __m512i,
) {
    let (vectors, rest) = source.as_chunks();
    let (out, last) = codes.as_chunks_mut();
    let stream = store == Store::NonTemporal && out.as_ptr().addr().is_multiple_of(STEP);
    for (source, out) in vectors.iter().zip(out) {
        let codes = step(source);
        if stream { stream_store(out, codes) } else { store_unaligned(out, codes) }
    }
    if !rest.is_empty() {
        let mut out = [0; STEP];
        store_unaligned(&mut out, step(&x86::padded(rest)));
        last.copy_from_slice(&out[..last.len()]);
    }
}

/// The staircase of a block of 16-bit elements, as registers: 32 steps, twice the same 16, because
/// the permute also looks at the lowest bit of the exponent.
#[derive(Clone, Copy)]
struct WordSteps {
    steps: __m512i,
    low: __m512i,
    multiplier: f32,
}

impl WordSteps {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn new(stair: &Staircase) -> Self {
        let steps = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(load_steps(stair)));
        let low = _mm512_set1_epi16(stair.low as i16);
        Self { steps, low, multiplier: stair.multiplier }
    }
}

/// The staircase of a block of F32, as registers.
#[derive(Clone, Copy)]
struct FloatSteps {
    steps: __m512i,
    low: __m512i,
    multiplier: f32,
}

impl FloatSteps {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn new(stair: &Staircase) -> Self {
        let low = _mm512_set1_epi32(stair.low as i32);
        Self { steps: load_steps(stair), low, multiplier: stair.multiplier }
    }
}

/// Staircase on 64 elements of 16 bits: `INDEX` mantissa bits are below the four that choose the
/// step, `CODE` below a code's. `None` if an element is low.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn encode_words<const INDEX: u32, const CODE: u32>(
    source: &[u8; 128],
    stair: &WordSteps,
) -> Option<__m512i> {
    let [first, second] = parts(source);
    let (first, second) = (load(first), load(second));
    let positive = _mm512_set1_epi16(i16::MAX);
    let (low_first, low_second) =
        (_mm512_and_si512(first, positive), _mm512_and_si512(second, positive));
    let lowest = _mm512_min_epu16(low_first, low_second);
    if _mm512_cmplt_epu16_mask(lowest, stair.low) != 0 {
        return None;
    }
    let climb = |word, magnitude| {
        let step = _mm512_permutexvar_epi16(_mm512_srli_epi16::<INDEX>(word), stair.steps);
        let code = _mm512_srli_epi16::<CODE>(_mm512_add_epi16(magnitude, step));
        // code | word >> 8 & 0x80
        let sign = _mm512_srli_epi16::<8>(word);
        _mm512_ternarylogic_epi32::<0xf8>(code, sign, _mm512_set1_epi16(0x80))
    };
    let packed = _mm512_packus_epi16(climb(first, low_first), climb(second, low_second));
    // Packing alternates between the operands every 8 bytes.
    Some(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed))
}

/// Staircase on 64 elements of 32 bits; `None` if one is low.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn encode_floats(source: &[u8; 256], stair: &FloatSteps) -> Option<__m512i> {
    let [a, b, c, d] = f32_values(source).map(|values| _mm512_castps_si512(values));
    let magnitude = |bits| _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX));
    let lowest = _mm512_min_epu32(
        _mm512_min_epu32(magnitude(a), magnitude(b)),
        _mm512_min_epu32(magnitude(c), magnitude(d)),
    );
    if _mm512_cmplt_epu32_mask(lowest, stair.low) != 0 {
        return None;
    }
    let climb = |bits| {
        let step = _mm512_permutexvar_epi32(_mm512_srli_epi32::<19>(bits), stair.steps);
        let code = _mm512_srli_epi32::<20>(_mm512_add_epi32(magnitude(bits), step));
        with_sign(code, bits)
    };
    Some(pack([climb(a), climb(b), climb(c), climb(d)]))
}

/// Codes of 64 values by the formula: multiply, then round. Values are finite and their products
/// at most 448 but for two roundings, which is far below 464, where the code would not be 0x7e:
/// nothing needs to be clamped.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[cold]
#[inline(never)]
fn arithmetic(values: [__m512; 4], multiplier: f32) -> __m512i {
    let multiplier = _mm512_set1_ps(multiplier);
    let [a, b, c, d] = values;
    let code = |value| {
        let bits = _mm512_castps_si512(_mm512_mul_ps(value, multiplier));
        let magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX));
        // As in `scalar::encode`: normal codes round in the bits, subnormal ones by adding 2^14.
        let odd = _mm512_and_si512(_mm512_srli_epi32::<20>(bits), _mm512_set1_epi32(1));
        let rounded =
            _mm512_add_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32(0x7_ffff)), odd);
        let normal =
            _mm512_sub_epi32(_mm512_srli_epi32::<20>(rounded), _mm512_set1_epi32(120 << 3));
        let rounder = _mm512_set1_ps(16384.0);
        let raised = _mm512_add_ps(_mm512_castsi512_ps(magnitude), rounder);
        let subnormal = _mm512_sub_epi32(_mm512_castps_si512(raised), _mm512_castps_si512(rounder));
        let small = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(121 << 23));
        with_sign(_mm512_mask_mov_epi32(normal, small, subnormal), bits)
    };
    pack([code(a), code(b), code(c), code(d)])
}

/// Rounds to BF16 if the format says so. Values are finite.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn cast(values: [__m512; 4], precast: Precast) -> [__m512; 4] {
    let round = |value| {
        let bits = _mm512_castps_si512(value);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(!0xffff)))
    };
    let [a, b, c, d] = values;
    match precast {
        Precast::Bf16 => [round(a), round(b), round(c), round(d)],
        Precast::None => values,
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn bf16_values(source: &[u8; 128]) -> [__m512; 4] {
    let [a, b, c, d] = parts(source);
    let widen = |half| _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_half(half)));
    let value = |half| _mm512_castsi512_ps(widen(half));
    [value(a), value(b), value(c), value(d)]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn f16_values(source: &[u8; 128]) -> [__m512; 4] {
    let [a, b, c, d] = parts(source);
    let value = |half| _mm512_cvtph_ps(load_half(half));
    [value(a), value(b), value(c), value(d)]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn f32_values(source: &[u8; 256]) -> [__m512; 4] {
    let [a, b, c, d] = parts(source);
    let value = |vector| _mm512_castsi512_ps(load(vector));
    [value(a), value(b), value(c), value(d)]
}

/// `code | bits >> 24 & 0x80`
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn with_sign(code: __m512i, bits: __m512i) -> __m512i {
    let sign = _mm512_srli_epi32::<24>(bits);
    _mm512_ternarylogic_epi32::<0xf8>(code, sign, _mm512_set1_epi32(0x80))
}

/// Codes in 32-bit lanes to bytes, in order.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn pack([a, b, c, d]: [__m512i; 4]) -> __m512i {
    let packed = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
    // Packing goes round the four operands every 4 bytes.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(order, packed)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn decode(codes: &[u8], scale: f32, ty: SourceType, out: &mut [u8]) {
    x86::decode_run(codes, scale, ty, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn copy(source: &[u8], out: &mut [u8]) {
    // Up to the first aligned byte of the destination, and after the last whole vector, plainly.
    let head = out.as_ptr().align_offset(STEP).min(out.len());
    let (source_head, source) = source.split_at(head);
    let (out_head, out) = out.split_at_mut(head);
    out_head.copy_from_slice(source_head);
    let (vectors, rest) = source.as_chunks();
    let (out_vectors, out_rest) = out.as_chunks_mut();
    for (vector, out) in vectors.iter().zip(out_vectors) {
        stream_store(out, load(vector));
    }
    out_rest.copy_from_slice(rest);
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_steps(stair: &Staircase) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read, and the load may be unaligned.
    unsafe { _mm512_loadu_si512(stair.steps.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(vector: &[u8; 64]) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read, and the load may be unaligned.
    unsafe { _mm512_loadu_si512(vector.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_half(half: &[u8; 32]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read, and the load may be unaligned.
    unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store_unaligned(out: &mut [u8; STEP], vector: __m512i) {
    // SAFETY: the array has the 64 bytes that are written, and the store may be unaligned.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), vector) }
}

/// `out` must be aligned to 64 bytes.
#[target_feature(enable = "avx512f")]
#[inline]
fn stream_store(out: &mut [u8; STEP], vector: __m512i) {
    debug_assert!(out.as_ptr().addr().is_multiple_of(STEP));
    // SAFETY: the array has the 64 bytes that are written, and both callers have checked that it
    // is aligned. `Codec` fences before it returns, so no other thread is handed unordered stores.
    unsafe { _mm512_stream_si512(out.as_mut_ptr().cast(), vector) }
}

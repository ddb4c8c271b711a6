//! AVX2 with F16C: 32 elements at a time. The method is that of [`avx512`](super::avx512), which
//! says more about it.
#![allow(unsafe_code, reason = "the intrinsics that touch memory are unsafe")]

use std::arch::x86_64::*;

use super::panel::{MOST_BLOCKS, Panel, Target};
use super::staircase::Staircase;
use super::x86::{self, parts};
use super::{Kernel, Store};
use crate::{Precast, SourceType};

/// Codes per step.
const STEP: usize = 32;

/// Steps in a row of a block of 128 columns.
const BLOCK: usize = 4;

/// Proof that the processor has the features; only [`detect`] hands it out.
#[derive(Debug)]
struct Avx2(());

/// The kernel, if this processor can run it.
pub(super) fn detect() -> Option<&'static dyn Kernel> {
    (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(&Avx2(()))
}

impl Kernel for Avx2 {
    fn name(&self) -> &'static str {
        "avx2"
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

#[target_feature(enable = "avx2,f16c")]
fn scan(panel: &Panel<'_>, maxima: &mut [u32]) {
    let wide = panel.ty == SourceType::F32;
    let mut tops = [_mm256_setzero_si256(); MOST_BLOCKS];
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
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn highest(mut top: __m256i, run: &[u8], wide: bool) -> __m256i {
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
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn higher(top: __m256i, vector: &[u8; 32], wide: bool) -> __m256i {
    let positive = if wide { _mm256_set1_epi32(i32::MAX) } else { _mm256_set1_epi16(i16::MAX) };
    let magnitude = _mm256_and_si256(load(vector), positive);
    if wide { _mm256_max_epu32(top, magnitude) } else { _mm256_max_epu16(top, magnitude) }
}

/// The highest lane of each vector.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn fold(tops: [__m256i; MOST_BLOCKS], wide: bool, maxima: &mut [u32]) {
    for (mut top, max) in tops.into_iter().zip(maxima) {
        if !wide {
            let even = _mm256_and_si256(top, _mm256_set1_epi32(0xffff));
            top = _mm256_max_epu32(even, _mm256_srli_epi32::<16>(top));
        }
        let pairs = _mm256_max_epu32(top, _mm256_permute4x64_epi64::<0b01_00_11_10>(top));
        let pairs = _mm256_max_epu32(pairs, _mm256_shuffle_epi32::<0b01_00_11_10>(pairs));
        let pairs = _mm256_max_epu32(pairs, _mm256_shuffle_epi32::<0b10_11_00_01>(pairs));
        *max = _mm256_cvtsi256_si32(pairs) as u32;
    }
}

#[target_feature(enable = "avx2,f16c")]
fn encode(
    panel: &Panel<'_>,
    stairs: &[Staircase],
    target: &mut Target<'_>,
    store: Store,
    next: Option<&Panel<'_>>,
) {
    let precast = panel.precast;
    match panel.ty {
        SourceType::Bf16 => encode_rows::<64, 4, _>(
            panel,
            stairs,
            target,
            store,
            next,
            |stair| Bf16Steps::new(stair),
            {
                |source: &[u8; 64], steps: &Bf16Steps| {
                    encode_bf16(source, steps)
                        .unwrap_or_else(|| arithmetic(bf16_values(source), steps.multiplier))
                }
            },
        ),
        SourceType::F16 => encode_rows::<64, 4, _>(
            panel,
            stairs,
            target,
            store,
            next,
            |stair| F16Steps::new(stair),
            {
                |source: &[u8; 64], steps: &F16Steps| {
                    encode_f16(source, steps).unwrap_or_else(|| {
                        arithmetic(cast(f16_values(source), precast), steps.multiplier)
                    })
                }
            },
        ),
        SourceType::F32 => encode_rows::<128, 8, _>(
            panel,
            stairs,
            target,
            store,
            next,
            |stair| FloatSteps::new(stair),
            {
                |source: &[u8; 128], steps: &FloatSteps| {
                    encode_floats(source, steps).unwrap_or_else(|| {
                        arithmetic(cast(f32_values(source), precast), steps.multiplier)
                    })
                }
            },
        ),
    }
}

/// Encodes a panel, `N` bytes to 32 codes at a time, and prefetches the next, whose blocks of 128
/// columns have `L` cache lines in a row. `prepare` is called once per block and its result is
/// handed to `step`.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn encode_rows<const N: usize, const L: usize, Steps: Copy>(
    panel: &Panel<'_>,
    stairs: &[Staircase],
    target: &mut Target<'_>,
    store: Store,
    next: Option<&Panel<'_>>,
    prepare: impl Fn(&Staircase) -> Steps,
    step: impl Fn(&[u8; N], &Steps) -> __m256i,
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

/// Encodes elements that share a scale, `N` bytes to 32 codes at a time.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn encode_run<const N: usize>(
    source: &[u8],
    codes: &mut [u8],
    store: Store,
    step: impl Fn(&[u8; N]) -> __m256i,
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

/// The staircase of a block of BF16, as registers. A byte shuffle is the widest table look-up there is. Counted from the lowest element that
/// has a step, steps are bytes: they differ by less than four codes, and a code is 16.
#[derive(Clone, Copy)]
struct Bf16Steps {
    /// Twice, because shuffles look up within halves.
    steps: __m256i,
    low: __m256i,
    /// The code that all codes are counted from.
    base: __m256i,
    multiplier: f32,
}

impl Bf16Steps {
    #[target_feature(enable = "avx2,f16c")]
    fn new(stair: &Staircase) -> Self {
        let sums = stair.steps.map(|step| stair.low.wrapping_add(step) as u16);
        let base = sums.into_iter().fold(u16::MAX, u16::min) >> 4;
        let steps = sums.map(|sum| sum - (base << 4));
        let fits = steps.iter().all(|step| *step <= 0xff) && stair.low.is_multiple_of(1 << 7);
        let steps = steps.map(|step| step as u8);
        // SAFETY: the array has the 16 bytes that are read, and the load may be unaligned.
        let steps = unsafe { _mm_loadu_si128(steps.as_ptr().cast()) };
        Self {
            steps: _mm256_broadcastsi128_si256(steps),
            // Above all elements if there is no staircase.
            low: _mm256_set1_epi16(if fits { stair.low as i16 } else { i16::MAX }),
            base: _mm256_set1_epi8(base as i8),
            multiplier: stair.multiplier,
        }
    }
}

/// Staircase on 32 elements of BF16. `None` if an element is low.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn encode_bf16(source: &[u8; 64], stair: &Bf16Steps) -> Option<__m256i> {
    let [first, second] = parts(source);
    let (first, second) = (load(first), load(second));
    let positive = _mm256_set1_epi16(i16::MAX);
    let over = |word| _mm256_sub_epi16(_mm256_and_si256(word, positive), stair.low);
    let (over_first, over_second) = (over(first), over(second));
    let either = _mm256_or_si256(over_first, over_second);
    if _mm256_testz_si256(either, _mm256_set1_epi16(i16::MIN)) == 0 {
        return None;
    }
    let climb = |over| {
        // What is low ends with the mantissa 0. A byte index with its top bit set looks up zero.
        let index = _mm256_and_si256(_mm256_srli_epi16::<3>(over), _mm256_set1_epi16(15));
        let index = _mm256_or_si256(index, _mm256_set1_epi16(i16::MIN));
        _mm256_srli_epi16::<4>(_mm256_add_epi16(over, _mm256_shuffle_epi8(stair.steps, index)))
    };
    let packed = _mm256_packus_epi16(climb(over_first), climb(over_second));
    Some(in_order(_mm256_or_si256(_mm256_add_epi8(packed, stair.base), signs(first, second))))
}

/// The signs of 32 elements of 16 bits, in the order in which packing leaves them.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn signs(first: __m256i, second: __m256i) -> __m256i {
    _mm256_and_si256(_mm256_packs_epi16(first, second), _mm256_set1_epi8(i8::MIN))
}

/// Undoes the order of packing, which alternates between the operands every 8 bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn in_order(packed: __m256i) -> __m256i {
    _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
}

/// The staircase of a block of F16, as registers. Its steps take nine bits, so low and high bytes of them are looked up apart.
#[derive(Clone, Copy)]
struct F16Steps {
    low_bytes: __m256i,
    high_bytes: __m256i,
    low: __m256i,
    multiplier: f32,
}

impl F16Steps {
    #[target_feature(enable = "avx2,f16c")]
    fn new(stair: &Staircase) -> Self {
        let [first, second] = load_steps(stair);
        let byte = |steps| _mm256_and_si256(steps, _mm256_set1_epi32(0xff));
        // Packing alternates between the halves of its operands, which the permutes undo. The
        // second one also repeats the 16 bytes, because shuffles look up within halves.
        let pack = |first, second| {
            let words = _mm256_packus_epi32(first, second);
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm256_packus_epi16(words, words);
            _mm256_permute4x64_epi64::<0b10_00_10_00>(bytes)
        };
        let (first_high, second_high) =
            (_mm256_srli_epi32::<8>(first), _mm256_srli_epi32::<8>(second));
        Self {
            low_bytes: pack(byte(first), byte(second)),
            high_bytes: pack(byte(first_high), byte(second_high)),
            low: _mm256_set1_epi16(stair.low as i16),
            multiplier: stair.multiplier,
        }
    }
}

/// The staircase of a block of F32, as registers: the first and the last eight steps.
#[derive(Clone, Copy)]
struct FloatSteps {
    halves: [__m256i; 2],
    low: __m256i,
    multiplier: f32,
}

impl FloatSteps {
    #[target_feature(enable = "avx2,f16c")]
    fn new(stair: &Staircase) -> Self {
        let low = _mm256_set1_epi32(stair.low as i32);
        Self { halves: load_steps(stair), low, multiplier: stair.multiplier }
    }
}

/// Staircase on 32 elements of F16. `None` if an element is low.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn encode_f16(source: &[u8; 64], stair: &F16Steps) -> Option<__m256i> {
    let [first, second] = parts(source);
    let (first, second) = (load(first), load(second));
    let positive = _mm256_set1_epi16(i16::MAX);
    let (low_first, low_second) =
        (_mm256_and_si256(first, positive), _mm256_and_si256(second, positive));
    let lowest = _mm256_min_epu16(low_first, low_second);
    let low = _mm256_cmpgt_epi16(stair.low, lowest);
    if _mm256_movemask_epi8(low) != 0 {
        return None;
    }
    let climb = |magnitude| {
        let index = _mm256_and_si256(_mm256_srli_epi16::<6>(magnitude), _mm256_set1_epi16(15));
        // A byte index with its top bit set looks up zero.
        let in_low = _mm256_or_si256(index, _mm256_set1_epi16(i16::MIN));
        let in_high = _mm256_or_si256(_mm256_slli_epi16::<8>(index), _mm256_set1_epi16(0x80));
        let step = _mm256_or_si256(
            _mm256_shuffle_epi8(stair.low_bytes, in_low),
            _mm256_shuffle_epi8(stair.high_bytes, in_high),
        );
        _mm256_srli_epi16::<7>(_mm256_add_epi16(magnitude, step))
    };
    let packed = _mm256_packus_epi16(climb(low_first), climb(low_second));
    Some(in_order(_mm256_or_si256(packed, signs(first, second))))
}

/// Staircase on 32 elements of 32 bits; `None` if one is low.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn encode_floats(source: &[u8; 128], stair: &FloatSteps) -> Option<__m256i> {
    let [lower, upper] = stair.halves;
    let [a, b, c, d] = f32_values(source);
    let magnitude =
        |value| _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(i32::MAX));
    let lowest = _mm256_min_epu32(
        _mm256_min_epu32(magnitude(a), magnitude(b)),
        _mm256_min_epu32(magnitude(c), magnitude(d)),
    );
    let low = _mm256_cmpgt_epi32(stair.low, lowest);
    if _mm256_movemask_epi8(low) != 0 {
        return None;
    }
    let climb = |value| {
        let bits = _mm256_castps_si256(value);
        // Three bits choose within a half of the table, and the mantissa's top bit, moved to the
        // sign, the half.
        let index = _mm256_srli_epi32::<19>(bits);
        let step = _mm256_blendv_ps(
            _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(lower, index)),
            _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(upper, index)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<9>(bits)),
        );
        let sum = _mm256_add_epi32(magnitude(value), _mm256_castps_si256(step));
        with_sign(_mm256_srli_epi32::<20>(sum), bits)
    };
    Some(pack([climb(a), climb(b), climb(c), climb(d)]))
}

/// Codes of 32 finite values by the formula; see [`avx512`](super::avx512) for why nothing needs
/// to be clamped.
#[target_feature(enable = "avx2,f16c")]
#[cold]
#[inline(never)]
fn arithmetic(values: [__m256; 4], multiplier: f32) -> __m256i {
    let multiplier = _mm256_set1_ps(multiplier);
    let [a, b, c, d] = values;
    let code = |value| {
        let bits = _mm256_castps_si256(_mm256_mul_ps(value, multiplier));
        let magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(i32::MAX));
        let odd = _mm256_and_si256(_mm256_srli_epi32::<20>(bits), _mm256_set1_epi32(1));
        let rounded =
            _mm256_add_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32(0x7_ffff)), odd);
        let normal =
            _mm256_sub_epi32(_mm256_srli_epi32::<20>(rounded), _mm256_set1_epi32(120 << 3));
        let rounder = _mm256_set1_ps(16384.0);
        let raised = _mm256_add_ps(_mm256_castsi256_ps(magnitude), rounder);
        let subnormal = _mm256_sub_epi32(_mm256_castps_si256(raised), _mm256_castps_si256(rounder));
        let small = _mm256_cmpgt_epi32(_mm256_set1_epi32(121 << 23), magnitude);
        with_sign(_mm256_blendv_epi8(normal, subnormal, small), bits)
    };
    pack([code(a), code(b), code(c), code(d)])
}

/// Rounds to BF16 if the format says so. Values are finite.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn cast(values: [__m256; 4], precast: Precast) -> [__m256; 4] {
    let round = |value| {
        let bits = _mm256_castps_si256(value);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(!0xffff)))
    };
    let [a, b, c, d] = values;
    match precast {
        Precast::Bf16 => [round(a), round(b), round(c), round(d)],
        Precast::None => values,
    }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn bf16_values(source: &[u8; 64]) -> [__m256; 4] {
    let [a, b, c, d] = parts(source);
    let widen = |half| _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_half(half)));
    let value = |half| _mm256_castsi256_ps(widen(half));
    [value(a), value(b), value(c), value(d)]
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn f16_values(source: &[u8; 64]) -> [__m256; 4] {
    let [a, b, c, d] = parts(source);
    let value = |half| _mm256_cvtph_ps(load_half(half));
    [value(a), value(b), value(c), value(d)]
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn f32_values(source: &[u8; 128]) -> [__m256; 4] {
    let [a, b, c, d] = parts(source);
    let value = |vector| _mm256_castsi256_ps(load(vector));
    [value(a), value(b), value(c), value(d)]
}

/// `code | bits >> 24 & 0x80`
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn with_sign(code: __m256i, bits: __m256i) -> __m256i {
    let sign = _mm256_and_si256(_mm256_srli_epi32::<24>(bits), _mm256_set1_epi32(0x80));
    _mm256_or_si256(code, sign)
}

/// Codes in 32-bit lanes to bytes, in order.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn pack([a, b, c, d]: [__m256i; 4]) -> __m256i {
    let packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    // Packing goes round the four operands every 4 bytes.
    _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

#[target_feature(enable = "avx2,f16c")]
fn decode(codes: &[u8], scale: f32, ty: SourceType, out: &mut [u8]) {
    x86::decode_run(codes, scale, ty, out);
}

#[target_feature(enable = "avx2,f16c")]
fn copy(source: &[u8], out: &mut [u8]) {
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

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load_steps(stair: &Staircase) -> [__m256i; 2] {
    let (first, second) = (stair.steps.as_ptr(), stair.steps[8..].as_ptr());
    // SAFETY: the first half of the array has the 32 bytes that are read; unaligned loads may.
    let first = unsafe { _mm256_loadu_si256(first.cast()) };
    // SAFETY: so does the second half.
    let second = unsafe { _mm256_loadu_si256(second.cast()) };
    [first, second]
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load(vector: &[u8; 32]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read, and the load may be unaligned.
    unsafe { _mm256_loadu_si256(vector.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load_half(half: &[u8; 16]) -> __m128i {
    // SAFETY: the array has the 16 bytes that are read, and the load may be unaligned.
    unsafe { _mm_loadu_si128(half.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn store_unaligned(out: &mut [u8; STEP], vector: __m256i) {
    // SAFETY: the array has the 32 bytes that are written, and the store may be unaligned.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), vector) }
}

/// `out` must be aligned to 32 bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn stream_store(out: &mut [u8; STEP], vector: __m256i) {
    debug_assert!(out.as_ptr().addr().is_multiple_of(STEP));
    // SAFETY: the array has the 32 bytes that are written, and both callers have checked that it
    // is aligned. `Codec` fences before it returns, so no other thread is handed unordered stores.
    unsafe { _mm256_stream_si256(out.as_mut_ptr().cast(), vector) }
}

//! What the x86 codecs share.
#![allow(unsafe_code, reason = "intrinsics for the memory system")]

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch, _mm_sfence};

use half::f16;

use crate::SourceType;

/// Bytes shorter than a vector, filled up with zeros, which change no maximum.
#[inline(always)]
pub(super) fn padded<const N: usize>(rest: &[u8]) -> [u8; N] {
    let mut vector = [0; N];
    vector[..rest.len()].copy_from_slice(rest);
    vector
}

/// An array in equal parts.
#[inline(always)]
pub(super) fn parts<const N: usize, const M: usize, const PARTS: usize>(
    whole: &[u8; N],
) -> [&[u8; M]; PARTS] {
    const { assert!(N == M * PARTS, "the parts make up the whole") };
    let parts = whole.as_chunks().0;
    std::array::from_fn(|i| &parts[i])
}

/// Brings a vector that will be read later into the L2 cache.
#[inline(always)]
pub(super) fn prefetch<const N: usize>(vector: &[u8; N]) {
    // SAFETY: prefetching has no effect but on caches, and does not fault.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(vector.as_ptr().cast()) }
}

/// Orders non-temporal stores before everything that follows.
pub(super) fn fence() {
    // SAFETY: every x86-64 processor has SSE.
    unsafe { _mm_sfence() }
}

/// Decodes a run. Written so that it becomes vector code in a function with vector features.
#[inline(always)]
pub(super) fn decode_run(codes: &[u8], scale: f32, ty: SourceType, out: &mut [u8]) {
    match ty {
        SourceType::Bf16 => {
            for (&code, out) in codes.iter().zip(out.as_chunks_mut().0) {
                *out = bf16_bits(value(code) * scale).to_le_bytes();
            }
        }
        SourceType::F16 => {
            for (&code, out) in codes.iter().zip(out.as_chunks_mut().0) {
                *out = f16::from_f32(value(code) * scale).to_le_bytes();
            }
        }
        SourceType::F32 => {
            for (&code, out) in codes.iter().zip(out.as_chunks_mut().0) {
                *out = (value(code) * scale).to_le_bytes();
            }
        }
    }
}

/// The value of a code: shifted to where an F32 has exponent and mantissa it is 2^120 times too
/// small, subnormals included.
#[inline(always)]
fn value(code: u8) -> f32 {
    const REBIAS: f32 = f32::from_bits((127 + 120) << 23);
    let magnitude = f32::from_bits(u32::from(code & 0x7f) << 20) * REBIAS;
    let magnitude = if code & 0x7f == 0x7f { f32::NAN } else { magnitude };
    f32::from_bits(magnitude.to_bits() | u32::from(code & 0x80) << 24)
}

/// The nearest BF16, ties to even; NaN stays NaN because its quiet bit is above the ones dropped.
#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let kept = bits >> 16 | 0x40;
    if value.is_nan() { kept as u16 } else { rounded as u16 }
}

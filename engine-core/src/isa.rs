//! The digest's inner loop, compiled for the vector unit that is there.
#![allow(unsafe_code, reason = "calling code compiled for a CPU feature, after asking for it")]

use crate::digest;

/// See [`digest::nh_rows`].
pub(crate) fn nh_rows(row: u32, rows: &[[u8; 64]]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the CPU has AVX-512F, which is all that the callee requires.
        return unsafe { nh_rows_avx512(row, rows) };
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2, which is all that the callee requires.
        return unsafe { nh_rows_avx2(row, rows) };
    }
    digest::nh_rows(row, rows)
}

/// A row is one register. Written out, because the compiler makes gathers of the portable loop.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn nh_rows_avx512(row: u32, rows: &[[u8; 64]]) -> u64 {
    use std::arch::x86_64::{
        _mm512_add_epi64, _mm512_loadu_si512, _mm512_mul_epu32, _mm512_reduce_add_epi64,
        _mm512_setzero_si512, _mm512_srli_epi64,
    };

    let load = |words: &[u64; 8]| {
        // SAFETY: the pointer is that of 64 readable bytes; the load has no alignment to keep.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    };
    let keys = digest::Keys::at(row);
    let (mut low, mut high) = (load(&keys.low), load(&keys.high));
    let (low_step, high_step) = (load(&keys.low_step), load(&keys.high_step));
    let mut sum = _mm512_setzero_si512();
    for bytes in rows {
        // SAFETY: the pointer is that of 64 readable bytes; the load has no alignment to keep.
        let words = unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) };
        // The multiplication reads the lower halves alone: what an addition carries into the upper
        // ones is not seen.
        let left = _mm512_add_epi64(words, low);
        let right = _mm512_add_epi64(_mm512_srli_epi64::<32>(words), high);
        sum = _mm512_add_epi64(sum, _mm512_mul_epu32(left, right));
        low = _mm512_add_epi64(low, low_step);
        high = _mm512_add_epi64(high, high_step);
    }
    _mm512_reduce_add_epi64(sum).cast_unsigned()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn nh_rows_avx2(row: u32, rows: &[[u8; 64]]) -> u64 {
    digest::nh_rows(row, rows)
}

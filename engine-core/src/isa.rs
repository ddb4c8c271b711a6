//! The digest's inner loop, for the vector unit that is there.
//!
//! A register holds words. Keys are added to both halves of all of them at once, the upper halves are shifted down, and one
//! instruction multiplies the halves: six instructions for a register, so that a core computes digests faster than it reads
//! memory with any of these units. Written out, because the compiler makes several times as much of the portable loop.
#![allow(unsafe_code, reason = "calling code compiled for a CPU feature, after asking for it")]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128i, __m256i, __m512i, _mm_add_epi32, _mm_add_epi64, _mm_loadu_si128, _mm_mul_epu32,
    _mm_setzero_si128, _mm_srli_epi64, _mm_storeu_si128, _mm256_add_epi32, _mm256_add_epi64,
    _mm256_loadu_si256, _mm256_mul_epu32, _mm256_setzero_si256, _mm256_srli_epi64,
    _mm256_storeu_si256, _mm512_add_epi32, _mm512_add_epi64, _mm512_loadu_si512, _mm512_mul_epu32,
    _mm512_setzero_si512, _mm512_srli_epi64, _mm512_storeu_si512,
};

use crate::digest::{self, Rows};

/// The best that this CPU has of [`units`].
pub(crate) fn nh_rows(row: u32, rows: &[[u8; 64]]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    return if is_x86_feature_detected!("avx512f") {
        avx512(row, rows)
    } else if is_x86_feature_detected!("avx2") {
        avx2(row, rows)
    } else {
        sse2(row, rows)
    };
    #[cfg(not(target_arch = "x86_64"))]
    digest::nh_rows(row, rows)
}

/// All that this CPU can run, by name; the last one is the portable loop.
pub(crate) fn units() -> Vec<(&'static str, Rows)> {
    let mut units: Vec<(&'static str, Rows)> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            units.push(("AVX-512", avx512));
        }
        if is_x86_feature_detected!("avx2") {
            units.push(("AVX2", avx2));
        }
        units.push(("SSE2", sse2));
    }
    units.push(("portable", digest::nh_rows));
    units
}

#[cfg(target_arch = "x86_64")]
fn avx512(row: u32, rows: &[[u8; 64]]) -> u64 {
    assert!(is_x86_feature_detected!("avx512f"));
    // SAFETY: the CPU has AVX-512F, which is all that the callee requires.
    unsafe { nh_rows_avx512(row, rows) }
}

#[cfg(target_arch = "x86_64")]
fn avx2(row: u32, rows: &[[u8; 64]]) -> u64 {
    assert!(is_x86_feature_detected!("avx2"));
    // SAFETY: the CPU has AVX2, which is all that the callee requires.
    unsafe { nh_rows_avx2(row, rows) }
}

#[cfg(target_arch = "x86_64")]
fn sse2(row: u32, rows: &[[u8; 64]]) -> u64 {
    // SAFETY: every CPU of this architecture has SSE2, which is all that the callee requires.
    unsafe { nh_rows_sse2(row, rows) }
}

/// Makes a function of `N` registers for a row, whose words are `W` to a register.
macro_rules! nh_rows {
    (
        $(#[$attribute:meta])* $name:ident, $vector:ty, $registers:literal,
        $load:ident, $store:ident, $zero:ident, $add_halves:ident, $add_words:ident, $shift:ident, $multiply:ident
    ) => {
        #[cfg(target_arch = "x86_64")]
        $(#[$attribute])*
        fn $name(row: u32, rows: &[[u8; 64]]) -> u64 {
            const WORDS: usize = 8 / $registers;
            let load = |bytes: *const u8| {
                // SAFETY: every caller passes a pointer to as many readable bytes as a register has; the load has no
                // alignment to keep.
                unsafe { $load(bytes.cast()) }
            };
            let keys = digest::Keys::at(row);
            let words = |words: &[u64; 8]| -> [$vector; $registers] {
                std::array::from_fn(|part| load(words[part * WORDS..][..WORDS].as_ptr().cast()))
            };
            let (mut key, step) = (words(&keys.row), words(&keys.step));
            let mut sums = [$zero(); $registers];
            for bytes in rows {
                for part in 0..$registers {
                    let halves = load(bytes[part * WORDS * 8..][..WORDS * 8].as_ptr());
                    let halves = $add_halves(halves, key[part]);
                    let products = $multiply(halves, $shift::<32>(halves));
                    sums[part] = $add_words(sums[part], products);
                    key[part] = $add_halves(key[part], step[part]);
                }
            }
            let mut all = [0_u64; 8];
            for (part, words) in sums.into_iter().zip(all.chunks_exact_mut(WORDS)) {
                // SAFETY: the pointer is that of as many writable bytes as a register has; the store has no alignment to
                // keep.
                unsafe { $store(words.as_mut_ptr().cast(), part) };
            }
            all.iter().fold(0, |sum, word| sum.wrapping_add(*word))
        }
    };
}

nh_rows!(
    #[target_feature(enable = "avx512f")]
    nh_rows_avx512,
    __m512i,
    1,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_setzero_si512,
    _mm512_add_epi32,
    _mm512_add_epi64,
    _mm512_srli_epi64,
    _mm512_mul_epu32
);
nh_rows!(
    #[target_feature(enable = "avx2")]
    nh_rows_avx2,
    __m256i,
    2,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    _mm256_setzero_si256,
    _mm256_add_epi32,
    _mm256_add_epi64,
    _mm256_srli_epi64,
    _mm256_mul_epu32
);
nh_rows!(
    #[target_feature(enable = "sse2")]
    nh_rows_sse2,
    __m128i,
    4,
    _mm_loadu_si128,
    _mm_storeu_si128,
    _mm_setzero_si128,
    _mm_add_epi32,
    _mm_add_epi64,
    _mm_srli_epi64,
    _mm_mul_epu32
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_vector_unit_computes_the_same_sum(
            row: u32, bytes in proptest::collection::vec(any::<u8>(), 0..40 * 64),
        ) {
            let rows = bytes.as_chunks::<64>().0;
            let plain = digest::nh_rows(row, rows);
            prop_assert_eq!(nh_rows(row, rows), plain);
            for (unit, sum) in units() {
                prop_assert_eq!(sum(row, rows), plain, "{}", unit);
            }
        }
    }
}

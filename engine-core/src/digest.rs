//! The digest that guards a bucket's bytes on their way.
//!
//! It finds bytes that were lost, that arrived late, in the wrong place or torn; it is no
//! protection against an adversary, which the control plane's authentication is for.
//!
//! # Formula
//!
//! A bucket is an array of rows of 64 bytes; row *r* is eight little-endian 64-bit words
//! *x(r,l)*, whose lower and upper halves are *lo* and *hi*. With 32-bit keys that depend on the
//! position,
//!
//! ```text
//! a(r,l) = A[l] + r·C[l]  mod 2³²          b(r,l) = B[l] + r·D[l]  mod 2³²
//! S = Σ (lo + a mod 2³²) · (hi + b mod 2³²)  mod 2⁶⁴
//! digest = mix(S + n·G)
//! ```
//!
//! summed over the words that carry weights (padding between them is left out; a weight's last
//! word is filled up with zeros), with *n* the bucket's filled length in bytes, *G* the 64-bit
//! golden ratio and *mix* the finaliser of `SplitMix64`.
//!
//! The sum is the NH hash of UMAC (RFC 4418, section 5.2) over positional keys. NH finds a change
//! of any set of words except with probability 2⁻³² over random keys. Here the keys are fixed and
//! advance linearly from row to row, which keeps them free of memory traffic: what that gives up is
//! the resistance to someone who chooses the bytes knowing the keys. A sum can be computed in any
//! order, by any number of threads or GPU blocks, and needs one 32 × 32 → 64 bit multiplication for
//! eight bytes, which every CPU and GPU has as one instruction.

/// Bytes of a row.
const ROW: usize = 64;
/// Words of a row.
const LANES: usize = 8;

/// `A`: keys of the lower halves in row 0. All tables hold digits of √2, √3, √5 and √7.
const LOW: [u32; LANES] = [
    0x6a09_e667,
    0xf3bc_c908,
    0xb2fb_1366,
    0xea95_7d3e,
    0x3adc_1753,
    0xb6b7_4ed5,
    0x4f8b_b9c1,
    0x9f3a_5f0b,
];
/// `B`: keys of the upper halves in row 0.
const HIGH: [u32; LANES] = [
    0xbb67_ae85,
    0x84ca_a73b,
    0x2574_2d70,
    0x78b8_3b89,
    0x25d8_34cc,
    0x53da_4798,
    0xc720_a648,
    0x6e45_a6e3,
];
/// `C`: how the keys of the lower halves advance from row to row. Odd, so that they have the full
/// period of 2³² rows (256 GiB).
const LOW_STEP: [u32; LANES] = [
    0x3c6e_f373,
    0xfe94_f82b,
    0xbe73_7e2f,
    0x1f83_d9ab,
    0x5be0_cd19,
    0x9b05_688d,
    0x510e_527f,
    0xa54f_f53b,
];
/// `D`: how the keys of the upper halves advance from row to row.
const HIGH_STEP: [u32; LANES] = [
    0xa54f_f53d,
    0x5f1d_36f1,
    0x9b05_688f,
    0x2b3e_6c1f,
    0xfb41_bd6b,
    0x1f83_d9ad,
    0x5be0_cd1b,
    0x137e_2179,
];

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What one word of a bucket adds to the sum: the word at byte `8·word`. A sum follows the bytes word by word: what a word
/// added is taken off, what the new one adds is added, both wrapping.
#[inline]
pub fn term(word: u64, bytes: u64) -> u64 {
    let (row, lane) = ((word / LANES as u64) as u32, (word % LANES as u64) as usize);
    let low = LOW[lane].wrapping_add(row.wrapping_mul(LOW_STEP[lane]));
    let high = HIGH[lane].wrapping_add(row.wrapping_mul(HIGH_STEP[lane]));
    u64::from((bytes as u32).wrapping_add(low))
        * u64::from(((bytes >> 32) as u32).wrapping_add(high))
}

/// The digest's sum over `bytes` that begin at byte `offset` of their bucket.
///
/// Sums of disjoint parts of a bucket add up (wrapping) to the sum of the whole, whatever the
/// order.
///
/// # Contract
///
/// `offset` is a multiple of 64, and every part but the last of a weight is a multiple of 8 bytes
/// long: the plan's alignment sees to the first, the chunks' length to the second.
///
/// # Panics
///
/// If `offset` is not a multiple of 64.
pub fn sum(offset: u64, bytes: &[u8]) -> u64 {
    assert!(offset.is_multiple_of(ROW as u64), "a part that begins within a row");
    let row = (offset / ROW as u64) as u32;
    let (rows, tail) = bytes.as_chunks::<ROW>();
    let mut total = crate::isa::nh_rows(row, rows);
    if !tail.is_empty() {
        let mut last = [0; ROW];
        last[..tail.len()].copy_from_slice(tail);
        let words = tail.len().div_ceil(8);
        let row = row.wrapping_add(rows.len() as u32);
        total = products(row, &last)[..words].iter().fold(total, |sum, p| sum.wrapping_add(*p));
    }
    total
}

/// The digest's sum over `bytes` that begin at any byte `offset`: a word that begins before them, or ends behind them, counts with zeros in
/// place of what is not theirs.
///
/// At a multiple of 64 it is [`sum`].
pub fn sum_anywhere(offset: u64, bytes: &[u8]) -> u64 {
    let head = (offset.next_multiple_of(ROW as u64) - offset).min(bytes.len() as u64) as usize;
    let (head, rest) = bytes.split_at(head);
    let (mut at, mut total, mut left) = (offset, 0_u64, head);
    while !left.is_empty() {
        let skip = (at % 8) as usize;
        let (now, later) = left.split_at(left.len().min(8 - skip));
        let mut word = [0; 8];
        word[skip..skip + now.len()].copy_from_slice(now);
        total = total.wrapping_add(term(at / 8, u64::from_le_bytes(word)));
        at += now.len() as u64;
        left = later;
    }
    if rest.is_empty() { total } else { total.wrapping_add(sum(at, rest)) }
}

/// The sum over rows of 64 bytes, the first of which has the number that is passed.
#[doc(hidden)]
pub type Rows = fn(u32, &[[u8; ROW]]) -> u64;

/// For benchmarks: what each vector unit of this CPU computes sums with, by name.
#[doc(hidden)]
pub fn units() -> Vec<(&'static str, Rows)> {
    crate::isa::units()
}

/// The digest of a bucket, from the sum over all its weights and its filled length in bytes.
pub fn finish(sum: u64, filled: u64) -> u64 {
    mix(sum.wrapping_add(filled.wrapping_mul(GOLDEN)))
}

/// Adds the digest of the next bucket to that of the whole version. It starts at 0.
pub fn chain(version: u64, bucket: u64) -> u64 {
    mix(version.wrapping_mul(GOLDEN) ^ bucket)
}

/// The key tables of the formula: `A`, `B`, `C` and `D`, for code that computes sums elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct KeyTables {
    /// `A`.
    pub low: [u32; LANES],
    /// `B`.
    pub high: [u32; LANES],
    /// `C`.
    pub low_step: [u32; LANES],
    /// `D`.
    pub high_step: [u32; LANES],
}

/// The key tables.
pub const fn keys() -> KeyTables {
    KeyTables { low: LOW, high: HIGH, low_step: LOW_STEP, high_step: HIGH_STEP }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn products(row: u32, bytes: &[u8; ROW]) -> [u64; LANES] {
    let (words, _) = bytes.as_chunks::<8>();
    std::array::from_fn(|lane| {
        term(u64::from(row) * LANES as u64 + lane as u64, u64::from_le_bytes(words[lane]))
    })
}

/// The keys of a row, and how they advance to the next: of each word the key of the lower half in the lower half, that of
/// the upper half in the upper one. Halves are added to halves, without a carry between them.
#[derive(Clone, Copy)]
pub(crate) struct Keys {
    pub(crate) row: [u64; LANES],
    pub(crate) step: [u64; LANES],
}

impl Keys {
    #[inline]
    pub(crate) fn at(row: u32) -> Self {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let key = |base: u32, step: u32| base.wrapping_add(row.wrapping_mul(step));
        Self {
            row: std::array::from_fn(|l| {
                pair(key(LOW[l], LOW_STEP[l]), key(HIGH[l], HIGH_STEP[l]))
            }),
            step: std::array::from_fn(|l| pair(LOW_STEP[l], HIGH_STEP[l])),
        }
    }
}

/// The sum over whole rows, for CPUs whose vector unit has no code of its own; the compiler makes some of it.
#[inline(always)]
pub(crate) fn nh_rows(row: u32, rows: &[[u8; ROW]]) -> u64 {
    let key = |base: u32, step: u32| base.wrapping_add(row.wrapping_mul(step));
    let mut low: [u32; LANES] = std::array::from_fn(|l| key(LOW[l], LOW_STEP[l]));
    let mut high: [u32; LANES] = std::array::from_fn(|l| key(HIGH[l], HIGH_STEP[l]));
    let mut sums = [0_u64; LANES];
    for bytes in rows {
        let (words, _) = bytes.as_chunks::<8>();
        for lane in 0..LANES {
            let word = u64::from_le_bytes(words[lane]);
            let left = (word as u32).wrapping_add(low[lane]);
            let right = ((word >> 32) as u32).wrapping_add(high[lane]);
            sums[lane] = sums[lane].wrapping_add(u64::from(left) * u64::from(right));
            low[lane] = low[lane].wrapping_add(LOW_STEP[lane]);
            high[lane] = high[lane].wrapping_add(HIGH_STEP[lane]);
        }
    }
    sums.iter().fold(0, |sum, lane| sum.wrapping_add(*lane))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive(offset: u64, bytes: &[u8]) -> u64 {
        bytes.chunks(8).enumerate().fold(0_u64, |sum, (index, chunk)| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let at = offset / 8 + index as u64;
            let (row, lane) = ((at / 8) as u32, (at % 8) as usize);
            let a = LOW[lane].wrapping_add(row.wrapping_mul(LOW_STEP[lane]));
            let b = HIGH[lane].wrapping_add(row.wrapping_mul(HIGH_STEP[lane]));
            let [l0, l1, l2, l3, h0, h1, h2, h3] = word;
            let lo = u32::from_le_bytes([l0, l1, l2, l3]).wrapping_add(a);
            let hi = u32::from_le_bytes([h0, h1, h2, h3]).wrapping_add(b);
            sum.wrapping_add(u64::from(lo) * u64::from(hi))
        })
    }

    fn pattern(len: usize, seed: u64) -> Vec<u8> {
        (0..len as u64).map(|i| (mix(seed + i) >> 13) as u8).collect()
    }

    proptest! {
        #[test]
        fn the_vector_code_computes_the_documented_formula(
            len in 0_usize..5000, row in 0_u64..1 << 30, seed: u64,
        ) {
            let bytes = pattern(len, seed >> 1);
            prop_assert_eq!(sum(row * 64, &bytes), naive(row * 64, &bytes));
            let rows = bytes.as_chunks::<ROW>().0;
            prop_assert_eq!(nh_rows(row as u32, rows), crate::isa::nh_rows(row as u32, rows));
        }

        #[test]
        fn parts_summed_in_any_order_give_the_sum_of_the_whole(
            rows in 1_usize..40, cut in 0_usize..40, tail in 0_usize..64, seed: u64,
        ) {
            let bytes = pattern(rows * 64 + tail, seed >> 1);
            let cut = cut.min(rows) * 64;
            let parts = sum(cut as u64, &bytes[cut..]).wrapping_add(sum(0, &bytes[..cut]));
            prop_assert_eq!(parts, sum(0, &bytes));
        }
    }

    proptest! {
        #[test]
        fn bytes_anywhere_count_as_whole_words_with_zeros_around_them(
            offset in 0_u64..300, len in 0_usize..700, seed: u64,
        ) {
            let bytes = pattern(len, seed >> 1);
            let naive = (offset / 8..(offset + len as u64).div_ceil(8)).fold(0_u64, |sum, word| {
                let byte = |at: u64| match at.checked_sub(offset) {
                    Some(at) => bytes.get(at as usize).copied().unwrap_or(0),
                    None => 0,
                };
                let word_bytes = std::array::from_fn(|n| byte(word * 8 + n as u64));
                sum.wrapping_add(term(word, u64::from_le_bytes(word_bytes)))
            });
            let expected = if len == 0 { 0 } else { naive };
            prop_assert_eq!(sum_anywhere(offset, &bytes), expected);
            if offset.is_multiple_of(64) {
                prop_assert_eq!(sum_anywhere(offset, &bytes), sum(offset, &bytes));
            }
        }
    }

    #[test]
    fn moved_swapped_torn_and_flipped_bytes_change_the_digest() {
        let bytes = pattern(64 * 64, 7);
        let whole = sum(0, &bytes);
        assert_ne!(sum(64, &bytes), whole, "moved by a row");
        for (i, j) in [(0, 1), (0, 8), (3, 500), (17, 25)] {
            let mut swapped = bytes.clone();
            for byte in 0..8 {
                swapped.swap(i * 8 + byte, j * 8 + byte);
            }
            assert_ne!(sum(0, &swapped), whole, "words {i} and {j} swapped");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(sum(0, &flipped), whole, "bit {bit} flipped");
        }
        let mut torn = bytes.clone();
        torn[2048..].fill(0);
        assert_ne!(sum(0, &torn), whole);
        assert_ne!(finish(whole, 4096), finish(whole, 4095), "the length counts");
    }

    #[test]
    fn two_sign_flips_do_not_cancel() {
        // They would in a plain sum of products with 64-bit words, whose top bits carry only one bit
        // each into the digest.
        let bytes = pattern(64 * 16, 3);
        for other in 1..128 {
            let mut flipped = bytes.clone();
            flipped[7] ^= 0x80;
            flipped[other * 8 + 7] ^= 0x80;
            assert_ne!(sum(0, &flipped), sum(0, &bytes));
        }
    }

    #[test]
    fn the_order_of_buckets_counts_in_the_digest_of_a_version() {
        assert_ne!(chain(chain(0, 1), 2), chain(chain(0, 2), 1));
    }
}

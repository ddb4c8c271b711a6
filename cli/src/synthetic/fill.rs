//! The values of synthetic tensors, and what changes those of real ones.
//!
//! A tensor is a sequence of 64-bit words, little-endian. Word `i` is a hash of `i` plus a seed out
//! of the tensor's name and the version, so that any range of bytes can be made alone, in any
//! order, on any number of threads. The hash adds, shifts and xors, and does not multiply: SSE2,
//! the vector unit that every x86-64 has, multiplies no 64-bit lanes.

use std::ops::Range;

use engine_core::{DType, TensorMeta, Version};
use serde::{Deserialize, Serialize};

/// Bytes made at a time for a comparison: well within the first-level cache.
const BLOCK: usize = 4096;

/// Makes the bytes `range` of a synthetic tensor at a version.
///
/// The values are finite and of the sizes that weights have: the sign, the mantissa and the lowest
/// three bits of the exponent are random, the exponent between 2⁻⁹ and 2⁻², so that values of
/// `BF16`, `F16`, `F32` and `F64` lie in ±[2⁻⁹, 2⁻¹). Other types get random bits, of which none
/// makes a NaN.
///
/// # Panics
///
/// If `output` has not the length of the range.
///
/// # Examples
///
/// ```
/// use cli::synthetic::fill;
/// use engine_core::{DType, TensorMeta, Version};
///
/// let meta = TensorMeta::new("lm_head.weight", DType::BF16, [1024]);
/// let mut whole = vec![0; 2048];
/// fill(&meta, Version(3), 0..2048, &mut whole);
/// let mut part = vec![0; 100];
/// fill(&meta, Version(3), 777..877, &mut part);
/// assert_eq!(part, whole[777..877]);
/// ```
pub fn fill(meta: &TensorMeta, version: Version, range: Range<u64>, output: &mut [u8]) {
    assert_eq!(range.end.checked_sub(range.start), Some(output.len() as u64), "{range:?}");
    let seed = seed(&meta.name, version.0);
    let (mask, base) = finite(meta.dtype);
    words(range.start, output, |index| (mix(seed, index) & mask).wrapping_add(base));
}

/// Compares bytes of a tensor from `offset` on with what [`fill`] makes, in constant memory.
///
/// # Errors
///
/// The position in the tensor of the first byte that differs.
pub fn compare(meta: &TensorMeta, version: Version, offset: u64, bytes: &[u8]) -> Result<(), u64> {
    blockwise(offset, bytes, |range, block| fill(meta, version, range, block))
}

/// Compares bytes with what `make` makes, block by block.
pub(crate) fn blockwise(
    mut offset: u64,
    bytes: &[u8],
    mut make: impl FnMut(Range<u64>, &mut [u8]),
) -> Result<(), u64> {
    let mut block = [0; BLOCK];
    for received in bytes.chunks(BLOCK) {
        let expected = &mut block[..received.len()];
        make(offset..offset + received.len() as u64, expected);
        if expected != received {
            let at = expected.iter().zip(received).position(|(a, b)| a != b).unwrap_or(0);
            return Err(offset + at as u64);
        }
        offset += received.len() as u64;
    }
    Ok(())
}

/// How many elements of a model differ between a version and the next: a fraction, to a precision of 1 in 32 768.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeRate(u16);

impl ChangeRate {
    /// A fraction between 0 and 1; `None` for other numbers.
    pub fn new(fraction: f64) -> Option<Self> {
        // Versions are told apart from a common start: an element differs from one to the next where one of both flips it.
        (0.0..=1.0).contains(&fraction).then(|| Self((fraction / 2.0 * 65536.0).round() as u16))
    }
}

/// The values of a synthetic model at a version: all of them new with every version, or those of version 1 with some that
/// training has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Values {
    pub(crate) version: Version,
    pub(crate) rate: Option<ChangeRate>,
}

impl Values {
    /// Makes the bytes `range` of a tensor.
    pub(crate) fn fill(self, meta: &TensorMeta, range: Range<u64>, output: &mut [u8]) {
        let Some(rate) = self.rate else { return fill(meta, self.version, range, output) };
        fill(meta, Version(1), range.clone(), output);
        perturb(meta, self.version.0.saturating_sub(1), Some(rate), range.start, output);
    }
}

/// Changes bytes of a real tensor, which begin at `offset`, as `steps` of training would: the lowest
/// mantissa bit of some of the elements flips, an eighth of them without a rate, others for every number of steps. With 0
/// steps nothing changes.
///
/// Finite values stay finite. Only floating-point tensors change (others are not trained), and of
/// those not the 6-bit ones, whose elements begin at no fixed bit of a word, nor `F8_E8M0`, of
/// which the lowest bit is a factor of two.
pub(crate) fn perturb(
    meta: &TensorMeta,
    steps: u64,
    rate: Option<ChangeRate>,
    offset: u64,
    bytes: &mut [u8],
) {
    let lowest: u64 = match meta.dtype {
        DType::F64 => 1,
        DType::F32 | DType::C64 => 0x0000_0001_0000_0001,
        DType::F16 | DType::BF16 => 0x0001_0001_0001_0001,
        DType::F8_E4M3 | DType::F8_E5M2 | DType::F8_E4M3FNUZ | DType::F8_E5M2FNUZ => {
            0x0101_0101_0101_0101
        }
        DType::F4 => 0x1111_1111_1111_1111,
        _ => return,
    };
    if steps == 0 {
        return;
    }
    let seed = seed(&meta.name, steps);
    let width = lowest.count_ones();
    let flips = |index| {
        let random = mix(seed, index);
        let Some(ChangeRate(rate)) = rate else {
            return random & random.rotate_right(21) & random.rotate_right(43) & lowest;
        };
        // Sixteen random bits for each element.
        let four = |group: u32| match group {
            0 => random,
            group => mix(!seed, index.wrapping_mul(4).wrapping_add(u64::from(group))),
        };
        (0..width).fold(0, |flips, element| {
            let chance = (four(element / 4) >> (element % 4 * 16)) as u16;
            flips | u64::from(chance < rate) << (element * (64 / width))
        })
    };
    // The bytes next to a NaN, which must not flip into it.
    let stays: fn(u8) -> bool = match meta.dtype {
        DType::F8_E4M3 => |byte| byte & 0x7e == 0x7e,
        DType::F8_E4M3FNUZ | DType::F8_E5M2FNUZ => |byte| byte & 0x7e == 0,
        _ => {
            flip(offset, bytes, flips);
            return;
        }
    };
    for (position, byte) in (offset..).zip(bytes) {
        if !stays(*byte) {
            *byte ^= flips(position / 8).to_le_bytes()[(position % 8) as usize];
        }
    }
}

fn flip(offset: u64, bytes: &mut [u8], flips: impl Fn(u64) -> u64) {
    let (head, body) = bytes.split_at_mut(to_boundary(offset, bytes.len()));
    let mut index = offset / 8;
    if !head.is_empty() {
        let from = (offset % 8) as usize;
        xor(head, &flips(index).to_le_bytes()[from..]);
        index += 1;
    }
    let (chunks, tail) = body.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = (u64::from_le_bytes(*chunk) ^ flips(index)).to_le_bytes();
        index += 1;
    }
    xor(tail, &flips(index).to_le_bytes());
}

fn xor(bytes: &mut [u8], with: &[u8]) {
    for (byte, with) in bytes.iter_mut().zip(with) {
        *byte ^= with;
    }
}

/// Writes the words of a tensor to bytes that begin anywhere in it.
#[inline(always)]
fn words(offset: u64, output: &mut [u8], word: impl Fn(u64) -> u64) {
    let (head, body) = output.split_at_mut(to_boundary(offset, output.len()));
    let mut index = offset / 8;
    if !head.is_empty() {
        let from = (offset % 8) as usize;
        head.copy_from_slice(&word(index).to_le_bytes()[from..from + head.len()]);
        index += 1;
    }
    let (chunks, tail) = body.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = word(index).to_le_bytes();
        index += 1;
    }
    tail.copy_from_slice(&word(index).to_le_bytes()[..tail.len()]);
}

/// Bytes from `offset` to the next word, if that is not where it is, and if there are so many.
fn to_boundary(offset: u64, len: usize) -> usize {
    ((8 - offset % 8) as usize % 8).min(len)
}

/// For a type, which bits of a random word are kept and what is added to them.
fn finite(dtype: DType) -> (u64, u64) {
    let twice = |mask: u64, base: u64| (mask << 32 | mask, base << 32 | base);
    let four = |mask: u64, base: u64| twice(mask << 16 | mask, base << 16 | base);
    match dtype {
        // Sign, three bits of exponent, mantissa; the smallest exponent of 2⁻⁹ is added.
        DType::BF16 => four(0x83ff, 118 << 7),
        DType::F16 => four(0x9fff, 6 << 10),
        DType::F32 | DType::C64 => twice(0x83ff_ffff, 118 << 23),
        DType::F64 => (0x807f_ffff_ffff_ffff, 1014 << 52),
        DType::BOOL => (0x0101_0101_0101_0101, 0),
        // Without the highest exponent bit there is no NaN; with a bit set there is no −0, which
        // is the NaN of the types without one.
        DType::F8_E4M3 | DType::F8_E5M2 | DType::F8_E8M0 => (0xbfbf_bfbf_bfbf_bfbf, 0),
        DType::F8_E4M3FNUZ | DType::F8_E5M2FNUZ => (0xbebe_bebe_bebe_bebe, 0x0101_0101_0101_0101),
        _ => (u64::MAX, 0),
    }
}

/// A seed in which every bit of the name and of the number matters: FNV-1a, then the finaliser of
/// SplitMix64.
fn seed(name: &str, number: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.bytes().chain(number.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

/// Thomas Wang's 64-bit integer hash: additions, shifts and xors.
#[inline(always)]
fn mix(seed: u64, index: u64) -> u64 {
    let mut x = seed.wrapping_add(index);
    x = (!x).wrapping_add(x << 21);
    x ^= x >> 24;
    x = x.wrapping_add(x << 3).wrapping_add(x << 8);
    x ^= x >> 14;
    x = x.wrapping_add(x << 2).wrapping_add(x << 4);
    x ^= x >> 28;
    x.wrapping_add(x << 31)
}

//! Comparing two checkpoints, whatever their shards and the order of their tensors.

use std::fmt;

use engine_core::memory::Pool;
use engine_core::{DType, Result, TensorMeta};
use half::{bf16, f16};

use super::Checkpoint;
use crate::threads::pool;

/// Bytes compared at a time: whole elements of every type, packed 6-bit ones included.
const PIECE: usize = 3 << 20;

/// What a comparison found.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifyReport {
    /// Tensors that are in both checkpoints with the same type and shape.
    pub compared: u64,
    /// Their bytes, in one of the checkpoints.
    pub bytes: u64,
    /// What differs, in the order of the first checkpoint, then what only the second one has.
    pub differences: Vec<Difference>,
}

/// One tensor that differs.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Difference {
    /// Only one checkpoint has it.
    OnlyIn {
        /// Which one.
        side: Side,
        /// The tensor.
        meta: TensorMeta,
    },
    /// Both have it, of different types.
    DType {
        /// The tensor.
        name: String,
        /// The types in the first and in the second checkpoint.
        dtypes: [DType; 2],
    },
    /// Both have it, in different shapes.
    Shape {
        /// The tensor.
        name: String,
        /// The shapes in the first and in the second checkpoint.
        shapes: [Vec<u64>; 2],
    },
    /// Elements differ in at least one bit.
    Values {
        /// The tensor.
        name: String,
        /// How many elements differ.
        count: u64,
        /// How many elements there are.
        elements: u64,
        /// The coordinates of the first element that differs; empty for a scalar.
        first: Vec<u64>,
        /// That element in the first and in the second checkpoint: its value and its bits.
        values: [String; 2],
    },
}

/// The first or the second of two checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first.
    A,
    /// The second.
    B,
}

impl VerifyReport {
    /// Whether the checkpoints have the same tensors, bit for bit.
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty()
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { compared, bytes, differences } = self;
        match differences.len() {
            0 => {
                let s = if *compared == 1 { "" } else { "s" };
                write!(f, "equal: {compared} tensor{s}, {bytes} bytes")
            }
            n => {
                let what = if n == 1 { "tensor differs" } else { "tensors differ" };
                write!(f, "different: {n} {what}; {compared} compared, {bytes} bytes")
            }
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::B => "B",
        })
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnlyIn { side, meta } => {
                write!(f, "{}: only in {side} ({} {:?})", meta.name, meta.dtype, meta.shape)
            }
            Self::DType { name, dtypes: [a, b] } => {
                write!(f, "{name}: type {a} in A, {b} in B")
            }
            Self::Shape { name, shapes: [a, b] } => {
                write!(f, "{name}: shape {a:?} in A, {b:?} in B")
            }
            Self::Values { name, count, elements, first, values: [a, b] } => write!(
                f,
                "{name}: {count} of {elements} elements differ, first at {first:?}: {a} in A, {b} in B"
            ),
        }
    }
}

/// Compares two checkpoints tensor by tensor, bit for bit, on all cores.
///
/// `progress` is told, from any thread, how many bytes more were compared.
///
/// Values are equal when their bits are: 0 and −0 differ, and a NaN equals itself.
///
/// # Errors
///
/// `Resource` if the threads cannot be started.
pub fn verify(
    a: &Checkpoint,
    b: &Checkpoint,
    progress: impl Fn(u64) + Sync,
) -> Result<VerifyReport> {
    let pool = pool()?;
    let compare = |meta: &TensorMeta| match b.meta(&meta.name) {
        None => (None, Some(Difference::OnlyIn { side: Side::A, meta: meta.clone() })),
        Some(other) => match describe(meta, other) {
            Some(difference) => (None, Some(difference)),
            None => {
                let left = a.bytes(&meta.name).unwrap_or_default();
                let right = b.bytes(&meta.name).unwrap_or_default();
                (Some(left.len() as u64), values(&pool, meta, left, right, &progress))
            }
        },
    };
    let results = pool.map(a.metas(), compare);
    let only_in_b = b
        .metas()
        .filter(|meta| a.meta(&meta.name).is_none())
        .map(|meta| Difference::OnlyIn { side: Side::B, meta: meta.clone() });
    Ok(VerifyReport {
        compared: results.iter().filter(|(bytes, _)| bytes.is_some()).count() as u64,
        bytes: results.iter().filter_map(|(bytes, _)| *bytes).sum(),
        differences: results
            .iter()
            .filter_map(|(_, difference)| difference.clone())
            .chain(only_in_b)
            .collect(),
    })
}

fn describe(a: &TensorMeta, b: &TensorMeta) -> Option<Difference> {
    let name = a.name.to_string();
    if a.dtype != b.dtype {
        return Some(Difference::DType { name, dtypes: [a.dtype, b.dtype] });
    }
    let shapes = || [a.shape.to_vec(), b.shape.to_vec()];
    (a.shape != b.shape).then(|| Difference::Shape { name, shapes: shapes() })
}

fn values(
    pool: &Pool,
    meta: &TensorMeta,
    a: &[u8],
    b: &[u8],
    progress: &(impl Fn(u64) + Sync),
) -> Option<Difference> {
    let bits = meta.dtype.bits();
    let per_piece = PIECE as u64 * 8 / bits;
    // The number of differing elements, and the index of the first.
    let compare = |(piece, (a, b)): (usize, (&[u8], &[u8]))| {
        let found = if a == b { (0, None) } else { differing(bits, a, b) };
        progress(a.len() as u64);
        (found.0, found.1.map(|first| piece as u64 * per_piece + first))
    };
    let pieces = a.chunks(PIECE).zip(b.chunks(PIECE)).enumerate();
    let found = pool.map(pieces, compare).into_iter();
    let (count, first) = found.fold((0, None), |x, y| (x.0 + y.0, x.1.or(y.1)));
    let first = first?;
    Some(Difference::Values {
        name: meta.name.to_string(),
        count,
        elements: a.len() as u64 * 8 / bits,
        first: coordinates(first, &meta.shape),
        values: [a, b].map(|bytes| show(meta.dtype, element(bits, bytes, first))),
    })
}

fn differing(bits: u64, a: &[u8], b: &[u8]) -> (u64, Option<u64>) {
    let mut count = 0;
    let mut first = None;
    for index in 0..a.len() as u64 * 8 / bits {
        if element(bits, a, index) != element(bits, b, index) {
            count += 1;
            first.get_or_insert(index);
        }
    }
    (count, first)
}

/// The bits of an element, whether elements fill bytes or share them (lowest bits first).
fn element(bits: u64, bytes: &[u8], index: u64) -> u64 {
    let start = index * bits;
    let (from, to) = ((start / 8) as usize, (start + bits).div_ceil(8) as usize);
    let mut word = [0; 8];
    word[..to - from].copy_from_slice(&bytes[from..to]);
    let value = u64::from_le_bytes(word) >> (start % 8);
    if bits == 64 { value } else { value & ((1 << bits) - 1) }
}

fn show(dtype: DType, bits: u64) -> String {
    let number = match dtype {
        DType::BOOL => return (bits != 0).to_string(),
        DType::U8 | DType::U16 | DType::U32 | DType::U64 => return bits.to_string(),
        DType::I8 => return (bits as i8).to_string(),
        DType::I16 => return (bits as i16).to_string(),
        DType::I32 => return (bits as i32).to_string(),
        DType::I64 => return (bits as i64).to_string(),
        DType::BF16 => format!("{:?}", bf16::from_bits(bits as u16).to_f32()),
        DType::F16 => format!("{:?}", f16::from_bits(bits as u16).to_f32()),
        DType::F32 => format!("{:?}", f32::from_bits(bits as u32)),
        DType::F64 => format!("{:?}", f64::from_bits(bits)),
        DType::C64 => {
            let (re, im) = (f32::from_bits(bits as u32), f32::from_bits((bits >> 32) as u32));
            format!("{re:?}{im:+?}i")
        }
        _ => return format!("{bits:#04x}"),
    };
    let digits = (dtype.bits() / 4) as usize + 2;
    format!("{number} ({bits:#0digits$x})")
}

fn coordinates(mut index: u64, shape: &[u64]) -> Vec<u64> {
    let mut coordinates: Vec<u64> = shape
        .iter()
        .rev()
        .map(|&dimension| {
            let at = index % dimension;
            index /= dimension;
            at
        })
        .collect();
    coordinates.reverse();
    coordinates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_that_share_bytes_are_told_apart() {
        // 1, 2, 3 and 4 in six bits each.
        let bytes = [0x81, 0x30, 0x10];
        let six: Vec<u64> = (0..4).map(|index| element(6, &bytes, index)).collect();
        assert_eq!(six, [1, 2, 3, 4]);
        assert_eq!(element(4, &[0xa5], 0), 5);
        assert_eq!(element(4, &[0xa5], 1), 0xa);
        assert_eq!(element(64, &[0xff; 16], 1), u64::MAX);
    }

    #[test]
    fn an_index_becomes_the_coordinates_of_its_element() {
        assert_eq!(coordinates(7, &[2, 2, 3]), [1, 0, 1]);
        assert!(coordinates(0, &[]).is_empty());
    }
}

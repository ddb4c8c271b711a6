//! FP8 weights that are given back in a wider type while they are written.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use checkpoint_engine::fp8::{BlockGrid, Codec, Granularity, SourceType};
use engine_core::{DType, Encoding, Error, ErrorKind, Result, TensorMeta, Treatment, Weight};
use half::{bf16, f16};

use crate::scheme::{Fp8Weight, Grid, ScaleType};

const OPERATION: &str = "dequantising";

/// A weight in the type `ty`, of its codes and its scales.
pub(crate) fn wide(
    codes: &Weight,
    scale: &Weight,
    how: &Fp8Weight,
    ty: SourceType,
) -> Result<Weight> {
    let meta = codes.meta().clone();
    let dtype = match ty {
        SourceType::Bf16 => DType::BF16,
        SourceType::F16 => DType::F16,
        SourceType::F32 => DType::F32,
    };
    let bytes = scale.to_bytes()?;
    let scales: Vec<f32> = match how.scale_type {
        ScaleType::F32 => bytes.as_chunks::<4>().0.iter().map(|s| f32::from_le_bytes(*s)).collect(),
        ScaleType::F16 => {
            bytes.as_chunks::<2>().0.iter().map(|s| f16::from_le_bytes(*s).to_f32()).collect()
        }
        ScaleType::Bf16 => {
            bytes.as_chunks::<2>().0.iter().map(|s| bf16::from_le_bytes(*s).to_f32()).collect()
        }
        ScaleType::E8m0 => bytes.iter().map(|&exponent| e8m0(exponent)).collect(),
    };
    let row = meta.shape.last().copied().unwrap_or(1) * ty.size() as u64;
    let wide = Wide {
        name: meta.name.clone(),
        codes: codes.to_bytes()?,
        blocks: blocks(&meta, &how.grid),
        scales,
        grid: how.grid,
        ty,
        codec: Codec::best(),
        row: row.max(1),
    };
    let meta = TensorMeta { dtype, ..TensorMeta::clone(&meta) };
    Weight::encoded(meta, Arc::new(wide), Treatment::Converted)
}

/// `2^(exponent - 127)`, where 255 is NaN.
fn e8m0(exponent: u8) -> f32 {
    match exponent {
        // Below the normal numbers.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// The grid as the codecs have it, if they do: they are faster.
fn blocks(meta: &TensorMeta, grid: &Grid) -> Option<BlockGrid> {
    let side = |side: u64| usize::try_from(side).ok();
    let (rows, cols) = (side(grid.rows)?, side(grid.cols)?);
    let elements: u64 = meta.shape.iter().product();
    let matrices = side(elements / grid.rows / grid.cols)?;
    let granularity = if (grid.block_rows, grid.block_cols) == (1, grid.cols) {
        Granularity::PerRow
    } else if (grid.block_rows, grid.block_cols) == (grid.rows, grid.cols) {
        Granularity::PerTensor
    } else {
        Granularity::Block { rows: side(grid.block_rows)?, cols: side(grid.block_cols)? }
    };
    if grid.per_matrix == 0 {
        return granularity.grid(&[matrices.checked_mul(rows)?, cols]).ok();
    }
    let found = granularity.grid(&[matrices, rows, cols]).ok()?;
    let expected = matrices as u64 * grid.per_matrix;
    (found.scales() as u64 == expected).then_some(found)
}

#[derive(Debug)]
struct Wide {
    name: Arc<str>,
    codes: Bytes,
    scales: Vec<f32>,
    grid: Grid,
    blocks: Option<BlockGrid>,
    ty: SourceType,
    codec: Codec,
    row: u64,
}

impl Wide {
    /// The values of some elements.
    fn decode(&self, elements: Range<usize>, values: &mut [u8]) -> Result<()> {
        let codes = &self.codes[elements.clone()];
        if let Some(blocks) = &self.blocks {
            let scales = &self.scales[blocks.scales_of(&elements)];
            let decoded =
                self.codec.dequantize(codes, blocks, elements.clone(), scales, self.ty, values);
            decoded?;
        } else {
            let size = self.ty.size();
            for ((&code, index), value) in
                codes.iter().zip(elements.start as u64..).zip(values.chunks_exact_mut(size))
            {
                let product = e4m3(code) * self.scale_of(index);
                match self.ty {
                    SourceType::Bf16 => {
                        value.copy_from_slice(&bf16::from_f32(product).to_le_bytes());
                    }
                    SourceType::F16 => value.copy_from_slice(&f16::from_f32(product).to_le_bytes()),
                    SourceType::F32 => value.copy_from_slice(&product.to_le_bytes()),
                }
            }
        }
        match first_not_finite(values, self.ty) {
            None => Ok(()),
            Some(at) => Err(self.not_finite(elements.start + at)),
        }
    }

    fn scale_of(&self, element: u64) -> f32 {
        self.scales.get(self.grid.scale_of(element) as usize).copied().unwrap_or(f32::NAN)
    }

    fn not_finite(&self, element: usize) -> Error {
        let (code, scale) = (self.codes[element], self.scale_of(element as u64));
        let (row, col) = (element as u64 / self.grid.cols, element as u64 % self.grid.cols);
        let message = format!(
            "row {row}, column {col}: the code {} times the scale {scale:?} has no finite form in \
             {:?}",
            e4m3(code),
            self.ty
        );
        Error::new(ErrorKind::Weight, OPERATION, message).tensor(&*self.name)
    }
}

/// The first element that is infinite or NaN.
fn first_not_finite(values: &[u8], ty: SourceType) -> Option<usize> {
    let wide = |exponent: u16| {
        let (values, _) = values.as_chunks::<2>();
        values.iter().position(|value| u16::from_le_bytes(*value) & exponent == exponent)
    };
    match ty {
        SourceType::Bf16 => wide(0x7f80),
        SourceType::F16 => wide(0x7c00),
        SourceType::F32 => {
            const EXPONENT: u32 = 0x7f80_0000;
            let (values, _) = values.as_chunks::<4>();
            values.iter().position(|value| u32::from_le_bytes(*value) & EXPONENT == EXPONENT)
        }
    }
}

/// The value of a code.
fn e4m3(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (code >> 3 & 15, f32::from(code & 7));
    sign * match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (8.0 + mantissa) * 2.0_f32.powi(i32::from(exponent) - 10),
    }
}

impl Encoding for Wide {
    fn name(&self) -> &'static str {
        "dequantise"
    }

    fn source_bytes(&self) -> u64 {
        self.codes.len() as u64
    }

    fn granule(&self) -> u64 {
        self.row
    }

    fn encode_host(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()> {
        let size = self.ty.size() as u64;
        let elements = (range.start / size) as usize..range.end.div_ceil(size) as usize;
        if range.start.is_multiple_of(size) && range.end.is_multiple_of(size) {
            return self.decode(elements, destination);
        }
        // The first and the last element are wanted in part.
        let mut values = vec![0; elements.len() * self.ty.size()];
        self.decode(elements, &mut values)?;
        let skip = (range.start % size) as usize;
        destination.copy_from_slice(&values[skip..skip + destination.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_powers_of_two_have_their_values() {
        assert_eq!([e4m3(0), e4m3(1), e4m3(8), e4m3(0x38)], [0.0, 1.0 / 512.0, 1.0 / 64.0, 1.0]);
        assert_eq!([e4m3(0x7e), e4m3(0xfe), e4m3(0xb8)], [448.0, -448.0, -1.0]);
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert_eq!([e8m0(127), e8m0(128), e8m0(1)], [1.0, 2.0, f32::MIN_POSITIVE]);
        assert_eq!(e8m0(0), f32::MIN_POSITIVE / 2.0);
        assert!(e8m0(255).is_nan());
    }
}

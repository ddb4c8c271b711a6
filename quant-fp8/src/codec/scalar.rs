//! The oracle: every formula written down once, plainly. The other codecs must give its bytes.
//!
//! It is also what they fall back to for blocks that hold NaN or infinity, which are never fast.

use half::{bf16, f16};

use super::panel::{Panel, Target};
use super::staircase::Staircase;
use super::{Kernel, Store, value_of};
use crate::format::{FP8_MAX, NonFinite};
use crate::{BlockScale, Fp8Format, Mode, Precast, QuantError, SourceType};

/// The e4m3fn code nearest to `value`, ties to even, after clamping to ±448. NaN gives 0x7f; both
/// keep the sign.
///
/// Codes are sign, 4 bits of exponent with bias 7, 3 bits of mantissa; exponent 0 is subnormal with
/// a step of 2^-9; 0x7f and 0xff are NaN and there is no infinity (OCP 8-bit floating point
/// specification, revision 1.0, section 5).
pub(crate) fn encode(value: f32) -> u8 {
    const MANTISSA_DROPPED: u32 = 20;
    /// The bits of 2^-6, the smallest normal number, which is also how far F32's exponents are from
    /// the codes'.
    const SMALLEST_NORMAL: u32 = 121 << 23;
    /// Adding 2^14, whose last mantissa bit is worth 2^-9, rounds to a multiple of 2^-9.
    const SUBNORMAL_ROUNDER: f32 = 16384.0;

    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs().min(FP8_MAX);
    let bits = magnitude.to_bits();
    let code = if bits < SMALLEST_NORMAL {
        (magnitude + SUBNORMAL_ROUNDER).to_bits() - SUBNORMAL_ROUNDER.to_bits()
    } else {
        // Exponent 121 becomes exponent 1: codes count in steps of an eighth of an octave.
        let odd = bits >> MANTISSA_DROPPED & 1;
        let rounded = bits + ((1 << (MANTISSA_DROPPED - 1)) - 1) + odd;
        (rounded >> MANTISSA_DROPPED) - (120 << (23 - MANTISSA_DROPPED))
    };
    sign | code as u8
}

/// The value of an e4m3fn code.
pub(crate) fn decode(code: u8) -> f32 {
    let exponent = i32::from(code >> 3 & 0xf);
    let mantissa = f32::from(code & 7);
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The elements of `bytes`, precast.
pub(crate) fn elements(
    bytes: &[u8],
    ty: SourceType,
    precast: Precast,
) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(ty.size()).map(move |element| {
        let value = match (ty, element) {
            (SourceType::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            (SourceType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("chunks have the size of the type"),
        };
        match precast {
            Precast::Bf16 => bf16::from_f32(value).to_f32(),
            Precast::None => value,
        }
    })
}

/// Scale of the block of elements `values`, as the format's mode has it.
///
/// # Errors
///
/// `None` inside `Ok` if the block has no finite form and the format makes that an error.
pub(crate) fn block_scale(
    values: impl Iterator<Item = f32>,
    format: &Fp8Format,
) -> Result<Option<BlockScale>, QuantError> {
    let (mut absmax, mut nan) = (0f32, false);
    for value in values {
        nan |= value.is_nan();
        // `max` drops NaN.
        absmax = absmax.max(value.abs());
    }
    scale_of(absmax, nan, format)
}

/// The scale of a block whose largest magnitude, NaN apart, and whether it has a NaN, are known: as [`block_scale`].
pub(super) fn scale_of(
    absmax: f32,
    nan: bool,
    format: &Fp8Format,
) -> Result<Option<BlockScale>, QuantError> {
    let block = if nan && format.mode == Mode::Pytorch {
        BlockScale { scale: f32::NAN, multiplier: f32::NAN }
    } else {
        format.mode.block_scale(absmax)?
    };
    let finite = !nan && absmax.is_finite() && block.multiplier.is_finite();
    Ok((finite || format.non_finite == NonFinite::Reproduce).then_some(block))
}

/// The code of an element under a multiplier. A NaN product has the sign of the element, because
/// the sign of a NaN is up to the processor.
pub(crate) fn quantize(value: f32, multiplier: f32) -> u8 {
    encode((value * multiplier).copysign(value))
}

/// The bits of an element without its sign. They order like magnitudes, with NaN above infinity.
fn magnitude(element: &[u8]) -> u32 {
    match *element {
        [a, b] => u32::from(u16::from_le_bytes([a, b]) & 0x7fff),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]) & 0x7fff_ffff,
        _ => unreachable!("elements have 2 or 4 bytes"),
    }
}

/// The largest bits of a block's magnitudes that are not NaN.
pub(super) fn largest_number(panel: &Panel<'_>, block: usize) -> u32 {
    let elements = panel.rows().flat_map(|row| panel.run(row, block).chunks_exact(panel.ty.size()));
    let bits = elements.map(magnitude);
    bits.filter(|&bits| !value_of(bits, panel.ty, Precast::None).is_nan()).max().unwrap_or(0)
}

/// The codec that runs everywhere, at a twentieth of the speed of memory.
#[derive(Debug)]
pub(super) struct Scalar;

impl Kernel for Scalar {
    fn name(&self) -> &'static str {
        "scalar"
    }

    fn scan(&self, panel: &Panel<'_>, maxima: &mut [u32]) {
        maxima.fill(0);
        for row in panel.rows() {
            for (block, max) in maxima.iter_mut().enumerate() {
                for element in panel.run(row, block).chunks_exact(panel.ty.size()) {
                    *max = (*max).max(magnitude(element));
                }
            }
        }
    }

    fn encode(
        &self,
        panel: &Panel<'_>,
        stairs: &[Staircase],
        target: &mut Target<'_>,
        _: Store,
        _: Option<&Panel<'_>>,
    ) {
        for row in panel.rows() {
            let mut part = target.part(panel, row);
            while let Some((block, source, codes)) = part.next_block(panel) {
                for (value, code) in elements(source, panel.ty, panel.precast).zip(codes) {
                    *code = quantize(value, stairs[block].multiplier);
                }
            }
        }
    }

    fn decode(&self, codes: &[u8], scale: f32, ty: SourceType, out: &mut [u8]) {
        for (&code, element) in codes.iter().zip(out.chunks_exact_mut(ty.size())) {
            let value = decode(code) * scale;
            match ty {
                SourceType::Bf16 => element.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                SourceType::F16 => element.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                SourceType::F32 => element.copy_from_slice(&value.to_le_bytes()),
            }
        }
    }

    fn copy(&self, source: &[u8], out: &mut [u8]) {
        out.copy_from_slice(source);
    }

    fn fence(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_code_decodes_and_encodes_to_itself() {
        for code in (0..=0xffu8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(encode(decode(code)), code);
        }
        assert_eq!(decode(0x7e), 448.0);
        assert_eq!(decode(0x01), 2f32.powi(-9));
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan());
    }

    #[test]
    fn encoding_takes_the_nearest_code_and_breaks_ties_to_even() {
        for code in 0..0x7eu8 {
            let (low, high) = (decode(code), decode(code + 1));
            let middle = low + (high - low) / 2.0;
            assert_eq!(encode(middle.next_down()), code);
            assert_eq!(encode(middle.next_up()), code + 1);
            assert_eq!(encode(middle), code + (code & 1));
            assert_eq!(encode(-middle), encode(middle) | 0x80);
        }
    }

    #[test]
    fn encoding_agrees_with_the_float8_crate_below_the_clamp() {
        for bits in (0..448f32.to_bits()).step_by(997) {
            let value = f32::from_bits(bits);
            assert_eq!(encode(value), float8::F8E4M3::from_f32(value).to_bits(), "{value}");
        }
    }

    #[test]
    fn values_beyond_448_are_clamped_and_minus_zero_keeps_its_sign() {
        for value in [448.1, 464.0, 465.0, 1e30, f32::INFINITY] {
            assert_eq!((encode(value), encode(-value)), (0x7e, 0xfe));
        }
        assert_eq!((encode(0.0), encode(-0.0)), (0x00, 0x80));
        assert_eq!(encode(-f32::from_bits(1)), 0x80);
        assert_eq!(encode(f32::NAN) & 0x7f, 0x7f);
    }
}

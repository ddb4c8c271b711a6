//! The staircase: quantising without arithmetic.
//!
//! Under a fixed multiplier the code of an element is a monotone step function of its magnitude
//! bits. While codes are normal it repeats in every octave of inputs, eight codes higher each time,
//! because multiplying by two only changes exponents. Within an octave it rises eight times, and
//! the rises are at least a sixteenth of an octave apart: codes are an eighth of an octave of
//! *results* apart, which is between a sixteenth and an eighth of an octave of inputs.
//!
//! So in each sixteenth of an octave, which the top four mantissa bits of the input tell, there is
//! at most one rise. One addition and one shift then give the code:
//!
//! ```text
//! code(bits) = (bits + step[top four mantissa bits]) >> (mantissa bits - 3)
//! ```
//!
//! where the step is chosen such that the sum reaches the next multiple of the code's unit exactly
//! at the rise. A vector codec does that with one permute where the arithmetic takes a widening, a
//! multiplication and a rounding. It holds for 7, 10 and 23 bits of mantissa alike, and also when
//! the input is rounded to BF16 first, which is one more monotone step function.
//!
//! Where the rises are is found by evaluating the exact formula on both sides of each, so a
//! staircase is exact by construction; if that does not work out, the block has none.

use crate::{Precast, SourceType};

/// Where the rises of a block's codes are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Staircase {
    /// What elements are multiplied with.
    pub(super) multiplier: f32,
    /// Elements whose magnitude bits are below this have subnormal codes or are subnormal
    /// themselves: they take the arithmetic path. Above all elements if there is no staircase.
    pub(super) low: u32,
    /// What is added to the magnitude bits, by their top four mantissa bits. For 16-bit elements
    /// the low halves count.
    pub(super) steps: [u32; 16],
}

/// Blocks with fewer elements are not worth a staircase.
const WORTHWHILE: usize = 512;

/// How many inputs around a quotient are tried for the one at which a code begins. The quotient is
/// rounded, and so are the products, which moves it by two at most.
const CANDIDATES: u32 = 6;

/// A sixteenth of an octave, in bits of an F32.
const GROUP: u32 = 1 << 19;

impl Staircase {
    /// The staircase for a finite, positive multiplier and a block of so many elements.
    pub(super) fn new(
        multiplier: f32,
        ty: SourceType,
        precast: Precast,
        block_elements: usize,
    ) -> Self {
        let arithmetic = Self {
            multiplier,
            low: if ty == SourceType::F32 { 0x7fff_ffff } else { 0x7fff },
            steps: [0; 16],
        };
        // The lowest octave whose results are all at least 2^-6, the smallest normal result: with
        // biased exponents, octave + multiplier - 127 = 121. All of this is done on F32 bits.
        let exponent = multiplier.to_bits() >> 23;
        if block_elements < WORTHWHILE || !(1..248).contains(&exponent) {
            return arithmetic;
        }
        let octave = (248 - exponent) << 23;
        let first = normal_code(octave, multiplier);
        let Some(rises) = rises(octave, first, multiplier, ty, precast) else { return arithmetic };

        let lane = Lane::of(ty);
        let mut steps = [0; 16];
        for (group, step) in (0..).zip(&mut steps) {
            let start = octave + group * GROUP;
            let (mut code, mut rise) = (first, start + GROUP);
            for at in rises {
                code += u32::from(at <= start);
                rise = if at > start { rise.min(at) } else { rise };
            }
            *step = ((code + 1) << (lane.mantissa - 3)).wrapping_sub(lane.bits(rise));
        }
        Self { multiplier, low: lane.low(octave), steps }
    }
}

/// How the bits of an element relate to those of the same value in F32.
struct Lane {
    mantissa: u32,
    /// Difference of the exponents' biases.
    rebias: u32,
    largest: u32,
}

impl Lane {
    fn of(ty: SourceType) -> Self {
        match ty {
            SourceType::Bf16 => Self { mantissa: 7, rebias: 0, largest: 0x7fff },
            SourceType::F16 => Self { mantissa: 10, rebias: 112, largest: 0x7fff },
            SourceType::F32 => Self { mantissa: 23, rebias: 0, largest: 0x7fff_ffff },
        }
    }

    /// Modulo 2^16 for F16, where the octave may lie outside of its exponents; the sum in the
    /// formula brings it back.
    fn bits(&self, f32_bits: u32) -> u32 {
        let rebiased = f32_bits.wrapping_sub(self.rebias << 23) as i32;
        (rebiased >> (23 - self.mantissa)) as u32
    }

    /// The first normal number of the lane that is not below the octave.
    fn low(&self, octave: u32) -> u32 {
        let octave = self.bits(octave) as i32;
        octave.clamp(1 << self.mantissa, self.largest as i32) as u32
    }
}

/// The inputs, as bits of an F32, at which the eight codes after `first` begin. `None` if the exact
/// formula does not confirm them, or if two are in one group.
#[inline]
fn rises(
    octave: u32,
    first: u32,
    multiplier: f32,
    ty: SourceType,
    precast: Precast,
) -> Option<[u32; 8]> {
    // The distance of neighbouring inputs, after the precast.
    let grid = match (ty, precast) {
        (SourceType::F32, Precast::None) => 1,
        (SourceType::F16, Precast::None) => 1 << 13,
        _ => 1 << 16,
    };
    let mut sure = true;
    let mut rises = [0u32; 8];
    for (code, rise) in (first + 1..).zip(&mut rises) {
        // Half a code below the code; see `normal_code`.
        let midpoint = f32::from_bits(((code + 960) << 20) - (1 << 19));
        let guess = (midpoint / multiplier).to_bits() & !(grid - 1);
        let lowest = guess.wrapping_sub(grid * (CANDIDATES / 2 - 1));
        let mut below = 0;
        for i in 0..CANDIDATES {
            let candidate = lowest.wrapping_add(i * grid);
            below += u32::from(normal_code(candidate, multiplier) < code);
        }
        // The first candidate is below and the last is not: the rise is between them.
        sure &= (1..CANDIDATES).contains(&below);
        *rise = lowest.wrapping_add(below * grid);
    }
    if precast == Precast::Bf16 {
        // What rounds to a BF16 begins half a unit below it; the midpoint itself goes up if the
        // BF16 is even. F16 has no values in between but every eighth.
        let source_grid = match ty {
            SourceType::Bf16 => 1 << 16,
            SourceType::F16 => 1 << 13,
            SourceType::F32 => 1,
        };
        for rise in &mut rises {
            let odd = *rise >> 16 & 1;
            *rise = (*rise - 0x8000 + odd).next_multiple_of(source_grid);
        }
    }
    for pair in rises.windows(2) {
        sure &= pair[0].saturating_add(GROUP) <= pair[1];
    }
    (sure && rises[0] > octave).then_some(rises)
}

/// The code of an input whose result is a normal code: rounds to nearest even by adding to the
/// bits, and lets exponent 121 (2^-6) become exponent 1.
#[inline]
fn normal_code(f32_bits: u32, multiplier: f32) -> u32 {
    let bits = (f32::from_bits(f32_bits) * multiplier).to_bits();
    (bits.wrapping_add(0x7_ffff + (bits >> 20 & 1)) >> 20).wrapping_sub(960)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::scalar;
    use half::{bf16, f16};

    /// What a vector codec does to one element.
    fn climb(stairs: &Staircase, bits: u32, ty: SourceType) -> Option<u8> {
        let mantissa = Lane::of(ty).mantissa;
        let sum = bits.wrapping_add(stairs.steps[(bits >> (mantissa - 4) & 15) as usize]);
        let sum = if ty == SourceType::F32 { sum } else { sum & 0xffff };
        (bits >= stairs.low).then_some((sum >> (mantissa - 3)) as u8)
    }

    /// Blocks of weights have such multipliers, whatever their type.
    fn usual(multiplier: f32) -> bool {
        (2f32.powi(-10)..2f32.powi(23)).contains(&multiplier)
    }

    fn multipliers() -> impl Iterator<Item = f32> {
        // Around 1 in all mantissas that are special, then pseudo-random ones of all exponents.
        let special = (0..64).flat_map(|i| {
            let bits = (127u32 << 23) + (i << 17);
            [bits.wrapping_sub(1), bits, bits + 1]
        });
        let random = (1..4000u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 1).min(0x7f7f_ffff));
        special.chain(random).map(f32::from_bits)
    }

    #[test]
    fn staircases_of_sixteen_bit_elements_are_exact_wherever_codes_are_normal() {
        for (ty, precast) in [
            (SourceType::Bf16, Precast::Bf16),
            (SourceType::F16, Precast::Bf16),
            (SourceType::F16, Precast::None),
        ] {
            let mut without = 0;
            for multiplier in multipliers() {
                let stairs = Staircase::new(multiplier, ty, precast, 1 << 14);
                without += u32::from(stairs.low == 0x7fff && usual(multiplier));
                for bits in 0..0x7fffu16 {
                    let Some(code) = climb(&stairs, bits.into(), ty) else { continue };
                    let value = match (ty, precast) {
                        (SourceType::Bf16, _) => bf16::from_bits(bits).to_f32(),
                        (_, Precast::None) => f16::from_bits(bits).to_f32(),
                        _ => bf16::from_f32(f16::from_bits(bits).to_f32()).to_f32(),
                    };
                    // Larger elements than the largest of the block do not occur.
                    if value * multiplier > 449.0 {
                        break;
                    }
                    assert_eq!(
                        code,
                        scalar::quantize(value, multiplier),
                        "{ty:?} {precast:?} {bits:#x} × {multiplier:e}"
                    );
                }
            }
            assert_eq!(without, 0, "multipliers without a staircase, {precast:?}");
        }
    }

    #[test]
    fn staircases_of_f32_are_exact_around_every_rise() {
        for precast in [Precast::Bf16, Precast::None] {
            let mut without = 0;
            for multiplier in multipliers() {
                let stairs = Staircase::new(multiplier, SourceType::F32, precast, 1 << 14);
                if stairs.low == 0x7fff_ffff {
                    without += u32::from(usual(multiplier));
                    continue;
                }
                for group in 0..16u32 * 12 {
                    let start = stairs.low + group * GROUP;
                    let step = stairs.steps[group as usize & 15];
                    // Where the sum reaches the next multiple of 2^20.
                    let rise = start + (step.wrapping_add(start).wrapping_neg() & 0xf_ffff);
                    for bits in [start, start + 1, rise - 1, rise, rise + 1, start + GROUP - 1] {
                        let value = f32::from_bits(bits);
                        let value = match precast {
                            Precast::Bf16 => bf16::from_f32(value).to_f32(),
                            Precast::None => value,
                        };
                        if bits >= 0x7f7f_0000 || value * multiplier > 449.0 || bits < stairs.low {
                            continue;
                        }
                        assert_eq!(
                            climb(&stairs, bits, SourceType::F32),
                            Some(scalar::quantize(value, multiplier)),
                            "{precast:?} {bits:#x} × {multiplier:e}"
                        );
                    }
                }
            }
            assert_eq!(without, 0, "multipliers without a staircase, {precast:?}");
        }
    }
}

//! FP8 weights as numbers again, for programs that compute with something else.

use engine_core::{DType, Error, ErrorKind, Result, Weight};

use crate::{Codec, Granularity, SourceType};

/// The numbers of an FP8 weight, in the order of its elements: `code · scale`, exactly.
///
/// `codes` has the type F8_E4M3 and the shape `[rows, cols]`, or `[experts, rows, cols]`; `scales` are F32, one for each
/// block of `granularity`.
///
/// # Errors
///
/// `Weight`, naming the tensor, for other types, or if the scales do not have the shape that the blocks give them.
///
/// # Examples
///
/// ```
/// use engine_core::{DType, Weight};
/// use quant_fp8::{Granularity, dequantize};
///
/// let codes = Weight::new("w", DType::F8_E4M3, [1, 2], vec![0x38, 0xb8])?; // 1 and -1
/// let scales = Weight::of("w_scale_inv", [1, 1], vec![0.5_f32])?;
/// assert_eq!(dequantize(&codes, &scales, Granularity::default())?, [0.5, -0.5]);
/// # Ok::<(), engine_core::Error>(())
/// ```
pub fn dequantize(codes: &Weight, scales: &Weight, granularity: Granularity) -> Result<Vec<f32>> {
    let refuse = |message: String| {
        Error::new(ErrorKind::Weight, "dequantising", message).tensor(codes.name())
    };
    let sides = |weight: &Weight| -> Result<Vec<usize>> {
        let sides = weight.meta().shape.iter().map(|&side| usize::try_from(side));
        sides.collect::<std::result::Result<_, _>>().map_err(|error| refuse(error.to_string()))
    };
    if codes.meta().dtype != DType::F8_E4M3 {
        return Err(refuse(format!("it is {}, not F8_E4M3", codes.meta().dtype)));
    }
    let named = |error| Error::from(error).tensor(codes.name());
    let grid = granularity.grid(&sides(codes)?).map_err(named)?;
    let expected = grid.scale_shape();
    if scales.meta().dtype != DType::F32 || sides(scales)? != expected {
        let (dtype, shape) = (scales.meta().dtype, &scales.meta().shape);
        let message =
            format!("`{}` is {dtype} {shape:?}, the blocks give F32 {expected:?}", scales.name());
        return Err(refuse(message));
    }
    // They may begin anywhere.
    let scales = scales.to_bytes()?;
    let scales: Vec<f32> = scales.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
    let mut numbers = vec![0.0_f32; grid.elements()];
    let out = bytemuck::cast_slice_mut(&mut numbers);
    Codec::best()
        .dequantize(&codes.to_bytes()?, &grid, 0..grid.elements(), &scales, SourceType::F32, out)
        .map_err(named)?;
    Ok(numbers)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn codes_and_scales_are_numbers_again_and_other_scales_are_an_error_that_names_both() {
        let codes = Weight::new("w", DType::F8_E4M3, [1, 3], vec![0x38, 0xb8, 0x40]).unwrap();
        let scales = Weight::of("w_scale_inv", [1, 1], vec![0.5_f32]).unwrap();
        let numbers = dequantize(&codes, &scales, Granularity::default()).unwrap();
        assert_eq!(numbers, [0.5, -0.5, 1.0]);

        let scales = Weight::of("w_scale_inv", [2, 1], vec![0.5_f32; 2]).unwrap();
        let error = dequantize(&codes, &scales, Granularity::default()).unwrap_err();
        assert_eq!(error.report().tensor.as_deref(), Some("w"));
        assert!(error.to_string().contains("`w_scale_inv` is F32 [2, 1]"), "{error}");
    }
}

//! Reductions of bytes that are numbers.

use half::{bf16, f16};

use crate::abi::*;

/// Joins another rank's numbers into a result. Types that cannot be reduced were refused before.
pub(crate) fn reduce(dtype: i32, op: i32, result: &mut [u8], other: &[u8]) {
    macro_rules! each {
        ($ty:ty, $add:expr, $multiply:expr) => {{
            const BYTES: usize = size_of::<$ty>();
            let add: fn($ty, $ty) -> $ty = $add;
            let multiply: fn($ty, $ty) -> $ty = $multiply;
            for (a, b) in result.chunks_exact_mut(BYTES).zip(other.chunks_exact(BYTES)) {
                let read = |bytes: &[u8]| {
                    let mut array = [0; BYTES];
                    array.copy_from_slice(bytes);
                    <$ty>::from_le_bytes(array)
                };
                let (x, y) = (read(a), read(b));
                let joined = match i64::from(op) {
                    HCCL_REDUCE_SUM => add(x, y),
                    HCCL_REDUCE_PROD => multiply(x, y),
                    HCCL_REDUCE_MAX => {
                        if y > x {
                            y
                        } else {
                            x
                        }
                    }
                    _ => {
                        if y < x {
                            y
                        } else {
                            x
                        }
                    }
                };
                a.copy_from_slice(&joined.to_le_bytes());
            }
        }};
    }
    match i64::from(dtype) {
        HCCL_DATA_TYPE_INT8 => each!(i8, i8::wrapping_add, i8::wrapping_mul),
        HCCL_DATA_TYPE_INT16 => each!(i16, i16::wrapping_add, i16::wrapping_mul),
        HCCL_DATA_TYPE_INT32 => each!(i32, i32::wrapping_add, i32::wrapping_mul),
        HCCL_DATA_TYPE_INT64 => each!(i64, i64::wrapping_add, i64::wrapping_mul),
        HCCL_DATA_TYPE_FP32 => each!(f32, |x, y| x + y, |x, y| x * y),
        HCCL_DATA_TYPE_FP16 => each!(f16, |x, y| x + y, |x, y| x * y),
        HCCL_DATA_TYPE_BFP16 => each!(bf16, |x, y| x + y, |x, y| x * y),
        _ => {}
    }
}

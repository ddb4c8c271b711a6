//! What kernels of devices need to give the same bytes: the formulas as CUDA C++, and the numbers by which it knows them.

use crate::{Mode, SourceType};

/// CUDA C++ with the formulas of scales and the rounding to codes. It comes behind declarations of `u8`, `u16`, `u32` and `u64`.
///
/// The bytes are the CPU's only without contraction of products and sums, with correctly rounded division, and with subnormal numbers.
pub const CUDA: &str = include_str!("../kernels/fp8.cuh");

/// The number of a mode there.
pub const fn mode_number(mode: Mode) -> u32 {
    match mode {
        Mode::Triton => 0,
        Mode::Pytorch => 1,
        Mode::Ue8m0 => 2,
        Mode::TritonGpu => 3,
    }
}

/// The number of a type of elements there. No type has the number 0.
pub const fn type_number(ty: SourceType) -> u32 {
    match ty {
        SourceType::Bf16 => 1,
        SourceType::F16 => 2,
        SourceType::F32 => 3,
    }
}

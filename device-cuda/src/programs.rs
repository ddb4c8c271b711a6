//! Programs of encodings: those of the encodings themselves, and those for engine-core's.
//!
//! A program is CUDA C++ that defines
//!
//! ```c++
//! __device__ uint4 encode16(const u8* source, u64 at, u32 bytes, const u64* parameters);
//! ```
//!
//! which returns the bytes `at` to `at + bytes` of the output: 16 bytes, or fewer at the output's end. `at` is a multiple of 16. What is
//! returned behind `bytes` is ignored. `source` has the alignment of the weight's elements. `u8`, `u16`, `u32`, `u64` and the contents of
//! `kernels/common.cuh` are available. The launch writes the bytes and adds them to the digest.
#![allow(unsafe_code, reason = "programs run on addresses")]

use std::any::Any;

use engine_core::{Cast, DType, Kernel, Program, Weight};

/// The name of this kind of memory for encodings.
pub(crate) const NAME: &str = "cuda";

// SAFETY: it reads the elements of the output's bytes, which are those of the source.
static CAST: Program = unsafe { Program::new("cast", include_str!("../kernels/cast.cu")) };

// SAFETY: it reads elements of the view, all of which `Weight::strided` has found within its storage.
static STRIDED: Program = unsafe { Program::new("strided", include_str!("../kernels/strided.cu")) };

/// The programs for encodings of engine-core.
pub(crate) static OWN: [&Program; 2] = [&CAST, &STRIDED];

/// The kernel of a weight on a CUDA device, if there is one.
pub(crate) fn kernel_of(weight: &Weight) -> Option<Kernel<'_>> {
    let Some(encoding) = weight.encoding() else { return strided(weight) };
    let any: &dyn Any = &**encoding;
    let kernel = match any.downcast_ref::<Cast>() {
        Some(cast) => of_cast(cast),
        None => encoding.kernel(NAME),
    };
    // The source of a deferred encoding may be in memory that a program cannot read.
    kernel.filter(|_| !encoding.is_deferred())
}

fn of_cast(cast: &Cast) -> Option<Kernel<'_>> {
    let number = |dtype| match dtype {
        DType::BF16 => Some(0),
        DType::F16 => Some(1),
        DType::F32 => Some(2),
        DType::F64 => Some(3),
        _ => None,
    };
    let (from, to) = (cast.from(), cast.to());
    // The kernel rounds once, through F32.
    if from == DType::F64 && to != DType::F32 {
        return None;
    }
    let parameters = vec![number(from)?, number(to)?];
    Some(Kernel { program: &CAST, source: cast.source().storage()?, parameters })
}

fn strided(weight: &Weight) -> Option<Kernel<'_>> {
    let view = weight.strides()?;
    let size = weight.meta().dtype.bytes().filter(|size| matches!(size, 1 | 2 | 4 | 8))?;
    let shape = &weight.meta().shape;
    let mut parameters = vec![size, shape.len() as u64, view.offset];
    for (&side, &stride) in shape.iter().zip(view.strides).rev() {
        // The sum wraps as the kernel's does.
        parameters.extend([side, stride.cast_unsigned()]);
    }
    Some(Kernel { program: &STRIDED, source: view.storage, parameters })
}

//! Changes of a weight, as they arrive: they are applied and can be taken back, or are refused.

#![no_main]

use engine_core::DType;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u16, u8, u16, &[u8])| {
    let (dtype, rows, fill, len, changes) = input;
    let dtype = [DType::U8, DType::BF16, DType::F32, DType::F64][usize::from(dtype) % 4];
    let len = usize::from(len) % 4096;
    let weight: Vec<u8> = (0..len).map(|at| (at as u8).wrapping_mul(fill)).collect();
    delta::fuzzing::changes(dtype, u32::from(rows % 40) * 64, &weight, changes);
});

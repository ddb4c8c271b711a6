//! Tensors that carry changes.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| delta::fuzzing::message(bytes));

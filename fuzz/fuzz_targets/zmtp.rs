//! What a worker says by ZeroMQ: how it begins, and its answers.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| receivers::fuzzing::zmtp(bytes));

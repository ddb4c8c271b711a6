//! What agents of NIXL ask each other, and answer.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| backend_nixl::fuzzing::notice(bytes));

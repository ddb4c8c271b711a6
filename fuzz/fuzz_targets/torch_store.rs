//! What workers of a server say to the store where they meet the trainer.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| receivers::fuzzing::store(bytes));

//! What an inference server answers.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u16, Vec<u8>)| {
    let (status, body) = input;
    receivers::fuzzing::answer(status, body);
});

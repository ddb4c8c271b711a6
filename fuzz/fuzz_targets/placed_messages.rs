//! What ranks say to each other of a placed update.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| placed::fuzzing::message(body));

//! What ranks say to each other of an update.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| protocol::fuzzing::message(body));

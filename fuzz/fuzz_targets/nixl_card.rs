//! How a rank of NIXL says that it is reached.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u32, u64, &[u8])| {
    let (slot, filled, bytes) = input;
    backend_nixl::fuzzing::card(bytes, slot, filled);
});

//! Which groups ranks of NCCL and HCCL join, with their libraries' root information.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u32, &[u8])| {
    let (rank, bytes) = input;
    collective::fuzzing::ticket(bytes, rank);
});

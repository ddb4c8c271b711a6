//! Bytes on a connection of the control plane, before anybody is known: frames, and calls' outcomes.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, bytes) = input;
    let pieces: Vec<&[u8]> = bytes.chunks(usize::from(cut) + 1).collect();
    control_plane::fuzzing::frames(&pieces);
    control_plane::fuzzing::outcome(bytes);
});

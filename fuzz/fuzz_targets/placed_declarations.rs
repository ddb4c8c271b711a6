//! What ranks of a placed update hold and want, and the plan of it. Each has a rank, whether it trains, a length, and what it says.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((rank, mut rest)) = bytes.split_first() else { return };
    let mut bodies = Vec::new();
    while let Some((&[of, trains, low, high], after)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([low, high])).min(after.len());
        bodies.push((of.into(), trains % 2 == 1, &after[..len]));
        rest = &after[len..];
    }
    placed::fuzzing::declarations(u32::from(*rank), &bodies);
});

//! Reads and applies changes for the targets of `fuzz/`. Compiled only for fuzzing.

use engine_core::changes::{Cut, exchange};
use engine_core::{DType, digest};

use crate::message;

/// Reads a tensor that carries changes. One that can be read is the same after it was written and read again.
pub fn message(bytes: &[u8]) {
    let Ok((head, words)) = message::read(bytes) else { return };
    let weight = message::tensor(0, &head, &words).expect("it can be written");
    let again = message::read(weight.contiguous_bytes().expect("bytes"));
    assert_eq!(again.expect("what was written can be read"), (head, words));
}

/// Applies changes to a weight: they are refused, or the digest sum follows them and they can be taken back. A word for each tile comes
/// before the values.
pub fn changes(dtype: DType, tile: u32, weight: &[u8], changes: &[u8]) {
    let Some(cut) = Cut::of(dtype, tile) else { return };
    let tiles = cut.tiles(weight.len() as u64) as usize;
    let Some((words, values)) = changes.split_at_checked(4 * tiles) else { return };
    let words: Vec<u32> =
        words.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let (mut now, mut old) = (weight.to_vec(), values.to_vec());
    let Ok(changed) = exchange(cut, &mut now, &words, &mut old) else { return };
    assert_eq!(digest::sum(0, weight).wrapping_add(changed), digest::sum(0, &now));
    let back = exchange(cut, &mut now, &words, &mut old);
    assert_eq!(back, Ok(0_u64.wrapping_sub(changed)));
    assert!(now == weight && old == values, "changes that cannot be taken back");
}

//! Reads and applies changes for the targets of `fuzz/`. Compiled only for fuzzing.

use bytes::Bytes;
use engine_core::{DType, digest};

use crate::message;
use crate::tiles::{Cut, exchange};

/// Reads a tensor that carries changes. One that can be read is the same after it was written and read again.
pub fn message(bytes: &[u8]) {
    let Ok((head, bodies)) = message::read(&Bytes::copy_from_slice(bytes)) else { return };
    let (weight, _) = message::tensor(0, &head, &[bodies.to_vec()]).expect("it can be written");
    let again = message::read(weight.contiguous_bytes().expect("bytes"));
    assert_eq!(again.expect("what was written can be read"), (head, bodies));
}

/// Applies changes to a weight: they are refused, or the digest sum follows them and they can be taken back.
pub fn changes(dtype: DType, tile: u32, weight: &[u8], changes: &[u8]) {
    let Some(cut) = Cut::of(dtype, tile) else { return };
    let (mut now, mut values) = (weight.to_vec(), changes.to_vec());
    let Ok(changed) = exchange(cut, &mut now, &mut values) else { return };
    assert_eq!(digest::sum(0, weight).wrapping_add(changed), digest::sum(0, &now));
    let back = exchange(cut, &mut now, &mut values);
    assert_eq!(back, Ok(0_u64.wrapping_sub(changed)));
    assert!(now == weight && values == changes, "changes that cannot be taken back");
}

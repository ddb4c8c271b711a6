//! Parses data of other agents, for the targets of `fuzz/`. Compiled only for fuzzing.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::agent::{Card, Notice};
use crate::lending::{Offer, ToLender, ToWriter};

/// Another rank's card, and whether one of its slots is within its memory.
pub fn card(bytes: &[u8], slot: u32, filled: u64) {
    let Ok(card) = postcard::from_bytes::<Card>(bytes) else { return };
    if let Ok((at, len)) = card.range(slot, filled) {
        assert!(slot < card.slots && len as u64 <= card.slot_bytes);
        assert!(at as u64 >= card.address);
    }
    let again = postcard::to_stdvec(&card).expect("what was read can be written");
    assert_eq!(postcard::from_bytes::<Card>(&again).expect("what was written can be read"), card);
}

/// A message of another agent, and the terms of a rollout.
pub fn notice(bytes: &[u8]) {
    round_trip::<Notice>(bytes);
    round_trip::<ToLender>(bytes);
    round_trip::<ToWriter>(bytes);
    round_trip::<Offer>(bytes);
}

fn round_trip<T: Serialize + DeserializeOwned + Debug>(bytes: &[u8]) {
    let Ok(read) = postcard::from_bytes::<T>(bytes) else { return };
    let again = postcard::to_stdvec(&read).expect("what was read can be written");
    let again: T = postcard::from_bytes(&again).expect("what was written can be read");
    assert_eq!(format!("{again:?}"), format!("{read:?}"));
}

//! Entry points for the targets of `fuzz/`: messages of other ranks, and schedules of whole groups. Only in builds for
//! fuzzing.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::message::{ToReceiver, ToSender, decode, encode};
use crate::schedules;

/// Decodes bytes as a message of either direction: [`same_again`].
pub fn message(body: &[u8]) {
    same_again::<ToReceiver>(body);
    same_again::<ToSender>(body);
}

/// Checks that a message that can be decoded is the same after it was encoded and decoded again.
///
/// # Panics
///
/// If it is not the same.
pub fn same_again<T: DeserializeOwned + Serialize + Debug>(body: &[u8]) {
    let Ok(message) = decode::<T>(body) else { return };
    let written = encode(&message).expect("what was read can be written");
    let again: T = decode(&written).expect("what was written can be read");
    assert_eq!(format!("{message:?}"), format!("{again:?}"));
}

/// Runs a schedule of events in a group, with or without faults, and checks that the group keeps its promises.
///
/// # Panics
///
/// With the promise that was broken, and how to replay the schedule.
pub fn schedule(numbers: &[u16], faults: bool) {
    if let Err(broken) = schedules::keeps_promises(numbers, faults) {
        let schedule: Vec<String> = numbers.iter().map(u16::to_string).collect();
        panic!("{broken}\nreplay: CKPT_ENGINE_SCHEDULE={faults}:{}", schedule.join(","));
    }
}

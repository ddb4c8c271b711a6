//! What other ranks say of updates, and whole groups, for the targets of `fuzz/`. It is there in builds for fuzzing
//! alone.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::message::{ToReceiver, ToSender, decode, encode};
use crate::schedules;

/// A message of either direction. One that can be read is the same after it was written and read again.
pub fn message(body: &[u8]) {
    same_again::<ToReceiver>(body);
    same_again::<ToSender>(body);
}

/// A message that can be read is the same after it was written and read again.
///
/// # Panics
///
/// If it is not.
pub fn same_again<T: DeserializeOwned + Serialize + Debug>(body: &[u8]) {
    let Ok(message) = decode::<T>(body) else { return };
    let written = encode(&message).expect("what was read can be written");
    let again: T = decode(&written).expect("what was written can be read");
    assert_eq!(format!("{message:?}"), format!("{again:?}"));
}

/// A schedule of everything that may happen to a group, with or without faults: no promise may be broken.
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

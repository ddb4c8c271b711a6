//! What servers answer, for the targets of `fuzz/`. It is there in builds for fuzzing alone.

use crate::http::{Answer, MAX_WORDS};

/// The body of an answer: what it says is short, and it is JSON or nothing.
pub fn answer(status: u16, body: Vec<u8>) {
    let answer = Answer { status, body: body.into() };
    assert!(answer.words().chars().count() <= MAX_WORDS + 1);
    drop(answer.json());
}

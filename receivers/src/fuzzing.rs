//! Parses what servers answer, for the targets of `fuzz/`. Compiled only for fuzzing.

use crate::http::{Answer, MAX_WORDS};
use crate::store;
use crate::zmtp::{read_answer, read_opening};

/// The body of an answer: its words are short, and it is JSON or null.
pub fn answer(status: u16, body: Vec<u8>) {
    let answer = Answer { status, body: body.into() };
    assert!(answer.words().chars().count() <= MAX_WORDS + 1);
    drop(answer.json());
}

/// What a worker sends by ZeroMQ: an opening, and answers until one is malformed. No answer is longer than the bytes it came from.
pub fn zmtp(bytes: &[u8]) {
    futures::executor::block_on(async {
        let mut rest = bytes;
        if read_opening(&mut rest).await.is_err() {
            rest = bytes;
        }
        let mut left = rest.len();
        while let Ok(answer) = read_answer(&mut rest).await {
            assert!(answer.len() + rest.len() < left);
            left = rest.len();
        }
    });
}

/// What a client sends to a store of torch's kind. It gets answers only if it began as a client does, and no more bytes than it can have
/// stored for each of its requests.
pub fn store(bytes: &[u8]) {
    let answers = futures::executor::block_on(store::conversation(bytes));
    assert!(bytes.first() == Some(&0) || answers.is_empty(), "a stranger was answered");
    assert!(answers.len() <= (bytes.len() + 8) * (bytes.len() + 1));
}

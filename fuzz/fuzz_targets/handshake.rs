//! A stranger in the handshake, and a man in the middle afterwards.

#![no_main]

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use control_plane::Token;
use control_plane::fuzzing::{Tampered, handshake};
use libfuzzer_sys::fuzz_target;

static TOKEN: LazyLock<Token> = LazyLock::new(|| Token::new(&[7; 32]).expect("a token"));

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    Stranger(&'a [u8]),
    Between { plain: &'a [u8], change: Change, at: u16 },
}

#[derive(Debug, Arbitrary)]
enum Change {
    Bit(u8),
    Cut,
    Insert(u8),
    Double,
}

fuzz_target!(|input: Input<'_>| match input {
    Input::Stranger(message) => handshake(&TOKEN, message),
    Input::Between { plain, change, at } => Tampered::new(&TOKEN).send(plain, |wire| {
        let at = usize::from(at) % (wire.len() + 1);
        match change {
            Change::Bit(bit) => {
                if let Some(byte) = wire.get_mut(at) {
                    *byte ^= 1 << (bit % 8);
                }
            }
            Change::Cut => wire.truncate(at),
            Change::Insert(byte) => wire.insert(at, byte),
            Change::Double => wire.extend_from_within(..),
        }
    }),
});

//! The encryption of a connection: a Noise handshake with the token as pre-shared key, and the records
//! that carry everything after it.
//!
//! The pattern is `NNpsk0` of the Noise protocol framework (revision 34, sections 7.4 and 9). Both sides
//! make a key for this connection alone, and mix in the token's key before anything is said. So a
//! stranger learns nothing, and a recording cannot be decrypted later. A record that was changed, repeated,
//! left out or reordered on the way is refused. The prologue is the program's greeting, which makes sure that
//! both sides have the same version.
//!
//! A record is a big-endian `u16` length and that many bytes of ciphertext, the last 16 of them its tag. Records
//! do not follow frames: in each direction they carry pieces of one stream of bytes.

use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};
use snow::{HandshakeState, StatelessTransportState};

use crate::Token;
use crate::wire::{MAGIC, malformed};
use engine_core::control::PROTOCOL_VERSION;
use engine_core::{Error, ErrorKind, Result};

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
/// The longest record, without its length.
const RECORD: usize = 65_535;
/// The tag of a record.
const TAG: usize = 16;
/// The room for a message of the handshake: a public key of 32 bytes and a tag.
const HANDSHAKE: usize = 256;

/// A handshake under way.
pub(super) struct Handshake(HandshakeState);

impl Handshake {
    pub(super) fn of_member(token: &Token) -> Result<Self> {
        Self::new(token, true)
    }

    pub(super) fn of_leader(token: &Token) -> Result<Self> {
        Self::new(token, false)
    }

    fn new(token: &Token, is_member: bool) -> Result<Self> {
        let prologue = [&MAGIC[..], &PROTOCOL_VERSION.to_be_bytes()].concat();
        let key = token.key();
        let state = PATTERN
            .parse()
            .and_then(|pattern| snow::Builder::new(pattern).prologue(&prologue))
            .and_then(|builder| builder.psk(0, &key))
            .and_then(|b| if is_member { b.build_initiator() } else { b.build_responder() });
        state.map(Self).map_err(|error| unusable(&error))
    }

    /// This side's next message.
    pub(super) fn speak(&mut self) -> Result<Vec<u8>> {
        let mut message = vec![0; HANDSHAKE];
        let length = self.0.write_message(&[], &mut message).map_err(|e| unusable(&e))?;
        message.truncate(length);
        Ok(message)
    }

    /// Takes in the other side's message. Returns whether its author knows the token.
    pub(super) fn hear(&mut self, message: &[u8]) -> bool {
        let mut nothing = [0; HANDSHAKE];
        self.0.read_message(message, &mut nothing).is_ok()
    }

    /// The keys of both directions, when both messages have been exchanged.
    pub(super) fn finish(self) -> Result<(Sealer, Opener)> {
        let keys = self.0.into_stateless_transport_mode().map_err(|e| unusable(&e))?;
        let keys = Arc::new(keys);
        Ok((Sealer { keys: Arc::clone(&keys), next: 0 }, Opener { keys, next: 0 }))
    }
}

/// Encrypts what this side writes.
pub(super) struct Sealer {
    keys: Arc<StatelessTransportState>,
    /// The number of the next record. It does not travel, because the other side counts as well.
    next: u64,
}

impl Sealer {
    /// Moves the first bytes of `plain`, as many as fit, into a record at the end of `out`.
    pub(super) fn seal(&mut self, plain: &mut BytesMut, out: &mut BytesMut) -> Result<()> {
        let piece = plain.len().min(RECORD - TAG);
        let start = out.len();
        out.put_bytes(0, 2 + piece + TAG);
        let record = &mut out[start + 2..];
        let sealed = self.keys.write_message(self.next, &plain[..piece], record);
        let length = sealed.map_err(|e| unusable(&e))?;
        let length = u16::try_from(length).map_err(|_| malformed("a record is too long"))?;
        out[start..start + 2].copy_from_slice(&length.to_be_bytes());
        self.next += 1;
        plain.advance(piece);
        Ok(())
    }
}

/// Decrypts what the other side wrote.
pub(super) struct Opener {
    keys: Arc<StatelessTransportState>,
    next: u64,
}

impl Opener {
    /// Decrypts the complete records of `sealed` to the end of `out`, and removes them from `sealed`.
    pub(super) fn open(&mut self, sealed: &mut BytesMut, out: &mut BytesMut) -> Result<()> {
        while let Some(length) = sealed.first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*length));
            let Some(record) = sealed.get(2..2 + length) else { break };
            let start = out.len();
            out.put_bytes(0, length);
            let opened = self.keys.read_message(self.next, record, &mut out[start..]);
            let opened = opened.map_err(|error| {
                malformed("what arrived is not what was sent: it was changed on the way")
                    .with_source(error)
            })?;
            out.truncate(start + opened);
            self.next += 1;
            sealed.advance(2 + length);
        }
        Ok(())
    }
}

fn unusable(error: &snow::Error) -> Error {
    Error::new(ErrorKind::State, "encrypting the control plane", error.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Side = (Sealer, Opener);

    fn meet(member: &Token, leader: &Token) -> Option<(Side, Side)> {
        let mut member = Handshake::of_member(member).unwrap();
        let mut leader = Handshake::of_leader(leader).unwrap();
        let known = leader.hear(&member.speak().unwrap()) && member.hear(&leader.speak().unwrap());
        known.then(|| (member.finish().unwrap(), leader.finish().unwrap()))
    }

    fn pair() -> (Side, Side) {
        let token = Token::generate().unwrap();
        meet(&token, &token).unwrap()
    }

    fn sealed(sealer: &mut Sealer, bytes: &[u8]) -> BytesMut {
        let (mut plain, mut out) = (BytesMut::from(bytes), BytesMut::new());
        while !plain.is_empty() {
            sealer.seal(&mut plain, &mut out).unwrap();
        }
        out
    }

    #[test]
    fn sides_with_different_tokens_do_not_meet() {
        assert!(meet(&Token::generate().unwrap(), &Token::generate().unwrap()).is_none());
    }

    #[test]
    fn what_a_side_sealed_is_not_taken_for_the_other_sides() {
        let ((mut up, mut down), _leader) = pair();
        let mut echo = sealed(&mut up, b"an echo");
        assert!(down.open(&mut echo, &mut BytesMut::new()).is_err());
    }

    #[test]
    fn a_recorded_connection_opens_in_no_other_one() {
        let token = Token::generate().unwrap();
        let ((mut up, _), _) = meet(&token, &token).unwrap();
        let (_, (_, mut opener)) = meet(&token, &token).unwrap();
        let mut recorded = sealed(&mut up, b"an order");
        assert!(opener.open(&mut recorded, &mut BytesMut::new()).is_err());
    }

    proptest! {
        #[test]
        fn a_stream_arrives_as_it_was_sent_however_it_is_cut(
            lengths in prop::collection::vec(0..100_000usize, 1..6),
            cut in 1..70_000usize,
        ) {
            let ((mut up, _), (_, mut opener)) = pair();
            let sent: Vec<u8> = (0..lengths.iter().sum::<usize>()).map(|i| (i % 251) as u8).collect();
            let mut rest = &sent[..];
            let mut wire = BytesMut::new();
            for length in lengths {
                let (piece, after) = rest.split_at(length);
                wire.unsplit(sealed(&mut up, piece));
                rest = after;
            }
            let (mut arrived, mut plain) = (BytesMut::new(), BytesMut::new());
            for piece in wire.chunks(cut) {
                arrived.extend_from_slice(piece);
                opener.open(&mut arrived, &mut plain).unwrap();
            }
            prop_assert!(arrived.is_empty());
            prop_assert_eq!(&plain[..], &sent[..]);
        }

        #[test]
        fn one_changed_bit_is_noticed_or_waits_for_bytes_that_never_come(
            length in 1..3000usize,
            at in any::<prop::sample::Index>(),
            bit in 0..8,
        ) {
            let ((mut up, _), (_, mut opener)) = pair();
            let mut wire = sealed(&mut up, &vec![7; length]);
            let at = at.index(wire.len());
            wire[at] ^= 1u8 << bit;
            let mut plain = BytesMut::new();
            let result = opener.open(&mut wire, &mut plain);
            prop_assert!(result.is_err() || at < 2, "{} {}", at, length);
            prop_assert!(plain.iter().all(|byte| *byte == 0) || result.is_err());
        }

        #[test]
        fn records_that_are_repeated_left_out_or_exchanged_do_not_open(which in 0..3) {
            let ((mut up, _), (_, mut opener)) = pair();
            let (first, second) = (sealed(&mut up, b"first"), sealed(&mut up, b"second"));
            let mut wire = BytesMut::new();
            for record in match which { 0 => [&first, &first], 1 => [&second, &second], _ => [&second, &first] } {
                wire.extend_from_slice(record);
            }
            prop_assert!(opener.open(&mut wire, &mut BytesMut::new()).is_err());
        }
    }
}

//! Entry points for the targets of `fuzz/`: bytes from peers. Only in builds for fuzzing.

use bytes::BytesMut;
use tokio_util::codec::{Decoder, LengthDelimitedCodec};

use crate::Token;
use crate::seal::{Handshake, Sealer};
use crate::wire::{self, Frame, HANDSHAKE_FRAME, Outcome};

/// Decodes bytes that arrive on a connection in these pieces. A frame that decodes must be the same after it is encoded
/// and decoded again.
pub fn frames(pieces: &[&[u8]]) {
    let mut codec = LengthDelimitedCodec::builder().max_frame_length(HANDSHAKE_FRAME).new_codec();
    let mut arrived = BytesMut::new();
    for piece in pieces {
        arrived.extend_from_slice(piece);
        while let Ok(Some(bytes)) = codec.decode(&mut arrived) {
            assert!(bytes.len() <= HANDSHAKE_FRAME, "a frame beyond the limit was taken in");
            let Ok(frame) = Frame::decode(bytes) else { continue };
            // A block of seats takes two bytes or more on the wire, and 16 in memory.
            assert!(frame.cost() <= 8 * HANDSHAKE_FRAME + 2 * wire::FRAME_OVERHEAD);
            let mut again = BytesMut::new();
            frame.encode(&mut again).expect("what was read can be written");
            let length = again.split_to(4);
            assert_eq!(
                u32::from_be_bytes(length[..].try_into().expect("four bytes")) as usize,
                again.len()
            );
            let again = Frame::decode(again).expect("what was written can be read");
            assert_eq!(format!("{again:?}"), format!("{frame:?}"));
        }
    }
}

/// Decodes the answer to a call.
pub fn outcome(bytes: &[u8]) {
    drop(wire::decode::<Outcome>(bytes));
}

/// Gives a message to a leader as a member's first one, and to a member as the leader's answer. Both must refuse it,
/// because its author does not know the token.
pub fn handshake(token: &Token, message: &[u8]) {
    let mut leader = Handshake::of_leader(token).expect("a leader");
    assert!(!leader.hear(message), "a stranger was believed");
    let mut member = Handshake::of_member(token).expect("a member");
    member.speak().expect("a first message");
    assert!(!member.hear(message), "a strange leader was believed");
}

/// One direction of a connection whose records are changed on the way.
pub struct Tampered {
    sealer: Sealer,
    opener: crate::seal::Opener,
}

impl std::fmt::Debug for Tampered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tampered")
    }
}

impl Tampered {
    /// A connection between two peers who know the token.
    pub fn new(token: &Token) -> Self {
        let mut member = Handshake::of_member(token).expect("a member");
        let mut leader = Handshake::of_leader(token).expect("a leader");
        assert!(leader.hear(&member.speak().expect("a first message")));
        assert!(member.hear(&leader.speak().expect("an answer")));
        let (sealer, _) = member.finish().expect("keys");
        let (_, opener) = leader.finish().expect("keys");
        Self { sealer, opener }
    }

    /// Sends bytes, which `change` may change on the way. Either the connection ends, or the bytes that arrive are the
    /// beginning of what was sent.
    pub fn send(mut self, plain: &[u8], change: impl FnOnce(&mut Vec<u8>)) {
        let (mut left, mut wire) = (BytesMut::from(plain), BytesMut::new());
        while !left.is_empty() {
            self.sealer.seal(&mut left, &mut wire).expect("it can be sealed");
        }
        let mut changed = wire.to_vec();
        change(&mut changed);
        let mut opened = BytesMut::new();
        if self.opener.open(&mut BytesMut::from(&changed[..]), &mut opened).is_ok() {
            assert!(plain.starts_with(&opened), "other bytes arrived than were sent");
        }
    }
}

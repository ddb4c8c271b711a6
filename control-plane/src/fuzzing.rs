//! What peers send, for the targets of `fuzz/`. It is there in builds for fuzzing alone.

use bytes::BytesMut;
use tokio_util::codec::{Decoder, LengthDelimitedCodec};

use crate::Token;
use crate::seal::{Handshake, Sealer};
use crate::wire::{self, Frame, HANDSHAKE_FRAME, Outcome};

/// Bytes that arrive on a connection, cut as the caller has them. A frame that decodes is the same after its own way
/// across a connection.
pub fn frames(pieces: &[&[u8]]) {
    let mut codec = LengthDelimitedCodec::builder().max_frame_length(HANDSHAKE_FRAME).new_codec();
    let mut arrived = BytesMut::new();
    for piece in pieces {
        arrived.extend_from_slice(piece);
        while let Ok(Some(bytes)) = codec.decode(&mut arrived) {
            assert!(bytes.len() <= HANDSHAKE_FRAME, "a frame beyond the limit was taken in");
            let Ok(frame) = Frame::decode(bytes) else { continue };
            assert!(frame.cost() <= HANDSHAKE_FRAME + wire::FRAME_OVERHEAD);
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

/// The answer to a call.
pub fn outcome(bytes: &[u8]) {
    drop(wire::decode::<Outcome>(bytes));
}

/// A first message, to a leader and as the leader's answer to a member: nobody without the token is believed.
pub fn handshake(token: &Token, message: &[u8]) {
    let mut leader = Handshake::of_leader(token).expect("a leader");
    assert!(!leader.hear(message), "a stranger was believed");
    let mut member = Handshake::of_member(token).expect("a member");
    member.speak().expect("a first message");
    assert!(!member.hear(message), "a strange leader was believed");
}

/// One direction of a connection whose records somebody changes on the way.
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
    /// A connection of two who know the token.
    pub fn new(token: &Token) -> Self {
        let mut member = Handshake::of_member(token).expect("a member");
        let mut leader = Handshake::of_leader(token).expect("a leader");
        assert!(leader.hear(&member.speak().expect("a first message")));
        assert!(member.hear(&leader.speak().expect("an answer")));
        let (sealer, _) = member.finish().expect("keys");
        let (_, opener) = leader.finish().expect("keys");
        Self { sealer, opener }
    }

    /// Sends bytes, which `change` may change on the way. What arrives is what was sent, or the beginning of it, or the
    /// connection ends; afterwards it is of no use.
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

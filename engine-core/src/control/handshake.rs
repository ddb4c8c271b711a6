//! How two peers find out that they belong together.
//!
//! ```text
//! member                                   leader
//!   Hello { magic, version, introduction }  →
//!                                           ←  Challenge(nonce)      or Refused
//!   Proof("member", hello, nonce)           →
//!                                           ←  Welcome { rank, terms, proof }  or Refused
//! ```
//!
//! The member proves first, so that a stranger obtains nothing from the leader. The leader's proof
//! covers everything the member heard, the rank included.

use std::time::Duration;

use super::token::{Prover, random};
use super::wire::{
    Control, Frame, Hello, Introduction, MAGIC, PROTOCOL_VERSION, Terms, Wire, decode, encode,
    malformed, unexpected,
};
use super::{Role, Token};
use crate::{Error, ErrorKind, ErrorReport, Rank, Result};

/// How long either side waits for the other's next step.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// The member's side: the rank that it was given, and the leader's terms.
pub(super) async fn introduce(
    wire: &mut Wire,
    token: &Token,
    role: Role,
    rank: Option<Rank>,
    terms: Terms,
) -> Result<(Rank, Terms)> {
    let introduction = Introduction { role, rank, nonce: random()?, terms };
    let body = encode(&introduction)?.into();
    let hello = Hello { magic: MAGIC, version: PROTOCOL_VERSION, body };
    wire.writer.send(Control::Hello(hello.clone()), PATIENCE).await?;
    let nonce = match next(wire).await? {
        Control::Challenge(nonce) => nonce,
        other => return Err(refusal(other)),
    };
    let transcript = encode(&(&hello, nonce))?;
    wire.writer.send(Control::Proof(token.prove(Prover::Member, &transcript)?), PATIENCE).await?;
    match next(wire).await? {
        Control::Welcome { rank, terms, proof } => {
            let transcript = encode(&(&hello, nonce, rank, terms))?;
            if !token.verify(Prover::Leader, &transcript, &proof)? {
                return Err(Error::new(
                    ErrorKind::Authentication,
                    "joining the group",
                    "the leader does not know this member's token",
                )
                .rank(Rank::LEADER));
            }
            Ok((rank, terms))
        }
        other => Err(refusal(other)),
    }
}

/// A member that proved that it knows the token, and waits to be welcomed.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) introduction: Introduction,
    transcript: (Hello, super::token::Nonce),
}

/// The leader's side, up to the member's proof.
pub(super) async fn examine(wire: &mut Wire, token: &Token) -> Result<Guest> {
    let hello = match next(wire).await? {
        Control::Hello(hello) if hello.magic == MAGIC => hello,
        Control::Hello(_) => return Err(malformed("another program's greeting")),
        other => return Err(unexpected(&Frame::Control(other))),
    };
    if hello.version != PROTOCOL_VERSION {
        let error = Error::new(
            ErrorKind::Protocol,
            "joining the group",
            format!(
                "the leader speaks protocol version {PROTOCOL_VERSION}, the member version {}",
                hello.version
            ),
        );
        return Err(refuse(wire, error).await);
    }
    let introduction: Introduction = decode(&hello.body)?;
    let nonce = random()?;
    wire.writer.send(Control::Challenge(nonce), PATIENCE).await?;
    let proof = match next(wire).await? {
        Control::Proof(proof) => proof,
        other => return Err(unexpected(&Frame::Control(other))),
    };
    if !token.verify(Prover::Member, &encode(&(&hello, nonce))?, &proof)? {
        let error = Error::new(
            ErrorKind::Authentication,
            "joining the group",
            "the member does not know the leader's token",
        );
        return Err(refuse(wire, error).await);
    }
    Ok(Guest { introduction, transcript: (hello, nonce) })
}

impl Guest {
    /// The frame that ends the handshake.
    pub(super) fn welcome(&self, token: &Token, rank: Rank, terms: Terms) -> Result<Control> {
        let (hello, nonce) = &self.transcript;
        let transcript = encode(&(hello, nonce, rank, terms))?;
        Ok(Control::Welcome { rank, terms, proof: token.prove(Prover::Leader, &transcript)? })
    }
}

/// Tells the peer why it is refused, and returns the reason.
pub(super) async fn refuse(wire: &mut Wire, error: Error) -> Error {
    let told = wire.writer.send(Control::Refused(ErrorReport::from(&error)), PATIENCE).await;
    if let Err(error) = told {
        tracing::debug!(%error, "the refused peer is gone");
    }
    wire.writer.shutdown().await;
    error
}

async fn next(wire: &mut Wire) -> Result<Control> {
    match wire.reader.next(PATIENCE).await? {
        Some(Frame::Control(control)) => Ok(control),
        Some(frame) => Err(unexpected(&frame)),
        None => Err(Error::new(
            ErrorKind::PeerLost,
            "joining the group",
            "the connection ended in the handshake",
        )),
    }
}

fn refusal(frame: Control) -> Error {
    match frame {
        Control::Refused(report) => Error::from(report),
        other => unexpected(&Frame::Control(other)),
    }
}

//! The handshake, by which two peers prove that they belong to the same group.
//!
//! ```text
//! member                                            leader
//!   Hello { magic, version, first Noise message }    →
//!                                                    ←  Answer(second Noise message)  or Refused
//!                  everything after this is encrypted
//!   Introduction { role, rank, terms }               →
//!                                                    ←  Welcome { rank, terms, … }    or Refused
//! ```
//!
//! A relay says `Relay(terms)` instead of an introduction, and gets `Relay(terms)` as the answer.
//!
//! The member's first message proves that it knows the token, so a stranger gets nothing from the leader.
//! Replaying a recorded one gains nothing: the leader gives no rank before the introduction, and only
//! the peer that made the message can encrypt that.

use std::time::Duration;

use crate::seal::Handshake;
use crate::wire::{Frame, Hello, Introduction, MAGIC, Signal, Terms, Wire, malformed, unexpected};
use crate::{ChannelId, Role, Token};
use engine_core::control::PROTOCOL_VERSION;
use engine_core::{Error, ErrorKind, ErrorReport, Rank, Result};

/// How long either side waits for the other's next step.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// What the leader says to a member that it lets in.
pub(super) struct Welcome {
    pub(super) rank: Rank,
    pub(super) terms: Terms,
    /// The unread bytes, by channel, of the process that had the rank before.
    pub(super) unread: Vec<(ChannelId, u64)>,
}

/// The member's side.
pub(super) async fn introduce(
    wire: &mut Wire,
    token: &Token,
    role: Role,
    rank: Option<Rank>,
    terms: Terms,
) -> Result<Welcome> {
    greet(wire, token).await?;
    let introduction = Introduction { role, rank, terms };
    wire.writer.send(Signal::Introduction(introduction), PATIENCE).await?;
    match next(wire).await? {
        Signal::Welcome { rank, terms, unread } => Ok(Welcome { rank, terms, unread }),
        other => Err(refusal(other)),
    }
}

/// Proves to each side that the other one knows the token. Everything that follows is encrypted.
async fn greet(wire: &mut Wire, token: &Token) -> Result<()> {
    let mut handshake = Handshake::of_member(token)?;
    let body = handshake.speak()?.into();
    let hello = Hello { magic: MAGIC, version: PROTOCOL_VERSION, body };
    wire.writer.send(Signal::Hello(hello), PATIENCE).await?;
    let answer = match next(wire).await? {
        Signal::Answer(answer) => answer,
        other => return Err(refusal(other)),
    };
    if !handshake.hear(&answer) {
        let message = "the leader does not know this member's token";
        let error = Error::new(ErrorKind::Authentication, "joining the group", message);
        return Err(error.rank(Rank::LEADER));
    }
    wire.seal(handshake)
}

/// A relay's side. Returns the terms of the peer that it connects to.
pub(super) async fn introduce_relay(wire: &mut Wire, token: &Token, terms: Terms) -> Result<Terms> {
    greet(wire, token).await?;
    wire.writer.send(Signal::Relay(terms), PATIENCE).await?;
    match next(wire).await? {
        Signal::Relay(terms) => Ok(terms),
        other => Err(refusal(other)),
    }
}

/// A peer that has proved that it knows the token.
pub(super) enum Newcomer {
    Rank(Introduction),
    Relay(Terms),
}

/// The leader's side, up to the newcomer's introduction.
pub(super) async fn examine(wire: &mut Wire, token: &Token) -> Result<Newcomer> {
    let hello = match next(wire).await? {
        Signal::Hello(hello) if hello.magic == MAGIC => hello,
        Signal::Hello(_) => return Err(malformed("another program's greeting")),
        other => return Err(unexpected(&Frame::Signal(other))),
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
    let mut handshake = Handshake::of_leader(token)?;
    if !handshake.hear(&hello.body) {
        let message = "the member does not know the leader's token";
        let error = Error::new(ErrorKind::Authentication, "joining the group", message);
        return Err(refuse(wire, error).await);
    }
    wire.writer.send(Signal::Answer(handshake.speak()?.into()), PATIENCE).await?;
    wire.seal(handshake)?;
    match next(wire).await? {
        Signal::Introduction(introduction) => Ok(Newcomer::Rank(introduction)),
        Signal::Relay(terms) => Ok(Newcomer::Relay(terms)),
        other => Err(unexpected(&Frame::Signal(other))),
    }
}

/// Tells the peer why it is refused, and returns the reason.
pub(super) async fn refuse(wire: &mut Wire, error: Error) -> Error {
    let told = wire.writer.send(Signal::Refused(ErrorReport::from(&error)), PATIENCE).await;
    if let Err(error) = told {
        tracing::debug!(%error, "the refused peer is gone");
    }
    wire.writer.shutdown().await;
    error
}

async fn next(wire: &mut Wire) -> Result<Signal> {
    match wire.reader.next(PATIENCE).await? {
        Some(Frame::Signal(control)) => Ok(control),
        Some(frame) => Err(unexpected(&frame)),
        None => Err(Error::new(
            ErrorKind::PeerLost,
            "joining the group",
            "the connection ended in the handshake",
        )),
    }
}

fn refusal(frame: Signal) -> Error {
    match frame {
        Signal::Refused(report) => Error::from(report),
        other => unexpected(&Frame::Signal(other)),
    }
}

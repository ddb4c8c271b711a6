//! The tasks of the control thread: the leader's door, and the traffic with one peer.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::address::{Listener, connect};
use crate::group::{Cut, End, Link, Mailbox, Membership, Outbox, Queue};
use crate::handshake::{PATIENCE, Welcome, examine, introduce, refuse};
use crate::shared::{Shared, Side};
use crate::wire::{
    Frame, FrameReader, FrameWriter, Heard, Signal, Terms, Wire, decode, unexpected,
};
use crate::{ControlConfig, Event, Role};
use engine_core::{Error, ErrorKind, ErrorReport, Rank, Recovery, Result};

/// How many connections may be in their handshake at once; the next one takes the place of the oldest.
const STRANGERS: usize = 64;
/// The smallest limit of frames that a member may demand: what every update needs has to fit.
pub(super) const FRAME_FLOOR: u32 = 4096;
/// The shortest heartbeat interval that a peer's terms can ask for.
const BEAT_FLOOR: Duration = Duration::from_millis(1);
/// How long a listener that cannot accept waits before it tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl ControlConfig {
    /// How many bytes of one peer's messages may wait to be read here, and of ours to be written to it.
    pub(super) fn budget(&self) -> usize {
        self.max_frame_bytes.saturating_mul(2)
    }

    fn terms(&self) -> Terms {
        Terms {
            // Checked by `validate`.
            max_frame: u32::try_from(self.max_frame_bytes).unwrap_or(u32::MAX),
            heartbeat_interval: self.heartbeat_interval,
            heartbeat_timeout: self.heartbeat_timeout,
        }
    }
}

/// Accepts members until `stop`, then says goodbye to them.
pub(super) async fn serve(
    listener: Listener,
    config: Arc<ControlConfig>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    let mut links = JoinSet::new();
    let strangers = Arc::new(Strangers::default());
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(done) = links.join_next() => {
                if let Err(error) = done {
                    tracing::error!(%error, "a link of the control plane panicked");
                }
            }
            accepted = listener.accept() => match accepted {
                Ok(mut wire) => {
                    wire.count(&shared.counters);
                    let stranger = strangers.enter();
                    let (config, shared, stop) = (config.clone(), shared.clone(), stop.clone());
                    links.spawn(async move {
                        let entered = tokio::select! {
                            () = stop.cancelled() => return,
                            () = stranger.shed.cancelled() => {
                                return tracing::debug!("a stranger had to make room for others");
                            }
                            entered = timeout(PATIENCE, enter(wire, &config, &shared)) => entered,
                        };
                        drop(stranger);
                        match entered {
                            Ok(Ok((rank, traffic))) => {
                                attend(rank, traffic, &config, &shared).await;
                            }
                            Ok(Err(error)) if error.kind() == ErrorKind::Protocol => {
                                tracing::debug!(%error, "a stranger knocked");
                            }
                            Ok(Err(error)) => tracing::warn!(%error, "a connection was refused"),
                            Err(_) => tracing::debug!("a stranger did not say who it is"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the control plane cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    drop(listener);
    shared.close();
    let farewells = async { while links.join_next().await.is_some() {} };
    if timeout(config.heartbeat_timeout, farewells).await.is_err() {
        tracing::debug!("a member did not close its connection; it is cut");
        links.shutdown().await;
    }
}

/// The connections that are in their handshake, the oldest first.
#[derive(Debug, Default)]
struct Strangers(Mutex<(u64, VecDeque<(u64, CancellationToken)>)>);

/// A connection's place among them.
#[derive(Debug)]
struct Stranger {
    strangers: Arc<Strangers>,
    number: u64,
    /// Cancelled when it has to make room.
    shed: CancellationToken,
}

impl Strangers {
    /// Whoever connects gets a place: those that say nothing cannot keep others out.
    fn enter(self: &Arc<Self>) -> Stranger {
        let mut state = self.lock();
        let (number, waiting) = &mut *state;
        if waiting.len() >= STRANGERS
            && let Some((_, oldest)) = waiting.pop_front()
        {
            oldest.cancel();
        }
        *number += 1;
        let shed = CancellationToken::new();
        waiting.push_back((*number, shed.clone()));
        Stranger { strangers: Arc::clone(self), number: *number, shed }
    }

    fn lock(&self) -> MutexGuard<'_, (u64, VecDeque<(u64, CancellationToken)>)> {
        // Each change leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.strangers.lock().1.retain(|(number, _)| *number != self.number);
    }
}

/// An authenticated connection, what is queued for it, and what its peer demands.
pub(super) struct Traffic {
    wire: Wire,
    queue: Queue,
    terms: Terms,
    cut: Arc<Cut>,
}

/// Takes a connection through the handshake and gives it a rank.
async fn enter(mut wire: Wire, config: &ControlConfig, shared: &Shared) -> Result<(Rank, Traffic)> {
    let introduction = examine(&mut wire, &config.token).await?;
    let terms = introduction.terms;
    if terms.max_frame < FRAME_FLOOR {
        let message = format!(
            "it accepts frames of up to {} bytes, and updates need {FRAME_FLOOR} (max_frame_bytes)",
            terms.max_frame
        );
        let error = Error::new(ErrorKind::Config, "joining the group", message);
        return Err(refuse(&mut wire, error).await);
    }
    let (link, queue) = link(config, terms, wire.reader.heard.clone());
    let (welcome, cut) = (link.outbox.clone(), Arc::clone(&link.cut));
    let admitted = shared.update(|mailbox, side| match side {
        Side::Leader(group) => group.admit(&introduction, link, mailbox).and_then(|admitted| {
            let (rank, unread) = admitted;
            // Queued under the lock, so that nothing can overtake it.
            let frame = Frame::Signal(Signal::Welcome { rank, terms: config.terms(), unread });
            welcome.send(frame).map_err(|_| Error::new(ErrorKind::State, "welcoming", "gone"))?;
            Ok(rank)
        }),
        Side::Member(_) => {
            Err(Error::new(ErrorKind::State, "admitting a member", "not the leader"))
        }
    });
    match admitted {
        Ok(rank) => {
            tracing::debug!(%rank, role = ?introduction.role, "a member connected");
            Ok((rank, Traffic { wire, queue, terms, cut }))
        }
        Err(error) => Err(refuse(&mut wire, error).await),
    }
}

/// The leader's traffic with one member, until it ends.
async fn attend(rank: Rank, traffic: Traffic, config: &ControlConfig, shared: &Shared) {
    let end = converse(traffic, config, |frame| {
        shared.update(|mailbox, side| {
            let Side::Leader(group) = side else { return Err(unexpected(&frame)) };
            match frame {
                Frame::Message { channel, body } => mailbox.deliver(rank, channel, body)?,
                Frame::Signal(Signal::Read { bytes }) => group.link_mut(rank)?.was_read(&bytes),
                Frame::Signal(Signal::Call { id, call }) => group.call(rank, id, call, mailbox),
                Frame::Signal(Signal::Withdraw { id }) => group.withdraw(rank, id, mailbox),
                other => return Err(unexpected(&other)),
            }
            Ok(())
        })
    })
    .await;
    tracing::debug!(%rank, ?end, "a member's connection ended");
    shared.update(|mailbox, side| {
        if let Side::Leader(group) = side {
            group.end(rank, end, mailbox);
        }
    });
}

/// What a member gets when it is admitted.
pub(super) type Admission = (Rank, Membership, Traffic);

/// Connects to the leader and is admitted, however often it takes within the connect timeout.
pub(super) async fn knock(
    config: &ControlConfig,
    role: Role,
    rank: Option<Rank>,
) -> Result<Admission> {
    let mut last = None;
    let mut taken_until: Option<Instant> = None;
    let attempts = async {
        let mut pause = Duration::from_millis(10);
        loop {
            let error = match attempt(config, role, rank).await {
                Ok(admission) => return Ok(admission),
                Err(error) => error,
            };
            // Only what a leader that starts later would change is worth another attempt, and a rank that
            // may be that of a process before this one, whose end the leader has not noticed yet: that
            // takes it no longer than the silence after which a peer is lost.
            let later = match error.kind() {
                ErrorKind::Io | ErrorKind::PeerLost | ErrorKind::Timeout | ErrorKind::Resource => {
                    true
                }
                _ if error.report().recovery == Recovery::Retry => {
                    let noticed = config.heartbeat_timeout + config.heartbeat_timeout / 4;
                    Instant::now() < *taken_until.get_or_insert_with(|| Instant::now() + noticed)
                }
                _ => false,
            };
            if !later {
                return Err(error);
            }
            tracing::trace!(%error, "not yet");
            last = Some(error);
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    };
    match timeout(config.connect_timeout, attempts).await {
        Ok(result) => result,
        // What the leader said is more than that there was no time left.
        Err(_)
            if last.as_ref().is_some_and(|error: &Error| error.kind() == ErrorKind::Mismatch) =>
        {
            Err(last.unwrap_or_else(|| Error::new(ErrorKind::Timeout, "joining the group", "")))
        }
        Err(_) => {
            let error = Error::new(
                ErrorKind::Timeout,
                "joining the group",
                format!("no leader at {} within {:?}", config.address, config.connect_timeout),
            )
            .rank(Rank::LEADER);
            Err(match last {
                Some(cause) => error.with_source(cause),
                None => error,
            })
        }
    }
}

async fn attempt(config: &ControlConfig, role: Role, rank: Option<Rank>) -> Result<Admission> {
    let connected = connect(&config.address).await;
    let mut wire = connected.map_err(|error| Error::io("connecting to the leader", error))?;
    let welcome = introduce(&mut wire, &config.token, role, rank, config.terms()).await?;
    let Welcome { rank, terms, unread } = welcome;
    let (mut leader, queue) = link(config, terms, wire.reader.heard.clone());
    let unread =
        unread.into_iter().map(|(id, bytes)| (id, usize::try_from(bytes).unwrap_or(usize::MAX)));
    leader.unread = unread.collect();
    let cut = Arc::clone(&leader.cut);
    Ok((
        rank,
        Membership { leader, table: Vec::new(), updates: 0 },
        Traffic { wire, queue, terms, cut },
    ))
}

/// The way to a peer with these terms, and what is queued on it.
fn link(config: &ControlConfig, terms: Terms, heard: Heard) -> (Link, Queue) {
    let (outbox, queue) = Outbox::new(config.budget());
    let beat = beat(terms.heartbeat_interval, config.heartbeat_timeout);
    let limit = terms.max_frame as usize;
    let (unread, cut) = (BTreeMap::new(), Arc::default());
    (Link { outbox, limit, unread, heard, beat, cut }, queue)
}

/// How often a side with this interval says something to one that tolerates so much silence: at least three
/// heartbeats fit into that.
fn beat(interval: Duration, tolerated: Duration) -> Duration {
    interval.min(tolerated / 3).max(BEAT_FLOOR)
}

/// A member's traffic with the leader, until it ends or `stop`.
pub(super) async fn follow(
    mut traffic: Traffic,
    config: Arc<ControlConfig>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    traffic.wire.count(&shared.counters);
    let on_frame = |frame| {
        shared.update(|mailbox, side| match frame {
            Frame::Message { channel, body } => mailbox.deliver(Rank::LEADER, channel, body),
            Frame::Signal(Signal::Read { bytes }) => {
                if let Some(link) = side.link_mut(Rank::LEADER) {
                    link.was_read(&bytes);
                }
                Ok(())
            }
            Frame::Signal(Signal::Reply { id, outcome }) => {
                mailbox.settle(id, decode(&outcome)?);
                Ok(())
            }
            other => Err(unexpected(&other)),
        })
    };
    let mut conversation = Box::pin(converse(traffic, &config, on_frame));
    tokio::select! {
        end = &mut conversation => shared.update(|mailbox, _| lose_leader(end, mailbox)),
        () = stop.cancelled() => {
            shared.close();
            if timeout(config.heartbeat_timeout, conversation).await.is_err() {
                tracing::debug!("the leader did not close its connection; it is cut");
            }
        }
    }
}

fn lose_leader(end: End, mailbox: &mut Mailbox) {
    let rank = Rank::LEADER;
    let (event, error) = match end {
        End::Left => (
            Event::Left { rank },
            Error::new(ErrorKind::TrainerLeft, "being in the group", "the leader closed it")
                .rank(rank),
        ),
        End::Lost(error) => {
            let report = ErrorReport::from(&error.rank(rank));
            let message = format!("the leader was lost: {}", report.message);
            let error = Error::new(ErrorKind::PeerLost, "being in the group", message).rank(rank);
            (Event::Lost { rank, error: report }, error)
        }
    };
    mailbox.tell(&event);
    mailbox.ended.get_or_insert(ErrorReport::from(&error));
}

/// Carries frames both ways until one side says goodbye, dies, breaks the protocol or is silent.
async fn converse(
    traffic: Traffic,
    config: &ControlConfig,
    on_frame: impl FnMut(Frame) -> Result<()>,
) -> End {
    let Traffic { wire: Wire { mut reader, writer }, queue, terms, cut } = traffic;
    reader.set_max_frame(config.max_frame_bytes);
    let beat = beat(config.heartbeat_interval, terms.heartbeat_timeout);
    let end = tokio::select! {
        biased;
        reason = cut.ordered() => End::Lost(reason),
        end = listen(reader, config.heartbeat_timeout, on_frame) => end,
        error = speak(writer, queue, beat, config.heartbeat_timeout) => End::Lost(error),
    };
    match end {
        End::Left => End::Left,
        End::Lost(error) => End::Lost(lost(error)),
    }
}

/// However the socket says that the other side is gone, its rank is lost. What the socket said is the cause, and said
/// once: an error on its way to other ranks carries the words of its causes.
fn lost(error: Error) -> Error {
    match error.kind() {
        // With the system's error as its source: a reset is `PeerLost` already, but says no more.
        ErrorKind::Io | ErrorKind::PeerLost if std::error::Error::source(&error).is_some() => {
            let message = "the connection broke: its process died";
            Error::new(ErrorKind::PeerLost, "keeping a connection", message).with_source(error)
        }
        ErrorKind::Timeout => {
            let ErrorReport { operation, message, .. } = error.report().clone();
            Error::new(ErrorKind::PeerLost, operation, message)
        }
        _ => error,
    }
}

async fn listen(
    mut reader: FrameReader,
    patience: Duration,
    mut on_frame: impl FnMut(Frame) -> Result<()>,
) -> End {
    loop {
        let result = match reader.next(patience).await {
            Ok(Some(Frame::Signal(Signal::Heartbeat))) => Ok(()),
            Ok(Some(Frame::Signal(Signal::Goodbye))) => return End::Left,
            Ok(Some(frame)) => on_frame(frame),
            Ok(None) => Err(Error::new(
                ErrorKind::PeerLost,
                "waiting for a frame",
                "the connection ended without a goodbye: its process died",
            )),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            return End::Lost(error);
        }
    }
}

/// Ends with an error only; after the last frame it leaves the socket to the reader.
async fn speak(
    mut writer: FrameWriter,
    mut queue: Queue,
    beat: Duration,
    patience: Duration,
) -> Error {
    loop {
        match timeout(beat, queue.recv()).await {
            Ok(Some(first)) => {
                let mut next = Some(first);
                while let Some(frame) = next {
                    next = match writer.push(&frame) {
                        Ok(true) => None,
                        Ok(false) => queue.try_recv(),
                        Err(error) => return error,
                    };
                }
            }
            Ok(None) => break,
            Err(_) => {
                if let Err(error) = writer.push(&Frame::Signal(Signal::Heartbeat)) {
                    return error;
                }
            }
        }
        if let Err(error) = writer.flush(patience).await {
            return error;
        }
    }
    writer.shutdown().await;
    std::future::pending().await
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::{Token, UPDATES};

    fn wire(io: tokio::io::DuplexStream) -> Wire {
        let (reader, writer) = tokio::io::split(io);
        Wire::new(Box::new(reader), Box::new(writer))
    }

    fn said(body: &bytes::Bytes) -> Frame {
        Frame::Message { channel: UPDATES, body: body.clone() }
    }

    #[test]
    fn a_connection_that_ends_says_its_cause_once() {
        let reset = || std::io::Error::from_raw_os_error(104);
        let words = reset().to_string();
        let silent = Error::new(ErrorKind::Timeout, "reading a frame", "silent for 1 s");
        for (error, cause) in [(Error::io("reading a frame", reset()), &*words), (silent, "silent")]
        {
            let lost = lost(error);
            assert_eq!(lost.kind(), ErrorKind::PeerLost, "{lost}");
            let told = ErrorReport::from(&lost).to_string();
            assert_eq!(told.matches(cause).count(), 1, "{told}");
            assert_eq!(told.matches("reading a frame").count(), 1, "{told}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_does_not_read_costs_two_frames_of_memory_and_its_connection() {
        let token = Token::generate().unwrap();
        let mut config = ControlConfig::new("127.0.0.1:0".parse().unwrap(), token);
        config.max_frame_bytes = FRAME_FLOOR as usize;
        let terms = Terms { max_frame: u32::MAX, ..config.terms() };
        let (link, queue) = link(&config, terms, Heard::default());
        // The socket takes one byte, and nobody takes that.
        let (near, _far) = tokio::io::duplex(1);
        let traffic = Traffic { wire: wire(near), queue, terms, cut: Arc::clone(&link.cut) };
        let body = bytes::Bytes::from(vec![0; 1000]);
        let mut taken = 0;
        let refused = loop {
            match link.send(Rank(1), body.len(), said(&body)) {
                Ok(()) => taken += 1,
                Err(error) => break error,
            }
        };
        assert_eq!((taken, refused.kind()), (7, ErrorKind::Resource), "{refused}");
        let End::Lost(error) = converse(traffic, &config, |_| Ok(())).await else { panic!() };
        assert_eq!(error.kind(), ErrorKind::Resource, "{error}");
        assert!(error.to_string().contains("does not read"), "{error}");
    }

    #[tokio::test]
    async fn a_peer_that_reads_is_sent_any_number_of_frames() {
        let token = Token::generate().unwrap();
        let mut config = ControlConfig::new("127.0.0.1:0".parse().unwrap(), token);
        config.max_frame_bytes = FRAME_FLOOR as usize;
        let (link, mut queue) = link(&config, config.terms(), Heard::default());
        let body = bytes::Bytes::from(vec![0; 3000]);
        for _ in 0..100 {
            link.send(Rank(1), body.len(), said(&body)).unwrap();
            link.send(Rank(1), body.len(), said(&body)).unwrap();
            assert!(queue.recv().await.is_some() && queue.try_recv().is_some());
        }
        // One that is larger than the budget, as the peer accepts larger ones than this side.
        let terms = Terms { max_frame: u32::MAX, ..config.terms() };
        let (link, mut queue) = super::link(&config, terms, Heard::default());
        let large = bytes::Bytes::from(vec![0; 10_000]);
        for _ in 0..3 {
            link.send(Rank(1), large.len(), said(&large)).unwrap();
            assert!(queue.recv().await.is_some());
        }
    }

    #[tokio::test]
    async fn a_member_that_accepts_no_frames_to_speak_of_is_refused_in_the_handshake() {
        let token = Token::generate().unwrap();
        let config = ControlConfig::new("127.0.0.1:0".parse().unwrap(), token.clone());
        let shared = Shared::new(Side::Leader(crate::group::Group::new(8)), config.budget());
        for (max_frame, is_welcome) in [(0, false), (FRAME_FLOOR - 1, false), (FRAME_FLOOR, true)] {
            let (up, down) = tokio::io::duplex(4096);
            let (mut member, leader) = (wire(up), wire(down));
            let terms = Terms { max_frame, ..config.terms() };
            // The welcome is queued for the traffic that follows.
            let entered = async {
                let Ok((_, mut traffic)) = enter(leader, &config, &shared).await else {
                    return false;
                };
                let Some(Frame::Signal(welcome)) = traffic.queue.recv().await else {
                    return false;
                };
                traffic.wire.writer.send(welcome, PATIENCE).await.is_ok()
            };
            let joining = introduce(&mut member, &token, Role::Rollout, None, terms);
            let (joined, entered) = futures::future::join(joining, entered).await;
            assert_eq!((joined.is_ok(), entered), (is_welcome, is_welcome), "{max_frame}");
            if let Err(error) = joined {
                assert!(error.to_string().contains("max_frame_bytes"), "{error}");
            }
        }
    }
}

//! The tasks of the control thread: accepting connections, and the traffic with each peer.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::address::{Listener, connect};
use crate::group::{Cut, End, Group, Link, Mailbox, Membership, Outbox, Queue};
use crate::handshake::{Newcomer, PATIENCE, Welcome, examine, introduce, refuse};
use crate::shared::{Shared, Side};
use crate::wire::{
    Counters, Frame, FrameReader, FrameWriter, Heard, Introduction, SEAT_BLOCKS, SEATS_ROOM,
    Signal, Terms, Wire, decode, unexpected,
};
use crate::{ChannelId, ControlConfig, Event, Role};
use engine_core::{Error, ErrorKind, ErrorReport, Rank, Recovery, Result};

/// How many connections may be in their handshake at once, and how many of them from one address. A further connection
/// replaces the oldest.
const STRANGERS: usize = 256;
const STRANGERS_OF_ONE: usize = 64;
/// The smallest frame limit that a member may demand. The messages that every update needs have to fit.
pub(super) const FRAME_FLOOR: u32 = 4096;
/// The shortest heartbeat interval that a peer's terms can ask for.
const BEAT_FLOOR: Duration = Duration::from_millis(1);
/// How many frames are gathered before they are written.
const BATCH: usize = 4096;
/// How long a relay holds a patient message back that not all of its ranks have sent yet.
const LINGER: Duration = Duration::from_millis(100);
/// How many messages a relay remembers, to know how many ranks to expect. A trainer with few slots has fewer outstanding.
const REMEMBERED: usize = 16;
/// How long a listener that cannot accept waits before it tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl ControlConfig {
    /// How many bytes of one peer's messages may be unread here, and how many may wait to be written to it.
    pub(super) fn budget(&self) -> usize {
        self.max_frame_bytes.saturating_mul(2)
    }

    pub(super) fn terms(&self) -> Terms {
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
    let host = {
        let (config, shared) = (config.clone(), shared.clone());
        move |wire, newcomer| {
            let (config, shared) = (config.clone(), shared.clone());
            async move {
                match newcomer {
                    Newcomer::Rank(introduction) => {
                        match enter(wire, &introduction, &config, &shared).await {
                            Ok((rank, traffic)) => attend(rank, traffic, &config, &shared).await,
                            Err(error) => tracing::warn!(%error, "a connection was refused"),
                        }
                    }
                    Newcomer::Relay(terms) => attend_relay(wire, terms, &config, &shared).await,
                }
            }
        }
    };
    let mut links = open_door(listener, &config, &shared.counters, &stop, host).await;
    shared.close();
    let farewells = async { while links.join_next().await.is_some() {} };
    if timeout(config.heartbeat_timeout, farewells).await.is_err() {
        tracing::debug!("a member did not close its connection; it is cut");
        links.shutdown().await;
    }
}

/// Accepts connections until `stop`, and gives those that know the token to `host`. Returns the tasks that still run.
pub(super) async fn open_door<F: Future<Output = ()> + Send + 'static>(
    listener: Listener,
    config: &Arc<ControlConfig>,
    counters: &Arc<Counters>,
    stop: &CancellationToken,
    host: impl Fn(Wire, Newcomer) -> F + Clone + Send + Sync + 'static,
) -> JoinSet<()> {
    let mut links = JoinSet::new();
    let strangers = Arc::new(Strangers::default());
    loop {
        tokio::select! {
            () = stop.cancelled() => return links,
            Some(done) = links.join_next() => {
                if let Err(error) = done {
                    tracing::error!(%error, "a link of the control plane panicked");
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((mut wire, from)) => {
                    wire.count(counters);
                    let stranger = strangers.enter(from);
                    let (config, stop, host) = (config.clone(), stop.clone(), host.clone());
                    links.spawn(async move {
                        let examined = tokio::select! {
                            () = stop.cancelled() => return,
                            () = stranger.shed.cancelled() => {
                                return tracing::debug!("a stranger had to make room for others");
                            }
                            examined = timeout(PATIENCE, examine(&mut wire, &config.token)) => examined,
                        };
                        drop(stranger);
                        match examined {
                            Ok(Ok(newcomer)) => host(wire, newcomer).await,
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
}

/// The connections that are in their handshake, the oldest first.
#[derive(Debug, Default)]
struct Strangers(Mutex<(u64, VecDeque<Waiting>)>);

#[derive(Debug)]
struct Waiting {
    number: u64,
    from: Option<IpAddr>,
    shed: CancellationToken,
}

/// A connection's place among the [`Strangers`].
#[derive(Debug)]
struct Stranger {
    strangers: Arc<Strangers>,
    number: u64,
    /// Cancelled when the connection has to make room.
    shed: CancellationToken,
}

impl Strangers {
    /// Gives every connection a place. Silent connections cannot keep others out. Those of one address cannot even
    /// shorten the time that other addresses have.
    fn enter(self: &Arc<Self>, from: Option<IpAddr>) -> Stranger {
        let mut state = self.lock();
        let (number, waiting) = &mut *state;
        let of_one = waiting.iter().filter(|other| other.from == from).count();
        let oldest = match waiting.len() {
            _ if of_one >= STRANGERS_OF_ONE => waiting.iter().position(|other| other.from == from),
            STRANGERS.. => Some(0),
            _ => None,
        };
        if let Some(oldest) = oldest.and_then(|at| waiting.remove(at)) {
            oldest.shed.cancel();
        }
        *number += 1;
        let shed = CancellationToken::new();
        waiting.push_back(Waiting { number: *number, from, shed: shed.clone() });
        Stranger { strangers: Arc::clone(self), number: *number, shed }
    }

    fn lock(&self) -> MutexGuard<'_, (u64, VecDeque<Waiting>)> {
        // Each change leaves the list consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.strangers.lock().1.retain(|waiting| waiting.number != self.number);
    }
}

/// An authenticated connection, the frames that are queued for it, and what its peer demands.
pub(super) struct Traffic {
    pub(super) wire: Wire,
    pub(super) queue: Queue,
    pub(super) terms: Terms,
    pub(super) cut: Arc<Cut>,
}

/// Checks the terms of a peer.
///
/// # Errors
///
/// `Config` if it accepts only frames that are too short for updates.
pub(super) fn acceptable(terms: Terms) -> Result<()> {
    if terms.max_frame >= FRAME_FLOOR {
        return Ok(());
    }
    let message = format!(
        "it accepts frames of up to {} bytes, and updates need {FRAME_FLOOR} (max_frame_bytes)",
        terms.max_frame
    );
    Err(Error::new(ErrorKind::Config, "joining the group", message))
}

/// Gives a newcomer a rank.
async fn enter(
    mut wire: Wire,
    introduction: &Introduction,
    config: &ControlConfig,
    shared: &Shared,
) -> Result<(Rank, Traffic)> {
    let terms = introduction.terms;
    if let Err(error) = acceptable(terms) {
        return Err(refuse(&mut wire, error).await);
    }
    let (link, queue) = link(config, terms, wire.reader.heard.clone());
    let cut = Arc::clone(&link.cut);
    let admitted = shared.update(|mailbox, side| match side {
        Side::Leader(group) => admit(introduction, link, config, group, mailbox),
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

fn admit(
    introduction: &Introduction,
    link: Link,
    config: &ControlConfig,
    group: &mut Group,
    mailbox: &mut Mailbox,
) -> Result<Rank> {
    let welcome = link.outbox.clone();
    let (rank, unread) = group.admit(introduction, link, mailbox)?;
    // Queued under the lock, so that no other frame comes before it.
    let frame = Frame::Signal(Signal::Welcome { rank, terms: config.terms(), unread });
    welcome.send(frame).map_err(|_| Error::new(ErrorKind::State, "welcoming", "gone"))?;
    Ok(rank)
}

/// The leader's traffic with one member, until the connection ends.
async fn attend(rank: Rank, traffic: Traffic, config: &ControlConfig, shared: &Shared) {
    let end = converse(traffic, config, Kind::OfARank, |frame| {
        shared.update(|mailbox, side| {
            let Side::Leader(group) = side else { return Err(unexpected(&frame)) };
            take_in(rank, frame, group, mailbox)
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

/// Takes in a frame from a member.
fn take_in(rank: Rank, frame: Frame, group: &mut Group, mailbox: &mut Mailbox) -> Result<()> {
    match frame {
        Frame::Message { channel, body, .. } => mailbox.deliver(rank, channel, body)?,
        Frame::Signal(Signal::Read { bytes }) => group.link_mut(rank)?.was_read(&bytes),
        Frame::Signal(Signal::Call { id, call }) => group.call(rank, id, call, mailbox),
        Frame::Signal(Signal::Withdraw { id }) => group.withdraw(rank, id, mailbox),
        other => return Err(unexpected(&other)),
    }
    Ok(())
}

/// The leader's traffic with a relay, until the connection ends.
async fn attend_relay(mut wire: Wire, terms: Terms, config: &ControlConfig, shared: &Shared) {
    if let Err(error) = acceptable(terms) {
        let error = refuse(&mut wire, error).await;
        return tracing::warn!(%error, "a relay was refused");
    }
    let (way, queue) = link(config, terms, wire.reader.heard.clone());
    let way = &way;
    let welcomed = way.outbox.send(Frame::Signal(Signal::Relay(config.terms())));
    shared.update(|_, side| match side {
        Side::Leader(group) if welcomed.is_ok() => group.add_relay(way.outbox.clone()),
        _ => {}
    });
    let traffic = Traffic { wire, queue, terms, cut: Arc::clone(&way.cut) };
    let end = converse(traffic, config, Kind::OfARelay, |frame| {
        let Frame::Carried { seats, frame } = frame else { return Err(unexpected(&frame)) };
        shared.update(|mailbox, side| {
            let Side::Leader(group) = side else { return Err(unexpected(&frame)) };
            if let Frame::Signal(Signal::Introduction(introduction)) = &*frame {
                for seat in seats.iter() {
                    if group.is_taken(&way.outbox, seat) {
                        return Err(unexpected(&frame));
                    }
                    let admitted = seat_of(introduction, way.of_seat(seat), config, group, mailbox);
                    if let Err(error) = admitted {
                        tracing::warn!(%error, "a connection was refused");
                        let refused = Signal::Refused(ErrorReport::from(&error));
                        way.tell_by(&way.outbox.of_seat(seat), Frame::Signal(refused));
                    }
                }
                return Ok(());
            }
            let from = group.ranks_in(&way.outbox, &seats);
            if let Frame::Message { channel, body, .. } = *frame {
                let mut taken = from;
                for (rank, error) in mailbox.charge(&taken, channel, &body) {
                    taken.remove(rank);
                    cut(rank, &error, group, mailbox);
                }
                mailbox.file(taken, channel, body);
                return Ok(());
            }
            for rank in from.iter() {
                match &*frame {
                    Frame::Signal(Signal::Goodbye) => group.end(rank, End::Left, mailbox),
                    Frame::Signal(Signal::Lost(report)) => {
                        group.end(rank, End::Lost(report.clone().into()), mailbox);
                    }
                    Frame::Signal(Signal::Silent(silence)) => {
                        if let Ok(link) = group.link_mut(rank) {
                            link.silent = Some((*silence, std::time::Instant::now()));
                        }
                    }
                    said => {
                        if let Err(error) = take_in(rank, said.clone(), group, mailbox) {
                            cut(rank, &error, group, mailbox);
                        }
                    }
                }
            }
            Ok(())
        })
    })
    .await;
    tracing::debug!(?end, "a relay's connection ended");
    let why = match end {
        End::Left => "its relay has closed".to_owned(),
        End::Lost(error) => format!("its relay was lost: {}", error.report().message),
    };
    shared.update(|mailbox, side| {
        let Side::Leader(group) = side else { return };
        for rank in group.remove_relay(&way.outbox).iter() {
            let error = Error::new(ErrorKind::PeerLost, "keeping a connection", &*why);
            group.end(rank, End::Lost(error), mailbox);
        }
    });
}

/// Cuts a rank behind a relay that breaks the rules, and not its relay.
fn cut(rank: Rank, error: &Error, group: &mut Group, mailbox: &mut Mailbox) {
    if let Err(error) = group.cut(rank, ErrorReport::from(error), mailbox) {
        tracing::debug!(%rank, %error, "it is gone already");
    }
}

/// Gives a rank to a newcomer in a seat of a relay.
fn seat_of(
    introduction: &Introduction,
    seat: Link,
    config: &ControlConfig,
    group: &mut Group,
    mailbox: &mut Mailbox,
) -> Result<Rank> {
    let terms = introduction.terms;
    acceptable(terms)?;
    let limit = seat.limit.min(terms.max_frame as usize);
    let beat = beat(terms.heartbeat_interval, config.heartbeat_timeout);
    admit(introduction, Link { limit, beat, ..seat }, config, group, mailbox)
}

/// The result of joining: the rank, the membership, and the connection.
pub(super) type Admission = (Rank, Membership, Traffic);

/// Repeats attempts to connect to the leader until one succeeds, within the connect timeout.
pub(super) async fn knock<T>(
    config: &ControlConfig,
    mut attempt: impl AsyncFnMut() -> Result<T>,
) -> Result<T> {
    let mut last = None;
    let mut taken_until: Option<Instant> = None;
    let attempts = async {
        let mut pause = Duration::from_millis(10);
        loop {
            let error = match attempt().await {
                Ok(admission) => return Ok(admission),
                Err(error) => error,
            };
            // Two kinds of errors are worth another attempt. The first are those that may go away when the
            // leader starts later. The second is a taken rank: its process may have died, which the leader
            // notices within the heartbeat timeout.
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
        // The leader's own answer says more than that the time is over.
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

/// One attempt to connect to the leader as a rank.
pub(super) async fn join(
    config: &ControlConfig,
    role: Role,
    rank: Option<Rank>,
) -> Result<Admission> {
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

/// The link to a peer with these terms, and the queue of its frames.
pub(super) fn link(config: &ControlConfig, terms: Terms, heard: Heard) -> (Link, Queue) {
    let (outbox, queue) = Outbox::new(config.budget());
    let beat = beat(terms.heartbeat_interval, config.heartbeat_timeout);
    let limit = terms.max_frame as usize;
    let (unread, cut) = (BTreeMap::new(), Arc::default());
    (Link { outbox, limit, unread, heard, silent: None, beat, cut }, queue)
}

/// The heartbeat interval of a side towards a peer that tolerates `tolerated` of silence: at least three heartbeats fit
/// into that.
fn beat(interval: Duration, tolerated: Duration) -> Duration {
    interval.min(tolerated / 3).max(BEAT_FLOOR)
}

/// A member's traffic with the leader, until the connection ends or `stop`.
pub(super) async fn follow(
    mut traffic: Traffic,
    config: Arc<ControlConfig>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    traffic.wire.count(&shared.counters);
    let on_frame = |frame| {
        shared.update(|mailbox, side| match frame {
            Frame::Message { channel, body, .. } => mailbox.deliver(Rank::LEADER, channel, body),
            Frame::Signal(Signal::Read { bytes }) => {
                if let Some(link) = side.link_mut(Rank::LEADER) {
                    link.was_read(&bytes);
                }
                Ok(())
            }
            Frame::Reply { id, outcome } => {
                mailbox.settle(id, decode(&outcome)?);
                Ok(())
            }
            other => Err(unexpected(&other)),
        })
    };
    let mut conversation = Box::pin(converse(traffic, &config, Kind::OfARank, on_frame));
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

/// The kind of peer on a connection.
#[derive(Clone, Copy)]
pub(super) enum Kind<'a> {
    OfARank,
    /// A relay's connection, on the side of the leader or of the relay above.
    OfARelay,
    /// The same connection on the relay's own side, with the number of ranks behind it.
    Upwards(&'a (dyn Fn() -> usize + Sync)),
}

/// Carries frames both ways until one side says goodbye, dies, breaks the protocol, is silent or is cut.
pub(super) async fn converse(
    traffic: Traffic,
    config: &ControlConfig,
    kind: Kind<'_>,
    on_frame: impl FnMut(Frame) -> Result<()>,
) -> End {
    let Traffic { wire: Wire { mut reader, writer }, queue, terms, cut } = traffic;
    let room = if matches!(kind, Kind::OfARank) { 0 } else { SEATS_ROOM };
    reader.set_max_frame(config.max_frame_bytes.saturating_add(room));
    let beat = beat(config.heartbeat_interval, terms.heartbeat_timeout);
    let end = tokio::select! {
        biased;
        reason = cut.ordered() => End::Lost(reason),
        end = listen(reader, config.heartbeat_timeout, on_frame) => end,
        error = speak(writer, queue, beat, config.heartbeat_timeout, kind) => End::Lost(error),
    };
    match end {
        End::Left => End::Left,
        End::Lost(error) => End::Lost(lost(error)),
    }
}

/// Turns any error that means that the other side is gone into `PeerLost`. The socket's error becomes the source, and its
/// words are not repeated: an error that travels to other ranks contains the words of its sources.
fn lost(error: Error) -> Error {
    match error.kind() {
        // Only with a source, which is the system's error. A reset is `PeerLost` already, but its message says no more.
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
            Ok(Some(Frame::Signal(Signal::Lost(report)))) => return End::Lost(report.into()),
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

/// Writes the queued frames, and heartbeats between them. Equal messages from ranks behind a relay travel as one frame.
/// Returns only with an error. After the last frame it waits for ever: the reader sees the end of the connection.
async fn speak(
    mut writer: FrameWriter,
    mut queue: Queue,
    beat: Duration,
    patience: Duration,
    kind: Kind<'_>,
) -> Error {
    let (mut batch, mut passed) = (VecDeque::new(), Passed::default());
    loop {
        match timeout(beat, queue.recv()).await {
            Ok(Some(first)) => {
                batch.push_back(first);
                while !batch.is_empty() {
                    batch.extend(std::iter::from_fn(|| queue.try_recv()).take(BATCH - 1));
                    let ready = match kind {
                        Kind::Upwards(ranks) => passed.gather(&mut batch, &mut queue, ranks).await,
                        _ => batch.len(),
                    };
                    for frame in batch.drain(..ready) {
                        let is_time = match writer.push(&frame) {
                            Ok(is_time) => is_time,
                            Err(error) => return error,
                        };
                        if is_time && let Err(error) = writer.flush(patience).await {
                            return error;
                        }
                    }
                    // What is held back does not hold back what is written.
                    if !batch.is_empty()
                        && let Err(error) = writer.flush(patience).await
                    {
                        return error;
                    }
                    batch.extend(queue.try_recv());
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

/// The last patient messages that a relay has passed on, by their hashes, the oldest first, and how many of its ranks
/// have sent each.
#[derive(Debug, Default)]
struct Passed(VecDeque<(u64, usize)>);

impl Passed {
    /// Merges equal messages of ranks. If they are patient, it waits a moment for the ranks that have not sent theirs
    /// yet: the leader does nothing before it has the message from all of them. Returns how many frames are to be passed
    /// on. The others are held back.
    async fn gather(
        &mut self,
        batch: &mut VecDeque<Frame>,
        queue: &mut Queue,
        ranks: &(dyn Fn() -> usize + Sync),
    ) -> usize {
        let until = Instant::now() + LINGER;
        let ready = loop {
            merge(batch);
            // Any other frame is urgent, and so are the frames before it.
            let is_due = |frame| self.lacks(frame, ranks()).is_none_or(|lacks| lacks == 0);
            if let Some(last) = batch.iter().rposition(is_due) {
                break last + 1;
            }
            if batch.len() >= BATCH {
                break batch.len();
            }
            match timeout_at(until, queue.recv()).await {
                Ok(Some(frame)) => batch.push_back(frame),
                Ok(None) | Err(_) => break batch.len(),
            }
            batch.extend(std::iter::from_fn(|| queue.try_recv()).take(BATCH));
        };
        for (message, here) in batch.range(..ready).filter_map(patient) {
            match self.0.iter_mut().find(|(passed, _)| *passed == message) {
                Some((_, ranks)) => *ranks += here,
                None => self.0.push_back((message, here)),
            }
        }
        self.0.drain(..self.0.len().saturating_sub(REMEMBERED));
        ready
    }

    /// How many ranks have yet to send a patient message after this frame. `None` for any other frame.
    fn lacks(&self, frame: &Frame, ranks: usize) -> Option<usize> {
        let (message, here) = patient(frame)?;
        let before = self.0.iter().find(|(passed, _)| *passed == message).map_or(0, |(_, n)| *n);
        // Not all ranks of a relay have a part in every update. As many as lately can be expected.
        let lately = self.0.iter().map(|(_, ranks)| *ranks).max();
        let expected = lately.map_or(ranks, |lately| lately.min(ranks));
        Some(expected.saturating_sub(before + here))
    }
}

/// A patient message of ranks behind a relay: its hash, and how many ranks have sent it.
fn patient(frame: &Frame) -> Option<(u64, usize)> {
    let Frame::Carried { seats, frame } = frame else { return None };
    let Frame::Message { channel, body, patient: true } = &**frame else { return None };
    let mut hasher = DefaultHasher::new();
    (channel, body).hash(&mut hasher);
    Some((hasher.finish(), seats.len()))
}

/// Merges equal messages of several seats into one frame. The frames of each seat stay in their order.
fn merge(batch: &mut VecDeque<Frame>) {
    if batch.len() < 2 {
        return;
    }
    let mut merged = VecDeque::<Frame>::with_capacity(batch.len());
    // The index of each message, and the index of the last frame of each seat.
    let mut places = HashMap::<(ChannelId, Bytes, bool), usize>::new();
    let mut last = HashMap::<u32, usize>::new();
    for frame in batch.drain(..) {
        let at = merged.len();
        if let Frame::Carried { seats, frame: inner } = &frame {
            if let Frame::Message { channel, body, patient } = &**inner {
                let key = (*channel, body.clone(), *patient);
                let place = places.get(&key).copied().filter(|place| {
                    seats.iter().all(|seat| last.get(&seat).is_none_or(|last| last < place))
                });
                if let Some(place) = place
                    && let Some(Frame::Carried { seats: others, .. }) = merged.get_mut(place)
                    && others.blocks() + seats.blocks() <= SEAT_BLOCKS
                {
                    last.extend(seats.iter().map(|seat| (seat, place)));
                    others.unite(seats);
                    continue;
                }
                places.insert(key, at);
            }
            last.extend(seats.iter().map(|seat| (seat, at)));
        }
        merged.push_back(frame);
    }
    *batch = merged;
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;

    use engine_core::BitSet;

    use super::*;
    use crate::{Token, UPDATES};

    fn wire(io: tokio::io::DuplexStream) -> Wire {
        let (reader, writer) = tokio::io::split(io);
        Wire::new(Box::new(reader), Box::new(writer))
    }

    fn said(body: &bytes::Bytes) -> Frame {
        Frame::Message { channel: UPDATES, body: body.clone(), patient: true }
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
        // The socket takes one byte, which nobody reads.
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
        let End::Lost(error) = converse(traffic, &config, Kind::OfARank, |_| Ok(())).await else {
            panic!()
        };
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
        // A message larger than the budget: the peer accepts longer frames than this side.
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
            // The welcome is written with the traffic that follows.
            let entered = async {
                let mut leader = leader;
                let Ok(Newcomer::Rank(who)) = examine(&mut leader, &token).await else {
                    return false;
                };
                let Ok((_, mut traffic)) = enter(leader, &who, &config, &shared).await else {
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

    #[tokio::test]
    async fn a_relay_that_lies_speaks_for_no_rank_but_its_own() {
        let config = ControlConfig::new("127.0.0.1:0".parse().unwrap(), Token::generate().unwrap());
        let (config, terms) = (Arc::new(config.clone()), config.terms());
        let group = crate::group::Group::new(8);
        let shared = Arc::new(Shared::new(Side::Leader(group), config.budget()));
        let mut relays = Vec::new();
        for _ in 0..2 {
            let (up, down) = tokio::io::duplex(1 << 16);
            let (config, shared) = (Arc::clone(&config), Arc::clone(&shared));
            tokio::spawn(async move { attend_relay(wire(down), terms, &config, &shared).await });
            relays.push(wire(up).writer);
        }
        let introduction = |rank| {
            let who = Introduction { role: Role::Rollout, rank: Some(Rank(rank)), terms };
            Frame::Signal(Signal::Introduction(who))
        };
        let body = |body: &'static [u8]| self::said(&Bytes::from_static(body));
        // The second relay claims the first one's rank as well, and uses seats that it never gave.
        for (relay, seats, frame) in [
            (0, vec![0], introduction(1)),
            (0, vec![0], body(b"true")),
            (1, vec![7], introduction(2)),
            (1, vec![3], introduction(1)),
            (1, vec![0, 1, 3, 7], body(b"false")),
        ] {
            let heard = || shared.read(|mailbox, _| mailbox.take_all(UPDATES));
            let is_message = matches!(frame, Frame::Message { .. });
            let writer = &mut relays[relay];
            let seats = seats.into_iter().collect();
            writer.push(&Frame::Carried { seats, frame: Box::new(frame) }).unwrap();
            writer.flush(PATIENCE).await.unwrap();
            let mut said = heard();
            while is_message && said.is_none() {
                sleep(Duration::from_millis(1)).await;
                said = heard();
            }
            let from = said.map(|(said, _)| match said {
                engine_core::control::Said::One(Event::Message { from, .. }) => from,
                other => panic!("{other:?}"),
            });
            assert_eq!(from, is_message.then(|| Rank(relay as u32 + 1)));
        }
        assert!(shared.read(|mailbox, _| mailbox.take_all(UPDATES)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_holds_back_what_all_ranks_say_until_the_last_of_them_and_nothing_else() {
        let (outbox, mut queue) = Outbox::new(1 << 20);
        let say = |seat: u32, body: &'static [u8], patient| {
            let body = Bytes::from_static(body);
            outbox.of_seat(seat).send(Frame::Message { channel: UPDATES, body, patient }).unwrap();
        };
        let (mut passed, mut batch) = (Passed::default(), VecDeque::new());
        let mut next = async || {
            let begun = Instant::now();
            if batch.is_empty() {
                batch.extend(queue.recv().await);
            }
            batch.extend(std::iter::from_fn(|| queue.try_recv()));
            let ready = passed.gather(&mut batch, &mut queue, &|| 4).await;
            let seats = |frame: Frame| match frame {
                Frame::Carried { seats, .. } => seats.iter().collect::<Vec<_>>(),
                other => panic!("{other:?}"),
            };
            (batch.drain(..ready).map(seats).collect::<Vec<_>>(), begun.elapsed())
        };
        let at_once = Duration::ZERO;
        (0..4).for_each(|seat| say(seat, b"released 1", true));
        assert_eq!(next().await, (vec![vec![0, 1, 2, 3]], at_once));
        (0..3).for_each(|seat| say(seat, b"released 2", true));
        let (seats, waited) = next().await;
        assert_eq!(seats, [[0, 1, 2]]);
        assert!((LINGER..LINGER * 2).contains(&waited), "{waited:?}");
        // Nobody else has to say it.
        say(3, b"released 2", true);
        assert_eq!(next().await, (vec![vec![3]], at_once));
        say(2, b"fetched 3", false);
        assert_eq!(next().await, (vec![vec![2]], at_once));
        // What a rank says after what is held back does not wait for the others.
        say(0, b"released 4", true);
        say(1, b"failed", false);
        assert_eq!(next().await, (vec![vec![0], vec![1]], at_once));
        // What all have said does not wait for what some of them have said since.
        (0..4).for_each(|seat| say(seat, b"released 5", true));
        say(2, b"released 6", true);
        assert_eq!(next().await, (vec![vec![0, 1, 2, 3]], at_once));
        [0, 1, 3].into_iter().for_each(|seat| say(seat, b"released 6", true));
        assert_eq!(next().await, (vec![vec![0, 1, 2, 3]], at_once));
        // A rank that has no part in updates any more is waited for a few times.
        let rounds: [&[u8]; 20] =
            std::array::from_fn(|round| &b"abcdefghijklmnopqrst"[round..][..1]);
        let mut waits = 0;
        for round in rounds {
            (0..3).for_each(|seat| say(seat, round, true));
            let (seats, waited) = next().await;
            assert_eq!(seats, [[0, 1, 2]]);
            waits += u32::from(!waited.is_zero());
        }
        assert!((1..20).contains(&waits), "{waits}");
    }

    #[test]
    fn strangers_of_one_address_shed_their_own_oldest_and_nobody_else() {
        let strangers = Arc::new(Strangers::default());
        let address = |last| Some(IpAddr::from([10, 0, 0, last]));
        let honest = strangers.enter(address(1));
        let many: Vec<_> = (0..2 * STRANGERS_OF_ONE).map(|_| strangers.enter(address(2))).collect();
        assert!(!honest.shed.is_cancelled());
        let shed = many.iter().take_while(|stranger| stranger.shed.is_cancelled()).count();
        assert_eq!(shed, STRANGERS_OF_ONE);
        assert!(many.iter().skip(shed).all(|stranger| !stranger.shed.is_cancelled()));
        // Connections of many addresses displace the oldest of all.
        let crowd: Vec<_> =
            (0..STRANGERS).map(|at| strangers.enter(address(3 + (at / 32) as u8))).collect();
        assert!(honest.shed.is_cancelled());
        assert!(crowd.iter().all(|stranger| !stranger.shed.is_cancelled()));
    }

    proptest! {
        #[test]
        fn what_is_merged_is_what_every_rank_said_in_its_order(
            said in prop::collection::vec((0..4_u32, 0..3_u8, any::<bool>()), 0..40),
        ) {
            let frame = |&(seat, body, is_message): &(u32, u8, bool)| Frame::Carried {
                seats: BitSet::from([seat]),
                frame: Box::new(match is_message {
                    true => self::said(&Bytes::from(vec![body])),
                    false => Frame::Signal(Signal::Withdraw { id: body.into() }),
                }),
            };
            let mut merged: VecDeque<Frame> = said.iter().map(frame).collect();
            merge(&mut merged);
            for seat in 0..4 {
                let of_seat = |frames: &mut dyn Iterator<Item = Frame>| -> Vec<Frame> {
                    frames
                        .filter_map(|carried| match carried {
                            Frame::Carried { seats, frame } if seats.contains(seat) => Some(*frame),
                            _ => None,
                        })
                        .collect()
                };
                let (before, after) = (
                    of_seat(&mut said.iter().map(frame)),
                    of_seat(&mut merged.iter().cloned()),
                );
                prop_assert_eq!(before, after);
            }
            // A single message of all seats is one frame.
            let mut alike: VecDeque<Frame> = (0..4).map(|seat| frame(&(seat, 1, true))).collect();
            merge(&mut alike);
            prop_assert_eq!(alike.len(), 1);
        }
    }
}

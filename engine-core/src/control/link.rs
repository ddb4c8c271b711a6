//! The tasks of the control thread: the leader's door, and the traffic with one peer.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::address::{Listener, connect};
use super::group::{End, Link, Mailbox, Membership};
use super::handshake::{PATIENCE, examine, introduce, refuse};
use super::shared::{Shared, Side};
use super::wire::{Control, Frame, FrameReader, FrameWriter, Terms, Wire, decode, unexpected};
use super::{ControlConfig, Event, Role};
use crate::{Error, ErrorKind, ErrorReport, Rank, Result};

/// How many connections may be in their handshake at once; the others wait in the backlog.
const STRANGERS: usize = 64;
/// The shortest heartbeat interval that a peer's terms can ask for.
const BEAT_FLOOR: Duration = Duration::from_millis(1);
/// How long a listener that cannot accept waits before it tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl ControlConfig {
    fn terms(&self) -> Terms {
        Terms {
            // Checked by `validate`.
            max_frame: u32::try_from(self.max_frame_bytes).unwrap_or(u32::MAX),
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
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    let accept = async || {
        let permit = Arc::clone(&strangers).acquire_owned().await.ok();
        (listener.accept().await, permit)
    };
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(done) = links.join_next() => {
                if let Err(error) = done {
                    tracing::error!(%error, "a link of the control plane panicked");
                }
            }
            (accepted, permit) = accept() => match accepted {
                Ok(wire) => {
                    let (config, shared, stop) = (config.clone(), shared.clone(), stop.clone());
                    links.spawn(async move {
                        let entered = tokio::select! {
                            () = stop.cancelled() => return,
                            entered = timeout(PATIENCE, enter(wire, &config, &shared)) => entered,
                        };
                        drop(permit);
                        match entered {
                            Ok(Ok((rank, traffic))) => attend(rank, traffic, &config, &shared).await,
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

/// An authenticated connection, what is queued for it, and what its peer demands.
pub(super) struct Traffic {
    wire: Wire,
    queue: UnboundedReceiver<Frame>,
    terms: Terms,
}

/// Takes a connection through the handshake and gives it a rank.
async fn enter(mut wire: Wire, config: &ControlConfig, shared: &Shared) -> Result<(Rank, Traffic)> {
    let guest = examine(&mut wire, &config.token).await?;
    let terms = guest.introduction.terms;
    let (outbox, queue) = unbounded_channel();
    let welcome = outbox.clone();
    let link = Link { outbox, limit: terms.max_frame as usize };
    let admitted = shared.update(|_, side| match side {
        Side::Leader(group) => group.admit(&guest.introduction, link).and_then(|rank| {
            // Queued under the lock, so that nothing can overtake it.
            let frame = Frame::Control(guest.welcome(&config.token, rank, config.terms())?);
            welcome.send(frame).map_err(|_| Error::new(ErrorKind::State, "welcoming", "gone"))?;
            Ok(rank)
        }),
        Side::Member(_) => {
            Err(Error::new(ErrorKind::State, "admitting a member", "not the leader"))
        }
    });
    match admitted {
        Ok(rank) => {
            tracing::debug!(%rank, role = ?guest.introduction.role, "a member connected");
            Ok((rank, Traffic { wire, queue, terms }))
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
                Frame::Message(body) => {
                    mailbox.events.push_back(Event::Message { from: rank, body });
                }
                Frame::Control(Control::Call { id, call }) => group.call(rank, id, call, mailbox),
                Frame::Control(Control::Withdraw { id }) => group.withdraw(rank, id, mailbox),
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
    let attempts = async {
        let mut pause = Duration::from_millis(10);
        loop {
            let error = match attempt(config, role, rank).await {
                Ok(admission) => return Ok(admission),
                Err(error) => error,
            };
            // Only what a leader that starts later would change is worth another attempt.
            let later = matches!(
                error.kind(),
                ErrorKind::Io | ErrorKind::PeerLost | ErrorKind::Timeout | ErrorKind::Resource
            );
            if !later {
                return Err(error);
            }
            tracing::trace!(%error, "no leader yet");
            last = Some(error);
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    };
    match timeout(config.connect_timeout, attempts).await {
        Ok(result) => result,
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
    let (rank, terms) = introduce(&mut wire, &config.token, role, rank, config.terms()).await?;
    let (outbox, queue) = unbounded_channel();
    let leader = Link { outbox, limit: terms.max_frame as usize };
    Ok((rank, Membership { leader, table: Vec::new() }, Traffic { wire, queue, terms }))
}

/// A member's traffic with the leader, until it ends or `stop`.
pub(super) async fn follow(
    traffic: Traffic,
    config: Arc<ControlConfig>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    let on_frame = |frame| {
        shared.update(|mailbox, _| match frame {
            Frame::Message(body) => {
                mailbox.events.push_back(Event::Message { from: Rank::LEADER, body });
                Ok(())
            }
            Frame::Control(Control::Reply { id, outcome }) => {
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
            Error::new(ErrorKind::PeerLost, "being in the group", "the leader closed it")
                .rank(rank),
        ),
        End::Lost(error) => {
            let report = ErrorReport::from(&error.rank(rank));
            let message = format!("the leader was lost: {}", report.message);
            let error = Error::new(ErrorKind::PeerLost, "being in the group", message).rank(rank);
            (Event::Lost { rank, error: report }, error)
        }
    };
    mailbox.events.push_back(event);
    mailbox.ended.get_or_insert(ErrorReport::from(&error));
}

/// Carries frames both ways until one side says goodbye, dies, breaks the protocol or is silent.
async fn converse(
    traffic: Traffic,
    config: &ControlConfig,
    on_frame: impl FnMut(Frame) -> Result<()>,
) -> End {
    let Traffic { wire: Wire { mut reader, writer }, queue, terms } = traffic;
    reader.set_max_frame(config.max_frame_bytes);
    // At least three heartbeats fit into the silence that the peer tolerates.
    let beat = config.heartbeat_interval.min(terms.heartbeat_timeout / 3).max(BEAT_FLOOR);
    tokio::select! {
        biased;
        end = listen(reader, config.heartbeat_timeout, on_frame) => end,
        error = speak(writer, queue, beat, config.heartbeat_timeout) => End::Lost(error),
    }
}

async fn listen(
    mut reader: FrameReader,
    patience: Duration,
    mut on_frame: impl FnMut(Frame) -> Result<()>,
) -> End {
    loop {
        let result = match reader.next(patience).await {
            Ok(Some(Frame::Control(Control::Heartbeat))) => Ok(()),
            Ok(Some(Frame::Control(Control::Goodbye))) => return End::Left,
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
    mut queue: UnboundedReceiver<Frame>,
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
                        Ok(false) => queue.try_recv().ok(),
                        Err(error) => return error,
                    };
                }
            }
            Ok(None) => break,
            Err(_) => {
                if let Err(error) = writer.push(&Frame::Control(Control::Heartbeat)) {
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

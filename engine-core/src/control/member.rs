//! The other ranks' end: connects to rank 0 and keeps the connection.

use std::os::linux::net::SocketAddrExt;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::auth::{Side, nonce};
use super::connection::{Connection, HANDSHAKE, read_frames, write_frames};
use super::frame::{Frame, Hello, VERSION};
use super::{Address, Event, Link, Ready, Role, Shared};
use crate::{Error, ErrorKind, ErrorReport, Rank, Result};

/// Between two attempts to reach the leader.
const RETRY: Duration = Duration::from_millis(50);

pub(super) async fn run(shared: Arc<Shared>, role: Role, rank: Option<Rank>, ready: Ready) {
    let mut shutdown = shared.shutdown.subscribe();
    let joined = tokio::select! {
        joined = join(&shared, role, rank) => joined,
        _ = shutdown.wait_for(|closing| *closing) => return,
    };
    let (connection, rank) = match joined {
        Ok(joined) => joined,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let (outbound, queue) = mpsc::unbounded_channel();
    shared.state().links.insert(Rank::LEADER, Link { id: 0, role: Role::Trainer, outbound });
    if ready.send(Ok((rank, shared.config.address.clone()))).is_err() {
        return;
    }
    let (reader, writer) = connection.split();
    let for_reader = shared.clone();
    let reader = tokio::spawn(async move {
        let mut said_goodbye = false;
        let error = read_frames(reader, &for_reader.config, |frame| {
            if frame == Frame::Goodbye {
                said_goodbye = true;
                return Err(Error::new(ErrorKind::PeerLost, "reading a frame", "it left"));
            }
            take(&for_reader, frame)
        })
        .await;
        disconnect(&for_reader, said_goodbye, &error);
    });
    write_frames(writer, queue, shared.shutdown.subscribe(), &shared.config).await;
    if *shared.shutdown.borrow() {
        reader.abort();
    } else if let Err(error) = reader.await {
        // The writer ends first only when the connection broke: the reader says how.
        tracing::debug!(%error, "the control plane's reader ended");
    }
}

async fn join(
    shared: &Shared,
    role: Role,
    rank: Option<Rank>,
) -> Result<(Connection, Rank)> {
    let config = &shared.config;
    let end = Instant::now() + config.connect_timeout;
    loop {
        let error = match connect(&config.address).await {
            Ok(connection) => {
                let handshake = tokio::time::timeout(HANDSHAKE, greet(shared, role, rank, connection));
                match handshake.await {
                    Ok(Err(error)) if error.kind() == ErrorKind::PeerLost => error,
                    Ok(result) => return result,
                    Err(_) => Error::new(
                        ErrorKind::Timeout,
                        "joining the group",
                        "whoever listens there does not answer as a checkpoint engine",
                    ),
                }
            }
            Err(error) => Error::io(format!("connecting to {}", config.address), error),
        };
        if Instant::now() + RETRY >= end {
            let words = format!(
                "the leader at {} could not be reached within {:.1} s: {error}",
                config.address,
                config.connect_timeout.as_secs_f64()
            );
            return Err(Error::new(ErrorKind::Timeout, "joining the group", words)
                .rank(Rank::LEADER)
                .with_source(error));
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn connect(address: &Address) -> std::io::Result<Connection> {
    let stream = match address {
        Address::Tcp(host_port) => {
            let stream = TcpStream::connect(host_port).await?;
            stream.set_nodelay(true)?;
            let (reader, writer) = stream.into_split();
            return Ok(Connection::new(reader, writer));
        }
        Address::Unix(path) => UnixStream::connect(path).await?,
        Address::Abstract(name) => {
            let name = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
            let stream = std::os::unix::net::UnixStream::connect_addr(&name)?;
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)?
        }
    };
    let (reader, writer) = stream.into_split();
    Ok(Connection::new(reader, writer))
}

/// Proves to the leader that this rank belongs to the group, and lets it prove the same.
async fn greet(
    shared: &Shared,
    role: Role,
    rank: Option<Rank>,
    mut connection: Connection,
) -> Result<(Connection, Rank)> {
    let refused = |kind, words: String| {
        Error::new(kind, "joining the group", words).rank(Rank::LEADER)
    };
    let body = Hello { role, rank, nonce: nonce()? }.encode()?;
    connection.send(&Frame::Hello { version: VERSION, body: body.clone() }).await?;
    let token = &shared.config.token;
    let nonce = match connection.receive().await? {
        Frame::Challenge { nonce, proof } if token.accepts(Side::Leader, &body, &nonce, &proof) => {
            nonce
        }
        Frame::Challenge { .. } => {
            let words = "the leader has another token than this rank".to_owned();
            connection.send(&Frame::Refused { version: VERSION, words: words.clone() }).await?;
            return Err(refused(ErrorKind::Authentication, words));
        }
        Frame::Refused { words, .. } => return Err(refused(ErrorKind::Protocol, words)),
        _ => return Err(refused(ErrorKind::Protocol, "it did not answer the hello".into())),
    };
    let proof = token.prove(Side::Member, &body, &nonce);
    connection.send(&Frame::Proof { proof }).await?;
    connection.trust(&shared.config);
    match connection.receive().await? {
        Frame::Welcome { rank } => Ok((connection, rank)),
        Frame::Refused { words, .. } => Err(refused(ErrorKind::Mismatch, words)),
        _ => Err(refused(ErrorKind::Protocol, "it gave no rank".into())),
    }
}

/// Takes in a frame of the leader.
fn take(shared: &Shared, frame: Frame) -> Result<()> {
    match frame {
        Frame::Message { body } => {
            shared.emit(Event::Message { from: Rank::LEADER, body });
            return Ok(());
        }
        Frame::Table { peers } => {
            let mut state = shared.state();
            state.gathered = peers.into_iter().map(|peer| (peer.rank, peer)).collect();
            state.formed = true;
        }
        Frame::GatherRefused { error } => shared.state().refused = Some(error),
        Frame::BarrierPassed { name } => {
            shared.state().passed.insert(name);
        }
        other => {
            tracing::debug!(?other, "an unexpected frame");
            return Err(Error::new(ErrorKind::Protocol, "reading a frame", "out of place")
                .rank(Rank::LEADER));
        }
    }
    shared.change();
    Ok(())
}

fn disconnect(shared: &Shared, said_goodbye: bool, error: &Error) {
    shared.state().links.remove(&Rank::LEADER);
    if said_goodbye {
        shared.emit(Event::Left { rank: Rank::LEADER });
    } else {
        tracing::warn!(%error, "the leader was lost");
        let error = ErrorReport { rank: Some(Rank::LEADER), ..ErrorReport::from(error) };
        shared.emit(Event::Lost { rank: Rank::LEADER, error });
    }
    shared.change();
}

//! Rank 0's end: accepts the others, forms the group, counts barriers.

use std::os::linux::net::SocketAddrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::auth::{Side, nonce};
use super::connection::{Connection, HANDSHAKE, read_frames, write_frames};
use super::frame::{Frame, Hello, VERSION};
use super::{Address, Event, Link, Peer, Ready, Role, Shared, State};
use crate::{Error, ErrorKind, ErrorReport, Rank, Result};

/// Connections that have not yet proved that they belong to the group.
const MAX_STRANGERS: usize = 64;

/// The highest rank that a peer can ask for.
const MAX_RANK: u32 = 1 << 20;

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, Option<PathBuf>),
}

pub(super) async fn run(shared: Arc<Shared>, ready: Ready) {
    let (listener, address) = match Listener::bind(&shared.config.address).await {
        Ok(bound) => bound,
        Err(error) => return drop(ready.send(Err(error))),
    };
    if ready.send(Ok((Rank::LEADER, address))).is_err() {
        return;
    }
    let strangers = Arc::new(Semaphore::new(MAX_STRANGERS));
    let ids = AtomicU64::new(0);
    let mut writers = JoinSet::new();
    let mut shutdown = shared.shutdown.subscribe();
    let (accepted_in, mut accepted) = mpsc::unbounded_channel();
    loop {
        tokio::select! {
            _ = shutdown.wait_for(|closing| *closing) => break,
            Some((connection, hello)) = accepted.recv() => {
                let id = ids.fetch_add(1, Ordering::Relaxed);
                admit(&shared, id, connection, hello, &mut writers);
            }
            connection = listener.accept() => {
                let connection = match connection {
                    Ok(connection) => connection,
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        // Out of file descriptors, most likely: do not spin.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                };
                let Ok(permit) = strangers.clone().try_acquire_owned() else {
                    tracing::warn!("too many unauthenticated connections; one was closed");
                    continue;
                };
                let (shared, accepted) = (shared.clone(), accepted_in.clone());
                tokio::spawn(async move {
                    match tokio::time::timeout(HANDSHAKE, authenticate(&shared, connection)).await {
                        Ok(Ok(member)) => drop(accepted.send(member)),
                        Ok(Err(error)) => tracing::warn!(%error, "a connection was refused"),
                        Err(_) => tracing::warn!("a connection did not authenticate in time"),
                    }
                    drop(permit);
                });
            }
        }
    }
    drop(listener);
    // Writers end by themselves after saying goodbye.
    let goodbyes = async { while writers.join_next().await.is_some() {} };
    if tokio::time::timeout(Duration::from_secs(1), goodbyes).await.is_err() {
        tracing::debug!("not every peer could be told goodbye");
    }
}

impl Listener {
    async fn bind(address: &Address) -> Result<(Self, Address)> {
        let failed = |error| Error::io(format!("listening at {address}"), error);
        match address {
            Address::Tcp(host_port) => {
                let listener = TcpListener::bind(host_port).await.map_err(failed)?;
                let bound = listener.local_addr().map_err(failed)?;
                // The host stays as it was written: it is what the others can resolve.
                let host = host_port.rsplit_once(':').map_or("", |(host, _)| host);
                let address = Address::Tcp(format!("{host}:{}", bound.port()));
                Ok((Self::Tcp(listener), address))
            }
            Address::Abstract(name) => {
                let socket = std::os::unix::net::SocketAddr::from_abstract_name(name)
                    .and_then(|name| std::os::unix::net::UnixListener::bind_addr(&name))
                    .and_then(|listener| {
                        listener.set_nonblocking(true)?;
                        UnixListener::from_std(listener)
                    });
                Ok((Self::Unix(socket.map_err(failed)?, None), address.clone()))
            }
            Address::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                        // A file that nobody listens at was left by a process that died.
                        if std::os::unix::net::UnixStream::connect(path).is_ok() {
                            return Err(failed(error));
                        }
                        std::fs::remove_file(path).map_err(failed)?;
                        UnixListener::bind(path)
                    }
                    bound => bound,
                };
                let listener = listener.map_err(failed)?;
                Ok((Self::Unix(listener, Some(path.clone())), address.clone()))
            }
        }
    }

    async fn accept(&self) -> std::io::Result<Connection> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let (reader, writer) = stream.into_split();
                Ok(Connection::new(reader, writer))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                let (reader, writer) = stream.into_split();
                Ok(Connection::new(reader, writer))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, Some(path)) = self
            && let Err(error) = std::fs::remove_file(&*path)
        {
            tracing::debug!(%error, "the socket file was gone already");
        }
    }
}

/// Lets a stranger prove that it belongs to the group, and proves the same to it.
async fn authenticate(shared: &Shared, mut connection: Connection) -> Result<(Connection, Hello)> {
    let refused = |kind, words: &str| Error::new(kind, "accepting a connection", words);
    let Frame::Hello { version, body } = connection.receive().await? else {
        return Err(refused(ErrorKind::Protocol, "it did not begin with a hello"));
    };
    if version != VERSION {
        let words = format!("the leader speaks version {VERSION}, the peer version {version}");
        connection.send(&Frame::Refused { version: VERSION, words: words.clone() }).await?;
        return Err(refused(ErrorKind::Protocol, &words));
    }
    let hello = Hello::decode(&body)?;
    let nonce = nonce()?;
    let token = &shared.config.token;
    let proof = token.prove(Side::Leader, &body, &nonce);
    connection.send(&Frame::Challenge { nonce, proof }).await?;
    match connection.receive().await? {
        Frame::Proof { proof } if token.accepts(Side::Member, &body, &nonce, &proof) => {
            connection.trust(&shared.config);
            Ok((connection, hello))
        }
        Frame::Proof { .. } => {
            let words = "the peer has another token than the leader";
            connection.send(&Frame::Refused { version: VERSION, words: words.into() }).await?;
            Err(refused(ErrorKind::Authentication, words))
        }
        Frame::Refused { words, .. } => Err(refused(ErrorKind::Authentication, &words)),
        _ => Err(refused(ErrorKind::Protocol, "it answered the challenge with something else")),
    }
}

/// Gives an authenticated peer its rank and starts serving it.
fn admit(
    shared: &Arc<Shared>,
    id: u64,
    mut connection: Connection,
    hello: Hello,
    writers: &mut JoinSet<()>,
) {
    let (outbound, queue) = mpsc::unbounded_channel();
    let assigned = shared.state().assign(&hello);
    let rank = match assigned {
        Ok(rank) => rank,
        Err(words) => {
            tracing::warn!(%words, "a peer was refused");
            writers.spawn(async move {
                let refused = Frame::Refused { version: VERSION, words };
                if let Err(error) = connection.send(&refused).await {
                    tracing::debug!(%error, "a refused peer was gone already");
                }
            });
            return;
        }
    };
    // Queued first, so that nothing can come before it.
    if outbound.send(Frame::Welcome { rank }).is_err() {
        return;
    }
    let link = Link { id, role: hello.role, outbound };
    {
        let mut state = shared.state();
        state.lost.remove(&rank);
        state.links.insert(rank, link);
    }
    shared.change();
    tracing::info!(%rank, role = %hello.role, "a rank connected");
    let (reader, writer) = connection.split();
    let for_writer = shared.clone();
    writers.spawn(async move {
        let shutdown = for_writer.shutdown.subscribe();
        write_frames(writer, queue, shutdown, &for_writer.config).await;
    });
    let for_reader = shared.clone();
    tokio::spawn(async move {
        let mut said_goodbye = false;
        let error = read_frames(reader, &for_reader.config, |frame| {
            if frame == Frame::Goodbye {
                said_goodbye = true;
                return Err(Error::new(ErrorKind::PeerLost, "reading a frame", "it left"));
            }
            take(&for_reader, rank, hello.role, frame)
        })
        .await;
        disconnect(&for_reader, rank, id, said_goodbye, &error);
    });
}

impl State {
    fn assign(&self, hello: &Hello) -> Result<Rank, String> {
        let free = |rank: Rank| rank != Rank::LEADER && !self.links.contains_key(&rank);
        match hello.rank {
            Some(rank) if rank.0 > MAX_RANK => Err(format!("rank {rank} is too high")),
            Some(rank) if free(rank) => Ok(rank),
            Some(rank) => Err(format!("rank {rank} is taken")),
            None => {
                let lost = self.lost.iter().find(|(_, role)| **role == hello.role);
                let rank = lost.map(|(rank, _)| *rank).or_else(|| (1..MAX_RANK).map(Rank).find(
                    |rank| free(*rank) && !self.lost.contains_key(rank),
                ));
                rank.ok_or_else(|| "no rank is free".into())
            }
        }
    }
}

/// Takes in a frame of a member.
fn take(shared: &Shared, from: Rank, role: Role, frame: Frame) -> Result<()> {
    match frame {
        Frame::Message { body } => shared.emit(Event::Message { from, body }),
        Frame::Gather { world_size, payload } => {
            contribute(shared, Peer { rank: from, role, payload }, world_size);
        }
        Frame::Barrier { name } => arrive(shared, from, name),
        other => {
            tracing::debug!(?other, "an unexpected frame");
            return Err(Error::new(ErrorKind::Protocol, "reading a frame", "out of place")
                .rank(from));
        }
    }
    Ok(())
}

/// Records what a rank contributes to the group, and forms the group when all are there.
pub(super) fn contribute(shared: &Shared, peer: Peer, world_size: u32) {
    let mut state = shared.state();
    let rank = peer.rank;
    if !state.formed
        && rank != Rank::LEADER
        && let Some(leaders) = state.world_size.filter(|&leaders| leaders != world_size)
    {
        let words = format!("it expects {world_size} ranks, the leader {leaders}");
        let error = Error::new(ErrorKind::Mismatch, "forming the group", words).rank(rank);
        state.tell(rank, Frame::GatherRefused { error: ErrorReport::from(&error) });
        return;
    }
    state.gathered.insert(rank, peer.clone());
    if state.formed {
        state.tell(rank, Frame::Table { peers: state.gathered.values().cloned().collect() });
        drop(state);
        shared.emit(Event::Joined(peer));
    } else if state.world_size.is_some_and(|size| state.gathered.len() >= size as usize) {
        state.formed = true;
        let peers: Vec<Peer> = state.gathered.values().cloned().collect();
        for peer in &peers {
            state.tell(peer.rank, Frame::Table { peers: peers.clone() });
        }
        drop(state);
    }
    shared.change();
}

/// Records that a rank is at a barrier, and lets all pass when the last one is.
pub(super) fn arrive(shared: &Shared, rank: Rank, name: String) {
    shared.state().barriers.entry(name).or_default().insert(rank);
    pass(shared);
}

/// The live ranks that a barrier waits for.
pub(super) fn missing(state: &State, name: &str) -> Vec<Rank> {
    let arrived = state.barriers.get(name);
    let ranks = state.links.keys().copied().filter(|rank| state.gathered.contains_key(rank));
    std::iter::once(Rank::LEADER)
        .chain(ranks)
        .filter(|rank| arrived.is_none_or(|arrived| !arrived.contains(rank)))
        .collect()
}

fn pass(shared: &Shared) {
    let mut state = shared.state();
    let complete: Vec<String> =
        state.barriers.keys().filter(|name| missing(&state, name).is_empty()).cloned().collect();
    for name in complete {
        for rank in state.barriers.remove(&name).unwrap_or_default() {
            state.tell(rank, Frame::BarrierPassed { name: name.clone() });
        }
        state.passed.insert(name);
    }
    drop(state);
    shared.change();
}

impl State {
    /// Sends a frame to a member that may be gone, and then needs it no more.
    fn tell(&self, rank: Rank, frame: Frame) {
        if let Some(link) = self.links.get(&rank)
            && link.outbound.send(frame).is_err()
        {
            tracing::debug!(%rank, "gone before it could be told");
        }
    }
}

fn disconnect(shared: &Shared, rank: Rank, id: u64, said_goodbye: bool, error: &Error) {
    {
        let mut state = shared.state();
        match state.links.get(&rank) {
            Some(link) if link.id == id => {
                let role = link.role;
                state.links.remove(&rank);
                state.gathered.remove(&rank);
                state.lost.insert(rank, role);
                for arrived in state.barriers.values_mut() {
                    arrived.remove(&rank);
                }
            }
            _ => return,
        }
    }
    if said_goodbye {
        tracing::info!(%rank, "a rank left");
        shared.emit(Event::Left { rank });
    } else {
        tracing::warn!(%rank, %error, "a rank was lost");
        let error = ErrorReport { rank: Some(rank), ..ErrorReport::from(error) };
        shared.emit(Event::Lost { rank, error });
    }
    // A barrier may have waited for this rank alone.
    pass(shared);
}

//! A relay: many ranks on one connection to the leader.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use tokio::sync::oneshot;
use tokio::time::{interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::address::{Listener, connect};
use crate::group::{End, Link, Outbox};
use crate::handshake::{Newcomer, introduce_relay, refuse};
use crate::link::{Kind, Traffic, acceptable, converse, knock, link, open_door};
use crate::wire::{Frame, Introduction, Signal, Terms, Wire, unexpected};
use crate::{Address, ControlConfig};
use engine_core::{BitSet, Error, ErrorKind, ErrorReport, Rank, Result};

/// Carries the traffic of many ranks on one connection to the leader, or to another relay.
///
/// Ranks join at its address as they would at the leader's, and notice no difference. A message of the leader to
/// several of them crosses the leader's connection once, and so does the same message from several of them. So the
/// leader's work for a bucket grows with its connections, not with its rollouts. One relay on each host is a good
/// choice. Relays behind relays make a tree.
///
/// It runs on a thread of its own. Dropping it ends the connections of its ranks. [`close`](Self::close) waits for that.
///
/// # Contract
///
/// The ranks of a relay that is gone are lost, and may join again at another relay or at the leader. The relay has the
/// group's token, so its process can read all messages of its ranks.
///
/// # Examples
///
/// ```
/// # use std::time::Duration;
/// # use control_plane::{ControlConfig, ControlPlane, Relay, Role, Token};
/// # futures::executor::block_on(async {
/// let token = Token::generate()?;
/// let any = || "127.0.0.1:0".parse();
/// let trainer = ControlPlane::lead(ControlConfig::new(any()?, token.clone())).await?;
/// // On each host:
/// let to_trainer = ControlConfig::new(trainer.address().clone(), token.clone());
/// let relay = Relay::start(to_trainer, any()?).await?;
/// // In each process there:
/// let config = ControlConfig::new(relay.address().clone(), token);
/// let rollout = ControlPlane::join(config, Role::Rollout, None).await?;
/// # rollout.close().await?;
/// # relay.close().await?;
/// # trainer.close().await?;
/// # Ok::<(), engine_core::Error>(())
/// # }).unwrap();
/// ```
pub struct Relay {
    address: Address,
    stop: CancellationToken,
    finished: CancellationToken,
    end: Arc<OnceLock<ErrorReport>>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Connects to the leader, or to another relay, at the address of the configuration, and listens at `at`. The
    /// leader may start later.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the relay again.
    ///
    /// # Errors
    ///
    /// `Config` when the configuration cannot be used, `Io` when the relay cannot listen, `Timeout` when no leader
    /// answers, `Authentication` when the tokens differ, `Protocol` when the leader speaks another version.
    pub async fn start(config: ControlConfig, at: Address) -> Result<Self> {
        config.validate()?;
        let operation = "starting a relay";
        let failed = |error| Error::io(operation, error);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(failed)?;
        let (stop, finished) = (CancellationToken::new(), CancellationToken::new());
        let (ready, started) = oneshot::channel();
        let end = Arc::<OnceLock<ErrorReport>>::default();
        let thread = {
            let (stop, end) = (stop.clone(), Arc::clone(&end));
            let finished = finished.clone().drop_guard();
            let main = async move || {
                let connected = tokio::select! {
                    () = stop.cancelled() => return,
                    connected = prepare(&config, &at) => connected,
                };
                let (listener, address, way, traffic) = match connected {
                    Ok(connected) => connected,
                    Err(error) => return drop(ready.send(Err(error))),
                };
                if ready.send(Ok(address)).is_ok() {
                    let why = carry(listener, way, traffic, config, stop).await;
                    end.get_or_init(|| ErrorReport::from(&why));
                }
            };
            let main = move || {
                runtime.block_on(main());
                drop(finished);
            };
            std::thread::Builder::new().name("ckpt-relay".into()).spawn(main).map_err(failed)?
        };
        let cancelled = stop.clone().drop_guard();
        let address = started.await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::State, operation, "its thread ended before it began"))
        })?;
        Ok(Self { address, stop: cancelled.disarm(), finished, end, thread: Some(thread) })
    }

    /// Where ranks join: the address that was given, with port 0 resolved.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits until the relay has ended, and returns the reason: `TrainerLeft` when the leader has left in order,
    /// `PeerLost` when the leader was lost, `State` when this side has closed the relay.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn ended(&self) -> Error {
        self.finished.cancelled().await;
        self.end.get().cloned().map_or_else(closed, Error::from)
    }

    /// Ends the connections of the relay's ranks, and waits for that.
    ///
    /// # Cancel safety
    ///
    /// Closing goes on when the future is dropped.
    ///
    /// # Errors
    ///
    /// `State` if the relay's thread has panicked.
    pub async fn close(mut self) -> Result<()> {
        self.stop.cancel();
        self.finished.cancelled().await;
        // The thread only has to return now, so `join` does not block.
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => {
                Err(Error::new(ErrorKind::State, "closing a relay", "its thread panicked"))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::State, "relaying", "the relay is closed")
}

async fn prepare(
    config: &ControlConfig,
    at: &Address,
) -> Result<(Listener, Address, Link, Traffic)> {
    let listener = Listener::bind(at).await?;
    let address = listener.address(at)?;
    let connected = knock(config, async || {
        let connected = connect(&config.address).await;
        let mut wire = connected.map_err(|error| Error::io("connecting to the leader", error))?;
        let terms = introduce_relay(&mut wire, &config.token, config.terms()).await?;
        let (way, queue) = link(config, terms, wire.reader.heard.clone());
        let cut = Arc::clone(&way.cut);
        Ok((way, Traffic { wire, queue, terms, cut }))
    });
    let (way, traffic) = connected.await?;
    Ok((listener, address, way, traffic))
}

/// The connection upwards, its seats, and the link down to the rank in each seat.
struct Carried {
    up: Link,
    seats: Mutex<Seats>,
}

#[derive(Default)]
struct Seats {
    /// The next free seat. No seat is given twice.
    next: u32,
    down: BTreeMap<u32, Arc<Link>>,
    /// The connections of relays behind this one.
    relays: Vec<Outbox>,
}

impl Carried {
    fn lock(&self) -> MutexGuard<'_, Seats> {
        // Each change leaves the seats consistent.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a seat to the rank behind a link.
    fn seat(&self, link: Arc<Link>) -> u32 {
        let mut seats = self.lock();
        let seat = seats.next;
        seats.next = seats.next.wrapping_add(1);
        seats.down.insert(seat, link);
        seat
    }

    /// Sends a frame upwards for the rank in a seat.
    fn say(&self, seat: u32, frame: Frame) {
        self.up.tell_by(&self.up.outbox.of_seat(seat), frame);
    }

    /// The rank in a seat is gone. Its farewell goes upwards once, whichever side ended the connection.
    fn leave(&self, seat: u32, farewell: Signal) {
        if self.lock().down.remove(&seat).is_some() {
            self.say(seat, Frame::Signal(farewell));
        }
    }

    /// Passes a frame from above on to seats.
    fn pass_down(&self, seats: &BitSet<u32>, frame: &Frame, own: Terms) {
        let frame = match frame {
            Frame::Signal(Signal::Welcome { rank, terms, unread }) => {
                // The rank hears from this relay, so the relay's own terms count.
                let terms = Terms { max_frame: own.max_frame.min(terms.max_frame), ..own };
                &Frame::Signal(Signal::Welcome { rank: *rank, terms, unread: unread.clone() })
            }
            frame => frame,
        };
        let last = Signal::is_last;
        let is_last = matches!(frame, Frame::Signal(signal) if last(signal));
        let mut table = self.lock();
        // Seats that share a connection get the frame once.
        let mut relays = BTreeMap::<_, (Arc<Link>, BitSet<u32>)>::new();
        for seat in seats.iter() {
            let found = match is_last {
                true => table.down.remove(&seat),
                false => table.down.get(&seat).cloned(),
            };
            let Some(link) = found else { continue };
            match link.outbox.seat() {
                Some(there) => {
                    let connection = link.outbox.connection();
                    let entry = relays.entry(connection).or_insert((link, BitSet::new()));
                    entry.1.insert(there);
                }
                None => link.tell(frame.clone()),
            }
        }
        drop(table);
        for (link, there) in relays.into_values() {
            link.send_to_seats(&there, frame);
        }
    }

    /// Reports upwards which ranks are silent. Relays behind this one report their own.
    fn say_who_is_silent(&self) {
        let table = self.lock();
        let of_here = table.down.iter().filter(|(_, link)| link.outbox.seat().is_none());
        let silent: Vec<_> = of_here.map(|(seat, link)| (*seat, link.silence())).collect();
        drop(table);
        for (seat, silence) in silent.into_iter().filter(|(_, silence)| !silence.is_zero()) {
            self.say(seat, Frame::Signal(Signal::Silent(silence)));
        }
    }

    /// Tells everyone below that the connection has ended, and why.
    fn dissolve(&self, farewell: &Signal) {
        let Seats { down, relays, .. } = std::mem::take(&mut *self.lock());
        for link in down.into_values() {
            link.signal(farewell.clone());
        }
        for relay in relays {
            if relay.close_with(Frame::Signal(farewell.clone())).is_err() {
                tracing::trace!("the relay is gone already");
            }
        }
    }
}

fn farewell(end: End) -> Signal {
    match end {
        End::Left => Signal::Goodbye,
        End::Lost(error) => Signal::Lost(ErrorReport::from(&error)),
    }
}

/// Carries frames until the connection upwards ends, or until `stop`. Returns the reason.
async fn carry(
    listener: Listener,
    up: Link,
    traffic: Traffic,
    config: ControlConfig,
    stop: CancellationToken,
) -> Error {
    let (config, own, beat) = (Arc::new(config.clone()), config.terms(), up.beat);
    let carried = Arc::new(Carried { up, seats: Mutex::default() });
    let host = {
        let (carried, config) = (Arc::clone(&carried), Arc::clone(&config));
        move |wire, newcomer| {
            let (carried, config) = (Arc::clone(&carried), Arc::clone(&config));
            async move {
                match newcomer {
                    Newcomer::Rank(who) => attend(wire, who, &carried, &config).await,
                    Newcomer::Relay(terms) => attend_relay(wire, terms, &carried, &config).await,
                }
            }
        }
    };
    let (counters, closing) = (Arc::default(), CancellationToken::new());
    let door = open_door(listener, &config, &counters, &closing, host);
    let heartbeats = async {
        let mut beats = interval(beat);
        loop {
            beats.tick().await;
            carried.say_who_is_silent();
        }
    };
    let ranks = || carried.lock().down.len();
    let upwards = Kind::Upwards(&ranks);
    let mut conversation = Box::pin(converse(traffic, &config, upwards, |frame| match frame {
        Frame::Carried { seats, frame } => {
            carried.pass_down(&seats, &frame, own);
            Ok(())
        }
        other => Err(unexpected(&other)),
    }));
    let ends = async {
        let end = tokio::select! {
            end = &mut conversation => end,
            () = heartbeats => End::Left,
            () = stop.cancelled() => {
                let error = Error::new(ErrorKind::PeerLost, "relaying", "the relay has closed");
                carried.dissolve(&farewell(End::Lost(error)));
                carried.up.signal(Signal::Goodbye);
                // The conversation ends as soon as the other side has read the goodbye.
                if timeout(config.heartbeat_timeout, conversation).await.is_err() {
                    tracing::debug!("the leader did not close its connection; it is cut");
                }
                closing.cancel();
                return closed();
            }
        };
        let (signal, why) = match end {
            End::Left => {
                let words = "the leader closed the group";
                (Signal::Goodbye, Error::new(ErrorKind::TrainerLeft, "relaying", words))
            }
            End::Lost(error) => {
                let words = format!("the relay has lost the leader: {}", error.report().message);
                let lost = Error::new(ErrorKind::PeerLost, "relaying", words).rank(Rank::LEADER);
                (Signal::Lost(ErrorReport::from(&lost)), lost.with_source(error))
            }
        };
        carried.dissolve(&signal);
        closing.cancel();
        why.rank(Rank::LEADER)
    };
    let (mut links, why) = futures::future::join(door, ends).await;
    let farewells = async { while links.join_next().await.is_some() {} };
    if timeout(config.heartbeat_timeout, farewells).await.is_err() {
        tracing::debug!("a rank did not close its connection; it is cut");
        links.shutdown().await;
    }
    why
}

/// Carries the traffic of a rank until its connection ends.
async fn attend(mut wire: Wire, who: Introduction, carried: &Carried, config: &ControlConfig) {
    let terms = who.terms;
    if let Err(error) = acceptable(terms) {
        let error = refuse(&mut wire, error).await;
        return tracing::warn!(%error, "a connection was refused");
    }
    let (way, queue) = link(config, terms, wire.reader.heard.clone());
    let traffic = Traffic { wire, queue, terms, cut: Arc::clone(&way.cut) };
    let seat = carried.seat(Arc::new(way));
    carried.say(seat, Frame::Signal(Signal::Introduction(who)));
    let end = converse(traffic, config, Kind::OfARank, |frame| match frame {
        Frame::Message { .. }
        | Frame::Signal(Signal::Read { .. } | Signal::Call { .. } | Signal::Withdraw { .. }) => {
            if carried.up.outbox.is_crowded() {
                // Better to lose one rank that says too much than all ranks.
                let message = "its relay has no room for what it says: its connection ends";
                return Err(Error::new(ErrorKind::Resource, "relaying a message", message));
            }
            carried.say(seat, frame);
            Ok(())
        }
        other => Err(unexpected(&other)),
    });
    carried.leave(seat, farewell(end.await));
}

/// Carries the traffic of a relay behind this one until its connection ends.
async fn attend_relay(mut wire: Wire, terms: Terms, carried: &Carried, config: &ControlConfig) {
    if let Err(error) = acceptable(terms) {
        let error = refuse(&mut wire, error).await;
        return tracing::warn!(%error, "a relay was refused");
    }
    let (way, queue) = link(config, terms, wire.reader.heard.clone());
    way.signal(Signal::Relay(config.terms()));
    carried.lock().relays.push(way.outbox.clone());
    let traffic = Traffic { wire, queue, terms, cut: Arc::clone(&way.cut) };
    let mut seated = BTreeMap::<u32, u32>::new();
    let end = converse(traffic, config, Kind::OfARelay, |frame| {
        let Frame::Carried { seats, frame } = frame else { return Err(unexpected(&frame)) };
        if matches!(*frame, Frame::Carried { .. } | Frame::Reply { .. }) {
            return Err(unexpected(&frame));
        }
        for there in seats.iter() {
            if matches!(*frame, Frame::Signal(Signal::Introduction(_))) {
                seated.insert(there, carried.seat(Arc::new(way.of_seat(there))));
            }
            let Some(&seat) = seated.get(&there) else { continue };
            match &*frame {
                Frame::Signal(signal) if signal.is_last() => {
                    seated.remove(&there);
                    carried.leave(seat, signal.clone());
                }
                said => carried.say(seat, said.clone()),
            }
        }
        Ok(())
    });
    let end = end.await;
    carried.lock().relays.retain(|relay| !relay.is_of(&way.outbox));
    let why = match end {
        End::Left => "its relay has closed".to_owned(),
        End::Lost(error) => format!("its relay was lost: {}", error.report().message),
    };
    let lost = Error::new(ErrorKind::PeerLost, "keeping a connection", why);
    for seat in seated.into_values() {
        carried.leave(seat, Signal::Lost(ErrorReport::from(&lost)));
    }
}

//! The loop that drives a rank's state machine and, on the leader, the coordinator. It makes no decisions.

use std::collections::{BTreeSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use engine_core::control::{Control, Event};
use engine_core::{Error, ErrorKind, Rank, Result, Version, clock};
use futures::{FutureExt, future::BoxFuture};
use protocol::{decode, encode};

use crate::coordinator::{self, Committed, Coordinator};
use crate::encode::Going;
use crate::member::{self, Done, Member, Task};
use crate::message::{Batch, ToLeader, ToMember};

/// A rank's connection and its state machines.
#[derive(Debug)]
pub(crate) struct Seat {
    control: Arc<dyn Control>,
    deadline: Duration,
    pub(crate) member: Member,
    coordinator: Option<Coordinator>,
    /// Ranks of the group that are gone.
    absent: BTreeSet<Rank>,
}

/// Starts the work of a rank.
pub(crate) trait Worker: Send {
    /// Starts a task. If the future is dropped, the work goes on until `going` tells it to stop.
    fn start(&mut self, task: Task, going: Going) -> BoxFuture<'static, Result<Done>>;
}

/// The result of an update that succeeded.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) version: Version,
    /// Only on the leader.
    pub(crate) committed: Option<Committed>,
    pub(crate) absent: Vec<Rank>,
    pub(crate) times: Times,
}

/// What a rank waits for.
enum Came {
    Event(Result<Option<Event>>),
    /// A trainer's work has written a batch to a rollout.
    Wrote(Rank, Batch),
    Done(Result<Done>),
    Read(Result<()>),
}

/// How long the tasks of a rank took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    pub(crate) plan: Duration,
    pub(crate) write: Duration,
    pub(crate) verify: Duration,
}

/// A call of [`Seat::take_part`]. If it is dropped before it is done, the update is given up.
struct Ongoing<'a> {
    seat: &'a mut Seat,
    going: Going,
    done: bool,
}

impl Drop for Ongoing<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        self.going.stop();
        let seat = &mut *self.seat;
        // Errors of sending are ignored here and below: the loss of a rank arrives as an event.
        let cancelled = seat.member.cancel();
        let Some(coordinator) = &mut seat.coordinator else {
            for act in cancelled {
                if let member::Act::Send(message) = act {
                    drop(encode(&message).and_then(|body| seat.control.send(Rank::LEADER, body)));
                }
            }
            return;
        };
        let message = "the trainer's program gave the update up";
        let error = Error::new(ErrorKind::Aborted, "updating", message).rank(Rank::LEADER);
        for act in coordinator.fail(error) {
            match act {
                coordinator::Act::Send(to, message) if to != Rank::LEADER => {
                    drop(encode(&message).and_then(|body| seat.control.send(to, body)));
                }
                _ => {}
            }
        }
    }
}

impl Seat {
    pub(crate) fn new(
        control: Arc<dyn Control>,
        deadline: Duration,
        member: Member,
        coordinator: Option<Coordinator>,
    ) -> Self {
        Self { control, deadline, member, coordinator, absent: BTreeSet::new() }
    }

    pub(crate) fn rank(&self) -> Rank {
        self.control.rank()
    }

    /// Takes part in the next update. The leader begins it, the other ranks wait for it. `reading` is polled meanwhile. Its error
    /// fails the update.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, an update that has begun is given up on every rank.
    ///
    /// # Errors
    ///
    /// `Timeout` if no update begins within the deadline; otherwise the cause of the failed update.
    pub(crate) async fn take_part(
        &mut self,
        worker: &mut dyn Worker,
        version: Option<Version>,
        digests: bool,
        reading: Pin<&mut (dyn Future<Output = Result<()>> + Send)>,
    ) -> Result<Ended> {
        let mut reading = Some(reading);
        // The error of reading, before the rank has heard of the update: then the others are told.
        let mut unread: Option<Error> = None;
        let until = Instant::now() + self.deadline;
        let (mut members, mut leads) = (VecDeque::new(), VecDeque::new());
        self.overhear(&mut members, &mut leads).await?;
        let now = Instant::now();
        members.extend(self.member.call(now, version));
        if let (Some(coordinator), Some(version)) = (&mut self.coordinator, version) {
            leads.extend(coordinator.begin(now, self.control.next_update(), version, digests));
        }
        let (going, mut wrote) = Going::new();
        let mut ongoing = Ongoing { seat: self, going, done: false };
        let mut work: Option<(Task, Instant, BoxFuture<'static, Result<Done>>)> = None;
        let (mut here, mut committed) = (None, None);
        let mut times = Times::default();
        let pause = ongoing.seat.deadline / 8;
        let (mut steps, mut look_at) = (0, now + pause);
        let mut connected = true;
        loop {
            // Do all acts.
            loop {
                let now = Instant::now();
                let seat = &mut *ongoing.seat;
                if let Some(act) = leads.pop_front() {
                    match act {
                        coordinator::Act::End(result) => committed = Some(result),
                        coordinator::Act::Send(Rank::LEADER, message) => {
                            members.extend(seat.member.heard(now, message));
                        }
                        coordinator::Act::Send(to, message) => {
                            // The loss of a rank arrives as an event. Any other error of sending fails the update.
                            let sent =
                                encode(&message).and_then(|body| seat.control.send(to, body));
                            if let Err(error) = sent
                                && error.kind() != ErrorKind::PeerLost
                                && let Some(coordinator) = &mut seat.coordinator
                            {
                                leads.extend(coordinator.fail(error.rank(to)));
                            }
                        }
                    }
                    continue;
                }
                let Some(act) = members.pop_front() else { break };
                match act {
                    member::Act::Send(message) => match &mut seat.coordinator {
                        Some(coordinator) => {
                            leads.extend(coordinator.heard(now, Rank::LEADER, message));
                        }
                        None => {
                            let body = encode(&message);
                            let sent = body.and_then(|body| seat.control.send(Rank::LEADER, body));
                            if let Err(error) = sent {
                                members.extend(seat.member.fail(error));
                            }
                        }
                    },
                    member::Act::Start(task) => {
                        (ongoing.going, wrote) = Going::new();
                        let started = worker.start(task.clone(), ongoing.going.clone());
                        work = Some((task, now, started));
                    }
                    member::Act::Stop => ongoing.going.stop(),
                    member::Act::End(result) => here = Some(result),
                }
            }
            let waits_for_commit = ongoing.seat.coordinator.is_some() && committed.is_none();
            if !waits_for_commit && let Some(result) = here.take() {
                ongoing.done = true;
                // The coordinator's error is the first cause.
                let committed = committed.transpose()?;
                let absent = ongoing.seat.absent.iter().copied().collect();
                return Ok(Ended { version: result?, committed, absent, times });
            }
            // Wait for an event, the end of the work, or the next time to look.
            let seat = &mut *ongoing.seat;
            let mut wakes = vec![look_at];
            wakes.extend(seat.member.wakes_at());
            wakes.extend(seat.coordinator.as_ref().and_then(Coordinator::wakes_at));
            if !seat.member.takes_part() && seat.coordinator.is_none() {
                wakes.push(until);
            }
            let wait = wakes.into_iter().min().unwrap_or(look_at);
            let wait = wait.saturating_duration_since(Instant::now());
            let control = seat.control.clone();
            let wait = wait.max(Duration::from_millis(1));
            let listens = connected;
            let coming = async {
                match listens {
                    true => control.recv(wait).await,
                    // Only the end of the work is left to wait for.
                    false => Ok(clock::within(wait, std::future::pending()).await),
                }
            };
            let mut coming = std::pin::pin!(coming);
            let came = std::future::poll_fn(|cx| {
                if let Poll::Ready(Some((to, batch))) = wrote.poll_recv(cx) {
                    return Poll::Ready(Came::Wrote(to, batch));
                }
                if let Some((_, _, working)) = &mut work
                    && let Poll::Ready(done) = working.poll_unpin(cx)
                {
                    return Poll::Ready(Came::Done(done));
                }
                if let Some(going) = &mut reading
                    && let Poll::Ready(read) = going.as_mut().poll(cx)
                {
                    return Poll::Ready(Came::Read(read));
                }
                coming.as_mut().poll(cx).map(Came::Event)
            });
            let came = came.await;
            let now = Instant::now();
            match came {
                Came::Read(read) => {
                    reading = None;
                    unread = read.err();
                }
                Came::Wrote(to, batch) => members.extend(seat.member.wrote(to, batch)),
                Came::Done(done) => {
                    // Some of it may have come since the last look.
                    while let Ok((to, batch)) = wrote.try_recv() {
                        members.extend(seat.member.wrote(to, batch));
                    }
                    if let Some((task, begun, _)) = work.take() {
                        let taken = now - begun;
                        match task {
                            Task::Prepare { .. } | Task::Check { .. } => {}
                            Task::Plan { .. } => times.plan = taken,
                            Task::Write { .. } => times.write = taken,
                            Task::Verify { .. } => times.verify = taken,
                        }
                    }
                    members.extend(seat.member.done(done));
                }
                Came::Event(Ok(None)) => {}
                Came::Event(Ok(Some(event))) => {
                    seat.happened(now, event, &mut members, &mut leads)?;
                }
                Came::Event(Err(error)) => {
                    connected = false;
                    let takes_part = seat.member.takes_part();
                    if !takes_part && seat.coordinator.is_none() {
                        return Err(error);
                    }
                    if let Some(coordinator) = &mut seat.coordinator {
                        leads.extend(coordinator.fail(copy(&error)));
                    }
                    members.extend(seat.member.lost(error));
                }
            }
            if now >= look_at {
                look_at = now + pause;
                let now_at = ongoing.going.steps();
                if work.is_some() && now_at != steps {
                    steps = now_at;
                    members.extend(seat.member.progress());
                }
            }
            if seat.member.takes_part()
                && let Some(error) = unread.take()
            {
                members.extend(seat.member.fail(error));
            }
            members.extend(seat.member.tick(now));
            if let Some(coordinator) = &mut seat.coordinator {
                leads.extend(coordinator.tick(now));
            }
            if !seat.member.takes_part()
                && seat.coordinator.is_none()
                && here.is_none()
                && members.is_empty()
                && now >= until
            {
                if let Some(error) = unread.take() {
                    return Err(error);
                }
                if let Some(error) = seat.member.refusal() {
                    return Err(error);
                }
                let message = format!("none began within {:.1} s", seat.deadline.as_secs_f64());
                let error = Error::new(ErrorKind::Timeout, "waiting for an update", message);
                return Err(error.rank(Rank::LEADER));
            }
        }
    }

    /// Takes in the events since the last call. Updates that have begun and ended meanwhile leave no trace.
    async fn overhear(
        &mut self,
        members: &mut VecDeque<member::Act>,
        leads: &mut VecDeque<coordinator::Act>,
    ) -> Result<()> {
        while let Some(event) = self.control.recv(Duration::ZERO).await? {
            self.happened(Instant::now(), event, members, leads)?;
        }
        Ok(())
    }

    fn happened(
        &mut self,
        now: Instant,
        event: Event,
        members: &mut VecDeque<member::Act>,
        leads: &mut VecDeque<coordinator::Act>,
    ) -> Result<()> {
        match (event, &mut self.coordinator) {
            (Event::Message { from, body }, Some(coordinator)) => {
                match decode::<ToLeader>(&body) {
                    Ok(message) => leads.extend(coordinator.heard(now, from, message)),
                    // The leader cuts the connection. The rank is then lost for this reason.
                    Err(error) => self.control.cut(from, &error.rank(from))?,
                }
            }
            (Event::Message { from, body }, None) => match decode::<ToMember>(&body) {
                Ok(message) => members.extend(self.member.heard(now, message)),
                Err(error) => members.extend(self.member.fail(error.rank(from))),
            },
            (Event::Joined(peer), Some(coordinator)) => {
                self.absent.remove(&peer.rank);
                coordinator.joined(peer.rank, peer.role);
            }
            (Event::Left { rank }, Some(coordinator)) => {
                self.absent.insert(rank);
                let error = Error::new(ErrorKind::PeerLost, "being in the group", "it has left");
                leads.extend(coordinator.gone(now, rank, error));
            }
            (Event::Lost { rank, error }, Some(coordinator)) => {
                self.absent.insert(rank);
                leads.extend(coordinator.gone(now, rank, error.into()));
            }
            // A member also learns of the leader's end by the error of the connection.
            _ => {}
        }
        Ok(())
    }

    /// Waits until the work of a call that was given up has ended.
    pub(crate) async fn idle(working: &Arc<tokio::sync::Mutex<()>>) {
        drop(working.clone().lock_owned().await);
    }
}

fn copy(error: &Error) -> Error {
    engine_core::ErrorReport::from(error).into()
}

/// Takes a worker's lock, to be held until the work ends, even if the future that started it is dropped.
pub(crate) fn busy(
    working: &Arc<tokio::sync::Mutex<()>>,
) -> Result<tokio::sync::OwnedMutexGuard<()>> {
    working.clone().try_lock_owned().map_err(|_| {
        Error::new(ErrorKind::State, "updating", "work of an update before this one goes on")
    })
}

/// A future that is ready with this value.
pub(crate) fn ready<T: Send + 'static>(value: Result<T>) -> BoxFuture<'static, Result<T>> {
    futures::future::ready(value).boxed()
}

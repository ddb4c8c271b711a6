//! The thread that makes a library's calls and watches broadcasts under way.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::Shared;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError as TryRecv;
use tracing::{debug, warn};

use super::{Communicator, SlotGuard};
use engine_core::{Error, ErrorKind, Result};

/// How often work under way is polled without a pause: short broadcasts end meanwhile.
const SPINS: u32 = 200;
/// The pause between two polls of longer work.
const PAUSE: Duration = Duration::from_micros(30);

/// The time that a call may take.
pub struct Wait<'a> {
    until: Instant,
    limit: Duration,
    awaited: &'a dyn Fn() -> bool,
}

impl<'a> Wait<'a> {
    /// A wait of `limit` from now, or until nobody waits any more.
    fn new(limit: Duration, awaited: &'a dyn Fn() -> bool) -> Self {
        Self { until: Instant::now() + limit, limit, awaited }
    }

    /// Checks whether to go on waiting.
    ///
    /// # Errors
    ///
    /// `Timeout` after the limit; `Aborted` if nobody waits any more.
    pub fn check(&self, operation: &str) -> Result<()> {
        if !(self.awaited)() {
            let message = "nobody waits for it any more";
            return Err(Error::new(ErrorKind::Aborted, operation, message));
        }
        if Instant::now() >= self.until {
            return Err(too_late(operation, self.limit));
        }
        Ok(())
    }

    /// The time that is left.
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

impl fmt::Debug for Wait<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wait").field("left", &self.left()).finish_non_exhaustive()
    }
}

fn too_late(operation: &str, limit: Duration) -> Error {
    let message = format!("nothing within {:.1} s", limit.as_secs_f64());
    Error::new(ErrorKind::Timeout, operation, message)
}

fn gone() -> Error {
    Error::new(ErrorKind::State, "calling a collective library", "its thread has ended")
}

/// The handle of a library's thread. The thread ends, and leaves all groups, when the last handle is
/// dropped; [`close`](Self::close) waits for that.
pub struct Thread<C> {
    commands: Sender<Command<C>>,
    /// How often all groups were given up. The thread also sees it during a call, and ends the call: nobody waits any more for earlier
    /// broadcasts.
    given_up: Arc<AtomicU64>,
    ended: Arc<Mutex<Option<Ending>>>,
}

/// The end of a thread.
struct Ending {
    /// The sender is dropped when the thread has freed all that it has of the library.
    told: Shared<oneshot::Receiver<()>>,
    thread: std::thread::JoinHandle<()>,
}

/// When this is dropped, it waits for the end of a thread, for up to `limit`.
struct Awaited {
    ending: Option<Ending>,
    limit: Duration,
}

impl Drop for Awaited {
    fn drop(&mut self) {
        let Some(ending) = self.ending.take() else { return };
        let until = Instant::now() + self.limit;
        while ending.told.clone().now_or_never().is_none() {
            if Instant::now() >= until {
                return warn!(
                    "the library does not let go of its groups; its thread is left behind"
                );
            }
            std::thread::sleep(PAUSE);
        }
        ending.join();
    }
}

impl Ending {
    /// Waits for the thread itself, which has announced its end: what libraries keep for each of their threads is freed with it, and must
    /// not be freed while the process ends.
    fn join(self) {
        if self.thread.join().is_err() {
            warn!("the thread of a collective library has panicked");
        }
    }
}

type Command<C> = Box<dyn FnOnce(&mut Worker<C>) + Send>;

impl<C> Clone for Thread<C> {
    fn clone(&self) -> Self {
        let Self { commands, given_up, ended } = self;
        Self { commands: commands.clone(), given_up: given_up.clone(), ended: ended.clone() }
    }
}

impl<C> fmt::Debug for Thread<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Thread").finish_non_exhaustive()
    }
}

/// The party that waits for a broadcast.
pub(super) trait Awaiting: Send {
    /// Whether it still waits. If not, the group is given up.
    fn is_awaited(&self) -> bool;

    /// The broadcast has ended.
    fn arrived(self: Box<Self>);

    /// The broadcast has failed. The library may still use the slot, so the slot's guard is returned, and the thread keeps it until the
    /// library has stopped.
    fn failed(self: Box<Self>, error: Error) -> SlotGuard;
}

/// A broadcast to be made.
pub(super) struct Broadcast {
    pub(super) group: usize,
    pub(super) slot: u32,
    pub(super) len: u64,
    pub(super) limit: Duration,
    pub(super) done: Box<dyn Awaiting>,
}

impl<C: Communicator> Thread<C> {
    /// Starts a thread, and makes a communicator on it.
    ///
    /// # Errors
    ///
    /// Those of `make`; `Resource` if there is no thread.
    pub async fn start(
        name: &str,
        make: impl FnOnce() -> Result<C> + Send + 'static,
    ) -> Result<Self> {
        let (commands, inbox) = channel::<Command<C>>();
        let (ready, started) = oneshot::channel();
        let (ending, ended) = oneshot::channel::<()>();
        let main = move || {
            match make() {
                Ok(communicator) => {
                    let mut worker =
                        Worker { communicator, groups: Vec::new(), attached: 0, closing: false };
                    if ready.send(Ok(())).is_ok() {
                        worker.run(&inbox);
                    }
                }
                Err(error) => drop(ready.send(Err(error))),
            }
            // Commands that came too late may hold slots of the library as well.
            drop(inbox);
            drop(ending);
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(main);
        let thread = thread.map_err(|error| {
            Error::new(ErrorKind::Resource, "starting a thread", error.to_string())
                .with_source(error)
        })?;
        started.await.map_err(|_| gone())??;
        let told = ended.shared();
        let ended = Arc::new(Mutex::new(Some(Ending { told, thread })));
        Ok(Self { commands, given_up: Arc::default(), ended })
    }

    /// Runs `work` with the communicator, on the thread.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped before the work began, the work never begins; otherwise its [`Wait`] ends.
    ///
    /// # Errors
    ///
    /// Those of the work; `State` if the thread has ended.
    pub async fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(&mut C, &Wait<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let work = move |worker: &mut Worker<C>, awaited: &dyn Fn() -> bool| {
            work(&mut worker.communicator, &Wait::new(limit, awaited))
        };
        self.ask(work, |_| debug!("a call ended that nobody waits for any more")).await
    }

    /// Runs `work` on the thread, unless the caller has gone. If the caller goes meanwhile, runs `unheard` after it.
    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Worker<C>, &dyn Fn() -> bool) -> Result<T> + Send + 'static,
        unheard: impl FnOnce(&mut Worker<C>) + Send + 'static,
    ) -> Result<T> {
        self.begin(work, unheard)?.await
    }

    /// As [`ask`](Self::ask), but the work begins now, not when its result is awaited.
    fn begin<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Worker<C>, &dyn Fn() -> bool) -> Result<T> + Send + 'static,
        unheard: impl FnOnce(&mut Worker<C>) + Send + 'static,
    ) -> Result<Begun<T>> {
        let (tell, told) = oneshot::channel();
        self.command(move |worker| {
            if tell.is_closed() {
                return;
            }
            let result = work(worker, &|| !tell.is_closed());
            if tell.send(result).is_err() {
                unheard(worker);
            }
        })?;
        Ok(Begun(told))
    }

    /// As [`run`](Self::run), for callers that block.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn run_blocking<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(&mut C, &Wait<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        futures::executor::block_on(self.run(limit, work))
    }

    /// Ends the thread, which leaves all groups and drops the communicator, and waits for it.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the thread ends all the same. The next call waits for it.
    pub async fn close(&self) {
        self.ask_to_end();
        let told = self.ending().as_ref().map(|ending| ending.told.clone());
        if let Some(told) = told {
            // The sender is dropped, never used.
            drop(told.await);
        }
        if let Some(ending) = self.ending().take() {
            ending.join();
        }
    }

    /// As [`close`](Self::close), for callers that cannot await. On a tokio runtime a blocking task waits, and the
    /// runtime waits for that task when it ends. Elsewhere the caller waits. Neither waits longer than `limit`.
    pub fn close_later(&self, limit: Duration) {
        self.ask_to_end();
        let awaited = Awaited { ending: self.ending().take(), limit };
        if awaited.ending.is_some()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            // A runtime that is shutting down drops tasks that have not begun; dropping this one waits.
            drop(runtime.spawn_blocking(move || drop(awaited)));
        }
    }

    fn ask_to_end(&self) {
        if self.command(|worker| worker.closing = true).is_err() {
            debug!("the thread has ended before");
        }
    }

    /// The end of the thread, until a caller has waited for it.
    fn ending(&self) -> MutexGuard<'_, Option<Ending>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a broadcast, and tells `done` of its end.
    pub(super) fn broadcast(&self, broadcast: Broadcast) {
        let cell = Arc::new(Mutex::new(Some(broadcast)));
        let taken = cell.clone();
        let take = move || taken.lock().unwrap_or_else(PoisonError::into_inner).take();
        let now = self.given_up.load(Ordering::Acquire);
        let given_up = self.given_up.clone();
        let queued = self.command(move |worker| {
            if let Some(broadcast) = take() {
                worker.broadcast(broadcast, &|| given_up.load(Ordering::Acquire) != now);
            }
        });
        if let Err(error) = queued
            && let Some(broadcast) = cell.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            drop(broadcast.done.failed(error));
        }
    }

    /// Gives up all groups.
    pub(super) fn leave_all(&self) {
        self.given_up.fetch_add(1, Ordering::AcqRel);
        let left = self.command(|worker| {
            let words = "the update has ended";
            worker.leave(&Error::new(ErrorKind::Aborted, BROADCASTING, words));
        });
        if left.is_err() {
            debug!("the thread has ended, and has left all groups");
        }
    }

    /// Leaves all groups and joins others, or changes their members. This begins now. If the result is dropped, it is given up.
    pub(super) fn regroup(
        &self,
        limit: Duration,
        leave: bool,
        join: impl FnOnce(&mut C, &Wait<'_>) -> Result<Vec<usize>> + Send + 'static,
    ) -> Result<Begun<()>> {
        if leave {
            self.given_up.fetch_add(1, Ordering::AcqRel);
        }
        let work = move |worker: &mut Worker<C>, awaited: &dyn Fn() -> bool| {
            if leave {
                let words = "the group is formed anew";
                worker.leave(&Error::new(ErrorKind::Aborted, BROADCASTING, words));
            }
            let result = join(&mut worker.communicator, &Wait::new(limit, awaited)).map(|groups| {
                for group in groups {
                    worker.enter(group);
                }
            });
            if result.is_err() {
                worker.leave_unfinished();
            }
            result
        };
        // If the caller has gone, its groups are useless.
        self.begin(work, Worker::leave_unfinished)
    }

    /// Maps the leader's slots in place of this rank's own, until the last attachment is dropped.
    pub(super) async fn attach(&self, key: Bytes) -> Result<Attachment<C>> {
        let thread = self.clone();
        let attach = move |worker: &mut Worker<C>, _: &dyn Fn() -> bool| {
            worker.attach(&key).map(|()| Attachment { thread })
        };
        // If the caller has gone, the attachment is dropped.
        self.ask(attach, |_| ()).await
    }

    fn command(&self, command: impl FnOnce(&mut Worker<C>) + Send + 'static) -> Result<()> {
        self.commands.send(Box::new(command)).map_err(|_| gone())
    }
}

/// Keeps the leader's slots mapped in place of this rank's own.
pub(super) struct Attachment<C: Communicator> {
    thread: Thread<C>,
}

impl<C: Communicator> fmt::Debug for Attachment<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").finish_non_exhaustive()
    }
}

impl<C: Communicator> Drop for Attachment<C> {
    fn drop(&mut self) {
        if self.thread.command(Worker::detach).is_err() {
            debug!("the thread has ended, and with it the attachment");
        }
    }
}

/// Work that a thread has begun, or will begin. If this is dropped, nobody waits for it any more.
#[derive(Debug)]
pub(super) struct Begun<T>(oneshot::Receiver<Result<T>>);

impl<T> Begun<T> {
    /// Its result, if it has ended.
    pub(super) fn ended(&mut self) -> Option<Result<T>> {
        match self.0.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecv::Empty) => None,
            Err(TryRecv::Closed) => Some(Err(gone())),
        }
    }
}

impl<T> Future for Begun<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_unpin(cx).map(|told| told.map_err(|_| gone())?)
    }
}

const BROADCASTING: &str = "broadcasting a bucket";

/// The state of the thread.
struct Worker<C> {
    communicator: C,
    groups: Vec<Option<Group>>,
    /// The number of attachments to the leader's slots.
    attached: usize,
    closing: bool,
}

/// A group of the rank, and its broadcasts under way.
#[derive(Default)]
struct Group {
    begun: u64,
    pending: VecDeque<Pending>,
}

struct Pending {
    number: u64,
    until: Instant,
    limit: Duration,
    done: Box<dyn Awaiting>,
}

impl<C: Communicator> Worker<C> {
    fn run(&mut self, inbox: &Receiver<Command<C>>) {
        let mut idle = 0;
        while !self.closing {
            let command = if self.groups.iter().flatten().all(|group| group.pending.is_empty()) {
                idle = 0;
                inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else if idle < SPINS {
                std::thread::yield_now();
                inbox.try_recv().map_err(|error| match error {
                    TryRecvError::Empty => RecvTimeoutError::Timeout,
                    TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                })
            } else {
                inbox.recv_timeout(PAUSE)
            };
            idle += 1;
            match command {
                Ok(command) => {
                    idle = 0;
                    command(self);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.poll();
        }
        self.leave(&gone());
    }

    fn attach(&mut self, key: &[u8]) -> Result<()> {
        if self.attached == 0 {
            self.communicator.attach(key)?;
        }
        self.attached += 1;
        Ok(())
    }

    fn detach(&mut self) {
        self.attached -= 1;
        if self.attached == 0 {
            self.communicator.detach();
        }
    }

    fn enter(&mut self, group: usize) {
        if self.groups.len() <= group {
            self.groups.resize_with(group + 1, || None);
        }
        // A group that only changed its members continues its count.
        self.groups[group].get_or_insert_default();
    }

    fn broadcast(&mut self, broadcast: Broadcast, given_up: &dyn Fn() -> bool) {
        let Broadcast { group, slot, len, limit, done } = broadcast;
        let Some(Some(state)) = self.groups.get_mut(group) else {
            let message = "the group has failed, or was never joined";
            return drop(done.failed(Error::new(ErrorKind::State, BROADCASTING, message)));
        };
        let awaited = || done.is_awaited() && !given_up();
        let wait = Wait::new(limit, &awaited);
        let until = wait.until;
        let begun = self.communicator.broadcast(group, slot, len, &wait);
        state.begun += 1;
        let number = state.begun;
        debug!(group, number, slot, len, "a broadcast has begun");
        state.pending.push_back(Pending { number, until, limit, done });
        if let Err(error) = begun {
            self.leave(&error);
        }
    }

    /// Watches all broadcasts that are under way.
    fn poll(&mut self) {
        for at in 0..self.groups.len() {
            let Some(group) = self.groups[at].as_mut().filter(|g| !g.pending.is_empty()) else {
                continue;
            };
            let ended = match self.communicator.ended(at) {
                Ok(ended) => ended,
                Err(error) => return self.leave(&error),
            };
            while group.pending.front().is_some_and(|first| first.number <= ended) {
                if let Some(first) = group.pending.pop_front() {
                    debug!(group = at, number = first.number, "a broadcast has ended");
                    first.done.arrived();
                }
            }
            let now = Instant::now();
            let failed = group.pending.iter().find_map(|pending| {
                if now >= pending.until {
                    return Some(too_late(BROADCASTING, pending.limit));
                }
                let message = "nobody waits for it any more";
                let aborted = || Error::new(ErrorKind::Aborted, BROADCASTING, message);
                (!pending.done.is_awaited()).then(aborted)
            });
            if let Some(error) = failed {
                return self.leave(&error);
            }
        }
    }

    /// Leaves all groups after only some were joined.
    fn leave_unfinished(&mut self) {
        self.leave(&gone());
        self.communicator.leave();
    }

    /// Aborts all groups, and tells waiting broadcasts the reason. The groups all belong to one update, which has failed.
    fn leave(&mut self, why: &Error) {
        let groups = std::mem::take(&mut self.groups);
        if groups.iter().all(Option::is_none) {
            return;
        }
        if why.kind() != ErrorKind::Aborted {
            warn!(error = %why, "the groups are given up");
        }
        // All are told first: a library may take long to abort what is under way.
        let fail = |pending: Pending| pending.done.failed(why.report().clone().into());
        let pending = groups.into_iter().flatten().flat_map(|group| group.pending);
        let slots: Vec<SlotGuard> = pending.map(fail).collect();
        debug!(%why, "leaving all groups");
        self.communicator.leave();
        debug!("all groups are left");
        // From here on nothing writes to the slots.
        drop(slots);
    }
}

//! Threads that drive engines, and how threads of Python wait for them.
//!
//! Every call that waits runs on a thread of its own, which needs no interpreter. Python's threads wait
//! without it too, in slices, so that signals are seen; event loops are called back.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine_core::{Error, ErrorKind, Result};

use crate::errors::not_now;
use futures::executor::block_on;
use futures::future::{AbortHandle, AbortRegistration, Abortable};
use pyo3::prelude::*;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a thread of Rust tells Python, and the other way around.
///
/// No thread asks for the interpreter while it has the lock.
pub(crate) struct Shared<T> {
    state: Mutex<(T, Vec<Waiter<T>>)>,
    changed: Condvar,
}

/// A function of Python, and what it waits for.
struct Waiter<T> {
    callback: Py<PyAny>,
    ready: fn(&T) -> bool,
}

impl<T: Send> Shared<T> {
    pub(crate) fn new(state: T) -> Self {
        Self { state: Mutex::new((state, Vec::new())), changed: Condvar::new() }
    }

    /// Looks at it or changes it, without telling anyone.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&mut T) -> R) -> R {
        look(&mut lock(&self.state).0)
    }

    /// Changes it, and tells all who wait for what it is now.
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let (result, callbacks) = {
            let mut state = lock(&self.state);
            let (state, waiters) = &mut *state;
            let result = change(state);
            let ready = waiters.extract_if(.., |waiter| (waiter.ready)(state));
            (result, ready.map(|waiter| waiter.callback).collect())
        };
        self.changed.notify_all();
        call(callbacks);
        result
    }

    /// Waits without the interpreter until it is ready; whether it is.
    pub(crate) fn wait(
        &self,
        py: Python<'_>,
        timeout: Duration,
        ready: impl Fn(&T) -> bool + Send,
    ) -> bool {
        py.detach(|| self.wait_until(Some(timeout), ready))
    }

    /// Waits on a thread that has no interpreter.
    pub(crate) fn wait_until(&self, timeout: Option<Duration>, ready: impl Fn(&T) -> bool) -> bool {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut state = lock(&self.state);
        while !ready(&state.0) {
            let Some(deadline) = deadline else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Has a function called once, from another thread or at once, when it is ready.
    pub(crate) fn call_back(&self, callback: Py<PyAny>, ready: fn(&T) -> bool) {
        {
            let mut state = lock(&self.state);
            if !ready(&state.0) {
                state.1.push(Waiter { callback, ready });
                return;
            }
        }
        call(vec![callback]);
    }
}

fn call(callbacks: Vec<Py<PyAny>>) {
    if callbacks.is_empty() {
        return;
    }
    // Where the interpreter is about to end, nobody waits any more.
    let called = Python::try_attach(|py| {
        for callback in callbacks {
            if let Err(error) = callback.call0(py) {
                tracing::debug!(%error, "a loop that waited for an engine is gone");
            }
        }
    });
    if called.is_none() {
        tracing::debug!("the interpreter is about to end");
    }
}

/// Who works on something: how to abort it, and whether it is about to end anyway.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    handle: AbortHandle,
    ending: Arc<AtomicBool>,
}

impl Owner {
    pub(crate) fn new() -> (Self, AbortRegistration) {
        let (handle, registration) = AbortHandle::new_pair();
        (Self { handle, ending: Arc::default() }, registration)
    }

    pub(crate) fn abort(&self) {
        self.end();
        self.handle.abort();
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.handle.is_aborted()
    }

    /// It was told to end by itself.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }
}

/// The work under way: what an interpreter that ends has to abort.
static RUNNING: Mutex<BTreeMap<u64, Owner>> = Mutex::new(BTreeMap::new());
static ENDED: Condvar = Condvar::new();
static NEXT: AtomicU64 = AtomicU64::new(0);

struct Registered(u64);

impl Drop for Registered {
    fn drop(&mut self) {
        lock(&RUNNING).remove(&self.0);
        ENDED.notify_all();
    }
}

/// Aborts all work, and waits for its end; whether it ended.
pub(crate) fn end_all(timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    let mut running = lock(&RUNNING);
    running.values().for_each(Owner::abort);
    while !running.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        running = ENDED.wait_timeout(running, left).unwrap_or_else(PoisonError::into_inner).0;
    }
    true
}

/// Runs a future on a thread of its own, and hands its result to `finish` there; `Aborted` if it was aborted.
pub(crate) fn spawn<T: Send + 'static>(
    what: &'static str,
    (owner, registration): (Owner, AbortRegistration),
    work: impl AsyncFnOnce(&Owner) -> Result<T> + Send + 'static,
    finish: impl FnOnce(Result<T>) + Send + 'static,
) -> Result<()> {
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    lock(&RUNNING).insert(id, owner.clone());
    let registered = Registered(id);
    let run = move || {
        let result =
            catch_unwind(AssertUnwindSafe(|| block_on(Abortable::new(work(&owner), registration))));
        finish(match result {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::new(ErrorKind::Aborted, what, "it was cancelled here")),
            Err(panic) => Err(Error::new(ErrorKind::State, what, words(&*panic))),
        });
        drop(registered);
    };
    let thread = std::thread::Builder::new().name("ckpt-python".into()).spawn(run);
    thread.map(drop).map_err(|error| Error::io("starting a thread", error))
}

fn words(panic: &(dyn Any + Send)) -> String {
    let words = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    format!("a bug: {}", words.unwrap_or("it panicked without words"))
}

/// An engine, or something else that one piece of work has at a time.
pub(crate) struct Slot<T> {
    /// What it is called in errors.
    what: &'static str,
    state: Mutex<SlotState<T>>,
    free: Condvar,
}

struct SlotState<T> {
    value: Option<T>,
    /// Of the work that has it.
    owner: Option<Owner>,
}

pub(crate) struct Taken<'a, T> {
    slot: &'a Slot<T>,
    value: Option<T>,
}

impl<T> Slot<T> {
    pub(crate) fn new(what: &'static str, value: T) -> Self {
        Self {
            what,
            state: Mutex::new(SlotState { value: Some(value), owner: None }),
            free: Condvar::new(),
        }
    }

    /// Whether there will never be one here again.
    pub(crate) fn is_gone(&self) -> bool {
        let state = lock(&self.state);
        state.value.is_none() && state.owner.is_none()
    }

    /// Looks at it, unless some work has it.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        lock(&self.state).value.as_ref().map(look)
    }

    /// Takes it; waits for work that is about to end.
    pub(crate) fn take(&self, operation: &str, owner: &Owner) -> Result<Taken<'_, T>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(value) = state.value.take() {
                state.owner = Some(owner.clone());
                return Ok(Taken { slot: self, value: Some(value) });
            }
            if owner.is_aborted() {
                return Err(Error::new(ErrorKind::Aborted, operation, "it was cancelled here"));
            }
            match &state.owner {
                None => {
                    return Err(not_now(operation, &format!("the {} was finalized", self.what)));
                }
                Some(other) if !other.is_ending() => {
                    let message = format!("the {} is at work on another call", self.what);
                    return Err(not_now(operation, &message));
                }
                Some(_) => {}
            }
            let tick = Duration::from_millis(50);
            state = self.free.wait_timeout(state, tick).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<T> Taken<'_, T> {
    pub(crate) fn get(&mut self) -> Result<&mut T> {
        let gone = || not_now("using an engine", "it was finalized");
        self.value.as_mut().ok_or_else(gone)
    }

    /// Takes it for good.
    pub(crate) fn keep(mut self) -> Option<T> {
        self.value.take()
    }
}

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        let mut state = lock(&self.slot.state);
        // After a panic nobody knows what it is.
        state.value = if std::thread::panicking() { None } else { self.value.take() };
        state.owner = None;
        drop(state);
        self.slot.free.notify_all();
    }
}

static PROCESS: AtomicU32 = AtomicU32::new(0);

/// Refuses to go on in a process that was forked from one that has used this: its threads are not here.
pub(crate) fn check_process() -> Result<()> {
    let own = std::process::id();
    match PROCESS.compare_exchange(0, own, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => Ok(()),
        Err(first) if first == own => Ok(()),
        Err(first) => Err(not_now(
            "using the engine",
            &format!(
                "this process was forked from process {first}, which had used the engine already; start it \
                 with the method `spawn` or `forkserver`, or fork before the first use"
            ),
        )),
    }
}

/// Whether this is a forked process, whose copies of objects must not be dropped: their threads are not here.
pub(crate) fn is_forked() -> bool {
    let first = PROCESS.load(Ordering::Relaxed);
    first != 0 && first != std::process::id()
}

/// Something that a forked process does not drop.
pub(crate) struct Own<T>(Option<T>);

impl<T> Own<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }

    pub(crate) fn get(&self) -> Result<&T> {
        check_process()?;
        self.0.as_ref().ok_or_else(|| not_now("using the engine", "it is gone"))
    }
}

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        if is_forked() {
            std::mem::forget(self.0.take());
        }
    }
}

impl<T> std::fmt::Debug for Own<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Own(..)")
    }
}

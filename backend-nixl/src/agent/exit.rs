//! The end of the process: no agent may be alive when UCX frees what its workers use.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Tells a thread to close its agent.
type Close = Box<dyn Fn() + Send>;

/// The threads that have agents.
static RUNNING: Mutex<BTreeMap<u64, Close>> = Mutex::new(BTreeMap::new());

static ENDED: Condvar = Condvar::new();

/// A thread's entry in the list of those that have agents, until its end.
pub(super) struct Running(u64);

impl Running {
    /// `close` tells the thread to close its agent, without waiting for that.
    pub(super) fn new(close: impl Fn() + Send + 'static) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).insert(number, Box::new(close));
        Self(number)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
        ENDED.notify_all();
    }
}

/// Closes all agents and waits for up to 3 s. Called when the process ends, before UCX frees what its workers use. An agent that is still
/// alive after that would crash the process.
pub(super) extern "C" fn close_all() {
    let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    running.values().for_each(|close| close());
    drop(ENDED.wait_timeout_while(running, Duration::from_secs(3), |running| !running.is_empty()));
}

//! Streams, each with a thread that runs its tasks, and events.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::abi::*;
use crate::device::Context;
use crate::{Fault, Outcome, fault, lock, sim};

/// How often a task that waits looks whether it was cancelled.
pub(crate) const TICK: Duration = Duration::from_millis(20);

/// What a task is given: it ends soon after this says so.
#[derive(Debug, Default)]
pub(crate) struct Cancel(AtomicBool);

impl Cancel {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// How a task ends that was cancelled.
    pub(crate) fn fault() -> Fault {
        fault(ACL_ERROR_RT_STREAM_ABORT, "the stream was aborted")
    }
}

type Task = Box<dyn FnOnce(&Cancel) -> Outcome + Send>;

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    submitted: u64,
    completed: u64,
    /// The last task that may run; in lazy mode, somebody waits for it.
    released: u64,
    failed: Option<Fault>,
    closed: bool,
}

/// Tasks in order.
pub(crate) struct Stream {
    context: Context,
    queue: Mutex<Queue>,
    changed: Condvar,
    cancel: Cancel,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("context", &self.context).finish_non_exhaustive()
    }
}

impl Stream {
    pub(crate) fn start(context: Context) -> Arc<Self> {
        static STREAMS: AtomicU64 = AtomicU64::new(0);
        let number = STREAMS.fetch_add(1, Ordering::Relaxed);
        let settings = &sim().settings;
        let released = if settings.lazy { 0 } else { u64::MAX };
        let stream = Arc::new(Self {
            context,
            queue: Mutex::new(Queue { released, ..Queue::default() }),
            changed: Condvar::new(),
            cancel: Cancel::default(),
        });
        let delays = Delays::new(settings.seed.wrapping_add(number), settings.delay_us);
        let worker = Arc::clone(&stream);
        std::thread::spawn(move || worker.work(delays));
        stream
    }

    pub(crate) fn context(&self) -> Context {
        self.context
    }

    /// Adds a task. That one before it failed is told at the next synchronisation only.
    pub(crate) fn push(
        &self,
        task: impl FnOnce(&Cancel) -> Outcome + Send + 'static,
    ) -> Result<u64, Fault> {
        let mut queue = lock(&self.queue);
        if self.cancel.is_set() {
            return Err(Cancel::fault());
        }
        queue.submitted += 1;
        if queue.failed.is_none() {
            queue.tasks.push_back(Box::new(task));
        }
        self.changed.notify_all();
        Ok(queue.submitted)
    }

    /// The number of the last task, unless the stream was aborted.
    pub(crate) fn submitted(&self) -> Result<u64, Fault> {
        let submitted = lock(&self.queue).submitted;
        if self.cancel.is_set() { Err(Cancel::fault()) } else { Ok(submitted) }
    }

    /// Whether a task has run; it may run from now on.
    pub(crate) fn is_complete(&self, number: u64) -> Result<bool, Fault> {
        let mut queue = lock(&self.queue);
        self.release(&mut queue, number);
        Self::state(&queue, number)
    }

    /// Waits for a task. `None` is a wait that was given up.
    pub(crate) fn wait(
        &self,
        number: u64,
        limit: Option<Duration>,
        cancel: Option<&Cancel>,
    ) -> Result<Option<()>, Fault> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut queue = lock(&self.queue);
        self.release(&mut queue, number);
        loop {
            if Self::state(&queue, number)? {
                return Ok(Some(()));
            }
            let now = Instant::now();
            let left = deadline.map_or(TICK, |deadline| deadline.saturating_duration_since(now));
            if left.is_zero() || cancel.is_some_and(Cancel::is_set) {
                return Ok(None);
            }
            queue = self.pause(queue, left.min(TICK));
        }
    }

    fn state(queue: &Queue, number: u64) -> Result<bool, Fault> {
        if queue.completed >= number {
            return Ok(true);
        }
        if let Some(fault) = &queue.failed {
            return Err(fault.clone());
        }
        if queue.closed {
            let message = "the stream was destroyed before it ran this";
            return Err(fault(ACL_ERROR_RT_INTERNAL_ERROR, message));
        }
        Ok(false)
    }

    fn release(&self, queue: &mut Queue, number: u64) {
        if queue.released < number {
            queue.released = number;
            self.changed.notify_all();
        }
    }

    /// Drops what has not run, and ends what runs.
    pub(crate) fn abort(&self) {
        let mut queue = lock(&self.queue);
        self.cancel.0.store(true, Ordering::Relaxed);
        let dropped = std::mem::take(&mut queue.tasks);
        queue.failed.get_or_insert_with(Cancel::fault);
        self.changed.notify_all();
        drop(queue);
        drop(dropped);
    }

    /// Destroys the stream, without waiting.
    pub(crate) fn close(&self) {
        let mut queue = lock(&self.queue);
        self.cancel.0.store(true, Ordering::Relaxed);
        let dropped = std::mem::take(&mut queue.tasks);
        queue.closed = true;
        self.changed.notify_all();
        drop(queue);
        drop(dropped);
    }

    fn pause<'a>(&self, queue: MutexGuard<'a, Queue>, limit: Duration) -> MutexGuard<'a, Queue> {
        self.changed.wait_timeout(queue, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    fn work(&self, mut delays: Delays) {
        loop {
            let mut queue = lock(&self.queue);
            let task = loop {
                if queue.closed {
                    return;
                }
                if queue.completed < queue.released
                    && let Some(task) = queue.tasks.pop_front()
                {
                    break task;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            delays.pause();
            let outcome =
                if self.cancel.is_set() { Err(Cancel::fault()) } else { task(&self.cancel) };
            let mut queue = lock(&self.queue);
            let dropped = match outcome {
                Ok(()) => {
                    queue.completed += 1;
                    VecDeque::new()
                }
                Err(fault) => {
                    queue.failed.get_or_insert(fault);
                    std::mem::take(&mut queue.tasks)
                }
            };
            self.changed.notify_all();
            drop(queue);
            drop(dropped);
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) context: Context,
    pub(crate) record: Mutex<Option<(Arc<Stream>, u64)>>,
}

impl Event {
    /// Where it was recorded last.
    pub(crate) fn recorded(&self) -> Result<(Arc<Stream>, u64), Fault> {
        let record = lock(&self.record).clone();
        record.ok_or_else(|| fault(ACL_ERROR_RT_PARAM_INVALID, "the event was never recorded"))
    }
}

/// Random and repeatable delays (xorshift64*).
#[derive(Debug)]
struct Delays {
    state: u64,
    longest_us: u64,
}

impl Delays {
    fn new(seed: u64, longest_us: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, longest_us }
    }

    fn pause(&mut self) {
        if self.longest_us == 0 {
            return;
        }
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let random = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        std::thread::sleep(Duration::from_micros(random % (self.longest_us + 1)));
    }
}

//! An update on the trainer: weights from Python's iterators, pulled ahead of the engine in bounds.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use engine_core::{Error, ErrorKind, Result, SendReport, Weight, WeightStream};
use futures::Stream;
use pyo3::prelude::*;
use pyo3::types::PyIterator;

use crate::engines::Engine;
use crate::errors::{OrRaise, written};
use crate::tensor::{self, Reader};
use crate::work::{Own, Owner, Shared, Slot, lock, spawn};

/// So many weights wait for the engine, and not more than so many bytes unless a single one is larger. A change of threads
/// costs as much as some hundred small weights.
///
/// The bytes bound what nobody but the engine keeps: an iterator may make its tensors.
const MOST: usize = 4096;
const MOST_BYTES: u64 = 64 << 20;

/// The same on devices. The iterator's thread sleeps when so much waits, and is woken when half of it does. A device encodes that half
/// in the time that the thread takes to wake. The engine keeps two buckets of weights beside it.
const MOST_DEVICE_BYTES: u64 = 1 << 30;

/// For so long weights of a device are gathered whose producer is waited for once, unless the engine has none.
const GATHER: Duration = Duration::from_millis(2);

/// The engine is not woken more often than this.
const WAKE: Duration = Duration::from_micros(100);

#[derive(Default)]
pub(crate) struct State {
    queue: VecDeque<Result<Weight>>,
    bytes: u64,
    /// Whether the last one is on a device.
    on_device: bool,
    ended: bool,
    waker: Option<Waker>,
    done: Option<Result<SendReport>>,
}

impl State {
    /// Whether it is, with what was gathered.
    fn is_full(&self, gathered: &Gathered) -> bool {
        self.queue.len() + gathered.weights.len() >= MOST
            || self.bytes + gathered.bytes >= self.most_bytes().max(gathered.most_bytes())
    }

    /// Whether the engine waits for weights.
    fn is_awaited(&self) -> bool {
        self.queue.is_empty() && self.waker.is_some()
    }

    fn most_bytes(&self) -> u64 {
        if self.on_device { MOST_DEVICE_BYTES } else { MOST_BYTES }
    }

    /// Whether it is worth a change of threads to fill it.
    fn wants(&self) -> bool {
        self.done.is_some() || self.queue.len() <= MOST / 2 && self.bytes <= self.most_bytes() / 2
    }

    fn push(&mut self, weight: Result<Weight>) {
        if let Ok(weight) = &weight {
            self.bytes += weight.source_bytes();
            self.on_device = weight.reads_device();
        }
        self.queue.push_back(weight);
    }
}

/// Weights whose producers were not waited for.
struct Gathered {
    weights: Vec<Weight>,
    bytes: u64,
    since: Instant,
}

impl Gathered {
    fn new() -> Self {
        Self { weights: Vec::new(), bytes: 0, since: Instant::now() }
    }

    fn push(&mut self, weight: Weight) {
        if self.weights.is_empty() {
            self.since = Instant::now();
        }
        self.bytes += weight.source_bytes();
        self.weights.push(weight);
    }

    fn take(&mut self) -> Vec<Weight> {
        self.bytes = 0;
        std::mem::take(&mut self.weights)
    }

    /// There is one of a device among them, or nothing.
    fn most_bytes(&self) -> u64 {
        if self.weights.is_empty() { 0 } else { MOST_DEVICE_BYTES }
    }
}

struct Queue(Arc<Shared<State>>);

impl Stream for Queue {
    type Item = Result<Weight>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.0.with(|state| {
            let wanted = state.wants();
            match state.queue.pop_front() {
                Some(weight) => {
                    state.bytes -= weight.as_ref().map_or(0, Weight::source_bytes);
                    (Poll::Ready(Some(weight)), !wanted && state.wants())
                }
                None if state.ended => (Poll::Ready(None), false),
                None => {
                    state.waker = Some(cx.waker().clone());
                    (Poll::Pending, false)
                }
            }
        });
        if let (polled, true) = polled {
            self.0.change(|_| ());
            return polled;
        }
        polled.0
    }
}

/// An update that a trainer sends.
#[pyclass(frozen)]
#[derive(Debug)]
pub(crate) struct Sending {
    own: Own<Inner>,
}

struct Inner {
    shared: Arc<Shared<State>>,
    owner: Owner,
    reader: Mutex<Reader>,
}

impl Sending {
    pub(crate) fn start(slot: Arc<Slot<Engine>>, version: u64, part: bool) -> Result<Self> {
        const WHAT: &str = "sending weights";
        let shared = Arc::new(Shared::new(State::default()));
        let (owner, registration) = Owner::new();
        let (queue, finished) = (Queue(Arc::clone(&shared)), Arc::clone(&shared));
        let work = async move |owner: &Owner| {
            let mut engine = slot.take(WHAT, owner)?;
            engine.get()?.send(WeightStream::new(queue), version, part).await
        };
        let finish = move |result: Result<SendReport>| {
            // Weights that nobody took are dropped outside the lock.
            let rest = finished.change(|state| {
                state.done = Some(result);
                std::mem::take(&mut state.queue)
            });
            drop(rest);
        };
        spawn(WHAT, (owner.clone(), registration), work, finish)?;
        let reader = Mutex::default();
        Ok(Self { own: Own::new(Inner { shared, owner, reader }) })
    }
}

impl Inner {
    fn push(&self, weights: impl IntoIterator<Item = Result<Weight>>) {
        self.add(weights);
        self.wake();
    }

    fn add(&self, weights: impl IntoIterator<Item = Result<Weight>>) {
        self.shared.with(|state| {
            if state.done.is_none() {
                weights.into_iter().for_each(|weight| state.push(weight));
            }
        });
    }

    fn wake(&self) {
        if let Some(waker) = self.shared.with(|state| state.waker.take()) {
            waker.wake();
        }
    }

    fn end(&self) {
        let waker = self.shared.with(|state| {
            state.ended = true;
            state.waker.take()
        });
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether there is no room beside what was gathered, or it is over; and whether the engine waits for weights.
    fn is_full(&self, gathered: &Gathered) -> (bool, bool) {
        self.shared
            .with(|state| (state.done.is_some() || state.is_full(gathered), state.is_awaited()))
    }

    fn flush(&self, py: Python<'_>, gathered: &mut Gathered) {
        if gathered.weights.is_empty() {
            return;
        }
        let synchronized = lock(&self.reader).synchronize(py);
        let gathered = gathered.take();
        match synchronized {
            Ok(()) => self.push(gathered.into_iter().map(Ok)),
            Err(error) => self.push([Err(error)]),
        }
    }

    fn weight(&self, py: Python<'_>, item: &Bound<'_, PyAny>) -> PyResult<Weight> {
        let (name, tensor) = tensor::item(item)?;
        tensor::weight(&mut lock(&self.reader), py, &name, &tensor)
    }
}

#[pymethods]
impl Sending {
    /// Whether the engine wants weights, or the update is over; waits without the interpreter.
    fn wait_wanted(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let inner = self.own.get().or_raise(py)?;
        Ok(inner.shared.wait(py, Duration::from_secs_f64(seconds), State::wants))
    }

    fn wait_done(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let inner = self.own.get().or_raise(py)?;
        Ok(inner.shared.wait(py, Duration::from_secs_f64(seconds), |state| state.done.is_some()))
    }

    /// Calls back once when the engine wants weights.
    fn when_wanted(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        self.own.get().or_raise(py)?.shared.call_back(callback, State::wants);
        Ok(())
    }

    fn when_done(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        let inner = self.own.get().or_raise(py)?;
        inner.shared.call_back(callback, |state| state.done.is_some());
        Ok(())
    }

    #[getter]
    fn done(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.own.get().or_raise(py)?.shared.with(|state| state.done.is_some()))
    }

    /// Takes items of an iterator until enough wait; whether the iterator has more.
    fn pull(&self, py: Python<'_>, iterator: &Bound<'_, PyIterator>) -> PyResult<bool> {
        let inner = self.own.get().or_raise(py)?;
        let mut iterator = iterator.clone();
        let mut gathered = Gathered::new();
        let mut woken: Option<Instant> = None;
        let mut unseen = 0;
        loop {
            if unseen >= MOST_BYTES / 4 {
                // Tensors that the engine has done with are given back when a thread gets the interpreter.
                py.detach(|| unseen = 0);
            }
            let (full, awaited) = inner.is_full(&gathered);
            let patience = if awaited { WAKE } else { GATHER };
            if full || gathered.since.elapsed() > patience {
                inner.flush(py, &mut gathered);
            }
            if full {
                inner.wake();
                return Ok(true);
            }
            match iterator
                .next()
                .transpose()
                .and_then(|item| item.map(|item| inner.weight(py, &item)).transpose())
            {
                Ok(Some(weight)) if gathered.weights.is_empty() && !weight.reads_device() => {
                    unseen += weight.source_bytes();
                    inner.add([Ok(weight)]);
                    // Not for every weight of a fast iterator, at once for those of a slow one.
                    if woken.is_none_or(|woken| woken.elapsed() > WAKE) {
                        inner.wake();
                        woken = Some(Instant::now());
                    }
                }
                Ok(Some(weight)) => gathered.push(weight),
                Ok(None) => {
                    inner.flush(py, &mut gathered);
                    inner.end();
                    return Ok(false);
                }
                Err(error) => {
                    inner.flush(py, &mut gathered);
                    inner.wake();
                    return Err(error);
                }
            }
        }
    }

    /// Takes one item; whether there is room for more.
    fn put(&self, py: Python<'_>, item: &Bound<'_, PyAny>) -> PyResult<bool> {
        let inner = self.own.get().or_raise(py)?;
        let weight = inner.weight(py, item)?;
        let mut gathered = Gathered::new();
        if weight.reads_device() {
            gathered.push(weight);
            inner.flush(py, &mut gathered);
        } else {
            inner.push([Ok(weight)]);
        }
        Ok(!inner.is_full(&gathered).0)
    }

    /// There are no more.
    fn end(&self, py: Python<'_>) -> PyResult<()> {
        self.own.get().or_raise(py)?.end();
        Ok(())
    }

    /// The program's stream failed: tells all ranks why.
    fn fail(&self, py: Python<'_>, message: &str) -> PyResult<()> {
        let inner = self.own.get().or_raise(py)?;
        inner.push([Err(Error::new(ErrorKind::Source, "reading the trainer's weights", message))]);
        Ok(())
    }

    /// Aborts the update.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        self.own.get().or_raise(py)?.owner.abort();
        Ok(())
    }

    /// The report as JSON, once it is done.
    fn result(&self, py: Python<'_>) -> PyResult<String> {
        let inner = self.own.get().or_raise(py)?;
        inner.shared.with(|state| written("sending weights", state.done.as_ref())).or_raise(py)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nobody can hear of it any more.
        self.owner.abort();
    }
}

//! An update on a rollout: buckets as they come, their tensors as Python takes them.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use device_cuda::{CudaMemory, CudaSlice, Stream};
use engine_core::{
    ArenaArc, Error, ErrorKind, ErrorReport, ReceiveReport, ReceivedBucket, Result, Storage,
    TensorMeta, Weight, check_names,
};
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::engines::Engine;
use crate::errors::{OrRaise, written};
use crate::readers::Readers;
use crate::tensor::Tensor;
use crate::work::{Own, Owner, Shared, Slot, lock, spawn};

const WHAT: &str = "receiving weights";

/// So many buckets and bytes wait for Python.
const MOST: usize = 256;
const MOST_BYTES: u64 = 32 << 20;

/// The version that a rollout has, and its names.
pub(crate) type Names = Arc<Mutex<Option<(u64, Vec<Arc<str>>)>>>;

/// Something that every tensor in a bucket keeps: how many there are is how many are still used.
pub(crate) type Lease = Arc<()>;

/// How an update is received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    pub(crate) version: Option<u64>,
    /// Whether tensors get memory of their own, and their buckets go back at once.
    pub(crate) copy: bool,
    /// Whether it may have other names than the version before.
    pub(crate) partial: bool,
    /// Whether Python gets tensors of torch, and not our own.
    pub(crate) torch: bool,
}

#[derive(Default)]
pub(crate) struct State {
    version: Option<u64>,
    /// The tensors of the bucket that Python takes from.
    current: VecDeque<Tensor>,
    /// Those of buckets after it, which wait for Python.
    next: VecDeque<VecDeque<Tensor>>,
    next_bytes: u64,
    /// Whether Python has taken all that there was, and asked for more.
    asked: bool,
    closed: Option<ErrorReport>,
    waker: Option<Waker>,
    done: Option<Result<ReceiveReport>>,
    /// The last tensor that came; see `receive`.
    held: Option<Tensor>,
}

impl State {
    fn has(&self) -> bool {
        let next = self.next.iter().any(|tensors| !tensors.is_empty());
        next || !self.current.is_empty() || self.done.is_some()
    }

    /// Whether another bucket may be fetched. A large one waits alone; of small ones several do, so that not
    /// each of them costs a change of threads. An engine gives out what it has buckets for.
    fn has_room(&self) -> bool {
        self.next.len() < MOST && self.next_bytes < MOST_BYTES
    }

    /// Adds the tensors of a bucket, but for the last one, which waits for the next bucket.
    fn push(&mut self, mut tensors: VecDeque<Tensor>) {
        self.asked = false;
        let last = tensors.pop_back();
        if let Some(held) = std::mem::replace(&mut self.held, last) {
            tensors.push_front(held);
        }
        self.next_bytes += tensors.iter().map(Tensor::byte_len).sum::<u64>();
        self.next.push_back(tensors);
    }

    /// The tensors of the bucket that Python takes from, if there are any.
    fn current(&mut self) -> Option<&mut VecDeque<Tensor>> {
        while self.current.is_empty() {
            self.current = self.next.pop_front()?;
            self.next_bytes -= self.current.iter().map(Tensor::byte_len).sum::<u64>();
        }
        Some(&mut self.current)
    }

    fn close(&mut self, reason: Error) -> Option<Waker> {
        self.closed.get_or_insert_with(|| ErrorReport::from(&reason));
        self.waker.take()
    }
}

/// A tensor in memory of its own, where its buckets' memory is, of which a part has come.
struct Partial {
    meta: ArenaArc<TensorMeta>,
    bytes: Filling,
}

enum Filling {
    Host(Vec<u8>),
    Device { memory: CudaMemory, stream: Stream, filled: usize },
}

impl Partial {
    fn new(meta: ArenaArc<TensorMeta>, like: &Storage) -> Result<Self> {
        let len = usize::try_from(meta.byte_len()?).unwrap_or(usize::MAX);
        let bytes = match CudaSlice::of_storage(like) {
            Some(slice) => Filling::Device {
                memory: CudaMemory::new(slice.device(), len)?,
                stream: Stream::new(slice.device())?,
                filled: 0,
            },
            None => {
                let mut bytes = Vec::new();
                let large =
                    |_| Error::new(ErrorKind::Resource, WHAT, format!("no memory for {len} bytes"));
                bytes.try_reserve_exact(len).map_err(large).map_err(|e| e.tensor(&*meta.name))?;
                Filling::Host(bytes)
            }
        };
        Ok(Self { meta, bytes })
    }

    /// Adds what comes next of it.
    fn push(&mut self, part: &Storage) -> Result<()> {
        match (&mut self.bytes, CudaSlice::of_storage(part)) {
            (Filling::Host(bytes), _) => {
                let start = bytes.len();
                bytes.resize(start + part.len() as usize, 0);
                part.read(0, &mut bytes[start..])?;
            }
            (Filling::Device { .. }, Some(part)) if part.is_empty() => {}
            (Filling::Device { memory, stream, filled }, Some(part)) => {
                memory.slice(*filled, part.len())?.copy_from(&part, stream)?;
                // The bucket may be filled again when this returns.
                stream.synchronize()?;
                *filled += part.len();
            }
            (Filling::Device { .. }, None) => {
                let message = "a part of it is not where the others are";
                return Err(Error::new(ErrorKind::Protocol, WHAT, message).tensor(&*self.meta.name));
            }
        }
        Ok(())
    }

    fn is_whole(&self) -> Result<bool> {
        let filled = match &self.bytes {
            Filling::Host(bytes) => bytes.len(),
            Filling::Device { filled, .. } => *filled,
        };
        Ok(filled as u64 == self.meta.byte_len()?)
    }

    fn finish(self) -> Result<Tensor> {
        let bytes = match self.bytes {
            Filling::Host(bytes) => Storage::from(bytes),
            Filling::Device { memory, .. } => memory.all().storage(),
        };
        Weight::from_meta(self.meta, bytes).map(Tensor::new)
    }
}

/// The tensors that a bucket completes.
fn tensors(
    bucket: &ReceivedBucket,
    partial: &mut Option<Partial>,
    how: How,
    lease: &Lease,
) -> Result<VecDeque<Tensor>> {
    let mut tensors = VecDeque::with_capacity(bucket.pieces().len());
    let readers = Arc::new(Readers::default());
    for piece in bucket.pieces() {
        let len = piece.meta.byte_len()?;
        let on_device = piece.bytes.device().is_some();
        if piece.bytes.len() == len && (!how.copy || how.torch && on_device) {
            let readers = on_device.then(|| Arc::clone(&readers));
            if let Some(readers) = &readers {
                readers.keep(piece.bytes.clone());
            }
            let guard = (Arc::clone(lease), readers.clone());
            let weight = Weight::from_meta(piece.meta, piece.bytes.guarded(guard))?;
            let tensor = Tensor::in_bucket(weight, readers);
            tensors.push_back(if how.copy { tensor.lent() } else { tensor });
            continue;
        }
        if piece.start == 0 {
            *partial = Some(Partial::new(piece.meta, &piece.bytes)?);
        }
        // The engine has checked that the chunks of a weight follow one another.
        let Some(whole) = partial else { continue };
        whole.push(&piece.bytes)?;
        if whole.is_whole()?
            && let Some(whole) = partial.take()
        {
            tensors.push_back(whole.finish()?);
        }
    }
    Ok(tensors)
}

/// The same tensor in memory of its own.
fn own(tensor: Tensor) -> Result<Tensor> {
    let Some(bytes) = tensor.weight().storage() else { return Ok(tensor) };
    let mut copy = Partial::new(tensor.weight().meta().clone(), bytes)?;
    copy.push(bytes)?;
    copy.finish()
}

/// Gives Python the last tensor that came, in memory of its own.
///
/// The variable of a loop keeps a tensor, and so its bucket, until the next tensor comes. Where the next bucket
/// has no whole tensor, or there is none, that would stop the update, or the next one.
fn give_held(shared: &Shared<State>, torch: bool) -> Result<()> {
    if let Some(held) = shared.with(|state| state.held.take()) {
        let held = if torch && held.is_on_device() { held.lent() } else { own(held)? };
        shared.change(|state| {
            state.asked = false;
            state.next_bytes += held.byte_len();
            state.next.push_back(VecDeque::from([held]));
        });
    }
    Ok(())
}

async fn receive(
    engine: &mut Engine,
    how: How,
    names: &Names,
    lease: &Lease,
    shared: &Arc<Shared<State>>,
    owner: &Owner,
) -> Result<ReceiveReport> {
    let mut received = engine.receive(how.version).await?;
    let version = received.version();
    shared.change(|state| state.version = Some(version.0));
    let came = Arc::new(Mutex::new(Vec::new()));
    let check = (Arc::clone(shared), owner.clone(), Arc::clone(names), Arc::clone(&came));
    received.before_confirm(move || {
        let (shared, owner, names, came) = check;
        if !how.partial
            && let Some((_, expected)) = &*lock(&names)
        {
            check_names(expected, &lock(&came))?;
        }
        give_held(&shared, how.torch)?;
        // The version is one when Python has taken all of it. This thread is the update's own, and what
        // closes it says so here.
        let over = |state: &State| state.closed.is_some() || state.asked && !state.has();
        while !shared.wait_until(Some(Duration::from_millis(50)), over) {
            if owner.is_aborted() {
                return Err(Error::new(ErrorKind::Aborted, WHAT, "it was cancelled here"));
            }
        }
        shared.with(|state| state.closed.clone().map_or(Ok(()), |reason| Err(reason.into())))
    });
    let mut partial = None;
    loop {
        let step = {
            let mut next = pin!(received.next_bucket());
            poll_fn(|cx| {
                let (closed, has_room) = shared.with(|state| {
                    state.waker = Some(cx.waker().clone());
                    (state.closed.clone(), state.has_room())
                });
                match closed {
                    Some(reason) => Poll::Ready(Err(reason)),
                    None if has_room => next.as_mut().poll(cx).map(Ok),
                    None => Poll::Pending,
                }
            })
            .await
        };
        let bucket = match step {
            Ok(bucket) => bucket?,
            Err(reason) => {
                received.fail(reason.clone().into());
                return Err(reason.into());
            }
        };
        let Some(bucket) = bucket else { break };
        lock(&came).extend(
            bucket.pieces().filter(|piece| piece.start == 0).map(|piece| piece.meta.name.clone()),
        );
        let taken = tensors(&bucket, &mut partial, how, lease);
        drop(bucket);
        match taken {
            Ok(tensors) if tensors.is_empty() => give_held(shared, how.torch)?,
            Ok(tensors) => shared.change(|state| state.push(tensors)),
            Err(error) => {
                let error = error.version(version);
                let report = ErrorReport::from(&error);
                received.fail(error);
                return Err(report.into());
            }
        }
    }
    let report = received.finish().await?;
    *lock(names) = Some((version.0, std::mem::take(&mut *lock(&came))));
    Ok(report)
}

/// An update that a rollout receives.
#[pyclass(frozen)]
#[derive(Debug)]
pub(crate) struct Receiving {
    own: Own<Inner>,
}

struct Inner {
    shared: Arc<Shared<State>>,
    owner: Owner,
    torch: bool,
}

impl Receiving {
    pub(crate) fn start(
        slot: Arc<Slot<Engine>>,
        names: Names,
        lease: Lease,
        how: How,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::new(State::default()));
        let (owner, registration) = Owner::new();
        let (state, finished) = (Arc::clone(&shared), Arc::clone(&shared));
        let work = async move |owner: &Owner| {
            let mut engine = slot.take(WHAT, owner)?;
            receive(engine.get()?, how, &names, &lease, &state, owner).await
        };
        let finish = move |result: Result<ReceiveReport>| {
            let failed = result.is_err();
            let rest = finished.change(|state| {
                state.done = Some(result);
                // Tensors of a version that will never be one are not given out.
                failed.then(|| {
                    let rest =
                        (std::mem::take(&mut state.current), std::mem::take(&mut state.next));
                    (rest, state.held.take())
                })
            });
            drop(rest);
        };
        spawn(WHAT, (owner.clone(), registration), work, finish)?;
        Ok(Self { own: Own::new(Inner { shared, owner, torch: how.torch }) })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close(Error::new(ErrorKind::Aborted, WHAT, "the rollout gave the update up"));
        // One that waits for its beginning is not wanted either.
        if self.shared.with(|state| state.version.is_none()) {
            self.owner.abort();
        }
    }
}

impl Inner {
    fn close(&self, reason: Error) {
        self.owner.end();
        if let Some(waker) = self.shared.change(|state| state.close(reason)) {
            waker.wake();
        }
    }
}

/// A tensor and its name, as Python has them.
type Named<'py> = (Bound<'py, PyString>, Bound<'py, PyAny>);

impl Inner {
    /// Takes of the tensors of a bucket that are here, if there are any.
    fn take<T>(&self, take: impl FnOnce(&mut VecDeque<Tensor>) -> T) -> Option<T> {
        let (taken, asked, waker) = self.shared.with(|state| {
            let full = !state.has_room();
            if let Some(tensors) = state.current() {
                let taken = take(tensors);
                let waker = if full && state.has_room() { state.waker.take() } else { None };
                return (Some(taken), false, waker);
            }
            let first = !state.asked;
            state.asked = true;
            (None, first, state.waker.take())
        });
        if let Some(waker) = waker {
            waker.wake();
        }
        if asked {
            self.shared.change(|_| ());
        }
        taken
    }

    fn named<'py>(&self, py: Python<'py>, tensor: Tensor) -> PyResult<Named<'py>> {
        let name = PyString::new(py, tensor.weight().name());
        let tensor = match self.torch {
            true => tensor.torch(py)?,
            false => Bound::new(py, tensor)?.into_any(),
        };
        Ok((name, tensor))
    }
}

#[pymethods]
impl Receiving {
    /// Whether the update has begun, or is over; waits without the interpreter.
    fn wait_begun(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let inner = self.own.get().or_raise(py)?;
        let begun = |state: &State| state.version.is_some() || state.done.is_some();
        Ok(inner.shared.wait(py, Duration::from_secs_f64(seconds), begun))
    }

    fn when_begun(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        let begun = |state: &State| state.version.is_some() || state.done.is_some();
        self.own.get().or_raise(py)?.shared.call_back(callback, begun);
        Ok(())
    }

    /// Whether there is a tensor, or the update is over; waits without the interpreter.
    fn wait_more(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let inner = self.own.get().or_raise(py)?;
        Ok(inner.shared.wait(py, Duration::from_secs_f64(seconds), State::has))
    }

    fn when_more(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        self.own.get().or_raise(py)?.shared.call_back(callback, State::has);
        Ok(())
    }

    fn wait_done(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let inner = self.own.get().or_raise(py)?;
        Ok(inner.shared.wait(py, Duration::from_secs_f64(seconds), |state| state.done.is_some()))
    }

    fn when_done(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        let inner = self.own.get().or_raise(py)?;
        inner.shared.call_back(callback, |state| state.done.is_some());
        Ok(())
    }

    #[getter]
    fn version(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        Ok(self.own.get().or_raise(py)?.shared.with(|state| state.version))
    }

    #[getter]
    fn done(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.own.get().or_raise(py)?.shared.with(|state| state.done.is_some()))
    }

    /// The next tensor that is here; without one, the engine is told that all before it were taken.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Option<Named<'py>>> {
        let inner = self.own.get().or_raise(py)?;
        let tensor = inner.take(VecDeque::pop_front);
        tensor.flatten().map(|tensor| inner.named(py, tensor)).transpose()
    }

    /// As `take`, all that are here of one bucket.
    fn take_bucket<'py>(&self, py: Python<'py>) -> PyResult<Option<Vec<Named<'py>>>> {
        let inner = self.own.get().or_raise(py)?;
        let tensors = inner.take(std::mem::take);
        let named = |tensors: VecDeque<Tensor>| {
            tensors.into_iter().map(|tensor| inner.named(py, tensor)).collect()
        };
        tensors.map(named).transpose()
    }

    /// Gives the update up, on every rank.
    fn fail(&self, py: Python<'_>, message: &str) -> PyResult<()> {
        let inner = self.own.get().or_raise(py)?;
        inner.close(Error::new(ErrorKind::Aborted, WHAT, message));
        Ok(())
    }

    /// Ends it, also while it waits for its beginning.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.own.get().or_raise(py)?;
        inner.close(Error::new(ErrorKind::Aborted, WHAT, "it was cancelled here"));
        inner.owner.abort();
        Ok(())
    }

    /// The report as JSON, once it is done.
    fn result(&self, py: Python<'_>) -> PyResult<String> {
        let inner = self.own.get().or_raise(py)?;
        inner.shared.with(|state| written(WHAT, state.done.as_ref())).or_raise(py)
    }
}

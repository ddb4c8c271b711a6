//! The native module of the Python package `ckpt_engine`.
//!
//! It has the smallest interface that Python needs to drive engines, in jobs that never hold the interpreter
//! while they work or wait. What people use is in `ckpt_engine/`, in Python.

#![deny(unsafe_code)]

mod destination;
mod engines;
mod errors;
mod ffi;
mod lending;
mod logs;
mod readers;
mod receiving;
mod sending;
mod tensor;
mod work;

use std::sync::Arc;
use std::time::Duration;

use checkpoint_engine::placed::TensorState;
use engine_core::{Error, ErrorKind, Result};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::destination::Destination;
use crate::engines::{Control, Messages, Reach};
use crate::errors::{OrRaise, exception, not_now, written};
use crate::lending::{Lending, Lent};
use crate::receiving::{How, Lease, Names, Receiving};
use crate::sending::Sending;
use crate::work::{Own, Owner, Shared, Slot, check_process, spawn};

type Answer = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

type Answered = Arc<Shared<Option<Result<Answer>>>>;

/// Work under way that has one result.
#[pyclass(frozen)]
#[derive(Debug)]
struct Job {
    own: Own<(Answered, Owner)>,
}

impl Job {
    fn start<T: Send + 'static>(
        what: &'static str,
        work: impl AsyncFnOnce(&Owner) -> Result<T> + Send + 'static,
        answer: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> Result<Self> {
        check_process()?;
        let shared = Arc::new(Shared::new(None));
        let (owner, registration) = Owner::new();
        let finished = Arc::clone(&shared);
        let finish = move |result: Result<T>| {
            let result =
                result.map(|value| Box::new(move |py: Python<'_>| answer(py, value)) as Answer);
            finished.change(|state| *state = Some(result));
        };
        spawn(what, (owner.clone(), registration), work, finish)?;
        Ok(Self { own: Own::new((shared, owner)) })
    }
}

#[pymethods]
impl Job {
    fn wait_done(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let (shared, _) = self.own.get().or_raise(py)?;
        Ok(shared.wait(py, Duration::from_secs_f64(seconds), Option::is_some))
    }

    fn when_done(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        self.own.get().or_raise(py)?.0.call_back(callback, Option::is_some);
        Ok(())
    }

    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        self.own.get().or_raise(py)?.1.abort();
        Ok(())
    }

    /// The result, once.
    fn result(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let (shared, _) = self.own.get().or_raise(py)?;
        match shared.with(Option::take) {
            Some(Ok(answer)) => answer(py),
            Some(Err(error)) => Err(exception(py, &error)),
            None => Err(exception(py, &crate::errors::not_now("asking a job", "it has no result"))),
        }
    }
}

/// A duration that Python gave.
fn seconds(name: &str, seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| {
        Error::new(ErrorKind::Config, "reading a time", format!("{name}={seconds}: {error}"))
    })
}

#[pyclass(frozen, name = "Control")]
#[derive(Debug)]
struct PyControl {
    own: Own<Control>,
}

fn control_answer(py: Python<'_>, control: Control) -> PyResult<Py<PyAny>> {
    Ok(Py::new(py, PyControl { own: Own::new(control) })?.into_any())
}

fn reach(
    address: String,
    token: Vec<u8>,
    connect: Option<f64>,
    heartbeat: Option<f64>,
) -> Result<Reach> {
    let connect_timeout = connect.map(|s| seconds("connect_timeout", s)).transpose()?;
    let heartbeat_timeout = heartbeat.map(|s| seconds("heartbeat_timeout", s)).transpose()?;
    Ok(Reach { address, token, connect_timeout, heartbeat_timeout })
}

#[pymethods]
impl PyControl {
    #[staticmethod]
    fn lead(
        py: Python<'_>,
        address: String,
        token: Vec<u8>,
        heartbeat_timeout: Option<f64>,
    ) -> PyResult<Job> {
        let reach = reach(address, token, None, heartbeat_timeout).or_raise(py)?;
        let work = async move |_: &Owner| Control::lead(reach).await;
        Job::start("leading a group", work, control_answer).or_raise(py)
    }

    #[staticmethod]
    fn join(
        py: Python<'_>,
        address: String,
        token: Vec<u8>,
        trainer: bool,
        rank: Option<u32>,
        connect_timeout: Option<f64>,
        heartbeat_timeout: Option<f64>,
    ) -> PyResult<Job> {
        let reach = reach(address, token, connect_timeout, heartbeat_timeout).or_raise(py)?;
        let work = async move |_: &Owner| Control::join(reach, trainer, rank).await;
        Job::start("joining a group", work, control_answer).or_raise(py)
    }

    #[getter]
    fn address(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.own.get().or_raise(py)?.address())
    }

    #[getter]
    fn rank(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.own.get().or_raise(py)?.rank())
    }

    #[getter]
    fn is_trainer(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.own.get().or_raise(py)?.is_trainer())
    }

    fn ranks(&self, py: Python<'_>) -> PyResult<Vec<u32>> {
        let control = self.own.get().or_raise(py)?;
        Ok(py.detach(|| control.ranks()))
    }

    fn barrier(&self, py: Python<'_>, name: String, timeout: f64) -> PyResult<Job> {
        let control = self.own.get().or_raise(py)?.clone();
        let timeout = seconds("timeout", timeout).or_raise(py)?;
        let work = async move |_: &Owner| control.barrier(&name, timeout).await;
        Job::start("waiting in a barrier", work, |py, ()| Ok(py.None())).or_raise(py)
    }

    fn channel(&self, py: Python<'_>, number: u16) -> PyResult<PyChannel> {
        let channel = self.own.get().or_raise(py)?.channel(number).or_raise(py)?;
        Ok(PyChannel { own: Own::new(Arc::new(channel)) })
    }

    fn close(&self, py: Python<'_>) -> PyResult<Job> {
        let control = self.own.get().or_raise(py)?.clone();
        let work = async move |_: &Owner| control.close().await;
        Job::start("closing the control plane", work, |py, ()| Ok(py.None())).or_raise(py)
    }
}

#[pyclass(frozen, name = "Channel")]
#[derive(Debug)]
struct PyChannel {
    own: Own<Arc<Messages>>,
}

#[pymethods]
impl PyChannel {
    fn send(&self, py: Python<'_>, to: u32, body: Vec<u8>) -> PyResult<()> {
        let channel = self.own.get().or_raise(py)?;
        py.detach(|| channel.send(to, body)).or_raise(py)
    }

    fn recv(&self, py: Python<'_>, timeout: f64) -> PyResult<Job> {
        let channel = Arc::clone(self.own.get().or_raise(py)?);
        let timeout = seconds("timeout", timeout).or_raise(py)?;
        let work = async move |_: &Owner| channel.recv(timeout).await;
        let answer = |py: Python<'_>, message: Option<(u32, bytes::Bytes)>| {
            let message = message.map(|(from, body)| (from, PyBytes::new(py, &body)));
            Ok(message.into_pyobject(py)?.into_any().unbind())
        };
        Job::start("waiting for a message", work, answer).or_raise(py)
    }
}

#[pyclass(frozen, name = "Engine")]
#[derive(Debug)]
struct PyEngine {
    own: Own<Rank>,
}

/// An engine, and what Python's end of it knows.
struct Rank {
    slot: Arc<Slot<engines::Engine>>,
    names: Names,
    lease: Lease,
    lending: Option<Arc<Lending>>,
}

impl PyEngine {
    fn new(engine: engines::Engine, lending: Option<Arc<Lending>>) -> Self {
        let slot = Arc::new(Slot::new("engine", engine));
        let (names, lease) = (Names::default(), Lease::default());
        Self { own: Own::new(Rank { slot, names, lease, lending }) }
    }
}

impl Rank {
    /// What the tensors hold that this rank lends; nothing that is sure while an update is awaited or under way.
    fn state(&self) -> Option<TensorState> {
        self.slot.look(|engine| engine.state().cloned()).flatten()
    }
}

#[pymethods]
impl PyEngine {
    /// Forms the group; the job's result is the engine and, as JSON, what all ranks said.
    #[staticmethod]
    #[expect(clippy::too_many_arguments, reason = "those of `form_group` of the package")]
    fn form(
        py: Python<'_>,
        control: &PyControl,
        config: Option<&str>,
        path: Option<&str>,
        world_size: Option<u32>,
        attributes: &str,
        timeout: f64,
        lent: Option<&Lent>,
    ) -> PyResult<Job> {
        let control = control.own.get().or_raise(py)?.clone();
        let config = engines::read_config(config, path).or_raise(py)?;
        let timeout = seconds("timeout", timeout).or_raise(py)?;
        let attributes = serde_json::from_str(attributes).map_err(|error| {
            Error::new(ErrorKind::Config, "reading the attributes", error.to_string())
        });
        let attributes = attributes.or_raise(py)?;
        let lending = lent.map(|lent| lent.lending(py)).transpose()?;
        let tensors = lent.map(|lent| lent.tensors(&config)).transpose().or_raise(py)?;
        let work = async move |_: &Owner| match tensors {
            None => engines::Engine::form(&control, config, world_size, attributes, timeout).await,
            Some(tensors) => {
                engines::Engine::lend(&control, config, tensors, world_size, attributes, timeout)
                    .await
            }
        };
        let answer = |py: Python<'_>, (engine, peers): (_, Vec<_>)| {
            let peers = serde_json::to_string(&peers).unwrap_or_default();
            Ok((Self::new(engine, lending), peers).into_pyobject(py)?.into_any().unbind())
        };
        Job::start("forming the group", work, answer).or_raise(py)
    }

    /// Forms a group within this process; the job's result is the trainer's engine and those of the rollouts.
    #[staticmethod]
    fn form_local(
        py: Python<'_>,
        config: Option<&str>,
        path: Option<&str>,
        rollouts: usize,
    ) -> PyResult<Job> {
        let config = engines::read_config(config, path).or_raise(py)?;
        let work = async move |_: &Owner| engines::Engine::form_local(config, rollouts).await;
        let answer = |py: Python<'_>, (trainer, rollouts): (_, Vec<_>)| {
            let rollouts: Vec<Self> =
                rollouts.into_iter().map(|one| Self::new(one, None)).collect();
            Ok((Self::new(trainer, None), rollouts).into_pyobject(py)?.into_any().unbind())
        };
        Job::start("forming the group", work, answer).or_raise(py)
    }

    fn send(&self, py: Python<'_>, version: u64, part: bool) -> PyResult<Sending> {
        let rank = self.own.get().or_raise(py)?;
        Sending::start(Arc::clone(&rank.slot), version, part).or_raise(py)
    }

    /// Attests the version that was sent last; the job's result is the report as JSON.
    fn attest(&self, py: Python<'_>) -> PyResult<Job> {
        const WHAT: &str = "attesting a version";
        let slot = Arc::clone(&self.own.get().or_raise(py)?.slot);
        let work = async move |owner: &Owner| {
            let report = slot.take(WHAT, owner)?.get()?.attest().await;
            written(WHAT, Some(&report))
        };
        let answer =
            |py: Python<'_>, report: String| Ok(report.into_pyobject(py)?.into_any().unbind());
        Job::start(WHAT, work, answer).or_raise(py)
    }

    fn receive(
        &self,
        py: Python<'_>,
        version: Option<u64>,
        copy: bool,
        partial: bool,
        torch: bool,
    ) -> PyResult<Receiving> {
        let rank = self.own.get().or_raise(py)?;
        let how = How { version, copy, partial, torch };
        let (slot, names) = (Arc::clone(&rank.slot), Arc::clone(&rank.names));
        Receiving::start(slot, names, Arc::clone(&rank.lease), how).or_raise(py)
    }

    /// Receives an update into tensors; the job's result is the report as JSON.
    fn receive_into(
        &self,
        py: Python<'_>,
        destination: &Destination,
        version: Option<u64>,
    ) -> PyResult<Job> {
        let rank = self.own.get().or_raise(py)?;
        let (slot, names) = (Arc::clone(&rank.slot), Arc::clone(&rank.names));
        let tensors = destination.tensors(py)?;
        let work = async move |owner: &Owner| {
            let report = destination::receive(&slot, &names, &tensors, version, owner).await;
            written(destination::WHAT, Some(&report))
        };
        let answer =
            |py: Python<'_>, report: String| Ok(report.into_pyobject(py)?.into_any().unbind());
        Job::start(destination::WHAT, work, answer).or_raise(py)
    }

    /// Takes part in an update of the tensors that this rank lends; the job's result is the report as JSON.
    fn update(&self, py: Python<'_>, version: Option<u64>) -> PyResult<Job> {
        const WHAT: &str = "updating";
        let rank = self.own.get().or_raise(py)?;
        let lending = rank.lending.as_ref();
        lending
            .ok_or_else(|| not_now(WHAT, "this rank lends no tensors"))
            .or_raise(py)?
            .check(py)?;
        let slot = Arc::clone(&rank.slot);
        let work = async move |owner: &Owner| {
            let report = slot.take(WHAT, owner)?.get()?.update(version).await;
            written(WHAT, Some(&report))
        };
        let answer =
            |py: Python<'_>, report: String| Ok(report.into_pyobject(py)?.into_any().unbind());
        Job::start(WHAT, work, answer).or_raise(py)
    }

    /// What the tensors hold that this rank lends.
    #[getter]
    fn state(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(match self.own.get().or_raise(py)?.state() {
            Some(TensorState::Empty) => "empty",
            Some(TensorState::Active(_)) => "active",
            None | Some(TensorState::Updating { .. }) => "updating",
        })
    }

    /// How many tensors that are in buckets Python still has.
    #[getter]
    fn held(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(Arc::strong_count(&self.own.get().or_raise(py)?.lease) - 1)
    }

    /// The last version that is complete here, on a rollout.
    #[getter]
    fn version(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let rank = self.own.get().or_raise(py)?;
        Ok(match (&rank.lending, rank.state()) {
            (None, _) => work::lock(&rank.names).as_ref().map(|(version, _)| *version),
            (Some(_), Some(TensorState::Active(version))) => Some(version.0),
            (Some(_), _) => None,
        })
    }

    fn finalize(&self, py: Python<'_>) -> PyResult<Job> {
        const WHAT: &str = "finalizing an engine";
        let slot = Arc::clone(&self.own.get().or_raise(py)?.slot);
        let work = async move |owner: &Owner| {
            if slot.is_gone() {
                return Ok(());
            }
            match slot.take(WHAT, owner)?.keep() {
                Some(engine) => engine.finalize().await,
                None => Ok(()),
            }
        };
        Job::start(WHAT, work, |py, ()| Ok(py.None())).or_raise(py)
    }
}

/// A new secret for a group.
#[pyfunction]
fn generate_token(py: Python<'_>) -> PyResult<Py<PyBytes>> {
    Ok(PyBytes::new(py, &engines::new_token().or_raise(py)?).unbind())
}

/// The secret in a file that only its owner can read.
#[pyfunction]
fn read_token(py: Python<'_>, path: &str) -> PyResult<Py<PyBytes>> {
    let token = py.detach(|| engines::read_token(path)).or_raise(py)?;
    Ok(PyBytes::new(py, &token).unbind())
}

/// Checks a configuration: nothing, or the error that an engine would raise.
#[pyfunction]
fn check_config(py: Python<'_>, config: Option<&str>, path: Option<&str>) -> PyResult<()> {
    engines::read_config(config, path).or_raise(py).map(drop)
}

/// Which of a model's weights become FP8 as a configuration says, and their scales; the types have the names that torch gives them.
#[pyfunction]
fn quantized(
    py: Python<'_>,
    config: &str,
    weights: Vec<(String, String, Vec<usize>)>,
) -> PyResult<Vec<lending::Scales>> {
    let config = engines::read_config(Some(config), None).or_raise(py)?;
    let typed = |(name, dtype, shape): (String, String, Vec<usize>)| {
        let dtype = tensor::named(&dtype).ok_or_else(|| {
            let message = format!("no type is called {dtype}");
            Error::new(ErrorKind::Weight, "deciding what is quantised", message).tensor(&*name)
        })?;
        Ok((name, dtype, shape))
    };
    let weights: engine_core::Result<Vec<_>> = weights.into_iter().map(typed).collect();
    weights.and_then(|weights| lending::quantized(&config, weights)).or_raise(py)
}

/// Aborts all work under way; whether it ended in time.
#[pyfunction]
fn end_all(py: Python<'_>, seconds: f64) -> bool {
    if work::is_forked() {
        return true;
    }
    py.detach(|| work::end_all(Duration::from_secs_f64(seconds)))
}

/// What is compiled in.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    let registry = checkpoint_engine::registry();
    let names: Vec<&str> = registry.backends().map(|backend| backend.name()).collect();
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("backends", names)?;
    info.set_item("cuda", cfg!(feature = "cuda"))?;
    Ok(info)
}

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::{
        Job, PyChannel, PyControl, PyEngine, build_info, check_config, end_all, generate_token,
        quantized, read_token,
    };
    #[pymodule_export]
    use crate::destination::Destination;
    #[pymodule_export]
    use crate::lending::{Fp8, Lent, Part};
    #[pymodule_export]
    use crate::logs::{collect_logs, next_logs};
    #[pymodule_export]
    use crate::receiving::Receiving;
    #[pymodule_export]
    use crate::sending::Sending;
    #[pymodule_export]
    use crate::tensor::Tensor;
}

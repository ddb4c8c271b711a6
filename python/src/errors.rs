//! Errors of engines as exceptions.

use engine_core::{Error, ErrorKind, ErrorReport, Result};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use serde::Serialize;

static RAISE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// The exception for an error: the class of its kind, with all of its context.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|failed| failed)
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let from_report = RAISE.get_or_try_init(py, || {
        py.import("ckpt_engine.errors")?.getattr("_from_report").map(Bound::unbind)
    })?;
    let report = ErrorReport::from(error);
    let fields = PyDict::new(py);
    fields.set_item("kind", format!("{:?}", report.kind))?;
    fields.set_item("recovery", format!("{:?}", report.recovery))?;
    fields.set_item("operation", &report.operation)?;
    fields.set_item("message", &report.message)?;
    fields.set_item("rank", report.rank.map(|rank| rank.0))?;
    fields.set_item("bucket", report.bucket)?;
    fields.set_item("tensor", &report.tensor)?;
    fields.set_item("version", report.version.map(|version| version.0))?;
    fields.set_item("text", report.to_string())?;
    Ok(PyErr::from_value(from_report.bind(py).call1((fields,))?))
}

/// A call that the state of an engine does not allow: Python's objects have all phases.
pub(crate) fn not_now(operation: &str, message: &str) -> Error {
    Error::new(ErrorKind::State, operation, message)
}

/// The report of an update as JSON, once it is over.
pub(crate) fn written<R: Serialize>(operation: &str, done: Option<&Result<R>>) -> Result<String> {
    match done {
        Some(Ok(report)) => serde_json::to_string(report)
            .map_err(|error| Error::new(ErrorKind::State, "writing a report", error.to_string())),
        Some(Err(error)) => Err(ErrorReport::from(error).into()),
        None => Err(not_now(operation, "the update is not over")),
    }
}

/// Results of engines as results of Python.
pub(crate) trait OrRaise<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for engine_core::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| exception(py, &error))
    }
}

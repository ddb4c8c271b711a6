//! What the engine has to say, for Python's `logging`.
//!
//! Threads of the engine never wait for the interpreter: they leave records here, and a thread of Python
//! hands them to its loggers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::LazyLock;
use std::time::Duration;

use pyo3::prelude::*;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::work::Shared;

/// So many records wait; the oldest are dropped before that.
const MOST: usize = 4096;

#[derive(Default)]
struct Records {
    waiting: VecDeque<Record>,
    dropped: u64,
}

/// Level, target, text.
type Record = (u8, String, String);

static RECORDS: LazyLock<Arc<Shared<Records>>> =
    LazyLock::new(|| Arc::new(Shared::new(Records::default())));

#[derive(Debug)]
struct ToPython;

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.fields.push_str(&format!(" {}={value:?}", field.name()));
        }
    }
}

impl<S: Subscriber> Layer<S> for ToPython {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let metadata = event.metadata();
        let level = match *metadata.level() {
            Level::ERROR => 40,
            Level::WARN => 30,
            Level::INFO => 20,
            Level::DEBUG => 10,
            Level::TRACE => 5,
        };
        let record = (level, metadata.target().replace("::", "."), text.message + &text.fields);
        RECORDS.change(|records| {
            if records.waiting.len() >= MOST {
                records.waiting.pop_front();
                records.dropped += 1;
            }
            records.waiting.push_back(record);
        });
    }
}

/// Begins to collect records of at least a level of Python's `logging`; whether nobody did before.
#[pyfunction]
pub(crate) fn collect_logs(level: u8) -> bool {
    let level = match level {
        0..=9 => LevelFilter::TRACE,
        10..=19 => LevelFilter::DEBUG,
        20..=29 => LevelFilter::INFO,
        30..=39 => LevelFilter::WARN,
        _ => LevelFilter::ERROR,
    };
    tracing_subscriber::registry().with(ToPython.with_filter(level)).try_init().is_ok()
}

/// The records that wait; waits for one without the interpreter.
#[pyfunction]
pub(crate) fn next_logs(py: Python<'_>, seconds: f64) -> Vec<Record> {
    let timeout = Duration::from_secs_f64(seconds);
    RECORDS.wait(py, timeout, |records| !records.waiting.is_empty());
    RECORDS.with(|records| {
        let dropped = std::mem::take(&mut records.dropped);
        let mut waiting: Vec<Record> = records.waiting.drain(..).collect();
        if dropped > 0 {
            let text = format!("{dropped} records were dropped: nobody took them in time");
            waiting.insert(0, (30, "ckpt_engine".into(), text));
        }
        waiting
    })
}

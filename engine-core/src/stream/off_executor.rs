//! `off_executor`: a source that blocks, on a thread of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};

use futures::StreamExt;
use futures::channel::mpsc;
use futures::executor::block_on;
use futures::sink::SinkExt;

use super::{IntoWeight, WeightStream};
use crate::{Error, ErrorKind, Result, Weight};

pub(super) fn off_executor<I>(source: I, ahead: usize) -> WeightStream<'static>
where
    I: IntoIterator<Item: IntoWeight> + Send + 'static,
{
    // The channel holds one item per sender beyond its capacity.
    let (sender, receiver) = mpsc::channel(ahead.saturating_sub(1));
    let mut to_engine = sender.clone();
    let produce = move || {
        let mut to_engine = sender;
        for weight in source {
            if block_on(to_engine.send(weight.into_weight())).is_err() {
                return; // The engine dropped the stream.
            }
        }
    };
    let thread = std::thread::Builder::new().name("ckpt-source".into()).spawn(move || {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(produce)) {
            let words = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            // Without this, a source that panicked would look like one that ended. A send fails
            // only if nobody is left to be told.
            drop(block_on(to_engine.send(Err(failed(format!("the source panicked: {words}"))))));
        }
    });
    match thread {
        Ok(_) => WeightStream::new(receiver),
        Err(error) => {
            let item: Result<Weight> =
                Err(failed("its thread could not be started".into()).with_source(error));
            WeightStream::new(futures::stream::iter([item]).chain(futures::stream::empty()))
        }
    }
}

fn failed(message: String) -> Error {
    Error::new(ErrorKind::Source, "reading the trainer's weights", message)
}

//! Buckets on a device, and the streams of Python's libraries that read them.
//!
//! A library enqueues work that reads a tensor, lets go of the tensor, and goes on. Its bucket goes back to the engine,
//! which has it filled again, when that work is done.

use std::sync::mpsc::{Sender, channel};
use std::sync::{LazyLock, Mutex};

use device_cuda::{CudaError, Device, ForeignStream, Pending};
use engine_core::Storage;

use crate::work::lock;

type Waiting = (Vec<Pending>, Vec<Storage>);

/// What all tensors of a bucket share.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    streams: Mutex<Vec<ForeignStream>>,
    bytes: Mutex<Vec<Storage>>,
}

impl Readers {
    /// Keeps bytes until nobody reads them any more.
    pub(crate) fn keep(&self, bytes: Storage) {
        lock(&self.bytes).push(bytes);
    }

    /// A stream reads the bucket, or any stream without one.
    ///
    /// # Safety
    ///
    /// As [`ForeignStream::new`].
    #[expect(unsafe_code, reason = "hands the caller's promise on")]
    pub(crate) unsafe fn add(&self, device: &Device, stream: Option<usize>) {
        let mut streams = lock(&self.streams);
        if !streams.iter().any(|known| known.is(device, stream)) {
            // SAFETY: the caller's.
            streams.push(unsafe { ForeignStream::new(device, stream) });
        }
    }
}

/// Waits on a thread of its own: threads of Python have the interpreter, and a device that they chose.
static WAITING: LazyLock<Option<Sender<Waiting>>> = LazyLock::new(|| {
    let (sender, receiver) = channel::<Waiting>();
    let wait = move || receiver.into_iter().for_each(wait_for);
    std::thread::Builder::new().name("ckpt-readers".into()).spawn(wait).ok().map(|_| sender)
});

fn wait_for((readers, bytes): Waiting) {
    readers.iter().map(Pending::wait).for_each(said);
    drop(bytes);
}

fn said(result: Result<(), CudaError>) {
    if let Err(error) = result {
        tracing::debug!(%error, "work that read a bucket has failed");
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        let mut readers = Vec::new();
        // What streams have to do now, not when the thread comes to it: until then they may be given more work, behind which
        // the bucket would wait for nothing.
        for stream in std::mem::take(&mut *lock(&self.streams)) {
            match stream.pending() {
                Ok(pending) if pending.is_nothing() => {}
                Ok(pending) => readers.push(pending),
                Err(error) => said(Err(error)),
            }
        }
        if readers.is_empty() {
            return;
        }
        let waiting = (readers, std::mem::take(&mut *lock(&self.bytes)));
        match &*WAITING {
            None => wait_for(waiting),
            Some(sender) => {
                if let Err(unsent) = sender.send(waiting) {
                    wait_for(unsent.0);
                }
            }
        }
    }
}

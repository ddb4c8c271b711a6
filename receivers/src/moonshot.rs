//! The protocol of Moonshot's checkpoint-engine, which servers of both kinds speak: buckets by CUDA IPC, of which workers are
//! told by ZeroMQ.
//!
//! A server is asked once for a whole update, with an address for each GPU that has the buckets, and answers when the update is
//! over. Each of its workers connects to the address of its GPU. It is told where all buckets are, and then of each of them what
//! lies where, and answers each time that it has done its part: with nothing, or with what went wrong. It waits for the next
//! word without an end, and its engine with it; so an update that does not come to its end is called off.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use collective::SharedSlot;
use engine_core::clock::within;
use engine_core::{Error, ErrorKind, Recovery, Result};
use futures::FutureExt;
use futures::future::{BoxFuture, Fuse, FusedFuture, join_all, select_all, try_join_all};
use serde_json::{Map, Value};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::task::{AbortHandle, JoinError, JoinHandle};

use crate::chunk::Tensors;
use crate::http::{Client, no_answer};
use crate::pickle::Pickle;
use crate::shared::{ANY_DEVICE, arguments};
use crate::zmtp::Requests;

/// How long a server may take to say that its update failed, once its worker was told so.
const CALLING_OFF: Duration = Duration::from_secs(5);

/// A server's workers, which are told by ZeroMQ where buckets are.
#[derive(Debug, Default)]
pub(crate) struct Workers {
    /// Where all buckets are, on each GPU that has them.
    buffers: OnceLock<Vec<SharedSlot>>,
    /// How many they are.
    count: AtomicU32,
    session: Mutex<Option<Session>>,
}

/// An update that is under way.
#[derive(Debug)]
struct Session {
    /// Where the worker of each GPU connects, if the server has one there.
    listeners: Vec<UnixListener>,
    /// Those that have, and the GPUs that they are on.
    workers: Vec<(usize, Requests<UnixStream>)>,
    /// How many there are.
    count: usize,
    /// What the server says of the whole update.
    update: Fuse<JoinHandle<Result<()>>>,
    abort: AbortHandle,
    limit: Duration,
    operation: String,
}

impl Workers {
    /// Where all buckets are, from now on.
    pub(crate) fn reads(&self, buffers: Vec<SharedSlot>) {
        // A second time never comes: slots are opened once.
        drop(self.buffers.set(buffers));
    }

    /// How many they are.
    pub(crate) fn are(&self, count: u32) {
        self.count.store(count, Ordering::Relaxed);
    }

    fn buffers(&self) -> Result<&[SharedSlot]> {
        let buffers = self.buffers.get().filter(|buffers| !buffers.is_empty());
        buffers
            .map(Vec::as_slice)
            .ok_or_else(|| state("there is no memory that workers could read"))
    }

    /// Looks whether a server's workers speak the protocol, and are where the buckets are: one that is asked for an update without an
    /// address says that the one of its GPU is missing. `lacks` are words by which a server says that it cannot, `remedy` what
    /// changes it.
    ///
    /// # Errors
    ///
    /// `Config` if they do not, or are on another GPU; what the server says else.
    pub(crate) async fn look(
        &self,
        client: &Client,
        path: &str,
        body: &Value,
        lacks: &[&str],
        remedy: &str,
    ) -> Result<()> {
        // Within an update, whose others may have failed, it has shown all that.
        if self.session.lock().await.is_some() {
            return Ok(());
        }
        let answer = client.post(path, Some(body), client.long).await?;
        let (gpus, words) = (self.buffers()?.iter().map(gpu).collect::<Vec<_>>(), answer.words());
        match gpu_in(&words) {
            _ if answer.is_success() => Err(client.odd(path, &answer)),
            Some(gpu) if gpus.iter().any(|own| gpu.eq_ignore_ascii_case(own)) => Ok(()),
            Some(gpu) => {
                let message = format!(
                    "a worker is on {gpu}, and buckets are on {}: list the GPUs of all workers in `devices`",
                    gpus.join(", ")
                );
                Err(Error::new(ErrorKind::Config, client.operation(path), message))
            }
            None if lacks.iter().any(|lack| words.contains(lack)) => {
                Err(client.refusal(path, &answer, remedy))
            }
            None => client.done(path, &answer),
        }
    }

    /// Has a server's workers connect, and tells them where all buckets are. The server is asked by a request with the addresses of
    /// all GPUs; no single step takes longer than `limit`.
    ///
    /// # Errors
    ///
    /// What the server or its worker says; `Timeout`.
    pub(crate) async fn begin(
        &self,
        limit: Duration,
        operation: String,
        request: impl FnOnce(Value) -> BoxFuture<'static, Result<()>>,
    ) -> Result<()> {
        self.call_off().await;
        let (mut listeners, mut addresses, mut places) = (Vec::new(), Map::new(), Vec::new());
        for buffer in self.buffers()? {
            let rebuild = Pickle::Global("torch.multiprocessing.reductions", "rebuild_cuda_tensor");
            let place = Pickle::Tuple(arguments(buffer, ANY_DEVICE));
            places.push(Pickle::Tuple(vec![rebuild, place]).to_bytes());
            // No other update of any trainer has this name, which is no file.
            let name = format!("ckpt-engine-{:016x}", RandomState::new().hash_one(&operation));
            let listener = UnixListener::bind(format!("\0{name}"));
            listeners.push(listener.map_err(|error| Error::io(operation.clone(), error))?);
            addresses.insert(gpu(buffer), format!("ipc://@{name}").into());
        }
        let update = tokio::spawn(request(addresses.into()));
        let abort = update.abort_handle();
        let (update, workers) = (update.fuse(), Vec::new());
        let count = self.count.load(Ordering::Relaxed).max(1) as usize;
        let session = Session { listeners, workers, count, update, abort, limit, operation };
        let mut open = self.session.lock().await;
        let session = open.insert(session);
        session.connect().await?;
        session.ask(|gpu| &places[gpu]).await
    }

    /// What workers are told of a bucket, which is at the same place of the buffers of all GPUs.
    pub(crate) fn describe(&self, tensors: &Tensors) -> Vec<u8> {
        let start = |places: &[SharedSlot]| places.first().map_or(0, |place| place.start);
        let buffers = self.buffers.get().map_or(&[][..], Vec::as_slice);
        let slot = start(&tensors.shared).saturating_sub(start(buffers));
        let all = tensors.parts().into_iter().enumerate().map(|(index, part)| {
            let shape = tensors.shapes[index].iter().map(|side| Pickle::size(*side)).collect();
            Pickle::Dict(vec![
                (Pickle::text("name"), Pickle::text(&*tensors.names[index])),
                (Pickle::text("shape"), Pickle::Tuple(shape)),
                (Pickle::text("dtype"), Pickle::Global("torch", tensors.types[index])),
                (Pickle::text("offset"), Pickle::size(slot + part.start)),
            ])
        });
        Pickle::List(all.collect()).to_bytes()
    }

    /// Has the workers load a bucket; ends when they have.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    pub(crate) async fn update(&self, described: &[u8]) -> Result<()> {
        match &mut *self.session.lock().await {
            Some(session) => session.ask(|_| described).await,
            None => Err(state("no update is under way")),
        }
    }

    /// Has the workers let go of the buckets, and make of what they loaded what the server computes with.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    pub(crate) async fn finish(&self) -> Result<()> {
        let mut open = self.session.lock().await;
        let Some(session) = &mut *open else { return Err(state("no update is under way")) };
        let end = Pickle::None.to_bytes();
        session.ask(|_| &end).await?;
        session.tell_last(&end).await?;
        *open = None;
        Ok(())
    }

    /// Calls off what is under way, if anything is: the workers fail, and the server's engine is free again.
    pub(crate) async fn call_off(&self) {
        let mut open = self.session.lock().await;
        if let Some(session) = &mut *open {
            session.call_off().await;
        }
        *open = None;
    }
}

/// What workers call the GPU that a buffer is on.
fn gpu(buffer: &SharedSlot) -> String {
    format!("GPU-{}", buffer.device)
}

fn state(message: &str) -> Error {
    Error::new(ErrorKind::State, "telling workers of buckets", message)
}

fn lost(operation: &str, error: JoinError) -> Error {
    Error::new(ErrorKind::Aborted, operation, error.to_string())
}

/// Waits for something that happens unless the update fails. What the server says of that is the cause.
async fn unless_it_fails<T>(
    update: &mut Fuse<JoinHandle<Result<()>>>,
    limit: Duration,
    operation: &str,
    step: impl Future<Output = std::io::Result<T>>,
) -> Result<T> {
    let cause = |said: std::result::Result<Result<()>, JoinError>| match said {
        Ok(Ok(())) => Error::new(ErrorKind::Protocol, operation, "its worker has ended too early"),
        Ok(Err(error)) => error,
        Err(error) => lost(operation, error),
    };
    let done = within(limit, async {
        tokio::select! {
            done = step => Ok(done),
            said = &mut *update => Err(cause(said)),
        }
    });
    match done.await {
        None => Err(no_answer(operation, limit)),
        Some(Err(cause)) => Err(cause),
        Some(Ok(Ok(done))) => Ok(done),
        Some(Ok(Err(broken))) => match within(CALLING_OFF.min(limit), update).await {
            Some(said) => Err(cause(said)),
            None => Err(Error::io(operation, broken)),
        },
    }
}

/// The next worker that connects, and its GPU. One of which a worker has connected has no other.
async fn next(
    listeners: &[UnixListener],
    workers: &[(usize, Requests<UnixStream>)],
) -> std::io::Result<(usize, Requests<UnixStream>)> {
    let is_free = |gpu: usize| workers.iter().all(|(of, _)| *of != gpu);
    let free = listeners.iter().enumerate().filter(|(gpu, _)| is_free(*gpu));
    let accepts: Vec<_> =
        free.map(|(gpu, listener)| async move { (gpu, listener.accept().await) }.boxed()).collect();
    if accepts.is_empty() {
        return std::future::pending().await;
    }
    let ((gpu, accepted), ..) = select_all(accepts).await;
    Ok((gpu, Requests::open(accepted?.0).await?))
}

impl Session {
    async fn connect(&mut self) -> Result<()> {
        let Self { listeners, workers, count, update, limit, operation, .. } = self;
        while workers.len() < *count {
            let connected = next(listeners, workers);
            let worker = unless_it_fails(update, *limit, operation, connected).await?;
            workers.push(worker);
        }
        Ok(())
    }

    /// Tells each worker something that it does, which may depend on its GPU.
    async fn ask<'a>(&mut self, request: impl Fn(usize) -> &'a [u8]) -> Result<()> {
        let Self { workers, update, limit, operation, .. } = self;
        let asked = workers.iter_mut().map(|(gpu, worker)| worker.ask(request(*gpu)));
        let answers = unless_it_fails(update, *limit, operation, try_join_all(asked)).await?;
        answers.iter().try_for_each(|answer| judge(answer, operation))
    }

    /// Tells the workers the last thing of all. Their answers and the server's are sent by different ways, and come in any order.
    async fn tell_last(&mut self, request: &[u8]) -> Result<()> {
        let Self { workers, update, limit, operation, .. } = self;
        let asked = try_join_all(workers.iter_mut().map(|(_, worker)| worker.ask(request)));
        let ended = within(*limit, async {
            tokio::select! {
                said = &mut *update => said,
                answers = asked => {
                    let answers = answers.unwrap_or_default();
                    match answers.iter().try_for_each(|answer| judge(answer, operation)) {
                        Ok(()) => (&mut *update).await,
                        Err(error) => Ok(Err(error)),
                    }
                }
            }
        });
        let said = ended.await.ok_or_else(|| no_answer(operation, *limit))?;
        said.unwrap_or_else(|error| Err(lost(operation, error)))
    }

    async fn call_off(&mut self) {
        if self.update.is_terminated() {
            return;
        }
        let words = vec![Pickle::text("the trainer has called the update off")];
        let error = Pickle::Call(Box::new(Pickle::Global("builtins", "RuntimeError")), words);
        let error = error.to_bytes();
        let Self { listeners, workers, update, .. } = self;
        let called_off = async {
            // One that is told nothing any more is no reason not to tell the others.
            join_all(workers.iter_mut().map(|(_, worker)| worker.say(&error))).await;
            // Those that have not connected yet hear of it when they do. One that never does is of a server that fails.
            loop {
                let late = tokio::select! {
                    said = &mut *update => break Ok::<_, std::io::Error>(said),
                    late = next(listeners, workers) => late?,
                };
                workers.push(late);
                if let Some((_, worker)) = workers.last_mut() {
                    worker.say(&error).await?;
                }
            }
        };
        match within(CALLING_OFF.min(self.limit), called_off).await {
            Some(Ok(said)) => tracing::debug!(?said, "an update was called off"),
            failed => tracing::warn!(
                operation = self.operation,
                ?failed,
                "the server does not end an update that was called off: it may have to be started anew"
            ),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

/// What a worker's answer means: it has done its part, or says what went wrong.
fn judge(answer: &[u8], operation: &str) -> Result<()> {
    if answer.is_empty() {
        return Ok(());
    }
    let message = format!("its worker failed: {}", last_words(answer));
    Err(Error::new(ErrorKind::Io, operation, message).recovery(Recovery::Retry))
}

/// The GPU that somebody names.
fn gpu_in(words: &str) -> Option<&str> {
    let (start, _) = words.match_indices("GPU-").find(|(at, prefix)| {
        words[at + prefix.len()..].starts_with(|first: char| first.is_ascii_hexdigit())
    })?;
    let name = &words[start..];
    let is_part = |part: char| part.is_ascii_hexdigit() || part == '-';
    let end = name[4..].find(|part| !is_part(part)).map_or(name.len(), |end| end + 4);
    Some(&name[..end])
}

/// The end of a worker's traceback, which is what went wrong.
fn last_words(words: &[u8]) -> String {
    let words = String::from_utf8_lossy(words);
    let line = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.trim().chars().take(crate::http::MAX_WORDS).collect()
}

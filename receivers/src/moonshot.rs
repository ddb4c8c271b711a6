//! The protocol of Moonshot's checkpoint-engine, which both kinds of servers speak: buckets by CUDA IPC, of which workers learn by ZeroMQ.
//!
//! A server gets one request for a whole update, with an address for each GPU that has the buckets, and answers when the update is over.
//! Each of its workers connects to the address of its GPU. The worker is told where all buckets are, and then the contents of each bucket.
//! It answers each message when it has done its part: with nothing, or with an error. It waits for the next message without an end, and so
//! does its engine. So an update that is not completed is called off.

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

/// How long a server may take to report that its update failed, once its workers were told so.
const CALLING_OFF: Duration = Duration::from_secs(5);

/// A server's workers, which learn by ZeroMQ where buckets are.
#[derive(Debug, Default)]
pub(crate) struct Workers {
    /// Where all buckets are, on each GPU that has them.
    buffers: OnceLock<Vec<SharedSlot>>,
    /// The number of workers.
    count: AtomicU32,
    session: Mutex<Option<Session>>,
}

/// An update that is under way.
#[derive(Debug)]
struct Session {
    /// Where the worker of each GPU connects, if the server has one on that GPU.
    listeners: Vec<UnixListener>,
    /// The workers that have connected, with the indices of their GPUs.
    workers: Vec<(usize, Requests<UnixStream>)>,
    /// The number of workers that are expected.
    count: usize,
    /// The request for the whole update.
    update: Fuse<JoinHandle<Result<()>>>,
    abort: AbortHandle,
    limit: Duration,
    operation: String,
}

impl Workers {
    /// Sets where all buckets are.
    pub(crate) fn reads(&self, buffers: Vec<SharedSlot>) {
        // It is set only once, because slots are opened once.
        drop(self.buffers.set(buffers));
    }

    /// Sets the number of workers.
    pub(crate) fn are(&self, count: u32) {
        self.count.store(count, Ordering::Relaxed);
    }

    fn buffers(&self) -> Result<&[SharedSlot]> {
        let buffers = self.buffers.get().filter(|buffers| !buffers.is_empty());
        buffers
            .map(Vec::as_slice)
            .ok_or_else(|| state("there is no memory that workers could read"))
    }

    /// Checks that a server's workers speak the protocol, and are on GPUs that have the buckets. A server that is asked for an update
    /// without an address names the GPU whose address is missing. `lacks` are words by which a server says that it cannot, `remedy` is the
    /// remedy for that.
    ///
    /// # Errors
    ///
    /// `Config` if they do not, or are on another GPU; else the server's own error.
    pub(crate) async fn look(
        &self,
        client: &Client,
        path: &str,
        body: &Value,
        lacks: &[&str],
        remedy: &str,
    ) -> Result<()> {
        // Within an update it has shown all that. A world may be formed again because other servers failed.
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

    /// Makes a server's workers connect, and tells them where all buckets are. `request` asks the server for an update, with the addresses
    /// of all GPUs. No single step takes longer than `limit`.
    ///
    /// # Errors
    ///
    /// The error of the server or of its worker; `Timeout`.
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
            // An abstract socket, not a file. The name is unique among the updates of all trainers.
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

    /// Describes a bucket to workers. It is at the same place of the buffers of all GPUs.
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

    /// Makes the workers load a bucket. Returns when they have.
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

    /// Makes the workers release the buckets, and activate what they loaded.
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

    /// Calls off the update that is under way, if there is one: the workers fail, and the server's engine is free again.
    pub(crate) async fn call_off(&self) {
        let mut open = self.session.lock().await;
        if let Some(session) = &mut *open {
            session.call_off().await;
        }
        *open = None;
    }
}

/// The workers' name of the GPU of a buffer.
fn gpu(buffer: &SharedSlot) -> String {
    format!("GPU-{}", buffer.device)
}

fn state(message: &str) -> Error {
    Error::new(ErrorKind::State, "telling workers of buckets", message)
}

fn lost(operation: &str, error: JoinError) -> Error {
    Error::new(ErrorKind::Aborted, operation, error.to_string())
}

/// Waits for a step, unless the update fails. The error that the server reports is the cause.
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

/// The next worker that connects, and its GPU. Each GPU has at most one worker.
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

    /// Makes a request to each worker, which may depend on its GPU.
    async fn ask<'a>(&mut self, request: impl Fn(usize) -> &'a [u8]) -> Result<()> {
        let Self { workers, update, limit, operation, .. } = self;
        let asked = workers.iter_mut().map(|(gpu, worker)| worker.ask(request(*gpu)));
        let answers = unless_it_fails(update, *limit, operation, try_join_all(asked)).await?;
        answers.iter().try_for_each(|answer| judge(answer, operation))
    }

    /// Makes the last request to the workers. Their answers and the server's take different ways, and come in any order.
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
            // All are told, even if one can no longer be reached.
            join_all(workers.iter_mut().map(|(_, worker)| worker.say(&error))).await;
            // Workers that have not connected yet are told when they do. If one never does, its server fails.
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

/// Interprets a worker's answer: empty if it has done its part, else an error.
fn judge(answer: &[u8], operation: &str) -> Result<()> {
    if answer.is_empty() {
        return Ok(());
    }
    let message = format!("its worker failed: {}", last_words(answer));
    Err(Error::new(ErrorKind::Io, operation, message).recovery(Recovery::Retry))
}

/// The name of a GPU in a message.
fn gpu_in(words: &str) -> Option<&str> {
    let (start, _) = words.match_indices("GPU-").find(|(at, prefix)| {
        words[at + prefix.len()..].starts_with(|first: char| first.is_ascii_hexdigit())
    })?;
    let name = &words[start..];
    let is_part = |part: char| part.is_ascii_hexdigit() || part == '-';
    let end = name[4..].find(|part| !is_part(part)).map_or(name.len(), |end| end + 4);
    Some(&name[..end])
}

/// The last line of a worker's traceback, which is the error.
fn last_words(words: &[u8]) -> String {
    let words = String::from_utf8_lossy(words);
    let line = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.trim().chars().take(crate::http::MAX_WORDS).collect()
}

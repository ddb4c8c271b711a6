//! The protocol of Moonshot's checkpoint-engine, which servers of both kinds speak: buckets by CUDA IPC, of which workers are
//! told by ZeroMQ.
//!
//! A server is asked once for a whole update, with an address for each of its GPUs, and answers when the update is over. Its
//! worker connects to the address. It is told where all buckets are, and then of each of them what lies where, and answers
//! each time that it has done its part: with nothing, or with what went wrong. It waits for the next word without an end, and
//! its engine with it; so an update that does not come to its end is called off.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::time::Duration;

use collective::SharedSlot;
use engine_core::clock::within;
use engine_core::{Error, ErrorKind, Recovery, Result};
use futures::FutureExt;
use futures::future::{BoxFuture, Fuse, FusedFuture};
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::task::{AbortHandle, JoinError, JoinHandle};

use crate::chunk::Tensors;
use crate::http::{Client, no_answer};
use crate::pickle::Pickle;
use crate::shared::arguments;
use crate::zmtp::Requests;

/// How long a server may take to say that its update failed, once its worker was told so.
const CALLING_OFF: Duration = Duration::from_secs(5);

/// A server whose worker is told by ZeroMQ where buckets are.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    /// Where all buckets are.
    buffer: OnceLock<SharedSlot>,
    session: Mutex<Option<Session>>,
}

/// An update that is under way.
#[derive(Debug)]
struct Session {
    /// Where the worker connects.
    listener: UnixListener,
    /// There once it has.
    requests: Option<Requests<UnixStream>>,
    /// What the server says of the whole update.
    update: Fuse<JoinHandle<Result<()>>>,
    abort: AbortHandle,
    limit: Duration,
    operation: String,
}

impl Worker {
    /// Where all buckets are, from now on.
    pub(crate) fn reads(&self, buffer: SharedSlot) {
        // A second one never comes: slots are opened once.
        drop(self.buffer.set(buffer));
    }

    fn buffer(&self) -> Result<&SharedSlot> {
        self.buffer.get().ok_or_else(|| state("there is no memory that workers could read"))
    }

    /// What workers call the trainer's GPU.
    ///
    /// # Errors
    ///
    /// `State` before there are buckets.
    pub(crate) fn gpu(&self) -> Result<String> {
        Ok(format!("GPU-{}", self.buffer()?.device))
    }

    /// Looks whether a server's worker speaks the protocol, and is on the trainer's GPU: one that is asked for an update without an
    /// address says that the one of its GPU is missing. `lacks` are words by which a server says that it cannot, `remedy` what
    /// changes it.
    ///
    /// # Errors
    ///
    /// `Config` if it does not, or is on another GPU; what the server says else.
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
        let (own, words) = (self.gpu()?, answer.words());
        match gpu_in(&words) {
            _ if answer.is_success() => Err(client.odd(path, &answer)),
            Some(gpu) if gpu.eq_ignore_ascii_case(&own) => Ok(()),
            Some(gpu) => {
                let message = format!(
                    "its worker is on {gpu}, and the trainer on {own}; buckets are read on one GPU"
                );
                Err(Error::new(ErrorKind::Config, client.operation(path), message))
            }
            None if lacks.iter().any(|lack| words.contains(lack)) => {
                Err(client.refusal(path, &answer, remedy))
            }
            None => client.done(path, &answer),
        }
    }

    /// Has a server's worker connect, and tells it where all buckets are. The server is asked by a request with the addresses of
    /// its GPUs; no single step takes longer than `limit`.
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
        let rebuild = Pickle::Global("torch.multiprocessing.reductions", "rebuild_cuda_tensor");
        let place = Pickle::Tuple(arguments(self.buffer()?));
        let place = Pickle::Tuple(vec![rebuild, place]).to_bytes();
        // No other update of any trainer has this name, which is no file.
        let name = format!("ckpt-engine-{:016x}", RandomState::new().hash_one(&operation));
        let listener = UnixListener::bind(format!("\0{name}"));
        let listener = listener.map_err(|error| Error::io(operation.clone(), error))?;
        let addresses = json!({ self.gpu()?: format!("ipc://@{name}") });
        let update = tokio::spawn(request(addresses));
        let abort = update.abort_handle();
        let update = update.fuse();
        let session = Session { listener, requests: None, update, abort, limit, operation };
        let mut open = self.session.lock().await;
        let session = open.insert(session);
        session.connect().await?;
        session.ask(&place).await
    }

    /// What a worker is told of a bucket.
    pub(crate) fn describe(&self, tensors: &Tensors) -> Vec<u8> {
        let start = |place: Option<&SharedSlot>| place.map_or(0, |place| place.start);
        let slot = start(tensors.shared.as_ref()).saturating_sub(start(self.buffer.get()));
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

    /// Has the worker load a bucket; ends when it has.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    pub(crate) async fn update(&self, described: &[u8]) -> Result<()> {
        match &mut *self.session.lock().await {
            Some(session) => session.ask(described).await,
            None => Err(state("no update is under way")),
        }
    }

    /// Has the worker let go of the buckets, and make of what it loaded what the server computes with.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    pub(crate) async fn finish(&self) -> Result<()> {
        let mut open = self.session.lock().await;
        let Some(session) = &mut *open else { return Err(state("no update is under way")) };
        let end = Pickle::None.to_bytes();
        session.ask(&end).await?;
        session.tell_last(&end).await?;
        *open = None;
        Ok(())
    }

    /// Calls off what is under way, if anything is: the worker fails, and the server's engine is free again.
    pub(crate) async fn call_off(&self) {
        let mut open = self.session.lock().await;
        if let Some(session) = &mut *open {
            session.call_off().await;
        }
        *open = None;
    }
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

impl Session {
    async fn connect(&mut self) -> Result<()> {
        let Self { listener, requests, update, limit, operation, .. } = self;
        let connected = async { Requests::open(listener.accept().await?.0).await };
        *requests = Some(unless_it_fails(update, *limit, operation, connected).await?);
        Ok(())
    }

    /// Tells the worker something that it does.
    async fn ask(&mut self, request: &[u8]) -> Result<()> {
        let Self { requests, update, limit, operation, .. } = self;
        let Some(requests) = requests else { return Err(state("no worker is connected")) };
        let answer = unless_it_fails(update, *limit, operation, requests.ask(request)).await?;
        judge(&answer, operation)
    }

    /// Tells the worker the last thing of all. Its answer and the server's are sent by different ways, and come in any order.
    async fn tell_last(&mut self, request: &[u8]) -> Result<()> {
        let Self { requests, update, limit, operation, .. } = self;
        let Some(requests) = requests else { return Err(state("no worker is connected")) };
        let ended = within(*limit, async {
            tokio::select! {
                said = &mut *update => said,
                answer = requests.ask(request) => match judge(&answer.unwrap_or_default(), operation) {
                    Ok(()) => (&mut *update).await,
                    Err(error) => Ok(Err(error)),
                },
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
        let called_off = async {
            if self.requests.is_none() {
                let (stream, _) = self.listener.accept().await?;
                self.requests = Some(Requests::open(stream).await?);
            }
            if let Some(requests) = &mut self.requests {
                requests.say(&error.to_bytes()).await?;
            }
            // What it was sent is there for the worker when the connection is closed.
            self.requests = None;
            Ok::<_, std::io::Error>((&mut self.update).await)
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

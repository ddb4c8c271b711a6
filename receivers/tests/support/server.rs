//! A server that keeps to the contract of vLLM or of SGLang to the letter, and is wrong on purpose on request.
//!
//! As there: one operation at a time, and none that waits in a collective ever ends by itself. What is the same for both
//! is here: processes, connections, and what is wrong on purpose; what differs is in `vllm_contract.rs` and
//! `sglang_contract.rs`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use engine_core::Weight;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::collectives::{DEVICES, Member};
use super::sglang_contract::{self, Group};
use super::vllm_contract;

/// What a server does instead of answering.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Wrong {
    /// It answers with an error, and does nothing.
    Refuses(&'static str),
    /// It never answers, and does nothing.
    Silent,
    /// It does what it is asked for and never says so.
    DoesNotSay,
    /// It takes so long to begin.
    Slow(Duration),
    /// Its process dies.
    Dies,
    /// It does everything and then says that it failed.
    FailsAfterwards(&'static str),
}

/// Whose contract a server keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contract {
    Vllm,
    Sglang,
}

impl Contract {
    /// The backend that sends to such servers.
    pub(crate) fn backend(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
        }
    }
}

/// How a server was started.
#[derive(Clone, Debug)]
pub(crate) struct Started {
    pub(crate) contract: Contract,
    pub(crate) dev_mode: bool,
    /// Its `--weight-transfer-config`.
    pub(crate) backend: Option<&'static str>,
    pub(crate) workers: u32,
    /// SGLang's `--dp-size`.
    pub(crate) replicas: u32,
    /// vLLM's `VLLM_ALLOW_INSECURE_SERIALIZATION`.
    pub(crate) insecure: bool,
    /// Whether its workers speak the protocol of Moonshot's checkpoint-engine.
    pub(crate) extension: bool,
    /// Where its checkpoint is.
    pub(crate) checkpoint: Option<std::path::PathBuf>,
    /// SGLang's `--api-key` and `--admin-api-key`.
    pub(crate) keys: Option<(&'static str, &'static str)>,
    /// The GPUs that its workers are on.
    pub(crate) gpus: &'static [&'static str],
}

impl Default for Started {
    fn default() -> Self {
        let (contract, backend) = (Contract::Vllm, Some("nccl"));
        Self {
            contract,
            dev_mode: true,
            backend,
            workers: 1,
            replicas: 1,
            insecure: true,
            extension: true,
            checkpoint: None,
            keys: None,
            gpus: &DEVICES,
        }
    }
}

impl Started {
    pub(crate) fn sglang() -> Self {
        Self { contract: Contract::Sglang, ..Self::default() }
    }

    /// The GPUs of its workers.
    pub(crate) fn workers_gpus(&self) -> &'static [&'static str] {
        &self.gpus[..self.workers as usize]
    }
}

/// The bytes of a model's tensors, by their names.
pub(crate) type Tensors = BTreeMap<String, Vec<u8>>;

#[derive(Debug, Default)]
pub(super) struct Layer {
    pub(super) loaded: u64,
    pub(super) buffered: Tensors,
}

#[derive(Debug)]
pub(super) struct State {
    /// Type, shape and size of what the model has.
    pub(super) expected: BTreeMap<String, (String, Vec<u64>)>,
    pub(super) weights: Tensors,
    /// What vLLM has loaded of layers that are not whole.
    pub(super) layers: BTreeMap<String, Layer>,
    /// Whether it is within an update.
    pub(super) active: bool,
    pub(super) paused: bool,
    pub(super) version: String,
    pub(super) members: Option<Vec<Member>>,
    pub(super) limit: u64,
    /// Whether vLLM was told that tensors come together: by one broadcast, or behind one handle.
    pub(super) packed: bool,
    /// The names, types and shapes that vLLM was told last.
    pub(super) last_told: (Vec<Value>, Vec<Value>, Vec<Value>),
    /// The groups of SGLang's workers, by their names in torch.
    pub(super) groups: BTreeMap<String, Group>,
    wrong: Vec<(String, usize, Wrong)>,
    asked: Vec<String>,
    dead: bool,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) started: Started,
    pub(super) state: Mutex<State>,
    /// The engine does one thing at a time.
    pub(super) engine: tokio::sync::Mutex<()>,
    /// All that the process is at.
    work: Mutex<Vec<tokio::task::AbortHandle>>,
}

impl Shared {
    /// What it does wrong at this one of whatever is counted by a name: a path, or buckets.
    pub(super) fn wrong_at(&self, what: &str) -> Option<Wrong> {
        let mut found = None;
        lock(&self.state).wrong.retain_mut(|(of, nth, wrong)| {
            let is_now = *of == what && *nth == 0;
            if is_now {
                found = Some(wrong.clone());
            } else if *of == what {
                *nth -= 1;
            }
            !is_now
        });
        found
    }

    pub(super) fn die(&self) {
        lock(&self.state).dead = true;
        lock(&self.work).iter().for_each(tokio::task::AbortHandle::abort);
    }
}

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

fn torch(weight: &Weight) -> &'static str {
    use engine_core::DType as D;
    match weight.meta().dtype {
        D::BF16 => "bfloat16",
        D::F32 => "float32",
        D::F8_E4M3 => "float8_e4m3fn",
        other => unreachable!("{other}"),
    }
}

pub(super) fn item_size(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "bfloat16" => 2,
        "float32" => 4,
        "float8_e4m3fn" => 1,
        _ => return None,
    })
}

pub(crate) fn tensors(weights: &[Weight]) -> Tensors {
    let bytes = |weight: &Weight| weight.to_bytes().expect("bytes").to_vec();
    weights.iter().map(|weight| (weight.name().to_owned(), bytes(weight))).collect()
}

impl Server {
    /// A server with a model.
    pub(crate) async fn start(model: &[Weight], started: Started) -> Self {
        Self::start_at("127.0.0.1:0".parse().expect("an address"), model, started).await
    }

    async fn start_at(address: SocketAddr, model: &[Weight], started: Started) -> Self {
        let listener = TcpListener::bind(address).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let described = model.iter().map(|weight| {
            (weight.name().to_owned(), (torch(weight).to_owned(), weight.meta().shape.to_vec()))
        });
        let state = State {
            expected: described.collect(),
            weights: tensors(model),
            layers: BTreeMap::new(),
            active: false,
            paused: false,
            version: "default".into(),
            members: None,
            limit: 0,
            packed: false,
            last_told: Default::default(),
            groups: BTreeMap::new(),
            wrong: Vec::new(),
            asked: Vec::new(),
            dead: false,
        };
        let shared = Arc::new(Shared {
            started,
            state: Mutex::new(state),
            engine: Default::default(),
            work: Default::default(),
        });
        let task = tokio::spawn(serve(listener, shared.clone()));
        Self { address, shared, task }
    }

    /// Another process at the same address, with a model.
    pub(crate) async fn start_anew(mut self, model: &[Weight]) -> Self {
        let started = self.shared.started.clone();
        self.shared.die();
        self.task.abort();
        drop((&mut self.task).await);
        Self::start_at(self.address, model, started).await
    }

    pub(crate) fn contract(&self) -> Contract {
        self.shared.started.contract
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Makes it wrong at one request of a path: `nth` counts those that come from now on, from 0.
    pub(crate) fn wrong(&self, path: &str, nth: usize, wrong: Wrong) {
        lock(&self.shared.state).wrong.push((path.to_owned(), nth, wrong));
    }

    /// What it was asked since the last time.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.shared.state).asked)
    }

    /// Waits until its engine does nothing, which it does soon unless a worker waits for somebody.
    pub(crate) async fn is_idle(&self) {
        let engine = tokio::time::timeout(Duration::from_secs(2), self.shared.engine.lock()).await;
        drop(engine.expect("a worker waits for a trainer that says nothing"));
    }

    /// What it generates with: an error while it is paused or within an update.
    pub(crate) fn generate(&self) -> Result<(String, Tensors), &'static str> {
        let state = lock(&self.shared.state);
        match (state.dead, state.paused, state.active) {
            (true, ..) => Err("dead"),
            (_, true, _) => Err("paused"),
            (_, _, true) => Err("within an update"),
            _ => Ok((state.version.clone(), state.weights.clone())),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends with the process: so do all connections, and all that is done for them.
async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let shared = shared.clone();
                connections.spawn(async move {
                    // A client that goes away ends nothing: what was begun goes on.
                    let service = service_fn(move |request| {
                        let work = tokio::spawn(answer(request, shared.clone()));
                        lock(&shared.work).push(work.abort_handle());
                        async move { work.await.unwrap_or_else(|_| Err(std::io::Error::other("a panic"))) }
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    drop(http.serve_connection(TokioIo::new(stream), service).await);
                });
            }
            () = tokio::time::sleep(Duration::from_millis(2)) => {
                if lock(&shared.state).dead {
                    return;
                }
            }
        }
    }
}

/// What all workers have read.
pub(super) fn same(read: Vec<Vec<u8>>) -> Result<Vec<u8>, String> {
    match read.windows(2).all(|pair| pair[0] == pair[1]) {
        true => read.into_iter().next().ok_or("there are no workers".into()),
        false => Err("workers read other bytes than one another".into()),
    }
}

pub(super) type Answer = std::io::Result<Response<Full<Bytes>>>;

pub(super) fn say(status: u16, body: Value) -> Answer {
    let body = Full::new(Bytes::from(body.to_string()));
    let response = Response::builder().status(status).body(body);
    response.map_err(std::io::Error::other)
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Answer {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let query = head.uri.query().unwrap_or_default().to_owned();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let shown = head.headers.get("authorization").and_then(|value| value.to_str().ok());
    let wanted = shared.started.keys.map(|(usual, admin)| match head.method {
        hyper::Method::GET => format!("Bearer {usual}"),
        _ => format!("Bearer {admin}"),
    });
    // Health is everybody's.
    if path != "/health" && wanted.is_some_and(|wanted| shown != Some(&*wanted)) {
        return say(401, serde_json::json!({ "error": "Unauthorized" }));
    }
    lock(&shared.state).asked.push(path.clone());
    match shared.wrong_at(&path) {
        None => {}
        Some(Wrong::Refuses(words)) => return failed(shared.started.contract, words),
        Some(Wrong::Silent) => return std::future::pending().await,
        Some(Wrong::Slow(time)) => tokio::time::sleep(time).await,
        Some(Wrong::Dies) => {
            shared.die();
            return std::future::pending().await;
        }
        Some(Wrong::DoesNotSay) => {
            drop(done(&head.method, &path, &query, &body, &shared).await);
            return std::future::pending().await;
        }
        Some(Wrong::FailsAfterwards(words)) => {
            drop(done(&head.method, &path, &query, &body, &shared).await);
            if path == "/update_weights" {
                lock(&shared.state).active = false;
            }
            return failed(shared.started.contract, words);
        }
    }
    done(&head.method, &path, &query, &body, &shared).await
}

/// How an engine says that it failed.
fn failed(contract: Contract, words: &str) -> Answer {
    match contract {
        Contract::Vllm => vllm_contract::failed(words),
        Contract::Sglang => sglang_contract::failed(words),
    }
}

async fn done(
    method: &hyper::Method,
    path: &str,
    query: &str,
    body: &[u8],
    shared: &Shared,
) -> Answer {
    match shared.started.contract {
        Contract::Vllm => vllm_contract::done(method, path, query, body, shared).await,
        Contract::Sglang => sglang_contract::done(method, path, query, body, shared).await,
    }
}

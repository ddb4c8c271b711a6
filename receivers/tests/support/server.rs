//! A server that keeps to vLLM's contract to the letter, and is wrong on purpose on request.
//!
//! As there: one operation at a time, and none that waits in a collective ever ends by itself; `/health` is fine
//! meanwhile. Loading counts the elements of each layer, and installs a layer when it has as many as the layer has,
//! whatever version they are of; an update that failed leaves its counts behind until one is finished.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use engine_core::Weight;
use futures::future::join_all;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::collectives::Member;

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

/// How a server was started.
#[derive(Clone, Debug)]
pub(crate) struct Started {
    pub(crate) dev_mode: bool,
    /// Its `--weight-transfer-config`.
    pub(crate) backend: Option<&'static str>,
    pub(crate) workers: u32,
}

impl Default for Started {
    fn default() -> Self {
        Self { dev_mode: true, backend: Some("nccl"), workers: 1 }
    }
}

/// The bytes of a model's tensors, by their names.
pub(crate) type Tensors = BTreeMap<String, Vec<u8>>;

#[derive(Debug, Default)]
struct Layer {
    loaded: u64,
    buffered: Tensors,
}

#[derive(Debug)]
struct State {
    /// Type, shape and size of what the model has.
    expected: BTreeMap<String, (String, Vec<u64>)>,
    weights: Tensors,
    layers: BTreeMap<String, Layer>,
    active: bool,
    paused: bool,
    version: String,
    members: Option<Vec<Member>>,
    limit: u64,
    wrong: Vec<(String, usize, Wrong)>,
    asked: Vec<String>,
    dead: bool,
}

#[derive(Debug)]
struct Shared {
    started: Started,
    state: Mutex<State>,
    /// The engine does one thing at a time.
    engine: tokio::sync::Mutex<()>,
    /// All that the process is at.
    work: Mutex<Vec<tokio::task::AbortHandle>>,
}

impl Shared {
    fn die(&self) {
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

fn item_size(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "bfloat16" => 2,
        "float32" => 4,
        "float8_e4m3fn" => 1,
        _ => return None,
    })
}

/// The layer that a tensor is a part of.
fn layer_of(name: &str) -> String {
    name.rsplit_once('.').map_or(name, |(layer, _)| layer).to_owned()
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

type Answer = std::io::Result<Response<Full<Bytes>>>;

fn say(status: u16, body: Value) -> Answer {
    let body = Full::new(Bytes::from(body.to_string()));
    let response = Response::builder().status(status).body(body);
    response.map_err(std::io::Error::other)
}

fn failed(words: &str) -> Answer {
    let message = format!(
        "Call to collective_rpc method failed: Worker failed with error '{words}', please check the stack trace"
    );
    let error =
        json!({ "message": message, "type": "InternalServerError", "param": null, "code": 500 });
    say(500, json!({ "error": error }))
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Answer {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let query = head.uri.query().unwrap_or_default().to_owned();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let wrong = {
        let mut state = lock(&shared.state);
        state.asked.push(path.clone());
        let mut found = None;
        state.wrong.retain_mut(|(of, nth, wrong)| {
            let is_now = *of == path && *nth == 0;
            if is_now {
                found = Some(wrong.clone());
            } else if *of == path {
                *nth -= 1;
            }
            !is_now
        });
        found
    };
    match wrong {
        None => {}
        Some(Wrong::Refuses(words)) => return failed(words),
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
            return failed(words);
        }
    }
    done(&head.method, &path, &query, &body, &shared).await
}

async fn done(
    method: &hyper::Method,
    path: &str,
    query: &str,
    body: &[u8],
    shared: &Shared,
) -> Answer {
    let parsed = || -> Result<Value, String> {
        serde_json::from_slice(body).map_err(|error| error.to_string())
    };
    match (method.as_str(), path) {
        ("GET", "/health") => return say(200, json!(null)),
        ("GET", "/version") => return say(200, json!({ "version": "0.33.0" })),
        _ if !shared.started.dev_mode => {
            return say(404, json!({ "error": { "message": "Not Found" } }));
        }
        ("GET", "/get_world_size") => {
            return say(200, json!({ "world_size": shared.started.workers }));
        }
        _ => {}
    }
    let _engine = shared.engine.lock().await;
    let done = match (method.as_str(), path) {
        ("GET", "/weight_info") => {
            let version = lock(&shared.state).version.clone();
            return say(200, json!({ "weight_version": version }));
        }
        ("POST", "/pause") => match query {
            "mode=abort" | "mode=wait" | "mode=keep" => {
                lock(&shared.state).paused = true;
                Ok(())
            }
            other => return say(400, json!({ "error": format!("a query {other}") })),
        },
        ("POST", "/resume") => {
            lock(&shared.state).paused = false;
            Ok(())
        }
        ("POST", "/init_weight_transfer_engine") => match parsed() {
            Ok(body) => init(&body["init_info"], shared).await,
            Err(words) => return say(422, json!({ "detail": words })),
        },
        ("POST", "/shutdown_weight_transfer_engine") => {
            let mut state = lock(&shared.state);
            if state.active {
                Err("Cannot release a trainer connection during a weight update".into())
            } else {
                state.members = None;
                Ok(())
            }
        }
        ("POST", "/start_weight_update") => start(shared),
        ("POST", "/update_weights") => match parsed() {
            Ok(body) => {
                let updated = update(&body["update_info"], shared).await;
                if updated.is_err() {
                    lock(&shared.state).active = false;
                }
                updated
            }
            Err(words) => return say(422, json!({ "detail": words })),
        },
        ("POST", "/finish_weight_update") => match body {
            b"" => finish(shared, None),
            _ => match parsed() {
                Ok(body) => finish(shared, body["weight_version"].as_str()),
                Err(words) => return say(422, json!({ "detail": words })),
            },
        },
        _ => return say(404, json!({ "error": { "message": "Not Found" } })),
    };
    match done {
        Ok(()) => say(200, json!({ "message": "done" })),
        Err(words) => failed(&words),
    }
}

async fn init(info: &Value, shared: &Shared) -> Result<(), String> {
    match shared.started.backend {
        None => {
            return Err("Weight transfer not configured. Please set weight_transfer_config".into());
        }
        Some("nccl") => {}
        Some(_) => {
            return Err("Invalid init_info: got an unexpected keyword argument 'packed'".into());
        }
    }
    let info = info.as_object().ok_or("no init_info")?;
    for key in info.keys() {
        let known = [
            "nccl_unique_id_b64",
            "rank_offset",
            "world_size",
            "packed",
            "packed_buffer_size_bytes",
            "packed_num_buffers",
        ];
        if !known.contains(&&**key) {
            return Err(format!("Invalid init_info: got an unexpected keyword argument '{key}'"));
        }
    }
    let number = |key: &str| {
        let number = info.get(key).and_then(Value::as_u64);
        number.ok_or_else(|| format!("Invalid init_info: missing argument '{key}'"))
    };
    let id = info.get("nccl_unique_id_b64").and_then(Value::as_str).unwrap_or_default();
    if id.is_empty() {
        return Err("need nccl_unique_id_b64, or both master_address and master_port".into());
    }
    let id = STANDARD.decode(id).map_err(|_| "not valid standard base64")?;
    if id.len() != 128 {
        return Err(format!("must decode to 128 bytes, got {}", id.len()));
    }
    if info.get("packed") != Some(&json!(true)) {
        return Err("this server is told of packed chunks only".into());
    }
    let (first, size) = (number("rank_offset")? as u32, number("world_size")? as u32);
    if first == 0 || first + shared.started.workers > size {
        return Err(format!("rank {first} out of range for world_size {size}"));
    }
    let limit = number("packed_buffer_size_bytes")?;
    let workers = first..first + shared.started.workers;
    let members = join_all(workers.map(|place| Member::join(&id, place, size))).await;
    let mut state = lock(&shared.state);
    (state.members, state.limit) = (Some(members), limit);
    Ok(())
}

fn start(shared: &Shared) -> Result<(), String> {
    let mut state = lock(&shared.state);
    if state.active {
        return Err("start_weight_update called while a weight update is already active.".into());
    }
    // Layers that are half loaded stay as they are.
    let layers: Vec<String> = state.expected.keys().map(|name| layer_of(name)).collect();
    for layer in layers {
        state.layers.entry(layer).or_default();
    }
    state.active = true;
    Ok(())
}

async fn update(info: &Value, shared: &Shared) -> Result<(), String> {
    let list = |key: &str| -> Result<Vec<Value>, String> {
        info[key].as_array().cloned().ok_or_else(|| format!("no {key}"))
    };
    let (names, types, shapes) = (list("names")?, list("dtype_names")?, list("shapes")?);
    if names.len() != types.len() || names.len() != shapes.len() {
        return Err("`dtype_names` should be of the same size as `names`".into());
    }
    let (members, limit) = {
        let state = lock(&shared.state);
        if !state.active {
            return Err("start_weight_update must be called before update_weights.".into());
        }
        (state.members.clone(), state.limit)
    };
    let mut members = members.ok_or("NCCL weight transfer not initialized.")?;
    let mut chunk = Vec::new();
    let mut size = 0;
    for ((name, dtype), shape) in names.iter().zip(&types).zip(&shapes) {
        let name = name.as_str().ok_or("a name that is no text")?;
        let dtype = dtype.as_str().ok_or("a type that is no text")?;
        let shape: Vec<u64> = serde_json::from_value(shape.clone()).map_err(|e| e.to_string())?;
        let item = item_size(dtype).ok_or_else(|| format!("torch has no {dtype}"))?;
        let len = shape.iter().product::<u64>() * item;
        chunk.push((name.to_owned(), dtype.to_owned(), shape, item, len));
        size += len;
        if size > limit {
            receive(&mut members, std::mem::take(&mut chunk), shared).await?;
            size = 0;
        }
    }
    if !chunk.is_empty() {
        receive(&mut members, chunk, shared).await?;
    }
    lock(&shared.state).members = Some(members);
    Ok(())
}

type Tensor = (String, String, Vec<u64>, u64, u64);

async fn receive(
    members: &mut [Member],
    chunk: Vec<Tensor>,
    shared: &Shared,
) -> Result<(), String> {
    let size: u64 = chunk.iter().map(|(.., len)| len).sum();
    if size == 0 {
        return load(chunk, &[], shared);
    }
    let received = join_all(members.iter_mut().map(|member| member.receive(size as usize))).await;
    assert!(received.windows(2).all(|pair| pair[0] == pair[1]));
    load(chunk, &received[0], shared)
}

fn load(chunk: Vec<Tensor>, bytes: &[u8], shared: &Shared) -> Result<(), String> {
    let mut at = 0;
    let mut state = lock(&shared.state);
    for (name, dtype, shape, item, len) in chunk {
        if !(at as u64).is_multiple_of(item) {
            return Err(format!("self.storage_offset() must be divisible by {item} to view Byte"));
        }
        let content = bytes[at..at + len as usize].to_vec();
        at += len as usize;
        match state.expected.get(&name) {
            None => return Err(format!("there is no module or parameter named '{name}'")),
            Some(expected) if *expected != (dtype.clone(), shape.clone()) => {
                return Err(format!(
                    "{name}: {expected:?} expected, {:?} received",
                    (dtype, shape)
                ));
            }
            Some(_) => {}
        }
        let layer = layer_of(&name);
        let total: u64 = {
            let of = state.expected.iter().filter(|(name, _)| layer_of(name) == layer);
            of.map(|(_, (_, shape))| shape.iter().product::<u64>()).sum()
        };
        let State { layers, weights, .. } = &mut *state;
        let loading = layers.get_mut(&layer).ok_or("a layer that is loaded already")?;
        loading.loaded += shape.iter().product::<u64>();
        loading.buffered.insert(name, content);
        if loading.loaded >= total {
            install(weights, &layer, loading);
            layers.remove(&layer);
        }
    }
    Ok(())
}

/// Makes a layer of what was loaded; what was not is whatever the memory had.
fn install(weights: &mut Tensors, layer: &str, loading: &mut Layer) {
    for (name, content) in weights.iter_mut().filter(|(name, _)| layer_of(name) == layer) {
        match loading.buffered.remove(name) {
            Some(bytes) => *content = bytes,
            None => content.fill(0xdb),
        }
    }
}

fn finish(shared: &Shared, version: Option<&str>) -> Result<(), String> {
    let mut state = lock(&shared.state);
    if !state.active {
        return Err("finish_weight_update called without a matching start_weight_update.".into());
    }
    let State { layers, weights, .. } = &mut *state;
    for (layer, loading) in layers.iter_mut().filter(|(_, loading)| loading.loaded > 0) {
        install(weights, layer, loading);
    }
    state.layers.clear();
    state.active = false;
    if let Some(version) = version {
        state.version = version.to_owned();
    }
    Ok(())
}

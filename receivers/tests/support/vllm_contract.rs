//! vLLM's contract for trainers that speak HTTP and NCCL, to the letter.
//!
//! `/health` is fine whatever happens. Loading counts the elements of each layer, and installs a layer when it has as many as
//! the layer has, whatever version they are of; an update that failed leaves its counts behind until one is finished.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::join_all;
use serde_json::{Value, json};

use super::collectives::{Member, rebuilt};
use super::rep::{self, Item};
use super::server::{Answer, Layer, Shared, State, Tensors, item_size, lock, same, say};
use super::unpickle::{Said, unpickle};

/// The layer that a tensor is a part of.
fn layer_of(name: &str) -> String {
    name.rsplit_once('.').map_or(name, |(layer, _)| layer).to_owned()
}

pub(super) fn failed(words: &str) -> Answer {
    let message = format!(
        "Call to collective_rpc method failed: Worker failed with error '{words}', please check the stack trace"
    );
    let error =
        json!({ "message": message, "type": "InternalServerError", "param": null, "code": 500 });
    say(500, json!({ "error": error }))
}

pub(super) async fn done(
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
        ("GET", "/v1/models") => {
            let root = &shared.started.checkpoint;
            return say(200, json!({ "object": "list", "data": [{ "id": "m", "root": root }] }));
        }
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
        ("POST", "/collective_rpc") => match parsed() {
            Ok(body) => call(&body, shared).await,
            Err(words) => return say(400, json!({ "detail": words })),
        },
        ("POST", "/update_weight_version") => match parsed() {
            Ok(body) => {
                let version = body["new_version"].as_str().unwrap_or_default().to_owned();
                lock(&shared.state).version = version;
                Ok(())
            }
            Err(words) => return say(422, json!({ "detail": words })),
        },
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
        Some("nccl" | "sparse_nccl") => {}
        Some(other) => {
            let other =
                format!("Invalid init_info for {}WeightTransferEngine", other.to_uppercase());
            let known = |key: &String| key == "packed";
            let odd = info.as_object().and_then(|info| info.keys().find(|key| !known(key)));
            if let Some(key) = odd {
                return Err(format!("{other}: got an unexpected keyword argument '{key}'"));
            }
            lock(&shared.state).packed = info["packed"] == true;
            return Ok(());
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
            let engine = match shared.started.backend {
                Some("sparse_nccl") => "SparseNCCL",
                _ => "NCCL",
            };
            return Err(format!(
                "Invalid init_info for {engine}WeightTransferEngine: got an unexpected keyword argument '{key}'"
            ));
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
    let packed = info.get("packed").and_then(Value::as_bool).ok_or("it is not told the form")?;
    let (first, size) = (number("rank_offset")? as u32, number("world_size")? as u32);
    if first == 0 || first + shared.started.workers > size {
        return Err(format!("rank {first} out of range for world_size {size}"));
    }
    let limit = number("packed_buffer_size_bytes")?;
    let workers = first..first + shared.started.workers;
    let members = join_all(workers.map(|place| Member::join(&id, place, size, true))).await;
    let mut state = lock(&shared.state);
    (state.members, state.limit, state.packed) = (Some(members), limit, packed);
    state.last_told = Default::default();
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
    let mut told = (list("names")?, list("dtype_names")?, list("shapes")?);
    if shared.started.backend == Some("nccl") {
        // Without names, it is what it was the last time.
        let mut state = lock(&shared.state);
        match told.0.is_empty() {
            true => told = state.last_told.clone(),
            false => state.last_told = told.clone(),
        }
    }
    let (names, types, shapes) = told;
    if names.len() != types.len() || names.len() != shapes.len() {
        return Err("`dtype_names` should be of the same size as `names`".into());
    }
    if !lock(&shared.state).active {
        return Err("start_weight_update must be called before update_weights.".into());
    }
    if shared.started.backend == Some("sparse_nccl") {
        let counts = list("num_updates_list")?;
        return patch(&names, &types, &shapes, &counts, shared).await;
    }
    if shared.started.backend == Some("ipc") {
        return read(info, &names, &types, &shapes, shared);
    }
    let (members, limit) = {
        let state = lock(&shared.state);
        // Unpacked, each tensor is received by itself.
        (state.members.clone(), if state.packed { state.limit } else { 0 })
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

/// Receives positions and values of each weight, and then changes what the model has there. What is not a number stands for an
/// element that does not change, so it cannot be sent; nor can types that have no such.
async fn patch(
    names: &[Value],
    types: &[Value],
    shapes: &[Value],
    counts: &[Value],
    shared: &Shared,
) -> Result<(), String> {
    if counts.is_empty() || counts.len() != names.len() {
        return Err("`num_updates_list` cannot be empty for sparse updates".into());
    }
    let mut members = lock(&shared.state).members.clone();
    let members = members.as_mut().ok_or("NCCL weight transfer not initialized.")?;
    let mut patches = Vec::new();
    for (((name, dtype), shape), count) in names.iter().zip(types).zip(shapes).zip(counts) {
        let (name, dtype) = (name.as_str().ok_or("a name")?, dtype.as_str().ok_or("a type")?);
        let shape: Vec<u64> = serde_json::from_value(shape.clone()).map_err(|e| e.to_string())?;
        let count = count.as_u64().filter(|count| *count > 0).ok_or("a number of elements")?;
        let item = item_size(dtype).ok_or_else(|| format!("torch has no {dtype}"))?;
        let mut all = async |bytes: u64| {
            let received = members.iter_mut().map(|member| member.receive(bytes as usize));
            same(join_all(received).await)
        };
        let positions = all(4 * count).await?;
        patches.push((
            name.to_owned(),
            (dtype.to_owned(), shape),
            positions,
            all(item * count).await?,
        ));
    }
    lock(&shared.state).members = Some(members.clone());
    let State { expected, weights, .. } = &mut *lock(&shared.state);
    for (name, described, positions, values) in &patches {
        if expected.get(name) != Some(described) {
            return Err(format!("there is no module or parameter named '{name}'"));
        }
        let weight = weights.get_mut(name).ok_or("no weight")?;
        let item = values.len() / (positions.len() / 4);
        let is_nan = match &*described.0 {
            "bfloat16" => |value: &[u8]| u16::from_le_bytes([value[0], value[1]]) & 0x7fff > 0x7f80,
            "float32" => {
                |value: &[u8]| f32::from_le_bytes(value.try_into().expect("four bytes")).is_nan()
            }
            other => return Err(format!("\"full_cuda\" not implemented for '{other}'")),
        };
        let mut last = None;
        for (position, value) in positions.chunks(4).zip(values.chunks(item)) {
            let position = i32::from_le_bytes(position.try_into().expect("four bytes"));
            let at = usize::try_from(position).map_err(|error| error.to_string())? * item;
            if is_nan(value) || at + item > weight.len() || last >= Some(position) {
                return Err(
                    "Sparse checkpoint patches contain NaN values, out-of-range indices, or \
                            duplicate indices"
                        .into(),
                );
            }
            last = Some(position);
            weight[at..at + item].copy_from_slice(value);
        }
    }
    Ok(())
}

/// Reads a bucket where it is.
fn read(
    info: &Value,
    names: &[Value],
    types: &[Value],
    shapes: &[Value],
    shared: &Shared,
) -> Result<(), String> {
    let pickled = info["ipc_handles_pickled"].as_str().ok_or("no ipc_handles_pickled")?;
    if !shared.started.insecure {
        return Err("Refusing to deserialize `ipc_handles_pickled` without \
                    VLLM_ALLOW_INSECURE_SERIALIZATION=1"
            .into());
    }
    if !lock(&shared.state).packed {
        return Err("one handle for a bucket, and it was not told so".into());
    }
    let places = STANDARD.decode(pickled).map_err(|error| error.to_string())?;
    let places = unpickle(&places).ok_or("no pickle")?;
    // Each worker has a part of what arrives: all of them see the same bytes, or the model is none.
    let read = |gpu: &&str| {
        let place = places.get(gpu).and_then(Said::items);
        let place = place.ok_or(format!("IPC handle not found for GPU UUID {gpu}"))?;
        rebuilt(place, gpu)
    };
    let read: Result<Vec<_>, String> = shared.started.workers_gpus().iter().map(read).collect();
    let bytes = same(read?)?;
    let sizes: Vec<u64> =
        serde_json::from_value(info["tensor_sizes"].clone()).map_err(|error| error.to_string())?;
    let mut chunk = Vec::new();
    for (((name, dtype), shape), len) in names.iter().zip(types).zip(shapes).zip(sizes) {
        let (name, dtype) = (name.as_str().ok_or("a name")?, dtype.as_str().ok_or("a type")?);
        let shape: Vec<u64> = serde_json::from_value(shape.clone()).map_err(|e| e.to_string())?;
        let item = item_size(dtype).ok_or_else(|| format!("torch has no {dtype}"))?;
        if len != shape.iter().product::<u64>() * item {
            return Err(format!("{name}: {len} bytes"));
        }
        chunk.push((name.to_owned(), dtype.to_owned(), shape, item, len));
    }
    load(chunk, &bytes, shared)
}

/// Has its worker do something by name: of what is known there, reading buckets of which ZeroMQ tells. What was read is
/// copied into the model at once.
async fn call(body: &Value, shared: &Shared) -> Result<(), String> {
    let method = body["method"].as_str().ok_or("Missing 'method' in request body")?;
    if method != "update_weights_from_ipc" || !shared.started.extension {
        return Err(format!("Method '{method}' is not implemented."));
    }
    let copy = |items: Vec<Item>, bytes: &[u8]| {
        let mut state = lock(&shared.state);
        for (name, dtype, shape, start) in items {
            let item = item_size(&dtype).ok_or_else(|| format!("torch has no {dtype}"))?;
            let len = shape.iter().product::<u64>() * item;
            if state.expected.get(&name) != Some(&(dtype, shape)) || start % item != 0 {
                return Err(format!("{name} at {start}: another one is expected"));
            }
            let bytes = bytes.get(start as usize..(start + len) as usize);
            let bytes = bytes.ok_or_else(|| format!("{name} at {start}: no such place"))?;
            state.weights.insert(name, bytes.to_vec());
        }
        Ok(())
    };
    rep::update(shared, &body["args"][0], |gpu| format!("'GPU-{gpu}'"), copy).await
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

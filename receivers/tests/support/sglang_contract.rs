//! SGLang's contract for trainers, to the letter.
//!
//! Its workers meet the trainer at a store of torch's, which each of them stays connected to, and form NCCL's communicator
//! when they take part in their first broadcast. What arrives is copied into the model at once: whatever of an update
//! has arrived is what it computes with. A weight is only taken within a session, and a session that failed stays open.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::{join_all, try_join_all};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::collectives::{Member, rebuilt};
use super::rep::{self, Item};
use super::server::{Answer, Shared, item_size, lock, same, say};
use super::unpickle::{Said, unpickle};

/// A group of torch, as all of the server's workers have it.
#[derive(Debug)]
pub(crate) struct Group {
    name: String,
    stores: Vec<TcpStream>,
    first: u32,
    size: u32,
    /// There once a first broadcast was taken part in.
    members: Option<Vec<Member>>,
}

pub(super) fn failed(words: &str) -> Answer {
    say(400, json!({ "success": false, "message": words }))
}

pub(super) async fn done(
    method: &hyper::Method,
    path: &str,
    query: &str,
    body: &[u8],
    shared: &Shared,
) -> Answer {
    let started = &shared.started;
    match (method.as_str(), path) {
        ("GET", "/model_info") => {
            let version = lock(&shared.state).version.clone();
            return say(200, json!({ "model_path": "a/model", "weight_version": version }));
        }
        // It generates, and nothing generates while it is paused.
        ("GET", "/health") => {
            let status = if lock(&shared.state).paused { 503 } else { 200 };
            return say(status, json!(null));
        }
        _ => {}
    }
    let Ok(told) = serde_json::from_slice::<Value>(if body.is_empty() { b"null" } else { body })
    else {
        return say(422, json!({ "detail": "it is no JSON" }));
    };
    let allowed: &[&str] = match path {
        "/server_info" | "/flush_cache" => &[],
        "/pause_generation" => &["mode"],
        "/continue_generation" => &["torch_empty_cache"],
        "/begin_weight_update" => &["selector"],
        "/end_weight_update" => &[],
        "/init_weights_update_group" => {
            &["master_address", "master_port", "rank_offset", "world_size", "group_name", "backend"]
        }
        "/destroy_weights_update_group" => &["group_name"],
        "/update_weight_version" => &["new_version", "abort_all_requests"],
        "/update_weights_from_distributed" => {
            &["names", "dtypes", "shapes", "group_name", "load_format", "flush_cache"]
        }
        "/update_weights_from_ipc" => {
            &["zmq_handles", "flush_cache", "weight_version", "torch_empty_cache"]
        }
        "/update_weights_from_tensor" => {
            &["serialized_named_tensors", "load_format", "flush_cache"]
        }
        _ => return say(404, json!({ "detail": "Not Found" })),
    };
    let keys = told.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
    if let Some(other) = keys.clone().find(|key| !allowed.contains(key)) {
        return say(422, json!({ "detail": format!("extra field {other}") }));
    }
    if method == "POST" && path != "/flush_cache" && !told.is_object() {
        return say(422, json!({ "detail": "Field required" }));
    }
    if path == "/pause_generation" {
        if !["abort", "retract", "in_place"].contains(&told["mode"].as_str().unwrap_or("abort")) {
            return say(422, json!({ "detail": "another mode" }));
        }
        lock(&shared.state).paused = true;
        return say(200, json!({ "message": "Generation paused successfully.", "status": "ok" }));
    }
    let _engine = shared.engine.lock().await;
    let done = match path {
        "/server_info" => {
            return say(
                200,
                json!({
                    "version": "0.5.23",
                    "model_path": started.checkpoint,
                    "tp_size": started.workers,
                    "dp_size": started.replicas,
                    "pp_size": 1,
                    "weight_cache_mode": "off",
                }),
            );
        }
        "/continue_generation" => {
            lock(&shared.state).paused = false;
            Ok(())
        }
        "/flush_cache" => match query.strip_prefix("timeout=").map(str::parse::<f64>) {
            Some(Ok(_)) => Ok(()),
            _ => return say(422, json!({ "detail": "another timeout" })),
        },
        "/begin_weight_update" => {
            let mut state = lock(&shared.state);
            match state.active {
                true => {
                    Err("a weight-update session is already open; call end_weight_update() first"
                        .to_owned())
                }
                false => {
                    state.active = true;
                    Ok(())
                }
            }
        }
        "/end_weight_update" => {
            let mut state = lock(&shared.state);
            match std::mem::take(&mut state.active) {
                true => Ok(()),
                false => {
                    Err("no weight-update session is open; call begin_weight_update() first"
                        .to_owned())
                }
            }
        }
        "/update_weight_version" => match told["new_version"].as_str() {
            Some(version) => {
                version.clone_into(&mut lock(&shared.state).version);
                Ok(())
            }
            None => return say(422, json!({ "detail": "new_version: Field required" })),
        },
        "/init_weights_update_group" => init(&told, shared).await,
        "/destroy_weights_update_group" => {
            let name = told["group_name"].as_str().unwrap_or("weight_update_group");
            let group = lock(&shared.state).groups.remove(name);
            group.map(drop).ok_or_else(|| "The group to be destroyed does not exist.".to_owned())
        }
        "/update_weights_from_tensor" => read(&told, shared),
        "/update_weights_from_ipc" => connect_and_read(&told, shared).await,
        _ => update(&told, shared).await,
    };
    match done {
        Ok(()) => say(200, json!({ "success": true, "message": "Succeeded." })),
        Err(words) => failed(&words),
    }
}

async fn init(told: &Value, shared: &Shared) -> Result<(), String> {
    if shared.started.replicas != 1 {
        return Err("data-parallel replicas are not supported".into());
    }
    let number = |key: &str| {
        told[key].as_u64().and_then(|number| u32::try_from(number).ok()).ok_or(format!("no {key}"))
    };
    let (first, size) = (number("rank_offset")?, number("world_size")?);
    let name = told["group_name"].as_str().ok_or("no group_name")?.to_owned();
    let address = told["master_address"].as_str().ok_or("no master_address")?;
    let port = u16::try_from(number("master_port")?).map_err(|error| error.to_string())?;
    if told["backend"] != "nccl" || name.is_empty() {
        return Err("another backend, or no name".into());
    }
    if first == 0 || first + shared.started.workers > size {
        return Err(format!("rank {first} of {size}"));
    }
    if lock(&shared.state).groups.contains_key(&name) {
        return Err("The specified group name has already been created".into());
    }
    let stores = (0..shared.started.workers).map(|_| connect(address, port));
    let failed = |error| format!("Failed to initialize custom process group: {error}.");
    let stores = try_join_all(stores).await.map_err(failed)?;
    let group = Group { name: name.clone(), stores, first, size, members: None };
    lock(&shared.state).groups.insert(name, group);
    Ok(())
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

/// As torch's client begins: what it is, a ping, and one more to the number of those that are there.
async fn connect(address: &str, port: u16) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect((address, port)).await?;
    let validate = [&[0_u8][..], &0x3c85_f7ce_u32.to_le_bytes()].concat();
    stream.write_all(&[validate, vec![13, 1, 2, 3, 4]].concat()).await?;
    let mut nonce = [0; 4];
    stream.read_exact(&mut nonce).await?;
    assert_eq!(nonce, [1, 2, 3, 4]);
    let add = [&[4_u8][..], &text(b"init/"), &1_u64.to_le_bytes()].concat();
    stream.write_all(&add).await?;
    assert!(stream.read_u64_le().await? >= 1);
    Ok(stream)
}

/// As ProcessGroupNCCL gets the id of its first communicator.
async fn id(stream: &mut TcpStream, group: &str) -> std::io::Result<Vec<u8>> {
    let key = text(format!("/{group}/{group}//cuda//0").as_bytes());
    let wait = [&[6_u8][..], &1_u64.to_le_bytes(), &key].concat();
    stream.write_all(&wait).await?;
    assert_eq!(stream.read_u8().await?, 0, "it is told to wait no more");
    stream.write_all(&[&[3_u8][..], &key].concat()).await?;
    let mut id = vec![0; stream.read_u64_le().await? as usize];
    stream.read_exact(&mut id).await?;
    Ok(id)
}

async fn members(group: &mut Group) -> Result<(), String> {
    if group.members.is_none() {
        let mut ids = BTreeSet::new();
        for stream in &mut group.stores {
            ids.insert(id(stream, &group.name).await.map_err(|error| error.to_string())?);
        }
        let id = ids.pop_first().filter(|id| ids.is_empty() && id.len() == 128);
        let id = id.ok_or("Invalid size for ncclUniqueId")?;
        let workers = group.first..group.first + group.stores.len() as u32;
        let joined = workers.map(|place| Member::join(&id, place, group.size, false));
        group.members = Some(join_all(joined).await);
    }
    Ok(())
}

async fn update(told: &Value, shared: &Shared) -> Result<(), String> {
    let list = |key: &str| told[key].as_array().cloned().ok_or_else(|| format!("no {key}"));
    let (names, types, shapes) = (list("names")?, list("dtypes")?, list("shapes")?);
    let name = told["group_name"].as_str().unwrap_or("weight_update_group");
    if told["load_format"] != "flattened_bucket" || told["flush_cache"] != false {
        return Err("this server is told of buckets only, and to flush once".into());
    }
    let group = {
        let mut state = lock(&shared.state);
        if !state.active {
            return Err(
                "update_weights_from_distributed must run between begin_weight_update() and \
                        end_weight_update()"
                    .into(),
            );
        }
        state.groups.remove(name)
    };
    let mut group = group.ok_or_else(|| format!("Group {name} not in the groups"))?;
    let mut bucket = Vec::new();
    let mut at = 0;
    if names.len() != types.len() || names.len() != shapes.len() || names.is_empty() {
        return Err("Failed to receive weights: lists of other lengths".into());
    }
    for ((name, dtype), shape) in names.iter().zip(&types).zip(&shapes) {
        let name = name.as_str().ok_or("a name that is no text")?;
        let dtype = dtype.as_str().ok_or("a type that is no text")?;
        let shape: Vec<u64> = serde_json::from_value(shape.clone()).map_err(|e| e.to_string())?;
        let item = item_size(dtype).ok_or_else(|| format!("torch has no {dtype}"))?;
        if at % item != 0 {
            return Err(format!("Unaligned received tensor {name}: byte offset {at}, {dtype}"));
        }
        let len = shape.iter().product::<u64>() * item;
        bucket.push((name.to_owned(), (dtype.to_owned(), shape), at as usize..(at + len) as usize));
        at += len;
    }
    members(&mut group).await?;
    let received = match &mut group.members {
        Some(members) => {
            join_all(members.iter_mut().map(|member| member.receive(at as usize))).await
        }
        None => unreachable!(),
    };
    assert!(received.windows(2).all(|pair| pair[0] == pair[1]));
    lock(&shared.state).groups.insert(group.name.clone(), group);
    load(bucket, &received[0], shared)
}

/// Reads a bucket where it is.
fn read(told: &Value, shared: &Shared) -> Result<(), String> {
    if !lock(&shared.state).active {
        return Err("update_weights_from_tensor must run between begin_weight_update() and \
                    end_weight_update()"
            .into());
    }
    if told["load_format"] != "flattened_bucket" || told["flush_cache"] != false {
        return Err("this server is told of buckets only, and to flush once".into());
    }
    let payloads = &told["serialized_named_tensors"];
    let each = |(rank, gpu): (usize, &&str)| {
        let payload = payloads[rank].as_str().ok_or("list index out of range")?;
        let payload = STANDARD.decode(payload).map_err(|error| error.to_string())?;
        let said = unpickle(&payload).ok_or("no pickle")?;
        let Some(Said::Call(rebuild, arguments)) = said.get("flattened_tensor") else {
            return Err("no flattened_tensor".into());
        };
        if rebuild != "torch.multiprocessing.reductions.rebuild_cuda_tensor" {
            return Err(format!("Blocked unsafe global ({rebuild})"));
        }
        // It sees all GPUs of the host, and finds this one by its UUID.
        if arguments.get(6).and_then(Said::text) != Some(gpu) {
            return Err(format!("Invalid device_uuid, or that of another worker: {arguments:?}"));
        }
        Ok((rebuilt(arguments, gpu)?, said))
    };
    let read = shared.started.workers_gpus().iter().enumerate().map(each);
    let (bytes, said): (Vec<_>, Vec<_>) =
        read.collect::<Result<Vec<_>, String>>()?.into_iter().unzip();
    let (bytes, said) = (same(bytes)?, &said[0]);
    let mut bucket = Vec::new();
    for meta in said.get("metadata").and_then(Said::items).ok_or("no metadata")? {
        let Said::Call(class, meta) = meta else { return Err("no metadata of a tensor".into()) };
        if class != "sglang.srt.weight_sync.tensor_bucket.FlattenedTensorMetadata" {
            return Err(format!("Blocked unsafe global ({class})"));
        }
        let name = meta[0].text().ok_or("a name")?.to_owned();
        let shape = meta[1].items().ok_or("a shape")?.iter().filter_map(Said::int).collect();
        let dtype = meta[2].text().and_then(|dtype| dtype.strip_prefix("torch."));
        let dtype = dtype.ok_or("a type")?.to_owned();
        let [Some(start), Some(end), Some(numel)] = [3, 4, 5].map(|at| meta[at].int()) else {
            return Err("a place".into());
        };
        let item = item_size(&dtype).ok_or("torch has no such type")?;
        if numel != end - start || start % item != 0 {
            return Err("self.storage_offset() must be divisible by the size of an element".into());
        }
        bucket.push((name, (dtype, shape), start as usize..end as usize));
    }
    load(bucket, &bytes, shared)
}

/// Reads buckets where they are, told of them by ZeroMQ. It knows no session.
async fn connect_and_read(told: &Value, shared: &Shared) -> Result<(), String> {
    if !shared.started.extension {
        return Err("IPC weight update failed: ImportError checkpoint-engine is not installed. \
                    Please install it with: pip install sglang[checkpoint-engine]"
            .into());
    }
    if told["flush_cache"] != false {
        return Err("this server is told to flush once".into());
    }
    let lacks = |gpu: &str| format!("Device UUID GPU-{gpu} not found in zmq_handles: []");
    let copy = |items: Vec<Item>, bytes: &[u8]| {
        let place = |(name, dtype, shape, start): Item| {
            let item = item_size(&dtype).ok_or("torch has no such type")?;
            let end = start + shape.iter().product::<u64>() * item;
            if start % item != 0 || end > bytes.len() as u64 {
                return Err(format!("{name} cannot be viewed at {start}"));
            }
            Ok((name, (dtype, shape), start as usize..end as usize))
        };
        load(items.into_iter().map(place).collect::<Result<_, String>>()?, bytes, shared)
    };
    rep::update(shared, &told["zmq_handles"], lacks, copy).await
}

type Tensor = (String, (String, Vec<u64>), std::ops::Range<usize>);

/// Copies what arrived into the model.
fn load(bucket: Vec<Tensor>, bytes: &[u8], shared: &Shared) -> Result<(), String> {
    let mut state = lock(&shared.state);
    for (name, described, place) in bucket {
        if state.expected.get(&name) != Some(&described) {
            return Err(format!(
                "Failed to update parameter online: {name}: {described:?} received. The full weights of the \
                 ModelRunner are partially updated. Please discard the whole weights."
            ));
        }
        state.weights.insert(name, bytes[place].to_vec());
    }
    Ok(())
}

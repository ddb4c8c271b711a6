//! The store at which torch's processes meet: the server's side of torch's `TCPStore`, for one world.
//!
//! Workers that get a master's address and port connect there, and look up a key whose value the trainer has set. They wait for a key
//! without a value. Every client of torch 2 speaks this protocol: a byte for the request, then its arguments. Numbers are in the byte order
//! of the machine (little-endian on every machine with a GPU), with 64 bits for lengths and counts.
//!
//! A store ends with its world. Its connections break, so that a worker that still waits for a key fails then, instead of waiting as long
//! as torch does.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use engine_core::{Error, ErrorKind, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

const OPERATION: &str = "opening a store for the servers' workers";
/// What a client sends first. Nobody else is answered.
const MAGIC: u32 = 0x3c85_f7ce;
/// The longest value, and the most bytes of the keys of a request. Workers store ids and counts here.
const MAX_BYTES: u64 = 1 << 16;
/// The most keys of one request.
const MAX_KEYS: u64 = 1 << 12;
/// The most keys of a store.
const MAX_ENTRIES: usize = 1 << 14;
/// The most bytes of all keys and values. Workers of one world store some kilobytes here.
const MAX_STORED: usize = 64 << 20;
/// The most clients at a time: several times the workers of the largest world that meets at a store.
const MAX_CLIENTS: usize = 4096;

/// The requests of clients, as torch numbers them. Newer clients know more, which this store does not need.
mod ask {
    pub(super) const VALIDATE: u8 = 0;
    pub(super) const SET: u8 = 1;
    pub(super) const COMPARE_SET: u8 = 2;
    pub(super) const GET: u8 = 3;
    pub(super) const ADD: u8 = 4;
    pub(super) const CHECK: u8 = 5;
    pub(super) const WAIT: u8 = 6;
    pub(super) const COUNT_KEYS: u8 = 7;
    pub(super) const DELETE: u8 = 8;
    pub(super) const APPEND: u8 = 9;
    pub(super) const MULTI_GET: u8 = 10;
    pub(super) const MULTI_SET: u8 = 11;
    pub(super) const CANCEL_WAIT: u8 = 12;
    pub(super) const PING: u8 = 13;
}

/// Answers to a wait, and to the check whether keys are there.
const STOP_WAITING: u8 = 0;
const WAIT_CANCELED: u8 = 1;
const READY: u8 = 0;
const NOT_READY: u8 = 1;

/// Keys and their values.
#[derive(Debug, Default)]
struct Entries {
    values: HashMap<Vec<u8>, Vec<u8>>,
    /// The bytes of all keys and values.
    bytes: usize,
}

impl Entries {
    fn get(&self, key: &[u8]) -> Option<&Vec<u8>> {
        self.values.get(key)
    }

    /// # Errors
    ///
    /// If the store would become too large.
    fn set(&mut self, key: Vec<u8>, value: Vec<u8>) -> io::Result<()> {
        let (more, less) = match self.values.get(&key) {
            Some(old) => (value.len(), old.len()),
            None => (key.len() + value.len(), 0),
        };
        let is_new = !self.values.contains_key(&key);
        let bytes = self.bytes - less + more;
        if (is_new && self.values.len() >= MAX_ENTRIES) || bytes > MAX_STORED {
            return Err(refusal("the store is full"));
        }
        self.bytes = bytes;
        self.values.insert(key, value);
        Ok(())
    }

    fn remove(&mut self, key: &[u8]) -> bool {
        let removed = self.values.remove(key);
        self.bytes -= removed.as_ref().map_or(0, |value| key.len() + value.len());
        removed.is_some()
    }
}

/// A listening store. It ends, with all of its connections, when it is dropped.
#[derive(Debug)]
pub(crate) struct TorchStore {
    port: u16,
    shared: Arc<Shared>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    entries: Mutex<Entries>,
    /// Counts changes, for clients that wait for keys.
    changes: watch::Sender<u64>,
}

impl TorchStore {
    /// Listens at a port, on all interfaces; 0 for any free port.
    ///
    /// # Errors
    ///
    /// `Io` if the port is not available.
    pub(crate) async fn open(port: u16) -> Result<Self> {
        let all = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = match TcpListener::bind(all).await {
            Ok(listener) => Ok(listener),
            // The host has no IPv6.
            Err(_) => TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await,
        };
        let listener = listener.map_err(|error| {
            let message = format!("port {port} cannot be had: {error}");
            Error::new(ErrorKind::Io, OPERATION, message).with_source(error)
        })?;
        let port = listener.local_addr().map_err(|error| Error::io(OPERATION, error))?.port();
        let shared = Arc::new(Shared::new());
        let task = tokio::spawn(serve(listener, shared.clone())).abort_handle();
        Ok(Self { port, shared, task })
    }

    /// The port at which it listens.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Sets a key's value, as `store.set(key, value)` of a client does.
    pub(crate) fn set(&self, key: &str, value: &[u8]) {
        // It only fails if the store is full, and this is its first key.
        if let Err(error) = self.shared.set(stored(key), value.to_vec()) {
            tracing::warn!(%error, "workers will not find their world's id");
        }
    }
}

impl Drop for TorchStore {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The key at which the workers of a torch group look for the id of NCCL's communicator: the first one that the group makes, on GPUs.
///
/// Each part is the prefix of a nested store. torch puts a slash between them.
pub(crate) fn id_key(group: &str) -> String {
    format!("{group}/{group}//cuda//0")
}

/// A key as it is stored: clients add this prefix.
fn stored(key: &str) -> Vec<u8> {
    format!("/{key}").into_bytes()
}

impl Shared {
    fn new() -> Self {
        Self { entries: Mutex::default(), changes: watch::Sender::new(0) }
    }

    fn with<T>(&self, what: impl FnOnce(&mut Entries) -> T) -> T {
        what(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change<T>(&self, what: impl FnOnce(&mut Entries) -> T) -> T {
        let done = self.with(what);
        self.changes.send_modify(|changes| *changes += 1);
        done
    }

    fn has(&self, keys: &[Vec<u8>]) -> bool {
        self.with(|entries| keys.iter().all(|key| entries.get(key).is_some()))
    }

    fn set(&self, key: Vec<u8>, value: Vec<u8>) -> io::Result<()> {
        self.change(|entries| entries.set(key, value))
    }
}

fn refusal(words: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) if clients.len() < MAX_CLIENTS => {
                    let shared = shared.clone();
                    clients.spawn(async move {
                        let ended = client(stream, &shared).await;
                        tracing::debug!(%address, ?ended, "a client of the store has gone");
                    });
                }
                Ok(_) => tracing::warn!("the store has too many clients"),
                // For example, no file descriptors are left.
                Err(error) => {
                    tracing::warn!(%error, "while a client of the store was accepted");
                    engine_core::clock::sleep(std::time::Duration::from_millis(50)).await;
                }
            },
            Some(_) = clients.join_next() => {}
        }
    }
}

/// A client's connection.
struct Wire<R, W> {
    read: R,
    write: W,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Wire<R, W> {
    async fn number(&mut self) -> io::Result<u64> {
        self.read.read_u64_le().await
    }

    async fn bytes(&mut self) -> io::Result<Vec<u8>> {
        let len = self.number().await?;
        if len > MAX_BYTES {
            return Err(refusal("a key or a value is too long"));
        }
        let mut bytes = vec![0; len as usize];
        self.read.read_exact(&mut bytes).await?;
        Ok(bytes)
    }

    async fn keys(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let count = self.number().await?;
        if count > MAX_KEYS {
            return Err(refusal("too many keys"));
        }
        let (mut keys, mut bytes) = (Vec::new(), 0);
        for _ in 0..count {
            let key = self.bytes().await?;
            bytes += key.len() as u64;
            if bytes > MAX_BYTES {
                return Err(refusal("too long keys"));
            }
            keys.push(key);
        }
        Ok(keys)
    }

    async fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write.write_all(bytes).await
    }

    async fn say_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut all = (bytes.len() as u64).to_le_bytes().to_vec();
        all.extend_from_slice(bytes);
        self.say(&all).await
    }
}

async fn client(stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (read, write) = stream.into_split();
    answer(Wire { read: BufReader::new(read), write }, shared).await
}

/// Answers a client until it disconnects or breaks the protocol.
async fn answer(
    mut wire: Wire<impl AsyncRead + Unpin, impl AsyncWrite + Unpin>,
    shared: &Shared,
) -> io::Result<()> {
    if wire.read.read_u8().await? != ask::VALIDATE || wire.read.read_u32_le().await? != MAGIC {
        return Err(refusal("it is no client of torch's store"));
    }
    loop {
        match wire.read.read_u8().await? {
            ask::SET => {
                let key = wire.bytes().await?;
                let value = wire.bytes().await?;
                shared.set(key, value)?;
            }
            ask::COMPARE_SET => {
                let key = wire.bytes().await?;
                let (expected, wanted) = (wire.bytes().await?, wire.bytes().await?);
                let now = shared.change(|entries| {
                    let now = match entries.get(&key) {
                        Some(has) if *has != expected => return Ok(has.clone()),
                        None if !expected.is_empty() => expected,
                        _ => wanted,
                    };
                    entries.set(key, now.clone())?;
                    io::Result::Ok(now)
                })?;
                wire.say_bytes(&now).await?;
            }
            ask::GET => {
                let key = wire.bytes().await?;
                let value = found(shared, &key)?;
                wire.say_bytes(&value).await?;
            }
            ask::ADD => {
                let key = wire.bytes().await?;
                let by = wire.number().await? as i64;
                let now = shared.change(|entries| {
                    let has = entries.get(&key).map_or(Ok(""), |has| std::str::from_utf8(has));
                    let has = match has.map(|text| if text.is_empty() { "0" } else { text }) {
                        Ok(text) => text.parse::<i64>().map_err(|_| refusal("no number"))?,
                        Err(_) => return Err(refusal("a value that is no number")),
                    };
                    let now = has.wrapping_add(by);
                    entries.set(key, now.to_string().into_bytes())?;
                    Ok(now)
                })?;
                wire.say(&now.to_le_bytes()).await?;
            }
            ask::CHECK => {
                let keys = wire.keys().await?;
                let answer = if shared.has(&keys) { READY } else { NOT_READY };
                wire.say(&[answer]).await?;
            }
            ask::WAIT => {
                let keys = wire.keys().await?;
                wait(&mut wire, shared, &keys).await?;
            }
            ask::COUNT_KEYS => {
                let count = shared.with(|entries| entries.values.len() as u64);
                wire.say(&count.to_le_bytes()).await?;
            }
            ask::DELETE => {
                let key = wire.bytes().await?;
                let deleted = shared.change(|entries| entries.remove(&key));
                wire.say(&u64::from(deleted).to_le_bytes()).await?;
            }
            ask::APPEND => {
                let key = wire.bytes().await?;
                let more = wire.bytes().await?;
                shared.change(|entries| {
                    let mut value = entries.get(&key).cloned().unwrap_or_default();
                    value.extend_from_slice(&more);
                    if value.len() as u64 > MAX_BYTES {
                        return Err(refusal("a value is too long"));
                    }
                    entries.set(key, value)
                })?;
            }
            ask::MULTI_GET => {
                for key in wire.keys().await? {
                    let value = found(shared, &key)?;
                    wire.say_bytes(&value).await?;
                }
            }
            ask::MULTI_SET => {
                let count = wire.number().await?;
                if count > MAX_KEYS {
                    return Err(refusal("too many keys"));
                }
                for _ in 0..count {
                    let key = wire.bytes().await?;
                    let value = wire.bytes().await?;
                    shared.set(key, value)?;
                }
            }
            // Its wait has ended meanwhile. The client reads both answers.
            ask::CANCEL_WAIT => wire.say(&[WAIT_CANCELED]).await?,
            ask::PING => {
                let nonce = wire.read.read_u32_le().await?;
                wire.say(&nonce.to_le_bytes()).await?;
            }
            _ => return Err(refusal("a request that this store does not know")),
        }
    }
}

/// The value of a key. Clients ask only for keys that exist: they wait for them first.
fn found(shared: &Shared, key: &[u8]) -> io::Result<Vec<u8>> {
    let value = shared.with(|entries| entries.get(key).cloned());
    value.ok_or_else(|| refusal("a key that has no value"))
}

/// Waits until all keys exist, or the client cancels the wait.
async fn wait(
    wire: &mut Wire<impl AsyncRead + Unpin, impl AsyncWrite + Unpin>,
    shared: &Shared,
    keys: &[Vec<u8>],
) -> io::Result<()> {
    let mut changes = shared.changes.subscribe();
    while !shared.has(keys) {
        let mut next = [0];
        tokio::select! {
            changed = changes.changed() => changed.map_err(|_| refusal("the store has ended"))?,
            read = wire.read.read(&mut next) => match (read?, next) {
                (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
                (_, [ask::CANCEL_WAIT]) => return wire.say(&[WAIT_CANCELED]).await,
                _ => return Err(refusal("a request within another one")),
            },
        }
    }
    wire.say(&[STOP_WAITING]).await
}

/// Answers all that a client sends to an empty store. For the targets of `fuzz/`.
#[cfg(fuzzing)]
pub(crate) async fn conversation(client: &[u8]) -> Vec<u8> {
    let mut answers = Vec::new();
    drop(answer(Wire { read: client, write: &mut answers }, &Shared::new()).await);
    answers
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::time::{Duration, timeout};

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(future)
    }

    async fn connected(store: &TorchStore) -> TcpStream {
        TcpStream::connect(("127.0.0.1", store.port())).await.expect("a connection")
    }

    fn greeting() -> Vec<u8> {
        [&[ask::VALIDATE][..], &MAGIC.to_le_bytes()].concat()
    }

    fn text(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
    }

    #[test]
    fn a_client_that_waits_for_a_key_goes_on_when_it_has_a_value_and_fails_when_the_store_ends() {
        block_on(async {
            let store = TorchStore::open(0).await.unwrap();
            let mut stream = connected(&store).await;
            let wait = [&[ask::WAIT][..], &1_u64.to_le_bytes(), &text(b"/a")].concat();
            stream.write_all(&[greeting(), wait.clone()].concat()).await.unwrap();
            let mut byte = [9];
            let early = timeout(Duration::from_millis(50), stream.read_exact(&mut byte)).await;
            assert!(early.is_err(), "{early:?}");
            store.set("a", b"value");
            stream.read_exact(&mut byte).await.unwrap();
            assert_eq!(byte, [STOP_WAITING]);
            stream.write_all(&[&[ask::GET][..], &text(b"/a")].concat()).await.unwrap();
            let mut value = [0; 13];
            stream.read_exact(&mut value).await.unwrap();
            assert_eq!(value.to_vec(), text(b"value"));
            let other = [&[ask::WAIT][..], &1_u64.to_le_bytes(), &text(b"/b")].concat();
            stream.write_all(&other).await.unwrap();
            drop(store);
            let ended = timeout(Duration::from_secs(5), stream.read(&mut byte)).await;
            assert!(matches!(ended.expect("an end"), Ok(0) | Err(_)));
        });
    }

    #[test]
    fn a_client_that_cancels_its_wait_is_told_so_and_goes_on() {
        block_on(async {
            let store = TorchStore::open(0).await.unwrap();
            let mut stream = connected(&store).await;
            let wait = [&[ask::WAIT][..], &1_u64.to_le_bytes(), &text(b"/a")].concat();
            let check = [&[ask::CHECK][..], &1_u64.to_le_bytes(), &text(b"/a")].concat();
            let all = [greeting(), wait, vec![ask::CANCEL_WAIT], check].concat();
            stream.write_all(&all).await.unwrap();
            let mut answers = [9; 2];
            stream.read_exact(&mut answers).await.unwrap();
            assert_eq!(answers, [WAIT_CANCELED, NOT_READY]);
        });
    }

    #[test]
    fn a_client_that_fills_the_store_is_sent_away_and_what_it_deletes_makes_room() {
        let shared = Shared::new();
        let value = vec![7; MAX_BYTES as usize];
        let fits = MAX_STORED / (value.len() + 8);
        let key = |number: usize| (number as u64).to_le_bytes().to_vec();
        for number in 0..fits {
            shared.set(key(number), value.clone()).expect("there is room");
        }
        let refused = || shared.set(b"one more".to_vec(), value.clone()).unwrap_err().to_string();
        assert_eq!(refused(), "the store is full");
        shared.set(key(0), value.clone()).expect("it replaces one of its size");
        assert!(shared.change(|entries| entries.remove(&key(1))));
        shared.set(key(fits), value.clone()).expect("there is room again");
        assert_eq!(refused(), "the store is full");
    }

    #[test]
    fn clients_that_count_at_the_same_time_lose_no_count() {
        const CLIENTS: usize = 8;
        const EACH: usize = 5000;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let store = TorchStore::open(0).await.expect("a port");
            let mut clients = JoinSet::new();
            for _ in 0..CLIENTS {
                let mut client = connected(&store).await;
                clients.spawn(async move {
                    client.write_all(&greeting()).await.expect("sent");
                    let (mut answers, mut asks) = client.into_split();
                    // All at once, so that the store works for several clients all the time.
                    let add = [&[ask::ADD][..], &text(b"/n"), &1_i64.to_le_bytes()].concat();
                    let asking = async { asks.write_all(&add.repeat(EACH)).await.expect("sent") };
                    let hearing = async {
                        for _ in 0..EACH {
                            answers.read_i64_le().await.expect("an answer");
                        }
                    };
                    tokio::join!(asking, hearing);
                });
            }
            while clients.join_next().await.is_some() {}
            let count = store.shared.with(|entries| entries.get(b"/n").cloned());
            assert_eq!(count, Some((CLIENTS * EACH).to_string().into_bytes()));
        });
    }

    #[test]
    fn a_port_that_somebody_has_is_an_error_that_says_which() {
        block_on(async {
            let store = TorchStore::open(0).await.unwrap();
            let error = TorchStore::open(store.port()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            assert!(error.to_string().contains(&store.port().to_string()), "{error}");
        });
    }

    /// All requests that torch's client can make, and the expected answers.
    const CLIENT: &str = r#"
import datetime, sys
from torch.distributed import DistStoreError, TCPStore

seconds = lambda count: datetime.timedelta(seconds=count)
store = TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, timeout=seconds(30))
other = TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, timeout=seconds(30))
assert store.get("ours") == b"from Rust"
store.set("a", "1")
assert other.get("a") == b"1" and other.check(["a", "ours"]) and not other.check(["b"])
assert store.add("n", 5) == 5 and other.add("n", -2) == 3
assert store.compare_set("c", "", "x") == b"x" and store.compare_set("c", "y", "z") == b"x"
assert store.compare_set("c", "x", "z") == b"z"
store.append("a", "23")
assert store.get("a") == b"123"
store.multi_set(["p", "q"], ["7", "8"])
assert other.multi_get(["p", "q"]) == [b"7", b"8"]
assert store.delete_key("p") and not store.delete_key("p") and not other.check(["p"])
# The two of them have counted themselves.
assert store.num_keys() == 6, store.num_keys()
try:
    store.wait(["late"], seconds(0.2))
    raise SystemExit("a key that nobody has set")
except DistStoreError:
    pass
assert store.get("q") == b"8"
other.set("late", "1")
store.wait(["late", "a"])
print("done")
"#;

    #[test]
    #[ignore = "needs a Python with PyTorch, named by CKPT_ENGINE_TORCH_PYTHON"]
    fn torchs_own_client_hears_what_torchs_own_store_would_say() {
        let name = "CKPT_ENGINE_TORCH_PYTHON";
        let python = std::env::var_os(name);
        let python = python.unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test`"));
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let store = runtime.block_on(TorchStore::open(0)).unwrap();
        store.set("ours", b"from Rust");
        let port = store.port().to_string();
        let mut command = std::process::Command::new(python);
        let ended = command.args(["-c", CLIENT, &port]).output().expect("a process");
        let errors = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && ended.stdout == b"done\n", "{errors}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn whatever_a_client_says_the_store_answers_others(
            polite in any::<bool>(),
            asks in proptest::collection::vec(0_u8..16, 0..4),
            bytes in proptest::collection::vec(any::<u8>(), 0..60),
        ) {
            block_on(async {
                let store = TorchStore::open(0).await.unwrap();
                store.set("a", b"1");
                let mut odd = connected(&store).await;
                let start = if polite { greeting() } else { Vec::new() };
                // The store may have closed the connection.
                drop(odd.write_all(&[start, asks, bytes].concat()).await);
                let mut good = connected(&store).await;
                let get = [&[ask::GET][..], &text(b"/a")].concat();
                good.write_all(&[greeting(), get].concat()).await.unwrap();
                let mut value = [0; 9];
                let read = timeout(Duration::from_secs(5), good.read_exact(&mut value)).await;
                read.expect("an answer").unwrap();
            });
        }
    }
}

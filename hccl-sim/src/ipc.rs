//! Device memory that other processes of the machine import by a key.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::abi::*;
use crate::memory::Backing;
use crate::{Fault, Outcome, fault, lock, sim, wire};

/// A key is text of 64 characters, and a zero byte.
pub(crate) const KEY_BYTES: usize = 65;

/// How long the other process may take to answer: it has nothing else to do in that thread.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    pid: i32,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Granted { pid: u32, descriptor: i32, size: usize, chip: i32 },
    Denied,
}

#[derive(Debug)]
struct Export {
    address: usize,
    size: usize,
    chip: i32,
    backing: Arc<Backing>,
    /// Without one, everybody may import it.
    allowed: Option<Mutex<HashSet<i32>>>,
    importers: AtomicUsize,
    closed: AtomicBool,
}

/// Memory that this process has exported or imported.
#[derive(Debug, Default)]
pub(crate) struct Sharing {
    exports: Mutex<HashMap<String, Arc<Export>>>,
    imports: Mutex<HashMap<String, (usize, UnixStream)>>,
}

/// A key as callers get it.
pub(crate) fn key_bytes(text: &str) -> [u8; KEY_BYTES] {
    let mut bytes = [0; KEY_BYTES];
    bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    bytes
}

fn socket(key: &str) -> Result<SocketAddr, Fault> {
    let address = SocketAddr::from_abstract_name(format!("hccl-sim-memory-{key}"));
    address.map_err(|error| fault(ACL_ERROR_RT_IPC_ERROR, error.to_string()))
}

impl Sharing {
    pub(crate) fn export(
        &self,
        address: usize,
        size: usize,
        chip: i32,
        check_pids: bool,
    ) -> Result<String, Fault> {
        let system = |message: String| fault(ACL_ERROR_RT_IPC_ERROR, message);
        let mut random = [0; 32];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| system(error.to_string()))?;
        let key: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let (backing, _) = sim().memory.export(address, size)?;
        let listener = UnixListener::bind_addr(&socket(&key)?);
        let listener = listener.map_err(|error| {
            sim().memory.end_export(address);
            system(error.to_string())
        })?;
        let export = Arc::new(Export {
            address,
            size,
            chip,
            backing,
            allowed: check_pids.then(Mutex::default),
            importers: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        });
        let served = Arc::clone(&export);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if served.closed.load(Ordering::Acquire) {
                    return;
                }
                let served = Arc::clone(&served);
                std::thread::spawn(move || served.serve(stream));
            }
        });
        lock(&self.exports).insert(key.clone(), export);
        Ok(key)
    }

    /// Keys that were not closed, of this process's memory and of that of others.
    pub(crate) fn held(&self) -> usize {
        lock(&self.exports).len() + lock(&self.imports).len()
    }

    pub(crate) fn allow(&self, key: &str, pids: &[i32]) -> Outcome {
        let export = lock(&self.exports).get(key).cloned();
        let message = "this process did not export it";
        let export = export.ok_or_else(|| fault(ACL_ERROR_RT_PARAM_INVALID, message))?;
        if let Some(allowed) = &export.allowed {
            lock(allowed).extend(pids);
        }
        Ok(())
    }

    pub(crate) fn import(
        &self,
        key: &str,
        device: i32,
        chip: i32,
        peer_access: bool,
    ) -> Result<usize, Fault> {
        if lock(&self.exports).contains_key(key) {
            let message = "a process cannot import its own memory";
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, message));
        }
        let mut imports = lock(&self.imports);
        if imports.contains_key(key) {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "it was imported before"));
        }
        let system = |error: std::io::Error| fault(ACL_ERROR_RT_IPC_ERROR, error.to_string());
        let missing = |_| fault(ACL_ERROR_RT_PARAM_INVALID, "nothing is exported by this key");
        let mut stream = UnixStream::connect_addr(&socket(key)?).map_err(missing)?;
        stream.set_read_timeout(Some(LIMIT)).map_err(system)?;
        let request = Request { pid: std::process::id() as i32 };
        wire::send(&mut stream, &request).map_err(system)?;
        let answer = wire::receive(&mut stream).map_err(system)?;
        let Answer::Granted { pid, descriptor, size, chip: theirs } = answer else {
            let message = "this process is not on the exporter's list";
            return Err(fault(ACL_ERROR_RT_NO_PERMISSION, message));
        };
        if theirs != chip && !peer_access {
            let message = "memory of another chip, without peer access";
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, message));
        }
        let path = format!("/proc/{pid}/fd/{descriptor}");
        let file = File::options().read(true).write(true).open(path).map_err(system)?;
        let address = sim().memory.import(file.into(), size, device)?;
        imports.insert(key.to_owned(), (address, stream));
        Ok(address)
    }

    /// Importers close first.
    pub(crate) fn close(&self, key: &str) -> Outcome {
        if let Some((address, stream)) = lock(&self.imports).remove(key) {
            sim().memory.end_import(address);
            // The exporter's answer says that it has noticed.
            drop(stream.shutdown(std::net::Shutdown::Write));
            drop((&stream).read(&mut [0]));
            return Ok(());
        }
        let mut exports = lock(&self.exports);
        let Some(export) = exports.get(key) else {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "not a key of this process"));
        };
        let importers = export.importers.load(Ordering::Acquire);
        if importers > 0 {
            let message = format!("{importers} processes have not closed it");
            return Err(fault(ACL_ERROR_RT_IPC_ERROR, message));
        }
        sim().memory.end_export(export.address);
        export.closed.store(true, Ordering::Release);
        // Its thread waits for somebody to come.
        drop(UnixStream::connect_addr(&socket(key)?));
        exports.remove(key);
        Ok(())
    }
}

impl Export {
    fn serve(&self, mut stream: UnixStream) {
        let Ok(request) = wire::receive::<Request>(&mut stream) else { return };
        let denied = |allowed: &Mutex<HashSet<i32>>| !lock(allowed).contains(&request.pid);
        if self.allowed.as_ref().is_some_and(denied) {
            drop(wire::send(&mut stream, &Answer::Denied));
            return;
        }
        self.importers.fetch_add(1, Ordering::AcqRel);
        let (pid, descriptor) = (std::process::id(), self.backing.descriptor());
        let answer = Answer::Granted { pid, descriptor, size: self.size, chip: self.chip };
        if wire::send(&mut stream, &answer).is_ok() {
            // Nothing more is ever sent: this ends when the importer closes, or dies.
            drop(stream.read(&mut [0]));
        }
        self.importers.fetch_sub(1, Ordering::AcqRel);
    }
}

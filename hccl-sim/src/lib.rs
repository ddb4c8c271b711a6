//! Ascend's `libascendcl.so` and `libhccl.so`, simulated at their binary interface, for tests on
//! machines without an NPU.
//!
//! A client loads the simulated libraries by their absolute paths, and by nothing else: they are never
//! installed, and no search path leads to them. [`libraries`] gives tests the folder; by hand,
//! `cargo run -p hccl-sim -- FOLDER --profile current` writes one. A program that loads them can tell that
//! they are simulated: each has a function `const char *HcclSimVersion(void)`, and
//! `aclrtGetSocName` ends with `-simulated`. What is found out with them has to be labelled so. Another one,
//! `const char *HcclSimHeld(void)`, lists what a process has not given back; [`held`] calls it.
//!
//! # What is simulated
//!
//! Contexts by thread; device memory that the host cannot read, with poison, capacity, alignment, and
//! detection of what is used after it was freed; streams and events that run in the background, after
//! random delays or not before somebody synchronises; communicators of several processes that meet
//! over TCP and really move the bytes of broadcasts, reductions, gathers, sends and barriers;
//! what operations check, on the host and on the device, and how they fail; device memory and links
//! that communicators take; memory shared between processes; and three [profiles](Profile) of
//! which library has which symbols. Where documentation leaves something open, the simulator does what is
//! hardest for a client: it is meant to be harder to please than the hardware. Its settings are
//! environment variables: see [`settings`].
//!
//! Stricter than the hardware, on purpose: nothing works before `aclInit`, or without `aclrtSetDevice` on the thread;
//! there is no default stream; asynchronous copies take pinned host memory only; a stream that failed or was
//! aborted stays so; destroying a busy stream drops what was not run; a sharing process cannot import its own memory,
//! nor free it before all others have closed it.
//!
//! # What it cannot show
//!
//! Performance of any kind; how links over HCCS and RoCE are set up, and what goes wrong there; how the
//! driver behaves with several processes on a device; which codes real hardware reports for
//! asynchronous errors, beyond those that are documented. Not simulated at all: communicators
//! from rank tables and sub-communicators, batches of sends, suspending and resuming, graphs, and
//! `aclrtCreateContext` with other contexts than a device's first.
//!
//! # Rooms
//!
//! `acl.rs` and `hccl.rs` are the boundary: they read and write what callers' pointers lead to. Memory
//! is mapped and copied in `memory.rs` alone. Everything else is safe code.

mod abi;
mod acl;
mod bootstrap;
mod comm;
mod device;
pub mod foreign;
mod hccl;
pub mod headers;
mod instance;
mod ipc;
mod layout;
mod memory;
mod reduce;
pub mod settings;
mod stream;
mod wire;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub use abi::declarations;
pub use instance::held;
pub use layout::{Profile, libraries, write_libraries};

/// Why a call or a task failed: a code of either library, and words for `aclGetRecentErrMsg`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) code: i32,
    pub(crate) message: String,
}

pub(crate) type Outcome = Result<(), Fault>;

pub(crate) fn fault(code: i64, message: impl Into<String>) -> Fault {
    // All codes are small numbers.
    Fault { code: i32::try_from(code).unwrap_or(i32::MAX), message: message.into() }
}

/// A panic elsewhere has left nothing half done that matters more than going on.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Handles for things that callers hold. None is given out twice, and none is an address.
#[derive(Debug)]
pub(crate) struct Registry<T> {
    base: usize,
    next: AtomicU64,
    things: Mutex<HashMap<usize, Arc<T>>>,
}

impl<T> Registry<T> {
    fn new(kind: u8) -> Self {
        // Not a canonical address: reading there is an error on every machine.
        Self {
            base: 0x5a00_0000_0000_0000 | usize::from(kind) << 48,
            next: AtomicU64::new(1),
            things: Mutex::default(),
        }
    }

    pub(crate) fn insert(&self, thing: Arc<T>) -> usize {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let handle = self.base + number as usize * 64;
        lock(&self.things).insert(handle, thing);
        handle
    }

    pub(crate) fn get(&self, handle: usize) -> Option<Arc<T>> {
        lock(&self.things).get(&handle).cloned()
    }

    pub(crate) fn remove(&self, handle: usize) -> Option<Arc<T>> {
        lock(&self.things).remove(&handle)
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        lock(&self.things).values().cloned().collect()
    }
}

/// Everything that the simulated libraries of this process know.
#[derive(Debug)]
pub(crate) struct Sim {
    pub(crate) settings: settings::Settings,
    pub(crate) profile: Profile,
    pub(crate) memory: memory::Memory,
    pub(crate) devices: device::Devices,
    pub(crate) streams: Registry<stream::Stream>,
    pub(crate) events: Registry<stream::Event>,
    pub(crate) comms: Registry<comm::Comm>,
    pub(crate) links: comm::Links,
    pub(crate) sharing: ipc::Sharing,
    /// Operations enqueued so far.
    pub(crate) operations: AtomicU64,
    /// Communicators that were asked for so far.
    pub(crate) joins: AtomicU64,
    /// 0, or 1 when initialised, or 2 when finalised.
    pub(crate) life: AtomicU8,
}

impl Sim {
    /// What the process has not given back, in words.
    fn held(&self) -> String {
        let (devices, host) = self.memory.held();
        let things = [
            (self.comms.all().len(), "communicators"),
            (self.streams.all().len(), "streams"),
            (self.events.all().len(), "events"),
            (devices, "allocations of devices"),
            (host, "allocations of the host"),
            (self.sharing.held(), "keys of shared memory"),
        ];
        let held = things.iter().filter(|(count, _)| *count > 0);
        held.map(|(count, what)| format!("{count} {what}")).collect::<Vec<_>>().join(", ")
    }
}

pub(crate) fn sim() -> &'static Sim {
    static SIM: OnceLock<Sim> = OnceLock::new();
    SIM.get_or_init(|| {
        let settings = settings::Settings::read();
        let profile = instance::folder()
            .and_then(|folder| std::fs::read_to_string(folder.join(layout::PROFILE)).ok())
            .and_then(|name| Profile::from_name(&name));
        Sim {
            profile: profile.unwrap_or(Profile::Current),
            memory: memory::Memory::new(settings.device_bytes, settings.oom_at),
            devices: device::Devices::default(),
            streams: Registry::new(1),
            events: Registry::new(2),
            comms: Registry::new(3),
            links: comm::Links::new(settings.links),
            sharing: ipc::Sharing::default(),
            operations: AtomicU64::new(0),
            joins: AtomicU64::new(0),
            life: AtomicU8::new(0),
            settings,
        }
    })
}

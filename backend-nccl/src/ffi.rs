//! NCCL's calls: one function for each, status in, `Result` out. A communicator keeps the memory and the streams
//! that it was told to use until it is aborted.
#![allow(unsafe_code, reason = "calls of a C library")]

use std::cell::RefCell;
use std::ffi::{CStr, c_int, c_void};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use device_cuda::Stream;
use engine_core::provider::BucketMemory;

use crate::error::NcclError;
use crate::sys::{
    Api, Comm, Config, FLOAT32, IN_PROGRESS, RawStream, SHRINK_ABORT, SUCCESS, SUM, Status, UINT8,
    UNIQUE_ID_BYTES, UniqueId,
};

/// A communicator, aborted when dropped. Used by the thread that made it.
pub(crate) struct RawComm {
    api: &'static Api,
    /// Where the library writes it, which may be after the call that makes it: at a place that stays.
    cell: Box<AtomicPtr<c_void>>,
    /// What its work uses: streams first, the last clone of which waits for the work.
    streams: RefCell<Vec<Stream>>,
    memory: RefCell<Vec<Arc<dyn BucketMemory>>>,
    _this_thread: PhantomData<*const ()>,
}

impl std::fmt::Debug for RawComm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RawComm").finish_non_exhaustive()
    }
}

/// Bytes that NCCL reaches, and the owner of their memory.
#[derive(Clone, Debug)]
pub(crate) struct DeviceBytes {
    memory: Arc<dyn BucketMemory>,
    address: u64,
    len: usize,
}

impl DeviceBytes {
    /// A part of memory.
    pub(crate) fn new(
        memory: Arc<dyn BucketMemory>,
        Range { start, end }: Range<u64>,
    ) -> Result<Self, NcclError> {
        let reach = memory.reach().filter(|reach| reach.device().is_some());
        let all = reach.ok_or(NcclError::OutOfReach)?.address();
        if start > end || end > memory.len() {
            return Err(NcclError::Outside { start, end, len: memory.len() });
        }
        // What has addresses has no more bytes than `usize` counts.
        Ok(Self { address: all + start, len: (end - start) as usize, memory })
    }

    /// All of it.
    pub(crate) fn all(memory: Arc<dyn BucketMemory>) -> Result<Self, NcclError> {
        let len = memory.len();
        Self::new(memory, 0..len)
    }
}

/// Memory that a communicator knows.
#[derive(Debug)]
pub(crate) struct Registration {
    handle: *mut c_void,
    of: Comm,
}

fn words(api: &Api, status: Status) -> String {
    // SAFETY: it takes any number and returns a static string.
    let text = unsafe { (api.error_string)(status) };
    if text.is_null() {
        return format!("status {status}");
    }
    // SAFETY: a string that ends with a zero and is never freed.
    let text = unsafe { CStr::from_ptr(text) };
    format!("{} ({status})", text.to_string_lossy())
}

/// What the library says of its last failure: of a communicator, or of the process if it is null.
fn last(api: &Api, comm: Comm) -> String {
    // SAFETY: the communicator is null, which the function allows, or alive.
    let text = unsafe { (api.last_error)(comm) };
    if text.is_null() {
        return String::new();
    }
    // SAFETY: a string that ends with a zero, valid until the next call of this thread.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    text.trim().to_owned()
}

fn failed(api: &Api, call: &'static str, status: Status, comm: Comm) -> NcclError {
    NcclError::Call { call, status, words: words(api, status), last: last(api, comm) }
}

/// A new id, which the calling process answers for.
pub(crate) fn unique_id(api: &Api) -> Result<[u8; UNIQUE_ID_BYTES], NcclError> {
    let mut id = UniqueId { internal: [0; UNIQUE_ID_BYTES] };
    // SAFETY: it writes the id.
    let status = unsafe { (api.get_unique_id)(&mut id) };
    match status {
        SUCCESS => Ok(id.internal),
        status => Err(failed(api, "ncclGetUniqueId", status, std::ptr::null_mut())),
    }
}

impl RawComm {
    fn nothing(api: &'static Api) -> Self {
        Self {
            api,
            cell: Box::new(AtomicPtr::new(std::ptr::null_mut())),
            streams: RefCell::default(),
            memory: RefCell::default(),
            _this_thread: PhantomData,
        }
    }

    /// The communicator, if the library has made it.
    fn made(&self, call: &'static str) -> Result<Comm, NcclError> {
        let comm = self.comm();
        if comm.is_null() { Err(self.failed(call, IN_PROGRESS)) } else { Ok(comm) }
    }

    /// Keeps memory until it is aborted.
    fn keep(&self, bytes: &DeviceBytes) {
        let mut kept = self.memory.borrow_mut();
        if !kept.iter().any(|memory| Arc::ptr_eq(memory, &bytes.memory)) {
            kept.push(bytes.memory.clone());
        }
    }

    fn comm(&self) -> Comm {
        self.cell.load(Ordering::Acquire)
    }

    /// Begins to join a communicator, on the device whose context is current.
    pub(crate) fn init(
        api: &'static Api,
        id: [u8; UNIQUE_ID_BYTES],
        size: u32,
        place: u32,
    ) -> Result<Self, NcclError> {
        let this = Self::nothing(api);
        let (size, place) = (size as c_int, place as c_int);
        let (id, config) = (UniqueId { internal: id }, Config::non_blocking());
        // SAFETY: it writes the communicator to a place that stays, and copies id and configuration.
        let status = unsafe { (api.init)(this.cell.as_ptr(), size, id, place, &config) };
        match status {
            SUCCESS | IN_PROGRESS => Ok(this),
            status => Err(this.failed("ncclCommInitRankConfig", status)),
        }
    }

    /// Begins to leave the members at some places out of a communicator; the new one.
    pub(crate) fn shrink(&self, gone: &[u32]) -> Result<Self, NcclError> {
        let Some(shrink) = self.api.shrink else {
            return Err(self.failed("ncclCommShrink", IN_PROGRESS));
        };
        let comm = self.made("ncclCommShrink")?;
        let mut gone: Vec<c_int> = gone.iter().map(|place| *place as c_int).collect();
        let new = Self::nothing(self.api);
        let (list, count, config) = (gone.as_mut_ptr(), gone.len() as c_int, std::ptr::null());
        let to = new.cell.as_ptr();
        // SAFETY: the communicator is alive; the list has as many places as it says, and is read before
        // the call returns; without a configuration the new one gets that of the old one, and is written
        // to a place that stays.
        let status = unsafe { shrink(comm, list, count, to, config, SHRINK_ABORT) };
        match status {
            SUCCESS | IN_PROGRESS => Ok(new),
            status => Err(self.failed("ncclCommShrink", status)),
        }
    }

    /// Whether what was begun is done; an error if the communicator has failed.
    pub(crate) fn is_ready(&self) -> Result<bool, NcclError> {
        if self.comm().is_null() {
            return Ok(false);
        }
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive, or about to be; it writes the state.
        let status = unsafe { (self.api.async_error)(self.comm(), &mut state) };
        match (status, state) {
            (SUCCESS, SUCCESS) => Ok(true),
            (SUCCESS, IN_PROGRESS) => Ok(false),
            (SUCCESS, state) => Err(self.failed("a call of NCCL", state)),
            (status, _) => Err(self.failed("ncclCommGetAsyncError", status)),
        }
    }

    /// Has the communicator know memory, which makes transfers of it faster on some transports.
    pub(crate) fn register(&self, bytes: &DeviceBytes) -> Result<Option<Registration>, NcclError> {
        let Some(register) = self.api.register else { return Ok(None) };
        let of = self.made("ncclCommRegister")?;
        let mut handle = std::ptr::null_mut();
        let address = bytes.address as *mut c_void;
        self.keep(bytes);
        // SAFETY: the communicator is alive; so is the memory, which is kept until that is aborted.
        let status = unsafe { register(of, address, bytes.len, &mut handle) };
        match status {
            SUCCESS | IN_PROGRESS if !handle.is_null() => Ok(Some(Registration { handle, of })),
            SUCCESS | IN_PROGRESS => Ok(None),
            status => Err(self.failed("ncclCommRegister", status)),
        }
    }

    /// Forgets memory again.
    pub(crate) fn deregister(&self, registration: Registration) -> Result<(), NcclError> {
        let Some(deregister) = self.api.deregister else { return Ok(()) };
        let (comm, Registration { handle, of }) = (self.comm(), registration);
        if comm != of {
            return Err(NcclError::NotJoined);
        }
        // SAFETY: the handle is one of this communicator, and is not used again.
        let status = unsafe { deregister(comm, handle) };
        match status {
            SUCCESS | IN_PROGRESS => Ok(()),
            status => Err(self.failed("ncclCommDeregister", status)),
        }
    }

    /// Enqueues a broadcast from a member, in place on all of them.
    pub(crate) fn broadcast(
        &self,
        place: u32,
        bytes: &DeviceBytes,
        stream: &Stream,
    ) -> Result<(), NcclError> {
        let comm = self.made("ncclBroadcast")?;
        let (address, len) = (bytes.address as *mut c_void, bytes.len);
        let stream = self.keep_both(bytes, stream);
        let (broadcast, root) = (self.api.broadcast, place as c_int);
        // SAFETY: the bytes are device memory of that length, which is kept like the stream until the
        // communicator is aborted.
        let status = unsafe { broadcast(address, address, len, UINT8, root, comm, stream) };
        match status {
            SUCCESS | IN_PROGRESS => Ok(()),
            status => Err(self.failed("ncclBroadcast", status)),
        }
    }

    /// Enqueues the sum of 32-bit floats over all members, in place on all of them.
    pub(crate) fn all_reduce(
        &self,
        floats: &DeviceBytes,
        stream: &Stream,
    ) -> Result<(), NcclError> {
        let comm = self.made("ncclAllReduce")?;
        let address = floats.address as *mut c_void;
        let count = floats.len / size_of::<f32>();
        let stream = self.keep_both(floats, stream);
        let all_reduce = self.api.all_reduce;
        // SAFETY: as for a broadcast; the floats are no more than the bytes.
        let status = unsafe { all_reduce(address, address, count, FLOAT32, SUM, comm, stream) };
        match status {
            SUCCESS | IN_PROGRESS => Ok(()),
            status => Err(self.failed("ncclAllReduce", status)),
        }
    }

    /// Keeps the memory and the stream of a call until it is aborted; the stream as the library takes it.
    fn keep_both(&self, bytes: &DeviceBytes, stream: &Stream) -> RawStream {
        self.keep(bytes);
        let mut streams = self.streams.borrow_mut();
        if !streams.iter().any(|kept| kept.as_raw() == stream.as_raw()) {
            streams.push(stream.clone());
        }
        stream.as_raw()
    }

    fn failed(&self, call: &'static str, status: Status) -> NcclError {
        failed(self.api, call, status, self.comm())
    }
}

/// Aborts communicators, all at once: each of them frees memory, which waits for the device, and so for the
/// kernels of others that have not been told to end.
pub(crate) fn abort_all(comms: Vec<RawComm>) {
    struct Alone(RawComm);
    // SAFETY: NCCL allows aborting from any thread, and nobody else has the communicator; what it keeps may be
    // dropped on any thread.
    unsafe impl Send for Alone {}
    impl Alone {
        fn abort(self) {
            drop(self.0);
        }
    }
    std::thread::scope(|scope| {
        for comm in comms {
            let comm = Alone(comm);
            scope.spawn(move || comm.abort());
        }
    });
}

impl Drop for RawComm {
    fn drop(&mut self) {
        if self.comm().is_null() {
            // The library may be about to write it: its place is given up with it.
            std::mem::forget(std::mem::replace(&mut self.cell, Box::new(AtomicPtr::default())));
            return;
        }
        // SAFETY: the communicator is alive and not used again.
        let status = unsafe { (self.api.abort)(self.comm()) };
        if status != SUCCESS {
            tracing::debug!(status, "while a communicator was aborted");
        }
    }
}

//! ACL's and HCCL's objects: one function per call, status in, `Result` out.
//!
//! All objects belong to the device of the thread that made them, and none of them is `Send`, except
//! pinned memory, which any thread may write and read. What work uses is kept by the stream that it is on until
//! that is gone, and given to a copy until it has ended: nobody has to promise that. Nothing here waits without a limit, but for the
//! two calls that the libraries give none: joining a communicator, and the first operation of a kind,
//! which HCCL's own timeouts end.
#![allow(unsafe_code, reason = "calling ACL's and HCCL's C interfaces")]

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::mem::{ManuallyDrop, forget};
use std::ptr::{NonNull, null, null_mut};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::environment;
use crate::error::HcclError;
use crate::mutation::Mutation;
use crate::sys::{self, Api, Handle, SUCCESS, Status};

type Result<T, E = HcclError> = std::result::Result<T, E>;

/// Words of ACL about the last failure of this thread, shortened.
fn recent(api: &Api) -> String {
    const MOST: usize = 400;
    let Some(get) = api.aclGetRecentErrMsg else { return String::new() };
    // SAFETY: it takes nothing.
    let text = unsafe { get() };
    // SAFETY: null, or a string of this thread's that the next call of the library changes.
    let text = unsafe { sys::words(text) };
    let mut words = text.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = words.char_indices().nth(MOST) {
        words.truncate(end);
        words.push('…');
    }
    words
}

fn acl(api: &Api, call: &'static str, status: Status) -> Result<()> {
    if status == SUCCESS {
        return Ok(());
    }
    Err(HcclError::Acl { call, status, detail: recent(api) })
}

fn hccl(api: &Api, call: &'static str, status: Status) -> Result<()> {
    if status == SUCCESS {
        return Ok(());
    }
    let mut detail = recent(api);
    if let Some(words) = api.HcclGetErrorString.filter(|_| detail.is_empty()) {
        // SAFETY: it takes any code.
        let text = unsafe { words(status) };
        // SAFETY: null, or a string that is never freed.
        detail = unsafe { sys::words(text) };
    }
    Err(HcclError::Hccl { call, status, detail })
}

/// A failure to take something down: told, since nobody can do anything about it.
fn told(result: Result<()>) {
    if let Err(error) = result {
        tracing::warn!(%error, "while closing");
    }
}

/// Sets an environment variable that the libraries read, unless it is set.
///
/// Called before they are loaded, in the process's first engine.
pub(crate) fn default_variable(name: &str, value: &str) {
    if std::env::var_os(name).is_none() {
        // SAFETY: the standard library's lock keeps all of Rust's accesses apart. Foreign code that
        // reads the environment at this moment in another thread would be at risk; a program that has
        // such code sets the variable itself, before it starts threads, and nothing is done here.
        unsafe { std::env::set_var(name, value) };
    }
}

/// Makes ACL ready to be used by this process, if nobody has.
pub(crate) fn initialise(api: &'static Api) -> Result<()> {
    // SAFETY: null stands for no configuration file.
    match unsafe { (api.aclInit)(null()) } {
        sys::REPEATED_INIT => Ok(()),
        status => acl(api, "aclInit", status),
    }
}

/// How many NPUs this process sees.
pub(crate) fn device_count(api: &'static Api) -> Result<u32> {
    let mut count = 0;
    // SAFETY: the call writes a number to where the pointer points.
    acl(api, "aclrtGetDeviceCount", unsafe { (api.aclrtGetDeviceCount)(&raw mut count) })?;
    Ok(count)
}

/// What kind of NPU the process has; nothing where the library does not say so.
pub(crate) fn soc_name(api: &'static Api) -> Option<String> {
    let get = api.aclrtGetSocName?;
    // SAFETY: it takes nothing.
    let text = unsafe { get() };
    // SAFETY: null, or a string that is never freed.
    Some(unsafe { sys::words(text) }).filter(|name| !name.is_empty())
}

/// ACL's version.
pub(crate) fn version(api: &'static Api) -> Option<String> {
    let get = api.aclrtGetVersion?;
    let (mut major, mut minor, mut patch) = (0, 0, 0);
    // SAFETY: the call writes three numbers to where the pointers point.
    let status = unsafe { get(&raw mut major, &raw mut minor, &raw mut patch) };
    (status == SUCCESS).then(|| format!("{major}.{minor}.{patch}"))
}

/// Which options of a communicator's configuration HCCL knows, as bits.
pub(crate) fn config_capability(api: &'static Api) -> Option<u32> {
    // SAFETY: it takes nothing.
    api.HcclGetCommConfigCapability.map(|get| unsafe { get() })
}

/// A device, chosen on this thread. Not reset when dropped: that would end what others of the process
/// have on the device.
#[derive(Clone, Copy)]
pub(crate) struct Device {
    api: &'static Api,
    number: i32,
    _this_thread: PhantomData<*const ()>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "npu:{}", self.number)
    }
}

impl Device {
    /// Chooses the device for this thread.
    pub(crate) fn set(api: &'static Api, number: u32) -> Result<Self> {
        let count = device_count(api)?;
        let no_device = HcclError::NoDevice { device: number, count };
        let number = i32::try_from(number).ok().filter(|_| number < count).ok_or(no_device)?;
        // SAFETY: it takes any number.
        acl(api, "aclrtSetDevice", unsafe { (api.aclrtSetDevice)(number) })?;
        Ok(Self { api, number, _this_thread: PhantomData })
    }

    pub(crate) fn number(self) -> i32 {
        self.number
    }

    /// Its number for all processes of the host. `ASCEND_RT_VISIBLE_DEVICES` gives NPUs other numbers in each.
    pub(crate) fn chip(self) -> i32 {
        type Map = Option<unsafe extern "C" fn(i32, *mut i32) -> Status>;
        let map = |map: Map, from: i32| {
            let mut to = from;
            // SAFETY: the call writes a number to where the pointer points.
            let status = unsafe { map?(from, &raw mut to) };
            (status == SUCCESS).then_some(to)
        };
        let listed = || {
            let list = std::env::var("ASCEND_RT_VISIBLE_DEVICES").ok();
            environment::visible(self.number, list.as_deref())
        };
        let logical = map(self.api.aclrtGetLogicDevIdByUserDevId, self.number);
        let logical = logical.unwrap_or_else(listed);
        map(self.api.aclrtGetPhyDevIdByLogicDevId, logical).unwrap_or(logical)
    }

    #[cfg(feature = "mutations")]
    pub(crate) fn api(self) -> &'static Api {
        self.api
    }

    /// Free and all bytes of its memory.
    pub(crate) fn memory_info(self) -> Option<(usize, usize)> {
        let get = self.api.aclrtGetMemInfo?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the call writes two numbers to where the pointers point.
        let status = unsafe { get(sys::HBM_MEMORY, &raw mut free, &raw mut total) };
        (status == SUCCESS).then_some((free, total))
    }

    /// Allocates memory of the device, of whole pages.
    pub(crate) fn allocate(self, len: usize) -> Result<DeviceMemory> {
        let mut address = null_mut();
        // SAFETY: the call writes an address to where the pointer points.
        let status = unsafe { (self.api.aclrtMalloc)(&raw mut address, len, sys::HUGE_FIRST) };
        let result = acl(self.api, "aclrtMalloc", status);
        if let Err(error) = result {
            if error.is(sys::OUT_OF_DEVICE_MEMORY) {
                let (device, free) = (self.number, self.memory_info());
                return Err(HcclError::Full { device, bytes: len, free });
            }
            return Err(error);
        }
        let exported = RefCell::new(None);
        Ok(DeviceMemory(Rc::new(Allocation { device: self, address, len, exported })))
    }

    /// Allocates pinned memory of the host, of zeros.
    pub(crate) fn allocate_host(self, len: usize) -> Result<Pinned> {
        let mut address = null_mut();
        // SAFETY: the call writes an address to where the pointer points.
        let status = unsafe { (self.api.aclrtMallocHost)(&raw mut address, len) };
        let result = acl(self.api, "aclrtMallocHost", status);
        let none = |detail: String| HcclError::NoPinned { bytes: len, detail };
        result.map_err(|error| none(error.to_string()))?;
        let start = NonNull::new(address.cast::<u8>()).ok_or_else(|| none("null".into()))?;
        // SAFETY: the memory has that length and is nobody else's.
        unsafe { start.write_bytes(0, len) };
        Ok(Pinned { start, len })
    }

    /// Frees pinned memory.
    pub(crate) fn free_host(self, memory: Pinned) {
        let memory = ManuallyDrop::new(memory);
        // SAFETY: nobody else has the memory; copies from it have ended, because those that have not
        // have it themselves.
        let status = unsafe { (self.api.aclrtFreeHost)(memory.start.as_ptr().cast()) };
        told(acl(self.api, "aclrtFreeHost", status));
    }

    pub(crate) fn stream(self) -> Result<Stream> {
        let mut stream = null_mut();
        // SAFETY: the call writes a handle to where the pointer points.
        let status = unsafe { (self.api.aclrtCreateStream)(&raw mut stream) };
        acl(self.api, "aclrtCreateStream", status)?;
        Ok(Stream { device: self, stream, work: Rc::default() })
    }

    pub(crate) fn event(self) -> Result<Event> {
        let mut event = null_mut();
        // SAFETY: the call writes a handle to where the pointer points.
        let status = unsafe { (self.api.aclrtCreateEvent)(&raw mut event) };
        acl(self.api, "aclrtCreateEvent", status)?;
        Ok(Event { device: self, event, behind: RefCell::new(None) })
    }

    /// What the members of a new communicator need; a listener of this process waits for them.
    pub(crate) fn root_info(self) -> Result<Vec<u8>> {
        let mut info = vec![0_u8; sys::ROOT_INFO_BYTES];
        // SAFETY: the call writes at most that many bytes.
        let status = unsafe { (self.api.HcclGetRootInfo)(info.as_mut_ptr().cast()) };
        hccl(self.api, "HcclGetRootInfo", status)?;
        Ok(info)
    }

    /// Joins a communicator. Blocks until all have joined, or for `HCCL_CONNECT_TIMEOUT`.
    pub(crate) fn join(self, size: u32, info: &[u8], place: u32) -> Result<Comm> {
        if info.len() != sys::ROOT_INFO_BYTES {
            return Err(HcclError::RootInfo(info.len()));
        }
        let mut comm = null_mut();
        // SAFETY: the bytes are as many as the call reads, which writes a handle.
        let status = unsafe {
            (self.api.HcclCommInitRootInfo)(size, info.as_ptr().cast(), place, &raw mut comm)
        };
        // After a failure the handle means nothing, whatever it is.
        hccl(self.api, "HcclCommInitRootInfo", status)?;
        Ok(Comm { device: self, comm })
    }

    /// Maps memory of another process of the same NPU, or finds that of this one, which the libraries would not
    /// map.
    pub(crate) fn import(self, key: &IpcKey, len: usize) -> Result<Imported> {
        let own = lent().iter().find(|(known, _)| known == key).map(|(_, lent)| lent.clone());
        if let Some(own) = own {
            let outside = HcclError::Outside { at: 0, len, size: own.len };
            let address = own.address as *mut c_void;
            let imported =
                Imported { device: self, address, len, key: key.clone(), own: Some(own) };
            return if imported.is_whole() { Ok(imported) } else { Err(outside) };
        }
        let Some(import) = self.api.aclrtIpcMemImportByKey else {
            return Err(HcclError::Absent("aclrtIpcMemImportByKey", NO_SHARING));
        };
        let mut address = null_mut();
        // SAFETY: the key ends with a zero; the call writes an address.
        let status = unsafe { import(&raw mut address, key.0.as_ptr().cast(), 0) };
        acl(self.api, "aclrtIpcMemImportByKey", status)?;
        Ok(Imported { device: self, address, len, key: key.clone(), own: None })
    }
}

const NO_SHARING: &str = "processes cannot share the memory of an NPU";

/// Memory of a device. Freed when it is dropped and every stream is gone that had work in it; but not while
/// others are known to have it mapped.
#[derive(Debug)]
pub(crate) struct DeviceMemory(Rc<Allocation>);

#[derive(Debug)]
struct Allocation {
    device: Device,
    address: *mut c_void,
    len: usize,
    exported: RefCell<Option<IpcKey>>,
}

/// Memory that this process has exported: it is there as long as anyone has this.
#[derive(Debug)]
struct Lent {
    address: usize,
    len: usize,
}

static LENT: Mutex<Vec<(IpcKey, Arc<Lent>)>> = Mutex::new(Vec::new());

fn lent() -> MutexGuard<'static, Vec<(IpcKey, Arc<Lent>)>> {
    // Every change is one insertion or removal.
    LENT.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DeviceMemory {
    fn at(&self, at: usize, len: usize) -> Result<*mut c_void> {
        if at.checked_add(len).is_none_or(|end| end > self.0.len) {
            return Err(HcclError::Outside { at, len, size: self.0.len });
        }
        Ok(self.0.address.wrapping_byte_add(at))
    }

    /// Fills a part of it with a byte.
    pub(crate) fn fill(&self, at: usize, len: usize, value: u8) -> Result<()> {
        let to = self.at(at, len)?;
        // SAFETY: the range lies within the allocation.
        let status = unsafe { (self.0.device.api.aclrtMemset)(to, len, value.into(), len) };
        acl(self.0.device.api, "aclrtMemset", status)
    }

    /// Copies a part of it to the host; blocks until it is there.
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let from = self.at(at, to.len())?;
        // SAFETY: the range lies within the allocation.
        unsafe { copy_to_host(self.0.device.api, from, to) }
    }

    /// Where a part of it is, to be read by a thread that has no device. It is never freed from then on.
    #[cfg(feature = "mutations")]
    pub(crate) fn escape(&self, at: usize, len: usize) -> Result<Escaped> {
        let address = self.at(at, len)? as usize;
        forget(self.0.clone());
        Ok(Escaped { address, len })
    }

    /// Copies host memory to it; blocks until it is there.
    pub(crate) fn write(&self, at: usize, from: &[u8]) -> Result<()> {
        let (to, len) = (self.at(at, from.len())?, from.len());
        let from = from.as_ptr().cast();
        // SAFETY: both have that length.
        let status =
            unsafe { (self.0.device.api.aclrtMemcpy)(to, len, from, len, sys::HOST_TO_DEVICE) };
        acl(self.0.device.api, "aclrtMemcpy", status)
    }

    /// A key by which every process of the NPU can map all of it.
    ///
    /// # Contract
    ///
    /// The memory is as long as whole pages of 2 MB.
    pub(crate) fn export(&self) -> Result<IpcKey> {
        if let Some(key) = &*self.0.exported.borrow() {
            return Ok(key.clone());
        }
        let Some(export) = self.0.device.api.aclrtIpcMemGetExportKey else {
            return Err(HcclError::Absent("aclrtIpcMemGetExportKey", NO_SHARING));
        };
        let mut key = [0_u8; sys::IPC_KEY_BYTES];
        let (text, len) = (key.as_mut_ptr().cast(), key.len());
        // SAFETY: the allocation is alive and of that length; the call writes at most `len` bytes.
        let status = unsafe { export(self.0.address, self.0.len, text, len, sys::EXPORT_TO_ALL) };
        acl(self.0.device.api, "aclrtIpcMemGetExportKey", status)?;
        let key = IpcKey::new(&key)?;
        let own = Lent { address: self.0.address as usize, len: self.0.len };
        lent().push((key.clone(), Arc::new(own)));
        *self.0.exported.borrow_mut() = Some(key.clone());
        Ok(key)
    }

    /// Whether others can map it.
    pub(crate) fn is_exported(&self) -> bool {
        self.0.exported.borrow().is_some()
    }

    /// Withdraws the key, if there is one; an error as long as others have the memory mapped.
    pub(crate) fn withdraw(&self) -> Result<()> {
        self.0.withdraw()
    }
}

impl Allocation {
    fn withdraw(&self) -> Result<()> {
        let mut exported = self.exported.borrow_mut();
        let Some(key) = &*exported else { return Ok(()) };
        let mut lent = lent();
        let own = lent.iter().position(|(known, _)| known == key);
        if own.is_some_and(|at| Arc::strong_count(&lent[at].1) > 1) {
            return Err(HcclError::Mapped);
        }
        close_key(self.device.api, key)?;
        own.map(|at| lent.swap_remove(at));
        *exported = None;
        Ok(())
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Err(error) = self.withdraw() {
            let bytes = self.len;
            tracing::warn!(%error, bytes, "memory that others have mapped is not freed");
            return;
        }
        // SAFETY: it came from `aclrtMalloc`, and nobody has it any more: streams keep what their work uses.
        let status = unsafe { (self.device.api.aclrtFree)(self.address) };
        told(acl(self.device.api, "aclrtFree", status));
    }
}

/// Copies memory of a device; blocks until it is there.
///
/// # Safety
///
/// As many bytes as `to` has are at `from`, in memory of a device that is alive.
unsafe fn copy_to_host(api: &Api, from: *const c_void, to: &mut [u8]) -> Result<()> {
    let len = to.len();
    // SAFETY: the caller's; `to` has that length.
    let status =
        unsafe { (api.aclrtMemcpy)(to.as_mut_ptr().cast(), len, from, len, sys::DEVICE_TO_HOST) };
    acl(api, "aclrtMemcpy", status)
}

/// Memory of a device that is never freed.
#[cfg(feature = "mutations")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Escaped {
    address: usize,
    len: usize,
}

#[cfg(feature = "mutations")]
impl Escaped {
    /// As [`DeviceMemory::read`], on a thread that has no device.
    pub(crate) fn read(self, api: &'static Api, to: &mut [u8]) -> Result<()> {
        if to.len() > self.len {
            return Err(HcclError::Outside { at: 0, len: to.len(), size: self.len });
        }
        // SAFETY: so many bytes are there for ever. That this thread has no device is what a test does wrong on
        // purpose, and what the library refuses.
        unsafe { copy_to_host(api, self.address as *const c_void, to) }
    }
}

/// The name of memory that processes share: text that ends with a zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IpcKey([u8; sys::IPC_KEY_BYTES]);

impl IpcKey {
    pub(crate) fn new(bytes: &[u8]) -> Result<Self> {
        let mut key = [0; sys::IPC_KEY_BYTES];
        let text: Vec<u8> = bytes.iter().copied().take_while(|&byte| byte != 0).collect();
        let outside = HcclError::Outside { at: 0, len: text.len(), size: key.len() - 1 };
        key[..sys::IPC_KEY_BYTES - 1].get_mut(..text.len()).ok_or(outside)?.copy_from_slice(&text);
        Ok(Self(key))
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

fn close_key(api: &Api, key: &IpcKey) -> Result<()> {
    let Some(close) = api.aclrtIpcMemClose else {
        return Err(HcclError::Absent("aclrtIpcMemClose", NO_SHARING));
    };
    // SAFETY: the key ends with a zero.
    acl(api, "aclrtIpcMemClose", unsafe { close(key.0.as_ptr().cast()) })
}

/// Memory of another rank. Closed when dropped, which has to be before that one withdraws it.
#[derive(Debug)]
pub(crate) struct Imported {
    device: Device,
    address: *mut c_void,
    len: usize,
    key: IpcKey,
    /// If it is memory of this process.
    own: Option<Arc<Lent>>,
}

impl Imported {
    /// Whether so many bytes are there, as far as that is known here: of another process's memory, the library
    /// knows.
    fn is_whole(&self) -> bool {
        self.own.as_ref().is_none_or(|own| self.len <= own.len)
    }

    /// Copies a part of it to the host; blocks until it is there.
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) -> Result<()> {
        if at.checked_add(to.len()).is_none_or(|end| end > self.len) {
            return Err(HcclError::Outside { at, len: to.len(), size: self.len });
        }
        let from = self.address.wrapping_byte_add(at);
        // SAFETY: the range lies within the memory that is mapped as long as this lives.
        unsafe { copy_to_host(self.device.api, from, to) }
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        if self.own.is_none() {
            told(close_key(self.device.api, &self.key));
        }
    }
}

/// Pinned memory of the host, which [`Device::free_host`] frees.
#[derive(Debug)]
pub(crate) struct Pinned {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is host memory like any other; who has the value is the only one to access it.
unsafe impl Send for Pinned {}
// SAFETY: shared references give no access to the bytes.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: the memory has that length and was filled; the value is borrowed mutably, and copies
        // under way have the value itself.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Nor may it be, if a copy from it is under way.
        tracing::warn!(bytes = self.len, "pinned memory is not freed: its device's thread is gone");
    }
}

/// Work of a device, in order. Destroyed when dropped, unless work is left that has not ended: then the stream stays,
/// and all that its work uses.
#[derive(Debug)]
pub(crate) struct Stream {
    device: Device,
    stream: Handle,
    work: Rc<Work>,
}

/// What the work of a stream uses.
#[derive(Debug, Default)]
struct Work {
    memory: RefCell<Vec<Rc<Allocation>>>,
    /// Events that it waits for, as far as no event of its own is known to be behind them.
    awaited: RefCell<Vec<Rc<Event>>>,
    /// Whether the stream is gone, and all of its work with it.
    gone: Cell<bool>,
}

impl Work {
    fn keep(&self, memory: &DeviceMemory) {
        let mut kept = self.memory.borrow_mut();
        if !kept.iter().any(|known| Rc::ptr_eq(known, &memory.0)) {
            kept.push(memory.0.clone());
        }
    }
}

/// A copy from pinned memory, which it has until it has ended.
#[derive(Debug)]
pub(crate) struct Copying {
    pinned: Pinned,
    /// Behind the copy, if it could be put there.
    done: Option<Rc<Event>>,
    work: Rc<Work>,
}

impl Copying {
    /// What is reached when the copy has ended.
    pub(crate) fn done(&self) -> Option<&Rc<Event>> {
        self.done.as_ref()
    }

    /// The memory, if the copy has ended: its event is reached, or its stream is gone.
    pub(crate) fn end(self) -> std::result::Result<Pinned, Self> {
        let is_reached = |event: &Rc<Event>| matches!(event.is_reached(), Ok(true));
        if self.work.gone.get() || self.done.as_ref().is_some_and(is_reached) {
            return Ok(self.pinned);
        }
        Err(self)
    }
}

impl Stream {
    /// Waits for all work, but no longer than that; false if there is some left.
    pub(crate) fn synchronize(&self, limit: Duration) -> Result<bool> {
        // -1 would be for ever.
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        let api = self.device.api;
        // SAFETY: the stream is alive.
        let status = unsafe { (api.aclrtSynchronizeStreamWithTimeout)(self.stream, limit) };
        if status == sys::SYNCHRONISE_TIMEOUT {
            return Ok(false);
        }
        acl(api, "aclrtSynchronizeStreamWithTimeout", status).map(|()| true)
    }

    /// Whether there is no work left.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        let mut status = 0;
        let api = self.device.api;
        // SAFETY: the stream is alive; the call writes a number.
        let code = unsafe { (api.aclrtStreamQuery)(self.stream, &raw mut status) };
        acl(api, "aclrtStreamQuery", code)?;
        Ok(status == sys::STREAM_COMPLETE)
    }

    /// Gives all work up; false if the library cannot.
    pub(crate) fn abort(&self) -> Result<bool> {
        let Some(abort) = self.device.api.aclrtStreamAbort else { return Ok(false) };
        // SAFETY: the stream is alive.
        acl(self.device.api, "aclrtStreamAbort", unsafe { abort(self.stream) }).map(|()| true)
    }

    /// Has all that comes after it wait for an event.
    pub(crate) fn wait_for(&self, event: &Rc<Event>) -> Result<()> {
        let api = self.device.api;
        self.work.awaited.borrow_mut().push(event.clone());
        // SAFETY: both are alive, and the event stays as long as the stream may look at it.
        let status = unsafe { (api.aclrtStreamWaitEvent)(self.stream, event.event) };
        acl(api, "aclrtStreamWaitEvent", status)
    }

    /// Enqueues a copy from the beginning of pinned memory to a device. After an error it may be under way all the
    /// same, as long as the stream is there.
    pub(crate) fn copy(
        &self,
        from: Pinned,
        to: &DeviceMemory,
        at: usize,
        len: usize,
    ) -> (Copying, Result<()>) {
        let mut copying = Copying { pinned: from, done: None, work: self.work.clone() };
        let result = self.enqueue(&mut copying, to, at, len);
        (copying, result)
    }

    fn enqueue(
        &self,
        copying: &mut Copying,
        to: &DeviceMemory,
        at: usize,
        len: usize,
    ) -> Result<()> {
        let Pinned { start, len: size } = copying.pinned;
        if len > size {
            return Err(HcclError::Outside { at: 0, len, size });
        }
        let (address, api) = (to.at(at, len)?, self.device.api);
        let from = start.as_ptr().cast_const().cast();
        let done = self.device.event()?;
        self.work.keep(to);
        // SAFETY: both ranges lie within allocations: the stream keeps one, the copy has the other.
        let status = unsafe {
            (api.aclrtMemcpyAsync)(address, len, from, len, sys::HOST_TO_DEVICE, self.stream)
        };
        acl(api, "aclrtMemcpyAsync", status)?;
        done.record(self)?;
        copying.done = Some(Rc::new(done));
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(false) = self.is_idle() {
            tracing::warn!(
                "a stream whose work does not end is left behind, with the memory that it uses"
            );
            forget(self.work.clone());
            return;
        }
        // SAFETY: nobody else has the stream. It has no work, or has failed and does none any more.
        let status = unsafe { (self.device.api.aclrtDestroyStream)(self.stream) };
        let destroyed = acl(self.device.api, "aclrtDestroyStream", status);
        if destroyed.is_err() {
            forget(self.work.clone());
            return told(destroyed);
        }
        self.work.gone.set(true);
        self.work.memory.take();
        self.work.awaited.take();
    }
}

/// A point in a stream. Destroyed when dropped.
#[derive(Debug)]
pub(crate) struct Event {
    device: Device,
    event: Handle,
    behind: RefCell<Option<Behind>>,
}

/// Where an event is.
#[derive(Debug)]
struct Behind {
    work: Rc<Work>,
    /// What the stream waits for before it reaches the event.
    awaited: Vec<Rc<Event>>,
}

impl Event {
    /// Puts it behind all work that a stream has.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        let api = self.device.api;
        // SAFETY: both are alive.
        let status = unsafe { (api.aclrtRecordEvent)(self.event, stream.stream) };
        acl(api, "aclrtRecordEvent", status)?;
        let awaited = stream.work.awaited.take();
        self.release();
        *self.behind.borrow_mut() = Some(Behind { work: stream.work.clone(), awaited });
        Ok(())
    }

    /// Whether the work before it has ended.
    pub(crate) fn is_reached(&self) -> Result<bool> {
        let mut status = 0;
        let api = self.device.api;
        // SAFETY: the event is alive; the call writes a number.
        let code = unsafe { (api.aclrtQueryEventStatus)(self.event, &raw mut status) };
        acl(api, "aclrtQueryEventStatus", code)?;
        if Mutation::EventAsStream.is_on() {
            return Ok(status == sys::STREAM_COMPLETE);
        }
        Ok(status == sys::EVENT_COMPLETE)
    }
}

impl Event {
    /// Lets go of the events that its stream has waited for; what the stream may still wait for goes back to it.
    fn release(&self) {
        let Some(Behind { work, awaited }) = self.behind.take() else { return };
        if !awaited.is_empty() && !work.gone.get() && !matches!(self.is_reached(), Ok(true)) {
            work.awaited.borrow_mut().extend(awaited);
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.release();
        // SAFETY: nobody else has the event.
        let status = unsafe { (self.device.api.aclrtDestroyEvent)(self.event) };
        told(acl(self.device.api, "aclrtDestroyEvent", status));
    }
}

/// A communicator, which has to be destroyed by [`destroy`](Self::destroy).
#[derive(Debug)]
pub(crate) struct Comm {
    device: Device,
    comm: Handle,
}

impl Comm {
    /// Enqueues the broadcast of a part of device memory, from member 0 to all others.
    pub(crate) fn broadcast(
        &self,
        memory: &DeviceMemory,
        at: usize,
        len: usize,
        stream: &Stream,
    ) -> Result<()> {
        self.broadcast_from(0, memory, at, len, stream)
    }

    /// As [`broadcast`](Self::broadcast), from any member.
    pub(crate) fn broadcast_from(
        &self,
        root: u32,
        memory: &DeviceMemory,
        at: usize,
        len: usize,
        stream: &Stream,
    ) -> Result<()> {
        let buffer = memory.at(at, len)?;
        stream.work.keep(memory);
        // SAFETY: the range lies within the allocation, which the stream keeps.
        unsafe { self.broadcast_at(root, buffer, len, stream) }
    }

    /// As [`broadcast`](Self::broadcast), from memory of the host, which no NPU reaches so.
    #[cfg(feature = "mutations")]
    pub(crate) fn broadcast_host(&self, len: usize, stream: &Stream) -> Result<()> {
        let buffer = ManuallyDrop::new(self.device.allocate_host(len)?);
        // SAFETY: so many bytes are there for ever. That they are the host's is what a test does wrong on purpose,
        // and what the library refuses.
        unsafe { self.broadcast_at(0, buffer.start.as_ptr().cast(), len, stream) }
    }

    /// # Safety
    ///
    /// As many bytes are at `buffer`, in memory of the device that nobody frees before the stream is gone.
    unsafe fn broadcast_at(
        &self,
        root: u32,
        buffer: *mut c_void,
        len: usize,
        stream: &Stream,
    ) -> Result<()> {
        let count = len as u64;
        if count > sys::MOST_ELEMENTS {
            return Err(HcclError::TooMany(count));
        }
        let api = self.device.api;
        // SAFETY: communicator and stream are alive; the memory is the caller's promise.
        let status = unsafe {
            (api.HcclBroadcast)(buffer, count, sys::UINT8, root, self.comm, stream.stream)
        };
        hccl(api, "HcclBroadcast", status)
    }

    /// Enqueues the maximum over all members of each signed byte of a part of device memory.
    pub(crate) fn all_reduce_max(
        &self,
        memory: &DeviceMemory,
        at: usize,
        len: usize,
        stream: &Stream,
    ) -> Result<()> {
        let (buffer, api) = (memory.at(at, len)?, self.device.api);
        let (count, max) = (len as u64, sys::REDUCE_MAX);
        // UINT8 is what moves bytes, and what reductions refuse.
        let dtype = if Mutation::WrongEnum.is_on() { sys::UINT8 } else { sys::INT8 };
        stream.work.keep(memory);
        // SAFETY: communicator and stream are alive; the stream keeps the memory, which may be both ends of
        // the operation.
        let status = unsafe {
            (api.HcclAllReduce)(buffer, buffer, count, dtype, max, self.comm, stream.stream)
        };
        hccl(api, "HcclAllReduce", status)
    }

    /// The failure of a peer, if HCCL knows of one; that it does not says nothing.
    pub(crate) fn check(&self) -> Result<()> {
        let api = self.device.api;
        let Some(get) = api.HcclGetCommAsyncError else { return Ok(()) };
        let mut error = SUCCESS;
        // SAFETY: the communicator is alive; the call writes a number.
        let status = unsafe { get(self.comm, &raw mut error) };
        hccl(api, "HcclGetCommAsyncError", status)?;
        if error == SUCCESS { Ok(()) } else { Err(HcclError::Asynchronous(error)) }
    }

    /// Destroys it; gives it back if it is still in use.
    pub(crate) fn destroy(self) -> std::result::Result<(), (Self, HcclError)> {
        let api = self.device.api;
        // SAFETY: the communicator is alive, and nobody else has it.
        let status = unsafe { (api.HcclCommDestroy)(self.comm) };
        hccl(api, "HcclCommDestroy", status).map_err(|error| (self, error))
    }
}

#[cfg(test)]
mod tests {
    use crate::alone;

    use super::*;

    const BYTES: usize = 2 << 20;

    /// What a child process does; nothing when the tests are run.
    #[test]
    fn work_here() {
        if !alone::is_alone() {
            return;
        }
        let api = sys::load(None).unwrap();
        initialise(api).unwrap();
        let device = Device::set(api, 0).unwrap();
        let free = || device.memory_info().unwrap().0;
        let before = free();
        let (stream, memory) = (device.stream().unwrap(), device.allocate(BYTES).unwrap());
        let pinned = device.allocate_host(BYTES).unwrap();
        let (copying, copied) = stream.copy(pinned, &memory, 0, BYTES);
        copied.unwrap();
        drop(memory);
        assert!(free() < before, "freed under the copy to it");
        while !stream.synchronize(Duration::from_secs(1)).unwrap() {}
        device.free_host(copying.end().unwrap());
        drop(stream);
        assert_eq!(free(), before);

        // A stream that is gone has ended its copies; one that waits for an event of another keeps it.
        let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
        let memory = device.allocate(BYTES).unwrap();
        let (copying, copied) =
            stream.copy(device.allocate_host(BYTES).unwrap(), &memory, 0, BYTES);
        copied.unwrap();
        let done = Rc::downgrade(copying.done().unwrap());
        other.wait_for(copying.done().unwrap()).unwrap();
        let behind = device.event().unwrap();
        behind.record(&other).unwrap();
        while !stream.synchronize(Duration::from_secs(1)).unwrap() {}
        drop(stream);
        device.free_host(copying.end().unwrap());
        assert_eq!(done.strong_count(), 1, "it may still be looked at");
        while !behind.is_reached().unwrap() {}
        drop(behind);
        assert_eq!(done.strong_count(), 0);
        let (copying, outside) = other.copy(device.allocate_host(1).unwrap(), &memory, 0, BYTES);
        assert!(matches!(outside, Err(HcclError::Outside { .. })));
        drop(other);
        device.free_host(copying.end().unwrap());
    }

    #[test]
    fn what_work_uses_stays_until_the_work_has_ended() {
        alone::run("ffi::tests::work_here", ("HCCL_SIM_LAZY", "1"));
    }
}

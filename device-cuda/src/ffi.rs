//! The driver's and NVRTC's objects, each owned by a type: status in, `Result` out.
//!
//! Every handle keeps its context, and every range is checked. Work of a stream goes on after the call that enqueues it: the stream keeps
//! the memory that the work uses until the work was waited for.
#![allow(unsafe_code, reason = "calls into CUDA")]

use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys as cu;
use cudarc::nvrtc::sys as rtc;
use sha2::{Digest as _, Sha256};

use crate::CudaError;
use crate::release::release;

pub(crate) use cu::CUdevice_attribute as Attribute;

/// An exported allocation; plain bytes.
pub(crate) const IPC_HANDLE_BYTES: usize = 64;

/// A handle of the driver.
#[derive(Clone, Copy, Debug)]
struct Raw<T>(T);

// SAFETY: the driver's API is thread-safe for contexts, streams, events, modules and allocations. `Pinned` keeps its bytes from being
// accessed while its stream uses them.
unsafe impl<T> Send for Raw<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Raw<T> {}

fn checked(call: &'static str, status: cu::CUresult) -> Result<(), CudaError> {
    if status == cu::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const c_char = null();
    // SAFETY: the out pointer is valid; the driver writes a static string or null.
    let named = unsafe { cu::cuGetErrorString(status, &mut text) };
    let words = if named == cu::CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: not null, and a static C string of the driver.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        format!("{status:?}")
    };
    Err(CudaError::Driver { call, code: status as u32, words })
}

/// Logs an error while a handle is dropped: the device is lost, and there is no caller to report it to.
fn log(result: Result<(), CudaError>) {
    if let Err(error) = result {
        tracing::debug!(%error, "while releasing a CUDA handle");
    }
}

/// The driver, loaded and initialised: what all other calls of it need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver(());

impl Driver {
    pub(crate) fn load() -> Result<Self, CudaError> {
        // SAFETY: loads the system's own driver library, which runs its initialisers.
        if !unsafe { cu::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        // SAFETY: no arguments but flags, which have to be 0.
        checked("cuInit", unsafe { cu::cuInit(0) })?;
        Ok(Self(()))
    }

    pub(crate) fn version(self) -> Result<i32, CudaError> {
        let mut version = 0;
        // SAFETY: the out pointer is valid.
        checked("cuDriverGetVersion", unsafe { cu::cuDriverGetVersion(&mut version) })?;
        Ok(version)
    }

    pub(crate) fn device_count(self) -> Result<i32, CudaError> {
        let mut count = 0;
        // SAFETY: the out pointer is valid.
        checked("cuDeviceGetCount", unsafe { cu::cuDeviceGetCount(&mut count) })?;
        Ok(count)
    }
}

/// The primary context of a device.
#[derive(Clone, Debug)]
pub(crate) struct Context(Arc<Retained>);

#[derive(Debug)]
struct Retained {
    device: i32,
    context: Raw<cu::CUcontext>,
}

impl Context {
    /// Retains the primary context of device number `ordinal`.
    pub(crate) fn retain(_: Driver, ordinal: i32) -> Result<Self, CudaError> {
        let mut device = 0;
        // SAFETY: the out pointer is valid; the driver checks the ordinal.
        checked("cuDeviceGet", unsafe { cu::cuDeviceGet(&mut device, ordinal) })?;
        let mut context = null_mut();
        // SAFETY: the out pointer is valid; the reference is given back when the last clone is dropped.
        let status = unsafe { cu::cuDevicePrimaryCtxRetain(&mut context, device) };
        checked("cuDevicePrimaryCtxRetain", status)?;
        Ok(Self(Arc::new(Retained { device, context: Raw(context) })))
    }

    /// Makes it current on this thread.
    pub(crate) fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self` lives.
        checked("cuCtxSetCurrent", unsafe { cu::cuCtxSetCurrent(self.0.context.0) })
    }

    pub(crate) fn name(&self) -> Result<String, CudaError> {
        let mut name = [0 as c_char; 256];
        // SAFETY: the buffer is longer than it is said to be, and the driver ends the name with a zero.
        let status = unsafe { cu::cuDeviceGetName(name.as_mut_ptr(), 255, self.0.device) };
        checked("cuDeviceGetName", status)?;
        // SAFETY: the last byte was never written, so there is a zero.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// Its UUID.
    pub(crate) fn uuid(&self) -> Result<[u8; 16], CudaError> {
        let mut uuid = cu::CUuuid { bytes: [0; 16] };
        // SAFETY: the out pointer is valid.
        let status = unsafe { cu::cuDeviceGetUuid_v2(&mut uuid, self.0.device) };
        checked("cuDeviceGetUuid", status)?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    pub(crate) fn attribute(&self, what: Attribute) -> Result<i32, CudaError> {
        let mut value = 0;
        // SAFETY: the out pointer is valid.
        let status = unsafe { cu::cuDeviceGetAttribute(&mut value, what, self.0.device) };
        checked("cuDeviceGetAttribute", status)?;
        Ok(value)
    }

    /// The free bytes and all bytes of the device's memory.
    pub(crate) fn memory_info(&self) -> Result<(usize, usize), CudaError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the out pointers are valid.
        checked("cuMemGetInfo", unsafe { cu::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free, total))
    }
}

impl Drop for Retained {
    fn drop(&mut self) {
        // SAFETY: pairs with the `retain` of this device; every handle that uses the context keeps it.
        let status = unsafe { cu::cuDevicePrimaryCtxRelease_v2(self.device) };
        log(checked("cuDevicePrimaryCtxRelease", status));
    }
}

/// The context that was current on this thread. Dropping this makes it current again.
///
/// Other libraries take the current context for the device that their caller chose.
#[derive(Debug)]
pub(crate) struct Current(Option<cu::CUcontext>);

impl Current {
    pub(crate) fn keep() -> Self {
        // SAFETY: loads the system's own driver library, if that was not done before.
        if !unsafe { cu::is_culib_present() } {
            return Self(None);
        }
        let mut context = null_mut();
        // SAFETY: the out pointer is valid.
        let got = checked("cuCtxGetCurrent", unsafe { cu::cuCtxGetCurrent(&mut context) });
        // If the driver was never initialised, no context was current.
        Self(got.is_ok().then_some(context))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if let Some(context) = self.0 {
            // SAFETY: it was current on this thread, or none was.
            log(checked("cuCtxSetCurrent", unsafe { cu::cuCtxSetCurrent(context) }));
        }
    }
}

/// The work that a stream of another library had to do at a moment.
#[derive(Debug)]
pub(crate) enum Pending {
    Nothing,
    Until(Event),
    /// All work that the context has when it is waited for.
    All(Context),
}

impl Pending {
    /// The work that a stream has now, or the whole context without a stream.
    ///
    /// # Safety
    ///
    /// The stream is one of this context, or 0 or 1 for its default stream, and lives until this returns.
    pub(crate) unsafe fn of_foreign(
        context: &Context,
        stream: Option<usize>,
    ) -> Result<Self, CudaError> {
        let _current = Current::keep();
        context.enter()?;
        let Some(stream) = stream else { return Ok(Self::All(context.clone())) };
        let stream: cu::CUstream = std::ptr::with_exposed_provenance_mut(stream);
        // The device records an event: where processes share it, that takes a turn. An idle stream is found without one.
        // SAFETY: the stream is alive, as the caller promised.
        match unsafe { cu::cuStreamQuery(stream) } {
            cu::CUresult::CUDA_ERROR_NOT_READY => {}
            status => return checked("cuStreamQuery", status).map(|()| Self::Nothing),
        }
        let event = Event::new(context, false)?;
        // SAFETY: the event is alive, and so is the stream, as the caller promised.
        checked("cuEventRecord", unsafe { cu::cuEventRecord(event.event.0, stream) })?;
        Ok(Self::Until(event))
    }

    /// Blocks until it is done.
    pub(crate) fn wait(&self) -> Result<(), CudaError> {
        let _current = Current::keep();
        match self {
            Self::Nothing => Ok(()),
            Self::Until(event) => event.wait(),
            Self::All(context) => {
                context.enter()?;
                // SAFETY: the context is current.
                checked("cuCtxSynchronize", unsafe { cu::cuCtxSynchronize() })
            }
        }
    }
}

/// Memory or modules that the work of a stream uses.
pub(crate) type Used = Arc<dyn Any + Send + Sync>;

/// A stream. The last clone waits for its work.
#[derive(Clone, Debug)]
pub(crate) struct Stream(Arc<StreamHandle>);

#[derive(Debug)]
struct StreamHandle {
    context: Context,
    stream: Raw<cu::CUstream>,
    /// Used by work that was not waited for.
    used: Mutex<Vec<Used>>,
}

impl Stream {
    pub(crate) fn new(context: &Context) -> Result<Self, CudaError> {
        context.enter()?;
        let mut stream = null_mut();
        let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the out pointer is valid.
        checked("cuStreamCreate", unsafe { cu::cuStreamCreate(&mut stream, flags) })?;
        let (stream, used) = (Raw(stream), Mutex::default());
        Ok(Self(Arc::new(StreamHandle { context: context.clone(), stream, used })))
    }

    /// Waits for all work, and drops what it used.
    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        self.0.synchronize()
    }

    /// Makes later work wait for the work before the event.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        self.0.context.enter()?;
        // SAFETY: both are alive; the driver keeps what it needs of the event.
        let status = unsafe { cu::cuStreamWaitEvent(self.0.stream.0, event.event.0, 0) };
        checked("cuStreamWaitEvent", status)
    }

    pub(crate) fn as_raw(&self) -> *mut c_void {
        self.0.stream.0.cast()
    }

    /// Keeps something until the work that is enqueued next was waited for.
    pub(crate) fn keep(&self, used: Used) {
        self.0.used().push(used);
    }

    /// Enqueues a copy within the device, or from another one.
    pub(crate) fn copy(
        &self,
        (target, to): (&Arc<Memory>, usize),
        (source, from): (&Arc<Memory>, usize),
        bytes: usize,
    ) -> Result<(), CudaError> {
        let (to, from) = (target.at(to, bytes)?, source.at(from, bytes)?);
        self.0.context.enter()?;
        self.keep(target.clone());
        self.keep(source.clone());
        // SAFETY: both ranges lie within allocations, which the stream keeps until it has done the work.
        let status = unsafe { cu::cuMemcpyDtoDAsync_v2(to, from, bytes, self.0.stream.0) };
        checked("cuMemcpyDtoDAsync", status)
    }

    /// Enqueues that a byte is written to all places of a range.
    pub(crate) fn fill(
        &self,
        (target, to): (&Arc<Memory>, usize),
        byte: u8,
        bytes: usize,
    ) -> Result<(), CudaError> {
        let to = target.at(to, bytes)?;
        self.0.context.enter()?;
        self.keep(target.clone());
        // SAFETY: as in `copy`.
        let status = unsafe { cu::cuMemsetD8Async(to, byte, bytes, self.0.stream.0) };
        checked("cuMemsetD8Async", status)
    }
}

impl StreamHandle {
    fn used(&self) -> std::sync::MutexGuard<'_, Vec<Used>> {
        // Every change is one push, or takes all.
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.context.enter()?;
        // What is kept from here on belongs to work that may not be waited for here.
        let used = std::mem::take(&mut *self.used());
        // SAFETY: the stream is alive.
        let status = unsafe { cu::cuStreamSynchronize(self.stream.0) };
        let result = checked("cuStreamSynchronize", status);
        if result.is_err() {
            self.used().extend(used);
        }
        result
    }
}

impl Drop for StreamHandle {
    fn drop(&mut self) {
        let _current = Current::keep();
        log(self.synchronize());
        // SAFETY: the stream is one that `new` made, and nobody uses it any more.
        let status = unsafe { cu::cuStreamDestroy_v2(self.stream.0) };
        log(checked("cuStreamDestroy", status));
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub(crate) struct Event {
    context: Context,
    event: Raw<cu::CUevent>,
}

impl Event {
    pub(crate) fn new(context: &Context, timing: bool) -> Result<Self, CudaError> {
        context.enter()?;
        let mut event = null_mut();
        let flags = match timing {
            true => cu::CUevent_flags::CU_EVENT_DEFAULT,
            false => cu::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        // SAFETY: the out pointer is valid.
        checked("cuEventCreate", unsafe { cu::cuEventCreate(&mut event, flags as u32) })?;
        Ok(Self { context: context.clone(), event: Raw(event) })
    }

    pub(crate) fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        self.context.enter()?;
        // SAFETY: both are alive.
        let status = unsafe { cu::cuEventRecord(self.event.0, stream.0.stream.0) };
        checked("cuEventRecord", status)
    }

    /// Whether all work before it is done.
    pub(crate) fn is_done(&self) -> Result<bool, CudaError> {
        self.context.enter()?;
        // SAFETY: the event is alive.
        match unsafe { cu::cuEventQuery(self.event.0) } {
            cu::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => checked("cuEventQuery", status).map(|()| true),
        }
    }

    pub(crate) fn wait(&self) -> Result<(), CudaError> {
        self.context.enter()?;
        // SAFETY: the event is alive.
        checked("cuEventSynchronize", unsafe { cu::cuEventSynchronize(self.event.0) })
    }

    pub(crate) fn milliseconds_since(&self, earlier: &Self) -> Result<f32, CudaError> {
        self.context.enter()?;
        let mut milliseconds = 0.0;
        let (start, end) = (earlier.event.0, self.event.0);
        // SAFETY: the out pointer is valid, the events are alive.
        let status = unsafe { cu::cuEventElapsedTime_v2(&mut milliseconds, start, end) };
        checked("cuEventElapsedTime", status)?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _current = Current::keep();
        log(self.context.enter());
        // SAFETY: the event is one that `new` made, and nobody uses it any more.
        log(checked("cuEventDestroy", unsafe { cu::cuEventDestroy_v2(self.event.0) }));
    }
}

/// Memory of a device. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    context: Context,
    address: u64,
    len: usize,
    origin: Origin,
}

/// Where memory comes from, which decides how it is released.
#[derive(Debug)]
enum Origin {
    Own,
    /// Opened from another process, with an owner that is dropped when it is closed.
    Imported(Used),
    /// Lent by another library until this is dropped.
    Borrowed(#[expect(dead_code, reason = "kept to be dropped")] Used),
}

impl Memory {
    /// Allocates `len` bytes, at least 1, aligned to 256.
    pub(crate) fn new(context: &Context, len: usize) -> Result<Self, CudaError> {
        context.enter()?;
        let mut address = 0;
        // SAFETY: the out pointer is valid.
        checked("cuMemAlloc", unsafe { cu::cuMemAlloc_v2(&mut address, len.max(1)) })?;
        Ok(Self { context: context.clone(), address, len, origin: Origin::Own })
    }

    /// Opens an allocation of another process.
    pub(crate) fn import(
        context: &Context,
        handle: [u8; IPC_HANDLE_BYTES],
        len: usize,
        owner: Used,
    ) -> Result<Self, CudaError> {
        context.enter()?;
        let handle = cu::CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
        let mut address = 0;
        // SAFETY: the out pointer is valid; the driver checks the handle.
        let status = unsafe { cu::cuIpcOpenMemHandle_v2(&mut address, handle, 1) };
        checked("cuIpcOpenMemHandle", status)?;
        let memory =
            Self { context: context.clone(), address, len, origin: Origin::Imported(owner) };
        // The length comes from the exporter. The driver knows the true one, if it reports it.
        match memory.mapped() {
            Ok(there) if there < len => {
                Err(CudaError::Range(format!("{len} bytes of an allocation of {there}")))
            }
            _ => Ok(memory),
        }
    }

    /// The number of bytes that the driver knows from its beginning on.
    fn mapped(&self) -> Result<usize, CudaError> {
        let (base, size) = self.allocation()?;
        Ok(size.saturating_sub((self.address - base) as usize))
    }

    /// The address and the length of the driver's allocation that it lies in.
    pub(crate) fn allocation(&self) -> Result<(u64, usize), CudaError> {
        self.context.enter()?;
        let (mut base, mut size) = (0, 0);
        // SAFETY: the out pointers are valid, the driver checks the address.
        let status = unsafe { cu::cuMemGetAddressRange_v2(&mut base, &mut size, self.address) };
        checked("cuMemGetAddressRange", status)?;
        Ok((base, size))
    }

    /// Memory of another library of this process, lent until this is dropped.
    ///
    /// # Safety
    ///
    /// `len` bytes of this context's device, or of one that it reaches, are at `address` as long as `owner`
    /// lives.
    pub(crate) unsafe fn borrowed(
        context: &Context,
        address: u64,
        len: usize,
        owner: Used,
    ) -> Self {
        Self { context: context.clone(), address, len, origin: Origin::Borrowed(owner) }
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of a range, if it is within.
    fn at(&self, at: usize, bytes: usize) -> Result<u64, CudaError> {
        match at.checked_add(bytes) {
            Some(end) if end <= self.len => Ok(self.address + at as u64),
            _ => Err(CudaError::Range(format!(
                "{bytes} bytes at {at} of device memory of {}",
                self.len
            ))),
        }
    }

    /// Writes host bytes. Returns when they have arrived.
    pub(crate) fn write(&self, at: usize, source: &[u8]) -> Result<(), CudaError> {
        let to = self.at(at, source.len())?;
        self.context.enter()?;
        // SAFETY: the range lies within the allocation; the call returns when it has read the source.
        let status = unsafe { cu::cuMemcpyHtoD_v2(to, source.as_ptr().cast(), source.len()) };
        checked("cuMemcpyHtoD", status)?;
        // The last part may still be on its way from the driver's own buffer, on the default stream. Our streams do not wait for that one.
        // SAFETY: null is the default stream.
        checked("cuStreamSynchronize", unsafe { cu::cuStreamSynchronize(null_mut()) })
    }

    /// Reads into host bytes. Returns when they have arrived.
    pub(crate) fn read(&self, at: usize, target: &mut [u8]) -> Result<(), CudaError> {
        let from = self.at(at, target.len())?;
        self.context.enter()?;
        // SAFETY: as in `write`.
        let status = unsafe { cu::cuMemcpyDtoH_v2(target.as_mut_ptr().cast(), from, target.len()) };
        checked("cuMemcpyDtoH", status)
    }

    /// A handle by which other processes open it.
    pub(crate) fn export(&self) -> Result<[u8; IPC_HANDLE_BYTES], CudaError> {
        self.context.enter()?;
        let mut handle = cu::CUipcMemHandle { reserved: [0; IPC_HANDLE_BYTES] };
        // SAFETY: the out pointer is valid; the driver checks the address.
        let status = unsafe { cu::cuIpcGetMemHandle(&mut handle, self.address) };
        checked("cuIpcGetMemHandle", status)?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (context, address) = (self.context.clone(), self.address);
        match std::mem::replace(&mut self.origin, Origin::Borrowed(Arc::new(()))) {
            Origin::Own => release(move || {
                let _current = Current::keep();
                log(context.enter());
                // SAFETY: the address is one that `new` got; no work uses it, because streams keep what
                // their work uses.
                log(checked("cuMemFree", unsafe { cu::cuMemFree_v2(address) }));
                None
            }),
            Origin::Imported(owner) => release(move || {
                let _current = Current::keep();
                log(context.enter());
                // SAFETY: the address is one that `import` got; as above.
                let status = unsafe { cu::cuIpcCloseMemHandle(address) };
                log(checked("cuIpcCloseMemHandle", status));
                Some(owner)
            }),
            Origin::Borrowed(_) => {}
        }
    }
}

/// Pinned host memory, which one stream reads and writes.
#[derive(Debug)]
pub(crate) struct Pinned {
    stream: Stream,
    address: Raw<*mut u8>,
    len: usize,
}

impl Pinned {
    /// Allocates `len` zeroed bytes.
    pub(crate) fn new(stream: &Stream, len: usize) -> Result<Self, CudaError> {
        stream.0.context.enter()?;
        let mut address: *mut c_void = null_mut();
        let bytes = len.max(1);
        // SAFETY: the out pointer is valid.
        checked("cuMemHostAlloc", unsafe { cu::cuMemHostAlloc(&mut address, bytes, 0) })?;
        let address = address.cast::<u8>();
        // SAFETY: the driver gave this many bytes at this address.
        unsafe { std::ptr::write_bytes(address, 0, bytes) };
        Ok(Self { stream: stream.clone(), address: Raw(address), len })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Its bytes. Waits for the stream's work, which may use them.
    pub(crate) fn bytes(&mut self) -> Result<&mut [u8], CudaError> {
        self.stream.synchronize()?;
        // SAFETY: `len` bytes of `new` that live as long as `self`, borrowed for writing; only this stream
        // was told to use them, and has done so.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address.0, self.len) })
    }

    fn at(&self, at: usize, bytes: usize) -> Result<*mut u8, CudaError> {
        match at.checked_add(bytes) {
            Some(end) if end <= self.len => Ok(self.address.0.wrapping_add(at)),
            _ => Err(CudaError::Range(format!("{bytes} bytes at {at} of {}", self.len))),
        }
    }

    /// Enqueues a copy of device memory to its beginning.
    pub(crate) fn copy_from(
        &mut self,
        (source, from): (&Arc<Memory>, usize),
        bytes: usize,
    ) -> Result<(), CudaError> {
        let (to, from) = (self.at(0, bytes)?, source.at(from, bytes)?);
        let stream = &self.stream;
        stream.0.context.enter()?;
        stream.keep(source.clone());
        // SAFETY: both ranges are there; the stream keeps the source, and this waits for the stream before
        // anybody sees the bytes and before they are freed.
        let status = unsafe { cu::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream.0.stream.0) };
        checked("cuMemcpyDtoHAsync", status)
    }

    /// Enqueues a copy of some of its bytes to device memory.
    pub(crate) fn copy_to(
        &self,
        at: usize,
        (target, to): (&Arc<Memory>, usize),
        bytes: usize,
    ) -> Result<(), CudaError> {
        let (from, to) = (self.at(at, bytes)?, target.at(to, bytes)?);
        let stream = &self.stream;
        stream.0.context.enter()?;
        stream.keep(target.clone());
        // SAFETY: as in `copy_from`.
        let status = unsafe { cu::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream.0.stream.0) };
        checked("cuMemcpyHtoDAsync", status)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        log(self.stream.synchronize());
        let (address, context) = (self.address, self.stream.0.context.clone());
        release(move || {
            log(context.enter());
            // Binds the whole `Raw`, which is `Send`: the closure would capture only its field.
            let address: Raw<*mut u8> = address;
            // SAFETY: the address is one that `new` got, and the stream has done its work.
            log(checked("cuMemFreeHost", unsafe { cu::cuMemFreeHost(address.0.cast()) }));
            None
        });
    }
}

/// Compiled kernels, known to be complete: the driver is given no length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image(Vec<u8>);

/// The beginning of a file with an image: what it is, its length and its SHA-256.
const MAGIC: &[u8; 16] = b"ckpt-engine cub1";
const HEADER: usize = 16 + 8 + 32;

impl Image {
    /// The contents of a file with this image.
    pub(crate) fn to_file(&self) -> Vec<u8> {
        let mut file = Vec::with_capacity(HEADER + self.0.len());
        file.extend(MAGIC);
        file.extend((self.0.len() as u64).to_le_bytes());
        file.extend(Sha256::digest(&self.0));
        file.extend(&self.0);
        file
    }

    /// Reads an image from a file, if it is complete and unchanged.
    pub(crate) fn from_file(file: &[u8]) -> Option<Self> {
        let rest = file.strip_prefix(MAGIC)?;
        let (len, rest) = rest.split_first_chunk::<8>()?;
        let (sum, image) = rest.split_first_chunk::<32>()?;
        let is_whole = u64::from_le_bytes(*len) == image.len() as u64 && !image.is_empty();
        (is_whole && Sha256::digest(image)[..] == sum[..]).then(|| Self(image.to_vec()))
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// An image that no driver accepts.
    #[cfg(test)]
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

/// Kernels on a device.
#[derive(Debug)]
pub(crate) struct Module {
    context: Context,
    module: Raw<cu::CUmodule>,
}

impl Module {
    pub(crate) fn load(context: &Context, image: &Image) -> Result<Self, CudaError> {
        context.enter()?;
        let mut module = null_mut();
        // SAFETY: an image is whole, as NVRTC made it; the driver checks the rest.
        let status = unsafe { cu::cuModuleLoadData(&mut module, image.0.as_ptr().cast()) };
        checked("cuModuleLoadData", status)?;
        Ok(Self { context: context.clone(), module: Raw(module) })
    }

    pub(crate) fn function(self: &Arc<Self>, name: &CStr) -> Result<Function, CudaError> {
        self.context.enter()?;
        let mut function = null_mut();
        // SAFETY: the out pointer is valid, the module is alive.
        let status =
            unsafe { cu::cuModuleGetFunction(&mut function, self.module.0, name.as_ptr()) };
        checked("cuModuleGetFunction", status)?;
        Ok(Function { module: self.clone(), function: Raw(function), shared: 0 })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let (context, module) = (self.context.clone(), self.module);
        release(move || {
            log(context.enter());
            // Binds the whole `Raw`, which is `Send`: the closure would capture only its field.
            let module: Raw<cu::CUmodule> = module;
            // SAFETY: none of its kernels runs any more: streams keep the modules that their work uses.
            log(checked("cuModuleUnload", unsafe { cu::cuModuleUnload(module.0) }));
            None
        });
    }
}

/// A kernel.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    module: Arc<Module>,
    function: Raw<cu::CUfunction>,
    /// Bytes of shared memory of a block, beside what the kernel declares.
    shared: u32,
}

impl Function {
    /// The kernel with so many bytes of shared memory for each block; `None` if the device has not so many for one.
    pub(crate) fn with_shared_memory(self, bytes: u32) -> Result<Option<Self>, CudaError> {
        use cu::CUfunction_attribute as Attribute;
        self.module.context.enter()?;
        let set = |attribute, value: u32| {
            // SAFETY: the function's module is alive.
            unsafe { cu::cuFuncSetAttribute(self.function.0, attribute, value as c_int) }
        };
        let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        match set(most, bytes) {
            cu::CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(None),
            status => checked("cuFuncSetAttribute", status)?,
        }
        // All that the multiprocessor can give, so that as many blocks fit as the kernel is made for.
        let carveout = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        checked("cuFuncSetAttribute", set(carveout, 100))?;
        Ok(Some(Self { shared: bytes, ..self }))
    }

    pub(crate) fn blocks_per_multiprocessor(&self, threads: u32) -> Result<i32, CudaError> {
        self.module.context.enter()?;
        let (mut blocks, threads) = (0, threads as c_int);
        let function = self.function.0;
        // SAFETY: the out pointer is valid, the function's module is alive.
        let status = unsafe {
            cu::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                function,
                threads,
                self.shared as usize,
            )
        };
        checked("cuOccupancyMaxActiveBlocksPerMultiprocessor", status)?;
        Ok(blocks)
    }

    /// Launches the kernel, with parameters that are 8 bytes each, or fit into 8 little-endian ones.
    ///
    /// # Safety
    ///
    /// There is a parameter for each one of the kernel. All addresses among them, and those in the memory that they point to, are of memory
    /// that the kernel may use in this way, and that the stream [keeps](Stream::keep).
    pub(crate) unsafe fn launch(
        &self,
        grid: u32,
        threads: u32,
        stream: &Stream,
        parameters: &mut [u64],
    ) -> Result<(), CudaError> {
        self.module.context.enter()?;
        stream.keep(self.module.clone());
        let mut pointers: Vec<*mut c_void> =
            parameters.iter_mut().map(|parameter| std::ptr::from_mut(parameter).cast()).collect();
        // SAFETY: there is a pointer for each parameter of the kernel, to at least as many bytes as it has;
        // what the addresses among them point to is the caller's promise.
        let status = unsafe {
            cu::cuLaunchKernel(
                self.function.0,
                grid,
                1,
                1,
                threads,
                1,
                1,
                self.shared,
                stream.0.stream.0,
                pointers.as_mut_ptr(),
                null_mut(),
            )
        };
        checked("cuLaunchKernel", status)
    }
}

fn compiled(call: &'static str, status: rtc::nvrtcResult) -> Result<(), CudaError> {
    if status == rtc::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    Err(CudaError::Compiler { call, log: format!("{status:?}") })
}

/// NVRTC, loaded: what all calls of it need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compiler(());

impl Compiler {
    /// Opens a library of NVRTC's by its path, for good, so that it is found under its name.
    pub(crate) fn preload(library: &Path) -> Result<(), CudaError> {
        // SAFETY: loads NVIDIA's compiler library, which the user named; it runs its initialisers.
        match unsafe { libloading::Library::new(library) } {
            Ok(library) => {
                std::mem::forget(library);
                Ok(())
            }
            Err(error) => {
                Err(CudaError::NoCompiler { reason: format!("{}: {error}", library.display()) })
            }
        }
    }

    /// NVRTC, if it can be loaded.
    pub(crate) fn load() -> Option<Self> {
        // SAFETY: loads NVIDIA's compiler library, which runs its initialisers.
        unsafe { rtc::is_culib_present() }.then_some(Self(()))
    }

    pub(crate) fn version(self) -> Result<(i32, i32), CudaError> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the out pointers are valid.
        compiled("nvrtcVersion", unsafe { rtc::nvrtcVersion(&mut major, &mut minor) })?;
        Ok((major, minor))
    }

    /// Compiles a source to an image. Returns it with what the compiler says.
    pub(crate) fn compile(
        self,
        source: &CStr,
        name: &CStr,
        options: &[CString],
    ) -> Result<(Image, String), CudaError> {
        let mut program = null_mut();
        let (source, name) = (source.as_ptr(), name.as_ptr());
        // SAFETY: the strings end with zeros, there are no headers.
        let status =
            unsafe { rtc::nvrtcCreateProgram(&mut program, source, name, 0, null(), null()) };
        compiled("nvrtcCreateProgram", status)?;
        let program = Program(program);
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive, and there are as many options as is said.
        let status = unsafe {
            rtc::nvrtcCompileProgram(program.0, options.len() as c_int, options.as_ptr())
        };
        compiled("nvrtcCompileProgram", status)
            .map_err(|_| CudaError::Compiler { call: "nvrtcCompileProgram", log: program.log() })?;
        Ok((program.image()?, program.log()))
    }
}

/// A program of NVRTC's.
struct Program(rtc::nvrtcProgram);

impl Program {
    fn image(&self) -> Result<Image, CudaError> {
        let mut size = 0;
        // SAFETY: the out pointer is valid, the program is alive.
        compiled("nvrtcGetCUBINSize", unsafe { rtc::nvrtcGetCUBINSize(self.0, &mut size) })?;
        let mut image = vec![0_u8; size];
        // SAFETY: the buffer has the size that was asked for.
        let status = unsafe { rtc::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) };
        compiled("nvrtcGetCUBIN", status)?;
        Ok(Image(image))
    }

    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the out pointer is valid, the program is alive.
        let status = unsafe { rtc::nvrtcGetProgramLogSize(self.0, &mut size) };
        if compiled("nvrtcGetProgramLogSize", status).is_err() {
            return "no log".into();
        }
        let mut text = vec![0_u8; size];
        // SAFETY: the buffer has the size that was asked for.
        let status = unsafe { rtc::nvrtcGetProgramLog(self.0, text.as_mut_ptr().cast()) };
        match compiled("nvrtcGetProgramLog", status) {
            Ok(()) => String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned(),
            Err(_) => "no log".into(),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program is alive, and not used after this.
        let status = unsafe { rtc::nvrtcDestroyProgram(&mut self.0) };
        log(compiled("nvrtcDestroyProgram", status));
    }
}

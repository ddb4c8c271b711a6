//! Devices and what lives on them. Every handle keeps its device's context.

use std::any::Any;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use crate::{CudaError, ffi};

/// A CUDA device and its primary context, which is released with the last handle.
#[derive(Clone, Debug)]
pub struct Device(Arc<Primary>);

#[derive(Debug)]
struct Primary {
    ordinal: i32,
    device: i32,
    context: Raw<ffi::Context>,
    multiprocessors: u32,
    capability: (i32, i32),
}

/// A handle of the driver, which may be used from any thread.
#[derive(Clone, Copy, Debug)]
struct Raw<T>(T);

#[allow(unsafe_code, reason = "the driver's handles are not bound to threads")]
mod send {
    use super::Raw;

    // SAFETY: the driver's API is thread-safe for contexts, streams, events and allocations; what
    // must not overlap (a slice of pinned memory and a stream) is kept apart by `&mut` and events.
    unsafe impl<T> Send for Raw<T> {}
    // SAFETY: as above.
    unsafe impl<T> Sync for Raw<T> {}
}

impl Device {
    /// Device number `ordinal` of those that `CUDA_VISIBLE_DEVICES` leaves.
    ///
    /// # Errors
    ///
    /// [`CudaError::NoDriver`], [`CudaError::NoDevice`], and what the driver reports.
    pub fn open(ordinal: i32) -> Result<Self, CudaError> {
        let count = count()?;
        if !(0..count).contains(&ordinal) {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let device = ffi::device(ordinal)?;
        let context = ffi::retain(device)?;
        let attribute = |what| ffi::attribute(device, what);
        let about = || {
            let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            Ok((processors.unsigned_abs(), (major, minor)))
        };
        match about() {
            Ok((multiprocessors, capability)) => {
                let context = Raw(context);
                let primary = Primary { ordinal, device, context, multiprocessors, capability };
                Ok(Self(Arc::new(primary)))
            }
            Err(error) => {
                ffi::release(device)?;
                Err(error)
            }
        }
    }

    /// Its number.
    pub fn ordinal(&self) -> i32 {
        self.0.ordinal
    }

    /// Its name, such as `NVIDIA H200`.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn name(&self) -> Result<String, CudaError> {
        ffi::device_name(self.0.device)
    }

    /// Its compute capability: (9, 0) for Hopper.
    pub fn capability(&self) -> (i32, i32) {
        self.0.capability
    }

    /// How many multiprocessors it has.
    pub fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors
    }

    /// Free and all bytes of its memory.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.enter()?;
        ffi::memory_info()
    }

    /// Makes the context current on this thread. Every call here does so by itself; other libraries
    /// may need it.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn enter(&self) -> Result<(), CudaError> {
        ffi::set_current(self.0.context.0)
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        log(ffi::release(self.device));
    }
}

/// What can go wrong while a handle is dropped is the loss of the device; there is nobody to tell.
fn log(result: Result<(), CudaError>) {
    if let Err(error) = result {
        tracing::debug!(%error, "while releasing a CUDA handle");
    }
}

/// How many devices there are.
///
/// # Errors
///
/// [`CudaError::NoDriver`], and what the driver reports.
pub fn count() -> Result<i32, CudaError> {
    if !ffi::driver_is_present() {
        return Err(CudaError::NoDriver);
    }
    ffi::init()?;
    ffi::device_count()
}

/// The newest CUDA that the driver can run, as (major, minor).
///
/// # Errors
///
/// As [`count`].
pub fn driver_version() -> Result<(i32, i32), CudaError> {
    count()?;
    let version = ffi::driver_version()?;
    Ok((version / 1000, version % 1000 / 10))
}

/// A stream: work in order, beside that of other streams. Dropping it waits for its work.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    stream: Raw<ffi::RawStream>,
}

impl Stream {
    /// A new stream.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        device.enter()?;
        Ok(Self { device: device.clone(), stream: Raw(ffi::stream()?) })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Blocks until all work so far is done.
    ///
    /// # Errors
    ///
    /// What the work itself made go wrong.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device.enter()?;
        ffi::synchronize(self.stream.0)
    }

    /// Lets later work of this stream wait for what the event was recorded after.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        self.device.enter()?;
        ffi::wait_for(self.stream.0, event.event.0)
    }

    pub(crate) fn raw(&self) -> ffi::RawStream {
        self.stream.0
    }

    /// The driver's handle, for other libraries. It is valid as long as this is.
    pub fn as_raw(&self) -> *mut std::ffi::c_void {
        self.stream.0.cast()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Nothing that the stream uses may be freed before it is done, and owners may be dropped next.
        log(self.synchronize());
        log(ffi::destroy_stream(self.stream.0));
    }
}

/// A place in a stream's work.
#[derive(Debug)]
pub struct Event {
    device: Device,
    event: Raw<ffi::RawEvent>,
}

impl Event {
    /// An event; with `timing` its time can be taken.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn new(device: &Device, timing: bool) -> Result<Self, CudaError> {
        device.enter()?;
        Ok(Self { device: device.clone(), event: Raw(ffi::event(timing)?) })
    }

    /// Puts it after all work of the stream so far.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        self.device.enter()?;
        ffi::record(self.event.0, stream.raw())
    }

    /// Whether the work before it is done.
    ///
    /// # Errors
    ///
    /// What that work made go wrong.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.device.enter()?;
        ffi::is_done(self.event.0)
    }

    /// Blocks until the work before it is done.
    ///
    /// # Errors
    ///
    /// What that work made go wrong.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device.enter()?;
        ffi::await_event(self.event.0)
    }

    /// Seconds from an earlier event to this one; both were made with timing, and are done.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn seconds_since(&self, earlier: &Self) -> Result<f64, CudaError> {
        self.device.enter()?;
        Ok(f64::from(ffi::elapsed_ms(earlier.event.0, self.event.0)?) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        log(self.device.enter());
        log(ffi::destroy_event(self.event.0));
    }
}

/// Memory of a device: its own allocation, or one of another process.
///
/// Freed with the last clone, after all work that the device has by then.
#[derive(Clone, Debug)]
pub struct CudaMemory(Arc<Allocation>);

#[derive(Debug)]
struct Allocation {
    device: Device,
    address: u64,
    len: usize,
    origin: Origin,
}

/// Where an allocation comes from, and so what becomes of it.
#[derive(Debug)]
enum Origin {
    Own,
    Imported,
    /// Another library's, which has it again when this is dropped.
    Borrowed(#[expect(dead_code, reason = "kept to be dropped")] Arc<dyn Any + Send + Sync>),
}

/// An allocation as another process of the host can open it.
pub type IpcHandle = [u8; ffi::IPC_HANDLE_BYTES];

impl CudaMemory {
    /// So many bytes, at least 1, aligned to 256.
    ///
    /// # Errors
    ///
    /// What the driver reports: out of memory.
    pub fn new(device: &Device, len: usize) -> Result<Self, CudaError> {
        device.enter()?;
        let address = ffi::alloc(len.max(1))?;
        Ok(Self::of(device, address, len, Origin::Own))
    }

    /// Opens an allocation of so many bytes that another process exported.
    ///
    /// # Errors
    ///
    /// What the driver reports: the process is gone, or is this one.
    pub fn import(device: &Device, handle: IpcHandle, len: usize) -> Result<Self, CudaError> {
        device.enter()?;
        let address = ffi::import(handle)?;
        Ok(Self::of(device, address, len, Origin::Imported))
    }

    /// Memory of another library of this process, which gets it back when the last clone is dropped.
    pub(crate) fn borrowed(
        device: &Device,
        address: u64,
        len: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self::of(device, address, len, Origin::Borrowed(owner))
    }

    fn of(device: &Device, address: u64, len: usize, origin: Origin) -> Self {
        Self(Arc::new(Allocation { device: device.clone(), address, len, origin }))
    }

    /// A handle with which other processes of the host can open it as long as it lives.
    ///
    /// # Errors
    ///
    /// What the driver reports: the system does not support it.
    pub fn export(&self) -> Result<IpcHandle, CudaError> {
        self.0.device.enter()?;
        ffi::export(self.0.address)
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.0.address
    }

    /// Whether nobody else holds it.
    pub(crate) fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// A part of it.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] if the part reaches beyond it.
    pub fn slice(&self, start: usize, len: usize) -> Result<CudaSlice, CudaError> {
        match start.checked_add(len) {
            Some(end) if end <= self.0.len => Ok(CudaSlice { memory: self.clone(), start, len }),
            _ => Err(CudaError::Range(format!(
                "{len} bytes at {start} of device memory of {}",
                self.0.len
            ))),
        }
    }

    /// All of it.
    pub fn all(&self) -> CudaSlice {
        CudaSlice { memory: self.clone(), start: 0, len: self.0.len }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        log(self.device.enter());
        log(match &self.origin {
            Origin::Own => ffi::free(self.address),
            Origin::Imported => ffi::close_import(self.address),
            Origin::Borrowed(_) => Ok(()),
        });
    }
}

/// A part of an allocation, which it keeps.
#[derive(Clone, Debug)]
pub struct CudaSlice {
    memory: CudaMemory,
    start: usize,
    len: usize,
}

impl CudaSlice {
    /// The allocation that it is a part of.
    pub fn memory(&self) -> &CudaMemory {
        &self.memory
    }

    /// Where it begins in that allocation.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.memory.address() + self.start as u64
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// A part of it.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] if the part reaches beyond it.
    pub fn slice(&self, start: usize, len: usize) -> Result<Self, CudaError> {
        match start.checked_add(len) {
            Some(end) if end <= self.len => {
                Ok(Self { memory: self.memory.clone(), start: self.start + start, len })
            }
            _ => {
                Err(CudaError::Range(format!("{len} bytes at {start} of a slice of {}", self.len)))
            }
        }
    }

    /// Writes host bytes; blocks until they are there.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] if the lengths differ, and what the driver reports.
    pub fn write(&self, bytes: &[u8]) -> Result<(), CudaError> {
        self.fits(bytes.len())?;
        self.device().enter()?;
        ffi::write(self.address(), bytes)
    }

    /// Reads into host bytes; blocks until they are here.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn read(&self, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.fits(bytes.len())?;
        self.device().enter()?;
        ffi::read(bytes, self.address())
    }

    /// Copies another slice of the device here, on a stream, which both have to outlive.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn copy_from(&self, source: &Self, stream: &Stream) -> Result<(), CudaError> {
        self.fits(source.len)?;
        self.device().enter()?;
        ffi::copy_on_device(self.address(), source.address(), self.len, stream.raw())
    }

    /// Fills it with one byte, on a stream.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn fill(&self, byte: u8, stream: &Stream) -> Result<(), CudaError> {
        self.device().enter()?;
        ffi::fill(self.address(), byte, self.len, stream.raw())
    }

    fn fits(&self, len: usize) -> Result<(), CudaError> {
        if len == self.len {
            return Ok(());
        }
        Err(CudaError::Range(format!("{len} bytes for {} of device memory", self.len)))
    }
}

/// Host memory that a device copies from at full speed while the host goes on.
#[derive(Debug)]
pub struct PinnedMemory {
    device: Device,
    address: Raw<*mut u8>,
    len: usize,
}

impl PinnedMemory {
    /// So many bytes, zeroed.
    ///
    /// # Errors
    ///
    /// What the driver reports: out of memory.
    pub fn new(device: &Device, len: usize) -> Result<Self, CudaError> {
        device.enter()?;
        let address = Raw(ffi::alloc_host(len.max(1))?);
        Ok(Self { device: device.clone(), address, len })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its bytes, to be written. Waits for the stream's earlier work, which may still read them.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    #[allow(unsafe_code, reason = "a slice of memory that this type owns")]
    pub(crate) fn bytes(&mut self, stream: &Stream) -> Result<&mut [u8], CudaError> {
        stream.synchronize()?;
        // SAFETY: `len` bytes of `alloc_host` that live as long as `self`, borrowed for writing; the
        // stream that reads them has done so.
        Ok(unsafe { ffi::host_bytes(self.address.0, self.len) })
    }

    /// Copies bytes of the device to its beginning, on the stream that [`bytes`](Self::bytes) is given.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] for more bytes than it has, and what the driver reports.
    pub(crate) fn copy_from(
        &mut self,
        source: &CudaSlice,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        if source.len() > self.len {
            return Err(CudaError::Range(format!("{} bytes for {}", source.len(), self.len)));
        }
        self.device.enter()?;
        ffi::copy_to_pinned(self.address.0, source.address(), source.len(), stream.raw())
    }

    /// Copies some of its bytes to the device, on the stream that [`bytes`](Self::bytes) is given.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] for bytes beyond it, and what the driver reports.
    pub(crate) fn copy_to(
        &self,
        start: usize,
        target: &CudaSlice,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let len = target.len();
        if start.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(CudaError::Range(format!("{len} bytes at {start} of {}", self.len)));
        }
        self.device.enter()?;
        ffi::copy_from_pinned(
            target.address(),
            self.address.0.wrapping_add(start),
            len,
            stream.raw(),
        )
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        log(self.device.enter());
        log(ffi::free_host(self.address.0));
    }
}

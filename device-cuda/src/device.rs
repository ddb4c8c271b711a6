//! Devices, streams, events and memory. Every handle keeps its device's context.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use engine_core::DeviceChoice;

use crate::CudaError;
use crate::ffi::{self, Attribute, Context, Driver};

/// A CUDA device and its primary context.
#[derive(Clone, Debug)]
pub struct Device(Arc<Primary>);

#[derive(Debug)]
struct Primary {
    ordinal: i32,
    context: Context,
    multiprocessors: u32,
    capability: (i32, i32),
}

impl Device {
    /// Opens device number `ordinal` of those that `CUDA_VISIBLE_DEVICES` leaves.
    ///
    /// # Errors
    ///
    /// [`CudaError::NoDriver`], [`CudaError::NoDevice`], and what the driver reports.
    pub fn open(ordinal: i32) -> Result<Self, CudaError> {
        let driver = Driver::load()?;
        let count = driver.device_count()?;
        if !(0..count).contains(&ordinal) {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = Context::retain(driver, ordinal)?;
        let attribute = |what| context.attribute(what);
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let (multiprocessors, capability) = (processors.unsigned_abs(), (major, minor));
        Ok(Self(Arc::new(Primary { ordinal, context, multiprocessors, capability })))
    }

    /// Opens the device of a configuration: the first one if it has no number.
    pub fn of(choice: &DeviceChoice) -> Result<Self, CudaError> {
        Self::open(i32::try_from(choice.ordinal().unwrap_or(0)).unwrap_or(i32::MAX))
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
        self.0.context.name()
    }

    /// Its UUID, in lower case and without a prefix: `8a1d0b2c-…`, as torch writes it.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn uuid(&self) -> Result<String, CudaError> {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let bytes = self.0.context.uuid()?;
        let parts = [&bytes[..4], &bytes[4..6], &bytes[6..8], &bytes[8..10], &bytes[10..]];
        Ok(parts.map(hex).join("-"))
    }

    /// Its compute capability: (9, 0) for Hopper.
    pub fn capability(&self) -> (i32, i32) {
        self.0.capability
    }

    /// The number of its multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors
    }

    /// The free bytes and all bytes of its memory.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.0.context.memory_info()
    }

    /// Makes the context current on this thread. Every call of this crate does so by itself. Other libraries may need it.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn enter(&self) -> Result<(), CudaError> {
        self.0.context.enter()
    }

    pub(crate) fn context(&self) -> &Context {
        &self.0.context
    }
}

/// The number of devices.
///
/// # Errors
///
/// [`CudaError::NoDriver`], and what the driver reports.
pub fn count() -> Result<i32, CudaError> {
    Driver::load()?.device_count()
}

/// The newest CUDA that the driver can run, as (major, minor).
///
/// # Errors
///
/// As [`count`].
pub fn driver_version() -> Result<(i32, i32), CudaError> {
    let version = Driver::load()?.version()?;
    Ok((version / 1000, version % 1000 / 10))
}

/// A stream: its work runs in order, concurrently with that of other streams. It keeps the memory that its work uses until the work was
/// waited for. Dropping the last clone waits.
#[derive(Clone, Debug)]
pub struct Stream {
    device: Device,
    stream: ffi::Stream,
}

impl Stream {
    /// A new stream.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self { device: device.clone(), stream: ffi::Stream::new(device.context())? })
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
        self.stream.synchronize()
    }

    /// Makes later work of this stream wait for the work before the event.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        self.stream.wait_for(&event.event)
    }

    pub(crate) fn raw(&self) -> &ffi::Stream {
        &self.stream
    }

    /// The driver's handle, for other libraries. It is valid as long as this stream lives. The stream does not keep the memory that their
    /// work uses.
    pub fn as_raw(&self) -> *mut std::ffi::c_void {
        self.stream.as_raw()
    }
}

/// A stream of another library of this process, such as the current stream of a tensor's device.
#[derive(Clone, Debug)]
pub struct ForeignStream {
    device: Device,
    stream: Option<usize>,
}

impl ForeignStream {
    /// A stream by the driver's handle, 0 or 1 for the default stream. `None` stands for all streams of the device.
    ///
    /// # Safety
    ///
    /// It is a stream of this device, and is not destroyed before the last clone is dropped.
    #[allow(unsafe_code, reason = "hands the caller's promise on")]
    pub unsafe fn new(device: &Device, stream: Option<usize>) -> Self {
        Self { device: device.clone(), stream }
    }

    /// Whether it is this stream of this device.
    pub fn is(&self, device: &Device, stream: Option<usize>) -> bool {
        (self.device.ordinal(), self.stream) == (device.ordinal(), stream)
    }

    /// The work that it has to do now, to be waited for later. Work that is enqueued after this call is not waited for, unless this stands
    /// for all streams of the device. The thread's current context does not change.
    ///
    /// # Errors
    ///
    /// What the work itself made go wrong.
    #[allow(unsafe_code, reason = "hands the caller's promise on")]
    pub fn pending(&self) -> Result<Pending, CudaError> {
        // SAFETY: `new` was promised that the stream is this device's and lives.
        unsafe { ffi::Pending::of_foreign(self.device.context(), self.stream) }.map(Pending)
    }

    /// Blocks until all work so far is done. The thread's current context does not change.
    ///
    /// # Errors
    ///
    /// What the work itself made go wrong.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.pending()?.wait()
    }
}

/// The work that a [`ForeignStream`] had to do at a moment.
#[derive(Debug)]
pub struct Pending(ffi::Pending);

impl Pending {
    /// Whether there was nothing to do.
    pub fn is_nothing(&self) -> bool {
        matches!(self.0, ffi::Pending::Nothing)
    }

    /// Blocks until it is done. The thread's current context does not change.
    ///
    /// # Errors
    ///
    /// What the work itself made go wrong.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.0.wait()
    }
}

/// Runs a closure and restores the thread's current context, by which a program may have chosen its device.
pub fn keeping_current<R>(run: impl FnOnce() -> R) -> R {
    let _current = ffi::Current::keep();
    run()
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event {
    event: ffi::Event,
}

impl Event {
    /// Makes an event. With `timing`, [`seconds_since`](Self::seconds_since) can be used.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn new(device: &Device, timing: bool) -> Result<Self, CudaError> {
        Ok(Self { event: ffi::Event::new(device.context(), timing)? })
    }

    /// Records it after all work of the stream so far.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        self.event.record(stream.raw())
    }

    /// Whether the work before it is done.
    ///
    /// # Errors
    ///
    /// What that work made go wrong.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.event.is_done()
    }

    /// Blocks until the work before it is done.
    ///
    /// # Errors
    ///
    /// What that work made go wrong.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.event.wait()
    }

    /// Seconds from an earlier event to this one. Both were made with timing, and are done.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn seconds_since(&self, earlier: &Self) -> Result<f64, CudaError> {
        Ok(f64::from(self.event.milliseconds_since(&earlier.event)?) / 1e3)
    }
}

/// Memory of a device: an allocation of this process, or one of another process.
///
/// Freed with the last clone. Work of a stream that uses it keeps a clone.
#[derive(Clone, Debug)]
pub struct CudaMemory {
    device: Device,
    memory: Arc<ffi::Memory>,
}

/// A handle by which another process of the host can open an allocation.
pub type IpcHandle = [u8; ffi::IPC_HANDLE_BYTES];

impl CudaMemory {
    /// Allocates `len` bytes, at least 1, aligned to 256.
    ///
    /// # Errors
    ///
    /// What the driver reports: out of memory.
    pub fn new(device: &Device, len: usize) -> Result<Self, CudaError> {
        Ok(Self::of(device, ffi::Memory::new(device.context(), len)?))
    }

    /// As [`new`](Self::new), but never given back to the driver while this process lives: for memory that a library of another process may
    /// keep mapped. When its last clone is dropped, the next call for the same number of bytes of the same device reuses it.
    ///
    /// # Errors
    ///
    /// What the driver reports: out of memory.
    pub fn for_life(device: &Device, len: usize) -> Result<Self, CudaError> {
        static ALL: Mutex<Vec<CudaMemory>> = Mutex::new(Vec::new());
        // A panic leaves the list whole: pushing is the only change. The lock is held until memory is taken, so that two callers never take
        // the same memory.
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |memory: &&Self| {
            memory.len() == len && memory.device.ordinal() == device.ordinal() && memory.is_unused()
        };
        if let Some(unused) = all.iter().find(fits) {
            return Ok(unused.clone());
        }
        let memory = Self::new(device, len)?;
        all.push(memory.clone());
        Ok(memory)
    }

    /// Whether the list in `for_life` has the only clone.
    fn is_unused(&self) -> bool {
        Arc::strong_count(&self.memory) == 1
    }

    /// Opens an allocation of `len` bytes that another process exported. `owner` is dropped when it is closed again.
    ///
    /// # Errors
    ///
    /// What the driver reports: the process is gone, or is this one. [`CudaError::Range`] if the allocation
    /// is shorter.
    pub fn import(
        device: &Device,
        handle: IpcHandle,
        len: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, CudaError> {
        Ok(Self::of(device, ffi::Memory::import(device.context(), handle, len, owner)?))
    }

    /// Memory that another library of this process keeps. Nothing is copied.
    ///
    /// # Safety
    ///
    /// `len` bytes of the device, or of one that it can reach, are at `address` as long as `owner` lives.
    #[allow(unsafe_code, reason = "hands the caller's promise on")]
    pub unsafe fn borrowed(
        device: &Device,
        address: u64,
        len: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        // SAFETY: the caller's.
        Self::of(device, unsafe { ffi::Memory::borrowed(device.context(), address, len, owner) })
    }

    pub(crate) fn of(device: &Device, memory: ffi::Memory) -> Self {
        Self { device: device.clone(), memory: Arc::new(memory) }
    }

    /// The driver's whole allocation that it lies in, which keeps it.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    #[allow(unsafe_code, reason = "the driver is believed")]
    pub fn allocation(&self) -> Result<Self, CudaError> {
        let (address, len) = self.memory.allocation()?;
        let (context, owner) = (self.device.context(), self.memory.clone());
        // SAFETY: the driver says so. It frees an allocation as a whole, so not before this memory.
        Ok(Self::of(&self.device, unsafe { ffi::Memory::borrowed(context, address, len, owner) }))
    }

    /// A handle with which other processes of the host can open it as long as it lives.
    ///
    /// # Contract
    ///
    /// They have closed it before the last clone is dropped: CUDA does not define the result of freeing memory that another process has
    /// open.
    ///
    /// # Errors
    ///
    /// What the driver reports: the system does not support it.
    pub fn export(&self) -> Result<IpcHandle, CudaError> {
        self.memory.export()
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// A weak reference to the memory.
    pub(crate) fn downgrade(&self) -> WeakMemory {
        WeakMemory { device: self.device.clone(), memory: Arc::downgrade(&self.memory) }
    }

    /// Whether nobody else holds it, the work of streams included.
    pub(crate) fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.memory) == 1
    }

    pub(crate) fn raw(&self) -> &Arc<ffi::Memory> {
        &self.memory
    }

    /// A part of it.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] if the part reaches beyond it.
    pub fn slice(&self, start: usize, len: usize) -> Result<CudaSlice, CudaError> {
        match start.checked_add(len) {
            Some(end) if end <= self.len() => Ok(CudaSlice { memory: self.clone(), start, len }),
            _ => Err(CudaError::Range(format!(
                "{len} bytes at {start} of device memory of {}",
                self.len()
            ))),
        }
    }

    /// All of it.
    pub fn all(&self) -> CudaSlice {
        CudaSlice { memory: self.clone(), start: 0, len: self.len() }
    }
}

/// A weak reference to memory of this process.
#[derive(Debug)]
pub(crate) struct WeakMemory {
    device: Device,
    memory: Weak<ffi::Memory>,
}

impl WeakMemory {
    pub(crate) fn upgrade(&self) -> Option<CudaMemory> {
        self.memory.upgrade().map(|memory| CudaMemory { device: self.device.clone(), memory })
    }
}

/// A part of an allocation, which it keeps.
#[derive(Clone, Debug)]
pub struct CudaSlice {
    memory: CudaMemory,
    start: usize,
    len: usize,
}

/// Equal if it is the same place, whatever the bytes.
impl PartialEq for CudaSlice {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory.memory, &other.memory.memory)
            && (self.start, self.len) == (other.start, other.len)
    }
}

impl Eq for CudaSlice {}

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

    /// The address of a part of it.
    pub(crate) fn address_of(&self, start: u64, len: u64) -> Result<u64, CudaError> {
        match start.checked_add(len) {
            Some(end) if end <= self.len as u64 => Ok(self.address() + start),
            _ => {
                Err(CudaError::Range(format!("{len} bytes at {start} of a slice of {}", self.len)))
            }
        }
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

    /// Writes host bytes. Blocks until they have arrived.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] if the lengths differ, and what the driver reports.
    pub fn write(&self, bytes: &[u8]) -> Result<(), CudaError> {
        self.fits(bytes.len())?;
        self.memory.raw().write(self.start, bytes)
    }

    /// Reads into host bytes. Blocks until they have arrived.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn read(&self, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.fits(bytes.len())?;
        self.memory.raw().read(self.start, bytes)
    }

    /// Copies another slice of the device here, on a stream, which keeps both until the work was waited for.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn copy_from(&self, source: &Self, stream: &Stream) -> Result<(), CudaError> {
        self.fits(source.len)?;
        stream.raw().copy(self.place(), source.place(), self.len)
    }

    /// Fills it with one byte, on a stream, which keeps it until the work was waited for.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn fill(&self, byte: u8, stream: &Stream) -> Result<(), CudaError> {
        stream.raw().fill(self.place(), byte, self.len)
    }

    fn place(&self) -> (&Arc<ffi::Memory>, usize) {
        (self.memory.raw(), self.start)
    }

    fn fits(&self, len: usize) -> Result<(), CudaError> {
        if len == self.len {
            return Ok(());
        }
        Err(CudaError::Range(format!("{len} bytes for {} of device memory", self.len)))
    }
}

/// Host memory that a stream copies from and to at full speed while the host goes on.
#[derive(Debug)]
pub struct PinnedMemory(ffi::Pinned);

impl PinnedMemory {
    /// Allocates `len` zeroed bytes for one stream.
    ///
    /// # Errors
    ///
    /// What the driver reports: out of memory.
    pub fn new(stream: &Stream, len: usize) -> Result<Self, CudaError> {
        Ok(Self(ffi::Pinned::new(stream.raw(), len)?))
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its bytes. Waits for the stream's earlier work, which may still use them.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn bytes(&mut self) -> Result<&mut [u8], CudaError> {
        self.0.bytes()
    }

    /// Copies bytes of the device to its beginning, on the stream.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] for more bytes than it has, and what the driver reports.
    pub fn copy_from(&mut self, source: &CudaSlice) -> Result<(), CudaError> {
        self.0.copy_from(source.place(), source.len)
    }

    /// Copies some of its bytes to the device, on the stream.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] for bytes beyond it, and what the driver reports.
    pub fn copy_to(&self, start: usize, target: &CudaSlice) -> Result<(), CudaError> {
        self.0.copy_to(start, target.place(), target.len)
    }
}

//! A kind of memory of one's own: a "device" whose memory the CPU reaches by copies alone. It is a file without a name here;
//! of an accelerator, the copies would be its driver's.
//!
//! [`MEMORY`] is all that a program needs: `registry().with_memory(file_memory::MEMORY)`, and `device = "file"` in the
//! configuration. Transports know nothing of it, and it knows nothing of transports.

#![forbid(unsafe_code)]

use std::any::Any;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use engine_core::memory::{Job, Pool, TensorMemory};
use engine_core::provider::{
    Allocation, BucketMemory, BucketSlot, Exported, ImportedMemory, Lifetime, MemoryKind,
    NativeHandle, SlotBytes,
};
use engine_core::{
    DeviceBytes, DeviceChoice, DeviceMemory, Error, ErrorKind, Result, Storage, Weight,
};
use serde::{Deserialize, Serialize};

/// Files as a kind of memory, to be registered.
pub static MEMORY: &dyn MemoryKind = &Files;

#[derive(Debug)]
struct Files;

impl MemoryKind for Files {
    fn name(&self) -> &'static str {
        "file"
    }

    fn allocate(
        &self,
        _: &DeviceChoice,
        slots: u32,
        bytes: u64,
        _: Lifetime,
    ) -> Result<Allocation> {
        let total = bytes.checked_mul(slots.into()).ok_or_else(|| {
            let message = format!("{slots} slots of {bytes} bytes are too many");
            Error::new(ErrorKind::Config, "allocating", message)
        })?;
        let memory = Arc::new(Memory::new(total)?);
        let slot = |number| Slot::boxed(&memory, u64::from(number) * bytes, bytes);
        Ok(Allocation { slots: (0..slots).map(slot).collect(), memory: memory.clone() })
    }

    fn import(
        &self,
        _: &DeviceChoice,
        handle: &[u8],
        bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Box<dyn ImportedMemory>> {
        let wrong = |words: String| Error::new(ErrorKind::Protocol, "opening a file", words);
        let handle: Handle =
            serde_json::from_slice(handle).map_err(|error| wrong(error.to_string()))?;
        let path = format!("/proc/{}/fd/{}", handle.process, handle.descriptor);
        let gone = |words: String| Error::new(ErrorKind::PeerLost, "opening a file", words);
        let file = File::open(&path).map_err(|error| gone(format!("{path}: {error}")))?;
        let found = file.metadata().map_err(|error| gone(format!("{path}: {error}")))?;
        if (found.dev(), found.ino()) != handle.file {
            return Err(gone(format!("{path} is another file now")));
        }
        if found.len() < bytes {
            return Err(wrong(format!("{path} has {} bytes, {bytes} were said", found.len())));
        }
        let memory = Arc::new(Memory { file, len: bytes });
        Ok(Box::new(Imported { memory, owner }))
    }
}

/// A weight of the same bytes on the "device".
///
/// # Errors
///
/// Those of the weight; `Io` if the file cannot be written.
pub fn upload(weight: &Weight) -> Result<Weight> {
    let bytes = weight.to_bytes()?;
    let memory = Memory::new(bytes.len() as u64)?;
    memory.write(0, &bytes)?;
    Weight::from_meta(weight.meta().clone(), Storage::from(DeviceBytes::new(Arc::new(memory))))
}

/// What travels of memory that was exported.
#[derive(Serialize, Deserialize)]
struct Handle {
    process: u32,
    descriptor: i32,
    /// Its device and number, so that another file behind the same descriptor is noticed.
    file: (u64, u64),
}

#[derive(Debug)]
struct Memory {
    file: File,
    len: u64,
}

impl Memory {
    fn new(len: u64) -> Result<Self> {
        let file = tempfile::tempfile().map_err(failed)?;
        file.set_len(len).map_err(|error| {
            let message = format!("no room for a file of {len} bytes: {error}");
            Error::new(ErrorKind::Resource, "allocating", message)
        })?;
        Ok(Self { file, len })
    }

    fn write(&self, start: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, start).map_err(failed)
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, "using a file", error.to_string()).with_source(error)
}

impl DeviceMemory for Memory {
    fn device(&self) -> String {
        "file:0".into()
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, start: u64, destination: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(destination, start).map_err(failed)
    }
}

impl BucketMemory for Memory {
    fn len(&self) -> u64 {
        self.len
    }

    fn spare(&self, bytes: u64) -> Result<Box<dyn BucketSlot>> {
        Ok(Slot::boxed(&Arc::new(Self::new(bytes)?), 0, bytes))
    }

    fn export(&self) -> Result<Exported> {
        let found = self.file.metadata().map_err(failed)?;
        let handle = Handle {
            process: std::process::id(),
            descriptor: self.file.as_raw_fd(),
            file: (found.dev(), found.ino()),
        };
        let handle = serde_json::to_vec(&handle).map_err(|error| {
            Error::new(ErrorKind::Protocol, "sharing a file", error.to_string())
        })?;
        // What any program opens it with.
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd());
        let native = NativeHandle { device: DeviceMemory::device(self), handle: path.into() };
        // The system keeps a file that somebody has open.
        Ok(Exported { handle, stays_while_open: false, native: Some(native) })
    }
}

#[derive(Debug)]
struct Slot {
    file: Arc<Memory>,
    memory: Arc<dyn BucketMemory>,
    start: u64,
    len: u64,
}

impl Slot {
    fn boxed(memory: &Arc<Memory>, start: u64, len: u64) -> Box<dyn BucketSlot> {
        Box::new(Self { file: memory.clone(), memory: memory.clone(), start, len })
    }

    fn check(&self, filled: u64) -> Result<()> {
        if filled <= self.len {
            return Ok(());
        }
        let message = format!("{filled} bytes of a slot of {}", self.len);
        Err(Error::new(ErrorKind::State, "using a slot", message))
    }
}

impl BucketSlot for Slot {
    fn memory(&self) -> &Arc<dyn BucketMemory> {
        &self.memory
    }

    fn start(&self) -> u64 {
        self.start
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn fill(&mut self, filled: u64, jobs: Vec<Job>, pool: &Pool, digests: bool) -> Result<u64> {
        self.check(filled)?;
        // An accelerator would encode what it has kernels for, and copy the rest.
        let used = jobs.iter().map(|job| job.offset + job.len).max().unwrap_or(0);
        self.check(used)?;
        let mut staging = TensorMemory::new(used, "filling a bucket")?;
        let sum = pool.encode(&jobs, staging.bytes_mut(), digests)?;
        self.file.write(self.start, staging.bytes())?;
        Ok(sum)
    }

    fn read(&self, filled: u64) -> Result<SlotBytes<'_>> {
        self.check(filled)?;
        let whole = Storage::from(DeviceBytes::new(self.file.clone()));
        match whole.slice(self.start..self.start + filled) {
            Storage::Device(bytes) => Ok(SlotBytes::Device(bytes)),
            Storage::Host(bytes) => {
                let message = format!("{} bytes of a file are in host memory", bytes.len());
                Err(Error::new(ErrorKind::State, "using a slot", message))
            }
        }
    }
}

/// Memory that another process has exported.
#[derive(Debug)]
struct Imported {
    memory: Arc<Memory>,
    owner: Arc<dyn Any + Send + Sync>,
}

impl ImportedMemory for Imported {
    fn view(&self, bytes: Range<u64>) -> Result<Storage> {
        if bytes.start > bytes.end || bytes.end > self.memory.len {
            let message = format!("bytes {bytes:?} of a file of {}", self.memory.len);
            return Err(Error::new(ErrorKind::Protocol, "reading a bucket", message));
        }
        let whole = Storage::from(DeviceBytes::new(self.memory.clone()));
        Ok(whole.slice(bytes).guarded(self.owner.clone()))
    }
}

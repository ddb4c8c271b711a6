//! Host memory that NIXL and peers access by its address, as a kind of memory.

mod ffi;

use std::sync::Arc;

use engine_core::memory::{Job, Pool};
use engine_core::provider::{
    Allocation, BucketMemory, BucketSlot, Lifetime, MemoryKind, Reach, SlotBytes,
};
use engine_core::{DeviceChoice, Error, ErrorKind, Result, available_memory};
use rustix::io::Errno;

use crate::arena::Memory;
use crate::error::NixlError;
use ffi::Mapping;
pub(crate) use ffi::{Piece, PromisedMemory};

/// Mapped memory of this process.
#[derive(Debug)]
pub(crate) struct HostMemory;

impl MemoryKind for HostMemory {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn is_host(&self) -> bool {
        true
    }

    fn allocate(
        &self,
        _: &DeviceChoice,
        slots: u32,
        bytes: u64,
        _: Lifetime,
    ) -> Result<Allocation> {
        let too_large = NixlError::TooLarge { slots, bytes };
        let len = bytes.checked_mul(slots.into()).and_then(|total| usize::try_from(total).ok());
        let (Some(len), Ok(bytes)) = (len, usize::try_from(bytes)) else {
            return Err(too_large.into());
        };
        let pieces = map(len)?.cut(bytes);
        let memory: Arc<dyn BucketMemory> = pieces.first().ok_or(too_large)?.mapping().clone();
        let slot = |piece| -> Box<dyn BucketSlot> { Box::new(Slot::new(piece)) };
        Ok(Allocation { memory, slots: pieces.into_iter().map(slot).collect() })
    }
}

/// So many pieces of memory of so many bytes each, and the memory that they are cut from.
///
/// # Errors
///
/// `Resource` if there is not so much.
pub(crate) fn pieces(count: usize, bytes: usize) -> Result<(Memory, Vec<Piece>)> {
    let full = NixlError::NoMemoryToLend(bytes as u64);
    let len = count.checked_mul(bytes).ok_or(full)?;
    let cut = map(len)
        .map_err(|error| match error {
            NixlError::Full(bytes) => NixlError::NoMemoryToLend(bytes),
            other => other,
        })?
        .cut(bytes);
    let mapping = cut.first().ok_or(NixlError::NoMemoryToLend(0))?.mapping().clone();
    Ok((Memory::new(mapping)?, cut))
}

/// Maps `len` bytes.
fn map(len: usize) -> Result<Mapping, NixlError> {
    // Without enough memory the mapping would not fail; the kernel would kill processes instead.
    let total = len as u64;
    if available_memory().is_some_and(|available| total > available) {
        return Err(NixlError::Full(total));
    }
    Mapping::new(len).map_err(|errno| match errno {
        Errno::NOMEM | Errno::AGAIN => NixlError::Full(total),
        errno => NixlError::System { call: "mmap", errno },
    })
}

/// A piece of a mapping.
#[derive(Debug)]
struct Slot {
    piece: Piece,
    /// The mapping.
    memory: Arc<dyn BucketMemory>,
}

impl Slot {
    fn new(piece: Piece) -> Self {
        Self { memory: piece.mapping().clone(), piece }
    }
}

impl BucketMemory for Mapping {
    fn reach(&self) -> Option<Reach> {
        Some(Self::reach(self))
    }

    fn len(&self) -> u64 {
        Self::len(self) as u64
    }

    fn spare(&self, bytes: u64) -> Result<Box<dyn BucketSlot>> {
        let len = usize::try_from(bytes).map_err(|_| NixlError::Full(bytes))?;
        let piece = map(len)?.cut(len).pop().ok_or(NixlError::Full(bytes))?;
        Ok(Box::new(Slot::new(piece)))
    }
}

impl BucketMemory for PromisedMemory {
    fn reach(&self) -> Option<Reach> {
        Some(Self::reach(self))
    }

    fn len(&self) -> u64 {
        Self::len(self) as u64
    }

    fn spare(&self, _: u64) -> Result<Box<dyn BucketSlot>> {
        let message = "memory of a program's own tensors has no slots";
        Err(Error::new(ErrorKind::Backend, "using NIXL", message))
    }
}

impl BucketSlot for Slot {
    fn memory(&self) -> &Arc<dyn BucketMemory> {
        &self.memory
    }

    fn start(&self) -> u64 {
        self.piece.at() as u64
    }

    fn len(&self) -> u64 {
        self.piece.len() as u64
    }

    fn fill(&mut self, filled: u64, jobs: Vec<Job>, pool: &Pool, digests: bool) -> Result<u64> {
        let outside = NixlError::OutsideSlot { filled, bytes: self.len() };
        let bytes = self.piece.bytes_mut().get_mut(..filled as usize).ok_or(outside)?;
        pool.encode(&jobs, bytes, digests)
    }

    fn read(&self, filled: u64) -> Result<SlotBytes<'_>> {
        let outside = NixlError::OutsideSlot { filled, bytes: self.len() };
        Ok(SlotBytes::Host(self.piece.bytes().get(..filled as usize).ok_or(outside)?))
    }
}

//! Mapped memory: all of the crate's `unsafe`.
#![allow(unsafe_code, reason = "mapping memory that processes share")]

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// A shared mapping of a whole file. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is memory like any other; who may access which part of it when is up to the
// functions below.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, for reading alone or for writing too, with all pages present.
    pub(crate) fn new(file: BorrowedFd<'_>, len: usize, writable: bool) -> Result<Self, Errno> {
        let protection =
            if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) }?;
        match NonNull::new(start.cast()) {
            Some(start) => Ok(Self { start, len }),
            None => Err(Errno::NOMEM),
        }
    }

    fn check(&self, at: usize, len: usize) {
        let end = at.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len), "a range outside the mapping");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more: every view holds it by `Arc`.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "a segment could not be unmapped");
        }
    }
}

/// A part of a mapping that nobody writes to while this lives, to be read.
#[derive(Debug)]
pub(crate) struct ReadView {
    mapping: Arc<Mapping>,
    at: usize,
    len: usize,
}

impl ReadView {
    /// # Panics
    ///
    /// If the range is not within the mapping.
    pub(crate) fn new(mapping: Arc<Mapping>, at: usize, len: usize) -> Self {
        mapping.check(at, len);
        Self { mapping, at, len }
    }
}

impl AsRef<[u8]> for ReadView {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `new` checked that the range is within the mapping.
        let start = unsafe { self.mapping.start.as_ptr().add(self.at) };
        // SAFETY: the bytes are mapped as long as `self.mapping` lives. Nobody writes to them: this
        // process maps them read-only, and either the file is sealed against writing (a cache), or the
        // trainer writes to a slot only after every receiver has released it, which the protocol ties
        // to the end of this view. Any byte is a valid `u8`.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

/// A part of a mapping that this process alone accesses while this lives, to be written.
#[derive(Debug)]
pub(crate) struct WriteView {
    mapping: Arc<Mapping>,
    at: usize,
    len: usize,
    /// Keeps any other view of the same slot from being made.
    _lock: tokio::sync::OwnedMutexGuard<()>,
}

impl WriteView {
    /// A view of a slot whose lock is given.
    ///
    /// # Panics
    ///
    /// If the range is not within the mapping.
    pub(crate) fn new(
        mapping: Arc<Mapping>,
        at: usize,
        len: usize,
        lock: tokio::sync::OwnedMutexGuard<()>,
    ) -> Self {
        mapping.check(at, len);
        Self { mapping, at, len, _lock: lock }
    }

    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: `new` checked that the range is within the mapping.
        let start = unsafe { self.mapping.start.as_ptr().add(self.at) };
        // SAFETY: the bytes are mapped for writing as long as `self.mapping` lives. In this process
        // the slot's lock, which the segment hands out for every view of it, makes this the only one;
        // receivers have released the slot before the engine fills it.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

//! Mapped memory.
#![allow(unsafe_code, reason = "memory that NIXL and peers access by its address")]

use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use tokio::sync::OwnedMutexGuard;

/// Memory of this process. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is memory like any other; who may access which part of it when is up to the
// views below.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps so many bytes, with all pages present.
    pub(super) fn new(len: usize) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        NonNull::new(start.cast()).map(|start| Self { start, len }).ok_or(Errno::NOMEM)
    }

    pub(super) fn address(&self) -> usize {
        // The address leaves the program: to NIXL, and through it to peers.
        self.start.as_ptr().expose_provenance()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn check(&self, at: usize, len: usize) {
        let end = at.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len), "a range outside the mapping");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more: views and agent hold it by `Arc`.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "an arena could not be unmapped");
        }
    }
}

/// A slot's bytes, to be read. Peers may read them too.
#[derive(Debug)]
pub(super) struct ReadView {
    mapping: Arc<Mapping>,
    at: usize,
    len: usize,
    _lock: OwnedMutexGuard<()>,
}

impl ReadView {
    /// # Panics
    ///
    /// If the range is not within the mapping.
    pub(super) fn new(
        mapping: Arc<Mapping>,
        at: usize,
        len: usize,
        lock: OwnedMutexGuard<()>,
    ) -> Self {
        mapping.check(at, len);
        Self { mapping, at, len, _lock: lock }
    }
}

impl AsRef<[u8]> for ReadView {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `new` checked that the range is within the mapping.
        let start = unsafe { self.mapping.start.as_ptr().add(self.at) };
        // SAFETY: the bytes are mapped as long as `self.mapping` lives. Nobody writes to them: this
        // process writes to a slot only with its lock, which is in this view, and peers write to one
        // only when the protocol gave it to them, which ends before a view is made: of a write that
        // was given up, the memory is replaced. Any byte is a valid `u8`.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

/// A slot's bytes, to be written.
#[derive(Debug)]
pub(crate) struct WriteView {
    mapping: Arc<Mapping>,
    at: usize,
    len: usize,
    _lock: OwnedMutexGuard<()>,
}

impl WriteView {
    /// # Panics
    ///
    /// If the range is not within the mapping.
    pub(super) fn new(
        mapping: Arc<Mapping>,
        at: usize,
        len: usize,
        lock: OwnedMutexGuard<()>,
    ) -> Self {
        mapping.check(at, len);
        Self { mapping, at, len, _lock: lock }
    }

    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: `new` checked that the range is within the mapping.
        let start = unsafe { self.mapping.start.as_ptr().add(self.at) };
        // SAFETY: the bytes are mapped for writing as long as `self.mapping` lives, and the slot's
        // lock makes this the only view of them in this process. A peer that reads them meanwhile,
        // for an update that was aborted, throws away what it reads.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

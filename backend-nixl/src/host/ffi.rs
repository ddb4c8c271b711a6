//! Mapped memory.
#![allow(unsafe_code, reason = "memory that NIXL and peers access by its address")]

use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use engine_core::provider::Reach;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Memory of this process. Unmapped when dropped.
///
/// It gives no access to its bytes. The [`Piece`]s that it is cut into do.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is memory like any other, and it can be unmapped by any thread.
unsafe impl Send for Mapping {}
// SAFETY: a shared mapping gives no access to its bytes, only its address and length.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, with all pages present.
    pub(super) fn new(len: usize) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        NonNull::new(start.cast()).map(|start| Self { start, len }).ok_or(Errno::NOMEM)
    }

    /// Cuts the mapping into pieces of equal size, as many as fit, which do not overlap.
    ///
    /// It takes the mapping by value, so that nothing is cut twice.
    pub(super) fn cut(self, piece: usize) -> Vec<Piece> {
        let count = self.len.checked_div(piece).unwrap_or(0);
        let mapping = Arc::new(self);
        let cut = |number| Piece { mapping: mapping.clone(), at: number * piece, len: piece };
        (0..count).map(cut).collect()
    }

    pub(super) fn reach(&self) -> Reach {
        // NIXL and peers get the address.
        let address = self.start.as_ptr().expose_provenance();
        // SAFETY: the memory is mapped for writing as long as `self` lives. Its pieces, which slots have, do not overlap, and
        // nothing else gives access to it.
        unsafe { Reach::new(address as u64, None) }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more: pieces and agents hold it by `Arc`.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "an arena could not be unmapped");
        }
    }
}

/// Bytes of a mapping that nobody else in this process has: no two pieces share a byte, and a piece cannot be copied.
///
/// NIXL and peers access the bytes by their address. Code that lets them write there makes the piece inaccessible until they have ended:
/// see [`Lent`](crate::arena::Lent) and [`RawTransfer`](crate::ffi::RawTransfer).
#[derive(Debug)]
pub(crate) struct Piece {
    mapping: Arc<Mapping>,
    /// `at + len` is at most the mapping's length: only `cut` makes pieces.
    at: usize,
    len: usize,
}

impl Piece {
    pub(super) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Where it begins in its mapping.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it begins, for libraries and peers.
    pub(crate) fn address(&self) -> usize {
        self.mapping.start.as_ptr().expose_provenance() + self.at
    }

    /// Its bytes. Only for use while no peer may write to them.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the piece lies within the mapping.
        let start = unsafe { self.mapping.start.as_ptr().add(self.at) };
        // SAFETY: the bytes are mapped as long as `self.mapping` lives. No other piece has them, so that
        // nothing in this process writes to them while `self` is borrowed, and what a library or a peer writes
        // there has ended before the piece can be reached again. Any byte is a valid `u8`.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the piece lies within the mapping.
        let start = unsafe { self.mapping.start.as_ptr().add(self.at) };
        // SAFETY: the bytes are mapped for writing as long as `self.mapping` lives, no other piece has them, and
        // `self` is borrowed for this alone. A peer that reads them meanwhile, for an update that was
        // aborted, throws away what it reads.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

/// Memory that somebody else has, and has promised to.
#[derive(Debug)]
pub(crate) struct PromisedMemory {
    address: u64,
    len: usize,
    _owners: Vec<Bytes>,
}

impl PromisedMemory {
    /// So many bytes from an address on.
    ///
    /// # Safety
    ///
    /// All of them are bytes of one of the owners. They may be written to as long as the owners live, and nobody in this process accesses
    /// them while peers may write.
    pub(crate) unsafe fn new(address: u64, len: usize, owners: Vec<Bytes>) -> Self {
        Self { address, len, _owners: owners }
    }

    pub(super) fn reach(&self) -> Reach {
        // SAFETY: as was promised when this was made. It has no slots.
        unsafe { Reach::new(self.address, None) }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

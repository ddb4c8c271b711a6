//! The memory of a rank's buckets: slots in one piece, registered once.

mod ffi;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::error::NixlError;
use ffi::{Mapping, ReadView, WriteView};

/// Slots of equal size, each of them with at most one user who may write.
#[derive(Debug)]
pub(crate) struct Arena {
    mapping: Arc<Mapping>,
    locks: Vec<Arc<Mutex<()>>>,
    slot_bytes: usize,
}

impl Arena {
    /// Allocates the slots. All of their memory is there when this returns.
    pub(crate) fn new(slots: u32, bytes: u64) -> Result<Self, NixlError> {
        let too_large = NixlError::TooLarge { slots, bytes };
        let Some(total) = bytes.checked_mul(slots.into()) else { return Err(too_large) };
        let (Ok(len), Ok(slot_bytes)) = (usize::try_from(total), usize::try_from(bytes)) else {
            return Err(too_large);
        };
        // Memory that is not there would not fail here, but end processes of the kernel's choice.
        if available_memory().is_some_and(|available| total > available) {
            return Err(NixlError::Full(total));
        }
        let mapping = Mapping::new(len).map_err(|errno| match errno {
            rustix::io::Errno::NOMEM | rustix::io::Errno::AGAIN => NixlError::Full(total),
            errno => NixlError::System { call: "mmap", errno },
        })?;
        let locks = (0..slots).map(|_| Arc::default()).collect();
        Ok(Self { mapping: Arc::new(mapping), locks, slot_bytes })
    }

    pub(crate) fn slots(&self) -> u32 {
        self.locks.len() as u32
    }

    pub(crate) fn slot_bytes(&self) -> u64 {
        self.slot_bytes as u64
    }

    pub(crate) fn address(&self) -> usize {
        self.mapping.address()
    }

    pub(crate) fn len(&self) -> usize {
        self.mapping.len()
    }

    /// The first bytes of a slot, once nobody else uses it.
    pub(crate) async fn lock(
        &self,
        slot: u32,
        filled: u64,
        deadline: Duration,
    ) -> Result<Slot, NixlError> {
        let lock = self.locks.get(slot as usize).filter(|_| filled <= self.slot_bytes());
        let Some(lock) = lock else {
            let (slots, bytes) = (self.slots(), self.slot_bytes());
            return Err(NixlError::Outside { slot, filled, slots, bytes });
        };
        let lock = tokio::time::timeout(deadline, lock.clone().lock_owned()).await;
        let lock = lock.map_err(|_| NixlError::InUse { slot, waited: deadline })?;
        let at = slot as usize * self.slot_bytes;
        Ok(Slot { mapping: self.mapping.clone(), at, len: filled as usize, lock })
    }
}

/// The first bytes of a slot, which nobody else in this process uses.
#[derive(Debug)]
pub(crate) struct Slot {
    mapping: Arc<Mapping>,
    at: usize,
    len: usize,
    lock: OwnedMutexGuard<()>,
}

impl Slot {
    /// Where the bytes are: address and length.
    pub(crate) fn range(&self) -> (usize, usize) {
        (self.mapping.address() + self.at, self.len)
    }

    /// To be written by this process.
    pub(crate) fn into_write(self) -> WriteView {
        WriteView::new(self.mapping, self.at, self.len, self.lock)
    }

    /// To be read; the slot is in use until the last of these bytes is dropped.
    pub(crate) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(ReadView::new(self.mapping, self.at, self.len, self.lock))
    }
}

/// Memory that can be had without swapping, in bytes.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

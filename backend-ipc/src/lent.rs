//! Memory that a rollout lends to trainers of its host, which write their updates straight into it.
//!
//! The memory is a file that both map. A [lease](crate::lease) for each update governs writing: a trainer holds it as long
//! as it may write, and the system releases it when the trainer's process ends, however it ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result};
use placed::{Encoder, Lender, LentBytes, Reach, Reached};
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::ffi::{Mapping, ReadView};
use crate::lease::{Borrowed, Lease, Terms};
#[cfg(feature = "cuda")]
use crate::lent_cuda::{CudaOffer, Peers};
use crate::memfile::{FileAddress, MemFile};
use crate::segment::{allocate, memory_in_words};

/// A rollout's terms, by the kind of its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Offer {
    Host(HostOffer),
    #[cfg(feature = "cuda")]
    Cuda(CudaOffer),
}

/// Encodes terms for the wire.
pub(crate) fn in_bytes(offer: &Offer) -> Result<Bytes> {
    serde_json::to_vec(offer).map(Bytes::from).map_err(|error| {
        Error::new(ErrorKind::Protocol, "lending tensors", error.to_string()).with_source(error)
    })
}

/// What a trainer needs to write to a rollout's memory in one update.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HostOffer {
    file: FileAddress,
    bytes: u64,
    lease: Terms,
}

/// A rollout's memory of the host.
#[derive(Debug)]
pub(crate) struct LentMemory {
    bytes: ReadView,
    file: MemFile,
    lease: Option<Lease>,
}

impl LentMemory {
    /// Allocates this many bytes of zeroed memory, with all pages present.
    pub(crate) fn create(bytes: u64) -> Result<Self, SegmentError> {
        let full = || SegmentError::NoMemoryToLend { needed: bytes, available: memory_in_words() };
        // A file without bytes cannot be mapped.
        let (file, mapping) = allocate("ckpt-engine-tensors", bytes.max(1), full)?;
        let len = mapping.len();
        let view = ReadView::new(Arc::new(mapping), 0, len);
        Ok(Self { bytes: view, file, lease: None })
    }
}

impl Lender for LentMemory {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn lend(&mut self) -> Result<Bytes> {
        if self.lease.is_some() {
            return Err(SegmentError::Lent.into());
        }
        let lease = Lease::new()?;
        let offer =
            HostOffer { file: self.file.address(), bytes: self.len(), lease: lease.terms() };
        self.lease = Some(lease);
        in_bytes(&Offer::Host(offer))
    }

    fn take_back(&mut self) -> Result<bool> {
        if self.lease.as_ref().is_none_or(Lease::is_over) {
            self.lease = None;
        }
        Ok(self.lease.is_none())
    }

    fn bytes(&self) -> Result<LentBytes<'_>> {
        match self.lease {
            // Nobody writes: no trainer has the lease, and none can accept it any more.
            None => Ok(LentBytes::Host(self.bytes.as_ref())),
            Some(_) => Err(SegmentError::Lent.into()),
        }
    }
}

/// How a trainer reaches the memory that rollouts of its host lend. Open memory is kept from one update to the next.
#[derive(Debug, Default)]
pub(crate) struct Neighbours {
    files: Mutex<HashMap<FileAddress, Arc<Mapping>>>,
    #[cfg(feature = "cuda")]
    peers: Option<Peers>,
}

impl Neighbours {
    /// For a trainer with this device, which may be the CPU.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub(crate) fn new(device: &DeviceChoice) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if !device.is_cpu() {
            return Ok(Self { peers: Some(Peers::new(device)?), ..Self::default() });
        }
        let _ = device;
        Ok(Self::default())
    }

    /// Reaches a rollout's memory of the host, and adds the mapping to `present`, which is kept for the next update.
    fn reach_host(
        &self,
        rank: Rank,
        offer: &HostOffer,
        present: &mut HashMap<FileAddress, Arc<Mapping>>,
    ) -> Result<Arc<dyn Reached>> {
        let failed = |error: SegmentError| Error::from(error).rank(rank);
        // The lease comes first: while it is held, the file is the one that the rollout has mapped.
        let lease = offer.lease.accept().map_err(failed)?;
        let mapping = match lock(&self.files).get(&offer.file) {
            Some(mapping) => mapping.clone(),
            None => {
                let len = usize::try_from(offer.bytes);
                let len = len.map_err(|_| failed(SegmentError::TooLarge(1, offer.bytes)))?;
                let file = offer.file.open_to_write().map_err(failed)?;
                Arc::new(Mapping::new(&file, len, true).map_err(failed)?)
            }
        };
        present.insert(offer.file, mapping.clone());
        Ok(Arc::new(Borrowing { mapping, _lease: lease }))
    }
}

/// Locks what a panic leaves usable: each change of it is one assignment, or it is made anew when it is used.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reach for Neighbours {
    fn reach(&self, terms: &[(Rank, Bytes)]) -> Result<Vec<Arc<dyn Reached>>> {
        let mut files = HashMap::new();
        #[cfg(feature = "cuda")]
        let mut opened = HashMap::new();
        let mut reached: Vec<Arc<dyn Reached>> = Vec::with_capacity(terms.len());
        for (rank, terms) in terms {
            let offer: Offer = serde_json::from_slice(terms).map_err(|error| {
                let message = format!("what the rollout lends is not what ipc knows: {error}");
                Error::new(ErrorKind::Protocol, "reaching a rollout's tensors", message)
                    .rank(*rank)
                    .with_source(error)
            })?;
            reached.push(match offer {
                Offer::Host(offer) => self.reach_host(*rank, &offer, &mut files)?,
                #[cfg(feature = "cuda")]
                Offer::Cuda(offer) => {
                    let peers = self.peers.as_ref().ok_or_else(|| {
                        let message = "its tensors are on a CUDA device, and this trainer's device is `cpu`: set `device` to \
                                       `cuda` here, or to `cpu` there";
                        Error::new(ErrorKind::Mismatch, "reaching a rollout's tensors", message)
                            .rank(*rank)
                    })?;
                    peers.reach(*rank, &offer, &mut opened)?
                }
            });
        }
        *lock(&self.files) = files;
        #[cfg(feature = "cuda")]
        if let Some(peers) = &self.peers {
            peers.keep(opened);
        }
        Ok(reached)
    }

    fn encoder(&self) -> Option<&dyn Encoder> {
        #[cfg(feature = "cuda")]
        return self.peers.as_ref().map(|peers| peers as &dyn Encoder);
        #[cfg(not(feature = "cuda"))]
        None
    }
}

/// A rollout's memory, while its lease is held.
#[derive(Debug)]
struct Borrowing {
    mapping: Arc<Mapping>,
    _lease: Borrowed,
}

impl Reached for Borrowing {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let size = self.mapping.len();
        let start = usize::try_from(at)
            .ok()
            .filter(|start| start.checked_add(bytes.len()).is_some_and(|end| end <= size));
        let outside = || SegmentError::OutsideLent { at, len: bytes.len(), size };
        self.mapping.put(start.ok_or_else(outside)?, bytes);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    fn host(memory: &LentMemory) -> &[u8] {
        let LentBytes::Host(bytes) = memory.bytes().unwrap() else { panic!("host memory") };
        bytes
    }

    fn reach(neighbours: &Neighbours, terms: &Bytes) -> Result<Arc<dyn Reached>> {
        Ok(neighbours.reach(&[(Rank(1), terms.clone())])?.remove(0))
    }

    #[test]
    fn bytes_are_read_once_whoever_could_write_has_let_go_and_nobody_can_write_by_old_terms() {
        let mut memory = LentMemory::create(100).unwrap();
        let neighbours = Neighbours::default();
        assert!(memory.take_back().unwrap());
        let terms = memory.lend().unwrap();
        let held = reach(&neighbours, &terms).unwrap();
        for (at, bytes) in [(3, &[1_u8; 20][..]), (23, &[2; 5]), (92, &[3; 8])] {
            held.put(at, bytes).unwrap();
        }
        let error = held.put(93, &[4; 8]).unwrap_err();
        assert!(error.to_string().contains("8 bytes at 93 lie outside"), "{error}");
        assert!(!memory.take_back().unwrap());
        assert_eq!(memory.bytes().unwrap_err().kind(), ErrorKind::State);
        drop(held);
        assert!(memory.take_back().unwrap());
        let bytes = host(&memory);
        let expected = [vec![0; 3], vec![1; 20], vec![2; 5], vec![0; 64], vec![3; 8]].concat();
        assert_eq!(bytes, expected);
        let error = reach(&neighbours, &terms).unwrap_err();
        assert_eq!(error.report().rank, Some(Rank(1)), "{error}");
        // The next update has new terms.
        let terms = memory.lend().unwrap();
        reach(&neighbours, &terms).unwrap().put(0, &[9]).unwrap();
        assert!(memory.take_back().unwrap());
        assert_eq!(host(&memory)[0], 9);
    }

    #[test]
    fn terms_of_a_rollout_that_is_gone_are_refused() {
        let neighbours = Neighbours::default();
        let terms = LentMemory::create(10).unwrap().lend().unwrap();
        assert!(reach(&neighbours, &terms).is_err());
        assert_eq!(
            reach(&neighbours, &Bytes::from_static(b"{}")).unwrap_err().kind(),
            ErrorKind::Protocol
        );
    }
}

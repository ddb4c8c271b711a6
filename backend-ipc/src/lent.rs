//! Memory that a rollout lends to trainers of its host, which write their updates straight into it.
//!
//! The memory is a file that both map, or the files of shared memory which the rollout's program has made its tensors in. A [lease](crate::lease) for each update governs writing: a trainer holds it as long
//! as it may write, and the system releases it when the trainer's process ends, however it ends.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use engine_core::plan::ALIGNMENT;
use engine_core::{DeviceChoice, Error, Rank, Result};
use placed::{Encoder, Layout, Lender, LentBytes, LentTensor, Parts, Reach, Reached};
use protocol::{decode, encode};
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::ffi::{Mapping, ReadView};
use crate::lease::{Borrowed, Lease, Terms};
#[cfg(feature = "cuda")]
use crate::lent_cuda::{CudaOffer, Peers};
use crate::mapped::{FileId, MappedFiles};
use crate::memfile::{FileAddress, MemFile};
use crate::segment::{allocate, memory_in_words};

/// Parts of files begin and end at multiples of it in what is lent, so that offsets there are aligned as addresses are.
const PAGE: u64 = 4096;
const _: () = assert!(PAGE.is_multiple_of(ALIGNMENT));

/// A rollout's terms, by the kind of its memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Offer {
    Host(HostOffer),
    #[cfg(feature = "cuda")]
    Cuda(CudaOffer),
}

/// What a trainer needs to write to a rollout's memory in one update.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HostOffer {
    /// In ascending order of what is lent.
    parts: Vec<OfferedPart>,
    lease: Terms,
}

/// A part of a file that is lent.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct OfferedPart {
    /// The offset of its first byte in what is lent.
    at: u64,
    bytes: u64,
    file: FileAddress,
    /// The offset of its first byte in the file.
    offset: u64,
}

/// A rollout's memory of the host.
#[derive(Debug)]
pub(crate) struct LentMemory {
    views: Parts<Bytes>,
    parts: Vec<OfferedPart>,
    /// Kept open, so that other processes can open them too.
    _files: Vec<MemFile>,
    lease: Option<Lease>,
}

impl LentMemory {
    /// Allocates this many bytes of zeroed memory, with all pages present.
    pub(crate) fn create(bytes: u64) -> Result<Self, SegmentError> {
        let full = || SegmentError::NoMemoryToLend { needed: bytes, available: memory_in_words() };
        // A file without bytes cannot be mapped.
        let (file, mapping) = allocate("ckpt-engine-tensors", bytes.max(1), full)?;
        let len = mapping.len();
        let view = Bytes::from_owner(ReadView::new(Arc::new(mapping), 0, len));
        let part = OfferedPart { at: 0, bytes: len as u64, file: file.address(), offset: 0 };
        let views = Parts::new([(0, len as u64, view)]);
        Ok(Self { views, parts: vec![part], _files: vec![file], lease: None })
    }

    /// Lends tensors where they are, which is in shared memory. Returns their layout too.
    pub(crate) fn of_tensors(tensors: Vec<LentTensor>) -> Result<(Layout, Self)> {
        let mapped = MappedFiles::of_this_process()?;
        let mut located = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let (wanted, [elements, scales]) = tensor.into_host_parts()?;
            let locate = |bytes: Bytes| {
                let found = match bytes.is_empty() {
                    true => None,
                    false => {
                        let address = bytes.as_ptr().addr() as u64;
                        let found = mapped.locate(address, bytes.len() as u64);
                        Some(found.map_err(|error| Error::from(error).tensor(&*wanted.meta.name))?)
                    }
                };
                Ok::<_, Error>((bytes, found))
            };
            let both = [locate(elements)?, locate(scales)?];
            located.push((wanted, both));
        }
        // Of each file, the pages from the first tensor to the last are one part.
        let mut parts: BTreeMap<FileId, Range<u64>> = BTreeMap::new();
        for (bytes, found) in located.iter().flat_map(|(_, both)| both) {
            let Some((id, offset)) = *found else { continue };
            let (start, end) = (offset & !(PAGE - 1), offset + bytes.len() as u64);
            let part = parts.entry(id).or_insert(start..end);
            *part = part.start.min(start)..part.end.max(end);
        }
        let files = mapped.open(parts.keys().copied())?;
        let mut offered = BTreeMap::new();
        let mut end = 0_u64;
        for (id, range) in parts {
            let (at, bytes) = (end, range.end - range.start);
            let Some(file) = files.get(&id) else { continue };
            offered
                .insert(id, OfferedPart { at, bytes, file: file.address(), offset: range.start });
            end = (at + bytes).next_multiple_of(PAGE);
        }
        let at = |found: &Option<(FileId, u64)>| {
            let part = found.and_then(|(id, offset)| Some((offered.get(&id)?, offset)));
            part.map_or(0, |(part, offset)| part.at + (offset - part.offset))
        };
        let mut views = Vec::new();
        let placed = located.into_iter().map(|(wanted, both)| {
            let [at, scales_at] = both.each_ref().map(|(_, found)| at(found));
            for ((bytes, _), at) in both.into_iter().zip([at, scales_at]) {
                views.push((at, bytes.len() as u64, bytes));
            }
            (wanted, at, scales_at)
        });
        let layout = Layout::at(placed.collect::<Vec<_>>(), end)?;
        let (parts, files) = (offered.into_values().collect(), files.into_values().collect());
        Ok((layout, Self { views: Parts::new(views), parts, _files: files, lease: None }))
    }
}

impl Lender for LentMemory {
    fn len(&self) -> u64 {
        self.parts.last().map_or(0, |part| (part.at + part.bytes).next_multiple_of(PAGE))
    }

    fn lend(&mut self) -> Result<Bytes> {
        if self.lease.is_some() {
            return Err(SegmentError::Lent.into());
        }
        let lease = Lease::new()?;
        let offer = HostOffer { parts: self.parts.clone(), lease: lease.terms() };
        self.lease = Some(lease);
        encode(&Offer::Host(offer))
    }

    fn take_back(&mut self) -> Result<bool> {
        if self.lease.as_ref().is_none_or(Lease::is_over) {
            self.lease = None;
        }
        Ok(self.lease.is_none())
    }

    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>> {
        if self.lease.is_some() {
            return Err(SegmentError::Lent.into());
        }
        // Nobody writes: no trainer has the lease, and none can accept it any more.
        let bytes = self.views.bytes(at, len);
        Ok(LentBytes::Host(bytes.ok_or(SegmentError::NotLent { at, len })?))
    }
}

/// A file of a rollout's memory, at a trainer.
#[derive(Debug)]
enum Opened {
    Mapped(Mapping),
    /// Its process could make it shorter, which would end this one if the file were mapped. So every write is a call of the system.
    Called(File),
}

impl Opened {
    fn new(address: &FileAddress, len: u64) -> Result<Self, SegmentError> {
        let file = address.open_to_write()?;
        let needed = usize::try_from(len).map_err(|_| SegmentError::TooLarge(1, len))?;
        match Mapping::new(&file, needed, true) {
            Err(SegmentError::Unsealed) => {
                let size = rustix::fs::fstat(&file)
                    .map_err(|errno| SegmentError::System { call: "fstat", errno })?
                    .st_size;
                match u64::try_from(size).is_ok_and(|size| size >= len) {
                    true => Ok(Self::Called(file)),
                    false => Err(SegmentError::Short { len: needed, size }),
                }
            }
            mapping => mapping.map(Self::Mapped),
        }
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        match self {
            // What is offered was checked to fit the mapping.
            Self::Mapped(mapping) => mapping.put(at as usize, bytes),
            Self::Called(file) => file
                .write_all_at(bytes, at)
                .map_err(|error| Error::io("writing to a rollout's tensors", error))?,
        }
        Ok(())
    }
}

/// How a trainer reaches the memory that rollouts of its host lend. Open memory is kept from one update to the next.
#[derive(Debug, Default)]
pub(crate) struct Neighbours {
    files: Mutex<HashMap<FileAddress, (u64, Arc<Opened>)>>,
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

    /// Reaches a rollout's memory of the host, and adds its files to `present`, which are kept for the next update.
    fn reach_host(
        &self,
        rank: Rank,
        offer: HostOffer,
        present: &mut HashMap<FileAddress, (u64, Arc<Opened>)>,
    ) -> Result<Arc<dyn Reached>> {
        let failed = |error: SegmentError| Error::from(error).rank(rank);
        // The lease comes first: while it is held, the files are the ones that the rollout has mapped.
        let lease = offer.lease.accept().map_err(failed)?;
        let known = lock(&self.files);
        let mut parts = Vec::with_capacity(offer.parts.len());
        for part in offer.parts {
            let OfferedPart { bytes, file, offset, .. } = part;
            let too_large = || failed(SegmentError::TooLarge(1, bytes));
            let len = offset.checked_add(bytes).ok_or_else(too_large)?;
            let (len, opened) = match known.get(&file).filter(|(known, _)| *known >= len) {
                Some(known) => known.clone(),
                None => (len, Arc::new(Opened::new(&file, len).map_err(failed)?)),
            };
            present.insert(file, (len, opened.clone()));
            parts.push((part.at, bytes, (offset, opened)));
        }
        Ok(Arc::new(Borrowing { parts: Parts::new(parts), _lease: lease }))
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
            let offer: Offer = decode(terms).map_err(|error| error.rank(*rank))?;
            reached.push(match offer {
                Offer::Host(offer) => self.reach_host(*rank, offer, &mut files)?,
                #[cfg(feature = "cuda")]
                Offer::Cuda(offer) => {
                    let peers = self.peers.as_ref().ok_or_else(|| {
                        let message = "its tensors are on a CUDA device, and this trainer's device is `cpu`: set `device` to \
                                       `cuda` here, or to `cpu` there";
                        let kind = engine_core::ErrorKind::Mismatch;
                        Error::new(kind, "reaching a rollout's tensors", message).rank(*rank)
                    })?;
                    peers.reach(*rank, offer, &mut opened)?
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
    /// For each part, where it begins in its file.
    parts: Parts<(u64, Arc<Opened>)>,
    _lease: Borrowed,
}

impl Reached for Borrowing {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let found = self.parts.find(at, bytes.len() as u64);
        let ((offset, opened), from) =
            found.ok_or(SegmentError::OutsideLent { at, len: bytes.len() as u64 })?;
        opened.put(offset + from, bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use engine_core::ErrorKind;

    use super::*;

    fn host(memory: &LentMemory) -> &[u8] {
        let LentBytes::Host(bytes) = memory.bytes(0, 100).unwrap() else { panic!("host memory") };
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
        assert_eq!(memory.bytes(0, 100).unwrap_err().kind(), ErrorKind::State);
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

//! Memory that a rollout lends to trainers of its host, which write their updates straight into it.
//!
//! The memory is a file that both map, or the files of shared memory which the rollout's program has made its tensors in. What is in other
//! memory of the program comes in parcels ([`staged`](crate::staged)). A [lease](crate::lease) for each update governs writing: a trainer
//! holds it as long as it may write, and the system releases it when the trainer's process ends, however it ends.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use engine_core::plan::ALIGNMENT;
use engine_core::{DeviceChoice, Error, Rank, Result};
use placed::parcels::Packing;
use placed::{
    Encoder, HostRanges, Layout, Lender, LentBytes, LentTensor, Parts, Reach, Reached, Wanted,
};
use protocol::{decode, encode};
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::ffi::{Mapping, ReadView, scattered};
use crate::lease::{Borrowed, Lease, Terms};
#[cfg(feature = "cuda")]
use crate::lent_cuda::{CudaOffer, Peers};
use crate::mapped::{FileId, MappedFiles};
use crate::memfile::{FileAddress, MemFile};
use crate::segment::{allocate, memory_in_words};
use crate::staged::{Lane, Staging, StagingOffer};

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
    /// For what is in none of the parts.
    staging: Option<StagingOffer>,
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
    bytes: u64,
    /// Kept open, so that other processes can open them too.
    _files: Vec<MemFile>,
    staging: Option<Staging>,
    /// What goes through staging memory, and why.
    slower: Option<String>,
    lease: Option<Lease>,
}

/// A tensor's elements or scales, and the file that they are in.
type Located = (Bytes, Option<(FileId, u64)>);

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
        Ok(Self {
            views,
            parts: vec![part],
            bytes: (len as u64).next_multiple_of(PAGE),
            _files: vec![file],
            staging: None,
            slower: None,
            lease: None,
        })
    }

    /// Lends tensors where they are. Those in shared memory are written to by trainers; all others come in parcels, for which there are about
    /// so many bytes. Returns their layout too.
    pub(crate) fn of_tensors(tensors: Vec<LentTensor>, staging: u64) -> Result<(Layout, Self)> {
        let mapped = MappedFiles::of_this_process()?;
        let mut located: Vec<(Wanted, [Located; 2])> = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let (wanted, both) = tensor.into_host_parts()?;
            let locate = |bytes: Bytes| {
                let (address, len) = (bytes.as_ptr().addr() as u64, bytes.len() as u64);
                let found = (len > 0).then(|| mapped.locate(address, len)).flatten();
                (bytes, found)
            };
            located.push((wanted, both.map(locate)));
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
        let shared = |(_, found): &Located| {
            let (id, offset) = (*found)?;
            let part = offered.get(&id)?;
            Some(part.at + (offset - part.offset))
        };
        let private = |both: &[Located; 2]| {
            let rest = both.iter().filter(|own| !own.0.is_empty() && shared(own).is_none());
            rest.map(|(bytes, _)| bytes.clone()).collect::<Vec<_>>()
        };
        let staged: Vec<Bytes> = located.iter().flat_map(|(_, both)| private(both)).collect();
        let bytes = |both| private(both).iter().map(|bytes| bytes.len() as u64).sum();
        let why = "theirs is not shared memory that other processes can open (of torch: `share_memory_()`)";
        let slower =
            words_of_staged(located.iter().map(|(wanted, both)| (wanted, bytes(both))), why);
        let ranges = HostRanges::new(end, &staged);
        let at = |own: &Located| {
            shared(own).or_else(|| ranges.find(&own.0).map(|(_, at)| at)).unwrap_or(0)
        };
        let mut views = Vec::new();
        let placed = located.iter().map(|(wanted, both)| {
            let places = both.each_ref().map(at);
            for ((bytes, _), at) in both.iter().zip(places) {
                views.push((at, bytes.len() as u64, bytes.clone()));
            }
            (wanted.clone(), places[0], places[1])
        });
        let placed: Vec<_> = placed.collect();
        let bytes = ranges.end(end).next_multiple_of(PAGE);
        let layout = Layout::at(placed, bytes)?;
        let places = staged.into_iter().filter_map(|bytes| Some((ranges.find(&bytes)?.1, bytes)));
        let places: Vec<_> = places.collect();
        let (parts, files) = (offered.into_values().collect(), files.into_values().collect());
        let staging = (!places.is_empty()).then(|| Staging::new(scattered(places), staging));
        let views = Parts::new(views);
        Ok((layout, Self { views, parts, bytes, _files: files, staging, slower, lease: None }))
    }
}

/// Says which tensors go through staging memory, with their bytes that do, and why; `None` if none do.
pub(crate) fn words_of_staged<'a>(
    tensors: impl Iterator<Item = (&'a Wanted, u64)>,
    why: &str,
) -> Option<String> {
    let staged: Vec<(&Wanted, u64)> = tensors.filter(|(_, bytes)| *bytes > 0).collect();
    let (first, _) = staged.first()?;
    let bytes: u64 = staged.iter().map(|(_, bytes)| bytes).sum();
    let (count, name) = (staged.len(), &first.meta.name);
    Some(format!(
        "{bytes} bytes of {count} tensors (`{name}` is the first) go through staging memory: {why}"
    ))
}

impl Lender for LentMemory {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn lend(&mut self, to: &[Rank]) -> Result<Bytes> {
        if self.lease.is_some() {
            return Err(SegmentError::Lent.into());
        }
        let lease = Lease::new()?;
        let terms = lease.terms();
        self.lease = Some(lease);
        let staging = self.staging.as_mut().map(|staging| staging.begin(to)).transpose()?;
        let offer = HostOffer { parts: self.parts.clone(), staging, lease: terms };
        encode(&Offer::Host(offer))
    }

    fn take_back(&mut self) -> Result<bool> {
        // Nobody hands a parcel over any more when the lease is over. What an update that has failed has left is not scattered.
        if self.lease.as_ref().is_none_or(Lease::is_over)
            && self.staging.as_mut().is_none_or(Staging::end)
        {
            self.lease = None;
        }
        Ok(self.lease.is_none())
    }

    fn slower(&self) -> Vec<String> {
        self.slower.iter().cloned().collect()
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
    Mapped(Arc<Mapping>),
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
            mapping => mapping.map(|mapping| Self::Mapped(Arc::new(mapping))),
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

/// Open files, each with its length that is known.
type Files = HashMap<FileAddress, (u64, Arc<Opened>)>;

/// How a trainer reaches the memory that rollouts of its host lend. Open memory is kept from one update to the next.
#[derive(Debug)]
pub(crate) struct Neighbours {
    /// The trainer's rank.
    rank: Rank,
    /// How long it waits for a rollout to empty a parcel.
    limit: Duration,
    files: Mutex<Files>,
    #[cfg(feature = "cuda")]
    peers: Option<Peers>,
}

impl Neighbours {
    /// For a trainer with this device, which may be the CPU. `limit` is how long it waits for a rollout to empty a parcel.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub(crate) fn new(device: &DeviceChoice, rank: Rank, limit: Duration) -> Result<Self> {
        let _ = device;
        Ok(Self {
            rank,
            limit,
            files: Mutex::default(),
            #[cfg(feature = "cuda")]
            peers: if device.is_cpu() { None } else { Some(Peers::new(device)?) },
        })
    }

    /// Opens a file of a rollout, and adds it to `present`.
    fn open(
        &self,
        file: FileAddress,
        len: u64,
        present: &mut Files,
    ) -> Result<Arc<Opened>, SegmentError> {
        let known = lock(&self.files).get(&file).filter(|(known, _)| *known >= len).cloned();
        let (len, opened) = match known {
            Some(known) => known,
            None => (len, Arc::new(Opened::new(&file, len)?)),
        };
        present.insert(file, (len, opened.clone()));
        Ok(opened)
    }

    /// This trainer's lane of a rollout's staging memory, if it has one. The lease is held.
    fn lane(
        &self,
        rank: Rank,
        staging: StagingOffer,
        lease: Terms,
        present: &mut Files,
    ) -> Result<Option<Lane>, SegmentError> {
        let opened = self.open(staging.file, staging.bytes()? as u64, present)?;
        let Opened::Mapped(memory) = &*opened else { return Err(SegmentError::Unsealed) };
        staging.lane(self.rank, rank, memory.clone(), lease, self.limit)
    }

    /// Reaches a rollout's memory of the host, and adds its files to `present`, which are kept for the next update.
    fn reach_host(
        &self,
        rank: Rank,
        offer: HostOffer,
        present: &mut Files,
    ) -> Result<Arc<dyn Reached>> {
        let failed = |error: SegmentError| Error::from(error).rank(rank);
        // The lease comes first: while it is held, the files are the ones that the rollout has mapped.
        let lease = offer.lease.accept().map_err(failed)?;
        let mut parts = Vec::with_capacity(offer.parts.len());
        for part in offer.parts {
            let OfferedPart { bytes, file, offset, .. } = part;
            let too_large = || failed(SegmentError::TooLarge(1, bytes));
            let len = offset.checked_add(bytes).ok_or_else(too_large)?;
            let opened = self.open(file, len, present).map_err(failed)?;
            parts.push((part.at, bytes, (offset, opened)));
        }
        let lane = offer.staging.map(|staging| self.lane(rank, staging, offer.lease, present));
        let lane = lane.transpose().map_err(failed)?.flatten();
        let parcels = lane.map(Packing::new);
        Ok(Arc::new(Borrowing { parts: Parts::new(parts), parcels, _lease: lease }))
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
                    peers.reach(*rank, offer, &mut opened, |staging, lease| {
                        self.lane(*rank, staging, lease, &mut files)
                    })?
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
    /// What takes everything that is in none of them.
    parcels: Option<Packing<Lane>>,
    _lease: Borrowed,
}

impl Reached for Borrowing {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        match (self.parts.find(at, len), &self.parcels) {
            (Some(((offset, opened), from)), _) => opened.put(offset + from, bytes),
            (None, Some(parcels)) => parcels.put(at, bytes),
            (None, None) => Err(SegmentError::OutsideLent { at, len }.into()),
        }
    }

    fn flush(&self) -> Result<()> {
        self.parcels.as_ref().map_or(Ok(()), Packing::flush)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#[allow(unsafe_code, reason = "memory of a test")]
mod tests {
    use engine_core::{DType, ErrorKind, TensorMeta};

    use super::*;

    fn neighbours() -> Neighbours {
        Neighbours::new(&DeviceChoice::default(), Rank(0), Duration::from_secs(5)).unwrap()
    }

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
        let neighbours = neighbours();
        assert!(memory.take_back().unwrap());
        let terms = memory.lend(&[Rank(0)]).unwrap();
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
        let terms = memory.lend(&[Rank(0)]).unwrap();
        reach(&neighbours, &terms).unwrap().put(0, &[9]).unwrap();
        assert!(memory.take_back().unwrap());
        assert_eq!(host(&memory)[0], 9);
    }

    /// A tensor of so many bytes of this process alone.
    fn private(bytes: usize) -> LentMemory {
        let memory = Bytes::from(vec![0_u8; bytes]);
        let wanted = Wanted::whole(TensorMeta::new("w", DType::U8, [bytes as u64]));
        // SAFETY: nobody else has it, and it is read only while it is not lent.
        let tensor = unsafe { LentTensor::new(wanted, memory.into(), None) }.unwrap();
        LentMemory::of_tensors(vec![tensor], 1 << 20).unwrap().1
    }

    #[test]
    fn what_is_in_memory_of_this_process_comes_in_parcels_and_is_there_when_it_was_flushed() {
        const BYTES: usize = 3 << 20;
        let mut memory = private(BYTES);
        let (neighbours, start) = (neighbours(), first_of(&memory));
        for version in 1..4 {
            let terms = memory.lend(&[Rank(0)]).unwrap();
            let held = reach(&neighbours, &terms).unwrap();
            // More than all slots together hold.
            for part in 0..3 {
                held.put(start + (part << 20), &vec![version + part as u8; 1 << 20]).unwrap();
            }
            held.flush().unwrap();
            drop(held);
            while !memory.take_back().unwrap() {}
            let LentBytes::Host(bytes) = memory.bytes(start, BYTES as u64).unwrap() else {
                panic!("host memory")
            };
            for (part, bytes) in (0_u8..).zip(bytes.chunks(1 << 20)) {
                assert!(bytes.iter().all(|byte| *byte == version + part));
            }
        }
    }

    fn first_of(memory: &LentMemory) -> u64 {
        (0..memory.len()).find(|at| memory.views.rest(*at).is_some()).unwrap()
    }

    #[test]
    fn a_parcel_for_other_memory_is_refused_and_the_next_update_works() {
        let mut memory = private(100);
        let neighbours = neighbours();
        let start = first_of(&memory);
        let held = reach(&neighbours, &memory.lend(&[Rank(0)]).unwrap()).unwrap();
        held.put(start + 93, &[4; 8]).unwrap();
        let error = held.flush().unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::Protocol, Some(Rank(1))));
        assert!(error.to_string().contains("refused"), "{error}");
        drop(held);
        while !memory.take_back().unwrap() {}
        let held = reach(&neighbours, &memory.lend(&[Rank(0)]).unwrap()).unwrap();
        held.put(start + 92, &[5; 8]).unwrap();
        held.flush().unwrap();
        drop(held);
        while !memory.take_back().unwrap() {}
        let LentBytes::Host(bytes) = memory.bytes(start + 92, 8).unwrap() else { panic!("host") };
        assert_eq!(bytes, [5; 8]);
    }

    #[test]
    fn a_trainer_does_not_wait_for_a_rollout_that_is_gone_or_takes_nothing() {
        let mut memory = private(100);
        let start = first_of(&memory);
        let hasty = Neighbours::new(&DeviceChoice::default(), Rank(0), Duration::from_millis(50));
        let held = reach(&hasty.unwrap(), &memory.lend(&[Rank(0)]).unwrap()).unwrap();
        while !memory.staging.as_mut().unwrap().end() {}
        held.put(start, &[1]).unwrap();
        let error = held.flush().unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::Timeout, Some(Rank(1))));
        drop(held);
        while !memory.take_back().unwrap() {}
        let held = reach(&neighbours(), &memory.lend(&[Rank(0)]).unwrap()).unwrap();
        drop(memory);
        held.put(start, &[1]).unwrap();
        let error = held.flush().unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::PeerLost, Some(Rank(1))));
    }

    #[test]
    fn terms_of_a_rollout_that_is_gone_are_refused() {
        let neighbours = neighbours();
        let terms = LentMemory::create(10).unwrap().lend(&[Rank(0)]).unwrap();
        assert!(reach(&neighbours, &terms).is_err());
        assert_eq!(
            reach(&neighbours, &Bytes::from_static(b"{}")).unwrap_err().kind(),
            ErrorKind::Protocol
        );
    }
}

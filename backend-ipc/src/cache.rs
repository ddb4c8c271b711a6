//! A cache of the last complete version, which other processes of the host read.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use engine_core::plan::ALIGNMENT;
use engine_core::{
    ArenaArc, CacheStore, CacheWriter, Error, ErrorKind, ReceivedPiece, Result, TensorMeta,
    Version, Weight, WeightStream, available_memory, ensure_async_iterator, ensure_fresh,
};
use rustix::fs::SealFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::ffi::{Mapping, ReadView};
use crate::memfile::{FileAddress, MemFile};

/// How often a reader tries again while the owner changes the cache.
const ATTEMPTS: usize = 1000;
/// How many bytes are written between two checks of the available memory.
const STRIDE: u64 = 64 << 20;

/// A cache in shared memory: a [`CacheStore`] for `WeightCache::in_store`, with any backend. Other processes of the
/// host read weights from it with a [`SharedCacheReader`], without a copy and without a request to its owner.
///
/// # Contract
///
/// It always shows a whole version that was verified and committed on every rank. It goes from the old version to the
/// new one in one step, when the new one is committed. An aborted version is never shown. The
/// kernel keeps every process, the owner included, from changing a version that is shown.
///
/// # Examples
///
/// ```
/// # fn example(engine: Box<dyn engine_core::RolloutEngine>) -> engine_core::Result<()> {
/// use backend_ipc::{SharedCache, SharedCacheReader};
/// use serving::CachedEngine;
///
/// let cache = SharedCache::create()?;
/// let address = cache.address(); // Serialisable: another process of this host opens it.
/// let receiver = CachedEngine::with_store(engine, std::sync::Arc::new(cache));
///
/// let reader = SharedCacheReader::open(address)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SharedCache(Arc<Owner>);

/// The address of a [`SharedCache`] for processes of the same host, user and PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CacheAddress(FileAddress);

/// A reader of a [`SharedCache`], usually another process's.
#[derive(Debug)]
pub struct SharedCacheReader {
    pid: u32,
    board: File,
    max_staleness: Option<u64>,
    mapped: Mutex<Option<(Notice, Arc<[Weight]>)>>,
}

#[derive(Debug)]
struct Owner {
    /// The file that the notice is written to.
    board: MemFile,
    shown: Mutex<Shown>,
}

#[derive(Debug)]
struct Shown {
    notice: Notice,
    /// The version's file. Readers open it by its descriptor in this process.
    _file: Option<MemFile>,
}

impl SharedCache {
    /// An empty cache.
    ///
    /// # Errors
    ///
    /// `Io` or `Resource` if the system cannot create its file.
    pub fn create() -> Result<Self> {
        let board = MemFile::create("ckpt-engine-board")?;
        let notice = Notice::default();
        write(&board, &notice.encode(), 0)?;
        Ok(Self(Arc::new(Owner { board, shown: Mutex::new(Shown { notice, _file: None }) })))
    }

    /// The address by which readers open it.
    pub fn address(&self) -> CacheAddress {
        CacheAddress(self.0.board.address())
    }
}

impl Owner {
    fn shown(&self) -> MutexGuard<'_, Shown> {
        // Every change is one assignment, so a panic elsewhere leaves the value consistent.
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a notice, and closes the file of the version before it.
    fn show(&self, shown: &mut Shown, new: Shown) -> Result<(), SegmentError> {
        write(&self.board, &new.notice.encode(), 0)?;
        *shown = new;
        Ok(())
    }
}

impl CacheStore for SharedCache {
    fn begin(&self, version: Version, is_update: bool) -> Result<Box<dyn CacheWriter>> {
        let file = MemFile::create("ckpt-engine-version")?;
        let mut shown = self.0.shown();
        let mut notice = shown.notice;
        if is_update {
            notice.newest = version.0;
            notice.begun += 1;
            write(&self.0.board, &notice.encode(), 0)?;
            shown.notice = notice;
        }
        let (owner, begun) = (self.0.clone(), notice.begun);
        Ok(Box::new(Writer { owner, version, begun, file, end: 0, checked: 0, table: Vec::new() }))
    }
}

/// A version that is being written to a file that no reader sees yet.
struct Writer {
    owner: Arc<Owner>,
    version: Version,
    /// How many updates had begun, this one included.
    begun: u64,
    file: MemFile,
    end: u64,
    /// The end up to which there was memory at the last check.
    checked: u64,
    table: Vec<Entry>,
}

/// A weight's place in the file of its version.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    meta: ArenaArc<TensorMeta>,
    at: u64,
}

impl Writer {
    fn append(&mut self, bytes: &[u8], at: u64) -> Result<(), SegmentError> {
        let end = at + bytes.len() as u64;
        // Only memory limits such files, and the kernel kills processes when memory runs out.
        if end > self.checked {
            let needed = end - self.end + STRIDE;
            if available_memory().is_some_and(|available| needed > available) {
                return Err(SegmentError::NoMemory { needed: end });
            }
            self.checked = end + STRIDE;
        }
        write(&self.file, bytes, at)?;
        self.end = end;
        Ok(())
    }
}

impl CacheWriter for Writer {
    fn write(&mut self, piece: &ReceivedPiece) -> Result<()> {
        let named = |error: SegmentError| Error::from(error).tensor(&*piece.meta.name);
        if piece.start == 0 {
            let at = self.end.next_multiple_of(ALIGNMENT);
            self.table.push(Entry { meta: piece.meta.clone(), at });
        }
        let Some(entry) = self.table.last() else {
            return Err(named(SegmentError::Damaged("a weight without its beginning".into())));
        };
        let at = entry.at + piece.start;
        self.append(&piece.bytes.to_host()?, at).map_err(named)
    }

    fn commit(mut self: Box<Self>) -> Result<Vec<Weight>> {
        let table = serde_json::to_vec(&self.table)
            .map_err(|error| SegmentError::Damaged(error.to_string()))?;
        let at = self.end.next_multiple_of(ALIGNMENT);
        self.append(&table, at)?;
        self.file.seal(SEALS | SealFlags::SEAL)?;
        let FileAddress { pid, fd, device, inode } = self.file.address();
        let mut shown = self.owner.shown();
        let notice = Notice {
            newest: shown.notice.newest,
            begun: shown.notice.begun,
            since: self.begun,
            is_there: 1,
            version: self.version.0,
            fd: fd as u64,
            device,
            inode,
            len: self.end,
            table: at,
        };
        let weights = map(pid, &notice)?;
        self.owner.show(&mut shown, Shown { notice, _file: Some(self.file) })?;
        Ok(weights)
    }
}

impl SharedCacheReader {
    /// Opens a cache of another process, or of this one.
    ///
    /// # Errors
    ///
    /// `Io` if it cannot be opened; `PeerLost` if its process is gone; `Protocol` if the file is not that of a cache.
    pub fn open(address: CacheAddress) -> Result<Self> {
        let CacheAddress(file) = address;
        let (pid, board) = (file.pid, open(file)?);
        let reader = Self { pid, board, max_staleness: None, mapped: Mutex::default() };
        reader.notice()?;
        Ok(reader)
    }

    /// Refuses weights if more than this number of updates have begun to arrive at the owner after
    /// theirs. `None` refuses none.
    #[must_use]
    pub fn with_max_staleness(mut self, updates: Option<u64>) -> Self {
        self.max_staleness = updates;
        self
    }

    /// The last complete version, however old it is; `None` before the first.
    ///
    /// # Errors
    ///
    /// `Protocol` if the file is not that of a cache.
    pub fn version(&self) -> Result<Option<Version>> {
        let notice = self.notice()?;
        Ok((notice.is_there == 1).then_some(Version(notice.version)))
    }

    /// The last complete version and its weights, in the order in which they were sent. They are in the owner's
    /// memory, which stays as long as any of them is held, even if the owner ends.
    ///
    /// # Errors
    ///
    /// `State` if no version is complete yet, or if more updates have begun since then than allowed; `PeerLost` if
    /// the owner has ended before this reader took the version.
    pub fn get_weights(&self) -> Result<(Version, WeightStream<'static>)> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..ATTEMPTS {
            let notice = self.notice()?;
            let version = Version(notice.version);
            if notice.is_there == 0 {
                let message = "no version is complete yet";
                return Err(Error::new(ErrorKind::State, "reading the cache", message));
            }
            let since = notice.begun.saturating_sub(notice.since);
            ensure_fresh(version, since, Version(notice.newest), self.max_staleness)?;
            let weights = match mapped.as_ref() {
                Some((known, weights)) if known.inode == notice.inode => weights.clone(),
                _ => match map(self.pid, &notice) {
                    Ok(weights) => mapped.insert((notice, weights.into())).1.clone(),
                    // The owner has shown another version meanwhile, and closed this one.
                    Err(_) if self.notice()?.inode != notice.inode => continue,
                    Err(error) => return Err(Error::from(error).version(version)),
                },
            };
            let weights = (0..weights.len()).map(move |index| weights[index].clone());
            return Ok((version, ensure_async_iterator(weights)));
        }
        Err(SegmentError::Damaged("it changes all the time".into()).into())
    }

    fn notice(&self) -> Result<Notice, SegmentError> {
        let mut bytes = [0; Notice::BYTES];
        for _ in 0..ATTEMPTS {
            let read = rustix::io::pread(&self.board, &mut bytes, 0)
                .map_err(|errno| SegmentError::System { call: "pread", errno })?;
            if let Some(notice) = Notice::decode(&bytes[..read]) {
                return Ok(notice);
            }
            std::hint::spin_loop(); // The owner is writing it.
        }
        Err(SegmentError::Damaged("its notice is damaged".into()))
    }
}

/// The notice by which readers find the shown version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Notice {
    /// The version of the last update that began to arrive.
    newest: u64,
    /// How many updates began to arrive.
    begun: u64,
    /// How many had begun with the complete version, that one included.
    since: u64,
    /// 1 if a version is complete. The fields below describe that version.
    is_there: u64,
    version: u64,
    /// Its file.
    fd: u64,
    device: u64,
    inode: u64,
    len: u64,
    /// Where the table of its weights begins.
    table: u64,
}

impl Notice {
    /// Ten numbers, and a checksum that detects a notice that was read while it was written.
    const BYTES: usize = 11 * 8;

    fn encode(self) -> [u8; Self::BYTES] {
        let Self { newest, begun, since, is_there, version, fd, device, inode, len, table } = self;
        let fields = [newest, begun, since, is_there, version, fd, device, inode, len, table];
        let mut bytes = [0; Self::BYTES];
        let all = fields.into_iter().chain([check(&fields)]);
        for (bytes, field) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(all) {
            *bytes = field.to_le_bytes();
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let numbers: Vec<u64> =
            bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        let (sum, fields) = numbers.split_last()?;
        let [newest, begun, since, is_there, version, fd, device, inode, len, table] = *fields
        else {
            return None;
        };
        let notice =
            Self { newest, begun, since, is_there, version, fd, device, inode, len, table };
        (check(fields) == *sum).then_some(notice)
    }
}

fn check(fields: &[u64]) -> u64 {
    fields.iter().fold(0x6368_6563_6b70_7431, |sum: u64, field| {
        (sum ^ field).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    })
}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::WRITE);

fn write(file: impl AsFd, mut bytes: &[u8], mut at: u64) -> Result<(), SegmentError> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(&file, bytes, at) {
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(Errno::NOSPC | Errno::NOMEM) => {
                return Err(SegmentError::NoMemory { needed: at + bytes.len() as u64 });
            }
            Err(errno) => return Err(SegmentError::System { call: "pwrite", errno }),
        }
    }
    Ok(())
}

/// Opens a file of a cache for reading, if its process still has it.
fn open(address: FileAddress) -> Result<File, SegmentError> {
    address.open().map_err(|error| match error {
        SegmentError::Gone { path } => SegmentError::CacheGone { path },
        error => error,
    })
}

/// Maps the version of a notice, and finds its weights.
fn map(pid: u32, notice: &Notice) -> Result<Vec<Weight>, SegmentError> {
    let damaged = |message: &str| SegmentError::Damaged(message.into());
    let fd = i32::try_from(notice.fd).map_err(|_| damaged("no such descriptor"))?;
    let file = open(FileAddress { pid, fd, device: notice.device, inode: notice.inode })?;
    // A sealed file can neither change nor become shorter than the mapping.
    let seals = rustix::fs::fcntl_get_seals(&file)
        .map_err(|errno| SegmentError::System { call: "fcntl(F_GET_SEALS)", errno })?;
    let len = file.metadata().map_or(0, |metadata| metadata.len());
    if !seals.contains(SEALS) || len != notice.len || notice.table >= len {
        return Err(damaged("its file is not a complete version"));
    }
    let len = usize::try_from(len).map_err(|_| damaged("too large"))?;
    let mapping = Arc::new(Mapping::new(&file, len, false)?);
    let table = notice.table as usize;
    let view = ReadView::new(mapping.clone(), table, len - table);
    let entries: Vec<Entry> = serde_json::from_slice(view.as_ref())
        .map_err(|error| SegmentError::Damaged(error.to_string()))?;
    let weight = |Entry { meta, at }: Entry| {
        let bytes = meta.validate().map_err(|error| SegmentError::Damaged(error.to_string()))?;
        let end = at.checked_add(bytes).filter(|end| *end <= notice.table);
        if end.is_none() {
            return Err(damaged("a weight lies outside of its file"));
        }
        let view = ReadView::new(mapping.clone(), at as usize, bytes as usize);
        Weight::from_meta(meta, Bytes::from_owner(view))
            .map_err(|error| SegmentError::Damaged(error.to_string()))
    };
    entries.into_iter().map(weight).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_are_no_notice_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(Notice::decode(&bytes), None);
        }

        #[test]
        fn a_notice_survives_and_one_whose_halves_are_of_two_does_not(
            a: [u64; 10],
            b: [u64; 10],
            torn in 1..Notice::BYTES,
        ) {
            let notice = |fields: [u64; 10]| {
                let [newest, begun, since, is_there, version, fd, device, inode, len, table] = fields;
                Notice { newest, begun, since, is_there, version, fd, device, inode, len, table }
            };
            let (a, b) = (notice(a), notice(b));
            prop_assert_eq!(Notice::decode(&a.encode()), Some(a));
            let mut bytes = a.encode();
            bytes[..torn].copy_from_slice(&b.encode()[..torn]);
            let read = Notice::decode(&bytes);
            prop_assert!([None, Some(a), Some(b)].contains(&read), "{read:?}");
        }

        #[test]
        fn a_notice_that_means_no_good_is_an_error(fields: [u64; 6], len in 0..4096_u64) {
            let file = MemFile::create("ckpt-engine-test").expect("a file");
            write(&file, &vec![b'['; len as usize], 0).expect("room");
            file.seal(SEALS).expect("seals");
            let FileAddress { pid, fd, device, inode } = file.address();
            let [newest, begun, since, is_there, version, table] = fields;
            let notice = Notice {
                newest,
                begun,
                since,
                is_there,
                version,
                fd: fd as u64,
                device,
                inode,
                len,
                table: table % 5000,
            };
            prop_assert!(map(pid, &notice).is_err());
        }
    }
}

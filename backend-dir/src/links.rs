//! The links of the update protocol: buckets that are written to files, and read from them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use engine_core::memory::{Job, Pool, TensorMemory};
use engine_core::plan::Piece;
use engine_core::{Error, ErrorKind, Rank, Result, Storage};
use protocol::{Arrival, Fetch, FetchLink, Members, SendLink, Ticket};

use crate::error::io;
use crate::folder::{Folder, staged_name, staged_path};
use crate::format::Checksum;
use crate::shards::{Part, Shards, file_name};
use crate::staged::Staged;

/// The trainer encodes one bucket while the other is read.
const SLOTS: usize = 2;

/// What the rollouts read, in errors.
const FETCHING: &str = "reading a bucket's files";

/// The version that is being written, for the link and for the engine around it.
///
/// Work on the version of a failed update goes on to its end, and writes to that version's own folder.
#[derive(Clone, Debug, Default)]
pub(crate) struct Writing(Arc<Mutex<Option<Arc<Mutex<Staged>>>>>);

impl Writing {
    fn begin(&self, staged: Staged) {
        *self.lock() = Some(Arc::new(Mutex::new(staged)));
    }

    fn present(&self) -> Result<Arc<Mutex<Staged>>> {
        self.lock().clone().ok_or_else(ended)
    }

    /// The version, if its update has ended without a failure.
    pub(crate) fn finish(&self) -> Result<Staged> {
        let staged = self.lock().take().and_then(Arc::into_inner).ok_or_else(ended)?;
        staged.into_inner().map_err(|_| ended())
    }

    /// Gives the version up, beside the caller's work: there may be many files to remove.
    fn give_up(&self, pool: &Pool) {
        let staged = self.lock().take();
        drop(pool.start(move || {
            drop(staged);
            Ok(())
        }));
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Mutex<Staged>>>> {
        // Every change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Aborted, "writing a version", "its update has ended")
}

/// A bucket's memory, and what lies in it. It is locked until work on it has ended, even if the future that began it is dropped.
type Slot = Arc<tokio::sync::Mutex<(TensorMemory, Vec<Piece>)>>;

/// The trainer's end of the link.
#[derive(Debug)]
pub(crate) struct Outgoing {
    folder: Arc<Folder>,
    checksum: Checksum,
    writing: Writing,
    slots: Vec<Slot>,
    bucket_bytes: u64,
    pool: Pool,
    /// Whether the trainer has no rollouts, and only publishes.
    is_alone: bool,
}

impl Outgoing {
    pub(crate) fn new(
        folder: Arc<Folder>,
        checksum: Checksum,
        bucket_bytes: u64,
        pool: Pool,
    ) -> Result<Self> {
        let slot = || {
            let memory = TensorMemory::new(bucket_bytes, "preparing")?;
            Ok(Arc::new(tokio::sync::Mutex::new((memory, Vec::new()))))
        };
        let slots = (0..SLOTS).map(|_| slot()).collect::<Result<_>>()?;
        let (writing, is_alone) = (Writing::default(), false);
        Ok(Self { folder, checksum, writing, slots, bucket_bytes, pool, is_alone })
    }

    /// The link of a trainer with rollouts, or of one that only publishes.
    pub(crate) fn with_rollouts(self, there_are: bool) -> Self {
        Self { is_alone: !there_are, ..self }
    }

    /// Where the engine finds a version when its update has succeeded.
    pub(crate) fn writing(&self) -> Writing {
        self.writing.clone()
    }
}

#[async_trait]
impl SendLink for Outgoing {
    fn slots(&self) -> usize {
        SLOTS
    }

    fn bucket_bytes(&self) -> u64 {
        self.bucket_bytes
    }

    fn needs_receivers(&self) -> bool {
        !self.is_alone
    }

    fn keeps_all(&self) -> bool {
        // A version in the folder is whole, whatever the rollouts of its update have read.
        true
    }

    async fn begin(&mut self, _: &Members, _: usize) -> Result<Option<Ticket>> {
        let (folder, checksum) = (self.folder.clone(), self.checksum);
        let staged = self.pool.start(move || Staged::new(folder, checksum)).await?;
        let bytes = Bytes::from(staged_name(staged.folder())?);
        self.writing.begin(staged);
        Ok(Some(Ticket { bytes, together: false }))
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let pool = self.pool.clone();
        let mut slot = self.slots[slot].clone().lock_owned().await;
        let work = move || {
            let (memory, pieces) = &mut *slot;
            *pieces = jobs.iter().map(piece).collect();
            pool.encode(&jobs, memory.bytes_mut(), digests)
        };
        self.pool.start(work).await
    }

    async fn publish(&mut self, slot: usize, _: u64) -> Result<()> {
        let (pool, staged) = (self.pool.clone(), self.writing.present()?);
        let slot = self.slots[slot].clone().lock_owned().await;
        let work = move || {
            let (memory, pieces) = &*slot;
            let mut staged = staged.lock().map_err(|_| ended())?;
            staged.write(pieces, memory.bytes(), &pool)
        };
        self.pool.start(work).await
    }

    fn end(&mut self, committed: bool) {
        if !committed {
            self.writing.give_up(&self.pool);
        }
    }
}

/// The part of a weight that a job is.
fn piece(job: &Job) -> Piece {
    let Job { weight, start, len, offset } = job;
    Piece { meta: weight.meta().clone(), start: *start, len: *len, offset: *offset }
}

/// A rollout's end of the link.
#[derive(Debug)]
pub(crate) struct Incoming {
    path: PathBuf,
    /// The folder of the present update.
    staged: Option<PathBuf>,
    shards: Shards,
    slots: Arc<Slots>,
    pool: Pool,
}

/// A rollout's memory of each slot. Views share it; it is used again when they are gone.
#[derive(Debug, Default)]
struct Slots(Mutex<[Option<Arc<TensorMemory>>; SLOTS]>);

impl Slots {
    /// Memory for this slot; `None` if there is no such slot.
    fn take(&self, slot: u32, bytes: u64) -> Option<Result<TensorMemory>> {
        let used = self.lock().get_mut(slot as usize)?.take().and_then(Arc::into_inner);
        let used = used.filter(|memory| memory.bytes().len() as u64 >= bytes);
        Some(used.map_or_else(|| TensorMemory::new(bytes, FETCHING), Ok))
    }

    fn put(&self, slot: u32, memory: Arc<TensorMemory>) {
        if let Some(slot) = self.lock().get_mut(slot as usize) {
            *slot = Some(memory);
        }
    }

    fn lock(&self) -> MutexGuard<'_, [Option<Arc<TensorMemory>>; SLOTS]> {
        // Every change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Incoming {
    pub(crate) fn new(path: PathBuf, pool: Pool) -> Self {
        Self { path, staged: None, shards: Shards::default(), slots: Arc::default(), pool }
    }

    /// Where the parts of a bucket are, and memory for it.
    fn place(&mut self, fetch: &Fetch) -> Result<(PathBuf, Vec<Part>, TensorMemory)> {
        let refuse = |message: String| Error::new(ErrorKind::Protocol, FETCHING, message);
        let Some(staged) = self.staged.clone() else {
            return Err(refuse("no files were announced".into()));
        };
        // Between the buckets that a rollout wants there may be others.
        if fetch.index < self.shards.bucket() {
            let message = format!("bucket {} was expected", self.shards.bucket());
            return Err(refuse(message));
        }
        self.shards.pass_to(fetch.index);
        let parts = self.shards.place(fetch.layout.pieces())?.parts;
        let memory = self.slots.take(fetch.slot, fetch.filled);
        let memory = memory.ok_or_else(|| refuse(format!("there is no slot {}", fetch.slot)))?;
        Ok((staged, parts, memory?))
    }
}

/// Reads parts of files into memory, in parallel.
fn read(folder: &Path, parts: &[Part], memory: &mut TensorMemory, pool: &Pool) -> Result<()> {
    let mut steps = Vec::new();
    let (mut rest, mut at) = (memory.bytes_mut(), 0);
    let mut open: Option<(u64, Arc<File>)> = None;
    for part in parts {
        let file = match &open {
            Some((number, file)) if *number == part.file => file.clone(),
            _ => {
                let path = folder.join(file_name(part.file));
                let file = File::open(&path).map_err(|error| io(FETCHING, &path, error))?;
                let file = Arc::new(file);
                open = Some((part.file, file.clone()));
                file
            }
        };
        for step in part.steps() {
            // The layout was checked: parts follow one another and lie within the bucket.
            let (_, from) = rest.split_at_mut((step.offset - at) as usize);
            let (bytes, after) = from.split_at_mut(step.len as usize);
            (rest, at) = (after, step.offset + step.len);
            steps.push((step, file.clone(), bytes));
        }
    }
    let done = pool.map(steps, |(step, file, bytes)| {
        file.read_exact_at(bytes, step.at)
            .map_err(|error| io(FETCHING, &folder.join(file_name(step.file)), error))
    });
    done.into_iter().collect()
}

/// Bytes of a slot that are shared.
struct View(Arc<TensorMemory>);

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

#[async_trait]
impl FetchLink for Incoming {
    fn card(&self) -> Bytes {
        Bytes::new()
    }

    async fn join(&mut self, ticket: &Ticket) -> Result<()> {
        self.staged = Some(staged_path(&self.path, &ticket.bytes)?);
        self.shards = Shards::default();
        Ok(())
    }

    async fn fetch(&mut self, fetch: Fetch, arrival: Arrival) {
        let (folder, parts, mut memory) = match self.place(&fetch) {
            Ok(placed) => placed,
            Err(error) => return arrival.tell(Err(error)),
        };
        let (pool, slots) = (self.pool.clone(), self.slots.clone());
        let (slot, filled) = (fetch.slot, fetch.filled as usize);
        // The rollout goes on: it works on the bucket before.
        drop(self.pool.start(move || {
            if !arrival.is_awaited() {
                return Ok(());
            }
            let here = read(&folder, &parts, &mut memory, &pool).map(|()| {
                let memory = Arc::new(memory);
                slots.put(slot, memory.clone());
                Storage::from(Bytes::from_owner(View(memory)).slice(..filled))
            });
            arrival.tell(here);
            Ok(())
        }));
    }

    fn abandon(&mut self, _: Rank) {}

    fn end(&mut self) {
        self.staged = None;
    }
}

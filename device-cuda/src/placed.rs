//! Writes parts of tensors straight to their final place, and digests them there.

mod ffi;
mod launches;
mod space;
mod table;

use std::sync::Arc;
use std::time::Instant;

use engine_core::{Result, Storage};
use quant_fp8::{Fp8Format, SourceType, StridedPart};

use crate::kernels::{Kernel, Library};
use crate::storage::address_of;
use crate::{CudaError, CudaMemory, Device, PinnedMemory, Stream};
use launches::{Job, Kind, Launch, Launches, Place, Room, Source, Taken, counts_of, within};
pub use space::CudaSpace;
use table::{Table, push_maxima};

/// Parts of a weight that are written to memory of this device, or of one that it reaches.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// The weight, on this device.
    pub source: &'a Storage,
    /// The type of its elements, if it is quantised.
    pub ty: Option<SourceType>,
    /// The parts. Clones of the same ones are compared without being read.
    pub parts: &'a Arc<[StridedPart]>,
    /// The memory that they are written to.
    pub to: &'a CudaSpace,
    /// The largest magnitudes of the blocks of a quantised part, if they are not those of the part alone. There is only one part then.
    pub known: Option<&'a [u32]>,
}

/// Parts of memory of this device that are digested.
#[derive(Clone, Copy, Debug)]
pub struct Check<'a> {
    /// The memory.
    pub memory: &'a CudaSpace,
    /// The parts that were written there.
    pub parts: &'a Arc<[StridedPart]>,
}

/// A part of a weight whose blocks' maxima are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Maxima<'a> {
    /// The weight, on this device.
    pub source: &'a Storage,
    /// The type of its elements.
    pub ty: SourceType,
    /// The part, with its blocks.
    pub part: &'a StridedPart,
}

/// The results of launches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Found {
    /// The digest sum of each job, in their order, over the bytes of its parts at their offsets in the lent memory. If a row, or a row of a
    /// block, has only some bytes of a word of eight, the others count as zeros. Each scale counts by itself.
    pub sums: Vec<u64>,
    /// The first block without a finite form.
    pub failed: Option<Failed>,
}

/// A block that has no finite form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failed {
    /// The number of the job.
    pub job: usize,
    /// The block's matrix, row and column, counted in blocks within the part.
    pub block: [u64; 3],
}

/// The kernels of placed updates on a device. All their work is on one stream.
///
/// The launches of the last lists of jobs are kept, with their tables on the device. A list like one of them costs the host only the
/// comparison; where weights have moved, their addresses are replaced.
#[derive(Debug)]
pub struct Placer {
    rows: Kernel,
    long_rows: Kernel,
    blocks: Kernel,
    any: Kernel,
    check: Kernel,
    maxima: Kernel,
    stream: Stream,
    /// Tables on their way to the device.
    staging: PinnedMemory,
    writes: Lists,
    checks: Lists,
    /// The results: a failure, and the sum of each slot.
    numbers: CudaMemory,
    /// The results, copied back.
    results: PinnedMemory,
    /// Maxima that are given, or that were found.
    known: CudaMemory,
}

/// The launches of a list of jobs.
#[derive(Debug, Default)]
struct Kept {
    launches: Launches,
    /// Their tables. Nothing, unless all of them have arrived.
    tables: Option<CudaMemory>,
}

/// So many lists are kept whatever they take: as many as a trainer's update has batches, and as many again, for the update that is the
/// first of another kind.
const LISTS: usize = 16;
/// Bytes of tables on the device, beyond which no more lists are kept. A rollout has a list for each batch of each trainer.
const KEPT: usize = 64 << 20;

/// The last lists of jobs, the last one behind the others.
#[derive(Debug, Default)]
struct Lists(Vec<Kept>);

impl Lists {
    /// Takes the list out that begins as this one, or else an empty one.
    fn take(&mut self, jobs: &[Job<'_>]) -> Kept {
        match self.0.iter().position(|kept| kept.launches.begin_as(jobs)) {
            Some(found) => self.0.remove(found),
            None => Kept::default(),
        }
    }

    fn put(&mut self, kept: Kept) {
        self.0.push(kept);
        let bytes =
            |lists: &[Kept]| lists.iter().map(|kept| kept.launches.bytes().len()).sum::<usize>();
        while self.0.len() > LISTS && bytes(&self.0) > KEPT {
            self.0.remove(0);
        }
    }
}

/// Whether [`Placer::write`] can write a weight that is on a device, quantised in a format if there is one.
pub fn places(device: &Device, source: &Storage, format: Option<&Fp8Format>) -> bool {
    address_of(source).is_some_and(|(ordinal, _)| ordinal == device.ordinal())
        && format.is_none_or(table::is_known)
}

/// Waits for a stream before the memory that its work reads is released.
struct Waiting(Stream);

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Err(error) = self.0.synchronize() {
            tracing::debug!(%error, "while work that failed was waited for");
        }
    }
}

impl Placer {
    /// Loads the kernels. The first time for this kind of device, it compiles them.
    ///
    /// # Errors
    ///
    /// Those of [`Kernels::load`](crate::Kernels::load).
    pub fn new(device: &Device) -> Result<Self> {
        let library = Library::load(device)?;
        let stream = Stream::new(device)?;
        Ok(Self {
            rows: library.kernel(c"place_rows")?,
            long_rows: library.bulk(c"place_bulk", c"place_rows")?,
            blocks: library.kernel(c"place_blocks")?,
            any: library.kernel(c"place_any")?,
            check: library.kernel(c"check")?,
            maxima: library.kernel(c"maxima")?,
            staging: PinnedMemory::new(&stream, 1 << 16)?,
            writes: Lists::default(),
            checks: Lists::default(),
            numbers: CudaMemory::new(device, 1 << 16)?,
            results: PinnedMemory::new(&stream, 1 << 16)?,
            known: CudaMemory::new(device, 1 << 12)?,
            stream,
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.stream.device()
    }

    /// Writes parts of weights, and digests them as they are written. `step` is called before every launch, and its error ends the work.
    /// Blocks until all is written. When it returns, nothing is written any more, not even after an error.
    ///
    /// # Errors
    ///
    /// `State` for memory that is not where the job says; those of `step`; what the driver reports.
    pub fn write(&mut self, jobs: &[Write<'_>], step: impl FnMut() -> Result<()>) -> Result<Found> {
        let _waiting = Waiting(self.stream.clone());
        let known: Vec<u8> = jobs
            .iter()
            .flat_map(|job| job.known.unwrap_or_default())
            .flat_map(|bits| bits.to_le_bytes())
            .collect();
        if !known.is_empty() {
            self.room_for_known(known.len())?;
            self.known.slice(0, known.len())?.write(&known)?;
        }
        let mut known_at = self.known.address();
        let mut all = Vec::with_capacity(jobs.len());
        for job in jobs {
            let mut source = Source {
                address: self.source(job.source)?,
                len: job.source.len(),
                ty: job.ty,
                known: 0,
            };
            if let Some(values) = job.known {
                let blocks = job.parts.iter().map(blocks_of).sum::<u64>();
                if blocks != values.len() as u64 || job.parts.len() != 1 {
                    let words = format!("{} maxima of {blocks} blocks", values.len());
                    return Err(CudaError::Range(words).into());
                }
                source.known = known_at;
                known_at += values.len() as u64 * 4;
            }
            let place = self.place(Some(source), job.to, job.parts)?;
            all.push(Job { place, parts: job.parts });
        }
        let used = used_by(jobs.iter().map(|job| job.to), &self.known);
        let mut kept = self.writes.take(&all);
        let (failed, sums) = self.run(&mut kept, &all, used, step)?;
        self.writes.put(kept);
        let failed = (failed != u64::MAX).then(|| {
            let (job, number) = ((failed >> 32) as usize, failed & u64::from(u32::MAX));
            let part = jobs.get(job).and_then(|job| job.parts.first());
            let [bands, blocks] = part.map_or([1, 1], counts_of);
            let row = number / blocks;
            Failed { job, block: [row / bands, row % bands, number % blocks] }
        });
        Ok(Found { sums, failed })
    }

    /// Digests parts in place. Blocks.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn check(
        &mut self,
        jobs: &[Check<'_>],
        step: impl FnMut() -> Result<()>,
    ) -> Result<Vec<u64>> {
        let _waiting = Waiting(self.stream.clone());
        let all = jobs.iter().map(|job| {
            let place = self.place(None, job.memory, job.parts)?;
            Ok(Job { place, parts: job.parts })
        });
        let all = all.collect::<Result<Vec<_>>>()?;
        let used = used_by(jobs.iter().map(|job| job.memory), &self.known);
        let mut kept = self.checks.take(&all);
        let (_, sums) = self.run(&mut kept, &all, used, step)?;
        self.checks.put(kept);
        Ok(sums)
    }

    /// Launches jobs. Returns the first failure, and the sum of each job. After an error, `kept` may not be used again.
    fn run(
        &mut self,
        kept: &mut Kept,
        jobs: &[Job<'_>],
        used: Arc<Vec<CudaMemory>>,
        mut step: impl FnMut() -> Result<()>,
    ) -> Result<(u64, Vec<u64>)> {
        let begun = Instant::now();
        self.begin(jobs.len())?;
        let taken = kept.launches.take(jobs)?;
        let bytes = kept.launches.bytes();
        let tables = match kept.tables.take().filter(|tables| tables.len() == bytes.len()) {
            Some(tables) if taken == Taken::Same => tables,
            tables => self.bring(bytes, tables)?,
        };
        for launch in kept.launches.list() {
            step()?;
            let kernel = match launch.kind {
                Kind::Rows => &self.rows,
                Kind::LongRows => &self.long_rows,
                Kind::Blocks => &self.blocks,
                Kind::Any => &self.any,
                Kind::Check => &self.check,
            };
            ffi::launch(kernel, &self.stream, launch, &tables, &self.numbers, &used)?;
        }
        let launched = begun.elapsed();
        let found = self.finish(jobs.len())?;
        let (jobs, launches, ended) = (jobs.len(), kept.launches.list().len(), begun.elapsed());
        tracing::debug!(jobs, launches, ?taken, ?launched, ?ended, "launches of placed updates");
        kept.tables = Some(tables);
        Ok(found)
    }

    /// The largest magnitudes of the blocks of parts, each over the elements in the part, as bits of the source's type. The top bit is set
    /// if there is none because of a NaN. Blocks.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn maxima(&mut self, jobs: &[Maxima<'_>]) -> Result<Vec<Vec<u32>>> {
        let _waiting = Waiting(self.stream.clone());
        let counts: Vec<usize> = jobs.iter().map(|job| blocks_of(job.part) as usize).collect();
        let all: usize = counts.iter().sum();
        self.room_for_known(all * 4)?;
        self.begin(0)?;
        let mut table = Table::default();
        let mut at = self.known.address();
        for (job, count) in jobs.iter().zip(&counts) {
            within(job.part, job.part.from, job.part.element, Room::of(job.source.len()))?;
            let source = self.source(job.source)?;
            push_maxima(&mut table, job.part, source, job.ty, at)?;
            at += *count as u64 * 4;
        }
        let used = Arc::new(vec![self.known.clone()]);
        if table.tiles > 0 {
            let mut bytes = Vec::new();
            table.put(&mut bytes);
            let (entries, tiles) = (table.entries(), table.tiles);
            let launch = Launch { kind: Kind::Blocks, at: 0, entries, tiles };
            let tables = self.bring(&bytes, None)?;
            ffi::launch(&self.maxima, &self.stream, &launch, &tables, &self.numbers, &used)?;
        }
        self.stream.synchronize()?;
        let mut bytes = vec![0; all * 4];
        self.known.slice(0, all * 4)?.read(&mut bytes)?;
        let (words, _) = bytes.as_chunks::<4>();
        let mut values = words.iter().map(|word| u32::from_le_bytes(*word));
        Ok(counts.into_iter().map(|count| values.by_ref().take(count).collect()).collect())
    }

    fn source(&self, source: &Storage) -> Result<u64> {
        match address_of(source) {
            Some((ordinal, address)) if ordinal == self.device().ordinal() => Ok(address),
            _ => {
                let words = format!("a weight that is not on device {}", self.device().ordinal());
                Err(CudaError::Range(words).into())
            }
        }
    }

    fn place(
        &self,
        source: Option<Source>,
        to: &CudaSpace,
        parts: &[StridedPart],
    ) -> Result<Place> {
        let (there, here) = (to.device().ordinal(), self.device().ordinal());
        if there != here {
            let words = format!("memory of device {there} for kernels of {here}");
            return Err(CudaError::Range(words).into());
        }
        // All parts of a job are parts of one tensor.
        let first = parts.first();
        let target = first.map_or_else(Room::default, |part| to.room(part.to.at));
        let blocks = first.and_then(|part| part.blocks.as_ref());
        let scales = blocks.map_or_else(Room::default, |blocks| to.room(blocks.scales.at));
        Ok(Place { source, target, scales })
    }

    fn room_for_known(&mut self, bytes: usize) -> Result<()> {
        if bytes > self.known.len() {
            self.known = CudaMemory::new(self.device(), bytes.next_power_of_two())?;
        }
        Ok(())
    }

    /// Resets the results for the launches that follow.
    fn begin(&mut self, slots: usize) -> Result<()> {
        let bytes = (1 + slots) * 8;
        if u32::try_from(slots).is_err() {
            return Err(CudaError::Range("more parts than a launch can have".into()).into());
        }
        if bytes > self.numbers.len() {
            self.numbers = CudaMemory::new(self.device(), bytes.next_power_of_two())?;
            self.results = PinnedMemory::new(&self.stream, bytes.next_power_of_two())?;
        }
        self.numbers.slice(0, 8)?.fill(0xff, &self.stream)?;
        if slots > 0 {
            self.numbers.slice(8, slots * 8)?.fill(0, &self.stream)?;
        }
        Ok(())
    }

    /// Copies tables to memory of their length.
    fn bring(&mut self, tables: &[u8], to: Option<CudaMemory>) -> Result<CudaMemory, CudaError> {
        if tables.len() > self.staging.len() {
            self.staging = PinnedMemory::new(&self.stream, tables.len().next_power_of_two())?;
        }
        let memory = match to {
            Some(memory) => memory,
            None => CudaMemory::new(self.stream.device(), tables.len().max(8))?,
        };
        self.staging.bytes()?[..tables.len()].copy_from_slice(tables);
        self.staging.copy_to(0, &memory.slice(0, tables.len())?)?;
        Ok(memory)
    }

    /// Waits for the launches. Returns the failure, and the sum of each slot.
    fn finish(&mut self, slots: usize) -> Result<(u64, Vec<u64>)> {
        self.results.copy_from(&self.numbers.slice(0, (1 + slots) * 8)?)?;
        let (found, _) = self.results.bytes()?.as_chunks::<8>();
        let mut found = found[..1 + slots].iter().map(|word| u64::from_le_bytes(*word));
        let failed = found.next().unwrap_or(u64::MAX);
        Ok((failed, found.collect()))
    }
}

/// The allocations of memory that jobs use, most of them once.
fn used_by<'a>(
    all: impl Iterator<Item = &'a CudaSpace>,
    known: &CudaMemory,
) -> Arc<Vec<CudaMemory>> {
    let mut used = vec![known.clone()];
    let mut last: Option<&CudaSpace> = None;
    for space in all {
        if last.is_none_or(|last| !last.is(space)) {
            used.extend(space.memory().cloned());
            last = Some(space);
        }
    }
    Arc::new(used)
}

fn blocks_of(part: &StridedPart) -> u64 {
    let [bands, blocks] = counts_of(part);
    part.extent[0] * bands * blocks
}

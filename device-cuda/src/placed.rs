//! Writes parts of tensors straight to their final place, and digests them there.

mod ffi;
mod table;

use std::sync::Arc;

use engine_core::{Result, Storage};
use quant_fp8::{Fp8Format, SourceType, StridedPart};

use crate::kernels::{Kernel, Library};
use crate::resident::{Known, MOST_BYTES, Resident};
use crate::storage::address_of;
use crate::{CudaError, CudaMemory, CudaSlice, Device, PinnedMemory, Stream};
use table::{Table, Target, push_check, push_maxima, push_write};

/// Bytes that a launch reads, approximately: while one is under way the next table is made.
const LAUNCH: u64 = 2 << 30;

/// Parts of a weight that are written to memory of this device, or of one that it reaches.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// The weight, on this device.
    pub source: &'a Storage,
    /// The type of its elements, if it is quantised.
    pub ty: Option<SourceType>,
    /// The parts.
    pub parts: &'a [StridedPart],
    /// The memory that they are written to.
    pub to: &'a CudaSlice,
    /// The largest magnitudes of the blocks of a quantised part, if they are not those of the part alone. There is only one part then.
    pub known: Option<&'a [u32]>,
}

/// Parts of memory of this device that are digested.
#[derive(Clone, Copy, Debug)]
pub struct Check<'a> {
    /// The memory.
    pub memory: &'a CudaSlice,
    /// The parts that were written there.
    pub parts: &'a [StridedPart],
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
/// Tables that come again are on the device already, as with [`Packer`](crate::Packer).
#[derive(Debug)]
pub struct Placer {
    place: Kernel,
    place_wide: Kernel,
    check: Kernel,
    maxima: Kernel,
    stream: Stream,
    /// Tables on their way to the device.
    staging: PinnedMemory,
    resident: Resident<CudaMemory>,
    /// The results: a failure, and the sum of each slot.
    numbers: CudaMemory,
    /// The results, copied back.
    results: PinnedMemory,
    /// Maxima that are given, or that were found.
    known: CudaMemory,
    table: Table,
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
            place: library.kernel(c"place")?,
            place_wide: library.kernel(c"place_wide")?,
            check: library.kernel(c"check")?,
            maxima: library.kernel(c"maxima")?,
            staging: PinnedMemory::new(&stream, 1 << 20)?,
            resident: Resident::new(MOST_BYTES),
            numbers: CudaMemory::new(device, 1 << 16)?,
            results: PinnedMemory::new(&stream, 1 << 16)?,
            known: CudaMemory::new(device, 1 << 12)?,
            table: Table::default(),
            stream,
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.stream.device()
    }

    /// Whether a weight is on this device, from which [`write`](Self::write) reads it.
    pub fn has(&self, source: &Storage) -> bool {
        address_of(source).is_some_and(|(ordinal, _)| ordinal == self.device().ordinal())
    }

    /// Whether there are kernels for a format.
    pub fn knows(&self, format: &Fp8Format) -> bool {
        table::is_known(format)
    }

    /// Writes parts of weights, and digests them as they are written. `step` is called before every launch, and its error ends the work.
    /// Blocks until all is written. When it returns, nothing is written any more, not even after an error.
    ///
    /// # Errors
    ///
    /// `State` for memory that is not where the job says; those of `step`; what the driver reports.
    pub fn write<'a>(
        &mut self,
        jobs: impl IntoIterator<Item = Write<'a>, IntoIter: Clone>,
        mut step: impl FnMut() -> Result<()>,
    ) -> Result<Found> {
        let _waiting = Waiting(self.stream.clone());
        let jobs = jobs.into_iter();
        let known: Vec<u8> = jobs
            .clone()
            .flat_map(|job| job.known.unwrap_or_default())
            .flat_map(|bits| bits.to_le_bytes())
            .collect();
        if !known.is_empty() {
            self.room_for_known(known.len())?;
            self.known.slice(0, known.len())?.write(&known)?;
        }
        let (mut used, mut counts) = (vec![self.known.clone()], Vec::new());
        let mut known_at = self.known.address();
        let slots = jobs.clone().count();
        self.begin(slots)?;
        self.table.clear();
        for (slot, job) in (0..).zip(jobs) {
            let source = self.source(job.source)?;
            let target = self.target(job.to)?;
            if used.last().is_none_or(|last| last.address() != job.to.memory().address()) {
                used.push(job.to.memory().clone());
            }
            let known = match job.known {
                Some(values) => {
                    let blocks = job.parts.iter().map(blocks_of).sum::<u64>();
                    if blocks != values.len() as u64 || job.parts.len() != 1 {
                        let words = format!("{} maxima of {blocks} blocks", values.len());
                        return Err(CudaError::Range(words).into());
                    }
                    let at = known_at;
                    known_at += values.len() as u64 * 4;
                    at
                }
                None => 0,
            };
            for part in job.parts {
                let written = if part.blocks.is_some() { 1 } else { part.element };
                within(part, part.from, part.element, job.source.len())?;
                within(part, part.to, written, job.to.len() as u64)?;
                scales_within(part, job.to.len() as u64)?;
                push_write(&mut self.table, part, source, target, job.ty, known, slot)?;
            }
            counts.push(job.parts.first().map_or([1, 1], counts_of));
            if self.table.read >= LAUNCH {
                step()?;
                self.launch(true, &Arc::new(used.clone()))?;
            }
        }
        step()?;
        self.launch(true, &Arc::new(used))?;
        let (failed, sums) = self.finish(slots)?;
        let failed = (failed != u64::MAX).then(|| {
            let (job, number) = ((failed >> 32) as usize, failed & u64::from(u32::MAX));
            let [bands, blocks] = counts.get(job).copied().unwrap_or([1, 1]);
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
    pub fn check<'a>(
        &mut self,
        jobs: impl IntoIterator<Item = Check<'a>, IntoIter: Clone>,
        mut step: impl FnMut() -> Result<()>,
    ) -> Result<Vec<u64>> {
        let _waiting = Waiting(self.stream.clone());
        let jobs = jobs.into_iter();
        let slots = jobs.clone().count();
        self.begin(slots)?;
        self.table.clear();
        let mut used: Vec<CudaMemory> = Vec::new();
        for (slot, job) in (0..).zip(jobs) {
            let target = self.target(job.memory)?;
            if used.last().is_none_or(|last| last.address() != job.memory.memory().address()) {
                used.push(job.memory.memory().clone());
            }
            for part in job.parts {
                let written = if part.blocks.is_some() { 1 } else { part.element };
                within(part, part.to, written, job.memory.len() as u64)?;
                scales_within(part, job.memory.len() as u64)?;
                push_check(&mut self.table, part, target, slot)?;
            }
            if self.table.read >= LAUNCH {
                step()?;
                self.launch(false, &Arc::new(used.clone()))?;
            }
        }
        step()?;
        self.launch(false, &Arc::new(used))?;
        Ok(self.finish(slots)?.1)
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
        self.table.clear();
        let mut at = self.known.address();
        for (job, count) in jobs.iter().zip(&counts) {
            within(job.part, job.part.from, job.part.element, job.source.len())?;
            let source = self.source(job.source)?;
            push_maxima(&mut self.table, job.part, source, job.ty, at)?;
            at += *count as u64 * 4;
        }
        let used = Arc::new(vec![self.known.clone()]);
        if self.table.tiles > 0 {
            let memory = self.bring()?;
            ffi::launch(&self.maxima, &self.stream, &self.table, &memory, &self.numbers, &used)?;
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

    fn target(&self, memory: &CudaSlice) -> Result<Target> {
        let (there, here) = (memory.device().ordinal(), self.device().ordinal());
        if there != here {
            let words = format!("memory of device {there} for kernels of {here}");
            return Err(CudaError::Range(words).into());
        }
        Ok(Target { address: memory.address(), place: 0 })
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

    /// Copies the table to the device, unless it is there.
    fn bring(&mut self) -> Result<CudaMemory, CudaError> {
        let bytes = self.table.bytes();
        let known = self.resident.want(bytes);
        if let Known::Here(memory) = known {
            return Ok(memory);
        }
        if bytes.len() > self.staging.len() {
            self.staging = PinnedMemory::new(&self.stream, bytes.len().next_power_of_two())?;
        }
        let memory = CudaMemory::new(self.stream.device(), bytes.len())?;
        self.staging.bytes()?[..bytes.len()].copy_from_slice(bytes);
        self.staging.copy_to(0, &memory.all())?;
        if matches!(known, Known::Again) {
            // It has arrived before anybody launches it again, or is forgotten.
            self.stream.synchronize()?;
            self.resident.keep(bytes, memory.clone());
        }
        Ok(memory)
    }

    /// Launches the table, and begins another one.
    fn launch(&mut self, writes: bool, used: &Arc<Vec<CudaMemory>>) -> Result<()> {
        if self.table.tiles > 0 {
            let memory = self.bring()?;
            let kernel = match (writes, self.table.wide) {
                (true, false) => &self.place,
                (true, true) => &self.place_wide,
                (false, _) => &self.check,
            };
            ffi::launch(kernel, &self.stream, &self.table, &memory, &self.numbers, used)?;
        }
        self.table.clear();
        Ok(())
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

fn counts_of(part: &StridedPart) -> [u64; 2] {
    part.blocks.as_ref().map_or([1, 1], |blocks| blocks.counts(part.extent[1], part.extent[2]))
}

fn blocks_of(part: &StridedPart) -> u64 {
    let [bands, blocks] = counts_of(part);
    part.extent[0] * bands * blocks
}

/// Checks that a part lies within memory of `len` bytes.
fn within(part: &StridedPart, at: quant_fp8::Strides, element: u64, len: u64) -> Result<()> {
    let [matrices, rows, cols] = part.extent;
    let end = cols.checked_mul(element).and_then(|bytes| at.end(matrices, rows, bytes));
    match end {
        Some(end) if end <= len => Ok(()),
        _ => Err(CudaError::Range(format!("a part at {} of {len} bytes", at.at)).into()),
    }
}

fn scales_within(part: &StridedPart, len: u64) -> Result<()> {
    let Some(blocks) = &part.blocks else { return Ok(()) };
    let [bands, columns] = counts_of(part);
    let end = blocks.scales.end(part.extent[0], bands, columns * 4);
    match end {
        Some(end) if end <= len => Ok(()),
        _ => Err(CudaError::Range(format!("scales at {} of {len} bytes", blocks.scales.at)).into()),
    }
}

//! Copies of versions on a device, with changes found and applied there.

mod ffi;
mod table;

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use engine_core::changes::{
    Applied, Compared, Cut, Difference, Due, ShadowBytes, ShadowMemory, ShadowPart,
};
use engine_core::memory::{Job, Pool};
use engine_core::{Error, ErrorKind, Result, Storage, Weight};

use crate::bucket::{Earlier, MARKED};
use crate::kernels::{Kernel, Library};
use crate::storage::address_of;
use crate::turns::Turns;
use crate::{CudaError, CudaMemory, CudaSlice, Device, Packer, PinnedMemory, Stream};
use table::{ENTRY, Entry, Table};

/// Bytes of weights that are compared at a time: so much of a device's memory, within these bounds. Every batch costs the time in which the
/// host learns that it is done, and memory for two batches or three beside the copies.
const BATCHES: u64 = 128;
const BATCH: std::ops::RangeInclusive<u64> = 256 << 20..=1 << 30;
/// Copies share allocations of so many bytes.
const COPIES: usize = 256 << 20;
/// Values of changes share allocations of so many bytes.
const VALUES: usize = 64 << 20;
/// Allocations for values that stay for the next update.
const SPARE: usize = 8;
/// Copies begin and end at multiples of it.
const ALIGNMENT: usize = 256;
/// Weights are encoded at the distances that their copies have, unless they are farther apart than this.
const GAP: usize = 1 << 20;

/// The memory of a CUDA device for copies of versions.
///
/// Weights that lie contiguous on the device are compared where they are. Others are encoded to memory beside, a batch at a time, and compared
/// there. Values of changes are made on the device and stay there.
#[derive(Debug)]
pub struct CudaShadows {
    device: Device,
    batch: u64,
    /// For the copies themselves.
    packer: Packer,
    tools: Turns<Tools>,
}

/// What works on a device.
#[derive(Debug)]
struct Tools {
    stream: Stream,
    find: Kernel,
    gather: Kernel,
    apply: Kernel,
    sum: Kernel,
    /// One is taken while weights are encoded and compared.
    encoders: Vec<Encoder>,
    /// Where the changes of each tile are, before those of all tiles are brought together.
    apart: CudaMemory,
    copies: Chunks,
    values: Chunks,
    /// Tables and results, on the device and on their way.
    table: CudaMemory,
    results: CudaMemory,
    to_device: PinnedMemory,
    to_host: PinnedMemory,
}

/// What encodes the weights of a batch. There is one for each that is encoded at the same time: the jobs of one are sorted while the device
/// works on another.
#[derive(Debug)]
struct Encoder {
    packer: Packer,
    bytes: CudaMemory,
    /// A bit for each 8 bytes, which is 0 where they are those of the copy, and not written.
    marks: CudaMemory,
}

/// Weights that are encoded together, at the distances that their copies have in one allocation.
#[derive(Debug)]
struct Run {
    jobs: Vec<Job>,
    copies: CudaMemory,
    /// Where in that allocation the memory for the first one begins.
    origin: usize,
    /// Where they are encoded.
    at: usize,
    len: usize,
}

/// The copy of a weight.
#[derive(Debug)]
struct Copied {
    place: CudaSlice,
    /// Views have clones.
    readers: Arc<()>,
}

impl ShadowBytes for Copied {
    fn len(&self) -> u64 {
        self.place.len() as u64
    }

    fn view(&self) -> Storage {
        self.place.storage().guarded(self.readers.clone())
    }
}

/// Allocations from which memory is taken piece by piece. One is used again when nobody has any of its pieces.
#[derive(Debug)]
struct Chunks {
    /// Bytes of one.
    size: usize,
    all: Vec<CudaMemory>,
    /// Bytes that are taken of the last one.
    taken: usize,
}

impl Chunks {
    fn of(size: usize) -> Self {
        Self { size, all: Vec::new(), taken: 0 }
    }

    /// Takes so many bytes that nobody has.
    fn take(&mut self, device: &Device, bytes: usize) -> Result<CudaSlice, CudaError> {
        // A piece shares its allocation. So nobody has a piece of what only this list has.
        if self.all.last().is_some_and(CudaMemory::is_unshared) {
            self.taken = 0;
        }
        let padded = bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        if self.all.last().is_none_or(|last| last.len() - self.taken < padded) {
            let fits = |memory: &CudaMemory| memory.len() >= padded && memory.is_unshared();
            let memory = match self.all.iter().position(fits) {
                Some(free) => self.all.remove(free),
                None => {
                    // Where a whole one does not fit any more, a smaller one may.
                    let memory = CudaMemory::new(device, padded.max(self.size));
                    memory.or_else(|_| CudaMemory::new(device, padded))?
                }
            };
            self.all.push(memory);
            self.taken = 0;
        }
        let at = self.taken;
        self.taken += padded;
        match self.all.last() {
            Some(last) => last.slice(at, bytes),
            None => Err(CudaError::Range("no memory was taken".into())),
        }
    }

    /// Lets go of allocations that nobody has any piece of, but for so many.
    fn shrink(&mut self, mut keep: usize) {
        let last = self.all.last().map(CudaMemory::address);
        self.all.retain(|memory| {
            let is_free = memory.is_unshared();
            let stays = !is_free || keep > 0;
            keep -= usize::from(is_free && stays);
            stays
        });
        // What is the last one now may have no room.
        match self.all.last() {
            Some(now) if Some(now.address()) != last => self.taken = now.len(),
            _ => {}
        }
    }
}

/// A part of a weight that is compared.
#[derive(Clone, Debug)]
struct Part {
    /// The number of the weight.
    of: usize,
    cut: Cut,
    bytes: Range<u64>,
    /// Where its new bytes are; `None` if they are encoded first.
    now: Option<u64>,
    /// Where the marks of its new bytes are, if they were encoded.
    marks: u64,
    old: u64,
}

const COMPARING: &str = "finding changes on a device";
const APPLYING: &str = "applying changes on a device";

fn copied(copy: &dyn ShadowBytes) -> Result<&Copied> {
    let copy: &dyn Any = copy;
    copy.downcast_ref().ok_or_else(|| other(COMPARING))
}

fn copied_mut(copy: &mut dyn ShadowBytes) -> Result<&mut Copied> {
    let copy: &mut dyn Any = copy;
    copy.downcast_mut().ok_or_else(|| other(APPLYING))
}

fn other(operation: &str) -> Error {
    Error::new(ErrorKind::State, operation, "a copy that is not in memory of a CUDA device")
}

impl CudaShadows {
    /// Loads what works on a device.
    ///
    /// # Errors
    ///
    /// Those of [`Packer::new`].
    pub fn new(device: &Device) -> Result<Self> {
        let (_, total) = device.memory()?;
        let batch = (total as u64 / BATCHES).clamp(*BATCH.start(), *BATCH.end());
        Self::with_batch(device, batch)
    }

    /// As [`new`](Self::new), with so many bytes of weights that are encoded and compared at a time.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new).
    pub fn with_batch(device: &Device, batch: u64) -> Result<Self> {
        let library = Library::of_deltas(device)?;
        let stream = Stream::new(device)?;
        const TABLE: usize = 1 << 20;
        let tools = Tools {
            find: library.kernel(c"find_changes")?,
            gather: library.kernel(c"gather_values")?,
            apply: library.kernel(c"apply_changes")?,
            sum: library.kernel(c"sum_copies")?,
            encoders: Vec::new(),
            apart: CudaMemory::new(device, TABLE)?,
            copies: Chunks::of(COPIES),
            values: Chunks::of(VALUES),
            table: CudaMemory::new(device, TABLE)?,
            results: CudaMemory::new(device, TABLE)?,
            to_device: PinnedMemory::new(&stream, TABLE)?,
            to_host: PinnedMemory::new(&stream, TABLE)?,
            stream,
        };
        let packer = Packer::new(device)?;
        Ok(Self { device: device.clone(), batch, packer, tools: Turns::new(tools) })
    }

    /// The address of bytes on this device.
    fn here(&self, storage: &Storage) -> Option<u64> {
        let (ordinal, address) = address_of(storage)?;
        (ordinal == self.device.ordinal()).then_some(address)
    }

    /// The parts in which weights are compared, in their order.
    fn parts_of(&self, weights: &[(&Weight, &dyn ShadowBytes)]) -> Result<Vec<Part>> {
        let mut parts = Vec::with_capacity(weights.len());
        for (of, (weight, copy)) in weights.iter().enumerate() {
            let (old, len) = (copied(*copy)?.place.address(), copy.len());
            if weight.byte_len() != len {
                let words = format!("{} bytes and a copy of {len}", weight.byte_len());
                return Err(Error::new(ErrorKind::State, COMPARING, words).tensor(weight.name()));
            }
            let cut = Cut::at(weight.meta().dtype, weight.granule());
            let now = weight.storage().and_then(|storage| self.here(storage));
            let now = now.filter(|now| now.is_multiple_of(16));
            let step = cut.step(weight.granule(), self.batch as usize);
            for start in (0..len.max(1)).step_by(step) {
                let bytes = start..len.min(start + step as u64);
                let now = now.map(|now| now + start);
                parts.push(Part { of, cut, bytes, now, marks: 0, old: old + start });
            }
        }
        Ok(parts)
    }

    /// Encodes the parts that are not compared where they are. Returns the memory in which they are now.
    fn encode_parts(
        &self,
        weights: &[(&Weight, &dyn ShadowBytes)],
        parts: &mut [Part],
        pool: &Pool,
    ) -> Result<Option<Encoder>> {
        let mut runs: Vec<Run> = Vec::new();
        let mut places = Vec::new();
        for part in parts.iter().filter(|part| part.now.is_none()) {
            let (weight, copy) = weights[part.of];
            let (start, len) = (part.bytes.start, part.bytes.end - part.bytes.start);
            let place = &copied(copy)?.place;
            let begins = place.start() + start as usize;
            let follows = |run: &&mut Run| {
                let gap = begins.checked_sub(run.origin + run.len);
                run.copies.address() == place.memory().address()
                    && gap.is_some_and(|gap| gap <= GAP)
            };
            let end = runs.last().map_or(0, |run| run.at + run.len);
            let run = match runs.last_mut().filter(follows) {
                Some(run) => run,
                None => runs.push_mut(Run {
                    jobs: Vec::new(),
                    copies: place.memory().clone(),
                    origin: begins / ALIGNMENT * ALIGNMENT,
                    at: end.next_multiple_of(ALIGNMENT),
                    len: 0,
                }),
            };
            let offset = begins - run.origin;
            run.jobs.push(Job { weight: weight.clone(), start, len, offset: offset as u64 });
            run.len = offset + len as usize;
            places.push(run.at + offset);
        }
        let Some(last) = runs.last() else { return Ok(None) };
        let needed = (last.at + last.len).next_multiple_of(ALIGNMENT);
        let needed = needed.max(self.batch as usize);
        let memory = || {
            let bytes = CudaMemory::new(&self.device, needed)?;
            let marks = CudaMemory::new(&self.device, needed.div_ceil(MARKED))?;
            Ok::<_, CudaError>((bytes, marks))
        };
        let encoder = match self.tools.take(|tools| tools.encoders.pop()) {
            Some(encoder) if encoder.bytes.len() >= needed => encoder,
            Some(Encoder { packer, bytes, marks }) => {
                drop((bytes, marks));
                let (bytes, marks) = memory()?;
                Encoder { packer, bytes, marks }
            }
            None => {
                let packer = Packer::new(&self.device)?;
                let (bytes, marks) = memory()?;
                Encoder { packer, bytes, marks }
            }
        };
        for Run { jobs, copies, origin, at, len } in runs {
            let bucket = encoder.bytes.slice(at, len)?;
            let marks = encoder.marks.slice(at / MARKED, len.div_ceil(MARKED))?;
            let earlier = Earlier { copy: copies.slice(origin, len)?, marks };
            encoder.packer.fill_what_differs(jobs, &bucket, &earlier, pool)?;
        }
        for (part, at) in parts.iter_mut().filter(|part| part.now.is_none()).zip(places) {
            part.now = Some(encoder.bytes.address() + at as u64);
            part.marks = encoder.marks.address() + (at / MARKED) as u64;
        }
        Ok(Some(encoder))
    }

    /// The slices of some bytes on this device: where they are, or copied here.
    fn brought(&self, storage: &Storage) -> Result<CudaSlice> {
        if self.here(storage).is_some()
            && let Some(slice) = CudaSlice::of_storage(storage)
        {
            return Ok(slice);
        }
        let bytes = storage.to_host()?;
        let slice = CudaMemory::new(&self.device, bytes.len())?.slice(0, bytes.len())?;
        slice.write(&bytes)?;
        Ok(slice)
    }
}

impl ShadowMemory for CudaShadows {
    fn batch(&self) -> u64 {
        self.batch
    }

    fn allocate(&self, lens: &[u64]) -> Result<Vec<Box<dyn ShadowBytes>>> {
        self.tools.take(|tools| {
            tools.copies.shrink(0);
            let places = tools.places(lens)?;
            let copy = |place| Box::new(Copied { place, readers: Arc::default() });
            Ok(places.into_iter().map(|place| copy(place) as Box<dyn ShadowBytes>).collect())
        })
    }

    fn encode(
        &self,
        weights: &[Weight],
        to: &mut [Box<dyn ShadowBytes>],
        pool: &Pool,
    ) -> Result<Vec<u64>> {
        let mut at = 0;
        while let Some(first) = weights.get(at) {
            // As many as lie one behind the other in an allocation.
            let begin = copied(&*to[at])?.place.clone();
            let (mut jobs, mut end) = (Vec::new(), begin.start());
            for (weight, copy) in weights[at..].iter().zip(&to[at..]) {
                let place = &copied(&**copy)?.place;
                let is_next = place.start() >= end || place.is_empty();
                if place.memory().address() != begin.memory().address() || !is_next {
                    break;
                }
                if place.len() as u64 != weight.byte_len() {
                    let words =
                        format!("{} bytes for a copy of {}", weight.byte_len(), place.len());
                    return Err(
                        Error::new(ErrorKind::State, COMPARING, words).tensor(weight.name())
                    );
                }
                let offset = place.start().saturating_sub(begin.start()) as u64;
                let len = weight.byte_len();
                jobs.push(Job { weight: weight.clone(), start: 0, len, offset });
                end = end.max(place.start() + place.len());
            }
            if jobs.is_empty() {
                let words = "copies that overlap";
                return Err(Error::new(ErrorKind::State, COMPARING, words).tensor(first.name()));
            }
            at += jobs.len();
            let bucket = begin.memory().slice(begin.start(), end - begin.start())?;
            self.packer.fill(jobs, &bucket, pool, false)?;
        }
        let copies: Vec<&dyn ShadowBytes> = to.iter().map(|copy| &**copy).collect();
        self.sums(&copies, pool)
    }

    fn write(&self, to: &mut [Box<dyn ShadowBytes>], parts: &[ShadowPart], _: &Pool) -> Result<()> {
        let mut own = to.iter_mut().map(|to| copied_mut(&mut **to)).collect::<Result<Vec<_>>>()?;
        self.tools.take(|tools| tools.make_own(&mut own))?;
        let outside = || Error::new(ErrorKind::Protocol, APPLYING, "a part outside its weight");
        let mut copies = Vec::with_capacity(parts.len());
        for ShadowPart { of, start, bytes } in parts {
            let place = &own.get(*of).ok_or_else(outside)?.place;
            let (start, len) = (usize::try_from(*start), usize::try_from(bytes.len()));
            let (Ok(start), Ok(len)) = (start, len) else { return Err(outside()) };
            let target = place.slice(start, len).map_err(|_| outside())?;
            match self.here(bytes).and_then(|_| CudaSlice::of_storage(bytes)) {
                Some(source) => copies.push((source, target)),
                None => target.write(&bytes.to_host()?)?,
            }
        }
        self.packer.copy(copies)
    }

    fn sums(&self, of: &[&dyn ShadowBytes], _: &Pool) -> Result<Vec<u64>> {
        let mut table = Table::default();
        for copy in of {
            table.push(&Entry::whole(copied(*copy)?.place.address(), copy.len()))?;
        }
        self.tools.take(|tools| Ok(tools.sums(&table)?))
    }

    fn compare(&self, weights: &[(&Weight, &dyn ShadowBytes)], pool: &Pool) -> Result<Compared> {
        let begun = Instant::now();
        let mut parts = self.parts_of(weights)?;
        let mut found: Vec<Difference> = Vec::with_capacity(weights.len());
        let (mut values, mut rest) = (Vec::new(), &mut parts[..]);
        while !rest.is_empty() {
            // A batch may be a little larger.
            let mut room = 2 * self.batch;
            let fits = |part: &Part| {
                let needed = (part.bytes.end - part.bytes.start).next_multiple_of(ALIGNMENT as u64);
                let fits = needed <= room;
                room = room.saturating_sub(needed);
                fits
            };
            let some = rest.iter().map(fits).take_while(|fits| *fits).count().max(1);
            let (now, later) = std::mem::take(&mut rest).split_at_mut(some);
            rest = later;
            let encoder = self.encode_parts(weights, now, pool)?;
            let encoded_after = begun.elapsed();
            let results = self.tools.take(|tools| {
                let results = tools.find(now);
                tools.encoders.extend(encoder);
                results
            });
            let (results, some) = results?;
            let (parts, after) = (now.len(), begun.elapsed());
            let bytes = some.as_ref().map_or(0, CudaSlice::len);
            tracing::debug!(parts, bytes, ?encoded_after, ?after, "changes found");
            values.extend(some);
            for (part, result) in now.iter().zip(results) {
                match found.last_mut().filter(|_| part.bytes.start > 0) {
                    Some(last) => last.extend(result),
                    None => found.push(result),
                }
            }
        }
        let values = match &values[..] {
            [] => Vec::new().into(),
            [one] => one.storage(),
            several => self.tools.take(|tools| tools.joined(several))?.storage(),
        };
        let weights = found.into_iter().map(Difference::without_words_of_nothing).collect();
        Ok(Compared { weights, values })
    }

    fn apply(
        &self,
        due: &mut [Due<'_>],
        values: &Storage,
        wanted: bool,
        _: &Pool,
    ) -> Result<Applied> {
        let begun = Instant::now();
        let refuse = |words: &str| Error::new(ErrorKind::Protocol, APPLYING, words);
        let mut own = Vec::with_capacity(due.len());
        let (mut words, mut places, mut at) = (Vec::new(), Vec::new(), 0_u64);
        let mut cuts = Vec::with_capacity(due.len());
        for Due { name, to, cut, words: of } in due.iter_mut() {
            let copy = copied_mut(&mut ***to)?;
            if of.is_empty() {
                continue;
            }
            let all = cut.places(copy.len(), of);
            let all = all.ok_or_else(|| refuse("not a word for each tile").tensor(*name))?;
            let (end, all) = all.split_last().ok_or_else(|| refuse("no places").tensor(*name))?;
            words.extend_from_slice(of);
            places.extend(all.iter().map(|place| at + place));
            at += end;
            cuts.push(*cut);
            own.push(copy);
        }
        if at != values.len() {
            return Err(refuse("other values than the words announce"));
        }
        let source = self.brought(values)?;
        let (undo, sums, failed) = self.tools.take(|tools| {
            tools.make_own(&mut own)?;
            let mut table = Table::default();
            for (copy, cut) in own.iter().zip(cuts) {
                table.push(&Entry::of(cut, copy.place.address(), copy.len()))?;
            }
            let undo = match wanted {
                true => Some(tools.values.take(&self.device, source.len())?),
                false => None,
            };
            let (sums, failed) = tools.apply(&table, &words, &places, &source, undo.as_ref())?;
            Ok::<_, Error>((undo, sums, failed))
        })?;
        tracing::debug!(weights = due.len(), bytes = at, after = ?begun.elapsed(), "changes applied");
        let mut sums = sums.into_iter();
        let mut changed = due.iter().filter(|due| !due.words.is_empty());
        if let Some(failed) = failed {
            let name = changed.nth(failed).map_or("", |due| due.name);
            return Err(refuse("the places of its changes are none").tensor(name));
        }
        let sums = due.iter().map(|due| match due.words.is_empty() {
            true => 0,
            false => sums.next().unwrap_or_default(),
        });
        Ok(Applied { sums: sums.collect(), undo: undo.map(|undo| undo.storage()) })
    }
}

impl Tools {
    /// Places for copies of these lengths.
    fn places(&mut self, lens: &[u64]) -> Result<Vec<CudaSlice>> {
        let device = self.stream.device().clone();
        let place = |len: &u64| {
            let len = usize::try_from(*len);
            let len = len.map_err(|_| CudaError::Range("more than can be addressed".into()))?;
            Ok(self.copies.take(&device, len)?)
        };
        lens.iter().map(place).collect()
    }

    /// Moves copies that somebody reads to other places.
    fn make_own(&mut self, copies: &mut [&mut Copied]) -> Result<()> {
        let read = copies.iter_mut().filter(|copy| Arc::strong_count(&copy.readers) > 1);
        let read: Vec<_> = read.collect();
        if read.is_empty() {
            return Ok(());
        }
        let lens: Vec<u64> = read.iter().map(|copy| copy.len()).collect();
        for (copy, place) in read.into_iter().zip(self.places(&lens)?) {
            place.copy_from(&copy.place, &self.stream)?;
            (copy.place, copy.readers) = (place, Arc::default());
        }
        Ok(self.stream.synchronize()?)
    }

    /// Copies a table to the device, and sets so many bytes of the results to 0.
    fn begin(&mut self, table: &[u8], zeros: usize, results: usize) -> Result<(), CudaError> {
        let device = self.stream.device().clone();
        if table.len() > self.table.len() {
            let len = table.len().next_power_of_two();
            self.table = CudaMemory::new(&device, len)?;
            self.to_device = PinnedMemory::new(&self.stream, len)?;
        }
        if results > self.results.len() {
            let len = results.next_power_of_two();
            self.results = CudaMemory::new(&device, len)?;
            self.to_host = PinnedMemory::new(&self.stream, len)?;
        }
        self.to_device.bytes()?[..table.len()].copy_from_slice(table);
        self.to_device.copy_to(0, &self.table.slice(0, table.len())?)?;
        self.results.slice(0, zeros)?.fill(0, &self.stream)
    }

    /// Waits, and returns some of the results.
    fn end(&mut self, results: Range<usize>) -> Result<&[u8], CudaError> {
        let len = results.len();
        self.to_host.copy_from(&self.results.slice(results.start, len)?)?;
        Ok(&self.to_host.bytes()?[..len])
    }

    /// Slices one behind the other.
    fn joined(&mut self, slices: &[CudaSlice]) -> Result<CudaSlice> {
        let len = slices.iter().map(CudaSlice::len).sum();
        let all = self.values.take(self.stream.device(), len)?;
        let mut at = 0;
        for slice in slices {
            all.slice(at, slice.len())?.copy_from(slice, &self.stream)?;
            at += slice.len();
        }
        self.stream.synchronize()?;
        Ok(all)
    }

    /// Finds the changes of parts whose new bytes are on the device, and brings their values together.
    fn find(&mut self, parts: &[Part]) -> Result<(Vec<Difference>, Option<CudaSlice>)> {
        let bytes: u64 = parts.iter().map(|part| part.bytes.end - part.bytes.start).sum();
        if bytes > self.apart.len() as u64 {
            self.apart = CudaMemory::new(self.stream.device(), bytes as usize)?;
        }
        let (mut table, mut place) = (Table::default(), self.apart.address());
        for part in parts {
            let len = part.bytes.end - part.bytes.start;
            let now = part.now.unwrap_or_default();
            let entry = Entry::of(part.cut, part.old, len);
            let (start, marks) = (part.bytes.start, part.marks);
            table.push(&Entry { now, place, start, marks, ..entry })?;
            place += len;
        }
        let (jobs, tiles) = (table.jobs(), table.tiles() as usize);
        // The results of each job, and of each tile the word and the length of its values.
        let words = jobs * 16;
        let lens = words + tiles * 4;
        self.begin(&table.bytes(), words, lens + tiles * 4)?;
        let (entries, found) = (self.table.address(), self.results.address());
        let (firsts, words_at) = (entries + (jobs * ENTRY) as u64, found + words as u64);
        let lens_at = found + lens as u64;
        let (count, all) = (jobs as u64, tiles as u64);
        let memory = [&self.table, &self.results, &self.apart];
        let mut parameters = [entries, firsts, count, all, found, words_at, lens_at];
        ffi::launch(&self.find, &self.stream, table.tiles(), &memory, &mut parameters)?;
        let bytes = self.end(0..lens)?;
        let (results, words) = bytes.split_at(jobs * 16);
        let mut words = words.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
        let differences =
            parts.iter().zip(results.as_chunks::<8>().0.chunks(2)).map(|(part, of)| {
                let (len, cut) = (part.bytes.end - part.bytes.start, part.cut);
                let words: Vec<u32> = words.by_ref().take(cut.tiles(len) as usize).collect();
                let number = |at: usize| of.get(at).map_or(0, |word| u64::from_le_bytes(*word));
                let places = cut.places(len, &words);
                let len = places.and_then(|places| places.last().copied()).unwrap_or_default();
                Difference { cut, words, len, sum: number(0), units: number(1) }
            });
        let differences: Vec<Difference> = differences.collect();
        let len = differences.iter().map(|difference| difference.len).sum::<u64>() as usize;
        if len == 0 {
            return Ok((differences, None));
        }
        self.values.shrink(SPARE);
        let out = self.values.take(self.stream.device(), len)?;
        let memory = [&self.table, &self.results, &self.apart, out.memory()];
        let mut parameters = [entries, firsts, count, all, words_at, lens_at, out.address()];
        ffi::launch(&self.gather, &self.stream, table.tiles(), &memory, &mut parameters)?;
        self.stream.synchronize()?;
        Ok((differences, Some(out)))
    }

    /// Applies changes. Returns the change of each sum, and the first job found whose changes were none of its.
    fn apply(
        &mut self,
        table: &Table,
        words: &[u32],
        places: &[u64],
        values: &CudaSlice,
        undo: Option<&CudaSlice>,
    ) -> Result<(Vec<u64>, Option<usize>)> {
        let (jobs, tiles) = (table.jobs(), table.tiles() as usize);
        if (words.len(), places.len()) != (tiles, tiles) {
            return Err(CudaError::Range(format!("{} words for {tiles} tiles", words.len())).into());
        }
        let mut bytes: Vec<u8> = places.iter().flat_map(|place| place.to_le_bytes()).collect();
        let words_at = bytes.len();
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        let entries_at = bytes.len().next_multiple_of(8);
        bytes.resize(entries_at, 0);
        bytes.extend(table.bytes());
        self.begin(&bytes, 8 + jobs * 8, 8 + jobs * 8)?;
        let (at, found) = (self.table.address(), self.results.address());
        let entries = at + entries_at as u64;
        let mut parameters = [
            entries,
            entries + (jobs * ENTRY) as u64,
            jobs as u64,
            tiles as u64,
            at + words_at as u64,
            at,
            values.address(),
            undo.map_or(0, CudaSlice::address),
            found + 8,
            found,
        ];
        let memory = [&self.table, &self.results, values.memory(), undo.unwrap_or(values).memory()];
        ffi::launch(&self.apply, &self.stream, table.tiles(), &memory, &mut parameters)?;
        let bytes = self.end(0..8 + jobs * 8)?;
        let mut numbers = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let failed = numbers.next().unwrap_or_default() as usize;
        Ok((numbers.collect(), failed.checked_sub(1)))
    }

    /// The sum of each copy of a table.
    fn sums(&mut self, table: &Table) -> Result<Vec<u64>, CudaError> {
        let len = table.jobs() * 8;
        self.begin(&table.bytes(), len, len)?;
        let (entries, found) = (self.table.address(), self.results.address());
        let (jobs, tiles) = (table.jobs(), table.tiles());
        let firsts = entries + (jobs * ENTRY) as u64;
        let mut parameters = [entries, firsts, jobs as u64, tiles.into(), found];
        let memory = [&self.table, &self.results];
        ffi::launch(&self.sum, &self.stream, tiles, &memory, &mut parameters)?;
        let words = self.end(0..len)?.as_chunks::<8>().0.iter();
        Ok(words.map(|word| u64::from_le_bytes(*word)).collect())
    }
}

//! Sorts the work of a bucket by who does it: the kernels, the driver or the CPU. Pure: jobs and addresses in, tables out.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use engine_core::memory::Job;
use engine_core::{Encoding, Error, Kernel, Program, Result, Storage, Weight};
use quant_fp8::{Fp8Codes, Fp8Format, Fp8Scales, Granularity, NonFinite, QuantError};

use crate::CudaError;
use crate::ledger::key;
use crate::programs::kernel_of;
use crate::table::{
    Against, Encoder, Entry, Fp8Places, ProgramEntry, Table, Tables, Task, mode_number,
};

/// The most programs in a bucket's launches. The CPU does the work of any others.
const MOST_PROGRAMS: usize = 4;

/// Bytes of a scale.
pub(crate) const SCALE: usize = size_of::<f32>();

/// Where bytes are, as a device sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Located {
    /// In its memory, at an address.
    Here(u64),
    /// In the memory of another device, from which the driver copies.
    Peer,
    Elsewhere,
}

/// Memory of the device outside the bucket.
pub(crate) trait Beside {
    /// Where the scales of a weight go that are not written to their place at once. The scales `now` are computed now.
    fn place(&mut self, of: &Arc<dyn Encoding>, codes: &Fp8Codes, now: Range<usize>)
    -> Result<u64>;

    /// Where the scales of codes are, if all of `scales` were or are computed there. With `ends`, they will not be asked for again.
    fn find(&mut self, codes: usize, scales: &Range<usize>, ends: bool) -> Option<u64>;

    /// Memory that is used within this bucket.
    fn scratch(&mut self, len: usize) -> Result<u64>;
}

/// The work of one bucket. Its memory is used for bucket after bucket.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// One launch for each format and kernel, and one for what is made outside the bucket. There are hardly ever more than two.
    batches: Vec<Batch>,
    /// Batches of earlier buckets, to be reused.
    spare: Vec<Batch>,
    /// Copies of what the launches made outside the bucket.
    late: Table,
    /// The jobs of encodings' own programs: one launch for each program.
    programs: Vec<(&'static Program, Table)>,
    /// Parts that no launch adds to the digest while it writes them.
    unsummed: Table,
    /// For each launch whose table was made, the job of each entry that is a matrix or a copy, and its first block: this names a block
    /// that is not finite.
    launched: Vec<Vec<(u32, u32)>>,
    /// The numbers of jobs that the CPU encodes.
    pub(crate) host: Vec<usize>,
    /// The numbers of jobs that the driver copies: weights of other devices.
    pub(crate) peers: Vec<usize>,
    /// How launches treat jobs that are scales.
    scales: Vec<Scales>,
}

#[derive(Debug, Default)]
struct Batch {
    format: Fp8Format,
    encoder: Encoder,
    /// Whether the targets are not in the bucket.
    is_aside: bool,
    table: Table,
    /// The job of each entry, and its first block.
    of: Vec<(u32, u32)>,
}

/// How the launch of their codes treats scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scales {
    Nothing,
    /// Writes them to their place.
    Written,
    /// Writes them to their place, and adds them to the digest.
    Summed,
}

/// The sorting of the jobs of a bucket, which may pause.
pub(crate) struct Sorting<'a, L, B> {
    jobs: &'a [Job],
    /// The address of the bucket, and its length.
    bucket: (u64, u64),
    digests: bool,
    /// Whether codes are compared with a copy.
    compares: bool,
    locate: L,
    pub(crate) beside: &'a mut B,
    /// The next job to look at.
    next: usize,
    /// The jobs of scales. They are sorted after all others: scales are computed with their codes, which may lie behind them.
    scales: Vec<usize>,
    /// The next one of them.
    next_scales: usize,
    /// Jobs of whole scales that do not directly follow their codes.
    elsewhere: Option<HashMap<usize, usize>>,
}

impl<'a, L: Fn(&Storage) -> Located, B: Beside> Sorting<'a, L, B> {
    /// Of the jobs of a bucket, given by address and length. With `compares` its codes are compared with a copy, and nothing is digested.
    /// `locate` says where storages are.
    pub(crate) fn new(
        jobs: &'a [Job],
        bucket: (u64, u64),
        digests: bool,
        compares: bool,
        locate: L,
        beside: &'a mut B,
    ) -> Self {
        let (next, scales, next_scales) = (0, Vec::new(), 0);
        Self {
            jobs,
            bucket,
            digests,
            compares,
            locate,
            beside,
            next,
            scales,
            next_scales,
            elsewhere: None,
        }
    }

    /// The next job to sort.
    fn next(&mut self) -> Option<usize> {
        while self.next < self.jobs.len() {
            let index = self.next;
            self.next += 1;
            match encoding::<Fp8Scales>(&self.jobs[index].weight) {
                Some(_) => self.scales.push(index),
                None => return Some(index),
            }
        }
        let index = self.scales.get(self.next_scales).copied()?;
        self.next_scales += 1;
        Some(index)
    }
}

impl Work {
    /// Prepares for another bucket, of so many jobs.
    pub(crate) fn begin(&mut self, jobs: usize) {
        self.clear();
        self.scales.resize(jobs, Scales::Nothing);
    }

    /// Sorts jobs, at most so many, and returns whether these were the last ones. What is sorted so far can be
    /// [launched](Self::tables) before the rest is.
    ///
    /// # Errors
    ///
    /// `State` for jobs that reach beyond their weight or the bucket; those of `beside`.
    pub(crate) fn sort<L: Fn(&Storage) -> Located, B: Beside>(
        &mut self,
        sorting: &mut Sorting<'_, L, B>,
        most: usize,
    ) -> Result<bool> {
        for _ in 0..most {
            let Some(index) = sorting.next() else {
                // The CPU encodes them in the order of their places.
                self.host.sort_unstable();
                return Ok(true);
            };
            self.take(index, sorting)?;
        }
        Ok(false)
    }

    fn clear(&mut self) {
        // The order is that of this bucket's jobs, whatever the last bucket had.
        self.spare.append(&mut self.batches);
        self.late.clear();
        self.programs.clear();
        self.unsummed.clear();
        self.launched.clear();
        self.host.clear();
        self.peers.clear();
        self.scales.clear();
    }

    /// Appends the tables of launches for what was sorted since the last call. Everything that these launches do not digest is digested by
    /// the `last` ones, when the bytes of others have arrived. `against` is what codes are compared with, if they are.
    pub(crate) fn tables(
        &mut self,
        bucket: u64,
        digests: bool,
        against: Option<Against>,
        last: bool,
        tables: &mut Tables,
    ) {
        for batch in self.batches.iter_mut().filter(|batch| !batch.table.is_empty()) {
            let mode = mode_number(batch.format.mode);
            let base = if digests && !batch.is_aside { bucket } else { 0 };
            let task = match against.filter(|_| batch.encoder == Encoder::Compared) {
                Some(against) => Task::Compare { mode, base: bucket, against },
                None => Task::Encode { mode, base },
            };
            tables.add(&batch.table, task);
            self.launched.push(std::mem::take(&mut batch.of));
            batch.table.clear();
        }
        let mode = mode_number(Fp8Format::default().mode);
        let base = if digests { bucket } else { 0 };
        let late = (Task::Encode { mode, base: 0 }, &mut self.late);
        let programs = self.programs.iter_mut();
        let programs = programs.map(|(program, table)| (Task::Program { program, base }, table));
        let unsummed = last.then_some((Task::Digest, &mut self.unsummed));
        for (task, table) in [late].into_iter().chain(programs).chain(unsummed) {
            if !table.is_empty() {
                tables.add(table, task);
                self.launched.push(Vec::new());
                table.clear();
            }
        }
    }

    /// The error of a block without a finite form, which names its weight. The block is given by its launch, its job in it, and its number
    /// in the job.
    pub(crate) fn failed(
        &self,
        jobs: &[Job],
        (launch, job, block): (usize, usize, usize),
    ) -> Error {
        let found = self.launched.get(launch).and_then(|entries| {
            let (of, first) = *entries.get(job)?;
            let weight = &jobs.get(of as usize)?.weight;
            Some((weight, encoding::<Fp8Codes>(weight)?, first as usize))
        });
        let Some((weight, codes, first)) = found else {
            return CudaError::NonFinite { job, block }.into();
        };
        let (grid, block) = (codes.grid(), first + block);
        let band = block / grid.scales_per_band();
        QuantError::NonFinite {
            tensor: Some(weight.name().to_owned()),
            expert: band / grid.bands_per_matrix(),
            block_row: band % grid.bands_per_matrix(),
            block_col: block % grid.scales_per_band(),
        }
        .into()
    }

    /// Sorts one job.
    fn take<L: Fn(&Storage) -> Located, B: Beside>(
        &mut self,
        index: usize,
        sorting: &mut Sorting<'_, L, B>,
    ) -> Result<()> {
        let job = &sorting.jobs[index];
        if job.len == 0 {
            return Ok(());
        }
        let target = sorting.target(job)?;
        if let Some(storage) = job.weight.storage() {
            match (sorting.locate)(storage) {
                Located::Here(source) => {
                    let copy = Entry::copy(source + job.start, target, job.len);
                    let batch = self.batch(None, copy.0.encoder(), false);
                    return self.add(batch, copy, (index, 0), job, sorting.digests);
                }
                Located::Peer => self.peers.push(index),
                Located::Elsewhere => self.host.push(index),
            }
        } else if let Some((kernel, source)) = self.program_of(job, target, &sorting.locate) {
            let entry = ProgramEntry { source, target, start: job.start, bytes: job.len };
            let table = self.program(kernel.program);
            // The launch adds what it writes to the digest.
            return Ok(table.push_program(entry, &kernel.parameters)?);
        } else if let Some(of) = job.weight.encoding() {
            let any: &dyn std::any::Any = &**of;
            if let Some(codes) = any.downcast_ref::<Fp8Codes>()
                && let Some(source) = source_of(codes, &sorting.locate)
            {
                return self.take_codes(index, sorting, (of, codes), (source, target));
            }
            let done = self.scales[index];
            if done == Scales::Summed {
                return Ok(());
            }
            let scales = any.downcast_ref::<Fp8Scales>();
            if let Some(scales) = scales.filter(|_| done == Scales::Nothing) {
                let wanted =
                    job.start as usize / SCALE..((job.start + job.len) as usize).div_ceil(SCALE);
                let ends = job.start + job.len == job.weight.byte_len();
                match sorting.beside.find(key(scales.codes()), &wanted, ends) {
                    Some(from) => self.late.push(Entry::copy(from + job.start, target, job.len))?,
                    // Not all were computed on this device: another rank may have sent some of the codes.
                    None => self.host.push(index),
                }
            } else if done == Scales::Nothing {
                self.host.push(index);
            }
        } else {
            self.host.push(index);
        }
        self.digest_later(target, job, sorting.digests)
    }

    /// The kernel of an encoding, and the address of its source, if it can encode a job here.
    fn program_of<'a>(
        &self,
        job: &'a Job,
        target: u64,
        locate: impl Fn(&Storage) -> Located,
    ) -> Option<(Kernel<'a>, u64)> {
        let kernel = kernel_of(&job.weight)?;
        let Located::Here(source) = locate(kernel.source) else { return None };
        // Programs read whole elements.
        let is_aligned = (target | job.start).is_multiple_of(16) && source.is_multiple_of(8);
        let is_known = self.programs.iter().any(|(known, _)| std::ptr::eq(*known, kernel.program));
        let fits = is_known || self.programs.len() < MOST_PROGRAMS;
        (is_aligned && fits).then_some((kernel, source))
    }

    fn program(&mut self, program: &'static Program) -> &mut Table {
        let known = self.programs.iter().position(|(known, _)| std::ptr::eq(*known, program));
        let at = known.unwrap_or_else(|| {
            self.programs.push((program, Table::default()));
            self.programs.len() - 1
        });
        &mut self.programs[at].1
    }

    /// Adds codes that are computed here, from a source to a target.
    fn take_codes<L, B: Beside>(
        &mut self,
        index: usize,
        sorting: &mut Sorting<'_, L, B>,
        (of, codes): (&Arc<dyn Encoding>, &Fp8Codes),
        (source, target): (u64, u64),
    ) -> Result<()> {
        let (job, grid) = (&sorting.jobs[index], codes.grid());
        // A code is one byte, so byte offsets are element indices.
        let part = job.start as usize..(job.start + job.len) as usize;
        let is_whole = part.len() == grid.elements();
        let covering = if is_whole { part.clone() } else { covering(codes, &part) };
        let first_block = if is_whole { 0 } else { grid.scales_of(&covering).start };
        let here = if is_whole { sorting.scales_here(index, key(of), &self.scales) } else { None };
        // The scales begin at a word of the digest.
        let sums_scales =
            here.is_some_and(|at| sorting.digests && sorting.jobs[at].offset.is_multiple_of(64));
        let all_scales = match here {
            Some(at) => {
                self.scales[at] = if sums_scales { Scales::Summed } else { Scales::Written };
                sorting.target(&sorting.jobs[at])?
            }
            None => sorting.beside.place(of, codes, grid.scales_of(&covering))?,
        };
        let is_aside = covering != part;
        let made = if is_aside { sorting.beside.scratch(covering.len())? } else { target };
        let at = Fp8Places {
            source: source + (covering.start * codes.source_type().size()) as u64,
            codes: made,
            scales: all_scales + (first_block * SCALE) as u64,
        };
        let encode = match *codes.shape() {
            _ if is_whole => Entry::fp8(at, codes.source_type(), codes.shape(), codes.format()),
            // Uneven experts come whole.
            [_, rows, cols] if covering.len().is_multiple_of(rows * cols) => {
                let shape = [covering.len() / (rows * cols), rows, cols];
                Entry::fp8(at, codes.source_type(), &shape, codes.format())
            }
            [.., cols] => {
                let shape = [covering.len() / cols, cols];
                Entry::fp8(at, codes.source_type(), &shape, codes.format())
            }
            [] => return Err(CudaError::Range("a matrix without sides".into()).into()),
        };
        let (encode, tiles) = encode?;
        let encode = if sums_scales { encode.summed_with_scales() } else { encode };
        let encode = (encode, tiles);
        let is_compared = sorting.compares && !is_aside && encode.0.is_comparable(sorting.bucket.0);
        let encoder = if is_compared { Encoder::Compared } else { encode.0.encoder() };
        let batch = self.batch(Some(codes.format()), encoder, is_aside);
        if !is_aside {
            return self.add(batch, encode, (index, first_block), job, sorting.digests);
        }
        // The part begins or ends within a row of blocks: whole rows are made outside the bucket.
        self.batches[batch].push(encode, (index, first_block))?;
        let skipped = (part.start - covering.start) as u64;
        self.late.push(Entry::copy(made + skipped, target, job.len))?;
        self.digest_later(target, job, sorting.digests)
    }

    /// The batch for an entry with an encoder and a format; for copies, of any format.
    fn batch(&mut self, format: Option<&Fp8Format>, encoder: Encoder, is_aside: bool) -> usize {
        let fits = |batch: &Batch| {
            (batch.encoder, batch.is_aside) == (encoder, is_aside)
                && format.is_none_or(|format| batch.format == *format)
        };
        match self.batches.iter().position(fits) {
            Some(index) => index,
            None => {
                let Batch { mut table, mut of, .. } = self.spare.pop().unwrap_or_default();
                table.clear();
                of.clear();
                let format = format.copied().unwrap_or_default();
                self.batches.push(Batch { format, encoder, is_aside, table, of });
                self.batches.len() - 1
            }
        }
    }

    fn add(
        &mut self,
        batch: usize,
        (entry, tiles): (Entry, usize),
        of: (usize, usize),
        job: &Job,
        digests: bool,
    ) -> Result<()> {
        let is_summed = digests && entry.is_summable();
        if digests && !is_summed {
            self.digest_later(entry.target(), job, digests)?;
        }
        let entry = if is_summed { entry.summed() } else { entry };
        self.batches[batch].push((entry, tiles), of)
    }

    fn digest_later(&mut self, target: u64, job: &Job, digests: bool) -> Result<()> {
        match digests {
            true => Ok(self.unsummed.push(Entry::part(target, job.offset, job.len)?)?),
            false => Ok(()),
        }
    }
}

impl Batch {
    fn push(&mut self, entry: (Entry, usize), (job, first): (usize, usize)) -> Result<()> {
        self.table.push(entry)?;
        // Both fit: a bucket has at most 65536 jobs, and a matrix with more blocks than fit into 32 bits has no launch.
        self.of.push((job as u32, first as u32));
        Ok(())
    }
}

impl<L, B> Sorting<'_, L, B> {
    /// The address that a job writes to, which lies within the bucket. Its part lies within its weight.
    fn target(&self, job: &Job) -> Result<u64> {
        let (address, len) = self.bucket;
        let part_end = job.start.checked_add(job.len);
        let end = job.offset.checked_add(job.len);
        if end.is_some_and(|end| end <= len)
            && part_end.is_some_and(|end| end <= job.weight.byte_len())
        {
            return Ok(address + job.offset);
        }
        let words = format!(
            "{} bytes at {} of a weight of {}, at {} of a bucket of {len}",
            job.len,
            job.start,
            job.weight.byte_len(),
            job.offset
        );
        Err(Error::from(CudaError::Range(words)).tensor(job.weight.name()))
    }

    /// The job of all scales of whole codes, if it is in this bucket and not written yet. Usually it follows its codes at once, but a
    /// sorted bucket may have it anywhere.
    fn scales_here(&mut self, codes: usize, of: usize, done: &[Scales]) -> Option<usize> {
        let jobs = self.jobs;
        let whose = |at: usize| {
            let job = jobs.get(at)?;
            let scales = encoding::<Fp8Scales>(&job.weight)?;
            (job.len == job.weight.byte_len()).then(|| key(scales.codes()))
        };
        let next = codes + 1;
        if whose(next) == Some(of) && done[next] == Scales::Nothing {
            return Some(next);
        }
        let elsewhere = self.elsewhere.get_or_insert_with(|| {
            (0..jobs.len()).filter_map(|at| Some((whose(at)?, at))).collect()
        });
        elsewhere.remove(&of).filter(|&at| done[at] == Scales::Nothing)
    }
}

/// The address of the source of codes on the device, if they can be computed there.
fn source_of(codes: &Fp8Codes, locate: &impl Fn(&Storage) -> Located) -> Option<u64> {
    let Fp8Format { granularity, non_finite, .. } = codes.format();
    let is_known = matches!(granularity, Granularity::Block { .. });
    if !is_known || *non_finite == NonFinite::Reproduce {
        return None;
    }
    let size = codes.source_type().size();
    let storage = codes.source().storage()?;
    match locate(storage) {
        // The kernels read whole elements.
        Located::Here(address)
            if address.is_multiple_of(size as u64)
                && storage.len() == (codes.grid().elements() * size) as u64 =>
        {
            Some(address)
        }
        _ => None,
    }
}

/// The smallest range of whole granules around a range of codes.
fn covering(codes: &Fp8Codes, part: &Range<usize>) -> Range<usize> {
    let granule = codes.granule() as usize;
    let end = part.end.next_multiple_of(granule).min(codes.grid().elements());
    part.start / granule * granule..end
}

/// A weight's encoding, if it is of this type.
fn encoding<T: Encoding>(weight: &Weight) -> Option<&T> {
    let encoding: &dyn std::any::Any = &**weight.encoding()?;
    encoding.downcast_ref()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;
    use engine_core::plan::BucketPlanner;
    use engine_core::{DType, WeightStreamExt};
    use futures::StreamExt;
    use proptest::prelude::*;
    use quant_fp8::rules::{Receiver, Rules, RulesConfig};
    use quant_fp8::{Fp8Quantizer, QuantizeFp8};

    /// Where the bucket is: memory of weights is nowhere near.
    const BUCKET: u64 = 1 << 60;
    /// Where memory beside it begins.
    const BESIDE: u64 = 1 << 61;
    /// Where the copy is that buckets are compared with, and where the marks are.
    const OLD: u64 = 1 << 62;
    const MARKS: u64 = 3 << 61;

    /// Memory outside buckets, and which scales of which codes were put there.
    #[derive(Default)]
    struct Fake {
        taken: u64,
        /// For each weight's codes: where, and which scales.
        places: HashMap<usize, (u64, Vec<bool>)>,
        /// Keeps addresses of encodings from being used again.
        kept: Vec<Arc<dyn Encoding>>,
    }

    impl Beside for Fake {
        fn place(
            &mut self,
            of: &Arc<dyn Encoding>,
            codes: &Fp8Codes,
            now: Range<usize>,
        ) -> Result<u64> {
            self.kept.push(of.clone());
            let count = codes.grid().scales();
            if !self.places.contains_key(&key(of)) {
                let address = self.scratch(count * SCALE)?;
                self.places.insert(key(of), (address, vec![false; count]));
            }
            let (address, known) = self.places.get_mut(&key(of)).unwrap();
            known[now].fill(true);
            Ok(*address)
        }

        fn find(&mut self, codes: usize, scales: &Range<usize>, _: bool) -> Option<u64> {
            let (address, known) = self.places.get(&codes)?;
            known[scales.clone()].iter().all(|known| *known).then_some(*address)
        }

        fn scratch(&mut self, len: usize) -> Result<u64> {
            let address = BESIDE + self.taken;
            self.taken += (len as u64).next_multiple_of(256);
            Ok(address)
        }
    }

    /// Sorts all jobs of a bucket, `most` at a time, and returns the tables of each time.
    fn sort(
        work: &mut Work,
        jobs: &[Job],
        (bucket_bytes, digests, most): (u64, bool, usize),
        locate: impl Fn(&Storage) -> Located,
        beside: &mut Fake,
    ) -> Result<Vec<Tables>> {
        work.begin(jobs.len());
        // Codes of a bucket without a digest are compared with a copy.
        let against = (!digests).then_some(Against { old: OLD, marks: MARKS });
        let place = (BUCKET, bucket_bytes);
        let mut sorting = Sorting::new(jobs, place, digests, !digests, locate, beside);
        let mut all = Vec::new();
        loop {
            let last = work.sort(&mut sorting, most)?;
            let mut tables = Tables::default();
            work.tables(BUCKET, digests, against, last, &mut tables);
            all.push(tables);
            if last {
                return Ok(all);
            }
        }
    }

    /// An entry as the kernels read it, with its number of tiles.
    #[derive(Clone, Copy, Debug)]
    struct Read {
        source: u64,
        target: u64,
        scales: u64,
        /// What it writes to the target.
        len: u64,
        tiles: u64,
        cols: u64,
        encoder: Encoder,
        is_copy: bool,
        is_summed: bool,
        sums_scales: bool,
    }

    fn read(tables: &Tables) -> Vec<(Task, Vec<Read>)> {
        let word = |at: usize| u32::from_le_bytes(tables.bytes[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(tables.bytes[at..at + 8].try_into().unwrap());
        let part = |part: &crate::table::Part| {
            let jobs = part.jobs as usize;
            let first = |job: usize| match job < jobs {
                true => u64::from(word(part.firsts_at + 4 * job)),
                false => u64::from(part.tiles),
            };
            let entry = |job: usize| {
                let at = part.jobs_at + 64 * job;
                let number = |index: usize| u64::from(word(at + 32 + 4 * index));
                let (kind, rows, cols, flags) = (number(0), number(1), number(2), number(7));
                let tiles = first(job + 1) - first(job);
                let matrices = tiles / (number(5) * number(6)).max(1);
                let len = if kind == 0 { long(at + 24) } else { matrices * rows * cols };
                Read {
                    source: long(at),
                    target: long(at + 8),
                    scales: long(at + 16),
                    len,
                    tiles,
                    cols,
                    encoder: part.encoder,
                    is_copy: kind == 0,
                    is_summed: flags & 2 != 0,
                    sums_scales: flags & 8 != 0,
                }
            };
            (part.task, (0..jobs).map(entry).collect())
        };
        tables.parts.iter().map(part).collect()
    }

    /// A weight of a model: its size, and where it is.
    type Made = (usize, usize, usize, u8);

    fn model(made: &[Made], quantizer: &Fp8Quantizer) -> Vec<Weight> {
        let weights = made.iter().enumerate().map(|(index, &(experts, rows, cols, _))| {
            let name = format!("model.layers.{index}.mlp.up_proj.weight");
            let shape = if experts > 1 { vec![experts, rows, cols] } else { vec![rows, cols] };
            let shape: Vec<u64> = shape.iter().map(|&side| side as u64).collect();
            Weight::new(name, DType::BF16, shape, vec![0; experts * rows * cols * 2]).unwrap()
        });
        let weights: Vec<Weight> = weights.collect();
        let quantized = weights.quantize_fp8(quantizer).map(|weight| weight.unwrap());
        let quantized: Vec<Weight> = futures::executor::block_on(quantized.collect());
        // Some weights have no format, and others have a format without a kernel.
        let cast = quantized.into_iter().enumerate().map(|(index, weight)| {
            let plain = weight.storage().is_some() && index % 7 == 3;
            if !plain {
                return weight;
            }
            let mut cast = vec![weight].cast(DType::F32);
            futures::executor::block_on(cast.next()).unwrap().unwrap()
        });
        cast.collect()
    }

    /// The jobs of each bucket. With `cuts`, weights that would have fit into the next bucket are cut in two.
    fn plan(weights: &[Weight], bucket_bytes: u64, cuts: bool) -> Vec<Vec<Job>> {
        let mut planner = BucketPlanner::new(bucket_bytes).unwrap();
        let (mut buckets, mut jobs) = (Vec::new(), Vec::new());
        for weight in weights {
            let (mut start, total) = (0, weight.byte_len());
            loop {
                let size = if cuts { u64::MAX } else { total };
                let place = planner.place(1, size, total - start, weight.granule());
                let Some(place) = place else {
                    planner.close();
                    buckets.push(std::mem::take(&mut jobs));
                    continue;
                };
                let weight = weight.clone();
                jobs.push(Job { weight, start, len: place.len, offset: place.offset });
                start += place.len;
                if start == total {
                    break;
                }
            }
        }
        buckets.push(jobs);
        buckets
    }

    /// Blocks are small, so that scales are long enough to be cut.
    fn quantizer() -> Fp8Quantizer {
        let granularity = Granularity::Block { rows: 32, cols: 32 };
        let format = Fp8Format { granularity, ..Fp8Format::default() };
        let mut config = RulesConfig::default();
        config.format = format;
        config.receiver = Receiver::Any;
        Rules::new(&config).unwrap().into()
    }

    /// Where the test says that a storage's memory is.
    fn located(places: &HashMap<u64, Located>, storage: &Storage) -> Located {
        let address = storage.host().map(|bytes| bytes.as_ptr().addr() as u64);
        address.and_then(|at| places.get(&at).copied()).unwrap_or(Located::Elsewhere)
    }

    /// Where the test says that the memory of each weight is, by its address on the host.
    fn places(weights: &[Weight], made: &[Made]) -> HashMap<u64, Located> {
        let mut places = HashMap::new();
        for weight in weights {
            let source = encoding::<Fp8Codes>(weight).map_or(weight, |codes| codes.source());
            let Some(bytes) = source.contiguous_bytes() else { continue };
            let index: usize = source.name().split('.').nth(2).unwrap().parse().unwrap();
            let address = bytes.as_ptr().addr() as u64;
            let located = match made[index].3 {
                0 => Located::Elsewhere,
                1 => Located::Peer,
                // Not all are aligned.
                shift => Located::Here(address + 2 * (u64::from(shift) - 2)),
            };
            places.insert(address, located);
        }
        places
    }

    fn made() -> impl Strategy<Value = Vec<Made>> {
        let side = || prop_oneof![Just(128_usize), Just(256), 1_usize..300];
        proptest::collection::vec((1_usize..4, side(), side(), 0_u8..8), 1..12)
    }

    /// The ranges of a bucket that are written and digested: each once.
    fn sorted_ranges(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
        ranges.retain(|(_, len)| *len > 0);
        ranges.sort_unstable();
        ranges
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn each_part_is_written_once_and_digested_once_by_launches_or_the_cpu(
            made in made(), bucket_bytes in 2_u64..600, cuts: bool, digests: bool, most in 1_usize..8,
        ) {
            let bucket_bytes = bucket_bytes * 256;
            let weights = model(&made, &quantizer());
            let places = places(&weights, &made);
            let locate = |storage: &Storage| located(&places, storage);
            let (mut beside, mut reused) = (Fake::default(), Work::default());
            for jobs in plan(&weights, bucket_bytes, cuts) {
                let before = (beside.taken, beside.places.clone());
                let how = (bucket_bytes, digests, most);
                let tables = sort(&mut reused, &jobs, how, locate, &mut beside).unwrap();

                // Memory that was used for other buckets makes the same table as new memory.
                let mut again = Fake { taken: before.0, places: before.1, kept: Vec::new() };
                let mut fresh = Work::default();
                let other = sort(&mut fresh, &jobs, how, locate, &mut again).unwrap();
                let bytes = |all: &[Tables]| -> Vec<_> { all.iter().map(|one| one.bytes.clone()).collect() };
                prop_assert_eq!(bytes(&tables), bytes(&other));

                // Digests come last: others bring bytes before.
                for earlier in &tables[..tables.len() - 1] {
                    prop_assert!(read(earlier).iter().all(|(task, _)| *task != Task::Digest));
                }
                let parts = tables.iter().flat_map(read);
                let (digested, launches): (Vec<_>, Vec<_>) =
                    parts.partition(|(task, _)| *task == Task::Digest);
                let is_here = |at: u64| (BUCKET..BUCKET + bucket_bytes).contains(&at);
                let (mut written, mut summed) = (Vec::new(), Vec::new());
                // Each launch has the fastest kernel that does its jobs.
                for (_, entries) in &launches {
                    let is_aligned = |entry: &Read| (entry.source | entry.target).is_multiple_of(16);
                    let is_even = |entry: &Read| {
                        entry.is_copy || (is_aligned(entry) && entry.cols.is_multiple_of(8))
                    };
                    let encoder = match () {
                        () if entries.iter().all(|entry| entry.is_copy && is_aligned(entry)) => Encoder::Copy,
                        () if entries.iter().all(is_even) => Encoder::Even,
                        () => Encoder::Odd,
                    };
                    prop_assert!(entries.iter().all(|entry| entry.encoder == encoder));
                }
                for entry in launches.iter().flat_map(|(_, entries)| entries) {
                    if is_here(entry.target) {
                        written.push((entry.target - BUCKET, entry.len));
                        if entry.is_summed {
                            summed.push((entry.target - BUCKET, entry.len));
                        }
                    }
                    if !entry.is_copy && is_here(entry.scales) {
                        written.push((entry.scales - BUCKET, entry.tiles * 4));
                        if entry.sums_scales {
                            summed.push((entry.scales - BUCKET, entry.tiles * 4));
                        }
                    }
                }
                let range = |index: &usize| (jobs[*index].offset, jobs[*index].len);
                written.extend(reused.host.iter().chain(&reused.peers).map(range));
                for entry in digested.iter().flat_map(|(_, entries)| entries) {
                    prop_assert_eq!(entry.source, BUCKET + entry.target);
                    summed.push((entry.target, entry.len));
                }
                let all: Vec<_> = jobs.iter().map(|job| (job.offset, job.len)).collect();
                let all = sorted_ranges(all);
                prop_assert_eq!(sorted_ranges(written), all.clone());
                let expected = if digests { all } else { Vec::new() };
                prop_assert_eq!(sorted_ranges(summed), expected);
            }
        }

        #[test]
        fn each_part_is_made_of_its_own_bytes(
            made in made(), bucket_bytes in 2_u64..600, cuts: bool, most in 1_usize..8,
        ) {
            let bucket_bytes = bucket_bytes * 256;
            let weights = model(&made, &quantizer());
            let places = places(&weights, &made);
            let locate = |storage: &Storage| located(&places, storage);
            let (mut beside, mut work) = (Fake::default(), Work::default());
            // Where each scale of each codes was last computed to.
            let mut scale_at: HashMap<usize, HashMap<usize, u64>> = HashMap::new();
            for jobs in plan(&weights, bucket_bytes, cuts) {
                let how = (bucket_bytes, true, most);
                let tables = sort(&mut work, &jobs, how, locate, &mut beside).unwrap();
                let entries: Vec<Read> = tables
                    .iter()
                    .flat_map(read)
                    .filter(|(task, _)| *task != Task::Digest)
                    .flat_map(|(_, entries)| entries)
                    .collect();
                let writer = |target: u64| entries.iter().find(|entry| entry.target == target);
                for (index, job) in jobs.iter().enumerate() {
                    let by_others = work.host.contains(&index) || work.peers.contains(&index);
                    if by_others || job.len == 0 {
                        continue;
                    }
                    let target = BUCKET + job.offset;
                    if let Some(codes) = encoding::<Fp8Codes>(&job.weight) {
                        let Located::Here(source) = locate(codes.source().storage().unwrap()) else {
                            panic!("codes of a source that is not here");
                        };
                        let (mut entry, mut start) = (*writer(target).unwrap(), job.start);
                        if entry.is_copy {
                            // Made beside the bucket, from whole granules.
                            let made = |other: &&Read| {
                                !other.is_copy
                                    && (other.target..other.target + other.len).contains(&entry.source)
                            };
                            let made = entries.iter().find(made).unwrap();
                            start -= entry.source - made.target;
                            entry = *made;
                        }
                        prop_assert_eq!(entry.source, source + 2 * start);
                        let first = codes.grid().scales_of(&(start as usize..start as usize + 1));
                        for block in 0..entry.tiles {
                            let all = scale_at.entry(key(job.weight.encoding().unwrap())).or_default();
                            all.insert(first.start + block as usize, entry.scales + 4 * block);
                        }
                    } else if let Some(scales) = encoding::<Fp8Scales>(&job.weight) {
                        let known = &scale_at[&key(scales.codes())];
                        for at in (job.start..job.start + job.len).step_by(4) {
                            let here = target + at - job.start;
                            let from = match writer(target) {
                                None => here,
                                Some(copy) => copy.source + at - job.start,
                            };
                            prop_assert_eq!(known[&(at as usize / 4)], from);
                        }
                    } else {
                        let Located::Here(source) = locate(job.weight.storage().unwrap()) else {
                            panic!("a copy of what is not here");
                        };
                        prop_assert_eq!(writer(target).unwrap().source, source + job.start);
                    }
                }
            }
        }
    }

    #[test]
    fn scales_that_do_not_follow_their_codes_are_written_to_their_place_all_the_same() {
        let weights = model(&[(1, 128, 256, 2), (1, 256, 128, 2), (1, 128, 128, 2)], &quantizer());
        let here = |storage: &Storage| {
            Located::Here(storage.host().unwrap().as_ptr().addr() as u64 / 16 * 16)
        };
        let codes = || weights.iter().step_by(2).cloned();
        let scales = || weights.iter().skip(1).step_by(2).cloned();
        // All codes and then all scales, and the other way round, as buckets have them that are sorted by the size of elements.
        for order in
            [codes().chain(scales()).collect(), scales().chain(codes()).collect::<Vec<_>>()]
        {
            let jobs = plan(&order, 1 << 20, false).remove(0);
            let (mut work, mut beside) = (Work::default(), Fake::default());
            sort(&mut work, &jobs, (1 << 20, true, 2), here, &mut beside).unwrap();
            assert_eq!((work.host.len(), beside.taken), (0, 0));
        }
    }

    #[test]
    fn jobs_are_sorted_so_many_at_a_time_and_the_end_is_said_with_the_last() {
        let weight = Weight::new("w", DType::U8, [256_u64], vec![0; 256]).unwrap();
        let job =
            |index: u64| Job { weight: weight.clone(), start: 0, len: 256, offset: 256 * index };
        let jobs: Vec<Job> = (0..5).map(job).collect();
        let here = |_: &Storage| Located::Here(4096);
        let how = (5 * 256, false, 2);
        let tables = sort(&mut Work::default(), &jobs, how, here, &mut Fake::default()).unwrap();
        let counts = |tables: &Tables| read(tables).iter().map(|(_, entries)| entries.len()).sum();
        assert_eq!(tables.iter().map(counts).collect::<Vec<usize>>(), [2, 2, 1]);
    }

    #[test]
    fn a_job_beyond_its_weight_or_its_bucket_is_an_error_that_names_it() {
        let weight = Weight::new("w", DType::U8, [300_u64], vec![0; 300]).unwrap();
        let sort = |start, len, offset| {
            let job = Job { weight: weight.clone(), start, len, offset };
            let here = |_: &Storage| Located::Here(4096);
            let how = (1024, true, 1);
            sort(&mut Work::default(), &[job], how, here, &mut Fake::default()).map(drop)
        };
        sort(0, 300, 256).unwrap();
        for (start, len, offset) in
            [(1, 300, 0), (0, 301, 0), (0, 300, 768), (u64::MAX, 2, 0), (0, 2, u64::MAX)]
        {
            let error = sort(start, len, offset).unwrap_err();
            assert_eq!(error.report().tensor.as_deref(), Some("w"), "{start} {len} {offset}");
        }
    }
}

//! The job tables of launches: what the kernels read. Pure: addresses in, bytes out.

use std::any::Any;
use std::sync::Arc;

use engine_core::Program;
use quant_fp8::{Fp8Format, Granularity, Mode, Precast, SourceType, device};

use crate::{CudaError, CudaMemory, CudaSlice};

/// Bytes of a copy that one tile moves: `COPY_TILE` of the kernels.
const COPY_TILE: usize = 16 << 10;

/// A job of a launch that fills a bucket, or reads one.
#[derive(Clone, Debug)]
pub enum DeviceJob {
    /// Bytes as they are, at any alignment.
    Copy {
        /// Where they are.
        source: CudaSlice,
        /// Where they go.
        target: CudaSlice,
    },
    /// A matrix, or a stack of them, as FP8 blocks.
    Fp8 {
        /// The elements, row-major.
        source: CudaSlice,
        /// Their type.
        ty: SourceType,
        /// `[rows, cols]` or `[experts, rows, cols]`.
        shape: Vec<usize>,
        /// Where the codes go: a byte for each element.
        codes: CudaSlice,
        /// Where the scales go: an F32 for each block.
        scales: CudaSlice,
    },
}

impl DeviceJob {
    /// All memory that it uses, by role: 0 is read, 1 is written, 2 is the scales that are written.
    pub(crate) fn slices(&self) -> impl Iterator<Item = (usize, &CudaSlice)> {
        let (source, target, beside) = match self {
            Self::Copy { source, target } => (source, target, None),
            Self::Fp8 { source, codes, scales, .. } => (source, codes, Some(scales)),
        };
        [(0, source), (1, target)].into_iter().chain(beside.map(|scales| (2, scales)))
    }

    /// Its entry, and its number of tiles.
    fn entry(&self, format: &Fp8Format) -> Result<(Entry, usize), CudaError> {
        match self {
            Self::Copy { source, target } => {
                if source.len() != target.len() {
                    let words = format!("a copy of {} bytes to {}", source.len(), target.len());
                    return Err(CudaError::Range(words));
                }
                let bytes = source.len() as u64;
                Ok(Entry::copy(source.address(), target.address(), bytes))
            }
            Self::Fp8 { source, ty, shape, codes, scales } => {
                let grid = format.granularity.grid(shape);
                let grid = grid.map_err(|error| CudaError::Range(error.to_string()))?;
                let lens = (source.len(), codes.len(), scales.len());
                let expected = (grid.elements() * ty.size(), grid.elements(), grid.scales() * 4);
                if lens != expected {
                    return Err(CudaError::Range(format!(
                        "{lens:?} bytes of source, codes and scales for shape {shape:?}, {expected:?} \
                         were expected"
                    )));
                }
                let (source, codes, scales) = (source.address(), codes.address(), scales.address());
                Entry::fp8(Fp8Places { source, codes, scales }, *ty, shape, format)
            }
        }
    }
}

/// Flags of [`Entry`], as in the kernels.
const PRECAST: u32 = 1;
const SUMMED: u32 = 2;
const FROM: u32 = 4;
const SCALES: u32 = 8;

/// Where the elements of a matrix are, and where its first code and its first scale go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fp8Places {
    pub(crate) source: u64,
    pub(crate) codes: u64,
    pub(crate) scales: u64,
}

/// The layout is that of `Job` in the kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    source: u64,
    target: u64,
    scales: u64,
    bytes: u64,
    kind: u32,
    rows: u32,
    cols: u32,
    block_rows: u32,
    block_cols: u32,
    bands: u32,
    blocks: u32,
    flags: u32,
}

/// Bytes of an entry.
const ENTRY: usize = 64;

/// The kernel that does the jobs of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Encoder {
    /// Any jobs but those of F32: made for copies, and for blocks whose rows begin at multiples of 16 bytes.
    #[default]
    Even,
    /// Any jobs, with fewer threads in flight.
    Wide,
    /// Blocks whose rows begin anywhere, and nothing else.
    Odd,
    /// Copies from and to multiples of 16 bytes, and nothing else.
    Copy,
    /// Blocks that are compared as they are made, and nothing else.
    Compared,
}

/// A job of an encoding's own program: `ProgramJob` of the kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProgramEntry {
    pub(crate) source: u64,
    pub(crate) target: u64,
    /// Where the job begins in the output.
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

impl Entry {
    /// A copy, and its number of tiles.
    pub(crate) fn copy(source: u64, target: u64, bytes: u64) -> (Self, usize) {
        let entry = Self { source, target, bytes, ..Self::default() };
        (entry, (bytes as usize).div_ceil(COPY_TILE))
    }

    /// A part of a bucket to be digested, with its address and its offset in the bucket.
    pub(crate) fn part(address: u64, offset: u64, bytes: u64) -> Result<(Self, usize), CudaError> {
        if !offset.is_multiple_of(64) || !address.is_multiple_of(16) {
            return Err(CudaError::Range("a part that begins within a row".into()));
        }
        Ok(Self::copy(address, offset, bytes))
    }

    /// A matrix or a stack of matrices, and its number of tiles. The caller has checked that the bytes are at these places.
    pub(crate) fn fp8(
        at: Fp8Places,
        ty: SourceType,
        shape: &[usize],
        format: &Fp8Format,
    ) -> Result<(Self, usize), CudaError> {
        let Granularity::Block { rows: block_rows, cols: block_cols } = format.granularity else {
            return Err(CudaError::Range(format!(
                "scales {} are not computed on the device: use blocks",
                format.granularity
            )));
        };
        let grid = format.granularity.grid(shape);
        let grid = grid.map_err(|error| CudaError::Range(error.to_string()))?;
        let Fp8Places { source, codes, scales } = at;
        if !source.is_multiple_of(ty.size() as u64) || !scales.is_multiple_of(4) {
            return Err(CudaError::Range("elements or scales that are not aligned".into()));
        }
        let side = |side: usize| {
            u32::try_from(side)
                .map_err(|_| CudaError::Range(format!("shape {shape:?} is too large")))
        };
        // `grid` has refused whatever is neither a matrix nor a stack of them.
        let (matrices, rows, cols) = match *shape {
            [matrices, rows, cols] => (matrices, rows, cols),
            [rows, cols] => (1, rows, cols),
            _ => (1, 1, 1),
        };
        let (bands, blocks) = (grid.bands_per_matrix(), grid.scales_per_band());
        let entry = Self {
            source,
            target: codes,
            scales,
            bytes: (grid.elements() * ty.size()) as u64,
            kind: device::type_number(ty),
            rows: side(rows)?,
            cols: side(cols)?,
            block_rows: side(block_rows)?,
            block_cols: side(block_cols)?,
            bands: side(bands)?,
            blocks: side(blocks)?,
            flags: if format.precast == Precast::Bf16 { PRECAST } else { 0 },
        };
        Ok((entry, matrices * bands * blocks))
    }

    /// Where the copy or the first code goes.
    pub(crate) fn target(&self) -> u64 {
        self.target
    }

    /// Makes the launch add what it writes to the digest.
    pub(crate) fn summed(self) -> Self {
        Self { flags: self.flags | SUMMED, ..self }
    }

    /// Makes a launch that follows add the scales to the digest, once all of them are there.
    pub(crate) fn summed_with_scales(self) -> Self {
        Self { flags: self.flags | SCALES, ..self }
    }

    /// Makes the launch add what it copies out of the bucket to the digest.
    pub(crate) fn summed_from(self) -> Self {
        Self { flags: self.flags | SUMMED | FROM, ..self }
    }

    /// Whether the launch that writes the target can add it to the digest at the same time. Scales need
    /// [`summed_with_scales`](Self::summed_with_scales): two scales that different blocks write share a word.
    pub(crate) fn is_summable(&self) -> bool {
        let is_copy = self.kind == 0;
        let is_even = is_copy || (self.cols.is_multiple_of(8) && self.is_small());
        is_even && (self.source | self.target).is_multiple_of(16)
    }

    /// Whether codes can be compared as they are made, in the bucket that begins at `base`: in whole rows of marks.
    pub(crate) fn is_comparable(&self, base: u64) -> bool {
        let is_aligned = u64::from(self.cols) | self.target.wrapping_sub(base);
        self.encoder() == Encoder::Even
            && self.kind != 0
            && self.is_summable()
            && self.block_cols == 128
            && is_aligned.is_multiple_of(128)
    }

    fn is_small(&self) -> bool {
        self.block_rows <= 128 && self.block_cols <= 128
    }

    /// The fastest kernel that does it.
    pub(crate) fn encoder(&self) -> Encoder {
        let is_f32 = self.kind == device::type_number(SourceType::F32);
        let is_rounded = !is_f32 || self.flags & PRECAST != 0;
        let is_odd = self.kind != 0 && !self.is_summable();
        match is_f32 {
            _ if is_odd && is_rounded && self.is_small() => Encoder::Odd,
            true => Encoder::Wide,
            false => Encoder::Even,
        }
    }

    fn bytes(&self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        let longs = [self.source, self.target, self.scales, self.bytes];
        let words = [
            self.kind,
            self.rows,
            self.cols,
            self.block_rows,
            self.block_cols,
            self.bands,
            self.blocks,
            self.flags,
        ];
        let (first, second) = bytes.split_at_mut(ENTRY / 2);
        for (to, long) in first.as_chunks_mut().0.iter_mut().zip(longs) {
            *to = long.to_le_bytes();
        }
        for (to, word) in second.as_chunks_mut().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        bytes
    }
}

/// The jobs of a launch, and the first tile of each.
#[derive(Debug, Default)]
pub(crate) struct Table {
    entries: Vec<u8>,
    firsts: Vec<u32>,
    tiles: u32,
    /// The kernel that does all jobs.
    encoder: Encoder,
    /// Whether a job has F32 elements.
    wide: bool,
    /// Whether a job is no copy between multiples of 16 bytes.
    has_others: bool,
    /// Whether a job's scales are added to the digest.
    sums_scales: bool,
    /// The parameters of a program's jobs.
    parameters: Vec<u64>,
}

impl Table {
    /// Adds a job.
    pub(crate) fn push(&mut self, (entry, tiles): (Entry, usize)) -> Result<(), CudaError> {
        self.wide |= entry.kind == device::type_number(SourceType::F32);
        self.sums_scales |= entry.flags & SCALES != 0;
        self.has_others |= !(entry.kind == 0 && entry.is_summable());
        let encoder = entry.encoder();
        if self.is_empty() || encoder == self.encoder {
            self.encoder = encoder;
        } else {
            self.encoder = if self.wide { Encoder::Wide } else { Encoder::Even };
        }
        self.count(tiles)?;
        self.entries.extend_from_slice(&entry.bytes());
        Ok(())
    }

    /// Adds a job of a program.
    pub(crate) fn push_program(
        &mut self,
        entry: ProgramEntry,
        parameters: &[u64],
    ) -> Result<(), CudaError> {
        let ProgramEntry { source, target, start, bytes } = entry;
        if !target.is_multiple_of(16) || !start.is_multiple_of(16) {
            return Err(CudaError::Range("a part of a weight that begins within 16 bytes".into()));
        }
        self.count((bytes as usize).div_ceil(COPY_TILE))?;
        let first = self.parameters.len() as u64;
        for word in [source, target, start, bytes, first, 0, 0, 0] {
            self.entries.extend_from_slice(&word.to_le_bytes());
        }
        self.parameters.extend_from_slice(parameters);
        Ok(())
    }

    /// Adds the tiles of the next job.
    fn count(&mut self, tiles: usize) -> Result<(), CudaError> {
        let all = u32::try_from(tiles).ok().and_then(|tiles| self.tiles.checked_add(tiles));
        let all =
            all.ok_or_else(|| CudaError::Range("more tiles than a launch can have".into()))?;
        self.firsts.push(self.tiles);
        self.tiles = all;
        Ok(())
    }

    /// Whether it has no jobs.
    pub(crate) fn is_empty(&self) -> bool {
        self.firsts.is_empty()
    }

    /// Removes all jobs, and keeps the memory for others.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.firsts.clear();
        self.parameters.clear();
        (self.tiles, self.wide) = (0, false);
        (self.has_others, self.sums_scales) = (false, false);
    }

    /// The table of a launch of `encode`. With `summed` the launch adds all jobs that are [summable](Entry::is_summable) to the digest.
    pub(crate) fn of_jobs(
        jobs: &[DeviceJob],
        format: &Fp8Format,
        summed: bool,
    ) -> Result<Self, CudaError> {
        let mut table = Self::default();
        for job in jobs {
            let (entry, tiles) = job.entry(format)?;
            let entry = if summed && entry.is_summable() { entry.summed() } else { entry };
            table.push((entry, tiles))?;
        }
        Ok(table)
    }

    /// The table of a launch of `digest`: parts of a bucket, with their offsets in it.
    pub(crate) fn of_parts(parts: &[(u64, CudaSlice)]) -> Result<Self, CudaError> {
        let mut table = Self::default();
        for (offset, part) in parts {
            table.push(Entry::part(part.address(), *offset, part.len() as u64)?)?;
        }
        Ok(table)
    }
}

/// What a bucket's codes are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Against {
    /// Where a copy of an earlier version is, which has the bucket's layout.
    pub(crate) old: u64,
    /// Where the marks are, a bit for each 8 bytes of the bucket: 0 where they are as in the copy, and not written.
    pub(crate) marks: u64,
}

/// What a launch does with its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Encodes, in a mode that is given by its number. The bucket begins at `base`, for the digest.
    Encode { mode: u64, base: u64 },
    /// Encodes [comparable](Entry::is_comparable) jobs of the bucket at `base`, and writes only what differs.
    Compare { mode: u64, base: u64, against: Against },
    /// Digests.
    Digest,
    /// Encodes by a program.
    Program { program: &'static Program, base: u64 },
}

/// A launch whose table is one of several.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) task: Task,
    /// The offsets of its jobs, and of the numbers of their first tiles.
    pub(crate) jobs_at: usize,
    pub(crate) firsts_at: usize,
    /// The offset of the parameters.
    pub(crate) parameters_at: usize,
    pub(crate) jobs: u32,
    pub(crate) tiles: u32,
    pub(crate) encoder: Encoder,
    /// Whether scales are added to the digest.
    pub(crate) sums_scales: bool,
}

/// The tables of launches that run together, as they are copied to the device, and the memory of their jobs.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub(crate) bytes: Vec<u8>,
    pub(crate) parts: Vec<Part>,
    /// The owners of the memory behind all addresses of the tables.
    pub(crate) used: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Tables {
    /// Adds a launch.
    pub(crate) fn add(&mut self, table: &Table, task: Task) {
        let jobs_at = self.bytes.len().next_multiple_of(ENTRY);
        self.bytes.resize(jobs_at, 0);
        self.bytes.extend_from_slice(&table.entries);
        let firsts_at = self.bytes.len();
        self.bytes.extend(table.firsts.iter().flat_map(|first| first.to_le_bytes()));
        // A job has at least one tile, except jobs without bytes, which are few; fewer than 2^32 tiles were counted.
        let jobs = table.firsts.len() as u32;
        let parameters_at = self.bytes.len().next_multiple_of(8);
        if !table.parameters.is_empty() {
            self.bytes.resize(parameters_at, 0);
            self.bytes.extend(table.parameters.iter().flat_map(|word| word.to_le_bytes()));
        }
        let Table { tiles, sums_scales, .. } = *table;
        let encoder = if table.has_others { table.encoder } else { Encoder::Copy };
        let part =
            Part { task, jobs_at, firsts_at, parameters_at, jobs, tiles, encoder, sums_scales };
        self.parts.push(part);
    }

    /// Keeps an allocation behind addresses.
    pub(crate) fn keep(&mut self, memory: &CudaMemory) {
        self.used.push(memory.raw().clone());
    }

    /// Removes all tables, and keeps the memory for others.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.parts.clear();
        self.used.clear();
    }
}

/// The number of a mode in the kernels.
pub(crate) fn mode_number(mode: Mode) -> u64 {
    device::mode_number(mode).into()
}

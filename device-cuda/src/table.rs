//! The job table of a launch: what the kernels read.

use quant_fp8::{BlockGrid, Fp8Format, Granularity, Mode, Precast, SourceType};

use crate::{CudaError, CudaSlice};

/// Bytes of a copy that one tile moves; as `COPY_TILE` in the kernels.
const COPY_TILE: usize = 16 << 10;

/// Something to be done by the launch that fills a bucket, or that reads one.
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
    /// Where the copy or the codes go.
    pub(crate) fn target(&self) -> &CudaSlice {
        match self {
            Self::Copy { target, .. } => target,
            Self::Fp8 { codes, .. } => codes,
        }
    }

    /// All memory that it uses, by what for: read, written, written beside it.
    pub(crate) fn slices(&self) -> impl Iterator<Item = (usize, &CudaSlice)> {
        let (source, target, beside) = match self {
            Self::Copy { source, target } => (source, target, None),
            Self::Fp8 { source, codes, scales, .. } => (source, codes, Some(scales)),
        };
        [(0, source), (1, target)].into_iter().chain(beside.map(|scales| (2, scales)))
    }

    /// Whether the launch that writes the target can add it to the digest. Scales never are: two of
    /// them, which different blocks write, share a word.
    pub(crate) fn is_summable(&self, format: &Fp8Format) -> bool {
        let aligned = |a: &CudaSlice, b: &CudaSlice| (a.address() | b.address()).is_multiple_of(16);
        match self {
            Self::Copy { source, target } => aligned(source, target),
            Self::Fp8 { source, codes, shape, .. } => {
                let cols = shape.last().copied().unwrap_or(1);
                let small =
                    matches!(format.granularity, Granularity::Block { rows: ..=128, cols: ..=128 });
                aligned(source, codes) && cols.is_multiple_of(8) && small
            }
        }
    }
}

/// Flags of [`Entry`], as in the kernels.
const PRECAST: u32 = 1;
const SUMMED: u32 = 2;

/// As `Job` in the kernels.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
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

impl Entry {
    fn write(&self, out: &mut Vec<u8>) {
        for word in [self.source, self.target, self.scales, self.bytes] {
            out.extend(word.to_le_bytes());
        }
        for word in [
            self.kind,
            self.rows,
            self.cols,
            self.block_rows,
            self.block_cols,
            self.bands,
            self.blocks,
            self.flags,
        ] {
            out.extend(word.to_le_bytes());
        }
    }
}

/// A job table: jobs, then the first tile of each.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) jobs: u32,
    /// Where the numbers of tiles begin, from the beginning of the table.
    pub(crate) firsts_at: usize,
    pub(crate) tiles: u32,
    /// Whether a job has F32 elements.
    pub(crate) wide: bool,
}

impl Table {
    /// Appends a table to `bytes`.
    fn build(bytes: &mut Vec<u8>, entries: &[(Entry, usize)]) -> Result<Self, CudaError> {
        let too_many = || CudaError::Range("more tiles than a launch can have".into());
        let start = bytes.len();
        for (entry, _) in entries {
            entry.write(bytes);
        }
        let firsts_at = bytes.len() - start;
        let mut tiles = 0_u32;
        for (_, count) in entries {
            bytes.extend(tiles.to_le_bytes());
            let count = u32::try_from(*count).map_err(|_| too_many())?;
            tiles = tiles.checked_add(count).ok_or_else(too_many)?;
        }
        let jobs = u32::try_from(entries.len()).map_err(|_| too_many())?;
        let wide = entries.iter().any(|(entry, _)| entry.kind == 3);
        Ok(Self { jobs, firsts_at, tiles, wide })
    }

    /// The table of a launch of `encode`; with `summed` it adds to the digest what it can: all jobs that
    /// are [summable](DeviceJob::is_summable).
    pub(crate) fn of_jobs(
        bytes: &mut Vec<u8>,
        jobs: &[DeviceJob],
        format: &Fp8Format,
        summed: bool,
    ) -> Result<Self, CudaError> {
        let entry = |job: &DeviceJob| {
            let (mut entry, tiles) = entry(job, format)?;
            if summed && job.is_summable(format) {
                entry.flags |= SUMMED;
            }
            Ok((entry, tiles))
        };
        let entries: Vec<_> = jobs.iter().map(entry).collect::<Result<_, _>>()?;
        Self::build(bytes, &entries)
    }

    /// The table of a launch of `digest`: parts of a bucket and where they begin in it.
    pub(crate) fn of_parts(
        bytes: &mut Vec<u8>,
        parts: &[(u64, CudaSlice)],
    ) -> Result<Self, CudaError> {
        let entries: Vec<_> = parts
            .iter()
            .map(|(offset, part)| {
                if !offset.is_multiple_of(64) || !part.address().is_multiple_of(16) {
                    return Err(CudaError::Range("a part that begins within a row".into()));
                }
                let bytes = part.len() as u64;
                let entry =
                    Entry { source: part.address(), target: *offset, bytes, ..Entry::default() };
                Ok((entry, part.len().div_ceil(COPY_TILE)))
            })
            .collect::<Result<_, _>>()?;
        Self::build(bytes, &entries)
    }
}

fn entry(job: &DeviceJob, format: &Fp8Format) -> Result<(Entry, usize), CudaError> {
    match job {
        DeviceJob::Copy { source, target } => {
            if source.len() != target.len() {
                let words = format!("a copy of {} bytes to {}", source.len(), target.len());
                return Err(CudaError::Range(words));
            }
            let entry = Entry {
                source: source.address(),
                target: target.address(),
                bytes: source.len() as u64,
                ..Entry::default()
            };
            Ok((entry, source.len().div_ceil(COPY_TILE)))
        }
        DeviceJob::Fp8 { source, ty, shape, codes, scales } => {
            let Granularity::Block { rows: block_rows, cols: block_cols } = format.granularity
            else {
                return Err(CudaError::Range(format!(
                    "scales {} are not computed on the device: use blocks",
                    format.granularity
                )));
            };
            let grid: BlockGrid = format
                .granularity
                .grid(shape)
                .map_err(|error| CudaError::Range(error.to_string()))?;
            let lens = (source.len(), codes.len(), scales.len());
            let expected = (grid.elements() * ty.size(), grid.elements(), grid.scales() * 4);
            if lens != expected {
                return Err(CudaError::Range(format!(
                    "{lens:?} bytes of source, codes and scales for shape {shape:?}, {expected:?} \
                     were expected"
                )));
            }
            let element = ty.size() as u64;
            if !source.address().is_multiple_of(element) || !scales.address().is_multiple_of(4) {
                return Err(CudaError::Range("elements or scales that are not aligned".into()));
            }
            let side = |side: usize| {
                u32::try_from(side)
                    .map_err(|_| CudaError::Range(format!("shape {shape:?} is too large")))
            };
            let cols = shape.last().copied().unwrap_or(1);
            let rows = shape[shape.len() - 2];
            let entry = Entry {
                source: source.address(),
                target: codes.address(),
                scales: scales.address(),
                bytes: 0,
                kind: match ty {
                    SourceType::Bf16 => 1,
                    SourceType::F16 => 2,
                    SourceType::F32 => 3,
                },
                rows: side(rows)?,
                cols: side(cols)?,
                block_rows: side(block_rows)?,
                block_cols: side(block_cols)?,
                bands: side(grid.bands_per_matrix())?,
                blocks: side(grid.scales_per_band())?,
                flags: if format.precast == Precast::Bf16 { PRECAST } else { 0 },
            };
            Ok((entry, grid.scales()))
        }
    }
}

/// The number that the kernels know a mode by.
pub(crate) fn mode_number(mode: Mode) -> u64 {
    match mode {
        Mode::Triton => 0,
        Mode::Pytorch => 1,
        Mode::Ue8m0 => 2,
        Mode::TritonGpu => 3,
    }
}

//! The job tables of placed updates: addresses in, bytes out.

use quant_fp8::{Fp8Format, Granularity, Precast, SourceType, StridedBlocks, StridedPart, Strides};

use super::launches::Room;
use crate::CudaError;
use crate::table::mode_number;

/// Bytes of a copy that one tile moves, approximately.
const TILE: u64 = 16 << 10;
/// The most rows of a tile that are long.
const LONG_ROWS: u32 = 2;
/// The length at which a digest cuts rows that do not begin at its words and that are not cut at blocks.
pub(crate) const CUT: u64 = 256 << 10;
/// The most bytes of a row of an entry.
const MOST: u64 = 1 << 30;

const PRECAST: u32 = 1;
const SUMMED: u32 = 2;
const FAST: u32 = 16;
const KEYED: u32 = 32;
const NO_FIRST_BAND: u32 = 64;
const NO_FIRST_COL: u32 = 128;
/// A kind of entry: numbers of 4 bytes, each digested by itself.
const SCALES_ONLY: u32 = 4;

/// The layout is that of `Part` in the kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    source: u64,
    target: u64,
    place: u64,
    scales: u64,
    scales_place: u64,
    known: u64,
    source_matrix: u64,
    source_row: u64,
    target_matrix: u64,
    target_row: u64,
    scales_matrix: u64,
    scales_row: u64,
    known_matrix: u32,
    known_row: u32,
    kind: u32,
    mode: u32,
    rows: u32,
    cols: u32,
    block_rows: u32,
    block_cols: u32,
    first_row: u32,
    first_col: u32,
    bands: u32,
    blocks: u32,
    flags: u32,
    slot: u32,
}

/// Bytes of an entry.
pub(super) const ENTRY: usize = 12 * 8 + 14 * 4;

/// The job of an entry, which is its slot.
pub(super) fn job_of(entry: &[u8; ENTRY]) -> u32 {
    let mut slot = [0; 4];
    slot.copy_from_slice(&entry[ENTRY - 4..]);
    u32::from_le_bytes(slot)
}

/// Moves the source of an entry.
pub(super) fn move_source(entry: &mut [u8; ENTRY], by: u64) {
    let (source, _) = entry.as_chunks_mut::<8>();
    if let Some(source) = source.first_mut() {
        *source = u64::from_le_bytes(*source).wrapping_add(by).to_le_bytes();
    }
}

impl Entry {
    fn put(&self, bytes: &mut Vec<u8>) {
        let longs = [
            self.source,
            self.target,
            self.place,
            self.scales,
            self.scales_place,
            self.known,
            self.source_matrix,
            self.source_row,
            self.target_matrix,
            self.target_row,
            self.scales_matrix,
            self.scales_row,
        ];
        let words = [
            self.known_matrix,
            self.known_row,
            self.kind,
            self.mode,
            self.rows,
            self.cols,
            self.block_rows,
            self.block_cols,
            self.first_row,
            self.first_col,
            self.bands,
            self.blocks,
            self.flags,
            self.slot,
        ];
        longs.iter().for_each(|long| bytes.extend_from_slice(&long.to_le_bytes()));
        words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    }
}

/// The jobs of a launch, and the first tile of each.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Vec<u8>,
    firsts: Vec<u32>,
    pub(super) tiles: u32,
}

impl Table {
    pub(super) fn entries(&self) -> u32 {
        // There are at most as many entries as tiles, whose number fits.
        self.firsts.len() as u32
    }

    /// Appends the whole table, as it is copied to the device: its length is a multiple of 8.
    pub(super) fn put(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.entries);
        bytes.extend(self.firsts.iter().flat_map(|first| first.to_le_bytes()));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }

    fn push(&mut self, entry: &Entry, matrices: u64) -> Result<(), CudaError> {
        let tiles = matrices * u64::from(entry.bands) * u64::from(entry.blocks);
        let all = u32::try_from(tiles).ok().and_then(|tiles| self.tiles.checked_add(tiles));
        let all = all.ok_or_else(|| too_large("more tiles than a launch can have"))?;
        entry.put(&mut self.entries);
        self.firsts.push(self.tiles);
        self.tiles = all;
        Ok(())
    }
}

fn too_large(words: &str) -> CudaError {
    CudaError::Range(words.into())
}

fn side(side: u64) -> Result<u32, CudaError> {
    u32::try_from(side).map_err(|_| too_large("a part of a tensor that is too large"))
}

fn all_multiples(numbers: &[u64], of: u64) -> bool {
    numbers.iter().all(|number| number.is_multiple_of(of))
}

/// Strides that matter: with one matrix, or one row, its stride is not used.
fn used(strides: Strides, [matrices, rows, _]: [u64; 3]) -> Strides {
    Strides {
        at: strides.at,
        matrix: if matrices > 1 { strides.matrix } else { 0 },
        row: if rows > 1 { strides.row } else { 0 },
    }
}

/// Divides rows of bytes into tiles: the columns of a tile, and its rows.
fn divide(
    entry: &mut Entry,
    rows: u64,
    bytes: u64,
    cut: Option<(u64, u64)>,
) -> Result<(), CudaError> {
    let (first_col, block_cols) = match cut {
        Some((first, each)) => (first.min(bytes), each),
        None => {
            let parts = bytes.div_ceil(TILE).max(1);
            let each = bytes.div_ceil(parts).next_multiple_of(64);
            (each.min(bytes), each)
        }
    };
    let block_rows = (TILE / block_cols.min(bytes).max(1)).clamp(1, rows.max(1));
    entry.rows = side(rows)?;
    entry.cols = side(bytes)?;
    entry.block_rows = side(block_rows)?;
    entry.first_row = entry.block_rows;
    entry.block_cols = side(block_cols)?;
    entry.first_col = side(first_col)?;
    entry.bands = side(rows.div_ceil(block_rows))?;
    entry.blocks = side(1 + (bytes - first_col).div_ceil(block_cols))?;
    Ok(())
}

/// Whether neither rows nor the places where they are cut divide a word of the digest.
fn is_whole_words(to: Strides, bytes: u64, cut: Option<(u64, u64)>) -> bool {
    let cut = cut.filter(|(first, _)| bytes > *first).unwrap_or_default();
    all_multiples(&[to.at, to.matrix, to.row, cut.0, cut.1], 8)
}

/// Makes entries for copies of rows of bytes from one memory to another, each for so many matrices.
fn push_rows(
    push: &mut dyn FnMut(&Entry, u64) -> Result<(), CudaError>,
    (source, from): (u64, Strides),
    (target, to): (Room, Strides),
    [matrices, rows, bytes]: [u64; 3],
    cut: Option<(u64, u64)>,
    slot: u32,
) -> Result<(), CudaError> {
    if rows == 1 && bytes > MOST {
        // Words stay whole: this length is a multiple of where digests cut.
        for matrix in 0..matrices {
            let mut at = 0;
            while at < bytes {
                let len = MOST.min(bytes - at);
                let from =
                    Strides { at: from.at + matrix * from.matrix + at, ..Strides::default() };
                let to = Strides { at: to.at + matrix * to.matrix + at, ..Strides::default() };
                push_rows(push, (source, from), (target, to), [1, 1, len], cut, slot)?;
                at += len;
            }
        }
        return Ok(());
    }
    let extent = [matrices, rows, bytes];
    let (from, to) = (used(from, extent), used(to, extent));
    let mut entry = Entry {
        source: source.wrapping_add(from.at),
        target: target.address(to.at),
        place: to.at,
        source_matrix: from.matrix,
        source_row: from.row,
        target_matrix: to.matrix,
        target_row: to.row,
        flags: SUMMED,
        slot,
        ..Entry::default()
    };
    let whole = is_whole_words(to, bytes, cut);
    divide(&mut entry, rows, bytes, if whole { None } else { Some(cut.unwrap_or((CUT, CUT))) })?;
    let aligned = [
        entry.source,
        entry.target,
        entry.place,
        from.matrix,
        from.row,
        to.matrix,
        to.row,
        entry.first_col.into(),
    ];
    let is_one_tile = entry.blocks == 1;
    let aligned = &aligned[..aligned.len() - usize::from(is_one_tile)];
    if whole && all_multiples(aligned, 16) {
        entry.flags |= FAST;
        let widths = [to.row, entry.cols.into(), entry.block_cols.into()];
        if all_multiples(&widths, 64) {
            entry.flags |= KEYED;
        }
    }
    push(&entry, matrices)
}

/// Adds a part that is written to the table of its kind: of rows, of long rows, of blocks that are fast, or of any blocks.
pub(super) fn push_write(
    [rows_table, long_table, fast_table, any_table]: [&mut Table; 4],
    part: &StridedPart,
    source: u64,
    [target, of_scales]: [Room; 2],
    ty: Option<SourceType>,
    known: u64,
    slot: u32,
) -> Result<(), CudaError> {
    let [matrices, rows, cols] = part.extent;
    let Some(blocks) = &part.blocks else {
        let bytes = cols * part.element;
        let extent = [matrices, rows, bytes];
        let mut push = |entry: &Entry, matrices| {
            let is_long = entry.flags & FAST != 0 && entry.block_rows <= LONG_ROWS;
            if is_long { &mut *long_table } else { &mut *rows_table }.push(entry, matrices)
        };
        let from = (source, part.from);
        return push_rows(&mut push, from, (target, part.to), extent, None, slot);
    };
    let ty = ty.ok_or_else(|| too_large("elements that have no blocks"))?;
    let (from, to) = (used(part.from, part.extent), used(part.to, part.extent));
    let mut entry = with_blocks(blocks, ty, part.extent)?;
    let counts = blocks.counts(rows, cols);
    entry.source = source + from.at;
    (entry.source_matrix, entry.source_row) = (from.matrix, from.row);
    (entry.target, entry.place) = (target.address(to.at), to.at);
    (entry.target_matrix, entry.target_row) = (to.matrix, to.row);
    let scales = blocks.scales;
    (entry.scales, entry.scales_place) = (of_scales.address(scales.at), scales.at);
    (entry.scales_matrix, entry.scales_row) = (scales.matrix, scales.row);
    if known != 0 {
        entry.known = known;
        (entry.known_matrix, entry.known_row) = (side(counts[0] * counts[1])?, side(counts[1])?);
    }
    entry.slot = slot;
    entry.flags |= SUMMED;
    for (skips, flag) in blocks.skips.into_iter().zip([NO_FIRST_BAND, NO_FIRST_COL]) {
        entry.flags |= if skips { flag } else { 0 };
    }
    if !entry.source.is_multiple_of(ty.size() as u64)
        || !all_multiples(&[entry.scales, entry.scales_place, scales.matrix, scales.row], 4)
    {
        return Err(too_large("elements or scales that are not aligned"));
    }
    let first = if entry.blocks > 1 { blocks.first[1] } else { 0 };
    let is_fast =
        all_multiples(&[entry.source, from.matrix, from.row, first * ty.size() as u64], 16)
            && all_multiples(&[entry.target, entry.place, to.matrix, to.row, cols, first], 8)
            && blocks.sides.iter().all(|side| *side <= 128);
    if is_fast {
        entry.flags |= FAST;
    }
    let table = if is_fast && ty.size() == 2 { fast_table } else { any_table };
    table.push(&entry, matrices)
}

fn with_blocks(
    blocks: &StridedBlocks,
    ty: SourceType,
    [_, rows, cols]: [u64; 3],
) -> Result<Entry, CudaError> {
    let counts = blocks.counts(rows, cols);
    Ok(Entry {
        kind: match ty {
            SourceType::Bf16 => 1,
            SourceType::F16 => 2,
            SourceType::F32 => 3,
        },
        mode: mode_number(blocks.format.mode) as u32,
        rows: side(rows)?,
        cols: side(cols)?,
        block_rows: side(blocks.sides[0])?,
        block_cols: side(blocks.sides[1])?,
        first_row: side(blocks.first[0].min(rows))?,
        first_col: side(blocks.first[1].min(cols))?,
        bands: side(counts[0])?,
        blocks: side(counts[1])?,
        flags: if blocks.format.precast == Precast::Bf16 { PRECAST } else { 0 },
        ..Entry::default()
    })
}

/// Adds a part whose maxima are written to an address.
pub(super) fn push_maxima(
    table: &mut Table,
    part: &StridedPart,
    source: u64,
    ty: SourceType,
    to: u64,
) -> Result<(), CudaError> {
    let [matrices, rows, cols] = part.extent;
    let Some(blocks) = &part.blocks else { return Err(too_large("a part without blocks")) };
    let mut entry = with_blocks(blocks, ty, part.extent)?;
    let from = used(part.from, part.extent);
    entry.source = source + from.at;
    (entry.source_matrix, entry.source_row) = (from.matrix, from.row);
    let counts = blocks.counts(rows, cols);
    entry.known = to;
    (entry.known_matrix, entry.known_row) = (side(counts[0] * counts[1])?, side(counts[1])?);
    table.push(&entry, matrices)
}

/// Adds a part that is digested in place.
pub(super) fn push_check(
    table: &mut Table,
    part: &StridedPart,
    [target, of_scales]: [Room; 2],
    slot: u32,
) -> Result<(), CudaError> {
    let [matrices, rows, cols] = part.extent;
    let bytes = if part.blocks.is_some() { cols } else { cols * part.element };
    let to = used(part.to, part.extent);
    let mut extent = [matrices, rows, bytes];
    let mut cut = part.blocks.as_ref().map(|blocks| (blocks.first[1], blocks.sides[1]));
    // Contiguous memory is one row, if no word is divided.
    if is_whole_words(to, bytes, cut) && bytes.is_multiple_of(8) {
        cut = None;
        if rows > 1 && to.row == bytes && (matrices == 1 || to.matrix == rows * bytes) {
            extent = [1, 1, matrices * rows * bytes];
        } else if rows > 1 && to.row == bytes {
            extent = [1, matrices, rows * bytes];
        }
    }
    let to = match extent {
        [1, n, _] if n == matrices && matrices > 1 => Strides { row: to.matrix, ..to },
        _ => to,
    };
    let mut push = |entry: &Entry, matrices| table.push(entry, matrices);
    push_rows(&mut push, (target.base, to), (target, to), extent, cut, slot)?;
    let Some(blocks) = &part.blocks else { return Ok(()) };
    let [bands, columns] = blocks.counts(rows, cols);
    let [skip_band, skip_col] = blocks.skips.map(u64::from);
    let (rows, cols) = (bands - skip_band, (columns - skip_col) * 4);
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let at = blocks.scales.at + skip_band * blocks.scales.row + skip_col * 4;
    let mut entry = Entry {
        kind: SCALES_ONLY,
        target: of_scales.address(at),
        place: at,
        target_matrix: blocks.scales.matrix,
        target_row: blocks.scales.row,
        slot,
        ..Entry::default()
    };
    if !all_multiples(&[entry.target, entry.place, entry.target_matrix, entry.target_row], 4) {
        return Err(too_large("scales that are not aligned"));
    }
    divide(&mut entry, rows, cols, Some((cols, cols)))?;
    table.push(&entry, matrices)
}

/// Whether there are kernels for a format.
pub(super) fn is_known(format: &Fp8Format) -> bool {
    matches!(format.granularity, Granularity::Block { .. })
        && format.non_finite == quant_fp8::NonFinite::Error
}

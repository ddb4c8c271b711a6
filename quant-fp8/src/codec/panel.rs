//! The unit that kernels work on: neighbouring blocks of one band, as many as stay in the caches
//! between the pass that finds their largest magnitudes and the pass that encodes them.

use std::ops::Range;
use std::slice::Chunks;

use crate::{BlockGrid, Precast, SourceType};

/// The most blocks that a panel has.
pub(super) const MOST_BLOCKS: usize = 64;

/// The most bytes that a panel has, unless one block has more. Whole rows of most weights fit, and
/// that matters more than the size of the L2 cache: a panel that is narrower than the matrix is read
/// in short runs far apart, which memory delivers at half its speed.
pub(super) const MOST_BYTES: usize = 1 << 21;

/// Where a panel lies in its tensor.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Which band it is part of, counted over the whole tensor.
    pub(super) band: usize,
    /// Rows, counted over the whole tensor as if its matrices were stacked.
    pub(super) rows: Range<usize>,
    /// Which blocks of the band.
    pub(super) blocks: Range<usize>,
    pub(super) cols: Range<usize>,
}

/// The panels of the blocks that a range of elements touches, in the order of memory.
pub(super) fn places(
    grid: BlockGrid,
    elements: Range<usize>,
    element_size: usize,
) -> impl Iterator<Item = Place> {
    let block_bytes = grid.block_rows * grid.block_cols * element_size;
    let most = (MOST_BYTES / block_bytes).clamp(1, MOST_BLOCKS);
    grid.bands_of(&elements).flat_map(move |band| {
        let whole = grid.band_elements(band);
        let rows = whole.start / grid.cols..whole.end / grid.cols;
        let part = elements.start.max(whole.start)..elements.end.min(whole.end);
        let (first, last) = (part.start / grid.cols, (part.end - 1) / grid.cols);
        // Only a range within one row can leave blocks out.
        let blocks = if first == last {
            let col = |element: usize| element % grid.cols / grid.block_cols;
            col(part.start)..col(part.end - 1) + 1
        } else {
            0..grid.scales_per_band()
        };
        // As few panels as possible, and then of the same width.
        let panels = blocks.len().div_ceil(most);
        let width = blocks.len().div_ceil(panels);
        blocks.clone().step_by(width).map(move |start| {
            let blocks = start..(start + width).min(blocks.end);
            let end = (blocks.end * grid.block_cols).min(grid.cols);
            let cols = blocks.start * grid.block_cols..end;
            Place { band, rows: rows.clone(), blocks, cols }
        })
    })
}

/// The elements of a panel.
#[derive(Debug)]
pub(super) struct Panel<'a> {
    bytes: &'a [u8],
    width: usize,
    block_cols: usize,
    place: Place,
    pub(super) ty: SourceType,
    pub(super) precast: Precast,
}

impl<'a> Panel<'a> {
    /// The panel at `place` of the tensor `bytes`.
    pub(super) fn new(
        bytes: &'a [u8],
        ty: SourceType,
        precast: Precast,
        grid: &BlockGrid,
        place: Place,
    ) -> Self {
        Self { bytes, width: grid.cols, block_cols: grid.block_cols, place, ty, precast }
    }

    /// The rows, to be passed to [`run`](Self::run).
    pub(super) fn rows(&self) -> Range<usize> {
        self.place.rows.clone()
    }

    /// How many elements a block of the panel has.
    pub(super) fn block_elements(&self, block: usize) -> usize {
        self.place.rows.len() * block_of(&self.place.cols, self.block_cols, block).len()
    }

    /// The elements of one block in one row.
    pub(super) fn run(&self, row: usize, block: usize) -> &'a [u8] {
        let cols = block_of(&self.place.cols, self.block_cols, block);
        self.slice(row * self.width + cols.start..row * self.width + cols.end)
    }

    /// The elements of one row.
    #[inline]
    pub(super) fn row(&self, row: usize) -> &'a [u8] {
        let start = row * self.width;
        self.slice(start + self.place.cols.start..start + self.place.cols.end)
    }

    /// The elements of row number `index` of the panel; nothing if it has fewer rows.
    #[inline]
    pub(super) fn nth_row(&self, index: usize) -> &'a [u8] {
        let row = self.place.rows.start + index;
        if row < self.place.rows.end { self.row(row) } else { &[] }
    }

    /// The elements of one row, block by block.
    #[inline]
    pub(super) fn runs(&self, row: usize) -> Chunks<'a, u8> {
        self.row(row).chunks(self.block_cols * self.ty.size())
    }

    /// The band that the panel is part of, counted over the whole tensor.
    pub(super) fn band(&self) -> usize {
        self.place.band
    }

    /// Which blocks of the band are in the panel.
    pub(super) fn blocks(&self) -> Range<usize> {
        self.place.blocks.clone()
    }

    fn slice(&self, elements: Range<usize>) -> &'a [u8] {
        &self.bytes[elements.start * self.ty.size()..elements.end * self.ty.size()]
    }
}

fn block_of(cols: &Range<usize>, block_cols: usize, block: usize) -> Range<usize> {
    let start = cols.start + block * block_cols;
    start..(start + block_cols).min(cols.end)
}

/// Where the codes of a range of elements go.
#[derive(Debug)]
pub(super) struct Target<'a> {
    elements: Range<usize>,
    codes: &'a mut [u8],
}

impl<'a> Target<'a> {
    /// `codes` has one byte for each of `elements`, which are counted over the whole tensor.
    pub(super) fn new(elements: Range<usize>, codes: &'a mut [u8]) -> Self {
        debug_assert_eq!(elements.len(), codes.len());
        Self { elements, codes }
    }

    /// The part of a row whose codes are asked for, and the place for them: nearly always all of
    /// it, and nothing in the rows before and after the range.
    #[inline]
    pub(super) fn part<'p>(&mut self, panel: &Panel<'p>, row: usize) -> Part<'p, '_> {
        let first = row * panel.width + panel.place.cols.start;
        let start = first.max(self.elements.start);
        let end = (row * panel.width + panel.place.cols.end).min(self.elements.end);
        if start >= end {
            return Part { source: &[], codes: &mut [], block: 0, skipped: 0 };
        }
        Part {
            source: panel.slice(start..end),
            codes: &mut self.codes[start - self.elements.start..end - self.elements.start],
            block: (start - first) / panel.block_cols,
            skipped: (start - first) % panel.block_cols,
        }
    }
}

/// Part of a row of a panel; see [`Target::part`].
#[derive(Debug)]
pub(super) struct Part<'p, 't> {
    /// The elements.
    pub(super) source: &'p [u8],
    /// The places of their codes.
    pub(super) codes: &'t mut [u8],
    /// The block that the part begins in.
    pub(super) block: usize,
    /// How many columns of that block come before the part.
    pub(super) skipped: usize,
}

impl<'p, 't> Part<'p, 't> {
    /// Takes the elements of one block off the front.
    pub(super) fn next_block(
        &mut self,
        panel: &Panel<'_>,
    ) -> Option<(usize, &'p [u8], &'t mut [u8])> {
        if self.codes.is_empty() {
            return None;
        }
        let block = self.block;
        let (source, codes) = self.take(panel.block_cols - self.skipped, panel.ty);
        (self.block, self.skipped) = (block + 1, 0);
        Some((block, source, codes))
    }

    /// Takes the elements of as many whole blocks as there are off the front, if their width is
    /// `cols`.
    #[inline]
    pub(super) fn whole_blocks(
        &mut self,
        panel: &Panel<'_>,
        cols: usize,
    ) -> (usize, &'p [u8], &'t mut [u8]) {
        let block = self.block;
        let fits = panel.block_cols == cols && self.skipped == 0;
        let blocks = if fits { self.codes.len() / cols } else { 0 };
        let (source, codes) = self.take(blocks * cols, panel.ty);
        self.block += blocks;
        (block, source, codes)
    }

    #[inline]
    fn take(&mut self, elements: usize, ty: SourceType) -> (&'p [u8], &'t mut [u8]) {
        let elements = elements.min(self.codes.len());
        let (codes, rest) = std::mem::take(&mut self.codes).split_at_mut(elements);
        self.codes = rest;
        let (source, rest) = self.source.split_at(elements * ty.size());
        self.source = rest;
        (source, codes)
    }
}

//! Where pieces lie in a trainer's own memory on their way to a rollout. Only arithmetic.
//!
//! A kernel writes a piece where it is told that what is lent begins. So a trainer's memory stands in for some of what is lent: for
//! *windows*, ranges of offsets that hold whole pieces. The bytes of a piece lie in its window as in the rollout's tensor, with gaps
//! where the tensor has those of others. Only the piece's own *runs* are written.

use std::sync::Arc;

use quant_fp8::{StridedPart, Strides};

use crate::parcels::{Gathered, Run};

/// Windows begin and end at multiples of it, in what is lent and in the memory for it: kernels read as many bytes at a time in both.
const ALIGNMENT: u64 = 256;

/// Bytes of a scale.
const SCALE: u64 = size_of::<f32>() as u64;

/// A range of what is lent, and where it lies meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Its offset in what is lent.
    pub(super) at: u64,
    pub(super) len: u64,
    /// Where it begins in the memory for all windows.
    pub(super) from: u64,
}

/// The windows of some pieces for one rollout, and their runs, both in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Windows {
    pub(super) windows: Vec<Window>,
    pub(super) runs: Vec<Gathered>,
    /// Where the memory for them ends.
    pub(super) end: u64,
}

/// Rows of bytes: matrices, rows of one, bytes of a row.
pub(super) type Rows = (Strides, [u64; 3]);

/// The rows of elements that a part writes.
pub(super) fn elements_of(part: &StridedPart) -> Rows {
    let [matrices, rows, cols] = part.extent;
    let element = if part.blocks.is_some() { 1 } else { part.element };
    (part.to, [matrices, rows, cols * element])
}

/// The rows of all scales of a part's blocks, and of those among them that it writes.
fn scales_of(part: &StridedPart) -> Option<(Rows, Rows)> {
    let blocks = part.blocks.as_ref()?;
    let [matrices, rows, cols] = part.extent;
    let [bands, across] = blocks.counts(rows, cols);
    let [skipped_bands, skipped] = blocks.skips.map(u64::from);
    let all = blocks.scales;
    let own = Strides { at: all.at + skipped_bands * all.row + skipped * SCALE, ..all };
    let own_rows = [matrices, bands - skipped_bands, (across - skipped) * SCALE];
    Some(((all, [matrices, bands, across * SCALE]), (own, own_rows)))
}

/// The range of offsets from the first of these bytes to the last one; none without bytes, and for what does not fit 64 bits.
fn around(rows: impl Iterator<Item = Rows>) -> Option<(u64, u64)> {
    let ranges = rows.filter(|(_, extent)| !extent.contains(&0)).map(|(strides, extent)| {
        let [matrices, rows, bytes] = extent;
        Some((strides.at, strides.end(matrices, rows, bytes)?))
    });
    let all = ranges.collect::<Option<Vec<_>>>()?;
    let start = all.iter().map(|(start, _)| *start).min()?;
    let end = all.iter().map(|(_, end)| *end).max()?;
    Some((start / ALIGNMENT * ALIGNMENT, end.checked_next_multiple_of(ALIGNMENT)?))
}

impl Windows {
    /// Those of pieces, each given as its parts. The memory for them has a place for the first one at `from`, a multiple of 256.
    pub(super) fn of(pieces: &[&Arc<[StridedPart]>], from: u64) -> Self {
        // A kernel finds all parts of a piece in one window, and all of its scales.
        let mut ranges: Vec<(u64, u64)> = Vec::with_capacity(pieces.len() * 2);
        for parts in pieces {
            ranges.extend(around(parts.iter().map(elements_of)));
            let scales = parts.iter().filter_map(scales_of).map(|(all, _)| all);
            ranges.extend(around(scales));
        }
        ranges.sort_unstable();
        let (mut windows, mut end): (Vec<Window>, u64) = (Vec::new(), from);
        for (at, until) in ranges {
            match windows.last_mut().filter(|last| at <= last.at + last.len) {
                Some(last) => {
                    let more = until.saturating_sub(last.at + last.len);
                    last.len += more;
                    end += more;
                }
                None => {
                    windows.push(Window { at, len: until - at, from: end });
                    end += until - at;
                }
            }
        }
        let mut this = Self { windows, runs: Vec::new(), end };
        this.find_runs(pieces);
        this
    }

    fn find_runs(&mut self, pieces: &[&Arc<[StridedPart]>]) {
        let mut found: Vec<(u64, u64)> = Vec::new();
        let parts = pieces.iter().flat_map(|parts| parts.iter());
        for part in parts {
            let own = scales_of(part).map(|(_, own)| own);
            for (strides, [matrices, rows, len]) in [elements_of(part)].into_iter().chain(own) {
                for matrix in 0..if len > 0 { matrices } else { 0 } {
                    let first = strides.at + matrix * strides.matrix;
                    // Rows that follow one another are one run.
                    if strides.row == len || rows == 1 {
                        found.extend((rows > 0).then_some((first, rows * len)));
                        continue;
                    }
                    found.extend((0..rows).map(|row| (first + row * strides.row, len)));
                }
            }
        }
        found.sort_unstable();
        let mut windows = self.windows.iter().peekable();
        for (at, len) in found {
            while windows.next_if(|window| window.at + window.len <= at).is_some() {}
            let Some(window) = windows.peek() else { return };
            let from = window.from + (at - window.at);
            let last = self.runs.last_mut().filter(|last| at - last.run.at == from - last.from);
            if !last.is_some_and(|last| last.run.takes(at, len)) {
                self.runs.push(Gathered { run: Run::together(at, len), from });
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use quant_fp8::{Fp8Format, StridedBlocks};

    use super::*;

    /// The offsets that a part writes, one by one.
    fn written(part: &StridedPart) -> Vec<u64> {
        let mut all = Vec::new();
        let [matrices, rows, cols] = part.extent;
        let element = if part.blocks.is_some() { 1 } else { part.element };
        for matrix in 0..matrices {
            for row in 0..rows {
                for byte in 0..cols * element {
                    all.push(part.to.at + matrix * part.to.matrix + row * part.to.row + byte);
                }
            }
            let Some(blocks) = &part.blocks else { continue };
            let [bands, across] = blocks.counts(rows, cols);
            for band in u64::from(blocks.skips[0])..bands {
                for block in u64::from(blocks.skips[1])..across {
                    let scales = blocks.scales;
                    let at = scales.at + matrix * scales.matrix + band * scales.row + block * 4;
                    all.extend(at..at + 4);
                }
            }
        }
        all
    }

    fn piece() -> impl Strategy<Value = (StridedPart, u64)> {
        let extent = [1_u64..3, 1..4, 1..40];
        let gaps = [0_u64..20, 0..50];
        let blocks = proptest::option::of(([1_u64..4, 1..9], [any::<bool>(), any::<bool>()]));
        (extent, 1_u64..5, gaps, blocks, 0_u64..600).prop_map(
            |(extent, element, gaps, blocks, before)| {
                let [matrices, rows, cols] = extent;
                let of = if blocks.is_some() { 1 } else { element };
                let row = cols * of + gaps[0];
                let matrix = rows * row + gaps[1];
                let to = Strides { at: 0, matrix, row };
                let mut end = matrices * matrix;
                let blocks = blocks.map(|(sides, skips)| {
                    let first = sides;
                    let mut blocks = StridedBlocks {
                        format: Fp8Format::default(),
                        sides,
                        first,
                        block: [0; 3],
                        scales: Strides::default(),
                        skips,
                    };
                    let [bands, across] = blocks.counts(rows, cols);
                    let row = across * 4 + gaps[0] / 4 * 4;
                    let at = end.next_multiple_of(4);
                    blocks.scales = Strides { at, matrix: bands * row, row };
                    end = at + matrices * bands * row;
                    blocks
                });
                let part = StridedPart { from: to, to, extent, element, blocks };
                (part, before + end)
            },
        )
    }

    proptest! {
        #[test]
        fn each_byte_of_a_piece_is_written_once_and_none_else_and_a_piece_is_in_one_window(
            pieces in proptest::collection::vec((piece(), 0_u64..700), 1..6),
            from in 0_u64..4,
        ) {
            let mut base = 0;
            let mut all: Vec<Arc<[StridedPart]>> = Vec::new();
            for ((mut part, len), gap) in pieces {
                base += gap;
                part.to.at += base;
                if let Some(blocks) = &mut part.blocks {
                    blocks.scales.at += base;
                }
                base += len;
                all.push([part].into());
            }
            let from = from * ALIGNMENT;
            let found = Windows::of(&all.iter().collect::<Vec<_>>(), from);
            let mut end = from;
            for (number, window) in found.windows.iter().enumerate() {
                prop_assert_eq!((window.at % ALIGNMENT, window.len % ALIGNMENT), (0, 0));
                prop_assert_eq!(window.from, end);
                end += window.len;
                let before = number.checked_sub(1).map(|before| found.windows[before]);
                prop_assert!(before.is_none_or(|before| before.at + before.len < window.at));
            }
            prop_assert_eq!(found.end, end);
            // How often each offset is written, and from where.
            let mut came: BTreeMap<u64, u64> = BTreeMap::new();
            for Gathered { run, from } in &found.runs {
                for row in (0..run.rows).map(|row| row * run.stride) {
                    for byte in row..row + run.len {
                        prop_assert!(came.insert(run.at + byte, from + byte).is_none());
                    }
                }
            }
            let mut expected: Vec<u64> = all.iter().flat_map(|parts| written(&parts[0])).collect();
            expected.sort_unstable();
            prop_assert!(came.keys().copied().eq(expected));
            let window_of = |at: u64| {
                found.windows.iter().position(|one| (one.at..one.at + one.len).contains(&at))
            };
            for (&at, &from) in &came {
                let window = found.windows[window_of(at).unwrap()];
                prop_assert_eq!(from - window.from, at - window.at);
            }
            for parts in &all {
                let (first, last) = (parts[0].to.at, *written(&parts[0]).first().unwrap());
                prop_assert_eq!(window_of(first), window_of(last));
            }
        }
    }

    #[test]
    fn neighbours_are_one_run_and_one_window() {
        let part = |at, rows, bytes| -> Arc<[StridedPart]> {
            let to = Strides { at, matrix: 0, row: bytes };
            let extent = [1, rows, bytes];
            [StridedPart { from: to, to, extent, element: 1, blocks: None }].into()
        };
        let pieces = [part(1024, 4, 64), part(1280, 2, 128), part(2048, 1, 10)];
        let found = Windows::of(&pieces.iter().collect::<Vec<_>>(), 512);
        let window = |at, len, from| Window { at, len, from };
        assert_eq!(found.windows, [window(1024, 512, 512), window(2048, 256, 1024)]);
        let run = |at, len, from| Gathered { run: Run::together(at, len), from };
        assert_eq!(found.runs, [run(1024, 512, 512), run(2048, 10, 1024)]);
        assert_eq!(found.end, 1280);
    }
}

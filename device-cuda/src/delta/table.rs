//! The tables of launches that find changes or apply them. Pure: addresses in, bytes out.

use engine_core::changes::{Cut, TILE};

use crate::CudaError;

/// Bytes of an entry: `DeltaJob` of the kernels.
pub(super) const ENTRY: usize = 56;

/// A part of a weight. The layout is that of `DeltaJob` in the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where its copy is.
    pub(super) old: u64,
    /// Where its new bytes are, if they are compared.
    pub(super) now: u64,
    /// Where the changes of its tiles go first, if it is compared: as many bytes as it has.
    pub(super) place: u64,
    pub(super) bytes: u64,
    /// Where it begins in the weight, a multiple of 64 bytes.
    pub(super) start: u64,
    /// Where the marks of its new bytes are, a bit for each 8: bytes without one are those of the copy, and not there. 0 if all are there.
    pub(super) marks: u64,
    pub(super) tile: u32,
    pub(super) unit: u32,
}

impl Entry {
    /// A part of a copy that is cut so.
    pub(super) fn of(cut: Cut, old: u64, bytes: u64) -> Self {
        // A tile has at most 64 KiB, a unit 8 bytes.
        let (tile, unit) = (cut.tile() as u32, cut.unit() as u32);
        Self { old, now: 0, place: 0, bytes, start: 0, marks: 0, tile, unit }
    }

    /// A copy that is read as a whole.
    pub(super) fn whole(old: u64, bytes: u64) -> Self {
        Self { old, now: 0, place: 0, bytes, start: 0, marks: 0, tile: TILE as u32, unit: 1 }
    }

    fn put(&self, bytes: &mut Vec<u8>) {
        for long in [self.old, self.now, self.place, self.bytes, self.start / 8, self.marks] {
            bytes.extend(long.to_le_bytes());
        }
        for word in [self.tile, self.unit] {
            bytes.extend(word.to_le_bytes());
        }
    }
}

/// The entries of a launch, and the first tile of each.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Vec<u8>,
    firsts: Vec<u32>,
    tiles: u32,
}

impl Table {
    pub(super) fn push(&mut self, entry: &Entry) -> Result<(), CudaError> {
        if ![entry.old, entry.now].into_iter().all(|address| address.is_multiple_of(16)) {
            return Err(CudaError::Range("bytes that do not begin at a multiple of 16".into()));
        }
        let tiles = u32::try_from(entry.bytes.div_ceil(entry.tile.into())).ok();
        let all = tiles.and_then(|tiles| self.tiles.checked_add(tiles));
        let all =
            all.ok_or_else(|| CudaError::Range("more tiles than a launch can have".into()))?;
        entry.put(&mut self.entries);
        self.firsts.push(self.tiles);
        self.tiles = all;
        Ok(())
    }

    /// The number of entries.
    pub(super) fn jobs(&self) -> usize {
        self.firsts.len()
    }

    pub(super) fn tiles(&self) -> u32 {
        self.tiles
    }

    /// Its bytes: the entries, and behind them the first tiles.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let firsts = self.firsts.iter().flat_map(|first| first.to_le_bytes());
        self.entries.iter().copied().chain(firsts).collect()
    }
}

//! The launches of a list of jobs, kept from one update to the next. Addresses in, bytes out.

use std::sync::Arc;

use quant_fp8::{SourceType, StridedPart, Strides};

use super::table::{ENTRY, Table, job_of, move_source, push_check, push_write};
use crate::CudaError;

/// Bytes that a launch reads, approximately. Work can be stopped between two launches.
const LAUNCH: u64 = 8 << 30;

/// Kernels read so many bytes at a time where addresses are multiples of it.
const ALIGNMENT: u64 = 16;

/// A kernel. Each has tables of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Copies.
    Rows,
    /// Copies of long rows.
    LongRows,
    /// Quantises blocks of elements of two bytes.
    Blocks,
    /// Quantises blocks that have no faster kernel.
    Any,
    /// Digests memory.
    Check,
}

const KINDS: [Kind; 5] = [Kind::Rows, Kind::LongRows, Kind::Blocks, Kind::Any, Kind::Check];

/// A job: parts of a weight that are written to memory, or parts of memory that are digested.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job<'a> {
    pub(super) place: Place,
    pub(super) parts: &'a Arc<[StridedPart]>,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The weight, if one is written.
    pub(super) source: Option<Source>,
    /// The memory that its parts are in, and that of their scales.
    pub(super) target: Room,
    pub(super) scales: Room,
}

/// Memory that has the bytes of some offsets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Room {
    /// What is added to an offset to get its address. It wraps.
    pub(super) base: u64,
    /// The first offset, and the one behind the last.
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Room {
    /// The first bytes of something.
    pub(super) fn of(len: u64) -> Self {
        Self { base: 0, start: 0, end: len }
    }

    /// The address of an offset.
    pub(super) fn address(self, at: u64) -> u64 {
        self.base.wrapping_add(at)
    }

    fn has(self, at: u64, end: Option<u64>) -> bool {
        at >= self.start && end.is_some_and(|end| end <= self.end)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) address: u64,
    pub(super) len: u64,
    /// The type of its elements, if it is quantised.
    pub(super) ty: Option<SourceType>,
    /// The address of the largest magnitudes of its blocks, or 0.
    pub(super) known: u64,
}

/// A launch of a kernel over a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Launch {
    pub(super) kind: Kind,
    /// Where the table is in the bytes of all tables.
    pub(super) at: usize,
    pub(super) entries: u32,
    pub(super) tiles: u32,
}

/// What became of the tables when a list of jobs was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// They are as before.
    Same,
    /// Weights have moved, and their addresses were replaced.
    Moved,
    /// They were made anew.
    New,
}

/// The launches of the last list of jobs, and their tables.
#[derive(Debug, Default)]
pub(super) struct Launches {
    jobs: Vec<(Place, Arc<[StridedPart]>)>,
    list: Vec<Launch>,
    bytes: Vec<u8>,
}

impl Launches {
    pub(super) fn list(&self) -> &[Launch] {
        &self.list
    }

    /// The bytes of all tables.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes a list of jobs: afterwards these are its launches. A job's slot is its number in the list.
    ///
    /// The jobs are compared with those of the last list, so no caller has to say what has changed.
    ///
    /// # Errors
    ///
    /// `Range` for parts that are not within their memory or that a kernel cannot do. Then there are no launches.
    pub(super) fn take(&mut self, jobs: &[Job<'_>]) -> Result<Taken, CudaError> {
        if let Some(moves) = self.moves(jobs) {
            if moves.is_empty() {
                return Ok(Taken::Same);
            }
            self.move_sources(&moves);
            for ((place, _), job) in self.jobs.iter_mut().zip(jobs) {
                *place = job.place;
            }
            return Ok(Taken::Moved);
        }
        *self = Self::default();
        let made = self.make(jobs);
        if made.is_err() {
            *self = Self::default();
        }
        made.map(|()| Taken::New)
    }

    /// Whether a list of jobs is probably the last one: it has as many jobs, and the first has the same parts.
    pub(super) fn begin_as(&self, jobs: &[Job<'_>]) -> bool {
        let first = self.jobs.first().zip(jobs.first());
        let is_same = |((_, parts), job): (&(Place, Arc<[StridedPart]>), &Job<'_>)| {
            Arc::ptr_eq(parts, job.parts) || parts == job.parts
        };
        self.jobs.len() == jobs.len() && first.is_none_or(is_same)
    }

    /// How far each job's source has moved since the last list, and nothing if none has. `None` if the lists differ in more than that.
    fn moves(&self, jobs: &[Job<'_>]) -> Option<Vec<u64>> {
        if jobs.len() != self.jobs.len() {
            return None;
        }
        let mut moves = Vec::new();
        for (number, (job, (place, parts))) in jobs.iter().zip(&self.jobs).enumerate() {
            // In an update that is like the last one, they are the same memory, which need not be read.
            if !Arc::ptr_eq(parts, job.parts) && parts != job.parts {
                return None;
            }
            if job.place == *place {
                continue;
            }
            let (now, before) = (job.place.source?, place.source?);
            let by = now.address.wrapping_sub(before.address);
            let moved = Place { source: Some(Source { address: now.address, ..before }), ..*place };
            if moved != job.place || !by.is_multiple_of(ALIGNMENT) {
                return None;
            }
            moves.resize(jobs.len(), 0);
            moves[number] = by;
        }
        Some(moves)
    }

    fn move_sources(&mut self, moves: &[u64]) {
        for launch in &self.list {
            let end = launch.at + launch.entries as usize * ENTRY;
            let (entries, _) = self.bytes[launch.at..end].as_chunks_mut::<ENTRY>();
            for entry in entries {
                match moves.get(job_of(entry) as usize) {
                    None | Some(0) => {}
                    Some(by) => move_source(entry, *by),
                }
            }
        }
    }

    fn make(&mut self, jobs: &[Job<'_>]) -> Result<(), CudaError> {
        let mut tables: [Table; KINDS.len()] = Default::default();
        let mut read = 0;
        self.jobs.reserve(jobs.len());
        for (slot, job) in (0..).zip(jobs) {
            let Place { source, target, scales } = job.place;
            for part in job.parts.iter() {
                let written = if part.blocks.is_some() { 1 } else { part.element };
                within(part, part.to, written, target)?;
                scales_within(part, scales)?;
                let [rows, long_rows, blocks, any, checks] = &mut tables;
                let elements = part.extent.iter().product::<u64>();
                let Some(source) = source else {
                    read += elements * written;
                    push_check(checks, part, [target, scales], slot)?;
                    continue;
                };
                within(part, part.from, part.element, Room::of(source.len))?;
                read += elements * part.element;
                let tables = [rows, long_rows, blocks, any];
                let to = [target, scales];
                push_write(tables, part, source.address, to, source.ty, source.known, slot)?;
            }
            self.jobs.push((job.place, job.parts.clone()));
            if read >= LAUNCH {
                self.finish(&mut tables);
                read = 0;
            }
        }
        self.finish(&mut tables);
        Ok(())
    }

    fn finish(&mut self, tables: &mut [Table; KINDS.len()]) {
        for (kind, table) in KINDS.into_iter().zip(tables) {
            let table = std::mem::take(table);
            if table.tiles > 0 {
                let (at, entries, tiles) = (self.bytes.len(), table.entries(), table.tiles);
                table.put(&mut self.bytes);
                self.list.push(Launch { kind, at, entries, tiles });
            }
        }
    }
}

/// The number of rows and columns of blocks of a part.
pub(super) fn counts_of(part: &StridedPart) -> [u64; 2] {
    part.blocks.as_ref().map_or([1, 1], |blocks| blocks.counts(part.extent[1], part.extent[2]))
}

/// Checks that a part lies within memory.
pub(super) fn within(
    part: &StridedPart,
    at: Strides,
    element: u64,
    room: Room,
) -> Result<(), CudaError> {
    let [matrices, rows, cols] = part.extent;
    let end = cols.checked_mul(element).and_then(|bytes| at.end(matrices, rows, bytes));
    match room.has(at.at, end) {
        true => Ok(()),
        false => Err(CudaError::Range(format!("a part at {} outside of {room:?}", at.at))),
    }
}

fn scales_within(part: &StridedPart, room: Room) -> Result<(), CudaError> {
    let Some(blocks) = &part.blocks else { return Ok(()) };
    let [bands, columns] = counts_of(part);
    let end = blocks.scales.end(part.extent[0], bands, columns * 4);
    match room.has(blocks.scales.at, end) {
        true => Ok(()),
        false => {
            Err(CudaError::Range(format!("scales at {} outside of {room:?}", blocks.scales.at)))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use quant_fp8::{Fp8Format, StridedBlocks};

    /// A job that owns what it is made of.
    #[derive(Clone, Debug)]
    struct Made(Place, Arc<[StridedPart]>);

    /// A copy, a quantised matrix in two parts of `bands` rows of blocks each, or memory that is digested.
    fn made(what: u8, at: u64, bands: u64, checks: bool) -> Made {
        let (rows, cols) = (bands * 128, 256);
        let part = |first: u64| {
            let blocks = StridedBlocks {
                format: Fp8Format::default(),
                sides: [128, 128],
                first: [128, 128],
                block: [0, first / 128, 0],
                scales: Strides { at: 1 << 20, matrix: 0, row: 8 },
                skips: [false; 2],
            };
            StridedPart {
                from: Strides { at: first * cols * 2, matrix: 0, row: cols * 2 },
                to: Strides { at: first * cols, matrix: 0, row: cols },
                extent: [1, rows, cols],
                element: if what == 2 { 4 } else { 2 },
                blocks: (what > 0).then_some(blocks),
            }
        };
        let ty = [None, Some(SourceType::Bf16), Some(SourceType::F32)][what as usize];
        let source = Source { address: at, len: 1 << 20, ty, known: 0 };
        let source = (!checks).then_some(source);
        // The scales are in other memory than the codes.
        let target = Room { base: 1 << 30, start: 0, end: 1 << 20 };
        let scales = Room { base: 1 << 40, start: 1 << 20, end: 2 << 20 };
        Made(Place { source, target, scales }, [part(0), part(rows)].into())
    }

    fn jobs(all: &[Made]) -> Vec<Job<'_>> {
        all.iter().map(|Made(place, parts)| Job { place: *place, parts }).collect()
    }

    /// Whether these are the launches that a list of jobs has that nothing was kept for.
    fn are_those_of(launches: &Launches, all: &[Made]) -> bool {
        let mut anew = Launches::default();
        anew.take(&jobs(all)).unwrap();
        launches.list() == anew.list() && launches.bytes() == anew.bytes()
    }

    fn lists() -> impl Strategy<Value = Vec<Made>> {
        let job = (0_u8..3, 0_u64..64, 1_u64..3).prop_map(|(w, at, n)| made(w, at << 12, n, false));
        proptest::collection::vec(job, 0..9)
    }

    #[derive(Clone, Debug)]
    enum Change {
        Nothing,
        /// Weights move, each by its own number of bytes.
        Move(Vec<u64>),
        /// The parts are others with the same values.
        Copy,
        Target,
        Other(Vec<Made>),
    }

    fn changes() -> impl Strategy<Value = Change> {
        let by = prop_oneof![Just(0_u64), (0_u64..9).prop_map(|at| at * 16), Just(8), Just(4)];
        prop_oneof![
            Just(Change::Nothing),
            proptest::collection::vec(by, 9).prop_map(Change::Move),
            Just(Change::Copy),
            Just(Change::Target),
            lists().prop_map(Change::Other),
        ]
    }

    proptest! {
        #[test]
        fn launches_that_are_kept_are_those_that_are_made_anew(
            first in lists(), changes in proptest::collection::vec(changes(), 1..6),
        ) {
            let (mut all, mut launches) = (first, Launches::default());
            launches.take(&jobs(&all)).unwrap();
            for change in changes {
                let mut expected = None;
                match change {
                    Change::Nothing => expected = Some(Taken::Same),
                    Change::Move(by) => {
                        for (Made(place, _), by) in all.iter_mut().zip(&by) {
                            place.source.as_mut().unwrap().address += by;
                        }
                        let by = &by[..all.len()];
                        if by.iter().all(|by| *by == 0) {
                            expected = Some(Taken::Same);
                        } else if by.iter().all(|by| by.is_multiple_of(16)) {
                            expected = Some(Taken::Moved);
                        }
                    }
                    Change::Copy => {
                        all.iter_mut().for_each(|Made(_, parts)| *parts = parts.to_vec().into());
                        expected = Some(Taken::Same);
                    }
                    Change::Target => all.iter_mut().for_each(|Made(place, _)| place.target.base += 8),
                    Change::Other(other) => all = other,
                }
                let taken = launches.take(&jobs(&all)).unwrap();
                if let Some(expected) = expected {
                    prop_assert_eq!(taken, expected);
                }
                prop_assert!(are_those_of(&launches, &all));
            }
        }
    }

    #[test]
    fn a_part_outside_of_its_weight_or_its_memory_leaves_no_launches() {
        let good = made(1, 0, 2, false);
        let mut launches = Launches::default();
        for change in [
            |place: &mut Place| place.source.as_mut().unwrap().len = 1 << 10,
            |place: &mut Place| place.target.end = 1 << 10,
            |place: &mut Place| place.target.start = 1,
            |place: &mut Place| place.scales.end = 1 << 20,
        ] {
            assert_eq!(launches.take(&jobs(std::slice::from_ref(&good))).unwrap(), Taken::New);
            let mut bad = good.clone();
            change(&mut bad.0);
            let error = launches.take(&jobs(&[good.clone(), bad])).unwrap_err();
            assert!(matches!(error, CudaError::Range(_)), "{error}");
            assert!(launches.list().is_empty());
        }
        let digested = made(0, 0, 1, true);
        assert_eq!(launches.take(&jobs(std::slice::from_ref(&digested))).unwrap(), Taken::New);
        assert_eq!(launches.list()[0].kind, Kind::Check);
        assert_eq!(launches.take(&jobs(&[digested])).unwrap(), Taken::Same);
    }

    #[test]
    fn copies_of_long_rows_that_are_aligned_have_a_kernel_of_their_own() {
        let kinds = |[rows, bytes]: [u64; 2], [pitch, at]: [u64; 2]| {
            let strides = Strides { at, matrix: 0, row: pitch };
            let extent = [1, rows, bytes];
            let part = StridedPart { from: strides, to: strides, extent, element: 1, blocks: None };
            let source = Source { address: 1 << 12, len: 1 << 20, ty: None, known: 0 };
            let [target, scales] = [Room { base: 1 << 30, start: 0, end: 1 << 20 }; 2];
            let made = Made(Place { source: Some(source), target, scales }, [part].into());
            let mut launches = Launches::default();
            launches.take(&jobs(&[made])).unwrap();
            launches.list().iter().map(|launch| launch.kind).collect::<Vec<_>>()
        };
        for (extent, strides, kind) in [
            ([1, 1 << 19], [0, 0], Kind::LongRows),
            ([1, 96], [0, 16], Kind::LongRows),
            ([9, 1 << 14], [1 << 15, 64], Kind::LongRows),
            ([9, 1 << 12], [1 << 15, 64], Kind::Rows),
            ([9, 1 << 14], [1 << 15, 8], Kind::Rows),
            ([9, 1 << 14], [(1 << 15) + 8, 0], Kind::Rows),
            ([1, 1 << 19], [0, 1], Kind::Rows),
        ] {
            assert_eq!(kinds(extent, strides), [kind], "{extent:?} {strides:?}");
        }
    }
}

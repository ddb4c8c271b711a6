//! What two layouts of one shape have in common.

use std::sync::Arc;

use engine_core::{Error, ErrorKind, Result, TensorBox};

use crate::layout::{Layout, Share};
use crate::search::Boxes;

/// The common boxes of a held and a wanted layout. They depend on the two layouts and the granule alone, so they are kept as long as these
/// are in use.
#[derive(Debug)]
pub(crate) struct Crossing {
    /// What is held, as disjoint boxes.
    pub(crate) held: Vec<Share>,
    pub(crate) wanted: Arc<Layout>,
    pub(crate) granule: Arc<[u64]>,
    /// Ordered by the wanted box, then by where the held box begins.
    pub(crate) cells: Vec<Cell>,
    /// Blocks of the granule of which several held boxes contain a part.
    pub(crate) straddling: Vec<Straddling>,
}

/// Elements that the same ranks hold and the same ranks want.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) region: TensorBox,
    /// Index in `held`.
    pub(crate) held: u32,
    /// Index among the shares of `wanted`.
    pub(crate) wanted: u32,
}

/// Blocks of which two held boxes contain a part.
#[derive(Debug)]
pub(crate) struct Straddling {
    /// Indices in `held`.
    pub(crate) pair: [u32; 2],
    /// Counted in granules.
    pub(crate) blocks: TensorBox,
}

impl Crossing {
    /// # Errors
    ///
    /// `Weight`, naming the rank that wants an element that nobody holds.
    pub(crate) fn new(held: &Layout, wanted: &Arc<Layout>, granule: &Arc<[u64]>) -> Result<Self> {
        let held = held.disjoint();
        let boxes = Boxes::new(held.iter().map(|share| &share.region));
        let mut cells = Vec::new();
        for (to, share) in (0..).zip(wanted.shares()) {
            let first = cells.len();
            whole_blocks(share, &held, &boxes, granule, wanted.shape())?;
            let mut missing = share.region.elements();
            for from in boxes.meeting(&share.region) {
                if let Some(region) = held[from].region.intersection(&share.region) {
                    missing -= region.elements();
                    cells.push(Cell { region, held: from as u32, wanted: to });
                }
            }
            if missing > 0 {
                let parts = cells[first..].iter().map(|cell| &cell.region);
                return Err(hole(share, missing, parts));
            }
        }
        let straddling = straddling(&held, granule);
        Ok(Self { held, wanted: wanted.clone(), granule: granule.clone(), cells, straddling })
    }
}

/// Checks that every block of which a part is wanted is held as a whole: a sender that encodes in blocks needs all elements of a block.
fn whole_blocks(
    share: &Share,
    held: &[Share],
    boxes: &Boxes<'_>,
    granule: &[u64],
    shape: &[u64],
) -> Result<()> {
    let around = share.region.to_granules(granule, shape);
    if around == share.region {
        return Ok(());
    }
    let parts = || boxes.meeting(&around).map(|at| &held[at].region);
    let common = |part: &TensorBox| part.intersection(&around).map_or(0, |part| part.elements());
    match around.elements() - parts().map(common).sum::<u64>() {
        0 => Ok(()),
        missing => {
            let share = Share { region: around.clone(), ranks: share.ranks.clone() };
            Err(hole(&share, missing, parts()))
        }
    }
}

fn hole<'a>(share: &Share, missing: u64, covered: impl Iterator<Item = &'a TensorBox>) -> Error {
    let mut rest = vec![share.region.clone()];
    for part in covered {
        rest = rest.iter().flat_map(|region| region.without(part)).collect();
    }
    let first = rest.first().unwrap_or(&share.region);
    let message = format!(
        "nobody holds {missing} of {} elements of the box {} that it takes, such as {first}",
        share.region.elements(),
        share.region
    );
    Error::new(ErrorKind::Weight, "planning who sends what", message).rank(share.ranks[0])
}

fn straddling(held: &[Share], granule: &[u64]) -> Vec<Straddling> {
    if granule.iter().all(|&side| side <= 1) {
        return Vec::new();
    }
    let blocks: Vec<TensorBox> = held.iter().map(|s| s.region.in_granules(granule)).collect();
    let search = Boxes::new(blocks.iter());
    let mut found = Vec::new();
    for (one, own) in blocks.iter().enumerate() {
        for other in search.meeting(own).filter(|&other| other > one) {
            if let Some(blocks) = own.intersection(&blocks[other]) {
                found.push(Straddling { pair: [one as u32, other as u32], blocks });
            }
        }
    }
    found
}

/// Cuts a box into at most `most` boxes, at granule boundaries of the dimension with the most granules. If elements share bytes, they do so
/// along the last dimension, which is then not cut.
pub(crate) fn cut(region: &TensorBox, granule: &[u64], most: u32, bits: u64) -> Vec<TensorBox> {
    let units = region.in_granules(granule);
    let count = |range: &std::ops::Range<u64>| range.end - range.start;
    let whole = if bits.is_multiple_of(8) { 0 } else { 1 };
    let sides = &units.ranges()[..units.dimensions().saturating_sub(whole)];
    let along = sides.iter().enumerate().rev().max_by_key(|(_, range)| count(range));
    let Some((dimension, range)) = along.filter(|_| most > 1) else {
        return vec![region.clone()];
    };
    // The granule covers only the last dimensions.
    let from_last = region.dimensions() - dimension;
    let side = granule.len().checked_sub(from_last).map_or(1, |at| granule[at].max(1));
    let pieces = u64::from(most).min(count(range)).max(1);
    let at = |piece: u64| (range.start + mul_div(count(range), piece, pieces)) * side;
    (0..pieces).map(|piece| region.narrowed(dimension, at(piece)..at(piece + 1))).collect()
}

fn mul_div(value: u64, by: u64, over: u64) -> u64 {
    (u128::from(value) * u128::from(by) / u128::from(over)) as u64
}

//! Finds, encodes and applies the changes of one weight, tile by tile. Without IO.
//!
//! A weight's bytes, as they travel, are cut into *tiles* of equal size, at most [`TILE`] bytes. Changes are counted in *units*: elements
//! of 1, 2, 4 or 8 bytes. The changes of a weight are one word of four bytes for each tile, followed by what these words announce:
//!
//! | the upper two bits | the tile has | follows |
//! |---|---|---|
//! | 0 | not changed | nothing |
//! | 1 | *n* changed units, *n* the lower 30 bits | their positions in the tile, ascending, two bytes each; their values |
//! | 2 | *n* changed units | a bit for each unit of the tile, set where it changed; the values |
//! | 3 | changed nearly everywhere | all of its bytes |
//!
//! All numbers are little-endian. Values are absolute: the new ones, never differences. The shortest form is used.
//!
//! [`exchange`] applies changes by exchanging values: afterwards the weight has the new values and the changes have the old ones.
//! Exchanging once more takes the changes back.

use engine_core::{DType, digest};

/// The most bytes of a tile: a position in it fits in two bytes, whatever the unit.
pub(crate) const TILE: usize = 1 << 16;

/// Bytes of a word of the digest sum.
const WORD: usize = 8;
/// Bytes that are compared at a time. Tiles begin at multiples of it.
const ROW: usize = 64;

const SAME: u32 = 0;
const POSITIONS: u32 = 1;
const BITMAP: u32 = 2;
const DENSE: u32 = 3;
const COUNT: u32 = (1 << 30) - 1;

/// How a weight is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Bytes of an element that changes as a whole: 1, 2, 4 or 8.
    unit: usize,
    /// Bytes of a tile.
    tile: usize,
}

impl Cut {
    /// Chooses tiles of which a granule is a multiple, if possible.
    pub(crate) fn at(dtype: DType, granule: u64) -> Self {
        let granule = usize::try_from(granule).unwrap_or(usize::MAX).max(1);
        let fits = |tile: &usize| tile.is_multiple_of(ROW) && granule.is_multiple_of(*tile);
        let least = granule.div_ceil(TILE);
        let divided = || (least..least.saturating_add(64)).map(|n| granule / n).find(fits);
        let tile = if TILE.is_multiple_of(granule) { None } else { divided() };
        Self { unit: unit(dtype), tile: tile.unwrap_or(TILE) }
    }

    /// The cut of a tile size from a peer; `None` if the size is not valid.
    pub(crate) fn of(dtype: DType, tile: u32) -> Option<Self> {
        let tile = usize::try_from(tile).ok()?;
        let is_one = tile != 0 && tile <= TILE && tile.is_multiple_of(ROW);
        is_one.then_some(Self { unit: unit(dtype), tile })
    }

    pub(crate) fn tile(self) -> usize {
        self.tile
    }
}

/// The bytes of a unit. Elements smaller than a byte, or of a size that no word has, are compared byte by byte.
fn unit(dtype: DType) -> usize {
    match dtype.bytes() {
        Some(2) => 2,
        Some(4) => 4,
        Some(8) => 8,
        _ => 1,
    }
}

/// Changes of consecutive tiles of a weight.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    heads: Vec<u8>,
    values: Vec<u8>,
    /// Units that changed.
    pub(crate) units: u64,
    /// The wrapping change of the weight's digest sum.
    pub(crate) sum: u64,
    positions: Vec<u16>,
    found: Vec<u8>,
}

impl Changes {
    /// Compares the old and new bytes of a weight from `offset` on, and records what changed.
    ///
    /// # Contract
    ///
    /// A tile begins at `offset`. The compared range ends where a tile or the weight ends. `old` and `new` have the same length.
    pub(crate) fn compare(&mut self, cut: Cut, offset: usize, old: &[u8], new: &[u8]) {
        debug_assert!(offset.is_multiple_of(cut.tile) && old.len() == new.len());
        for (tile, (old, new)) in old.chunks(cut.tile).zip(new.chunks(cut.tile)).enumerate() {
            let at = offset + tile * cut.tile;
            match cut.unit {
                1 => self.compare_tile::<1>(at, old, new),
                2 => self.compare_tile::<2>(at, old, new),
                4 => self.compare_tile::<4>(at, old, new),
                _ => self.compare_tile::<8>(at, old, new),
            }
        }
    }

    fn compare_tile<const UNIT: usize>(&mut self, offset: usize, old: &[u8], new: &[u8]) {
        self.positions.clear();
        self.found.clear();
        let first = (offset / WORD) as u64;
        let ((was, was_last), (is, is_last)) = (old.as_chunks::<ROW>(), new.as_chunks::<ROW>());
        for (row, (was, is)) in was.iter().zip(is).enumerate() {
            if differ(was, is) {
                self.compare_row::<UNIT>(first, row, was, is);
            }
        }
        if was_last != is_last {
            let padded = |bytes: &[u8]| {
                let mut row = [0; ROW];
                row[..bytes.len()].copy_from_slice(bytes);
                row
            };
            self.compare_row::<UNIT>(first, was.len(), &padded(was_last), &padded(is_last));
        }
        let count = self.positions.len();
        let sparse = count * (2 + UNIT);
        let bitmap = (new.len() / UNIT).div_ceil(8) + count * UNIT;
        let (form, positions) = match (count, sparse.min(bitmap)) {
            (0, _) => (SAME, 0),
            (_, least) if least >= new.len() => {
                self.values.extend_from_slice(new);
                (DENSE, 0)
            }
            (_, least) if least == sparse => {
                self.values.extend(self.positions.iter().flat_map(|at| at.to_le_bytes()));
                (POSITIONS, count)
            }
            _ => {
                let start = self.values.len();
                self.values.resize(start + (new.len() / UNIT).div_ceil(8), 0);
                for at in &self.positions {
                    self.values[start + usize::from(at / 8)] |= 1 << (at % 8);
                }
                (BITMAP, count)
            }
        };
        if positions > 0 {
            self.values.extend_from_slice(&self.found);
        }
        self.heads.extend((form << 30 | positions as u32).to_le_bytes());
        self.units += count as u64;
    }

    fn compare_row<const UNIT: usize>(
        &mut self,
        first: u64,
        row: usize,
        was: &[u8; ROW],
        is: &[u8; ROW],
    ) {
        let unit = u64::MAX >> (64 - 8 * UNIT);
        let words = was.as_chunks::<WORD>().0.iter().zip(is.as_chunks::<WORD>().0);
        for (at, (was, is)) in words.enumerate() {
            let (was, now) = (u64::from_le_bytes(*was), u64::from_le_bytes(*is));
            let mut differs = was ^ now;
            if differs == 0 {
                continue;
            }
            let word = row * (ROW / WORD) + at;
            self.sum = self.sum.wrapping_add(digest::term(first + word as u64, now));
            self.sum = self.sum.wrapping_sub(digest::term(first + word as u64, was));
            // A word mostly has one changed unit: this branch is predicted well, a branch for each unit would not be.
            while differs != 0 {
                let lane = differs.trailing_zeros() as usize / (8 * UNIT);
                let shift = 8 * UNIT * lane;
                self.positions.push((word * (WORD / UNIT) + lane) as u16);
                self.found.extend_from_slice(&(now >> shift).to_le_bytes()[..UNIT]);
                differs &= !(unit << shift);
            }
        }
    }

    /// Joins the changes of a weight's parts, in their order. Appends nothing if nothing changed.
    pub(crate) fn join(parts: &[Self], into: &mut Vec<u8>) {
        if parts.iter().all(|part| part.units == 0) {
            return;
        }
        parts.iter().for_each(|part| into.extend_from_slice(&part.heads));
        parts.iter().for_each(|part| into.extend_from_slice(&part.values));
    }
}

/// Whether two rows differ. It has no branch, so that it compiles to a few vector instructions.
#[inline(always)]
fn differ(was: &[u8; ROW], is: &[u8; ROW]) -> bool {
    let words = was.as_chunks::<WORD>().0.iter().zip(is.as_chunks::<WORD>().0);
    words.fold(0, |all, (was, is)| all | (u64::from_le_bytes(*was) ^ u64::from_le_bytes(*is))) != 0
}

/// Exchanges the values of a weight and of its changes. Returns the wrapping change of the weight's digest sum.
///
/// # Errors
///
/// A message, if these are not changes of such a weight. Some values may have been exchanged.
pub(crate) fn exchange(cut: Cut, weight: &mut [u8], changes: &mut [u8]) -> Result<u64, String> {
    let tiles = weight.len().div_ceil(cut.tile);
    let Some((heads, mut values)) = changes.split_at_mut_checked(tiles * 4) else {
        return Err(format!("{} bytes of changes for {tiles} tiles", changes.len()));
    };
    let mut sum = 0_u64;
    let heads = heads.as_chunks::<4>().0.iter();
    for (index, (tile, head)) in weight.chunks_mut(cut.tile).zip(heads).enumerate() {
        let head = u32::from_le_bytes(*head);
        let (form, count) = (head >> 30, (head & COUNT) as usize);
        let (places, len) = match form {
            SAME => continue,
            POSITIONS => (count * 2, count * cut.unit),
            BITMAP => ((tile.len() / cut.unit).div_ceil(8), count * cut.unit),
            _ => (0, tile.len()),
        };
        let Some((own, rest)) = values.split_at_mut_checked(places + len) else {
            return Err(format!("the changes end within tile {index} of {tiles}"));
        };
        values = rest;
        let (places, own) = own.split_at_mut(places);
        let offset = (index * cut.tile) as u64;
        let changed = match (form, cut.unit) {
            (DENSE, _) => {
                let was = digest::sum(offset, tile);
                tile.swap_with_slice(own);
                Some(digest::sum(offset, tile).wrapping_sub(was))
            }
            (form, 1) => exchange_tile::<1>(form, offset, tile, places, own),
            (form, 2) => exchange_tile::<2>(form, offset, tile, places, own),
            (form, 4) => exchange_tile::<4>(form, offset, tile, places, own),
            (form, _) => exchange_tile::<8>(form, offset, tile, places, own),
        };
        let Some(changed) = changed else {
            return Err(format!("the places of tile {index} of {tiles} are none"));
        };
        sum = sum.wrapping_add(changed);
    }
    if !values.is_empty() {
        return Err(format!("{} bytes of changes too many", values.len()));
    }
    Ok(sum)
}

/// As [`exchange`], for one tile that is not dense. `None` if the places are not ascending, not in the tile, or not as many as the values.
fn exchange_tile<const UNIT: usize>(
    form: u32,
    offset: u64,
    tile: &mut [u8],
    places: &[u8],
    values: &mut [u8],
) -> Option<u64> {
    let mut exchange = Exchange { first: offset / WORD as u64, tile, word: None, sum: 0 };
    let mut values = values.as_chunks_mut::<UNIT>().0.iter_mut();
    let mut least = 0;
    if form == POSITIONS {
        for (place, value) in places.as_chunks::<2>().0.iter().zip(values) {
            let place = usize::from(u16::from_le_bytes(*place));
            if place < least {
                return None;
            }
            least = place + 1;
            exchange.unit(place, value)?;
        }
        return Some(exchange.finish());
    }
    for (at, byte) in places.iter().enumerate() {
        let mut bits = *byte;
        while bits != 0 {
            exchange.unit(at * 8 + bits.trailing_zeros() as usize, values.next()?)?;
            bits &= bits - 1;
        }
    }
    values.next().is_none().then(|| exchange.finish())
}

/// Exchanges units of a tile, and updates the digest sum word by word.
struct Exchange<'a> {
    /// The number of the tile's first word in the weight.
    first: u64,
    tile: &'a mut [u8],
    /// The word that is being changed, and its term in the sum before the change.
    word: Option<(usize, u64)>,
    sum: u64,
}

impl Exchange<'_> {
    fn unit<const UNIT: usize>(&mut self, place: usize, value: &mut [u8; UNIT]) -> Option<()> {
        let at = place * UNIT;
        let word = at / WORD;
        if self.word.is_none_or(|(present, _)| present != word) {
            self.leave();
            self.word = Some((word, self.term(word)));
        }
        self.tile.get_mut(at..at + UNIT)?.swap_with_slice(value);
        Some(())
    }

    fn term(&self, word: usize) -> u64 {
        let mut bytes = [0; WORD];
        let rest = self.tile.get(word * WORD..).unwrap_or_default();
        let len = rest.len().min(WORD);
        bytes[..len].copy_from_slice(&rest[..len]);
        digest::term(self.first + word as u64, u64::from_le_bytes(bytes))
    }

    fn leave(&mut self) {
        if let Some((word, before)) = self.word.take() {
            self.sum = self.sum.wrapping_add(self.term(word)).wrapping_sub(before);
        }
    }

    fn finish(mut self) -> u64 {
        self.leave();
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DTYPES: [DType; 4] = [DType::U8, DType::BF16, DType::F32, DType::F64];

    fn changes(cut: Cut, old: &[u8], new: &[u8], step: usize) -> (Vec<u8>, u64, u64) {
        let step = step.max(1) * cut.tile();
        let parts: Vec<Changes> = (0..old.len())
            .step_by(step)
            .map(|from| {
                let mut part = Changes::default();
                let to = old.len().min(from + step);
                part.compare(cut, from, &old[from..to], &new[from..to]);
                part
            })
            .collect();
        let mut body = Vec::new();
        Changes::join(&parts, &mut body);
        let total = |of: fn(&Changes) -> u64| parts.iter().map(of).fold(0, u64::wrapping_add);
        (body, total(|part| part.units), total(|part| part.sum))
    }

    /// New bytes from old ones. Each byte is replaced at a rate in thousandths.
    fn changed(old: &[u8], seed: u64, rate: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        old.iter().map(|byte| if next() % 1000 < rate { next() as u8 } else { *byte }).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn changes_turn_the_old_bytes_into_the_new_ones_and_back(
            dtype in 0..4_usize, elements in 0..70_000_usize, granule in 1..200_000_u64,
            seed: u64, rate in prop_oneof![Just(0), Just(1), Just(20), Just(200), Just(1000)],
            step in 1..4_usize,
        ) {
            let dtype = DTYPES[dtype];
            let len = elements * unit(dtype);
            let old: Vec<u8> = (0..len).map(|at| (at as u64 ^ seed) as u8).collect();
            let new = changed(&old, seed, rate);
            let cut = Cut::at(dtype, granule);
            prop_assert_eq!(Cut::of(dtype, cut.tile() as u32), Some(cut));
            let (mut body, units, sum) = changes(cut, &old, &new, step);
            let differ = old.chunks(cut.unit).zip(new.chunks(cut.unit)).filter(|(a, b)| a != b);
            prop_assert_eq!(units, differ.count() as u64);
            prop_assert_eq!(sum, digest::sum(0, &new).wrapping_sub(digest::sum(0, &old)));
            prop_assert!(body.len() <= len + len.div_ceil(cut.tile()) * 4);
            prop_assert_eq!(body.is_empty(), old == new);
            if body.is_empty() {
                return Ok(());
            }
            let (mut weight, sent) = (old.clone(), body.clone());
            prop_assert_eq!(exchange(cut, &mut weight, &mut body), Ok(sum));
            prop_assert!(weight == new);
            prop_assert_eq!(exchange(cut, &mut weight, &mut body), Ok(0_u64.wrapping_sub(sum)));
            prop_assert!(weight == old && body == sent);
        }

        #[test]
        fn what_comes_from_outside_is_applied_or_refused_but_never_a_panic(
            dtype in 0..4_usize, tile in 0..5_u32, len in 0..2000_usize,
            mut body in proptest::collection::vec(any::<u8>(), 0..600),
            forms in proptest::collection::vec((0..4_u32, 0..40_u32), 0..30),
        ) {
            let Some(cut) = Cut::of(DTYPES[dtype], tile * 64) else { return Ok(()) };
            for (head, (form, count)) in body.as_chunks_mut::<4>().0.iter_mut().zip(forms) {
                *head = (form << 30 | count).to_le_bytes();
            }
            let mut weight = vec![7; len];
            let before = digest::sum(0, &weight);
            if let Ok(sum) = exchange(cut, &mut weight, &mut body) {
                prop_assert_eq!(before.wrapping_add(sum), digest::sum(0, &weight));
            }
        }
    }

    #[test]
    fn tiles_are_what_granules_consist_of() {
        for (granule, tile) in [
            (1, TILE),
            (128, TILE),
            (128 * 4096, TILE),
            (128 * 896, 128 * 896 / 2),
            (128 * 130, 128 * 130),
            (128 * 3584, TILE),
            (7, TILE),
        ] {
            assert_eq!(Cut::at(DType::U8, granule).tile(), tile, "granule {granule}");
        }
        let refused = [0, 63, 65, (TILE + 64) as u32];
        assert!(refused.into_iter().all(|tile| Cut::of(DType::U8, tile).is_none()));
    }

    #[test]
    fn few_changes_are_few_bytes() {
        let old = vec![0_u8; 4 * TILE];
        let mut new = old.clone();
        (0..old.len()).step_by(1000).for_each(|at| new[at] = 1);
        let count = old.len().div_ceil(1000);
        let body = |dtype| changes(Cut::at(dtype, 1), &old, &new, 1).0.len();
        assert_eq!(body(DType::U8), 4 * 4 + count * 3);
        assert_eq!(body(DType::BF16), 4 * 4 + count * 4);
    }
}

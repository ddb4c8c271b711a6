//! What changed in weights since a version: the format, and memory in which copies of a version lie, where changes are found and applied.
//!
//! A weight's bytes, as they travel, are cut into *tiles* of equal size, at most [`TILE`] bytes. Changes are counted in *units*: elements
//! of 1, 2, 4 or 8 bytes. The changes of a weight are a *word* for each tile, and the *values* that these words announce, in the order of
//! the tiles:
//!
//! | the upper two bits | the tile has | its values |
//! |---|---|---|
//! | 0 | not changed | none |
//! | 1 | *n* changed units, *n* the lower 30 bits | their positions in the tile, ascending, two bytes each; their new bytes |
//! | 2 | *n* changed units | a bit for each unit of the tile, set where it changed; their new bytes |
//! | 3 | changed nearly everywhere | all of its bytes |
//!
//! All numbers are little-endian. Values are absolute: the new ones, never differences. A tile has the shortest of these forms. If two are
//! as short, it has the one that is first in the table. So the CPU and a device find the same changes, byte for byte.
//!
//! Changes are applied by exchanging values: afterwards the weight has the new values and the changes have the old ones. Exchanging once
//! more takes the changes back.

use std::any::Any;
use std::fmt;

use crate::memory::Pool;
use crate::{DType, Result, Storage, Weight, digest};

/// The most bytes of a tile: a position in it fits in two bytes, whatever the unit.
pub const TILE: usize = 1 << 16;

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
pub struct Cut {
    /// Bytes of an element that changes as a whole: 1, 2, 4 or 8.
    unit: usize,
    /// Bytes of a tile.
    tile: usize,
}

impl Cut {
    /// Chooses tiles of which a granule is a multiple, if possible.
    pub fn at(dtype: DType, granule: u64) -> Self {
        let granule = usize::try_from(granule).unwrap_or(usize::MAX).max(1);
        let fits = |tile: &usize| tile.is_multiple_of(ROW) && granule.is_multiple_of(*tile);
        let least = granule.div_ceil(TILE);
        let divided = || (least..least.saturating_add(64)).map(|n| granule / n).find(fits);
        let tile = if TILE.is_multiple_of(granule) { None } else { divided() };
        Self { unit: unit(dtype), tile: tile.unwrap_or(TILE) }
    }

    /// The cut of a tile size from a peer; `None` if the size is not valid.
    pub fn of(dtype: DType, tile: u32) -> Option<Self> {
        let tile = usize::try_from(tile).ok()?;
        let is_one = tile != 0 && tile <= TILE && tile.is_multiple_of(ROW);
        is_one.then_some(Self { unit: unit(dtype), tile })
    }

    /// Bytes of a tile.
    pub fn tile(self) -> usize {
        self.tile
    }

    /// At most so many bytes that are encoded at a time, if that is enough: whole tiles, and whole granules if these consist of tiles.
    pub fn step(self, granule: u64, most: usize) -> usize {
        let granule = usize::try_from(granule).unwrap_or(usize::MAX);
        let whole = if granule.is_multiple_of(self.tile) { granule } else { self.tile };
        whole.max(most / whole * whole)
    }

    /// Bytes of a unit: 1, 2, 4 or 8.
    pub fn unit(self) -> usize {
        self.unit
    }

    /// The number of tiles of a weight of `len` bytes.
    pub fn tiles(self, len: u64) -> u64 {
        len.div_ceil(self.tile as u64)
    }

    /// The bytes of values that a word announces for a tile of `len` bytes: of places, and of units.
    fn announced(self, word: u32, len: usize) -> (usize, usize) {
        let count = (word & COUNT) as usize;
        match word >> 30 {
            SAME => (0, 0),
            POSITIONS => (count * 2, count * self.unit),
            BITMAP => ((len / self.unit).div_ceil(8), count * self.unit),
            _ => (0, len),
        }
    }

    /// Where the values of each tile of a weight of `len` bytes begin among those of the weight, and where the last ones end. `None` if
    /// there is not a word for each tile.
    pub fn places(self, len: u64, words: &[u32]) -> Option<Vec<u64>> {
        if words.len() as u64 != self.tiles(len) {
            return None;
        }
        let (mut places, mut at, mut left) = (Vec::with_capacity(words.len() + 1), 0, len);
        for word in words {
            places.push(at);
            let tile = left.min(self.tile as u64);
            let (own, values) = self.announced(*word, tile as usize);
            (at, left) = (at + (own + values) as u64, left - tile);
        }
        places.push(at);
        Some(places)
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

/// Changes of consecutive tiles of a weight, found by the CPU.
#[derive(Debug, Default)]
pub struct Changes {
    /// The word of each tile.
    pub words: Vec<u32>,
    /// The values of all tiles.
    pub values: Vec<u8>,
    /// Units that changed.
    pub units: u64,
    /// The wrapping change of the weight's digest sum.
    pub sum: u64,
    positions: Vec<u16>,
    found: Vec<u8>,
}

impl Changes {
    /// Compares the old and new bytes of a weight from `offset` on, and records what changed.
    ///
    /// # Contract
    ///
    /// A tile begins at `offset`. The compared range ends where a tile or the weight ends. `old` and `new` have the same length.
    pub fn compare(&mut self, cut: Cut, offset: usize, old: &[u8], new: &[u8]) {
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
        self.words.push(form << 30 | positions as u32);
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
pub fn exchange(
    cut: Cut,
    weight: &mut [u8],
    words: &[u32],
    mut values: &mut [u8],
) -> std::result::Result<u64, String> {
    let tiles = weight.len().div_ceil(cut.tile);
    if words.len() != tiles {
        return Err(format!("{} words for {tiles} tiles", words.len()));
    }
    let mut sum = 0_u64;
    for (index, (tile, word)) in weight.chunks_mut(cut.tile).zip(words).enumerate() {
        let form = word >> 30;
        let (places, len) = cut.announced(*word, tile.len());
        let Some((own, rest)) = values.split_at_mut_checked(places + len) else {
            return Err(format!("the changes end within tile {index} of {tiles}"));
        };
        values = rest;
        let (places, own) = own.split_at_mut(places);
        let offset = (index * cut.tile) as u64;
        let changed = match (form, cut.unit) {
            (SAME, _) => Some(0),
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

/// The copy of a weight as it travelled, in a kind of memory.
pub trait ShadowBytes: Any + fmt::Debug + Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, shared. They never change: what writes to the copy while a view lives writes to another place.
    fn view(&self) -> Storage;
}

/// A kind of memory in which the copy of a version (its *shadow*) lies, and in which changes are found and applied.
///
/// Every method takes many weights at once, of which each is given once. The copies are those that the same value has allocated; others are
/// an error of the kind `State`. All methods block.
pub trait ShadowMemory: fmt::Debug + Send + Sync {
    /// Bytes of weights that are best compared at a time.
    fn batch(&self) -> u64;

    /// Memory for weights of these lengths in bytes, with any contents.
    ///
    /// # Errors
    ///
    /// `Resource` if there is not so much.
    fn allocate(&self, lens: &[u64]) -> Result<Vec<Box<dyn ShadowBytes>>>;

    /// Encodes weights into copies of their lengths. Returns the digest sum of each.
    ///
    /// # Errors
    ///
    /// Those of the encodings, and of the device.
    fn encode(
        &self,
        weights: &[Weight],
        to: &mut [Box<dyn ShadowBytes>],
        pool: &Pool,
    ) -> Result<Vec<u64>>;

    /// Writes parts of weights. Several may be of one.
    ///
    /// # Errors
    ///
    /// `Protocol` for a part outside its weight; those of the device.
    fn write(
        &self,
        to: &mut [Box<dyn ShadowBytes>],
        parts: &[ShadowPart],
        pool: &Pool,
    ) -> Result<()>;

    /// The digest sum of each copy, computed from memory.
    ///
    /// # Errors
    ///
    /// Those of the device.
    fn sums(&self, of: &[&dyn ShadowBytes], pool: &Pool) -> Result<Vec<u64>>;

    /// Compares weights, as they would travel now, with their copies.
    ///
    /// # Errors
    ///
    /// Those of the encodings, and of the device; `Resource` if there is no memory for the values.
    fn compare(&self, weights: &[(&Weight, &dyn ShadowBytes)], pool: &Pool) -> Result<Compared>;

    /// Exchanges the values of copies and of their changes. `values` has those of all of them, in order. The old ones are returned if they
    /// are `wanted`.
    ///
    /// # Errors
    ///
    /// `Protocol` if these are not changes of such weights. It names the weight if one is at fault. `Resource` if a copy is viewed and
    /// there is no memory for another. Those of the device. The contents of all copies are undefined then.
    fn apply(
        &self,
        due: &mut [Due<'_>],
        values: &Storage,
        wanted: bool,
        pool: &Pool,
    ) -> Result<Applied>;
}

/// A part of a weight that is written to its copy.
#[derive(Clone, Debug)]
pub struct ShadowPart {
    /// The index of the copy.
    pub of: usize,
    /// Where the part begins in the weight, in bytes.
    pub start: u64,
    /// Its bytes.
    pub bytes: Storage,
}

/// The changes of some weights.
#[derive(Debug)]
pub struct Compared {
    /// Of each weight.
    pub weights: Vec<Difference>,
    /// The values of all of them, in order.
    pub values: Storage,
}

/// The changes of a weight, without their values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// How the weight is cut.
    pub cut: Cut,
    /// The word of each tile; none if nothing changed.
    pub words: Vec<u32>,
    /// Bytes of its values.
    pub len: u64,
    /// Units that changed.
    pub units: u64,
    /// The wrapping change of the weight's digest sum.
    pub sum: u64,
}

/// Changes that a copy gets.
#[derive(Debug)]
pub struct Due<'a> {
    /// The weight's name, for errors.
    pub name: &'a str,
    /// The copy.
    pub to: &'a mut Box<dyn ShadowBytes>,
    /// How the weight is cut.
    pub cut: Cut,
    /// The word of each tile; none if nothing changed.
    pub words: &'a [u32],
}

impl Difference {
    /// Adds the changes of the next part of the weight.
    pub fn extend(&mut self, next: Self) {
        self.words.extend(next.words);
        self.len += next.len;
        self.units += next.units;
        self.sum = self.sum.wrapping_add(next.sum);
    }

    /// The same, when all parts were added: without words if nothing changed.
    #[must_use]
    pub fn without_words_of_nothing(mut self) -> Self {
        if self.units == 0 {
            self.words.clear();
        }
        self
    }
}

/// What applying changes gives.
#[derive(Debug)]
pub struct Applied {
    /// The wrapping change of each weight's digest sum.
    pub sums: Vec<u64>,
    /// The old values, if they were wanted: with them the same words take the changes back.
    pub undo: Option<Storage>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DTYPES: [DType; 4] = [DType::U8, DType::BF16, DType::F32, DType::F64];

    fn changes(cut: Cut, old: &[u8], new: &[u8], step: usize) -> Changes {
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
        parts.into_iter().fold(Changes::default(), |mut all, part| {
            all.words.extend(part.words);
            all.values.extend(part.values);
            all.units += part.units;
            all.sum = all.sum.wrapping_add(part.sum);
            all
        })
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
            let found = changes(cut, &old, &new, step);
            let differ = old.chunks(cut.unit).zip(new.chunks(cut.unit)).filter(|(a, b)| a != b);
            prop_assert_eq!(found.units, differ.count() as u64);
            prop_assert_eq!(found.sum, digest::sum(0, &new).wrapping_sub(digest::sum(0, &old)));
            prop_assert!(found.values.len() <= len);
            prop_assert_eq!(found.values.is_empty(), old == new);
            let places = cut.places(len as u64, &found.words).expect("a word for each tile");
            prop_assert_eq!(places.last(), Some(&(found.values.len() as u64)));
            let (mut weight, mut values) = (old.clone(), found.values.clone());
            let words = &found.words;
            prop_assert_eq!(exchange(cut, &mut weight, words, &mut values), Ok(found.sum));
            prop_assert!(weight == new);
            let back = 0_u64.wrapping_sub(found.sum);
            prop_assert_eq!(exchange(cut, &mut weight, words, &mut values), Ok(back));
            prop_assert!(weight == old && values == found.values);
        }

        #[test]
        fn what_comes_from_outside_is_applied_or_refused_but_never_a_panic(
            dtype in 0..4_usize, tile in 0..5_u32, len in 0..2000_usize,
            mut values in proptest::collection::vec(any::<u8>(), 0..600),
            forms in proptest::collection::vec((0..4_u32, 0..40_u32), 0..30),
        ) {
            let Some(cut) = Cut::of(DTYPES[dtype], tile * 64) else { return Ok(()) };
            let words = forms.iter().map(|(form, count)| form << 30 | count).cycle();
            let words: Vec<u32> = words.take(cut.tiles(len as u64) as usize).collect();
            if let Some(places) = cut.places(len as u64, &words) {
                values.resize(*places.last().expect("an end") as usize, 1);
            }
            let mut weight = vec![7; len];
            let before = digest::sum(0, &weight);
            if let Ok(sum) = exchange(cut, &mut weight, &words, &mut values) {
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
        let values = |dtype| changes(Cut::at(dtype, 1), &old, &new, 1).values.len();
        assert_eq!(values(DType::U8), count * 3);
        assert_eq!(values(DType::BF16), count * 4);
    }
}

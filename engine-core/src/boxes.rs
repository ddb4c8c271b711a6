//! Boxes: the part of a tensor that a rank holds or wants.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result, TensorMeta};

/// A part of a tensor: in each dimension a range of indices of the full shape, slowest dimension first.
///
/// A scalar has no dimensions, and one box: the whole. `Display` prints `[0..8, 128..256]`.
///
/// # Examples
///
/// ```
/// use engine_core::TensorBox;
///
/// let upper = TensorBox::new(&[0, 0], &[4, 6])?;
/// let right = TensorBox::new(&[0, 3], &[8, 3])?;
/// assert_eq!(upper.intersection(&right), Some(TensorBox::new(&[0, 3], &[4, 3])?));
/// assert_eq!(TensorBox::whole(&[8, 6]).elements(), 48);
/// # Ok::<(), engine_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "Vec<(u64, u64)>", try_from = "Vec<(u64, u64)>")]
pub struct TensorBox(Box<[Range<u64>]>);

impl TensorBox {
    /// A box that begins at `offset` and has `extent` elements in each dimension.
    ///
    /// # Errors
    ///
    /// `Weight` if the numbers of dimensions differ or are more than
    /// [`MAX_DIMENSIONS`](TensorMeta::MAX_DIMENSIONS), or if an end or the number of elements does not fit 64 bits.
    pub fn new(offset: &[u64], extent: &[u64]) -> Result<Self> {
        if offset.len() != extent.len() {
            return Err(invalid(format!("offset {offset:?} and extent {extent:?}")));
        }
        let sides = offset.iter().zip(extent).map(|(&start, &len)| (start, len));
        Self::try_from(sides.collect::<Vec<_>>())
    }

    /// The whole of a tensor.
    pub fn whole(shape: &[u64]) -> Self {
        Self(shape.iter().map(|&extent| 0..extent).collect())
    }

    /// The range of indices in each dimension.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.0
    }

    /// The number of dimensions.
    pub fn dimensions(&self) -> usize {
        self.0.len()
    }

    /// The number of elements; 1 for a scalar.
    pub fn elements(&self) -> u64 {
        // Where a box is made its product was checked to fit, or it lies within one that does.
        self.0.iter().map(|range| range.end - range.start).product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.0.iter().any(Range::is_empty)
    }

    /// Whether it lies within a tensor of a shape, and has as many dimensions.
    pub fn fits(&self, shape: &[u64]) -> bool {
        self.0.len() == shape.len() && self.0.iter().zip(shape).all(|(range, &n)| range.end <= n)
    }

    /// Whether it is the whole of a tensor of a shape.
    pub fn is_whole(&self, shape: &[u64]) -> bool {
        self.0.len() == shape.len() && self.0.iter().zip(shape).all(|(range, &n)| *range == (0..n))
    }

    /// Whether all elements of another box are in this one.
    pub fn contains(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|(a, b)| a.start <= b.start && b.end <= a.end)
    }

    /// Whether the boxes have an element in common.
    pub fn intersects(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|(a, b)| a.start.max(b.start) < a.end.min(b.end))
    }

    /// The elements that both boxes have, unless there are none.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        self.intersects(other).then(|| {
            let common =
                |(a, b): (&Range<u64>, &Range<u64>)| a.start.max(b.start)..a.end.min(b.end);
            Self(self.0.iter().zip(&other.0).map(common).collect())
        })
    }

    /// The elements that another box does not have, as disjoint boxes, at most two for each dimension.
    pub fn without(&self, other: &Self) -> Vec<Self> {
        let Some(common) = self.intersection(other) else {
            return if self.is_empty() { Vec::new() } else { vec![self.clone()] };
        };
        let mut rest = self.clone();
        let mut pieces = Vec::new();
        for (side, cut) in common.0.iter().enumerate() {
            for outside in [rest.0[side].start..cut.start, cut.end..rest.0[side].end] {
                if !outside.is_empty() {
                    pieces.push(rest.narrowed(side, outside));
                }
            }
            rest.0[side] = cut.clone();
        }
        pieces
    }

    /// The elements whose index in one dimension is in a range.
    ///
    /// # Panics
    ///
    /// If it has no such dimension.
    #[must_use]
    pub fn narrowed(&self, dimension: usize, range: Range<u64>) -> Self {
        let mut other = self.clone();
        let own = &mut other.0[dimension];
        let start = range.start.clamp(own.start, own.end);
        *own = start..range.end.clamp(start, own.end);
        other
    }

    /// The box in units of `granule` elements in each dimension: those that it has an element of. `granule` is
    /// that of the last dimensions; before them units are single elements.
    pub fn in_granules(&self, granule: &[u64]) -> Self {
        let dimensions = self.0.len();
        let units = self.0.iter().enumerate().map(|(dimension, range)| {
            let unit = granule.len().checked_sub(dimensions - dimension);
            let unit = unit.map_or(1, |at| granule[at].max(1));
            if range.is_empty() { 0..0 } else { range.start / unit..range.end.div_ceil(unit) }
        });
        Self(units.collect())
    }

    /// The smallest box of whole granules around it, as far as a tensor of a shape has them. For granules see
    /// [`in_granules`](Self::in_granules).
    #[must_use]
    pub fn to_granules(&self, granule: &[u64], shape: &[u64]) -> Self {
        let mut around = self.clone();
        for (unit, (range, &n)) in
            granule.iter().rev().zip(around.0.iter_mut().zip(shape).rev()).filter(|(u, _)| **u > 1)
        {
            if !range.is_empty() {
                let end = range.end.checked_next_multiple_of(*unit).unwrap_or(n);
                *range = range.start / unit * unit..end.min(n).max(range.end);
            }
        }
        around
    }

    /// Runs of elements that are neighbours in the row-major full tensor: how many writes it takes to put the
    /// box there.
    pub fn runs(&self, shape: &[u64]) -> u64 {
        if self.is_empty() {
            return 0;
        }
        let mut runs = 1;
        let mut whole = true;
        for (range, &n) in self.0.iter().zip(shape).rev() {
            if !whole {
                runs *= range.end - range.start;
            }
            whole &= range.start == 0 && range.end == n;
        }
        runs
    }
}

impl From<TensorBox> for Vec<(u64, u64)> {
    /// Offset and extent of each dimension.
    fn from(value: TensorBox) -> Self {
        value.0.iter().map(|range| (range.start, range.end - range.start)).collect()
    }
}

impl TryFrom<Vec<(u64, u64)>> for TensorBox {
    type Error = Error;

    /// A box of the offset and the extent of each dimension.
    fn try_from(sides: Vec<(u64, u64)>) -> Result<Self> {
        let overflows = || invalid(format!("{sides:?} does not fit 64 bits"));
        if sides.len() > TensorMeta::MAX_DIMENSIONS {
            return Err(invalid(format!("{} dimensions", sides.len())));
        }
        let ranges = sides.iter().map(|&(start, len)| Some(start..start.checked_add(len)?));
        let ranges = ranges.collect::<Option<_>>().ok_or_else(overflows)?;
        let mut extents = sides.iter().map(|&(_, len)| len);
        extents.try_fold(1_u64, u64::checked_mul).ok_or_else(overflows)?;
        Ok(Self(ranges))
    }
}

impl fmt::Display for TensorBox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0).finish()
    }
}

impl fmt::Debug for TensorBox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::Weight, "making a box", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: [u64; 3] = [5, 4, 6];

    fn boxes() -> impl Strategy<Value = TensorBox> {
        let side = |n: u64| (0..=n).prop_flat_map(move |start| (Just(start), 0..=n - start));
        (side(SHAPE[0]), side(SHAPE[1]), side(SHAPE[2]))
            .prop_map(|(a, b, c)| TensorBox::new(&[a.0, b.0, c.0], &[a.1, b.1, c.1]).unwrap())
    }

    /// The positions of a box's elements in the row-major tensor.
    fn elements(part: &TensorBox) -> Vec<u64> {
        let [x, y, z] = part.ranges() else { panic!("three dimensions") };
        let mut all = Vec::new();
        for i in x.clone() {
            for j in y.clone() {
                all.extend(z.clone().map(|k| (i * SHAPE[1] + j) * SHAPE[2] + k));
            }
        }
        all
    }

    proptest! {
        #[test]
        fn what_boxes_have_in_common_and_what_not_is_what_their_elements_say(
            (one, other) in (boxes(), boxes()),
        ) {
            let (of_one, of_other) = (elements(&one), elements(&other));
            prop_assert_eq!(one.elements(), of_one.len() as u64);
            prop_assert!(one.fits(&SHAPE));
            let common: Vec<u64> =
                of_one.iter().copied().filter(|at| of_other.contains(at)).collect();
            let found = one.intersection(&other);
            prop_assert_eq!(found.as_ref().map(elements).unwrap_or_default(), common.clone());
            prop_assert_eq!(one.intersects(&other), !common.is_empty());
            if !other.is_empty() {
                prop_assert_eq!(one.contains(&other), common.len() == of_other.len());
            }
            let rest = one.without(&other);
            let mut covered: Vec<u64> = rest.iter().flat_map(elements).collect();
            prop_assert_eq!(covered.len() + common.len(), of_one.len());
            covered.extend(&common);
            covered.sort_unstable();
            prop_assert_eq!(covered, of_one);
        }

        #[test]
        fn a_box_has_as_many_runs_as_its_elements_have_gaps_and_touches_the_granules_of_its_elements(
            part in boxes(), granule in [1_u64..4, 1..4],
        ) {
            let all = elements(&part);
            let gaps = all.windows(2).filter(|pair| pair[1] != pair[0] + 1).count() as u64;
            prop_assert_eq!(part.runs(&SHAPE), gaps + u64::from(!all.is_empty()));
            let mut touched: Vec<_> = all
                .iter()
                .map(|at| (at / 24, at / 6 % 4 / granule[0], at % 6 / granule[1]))
                .collect();
            touched.sort_unstable();
            touched.dedup();
            let granules = part.in_granules(&granule);
            prop_assert_eq!(granules.elements(), touched.len() as u64);
            let around = part.to_granules(&granule, &SHAPE);
            prop_assert!(around.contains(&part) && around.fits(&SHAPE));
            prop_assert_eq!(around.in_granules(&granule), granules);
            prop_assert_eq!(around.to_granules(&granule, &SHAPE), around);
        }

        #[test]
        fn any_sides_are_a_box_or_an_error(
            sides in prop::collection::vec((any::<u64>(), prop_oneof![0_u64..4, any::<u64>()]), 0..40),
        ) {
            if let Ok(part) = TensorBox::try_from(sides.clone()) {
                let product = sides.iter().fold(1_u128, |all, side| all.saturating_mul(side.1.into()));
                prop_assert_eq!(u128::from(part.elements()), product);
                prop_assert_eq!(Vec::from(part), sides);
            }
        }

        #[test]
        fn a_box_survives_its_way_to_another_rank(part in boxes()) {
            let text = serde_json::to_string(&part).unwrap();
            prop_assert_eq!(serde_json::from_str::<TensorBox>(&text).unwrap(), part);
        }
    }

    #[test]
    fn whole_rows_are_one_run_and_columns_one_for_each_row() {
        let part = |offset: [u64; 2], extent: [u64; 2]| TensorBox::new(&offset, &extent).unwrap();
        assert_eq!(part([2, 0], [3, 8]).runs(&[8, 8]), 1);
        assert_eq!(part([2, 4], [3, 4]).runs(&[8, 8]), 3);
        assert_eq!(TensorBox::whole(&[]).runs(&[]), 1);
        assert_eq!(TensorBox::whole(&[]).elements(), 1);
    }

    #[test]
    fn boxes_from_outside_that_overflow_are_refused() {
        for text in ["[[18446744073709551615,1]]", "[[0,4294967296],[0,4294967296]]"] {
            assert!(serde_json::from_str::<TensorBox>(text).is_err(), "{text}");
        }
        assert!(TensorBox::new(&[0], &[1, 1]).is_err());
        assert!(TensorBox::new(&[0; 33], &[1; 33]).is_err());
    }
}

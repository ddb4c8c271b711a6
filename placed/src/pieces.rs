//! Boxes as bytes: where the elements of a region are in the memory of a box around it, and how work on a region is
//! divided. Only arithmetic.

use engine_core::{TensorBox, digest};
use quant_fp8::{Fp8Format, StridedBlocks, StridedPart, Strides};

/// The approximate bytes of a tile. It is small enough that an encoded tile is still in a core's cache when it is copied
/// and digested.
const TILE: u64 = 256 << 10;

/// The runs of a region: elements that are neighbours in every row-major box around the region.
///
/// The length of a run depends only on the region and the full shape, so sender and receiver have the same runs.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    /// The elements of a run.
    pub(crate) len: u64,
    /// For each dimension outside of a run: its extent in the region, and its stride in memory.
    outer: Vec<(u64, u64)>,
    first: u64,
    count: u64,
}

impl Runs {
    /// The runs of `region` in the memory of `around`, a box that contains it.
    pub(crate) fn new(region: &TensorBox, around: &TensorBox, shape: &[u64]) -> Self {
        debug_assert!(around.contains(region) || region.is_empty());
        let ranges = region.ranges();
        let extent = |at: usize| ranges[at].end - ranges[at].start;
        // A run covers the last dimensions that are complete, and the one before them.
        let mut inner = ranges.len().saturating_sub(1);
        while inner > 0 && ranges[inner] == (0..shape[inner]) {
            inner -= 1;
        }
        let len = (inner..ranges.len()).map(extent).product();
        let (mut stride, mut first) = (1, 0);
        let mut outer = Vec::with_capacity(inner);
        for at in (0..ranges.len()).rev() {
            let own = &around.ranges()[at];
            first += (ranges[at].start - own.start) * stride;
            if at < inner {
                outer.push((extent(at), stride));
            }
            stride *= own.end - own.start;
        }
        outer.reverse();
        let count = if region.is_empty() { 0 } else { outer.iter().map(|(n, _)| n).product() };
        Self { len, outer, first, count }
    }

    /// Where each run begins, in elements.
    pub(crate) fn starts(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.count).map(|mut number| {
            let mut at = self.first;
            for (n, stride) in self.outer.iter().rev() {
                at += number % n * stride;
                number /= n;
            }
            at
        })
    }

    /// The number of runs.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }
}

/// The digest sum of what is written to a rollout's memory. It depends on the bytes and on their places.
///
/// The unit is a *row*: one of the region's last dimension, cut where blocks begin. A row counts as the words of the lent
/// memory that it touches, with zeros for bytes outside of the row. So the sum depends neither on the tiles that a
/// trainer writes nor on those that a rollout reads. Each scale counts by itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds whole rows of `row` bytes each, which follow one another in memory from `at` on. Each is cut after the first
    /// `cut.0` bytes and then after every `cut.1`.
    pub(crate) fn add(&mut self, at: u64, rows: &[u8], row: u64, cut: (u64, u64)) {
        let cut = if row <= cut.0 { (row, row) } else { cut };
        let is_cut = cut.0 < row;
        let is_one = rows.len() as u64 == row;
        let whole = |number: u64| number.is_multiple_of(8);
        if (is_one || whole(at) && whole(row)) && (!is_cut || whole(at + cut.0) && whole(cut.1)) {
            self.0 = self.0.wrapping_add(digest::sum_anywhere(at, rows));
            return;
        }
        for (number, bytes) in (0..).zip(rows.chunks(row.max(1) as usize)) {
            let (mut at, mut left, mut len) = (at + number * row, bytes, cut.0);
            while !left.is_empty() {
                let (now, later) = left.split_at(left.len().min(len.max(1) as usize));
                self.0 = self.0.wrapping_add(digest::sum_anywhere(at, now));
                (at, left, len) = (at + now.len() as u64, later, cut.1);
            }
        }
    }

    /// Adds scales that follow one another in memory from `at` on.
    pub(crate) fn add_scales(&mut self, at: u64, scales: &[u8]) {
        for (number, scale) in (0..).zip(scales.chunks(4)) {
            self.0 = self.0.wrapping_add(digest::sum_anywhere(at + number * 4, scale));
        }
    }

    pub(crate) fn value(self) -> u64 {
        self.0
    }
}

/// Where a tile's rows are cut: the bytes before the first cut, and between further cuts.
pub(crate) fn cut_of(tile: &TensorBox, granule: &[u64], size: u64) -> (u64, u64) {
    match (tile.ranges().last(), granule.last()) {
        (Some(range), Some(&side)) if side > 0 => ((side - range.start % side) * size, side * size),
        // No cut: no row of a tile is longer than this.
        _ => (TILE, TILE),
    }
}

/// The bytes of a row of a region.
pub(crate) fn row_of(region: &TensorBox, size: u64) -> u64 {
    region.ranges().last().map_or(1, |range| range.end - range.start) * size
}

/// A row-major box in memory, and where it begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) at: u64,
    pub(crate) around: &'a TensorBox,
    /// The bytes of an element.
    pub(crate) element: u64,
}

impl Place<'_> {
    /// Where a region's first element is, and the stride of each dimension.
    fn strides(&self, region: &TensorBox) -> (u64, Vec<u64>) {
        let (mut at, mut stride) = (self.at, self.element);
        let mut strides = vec![0; region.dimensions()];
        for (dimension, (range, own)) in
            region.ranges().iter().zip(self.around.ranges()).enumerate().rev()
        {
            at += (range.start - own.start) * stride;
            strides[dimension] = stride;
            stride *= own.end - own.start;
        }
        (at, strides)
    }
}

/// The copy of a region from one place to another, in as few parts as possible.
pub(crate) fn copied(region: &TensorBox, from: Place<'_>, to: Place<'_>) -> Vec<StridedPart> {
    let ((from_at, from_strides), (to_at, to_strides)) = (from.strides(region), to.strides(region));
    let extents = region.ranges().iter().map(|range| range.end - range.start);
    // The extent and both strides of each dimension, the last one first. Dimensions that are contiguous in both places are
    // merged.
    let mut dimensions: Vec<[u64; 3]> = Vec::new();
    let all = extents.zip(from_strides.iter().zip(&to_strides)).rev();
    for (number, (extent, (&from_stride, &to_stride))) in all.enumerate() {
        let row = dimensions.first().map_or(0, |[extent, _, _]| extent * to.element);
        let is_row = dimensions.len() == 1;
        // Rows are merged only if each begins at a word of the digest.
        let may_merge = !is_row || [row, to_at].iter().all(|bytes| bytes.is_multiple_of(8));
        match dimensions.last_mut() {
            Some(_) if extent == 1 && number > 0 => {}
            Some([inner, from_inner, to_inner])
                if may_merge
                    && from_stride == *inner * *from_inner
                    && to_stride == *inner * *to_inner =>
            {
                *inner *= extent;
            }
            _ => dimensions.push([extent, from_stride, to_stride]),
        }
    }
    if dimensions.is_empty() {
        dimensions.push([1, from.element, to.element]);
    }
    let dimension = |at: usize| dimensions.get(at).copied().unwrap_or([1, 0, 0]);
    let ([cols, ..], [rows, from_row, to_row], [matrices, from_matrix, to_matrix]) =
        (dimension(0), dimension(1), dimension(2));
    let outer = dimensions.get(3..).unwrap_or_default();
    let count: u64 = outer.iter().map(|[extent, ..]| extent).product();
    let part = |mut number: u64| {
        let (mut from_at, mut to_at) = (from_at, to_at);
        for [extent, from_stride, to_stride] in outer {
            from_at += number % extent * from_stride;
            to_at += number % extent * to_stride;
            number /= extent;
        }
        StridedPart {
            from: Strides { at: from_at, matrix: from_matrix, row: from_row },
            to: Strides { at: to_at, matrix: to_matrix, row: to_row },
            extent: [matrices, rows, cols],
            element: from.element,
            blocks: None,
        }
    };
    (0..count).map(part).collect()
}

/// The quantisation of a region of a matrix, or of a stack of matrices, from one place to another, with its scales to a
/// third.
pub(crate) fn quantized(
    region: &TensorBox,
    from: Place<'_>,
    to: Place<'_>,
    scales_at: u64,
    granule: &[u64],
    format: Fp8Format,
) -> StridedPart {
    let three = |numbers: &[u64], default: u64| {
        let mut all = [default; 3];
        let skip = 3_usize.saturating_sub(numbers.len());
        for (to, from) in all[skip..].iter_mut().zip(numbers) {
            *to = *from;
        }
        all
    };
    let ((from_at, from_strides), (to_at, to_strides)) = (from.strides(region), to.strides(region));
    let (from_strides, to_strides) = (three(&from_strides, 0), three(&to_strides, 0));
    let extents: Vec<u64> = region.ranges().iter().map(|range| range.end - range.start).collect();
    let (blocks, lent) = (region.in_granules(granule), to.around.in_granules(granule));
    let scales = Place { at: scales_at, around: &lent, element: 4 };
    let (scales_at, scales_strides) = scales.strides(&blocks);
    let scales_strides = three(&scales_strides, 0);
    let starts = |part: &TensorBox| {
        let starts: Vec<u64> = part.ranges().iter().map(|range| range.start).collect();
        three(&starts, 0)
    };
    let (first, block, own) =
        (starts(region), starts(&blocks), starts(&scales_of(region, to.around, granule)));
    let sides = three(granule, 1);
    StridedPart {
        from: Strides { at: from_at, matrix: from_strides[0], row: from_strides[1] },
        to: Strides { at: to_at, matrix: to_strides[0], row: to_strides[1] },
        extent: three(&extents, 1),
        element: from.element,
        blocks: Some(StridedBlocks {
            format,
            sides: [sides[1], sides[2]],
            first: [1, 2].map(|at| sides[at] - first[at] % sides[at]),
            block,
            scales: Strides { at: scales_at, matrix: scales_strides[0], row: scales_strides[1] },
            skips: [1, 2].map(|at| own[at] > block[at]),
        }),
    }
}

fn granule_of(granule: &[u64], dimensions: usize, at: usize) -> u64 {
    let side = (at + granule.len()).checked_sub(dimensions).map(|at| granule[at]);
    side.unwrap_or(1).max(1)
}

/// Divides a region, at multiples of a granule, into parts of about [`TILE`] bytes. Sender and receiver get the same
/// parts.
pub(crate) fn tiles(region: &TensorBox, granule: &[u64], bytes_each: u64) -> Vec<TensorBox> {
    let mut parts = Vec::new();
    if !region.is_empty() {
        divide(region, granule, bytes_each, 0, &mut parts);
    }
    parts
}

fn divide(part: &TensorBox, granule: &[u64], each: u64, at: usize, parts: &mut Vec<TensorBox>) {
    let ranges = part.ranges();
    let bytes = part.elements().saturating_mul(each);
    if bytes <= TILE || at == ranges.len() {
        parts.push(part.clone());
        return;
    }
    let range = &ranges[at];
    let unit = granule_of(granule, ranges.len(), at);
    let unit_bytes = (bytes / (range.end - range.start)).saturating_mul(unit).max(1);
    let units = (TILE / unit_bytes).max(1);
    let mut start = range.start;
    while start < range.end {
        let end = ((start / unit + units).saturating_mul(unit)).min(range.end);
        divide(&part.narrowed(at, start..end), granule, each, at + 1, parts);
        start = end;
    }
}

/// The blocks whose scales are written with a region of `wanted`: those whose first element in `wanted` is in the region.
/// So each scale is written with exactly one of the regions that make up `wanted`.
pub(crate) fn scales_of(region: &TensorBox, wanted: &TensorBox, granule: &[u64]) -> TensorBox {
    let dimensions = region.dimensions();
    let sides = region.ranges().iter().zip(wanted.ranges()).enumerate().map(|(at, (own, all))| {
        let unit = granule_of(granule, dimensions, at);
        let begins = own.start == all.start;
        let start = if begins { own.start / unit } else { own.start.div_ceil(unit) };
        (start, own.end.div_ceil(unit).saturating_sub(start))
    });
    // This cannot fail: there are no more blocks than elements, and the region fits.
    TensorBox::try_from(sides.collect::<Vec<_>>()).unwrap_or_else(|_| TensorBox::whole(&[0]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: [u64; 3] = [4, 7, 9];

    fn boxes_in(around: TensorBox) -> impl Strategy<Value = TensorBox> {
        let side = |range: std::ops::Range<u64>| {
            (range.start..range.end)
                .prop_flat_map(move |start| (Just(start), 1..=range.end - start))
        };
        let [a, b, c] = [0, 1, 2].map(|at| side(around.ranges()[at].clone()));
        (a, b, c).prop_map(|(a, b, c)| TensorBox::new(&[a.0, b.0, c.0], &[a.1, b.1, c.1]).unwrap())
    }

    fn nested() -> impl Strategy<Value = (TensorBox, TensorBox)> {
        boxes_in(TensorBox::whole(&SHAPE))
            .prop_flat_map(|around| (boxes_in(around.clone()), Just(around)))
    }

    /// Every index of a box, row-major.
    fn indices(part: &TensorBox) -> Vec<[u64; 3]> {
        let [x, y, z] = part.ranges() else { panic!("three dimensions") };
        let mut all = Vec::new();
        for i in x.clone() {
            for j in y.clone() {
                all.extend(z.clone().map(|k| [i, j, k]));
            }
        }
        all
    }

    proptest! {
        #[test]
        fn runs_are_where_a_regions_elements_are_in_the_box_around_it((region, around) in nested()) {
            let all = indices(&around);
            let places: Vec<u64> = indices(&region)
                .iter()
                .map(|at| all.iter().position(|other| other == at).unwrap() as u64)
                .collect();
            let runs = Runs::new(&region, &around, &SHAPE);
            let found: Vec<u64> =
                runs.starts().flat_map(|start| start..start + runs.len).collect();
            prop_assert_eq!(found, places);
            let elsewhere = Runs::new(&region, &TensorBox::whole(&SHAPE), &SHAPE);
            prop_assert_eq!((runs.len, runs.count()), (elsewhere.len, elsewhere.count()));
        }

        #[test]
        fn tiles_have_every_element_once_and_cut_no_block(
            (region, _) in nested(), granule in [1_u64..4, 1..4], each in prop_oneof![Just(1_u64), Just(40_000), Just(200_000)],
        ) {
            let tiles = tiles(&region, &granule, each);
            let mut found: Vec<[u64; 3]> = tiles.iter().flat_map(indices).collect();
            found.sort_unstable();
            prop_assert_eq!(found, indices(&region));
            for (at, one) in tiles.iter().enumerate() {
                for other in &tiles[at + 1..] {
                    prop_assert!(!one.in_granules(&granule).intersects(&other.in_granules(&granule)));
                }
            }
        }

        #[test]
        fn each_scale_of_what_is_wanted_comes_with_one_region_and_that_has_a_part_of_its_block(
            wanted in boxes_in(TensorBox::whole(&SHAPE)), granule in [1_u64..4, 1..4], cuts in [0_u64..4, 0..7, 0..9],
        ) {
            let mut regions = vec![wanted.clone()];
            for (at, cut) in cuts.iter().enumerate() {
                regions = regions
                    .iter()
                    .flat_map(|part| [part.narrowed(at, 0..*cut), part.narrowed(at, *cut..SHAPE[at])])
                    .filter(|part| !part.is_empty())
                    .collect();
            }
            let mut found = Vec::new();
            for region in &regions {
                let scales = scales_of(region, &wanted, &granule);
                prop_assert!(scales.is_empty() || region.in_granules(&granule).contains(&scales));
                found.extend(indices(&scales));
            }
            found.sort_unstable();
            prop_assert_eq!(found, indices(&wanted.in_granules(&granule)));
        }
    }

    /// For each row of a part: its source, its target and its bytes.
    fn rows(part: &StridedPart, written: u64) -> Vec<(u64, u64, u64)> {
        let [matrices, rows, cols] = part.extent;
        let mut all = Vec::new();
        for matrix in 0..matrices {
            for row in 0..rows {
                let at =
                    |strides: &Strides| strides.at + matrix * strides.matrix + row * strides.row;
                all.push((at(&part.from), at(&part.to), cols * written));
            }
        }
        all
    }

    /// Where each element of a region is in the memory of a box, in elements.
    fn places(region: &TensorBox, around: &TensorBox) -> Vec<u64> {
        let all = indices(around);
        let found = indices(region).into_iter().map(|at| all.iter().position(|other| *other == at));
        found.map(|place| place.unwrap() as u64).collect()
    }

    proptest! {
        #[test]
        fn parts_move_each_element_of_a_region_from_its_place_to_its_place(
            (region, held) in nested(), grow in [0_u64..3, 0..3, 0..3], at in 0_u64..20, element in prop_oneof![Just(1_u64), Just(2), Just(8)],
        ) {
            // Another box around the region.
            let sides = region.ranges().iter().zip(grow).zip(SHAPE).map(|((range, grow), side)| {
                let start = range.start.saturating_sub(grow);
                (start, (range.end + grow).min(side) - start)
            });
            let wanted = TensorBox::try_from(sides.collect::<Vec<_>>()).unwrap();
            let from = Place { at: 0, around: &held, element };
            let to = Place { at, around: &wanted, element };
            let mut expected: Vec<(u64, u64)> = places(&region, &held)
                .into_iter()
                .zip(places(&region, &wanted))
                .flat_map(|(a, b)| (0..element).map(move |byte| (a * element + byte, at + b * element + byte)))
                .collect();
            let mut moved: Vec<(u64, u64)> = copied(&region, from, to)
                .iter()
                .flat_map(|part| rows(part, element))
                .flat_map(|(from, to, len)| (0..len).map(move |byte| (from + byte, to + byte)))
                .collect();
            expected.sort_unstable();
            moved.sort_unstable();
            prop_assert_eq!(moved, expected);
        }

        #[test]
        fn a_quantised_part_has_each_code_at_its_place_and_each_scale_at_that_of_its_block(
            (region, held) in nested(), (_, wanted) in nested(), granule in [1_u64..4, 1..4],
        ) {
            let Some(region) = region.intersection(&wanted) else { return Ok(()) };
            let from = Place { at: 0, around: &held, element: 2 };
            let to = Place { at: 5, around: &wanted, element: 1 };
            let part = quantized(&region, from, to, 100, &granule, Fp8Format::default());
            let blocks = part.blocks.as_ref().unwrap();
            let moved: Vec<(u64, u64)> = rows(&part, 1)
                .into_iter()
                .flat_map(|(from, to, len)| (0..len).map(move |col| (from + 2 * col, to + col)))
                .collect();
            let expected: Vec<(u64, u64)> = places(&region, &held)
                .into_iter()
                .zip(places(&region, &wanted))
                .map(|(a, b)| (2 * a, 5 + b))
                .collect();
            prop_assert_eq!(moved, expected);
            let (of_region, lent) = (region.in_granules(&granule), wanted.in_granules(&granule));
            let [bands, columns] = blocks.counts(part.extent[1], part.extent[2]);
            let mut scales = Vec::new();
            for matrix in 0..part.extent[0] {
                for band in blocks.skips[0].into()..bands {
                    for column in blocks.skips[1].into()..columns {
                        scales.push(blocks.scales.at + matrix * blocks.scales.matrix + band * blocks.scales.row + column * 4);
                    }
                }
            }
            let own = scales_of(&region, &wanted, &granule);
            let expected: Vec<u64> = match own.is_empty() {
                true => Vec::new(),
                false => places(&own, &lent).into_iter().map(|place| 100 + place * 4).collect(),
            };
            prop_assert_eq!(scales, expected);
            prop_assert_eq!(of_region.elements(), part.extent[0] * bands * columns);
        }

        #[test]
        fn the_sum_of_a_region_is_that_of_its_rows_however_it_is_divided(
            (region, wanted) in nested(), at in 0_u64..9, size in prop_oneof![Just(1_u64), Just(2), Just(8)],
            granule in prop_oneof![Just(vec![]), [1_u64..4, 1..4].prop_map(Vec::from)], cuts in [0_u64..4, 0..7], seed: u64,
        ) {
            let memory: Vec<u8> = (0..at + wanted.elements() * size)
                .map(|at| (at.wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
                .collect();
            let sum_of = |part: &TensorBox| {
                let mut sum = Sum::default();
                let runs = Runs::new(part, &wanted, &SHAPE);
                for start in runs.starts() {
                    let place = at + start * size;
                    let run = &memory[place as usize..(place + runs.len * size) as usize];
                    sum.add(place, run, row_of(part, size), cut_of(part, &granule, size));
                }
                sum.value()
            };
            // Row by row, and within one block by block.
            let unit = granule.last().copied().unwrap_or(u64::MAX);
            let mut naive = 0_u64;
            let all = places(&region, &wanted);
            let cells: Vec<(u64, [u64; 3])> = all.into_iter().zip(indices(&region)).collect();
            for run in cells.chunk_by(|(_, a), (_, b)| a[..2] == b[..2] && a[2] / unit == b[2] / unit) {
                let place = at + run[0].0 * size;
                let bytes = &memory[place as usize..place as usize + run.len() * size as usize];
                naive = naive.wrapping_add(digest::sum_anywhere(place, bytes));
            }
            prop_assert_eq!(sum_of(&region), naive);
            let parts = [(0, cuts[0]), (1, cuts[1])].into_iter().fold(vec![region.clone()], |parts, (dimension, cut)| {
                parts
                    .iter()
                    .flat_map(|part| {
                        [part.narrowed(dimension, 0..cut), part.narrowed(dimension, cut..SHAPE[dimension])]
                    })
                    .filter(|part| !part.is_empty())
                    .collect()
            });
            let divided = parts.iter().fold(0_u64, |sum, part| sum.wrapping_add(sum_of(part)));
            prop_assert_eq!(divided, naive);
        }
    }

    #[test]
    fn a_scalar_is_one_run_and_whole_rows_are_too() {
        let scalar = Runs::new(&TensorBox::whole(&[]), &TensorBox::whole(&[]), &[]);
        assert_eq!((scalar.len, scalar.count()), (1, 1));
        let rows = TensorBox::new(&[2, 0], &[3, 8]).unwrap();
        let runs = Runs::new(&rows, &TensorBox::whole(&[8, 8]), &[8, 8]);
        assert_eq!((runs.len, runs.starts().collect::<Vec<_>>()), (24, vec![16]));
    }
}

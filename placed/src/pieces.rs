//! Boxes as bytes: where the elements of a region are in memory that has a box around it, and in which parts work on a region is
//! divided. Numbers alone.

use engine_core::{TensorBox, digest};

/// Work is divided into tiles of about so many bytes: small enough that what is made of one is still in a core's cache when it is
/// copied and digested.
const TILE: u64 = 256 << 10;

/// Runs of elements that are neighbours wherever a row-major box around a region is.
///
/// How long a run is follows from the region and the full shape alone, so that sender and receiver have the same runs.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    /// Elements of a run.
    pub(crate) len: u64,
    /// Of each dimension before those of a run: how many, and how far one is from the next in memory.
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
        // Dimensions of which all is there belong to the run, and the one before them.
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

    /// Where runs begin, in elements.
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

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }
}

/// The digest of a tile: each run begins a row of the digest's formula.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TileDigest {
    at: u64,
    sum: u64,
    bytes: u64,
}

impl TileDigest {
    pub(crate) fn add(&mut self, run: &[u8]) {
        self.sum = self.sum.wrapping_add(digest::sum(self.at, run));
        self.at += (run.len() as u64).next_multiple_of(64);
        self.bytes += run.len() as u64;
    }

    pub(crate) fn finish(self) -> u64 {
        digest::finish(self.sum, self.bytes)
    }
}

fn granule_of(granule: &[u64], dimensions: usize, at: usize) -> u64 {
    let side = (at + granule.len()).checked_sub(dimensions).map(|at| granule[at]);
    side.unwrap_or(1).max(1)
}

/// Divides a region, at multiples of a granule, into parts of about [`TILE`] bytes. Sender and receiver have the same.
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

/// The blocks whose scales come with a region of what a rollout wants: those whose first element in `wanted` is in the region. Each
/// scale so comes with exactly one of the regions that make up `wanted`.
pub(crate) fn scales_of(region: &TensorBox, wanted: &TensorBox, granule: &[u64]) -> TensorBox {
    let dimensions = region.dimensions();
    let sides = region.ranges().iter().zip(wanted.ranges()).enumerate().map(|(at, (own, all))| {
        let unit = granule_of(granule, dimensions, at);
        let begins = own.start == all.start;
        let start = if begins { own.start / unit } else { own.start.div_ceil(unit) };
        (start, own.end.div_ceil(unit).saturating_sub(start))
    });
    // Fewer blocks than elements: it fits as the region does.
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

    #[test]
    fn a_scalar_is_one_run_and_whole_rows_are_too() {
        let scalar = Runs::new(&TensorBox::whole(&[]), &TensorBox::whole(&[]), &[]);
        assert_eq!((scalar.len, scalar.count()), (1, 1));
        let rows = TensorBox::new(&[2, 0], &[3, 8]).unwrap();
        let runs = Runs::new(&rows, &TensorBox::whole(&[8, 8]), &[8, 8]);
        assert_eq!((runs.len, runs.starts().collect::<Vec<_>>()), (24, vec![16]));
    }
}

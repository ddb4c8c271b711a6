//! Finds the boxes that intersect a box, without comparing all of them.

use std::ops::Range;

use engine_core::TensorBox;

/// Boxes, sorted by where they begin along one dimension: the dimension with the most distinct starts.
#[derive(Debug)]
pub(crate) struct Boxes<'a> {
    boxes: Vec<&'a TensorBox>,
    dimension: usize,
    /// Indices in `boxes`, by where they begin.
    order: Vec<u32>,
    starts: Vec<u64>,
    /// The largest end of all boxes up to this one.
    ends: Vec<u64>,
}

impl<'a> Boxes<'a> {
    pub(crate) fn new(boxes: impl Iterator<Item = &'a TensorBox>) -> Self {
        let boxes: Vec<_> = boxes.collect();
        let dimensions = boxes.first().map_or(0, |first| first.dimensions());
        let begins = |dimension: usize| {
            let mut starts: Vec<u64> = boxes.iter().map(|b| range(b, dimension).start).collect();
            starts.sort_unstable();
            starts.dedup();
            starts.len()
        };
        let dimension = (0..dimensions).max_by_key(|&dimension| begins(dimension)).unwrap_or(0);
        let mut order: Vec<u32> = (0..).take(boxes.len()).collect();
        order.sort_by_key(|&at| range(boxes[at as usize], dimension).start);
        let along = || order.iter().map(|&at| range(boxes[at as usize], dimension));
        let starts = along().map(|range| range.start).collect();
        let ends = along().scan(0, |most, range| {
            *most = range.end.max(*most);
            Some(*most)
        });
        let ends = ends.collect();
        Self { boxes, dimension, order, starts, ends }
    }

    /// The indices of the boxes that have an element in common with `other`, by where they begin.
    pub(crate) fn meeting<'s>(&'s self, other: &'s TensorBox) -> impl Iterator<Item = usize> + 's {
        let along = range(other, self.dimension);
        let from = self.ends.partition_point(|&end| end <= along.start);
        let to = self.starts.partition_point(|&start| start < along.end);
        let order = self.order.get(from..to).unwrap_or_default().iter();
        order.map(|&at| at as usize).filter(|&at| self.boxes[at].intersects(other))
    }

    /// Two boxes that overlap, if there are any.
    pub(crate) fn overlap(&self) -> Option<(usize, usize)> {
        self.boxes.iter().enumerate().find_map(|(at, one)| {
            self.meeting(one).find(|&other| other != at).map(|other| (at.min(other), at.max(other)))
        })
    }
}

/// The range along a dimension; `0..1` for a scalar.
fn range(of: &TensorBox, dimension: usize) -> Range<u64> {
    of.ranges().get(dimension).cloned().unwrap_or(0..1)
}

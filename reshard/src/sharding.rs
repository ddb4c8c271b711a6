//! All tensors of one side, and how each is divided.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use engine_core::{Error, ErrorKind, Rank, Result, TensorBox, TensorMeta};

use crate::Layout;

/// A tensor and its layout.
#[derive(Clone, Debug)]
pub struct ShardedTensor {
    /// Name, type and full shape. A tensor travels in the type that is wanted; the type of the held tensor is ignored.
    pub meta: TensorMeta,
    /// The sides, in the last dimensions, of blocks that are not cut if possible: `[128, 128]` if the elements of blocks of that size share
    /// a scale. Empty if elements are independent. The granule of the wanted tensor counts, that of the held tensor is ignored.
    pub granule: Arc<[u64]>,
    /// Which boxes are on which ranks.
    pub layout: Arc<Layout>,
}

/// All tensors that trainers hold, or that rollouts want, by name.
///
/// The order in which tensors are added does not matter. They travel in the order of their names, where numbers are compared by value: the
/// layers of a model follow one another.
#[derive(Clone, Debug, Default)]
pub struct Sharding {
    tensors: BTreeMap<Name, ShardedTensor>,
}

impl Sharding {
    /// A sharding without tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor with all of its boxes.
    ///
    /// # Errors
    ///
    /// `Weight`, naming the tensor, if it was added before, if its shape is not that of the layout, or if boxes cut bytes that elements
    /// share.
    pub fn add(&mut self, tensor: ShardedTensor) -> Result<()> {
        let meta = &tensor.meta;
        meta.validate()?;
        let refuse = |message: String| {
            Error::new(ErrorKind::Weight, "collecting boxes", message).tensor(&*meta.name)
        };
        if *meta.shape != *tensor.layout.shape() {
            let (own, shape) = (&meta.shape, tensor.layout.shape());
            let error = refuse(format!("its shape is {own:?}, that of its boxes {shape:?}"));
            return Err(match tensor.layout.shares().first() {
                Some(share) => error.rank(share.ranks[0]),
                None => error,
            });
        }
        if !meta.dtype.bits().is_multiple_of(8) {
            for share in tensor.layout.shares() {
                let whole = |at: u64| (at * meta.dtype.bits()).is_multiple_of(8);
                let along = share.region.ranges().last().cloned().unwrap_or(0..1);
                if !whole(along.start) || !whole(along.end) {
                    let message = format!("the box {} of {} cuts a byte", share.region, meta.dtype);
                    return Err(refuse(message).rank(share.ranks[0]));
                }
            }
        }
        let name = Name(meta.name.clone());
        if self.tensors.contains_key(&name) {
            return Err(refuse("it was added before".into()));
        }
        self.tensors.insert(name, tensor);
        Ok(())
    }

    /// The tensors in the order in which they travel.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &ShardedTensor> {
        self.tensors.values()
    }

    /// For each tensor of `other`, the tensor of the same name here.
    pub(crate) fn aligned_with<'a>(
        &'a self,
        other: &'a Self,
    ) -> impl Iterator<Item = Option<&'a ShardedTensor>> {
        let mut own = self.tensors.iter().peekable();
        other.tensors.keys().map(move |name| {
            while own.next_if(|(own, _)| *own < name).is_some() {}
            own.next_if(|(own, _)| *own == name).map(|(_, tensor)| tensor)
        })
    }

    /// The tensor of a name.
    pub fn get(&self, name: &str) -> Option<&ShardedTensor> {
        self.tensors.get(&Name(name.into()))
    }
}

/// Collects the boxes that ranks declare into a [`Sharding`].
#[derive(Debug, Default)]
pub struct Declarations {
    tensors: BTreeMap<Arc<str>, Declared>,
}

#[derive(Debug)]
struct Declared {
    meta: TensorMeta,
    granule: Arc<[u64]>,
    first: Rank,
    boxes: Vec<(Rank, TensorBox)>,
}

impl Declarations {
    /// No boxes yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a box of a rank.
    ///
    /// # Errors
    ///
    /// `Mismatch`, naming tensor and rank, if an earlier declaration of that name has another type, full shape or granule; `Weight` if the
    /// box is not within the tensor.
    pub fn add(
        &mut self,
        rank: Rank,
        meta: &TensorMeta,
        granule: &[u64],
        region: TensorBox,
    ) -> Result<()> {
        meta.validate()?;
        if !region.fits(&meta.shape) {
            let message = format!("the box {region} is not within the shape {:?}", meta.shape);
            return Err(Error::new(ErrorKind::Weight, "collecting boxes", message)
                .tensor(&*meta.name)
                .rank(rank));
        }
        let declared = self.tensors.entry(meta.name.clone()).or_insert_with(|| Declared {
            meta: meta.clone(),
            granule: granule.into(),
            first: rank,
            boxes: Vec::new(),
        });
        if declared.meta != *meta || *declared.granule != *granule {
            let (own, other) = (&declared.meta, declared.first);
            let message = format!(
                "{} {:?} in blocks of {granule:?}, which for rank {other} is {} {:?} in blocks of {:?}",
                meta.dtype, meta.shape, own.dtype, own.shape, declared.granule
            );
            return Err(Error::new(ErrorKind::Mismatch, "collecting boxes", message)
                .tensor(&*meta.name)
                .rank(rank));
        }
        declared.boxes.push((rank, region));
        Ok(())
    }

    /// Combines the boxes of all ranks. Equal layouts are stored once.
    ///
    /// # Errors
    ///
    /// As [`Layout::new`] and [`Sharding::add`], naming tensor and rank.
    pub fn finish(self) -> Result<Sharding> {
        let mut layouts: HashMap<[u8; 32], Arc<Layout>> = HashMap::new();
        let mut sharding = Sharding::new();
        for Declared { meta, granule, boxes, .. } in self.tensors.into_values() {
            let layout = Layout::new(&meta.shape, boxes).map_err(|e| e.tensor(&*meta.name))?;
            let layout = layouts.entry(layout.digest()).or_insert_with(|| layout.into()).clone();
            sharding.add(ShardedTensor { meta, granule, layout })?;
        }
        Ok(sharding)
    }
}

/// A name, ordered with the numbers in it by their value.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name(Arc<str>);

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        natural(self.0.as_bytes(), other.0.as_bytes()).then_with(|| self.0.cmp(&other.0))
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

fn natural(one: &[u8], other: &[u8]) -> Ordering {
    // The common prefix decides nothing, unless a number continues after it.
    let same = one.iter().zip(other).take_while(|(a, b)| a == b).count();
    let start = same - one[..same].iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let (mut one, mut other) = (&one[start..], &other[start..]);
    loop {
        let digits = (digits(one), digits(other));
        let order = match digits {
            (0, _) | (_, 0) => match (one.first(), other.first()) {
                (Some(a), Some(b)) if a == b => {
                    (one, other) = (&one[1..], &other[1..]);
                    continue;
                }
                (a, b) => return a.cmp(&b),
            },
            (n, m) => {
                let (a, b) = (significant(&one[..n]), significant(&other[..m]));
                (one, other) = (&one[n..], &other[m..]);
                a.len().cmp(&b.len()).then_with(|| a.cmp(b))
            }
        };
        if order.is_ne() {
            return order;
        }
    }
}

fn digits(text: &[u8]) -> usize {
    text.iter().take_while(|byte| byte.is_ascii_digit()).count()
}

fn significant(number: &[u8]) -> &[u8] {
    &number[number.iter().take_while(|&&digit| digit == b'0').count()..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ordered_by_the_value_of_their_numbers() {
        let mut names = ["b.10.w", "b.9.w", "b.9", "a", "b.09.w", "b.x", "b.100", "", "b.9.v2"];
        names.sort_by_key(|name| Name((*name).into()));
        assert_eq!(names, ["", "a", "b.9", "b.9.v2", "b.09.w", "b.9.w", "b.10.w", "b.100", "b.x"]);
    }
}

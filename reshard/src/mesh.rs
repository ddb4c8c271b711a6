//! Layouts of PyTorch's DTensor: a mesh of ranks, and a placement for each of its dimensions.

use std::ops::Range;

use engine_core::{Error, ErrorKind, Rank, Result, TensorBox};

use crate::Layout;

/// Ranks in a grid of any number of dimensions: PyTorch's `DeviceMesh`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    shape: Vec<u32>,
    ranks: Vec<Rank>,
}

/// How a dimension of a mesh divides a tensor: PyTorch's placements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Placement {
    /// Every rank along the mesh dimension holds the same elements.
    Replicate,
    /// The tensor's dimension of this number is divided along the mesh dimension as `torch.chunk` does it: all chunks have the size of the
    /// first, except the last ones, which are smaller or empty. Mesh dimensions that shard the same tensor dimension divide it one after
    /// the other.
    Shard(usize),
    /// As `Shard`, but after all `Shard` placements, the last mesh dimension first: FSDP2 over tensor parallelism (`_StridedShard`).
    StridedShard(usize),
}

impl Mesh {
    /// A mesh of a shape, with its ranks in row-major order.
    ///
    /// # Errors
    ///
    /// `Config` if the number of ranks is not that of the shape, or if a rank occurs twice.
    pub fn new(shape: &[u32], ranks: impl IntoIterator<Item = Rank>) -> Result<Self> {
        let ranks: Vec<Rank> = ranks.into_iter().collect();
        let size = shape.iter().try_fold(1_usize, |size, &n| size.checked_mul(n as usize));
        if size != Some(ranks.len()) {
            return Err(refuse(format!("{} ranks for a mesh of shape {shape:?}", ranks.len())));
        }
        let mut sorted = ranks.clone();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(refuse("it is in the mesh twice".into()).rank(pair[0]));
        }
        Ok(Self { shape: shape.into(), ranks })
    }

    /// The layout of a tensor of the given shape.
    ///
    /// # Errors
    ///
    /// `Config` if the mesh has another number of dimensions than there are placements, or if the tensor has no such dimension.
    ///
    /// # Examples
    ///
    /// ```
    /// use engine_core::Rank;
    /// use reshard::{Mesh, Placement};
    ///
    /// // Two replicas of a tensor of ten rows, each divided over three ranks: of 4, 4 and 2 rows.
    /// let mesh = Mesh::new(&[2, 3], (0..6).map(Rank))?;
    /// let layout = mesh.layout(&[10, 8], &[Placement::Replicate, Placement::Shard(0)])?;
    /// let last = &layout.shares()[2];
    /// assert_eq!(last.region.to_string(), "[8..10, 0..8]");
    /// assert_eq!(*last.ranks, [Rank(2), Rank(5)]);
    /// # Ok::<(), engine_core::Error>(())
    /// ```
    pub fn layout(&self, shape: &[u64], placements: &[Placement]) -> Result<Layout> {
        let boxes = self.ranks.iter().enumerate().map(|(at, &rank)| {
            let coordinate: Vec<u32> =
                (0..self.shape.len()).map(|axis| self.position(at, axis)).collect();
            Ok((rank, Self::region(&self.shape, &coordinate, shape, placements)?))
        });
        Layout::new(shape, boxes.collect::<Result<Vec<_>>>()?)
    }

    /// The box of a tensor of the given shape at one coordinate of a mesh of the shape `mesh`.
    ///
    /// # Errors
    ///
    /// As [`layout`](Self::layout), and for a coordinate outside of the mesh.
    pub fn region(
        mesh: &[u32],
        coordinate: &[u32],
        shape: &[u64],
        placements: &[Placement],
    ) -> Result<TensorBox> {
        if placements.len() != mesh.len() {
            let given = placements.len();
            return Err(refuse(format!("{given} placements for a mesh of shape {mesh:?}")));
        }
        let is_within = coordinate.iter().zip(mesh).all(|(at, side)| at < side);
        if coordinate.len() != mesh.len() || !is_within {
            return Err(refuse(format!("{coordinate:?} in a mesh of shape {mesh:?}")));
        }
        let sharded = placements.iter().filter_map(|placement| match placement {
            Placement::Shard(dimension) | Placement::StridedShard(dimension) => Some(*dimension),
            Placement::Replicate => None,
        });
        if let Some(dimension) = sharded.into_iter().find(|&dimension| dimension >= shape.len()) {
            return Err(refuse(format!("shards of dimension {dimension} of the shape {shape:?}")));
        }
        let mut region = TensorBox::whole(shape);
        let mut shard = |axis: usize, dimension: usize| {
            let along = region.ranges()[dimension].clone();
            let part = chunk(along, mesh[axis].into(), coordinate[axis].into());
            region = region.narrowed(dimension, part);
        };
        for (axis, placement) in placements.iter().enumerate() {
            if let Placement::Shard(dimension) = *placement {
                shard(axis, dimension);
            }
        }
        for (axis, placement) in placements.iter().enumerate().rev() {
            if let Placement::StridedShard(dimension) = *placement {
                shard(axis, dimension);
            }
        }
        Ok(region)
    }

    /// The coordinate of the rank at index `at` along a dimension of the mesh.
    fn position(&self, at: usize, axis: usize) -> u32 {
        let stride: usize = self.shape[axis + 1..].iter().map(|&n| n as usize).product();
        (at / stride) as u32 % self.shape[axis]
    }
}

/// Chunk `at` of `chunks`, as `torch.chunk` divides the range; empty where torch returns fewer chunks.
pub(crate) fn chunk(range: Range<u64>, chunks: u64, at: u64) -> Range<u64> {
    let size = (range.end - range.start).div_ceil(chunks.max(1));
    let start = range.start.saturating_add(size.saturating_mul(at)).min(range.end);
    start..start.saturating_add(size).min(range.end)
}

fn refuse(message: String) -> Error {
    Error::new(ErrorKind::Config, "laying out a mesh", message)
}

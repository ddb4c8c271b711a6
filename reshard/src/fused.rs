//! Tensors that frameworks make of several tensors of a checkpoint.

use engine_core::{DType, Error, ErrorKind, Result, TensorBox, TensorMeta};

use crate::Layout;
use crate::search::Boxes;

/// A tensor that consists of parts of tensors of the checkpoint, such as query, key and value, gate and up, or a stack of experts.
///
/// It is only a description. A rank that holds a box of it holds boxes of the checkpoint's tensors, and the planner plans those.
#[derive(Clone, Debug)]
pub struct FusedTensor {
    shape: Vec<u64>,
    parts: Vec<FusedPart>,
}

/// A box of a tensor of the checkpoint, and where it lies in a fused one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FusedPart {
    /// The checkpoint's tensor.
    pub meta: TensorMeta,
    /// The part of it.
    pub region: TensorBox,
    /// Where these elements lie in the fused tensor. The box may have further leading dimensions, in each of which it has one index.
    pub at: TensorBox,
}

impl FusedTensor {
    /// Makes a fused tensor of parts.
    ///
    /// # Errors
    ///
    /// `Weight`, naming the checkpoint's tensor, if a part does not fit its tensor or the fused one, overlaps another part, or has another
    /// type than the first; `Weight` if the parts do not fill the fused tensor.
    pub fn new(shape: &[u64], parts: Vec<FusedPart>) -> Result<Self> {
        TensorMeta::new("fused", DType::U8, shape).validate()?;
        for part in &parts {
            let extra = part.at.dimensions().checked_sub(part.region.dimensions());
            let extents = |of: &TensorBox, from: usize| -> Vec<u64> {
                of.ranges()[from..].iter().map(|range| range.end - range.start).collect()
            };
            let is_same = extra.is_some_and(|extra| {
                extents(&part.at, extra) == extents(&part.region, 0)
                    && part.at.ranges()[..extra].iter().all(|range| range.end - range.start == 1)
            });
            if !part.region.fits(&part.meta.shape) || !part.at.fits(shape) || !is_same {
                let (region, at, own) = (&part.region, &part.at, &part.meta.shape);
                let message = format!("{region} of {own:?} at {at} of {shape:?}");
                return Err(refuse(message).tensor(&*part.meta.name));
            }
            if part.meta.dtype != parts[0].meta.dtype {
                let message = format!("{} beside {}", part.meta.dtype, parts[0].meta.dtype);
                return Err(refuse(message).tensor(&*part.meta.name));
            }
        }
        let filled = Boxes::new(parts.iter().map(|part| &part.at));
        if let Some((one, other)) = filled.overlap() {
            let message = format!("it lies where `{}` does", parts[one].meta.name);
            return Err(refuse(message).tensor(&*parts[other].meta.name));
        }
        let elements: u64 = parts.iter().map(|part| part.at.elements()).sum();
        if elements != TensorBox::whole(shape).elements() {
            return Err(refuse(format!("parts of {elements} elements in all for {shape:?}")));
        }
        Ok(Self { shape: shape.into(), parts })
    }

    /// Concatenates tensors along the first dimension, as most inference engines do with gate and up, and with query, key and value.
    ///
    /// # Errors
    ///
    /// `Weight` if a tensor is a scalar, or if the types or any dimension but the first differ.
    pub fn concatenated(metas: &[TensorMeta]) -> Result<Self> {
        let mut rows = 0;
        let mut parts = Vec::new();
        for meta in metas {
            let region = TensorBox::whole(&meta.shape);
            let mut place: Vec<(u64, u64)> = region.clone().into();
            let Some(first) = place.first_mut() else {
                return Err(refuse("a scalar cannot be fused".into()).tensor(&*meta.name));
            };
            first.0 = rows;
            rows = rows.saturating_add(first.1);
            parts.push(FusedPart { meta: meta.clone(), region, at: place.try_into()? });
        }
        let rest = metas.first().map(|meta| meta.shape[1..].to_vec()).unwrap_or_default();
        Self::new(&[vec![rows], rest].concat(), parts)
    }

    /// Interleaves query, key and value as Megatron does: for each attention group its queries, its key and its value, so that a shard of
    /// the fused tensor is a shard of each. The tensors are weights or biases.
    ///
    /// # Errors
    ///
    /// `Weight`, naming the tensor, if the number of groups does not divide its rows; else as [`new`](Self::new).
    pub fn interleaved(metas: &[TensorMeta], groups: u64) -> Result<Self> {
        let mut sizes = Vec::new();
        for meta in metas {
            // A scalar has no rows.
            let rows = meta.shape.first().copied().unwrap_or(0);
            if groups == 0 || rows < groups || !rows.is_multiple_of(groups) {
                let message = format!("{:?} in {groups} groups", meta.shape);
                return Err(refuse(message).tensor(&*meta.name));
            }
            sizes.push(rows / groups);
        }
        let mut parts = Vec::new();
        let mut row = 0;
        for group in 0..groups {
            for (meta, &size) in metas.iter().zip(&sizes) {
                let whole = TensorBox::whole(&meta.shape);
                let mut place: Vec<(u64, u64)> = whole.clone().into();
                place[0] = (row, size);
                row = row.saturating_add(size);
                let region = whole.narrowed(0, group * size..(group + 1) * size);
                parts.push(FusedPart { meta: meta.clone(), region, at: place.try_into()? });
            }
        }
        let rest = metas.first().map(|meta| meta.shape[1..].to_vec()).unwrap_or_default();
        Self::new(&[vec![row], rest].concat(), parts)
    }

    /// Stacks fused tensors of one shape along a new first dimension, such as the experts of a layer.
    ///
    /// # Errors
    ///
    /// `Weight` if shapes or types differ.
    pub fn stacked(members: Vec<Self>) -> Result<Self> {
        let own = members.first().map(|first| first.shape.clone()).unwrap_or_default();
        let shape = [vec![members.len() as u64], own].concat();
        let mut parts = Vec::new();
        for (index, member) in (0..).zip(members) {
            if member.shape[..] != shape[1..] {
                let message = format!("{:?} in a stack of {:?}", member.shape, &shape[1..]);
                return Err(refuse(message));
            }
            for part in member.parts {
                let place = [vec![(index, 1)], part.at.into()].concat();
                parts.push(FusedPart { at: place.try_into()?, ..part });
            }
        }
        Self::new(&shape, parts)
    }

    /// The shape of the fused tensor.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The parts of the checkpoint's tensors that a box of the fused tensor consists of, each with its place in the fused tensor.
    pub fn parts_of(&self, region: &TensorBox) -> Vec<FusedPart> {
        let parts = self.parts.iter().filter_map(|part| {
            let at = part.at.intersection(region)?;
            let extra = at.dimensions() - part.region.dimensions();
            let mut own = part.region.clone();
            for dimension in 0..own.dimensions() {
                let (from, base) =
                    (&at.ranges()[extra + dimension], &part.at.ranges()[extra + dimension]);
                let start = part.region.ranges()[dimension].start;
                let range = start + (from.start - base.start)..start + (from.end - base.start);
                own = own.narrowed(dimension, range);
            }
            Some(FusedPart { meta: part.meta.clone(), region: own, at })
        });
        parts.collect()
    }

    /// Derives the layouts of the checkpoint's tensors from a layout of the fused tensor.
    ///
    /// # Errors
    ///
    /// `Weight` if the layout has another shape than the fused tensor; else as [`Layout::new`].
    pub fn layouts(&self, layout: &Layout) -> Result<Vec<(TensorMeta, Layout)>> {
        if layout.shape() != self.shape {
            let (own, other) = (&self.shape, layout.shape());
            return Err(refuse(format!("a layout of {other:?} for a fused tensor of {own:?}")));
        }
        let mut found: Vec<(TensorMeta, Vec<_>)> = Vec::new();
        for part in &self.parts {
            if !found.iter().any(|(meta, _)| *meta == part.meta) {
                found.push((part.meta.clone(), Vec::new()));
            }
        }
        for share in layout.shares() {
            for part in self.parts_of(&share.region) {
                if let Some((_, boxes)) = found.iter_mut().find(|(meta, _)| *meta == part.meta) {
                    boxes.extend(share.ranks.iter().map(|&rank| (rank, part.region.clone())));
                }
            }
        }
        let layouts = found.into_iter().map(|(meta, boxes)| {
            let layout = Layout::new(&meta.shape, boxes).map_err(|e| e.tensor(&*meta.name))?;
            Ok((meta, layout))
        });
        layouts.collect()
    }
}

impl From<TensorMeta> for FusedTensor {
    /// Describes a tensor of the checkpoint as it is.
    fn from(meta: TensorMeta) -> Self {
        let whole = TensorBox::whole(&meta.shape);
        let shape = meta.shape.to_vec();
        Self { shape, parts: vec![FusedPart { meta, region: whole.clone(), at: whole }] }
    }
}

fn refuse(message: String) -> Error {
    Error::new(ErrorKind::Weight, "describing a fused tensor", message)
}

//! Boxes of tensors: the bytes that the whole tensor would have there.

use std::ops::Range;

use engine_core::TensorBox;

use super::panel::{MOST_BLOCKS, MOST_BYTES, Panel, Place, Target};
use super::staircase::Staircase;
use super::{Codec, Kernel, Store, scalar, value_of};
use crate::format::BlockGrid;
use crate::{Fp8Format, Mode, QuantError, SourceType};

/// A box of a tensor: the bytes that a rank holds, and where in the tensor they lie.
#[derive(Clone, Debug)]
pub struct BoxSource<'a> {
    bytes: &'a [u8],
    ty: SourceType,
    shape: Vec<usize>,
    region: TensorBox,
}

impl<'a> BoxSource<'a> {
    /// The box `region` of a tensor of shape `[rows, cols]` or `[experts, rows, cols]`. `bytes` has its elements row-major and
    /// contiguous, little-endian, at any alignment.
    ///
    /// # Errors
    ///
    /// [`QuantError::Sizes`] for other ranks, for a box outside the tensor, and if the bytes are not as many as the box says.
    pub fn new(
        bytes: &'a [u8],
        ty: SourceType,
        shape: &[usize],
        region: &TensorBox,
    ) -> Result<Self, QuantError> {
        let sides: Vec<u64> = shape.iter().map(|&side| side as u64).collect();
        crate::Granularity::PerTensor.grid(shape)?;
        if !region.fits(&sides) {
            return Err(QuantError::sizes(format!("the box {region} of shape {shape:?}")));
        }
        if region.elements().checked_mul(ty.size() as u64) != Some(bytes.len() as u64) {
            let message = format!("{} bytes of {ty:?} for the box {region}", bytes.len());
            return Err(QuantError::sizes(message));
        }
        Ok(Self { bytes, ty, shape: shape.into(), region: region.clone() })
    }

    fn grid(&self, format: &Fp8Format) -> Result<BlockGrid, QuantError> {
        if format.mode == Mode::TritonGpu {
            return Err(QuantError::CudaOnly);
        }
        format.granularity.grid(&self.shape)
    }

    /// Its blocks, counted over the tensor's.
    fn blocks(&self, grid: &BlockGrid) -> TensorBox {
        self.region.in_granules(&grid.block().map(|side| side as u64))
    }

    fn panels(&self, grid: &BlockGrid, format: &Fp8Format) -> Vec<Panel<'a>> {
        let [_, _, cols] = three(&self.region);
        let grid = grid.over(cols.len());
        let places = places(&self.region, &grid, self.ty.size());
        let panel = |place| Panel::new(self.bytes, self.ty, format.precast, &grid, place);
        places.into_iter().map(panel).collect()
    }
}

/// The largest magnitude in each block that a box has a part of, over the elements that are in the box: what ranks that share a
/// block tell one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMaxima {
    blocks: TensorBox,
    values: Vec<u32>,
}

/// Beside the bits of the largest magnitude that is a number: whether there is a NaN.
const NAN: u32 = 1 << 31;

impl BlockMaxima {
    /// The blocks, counted as the tensor's blocks are: a box of the shape that its scales have, or that with a first side
    /// for experts.
    pub fn blocks(&self) -> &TensorBox {
        &self.blocks
    }

    /// The maxima of some of the blocks, row-major, as they travel.
    ///
    /// # Errors
    ///
    /// [`QuantError::Sizes`] if not all of them are here.
    pub fn of(&self, blocks: &TensorBox) -> Result<Vec<u32>, QuantError> {
        Ok(self.places(blocks)?.map(|at| self.values[at]).collect())
    }

    /// The maxima of blocks that nothing is known of yet.
    ///
    /// # Errors
    ///
    /// [`QuantError::Sizes`] if they are no blocks of a matrix or of a stack of matrices.
    pub fn zero(blocks: &TensorBox) -> Result<Self, QuantError> {
        let count = usize::try_from(blocks.elements()).unwrap_or(usize::MAX);
        Self::from_values(blocks, &vec![0; count])
    }

    /// The maxima of blocks, row-major, as they [travelled](Self::of).
    ///
    /// # Errors
    ///
    /// [`QuantError::Sizes`] if there are not as many as blocks, or these are none of a matrix or of a stack of matrices.
    pub fn from_values(blocks: &TensorBox, values: &[u32]) -> Result<Self, QuantError> {
        if !(2..=3).contains(&blocks.dimensions()) || values.len() as u64 != blocks.elements() {
            return Err(QuantError::sizes(format!("{} maxima of {blocks}", values.len())));
        }
        Ok(Self { blocks: blocks.clone(), values: values.into() })
    }

    /// The maxima of some of the blocks by themselves: those of a part of the box.
    ///
    /// # Errors
    ///
    /// [`QuantError::Sizes`] if not all of them are here.
    pub fn part(&self, blocks: &TensorBox) -> Result<Self, QuantError> {
        Ok(Self { blocks: blocks.clone(), values: self.of(blocks)? })
    }

    /// Takes into account what another rank finds in its parts of some of the blocks.
    ///
    /// # Errors
    ///
    /// [`QuantError::Sizes`] if not all of the blocks are here, or there are not as many maxima.
    pub fn merge(&mut self, blocks: &TensorBox, maxima: &[u32]) -> Result<(), QuantError> {
        let places = self.places(blocks)?;
        if maxima.len() as u64 != blocks.elements() {
            return Err(QuantError::sizes(format!("{} maxima of {blocks}", maxima.len())));
        }
        for (at, &other) in places.collect::<Vec<_>>().into_iter().zip(maxima) {
            self.values[at] = merged(self.values[at], other);
        }
        Ok(())
    }

    fn places(
        &self,
        blocks: &TensorBox,
    ) -> Result<impl Iterator<Item = usize> + use<>, QuantError> {
        if !blocks.is_empty() && !self.blocks.contains(blocks) {
            return Err(QuantError::sizes(format!("maxima of {blocks} out of {}", self.blocks)));
        }
        let ([experts, rows, cols], own) = (three(blocks), three(&self.blocks));
        let (height, width) = (own[1].len(), own[2].len());
        Ok(experts.flat_map(move |expert| {
            let (cols, own) = (cols.clone(), own.clone());
            rows.clone().flat_map(move |row| {
                let row = (expert - own[0].start) * height + row - own[1].start;
                let first = own[2].start;
                cols.clone().map(move |col| row * width + col - first)
            })
        }))
    }

    fn at(&self, expert: usize, row: usize, col: usize) -> usize {
        let [experts, rows, cols] = three(&self.blocks);
        let row = (expert - experts.start) * rows.len() + row - rows.start;
        row * cols.len() + col - cols.start
    }
}

fn merged(one: u32, other: u32) -> u32 {
    (one & !NAN).max(other & !NAN) | (one | other) & NAN
}

impl Codec {
    /// Finds the largest magnitudes of a box in each block that it has a part of.
    ///
    /// # Errors
    ///
    /// [`QuantError::CudaOnly`], [`QuantError::InvalidFormat`].
    pub fn box_maxima(
        &self,
        source: &BoxSource<'_>,
        format: &Fp8Format,
    ) -> Result<BlockMaxima, QuantError> {
        let grid = source.grid(format)?;
        let blocks = source.blocks(&grid);
        let mut found = BlockMaxima { values: vec![0; blocks.elements() as usize], blocks };
        let mut maxima = [0; MOST_BLOCKS];
        for panel in source.panels(&grid, format) {
            let maxima = &mut maxima[..panel.blocks().len()];
            self.0.scan(&panel, maxima);
            let (matrix, band) = grid.place_of_band(panel.band());
            for (block, &bits) in maxima.iter().enumerate() {
                // Bits above infinity are a NaN, which hides the largest number.
                let bits = match value_of(bits, source.ty, crate::Precast::None).is_nan() {
                    false => bits,
                    true => NAN | scalar::largest_number(&panel, block),
                };
                let at = found.at(matrix, band, panel.blocks().start + block);
                found.values[at] = bits;
            }
        }
        Ok(found)
    }

    /// Quantises a box with the maxima of its blocks, which are [those of the box](Self::box_maxima) merged with those of all other
    /// boxes that have a part of a block. The codes and scales are those of the whole tensor.
    ///
    /// `out` has one byte for each element of the box, `scales` one number for each block that the box has a part of, row-major
    /// as [`maxima.blocks()`](BlockMaxima::blocks).
    ///
    /// # Errors
    ///
    /// [`QuantError::NonFinite`] names the first block of the box that has no finite form, unless the format says to reproduce it;
    /// every rank that has a part of the block gets it. [`QuantError::Sizes`] if the arguments contradict each other.
    pub fn quantize_box(
        &self,
        source: &BoxSource<'_>,
        format: &Fp8Format,
        maxima: &BlockMaxima,
        out: &mut [u8],
        scales: &mut [f32],
        store: Store,
    ) -> Result<(), QuantError> {
        let grid = source.grid(format)?;
        let elements = source.region.elements() as usize;
        if maxima.blocks != source.blocks(&grid)
            || out.len() != elements
            || scales.len() != maxima.values.len()
        {
            return Err(QuantError::sizes(format!(
                "maxima of {}, {} codes and {} scales for the box {}",
                maxima.blocks,
                out.len(),
                scales.len(),
                source.region
            )));
        }
        let mut target = Target::new(0..elements, out);
        let mut stairs = Vec::with_capacity(MOST_BLOCKS);
        let panels = source.panels(&grid, format);
        let result = panels.iter().enumerate().try_for_each(|(number, panel)| {
            let (matrix, band) = grid.place_of_band(panel.band());
            let mut finite = true;
            stairs.clear();
            for (block, col) in panel.blocks().enumerate() {
                let at = maxima.at(matrix, band, col);
                let bits = maxima.values[at];
                let absmax = value_of(bits & !NAN, source.ty, format.precast);
                let scale = scalar::scale_of(absmax, bits & NAN != 0, format)?;
                let scale = scale.ok_or(QuantError::NonFinite {
                    tensor: None,
                    expert: matrix,
                    block_row: band,
                    block_col: col,
                })?;
                finite &= bits & NAN == 0 && absmax.is_finite() && scale.multiplier.is_finite();
                scales[at] = scale.scale;
                let elements = panel.block_elements(block);
                stairs.push(Staircase::new(scale.multiplier, source.ty, format.precast, elements));
            }
            let kernel: &dyn Kernel = if finite { self.0 } else { &scalar::Scalar };
            kernel.encode(panel, &stairs, &mut target, store, panels.get(number + 1));
            Ok(())
        });
        self.0.fence();
        result
    }
}

/// Matrices, rows and columns of a box; of a matrix it is the first.
fn three(region: &TensorBox) -> [Range<usize>; 3] {
    let range = |range: &Range<u64>| range.start as usize..range.end as usize;
    match region.ranges() {
        [rows, cols] => [0..1, range(rows), range(cols)],
        [experts, rows, cols] => [range(experts), range(rows), range(cols)],
        // `BoxSource` and what makes its blocks let no others pass.
        _ => [0..0, 0..0, 0..0],
    }
}

/// The panels of a box. Rows and columns are those of the box, bands and blocks those of the tensor.
fn places(region: &TensorBox, grid: &BlockGrid, element_size: usize) -> Vec<Place> {
    let [experts, rows, cols] = three(region);
    let (height, width) = (grid.block_rows, grid.block_cols);
    let most = (MOST_BYTES / (height * width * element_size).max(1)).clamp(1, MOST_BLOCKS);
    let mut places = Vec::new();
    if region.is_empty() {
        return places;
    }
    // Blocks begin at multiples of their width, but for the one that the box cuts on the left.
    let first = cols.start / width;
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut block = first;
    while block * width < cols.end {
        let is_cut = block == first && !cols.start.is_multiple_of(width);
        let end = if is_cut { block + 1 } else { (block + most).min(cols.end.div_ceil(width)) };
        runs.push(block..end);
        block = end;
    }
    for (number, expert) in experts.enumerate() {
        for band in rows.start / height..rows.end.div_ceil(height) {
            let from = (band * height).max(rows.start) - rows.start;
            let to = ((band + 1) * height).min(rows.end) - rows.start;
            let above = number * rows.len();
            for blocks in &runs {
                let from_col = (blocks.start * width).max(cols.start) - cols.start;
                let to_col = (blocks.end * width).min(cols.end) - cols.start;
                places.push(Place {
                    band: expert * grid.bands_per_matrix() + band,
                    rows: above + from..above + to,
                    blocks: blocks.clone(),
                    cols: from_col..to_col,
                });
            }
        }
    }
    places
}

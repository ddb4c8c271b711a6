//! Carries out [`Fp8Format`]s on the CPU.
//!
//! This file checks arguments, walks panels and computes scales, once for all codecs. A codec is a
//! [`Kernel`]: [`scalar`] is the oracle, [`avx512`] and [`avx2`] do the same work at the speed of
//! memory and are chosen at run time. There is no NEON codec yet, because it could not be tested:
//! aarch64 has the scalar one.

mod boxes;
mod panel;
mod scalar;
mod staircase;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt::Debug;
use std::ops::Range;

use engine_core::memory::Pool;
use half::{bf16, f16};

use crate::{BlockGrid, BlockScale, Fp8Format, Granularity, Mode, Precast, QuantError, SourceType};
pub use boxes::{BlockMaxima, BoxSource};
use panel::{MOST_BLOCKS, Panel, Target};
use staircase::Staircase;

/// What a kind of processor contributes.
///
/// Sizes have been checked and blocks are finite when a kernel sees them. Values exist only where
/// the processor has what the kernel needs, which is what makes the methods safe.
trait Kernel: Debug + Sync {
    fn name(&self) -> &'static str;

    /// Finds the largest magnitude bits of each block of the panel.
    fn scan(&self, panel: &Panel<'_>, maxima: &mut [u32]);

    /// Writes the codes of the panel that the target asks for. The next panel may be prefetched
    /// meanwhile.
    fn encode(
        &self,
        panel: &Panel<'_>,
        stairs: &[Staircase],
        target: &mut Target<'_>,
        store: Store,
        next: Option<&Panel<'_>>,
    );

    /// Writes the values of codes that share one scale.
    fn decode(&self, codes: &[u8], scale: f32, ty: SourceType, out: &mut [u8]);

    /// Copies past the caches if it can.
    fn copy(&self, source: &[u8], out: &mut [u8]);

    /// Orders non-temporal stores before everything that follows.
    fn fence(&self);
}

/// How codes are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Store {
    /// Through the caches: for buffers that are read soon by the same core.
    Cached,
    /// Past the caches, which saves reading the destination: for buckets that a transport sends.
    /// Takes effect on runs that are aligned to a vector (64 bytes with AVX-512, 32 with AVX2), so
    /// align the buffer and prefer rows of a multiple of 64 elements.
    #[default]
    NonTemporal,
}

/// A tensor to be quantised: its bytes and what they mean.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    bytes: &'a [u8],
    ty: SourceType,
    shape: [usize; 3],
    rank: usize,
}

impl<'a> Source<'a> {
    /// A tensor of shape `[rows, cols]` or `[experts, rows, cols]`, row-major and contiguous,
    /// little-endian, at any alignment.
    ///
    /// # Errors
    ///
    /// [`QuantError::Sizes`] for other ranks, and if the bytes are not as many as the shape says.
    pub fn new(bytes: &'a [u8], ty: SourceType, shape: &[usize]) -> Result<Self, QuantError> {
        let grid = Granularity::PerTensor.grid(shape)?;
        if grid.elements().checked_mul(ty.size()) != Some(bytes.len()) {
            return Err(QuantError::sizes(format!(
                "{} bytes of {ty:?} for shape {shape:?}",
                bytes.len()
            )));
        }
        let shape3 = [grid.experts, grid.rows, grid.cols];
        Ok(Self { bytes, ty, shape: shape3, rank: shape.len() })
    }

    /// The type of the elements.
    pub fn source_type(&self) -> SourceType {
        self.ty
    }

    /// The shape as it was given.
    pub fn shape(&self) -> &[usize] {
        &self.shape[3 - self.rank..]
    }
}

/// An implementation of FP8 quantisation for some kind of processor. All give the same bytes.
#[derive(Clone, Copy, Debug)]
pub struct Codec(&'static dyn Kernel);

impl Codec {
    /// The fastest codec of this machine.
    pub fn best() -> Self {
        *Self::available().first().unwrap_or(&Self(&scalar::Scalar))
    }

    /// The codecs that this machine can run, fastest first. The last is `scalar`, the reference.
    pub fn available() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let fast = [avx512::detect(), avx2::detect()];
        #[cfg(not(target_arch = "x86_64"))]
        let fast: [Option<&'static dyn Kernel>; 0] = [];
        fast.into_iter().flatten().chain([&scalar::Scalar as &dyn Kernel]).map(Self).collect()
    }

    /// The codec of that name: `avx512`, `avx2` or `scalar`.
    ///
    /// # Errors
    ///
    /// [`QuantError::NoSuchCodec`] if there is none or this machine cannot run it.
    pub fn named(name: &str) -> Result<Self, QuantError> {
        let available = Self::available();
        available.iter().copied().find(|codec| codec.name() == name).ok_or_else(|| {
            let names: Vec<_> = available.iter().map(Self::name).collect();
            QuantError::NoSuchCodec { name: name.to_owned(), available: names.join(", ") }
        })
    }

    /// The name.
    pub fn name(&self) -> &'static str {
        self.0.name()
    }

    /// Quantises a range of a tensor's elements on this thread.
    ///
    /// `elements` counts over the whole row-major tensor and may begin and end anywhere; `out` has
    /// one byte for each. Scales always are those of whole blocks: where the range cuts a block,
    /// all of the block is read but only the codes inside are written, so the pieces of a tensor
    /// put together are the bytes of the whole.
    ///
    /// `scales` has the scales of the bands that the range touches, i.e. of the indices
    /// [`grid.scales_of(&elements)`](BlockGrid::scales_of). Those of the blocks that the range
    /// touches are written; the others are left as they are.
    ///
    /// With per-tensor scales each call reads the whole matrix for its maximum, whatever the range.
    ///
    /// # Errors
    ///
    /// [`QuantError::NonFinite`] names the first block that has no finite form, unless the format
    /// says to reproduce it; `out` then holds codes of some blocks. [`QuantError::Sizes`],
    /// [`QuantError::InvalidFormat`], [`QuantError::CudaOnly`] before anything is written.
    pub fn quantize(
        &self,
        source: &Source<'_>,
        format: &Fp8Format,
        elements: Range<usize>,
        out: &mut [u8],
        scales: &mut [f32],
        store: Store,
    ) -> Result<(), QuantError> {
        let grid = check(source, format, &elements, out, scales)?;
        let result = self.quantize_panels(source, format, &grid, elements, out, scales, store);
        self.0.fence();
        result
    }

    /// Quantises a whole tensor as [`quantize`](Self::quantize) does, on the threads of a pool. The unit
    /// of work is a row of blocks, so per-tensor scales gain nothing.
    ///
    /// # Errors
    ///
    /// As [`quantize`](Self::quantize).
    pub fn quantize_parallel(
        &self,
        pool: &Pool,
        source: &Source<'_>,
        format: &Fp8Format,
        mut out: &mut [u8],
        mut scales: &mut [f32],
        store: Store,
    ) -> Result<(), QuantError> {
        /// Large enough that handing out work costs nothing, small enough that threads finish
        /// together.
        const PIECE: usize = 1 << 18;

        let elements = 0..format.granularity.grid(source.shape())?.elements();
        let grid = check(source, format, &elements, out, scales)?;
        let mut pieces = Vec::new();
        for piece in grid.split(elements, PIECE) {
            let (codes, piece_scales);
            (codes, out) = out.split_at_mut(piece.len());
            (piece_scales, scales) = scales.split_at_mut(grid.scales_of(&piece).len());
            pieces.push((piece, codes, piece_scales));
        }
        let results = pool.map(pieces, |(piece, codes, scales)| {
            self.quantize(source, format, piece, codes, scales, store)
        });
        // In order, so that the same block is named whichever thread was first.
        results.into_iter().collect()
    }

    /// Gives a range of a tensor's elements back: `code · scale`, rounded to nearest even to `ty`.
    ///
    /// `codes` are those of the range, `scales` those of the bands that it touches, as in
    /// [`quantize`](Self::quantize); `out` has `ty.size()` bytes for each element.
    ///
    /// # Errors
    ///
    /// [`QuantError::Sizes`] if the arguments contradict each other.
    pub fn dequantize(
        &self,
        codes: &[u8],
        grid: &BlockGrid,
        elements: Range<usize>,
        scales: &[f32],
        ty: SourceType,
        out: &mut [u8],
    ) -> Result<(), QuantError> {
        check_range(grid, &elements, codes.len(), scales.len())?;
        if out.len() != codes.len() * ty.size() {
            return Err(QuantError::sizes(format!(
                "{} bytes of {ty:?} for {} codes",
                out.len(),
                codes.len()
            )));
        }
        let first_scale = grid.scales_of(&elements).start;
        let mut at = elements.start;
        while at < elements.end {
            let (row, col) = (at / grid.cols, at % grid.cols);
            let block = col / grid.block_cols;
            let end = row * grid.cols + ((block + 1) * grid.block_cols).min(grid.cols);
            let band = grid.bands_of(&(at..at + 1)).start;
            let scale = scales[band * grid.scales_per_band() + block - first_scale];
            let run = at - elements.start..end.min(elements.end) - elements.start;
            let bytes = run.start * ty.size()..run.end * ty.size();
            self.0.decode(&codes[run], scale, ty, &mut out[bytes]);
            at = end;
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "quantize's own, checked, and the grid")]
    fn quantize_panels(
        &self,
        source: &Source<'_>,
        format: &Fp8Format,
        grid: &BlockGrid,
        elements: Range<usize>,
        out: &mut [u8],
        scales: &mut [f32],
        store: Store,
    ) -> Result<(), QuantError> {
        let per_band = grid.scales_per_band();
        let first_scale = grid.scales_of(&elements).start;
        let mut panels = panel::places(*grid, elements.clone(), source.ty.size())
            .map(|place| Panel::new(source.bytes, source.ty, format.precast, grid, place))
            .peekable();
        let mut target = Target::new(elements, out);
        let mut stairs = Vec::with_capacity(MOST_BLOCKS);
        let mut maxima = [0; MOST_BLOCKS];
        while let Some(panel) = panels.next() {
            let (band, blocks) = (panel.band(), panel.blocks());
            let maxima = &mut maxima[..blocks.len()];
            self.0.scan(&panel, maxima);

            let mut finite = true;
            stairs.clear();
            for (block, &max) in maxima.iter().enumerate() {
                let absmax = value_of(max, source.ty, format.precast);
                let mut scale = format.mode.block_scale(absmax)?;
                if !absmax.is_finite() || !scale.multiplier.is_finite() {
                    finite = false;
                    scale = reproduced(&panel, block, format)?.ok_or_else(|| {
                        QuantError::NonFinite {
                            tensor: None,
                            expert: band / grid.bands_per_matrix(),
                            block_row: band % grid.bands_per_matrix(),
                            block_col: blocks.start + block,
                        }
                    })?;
                }
                scales[band * per_band + blocks.start + block - first_scale] = scale.scale;
                let elements = panel.block_elements(block);
                stairs.push(Staircase::new(scale.multiplier, source.ty, format.precast, elements));
            }
            let kernel: &dyn Kernel = if finite { self.0 } else { &scalar::Scalar };
            kernel.encode(&panel, &stairs, &mut target, store, panels.peek());
        }
        Ok(())
    }
}

/// Copies bytes with the fastest codec's non-temporal stores: the bandwidth that quantisation is
/// measured against.
///
/// # Panics
///
/// If the lengths differ.
pub fn copy_non_temporal(source: &[u8], out: &mut [u8]) {
    assert_eq!(source.len(), out.len(), "a copy is as long as its source");
    let kernel = Codec::best().0;
    kernel.copy(source, out);
    kernel.fence();
}

fn check(
    source: &Source<'_>,
    format: &Fp8Format,
    elements: &Range<usize>,
    out: &[u8],
    scales: &[f32],
) -> Result<BlockGrid, QuantError> {
    if format.mode == Mode::TritonGpu {
        return Err(QuantError::CudaOnly);
    }
    let grid = format.granularity.grid(source.shape())?;
    check_range(&grid, elements, out.len(), scales.len())?;
    Ok(grid)
}

fn check_range(
    grid: &BlockGrid,
    elements: &Range<usize>,
    codes: usize,
    scales: usize,
) -> Result<(), QuantError> {
    if elements.start > elements.end || elements.end > grid.elements() {
        return Err(QuantError::sizes(format!(
            "range {elements:?} of {} elements",
            grid.elements()
        )));
    }
    if codes != elements.len() {
        return Err(QuantError::sizes(format!("{codes} codes for {} elements", elements.len())));
    }
    let expected = grid.scales_of(elements).len();
    if scales != expected {
        return Err(QuantError::sizes(format!("{scales} scales where {expected} are touched")));
    }
    Ok(())
}

/// The value of magnitude bits, after the precast.
fn value_of(magnitude: u32, ty: SourceType, precast: Precast) -> f32 {
    let value = match ty {
        SourceType::Bf16 => bf16::from_bits(magnitude as u16).to_f32(),
        SourceType::F16 => f16::from_bits(magnitude as u16).to_f32(),
        SourceType::F32 => f32::from_bits(magnitude),
    };
    match precast {
        Precast::Bf16 => bf16::from_f32(value).to_f32(),
        Precast::None => value,
    }
}

/// The scale of a block that is not finite, if the format reproduces those.
fn reproduced(
    panel: &Panel<'_>,
    block: usize,
    format: &Fp8Format,
) -> Result<Option<BlockScale>, QuantError> {
    let values = panel
        .rows()
        .flat_map(|row| scalar::elements(panel.run(row, block), panel.ty, panel.precast));
    scalar::block_scale(values, format)
}

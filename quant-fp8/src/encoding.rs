//! A weight that is quantised while it is encoded into its bucket, and the scales that follow it.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use engine_core::{
    Arena, ArenaArc, DType, Encoding, Error, ErrorKind, Result, TensorMeta, Treatment, Weight,
};

use crate::{BlockGrid, Codec, Fp8Format, QuantError, Source, SourceType, Store};

/// The bits of a scale that was not computed yet: a NaN that no formula gives.
const UNKNOWN: u32 = u32::MAX;

/// The encoding of a quantised weight: its codes, computed from the source as they are asked for, in any
/// division.
///
/// The code of a device's memory recognises this type and computes the codes with its own kernels.
#[derive(Debug)]
pub struct Fp8Codes {
    source: Weight,
    layout: ArenaArc<Fp8Layout>,
    codec: Codec,
    /// The bits of the scales, filled in where their blocks are encoded. They exist only if the CPU encodes: devices
    /// that compute scales by their own kernels do not use them.
    scales: OnceLock<Box<[AtomicU32]>>,
}

/// The encoding of a quantised weight's scales, which exist once its codes do.
#[derive(Debug)]
pub struct Fp8Scales(Arc<Fp8Codes>);

impl Fp8Scales {
    /// The codes that they belong to.
    pub fn codes(&self) -> &Arc<Fp8Codes> {
        &self.0
    }
}

/// The source type of a data type; `None` for those that are not quantised.
pub(crate) fn source_type(dtype: DType) -> Option<SourceType> {
    match dtype {
        DType::BF16 => Some(SourceType::Bf16),
        DType::F16 => Some(SourceType::F16),
        DType::F32 => Some(SourceType::F32),
        _ => None,
    }
}

/// A shape in the platform's sizes.
pub(crate) fn sizes(meta: &TensorMeta) -> Result<Vec<usize>> {
    meta.shape.iter().map(|&side| usize::try_from(side)).collect::<Result<_, _>>().map_err(|_| {
        Error::new(ErrorKind::Weight, "quantising", "a side does not fit this machine's memory")
            .tensor(&*meta.name)
    })
}

/// Makes layouts.
#[derive(Debug, Default)]
pub(crate) struct Layouts {
    metas: Arena<TensorMeta>,
    layouts: Arena<Fp8Layout>,
    /// Models have thousands of weights of few shapes: what is equal becomes the same memory, which stays in a CPU's caches.
    shapes: HashSet<Arc<[u64]>>,
}

/// What follows from a weight's description and the format: the same in every update.
#[derive(Debug)]
pub(crate) struct Fp8Layout {
    ty: SourceType,
    shape: Vec<usize>,
    format: Fp8Format,
    grid: BlockGrid,
    /// Of the codes.
    granule: u64,
    codes: ArenaArc<TensorMeta>,
    scales: ArenaArc<TensorMeta>,
}

impl Layouts {
    /// Of a weight.
    pub(crate) fn layout(
        &mut self,
        meta: &TensorMeta,
        format: Fp8Format,
    ) -> Result<ArenaArc<Fp8Layout>> {
        let name = &meta.name;
        let ty = source_type(meta.dtype).ok_or_else(|| {
            let message = format!("{} has no FP8 form here, only BF16, F16 and F32 do", meta.dtype);
            Error::new(ErrorKind::Weight, "quantising", message).tensor(&**name)
        })?;
        let shape = sizes(meta)?;
        let grid = format.granularity.grid(&shape).map_err(|error| error.in_tensor(name))?;
        let side = |&side: &usize| side as u64;
        let mut same = |shape: Arc<[u64]>| match self.shapes.get(&shape) {
            Some(known) => Arc::clone(known),
            None => {
                self.shapes.insert(Arc::clone(&shape));
                shape
            }
        };
        let scale_shape = same(grid.scale_shape().iter().map(side).collect());
        let scales = TensorMeta::new(format.scale_name.of(name), DType::F32, scale_shape);
        let codes_shape = same(Arc::clone(&meta.shape));
        let codes = TensorMeta::new(Arc::clone(name), DType::F8_E4M3, codes_shape);
        let granule = granule(&grid, &shape);
        let (codes, scales) = (self.metas.put(codes), self.metas.put(scales));
        let layout = Fp8Layout { ty, shape, format, grid, granule, codes, scales };
        Ok(self.layouts.put(layout))
    }
}

/// The elements at whose multiples splitting a tensor costs nothing.
fn granule(grid: &BlockGrid, shape: &[usize]) -> u64 {
    if grid.elements() == 0 {
        return 1;
    }
    let experts = match *shape {
        [experts, _, _] => experts.max(1),
        _ => 1,
    };
    let first = grid.band_elements(0).len();
    // Where the last band of an expert is shorter, only whole experts are all the same size.
    let is_uneven = grid.band_elements(grid.bands_per_matrix() - 1).len() != first;
    let granule = if experts > 1 && is_uneven { grid.elements() / experts } else { first };
    granule as u64
}

/// A weight as two: its codes, and the scales under their own name.
pub(crate) fn quantized(
    weight: Weight,
    layout: &ArenaArc<Fp8Layout>,
    codec: Codec,
) -> Result<[Weight; 2]> {
    weight.require_whole("quantising")?;
    let layout = layout.clone();
    let codes = Arc::new(Fp8Codes { source: weight, layout, codec, scales: OnceLock::new() });
    let (meta, scale_meta) = (codes.layout.codes.clone(), codes.layout.scales.clone());
    Ok([
        Weight::encoded(meta, codes.clone(), Treatment::Converted)?,
        Weight::encoded(scale_meta, Arc::new(Fp8Scales(codes)), Treatment::Added)?,
    ])
}

impl Fp8Codes {
    /// What is quantised.
    pub fn source(&self) -> &Weight {
        &self.source
    }

    /// The type of the source's elements.
    pub fn source_type(&self) -> SourceType {
        self.layout.ty
    }

    /// `[rows, cols]` or `[experts, rows, cols]`.
    pub fn shape(&self) -> &[usize] {
        &self.layout.shape
    }

    /// How it is quantised.
    pub fn format(&self) -> &Fp8Format {
        &self.layout.format
    }

    /// The blocks.
    pub fn grid(&self) -> &BlockGrid {
        &self.layout.grid
    }

    /// The bits of all scales.
    fn scales(&self) -> &[AtomicU32] {
        let unknown = || (0..self.grid().scales()).map(|_| AtomicU32::new(UNKNOWN)).collect();
        self.scales.get_or_init(unknown)
    }

    fn failed(&self, error: QuantError) -> Error {
        Error::from(error.in_tensor(self.source.name()))
    }

    /// Quantises elements of the tensor `source`, whose scales begin at `first_scale`.
    fn quantize(
        &self,
        source: &Source<'_>,
        elements: Range<usize>,
        first_scale: usize,
        out: &mut [u8],
    ) -> Result<(), QuantError> {
        let grid = self.layout.format.granularity.grid(source.shape())?;
        let mut scales = vec![f32::from_bits(UNKNOWN); grid.scales_of(&elements).len()];
        // The digest reads the codes next, and a rollout of this host soon after.
        let store = Store::Cached;
        self.codec.quantize(source, &self.layout.format, elements, out, &mut scales, store)?;
        for (known, scale) in self.scales()[first_scale..].iter().zip(scales) {
            // Two pieces that share a block compute the same scale.
            if scale.to_bits() != UNKNOWN {
                known.store(scale.to_bits(), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// As `quantize`, for a source that has to be encoded itself: a band at a time, or several of them where
    /// reading has its price.
    fn quantize_bands(&self, elements: Range<usize>, out: &mut [u8]) -> Result<()> {
        const READ: usize = 4 << 20;
        let size = self.layout.ty.size();
        let at_a_time = if self.source.reads_device() { READ / size } else { 0 };
        let bands: Vec<Range<usize>> = self
            .layout
            .grid
            .bands_of(&elements)
            .map(|band| self.layout.grid.band_elements(band))
            .collect();
        let (mut scratch, mut here) = (Vec::new(), 0..0);
        let mut out = out;
        for (index, band) in self.layout.grid.bands_of(&elements).enumerate() {
            let whole = bands[index].clone();
            if whole.end > here.end {
                let fits = |next: &&Range<usize>| next.end - whole.start <= at_a_time;
                let end =
                    bands[index..].iter().take_while(fits).last().map_or(whole.end, |b| b.end);
                here = whole.start..end;
                scratch.resize(here.len() * size, 0);
                let bytes = (here.start * size) as u64..(here.end * size) as u64;
                self.source.encode(bytes, &mut scratch)?;
            }
            let source = (whole.start - here.start) * size..(whole.end - here.start) * size;
            let part = whole.start.max(elements.start)..whole.end.min(elements.end);
            let (now, rest) = out.split_at_mut(part.len());
            out = rest;
            let cols = self.layout.shape.last().copied().unwrap_or(1).max(1);
            let part = part.start - whole.start..part.end - whole.start;
            let first_scale = band * self.layout.grid.scales_per_band();
            Source::new(&scratch[source], self.layout.ty, &[whole.len() / cols, cols])
                .and_then(|source| self.quantize(&source, part, first_scale, now))
                .map_err(|error| self.failed(error.at_band(&self.layout.grid, band)))?;
        }
        Ok(())
    }

    /// A scale; computed if nobody has encoded its block, as when only the scales are read.
    fn scale(&self, index: usize) -> Result<u32> {
        let known = self.scales()[index].load(Ordering::Relaxed);
        if known != UNKNOWN {
            return Ok(known);
        }
        let band = self.layout.grid.band_elements(index / self.layout.grid.scales_per_band());
        let mut codes = vec![0; band.len()];
        self.encode_host(band.start as u64..band.end as u64, &mut codes)?;
        Ok(self.scales()[index].load(Ordering::Relaxed))
    }
}

impl Encoding for Fp8Codes {
    fn name(&self) -> &'static str {
        "fp8"
    }

    fn source_bytes(&self) -> u64 {
        self.source.source_bytes()
    }

    fn granule(&self) -> u64 {
        self.layout.granule
    }

    fn reads_device(&self) -> bool {
        self.source.reads_device()
    }

    fn encode_host(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()> {
        // A code is a byte; `Weight::encode` has checked the range.
        let elements = range.start as usize..range.end as usize;
        match self.source.contiguous_bytes() {
            None => self.quantize_bands(elements, destination),
            Some(bytes) => {
                let first_scale = self.layout.grid.scales_of(&elements).start;
                Source::new(bytes, self.layout.ty, &self.layout.shape)
                    .and_then(|source| self.quantize(&source, elements, first_scale, destination))
                    .map_err(|error| self.failed(error))
            }
        }
    }
}

impl Encoding for Fp8Scales {
    fn name(&self) -> &'static str {
        "fp8-scales"
    }

    fn source_bytes(&self) -> u64 {
        // They come of the same bytes as the codes.
        0
    }

    fn granule(&self) -> u64 {
        size_of::<f32>() as u64
    }

    fn is_deferred(&self) -> bool {
        true
    }

    fn encode_host(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()> {
        let mut at = range.start as usize;
        let mut rest = destination;
        while !rest.is_empty() {
            let bytes = self.0.scale(at / 4)?.to_le_bytes();
            let bytes = &bytes[at % 4..];
            let now = bytes.len().min(rest.len());
            let (to, after) = rest.split_at_mut(now);
            to.copy_from_slice(&bytes[..now]);
            (at, rest) = (at + now, after);
        }
        Ok(())
    }
}

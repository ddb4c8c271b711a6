//! What a receiver of quantised weights checks them against: the source, quantised here again.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use checkpoint_engine::fp8::rules::{Decision, QuantPlan, RulesConfig};
use checkpoint_engine::fp8::{BlockGrid, Codec, Source as Matrix, SourceType, Store, stored};
use engine_core::{DType, Error, Result, TensorMeta, Version};

use crate::threads::pool;

/// Makes bytes of a source's tensor.
pub(super) type Make<'a> = dyn Fn(&TensorMeta, Range<u64>, &mut [u8]) + Sync + 'a;

/// The plan of a source, and the scales of what was checked.
#[derive(Debug)]
pub(super) struct Quantized {
    plan: QuantPlan,
    codec: Codec,
    /// The scales of weights whose codes were checked: the bits of each.
    scales: Mutex<HashMap<String, (Version, Vec<u32>)>>,
}

/// A weight of the source that travels quantised.
struct Planned<'a> {
    source: &'a TensorMeta,
    ty: SourceType,
    grid: BlockGrid,
}

/// What a received tensor has to be.
pub(super) enum Expected {
    /// What the source has under this name.
    Source,
    /// The codes of the weight of this name.
    Codes(TensorMeta),
    /// The scales of a weight.
    Scales { meta: TensorMeta, weight: String },
}

impl Quantized {
    pub(super) fn new<'a>(
        metas: impl Iterator<Item = &'a TensorMeta>,
        rules: &RulesConfig,
    ) -> Result<Self> {
        let parameters = metas.map(|meta| {
            let shape = meta.shape.iter().map(|&side| side as usize).collect();
            (meta.name.to_string(), shape, stored(meta.dtype))
        });
        let plan = QuantPlan::resolve(parameters, rules)?;
        Ok(Self { plan, codec: Codec::best(), scales: Mutex::default() })
    }

    fn planned<'a>(&self, source: Option<&'a TensorMeta>) -> Option<Planned<'a>> {
        let source = source?;
        let entry = self.plan.get(&source.name)?;
        let ty = match source.dtype {
            DType::BF16 => SourceType::Bf16,
            DType::F16 => SourceType::F16,
            DType::F32 => SourceType::F32,
            _ => return None,
        };
        let grid = self.plan.format().granularity.grid(&entry.shape).ok()?;
        (entry.decision == Decision::Quantize).then_some(Planned { source, ty, grid })
    }

    /// What the tensor of a name has to be.
    pub(super) fn expected<'a>(
        &self,
        name: &str,
        source: impl Fn(&str) -> Option<&'a TensorMeta>,
    ) -> Expected {
        if let Some(planned) = self.planned(source(name)) {
            let meta = TensorMeta { dtype: DType::F8_E4M3, ..planned.source.clone() };
            return Expected::Codes(meta);
        }
        let weight = name.strip_suffix(self.plan.format().scale_name.suffix());
        let planned = weight.and_then(|weight| self.planned(source(weight)));
        match (weight, planned) {
            (Some(weight), Some(planned)) => {
                let shape: Vec<u64> =
                    planned.grid.scale_shape().iter().map(|&side| side as u64).collect();
                let meta = TensorMeta::new(name, DType::F32, shape);
                Expected::Scales { meta, weight: weight.to_owned() }
            }
            _ => Expected::Source,
        }
    }

    /// Checks codes from `offset` on, and keeps the scales for later. Returns the bytes of the
    /// source that they stand for, or the position of the first code that differs.
    pub(super) fn check_codes(
        &self,
        source: &TensorMeta,
        version: Version,
        offset: u64,
        codes: &[u8],
        make: &Make<'_>,
    ) -> Result<Result<u64, u64>> {
        let Some(planned) = self.planned(Some(source)) else { return Ok(Err(offset)) };
        let elements = offset as usize..offset as usize + codes.len();
        let bands = planned.grid.bands_of(&elements);
        let check = |band| {
            let (made, scales) = self.band(&planned, band, make)?;
            let whole = planned.grid.band_elements(band);
            let part = whole.start.max(elements.start)..whole.end.min(elements.end);
            let here = &codes[part.start - elements.start..part.end - elements.start];
            let there = &made[part.start - whole.start..part.end - whole.start];
            let differs = here.iter().zip(there).position(|(a, b)| a != b);
            Ok((band, differs.map(|at| (part.start + at) as u64), scales))
        };
        let checked: Vec<(usize, Option<u64>, Vec<f32>)> =
            pool()?.map(bands, check).into_iter().collect::<Result<_>>()?;
        if let Some(at) = checked.iter().find_map(|(_, differs, _)| *differs) {
            return Ok(Err(at));
        }
        let mut known = self.scales.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || (version, vec![0; planned.grid.scales()]);
        let entry = known.entry(source.name.to_string()).or_insert_with(fresh);
        if entry.0 != version {
            *entry = fresh();
        }
        let per_band = planned.grid.scales_per_band();
        for (band, _, scales) in checked {
            for (to, scale) in entry.1[band * per_band..].iter_mut().zip(scales) {
                *to = scale.to_bits();
            }
        }
        Ok(Ok(codes.len() as u64 * planned.ty.size() as u64))
    }

    /// Checks scales from byte `offset` on; returns the position of the first byte that differs.
    pub(super) fn check_scales(
        &self,
        weight: &str,
        version: Version,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), u64> {
        let known = self.scales.lock().unwrap_or_else(PoisonError::into_inner);
        // Without codes of this version before them, none of the scales is right.
        let Some((_, scales)) = known.get(weight).filter(|entry| entry.0 == version) else {
            return Err(offset);
        };
        let expected = scales.iter().flat_map(|scale| scale.to_le_bytes());
        let differs = bytes.iter().zip(expected.skip(offset as usize)).position(|(a, b)| *a != b);
        differs.map_or(Ok(()), |at| Err(offset + at as u64))
    }

    /// The codes and scales of one row of blocks.
    fn band(
        &self,
        planned: &Planned<'_>,
        band: usize,
        make: &Make<'_>,
    ) -> Result<(Vec<u8>, Vec<f32>)> {
        let whole = planned.grid.band_elements(band);
        let size = planned.ty.size();
        let mut bytes = vec![0; whole.len() * size];
        make(planned.source, (whole.start * size) as u64..(whole.end * size) as u64, &mut bytes);
        let cols = planned.source.shape.last().map_or(1, |&cols| cols as usize).max(1);
        let mut codes = vec![0; whole.len()];
        let mut scales = vec![0.0; planned.grid.scales_per_band()];
        Matrix::new(&bytes, planned.ty, &[whole.len() / cols, cols])
            .and_then(|matrix| {
                let format = self.plan.format();
                let all = 0..whole.len();
                self.codec.quantize(&matrix, format, all, &mut codes, &mut scales, Store::Cached)
            })
            .map_err(|error| Error::from(error.in_tensor(&planned.source.name)))?;
        Ok((codes, scales))
    }
}

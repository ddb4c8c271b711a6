//! `cast`: floating-point weights in another type, converted as they are packed.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use futures::StreamExt;
use half::{bf16, f16};

use super::WeightStream;
use crate::{DType, Encoding, Error, ErrorKind, Result, TensorMeta, Treatment, Weight};

pub(super) fn cast(weights: WeightStream<'_>, to: DType) -> WeightStream<'_> {
    WeightStream::new(weights.map(move |weight| weight.and_then(|weight| cast_weight(weight, to))))
}

fn cast_weight(weight: Weight, to: DType) -> Result<Weight> {
    let from = weight.meta().dtype;
    if from == to || !is_float(from) {
        return Ok(weight);
    }
    if !is_float(to) {
        return Err(Error::new(
            ErrorKind::Weight,
            "casting a weight",
            format!("there is no cast to {to}, only to BF16, F16, F32 and F64"),
        )
        .tensor(weight.name()));
    }
    let meta = TensorMeta { dtype: to, ..TensorMeta::clone(weight.meta()) };
    let (part, named_part) = (weight.part.clone(), weight.named_part);
    let ends_bucket = weight.ends_bucket;
    let cast = Arc::new(Cast { source: weight, from, to });
    Ok(Weight { part, named_part, ends_bucket, ..Weight::encoded(meta, cast, Treatment::Plain)? })
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16 | DType::F32 | DType::F64)
}

/// The encoding of a weight that is [cast](crate::WeightStreamExt::cast) to another floating-point type.
///
/// Every element is rounded once, to nearest even; what is no number stays so, with the upper bits that fit and the first of them set.
/// Kinds of memory that recognise it have kernels for it.
#[derive(Debug)]
pub struct Cast {
    source: Weight,
    from: DType,
    to: DType,
}

impl Cast {
    /// What is cast.
    pub fn source(&self) -> &Weight {
        &self.source
    }

    /// The type that the elements have.
    pub fn from(&self) -> DType {
        self.from
    }

    /// The type that they get.
    pub fn to(&self) -> DType {
        self.to
    }
}

/// Elements converted at a time, on the stack.
const PIECE: usize = 1024;

/// Bytes read from a device at a time, at most.
const DEVICE_PIECE: usize = 8 << 20;

thread_local! {
    /// What was read from a device, kept from one range to the next.
    static READ: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Encoding for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn source_bytes(&self) -> u64 {
        self.source.source_bytes()
    }

    fn granule(&self) -> u64 {
        self.to.bits() / 8
    }

    fn is_deferred(&self) -> bool {
        self.source.is_deferred()
    }

    fn reads_device(&self) -> bool {
        self.source.reads_device()
    }

    fn encode_host(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()> {
        let (read, write) = ((self.from.bits() / 8) as usize, (self.to.bits() / 8) as usize);
        let (mut first, last) = (range.start / write as u64, range.end.div_ceil(write as u64));
        let mut skip = (range.start % write as u64) as usize;
        let (mut few, mut output) = ([0; PIECE * 8], [0; PIECE * 8]);
        let mut many = Vec::new();
        let buffer = match self.reads_device() {
            false => &mut few[..PIECE * read],
            true => {
                let elements = (last - first).min((DEVICE_PIECE / read) as u64) as usize;
                many = READ.take();
                many.resize(elements * read, 0);
                &mut many[..]
            }
        };
        let mut rest = destination;
        while first < last {
            let count = (last - first).min((buffer.len() / read) as u64) as usize;
            let source = &mut buffer[..count * read];
            let start = first * read as u64;
            self.source.encode(start..start + source.len() as u64, source)?;
            for piece in source.chunks(PIECE * read) {
                let output = &mut output[..piece.len() / read * write];
                convert(self.from, piece, self.to, output);
                let take = (output.len() - skip).min(rest.len());
                let (now, after) = rest.split_at_mut(take);
                now.copy_from_slice(&output[skip..skip + take]);
                (rest, skip) = (after, 0);
            }
            first += count as u64;
        }
        READ.set(many);
        Ok(())
    }
}

/// Rounded to odd: what lies between two `f32` becomes the one of them whose last bit is set.
///
/// Rounding that to nearest even, to a type with at least two bits less, is one rounding of the whole. Rounding to nearest twice is not: what is
/// just above a tie would become the tie first.
fn odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || value.is_nan() {
        return nearest;
    }
    let is_above = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(is_above)) | 1)
}

fn convert(from: DType, source: &[u8], to: DType, output: &mut [u8]) {
    /// Through `$via`, which holds every value of both types exactly, so that one rounding happens.
    macro_rules! through {
        ($via:ty, $read:ty => $($to:pat => $write:expr),*) => {
            match to { $($to => each(source, output, |bytes| {
                let value: $via = <$read>::from_le_bytes(bytes).into();
                #[allow(clippy::redundant_closure_call, reason = "one shape for all pairs")]
                ($write)(value).to_le_bytes()
            }),)* _ => {} }
        };
    }
    macro_rules! all {
        ($via:ty, $read:ty, $f32:expr, $f16:expr, $bf16:expr) => {
            through!($via, $read =>
                DType::F32 => $f32, DType::F16 => $f16, DType::BF16 => $bf16, DType::F64 => f64::from)
        };
    }
    match from {
        DType::F64 => {
            all!(f64, f64, |v| v as f32, |v| f16::from_f32(odd(v)), |v| bf16::from_f32(odd(v)));
        }
        DType::F32 => all!(f32, f32, |v: f32| v, f16::from_f32, bf16::from_f32),
        DType::F16 => all!(f32, f16, |v: f32| v, f16::from_f32, bf16::from_f32),
        DType::BF16 => all!(f32, bf16, |v: f32| v, f16::from_f32, bf16::from_f32),
        _ => {}
    }
}

fn each<const R: usize, const W: usize>(
    source: &[u8],
    output: &mut [u8],
    mut convert: impl FnMut([u8; R]) -> [u8; W],
) {
    let (source, _) = source.as_chunks::<R>();
    let (output, _) = output.as_chunks_mut::<W>();
    for (from, to) in source.iter().zip(output) {
        *to = convert(*from);
    }
}

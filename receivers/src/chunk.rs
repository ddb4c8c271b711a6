//! Groups weights that travel together: one bucket of the trainer, one request to every server.
//!
//! The receivers call a bucket a chunk: the bytes of its weights one behind the other, without gaps. A weight is never split, because a
//! receiver takes it by one broadcast. A weight that is larger than a bucket travels alone. Within a bucket the weights are sorted by the
//! size of their elements, the largest first. So each begins at a multiple of its own element size, as torch requires of a view.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use collective::SharedSlot;
use engine_core::clock::within;
use engine_core::memory::Job;
use engine_core::{
    ArenaArc, DType, Error, ErrorKind, Result, TensorCounts, TensorMeta, Weight, WeightStream,
};
use futures::{FutureExt, StreamExt};

use crate::whole::{Whole, WholeBucket};

const COLLECTING: &str = "reading the trainer's weights";

/// The weights of one bucket.
#[derive(Debug)]
pub(crate) struct Chunk {
    /// Sorted by offset.
    pub(crate) jobs: Vec<Job>,
    /// Their bytes.
    pub(crate) len: u64,
    /// Bytes of the trainer's memory from which they are made.
    pub(crate) source_bytes: u64,
}

/// Divides a stream into chunks.
#[derive(Debug)]
pub(crate) struct Chunks {
    /// The most bytes of a chunk, unless it is a single weight.
    limit: u64,
    /// Weights that were read, and belong to a later chunk.
    pending: VecDeque<Weight>,
    names: HashSet<Arc<str>>,
    /// All weights so far, in the order of the stream, if they are wanted.
    pub(crate) metas: Option<Vec<ArenaArc<TensorMeta>>>,
    pub(crate) counts: TensorCounts,
}

impl Chunks {
    pub(crate) fn new(limit: u64) -> Self {
        let (pending, names, counts) = Default::default();
        Self { limit, pending, names, metas: None, counts }
    }

    /// The next chunk, or `None` at the end of the stream.
    pub(crate) async fn next(
        &mut self,
        weights: &mut WeightStream<'_>,
        deadline: Duration,
    ) -> Result<Option<Chunk>> {
        let (mut taken, mut len) = (Vec::new(), 0);
        loop {
            let weight = self.read(weights, deadline).await?;
            let Some(weight) = weight else { break };
            if !taken.is_empty() && weight.byte_len() > self.limit.saturating_sub(len) {
                self.pending.push_front(weight);
                break;
            }
            len += weight.byte_len();
            taken.push(weight);
        }
        Ok((!taken.is_empty()).then(|| packed(taken)))
    }

    /// The chunk that servers were told of as this bucket; `None` without a bucket, at the end of the stream. If the stream brings other
    /// weights, what was read of them is kept for [`next`](Self::next).
    ///
    /// # Errors
    ///
    /// `Mismatch`, naming the first other weight.
    pub(crate) async fn next_of(
        &mut self,
        weights: &mut WeightStream<'_>,
        whole: &Whole,
        bucket: Option<&WholeBucket>,
        deadline: Duration,
    ) -> Result<Option<Chunk>> {
        let expected = bucket
            .map_or(whole.metas().len()..whole.metas().len() + 1, |bucket| bucket.weights.clone());
        let mut taken: VecDeque<Weight> = VecDeque::new();
        for index in expected {
            let weight = self.read(weights, deadline).await?;
            let meta = whole.metas().get(index);
            if weight.as_ref().map(Weight::meta) != meta {
                let error = differs(meta, weight.as_ref());
                taken.extend(weight);
                taken.append(&mut self.pending);
                self.pending = taken;
                return Err(error);
            }
            taken.extend(weight);
        }
        let Some(bucket) = bucket else { return Ok(None) };
        let start = bucket.weights.start;
        let mut taken: Vec<Option<Weight>> = taken.into_iter().map(Some).collect();
        let ordered = bucket.order.iter().filter_map(|index| taken.get_mut(index - start)?.take());
        Ok(Some(laid_out(ordered)))
    }

    async fn read(
        &mut self,
        weights: &mut WeightStream<'_>,
        deadline: Duration,
    ) -> Result<Option<Weight>> {
        if let Some(weight) = self.pending.pop_front() {
            return Ok(Some(weight));
        }
        // Weights that are ready need no timer: one for each of thousands of weights would cost time.
        let weight = match weights.next().now_or_never() {
            Some(weight) => weight,
            None => within(deadline, weights.next()).await.ok_or_else(|| {
                let message = format!("no weight within {:.1} s", deadline.as_secs_f64());
                Error::new(ErrorKind::Timeout, COLLECTING, message)
            })?,
        };
        let Some(weight) = weight.transpose()? else { return Ok(None) };
        weight.require_whole(COLLECTING)?;
        torch_name(weight.meta())?;
        if !self.names.insert(weight.meta().name.clone()) {
            let message = "the stream has a weight of this name already";
            return Err(Error::new(ErrorKind::Weight, COLLECTING, message).tensor(weight.name()));
        }
        self.counts.add(&weight);
        if let Some(metas) = &mut self.metas {
            metas.push(weight.meta().clone());
        }
        Ok(Some(weight))
    }
}

/// The error for a stream with another weight than servers were told.
fn differs(expected: Option<&ArenaArc<TensorMeta>>, got: Option<&Weight>) -> Error {
    let words = |meta: &TensorMeta| format!("{} {:?} {}", meta.dtype, meta.shape, meta.name);
    let (expected, got) =
        (expected.map(|meta| words(meta)), got.map(|weight| words(weight.meta())));
    let message = format!(
        "the stream has {}, and the last update had {}: one call announces the weights of the last update",
        got.as_deref().unwrap_or("no more weights"),
        expected.as_deref().unwrap_or("no more"),
    );
    Error::new(ErrorKind::Mismatch, COLLECTING, message)
}

/// Lays weights out one behind the other.
fn packed(mut weights: Vec<Weight>) -> Chunk {
    // The sort is stable: weights of one element size stay in the order of the stream.
    weights.sort_by_key(|weight| std::cmp::Reverse(weight.meta().dtype.bits()));
    laid_out(weights)
}

/// The same, in this order.
fn laid_out(weights: impl IntoIterator<Item = Weight>) -> Chunk {
    let (mut jobs, mut len, mut source_bytes) = (Vec::new(), 0, 0);
    for weight in weights {
        source_bytes += weight.source_bytes();
        let job = Job { start: 0, len: weight.byte_len(), offset: len, weight };
        len += job.len;
        jobs.push(job);
    }
    Chunk { jobs, len, source_bytes }
}

/// The description of a bucket's weights for servers, in the order in which they lie there.
#[derive(Debug, Default)]
pub(crate) struct Tensors {
    pub(crate) names: Vec<Arc<str>>,
    /// The names of their types in torch.
    pub(crate) types: Vec<&'static str>,
    pub(crate) shapes: Vec<Vec<u64>>,
    /// In bytes.
    pub(crate) sizes: Vec<u64>,
    /// The number of elements sent of each weight, with their positions before them, if only changed elements are sent.
    pub(crate) patches: Option<Vec<u64>>,
    /// Where servers' workers read the bucket, in the order of the workers of a server, if they read it in place.
    pub(crate) shared: Vec<SharedSlot>,
}

impl Tensors {
    /// Where each weight lies in the bucket, in bytes.
    pub(crate) fn parts(&self) -> Vec<Range<u64>> {
        parts(&self.sizes)
    }

    /// The pieces that are sent one by one if a bucket is not sent as a whole: each weight, or the positions and the values of each.
    pub(crate) fn pieces(&self) -> Vec<Range<u64>> {
        match &self.patches {
            None => self.parts(),
            Some(counts) => {
                let both = |(size, count): (&u64, &u64)| [4 * count, size - 4 * count];
                let sizes: Vec<u64> = self.sizes.iter().zip(counts).flat_map(both).collect();
                parts(&sizes)
            }
        }
    }
}

/// The ranges of pieces of these sizes, one behind the other.
pub(crate) fn parts(sizes: &[u64]) -> Vec<Range<u64>> {
    let mut end = 0;
    let part = |size: &u64| {
        let start = end;
        end += size;
        start..end
    };
    sizes.iter().map(part).collect()
}

impl Chunk {
    /// Describes it to servers.
    ///
    /// # Errors
    ///
    /// `Weight` for types that torch does not have.
    pub(crate) fn tensors(&self) -> Result<Tensors> {
        described(self.jobs.iter().map(|job| &**job.weight.meta()))
    }
}

/// The description of weights for servers.
///
/// # Errors
///
/// `Weight` for types that torch does not have.
pub(crate) fn described<'a>(metas: impl Iterator<Item = &'a TensorMeta>) -> Result<Tensors> {
    let mut all = Tensors::default();
    for meta in metas {
        all.names.push(meta.name.clone());
        all.types.push(torch_name(meta)?);
        all.shapes.push(meta.shape.to_vec());
        all.sizes.push(meta.shape.iter().product::<u64>() * item_bytes(meta)?);
    }
    Ok(all)
}

/// The bytes of an element of a weight.
///
/// # Errors
///
/// `Weight` if torch has no such type.
pub(crate) fn item_bytes(meta: &TensorMeta) -> Result<u64> {
    torch_name(meta).map(|_| meta.dtype.bits() / 8)
}

/// The name in torch of the type of a weight's elements.
///
/// # Errors
///
/// `Weight` if torch has no such type.
pub(crate) fn torch_name(meta: &TensorMeta) -> Result<&'static str> {
    Ok(match meta.dtype {
        DType::BOOL => "bool",
        DType::U8 => "uint8",
        DType::I8 => "int8",
        DType::F8_E5M2 => "float8_e5m2",
        DType::F8_E4M3 => "float8_e4m3fn",
        DType::F8_E8M0 => "float8_e8m0fnu",
        DType::F8_E4M3FNUZ => "float8_e4m3fnuz",
        DType::F8_E5M2FNUZ => "float8_e5m2fnuz",
        DType::I16 => "int16",
        DType::U16 => "uint16",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::I32 => "int32",
        DType::U32 => "uint32",
        DType::F32 => "float32",
        DType::C64 => "complex64",
        DType::F64 => "float64",
        DType::I64 => "int64",
        DType::U64 => "uint64",
        other => {
            let message = format!("the receivers' torch has no type {other} of this shape");
            return Err(Error::new(ErrorKind::Weight, COLLECTING, message).tensor(&*meta.name));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::ensure_async_iterator;
    use futures::executor::block_on;
    use proptest::prelude::*;

    const TYPES: [DType; 6] =
        [DType::F8_E4M3, DType::F32, DType::BF16, DType::U8, DType::I64, DType::F16];

    fn weight(name: &str, dtype: DType, elements: u64) -> Weight {
        let bytes = vec![0_u8; (elements * dtype.bits() / 8) as usize];
        Weight::new(name, dtype, [elements], bytes).unwrap()
    }

    fn chunks(limit: u64, weights: Vec<Weight>) -> Result<Vec<Chunk>> {
        let mut stream = ensure_async_iterator(weights);
        let mut chunks = Chunks::new(limit);
        let mut all = Vec::new();
        while let Some(chunk) = block_on(chunks.next(&mut stream, Duration::from_secs(1)))? {
            all.push(chunk);
        }
        Ok(all)
    }

    proptest! {
        #[test]
        fn every_weight_is_whole_in_one_chunk_without_gaps_and_begins_at_a_multiple_of_its_elements(
            sizes in proptest::collection::vec((0..TYPES.len(), 0_u64..40), 0..60),
            limit in 320_u64..2000,
        ) {
            let named = |(index, &(ty, len)): (usize, &(usize, u64))| {
                weight(&format!("w{index}"), TYPES[ty], len)
            };
            let all = chunks(limit, sizes.iter().enumerate().map(named).collect()).unwrap();
            let mut seen = Vec::new();
            for chunk in &all {
                let mut at = 0;
                prop_assert!(chunk.len <= limit && !chunk.jobs.is_empty());
                for Job { weight, start, len, offset } in &chunk.jobs {
                    prop_assert_eq!((*start, *len, *offset), (0, weight.byte_len(), at));
                    prop_assert!(offset.is_multiple_of(weight.meta().dtype.bytes().unwrap()));
                    at += len;
                    seen.push(weight.name()[1..].parse::<usize>().unwrap());
                }
                prop_assert_eq!(at, chunk.len);
            }
            // Chunks keep the order of the stream: no weight of a chunk comes after one of the next chunk.
            let mut firsts = 0;
            for chunk in &all {
                let mut here = seen[firsts..firsts + chunk.jobs.len()].to_vec();
                here.sort_unstable();
                prop_assert_eq!(here, (firsts..firsts + chunk.jobs.len()).collect::<Vec<_>>());
                firsts += chunk.jobs.len();
            }
            prop_assert_eq!(firsts, sizes.len());
        }
    }

    #[test]
    fn a_weight_that_is_larger_than_a_bucket_is_alone_in_one() {
        let sizes = [("a", 3), ("b", 100), ("c", 3), ("d", 3)];
        let weights = sizes.map(|(name, len)| weight(name, DType::U8, len));
        let all = chunks(64, weights.to_vec()).unwrap();
        let lens: Vec<u64> = all.iter().map(|chunk| chunk.len).collect();
        assert_eq!(lens, [3, 100, 6]);
    }

    #[test]
    fn a_name_that_comes_twice_is_an_error() {
        let twice =
            vec![weight("a", DType::U8, 1), weight("b", DType::U8, 1), weight("a", DType::U8, 1)];
        assert_eq!(chunks(1 << 20, twice).unwrap_err().kind(), ErrorKind::Weight);
    }

    #[test]
    fn a_type_that_torch_does_not_have_is_an_error_that_names_the_weight() {
        let error = chunks(64, vec![weight("q", DType::F4, 2)]).unwrap_err();
        assert_eq!(error.report().tensor.as_deref(), Some("q"));
    }
}

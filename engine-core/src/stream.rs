//! Streams of weights, and the combinators that act on them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::stream::{BoxStream, Stream, StreamExt};

use crate::{DType, Error, Result, TensorMeta, Weight};

mod cast;
mod filter;
mod inspect;
mod map_names;
mod off_executor;

pub use cast::Cast;

/// The weights of one update, in order: what every engine sends.
///
/// [`ensure_async_iterator`] makes one of any iterator or stream; [`WeightStreamExt`] has the
/// combinators.
pub struct WeightStream<'a>(BoxStream<'a, Result<Weight>>);

impl<'a> WeightStream<'a> {
    /// Wraps a stream whose items are weights or the error that ended them.
    pub fn new(stream: impl Stream<Item = Result<Weight>> + Send + 'a) -> Self {
        Self(stream.boxed())
    }
}

impl Stream for WeightStream<'_> {
    type Item = Result<Weight>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl std::fmt::Debug for WeightStream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WeightStream(..)")
    }
}

/// What a source of weights may yield: a weight, or a weight or the error that ended them.
///
/// Implemented for [`Weight`] and for `Result<Weight, E>` of any error; nothing else is needed to
/// pass a source to [`ensure_async_iterator`].
pub trait IntoWeight: Send {
    /// The weight, or the engine's error. Errors that are not [`Error`] become the source of one
    /// of kind [`Source`](crate::ErrorKind::Source).
    fn into_weight(self) -> Result<Weight>;
}

impl IntoWeight for Weight {
    fn into_weight(self) -> Result<Weight> {
        Ok(self)
    }
}

impl<E: Into<Box<dyn std::error::Error + Send + Sync>> + Send> IntoWeight for Result<Weight, E> {
    fn into_weight(self) -> Result<Weight> {
        self.map_err(|error| match error.into().downcast::<Error>() {
            Ok(error) => *error,
            Err(error) => Error::new(
                crate::ErrorKind::Source,
                "reading the trainer's weights",
                error.to_string(),
            )
            .with_source(error),
        })
    }
}

/// Anything that yields weights, synchronously or not, fallible or not.
///
/// The marker `M` keeps the implementations for iterators and for streams apart and is always
/// inferred. Iterators take one more step of type inference than streams, none that a caller sees.
pub trait IntoWeightStream<'a, M>: Sized {
    /// The source as one stream.
    fn into_weight_stream(self) -> WeightStream<'a>;
}

/// Marks sources that are iterators.
#[derive(Debug)]
pub enum FromIterator {}

/// Marks sources that are asynchronous streams.
#[derive(Debug)]
pub enum FromStream {}

impl<'a, I> IntoWeightStream<'a, FromIterator> for I
where
    I: IntoIterator,
    I::Item: IntoWeight + 'a,
    I::IntoIter: Send + 'a,
{
    fn into_weight_stream(self) -> WeightStream<'a> {
        WeightStream::new(futures::stream::iter(self.into_iter().map(IntoWeight::into_weight)))
    }
}

impl<'a, S> IntoWeightStream<'a, FromStream> for S
where
    S: Stream + Send + 'a,
    S::Item: IntoWeight + 'a,
{
    fn into_weight_stream(self) -> WeightStream<'a> {
        WeightStream::new(self.map(IntoWeight::into_weight))
    }
}

/// Makes one [`WeightStream`] of any source of weights: an iterator or a stream, of weights or of
/// results.
///
/// It is the only place where synchronous and asynchronous sources differ; no engine has a second
/// path. An iterator is polled where the stream is polled: move one that blocks (reads a disk,
/// gathers shards) off the executor with [`WeightStreamExt::off_executor`] instead.
///
/// # Examples
///
/// ```
/// use engine_core::{DType, Result, Weight, ensure_async_iterator};
///
/// let weights = vec![Weight::new("a", DType::U8, [1], vec![7_u8])?];
/// let from_iterator = ensure_async_iterator(weights.clone());
/// let from_results = ensure_async_iterator(weights.clone().into_iter().map(std::io::Result::Ok));
/// let from_stream = ensure_async_iterator(futures::stream::iter(weights));
/// # Ok::<(), engine_core::Error>(())
/// ```
pub fn ensure_async_iterator<'a, M>(source: impl IntoWeightStream<'a, M>) -> WeightStream<'a> {
    source.into_weight_stream()
}

/// Combinators on anything that yields weights.
///
/// All keep the order of the weights, pass errors through untouched, and may be dropped at any
/// time.
pub trait WeightStreamExt<'a, M>: IntoWeightStream<'a, M> {
    /// Renames weights: gives each its new name.
    fn map_names<F>(self, rename: F) -> WeightStream<'a>
    where
        F: FnMut(&str) -> Arc<str> + Send + 'a,
    {
        map_names::map_names(self.into_weight_stream(), rename)
    }

    /// Keeps the weights whose description the predicate accepts.
    fn filter_weights<F>(self, keep: F) -> WeightStream<'a>
    where
        F: FnMut(&TensorMeta) -> bool + Send + 'a,
    {
        filter::filter(self.into_weight_stream(), keep)
    }

    /// Casts floating-point weights to another type as they are packed.
    ///
    /// `BF16`, `F16`, `F32` and `F64` are cast, each value rounded to nearest even; weights of every
    /// other type, and those that have the wanted type already, pass unchanged.
    fn cast(self, to: DType) -> WeightStream<'a> {
        cast::cast(self.into_weight_stream(), to)
    }

    /// Calls a function on each weight that passes.
    fn inspect_weights<F>(self, inspect: F) -> WeightStream<'a>
    where
        F: FnMut(&Weight) + Send + 'a,
    {
        inspect::inspect(self.into_weight_stream(), inspect)
    }

    /// Moves a source that blocks (it reads a disk, or gathers shards) to a thread of its own.
    ///
    /// At most `ahead` weights wait for the engine, so that the source runs ahead of the transfer
    /// without filling the memory.
    ///
    /// # Cancel safety
    ///
    /// Dropping the stream ends the thread after the weight that it is producing.
    fn off_executor(self, ahead: usize) -> WeightStream<'static>
    where
        Self: IntoIterator<Item: IntoWeight> + Send + 'static,
    {
        off_executor::off_executor(self, ahead)
    }
}

impl<'a, M, S: IntoWeightStream<'a, M>> WeightStreamExt<'a, M> for S {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use futures::executor::block_on;
    use half::bf16;

    fn weight(name: &str) -> Weight {
        Weight::new(name, DType::F32, [2], [1.0_f32, -2.5].map(f32::to_le_bytes).concat()).unwrap()
    }

    fn names(stream: WeightStream<'_>) -> Vec<String> {
        block_on(stream.map(|weight| weight.unwrap().name().to_owned()).collect())
    }

    #[test]
    fn iterators_and_streams_of_weights_and_results_give_the_same_stream() {
        let two = || vec![weight("a"), weight("b")];
        assert_eq!(names(ensure_async_iterator(two())), ["a", "b"]);
        let results = two().into_iter().map(Ok::<_, std::io::Error>);
        assert_eq!(names(ensure_async_iterator(results)), ["a", "b"]);
        assert_eq!(names(ensure_async_iterator(futures::stream::iter(two()))), ["a", "b"]);
        let results = futures::stream::iter(two()).map(Ok::<_, Error>);
        assert_eq!(names(ensure_async_iterator(results)), ["a", "b"]);
        assert_eq!(names(two().off_executor(1)), ["a", "b"]);
    }

    #[test]
    fn an_error_of_the_source_keeps_its_words_and_an_engine_error_its_kind() {
        let source = [Err(std::io::Error::other("shard 3 is gone"))];
        let error = block_on(ensure_async_iterator(source).next()).unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Source);
        assert!(error.to_string().contains("shard 3 is gone"));
        let source = [Err(Error::new(ErrorKind::Resource, "gathering", "out of memory"))];
        let error = block_on(ensure_async_iterator(source).next()).unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Resource);
    }

    #[test]
    fn combinators_rename_select_and_observe_in_order() {
        let mut seen = Vec::new();
        let stream = vec![weight("model.a"), weight("skip"), weight("model.b")]
            .inspect_weights(|weight| seen.push(weight.name().to_owned()))
            .filter_weights(|meta| meta.name.starts_with("model."))
            .map_names(|name| name.trim_start_matches("model.").into());
        assert_eq!(names(stream), ["a", "b"]);
        assert_eq!(seen, ["model.a", "skip", "model.b"]);
    }

    #[test]
    fn cast_rounds_to_nearest_even_in_any_division_of_the_range() {
        let values: Vec<f32> = (0..4096).map(|i| (i as f32).sin() * 3e5).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let source = vec![Weight::new("w", DType::F32, [4096], bytes).unwrap()];
        let cast = block_on(source.cast(DType::BF16).next()).unwrap().unwrap();
        assert_eq!(cast.meta().dtype, DType::BF16);
        let expected: Vec<u8> =
            values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        assert_eq!(cast.to_bytes().unwrap(), expected);
        let mut part = vec![0; 1001];
        cast.encode(77..1078, &mut part).unwrap();
        assert_eq!(part, expected[77..1078]);
    }

    /// The value of a finite bit pattern's upper neighbour, and the exact middle between both.
    fn middles(values: impl Iterator<Item = f64>) -> Vec<(f64, f64, f64)> {
        let all: Vec<f64> = values.collect();
        all.windows(2).map(|pair| (pair[0], f64::midpoint(pair[0], pair[1]), pair[1])).collect()
    }

    /// What `F64` values become, as `f64`.
    fn cast_of(values: &[f64], to: DType) -> Vec<f64> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let weight = Weight::new("w", DType::F64, [values.len() as u64], bytes).unwrap();
        let cast = block_on(vec![weight].cast(to).next()).unwrap().unwrap().to_bytes().unwrap();
        let (halves, _) = cast.as_chunks::<2>();
        let value = |half: &[u8; 2]| match to {
            DType::BF16 => bf16::from_le_bytes(*half).to_f64(),
            _ => half::f16::from_le_bytes(*half).to_f64(),
        };
        halves.iter().map(value).collect()
    }

    #[test]
    fn a_double_beside_the_middle_of_two_halves_becomes_the_nearer_one() {
        let halves = |to| match to {
            DType::BF16 => middles((0..0x7f80).map(|bits| bf16::from_bits(bits).to_f64())),
            _ => middles((0..0x7c00).map(|bits| half::f16::from_bits(bits).to_f64())),
        };
        for to in [DType::BF16, DType::F16] {
            let all = halves(to);
            for sign in [1.0, -1.0] {
                let of = |value: fn(f64) -> f64| -> Vec<f64> {
                    let doubles: Vec<f64> =
                        all.iter().map(|&(_, at, _)| sign * value(at)).collect();
                    cast_of(&doubles, to)
                };
                let (below, at, above) = (of(f64::next_down), of(|at| at), of(f64::next_up));
                for (index, &(low, _, high)) in all.iter().enumerate() {
                    let even = if index.is_multiple_of(2) { low } else { high };
                    let found = (below[index], at[index], above[index]);
                    assert_eq!(found, (sign * low, sign * even, sign * high), "{to}, {index}");
                }
            }
        }
        let beyond = [f64::INFINITY, 1e300, -1e300, 5e-324, -0.0];
        for to in [DType::BF16, DType::F16] {
            let found = cast_of(&beyond, to);
            assert_eq!(found[..2], [f64::INFINITY; 2]);
            assert_eq!(found[2], f64::NEG_INFINITY);
            assert_eq!(found[3..], [0.0, 0.0]);
        }
    }

    #[test]
    fn a_blocking_source_that_panics_is_an_error_and_not_an_early_end() {
        let source = (0..3).map(|i| {
            assert!(i < 1, "the disk fell out");
            weight("a")
        });
        let items: Vec<_> = block_on(source.off_executor(4).collect());
        assert_eq!(items.len(), 2);
        assert_eq!(items[1].as_ref().unwrap_err().kind(), ErrorKind::Source);
    }
}

//! Updates that are one call: what is told to servers of all buckets at once.
//!
//! The names, types and shapes of all weights have to be known before the first of them is sent. So the trainer takes those of the last
//! update, and the stream has to bring the same weights in the same order.
//!
//! A server is told the list and the size of a bucket. It ends a bucket with the first weight that makes it larger than that size, and
//! receives it by one broadcast. This is where it differs from a bucket that is a call of its own, which never exceeds the size.

use std::ops::Range;

use engine_core::{ArenaArc, Result, TensorMeta};

use crate::chunk::{Tensors, described, item_bytes};

/// The weights of an update, and how a server divides them.
#[derive(Debug)]
pub(crate) struct Whole {
    /// In the order of the stream.
    metas: Vec<ArenaArc<TensorMeta>>,
    buckets: Vec<WholeBucket>,
    tensors: Tensors,
}

/// One bucket of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct WholeBucket {
    /// Its weights, as the stream brings them.
    pub(crate) weights: Range<usize>,
    /// These weights, in the order in which they lie in the bucket.
    pub(crate) order: Vec<usize>,
    /// Its bytes.
    pub(crate) len: u64,
}

impl Whole {
    /// Divides weights into buckets as a server does that is told a size of `limit` bytes. `None` if no order of some bucket's weights
    /// puts each at a multiple of its own element size and ends the bucket with its last weight: then each bucket has to be a call.
    ///
    /// # Errors
    ///
    /// `Weight` for types that torch does not have.
    pub(crate) fn of(metas: Vec<ArenaArc<TensorMeta>>, limit: u64) -> Result<Option<Self>> {
        let sizes: Result<Vec<_>> = metas.iter().map(|meta| item_bytes(meta)).collect();
        let sizes: Vec<(u64, u64)> = sizes?
            .into_iter()
            .zip(&metas)
            .map(|(item, meta)| (item, meta.shape.iter().product::<u64>() * item))
            .collect();
        let (mut buckets, mut start) = (Vec::new(), 0);
        while start < metas.len() {
            let (mut end, mut len) = (start, 0);
            while end < metas.len() && len <= limit {
                len += sizes[end].1;
                end += 1;
            }
            let Some(order) = order(&sizes, start..end, len, limit) else { return Ok(None) };
            buckets.push(WholeBucket { weights: start..end, order, len });
            start = end;
        }
        let order = buckets.iter().flat_map(|bucket: &WholeBucket| &bucket.order);
        let tensors = described(order.map(|&index| &*metas[index]))?;
        Ok(Some(Self { metas, buckets, tensors }))
    }

    /// The weights, in the order of the stream.
    pub(crate) fn metas(&self) -> &[ArenaArc<TensorMeta>] {
        &self.metas
    }

    pub(crate) fn buckets(&self) -> &[WholeBucket] {
        &self.buckets
    }

    /// The bytes of its largest bucket.
    pub(crate) fn largest(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.len).max().unwrap_or(0)
    }

    /// The description of all weights, in the order in which they are sent.
    pub(crate) fn tensors(&self) -> &Tensors {
        &self.tensors
    }
}

/// The order of the weights of a bucket of `len` bytes. `sizes` has the bytes of an element and of the whole of each weight.
fn order(sizes: &[(u64, u64)], weights: Range<usize>, len: u64, limit: u64) -> Option<Vec<usize>> {
    let crossing = weights.end - 1;
    let mut order: Vec<usize> = weights.collect();
    // With the largest elements first, each weight begins at a multiple of its own element size.
    order.sort_by_key(|&index| std::cmp::Reverse(sizes[index].0));
    let ends_early = |last: usize| len > limit && len - sizes[last].1 > limit;
    if order.last().is_some_and(|&last| ends_early(last)) {
        // Without the weight that crossed the limit, all others are within it. So that one may be the last.
        order.retain(|&index| index != crossing);
        order.push(crossing);
        let (item, bytes) = sizes[crossing];
        if !(len - bytes).is_multiple_of(item.max(1)) {
            return None;
        }
    }
    Some(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::DType;
    use proptest::prelude::*;

    const TYPES: [DType; 4] = [DType::F8_E4M3, DType::BF16, DType::F32, DType::I64];

    /// The lengths of the buckets of a server that is told these weights, in this order.
    fn received(sizes: impl Iterator<Item = u64>, limit: u64) -> Vec<u64> {
        let (mut all, mut bucket, mut is_open) = (Vec::new(), 0, false);
        for size in sizes {
            bucket += size;
            is_open = true;
            if bucket > limit {
                all.push(std::mem::take(&mut bucket));
                is_open = false;
            }
        }
        all.extend(is_open.then_some(bucket));
        all
    }

    proptest! {
        #[test]
        fn a_server_divides_the_list_as_the_trainer_does_and_every_weight_is_aligned(
            weights in proptest::collection::vec((0..TYPES.len(), 0_u64..60), 0..60),
            limit in 1_u64..600,
        ) {
            let meta = |(at, &(ty, len)): (usize, &(usize, u64))| {
                TensorMeta::new(format!("w{at}"), TYPES[ty], [len]).into()
            };
            let metas: Vec<_> = weights.iter().enumerate().map(meta).collect();
            let Some(whole) = Whole::of(metas.clone(), limit).unwrap() else {
                // There has to be a reason: elements of several sizes.
                prop_assert!(weights.iter().any(|(ty, _)| *ty != weights[0].0));
                return Ok(());
            };
            let tensors = whole.tensors();
            let lens: Vec<u64> = whole.buckets().iter().map(|bucket| bucket.len).collect();
            prop_assert_eq!(received(tensors.sizes.iter().copied(), limit), lens);
            let mut seen = Vec::new();
            for bucket in whole.buckets() {
                let mut at = 0;
                for &index in &bucket.order {
                    let item = metas[index].dtype.bits() / 8;
                    prop_assert!(at % item == 0, "{index} at {at}");
                    at += item * weights[index].1;
                }
                let mut of: Vec<usize> = bucket.order.clone();
                of.sort_unstable();
                prop_assert_eq!(of, bucket.weights.clone().collect::<Vec<_>>());
                seen.extend(bucket.weights.clone());
            }
            prop_assert_eq!(seen, (0..weights.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_wide_weight_that_crosses_the_limit_behind_odd_bytes_cannot_be_a_part_of_one_call() {
        let metas = |bytes: u64| {
            vec![
                TensorMeta::new("a", DType::U8, [bytes]).into(),
                TensorMeta::new("b", DType::F32, [100]).into(),
            ]
        };
        assert!(Whole::of(metas(3), 64).unwrap().is_none());
        let whole = Whole::of(metas(4), 64).unwrap().expect("it can");
        assert_eq!(whole.buckets(), [WholeBucket { weights: 0..2, order: vec![0, 1], len: 404 }]);
    }
}

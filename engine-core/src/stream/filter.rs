//! `filter_weights`: keeps the weights that a predicate accepts.

use std::future::ready;

use futures::StreamExt;

use super::WeightStream;
use crate::TensorMeta;

pub(super) fn filter<'a>(
    weights: WeightStream<'a>,
    mut keep: impl FnMut(&TensorMeta) -> bool + Send + 'a,
) -> WeightStream<'a> {
    // An error is never filtered out: it ends the update.
    WeightStream::new(
        weights.filter(move |weight| {
            ready(weight.as_ref().map_or(true, |weight| keep(weight.meta())))
        }),
    )
}

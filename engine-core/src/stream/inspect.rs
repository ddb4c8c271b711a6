//! `inspect_weights`: observes the weights that pass.

use futures::StreamExt;

use super::WeightStream;
use crate::Weight;

pub(super) fn inspect<'a>(
    weights: WeightStream<'a>,
    mut inspect: impl FnMut(&Weight) + Send + 'a,
) -> WeightStream<'a> {
    WeightStream::new(weights.inspect(move |weight| {
        if let Ok(weight) = weight {
            inspect(weight);
        }
    }))
}

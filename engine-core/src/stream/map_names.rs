//! `map_names`: gives weights other names.

use std::sync::Arc;

use futures::StreamExt;

use super::WeightStream;

pub(super) fn map_names<'a>(
    weights: WeightStream<'a>,
    mut rename: impl FnMut(&str) -> Arc<str> + Send + 'a,
) -> WeightStream<'a> {
    WeightStream::new(weights.map(move |weight| {
        weight.map(|weight| {
            let name = rename(weight.name());
            weight.with_name(name)
        })
    }))
}

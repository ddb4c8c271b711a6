//! Where weights can come from, and what can be done to them on the way. Every engine takes all of
//! these: `ensure_async_iterator` is the one place where sources differ.

use checkpoint_engine::{
    DType, Result, Weight, WeightStream, WeightStreamExt, ensure_async_iterator,
};
use futures::{StreamExt, TryStreamExt, stream};

fn weight(layer: usize) -> Result<Weight> {
    let bytes = [1.5_f32; 8].map(f32::to_le_bytes).concat();
    Weight::new(format!("module.layers.{layer}.weight"), DType::F32, [2, 4], bytes)
}

async fn names(stream: WeightStream<'_>) -> Result<Vec<String>> {
    stream.map_ok(|weight| weight.name().to_owned()).try_collect().await
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    // A collection of weights; an iterator whose items may fail; an asynchronous stream.
    let collection: Vec<Weight> = (0..3).map(weight).collect::<Result<_>>()?;
    let expected = names(ensure_async_iterator(collection)).await?;
    assert_eq!(names(ensure_async_iterator((0..3).map(weight))).await?, expected);
    let gathered = stream::iter(0..3).then(|layer| async move {
        tokio::task::yield_now().await; // an all-gather, say
        weight(layer)
    });
    assert_eq!(names(ensure_async_iterator(gathered)).await?, expected);

    // A source that blocks runs on a thread of its own, at most two weights ahead.
    assert_eq!(names((0..3).map(weight).off_executor(2)).await?, expected);

    // Combinators change what will be sent, and copy nothing: the cast happens when the weight is
    // written into its bucket.
    let mut elements = 0;
    let stream = (0..3)
        .map(weight)
        .filter_weights(|meta| !meta.name.contains(".1."))
        .map_names(|name| name.trim_start_matches("module.").into())
        .cast(DType::BF16)
        .inspect_weights(|weight| elements += weight.byte_len() / 2);
    assert_eq!(names(stream).await?, ["layers.0.weight", "layers.2.weight"]);
    assert_eq!(elements, 16);

    // An error ends the stream, and with it the update, on every rank.
    let broken = [Err::<Weight, _>(std::io::Error::other("shard 3 is gone"))];
    let error = names(ensure_async_iterator(broken)).await.expect_err("the shard is gone");
    assert!(error.to_string().contains("shard 3 is gone"));
    Ok(())
}

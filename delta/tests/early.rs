//! Changes travel while others are still looked for.

use delta::LAYER;
use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, Rank, Registry, Result, Version, Weight,
    WeightStream, ensure_async_iterator, form_local_group,
};
use futures::StreamExt;
use futures::channel::oneshot;

const WEIGHTS: u64 = 12;
const LEN: u64 = 1 << 20;

/// A weight that is a batch by itself.
fn weight(at: u64, version: u64) -> Result<Weight> {
    let mut bytes = vec![0_u8; LEN as usize];
    bytes[at as usize] = version as u8;
    Weight::new(format!("w{at}"), DType::U8, [LEN], bytes)
}

#[tokio::test]
async fn a_rollout_has_the_first_changes_before_the_trainer_has_its_last_weights() {
    let registry = Registry::new().with(backend_naive::BACKEND).with_layer(LAYER);
    let context = |rank: u32| {
        let mut config = CheckpointEngineConfig::default();
        config.timeout_seconds = 10.0;
        config.update_weights_bucket_megabytes = Some(1);
        config.layers.insert("delta".into(), true.into());
        EngineContext::new(config).with_rank(Rank(rank))
    };
    let trainer = registry.prepare_trainer(context(0)).await.expect("a trainer");
    let rollout = registry.prepare_rollout(context(1)).await.expect("a rollout");
    let formed = form_local_group(backend_naive::BACKEND, vec![trainer], vec![rollout]).await;
    let (mut trainers, mut rollouts) = formed.expect("a group");
    for version in 1..=3 {
        let (tell, told) = oneshot::channel();
        let first = ensure_async_iterator((0..8).map(move |at| weight(at, version)));
        let rest = ensure_async_iterator((8..WEIGHTS).map(move |at| weight(at, version)));
        // With changes, the rest comes when the rollout has the first ones.
        let wait = async move {
            if version > 1 {
                told.await.expect("the rollout has changes");
            }
            rest
        };
        let stream = first.chain(futures::stream::once(wait).flatten());
        let send = trainers[0].send_weights(WeightStream::new(stream), Version(version));
        let receive = async {
            let mut received = rollouts[0].receive_weights(None).await?;
            let (mut tell, mut tensors) = (Some(tell), 0);
            while let Some(bucket) = received.next_bucket().await? {
                tensors += bucket.layout().pieces().len() as u64;
                tell.take().map(|tell| tell.send(()));
            }
            received.finish().await?;
            Ok::<_, engine_core::Error>(tensors)
        };
        let (sent, tensors) = futures::join!(send, receive);
        assert_eq!(tensors.expect("an update"), WEIGHTS);
        let delta = sent.expect("an update").delta.expect("a report of changes");
        assert_eq!(delta.whole.is_none(), version > 1);
    }
}

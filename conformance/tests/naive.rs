//! The naive engine behaves as every engine has to.

conformance::suite!(conformance::Suite::new(engine_core::naive::BACKEND), without buckets);

mod its_own {
    use std::time::Duration;

    use engine_core::{
        CheckpointEngineConfig, DType, EngineContext, RolloutEngine, Version, Weight, clock,
        ensure_async_iterator, form_local_group, naive,
    };

    /// The trainer waits for one rank after the other, up to one deadline each.
    #[test]
    fn a_rollout_waits_as_long_as_the_trainer_waits_for_others() {
        let deadline = 2.0;
        let config = CheckpointEngineConfig {
            backend: "naive".into(),
            timeout_seconds: deadline,
            ..Default::default()
        };
        let context = EngineContext::new(config);
        let weights = (0..4).map(|index| {
            Weight::new(format!("w{index}"), DType::U8, [1], vec![index]).expect("a weight")
        });
        let weights: Vec<Weight> = weights.collect();
        futures::executor::block_on(async {
            let trainer = naive::BACKEND.prepare_trainer(context.clone()).await.expect("a trainer");
            let mut rollouts = Vec::new();
            for _ in 0..3 {
                let rollout = naive::BACKEND.prepare_rollout(context.clone()).await;
                rollouts.push(rollout.expect("a rollout"));
            }
            let formed = form_local_group(naive::BACKEND, vec![trainer], rollouts).await;
            let (mut trainers, mut rollouts) = formed.expect("a group");
            let [slow, slower, fast] = &mut rollouts[..] else { panic!("three rollouts") };
            let send = trainers[0].send_weights(ensure_async_iterator(weights), Version(1));
            let receive = async |engine: &mut dyn RolloutEngine, pause: f64| {
                let mut received = engine.receive_weights(None).await?;
                received.next_tensor().await?.expect("a tensor");
                clock::sleep(Duration::from_secs_f64(deadline * pause)).await;
                received.finish().await
            };
            let all = futures::future::join4(
                send,
                receive(&mut **slow, 0.8),
                receive(&mut **slower, 1.5),
                receive(&mut **fast, 0.0),
            );
            let (sent, slow, slower, fast) = all.await;
            sent.expect("an update");
            for received in [slow, slower, fast] {
                received.expect("a complete version");
            }
        });
    }
}

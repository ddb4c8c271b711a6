//! The naive engine behaves as every engine has to.

conformance::suite!(conformance::Suite::new(engine_core::naive::BACKEND), without buckets);

mod its_own {
    use std::time::Duration;

    use engine_core::{
        CheckpointEngineConfig, DType, EngineContext, Role, Version, Weight, clock,
        ensure_async_iterator, form_local_group, naive,
    };

    /// The trainer waits for one rank after the other, up to one deadline each.
    #[test]
    fn a_rollout_waits_as_long_as_the_trainer_waits_for_others() {
        let deadline = 2.0;
        let engine = |role| {
            let config = CheckpointEngineConfig {
                backend: "naive".into(),
                timeout_seconds: deadline,
                ..Default::default()
            };
            naive::BACKEND.create(EngineContext::new(config, role)).expect("an engine")
        };
        let (mut trainer, mut slow) = (engine(Role::Trainer), engine(Role::Rollout));
        let (mut slower, mut fast) = (engine(Role::Rollout), engine(Role::Rollout));
        let weights = (0..4).map(|index| {
            Weight::new(format!("w{index}"), DType::U8, [1], vec![index]).expect("a weight")
        });
        let weights: Vec<Weight> = weights.collect();
        futures::executor::block_on(async {
            form_local_group(
                &mut [&mut *trainer, &mut *slow, &mut *slower, &mut *fast],
                naive::BACKEND,
            )
            .await
            .expect("a group");
            let send = trainer.send_weights(ensure_async_iterator(weights), Version(1));
            let receive = async |engine: &mut dyn engine_core::CheckpointEngine, pause: f64| {
                let mut received = engine.receive_weights(None).await?;
                received.next_tensor().await?.expect("a tensor");
                clock::sleep(Duration::from_secs_f64(deadline * pause)).await;
                received.finish().await
            };
            let all = futures::future::join4(
                send,
                receive(&mut *slow, 0.8),
                receive(&mut *slower, 1.5),
                receive(&mut *fast, 0.0),
            );
            let (sent, slow, slower, fast) = all.await;
            sent.expect("an update");
            for received in [slow, slower, fast] {
                received.expect("a complete version");
            }
        });
    }
}

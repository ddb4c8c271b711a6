//! The engine that all collective backends share behaves as every engine has to: with one sender and with
//! several, with relays, with groups that are formed anew each time, and when its library fails.

use conformance::Suite;
use conformance::collective::{BACKEND, DEVICE};
use engine_core::{CheckpointEngineConfig, DeviceChoice};
use serde_json::{Value, json};

fn with(options: Value) -> impl FnOnce(&mut CheckpointEngineConfig) {
    move |config| {
        if let Value::Object(options) = options {
            config.engine_kwargs.insert("in-process".into(), options);
        }
    }
}

fn suite(options: Value) -> Suite {
    Suite::new(BACKEND).with_control_plane().with_config(with(options))
}

mod one_sender {
    conformance::suite!(super::suite(super::json!({})));
}

mod without_digests {
    conformance::suite!(
        super::suite(super::json!({})).with_config(|config| config.digests = false)
    );
}

mod two_senders {
    conformance::suite!(super::suite(super::json!({"senders": 2})).with_trainers(2));
}

mod two_senders_and_a_library_that_connects_late {
    conformance::suite!(
        super::suite(super::json!({"senders": 2, "connect_ms": 50})).with_trainers(2)
    );
}

mod three_senders_and_a_relay {
    conformance::suite!(super::suite(super::json!({"senders": 3})).with_trainers(4));
}

mod a_relay_and_no_group_that_shrinks {
    conformance::suite!(super::suite(super::json!({"shrinks": false})).with_trainers(2));
}

mod a_trainer_without_a_part {
    conformance::suite!(super::suite(super::json!({"relays": false})).with_trainers(2));
}

mod groups_formed_anew_for_every_update {
    conformance::suite!(super::suite(super::json!({"rebuild_group": true})));
}

/// The suite with these devices, of which a group has one rank each.
fn on(devices: &[u32]) -> Suite {
    suite(json!({})).with_devices(devices.iter().map(|&number| DeviceChoice::new(DEVICE, number)))
}

mod all_rollouts_colocated_with_the_leader {
    conformance::suite!(super::on(&[0]));
}

mod one_rollout_colocated_with_the_leader_and_others_elsewhere {
    conformance::suite!(super::on(&[0, 0, 1, 2, 3]));
}

mod a_trainer_beside_a_rollout_and_others_colocated_with_the_leader {
    conformance::suite!(super::on(&[0, 1, 1, 0]).with_trainers(2));
}

/// A group whose ranks come and go, in this process.
mod membership_and_faults {
    use std::sync::Mutex;
    use std::time::Duration;

    use conformance::collective::{BACKEND, Counts, DEVICE, counts};
    use control_plane::{ControlConfig, ControlPlane, Token, join_group};
    use engine_core::{
        CheckpointEngine, CheckpointEngineConfig, DType, DeviceChoice, EngineContext, Error,
        ErrorKind, Rank, Result, Role, RolloutEngine, SendReport, TrainerEngine, Version, Weight,
        ensure_async_iterator,
    };
    use futures::FutureExt;
    use serde_json::{Value, json};

    /// Tests that count what all groups of the process do run one after the other.
    static COUNTING: Mutex<()> = Mutex::new(());

    struct Member<E: ?Sized> {
        control: ControlPlane,
        engine: Box<E>,
    }

    type Trainer = Member<dyn TrainerEngine>;
    type Rollout = Member<dyn RolloutEngine>;

    struct Group {
        at: ControlConfig,
        config: CheckpointEngineConfig,
        leader: Trainer,
        others: Vec<Rollout>,
    }

    const WAIT: Duration = Duration::from_secs(5);

    fn context(control: &ControlPlane, config: &CheckpointEngineConfig) -> EngineContext {
        EngineContext::new(config.clone()).with_control(control.clone())
    }

    async fn trainer(
        control: ControlPlane,
        config: &CheckpointEngineConfig,
        ranks: u32,
    ) -> Result<Trainer> {
        let prepared = BACKEND.prepare_trainer(context(&control, config)).await?;
        let (engine, _) = join_group(prepared, BACKEND, &control, Some(ranks), WAIT).await?;
        Ok(Member { control, engine })
    }

    async fn rollout(control: ControlPlane, config: &CheckpointEngineConfig) -> Result<Rollout> {
        let prepared = BACKEND.prepare_rollout(context(&control, config)).await?;
        let (engine, _) = join_group(prepared, BACKEND, &control, None, WAIT).await?;
        Ok(Member { control, engine })
    }

    fn seat(number: u32) -> DeviceChoice {
        DeviceChoice::new(DEVICE, number)
    }

    impl Group {
        async fn form(options: Value, rollouts: u32) -> Result<Self> {
            let devices = vec![DeviceChoice::default(); rollouts as usize + 1];
            Self::on(devices, options).await
        }

        /// A group of ranks on these devices, the leader's first.
        async fn on(devices: Vec<DeviceChoice>, options: Value) -> Result<Self> {
            Self::with_deadline(2.0, devices, options).await
        }

        async fn with_deadline(
            timeout_seconds: f64,
            devices: Vec<DeviceChoice>,
            options: Value,
        ) -> Result<Self> {
            let rollouts = devices.len() as u32 - 1;
            static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let address = format!("unix:@collective-{}-{number}", std::process::id());
            let at = ControlConfig::new(address.parse()?, Token::generate()?);
            let mut config = CheckpointEngineConfig::new(BACKEND.name());
            config.update_weights_bucket_megabytes = Some(1);
            config.timeout_seconds = timeout_seconds;
            super::with(options)(&mut config);
            let leading = ControlPlane::lead(at.clone()).await?;
            let mut planes = Vec::new();
            for rank in 1..=rollouts {
                let rank = Some(Rank(rank));
                planes.push(ControlPlane::join(at.clone(), Role::Rollout, rank).await?);
            }
            let mut configs = devices.into_iter().map(|device| {
                let mut config = config.clone();
                config.device = device;
                config
            });
            let leaders = configs.next().expect("the leader's device");
            let others = planes.into_iter().zip(configs);
            let others = others.map(|(plane, config)| async move { rollout(plane, &config).await });
            let others = futures::future::try_join_all(others);
            let leader = trainer(leading, &leaders, rollouts + 1);
            let (leader, others) = futures::future::try_join(leader, others).await?;
            Ok(Self { at, config, leader, others })
        }

        async fn update(&mut self, version: u64) -> (Result<SendReport>, Vec<Result<()>>) {
            let weights = (0..6).map(|index| {
                let bytes = vec![(version as u8) ^ index; 400_000];
                Weight::new(format!("w{index}"), DType::U8, [400_000], bytes).expect("a weight")
            });
            let weights: Vec<Weight> = weights.collect();
            let send = ensure_async_iterator(weights.clone());
            let send = self.leader.engine.send_weights(send, Version(version));
            let receive = self.others.iter_mut().map(|member| async {
                let mut received = member.engine.receive_weights(None).await?;
                let mut sent = weights.iter();
                while let Some(tensor) = received.next_tensor().await? {
                    let sent = sent.next().expect("as many as were sent").to_bytes()?;
                    assert_eq!(tensor.to_bytes()?, sent, "other bytes arrived");
                }
                assert!(sent.next().is_none(), "tensors are missing");
                Ok(())
            });
            futures::future::join(send, futures::future::join_all(receive)).await
        }

        async fn works(&mut self, version: u64) -> SendReport {
            let (sent, received) = self.update(version).await;
            let report = sent.unwrap_or_else(|error| panic!("version {version}: {error}"));
            assert_eq!(report.receivers.len(), self.others.len(), "version {version}");
            received.into_iter().for_each(|received| received.expect("a complete version"));
            report
        }

        /// The leader's error, and those of the others.
        async fn fails(&mut self, version: u64) -> (Error, Vec<Error>) {
            let (sent, received) = self.update(version).await;
            let errors = received.into_iter().map(|result| result.expect_err("a failure"));
            (sent.expect_err("a failure"), errors.collect())
        }

        /// A member leaves as a process does that ends.
        async fn leave(&mut self, at: usize) {
            let Member { control, engine } = self.others.remove(at);
            engine.finalize().await.expect("an end");
            control.close().await.expect("an end");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }

        async fn join(&mut self) {
            self.join_on(DeviceChoice::default()).await.expect("a place");
        }

        async fn join_on(&mut self, device: DeviceChoice) -> Result<()> {
            let plane = ControlPlane::join(self.at.clone(), Role::Rollout, None).await?;
            let mut config = self.config.clone();
            config.device = device;
            self.others.push(rollout(plane, &config).await?);
            Ok(())
        }
    }

    fn run(test: impl Future<Output = ()>) {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(2).enable_all().build().expect("a runtime").block_on(test);
    }

    fn since(before: Counts) -> (u64, u64) {
        let now = counts();
        (now.joined - before.joined, now.shrunk - before.shrunk)
    }

    #[test]
    fn a_group_is_kept_while_its_members_stay_shrinks_when_they_leave_and_forms_anew_when_they_join()
     {
        let _counting = COUNTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        run(async {
            let start = counts();
            let mut group = Group::form(json!({}), 3).await.expect("a group");
            for version in 1..5 {
                group.works(version).await;
            }
            assert_eq!(since(start), (4, 0), "four ranks join once");
            group.leave(1).await;
            group.works(5).await;
            group.works(6).await;
            assert_eq!(since(start), (4, 3), "three ranks go on without the fourth");
            group.join().await;
            group.works(7).await;
            group.works(8).await;
            assert_eq!(since(start), (8, 3), "four ranks join anew");
        });
    }

    /// Waits until so many more ranks have joined.
    async fn joined(before: Counts, ranks: u64) {
        let until = tokio::time::Instant::now() + Duration::from_secs(5);
        while since(before).0 < ranks {
            assert!(tokio::time::Instant::now() < until, "{before:?}, then {:?}", counts());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[test]
    fn ranks_join_the_groups_of_the_first_update_before_it_begins_and_those_that_form_anew_do_too()
    {
        let _counting = COUNTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        run(async {
            let start = counts();
            let mut group = Group::form(json!({}), 3).await.expect("a group");
            joined(start, 4).await;
            group.works(1).await;
            assert_eq!(since(start), (4, 0), "what was joined is used");
            // A rank that comes later does not take the ids of the first groups for its own.
            group.join().await;
            group.works(2).await;
            assert_eq!(since(start), (9, 0));
        });
        run(async {
            let start = counts();
            let mut group = Group::form(json!({"rebuild_group": true}), 2).await.expect("a group");
            group.works(1).await;
            assert_eq!(
                since(start),
                (3, 0),
                "groups that every update forms are not formed before"
            );
        });
    }

    #[test]
    fn a_rank_that_is_gone_or_never_joins_before_the_first_update_holds_nobody_up() {
        let _counting = COUNTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let options = json!({"fault": "join_hangs", "fault_rank": 2});
        run(async {
            let devices = vec![DeviceChoice::default(); 4];
            let group = Group::with_deadline(30.0, devices, options.clone()).await;
            let mut group = group.expect("a group");
            let begun = std::time::Instant::now();
            group.leave(1).await;
            group.works(1).await;
            assert!(begun.elapsed() < Duration::from_secs(5), "nobody waits for a deadline");
            group.works(2).await;
        });
        run(async {
            let mut group = Group::form(options, 2).await.expect("a group");
            // By then, the leader knows that the first groups were not joined. It forms others.
            tokio::time::sleep(Duration::from_secs(2)).await;
            group.works(1).await;
        });
    }

    #[test]
    fn colocated_rollouts_are_in_no_group_and_read_the_leaders_slots_for_the_time_of_an_update() {
        let _counting = COUNTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        run(async {
            let start = counts();
            let attached = || counts().attached - start.attached;
            let mut group = Group::on(vec![seat(0), seat(0), seat(0)], json!({})).await.unwrap();
            assert_eq!(attached(), 2, "once each, to see that it works");
            group.works(1).await;
            group.works(2).await;
            assert_eq!((since(start), attached()), ((0, 0), 6), "nobody forms a group");
            // One that is elsewhere forms one with the leader, and one that is not goes on without.
            group.join_on(seat(1)).await.expect("a place");
            group.works(3).await;
            assert_eq!(since(start), (2, 0));
            group.join_on(seat(0)).await.expect("a place");
            group.works(4).await;
            assert_eq!(since(start), (2, 0), "the group is the same");
            // The leader alone, and then a rank of the same number as the one that has left.
            group.leave(2).await;
            group.works(5).await;
            group.join_on(seat(2)).await.expect("a place");
            group.works(6).await;
            assert_eq!(since(start), (4, 0));
            assert_eq!(group.others[3].control.rank(), Rank(3), "as before");
        });
    }

    #[test]
    fn the_last_colocated_rollout_that_leaves_hinders_nobody() {
        run(async {
            let mut group = Group::on(vec![seat(0), seat(0), seat(1)], json!({})).await.unwrap();
            group.works(1).await;
            group.leave(0).await;
            group.works(2).await;
            group.leave(0).await;
            let (sent, _) = group.update(3).await;
            assert_eq!(sent.expect_err("nobody is left").kind(), ErrorKind::PeerLost);
        });
    }

    #[test]
    fn a_colocated_rollout_that_holds_a_bucket_is_a_timeout_and_its_bytes_stay_until_it_lets_go() {
        run(async {
            let mut group = Group::on(vec![seat(0), seat(0), seat(1)], json!({})).await.unwrap();
            let weights = (0..12).map(|index| {
                let bytes = vec![index; 400_000];
                Weight::new(format!("w{index}"), DType::U8, [400_000], bytes).expect("a weight")
            });
            let weights = ensure_async_iterator(weights.collect::<Vec<_>>());
            let send = group.leader.engine.send_weights(weights, Version(1));
            let (holding, taking) = group.others.split_at_mut(1);
            let held = std::sync::Mutex::new(None);
            let hold = async {
                let mut received = holding[0].engine.receive_weights(None).await?;
                *held.lock().expect("no panic") = received.next_bucket().await?;
                while received.next_bucket().await?.is_some() {}
                Ok::<_, Error>(())
            };
            let take = async {
                let mut received = taking[0].engine.receive_weights(None).await?;
                while received.next_bucket().await?.is_some() {}
                Ok::<_, Error>(())
            };
            let (sent, received, taken) = futures::future::join3(send, hold, take).await;
            for error in [sent.map(drop), received, taken].map(|result| result.expect_err("held")) {
                assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
                assert_eq!((error.report().rank, error.report().bucket), (Some(Rank(1)), Some(0)));
            }
            let (error, _) = group.fails(2).await;
            assert_eq!(error.report().rank, Some(Rank(1)), "{error}");
            let held = held.into_inner().expect("no panic").expect("a bucket");
            let bytes = held.pieces().next().expect("a weight").bytes.to_host().expect("bytes");
            assert!(bytes.iter().all(|byte| *byte == 0), "the bucket was filled anew");
            drop((held, bytes));
            group.works(3).await;
        });
    }

    #[test]
    fn the_leaders_slots_are_freed_after_colocated_rollouts_let_go_or_after_a_while() {
        for lets_go in [true, false] {
            run(async {
                let mut group = Group::on(vec![seat(0), seat(0)], json!({})).await.unwrap();
                let weight = Weight::new("w", DType::U8, [400_000], vec![7; 400_000]);
                let weights = ensure_async_iterator([weight.expect("a weight")]);
                let send = group.leader.engine.send_weights(weights, Version(1));
                let receive = async {
                    let mut received = group.others[0].engine.receive_weights(None).await?;
                    let held = received.next_bucket().await?;
                    received.finish().await.map(|_| held)
                };
                let (sent, held) = futures::future::join(send, receive).await;
                sent.expect("an update");
                let (held, begun) = (held.expect("a version"), std::time::Instant::now());
                let holding = async {
                    let enough = if lets_go { 300 } else { 3000 };
                    tokio::time::sleep(Duration::from_millis(enough)).await;
                    drop(held);
                };
                let finalize = async {
                    group.leader.engine.finalize().await.expect("an end");
                    begun.elapsed().as_millis()
                };
                let (took, ()) = futures::future::join(finalize, holding).await;
                let expected = if lets_go { 300..1400 } else { 1400..2900 };
                assert!(expected.contains(&took), "{lets_go}: {took} ms");
            });
        }
    }

    #[test]
    fn a_leader_that_cannot_share_its_slots_refuses_rollouts_of_its_device_and_no_others() {
        run(async {
            let options = json!({"fault": "cannot_share", "fault_rank": 0});
            let error = Group::on(vec![seat(0), seat(1), seat(0)], options.clone()).await;
            let error = error.err().expect("a mismatch");
            assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
            assert_eq!(error.report().rank, Some(Rank(2)), "{error}");
            assert!(error.to_string().contains("too old to share memory"), "{error}");

            let mut group = Group::on(vec![seat(0), seat(1)], options).await.expect("a group");
            let error = group.join_on(seat(0)).await.expect_err("a mismatch");
            assert!(error.to_string().contains("too old to share memory"), "{error}");
            group.works(1).await;
        });
    }

    #[test]
    fn a_library_that_cannot_leave_members_out_forms_the_group_anew() {
        let _counting = COUNTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        run(async {
            let start = counts();
            let mut group = Group::form(json!({"shrinks": false}), 2).await.expect("a group");
            group.works(1).await;
            group.leave(0).await;
            group.works(2).await;
            assert_eq!(since(start), (5, 0));
        });
    }

    #[test]
    fn leaving_members_out_that_fails_is_an_error_and_the_group_forms_anew() {
        run(async {
            let options = json!({"fault": "shrink_fails", "fault_rank": 0});
            let mut group = Group::form(options, 3).await.expect("a group");
            assert_eq!(group.works(1).await.slower, [""; 0]);
            group.leave(2).await;
            let (error, _) = group.fails(2).await;
            assert!(error.to_string().contains("leave anyone out"), "{error}");
            let slower = group.works(3).await.slower;
            assert!(slower.len() == 1 && slower[0].contains("groups form anew"), "{slower:?}");
            group.leave(1).await;
            group.works(4).await;
        });
    }

    #[test]
    fn a_broadcast_that_never_ends_is_a_timeout_that_names_rank_and_bucket_and_the_next_update_works()
     {
        // On the rank that sends, on one that receives, and in the middle of the update's buckets.
        for (rank, at) in [(0, 1), (1, 3), (2, 5)] {
            run(async {
                let options = json!({"fault": "never_ends", "fault_rank": rank, "fault_at": at});
                let mut group = Group::form(options, 2).await.expect("a group");
                let (error, others) = group.fails(1).await;
                for error in others.iter().chain([&error]) {
                    assert_eq!(error.kind(), ErrorKind::Timeout, "rank {rank} at {at}: {error}");
                    assert!(error.report().rank.is_some(), "no rank: {error}");
                    assert!(error.report().bucket.is_some(), "no bucket: {error}");
                }
                group.works(2).await;
                group.works(3).await;
            });
        }
    }

    #[test]
    fn an_update_that_is_dropped_while_the_library_connects_is_given_up_at_once() {
        let _counting = COUNTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        run(async {
            let mut group = Group::form(json!({"connect_ms": 400}), 2).await.expect("a group");
            let start = counts();
            let update = tokio::time::timeout(Duration::from_millis(200), group.update(1));
            update.await.expect_err("it was dropped");
            // Neither the deadline nor the next update is what ends it.
            let until = tokio::time::Instant::now() + Duration::from_secs(1);
            while counts().left < start.left + 3 {
                assert!(tokio::time::Instant::now() < until, "{:?}, then {:?}", start, counts());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            group.works(2).await;
        });
    }

    #[test]
    fn an_engine_that_is_finalized_or_dropped_leaves_nothing_of_its_library_at_work() {
        // Longer than one would wait without a reason, and shorter than the deadline.
        let leaving = Duration::from_millis(2500);
        for way in ["finalized", "dropped", "dropped while it finalizes", "dropped at the end"] {
            let (mut start, mut kept) = (0, Vec::new());
            run(async {
                let devices = vec![DeviceChoice::default(); 3];
                let options = json!({"leave_ms": leaving.as_millis() as u64});
                let group = Group::with_deadline(60.0, devices, options);
                let mut group = group.await.expect("a group");
                group.works(1).await;
                start = counts().ended;
                let Group { leader, others, .. } = group;
                let begun = std::time::Instant::now();
                let leader: Box<dyn CheckpointEngine> = leader.engine;
                let others = others.into_iter().map(|member| member.engine as _);
                for engine in std::iter::once(leader).chain(others) {
                    match way {
                        "finalized" => engine.finalize().await.expect("an end"),
                        "dropped while it finalizes" => {
                            // A rank that is not the last one may have left by now.
                            if let Some(left) = engine.finalize().now_or_never() {
                                left.expect("an end");
                            }
                        }
                        "dropped at the end" => kept.push(engine),
                        _ => drop(engine),
                    }
                }
                match way {
                    "finalized" => assert_eq!(counts().ended, start + 3),
                    _ => assert!(begun.elapsed() < leaving, "{way}: it blocked an executor"),
                }
            });
            // The runtime has ended.
            drop(kept);
            assert_eq!(counts().ended, start + 3, "{way}");
        }
    }

    #[test]
    fn a_library_that_hangs_while_it_gives_up_hides_no_error() {
        run(async {
            let options = json!({"fault": "never_lets_go", "fault_rank": 1, "fault_at": 3});
            let mut group = Group::form(options, 2).await.expect("a group");
            let (error, _) = group.fails(1).await;
            // What the rank says, and not the leader's own wait for it, which is longer.
            assert!(error.to_string().starts_with("broadcasting a bucket"), "{error}");
            assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        });
    }

    #[test]
    fn a_group_that_fails_is_an_error_everywhere_and_the_next_update_works() {
        for rank in 0..3 {
            run(async {
                let options = json!({"fault": "fails", "fault_rank": rank, "fault_at": 2});
                let mut group = Group::form(options, 2).await.expect("a group");
                let (error, others) = group.fails(1).await;
                assert!(error.to_string().contains("an asynchronous error"), "{error}");
                assert_eq!(others.len(), 2);
                group.works(2).await;
            });
        }
    }

    #[test]
    fn a_rank_that_cannot_join_is_a_timeout_everywhere_and_the_next_update_works() {
        for rank in 0..3 {
            run(async {
                let options = json!({"fault": "join_hangs", "fault_rank": rank});
                let mut group = Group::form(options, 2).await.expect("a group");
                let (error, _) = group.fails(1).await;
                assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
                group.works(2).await;
            });
        }
    }

    #[test]
    fn a_bit_that_changes_on_the_way_is_a_digest_that_differs() {
        run(async {
            let options = json!({"fault": "corrupts", "fault_at": 4});
            let config = |rank: u32| {
                let mut options = options.clone();
                options["fault_rank"] = rank.into();
                options
            };
            let mut group = Group::form(config(2), 2).await.expect("a group");
            let (error, _) = group.fails(1).await;
            assert_eq!(error.kind(), ErrorKind::Digest, "{error}");
            assert_eq!(error.report().rank, Some(Rank(2)), "{error}");
            group.works(2).await;
        });
    }

    /// A trainer that sends every other bucket dies within an update, having filled some of its own.
    #[test]
    fn a_sender_that_is_gone_ends_the_update_and_the_next_one_is_sent_by_those_that_are_left() {
        for given in 0..7 {
            run(async {
                let address = format!("unix:@collective-sender-{}-{given}", std::process::id());
                let token = Token::generate().expect("a token");
                let at = ControlConfig::new(address.parse().expect("an address"), token);
                let mut config = CheckpointEngineConfig::new(BACKEND.name());
                config.update_weights_bucket_megabytes = Some(1);
                config.timeout_seconds = 2.0;
                super::with(json!({"senders": 2}))(&mut config);
                let leader = ControlPlane::lead(at.clone()).await.expect("a leader");
                let join = async |role, rank| {
                    let rank = Some(Rank(rank));
                    ControlPlane::join(at.clone(), role, rank).await.expect("a place")
                };
                let other = join(Role::Trainer, 1).await;
                let planes = [join(Role::Rollout, 2).await, join(Role::Rollout, 3).await];
                let rollouts = planes.map(|plane| rollout(plane, &config));
                let members = futures::future::try_join3(
                    trainer(leader, &config, 4),
                    trainer(other, &config, 4),
                    futures::future::try_join_all(rollouts),
                );
                let (leader, mut other, others) = members.await.expect("a group");
                let mut group = Group { at, config, leader, others };

                // It gives so many weights and is no more.
                let weights = |version: u8| -> Vec<Weight> {
                    let weight = |index: u8| {
                        let bytes = vec![version ^ index; 400_000];
                        Weight::new(format!("w{index}"), DType::U8, [400_000], bytes)
                    };
                    (0..6).map(|index| weight(index).expect("a weight")).collect()
                };
                let dying = tokio::spawn(async move {
                    let some = futures::stream::iter(weights(1).into_iter().take(given));
                    let some = futures::StreamExt::chain(some, futures::stream::pending());
                    let send = other.engine.send_weights(ensure_async_iterator(some), Version(1));
                    drop(tokio::time::timeout(Duration::from_millis(150), send).await);
                    drop(other);
                });
                let (error, _) = group.fails(1).await;
                assert_eq!(error.report().rank, Some(Rank(1)), "{given}: {error}");
                dying.await.expect("it ends");
                tokio::time::sleep(Duration::from_millis(100)).await;
                group.works(2).await;
                group.works(3).await;
            });
        }
    }

    #[test]
    fn a_rank_with_another_version_of_the_library_is_a_mismatch_that_says_both() {
        run(async {
            let options = json!({"fault": "other_version", "fault_rank": 2});
            let error = Group::form(options, 2).await.err().expect("a mismatch");
            assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
            assert_eq!(error.report().rank, Some(Rank(2)), "{error}");
            let words = error.to_string();
            assert!(words.contains("in-process 2") && words.contains("in-process 1"), "{words}");
        });
    }
}

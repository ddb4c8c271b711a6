//! Versions of which only a part is sent.

use std::collections::BTreeMap;

use delta::LAYER;
use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, Error, ErrorKind, Outcome, PartReport, Rank,
    ReceiveReport, ReceivedWeights, Registry, Result, RolloutEngine, SendReport, TrainerEngine,
    Version, Weight, ensure_async_iterator, form_local_group,
};

/// A trainer that quantises to FP8, and so many rollouts.
async fn group(rollouts: u32) -> (Box<dyn TrainerEngine>, Vec<Box<dyn RolloutEngine>>) {
    let registry =
        Registry::new().with(backend_naive::BACKEND).with_layer(LAYER).with_layer(quant_fp8::LAYER);
    let context = |rank: u32| {
        let mut config = CheckpointEngineConfig::default();
        config.timeout_seconds = 20.0;
        config.layers.insert("delta".into(), true.into());
        config.layers.insert("trainer_quantize_fp8".into(), (rank == 0).into());
        EngineContext::new(config).with_rank(Rank(rank))
    };
    let trainer = registry.prepare_trainer(context(0)).await.expect("a trainer");
    let mut prepared = Vec::new();
    for rank in 1..=rollouts {
        prepared.push(registry.prepare_rollout(context(rank)).await.expect("a rollout"));
    }
    let formed = form_local_group(backend_naive::BACKEND, vec![trainer], prepared).await;
    let (mut trainers, rollouts) = formed.expect("a group");
    (trainers.remove(0), rollouts)
}

/// A BF16 matrix of a layer, whose values depend on the version.
fn matrix(name: &str, rows: u64, version: u64) -> Weight {
    let len = rows * 256;
    let value = |at: u64| (0x3f00 + (at * 7 + version) % 64) as u16;
    let bytes: Vec<u8> = (0..len).flat_map(|at| value(at).to_le_bytes()).collect();
    let name = format!("model.layers.0.{name}.weight");
    Weight::new(name, DType::BF16, [rows, 256], bytes).expect("a weight")
}

/// The names of what arrived, without what all have in common, and their types.
type Came = Vec<(String, DType)>;

async fn receive(rollout: &mut dyn RolloutEngine) -> Result<Came> {
    let mut received = rollout.receive_weights(None).await?;
    let mut came = Came::new();
    while let Some(weight) = received.next_tensor().await? {
        let name = weight.name().strip_prefix("model.layers.0.").expect("a layer's").to_owned();
        came.push((name, weight.meta().dtype));
    }
    received.finish().await?;
    Ok(came)
}

/// Sends all weights of a version or a part of it. Returns the report, and what each rollout received.
async fn send(
    (trainer, rollouts): &mut (Box<dyn TrainerEngine>, Vec<Box<dyn RolloutEngine>>),
    weights: Vec<Weight>,
    version: u64,
    is_part: bool,
) -> Result<(SendReport, Vec<Came>)> {
    let (stream, version) = (ensure_async_iterator(weights), Version(version));
    let send = match is_part {
        true => trainer.send_part(stream, version),
        false => trainer.send_weights(stream, version),
    };
    let receive = rollouts.iter_mut().map(|rollout| receive(&mut **rollout));
    let (sent, received) = futures::join!(send, futures::future::join_all(receive));
    Ok((sent?, received.into_iter().collect::<Result<_>>()?))
}

fn names(of: &[(&str, DType)]) -> Came {
    of.iter().map(|(name, dtype)| ((*name).to_owned(), *dtype)).collect()
}

const UP: &str = "mlp.up_proj.weight";
const UP_SCALES: &str = "mlp.up_proj.weight_scale_inv";
const DOWN: &str = "mlp.down_proj.weight";
const DOWN_SCALES: &str = "mlp.down_proj.weight_scale_inv";

#[tokio::test]
async fn a_weight_of_a_part_that_is_not_fp8_any_more_takes_its_scales_out_of_the_version() {
    // Also where a rollout has lost its copy, and all get everything out of the trainer's.
    for loses in [false, true] {
        let mut group = group(2).await;
        let all = vec![matrix("mlp.up_proj", 256, 1), matrix("mlp.down_proj", 256, 1)];
        send(&mut group, all, 1, false).await.expect("the whole version");
        let fp8 = DType::F8_E4M3;
        let quantised = [(UP, fp8), (UP_SCALES, DType::F32)];
        let others = [(DOWN, fp8), (DOWN_SCALES, DType::F32)];
        // Of one shape, it is quantised; of the other, it is too narrow for that.
        for (version, rows) in (2..).zip([256, 8, 8, 256, 256]) {
            if loses {
                let nothing = futures::stream::empty();
                let other = ReceivedWeights::new(Version(0), Outcome::default(), nothing);
                let adopted = group.1[0].adopt(other).next_bucket().await;
                assert!(adopted.expect("an empty version").is_none());
            }
            let part = vec![matrix("mlp.up_proj", rows, version)];
            let (report, came) = send(&mut group, part, version, true).await.expect("a part");
            let sent = if rows == 8 { names(&[(UP, DType::BF16)]) } else { names(&quantised) };
            let expected = [sent, names(&others)].concat();
            assert!(came.iter().all(|came| *came == expected), "{version}: {came:?}");
            assert_eq!(report.delta.expect("a report").whole.is_some(), loses);
        }
    }
}

#[tokio::test]
async fn a_part_of_a_layer_is_quantised_as_the_layer_was() {
    let mut group = group(1).await;
    let [q, k, v] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
    // Receivers make one weight of these three, and two of them are too narrow for blocks.
    let all = vec![matrix(k, 8, 1), matrix(v, 8, 1), matrix(q, 256, 1)];
    let (_, came) = send(&mut group, all, 1, false).await.expect("the whole version");
    assert!(came[0].iter().all(|(_, dtype)| *dtype == DType::BF16), "{came:?}");
    let (_, came) = send(&mut group, vec![matrix(q, 256, 2)], 2, true).await.expect("a part");
    assert!(came[0].iter().all(|(_, dtype)| *dtype == DType::BF16), "{came:?}");
    assert_eq!(came[0].len(), 3);
    // Others of the layer decide as well, wherever they come from.
    let part = vec![matrix(k, 256, 3), matrix(v, 256, 3)];
    let error = send(&mut group, part, 3, true).await.expect_err("a layer that is FP8 in part");
    assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
    assert!(error.to_string().contains("proj"), "{error}");
    let all = vec![matrix(q, 256, 4), matrix(k, 256, 4), matrix(v, 256, 4)];
    let (_, came) = send(&mut group, all, 4, false).await.expect("the whole version");
    let fp8 = came[0].iter().filter(|(_, dtype)| *dtype == DType::F8_E4M3).count();
    assert_eq!((fp8, came[0].len()), (3, 6), "{came:?}");
}

/// An adapter in PEFT's names.
fn adapter(version: u64) -> Vec<Weight> {
    let half = |half: &str| {
        let name = format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight");
        let bytes = vec![version as u8; 8 * 256 * 2];
        Weight::new(name, DType::BF16, [8, 256], bytes).expect("a weight")
    };
    vec![half("A"), half("B")]
}

/// A draft model's weight.
fn draft(version: u64) -> Weight {
    Weight::new("mtp.fc.weight", DType::BF16, [1, 2], vec![version as u8; 4]).expect("a weight")
}

/// A group whose versions have three parts. No rank quantises.
async fn group_of_parts() -> Result<(Box<dyn TrainerEngine>, Vec<Box<dyn RolloutEngine>>)> {
    group_that_wants([None, None]).await
}

/// The same, of which the rollouts want these parts.
async fn group_that_wants(
    wants: [Option<&[&str]>; 2],
) -> Result<(Box<dyn TrainerEngine>, Vec<Box<dyn RolloutEngine>>)> {
    let parts = serde_json::json!({"adapter": ["*.lora_*"], "draft": ["mtp.*"]});
    group_with(parts, true, wants).await
}

async fn group_with(
    parts: serde_json::Value,
    delta: bool,
    wants: [Option<&[&str]>; 2],
) -> Result<(Box<dyn TrainerEngine>, Vec<Box<dyn RolloutEngine>>)> {
    let registry = Registry::new().with(backend_naive::BACKEND).with_layer(LAYER);
    let context = |rank: u32| {
        let mut config = CheckpointEngineConfig::default();
        config.timeout_seconds = 20.0;
        config.layers.insert("delta".into(), delta.into());
        let wants = rank.checked_sub(1).and_then(|rollout| wants[rollout as usize]);
        config.wants = wants.map(|wants| wants.iter().map(|part| (*part).to_owned()).collect());
        config.parts = serde_json::from_value(parts.clone()).expect("parts");
        EngineContext::new(config).with_rank(Rank(rank))
    };
    let trainer = registry.prepare_trainer(context(0)).await?;
    let rollouts = vec![
        registry.prepare_rollout(context(1)).await?,
        registry.prepare_rollout(context(2)).await?,
    ];
    let (mut trainers, rollouts) =
        form_local_group(backend_naive::BACKEND, vec![trainer], rollouts).await?;
    Ok((trainers.remove(0), rollouts))
}

/// Makes an update. Returns the parts in the trainer's report, which those of every rollout must equal.
async fn parts_of(
    (trainer, rollouts): &mut (Box<dyn TrainerEngine>, Vec<Box<dyn RolloutEngine>>),
    weights: Vec<Weight>,
    version: u64,
    is_part: bool,
) -> Result<BTreeMap<String, PartReport>> {
    let (stream, version) = (ensure_async_iterator(weights), Version(version));
    let send = match is_part {
        true => trainer.send_part(stream, version),
        false => trainer.send_weights(stream, version),
    };
    let receive = rollouts
        .iter_mut()
        .map(|rollout| async move { rollout.receive_weights(Some(version)).await?.finish().await });
    let (sent, received) = futures::join!(send, futures::future::join_all(receive));
    let parts = sent?.delta.expect("a report").parts;
    for received in received {
        assert_eq!(received?.parts, parts);
    }
    Ok(parts)
}

#[tokio::test]
async fn every_part_has_a_digest_that_only_its_own_weights_change_and_all_ranks_have_the_same() {
    let mut group = group_of_parts().await.expect("a group");
    let all = |policy: u64, other: u64| {
        let policy = [matrix("mlp.up_proj", 8, policy), matrix("mlp.down_proj", 8, policy)];
        policy.into_iter().chain(adapter(other)).chain([draft(other)]).collect::<Vec<_>>()
    };
    let first = parts_of(&mut group, all(1, 1), 1, false).await.expect("the whole version");
    let sizes = |parts: &BTreeMap<String, PartReport>| -> Vec<(String, u64, u64, u64)> {
        let size = |(name, part): (&String, &PartReport)| {
            (name.clone(), part.tensors, part.bytes, part.sent)
        };
        parts.iter().map(size).collect()
    };
    let expected = |sent: [u64; 3]| {
        let parts = [("adapter", 2, 8192), ("draft", 1, 4), ("policy", 2, 8192)];
        let part = |((name, tensors, bytes), sent): ((&str, u64, u64), u64)| {
            (name.to_owned(), tensors, bytes, sent)
        };
        parts.into_iter().zip(sent).map(part).collect::<Vec<_>>()
    };
    assert_eq!(sizes(&first), expected([2, 1, 2]));
    let digests = |parts: &BTreeMap<String, PartReport>| -> Vec<u64> {
        parts.values().map(|part| part.digest).collect()
    };
    // Which of the parts another version has as the one before.
    let is_same = |one: &BTreeMap<String, PartReport>, other: &BTreeMap<String, PartReport>| {
        let both = digests(one).into_iter().zip(digests(other));
        both.map(|(one, other)| one == other).collect::<Vec<_>>()
    };
    // The adapter alone: its base is proven to be what it was.
    let second = parts_of(&mut group, adapter(2), 2, true).await.expect("the adapter");
    assert_eq!(sizes(&second), expected([2, 0, 0]));
    assert_eq!(is_same(&first, &second), [false, true, true]);
    let third = parts_of(&mut group, all(3, 2), 3, false).await.expect("another policy");
    assert_eq!(sizes(&third), expected([0, 1, 2]));
    assert_eq!(is_same(&second, &third), [true, false, false]);
    // Weights that are sent as they were come first in the version, which changes no part.
    let again = vec![matrix("mlp.down_proj", 8, 3), draft(2)];
    let again = parts_of(&mut group, again, 4, true).await.expect("the same again");
    assert_eq!((sizes(&again), digests(&again)), (expected([0, 0, 0]), digests(&third)));
    // A part has its digest wherever it comes from, and whatever is around it.
    let alone = parts_of(&mut group, adapter(2), 5, false).await.expect("nothing but an adapter");
    assert_eq!(alone["adapter"].digest, third["adapter"].digest);
    assert_eq!(alone.len(), 1);
}

/// An update that the second of two rollouts refuses when it has all of it. It fails everywhere.
async fn second_refuses(
    rollouts: &mut [Box<dyn RolloutEngine>],
    send: impl Future<Output = Result<SendReport>>,
) {
    let [one, other] = &mut rollouts[..] else { panic!("two rollouts") };
    let takes = async { one.receive_weights(None).await?.finish().await };
    let refuses = async {
        let received = other.receive_weights(None).await?;
        received.before_confirm(|| Err(Error::new(ErrorKind::Resource, "installing", "no room")));
        received.finish().await
    };
    let (sent, taken, refused) = futures::join!(send, takes, refuses);
    assert!(sent.is_err() && taken.is_err() && refused.is_err());
}

#[tokio::test]
async fn a_failed_update_leaves_every_part_as_it_was() {
    let mut group = group_of_parts().await.expect("a group");
    let all = || [vec![matrix("mlp.up_proj", 8, 1), draft(1)], adapter(1)].concat();
    let first = parts_of(&mut group, all(), 1, false).await.expect("the whole version");
    let (trainer, rollouts) = &mut group;
    let send = trainer.send_part(ensure_async_iterator(adapter(2)), Version(2));
    second_refuses(rollouts, send).await;
    // The draft comes as it was. Nothing of the adapter that failed is in the version.
    let next = parts_of(&mut group, vec![draft(1)], 3, true).await.expect("a part");
    let digests = |parts: &BTreeMap<String, PartReport>| -> Vec<u64> {
        parts.values().map(|part| part.digest).collect()
    };
    assert_eq!(digests(&first), digests(&next));
    assert!(next.values().all(|part| part.sent == 0), "{next:?}");
}

#[tokio::test]
async fn parts_that_cannot_be_are_refused_before_anything_is_sent() {
    for (parts, words) in [
        (serde_json::json!({"policy": ["*"]}), "policy"),
        (serde_json::json!({"draft": []}), "draft"),
        (serde_json::json!({"": ["*"]}), "without a name"),
    ] {
        for delta in [false, true] {
            let group = group_with(parts.clone(), delta, [None, None]).await;
            let error = group.expect_err("parts that cannot be");
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}

/// Makes an update. Returns the trainer's report, and of each rollout the names of what came and its report.
async fn update(
    (trainer, rollouts): &mut (Box<dyn TrainerEngine>, Vec<Box<dyn RolloutEngine>>),
    weights: Vec<Weight>,
    version: u64,
    is_part: bool,
) -> Result<(SendReport, Vec<(Vec<Weight>, ReceiveReport)>)> {
    let (stream, version) = (ensure_async_iterator(weights), Version(version));
    let send = match is_part {
        true => trainer.send_part(stream, version),
        false => trainer.send_weights(stream, version),
    };
    let receive = rollouts.iter_mut().map(|rollout| async move {
        let mut received = rollout.receive_weights(Some(version)).await?;
        let mut came = Vec::new();
        while let Some(weight) = received.next_tensor().await? {
            came.push(weight);
        }
        Ok((came, received.finish().await?))
    });
    let (sent, received) = futures::join!(send, futures::future::join_all(receive));
    Ok((sent?, received.into_iter().collect::<Result<_>>()?))
}

/// All weights of a version, parts of which come in turn.
fn mixed(policy: u64, draft_of: u64, adapter_of: u64) -> Vec<Weight> {
    let [a, b] = adapter(adapter_of).try_into().expect("two halves");
    let (up, down) = (matrix("mlp.up_proj", 8, policy), matrix("mlp.down_proj", 8, policy));
    vec![a, up, draft(draft_of), b, down]
}

fn bytes_of(weights: &[Weight]) -> Vec<(String, Vec<u8>)> {
    let bytes = |weight: &Weight| weight.to_bytes().expect("bytes").to_vec();
    weights.iter().map(|weight| (weight.name().to_owned(), bytes(weight))).collect()
}

#[tokio::test]
async fn changes_of_a_part_reach_those_who_want_it_and_every_rollout_proves_what_it_has() {
    let wants = [Some(&["adapter", "policy"][..]), Some(&["draft"])];
    let mut group = group_that_wants(wants).await.expect("a group");
    let (sent, _) = update(&mut group, mixed(1, 1, 1), 1, false).await.expect("the first");
    assert!(sent.delta.expect("a report").whole.is_some());
    let is_drafts = |weight: &Weight| weight.name().starts_with("mtp.");
    let steps = [(2, 1, 1), (2, 2, 2), (2, 2, 2), (3, 3, 2)];
    for (version, (policy, draft_of, adapter_of)) in (2..).zip(steps) {
        let (all, weights) =
            (mixed(policy, draft_of, adapter_of), mixed(policy, draft_of, adapter_of));
        let (sent, received) = update(&mut group, weights, version, false).await.expect("changes");
        let delta = sent.delta.expect("a report");
        assert_eq!(delta.whole, None, "{version}");
        let (drafts, others): (Vec<_>, Vec<_>) = all.into_iter().partition(is_drafts);
        for ((came, report), (expected, wants)) in
            received.iter().zip([(others, wants[0]), (drafts, wants[1])])
        {
            assert_eq!(bytes_of(came), bytes_of(&expected), "{version}");
            let wants: Vec<String> = wants.into_iter().flatten().map(|w| (*w).to_owned()).collect();
            assert_eq!(report.wants.as_ref(), Some(&wants));
            // Of its parts it has what the trainer has, and of others nothing.
            assert_eq!(report.parts.keys().cloned().collect::<Vec<_>>(), wants);
            for (name, part) in &report.parts {
                assert_eq!(part, &delta.parts[name], "{version}: {name}");
            }
        }
        let told: Vec<_> = sent.receivers.iter().map(|receiver| receiver.parts.len()).collect();
        assert_eq!(told, [2, 1]);
    }
    // A part of it, which one of the rollouts does not want; and the proof of all.
    let (sent, received) = update(&mut group, adapter(9), 6, true).await.expect("an adapter");
    assert_eq!(sent.delta.expect("a report").whole, None);
    assert_eq!(bytes_of(&received[0].0)[..2], bytes_of(&adapter(9)));
    assert_eq!(bytes_of(&received[1].0), bytes_of(&[draft(3)]));
    let (trainer, rollouts) = &mut group;
    let receive = rollouts.iter_mut().map(|rollout| async move {
        rollout.receive_weights(None).await?.finish().await.map(|report| report.tensors)
    });
    let (proof, received) = futures::join!(trainer.attest(), futures::future::join_all(receive));
    assert!(proof.expect("proof").delta.expect("a report").attested);
    let received: Result<Vec<u64>> = received.into_iter().collect();
    assert_eq!(received.expect("the version again"), [4, 1]);
}

#[tokio::test]
async fn a_part_that_nobody_wants_does_not_travel_and_counts_as_nothing_sent() {
    let mut group = group_that_wants([Some(&["draft"]), Some(&["draft"])]).await.expect("a group");
    for version in 1..4 {
        let weights = mixed(version, version, version);
        let (sent, received) =
            update(&mut group, weights, version, false).await.expect("an update");
        for (came, report) in received {
            assert_eq!(bytes_of(&came), bytes_of(&[draft(version)]));
            assert_eq!((report.tensors, report.bytes), (1, 4));
        }
        let delta = sent.delta.expect("a report");
        let sent: Vec<u64> = delta.parts.values().map(|part| part.sent).collect();
        assert_eq!(sent, [0, 1, 0], "version {version}");
        assert_eq!(delta.whole.is_some(), version == 1);
    }
}

#[tokio::test]
async fn an_update_that_a_rank_of_one_part_fails_leaves_all_parts_on_all_ranks() {
    let mut group = group_that_wants([Some(&["policy"]), Some(&["draft"])]).await.expect("a group");
    for version in 1..3 {
        update(&mut group, mixed(version, version, 1), version, false).await.expect("an update");
    }
    let (trainer, rollouts) = &mut group;
    let send = trainer.send_weights(ensure_async_iterator(mixed(3, 3, 1)), Version(3));
    second_refuses(rollouts, send).await;
    // Both have what they had, so that changes to it are enough.
    let (sent, received) = update(&mut group, mixed(2, 4, 1), 4, false).await.expect("an update");
    let delta = sent.delta.expect("a report");
    assert_eq!((delta.whole, delta.parts["policy"].sent), (None, 0));
    assert_eq!(bytes_of(&received[1].0), bytes_of(&[draft(4)]));
}

#[tokio::test]
async fn without_copies_parts_travel_apart_as_well() {
    let parts = serde_json::json!({"adapter": ["*.lora_*"], "draft": ["mtp.*"]});
    let wants = [Some(&["adapter"][..]), None];
    let mut group = group_with(parts, false, wants).await.expect("a group");
    for version in 1..3 {
        let weights = mixed(version, version, version);
        let (_, received) = update(&mut group, weights, version, false).await.expect("an update");
        assert_eq!(bytes_of(&received[0].0), bytes_of(&adapter(version)));
        assert_eq!(bytes_of(&received[1].0), bytes_of(&mixed(version, version, version)));
    }
}

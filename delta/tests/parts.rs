//! Versions of which only a part is sent.

use delta::LAYER;
use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, ErrorKind, Outcome, Rank, ReceivedWeights,
    Registry, Result, RolloutEngine, SendReport, TrainerEngine, Version, Weight,
    ensure_async_iterator, form_local_group,
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

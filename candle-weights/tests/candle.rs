//! Tensors of candle through an engine and back.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_weights::{Fp8Weights, tensors, weights};
use engine_core::{
    CheckpointEngineConfig, EngineContext, ErrorKind, Registry, TensorMap, Version, Weight,
    ensure_async_iterator, form_local_group,
};

const PROJECTION: &str = "model.layers.0.mlp.up_proj.weight";

/// What a rollout has installed after an update over the engine of one process.
async fn sent(
    weights: impl Iterator<Item = engine_core::Result<Weight>> + Send,
    fp8: bool,
) -> TensorMap {
    let mut config = CheckpointEngineConfig::default();
    config.layers = [("trainer_quantize_fp8".to_owned(), fp8.into())].into_iter().collect();
    let registry = Registry::new().with(backend_naive::BACKEND).with_layer(quant_fp8::LAYER);
    let context = EngineContext::new(config);
    let trainer = registry.prepare_trainer(context.clone()).await.unwrap();
    let rollout = registry.prepare_rollout(context).await.unwrap();
    let backend = registry.get("naive").unwrap();
    let formed = form_local_group(backend, vec![trainer], vec![rollout]).await.unwrap();
    let (mut trainers, mut rollouts) = formed;
    let (trainer, rollout) = (&mut trainers[0], &mut rollouts[0]);
    let mut map = TensorMap::new();
    let send = trainer.send_weights(ensure_async_iterator(weights), Version(1));
    let receive = async { rollout.receive_weights(None).await?.install(&mut map).await };
    futures::future::try_join(send, receive).await.unwrap();
    map
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[tokio::test]
async fn a_model_built_of_what_arrived_computes_the_same() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| candle_nn::linear(8, 4, vb.pp("head")).unwrap();
    let trained = build(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu));
    let tensors_of: Vec<_> = {
        let vars = vars.data().lock().unwrap();
        vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect()
    };
    let map = sent(weights(tensors_of), false).await;
    let arrived = tensors(&map, &Device::Cpu, Fp8Weights::Kept).unwrap();
    let copy = build(VarBuilder::from_tensors(arrived, DType::F32, &Device::Cpu));
    let x = Tensor::arange(0_f32, 16., &Device::Cpu).unwrap().reshape((2, 8)).unwrap();
    use candle_nn::Module;
    assert_eq!(values(&trained.forward(&x).unwrap()), values(&copy.forward(&x).unwrap()));
}

#[tokio::test]
async fn tensors_of_every_type_arrive_as_they_were_also_views() {
    let base = Tensor::arange(0_f32, 24., &Device::Cpu).unwrap().reshape((4, 6)).unwrap();
    let mut given = HashMap::new();
    for dtype in [
        DType::U8,
        DType::U32,
        DType::I64,
        DType::BF16,
        DType::F16,
        DType::F32,
        DType::F64,
        DType::F8E4M3,
    ] {
        given.insert(format!("{dtype:?}"), base.to_dtype(dtype).unwrap());
    }
    given.insert("transposed".into(), base.t().unwrap());
    given.insert("narrowed".into(), base.narrow(0, 1, 2).unwrap());
    given.insert("scalar".into(), Tensor::new(3_f32, &Device::Cpu).unwrap());
    let map = sent(weights(given.clone()), false).await;
    let arrived = tensors(&map, &Device::Cpu, Fp8Weights::Kept).unwrap();
    assert_eq!(arrived.len(), given.len());
    for (name, tensor) in given {
        assert_eq!(arrived[&name].dtype(), tensor.dtype(), "{name}");
        assert_eq!(arrived[&name].dims(), tensor.dims(), "{name}");
        assert_eq!(values(&arrived[&name]), values(&tensor), "{name}");
    }
}

#[test]
fn a_weight_is_what_its_variable_held_at_its_turn() {
    let var = Var::zeros(4, DType::F32, &Device::Cpu).unwrap();
    let first = weights([("w", var.as_tensor().clone())]).next().unwrap().unwrap();
    var.set(&Tensor::ones(4, DType::F32, &Device::Cpu).unwrap()).unwrap();
    let second = weights([("w", var.as_tensor().clone())]).next().unwrap().unwrap();
    assert_eq!(&first.to_bytes().unwrap()[..], [0; 16]);
    assert_eq!(&second.to_bytes().unwrap()[..], 1_f32.to_le_bytes().repeat(4));
}

fn projection() -> Tensor {
    let values: Vec<f32> = (0..256 * 128).map(|i| (i as f32 * 0.37).sin()).collect();
    Tensor::from_vec(values, (256, 128), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap()
}

#[tokio::test]
async fn fp8_weights_are_dequantised_close_to_what_was_sent_and_their_scales_disappear() {
    let map = sent(weights([(PROJECTION, projection())]), true).await;
    let fp8 = Fp8Weights::Dequantized(DType::F32, Default::default());
    let arrived = tensors(&map, &Device::Cpu, fp8).unwrap();
    assert_eq!(arrived.keys().collect::<Vec<_>>(), [PROJECTION]);
    let (sent, got) = (values(&projection()), values(&arrived[PROJECTION]));
    // Three bits of mantissa: half a step is 1/16 of the value; near zero, half the smallest code.
    let close = |(a, b): (&f32, &f32)| (a - b).abs() <= a.abs() / 16.0 + 1e-5;
    assert!(sent.iter().zip(&got).all(close));
    assert_ne!(sent, got, "nothing was quantised");
}

#[tokio::test]
async fn fp8_weights_that_are_kept_are_codes_beside_their_scales() {
    let map = sent(weights([(PROJECTION, projection())]), true).await;
    let arrived = tensors(&map, &Device::Cpu, Fp8Weights::Kept).unwrap();
    assert_eq!(arrived[PROJECTION].dtype(), DType::F8E4M3);
    let scales = &arrived[&format!("{PROJECTION}_scale_inv")];
    assert_eq!((scales.dtype(), scales.dims()), (DType::F32, [2, 1].as_slice()));
    let codes = values(&arrived[PROJECTION]);
    assert!(codes.iter().all(|code| code.abs() <= 448.0) && codes.iter().any(|c| c.abs() == 448.0));
}

#[tokio::test]
async fn fp8_weights_whose_scales_are_missing_or_of_another_shape_are_refused_by_name() {
    let codes = projection().to_dtype(DType::F8E4M3).unwrap();
    let fp8 = Fp8Weights::Dequantized(DType::F32, Default::default());
    let alone = sent(weights([(PROJECTION.to_owned(), codes.clone())]), false).await;
    let error = tensors(&alone, &Device::Cpu, fp8).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Weight);
    assert!(error.to_string().contains(PROJECTION) && error.to_string().contains("did not arrive"));

    let scales = Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap();
    let given = [(PROJECTION.to_owned(), codes), (format!("{PROJECTION}_scale_inv"), scales)];
    let error = tensors(&sent(weights(given), false).await, &Device::Cpu, fp8).unwrap_err();
    assert!(error.to_string().contains("[2, 1]"), "{error}");
}

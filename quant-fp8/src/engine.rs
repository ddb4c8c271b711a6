//! Quantisation in front of any engine, which does not know of it.

use async_trait::async_trait;
use engine_core::{
    CheckpointEngine, EngineContext, Layer, Placement, ReceivedWeights, Result, Role, SendReport,
    Version, WeightStream, WorkerMetadata, memory::Pool,
};

use crate::contract::{Declaration, Fp8Config, Inspector, agree};
use crate::rules::Rules;
use crate::{Fp8Quantizer, QuantizeFp8};

/// Quantisation in front of an engine, as its configuration says: to be given to
/// [`Registry::with_layer`](engine_core::Registry::with_layer). [`Fp8Config`] has its keys.
///
/// On every rank the engine then declares a format contract in [`prepare`](CheckpointEngine::prepare)
/// and compares it with the others' in
/// [`init_process_group`](CheckpointEngine::init_process_group). A trainer with
/// `trainer_quantize_fp8` quantises what it sends; a rollout with `quantize_on_receive` what arrives
/// unquantised. A `quantization` section that cannot be used is an error of the engine's making.
pub const LAYER: Layer = Layer { name: "fp8", keys: &Fp8Config::KEYS, put: with_fp8 };

fn with_fp8(
    engine: Box<dyn CheckpointEngine>,
    context: &EngineContext,
) -> Result<Box<dyn CheckpointEngine>> {
    let declaration = Declaration::of(&context.config, context.role)?;
    let (role, threads) = (context.role, context.threads());
    Ok(Box::new(Fp8Engine { engine, role, declaration, threads, task: Task::Pass }))
}

#[derive(Debug)]
struct Fp8Engine {
    engine: Box<dyn CheckpointEngine>,
    role: Role,
    declaration: Declaration,
    threads: usize,
    task: Task,
}

/// What this rank does to the weights, once the group has agreed.
#[derive(Debug)]
enum Task {
    /// They pass as they are.
    Pass,
    /// They pass if they are what this rank declared.
    Inspect(Rules),
    /// It quantises what it sends.
    OnSend(Fp8Quantizer),
    /// It quantises what it receives.
    OnReceive(Fp8Quantizer, Pool),
}

#[async_trait]
impl CheckpointEngine for Fp8Engine {
    async fn prepare(&mut self) -> Result<WorkerMetadata> {
        let mut metadata = self.engine.prepare().await?;
        metadata.format = self.declaration.to_value()?;
        Ok(metadata)
    }

    async fn init_process_group(&mut self, place: Placement) -> Result<()> {
        let agreement = agree(&place.peers)?;
        let rules = Rules::new(&agreement.rules)?;
        let format = agreement.rules.format;
        self.task = match (self.role, agreement.trainer_quantizes) {
            (Role::Trainer, true) => {
                tracing::info!(?format, "quantising to FP8 on the trainer");
                Task::OnSend(rules.into())
            }
            (Role::Trainer, false) => Task::Pass,
            (Role::Rollout, false) if self.declaration.quantizes => {
                tracing::info!(?format, "quantising to FP8 on the rollout");
                Task::OnReceive(rules.into(), Pool::new(self.threads)?)
            }
            (Role::Rollout, quantized) => {
                if quantized {
                    tracing::info!(?format, "weights arrive as FP8, quantised by the trainer");
                }
                Task::Inspect(rules)
            }
        };
        self.engine.init_process_group(place).await
    }

    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let weights = match &self.task {
            Task::OnSend(quantizer) => weights.quantize_fp8(quantizer),
            _ => weights,
        };
        self.engine.send_weights(weights, version).await
    }

    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>> {
        let received = self.engine.receive_weights(version).await?;
        Ok(match &self.task {
            Task::OnReceive(quantizer, pool) => {
                received.map_weights(pool.clone(), |weights| weights.quantize_fp8(quantizer))
            }
            Task::Inspect(rules) => match Inspector::new(&self.declaration.section, rules) {
                Some(mut inspector) => {
                    received.inspect_buckets(move |bucket| inspector.inspect(bucket))
                }
                None => received,
            },
            _ => received,
        })
    }

    async fn finalize(&mut self) -> Result<()> {
        self.task = Task::Pass;
        self.engine.finalize().await
    }
}

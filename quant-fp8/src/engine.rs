//! Quantisation in front of any engine, which does not know of it.

use std::sync::Arc;

use async_trait::async_trait;
use engine_core::{
    CheckpointEngine, EngineContext, Layer, Prepared, PreparedRollout, PreparedTrainer,
    ReceivedWeights, Result, Role, RolloutEngine, SendReport, TrainerEngine, Version, WeightStream,
    WorkerMetadata, memory::Pool,
};

use crate::combinator::{Decided, Part, quantize_part};
use crate::contract::{Declaration, Fp8Config, Inspector, agree};
use crate::rules::{Rules, RulesConfig};
use crate::{Fp8Quantizer, QuantizeFp8};

/// Quantisation in front of an engine, as its configuration says: to be given to
/// [`Registry::with_layer`](engine_core::Registry::with_layer). [`Fp8Config`] has its keys.
///
/// Every rank declares a format contract in its metadata, and compares it with the others' when it
/// [joins](Prepared::join). A trainer with
/// `trainer_quantize_fp8` quantises what it sends; a rollout with `quantize_on_receive` what arrives
/// unquantised. A `quantization` section that cannot be used is an error of preparing.
pub const LAYER: Layer =
    Layer::new("fp8", &Fp8Config::KEYS, in_front_of_trainer, in_front_of_rollout);

fn in_front_of_trainer(
    prepared: PreparedTrainer,
    context: &EngineContext,
) -> Result<PreparedTrainer> {
    let declaration = Declaration::of(&context.config, Role::Trainer)?;
    let metadata = declared(&prepared, &declaration)?;
    Ok(Prepared::new(metadata, move |place| async move {
        let agreement = agree(&place.peers)?;
        if !agreement.trainer_quantizes {
            return prepared.join(place).await;
        }
        let rules = Rules::new(&agreement.rules)?;
        tracing::info!(format = ?agreement.rules.format, "quantising to FP8 on the trainer");
        let engine = prepared.join(place).await?;
        let quantizing = QuantizingTrainer {
            engine,
            quantizer: rules.into(),
            rules: Arc::new(agreement.rules),
            version: Arc::default(),
        };
        Ok(Box::new(quantizing) as Box<dyn TrainerEngine>)
    }))
}

fn in_front_of_rollout(
    prepared: PreparedRollout,
    context: &EngineContext,
) -> Result<PreparedRollout> {
    let declaration = Declaration::of(&context.config, Role::Rollout)?;
    let metadata = declared(&prepared, &declaration)?;
    let threads = context.threads(Role::Rollout);
    Ok(Prepared::new(metadata, move |place| async move {
        let agreement = agree(&place.peers)?;
        let rules = Rules::new(&agreement.rules)?;
        let format = agreement.rules.format;
        let task = if declaration.quantizes && !agreement.trainer_quantizes {
            tracing::info!(?format, "quantising to FP8 on the rollout");
            Task::Quantize(rules.into(), Pool::new(threads)?)
        } else {
            if agreement.trainer_quantizes {
                tracing::info!(?format, "weights arrive as FP8, quantised by the trainer");
            }
            Task::Inspect(rules)
        };
        let engine = prepared.join(place).await?;
        Ok(Box::new(Fp8Rollout { engine, declaration, task }) as Box<dyn RolloutEngine>)
    }))
}

/// The metadata of a rank, with its declaration.
fn declared<E>(prepared: &Prepared<E>, declaration: &Declaration) -> Result<WorkerMetadata> {
    let mut metadata = prepared.metadata().clone();
    metadata.format = declaration.to_value()?;
    Ok(metadata)
}

/// A trainer that quantises what it sends.
#[derive(Debug)]
struct QuantizingTrainer {
    engine: Box<dyn TrainerEngine>,
    quantizer: Fp8Quantizer,
    rules: Arc<RulesConfig>,
    /// What was decided on the weights of the version that was committed last.
    version: Arc<[Decided]>,
}

#[async_trait]
impl CheckpointEngine for QuantizingTrainer {
    async fn finalize(self: Box<Self>) -> Result<()> {
        self.engine.finalize().await
    }
}

#[async_trait]
impl TrainerEngine for QuantizingTrainer {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let report =
            self.engine.send_weights(weights.quantize_fp8(&self.quantizer), version).await?;
        self.version = self.quantizer.last();
        Ok(report)
    }

    async fn send_part(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let part = Part::after(self.version.clone(), self.rules.clone());
        let next = part.next();
        let weights = quantize_part(weights, &self.quantizer, part);
        let report = self.engine.send_part(weights, version).await?;
        if let Some(next) = next.get() {
            self.version = next.clone();
        }
        Ok(report)
    }

    async fn attest(&mut self) -> Result<SendReport> {
        self.engine.attest().await
    }
}

#[derive(Debug)]
struct Fp8Rollout {
    engine: Box<dyn RolloutEngine>,
    declaration: Declaration,
    task: Task,
}

/// What a rollout does to the weights.
#[derive(Debug)]
enum Task {
    /// They pass if they are what this rank declared.
    Inspect(Rules),
    /// It quantises what it receives.
    Quantize(Fp8Quantizer, Pool),
}

#[async_trait]
impl CheckpointEngine for Fp8Rollout {
    async fn finalize(self: Box<Self>) -> Result<()> {
        self.engine.finalize().await
    }
}

#[async_trait]
impl RolloutEngine for Fp8Rollout {
    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>> {
        let received = self.engine.receive_weights(version).await?;
        Ok(match &self.task {
            Task::Quantize(quantizer, pool) => {
                received.map_weights(pool.clone(), |weights| weights.quantize_fp8(quantizer))
            }
            Task::Inspect(rules) => match Inspector::new(&self.declaration.section, rules) {
                Some(mut inspector) => {
                    received.inspect_buckets(move |bucket| inspector.inspect(bucket))
                }
                None => received,
            },
        })
    }

    fn adopt<'a>(&'a mut self, received: ReceivedWeights<'a>) -> ReceivedWeights<'a> {
        match &self.task {
            // Another rollout gives what it has quantised, which is not what travels.
            Task::Quantize(..) => received,
            Task::Inspect(_) => self.engine.adopt(received),
        }
    }
}

//! Engines with one fault each, made from the naive one. A suite that passes them is worthless.

use async_trait::async_trait;
use engine_core::{
    Availability, Backend, CheckpointEngine, EngineContext, Placement, PreparedRollout,
    PreparedTrainer, Result, SendReport, TrainerEngine, Version, Weight, WeightStream,
    WorkerMetadata, ensure_async_iterator,
};
use futures::StreamExt;

/// The fault of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The last tensor of an update never travels.
    DropsTheLastTensor,
    /// The first two tensors change places.
    SwapsTwoTensors,
    /// One bit of one tensor changes on the way.
    CorruptsAByte,
    /// A receiver that failed is reported as one that succeeded.
    HidesADeadPeer,
    /// Success is reported while nothing has been sent yet.
    ReportsSuccessEarly,
}

/// One broken backend for each fault.
pub static BACKENDS: &[&dyn Backend] = &[
    &Broken(Fault::DropsTheLastTensor),
    &Broken(Fault::SwapsTwoTensors),
    &Broken(Fault::CorruptsAByte),
    &Broken(Fault::HidesADeadPeer),
    &Broken(Fault::ReportsSuccessEarly),
];

#[derive(Debug)]
struct Broken(Fault);

#[async_trait]
impl Backend for Broken {
    fn name(&self) -> &'static str {
        backend_naive::BACKEND.name()
    }

    fn summary(&self) -> &'static str {
        "a broken engine, for tests of the suite"
    }

    fn probe(&self) -> Availability {
        backend_naive::BACKEND.probe()
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        let fault = self.0;
        let prepared = backend_naive::BACKEND.prepare_trainer(context).await?;
        Ok(prepared.map(move |inner| Box::new(BrokenTrainer { inner, fault }) as Box<_>))
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        backend_naive::BACKEND.prepare_rollout(context).await
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        backend_naive::BACKEND.build_topology(workers)
    }
}

#[derive(Debug)]
struct BrokenTrainer {
    inner: Box<dyn TrainerEngine>,
    fault: Fault,
}

#[async_trait]
impl CheckpointEngine for BrokenTrainer {
    async fn finalize(self: Box<Self>) -> Result<()> {
        self.inner.finalize().await
    }
}

#[async_trait]
impl TrainerEngine for BrokenTrainer {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        if self.fault == Fault::ReportsSuccessEarly {
            return Ok(SendReport::new(version));
        }
        let weights = self.fault.damaged(weights).await?;
        let result = self.inner.send_weights(weights, version).await;
        self.fault.told(result, version)
    }

    async fn send_part(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let weights = self.fault.damaged(weights).await?;
        let result = self.inner.send_part(weights, version).await;
        self.fault.told(result, version)
    }

    async fn attest(&mut self) -> Result<SendReport> {
        self.inner.attest().await
    }
}

impl Fault {
    /// The weights that an engine with it sends for those that it was given.
    async fn damaged<'a>(self, weights: WeightStream<'a>) -> Result<WeightStream<'a>> {
        let mut weights: Vec<Result<Weight>> = weights.collect().await;
        match self {
            Fault::DropsTheLastTensor => drop(weights.pop()),
            Fault::SwapsTwoTensors if weights.len() > 1 => weights.swap(0, 1),
            Fault::CorruptsAByte => {
                if let Some(Ok(first)) = weights.first() {
                    let mut bytes = first.to_bytes()?.to_vec();
                    if let Some(byte) = bytes.last_mut() {
                        *byte ^= 1;
                    }
                    weights[0] = Weight::from_meta(first.meta().clone(), bytes);
                }
            }
            _ => {}
        }
        Ok(ensure_async_iterator(weights))
    }

    /// What such an engine says of an update.
    fn told(self, result: Result<SendReport>, version: Version) -> Result<SendReport> {
        match self {
            Fault::HidesADeadPeer => Ok(result.unwrap_or_else(|_| SendReport::new(version))),
            _ => result,
        }
    }
}

//! What a placed update costs the host for each tensor: everything but the work of the device, which is nothing here.
//!
//! ```text
//! cargo run -p checkpoint-engine-placed --example host_cost -- [tensors] [updates]
//! ```
//!
//! One trainer and one rollout of one process send tensors of 768 x 2048 elements, once as they are and once quantised. Prints the medians of
//! the trainer's stages, in microseconds for each tensor.

#![allow(clippy::print_stdout, reason = "the measurements are its output")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use engine_core::{
    CheckpointEngineConfig, DType, DeviceBytes, DeviceMemory, EngineContext, Error, ErrorKind,
    Rank, Result, Role, SendReport, Storage, TensorMeta, TrainerEngine, Version, Weight,
    ensure_async_iterator,
};
use placed::{
    Encoded, Encoder, Layout, Lender, LentBytes, PlacedRollout, PlacedTrainer, Reach, Reached,
    Wanted, Written,
};
use protocol::hub::{Hub, Member};
use quant_fp8::{Fp8Format, SourceType, StridedPart};

/// Memory of a device that takes no time, because it has no bytes.
#[derive(Debug)]
struct Nothing(u64);

impl DeviceMemory for Nothing {
    fn device(&self) -> String {
        "nothing:0".into()
    }

    fn len(&self) -> u64 {
        self.0
    }

    fn read(&self, _start: u64, destination: &mut [u8]) -> Result<()> {
        destination.fill(0);
        Ok(())
    }
}

fn nothing(len: u64) -> Storage {
    Storage::from(DeviceBytes::new(Arc::new(Nothing(len))))
}

impl Reached for Nothing {
    fn put(&self, _at: u64, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }
}

impl Lender for Nothing {
    fn len(&self) -> u64 {
        self.0
    }

    fn lend(&mut self) -> Result<Bytes> {
        Ok(Bytes::new())
    }

    fn take_back(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn bytes(&self, _: u64, _: u64) -> Result<LentBytes<'_>> {
        Ok(LentBytes::Device(nothing(self.0)))
    }

    fn sums(
        &self,
        pieces: &[&Arc<[StridedPart]>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        step()?;
        Ok(Some(vec![0; pieces.len()]))
    }
}

/// Reaches memory, and writes nothing.
#[derive(Debug)]
struct Writes;

impl Reach for Writes {
    fn reach(&self, terms: &[(Rank, Bytes)]) -> Result<Vec<Arc<dyn Reached>>> {
        Ok(terms.iter().map(|_| Arc::new(Nothing(0)) as Arc<dyn Reached>).collect())
    }

    fn encoder(&self) -> Option<&dyn Encoder> {
        Some(self)
    }
}

impl Encoder for Writes {
    fn takes(&self, weight: &Weight, _format: Option<&Fp8Format>) -> bool {
        weight.storage().is_some_and(|storage| storage.device().is_some())
    }

    fn writes_to(&self, _to: &dyn Reached) -> bool {
        true
    }

    fn maxima(&self, parts: &[(&Weight, SourceType, &StridedPart)]) -> Result<Vec<Vec<u32>>> {
        Ok(vec![Vec::new(); parts.len()])
    }

    fn write(
        &self,
        pieces: &[Encoded<'_>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Written> {
        step()?;
        Ok(Written { sums: vec![0; pieces.len()], failed: None })
    }
}

async fn measure(
    tensors: u64,
    updates: u64,
    format: Option<Fp8Format>,
) -> Result<(SendReport, Vec<Duration>)> {
    let metas: Vec<TensorMeta> = (0..tensors)
        .map(|at| {
            let (layer, expert) = (at / 384, at % 384);
            let name = format!("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight");
            TensorMeta::new(name, DType::BF16, [768, 2048])
        })
        .collect();
    let wanted = metas.iter().map(|meta| match format {
        None => Wanted::whole(meta.clone()),
        Some(format) => Wanted::whole(meta.clone()).quantized(format),
    });
    let layout = Layout::new(wanted)?;
    let (hub, member) = (Hub::new(), Member::new(Rank(1), Role::Rollout));
    hub.admit(&member)?;
    let config = CheckpointEngineConfig::new("ipc");
    let context = |control| EngineContext::new(config.clone()).with_control(control);
    let memory = Box::new(Nothing(layout.bytes()));
    let mut rollout = PlacedRollout::new(&context(member.control()), layout, memory)?;
    let ranks = BTreeMap::from([(Rank(0), Role::Trainer), (Rank(1), Role::Rollout)]);
    let mut trainer = PlacedTrainer::new(&context(hub.control()), ranks, Arc::new(Writes))?;
    let serving = tokio::spawn(async move {
        for version in 1..=updates {
            rollout.update(Some(Version(version))).await?;
        }
        rollout.finalize().await
    });
    let mut reports = Vec::new();
    for version in (1..=updates).map(Version) {
        let weights = metas.iter().map(|meta| {
            let len = meta.byte_len()?;
            Weight::from_meta(meta.clone(), nothing(len))
        });
        let weights = weights.collect::<Result<Vec<_>>>()?;
        reports.push(trainer.send_weights(ensure_async_iterator(weights), version).await?);
    }
    serving.await.map_err(|error| {
        Error::new(ErrorKind::Io, "measuring", error.to_string()).with_source(error)
    })??;
    let first = reports.remove(0);
    let median = |of: fn(&SendReport) -> Duration| {
        let mut all: Vec<Duration> = reports.iter().map(of).collect();
        all.sort();
        all[all.len() / 2]
    };
    let medians = vec![
        median(|report| report.stages.source),
        median(|report| report.stages.publish),
        median(|report| report.stages.encode),
        median(|report| report.stages.confirm),
        median(|report| report.elapsed),
    ];
    Ok((first, medians))
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>());
    let tensors = arguments.next().transpose()?.unwrap_or(18_867).max(1);
    let updates = arguments.next().transpose()?.unwrap_or(12).max(2);
    println!(
        "us per tensor, {tensors} tensors: stream, plan, write, verify, whole; the first update"
    );
    for (name, format) in [("bf16", None), ("fp8", Some(Fp8Format::default()))] {
        let (first, medians) = measure(tensors, updates, format).await?;
        let each = |time: &Duration| format!("{:.3}", time.as_secs_f64() * 1e6 / tensors as f64);
        let medians: Vec<String> = medians.iter().map(each).collect();
        println!("{name}: {}; {}", medians.join(", "), each(&first.elapsed));
    }
    Ok(())
}

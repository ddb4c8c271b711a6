//! What a placed update costs the host for each tensor: everything but the work of the device, which is nothing here.
//!
//! ```text
//! cargo run -p checkpoint-engine-placed --example host_cost -- [tensors] [updates] [TRAINERS ROLLOUTS]
//! ```
//!
//! The ranks are tasks of one process. They send the matrices of experts, once as they are and once quantised: from one trainer to one
//! rollout, and then from two trainers with half of the rows of each to two rollouts with tensor parallelism, and to two that want everything.
//! Or only from trainers of one layout to rollouts of another, such as `fsdp=2` and `tp=2`. Prints the medians of the stages of the
//! leading trainer, in microseconds for each tensor, and how many pieces a trainer writes, with how many calls of its encoder. With fewer
//! cores than ranks, ranks wait for one another, and the times of several ranks are larger than those of ranks with cores of their own.

#![allow(clippy::print_stdout, reason = "the measurements are its output")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use engine_core::{
    CheckpointEngineConfig, DType, DeviceBytes, DeviceMemory, EngineContext, Error, ErrorKind,
    Rank, Result, Role, SendReport, Storage, TensorBox, TensorMeta, TrainerEngine, Version, Weight,
    ensure_async_iterator,
};
use placed::{
    Encoded, Encoder, Layout, Lender, LentBytes, PlacedRollout, PlacedTrainer, Reach, Reached,
    Wanted, Written,
};
use protocol::hub::{Hub, Member};
use quant_fp8::{Fp8Format, SourceType, StridedPart};
use reshard::Parallelism;

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

    fn lend(&mut self, _: &[Rank]) -> Result<Bytes> {
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

/// Reaches memory, and writes nothing. Counts pieces, and calls.
#[derive(Debug, Default)]
struct Writes {
    pieces: AtomicU64,
    calls: AtomicU64,
}

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

    fn writes_to(&self, _to: &dyn Reached, _places: &[u64]) -> bool {
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
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.pieces.fetch_add(pieces.len() as u64, Ordering::Relaxed);
        Ok(Written { sums: vec![0; pieces.len()], failed: None })
    }
}

/// Who holds and who wants which part of the tensors. The ranks of trainers are the first.
struct Layouts {
    metas: Vec<TensorMeta>,
    trainers: Parallelism,
    rollouts: Parallelism,
}

impl Layouts {
    fn new(tensors: u64, trainers: &str, rollouts: &str) -> Result<Self> {
        let meta = |at: u64| {
            let (layer, expert) = (at / 384, at % 384 / 3);
            let (name, shape) = match at % 3 {
                0 => ("gate_proj", [768, 2048]),
                1 => ("up_proj", [768, 2048]),
                _ => ("down_proj", [2048, 768]),
            };
            let name = format!("model.layers.{layer}.mlp.experts.{expert}.{name}.weight");
            TensorMeta::new(name, DType::BF16, shape)
        };
        let metas = (0..tensors).map(meta).collect();
        Ok(Self { metas, trainers: trainers.parse()?, rollouts: rollouts.parse()? })
    }

    /// The tensors of a rank, with its box of each.
    fn of(&self, layout: &Parallelism, first: Rank, rank: Rank) -> Result<Vec<Wanted>> {
        let tensors = self.metas.iter().map(|meta| (meta.clone(), [].into()));
        let sharding = layout.sharding(first, tensors)?;
        let boxes = self.metas.iter().filter_map(|meta| {
            let part = sharding.get(&meta.name)?.layout.boxes_of(rank).next()?;
            Some(Wanted::whole(meta.clone()).part(part.clone()))
        });
        Ok(boxes.collect())
    }
}

/// The weights of a trainer, in the memory that they are in in every update.
fn weights(held: &[Wanted]) -> Result<Vec<Weight>> {
    let weight = |held: &Wanted| {
        let Wanted { meta, region, .. } = held;
        let sides: Vec<u64> = region.ranges().iter().map(|side| side.end - side.start).collect();
        let own = TensorMeta::new(meta.name.clone(), meta.dtype, sides);
        let bytes = nothing(own.byte_len()?);
        let weight = Weight::from_meta(own, bytes)?;
        match *region == TensorBox::whole(&meta.shape) {
            true => Ok(weight),
            false => weight.of_box(meta.shape.clone(), region.clone()),
        }
    };
    held.iter().map(weight).collect()
}

/// Runs the updates of a trainer.
async fn send(
    mut trainer: PlacedTrainer,
    weights: Vec<Weight>,
    updates: u64,
) -> Result<Vec<SendReport>> {
    let mut reports = Vec::new();
    for version in (1..=updates).map(Version) {
        let stream = ensure_async_iterator(weights.clone());
        reports.push(trainer.send_weights(stream, version).await?);
    }
    Ok(reports)
}

async fn joined<T>(task: tokio::task::JoinHandle<Result<T>>) -> Result<T> {
    task.await.map_err(|error| {
        Error::new(ErrorKind::Io, "measuring", error.to_string()).with_source(error)
    })?
}

struct Measured {
    first: SendReport,
    medians: Vec<Duration>,
    /// Of one trainer in one update.
    pieces: u64,
    calls: u64,
}

async fn measure(layouts: &Layouts, updates: u64, format: Option<Fp8Format>) -> Result<Measured> {
    let (senders, receivers) = (layouts.trainers.ranks, layouts.rollouts.ranks);
    let config = CheckpointEngineConfig::new("ipc");
    let context = |control| EngineContext::new(config.clone()).with_control(control);
    let role = |rank| if rank < senders { Role::Trainer } else { Role::Rollout };
    let ranks: BTreeMap<Rank, Role> =
        (0..senders + receivers).map(|rank| (Rank(rank), role(rank))).collect();
    let hub = Hub::new();
    let (mut others, mut rollouts) = (Vec::new(), Vec::new());
    for (&rank, &role) in ranks.iter().skip(1) {
        let member = Member::new(rank, role);
        hub.admit(&member)?;
        let context = context(member.control());
        if role == Role::Trainer {
            let own = weights(&layouts.of(&layouts.trainers, Rank::LEADER, rank)?)?;
            let writes = Arc::new(Writes::default());
            let trainer = PlacedTrainer::new(&context, ranks.clone(), writes)?;
            others.push((member, tokio::spawn(send(trainer, own, updates))));
            continue;
        }
        let wanted = layouts.of(&layouts.rollouts, Rank(senders), rank)?.into_iter();
        let layout = Layout::new(wanted.map(|wanted| match format {
            None => wanted,
            Some(format) => wanted.quantized(format),
        }))?;
        let memory = Box::new(Nothing(layout.bytes()));
        let mut rollout = PlacedRollout::new(&context, layout, memory)?;
        let serving = tokio::spawn(async move {
            for version in 1..=updates {
                rollout.update(Some(Version(version))).await?;
            }
            rollout.finalize().await
        });
        rollouts.push((member, serving));
    }
    let own = weights(&layouts.of(&layouts.trainers, Rank::LEADER, Rank::LEADER)?)?;
    let writes = Arc::new(Writes::default());
    let trainer = PlacedTrainer::new(&context(hub.control()), ranks, writes.clone())?;
    let mut reports = send(trainer, own, updates).await?;
    for (_member, sending) in others {
        joined(sending).await?;
    }
    for (_member, serving) in rollouts {
        joined(serving).await?;
    }
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
    let each = |count: &AtomicU64| count.load(Ordering::Relaxed) / updates;
    Ok(Measured { first, medians, pieces: each(&writes.pieces), calls: each(&writes.calls) })
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| match arguments.get(at) {
        Some(text) => text.parse::<u64>(),
        None => Ok(default),
    };
    let (tensors, updates) = (number(0, 18_867)?.max(1), number(1, 12)?.max(2));
    let usual = [("ranks=1", "ranks=1"), ("fsdp=2", "tp=2"), ("fsdp=2", "ranks=2")];
    let chosen = match &arguments[..] {
        [_, _, trainers, rollouts] => vec![(&**trainers, &**rollouts)],
        _ => usual.to_vec(),
    };
    println!(
        "us per tensor, {tensors} tensors: stream, plan, write, verify, whole; the first update; pieces, calls"
    );
    for (trainers, rollouts) in chosen {
        let layouts = Layouts::new(tensors, trainers, rollouts)?;
        for (name, format) in [("bf16", None), ("fp8", Some(Fp8Format::default()))] {
            let Measured { first, medians, pieces, calls } =
                measure(&layouts, updates, format).await?;
            let each =
                |time: &Duration| format!("{:.3}", time.as_secs_f64() * 1e6 / tensors as f64);
            let medians: Vec<String> = medians.iter().map(each).collect();
            let (medians, first) = (medians.join(", "), each(&first.elapsed));
            println!("{trainers} -> {rollouts}, {name}: {medians}; {first}; {pieces}, {calls}");
        }
    }
    Ok(())
}

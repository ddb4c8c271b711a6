//! Plans of models that are divided over many ranks, and how long their transfers would take.

use std::sync::Arc;

use checkpoint_engine::fp8::rules::{Decision, QuantPlan};
use checkpoint_engine::reshard::{
    self, Links, Parallelism, Planner, ReshardPlan, Sharding, Speeds,
};
use engine_core::{DType, Rank, Result, TensorMeta};
use serde::Serialize;

/// Who has a model in which layout, and what connects them.
#[derive(Clone, Debug)]
pub struct Setting {
    /// How trainers hold the model. Their ranks are the first.
    pub trainers: Parallelism,
    /// How rollouts want it. Their ranks come after those of the trainers, on nodes of their own.
    pub rollouts: Parallelism,
    /// Ranks of a node.
    pub ranks_per_node: u32,
    /// Network cards of a node.
    pub cards_per_node: u32,
    /// What links carry.
    pub speeds: Speeds,
}

/// What a plan costs, and what it is like. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct SimulatedPlan {
    /// The layout of the trainers.
    pub trainers: String,
    /// The layout of the rollouts.
    pub rollouts: String,
    /// Tensors of the model.
    pub tensors: usize,
    /// All elements once, in the types in which they travel.
    pub bytes: u64,
    /// Boxes that are sent, over all ranks.
    pub transfers: u64,
    /// Laying out all tensors on both sides: processor time, of one thread.
    pub layout_seconds: f64,
    /// The plan: processor time, of one thread.
    pub plan_seconds: f64,
    /// The next plan, after the experts of the last layer have changed places: the first with the last, and so on.
    pub replan_seconds: f64,
    /// What the next plan crossed anew, and what it kept.
    pub replan_crossed: usize,
    /// See [`replan_crossed`](Self::replan_crossed).
    pub replan_kept: usize,
    /// What a trainer sends over the network: the least of them, the mean, the most.
    pub sent: [u64; 3],
    /// What a rollout gets over the network.
    pub received: [u64; 3],
    /// Within their nodes, of all ranks.
    pub within_nodes: u64,
    /// The busiest network card.
    pub busiest: u64,
    /// What the busiest network card cannot do without.
    pub lower_bound: u64,
    /// `busiest` over `lower_bound`.
    pub ratio: f64,
    /// Until the last byte has arrived.
    pub seconds: f64,
    /// What the busiest link takes for its bytes alone.
    pub floor_seconds: f64,
    /// Maxima of straddling blocks that a rank sends at most.
    pub maxima_bytes: u64,
    /// Until they are exchanged.
    pub maxima_seconds: f64,
    /// Contiguous runs of bytes that a rank writes at most.
    pub writes: u64,
    /// The plan's digest, in hexadecimal.
    pub digest: String,
}

/// Plans an update of a model and simulates its transfers.
///
/// With a quantisation, what it quantises travels as FP8, in blocks that are not cut. Their scales are not counted: four bytes for
/// each block.
///
/// # Errors
///
/// `Config` for layouts that do not fit the model.
pub fn simulate(
    setting: &Setting,
    metas: &[TensorMeta],
    quantized: Option<&QuantPlan>,
) -> Result<SimulatedPlan> {
    let as_it_travels: Vec<(TensorMeta, Arc<[u64]>)> =
        metas.iter().map(|meta| travelling(meta, quantized)).collect::<Result<_>>()?;
    let first = setting.trainers.ranks;
    let sides = |parallelism: &Parallelism, first| -> Result<Sharding> {
        parallelism.sharding(Rank(first), as_it_travels.iter().cloned())
    };
    let mut links = Links::new();
    let (per_node, cards) = (setting.ranks_per_node, setting.cards_per_node);
    links.add_nodes(0..first, per_node, cards);
    links.add_nodes(first..first.saturating_add(setting.rollouts.ranks), per_node, cards);

    let start = cpu_seconds();
    let held = sides(&setting.trainers, 0)?;
    let wanted = sides(&setting.rollouts, first)?;
    let layout_seconds = cpu_seconds() - start;
    let mut planner = Planner::new();
    let start = cpu_seconds();
    let plan = planner.plan(&held, &wanted, &links)?;
    let plan_seconds = cpu_seconds() - start;

    let changed = with_experts_elsewhere(&wanted)?;
    let start = cpu_seconds();
    planner.plan(&held, &changed, &links)?;
    let replan_seconds = cpu_seconds() - start;
    let work = planner.work();

    let simulated = reshard::simulate(&plan, setting.speeds);
    let of = |ranks: std::ops::Range<u32>, load: fn(reshard::Load) -> u64| {
        let loads = ranks.map(|rank| load(plan.load(Rank(rank))));
        let (mut least, mut sum, mut most, mut count) = (u64::MAX, 0, 0, 0);
        for load in loads {
            (least, sum, most, count) = (least.min(load), sum + load, most.max(load), count + 1);
        }
        [least, sum / count.max(1), most]
    };
    let all = first + setting.rollouts.ranks;
    Ok(SimulatedPlan {
        trainers: setting.trainers.to_string(),
        rollouts: setting.rollouts.to_string(),
        tensors: metas.len(),
        bytes: as_it_travels.iter().map(|(meta, _)| meta.byte_len()).sum::<Result<u64>>()?,
        transfers: plan.transfers(),
        layout_seconds,
        plan_seconds,
        replan_seconds,
        replan_crossed: work.crossed,
        replan_kept: work.kept,
        sent: of(0..first, |load| load.sent),
        received: of(first..all, |load| load.received),
        within_nodes: plan.loads().map(|(_, load)| load.received_within).sum(),
        busiest: plan.busiest(),
        lower_bound: plan.lower_bound(),
        ratio: ratio(&plan),
        seconds: simulated.seconds,
        floor_seconds: simulated.floor,
        maxima_bytes: simulated.maxima_bytes,
        maxima_seconds: simulated.maxima,
        writes: simulated.writes,
        digest: plan.digest().iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

/// The same, with the experts of the last layer in the opposite order.
fn with_experts_elsewhere(sharding: &Sharding) -> Result<Sharding> {
    /// What is before the number of an expert, the number, and what is after it.
    fn parts(name: &str) -> Option<(&str, usize, &str)> {
        let (before, rest) = name.split_once(".experts.")?;
        let (number, after) = rest.split_once('.')?;
        Some((before, number.parse().ok()?, after))
    }
    let experts = || sharding.tensors().filter_map(|tensor| parts(&tensor.meta.name));
    let last = experts().map(|(before, ..)| before.to_owned()).last();
    let most = experts().map(|(_, number, _)| number).max();
    let mut changed = Sharding::new();
    for tensor in sharding.tensors() {
        let mut tensor = tensor.clone();
        if let (Some((before, number, after)), Some(most)) = (parts(&tensor.meta.name), most)
            && last.as_deref() == Some(before)
            && let Some(other) =
                sharding.get(&format!("{before}.experts.{}.{after}", most - number))
        {
            tensor.layout = other.layout.clone();
        }
        changed.add(tensor)?;
    }
    Ok(changed)
}

/// Processor time of this thread.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn ratio(plan: &ReshardPlan) -> f64 {
    if plan.lower_bound() == 0 { 1.0 } else { plan.busiest() as f64 / plan.lower_bound() as f64 }
}

/// The type in which a tensor travels, and the sides of its blocks.
fn travelling(
    meta: &TensorMeta,
    quantized: Option<&QuantPlan>,
) -> Result<(TensorMeta, Arc<[u64]>)> {
    let Some(plan) = quantized else { return Ok((meta.clone(), [].into())) };
    if plan.get(&meta.name).is_none_or(|entry| entry.decision != Decision::Quantize) {
        return Ok((meta.clone(), [].into()));
    }
    let shape: Vec<usize> = meta.shape.iter().map(|&side| side as usize).collect();
    let granule = plan.format().granularity.grid(&shape)?.block();
    let granule: Arc<[u64]> = granule.map(|side| side as u64).into();
    Ok((TensorMeta::new(meta.name.clone(), DType::F8_E4M3, meta.shape.clone()), granule))
}

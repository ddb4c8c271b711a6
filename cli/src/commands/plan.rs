//! `ckpt-engine plan`: what happens to each parameter of a model, and the same for commands that quantise. With `--simulate`,
//! who would send which part of each to whom.

use std::path::PathBuf;
use std::process::ExitCode;

use checkpoint_engine::fp8::rules::{QuantPlan, Receiver, RulesConfig, Stored};
use checkpoint_engine::fp8::{Fp8Config, stored};
use checkpoint_engine::reshard::{Parallelism, Speeds};
use checkpoint_engine::{CheckpointEngineConfig, DType, TensorMeta};
use clap::Args;
use cli::checkpoint::Checkpoint;
use cli::quantize::plan_of;
use cli::simulate::{Setting, SimulatedPlan, simulate};
use cli::source::{ModelSpec, SourceSpec};
use cli::synthetic::SyntheticModel;

use crate::Failure;
use crate::args::{FormatArgs, rules, shape};
use crate::output::{complain, json_line, say};

/// Prints what happens to each parameter, and by which rule: `name, decision, rule`, tab-separated.
///
/// The decision is quantize, keep or pass (what is FP8 already). Standard error says how much of what could
/// be FP8 stays as it is, and by which rules.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
    ckpt-engine plan --model Qwen3-30B-A3B | cut -f2 | sort | uniq -c

  For one receiver alone, which may load more than both vLLM and SGLang do:
    ckpt-engine plan --model Llama-4-Scout-17B-16E --receiver vllm

  From names and shapes alone:
    printf 'model.layers.0.mlp.gate.weight\\t256x1024\\n' > names
    ckpt-engine plan --names names

  What an update from 256 FSDP ranks to 128 ranks with tensor and expert parallelism takes, without any of them:
    ckpt-engine plan --simulate --synthetic kimi-k2 --trainer-layout fsdp=256 --rollout-layout tp=8,ep=64,ranks=128")]
pub(crate) struct PlanArgs {
    /// A .safetensors file, a Hugging Face folder, or the index of one
    #[arg(long, value_name = "PATH", required_unless_present_any = ["names", "synthetic"], conflicts_with_all = ["names", "synthetic"])]
    model: Option<PathBuf>,
    /// A file of lines NAME<TAB>SHAPE, the shape as 256x1024
    #[arg(long, value_name = "FILE", conflicts_with = "synthetic")]
    names: Option<PathBuf>,
    /// The names and shapes of a model that `bench transfer` knows, or of deepseek-v3 or kimi-k2
    #[arg(long, value_name = "NAME")]
    synthetic: Option<SyntheticModel>,
    #[command(flatten)]
    format: FormatArgs,
    /// Make a matrix that no rule knows an error
    #[arg(long)]
    strict: bool,
    /// Print the quantization_config for config.json instead
    #[arg(long, conflicts_with = "simulate")]
    config: bool,
    #[command(flatten)]
    simulation: SimulationArgs,
}

/// Who has the model in which layout, and over which links they would send.
#[derive(Debug, Args)]
struct SimulationArgs {
    /// Plan who sends which part of each tensor to whom instead, and simulate how long the links take for it
    #[arg(long, requires = "trainer_layout", requires = "rollout_layout")]
    simulate: bool,
    /// How trainers hold the model, such as fsdp=256 or tp=8,pp=4,ep=16,ranks=256: tp, pp, ep, etp (tensor parallelism of
    /// experts; that of tp unless ep is given), fsdp (how many replicas divide their part), kv-heads, and ranks, which all of them divide
    #[arg(long, value_name = "LAYOUT", requires = "simulate")]
    trainer_layout: Option<Parallelism>,
    /// How rollouts want it, such as tp=8,ep=64,ranks=128
    #[arg(long, value_name = "LAYOUT", requires = "simulate")]
    rollout_layout: Option<Parallelism>,
    /// Send everything as it is, and not in FP8 what can be
    #[arg(long, requires = "simulate")]
    unquantized: bool,
    /// Ranks of a node
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    ranks_per_node: u32,
    /// Network cards of a node, which its ranks take turns on
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    cards_per_node: u32,
    /// What a network card carries in each direction, in Gbit/s
    #[arg(long, value_name = "GBIT", default_value_t = 400.0, value_parser = speed)]
    network: f64,
    /// What a rank carries in each direction to and from others of its node, in GB/s
    #[arg(long, value_name = "GB", default_value_t = 368.0, value_parser = speed)]
    nvlink: f64,
    /// What each transfer between two ranks takes beside its bytes, in microseconds
    #[arg(long, value_name = "US", default_value_t = 10.0)]
    latency: f64,
    /// To and from how many others a rank has transfers at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    at_once: u32,
    /// Print one JSON object
    #[arg(long, requires = "simulate")]
    json: bool,
}

fn speed(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(speed) if speed > 0.0 && f64::is_finite(speed) => Ok(speed),
        _ => Err(format!("`{text}` is no speed above 0")),
    }
}

pub(crate) fn plan_command(args: &PlanArgs) -> Result<ExitCode, Failure> {
    let mut rules = rules(&args.format);
    rules.strict = args.strict;
    if args.simulation.simulate {
        return simulate_command(args, &rules);
    }
    let plan = quantization(args, &rules)?;
    remark(&plan, rules.receiver);
    if args.config {
        say(serde_json::to_string_pretty(&plan.quantization_config()?)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    for entry in plan.entries() {
        say(format!("{}\t{}\t{}", entry.name, entry.decision, entry.rule.id()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn quantization(args: &PlanArgs, rules: &RulesConfig) -> Result<QuantPlan, Failure> {
    Ok(match &args.model {
        Some(model) => plan_of(&Checkpoint::open(model)?, rules)?,
        None => QuantPlan::resolve(named(args)?, rules)?,
    })
}

type Parameter = (String, Vec<usize>, Stored);

/// The names and shapes of whatever is no checkpoint.
fn named(args: &PlanArgs) -> Result<Vec<Parameter>, Failure> {
    match (&args.names, args.synthetic) {
        (Some(names), _) => {
            let text = std::fs::read_to_string(names)
                .map_err(|error| format!("{}: {error}", names.display()))?;
            parameters(&text)
        }
        (None, Some(model)) => Ok(model.metas(None)?.iter().map(parameter).collect()),
        (None, None) => Err("give --model, --names or --synthetic".into()),
    }
}

fn parameter(meta: &TensorMeta) -> Parameter {
    let shape = meta.shape.iter().map(|&side| side as usize).collect();
    (meta.name.to_string(), shape, stored(meta.dtype))
}

fn simulate_command(args: &PlanArgs, rules: &RulesConfig) -> Result<ExitCode, Failure> {
    let SimulationArgs { trainer_layout, rollout_layout, .. } = &args.simulation;
    let (Some(trainers), Some(rollouts)) = (trainer_layout.clone(), rollout_layout.clone()) else {
        return Err("give --trainer-layout and --rollout-layout".into());
    };
    let simulation = &args.simulation;
    let metas: Vec<TensorMeta> = match (&args.model, args.synthetic) {
        (Some(model), _) => Checkpoint::open(model)?.metas().cloned().collect(),
        (None, Some(model)) => model.metas(None)?,
        (None, None) => {
            let sides =
                |shape: Vec<usize>| shape.into_iter().map(|side| side as u64).collect::<Vec<u64>>();
            let meta =
                |(name, shape, _): Parameter| TensorMeta::new(name, DType::BF16, sides(shape));
            named(args)?.into_iter().map(meta).collect()
        }
    };
    let plan = match simulation.unquantized {
        true => None,
        false => Some(quantization(args, rules)?),
    };
    let setting = Setting {
        trainers,
        rollouts,
        ranks_per_node: simulation.ranks_per_node,
        cards_per_node: simulation.cards_per_node,
        speeds: Speeds {
            network: simulation.network * 1e9 / 8.0,
            within_node: simulation.nvlink * 1e9,
            latency: simulation.latency.max(0.0) * 1e-6,
            at_once: simulation.at_once as usize,
        },
    };
    let found = simulate(&setting, &metas, plan.as_ref())?;
    say(if simulation.json { json_line(&found)? } else { simulated_text(&found) })?;
    Ok(ExitCode::SUCCESS)
}

fn simulated_text(found: &SimulatedPlan) -> String {
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let three = |[least, mean, most]: [u64; 3]| {
        format!("{:.3} GB in the mean, {:.3} to {:.3}", gb(mean), gb(least), gb(most))
    };
    format!(
        "{} tensors of {:.1} GB, from {} to {}\n\
         planned in {:.2} s of processor time, after {:.2} s for the layouts; again in {:.2} s with a layer's experts in other \
         places, for which {} pairs of layouts were crossed and {} kept\n\
         {} transfers, at most {} writes of a rank; digest {}\n\
         a trainer sends {}; a rollout gets {}; {:.3} GB stay within nodes\n\
         busiest network card: {:.3} GB, of which it cannot do without {:.3} (ratio {:.3})\n\
         simulated: {:.3} s, {:.3} s for the bytes of the busiest link alone\n\
         maxima of straddling blocks: at most {:.3} GB of a rank, {:.4} s",
        found.tensors,
        gb(found.bytes),
        found.trainers,
        found.rollouts,
        found.plan_seconds,
        found.layout_seconds,
        found.replan_seconds,
        found.replan_crossed,
        found.replan_kept,
        found.transfers,
        found.writes,
        &found.digest[..16],
        three(found.sent),
        three(found.received),
        gb(found.within_nodes),
        gb(found.busiest),
        gb(found.lower_bound),
        found.ratio,
        found.seconds,
        found.floor_seconds,
        gb(found.maxima_bytes),
        found.maxima_seconds,
    )
}

/// A configuration that quantises a checkpoint as `plan` and `quantize` do: they know all of its weights
/// before the first one travels, and what its own `config.json` says.
pub(crate) fn as_planned(
    mut config: CheckpointEngineConfig,
    source: &SourceSpec,
) -> Result<CheckpointEngineConfig, Failure> {
    let mut fp8 = Fp8Config::of(&config)?;
    let section = &mut fp8.quantization;
    if !(fp8.trainer_quantize_fp8 || section.quantize_on_receive) || section.manifest.is_some() {
        return Ok(config);
    }
    let path = match &source.model {
        ModelSpec::Checkpoint { path } => path,
        ModelSpec::Synthetic { name, layers } => {
            let parameters: Vec<_> = name.metas(*layers)?.iter().map(parameter).collect();
            warn_of(&QuantPlan::resolve(parameters, &section.rules())?);
            return Ok(config);
        }
    };
    let plan = plan_of(&Checkpoint::open(path)?, &section.rules())?;
    warn_of(&plan);
    section.ignored_layers.extend(plan.layers_to_ignore());
    fp8.put_into(&mut config)?;
    Ok(config)
}

/// Says on standard error how much of a model stays as it is, and what about a plan may be a mistake.
pub(crate) fn remark(plan: &QuantPlan, receiver: Receiver) {
    let share = plan.share();
    let (part, all) = (share.kept_part(), share.quantized + share.kept.values().sum::<u64>());
    let rules: Vec<String> = share
        .kept
        .iter()
        .map(|(rule, kept)| format!("{rule} {:.1}%", *kept as f64 / all as f64 * 100.0))
        .collect();
    if !rules.is_empty() {
        let (percent, rules) = (part * 100.0, rules.join(", "));
        complain(&format!("{percent:.1}% of what could be FP8 stays as it is: {rules}"));
    }
    if share.quantized > 0 && part > 0.5 {
        let title = receiver.profile().title;
        complain(&format!("warning: more than half stays as it is for {title}; see --receiver"));
    }
    warn_of(plan);
}

/// Says on standard error what about a plan is most likely a mistake.
fn warn_of(plan: &QuantPlan) {
    if plan.share().quantized == 0 {
        complain("warning: nothing is quantised");
    }
    if !plan.unmatched().is_empty() {
        let entries = plan.unmatched().join(", ");
        complain(&format!("warning: layers to leave alone that match no parameter: {entries}"));
    }
}

/// The lines `name<TAB>shape`; empty ones and comments do not count.
fn parameters(text: &str) -> Result<Vec<Parameter>, Failure> {
    let lines = (1..).zip(text.lines()).map(|(number, line)| (number, line.trim_end()));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|(number, line)| {
            let parsed = line.split_once('\t').ok_or("NAME<TAB>SHAPE was expected".to_owned());
            let parsed = parsed.and_then(|(name, sides)| Ok((name.to_owned(), shape(sides)?.0)));
            match parsed {
                Ok((name, shape)) => Ok((name, shape, Stored::Float)),
                Err(message) => Err(format!("line {number}: {message}").into()),
            }
        })
        .collect()
}

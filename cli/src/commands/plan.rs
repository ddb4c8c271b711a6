//! `ckpt-engine plan`: what happens to each parameter of a model, and the same for commands that quantise.

use std::path::PathBuf;
use std::process::ExitCode;

use checkpoint_engine::fp8::rules::{QuantPlan, Receiver, RulesConfig, Stored};
use checkpoint_engine::fp8::{Fp8Config, stored};
use checkpoint_engine::{CheckpointEngineConfig, TensorMeta};
use clap::Args;
use cli::checkpoint::Checkpoint;
use cli::quantize::plan_of;
use cli::source::{ModelSpec, SourceSpec};

use crate::Failure;
use crate::args::{FormatArgs, rules, shape};
use crate::output::{complain, say};

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
    ckpt-engine plan --names names")]
pub(crate) struct PlanArgs {
    /// A .safetensors file, a Hugging Face folder, or the index of one
    #[arg(long, value_name = "PATH", required_unless_present = "names", conflicts_with = "names")]
    model: Option<PathBuf>,
    /// A file of lines NAME<TAB>SHAPE, the shape as 256x1024
    #[arg(long, value_name = "FILE")]
    names: Option<PathBuf>,
    #[command(flatten)]
    format: FormatArgs,
    /// Make a matrix that no rule knows an error
    #[arg(long)]
    strict: bool,
    /// Print the quantization_config for config.json instead
    #[arg(long)]
    config: bool,
}

pub(crate) fn plan_command(args: &PlanArgs) -> Result<ExitCode, Failure> {
    let rules = RulesConfig { strict: args.strict, ..rules(&args.format) };
    let plan = match (&args.model, &args.names) {
        (Some(model), _) => plan_of(&Checkpoint::open(model)?, &rules)?,
        (None, Some(names)) => {
            let text = std::fs::read_to_string(names)
                .map_err(|error| format!("{}: {error}", names.display()))?;
            QuantPlan::resolve(parameters(&text)?, &rules)?
        }
        (None, None) => return Err("give --model or --names".into()),
    };
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
            let shape = |meta: &TensorMeta| meta.shape.iter().map(|&side| side as usize).collect();
            let metas = name.metas(*layers)?;
            let parameters =
                metas.iter().map(|meta| (&*meta.name, shape(meta), stored(meta.dtype)));
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
fn parameters(text: &str) -> Result<Vec<(String, Vec<usize>, Stored)>, Failure> {
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

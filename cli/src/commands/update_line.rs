//! What `sync` and `trainer` print of their source and of each update.

use cli::report_line::{UpdateLine, delta_in_words};
use cli::source::{ModelSpec, Source};

use crate::output::{json_line, say};

pub(crate) fn say_source(source: &Source, backend: &str) -> checkpoint_engine::Result<()> {
    let gib = source.byte_len() as f64 / f64::from(1 << 30);
    let words = match &source.spec().model {
        ModelSpec::Synthetic { name, .. } => name.to_string(),
        ModelSpec::Checkpoint { path } => path.display().to_string(),
    };
    say(format!("{words}: {} tensors, {gib:.2} GiB, over {backend}", source.tensors()))?;
    match source.residency() {
        Some(residency) => say(residency.to_string()),
        None => Ok(()),
    }
}

pub(crate) fn print_update(line: &UpdateLine, json: bool) -> checkpoint_engine::Result<()> {
    if json {
        return say(json_line(line)?);
    }
    let rollouts: Vec<String> = line
        .rollouts
        .iter()
        .map(|rollout| {
            let state = format!("{:?}", rollout.state).to_lowercase();
            format!("{} {state}", rollout.rank)
        })
        .collect();
    let quantised = match line.quantized + line.kept + line.passed_through {
        0 => String::new(),
        _ => format!(
            " ({} quantised, {} kept, {} passed through: {:.3} GB travel)",
            line.quantized,
            line.kept,
            line.passed_through,
            line.wire_bytes as f64 / 1e9
        ),
    };
    let memcpy =
        line.memcpy_gb_per_s.map(|rate| format!(" (memcpy {rate:.2})")).unwrap_or_default();
    say(format!(
        "{}version {}: {} tensors{}, {:.3} GB in {:.3} s, {:.2} GB/s{memcpy}, {:.1} MiB extra \
         memory{}; rollouts: {}",
        if line.simulated { "simulated: " } else { "" },
        line.version,
        line.tensors,
        quantised,
        line.source_bytes as f64 / 1e9,
        line.seconds,
        line.gb_per_s,
        line.extra_peak_bytes as f64 / f64::from(1 << 20),
        if line.verified { ", every byte verified" } else { "" },
        rollouts.join(", ")
    ))?;
    if let Some(delta) = &line.delta {
        say(format!("  {}", delta_in_words(delta, line.wire_bytes)))?;
    }
    if let Some(seconds) = line.attested_seconds {
        say(format!("  attested in {seconds:.3} s: every rank's copy is what was sent"))?;
    }
    line.slower.iter().try_for_each(|why| say(format!("  slower than it could be: {why}")))
}

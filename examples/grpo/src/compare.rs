//! BF16 beside FP8: runs, table, plot.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::Failure;
use crate::trainer::{self, Settings, Step};

/// The last steps of a run, whose mean is its final reward.
const FINAL: usize = 10;

/// One run of a comparison.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    pub(crate) fp8: bool,
    pub(crate) seed: u64,
}

impl Run {
    pub(crate) fn csv(self, out: &Path) -> PathBuf {
        let kind = if self.fp8 { "fp8" } else { "bf16" };
        out.join(format!("{kind}-{}.csv", self.seed))
    }

    /// Runs it as a process of its own, whose memory and threads are nobody else's.
    fn go(self, settings: &Settings, shown: bool, cores: usize, out: &Path) -> Result<(), Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(settings.arguments()).args(["--seed", &self.seed.to_string()]);
        if self.fp8 {
            command.arg("--trainer-quantize-fp8");
        }
        command.arg("--out").arg(out).env("RAYON_NUM_THREADS", cores.to_string());
        command.stdin(Stdio::null());
        if shown {
            let status = command.status()?;
            return if status.success() { Ok(()) } else { Err(format!("{self}: {status}").into()) };
        }
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("{self}: {}\n{said}", output.status).into());
        }
        eprintln!("{}", said.lines().last().unwrap_or_default());
        Ok(())
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} seed {}", if self.fp8 { "FP8" } else { "BF16" }, self.seed)
    }
}

pub(crate) struct Summary {
    first: f64,
    last: f64,
    kl: f64,
    update_ms: f64,
    bytes: u64,
}

impl Summary {
    pub(crate) fn of(steps: &[Step]) -> Self {
        let count = FINAL.min(steps.len());
        let end = &steps[steps.len() - count..];
        // The first update has to agree on a plan and is not typical.
        let mut seconds: Vec<_> = steps.iter().map(|step| step.update_seconds).collect();
        seconds.sort_by(f64::total_cmp);
        Self {
            first: mean(&steps.iter().take(count).map(|step| step.reward).collect::<Vec<_>>()),
            last: mean(&end.iter().map(|step| step.reward).collect::<Vec<_>>()),
            kl: mean(&steps.iter().map(|step| step.kl).collect::<Vec<_>>()),
            update_ms: seconds.get(seconds.len() / 2).copied().unwrap_or_default() * 1e3,
            bytes: steps.last().map_or(0, |step| step.bytes),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last, kl, update_ms, bytes } = self;
        write!(
            f,
            "reward {first:.3} at first, {last:.3} at last, KL {kl:.1e}, update {update_ms:.1} ms, {bytes} bytes"
        )
    }
}

/// All runs, `jobs` of them at a time; then their table and plot.
pub(crate) fn compare(
    settings: &Settings,
    seeds: u64,
    jobs: usize,
    out: &Path,
) -> Result<(), Failure> {
    std::fs::create_dir_all(out)?;
    let seeds = settings.seed..settings.seed + seeds;
    let runs = |fp8| seeds.clone().map(move |seed| Run { fp8, seed });
    let waiting: VecDeque<Run> =
        runs(false).zip(runs(true)).flat_map(|(bf16, fp8)| [bf16, fp8]).collect();
    let jobs = jobs.min(waiting.len());
    let cores = std::thread::available_parallelism()?.get();
    let cores = (cores / jobs).max(1);
    let waiting = Mutex::new(waiting);
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || {
        while let Some(run) = next() {
            if let Err(error) = run.go(settings, jobs == 1, cores, out) {
                // Nobody begins another one.
                waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        let mut ended = workers.into_iter().map(|worker| worker.join());
        ended.try_for_each(|end| end.map_err(|_| "a thread panicked")?)
    })?;
    let read = |fp8| -> Result<Vec<Vec<Step>>, Failure> {
        runs(fp8).map(|run| trainer::read(&run.csv(out))).collect()
    };
    let runs = [read(false)?, read(true)?];
    let mut table = table(&runs)?;
    if settings.delta {
        table.push_str(&table_of_changes(&runs)?);
        std::fs::write(out.join("changed.svg"), plot(&CHANGED, &changes(&runs))?)?;
    }
    eprintln!("\n{table}");
    std::fs::write(out.join("table.md"), table)?;
    std::fs::write(out.join("grpo.svg"), plot(&REWARD, &rewards(&runs))?)?;
    Ok(())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The standard deviation of a sample.
fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    (squares / (values.len().max(2) - 1) as f64).sqrt()
}

fn table(runs: &[Vec<Vec<Step>>; 2]) -> Result<String, Failure> {
    let mut text = String::from(
        "| weights | first reward | final reward | mismatch KL | update | bytes |\n\
         |---|---|---|---|---|---|\n",
    );
    for (kind, runs) in ["BF16", "FP8"].into_iter().zip(runs) {
        let all: Vec<_> = runs.iter().map(|steps| Summary::of(steps)).collect();
        let spread = |of: fn(&Summary) -> f64| {
            let values: Vec<f64> = all.iter().map(of).collect();
            (mean(&values), deviation(&values))
        };
        let ((first, d_first), (last, d_last)) = (spread(|s| s.first), spread(|s| s.last));
        let ((kl, d_kl), (ms, d_ms)) = (spread(|s| s.kl), spread(|s| s.update_ms));
        let bytes = all.first().map_or(0, |summary| summary.bytes);
        writeln!(
            text,
            "| {kind} | {first:.3} ± {d_first:.3} | {last:.3} ± {d_last:.3} | {kl:.1e} ± {d_kl:.0e} | {ms:.2} ± {d_ms:.2} ms | {bytes} |"
        )?;
    }
    Ok(text)
}

/// What part of the elements of each type a step changed: the mean of all steps and runs, the least and the most of a step; and the bytes
/// that travelled for it.
fn table_of_changes(runs: &[Vec<Vec<Step>>; 2]) -> Result<String, Failure> {
    let mut text = String::from(
        "\n| weights | type | changed in a step | least | most | bytes of a whole update | of changes |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for (kind, runs) in ["BF16", "FP8"].into_iter().zip(runs) {
        let whole = runs.iter().filter_map(|run| run.first()).map(|step| step.bytes as f64);
        let later = runs.iter().flat_map(|run| run.iter().skip(1)).map(|step| step.bytes as f64);
        let (whole, later) = (mean(&whole.collect::<Vec<_>>()), mean(&later.collect::<Vec<_>>()));
        for (at, name) in trainer::TYPES.into_iter().enumerate() {
            let parts: Vec<f64> =
                runs.iter().flatten().filter_map(|step| step.changed[at]).collect();
            if parts.is_empty() {
                continue;
            }
            let (least, most) = parts.iter().fold((1.0_f64, 0.0_f64), |(least, most), part| {
                (least.min(*part), most.max(*part))
            });
            writeln!(
                text,
                "| {kind} | {name} | {:.3} % | {:.3} % | {:.3} % | {whole:.0} | {later:.0} |",
                mean(&parts) * 100.0,
                least * 100.0,
                most * 100.0
            )?;
        }
    }
    Ok(text)
}

/// What a plot shows of a step; `None` where the step has no such value.
type Value = fn(&Step) -> Option<f64>;

/// One line of a plot.
struct Curve<'a> {
    name: &'a str,
    color: &'a str,
    runs: &'a [Vec<Step>],
    value: Value,
}

/// The vertical axis of a plot.
struct Axis<'a> {
    /// What is plotted.
    title: &'a str,
    /// Values with a line across the plot, and their names; from the lowest to the highest.
    ticks: &'a [(f64, &'a str)],
    /// Whether equal distances are equal factors.
    is_logarithmic: bool,
}

impl Axis<'_> {
    /// Where a value is, from 0 at the lowest tick to 1 at the highest.
    fn place(&self, value: f64) -> f64 {
        let ends = (self.ticks.first(), self.ticks.last());
        let (Some((low, _)), Some((high, _))) = ends else { return 0.0 };
        let scale = |value: f64| if self.is_logarithmic { value.max(*low).ln() } else { value };
        ((scale(value) - scale(*low)) / (scale(*high) - scale(*low))).clamp(0.0, 1.0)
    }
}

/// The mean of a value and its deviation, over the runs that have one for a step.
fn spread(runs: &[Vec<Step>], step: usize, value: Value) -> Option<(f64, f64)> {
    let values: Vec<f64> = runs.iter().filter_map(|run| value(run.get(step)?)).collect();
    (!values.is_empty()).then(|| (mean(&values), deviation(&values)))
}

const REWARD: Axis<'_> = Axis {
    title: "reward",
    ticks: &[(0.0, "0.0"), (0.2, "0.2"), (0.4, "0.4"), (0.6, "0.6"), (0.8, "0.8"), (1.0, "1.0")],
    is_logarithmic: false,
};

const CHANGED: Axis<'_> = Axis {
    title: "elements that a step changes",
    ticks: &[
        (1e-5, "0.001 %"),
        (1e-4, "0.01 %"),
        (1e-3, "0.1 %"),
        (1e-2, "1 %"),
        (0.1, "10 %"),
        (1.0, "100 %"),
    ],
    is_logarithmic: true,
};

fn rewards(runs: &[Vec<Vec<Step>>; 2]) -> [Curve<'_>; 2] {
    let value: Value = |step| Some(step.reward);
    let [bf16, fp8] = runs;
    [
        Curve { name: "BF16", color: "#1f77b4", runs: bf16, value },
        Curve { name: "FP8", color: "#d62728", runs: fp8, value },
    ]
}

/// What changed of the weights in BF16, and of codes and scales in FP8.
fn changes(runs: &[Vec<Vec<Step>>; 2]) -> [Curve<'_>; 3] {
    let [bf16, fp8] = runs;
    [
        Curve { name: "BF16", color: "#1f77b4", runs: bf16, value: |step| step.changed[0] },
        Curve { name: "FP8 codes", color: "#d62728", runs: fp8, value: |step| step.changed[1] },
        Curve { name: "FP8 scales", color: "#2ca02c", runs: fp8, value: |step| step.changed[2] },
    ]
}

/// Means of runs over the steps, each in a band of one standard deviation.
fn plot(axis: &Axis<'_>, curves: &[Curve<'_>]) -> Result<String, Failure> {
    const WIDTH: f64 = 720.0;
    const HEIGHT: f64 = 400.0;
    const EDGE: f64 = 50.0;
    let runs = curves.first().map_or(&[][..], |curve| curve.runs);
    let steps = runs.first().map_or(1, Vec::len).max(2);
    let x = |step: usize| EDGE + (WIDTH - 2.0 * EDGE) * step as f64 / (steps - 1) as f64;
    let y = |value: f64| HEIGHT - EDGE - (HEIGHT - 2.0 * EDGE) * axis.place(value);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    for (value, name) in axis.ticks {
        writeln!(
            svg,
            "<path d=\"M{EDGE} {0:.1}H{1}\" stroke=\"#ddd\"/><text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{name}</text>",
            y(*value),
            WIDTH - EDGE,
            EDGE - 6.0,
            y(*value) + 4.0
        )?;
    }
    for step in (0..steps).step_by((steps / 6).max(1)) {
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x(step),
            HEIGHT - EDGE + 18.0,
            step + 1
        )?;
    }
    writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">step</text><text x=\"{EDGE}\" y=\"{}\">{}: mean of {} seeds, band of one standard deviation</text>",
        WIDTH / 2.0,
        HEIGHT - 10.0,
        EDGE - 20.0,
        axis.title,
        runs.len()
    )?;
    for (index, Curve { name, color, runs, value }) in curves.iter().enumerate() {
        let at: Vec<(usize, f64, f64)> = (0..steps)
            .filter_map(|step| {
                let (mean, deviation) = spread(runs, step, *value)?;
                Some((step, mean, deviation))
            })
            .collect();
        let line = |points: &mut dyn Iterator<Item = (usize, f64)>| {
            let points: Vec<_> =
                points.map(|(step, value)| format!("{:.1},{:.1}", x(step), y(value))).collect();
            points.join(" ")
        };
        let upper = line(&mut at.iter().map(|(step, mean, spread)| (*step, mean + spread)));
        let lower = line(&mut at.iter().rev().map(|(step, mean, spread)| (*step, mean - spread)));
        let middle = line(&mut at.iter().map(|(step, mean, _)| (*step, *mean)));
        writeln!(svg, "<polygon points=\"{upper} {lower}\" fill=\"{color}\" opacity=\"0.15\"/>")?;
        writeln!(
            svg,
            "<polyline points=\"{middle}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>"
        )?;
        writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" fill=\"{color}\" font-weight=\"bold\" text-anchor=\"end\">{name}</text>",
            WIDTH - EDGE - 10.0,
            HEIGHT - EDGE - 22.0 - 18.0 * (curves.len() - 1 - index) as f64
        )?;
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

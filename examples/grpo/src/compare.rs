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
    let table = table(&runs)?;
    eprintln!("\n{table}");
    std::fs::write(out.join("table.md"), table)?;
    std::fs::write(out.join("grpo.svg"), plot(&runs)?)?;
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

/// Mean reward of both kinds over the steps, each in a band of one standard deviation.
fn plot(runs: &[Vec<Vec<Step>>; 2]) -> Result<String, Failure> {
    const WIDTH: f64 = 720.0;
    const HEIGHT: f64 = 400.0;
    const EDGE: f64 = 50.0;
    let steps = runs[0].first().map_or(1, Vec::len).max(2);
    let x = |step: usize| EDGE + (WIDTH - 2.0 * EDGE) * step as f64 / (steps - 1) as f64;
    let y = |reward: f64| HEIGHT - EDGE - (HEIGHT - 2.0 * EDGE) * reward.clamp(0.0, 1.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    for tick in 0..=5 {
        let reward = f64::from(tick) / 5.0;
        writeln!(
            svg,
            "<path d=\"M{EDGE} {0:.1}H{1}\" stroke=\"#ddd\"/><text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{reward:.1}</text>",
            y(reward),
            WIDTH - EDGE,
            EDGE - 6.0,
            y(reward) + 4.0
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
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">step</text><text x=\"{EDGE}\" y=\"{}\">reward: mean of {} seeds, band of one standard deviation</text>",
        WIDTH / 2.0,
        HEIGHT - 10.0,
        EDGE - 20.0,
        runs[0].len()
    )?;
    for (index, (kind, color)) in [("BF16", "#1f77b4"), ("FP8", "#d62728")].iter().enumerate() {
        let at: Vec<(f64, f64)> = (0..steps)
            .map(|step| {
                let rewards: Vec<f64> = runs[index]
                    .iter()
                    .filter_map(|run| run.get(step).map(|step| step.reward))
                    .collect();
                (mean(&rewards), deviation(&rewards))
            })
            .collect();
        let line = |points: &mut dyn Iterator<Item = (usize, f64)>| {
            let points: Vec<_> =
                points.map(|(step, reward)| format!("{:.1},{:.1}", x(step), y(reward))).collect();
            points.join(" ")
        };
        let upper = line(&mut at.iter().map(|(mean, spread)| mean + spread).enumerate());
        let lower = line(&mut at.iter().map(|(mean, spread)| mean - spread).enumerate().rev());
        let middle = line(&mut at.iter().map(|(mean, _)| *mean).enumerate());
        writeln!(svg, "<polygon points=\"{upper} {lower}\" fill=\"{color}\" opacity=\"0.15\"/>")?;
        writeln!(
            svg,
            "<polyline points=\"{middle}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>"
        )?;
        writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" fill=\"{color}\" font-weight=\"bold\">{kind}</text>",
            WIDTH - EDGE - 50.0,
            HEIGHT - EDGE - 40.0 + 18.0 * index as f64
        )?;
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

//! The trainer: pretrains, then learns by GRPO from what the rollouts answer.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use candle_core::{D, DType, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use checkpoint_engine::candle::weights;
use checkpoint_engine::control::Token;
use checkpoint_engine::{SendReport, TrainerEngine, Version, ensure_async_iterator};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Failure;
use crate::child::Child;
use crate::group::{Member, RANKS};
use crate::model::{Model, initial};
use crate::pipe::{Reply, Request, Sample};
use crate::random::Random;
use crate::task::{self, ANSWER, LENGTH, PROMPT, Prompt};

/// The deadline of every wait for a rollout.
const DEADLINE: Duration = Duration::from_secs(60);
/// How often a step is tried when rollouts die in it.
const ATTEMPTS: usize = 5;

#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) backend: String,
    pub(crate) fp8: bool,
    pub(crate) delta: bool,
    pub(crate) steps: u64,
    pub(crate) pretrain: u64,
    pub(crate) prompts: usize,
    pub(crate) group: u32,
    pub(crate) learning_rate: f64,
    pub(crate) truncate: Option<f64>,
    pub(crate) seed: u64,
    pub(crate) csv: Option<PathBuf>,
}

impl Settings {
    /// The program's options that say the same, without the seed and what travels.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let Self {
            backend, delta, steps, pretrain, prompts, group, learning_rate, truncate, ..
        } = self;
        let mut arguments = vec![
            format!("--backend={backend}"),
            format!("--steps={steps}"),
            format!("--pretrain={pretrain}"),
            format!("--prompts={prompts}"),
            format!("--group={group}"),
            format!("--learning-rate={learning_rate}"),
        ];
        arguments.extend(delta.then(|| "--delta".to_owned()));
        arguments.extend(truncate.map(|most| format!("--truncate={most}")));
        arguments
    }
}

const HEADER: &str = "step,version,reward,kl,update_seconds,bytes,quantized,restarts,\
                      bf16_changed,codes_changed,scales_changed";

/// The types of elements that travel: BF16 weights, FP8 codes and their scales.
pub(crate) const TYPES: [&str; 3] = ["BF16", "F8_E4M3", "F32"];

/// What a step did.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) step: u64,
    pub(crate) version: u64,
    pub(crate) reward: f64,
    pub(crate) kl: f64,
    pub(crate) update_seconds: f64,
    pub(crate) bytes: u64,
    pub(crate) quantized: u64,
    pub(crate) restarts: u64,
    /// The part of the elements of each type that changed; `None` if none were compared.
    pub(crate) changed: [Option<f64>; TYPES.len()],
}

/// The part of the elements of each type that changed in an update.
fn changed(report: &SendReport) -> [Option<f64>; TYPES.len()] {
    TYPES.map(|name| {
        let counts = report.delta.as_ref()?.elements.get(name)?;
        Some(counts.changed as f64 / counts.compared as f64)
    })
}

pub(crate) async fn train(settings: &Settings, title: &str) -> Result<Vec<Step>, Failure> {
    let mut random = Random::new(settings.seed);
    let vars = initial(&mut random)?;
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let model = Model::new(tensors)?;
    pretrain(&model, &vars, settings, &mut random, title)?;

    let mut optimizer = adam(&vars, settings.learning_rate)?;
    let mut csv = match &settings.csv {
        Some(path) => Some(std::io::BufWriter::new(std::fs::File::create(path)?)),
        None => None,
    };
    if let Some(csv) = &mut csv {
        writeln!(csv, "{HEADER}")?;
    }
    let mut rollouts = Rollouts::start(settings)?;
    let bar = progress(settings.steps, title);
    let mut steps = Vec::new();
    for step in 1..=settings.steps {
        let prompts: Vec<Prompt> =
            (0..settings.prompts).map(|_| task::prompt(&mut random)).collect();
        let seed = random.seed();
        let (report, samples) = rollouts.step(&vars, &prompts, settings.group, seed).await?;
        let learned = learn(&model, &mut optimizer, &prompts, &samples, settings)?;
        let step = Step {
            step,
            version: report.version.0,
            reward: learned.reward,
            kl: learned.kl,
            update_seconds: report.elapsed.as_secs_f64(),
            bytes: report.counts.wire_bytes,
            quantized: report.counts.converted,
            restarts: rollouts.restarts,
            changed: changed(&report),
        };
        if let Some(csv) = &mut csv {
            let Step {
                step,
                version,
                reward,
                kl,
                update_seconds,
                bytes,
                quantized,
                restarts,
                changed,
            } = step;
            let changed =
                changed.map(|part| part.map_or(String::new(), |part| format!("{part:.3e}")));
            writeln!(
                csv,
                "{step},{version},{reward:.4},{kl:.3e},{update_seconds:.6},{bytes},{quantized},{restarts},{}",
                changed.join(",")
            )?;
            csv.flush()?;
        }
        bar.set_message(format!("reward {:.2}, KL {:.1e}", step.reward, step.kl));
        bar.inc(1);
        steps.push(step);
    }
    bar.finish();
    rollouts.stop().await?;
    Ok(steps)
}

/// The steps of a run from its CSV file.
pub(crate) fn read(csv: &Path) -> Result<Vec<Step>, Failure> {
    let text = std::fs::read_to_string(csv)?;
    let mut lines = text.lines();
    if lines.next() != Some(HEADER) {
        return Err(format!("{} is not of this program", csv.display()).into());
    }
    let step = |line: &str| {
        let wrong = || Failure::from(format!("{}: {line}", csv.display()));
        let fields: Vec<&str> = line.split(',').collect();
        let [
            step,
            version,
            reward,
            kl,
            update_seconds,
            bytes,
            quantized,
            restarts,
            bf16,
            codes,
            scales,
        ] = fields[..]
        else {
            return Err(wrong());
        };
        let whole = |field: &str| field.parse::<u64>().map_err(|_| wrong());
        let real = |field: &str| field.parse::<f64>().map_err(|_| wrong());
        let part = |field: &str| (!field.is_empty()).then(|| real(field)).transpose();
        Ok(Step {
            step: whole(step)?,
            version: whole(version)?,
            reward: real(reward)?,
            kl: real(kl)?,
            update_seconds: real(update_seconds)?,
            bytes: whole(bytes)?,
            quantized: whole(quantized)?,
            restarts: whole(restarts)?,
            changed: [part(bf16)?, part(codes)?, part(scales)?],
        })
    };
    lines.map(step).collect()
}

fn adam(vars: &HashMap<String, Var>, lr: f64) -> Result<AdamW, Failure> {
    let mut all: Vec<_> = vars.iter().collect();
    all.sort_by_key(|(name, _)| *name);
    let all = all.into_iter().map(|(_, var)| var.clone()).collect();
    Ok(AdamW::new(all, ParamsAdamW { lr, weight_decay: 0.0, ..Default::default() })?)
}

fn progress(length: u64, title: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {msg} ({elapsed})");
    let bar = ProgressBar::new(length).with_prefix(title.to_owned());
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Learns sums that are mostly wrong, as text.
fn pretrain(
    model: &Model,
    vars: &HashMap<String, Var>,
    settings: &Settings,
    random: &mut Random,
    title: &str,
) -> Result<(), Failure> {
    let mut optimizer = adam(vars, 2e-3)?;
    let bar = progress(settings.pretrain, &format!("{title}, pretraining"));
    for step in 0..settings.pretrain {
        optimizer.set_learning_rate(2e-3 * (1.0 - step as f64 / settings.pretrain as f64));
        let texts: Vec<[u32; LENGTH]> = (0..64).map(|_| task::careless(random)).collect();
        let loss = answer_log_probabilities(model, &texts)?.mean_all()?.neg()?;
        optimizer.backward_step(&loss)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// The logarithm of the probability of every token of the answers: `[rows, ANSWER]`.
fn answer_log_probabilities(model: &Model, texts: &[[u32; LENGTH]]) -> Result<Tensor, Failure> {
    let tokens = task::tensor(texts)?;
    let logs = model.log_probabilities(&tokens.narrow(1, 0, LENGTH - 1)?.contiguous()?)?;
    let logs = logs.narrow(1, PROMPT - 1, ANSWER)?.contiguous()?;
    let answers = tokens.narrow(1, PROMPT, ANSWER)?.contiguous()?.unsqueeze(2)?;
    Ok(logs.gather(&answers, D::Minus1)?.squeeze(2)?)
}

struct Learned {
    reward: f64,
    kl: f64,
}

/// One step of GRPO: each answer is judged by the others to the same prompt.
fn learn(
    model: &Model,
    optimizer: &mut AdamW,
    prompts: &[Prompt],
    samples: &[Sample],
    settings: &Settings,
) -> Result<Learned, Failure> {
    let group = settings.group as usize;
    let (mut texts, mut advantages, mut rewarded) = (Vec::new(), Vec::new(), 0.0);
    for (prompt, answers) in prompts.iter().zip(samples.chunks(group)) {
        let rewards: Vec<f32> =
            answers.iter().map(|sample| task::reward(prompt, &sample.answer)).collect();
        let mean = rewards.iter().sum::<f32>() / group as f32;
        let variance = rewards.iter().map(|r| (r - mean).powi(2)).sum::<f32>() / group as f32;
        for (sample, reward) in answers.iter().zip(rewards) {
            let mut text = [0; LENGTH];
            text[..PROMPT].copy_from_slice(prompt);
            text[PROMPT..].copy_from_slice(&sample.answer);
            texts.push(text);
            advantages.push((reward - mean) / (variance.sqrt() + 1e-4));
            rewarded += f64::from(reward);
        }
    }
    let sampled: Vec<f32> = samples.iter().flat_map(|sample| sample.log_probabilities).collect();
    let sampled = Tensor::from_vec(sampled, (samples.len(), ANSWER), &candle_core::Device::Cpu)?;
    let own = answer_log_probabilities(model, &texts)?;
    // The tokens are the rollouts', so with r = trainer's / rollout's probability the mean of
    // r - 1 - ln r estimates KL(rollout || trainer); every term of it is at least zero.
    let log_ratio = (own.detach() - sampled)?.to_dtype(DType::F64)?;
    let ratio = log_ratio.exp()?;
    let kl = ((&ratio - 1.0)? - &log_ratio)?.mean_all()?.to_scalar::<f64>()?;

    let advantages = Tensor::from_vec(advantages, (texts.len(), 1), &candle_core::Device::Cpu)?;
    let mut gain = own.broadcast_mul(&advantages)?;
    if let Some(most) = settings.truncate {
        // Truncated importance sampling: what the rollout would hardly have said counts less, and
        // nothing counts more than `most` times.
        gain = (gain * ratio.minimum(most)?.to_dtype(DType::F32)?)?;
    }
    optimizer.backward_step(&gain.mean_all()?.neg()?)?;
    Ok(Learned { reward: rewarded / samples.len() as f64, kl })
}

/// The rollout processes and the trainer's place in the group with them.
struct Rollouts {
    children: Vec<Child>,
    member: Option<Member<Box<dyn TrainerEngine>>>,
    config: String,
    version: u64,
    restarts: u64,
}

impl Rollouts {
    fn start(settings: &Settings) -> Result<Self, Failure> {
        let config = serde_json::json!({
            "backend": settings.backend,
            "trainer_quantize_fp8": settings.fp8,
            "delta": settings.delta,
            "update_weights_bucket_megabytes": 1,
            "timeout_seconds": 20,
        });
        let children = (1..RANKS).map(Child::start).collect::<Result<_, _>>()?;
        Ok(Self { children, member: None, config: config.to_string(), version: 0, restarts: 0 })
    }

    /// Sends the weights and gets the answers; a rollout that dies meanwhile is started again, and
    /// the step begins anew with all of them.
    async fn step(
        &mut self,
        vars: &HashMap<String, Var>,
        prompts: &[Prompt],
        group: u32,
        seed: u64,
    ) -> Result<(SendReport, Vec<Sample>), Failure> {
        for _ in 1..ATTEMPTS {
            match self.try_step(vars, prompts, group, seed).await {
                Ok(done) => return Ok(done),
                Err(error) => self.recover(error).await?,
            }
        }
        self.try_step(vars, prompts, group, seed).await
    }

    async fn try_step(
        &mut self,
        vars: &HashMap<String, Var>,
        prompts: &[Prompt],
        group: u32,
        seed: u64,
    ) -> Result<(SendReport, Vec<Sample>), Failure> {
        if self.member.is_none() {
            self.form().await?;
        }
        self.version += 1;
        let version = self.version;
        self.ask_all(|_| Request::Update { version })?;
        let member = self.member.as_mut().ok_or("not in a group")?;
        // What travels is BF16, or FP8 made of it; the trainer's own weights are F32.
        let tensors =
            vars.iter().map(|(name, var)| Ok((name.as_str(), var.to_dtype(DType::BF16)?)));
        let tensors = tensors.collect::<Result<Vec<_>, Failure>>()?;
        let stream = ensure_async_iterator(weights(tensors));
        let report = member.engine.send_weights(stream, Version(self.version)).await?;
        for child in &mut self.children {
            match child.answer(DEADLINE)? {
                Reply::Updated => {}
                _ => return Err("a rollout did not update".into()),
            }
        }
        if !report.absent.is_empty() {
            return Err(format!("ranks {:?} are gone", report.absent).into());
        }

        let share = prompts.len().div_ceil(self.children.len());
        let shares: Vec<_> = prompts.chunks(share).collect();
        self.ask_all(|index| Request::Generate {
            prompts: shares.get(index).map(|share| share.to_vec()).unwrap_or_default(),
            group,
            seed: seed ^ index as u64,
        })?;
        let mut all = Vec::new();
        for child in &mut self.children {
            match child.answer(DEADLINE)? {
                Reply::Generated { version, samples } if version == self.version => {
                    all.extend(samples);
                }
                _ => return Err("a rollout did not generate with the last version".into()),
            }
        }
        if all.len() != prompts.len() * group as usize {
            return Err("rollouts gave another number of answers".into());
        }
        Ok((report, all))
    }

    fn ask_all(&mut self, mut request: impl FnMut(usize) -> Request) -> Result<(), Failure> {
        let mut asked = self.children.iter_mut().enumerate();
        asked.try_for_each(|(index, child)| child.ask(&request(index)))
    }

    /// Forms a group of all rollouts. Each has an address and a secret of its own, so that nobody
    /// takes part in two.
    async fn form(&mut self) -> Result<(), Failure> {
        static GROUPS: AtomicU32 = AtomicU32::new(0);
        let group = GROUPS.fetch_add(1, Ordering::Relaxed);
        let address = format!("unix:@grpo-{}-{group}", std::process::id());
        let secret = Token::generate()?.expose().to_vec();
        let config = self.config.clone();
        self.ask_all(|_| Request::Form {
            address: address.clone(),
            secret: secret.clone(),
            config: config.clone(),
        })?;
        self.member = Some(Member::lead(&address, &secret, &config).await?);
        for child in &mut self.children {
            match child.answer(DEADLINE)? {
                Reply::Formed => {}
                _ => return Err("a rollout did not join the group".into()),
            }
        }
        Ok(())
    }

    /// Starts the rollouts again that died. If none did, the failure is not one to recover from.
    async fn recover(&mut self, error: Failure) -> Result<(), Failure> {
        let mut dead = 0;
        for (rank, child) in (1..RANKS).zip(&mut self.children) {
            if child.died(Duration::from_secs(1))? {
                eprintln!("rollout {rank} died, it is started again ({error})");
                *child = Child::start(rank)?;
                dead += 1;
            }
        }
        if dead == 0 {
            return Err(error);
        }
        self.restarts += dead;
        if let Some(member) = self.member.take() {
            member.leave().await;
        }
        Ok(())
    }

    async fn stop(mut self) -> Result<(), Failure> {
        // Rollouts leave when their pipes close, and the trainer stays until they have.
        for child in &mut self.children {
            child.hang_up();
        }
        if let Some(member) = self.member.take() {
            member.leave().await;
        }
        self.children.iter_mut().try_for_each(|child| child.wait(DEADLINE))
    }
}

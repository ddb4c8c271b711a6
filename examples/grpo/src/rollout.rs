//! A rollout: answers prompts with the last weights that it received.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use checkpoint_engine::candle::{Fp8Weights, tensors};
use checkpoint_engine::{RolloutEngine, TensorMap, Version};

use crate::Failure;
use crate::group::Member;
use crate::model::Model;
use crate::pipe::{self, Reply, Request, Sample};
use crate::random::Random;
use crate::task::{self, ANSWER, Prompt};

pub(crate) async fn run() -> Result<(), Failure> {
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut rollout = Rollout { member: None, installed: TensorMap::new(), model: None };
    // The trainer's end of the pipe closes with the trainer.
    while let Some((id, request)) = pipe::read(&mut input)? {
        let reply = rollout.serve(request).await;
        let reply = reply.unwrap_or_else(|error| Reply::Failed(error.to_string()));
        pipe::write(&mut output, id, &reply)?;
    }
    if let Some(member) = rollout.member.take() {
        member.leave().await;
    }
    Ok(())
}

struct Rollout {
    member: Option<Member<Box<dyn RolloutEngine>>>,
    installed: TensorMap,
    model: Option<(u64, Model)>,
}

impl Rollout {
    async fn serve(&mut self, request: Request) -> Result<Reply, Failure> {
        match request {
            Request::Form { address, secret, config } => {
                if let Some(member) = self.member.take() {
                    member.leave().await;
                }
                self.member = Some(Member::join(&address, &secret, &config).await?);
                Ok(Reply::Formed)
            }
            Request::Update { version } => {
                let member = self.member.as_mut().ok_or("not in a group")?;
                let received = member.engine.receive_weights(Some(Version(version))).await?;
                received.install(&mut self.installed).await?;
                // The model that generates is replaced only now that the version is whole.
                let fp8 = Fp8Weights::Dequantized(candle_core::DType::F32, Default::default());
                let arrived = tensors(&self.installed, &Device::Cpu, fp8)?;
                let arrived: HashMap<String, Tensor> = arrived
                    .into_iter()
                    .map(|(name, tensor)| Ok((name, tensor.to_dtype(candle_core::DType::F32)?)))
                    .collect::<Result<_, Failure>>()?;
                self.model = Some((version, Model::new(arrived)?));
                Ok(Reply::Updated)
            }
            Request::Generate { prompts, group, seed } => {
                let (version, model) = self.model.as_ref().ok_or("no weights arrived yet")?;
                let samples = generate(model, &prompts, group, &mut Random::new(seed))?;
                Ok(Reply::Generated { version: *version, samples })
            }
        }
    }
}

/// Samples at temperature 1, all prompts at once.
fn generate(
    model: &Model,
    prompts: &[Prompt],
    group: u32,
    random: &mut Random,
) -> Result<Vec<Sample>, Failure> {
    let rows = prompts.iter().flat_map(|prompt| (0..group).map(move |_| prompt.to_vec()));
    let mut rows: Vec<Vec<u32>> = rows.collect();
    let empty = Sample { answer: [0; ANSWER], log_probabilities: [0.0; ANSWER] };
    let mut samples = vec![empty; rows.len()];
    for at in 0..ANSWER {
        let length = task::PROMPT + at;
        // Short enough that computing all of it again costs less than a cache would.
        let tokens = Tensor::from_vec(rows.concat(), (rows.len(), length), &Device::Cpu)?;
        let last = model.log_probabilities(&tokens)?.narrow(1, length - 1, 1)?.squeeze(1)?;
        for ((row, sample), logs) in rows.iter_mut().zip(&mut samples).zip(last.to_vec2::<f32>()?) {
            let mut left = random.uniform();
            let token = logs.iter().position(|log| {
                left -= log.exp();
                left < 0.0
            });
            // Rounding may leave a little of the one that all probabilities should add up to.
            let token = token.unwrap_or(0);
            sample.answer[at] = token as u32;
            sample.log_probabilities[at] = logs[token];
            row.push(token as u32);
        }
    }
    Ok(samples)
}

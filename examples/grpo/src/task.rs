//! The task: sums of two digits, `7+5=12`, a character a token.

use candle_core::{Device, Result, Tensor};

use crate::random::Random;

pub(crate) const PROMPT: usize = 4;
pub(crate) const ANSWER: usize = 2;
pub(crate) const LENGTH: usize = PROMPT + ANSWER;
const PLUS: u32 = 10;
const EQUALS: u32 = 11;

pub(crate) type Prompt = [u32; PROMPT];
pub(crate) type Answer = [u32; ANSWER];

fn digits(number: u32) -> [u32; 2] {
    [number / 10, number % 10]
}

pub(crate) fn prompt(random: &mut Random) -> Prompt {
    [random.below(10), PLUS, random.below(10), EQUALS]
}

/// 1 for the right sum, else 0.
pub(crate) fn reward(prompt: &Prompt, answer: &Answer) -> f32 {
    let [a, _, b, _] = *prompt;
    f32::from(*answer == digits(a + b))
}

/// What the model is pretrained on: one sum in three is right, the others are off by up to three.
///
/// So it knows what an answer looks like and that it is near the sum, and has the right one
/// among its guesses: what reinforcement can build on, and cannot be without.
pub(crate) fn careless(random: &mut Random) -> [u32; LENGTH] {
    let prompt = prompt(random);
    let [a, _, b, _] = prompt;
    let sum = a + b;
    let said = match random.below(3) {
        0 => sum,
        _ => (sum + 7 - random.below(7)).saturating_sub(4),
    };
    let [tens, ones] = digits(said);
    [a, PLUS, b, EQUALS, tens, ones]
}

pub(crate) fn tensor<const N: usize>(rows: &[[u32; N]]) -> Result<Tensor> {
    Tensor::from_vec(rows.concat(), (rows.len(), N), &Device::Cpu)
}

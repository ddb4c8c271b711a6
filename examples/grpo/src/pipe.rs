//! What the trainer and its rollouts say to one another, besides weights: frames over pipes.

use std::io::{Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::task::{Answer, Prompt};

const LONGEST: usize = 1 << 24;

#[derive(Serialize, Deserialize)]
pub(crate) enum Request {
    /// Leave the group, if in one, and join another.
    Form { address: String, secret: Vec<u8>, config: String },
    /// Receive a version.
    Update { version: u64 },
    /// Answer every prompt so many times.
    Generate { prompts: Vec<Prompt>, group: u32, seed: u64 },
}

#[derive(Serialize, Deserialize)]
pub(crate) enum Reply {
    Formed,
    Updated,
    /// The answers, prompt by prompt.
    Generated {
        version: u64,
        samples: Vec<Sample>,
    },
    Failed(String),
}

#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) answer: Answer,
    /// The logarithm of each token's probability.
    pub(crate) log_probabilities: [f32; 2],
}

/// Requests are numbered; a reply has its request's number.
pub(crate) fn write(to: &mut impl Write, id: u64, body: &impl Serialize) -> Result<(), Failure> {
    let bytes = postcard::to_allocvec(&(id, body))?;
    to.write_all(&u32::try_from(bytes.len())?.to_le_bytes())?;
    to.write_all(&bytes)?;
    Ok(to.flush()?)
}

/// The next frame; `None` when the other side is gone.
pub(crate) fn read<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<(u64, T)>, Failure> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(format!("a frame of {length} bytes").into());
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok(Some(postcard::from_bytes(&bytes)?))
}

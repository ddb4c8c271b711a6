//! An encoding of one's own: F16 weights travel as 8-bit floats with five bits of exponent, half the bytes.
//!
//! [`E5m2`] is data that says what is to be done, with code for the CPU and a kernel for CUDA devices: where weights and
//! buckets are on one, they are encoded there, as they are packed, and nothing of the project had to know of it. [`LAYER`]
//! puts it in front of any engine: `registry().with_layer(e5m2::LAYER)`, and `send_e5m2 = true` in the trainer's configuration.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use engine_core::{
    CheckpointEngine, DType, Encoding, EngineContext, Kernel, Layer, PreparedTrainer, Program,
    Result, SendReport, TensorMeta, TrainerEngine, Treatment, Version, Weight, WeightStream,
};
use futures::StreamExt;

#[allow(unsafe_code, reason = "devices run it on addresses")]
// SAFETY: it reads as many elements of the source as bytes are asked for, those of the same numbers.
/// The kernel for CUDA devices.
pub static CUDA: Program = unsafe { Program::new("e5m2", include_str!("e5m2.cu")) };

/// The encoding of an F16 weight.
#[derive(Debug)]
pub struct E5m2(Weight);

/// Elements read at a time from host memory.
const PIECE: u64 = 4096;

impl Encoding for E5m2 {
    fn name(&self) -> &'static str {
        "e5m2"
    }

    fn source_bytes(&self) -> u64 {
        self.0.source_bytes()
    }

    fn is_deferred(&self) -> bool {
        self.0.is_deferred()
    }

    fn reads_device(&self) -> bool {
        self.0.reads_device()
    }

    fn kernel(&self, memory: &str) -> Option<Kernel<'_>> {
        let source = self.0.storage().filter(|_| memory == "cuda")?;
        Some(Kernel { program: &CUDA, source, parameters: Vec::new() })
    }

    fn encode_host(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()> {
        let piece = if self.reads_device() { u64::MAX } else { PIECE };
        let at_once = piece.min(range.end - range.start).max(1) as usize;
        let mut elements = vec![0; at_once * 2];
        let mut start = range.start;
        for codes in destination.chunks_mut(at_once) {
            let elements = &mut elements[..codes.len() * 2];
            let end = start + codes.len() as u64;
            self.0.encode(start * 2..end * 2, elements)?;
            for (code, element) in codes.iter_mut().zip(elements.as_chunks::<2>().0) {
                *code = code_of(u16::from_le_bytes(*element));
            }
            start = end;
        }
        Ok(())
    }
}

/// The upper byte of a half, rounded to nearest even; what is no number stays so.
fn code_of(bits: u16) -> u8 {
    let code = if bits & 0x7fff > 0x7c00 {
        bits >> 8 | 0x02
    } else {
        // A finite half of the largest exponent has room for it below infinity.
        (bits + 0x7f + (bits >> 8 & 1)) >> 8
    };
    code.to_le_bytes()[0]
}

/// F16 weights as 8-bit floats; all others as they are.
///
/// # Errors
///
/// `Weight` for a part of a tensor.
pub fn encoded(weight: Weight) -> Result<Weight> {
    if weight.meta().dtype != DType::F16 {
        return Ok(weight);
    }
    weight.require_whole("encoding")?;
    let meta = TensorMeta { dtype: DType::F8_E5M2, ..TensorMeta::clone(weight.meta()) };
    Weight::encoded(meta, Arc::new(E5m2(weight)), Treatment::Converted)
}

/// The encoding in front of a trainer's engine.
pub const LAYER: Layer =
    Layer::new("e5m2", &[KEY], in_front_of_trainer, |prepared, _| Ok(prepared));

const KEY: &str = "send_e5m2";

fn in_front_of_trainer(
    prepared: PreparedTrainer,
    context: &EngineContext,
) -> Result<PreparedTrainer> {
    let is_wanted = context.config.layers.get(KEY).is_some_and(|value| value == true);
    if !is_wanted {
        return Ok(prepared);
    }
    Ok(prepared.map(|engine| Box::new(EncodingTrainer(engine)) as Box<dyn TrainerEngine>))
}

/// A trainer that encodes what it sends.
#[derive(Debug)]
struct EncodingTrainer(Box<dyn TrainerEngine>);

#[async_trait]
impl CheckpointEngine for EncodingTrainer {
    async fn finalize(self: Box<Self>) -> Result<()> {
        self.0.finalize().await
    }
}

#[async_trait]
impl TrainerEngine for EncodingTrainer {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let weights = weights.map(|weight| encoded(weight?));
        self.0.send_weights(WeightStream::new(weights), version).await
    }

    async fn send_part(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let weights = weights.map(|weight| encoded(weight?));
        self.0.send_part(WeightStream::new(weights), version).await
    }

    async fn attest(&mut self) -> Result<SendReport> {
        self.0.attest().await
    }
}

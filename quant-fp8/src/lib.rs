//! FP8 block quantisation of weights.
//!
//! A weight becomes e4m3fn codes, one byte per element, and one F32 scale per block of 128×128
//! elements; `code · scale` gives the weight back with about 2.65% relative error. This is the
//! layout of Qwen3-FP8 and DeepSeek-V3 checkpoints that vLLM and SGLang load.
//!
//! - [`Fp8Format`] describes the result: formula, block size, what is done at NaN.
//! - [`rules`] decides which parameters of a model are quantised, and writes the decision down as
//!   the `quantization_config` of `config.json`.
//! - [`Codec`] does it, at the speed of memory, on whole tensors or on any range of their elements,
//!   straight from the source into the buffer that is sent. A rank that holds a [box](BoxSource) of a tensor gives the bytes that the
//!   whole would have there, once it knows the [maxima](BlockMaxima) of blocks that it shares with others.
//! - [`QuantizeFp8`] quantises a stream of weights while they are packed, and [`LAYER`] puts that
//!   in front of any engine whose configuration asks for it, once all ranks agree on the format.

#![deny(unsafe_code)]

mod codec;
mod combinator;
mod contract;
pub mod device;
mod encoding;
mod engine;
mod error;
mod format;
mod numbers;
pub mod rules;
mod strided;

pub use codec::{BlockMaxima, BoxSource, Codec, Source, Store, copy_non_temporal};
pub use combinator::{Fp8Quantizer, QuantizeFp8, stored};
pub use contract::{Accepts, Fp8Config, Quantization, agreed_rules};
pub use encoding::{Fp8Codes, Fp8Scales};
pub use engine::LAYER;
pub use error::QuantError;
pub use format::{
    BlockGrid, BlockScale, Fp8Format, Granularity, Mode, NonFinite, Precast, ScaleName, SourceType,
};
pub use numbers::dequantize;
pub use strided::{StridedBlocks, StridedPart, Strides};

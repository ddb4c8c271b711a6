//! What the parts reach, beside what the machine can do in the same run.

pub mod quant;
pub mod scale;
pub mod transfer;

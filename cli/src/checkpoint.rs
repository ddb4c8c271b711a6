//! Safetensors checkpoints: reading without copying, writing without half-written files, comparing.

mod error;
mod header;
mod reader;
mod verify;
mod writer;

pub use error::CheckpointError;
pub use reader::{Checkpoint, Shard};
pub use verify::{Difference, Side, VerifyReport, verify};
pub use writer::CheckpointWriter;

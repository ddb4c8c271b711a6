//! Safetensors checkpoints: reading without copying, writing without half-written files, comparing.

mod beside;
mod error;
mod header;
mod json;
mod reader;
mod staging;
mod verify;
mod writer;

pub use beside::Beside;
pub use error::CheckpointError;
pub use json::{JsonError, JsonText};
pub use reader::{Checkpoint, Shard};
pub(crate) use staging::{Staging, sync_folder};
pub use staging::{end_unfinished, is_ending};
pub use verify::{Difference, Side, VerifyReport, verify};
pub use writer::CheckpointWriter;

//! The parts of the `ckpt-engine` program: where weights come from and where they are put.
//!
//! - [`checkpoint`] reads, writes and compares safetensors checkpoints;
//! - [`synthetic`] makes models that need no download;
//! - [`source`] is either of the two, changing from update to update as training would change it.

pub mod checkpoint;
mod ffi;
pub mod source;
pub mod synthetic;

//! The parts of the `ckpt-engine` program: where weights come from and where they are put.
//!
//! - [`checkpoint`] reads, writes and compares safetensors checkpoints;
//! - [`synthetic`] makes models that need no download;
//! - [`source`] is either of the two, changing from update to update as training would change it;
//! - [`roles`] is what a trainer and a rollout do, [`sync`] starts one of each and more on this
//!   machine;
//! - [mod@bench] measures transports; [`memory`] measures what that takes.

pub mod bench;
pub mod checkpoint;
pub mod device;
pub mod exporter;
mod ffi;
pub use ffi::set_variable;
pub mod memory;
mod progress;
pub mod quantize;
pub mod roles;
pub mod source;
pub mod sync;
pub mod synthetic;
pub mod top;

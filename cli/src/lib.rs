//! The parts of the `ckpt-engine` program: where weights come from and where they are put.
//!
//! - [`checkpoint`] reads, writes and compares safetensors checkpoints;
//! - [`scheme`] is how a checkpoint's weights are stored, [`quantize`] changes that;
//! - [`synthetic`] makes models that need no download;
//! - [`source`] is either of the two, changing from update to update as training would change it;
//! - [`roles`] is what a trainer and a rollout do, [`sync`] starts one of each and more on this
//!   machine, [`report_line`] is what it tells of an update;
//! - [`placed`] is what these do where each has a part of the model;
//! - [mod@bench] measures transports; [`memory`] measures what that takes;
//! - [`mod@simulate`] plans models that are divided over many ranks, and simulates their transfers.

// `println!` and `eprintln!` panic when nobody reads.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod bench;
pub mod checkpoint;
mod dequantize;
pub mod device;
pub mod exporter;
mod ffi;
pub use ffi::set_variable;
pub mod memory;
pub mod placed;
mod processes;
mod progress;
pub mod quantize;
pub mod report_line;
pub mod roles;
pub mod runtime;
pub mod scheme;
pub mod simulate;
pub mod source;
pub mod sync;
pub mod synthetic;
mod threads;
pub mod top;

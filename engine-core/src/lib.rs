//! The contract of a checkpoint engine, and everything of it that no device needs.

pub mod control;
mod error;
mod ids;

pub use error::{Error, ErrorKind, ErrorReport, Recovery, Result};
pub use ids::{Rank, Version};

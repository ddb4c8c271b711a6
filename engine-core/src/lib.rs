//! The contract of a checkpoint engine, and everything of it that no device needs.

pub mod digest;
mod dtype;
mod error;
mod ids;
mod isa;
pub mod memory;
pub mod plan;
mod stream;
mod weight;

pub use dtype::DType;
pub use error::{Error, ErrorKind, ErrorReport, Recovery, Result};
pub use ids::{Rank, Version};
pub use stream::{
    FromIterator, FromStream, IntoWeight, IntoWeightStream, WeightStream, WeightStreamExt,
    ensure_async_iterator,
};
pub use weight::{Encoding, TensorMeta, Treatment, Weight};

//! Models that need no download: true names and shapes, made-up values.
//!
//! Each tensor's bytes follow from its name and the update's version alone ([`fill`]), so that a
//! receiver can check any part of what it received ([`compare`]) without the rest and without
//! being sent anything.

mod architecture;
mod fill;
mod model;

pub use architecture::SyntheticModel;
pub use fill::{ChangeRate, compare, fill};
pub(crate) use fill::{Values, blockwise, perturb};
pub use model::{Residency, ResidentModel, StreamedModel};

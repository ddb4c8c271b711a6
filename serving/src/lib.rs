//! How rollouts of a checkpoint engine get a version that others have.

mod handover;

pub use handover::{Holder, Newcomer};

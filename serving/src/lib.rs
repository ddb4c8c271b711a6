//! Rollouts that have the current version at hand: kept up to date, and taken over from one another.

mod handover;
mod replica;

pub use handover::{Holder, Newcomer};
pub use replica::Replica;

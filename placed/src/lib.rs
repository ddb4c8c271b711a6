//! Placed updates: trainers that hold parts of tensors write what each rollout wants of them straight into the rollout's own.
//!
//! A trainer streams the [boxes](engine_core::Weight::of_box) that it holds; a rollout lends memory for the boxes that it
//! [wants](Wanted). Every rank computes the same [plan](reshard) of who writes what where. A transport contributes memory:
//! a [`Lender`] on rollouts, and how trainers [`Reach`] it.
//!
//! ```text
//! leading trainer            other trainers                  rollouts
//!   Begin(update, version)          ─────▶  all
//!                                   ◀─────  Entered(what it holds or wants)
//!   Plan(what all declare)          ─────▶  all: the same plan
//!                                   ◀─────  Maxima(of blocks that several trainers share), passed on
//!                                   ◀─────  Planned(its digest; rollouts: the terms they lend on)
//!   Write(terms)                    ─────▶  trainers: encode into the rollouts' tensors
//!                                   ◀─────  Written(digests of what went where)
//!   Verify(digests)                 ─────▶                   rollouts: compare with what is there
//!                                   ◀─────                   Verified
//!   Commit                          ─────▶  all: active
//! ```
//!
//! Nothing is written before every rank has agreed to the plan: a hole, an overlap, or a type that does not fit is an error that names
//! tensor and rank, and leaves the version that is there. From then on a rollout's tensors hold no version until the
//! commit, and they are whole again when an update succeeds.
//!
//! A trainer that was taken for lost may still be writing. So the [`Lender`] lets an update begin only when every trainer of the one
//! before has let the memory go.
//!
//! The leader's part and a rank's are state machines without IO.

#![forbid(unsafe_code)]

mod coordinator;
mod declared;
mod encode;
#[cfg(fuzzing)]
pub mod fuzzing;
mod member;
mod memory;
mod message;
mod pieces;
mod rollout;
#[cfg(test)]
mod schedules;
mod seat;
mod trainer;

pub use declared::Wanted;
pub use member::TensorState;
pub use memory::{Encoded, Encoder, Lender, LentBytes, Reach, Reached, Written};
pub use rollout::{Inspect, Layout, PlacedRollout, PlacedTensor};
pub use trainer::PlacedTrainer;

//! Placed updates: trainers that hold parts of tensors write them straight into the tensors of the rollouts that want them.
//!
//! A trainer streams the [boxes](engine_core::Weight::of_box) that it holds. A rollout lends memory for the boxes that it
//! [wants](Wanted). Every rank computes the same [plan](reshard) of who writes what where. A transport contributes the
//! memory: a [`Lender`] on rollouts, and a [`Reach`] on trainers.
//!
//! ```text
//! leading trainer            other trainers                  rollouts
//!   Begin(update, version)          ─────▶  all
//!                                   ◀─────  Entered(what it holds or wants)
//!   Plan(what all declare)          ─────▶  all: the same plan
//!                                   ◀─────  Maxima(of blocks that several trainers share), passed on
//!                                   ◀─────  Planned(its digest; rollouts: the terms they lend on)
//!   Write(terms)                    ─────▶  trainers: encode into the rollouts' tensors
//!                                   ◀─────  Batch(digests of what went to a rollout)
//!   Batch                           ─────▶                   that rollout: compare with what is there
//!                                   ◀─────  Written(everything)
//!   Verify                          ─────▶                   rollouts: compare what is left
//!                                   ◀─────                   Verified
//!   Commit                          ─────▶  all: active
//! ```
//!
//! A trainer whose stream begins as that of its last update enters with the boxes of that one, and writes while the stream is read. If it turns
//! out to have other boxes, all ranks go back to the beginning of the same update, with the declarations that are true:
//!
//! ```text
//!   Plan, or Write                  ─────▶  trainers
//!                                   ◀─────  Differs, when it writes no more
//!   Again, when no trainer writes   ─────▶  all: Entered(what it holds or wants)
//! ```
//!
//! Nothing is written before every rank has agreed to the plan. A hole, an overlap or a type that does not fit is an error
//! that names tensor and rank, and the rollouts keep their version. Once trainers may write, a rollout's tensors hold no
//! version until the commit. If the update fails then, they hold none until a later update succeeds.
//!
//! A rollout whose memory digests itself compares each batch while trainers write others. No piece is written twice, and none has bytes of
//! another. Host memory is compared when no trainer has it any more.
//!
//! A trainer that counts as lost may still be writing. So the [`Lender`] lets an update begin only when every trainer of
//! the update before has let go of the memory.
//!
//! The leader's decisions and each rank's part are state machines without IO.

#![deny(unsafe_code)]

mod arriving;
mod coordinator;
#[cfg(feature = "cuda")]
pub mod cuda;
mod declared;
mod encode;
#[cfg(fuzzing)]
pub mod fuzzing;
mod host;
mod member;
mod memory;
mod message;
pub mod parcels;
mod parts;
mod pieces;
mod ranks;
mod rollout;
#[cfg(test)]
mod schedules;
mod seat;
mod tensors;
mod trainer;

pub use declared::Wanted;
pub use host::{HostRange, HostRanges, HostTensors};
pub use member::TensorState;
pub use memory::{Encoded, Encoder, Lender, LentBytes, Reach, Reached, Written};
pub use parts::Parts;
pub use ranks::{are_placed, prepare_rollout, prepare_trainer, says_nothing_of_what_it_wants};
pub use rollout::{Inspect, Layout, PlacedRollout, PlacedTensor};
pub use tensors::LentTensor;
pub use trainer::PlacedTrainer;

//! A rank's agent: the thread that owns it, and the handle of that thread.
//!
//! - [`handle`] is the engine's side, [`worker`] the thread;
//! - [`open`](mod@open) makes an agent of NIXL, [`thread`] the thread for it, [`exit`] ends those that are left when the process ends;
//! - [`card`] and [`reach`] describe how peers are reached, [`notice`] has the messages between agents.

mod card;
mod exit;
mod handle;
mod notice;
mod open;
mod reach;
pub(crate) mod thread;
mod worker;

pub(crate) use card::Card;
pub(crate) use handle::{Agent, Awaiting, Transfer};
#[cfg(fuzzing)]
pub(crate) use notice::Notice;
pub(crate) use open::{AgentOptions, open, open_with, probe};
pub(crate) use reach::{Reach, this_host};

#[cfg(test)]
mod tests;

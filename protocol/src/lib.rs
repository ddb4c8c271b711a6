//! The protocol of an update: the messages of trainer and rollouts over the control plane, while a transport
//! carries the buckets.
//!
//! A transport contributes a [`SendLink`] and a [`ReceiveLink`]: memory for buckets, and the way that a
//! filled bucket takes to the other side. [`Sender`] and [`Receiver`] do the rest in the same way for every
//! transport: the plan, double buffering, digests, releases, deadlines, confirmation, commit and aborts.
//!
//! ```text
//! trainer                                   rollout
//!   Begin(update, version)          ─────▶
//!                                   ◀─────  Entered(the plan it knows, the buckets it still reads)
//!   fill slot 0, Bucket(0)          ─────▶  verify, offer views of bucket 0
//!   fill slot 1, Bucket(1)          ─────▶  verify, offer views of bucket 1
//!                                   ◀─────  Release(0)      the last view is gone
//!   fill slot 0, Bucket(2)          ─────▶  …
//!   End(digest of the version)      ─────▶  verify the whole: Ready
//!                                   ◀─────  Confirm
//!   all have confirmed: Commit      ─────▶  Active
//! ```
//!
//! Each rank's part is a state machine without IO. [`Sender`], [`CoSender`], [`Receiver`] and [`Witness`] are loops
//! that each drive one.
//!
//! Any failure on any side becomes an `Abort` that every rank receives, with the first cause. The exception is the loss of
//! a receiver where receivers fetch from one another: if the others can still get all buckets, the update goes on
//! without it.
//!
//! The trainer knows of a rank what the rank said when it entered the update. It remembers nothing from the
//! update before, so a message that was lost in that update cannot mislead this one.
//!
//! Every wait of the trainer has a deadline. It restarts only when the awaited rank takes a step or is given a new
//! task. The other ranks wait as long as the trainer says that it is alive.
//!
//! A rank may want only some of the named parts of a version ([`Parts`]), and says so when it enters. Then a bucket has weights
//! of parts that the same ranks want, and is announced to these alone. `End` tells each rank the digests of what it got.
//!
//! [`Parts`]: engine_core::Parts
//!
//! Where nothing travels ([`BucketKind::List`]), a bucket is a list of whole weights, each in memory that the rollout
//! may keep. Its `Release` says that the rollout asks for more, so no more buckets are on the way than there are
//! slots.
//!
//! [`BucketKind::List`]: engine_core::plan::BucketKind::List
//!
//! Several trainers may share the sending ([`CoSender`]). With *k* senders, sender *n* mod *k* sends bucket *n*.
//! Each sender collects the same buckets from its own stream. The leader hears every release: it says when a
//! slot is free, and announces the buckets in order:
//!
//! ```text
//! leading trainer                           another trainer that sends
//!   Begin(update, version)          ─────▶  Entered
//!   Fill(1)                         ─────▶  fill its slot, send
//!   Bucket(0), to the rollouts
//!                                   ◀─────  Filled(1)
//!   Bucket(1), to the rollouts
//!   End(digest of the plan)         ─────▶  compare, Confirm
//! ```

mod announced;
mod collect;
mod follower;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod hub;
mod leader;
mod link;
mod message;
mod paths;
#[cfg(test)]
mod ranks;
mod receiver;
mod route;
#[cfg(any(test, fuzzing))]
mod schedules;
mod secondary;
mod sender;
mod simulate;
#[cfg(test)]
mod tests;
mod tree;
mod witness;
mod work;

pub use link::{Fetch, FetchLink, Members, Part, ReceiveLink, SendLink};
pub use message::{Ticket, decode, encode};
pub use receiver::{Arrival, Receiver};
pub use route::Topology;
pub use sender::{CoSender, Sender};
pub use simulate::{Simulated, Simulation, simulate};
pub use witness::{Relay, Witness};

use std::future::Future;
use std::time::Duration;

use engine_core::control::{Control, Event};
use engine_core::{Error, ErrorKind, Result, clock};

/// The limit of a wait that has no deadline of its own.
const LONG: Duration = Duration::from_secs(3600);

/// Awaits with a deadline. The caller completes the error, because it knows which rank it waited for.
async fn within<T>(
    deadline: Duration,
    operation: &str,
    waiting: impl Future<Output = T>,
) -> Result<T> {
    clock::within(deadline, waiting).await.ok_or_else(|| too_late(deadline, operation))
}

fn too_late(deadline: Duration, operation: &str) -> Error {
    let message = format!("nothing within {:.1} s", deadline.as_secs_f64());
    Error::new(ErrorKind::Timeout, operation, message)
}

/// The operation of a trainer that works on its own weights, in errors.
const ENCODING: &str = "encoding a bucket";

/// Whether a transport may report an error of this kind when a rank dies.
fn is_of_transport(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::Io)
}

/// The cause of a failure, with the error that this rank saw first as its source. An error that only says that the
/// same rank is lost adds nothing and is left out.
fn because(cause: Error, seen: Error) -> Error {
    let lost = |error: &Error| (error.kind() == ErrorKind::PeerLost).then(|| error.report().rank);
    if lost(&cause).is_some() && lost(&cause) == lost(&seen) {
        cause
    } else {
        cause.with_source(seen)
    }
}

/// The next event if it is here already.
async fn arrived_event(control: &dyn Control) -> Result<Option<Event>> {
    control.recv(Duration::ZERO).await
}

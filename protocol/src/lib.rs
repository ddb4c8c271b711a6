//! The protocol of an update: what trainer and rollouts say to each other over the control plane
//! while buckets travel by whatever the transport is.
//!
//! A transport contributes a [`SendLink`] and a [`ReceiveLink`]: memory for buckets, and how a
//! filled one gets to the other side. [`Sender`] and [`Receiver`] do the rest, the same for every
//! transport: the plan, double buffering, digests, releases, deadlines, confirmation and commit,
//! aborts.
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
//! Every rank's part is a state machine without IO: [`Sender`], [`CoSender`], [`Receiver`] and [`Witness`] are loops
//! that drive one each.
//!
//! Any failure on any side becomes an `Abort` that every rank receives, with the first cause.
//!
//! What the trainer believes of a rank is what the rank said when it entered the update: nothing is
//! remembered from the one before, so that nothing lost or dropped in that one can be wrong in this one.
//!
//! Every wait of the trainer has a deadline, which only steps of the rank that is waited for begin anew.
//! The others wait as long as the trainer says that it is alive.
//!
//! Where nothing travels ([`BucketKind::List`]), a bucket is a list of whole weights, each in memory that the rollout
//! may keep. Its `Release` says that the rollout asks for more, so that there are two buckets on the way at most.
//!
//! [`BucketKind::List`]: engine_core::plan::BucketKind::List
//!
//! Several trainers may share the sending ([`CoSender`]): bucket *n* comes from the one at *n* modulo their
//! number. All of them collect the same buckets from streams of their own; the leader, which hears of
//! every release, says when a slot is free and announces buckets in order:
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

/// A wait for events that something else ends.
const LONG: Duration = Duration::from_secs(3600);

/// Awaits with a deadline; the error is completed by the caller, who knows whom it waited for.
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

/// What a trainer does with its own weights, in errors.
const ENCODING: &str = "encoding a bucket";

/// Whether an error may be what a transport sees of a rank that died.
fn is_of_transport(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::Io)
}

/// The cause of a failure, with what this rank saw of it before. That nothing could be sent to a lost rank, or that its
/// connection broke, is the loss itself and not said again.
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

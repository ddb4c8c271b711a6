//! The traits of a transport: memory for buckets, and the way of a filled bucket to the other side.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::message::Ticket;
use super::receiver::Arrival;
use super::route::Topology;
use engine_core::memory::Job;
use engine_core::plan::{BucketKind, BucketLayout};
use engine_core::{Rank, Result, Storage};

/// A transport's sending side: the memory of its buckets, and the way out of a filled one.
#[async_trait]
pub trait SendLink: std::fmt::Debug + Send + 'static {
    /// The number of buckets: two for double buffering.
    fn slots(&self) -> usize;

    /// The size of each bucket in bytes. A list takes weights up to this size, or a single larger one.
    fn bucket_bytes(&self) -> u64;

    /// The kind of its buckets. Both sides of a transport have the same kind.
    ///
    /// Where buckets are lists, [`fill`](Self::fill) puts each job's weight into memory of its own, which receivers may
    /// keep, and computes no digest.
    fn bucket_kind(&self) -> BucketKind {
        BucketKind::Buffer
    }

    /// Encodes all jobs into a bucket. Returns its digest sum if `digests` is set, else 0.
    ///
    /// # Contract
    ///
    /// Called for a slot only when it is free: without a [`topology`](Self::topology) when all receivers have released
    /// its bucket, with one when those that fetch from this rank, and those that fetch from them, have it. When the
    /// future has ended, with an error or without, nothing reads the weights of the jobs any more.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, work on the bucket may go on. It keeps clones of its weights until
    /// it ends, and a later call for the same slot waits for its end.
    ///
    /// # Errors
    ///
    /// Those of the weights; each names its weight.
    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64>;

    /// Makes the first `filled` bytes of a bucket visible to the receivers. Called before they are told of
    /// the bucket. Transports that push bytes do it here.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    async fn publish(&mut self, slot: usize, filled: u64) -> Result<()>;

    /// For transports whose receivers fetch buckets from any rank that has them: who fetches from
    /// whom in the next update. `receivers` is the number of rollouts, `buckets` the number of buckets in the last
    /// update, 0 if there was none.
    ///
    /// With a topology, receivers need to implement [`FetchLink`] themselves, and an update goes on without receivers
    /// that die. A slot is filled again when the ranks that fetch from this one, and those that fetch from them, have
    /// its bucket. Without a topology, every receiver uses the trainer's own slot, which is filled again when all have
    /// released it.
    fn topology(&self, receivers: usize, buckets: usize) -> Option<Topology> {
        let _ = (receivers, buckets);
        None
    }

    /// The bytes that receivers need to fetch from this rank.
    fn card(&self) -> Bytes {
        Bytes::new()
    }

    /// Whether an update without a receiver is an error: it is, unless what is published serves others as well.
    fn needs_receivers(&self) -> bool {
        true
    }

    /// Whether parts of a version that no rollout wants are sent all the same, because what is published serves others as
    /// well.
    fn keeps_all(&self) -> bool {
        false
    }

    /// Begins an update on the leader, with these ranks and `colocated` ranks of [`Part::Colocated`] beside them. If the
    /// ranks have to join one another for the update, this returns a ticket, which travels to all of them.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    async fn begin(&mut self, members: &Members, colocated: usize) -> Result<Option<Ticket>> {
        let _ = (members, colocated);
        Ok(None)
    }

    /// Joins the other ranks of the update. Called before anything is published, if
    /// [`begin`](Self::begin) returned this ticket on the leader. The others join at the same time if the ticket is for
    /// joining [`together`](Ticket::together).
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the rank gives up joining.
    ///
    /// # Errors
    ///
    /// Those of the transport; `Timeout`.
    async fn join(&mut self, ticket: &Ticket) -> Result<()> {
        let _ = ticket;
        Ok(())
    }

    /// The update has ended on this rank. `committed` says whether it succeeded.
    fn end(&mut self, committed: bool) {
        let _ = committed;
    }

    /// Every fallback to something slower than was asked for, in words for [`SendReport::slower`].
    ///
    /// [`SendReport::slower`]: engine_core::SendReport::slower
    fn slower(&self) -> Vec<String> {
        Vec::new()
    }

    /// The rank leaves the group. Ends everything that the link has opened. Where it matters, rollouts get up to `limit`
    /// to close what they have open of this rank. Dropping the link without this call does the same, but waits for
    /// nothing.
    async fn close(&mut self, limit: Duration) {
        let _ = limit;
    }
}

/// The ranks of an update.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// The trainers that send, the leader first. Bucket `n` comes from the one at index `n` modulo their number.
    pub senders: Vec<Rank>,
    /// The ranks that get buckets from them, in the order of their ranks: receivers and relays.
    pub others: Vec<Rank>,
}

/// The part in updates of a rank other than the leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// A rollout.
    #[default]
    Receiver,
    /// A rollout on the leader's device. It reads the leader's buckets in place, and is not among the [`Members`].
    Colocated,
    /// A trainer that receives buckets so that the transport can pass them on from there. It keeps nothing.
    Relay,
    /// A trainer that sends a part of the buckets.
    Sender,
    /// A trainer that neither sends nor receives. It hears of updates and how they end
    /// ([`Witness`](super::Witness)), and no rank waits for it. It is not among the [`Members`].
    Idle,
}

impl Part {
    pub(super) fn is_rollout(self) -> bool {
        matches!(self, Self::Receiver | Self::Colocated)
    }
}

#[async_trait]
impl<L: SendLink + ?Sized> SendLink for Box<L> {
    fn slots(&self) -> usize {
        (**self).slots()
    }

    fn bucket_bytes(&self) -> u64 {
        (**self).bucket_bytes()
    }

    fn bucket_kind(&self) -> BucketKind {
        (**self).bucket_kind()
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        (**self).fill(slot, jobs, digests).await
    }

    async fn publish(&mut self, slot: usize, filled: u64) -> Result<()> {
        (**self).publish(slot, filled).await
    }

    fn topology(&self, receivers: usize, buckets: usize) -> Option<Topology> {
        (**self).topology(receivers, buckets)
    }

    fn card(&self) -> Bytes {
        (**self).card()
    }

    fn needs_receivers(&self) -> bool {
        (**self).needs_receivers()
    }

    fn keeps_all(&self) -> bool {
        (**self).keeps_all()
    }

    async fn begin(&mut self, members: &Members, colocated: usize) -> Result<Option<Ticket>> {
        (**self).begin(members, colocated).await
    }

    async fn join(&mut self, ticket: &Ticket) -> Result<()> {
        (**self).join(ticket).await
    }

    fn end(&mut self, committed: bool) {
        (**self).end(committed);
    }

    fn slower(&self) -> Vec<String> {
        (**self).slower()
    }

    async fn close(&mut self, limit: Duration) {
        (**self).close(limit).await;
    }
}

/// A transport's receiving side: it gets the bytes of a bucket.
#[async_trait]
pub trait ReceiveLink: std::fmt::Debug + Send + 'static {
    /// Returns the first `filled` bytes of a slot, in place.
    ///
    /// # Contract
    ///
    /// The sender does not write to the slot before the receiver has released the bucket. The receiver releases
    /// it when the returned bytes and everything shared from them are dropped. The bytes begin at an address
    /// that is a multiple of [`ALIGNMENT`](engine_core::plan::ALIGNMENT), so that tensors can be viewed in place.
    ///
    /// # Errors
    ///
    /// `Protocol` if there is no such slot or the slot is smaller; those of the transport.
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage>;
}

#[async_trait]
impl<L: ReceiveLink + ?Sized> ReceiveLink for Box<L> {
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        (**self).fetch(slot, filled).await
    }
}

/// A receiving side that fetches each bucket from the rank that it is told to, the trainer or another
/// receiver. Fetches may run at the same time.
///
/// Every [`ReceiveLink`] is one: it gets all buckets from the trainers that send.
#[async_trait]
pub trait FetchLink: std::fmt::Debug + Send + 'static {
    /// The bytes that others need to fetch from this rank.
    fn card(&self) -> Bytes;

    /// The kind of its buckets, the same as that of the [`SendLink`]. The arrival of a list is reported by
    /// [`Arrival::tell_list`].
    fn bucket_kind(&self) -> BucketKind {
        BucketKind::Buffer
    }

    /// Starts to fetch a bucket into the slot of the same number.
    ///
    /// # Contract
    ///
    /// `arrival` is told once, from any thread, when the bytes are here or cannot come. The slot is
    /// used for nothing else before the bytes given to `arrival` and everything shared from them are
    /// dropped. Others may fetch the bucket from here until the slot's next bucket is fetched. The bytes are aligned
    /// as in [`ReceiveLink::fetch`].
    async fn fetch(&mut self, fetch: Fetch, arrival: Arrival);

    /// Gives up all fetches from a rank that failed. Those that have not ended yet soon end with an error.
    fn abandon(&mut self, from: Rank);

    /// Joins the other ranks of the update, if the leader's [`SendLink::begin`] returned a ticket. The others join at
    /// the same time if the ticket is for joining [`together`](Ticket::together).
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the rank gives up joining.
    ///
    /// # Errors
    ///
    /// Those of the transport; `Timeout`.
    async fn join(&mut self, ticket: &Ticket) -> Result<()> {
        let _ = ticket;
        Ok(())
    }

    /// The update has ended on this rank, whether it succeeded or failed. Its bytes may still be held.
    fn end(&mut self) {}

    /// Prepares for an update: called when the rank begins to wait for one. Takes no longer than `limit`.
    async fn listen(&mut self, limit: Duration) {
        let _ = limit;
    }

    /// The rank leaves the group. Ends everything that the link has opened. Dropping the link without this call does the
    /// same, but waits for nothing. Bytes that are still held stay valid.
    async fn close(&mut self) {}
}

/// A bucket to fetch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Fetch {
    /// The rank that has it.
    pub from: Rank,
    /// That rank's [`SendLink::card`] or [`FetchLink::card`].
    pub card: Bytes,
    /// Its number in the update.
    pub index: u64,
    /// The slot that it is in.
    pub slot: u32,
    /// Its length in bytes.
    pub filled: u64,
    /// What lies where in it.
    pub layout: Arc<BucketLayout>,
}

#[async_trait]
impl<L: ReceiveLink> FetchLink for L {
    fn card(&self) -> Bytes {
        Bytes::new()
    }

    async fn fetch(&mut self, fetch: Fetch, arrival: Arrival) {
        arrival.tell(ReceiveLink::fetch(self, fetch.slot, fetch.filled).await);
    }

    fn abandon(&mut self, _: Rank) {}
}

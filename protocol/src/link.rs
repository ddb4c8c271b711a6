//! What a transport contributes: memory for buckets, and how a filled one gets to the other side.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::message::Ticket;
use super::receiver::Arrival;
use super::route::Topology;
use engine_core::memory::Job;
use engine_core::plan::BucketKind;
use engine_core::{Rank, Result, Storage};

/// A transport's sending side: the memory of its buckets, and how a filled one gets out.
#[async_trait]
pub trait SendLink: std::fmt::Debug + Send + 'static {
    /// The number of buckets: two for double buffering.
    fn slots(&self) -> usize;

    /// The size of each in bytes. A list ends when it has it.
    fn bucket_bytes(&self) -> u64;

    /// What a bucket is. Those of a kind are filled and fetched by links of the same kind.
    ///
    /// Where buckets are lists, [`fill`](Self::fill) makes each job's weight memory of its own, of which receivers may keep
    /// what they like, and digests nothing.
    fn bucket_kind(&self) -> BucketKind {
        BucketKind::Buffer
    }

    /// Encodes all jobs into a bucket, and returns its digest sum if it is wanted, else 0.
    ///
    /// # Contract
    ///
    /// Called for a slot only when all receivers have released it. When the future has ended, with
    /// an error or without, nothing reads the weights of the jobs any more.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, work on the bucket may go on, and keeps clones of its weights until
    /// it ends; a later call for the same slot waits for its end.
    ///
    /// # Errors
    ///
    /// Those of the weights, naming them.
    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64>;

    /// Makes the first `filled` bytes of a bucket visible to the receivers, before they are told of
    /// it. Transports that push bytes do it here.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    async fn publish(&mut self, slot: usize, filled: u64) -> Result<()>;

    /// For transports whose receivers fetch buckets from any rank that has them: who fetches from
    /// whom in the next update, among so many receivers. `buckets` is the number of the last update's
    /// buckets, 0 if there was none.
    ///
    /// With a topology, receivers need to be [`FetchLink`]s; a slot is filled again
    /// when those that fetch from it have its bucket; and an update goes on without receivers that die.
    /// Without one, every receiver uses the trainer's own slot, which is filled again when all have
    /// released it.
    fn topology(&self, receivers: usize, buckets: usize) -> Option<Topology> {
        let _ = (receivers, buckets);
        None
    }

    /// What receivers need to fetch from this rank.
    fn card(&self) -> Bytes {
        Bytes::new()
    }

    /// Begins an update of these ranks, on the leader, and of so many [`Part::Colocated`] ones beside them. A
    /// transport whose ranks have to join one another for it returns a ticket, which travels to all of them.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    async fn begin(&mut self, members: &Members, colocated: usize) -> Result<Option<Ticket>> {
        let _ = (members, colocated);
        Ok(None)
    }

    /// Joins the others, who do the same now. Called before anything is published, if
    /// [`begin`](Self::begin) returned this ticket on the leader.
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

    /// The update has ended here, with the version or without.
    fn end(&mut self, committed: bool) {
        let _ = committed;
    }

    /// What fell back to something slower than was asked for, in words for [`SendReport::slower`].
    ///
    /// [`SendReport::slower`]: engine_core::SendReport::slower
    fn slower(&self) -> Vec<String> {
        Vec::new()
    }

    /// The rank leaves the group: ends what the link has opened, and gives rollouts up to `limit` to let go of what they
    /// have open of it, where that matters. A link that is dropped without does the same, unawaited.
    async fn close(&mut self, limit: Duration) {
        let _ = limit;
    }
}

/// The ranks of an update.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// The trainers that send, the leader first. Bucket `n` comes from the one at `n` modulo their number.
    pub senders: Vec<Rank>,
    /// Those that get buckets from them, in the order of their ranks: receivers and relays.
    pub others: Vec<Rank>,
}

/// What a rank does in updates, beside the leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// A rollout.
    #[default]
    Receiver,
    /// A rollout that reads the leader's buckets where they are, because it is on the leader's device. It is
    /// none of the [`Members`].
    Colocated,
    /// A trainer that receives, for the transport to pass on from there, and keeps nothing.
    Relay,
    /// A trainer that sends a part of the buckets.
    Sender,
    /// A trainer that neither sends nor receives: it hears of updates and how they end
    /// ([`Witness`](super::Witness)), and nobody waits for it. It is none of the [`Members`].
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

/// A transport's receiving side: how the bytes of a bucket get here.
#[async_trait]
pub trait ReceiveLink: std::fmt::Debug + Send + 'static {
    /// The first `filled` bytes of a slot, in place.
    ///
    /// # Contract
    ///
    /// The sender does not write to the slot before the receiver has released the bucket, which
    /// happens when the returned bytes and everything shared from them are dropped. The bytes begin at an address
    /// that is a multiple of [`ALIGNMENT`](engine_core::plan::ALIGNMENT), so that tensors can be viewed in place.
    ///
    /// # Errors
    ///
    /// `Protocol` if there is no such slot or it is smaller; those of the transport.
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage>;
}

#[async_trait]
impl<L: ReceiveLink + ?Sized> ReceiveLink for Box<L> {
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        (**self).fetch(slot, filled).await
    }
}

/// A receiving side that fetches each bucket from a rank that it is told, the trainer or another
/// receiver, while other things go on.
///
/// Every [`ReceiveLink`] is one: it takes all buckets from the trainer.
#[async_trait]
pub trait FetchLink: std::fmt::Debug + Send + 'static {
    /// What others need to fetch from this rank.
    fn card(&self) -> Bytes;

    /// What a bucket is, as its [`SendLink`] says. A list is told by [`Arrival::tell_list`].
    fn bucket_kind(&self) -> BucketKind {
        BucketKind::Buffer
    }

    /// Starts to fetch a bucket into the slot of the same number.
    ///
    /// # Contract
    ///
    /// `arrival` is told once, from any thread, when the bytes are here or cannot come. The slot is
    /// used for nothing else before the bytes given to it and everything shared from them are
    /// dropped. Others may fetch the bucket from here until the slot's next bucket is fetched. The bytes are aligned
    /// as in [`ReceiveLink::fetch`].
    ///
    async fn fetch(&mut self, fetch: Fetch, arrival: Arrival);

    /// Gives up all fetches from a rank that failed; those that have not ended end with an error, soon.
    fn abandon(&mut self, from: Rank);

    /// Joins the update's other ranks, with the ticket that the leader's
    /// [`SendLink::begin`] returned, if it did. All of them do at the same time.
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

    /// The update has ended here, with the version or without. Its bytes may still be held.
    fn end(&mut self) {}

    /// The rank begins to wait for an update. Takes no longer than `limit`.
    async fn listen(&mut self, limit: Duration) {
        let _ = limit;
    }

    /// The rank leaves the group: ends what the link has opened. A link that is dropped without does the same,
    /// unawaited. Bytes that are still held stay.
    async fn close(&mut self) {}
}

/// A bucket to be fetched.
#[derive(Clone, Debug)]
pub struct Fetch {
    /// Who has it.
    pub from: Rank,
    /// That rank's [`SendLink::card`] or [`FetchLink::card`].
    pub card: Bytes,
    /// The slot that it is in.
    pub slot: u32,
    /// Its length in bytes.
    pub filled: u64,
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

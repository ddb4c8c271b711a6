//! The traits of a transport: memory that a rollout lends, and how trainers reach it.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use engine_core::{Rank, Result, Storage, Weight};
use futures::future::BoxFuture;
use quant_fp8::{Fp8Format, SourceType, StridedPart};

/// Memory of a rollout that trainers write to in updates. All parties speak of its bytes by their offsets. It need not be one
/// allocation: each tensor is in one piece, and so are its scales.
///
/// # Contract
///
/// Trainers reach it only by the terms of the last [`lend`](Self::lend). [`take_back`](Self::take_back) succeeds only when
/// every trainer that reached the memory has let go or its process has ended, and no trainer can reach it by these terms
/// any more. So between `take_back` and the next `lend` nobody writes, even if trainers have died.
pub trait Lender: fmt::Debug + Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lends it for one update, to the trainers that have a piece for it. Returns the terms that they need to reach it.
    ///
    /// # Errors
    ///
    /// `State` while it is lent; those of the system.
    fn lend(&mut self, to: &[Rank]) -> Result<Bytes>;

    /// Takes it back if no trainer has it any more, and returns whether that is so. Does not block.
    ///
    /// # Errors
    ///
    /// Those of the system.
    fn take_back(&mut self) -> Result<bool>;

    /// The bytes of a tensor, or of its scales. While they are borrowed, the memory cannot be lent.
    ///
    /// # Errors
    ///
    /// `State` while it is lent, and for bytes that are not in one piece of it.
    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>>;

    /// The digest sum of each piece, which is given as its parts, computed where the memory is. `None` for memory whose
    /// [bytes](Self::bytes) the host reads, or copies. While it is lent, this is called for pieces that were written, beside which trainers
    /// may still write. `step` is called as the work goes on. Its error ends the work. In an update that is like the last one, the parts
    /// are clones of the same ones.
    ///
    /// # Errors
    ///
    /// Those of the device and of `step`.
    fn sums(
        &self,
        _pieces: &[&Arc<[StridedPart]>],
        _step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        Ok(None)
    }

    /// What makes writing to it slower than possible, each with the reason, in words for the reports of both sides.
    fn slower(&self) -> Vec<String> {
        Vec::new()
    }

    /// Ends what the transport does for it, and waits for that: a library's threads have to be gone before the process ends. Called when a
    /// rollout is finalized, after [`take_back`](Self::take_back). Nothing is lent afterwards.
    fn close(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Bytes of a [`Lender`], while they are not lent.
#[derive(Clone, Debug)]
pub enum LentBytes<'a> {
    /// In host memory.
    Host(&'a [u8]),
    /// On a device.
    Device(Storage),
}

impl<'a> LentBytes<'a> {
    pub(crate) fn to_host(&self) -> Result<Cow<'a, [u8]>> {
        match self {
            Self::Host(bytes) => Ok(Cow::Borrowed(bytes)),
            Self::Device(bytes) => Ok(Cow::Owned(bytes.to_host()?.into())),
        }
    }
}

/// How a trainer reaches the memory of rollouts.
pub trait Reach: fmt::Debug + Send + Sync {
    /// Reaches the memory of rollouts by their terms, and returns it in their order. Mappings may be kept for the next
    /// update, but only those of memory that is reached again.
    ///
    /// # Errors
    ///
    /// `PeerLost` or `Io` if a rollout has ended or has taken its memory back; `Protocol` for terms that cannot be decoded.
    fn reach(&self, terms: &[(Rank, Bytes)]) -> Result<Vec<Arc<dyn Reached>>>;

    /// The encoder for weights on a device, if there is one. The CPU encodes all other weights and [puts](Reached::put)
    /// them.
    fn encoder(&self) -> Option<&dyn Encoder> {
        None
    }

    /// As [`Lender::close`], when a trainer is finalized. Nothing is reached afterwards.
    fn close(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Encodes weights in a device's memory straight into the memory of rollouts.
///
/// # Contract
///
/// When a call returns, with an error or without, it no longer reads weights. Without an error all is written. After one, what it has begun to
/// write may still arrive until the trainer has let go of the memory ([`Reached`]).
pub trait Encoder: fmt::Debug + Send + Sync {
    /// Whether it can encode a weight, into this format if the weight is quantised.
    fn takes(&self, weight: &Weight, format: Option<&Fp8Format>) -> bool;

    /// Whether it can write to the tensor whose elements and scales are at these offsets in a rollout's memory.
    fn writes_to(&self, to: &dyn Reached, places: &[u64]) -> bool;

    /// The largest magnitude in each block of each part, over the elements of the part, in the form of
    /// [`BlockMaxima`](quant_fp8::BlockMaxima).
    ///
    /// # Errors
    ///
    /// Those of the device.
    fn maxima(&self, parts: &[(&Weight, SourceType, &StridedPart)]) -> Result<Vec<Vec<u32>>>;

    /// Writes pieces. `step` is called as the work goes on. Its error ends the work.
    ///
    /// # Errors
    ///
    /// Those of the device and of `step`.
    fn write(
        &self,
        pieces: &[Encoded<'_>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Written>;
}

/// A piece that an [`Encoder`] writes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Encoded<'a> {
    /// The weight, which the encoder [takes](Encoder::takes).
    pub weight: &'a Weight,
    /// The type of the weight's elements, if it is quantised.
    pub ty: Option<SourceType>,
    /// The parts to write: a single one, if it is quantised. In an update that is like the last one, they are clones of the
    /// same ones.
    pub parts: &'a Arc<[StridedPart]>,
    /// The rollout's memory, which the encoder [writes to](Encoder::writes_to).
    pub to: &'a dyn Reached,
    /// The maxima of the piece's blocks, if they also cover elements outside of the piece.
    pub known: Option<Vec<u32>>,
}

/// What an [`Encoder`] wrote.
#[derive(Clone, Debug, Default)]
pub struct Written {
    /// The digest sum of each piece.
    pub sums: Vec<u64>,
    /// The first piece with a block that cannot be quantised to finite values, and the matrix, row and column of that block
    /// in the piece.
    pub failed: Option<(usize, [u64; 3])>,
}

/// A rollout's memory at a trainer. The trainer lets go of it when the last clone of its `Arc` is dropped.
pub trait Reached: Any + fmt::Debug + Send + Sync {
    /// Writes bytes, which may be there only after [`flush`](Self::flush). Several threads call it.
    ///
    /// # Errors
    ///
    /// `Protocol` if they do not lie within the memory; those of writing, of these bytes or of some before them, which name the rollout.
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()>;

    /// Returns when all bytes that were put are there. No thread puts any meanwhile.
    ///
    /// # Errors
    ///
    /// Those of writing, which name the rollout.
    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

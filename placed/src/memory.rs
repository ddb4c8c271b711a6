//! What a transport contributes: memory that a rollout lends, and how trainers reach it.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use engine_core::{Rank, Result, Storage, Weight};
use quant_fp8::{Fp8Format, SourceType, StridedPart};

/// Memory of a rollout that trainers write to in updates.
///
/// # Contract
///
/// Trainers reach it by the terms of the last [`lend`](Self::lend) alone. [`take_back`](Self::take_back) has succeeded only when
/// every trainer that reached it has let go or its process has ended, and no one can reach it by these terms any more. So
/// between `take_back` and the next `lend` nobody writes, whatever became of trainers.
pub trait Lender: fmt::Debug + Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lends it for one update: what trainers need to reach it.
    ///
    /// # Errors
    ///
    /// Those of the system.
    fn lend(&mut self) -> Result<Bytes>;

    /// Takes it back, if nobody has it any more; whether that is so. Does not block.
    ///
    /// # Errors
    ///
    /// Those of the system.
    fn take_back(&mut self) -> Result<bool>;

    /// Its bytes. The borrow keeps it from being lent.
    ///
    /// # Errors
    ///
    /// `State` while it is lent.
    fn bytes(&self) -> Result<LentBytes<'_>>;

    /// The digest's sums of pieces, computed where they are; of each its parts. Nothing for memory whose [bytes](Self::bytes) the host
    /// reads. `step` is called as the work goes on; its error ends it.
    ///
    /// # Errors
    ///
    /// `State` while it is lent; those of the device and of `step`.
    fn sums(
        &self,
        _pieces: &[&[StridedPart]],
        _step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        Ok(None)
    }
}

/// Bytes of memory that is lent, when it is not.
#[derive(Clone, Debug)]
pub enum LentBytes<'a> {
    /// In host memory.
    Host(&'a [u8]),
    /// On a device.
    Device(Storage),
}

impl<'a> LentBytes<'a> {
    /// A part of them, if it lies within.
    pub(crate) fn part(&self, at: u64, len: u64) -> Option<Self> {
        let end = at.checked_add(len)?;
        match self {
            Self::Host(bytes) => Some(Self::Host(bytes.get(at as usize..end as usize)?)),
            Self::Device(bytes) if end <= bytes.len() => Some(Self::Device(bytes.slice(at..end))),
            Self::Device(_) => None,
        }
    }

    pub(crate) fn to_host(&self) -> Result<Cow<'a, [u8]>> {
        match self {
            Self::Host(bytes) => Ok(Cow::Borrowed(bytes)),
            Self::Device(bytes) => Ok(Cow::Owned(bytes.to_host()?.into())),
        }
    }
}

/// How a trainer reaches the memory of rollouts.
pub trait Reach: fmt::Debug + Send + Sync {
    /// Reaches what a rollout has lent. What is kept from one update to the next (mappings) is kept for those ranks alone that are
    /// reached again.
    ///
    /// # Errors
    ///
    /// `PeerLost` if the rollout has ended or taken it back; `Protocol` for terms that cannot be read.
    fn reach(&self, terms: &[(Rank, Bytes)]) -> Result<Vec<Arc<dyn Reached>>>;

    /// What encodes weights where they are, if that is a device. All other weights are encoded by the CPU and [put](Reached::put).
    fn encoder(&self) -> Option<&dyn Encoder> {
        None
    }
}

/// Encodes weights of a device's memory straight into rollouts' memory.
///
/// # Contract
///
/// When a call returns, error or not, it reads no weight and writes no rollout's memory any more.
pub trait Encoder: fmt::Debug + Send + Sync {
    /// Whether it encodes a weight, into this format if it is quantised.
    fn takes(&self, weight: &Weight, format: Option<&Fp8Format>) -> bool;

    /// Whether it writes to a rollout's memory.
    fn writes_to(&self, to: &dyn Reached) -> bool;

    /// The largest magnitudes of the blocks of each part, over the elements that are in it: as
    /// [`BlockMaxima`](quant_fp8::BlockMaxima) has them.
    ///
    /// # Errors
    ///
    /// Those of the device.
    fn maxima(&self, parts: &[(&Weight, SourceType, &StridedPart)]) -> Result<Vec<Vec<u32>>>;

    /// Writes pieces. `step` is called as the work goes on; its error ends it.
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
pub struct Encoded<'a> {
    /// The weight, which the encoder [takes](Encoder::takes).
    pub weight: &'a Weight,
    /// The type of its elements, if it is quantised.
    pub ty: Option<SourceType>,
    /// What is written: one part, if it is quantised.
    pub parts: &'a [StridedPart],
    /// The rollout's memory, which the encoder [writes to](Encoder::writes_to).
    pub to: &'a dyn Reached,
    /// The maxima of the piece's blocks, if they are not those of the piece alone.
    pub known: Option<Vec<u32>>,
}

/// What an [`Encoder`] wrote.
#[derive(Clone, Debug, Default)]
pub struct Written {
    /// The digest's sum of each piece.
    pub sums: Vec<u64>,
    /// The first piece with a block that has no finite form, and the matrix, row and column of the block in the piece.
    pub failed: Option<(usize, [u64; 3])>,
}

/// A rollout's memory at a trainer. It is let go when the last clone is dropped.
pub trait Reached: Any + fmt::Debug + Send + Sync {
    /// Writes bytes.
    ///
    /// # Errors
    ///
    /// `Protocol` if they do not lie within the memory.
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()>;
}

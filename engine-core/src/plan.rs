//! The bucket plan: which part of which weight lies where in which bucket.
//!
//! Pure functions. A weight that fits into a bucket is never split, so that a receiver can view it
//! in place; a larger one is cut in chunks that fill the buckets. Every part begins at a multiple
//! of [`ALIGNMENT`] bytes, so that a tensor of any type can be viewed in place on any device.
//!
//! Where weights are handed over ([`BucketKind::List`]), none is split; the bucket's size only says when it ends.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{ArenaArc, Error, ErrorKind, Result, TensorMeta};

/// Every part of a weight begins at a multiple of this many bytes in its bucket.
pub const ALIGNMENT: u64 = 256;

/// The most parts of one bucket, and the most bytes of their names: they bound the message that
/// describes a bucket.
const MAX_PIECES: usize = 1 << 16;
const MAX_NAME_BYTES: usize = 8 << 20;

/// What a bucket is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BucketKind {
    /// Memory of a fixed size that weights are packed into.
    #[default]
    Buffer,
    /// A list of whole weights, each in memory of its own. It ends when it has the size of a bucket; a weight that is
    /// larger has one to itself. A piece's offset says where it would lie in a buffer.
    List,
}

/// A part of a weight that lies in a bucket: the whole weight, or a chunk of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The weight that it is a part of.
    pub meta: ArenaArc<TensorMeta>,
    /// Where the part begins in the tensor, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Where it lies in the bucket, in bytes.
    pub offset: u64,
}

impl Piece {
    /// Whether this part ends its weight, whose size in bytes is given.
    fn ends(&self, byte_len: u64) -> bool {
        self.start + self.len == byte_len
    }
}

/// The parts of one bucket, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketLayout {
    pieces: Vec<Piece>,
    digest: u64,
}

impl BucketLayout {
    /// A layout of parts that the planner placed.
    pub fn new(pieces: Vec<Piece>) -> Self {
        let mut hash = Sha256::new();
        for piece in &pieces {
            let meta = &piece.meta;
            hash.update((meta.name.len() as u64).to_le_bytes());
            hash.update(meta.name.as_bytes());
            hash.update(meta.dtype.name());
            hash.update((meta.shape.len() as u64).to_le_bytes());
            for number in meta.shape.iter().chain([&piece.start, &piece.len, &piece.offset]) {
                hash.update(number.to_le_bytes());
            }
        }
        let mut digest = [0; 8];
        digest.copy_from_slice(&hash.finalize()[..8]);
        Self { pieces, digest: u64::from_le_bytes(digest) }
    }

    /// The parts, by ascending offset.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// A digest of names, types, shapes and places: equal layouts have equal digests.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Bytes of the bucket that are filled.
    pub fn filled(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.offset + piece.len)
    }
}

/// Checks layouts that come from outside, bucket by bucket: the inverse of the planner.
#[derive(Debug)]
pub struct LayoutChecker {
    bucket_bytes: u64,
    kind: BucketKind,
    open: Option<(ArenaArc<TensorMeta>, u64)>,
}

impl LayoutChecker {
    /// A checker for buckets of a size, before the first of an update.
    pub fn new(bucket_bytes: u64) -> Self {
        Self { bucket_bytes, kind: BucketKind::Buffer, open: None }
    }

    /// For buckets of a kind.
    #[must_use]
    pub fn of_kind(self, kind: BucketKind) -> Self {
        Self { kind, ..self }
    }

    /// Checks the next bucket's parts: sizes, alignment, no overlap, chunks without gaps.
    ///
    /// # Errors
    ///
    /// `Protocol`, naming the tensor.
    pub fn check(&mut self, pieces: &[Piece]) -> Result<()> {
        let mut free_from = 0;
        for piece in pieces {
            let refuse = |message: &str| {
                Err(Error::new(ErrorKind::Protocol, "checking a bucket's layout", message)
                    .tensor(&*piece.meta.name))
            };
            let byte_len = piece.meta.validate()?;
            let (Some(end), Some(part_end)) =
                (piece.offset.checked_add(piece.len), piece.start.checked_add(piece.len))
            else {
                return refuse("a place that overflows");
            };
            let is_alone = self.kind == BucketKind::List && pieces.len() == 1 && piece.offset == 0;
            if (end > self.bucket_bytes && !is_alone) || part_end > byte_len {
                return refuse("a part outside its bucket or its tensor");
            }
            if self.kind == BucketKind::List && piece.len != byte_len {
                return refuse("a part of a weight where all are whole");
            }
            if piece.offset < free_from || !piece.offset.is_multiple_of(ALIGNMENT) {
                return refuse("a part that overlaps another or is not aligned");
            }
            free_from = end;
            let expected = match self.open.take() {
                Some((meta, at)) if meta == piece.meta => at,
                Some(_) => return refuse("a weight before the previous one was complete"),
                None => 0,
            };
            if piece.start != expected || (piece.len == 0 && byte_len != 0) {
                return refuse("a chunk out of order");
            }
            if !piece.ends(byte_len) {
                self.open = Some((piece.meta.clone(), part_end));
            }
        }
        Ok(())
    }

    /// Checks that no weight is left incomplete after the last bucket.
    ///
    /// # Errors
    ///
    /// `Protocol`, naming the tensor.
    pub fn finish(self) -> Result<()> {
        match self.open {
            None => Ok(()),
            Some((meta, at)) => Err(Error::new(
                ErrorKind::Protocol,
                "ending an update",
                format!("only the first {at} bytes of a weight arrived"),
            )
            .tensor(&*meta.name)),
        }
    }
}

/// Places weights into buckets, one after the other.
#[derive(Debug)]
pub struct BucketPlanner {
    bucket_bytes: u64,
    kind: BucketKind,
    filled: u64,
    pieces: usize,
    name_bytes: usize,
}

/// Where the planner put the next part of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it begins in the bucket, in bytes.
    pub offset: u64,
    /// How many bytes of the weight lie there.
    pub len: u64,
}

impl BucketPlanner {
    /// A planner for buckets of a size in bytes.
    ///
    /// # Errors
    ///
    /// `Config` if the size is 0 or not a multiple of [`ALIGNMENT`].
    pub fn new(bucket_bytes: u64) -> Result<Self> {
        if bucket_bytes == 0 || !bucket_bytes.is_multiple_of(ALIGNMENT) {
            return Err(Error::new(
                ErrorKind::Config,
                "planning buckets",
                format!("a bucket of {bucket_bytes} bytes: give a multiple of {ALIGNMENT} above 0"),
            ));
        }
        let kind = BucketKind::Buffer;
        Ok(Self { bucket_bytes, kind, filled: 0, pieces: 0, name_bytes: 0 })
    }

    /// For buckets of a kind.
    #[must_use]
    pub fn of_kind(self, kind: BucketKind) -> Self {
        Self { kind, ..self }
    }

    /// Places the next part of a weight of which `remaining` of `total` bytes are not yet placed,
    /// or returns `None` if the bucket has to be [closed](Self::close) first.
    ///
    /// A weight that fits into a bucket is placed whole. Of a larger one, as much as fits, cut at a
    /// multiple of `granule` bytes if the bucket has room for one; all of it where buckets are lists, alone in one.
    pub fn place(
        &mut self,
        name_bytes: usize,
        total: u64,
        remaining: u64,
        granule: u64,
    ) -> Option<Place> {
        if self.pieces > 0
            && (self.pieces == MAX_PIECES || self.name_bytes + name_bytes > MAX_NAME_BYTES)
        {
            return None;
        }
        let offset = self.filled.checked_next_multiple_of(ALIGNMENT)?;
        let space = self.bucket_bytes.checked_sub(offset)?;
        let is_whole = self.kind == BucketKind::List && self.pieces == 0;
        let len = if remaining <= space || is_whole {
            remaining
        } else if self.kind == BucketKind::List || total <= self.bucket_bytes {
            return None;
        } else {
            let granules = space / granule * granule;
            match granules {
                // A granule larger than a bucket is cut wherever the bucket ends.
                0 if self.pieces == 0 => space,
                0 => return None,
                granules => self.aligned_cut(granules, granule),
            }
        };
        self.filled = offset + len;
        self.pieces += 1;
        self.name_bytes += name_bytes;
        Some(Place { offset, len })
    }

    /// A cut that is a multiple of eight bytes, as the digest wants it, where the granule allows.
    fn aligned_cut(&self, granules: u64, granule: u64) -> u64 {
        let step = if granule.is_multiple_of(8) { granule } else { granule * 8 };
        match granules / step * step {
            0 => granules / 8 * 8,
            cut => cut,
        }
    }

    /// Ends the bucket, and returns how many of its bytes are filled.
    pub fn close(&mut self) -> u64 {
        self.pieces = 0;
        self.name_bytes = 0;
        std::mem::take(&mut self.filled)
    }
}

/// The layouts of a whole update, kept for the next one, which sends only their digests.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// One layout per bucket, in order.
    pub buckets: Vec<Arc<BucketLayout>>,
}

impl Plan {
    /// A digest of all names, types, shapes and places.
    pub fn digest(&self) -> u64 {
        self.buckets.iter().fold(0, |digest, bucket| crate::digest::chain(digest, bucket.digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use proptest::prelude::*;

    fn plan(bucket: u64, sizes: &[u64], granule: u64) -> Vec<Vec<Piece>> {
        plan_of(BucketKind::Buffer, bucket, sizes, granule)
    }

    fn plan_of(kind: BucketKind, bucket: u64, sizes: &[u64], granule: u64) -> Vec<Vec<Piece>> {
        let mut planner = BucketPlanner::new(bucket).unwrap().of_kind(kind);
        let (mut buckets, mut current) = (Vec::new(), Vec::new());
        for (index, &size) in sizes.iter().enumerate() {
            let meta = ArenaArc::from(TensorMeta::new(format!("w{index}"), DType::U8, [size]));
            let mut start = 0;
            loop {
                match planner.place(meta.name.len(), size, size - start, granule) {
                    Some(Place { offset, len }) => {
                        current.push(Piece { meta: meta.clone(), start, len, offset });
                        start += len;
                        if start == size {
                            break;
                        }
                    }
                    None => {
                        assert!(!current.is_empty(), "an empty bucket was closed");
                        planner.close();
                        buckets.push(std::mem::take(&mut current));
                    }
                }
            }
        }
        buckets.push(current);
        buckets
    }

    proptest! {
        #[test]
        fn every_byte_of_every_weight_is_placed_once_and_aligned(
            sizes in proptest::collection::vec(
                prop_oneof![0_u64..9, 0_u64..3000, 0_u64..30_000], 0..40),
            bucket in 1_u64..20, granule in prop_oneof![Just(1_u64), 1_u64..900],
        ) {
            let bucket = bucket * ALIGNMENT;
            let buckets = plan(bucket, &sizes, granule);
            let mut checker = LayoutChecker::new(bucket);
            for pieces in &buckets {
                checker.check(pieces).unwrap();
                for piece in pieces {
                    let size = piece.meta.shape[0];
                    prop_assert!(size > bucket || piece.len == size, "split without need");
                    if !piece.ends(size) {
                        prop_assert!(piece.len.is_multiple_of(8));
                    }
                }
            }
            checker.finish().unwrap();
            prop_assert_eq!(buckets.iter().flatten().map(|p| p.len).sum::<u64>(), sizes.iter().sum::<u64>());
        }

        #[test]
        fn a_list_has_whole_weights_and_one_that_is_larger_than_a_bucket_is_alone_in_it(
            sizes in proptest::collection::vec(
                prop_oneof![0_u64..9, 0_u64..3000, 0_u64..30_000], 0..40),
            bucket in 1_u64..20,
        ) {
            let bucket = bucket * ALIGNMENT;
            let buckets = plan_of(BucketKind::List, bucket, &sizes, 8);
            let mut checker = LayoutChecker::new(bucket).of_kind(BucketKind::List);
            for pieces in &buckets {
                checker.check(pieces).unwrap();
                prop_assert!(pieces.iter().all(|piece| piece.len == piece.meta.shape[0]));
                let filled = pieces.last().map_or(0, |piece| piece.offset + piece.len);
                prop_assert!(filled <= bucket || pieces.len() == 1);
            }
            checker.finish().unwrap();
            prop_assert_eq!(buckets.iter().flatten().count(), sizes.len());
        }
    }

    #[test]
    fn a_list_refuses_a_part_of_a_weight_and_a_buffer_one_that_is_larger_than_it() {
        let piece = |len, offset| Piece {
            meta: TensorMeta::new("a", DType::U8, [5000]).into(),
            start: 0,
            len,
            offset,
        };
        let check = |kind, pieces: &[Piece]| LayoutChecker::new(4096).of_kind(kind).check(pieces);
        check(BucketKind::List, &[piece(5000, 0)]).unwrap();
        check(BucketKind::Buffer, &[piece(4096, 0)]).unwrap();
        let meta = TensorMeta::new("b", DType::U8, [8]).into();
        let small = Piece { meta, start: 0, len: 8, offset: 5120 };
        for (kind, pieces) in [
            (BucketKind::Buffer, vec![piece(5000, 0)]),
            (BucketKind::List, vec![piece(4096, 0)]),
            (BucketKind::List, vec![piece(5000, 256)]),
            (BucketKind::List, vec![piece(5000, 0), small]),
        ] {
            let error = check(kind, &pieces).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol, "{kind:?} {pieces:?}");
        }
    }

    #[test]
    fn a_weight_that_claims_all_bytes_there_could_be_overflows_nothing() {
        let mut planner = BucketPlanner::new(4096).unwrap().of_kind(BucketKind::List);
        let all = u64::MAX;
        assert_eq!(planner.place(1, all, all, 1), Some(Place { offset: 0, len: all }));
        assert_eq!(planner.place(1, 1, 1, 1), None);
    }

    #[test]
    fn chunks_are_cut_at_granules_where_the_bucket_has_room_for_one() {
        let buckets = plan(4096, &[10_000], 1000);
        let lens: Vec<u64> = buckets.iter().flatten().map(|piece| piece.len).collect();
        assert_eq!(lens, [4000, 4000, 2000]);
    }

    #[test]
    fn a_layout_that_lies_is_refused() {
        let piece = |name: &str, start, len, offset| Piece {
            meta: TensorMeta::new(name, DType::U8, [1000]).into(),
            start,
            len,
            offset,
        };
        for (what, pieces) in [
            ("outside the bucket", vec![piece("a", 0, 1000, 3328)]),
            ("outside the tensor", vec![piece("a", 0, 1001, 0)]),
            ("overlap", vec![piece("a", 0, 1000, 0), piece("b", 0, 1000, 512)]),
            ("unaligned", vec![piece("a", 0, 1000, 8)]),
            ("overflow", vec![piece("a", 0, 1000, u64::MAX - 255)]),
            ("gap", vec![piece("a", 8, 992, 0)]),
            ("interleaved", vec![piece("a", 0, 8, 0), piece("b", 0, 1000, 256)]),
            ("empty chunk", vec![piece("a", 0, 0, 0)]),
        ] {
            let error = LayoutChecker::new(4096).check(&pieces).expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Protocol, "{what}");
        }
        let mut open = LayoutChecker::new(4096);
        open.check(&[piece("a", 0, 8, 0)]).unwrap();
        assert!(open.finish().is_err());
    }

    #[test]
    fn a_bucket_of_no_bytes_is_refused() {
        assert_eq!(BucketPlanner::new(0).unwrap_err().kind(), ErrorKind::Config);
        assert_eq!(BucketPlanner::new(1000).unwrap_err().kind(), ErrorKind::Config);
    }

    #[test]
    fn layouts_of_other_names_shapes_or_places_have_other_digests() {
        let piece = |name: &str, shape: &[u64], offset| Piece {
            meta: TensorMeta::new(name, DType::U8, shape).into(),
            start: 0,
            len: 6,
            offset,
        };
        let digest = |piece| BucketLayout::new(vec![piece]).digest();
        let base = digest(piece("a", &[6], 0));
        assert_ne!(base, digest(piece("b", &[6], 0)));
        assert_ne!(base, digest(piece("a", &[2, 3], 0)));
        assert_ne!(base, digest(piece("a", &[6], 256)));
        assert_eq!(base, digest(piece("a", &[6], 0)));
    }
}

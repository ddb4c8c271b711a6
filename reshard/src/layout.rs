//! How a tensor is divided over ranks.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_core::{Error, ErrorKind, Rank, Result, TensorBox, TensorMeta};
use sha2::{Digest, Sha256};

use crate::search::Boxes;

/// A box, and all ranks that hold it, or want it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The part of the tensor.
    pub region: TensorBox,
    /// The ranks, ascending.
    pub ranks: Arc<[Rank]>,
}

/// How tensors of one shape are divided over ranks: boxes, each with the ranks that have it.
///
/// Tensors of the same shape that are divided in the same way share one layout, so a model of a hundred thousand tensors takes little
/// memory. Boxes of different ranks may be equal or overlap: there the ranks are replicas. Ranks without a part of the tensor are not in
/// the layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    shape: Arc<[u64]>,
    shares: Vec<Share>,
    digest: [u8; 32],
}

impl Layout {
    /// Makes a layout from the boxes of ranks, in any order. Empty boxes are ignored.
    ///
    /// # Errors
    ///
    /// `Weight`, naming the rank, if a box has other dimensions than the shape or is not within it, or if two boxes of one rank overlap.
    ///
    /// # Examples
    ///
    /// ```
    /// use engine_core::{Rank, TensorBox};
    /// use reshard::Layout;
    ///
    /// let halves = [
    ///     (Rank(0), TensorBox::new(&[0, 0], &[4, 6])?),
    ///     (Rank(1), TensorBox::new(&[4, 0], &[4, 6])?),
    /// ];
    /// assert_eq!(Layout::new(&[8, 6], halves.clone())?.shares().len(), 2);
    /// let error = Layout::new(&[7, 6], halves).unwrap_err();
    /// assert_eq!(error.report().rank, Some(Rank(1)));
    /// # Ok::<(), engine_core::Error>(())
    /// ```
    pub fn new(shape: &[u64], boxes: impl IntoIterator<Item = (Rank, TensorBox)>) -> Result<Self> {
        TensorMeta::new("shape", engine_core::DType::U8, shape).validate()?;
        let mut of_rank: BTreeMap<Rank, Vec<TensorBox>> = BTreeMap::new();
        let mut ranks: BTreeMap<Vec<(u64, u64)>, Vec<Rank>> = BTreeMap::new();
        for (rank, region) in boxes {
            if !region.fits(shape) {
                let message = format!("the box {region} is not within the shape {shape:?}");
                return Err(invalid(message).rank(rank));
            }
            if region.is_empty() {
                continue;
            }
            ranks.entry(region.clone().into()).or_default().push(rank);
            of_rank.entry(rank).or_default().push(region);
        }
        for (rank, own) in &of_rank {
            if let Some((one, other)) = Boxes::new(own.iter()).overlap() {
                let message = format!("its boxes {} and {} overlap", own[one], own[other]);
                return Err(invalid(message).rank(*rank));
            }
        }
        let shares = ranks.into_iter().map(|(region, mut ranks)| {
            ranks.sort_unstable();
            Ok(Share { region: region.try_into()?, ranks: ranks.into() })
        });
        Ok(Self::of_shares(shape.into(), shares.collect::<Result<_>>()?))
    }

    /// The whole tensor on each of the ranks.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn whole(shape: &[u64], ranks: impl IntoIterator<Item = Rank>) -> Result<Self> {
        Self::new(shape, ranks.into_iter().map(|rank| (rank, TensorBox::whole(shape))))
    }

    fn of_shares(shape: Arc<[u64]>, shares: Vec<Share>) -> Self {
        let mut hash = Sha256::new();
        let mut add = |number: u64| hash.update(number.to_le_bytes());
        add(shape.len() as u64);
        shape.iter().for_each(|&side| add(side));
        for share in &shares {
            for range in share.region.ranges() {
                add(range.start);
                add(range.end);
            }
            add(share.ranks.len() as u64);
            share.ranks.iter().for_each(|rank| add(rank.0.into()));
        }
        let digest = hash.finalize().into();
        Self { shape, shares, digest }
    }

    /// The full shape.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The boxes, sorted by where they begin, each once.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// The boxes of a rank.
    pub fn boxes_of(&self, rank: Rank) -> impl Iterator<Item = &TensorBox> {
        let has = move |share: &&Share| share.ranks.binary_search(&rank).is_ok();
        self.shares.iter().filter(has).map(|share| &share.region)
    }

    /// A digest of the shape, the boxes and their ranks.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The same parts as disjoint boxes, each with all ranks that have it.
    pub(crate) fn disjoint(&self) -> Vec<Share> {
        if Boxes::new(self.shares.iter().map(|share| &share.region)).overlap().is_none() {
            return self.shares.clone();
        }
        let mut done: Vec<Share> = Vec::new();
        for share in &self.shares {
            let mut rest = vec![share.region.clone()];
            let mut cut = Vec::new();
            for old in std::mem::take(&mut done) {
                let Some(common) = old.region.intersection(&share.region) else {
                    cut.push(old);
                    continue;
                };
                let outside = old.region.without(&common).into_iter();
                cut.extend(outside.map(|region| Share { region, ranks: old.ranks.clone() }));
                rest = rest.iter().flat_map(|part| part.without(&common)).collect();
                let mut ranks = [&*old.ranks, &*share.ranks].concat();
                ranks.sort_unstable();
                ranks.dedup();
                cut.push(Share { region: common, ranks: ranks.into() });
            }
            cut.extend(rest.into_iter().map(|region| Share { region, ranks: share.ranks.clone() }));
            done = cut;
        }
        done
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::Weight, "laying out a tensor", message)
}

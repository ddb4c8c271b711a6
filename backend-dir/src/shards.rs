//! Where the weights of buckets lie in safetensors files.
//!
//! Pure: the trainer and its rollouts compute the same from the layouts of the buckets, in order. A file has the weights
//! that begin in one bucket, and its number. A weight that is larger than a bucket goes on in its file while later buckets
//! arrive, so that every file has whole weights and no holes.

use std::ops::Range;

use engine_core::plan::Piece;
use engine_core::{Error, ErrorKind, Result, TensorMeta};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// The key of a header that is no weight.
pub(crate) const METADATA: &str = "__metadata__";

/// The longest read or write of one call, so that threads share a large weight.
const STEP: u64 = 4 << 20;

/// The files of an update, bucket by bucket.
#[derive(Debug, Default)]
pub(crate) struct Shards {
    bucket: u64,
    /// The weight that the last bucket left incomplete: its file, and where it begins there.
    open: Option<(u64, u64)>,
}

/// Where a bucket's parts lie.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    /// How the bucket's own file begins, unless no weight begins in the bucket.
    pub(crate) header: Option<Vec<u8>>,
    /// The place of each piece, in order.
    pub(crate) parts: Vec<Part>,
}

/// Where a piece of a bucket lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The number of the file.
    pub(crate) file: u64,
    /// Where in the file, in bytes.
    pub(crate) at: u64,
    /// Where in the bucket, in bytes.
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Part {
    /// Cuts the part in pieces that are read or written by one call each.
    pub(crate) fn steps(self) -> impl Iterator<Item = Self> {
        (0..self.len).step_by(STEP as usize).map(move |from| Self {
            at: self.at + from,
            offset: self.offset + from,
            len: STEP.min(self.len - from),
            ..self
        })
    }
}

/// The name of a file.
pub(crate) fn file_name(file: u64) -> String {
    format!("model-{file:05}.safetensors")
}

impl Shards {
    /// The number of the next bucket.
    pub(crate) fn bucket(&self) -> u64 {
        self.bucket
    }

    /// Passes over all buckets before this one. None of their weights goes on in a later bucket that this rank reads.
    pub(crate) fn pass_to(&mut self, bucket: u64) {
        self.bucket = bucket;
    }

    /// Places the pieces of the next bucket.
    ///
    /// # Errors
    ///
    /// `Weight` for a weight whose name the format has for something else; `Protocol` for a weight that goes on and never
    /// began.
    pub(crate) fn place(&mut self, pieces: &[Piece]) -> Result<Placed> {
        let file = self.bucket;
        self.bucket += 1;
        let mut beginning = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            if piece.start == 0 {
                beginning.push((index, &piece.meta, piece.meta.byte_len()?));
            }
        }
        // Loaders view tensors in place where they are aligned.
        beginning.sort_by_key(|(_, meta, _)| std::cmp::Reverse(meta.dtype.bytes().unwrap_or(1)));
        let mut end = 0_u64;
        let mut tensors = Vec::with_capacity(beginning.len());
        for (index, meta, len) in beginning {
            let refuse = |message: &str| {
                let error = Error::new(ErrorKind::Weight, "placing a weight in a file", message);
                error.tensor(&*meta.name)
            };
            if &*meta.name == METADATA {
                return Err(refuse("safetensors files have that name for something else"));
            }
            let start = end;
            end = end.checked_add(len).ok_or_else(|| refuse("its place overflows"))?;
            tensors.push((index, meta, start..end));
        }
        let header = header(tensors.iter().map(|(_, meta, range)| (&***meta, range.clone())))?;
        let mut places = vec![None; pieces.len()];
        for (index, _, range) in &tensors {
            places[*index] = Some((file, header.len() as u64 + range.start));
        }
        let mut parts = Vec::with_capacity(pieces.len());
        for (piece, place) in pieces.iter().zip(places) {
            let Some((file, start)) = place.or(self.open) else {
                let message = "a part of it arrived before its beginning";
                let error = Error::new(ErrorKind::Protocol, "finding a bucket's files", message);
                return Err(error.tensor(&*piece.meta.name));
            };
            let at = start + piece.start;
            parts.push(Part { file, at, offset: piece.offset, len: piece.len });
            let ends = piece.start + piece.len == piece.meta.byte_len()?;
            self.open = (!ends).then_some((file, start));
        }
        let header = (!tensors.is_empty()).then_some(header);
        Ok(Placed { header, parts })
    }
}

/// The bytes of a file before its data: the length of the header, and the header, padded so that the data is aligned.
fn header<'a>(tensors: impl Iterator<Item = (&'a TensorMeta, Range<u64>)>) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Info<'a> {
        dtype: engine_core::DType,
        shape: &'a [u64],
        data_offsets: [u64; 2],
    }
    struct Tensors<'a>(Vec<(&'a TensorMeta, Range<u64>)>);
    impl Serialize for Tensors<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut map = serializer.serialize_map(None)?;
            map.serialize_entry(METADATA, &serde_json::json!({"format": "pt"}))?;
            for (meta, range) in &self.0 {
                let data_offsets = [range.start, range.end];
                let info = Info { dtype: meta.dtype, shape: &meta.shape, data_offsets };
                map.serialize_entry(&*meta.name, &info)?;
            }
            map.end()
        }
    }
    let mut bytes = vec![0; 8];
    serde_json::to_writer(&mut bytes, &Tensors(tensors.collect())).map_err(|error| {
        let words = "its header cannot be written";
        Error::new(ErrorKind::Io, "writing a version", words).with_source(error)
    })?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    let len = (bytes.len() - 8) as u64;
    bytes[..8].copy_from_slice(&len.to_le_bytes());
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use std::collections::BTreeMap;

    use engine_core::DType;
    use engine_core::plan::BucketPlanner;
    use proptest::prelude::*;

    use super::*;

    /// The buckets that the planner makes of weights.
    fn buckets(weights: &[TensorMeta], bucket_bytes: u64) -> Vec<Vec<Piece>> {
        let mut planner = BucketPlanner::new(bucket_bytes).unwrap();
        let (mut buckets, mut pieces) = (Vec::new(), Vec::new());
        for meta in weights {
            let total = meta.byte_len().unwrap();
            let mut start = 0;
            loop {
                let remaining = total - start;
                let Some(place) = planner.place(meta.name.len(), total, remaining, 1) else {
                    planner.close();
                    buckets.push(std::mem::take(&mut pieces));
                    continue;
                };
                let (offset, len) = (place.offset, place.len);
                let meta = meta.clone().into();
                pieces.push(Piece { meta, start, len, offset });
                start += len;
                if start == total {
                    break;
                }
            }
        }
        buckets.push(pieces);
        buckets
    }

    proptest! {
        #[test]
        fn files_have_every_weight_whole_and_can_be_read_by_the_formats_own_library(
            shapes in proptest::collection::vec((0_u64..900, 0_usize..4), 0..40),
            bucket in 1_u64..5,
        ) {
            let dtypes = [DType::U8, DType::BF16, DType::F32, DType::F64];
            let weights: Vec<TensorMeta> = (0..)
                .zip(&shapes)
                .map(|(at, (len, dtype))| TensorMeta::new(format!("w{at}"), dtypes[*dtype], [*len]))
                .collect();
            let value = |meta: &TensorMeta, at: u64| {
                let number: u64 = meta.name[1..].parse().unwrap();
                (number * 31 + at) as u8
            };
            let mut files: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
            let mut shards = Shards::default();
            for pieces in buckets(&weights, bucket * 256) {
                let placed = shards.place(&pieces).unwrap();
                if let Some(header) = placed.header {
                    files.insert(shards.bucket() - 1, header);
                }
                for (piece, part) in pieces.iter().zip(placed.parts) {
                    prop_assert_eq!((part.len, part.offset), (piece.len, piece.offset));
                    let file = files.get_mut(&part.file).unwrap();
                    let end = (part.at + part.len) as usize;
                    file.resize(file.len().max(end), 0xee);
                    for at in 0..part.len {
                        file[(part.at + at) as usize] = value(&piece.meta, piece.start + at);
                    }
                }
            }
            let mut seen = 0;
            for file in files.values() {
                let read = safetensors::SafeTensors::deserialize(file).unwrap();
                for (name, view) in read.iter() {
                    let meta = weights.iter().find(|meta| &*meta.name == name).unwrap();
                    let expected: Vec<u8> =
                        (0..meta.byte_len().unwrap()).map(|at| value(meta, at)).collect();
                    prop_assert_eq!(view.data(), &expected[..]);
                    let alignment = meta.dtype.bytes().unwrap() as usize;
                    let offset = view.data().as_ptr().addr() - file.as_ptr().addr();
                    prop_assert!(offset.is_multiple_of(alignment));
                    seen += 1;
                }
            }
            prop_assert_eq!(seen, weights.len());
        }
    }

    #[test]
    fn a_weight_that_goes_on_and_never_began_is_refused_and_so_is_the_formats_own_name() {
        let piece = |name: &str, start| Piece {
            meta: TensorMeta::new(name, DType::U8, [8]).into(),
            start,
            len: 4,
            offset: 0,
        };
        let error = Shards::default().place(&[piece("w", 4)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        let error = Shards::default().place(&[piece(METADATA, 0)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Weight, "{error}");
        assert_eq!(error.report().tensor.as_deref(), Some(METADATA));
    }
}

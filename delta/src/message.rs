//! The format of changes: tensors of bytes among the weights, under names that no weight may have.
//!
//! A tensor begins with the length of its [`Head`] in four bytes, little-endian, and the head. The words of the weights that it names as
//! changed follow in order, four bytes each, little-endian. If there are any, the next tensor has the values of all these weights, and
//! nothing else: so values that a device has found travel from where they lie.
//!
//! Where some rollouts want only some parts of a version, each part has heads of its own, from its `Begin` to its `End`, and travels
//! alone. Whole weights among them belong to their parts by their names.

use engine_core::{DType, Error, ErrorKind, Result, Storage, Weight};
use serde::{Deserialize, Serialize};

/// The prefix of the names of these tensors.
const RESERVED: &str = "checkpoint-engine/delta/";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Head {
    /// Changes to the version with this number follow.
    Begin { of: Of, base: u64 },
    /// The next weights of the version that the base has as well, in the order of the new version.
    Weights { of: Of, records: Vec<Record> },
    /// All weights have come. `version` is the number of the new version. Where it is attested, the rollout computes its sums anew from
    /// memory.
    End { of: Of, version: u64, attested: bool },
}

/// What a head is about: the part of this name, or the whole version. Numbers of versions and indices of weights count within it.
pub(crate) type Of = Option<String>;

/// A weight of the base that is in the new version as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Its index in the base, or in the part of it.
    pub(crate) weight: u32,
    /// Bytes of a tile.
    pub(crate) tile: u32,
    /// Bytes of its values; 0 if nothing changed, and then it has no words.
    pub(crate) len: u64,
}

/// Whether a tensor of this name carries changes.
pub(crate) fn is_reserved(name: &str) -> bool {
    name.starts_with(RESERVED)
}

/// Refuses a weight whose name is reserved for changes.
pub(crate) fn refuse_reserved(weight: &Weight) -> Result<()> {
    if !is_reserved(weight.name()) {
        return Ok(());
    }
    let message = format!("names that begin with `{RESERVED}` are those of changes");
    Err(Error::new(ErrorKind::Weight, COMPARING, message).tensor(weight.name()))
}

pub(crate) const COMPARING: &str = "comparing weights with those sent last";
pub(crate) const APPLYING: &str = "applying changes";
pub(crate) const ATTESTING: &str = "attesting a version";
pub(crate) const SENDING_A_PART: &str = "sending a part of a version";

/// The tensor of a number: the name that it travels under.
fn name(number: u64) -> String {
    format!("{RESERVED}{number}")
}

/// Makes a tensor of a head and words.
///
/// # Errors
///
/// `Protocol` if the head cannot be written.
pub(crate) fn tensor<'a>(
    number: u64,
    head: &Head,
    words: impl IntoIterator<Item = &'a u32>,
) -> Result<Weight> {
    let mut bytes = vec![0; 4];
    bytes = postcard::to_extend(head, bytes).map_err(|error| {
        Error::new(ErrorKind::Protocol, COMPARING, error.to_string()).with_source(error)
    })?;
    let len = bytes.len() - 4;
    bytes[..4].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(words.into_iter().flat_map(|word| word.to_le_bytes()));
    values(number, bytes.into())
}

/// Makes a tensor of values.
///
/// # Errors
///
/// Those of [`Weight::new`].
pub(crate) fn values(number: u64, values: Storage) -> Result<Weight> {
    Weight::new(name(number), DType::U8, [values.len()], values)
}

/// Splits a tensor into its head and its words.
///
/// # Errors
///
/// `Protocol` if the bytes are not such a tensor.
pub(crate) fn read(bytes: &[u8]) -> Result<(Head, Vec<u32>)> {
    let malformed = |words: String| Error::new(ErrorKind::Protocol, APPLYING, words);
    let Some((len, rest)) = bytes.split_first_chunk() else {
        return Err(malformed(format!("{} bytes are no changes", bytes.len())));
    };
    let len = u32::from_le_bytes(*len) as usize;
    let Some((head, rest)) = rest.split_at_checked(len) else {
        return Err(malformed(format!("a head of {len} bytes in {}", rest.len())));
    };
    let (words, []) = rest.as_chunks::<4>() else {
        return Err(malformed(format!("{} bytes of words", rest.len())));
    };
    let words = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    match postcard::take_from_bytes(head) {
        Ok((head, [])) => Ok((head, words)),
        Ok((_, rest)) => Err(malformed(format!("{} bytes too many in a head", rest.len()))),
        Err(error) => Err(malformed(error.to_string()).with_source(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::control::PROTOCOL_VERSION;
    use proptest::prelude::*;

    #[test]
    fn a_head_and_its_words_survive_their_way() {
        let record = |weight, len| Record { weight, tile: 64, len };
        let records = vec![record(3, 2), record(7, 0), record(1 << 20, 3)];
        let head = Head::Weights { of: Some("draft".to_owned()), records };
        let words = [1, u32::MAX, 7];
        let weight = tensor(5, &head, &words).expect("a tensor");
        assert!(is_reserved(weight.name()));
        let bytes = weight.contiguous_bytes().expect("bytes");
        assert_eq!(read(bytes).expect("a head"), (head, words.to_vec()));
        for cut in [0, 3, 4, 6, bytes.len() - 1] {
            let error = read(&bytes[..cut]).expect_err("a part of it");
            assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        }
    }

    /// Ranks of two builds must not decode each other's changes as different ones. Whoever changes the encoding has to change
    /// `PROTOCOL_VERSION` too.
    #[test]
    fn heads_are_encoded_as_this_protocol_version_encodes_them() {
        let encoded = |head| {
            let tensor = tensor(0, &head, &[]).expect("a tensor");
            tensor.contiguous_bytes().expect("bytes").to_vec()
        };
        assert_eq!(PROTOCOL_VERSION, 14);
        assert_eq!(encoded(Head::Begin { of: None, base: 300 }), [4, 0, 0, 0, 0, 0, 0xac, 2]);
        let of = Some("d".to_owned());
        assert_eq!(encoded(Head::Begin { of, base: 3 }), [5, 0, 0, 0, 0, 1, 1, b'd', 3]);
        let records = vec![Record { weight: 1, tile: 64, len: 3 }];
        assert_eq!(encoded(Head::Weights { of: None, records }), [6, 0, 0, 0, 1, 0, 1, 1, 64, 3]);
        let end = Head::End { of: None, version: 5, attested: true };
        assert_eq!(encoded(end), [4, 0, 0, 0, 2, 0, 5, 1]);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_an_error_or_a_head_but_never_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..100), len in 0..100_u32,
        ) {
            let mut bytes = bytes;
            drop(read(&bytes));
            bytes.splice(0..0, len.to_le_bytes());
            drop(read(&bytes));
        }
    }
}

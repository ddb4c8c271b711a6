//! The header of a safetensors file.
//!
//! The format: eight bytes with the length of the header, little-endian; the header, a JSON object
//! from tensor names to `{dtype, shape, data_offsets: [begin, end]}` and optionally `__metadata__`;
//! then the data, which the tensors cover without holes or overlaps.
//!
//! The entries are parsed with the types of the `safetensors` crate. The checks are made here: the
//! crate's own lose a name that is used twice, do not say which tensor lies, and add offsets that
//! come from the file without a check.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::Path;

use engine_core::{DType, TensorMeta};
use safetensors::tensor::TensorInfo;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::CheckpointError;

/// The longest header that is read or written, as in the reference implementation.
pub(super) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// How a file begins that stands for one in Git's large file storage.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

const METADATA: &str = "__metadata__";

/// A header whose tensors are known to lie within the file.
#[derive(Debug)]
pub(super) struct Header {
    /// Free-form notes, such as `format: pt`.
    pub(super) metadata: BTreeMap<String, String>,
    /// Tensors in the order of their data, each with its range of bytes of the file.
    pub(super) tensors: Vec<(TensorMeta, Range<usize>)>,
}

impl Header {
    /// Reads and checks the header at the start of a file's bytes.
    pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Self, CheckpointError> {
        let not = |reason: String| CheckpointError::NotSafetensors { path: path.into(), reason };
        let Some((length, rest)) = file.split_first_chunk::<8>() else {
            return Err(not(format!("{} bytes; the length of the header takes 8", file.len())));
        };
        let length = u64::from_le_bytes(*length);
        if file.starts_with(LFS_POINTER) {
            return Err(not("it is a Git LFS pointer: the file itself was not downloaded; \
                 run `git lfs pull` in its repository"
                .into()));
        }
        if length > MAX_HEADER_BYTES {
            return Err(not(format!(
                "its first 8 bytes announce a header of {length} bytes; \
                 at most {MAX_HEADER_BYTES} are allowed"
            )));
        }
        if length > rest.len() as u64 {
            return Err(CheckpointError::Truncated {
                path: path.into(),
                expected: 8 + length,
                len: file.len() as u64,
            });
        }
        let (json, data) = rest.split_at(length as usize);
        if json.first() != Some(&b'{') {
            return Err(not("its header is not a JSON object".into()));
        }
        let Entries(entries) =
            serde_json::from_slice::<Entries<serde_json::Value>>(json).map_err(|error| {
                CheckpointError::header(path, format!("it is not valid JSON: {error}"))
            })?;
        let data_start = file.len() - data.len();
        Self::check(path, entries, data_start, data.len())
    }

    fn check(
        path: &Path,
        entries: Vec<(String, serde_json::Value)>,
        data_start: usize,
        data_len: usize,
    ) -> Result<Self, CheckpointError> {
        let mut metadata = BTreeMap::new();
        let mut tensors = Vec::with_capacity(entries.len());
        let mut names = HashSet::with_capacity(entries.len());
        for (name, value) in entries {
            if !names.insert(name.clone()) {
                return Err(CheckpointError::Duplicate {
                    tensor: name,
                    first: path.into(),
                    second: path.into(),
                });
            }
            if name == METADATA {
                // The reference implementation takes `null` for none.
                let given: Option<_> = serde_json::from_value(value).map_err(|error| {
                    CheckpointError::header(path, format!("its {METADATA} is invalid: {error}"))
                })?;
                metadata = given.unwrap_or_default();
                continue;
            }
            let info: TensorInfo = serde_json::from_value(value)
                .map_err(|error| CheckpointError::tensor(path, &name, error.to_string()))?;
            let dtype = DType::try_from(info.dtype).map_err(|error| {
                CheckpointError::tensor(path, &name, error.report().message.clone())
            })?;
            let shape: Vec<u64> = info.shape.iter().map(|&dimension| dimension as u64).collect();
            let meta = TensorMeta::new(name, dtype, shape);
            let size = meta.validate().map_err(|error| {
                CheckpointError::tensor(path, &meta.name, error.report().message.clone())
            })?;
            let (begin, end) = info.data_offsets;
            if end.checked_sub(begin).map(|len| len as u64) != Some(size) {
                return Err(CheckpointError::tensor(
                    path,
                    &meta.name,
                    format!(
                        "its offsets are {begin} to {end}, but {dtype} {:?} takes {size} bytes",
                        meta.shape
                    ),
                ));
            }
            tensors.push((meta, begin..end));
        }
        // Empty tensors sort before the tensor that begins where they are.
        tensors.sort_by_key(|(_, range)| (range.start, range.end));
        let mut at = 0;
        for (meta, range) in &tensors {
            if range.start != at {
                let what = if range.start < at { "overlaps" } else { "leaves a hole after" };
                return Err(CheckpointError::tensor(
                    path,
                    &meta.name,
                    format!(
                        "it begins at {} and so {what} the tensors before it, which end at {at}",
                        range.start
                    ),
                ));
            }
            at = range.end;
        }
        if at > data_len {
            return Err(CheckpointError::Truncated {
                path: path.into(),
                expected: (data_start as u64).saturating_add(at as u64),
                len: (data_start + data_len) as u64,
            });
        }
        if at < data_len {
            return Err(CheckpointError::header(
                path,
                format!("{} bytes at the end belong to no tensor", data_len - at),
            ));
        }
        for (_, range) in &mut tensors {
            // Cannot overflow: every range ends within the data.
            *range = range.start + data_start..range.end + data_start;
        }
        Ok(Self { metadata, tensors })
    }
}

/// The bytes of a file before its data: the length, and the header padded to a multiple of 8, so
/// that the first tensor is aligned.
pub(super) fn serialize(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    tensors: &[(&TensorMeta, Range<u64>)],
) -> Result<Vec<u8>, CheckpointError> {
    struct Fields<'a>(&'a BTreeMap<String, String>, &'a [(&'a TensorMeta, Range<u64>)]);

    #[derive(Serialize)]
    struct Info<'a> {
        dtype: DType,
        shape: &'a [u64],
        data_offsets: [u64; 2],
    }

    impl Serialize for Fields<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            use serde::ser::SerializeMap;
            let mut map = serializer.serialize_map(None)?;
            if !self.0.is_empty() {
                map.serialize_entry(METADATA, self.0)?;
            }
            for (meta, range) in self.1 {
                let info = Info {
                    dtype: meta.dtype,
                    shape: &meta.shape,
                    data_offsets: [range.start, range.end],
                };
                map.serialize_entry(&*meta.name, &info)?;
            }
            map.end()
        }
    }

    let mut bytes = vec![0; 8];
    serde_json::to_writer(&mut bytes, &Fields(metadata, tensors))
        .map_err(|error| CheckpointError::header(path, error.to_string()))?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    let length = (bytes.len() - 8) as u64;
    if length > MAX_HEADER_BYTES {
        return Err(CheckpointError::header(
            path,
            format!("{length} bytes for {} tensors; readers refuse it", tensors.len()),
        ));
    }
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// A JSON object as its entries, in order, names that occur twice included.
pub(super) struct Entries<V>(pub(super) Vec<(String, V)>);

impl<V> Default for Entries<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, V: DeserializeOwned> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect<V>(PhantomData<V>);

        impl<'de, V: DeserializeOwned> Visitor<'de> for Collect<V> {
            type Value = Entries<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Collect(PhantomData))
    }
}

//! The format of a version's folder: its names, its index, and how a changed tensor is written.
//!
//! It is that of slime's disk deltas, so that its readers and writers can be at the other side:
//!
//! ```text
//! weight_v000007/
//!   model.safetensors.index.json  metadata {version, base_version, delta_encoding, …}, weight_map
//!   model-00000.safetensors       a tensor is the zstd frame of what changed; __metadata__ {name: digest}
//!   …
//! ```
//!
//! Without `delta_encoding` a version is a whole checkpoint, which any loader of Hugging Face's folders takes. The index of
//! one that was written here has the digests of its tensors as well (`checksums`).

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

use engine_core::{Error, ErrorKind, Result, Version};
use serde::{Deserialize, Serialize};

/// The index of a version. It is written last: a folder without one is no version.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The only file of a version that has no index.
pub(crate) const SINGLE: &str = "model.safetensors";

/// An index of a million tensors takes about 100 MB.
pub(crate) const MAX_INDEX_BYTES: u64 = 256 << 20;

/// zstd's fastest ordinary level: what changed is mostly zeros, and every level finds those.
const LEVEL: i32 = 1;

/// What a reader does, in errors.
pub(crate) const READING: &str = "reading a version";

/// How a tensor's change is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Encoding {
    /// The exclusive or of old and new bytes. It has to be applied exactly once: applied twice, it gives the old bytes again.
    #[default]
    Xor,
    /// The positions of bytes that changed, and their new values. Applying it again does no harm. Of tensors below 4 GiB.
    Overwrite,
}

/// The digest of a tensor's new bytes that a version has beside its change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Checksum {
    /// XXH3, 128 bits.
    #[default]
    #[serde(rename = "xxh3-128")]
    Xxh3,
    /// BLAKE3, 256 bits: for storage that others may write to.
    #[serde(rename = "blake3")]
    Blake3,
    /// Adler-32: for readers that have no other.
    #[serde(rename = "adler32")]
    Adler32,
}

impl Checksum {
    /// The digest of these bytes, in hexadecimal.
    pub(crate) fn of(self, bytes: &[u8]) -> String {
        let mut hasher = Hasher::new(self);
        hasher.update(bytes);
        hasher.hex()
    }
}

/// A digest of bytes that come one after the other.
pub(crate) enum Hasher {
    Xxh3(Box<twox_hash::XxHash3_128>),
    Blake3(Box<blake3::Hasher>),
    Adler32(adler2::Adler32),
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hasher").finish_non_exhaustive()
    }
}

impl Hasher {
    pub(crate) fn new(checksum: Checksum) -> Self {
        match checksum {
            Checksum::Xxh3 => Self::Xxh3(Box::default()),
            Checksum::Blake3 => Self::Blake3(Box::default()),
            Checksum::Adler32 => Self::Adler32(adler2::Adler32::new()),
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Xxh3(hasher) => hasher.write(bytes),
            Self::Blake3(hasher) => drop(hasher.update(bytes)),
            Self::Adler32(hasher) => hasher.write_slice(bytes),
        }
    }

    /// The digest so far, in hexadecimal.
    pub(crate) fn hex(&self) -> String {
        match self {
            Self::Xxh3(hasher) => format!("{:032x}", hasher.finish_128()),
            Self::Blake3(hasher) => hasher.finalize().to_hex().to_string(),
            Self::Adler32(hasher) => format!("{:08x}", hasher.checksum()),
        }
    }
}

/// The name of a version's folder.
pub(crate) fn folder_name(version: Version) -> String {
    format!("weight_v{:06}", version.0)
}

/// The version whose folder has this name.
pub(crate) fn version_of(name: &str) -> Option<Version> {
    let digits = name.strip_prefix("weight_v")?;
    let version = Version(digits.parse().ok()?);
    // No other spelling: `+7` and `7` are numbers as well.
    (folder_name(version) == name).then_some(version)
}

/// What the index of a version says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Index {
    /// The version before, and how this one changes it; `None` for a whole checkpoint.
    pub(crate) delta: Option<Delta>,
    /// The version that it is, where it says so.
    pub(crate) version: Option<Version>,
    /// The kind of its digests, if it has any.
    pub(crate) checksum: Option<Checksum>,
    /// The digests of the tensors of a whole checkpoint, by name, if it has any.
    pub(crate) checksums: BTreeMap<String, String>,
    /// The files that have anything, each once, in order.
    pub(crate) files: Vec<String>,
}

/// What a version changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Delta {
    pub(crate) base: Version,
    pub(crate) encoding: Encoding,
}

#[derive(Serialize, Deserialize)]
struct Json {
    #[serde(default)]
    metadata: Metadata,
    weight_map: BTreeMap<String, String>,
}

#[derive(Default, Serialize, Deserialize)]
struct Metadata {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base_version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    delta_encoding: Option<Encoding>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    compression_format: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checksum_format: Option<Checksum>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    total_size: Option<u64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    checksums: BTreeMap<String, String>,
}

fn number(version: Version) -> String {
    format!("{:06}", version.0)
}

/// What an index is made of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Contents {
    pub(crate) delta: Option<Delta>,
    pub(crate) checksum: Checksum,
    /// The digests of a whole checkpoint's tensors. Those of changes are in their files.
    pub(crate) checksums: BTreeMap<String, String>,
    /// The file of each tensor.
    pub(crate) weight_map: BTreeMap<String, String>,
    /// Bytes of all tensors.
    pub(crate) total_size: u64,
}

impl Contents {
    /// The text of a version's index.
    pub(crate) fn text(self, version: Version) -> Result<Vec<u8>> {
        let Self { delta, checksum, checksums, weight_map, total_size } = self;
        let metadata = Metadata {
            version: Some(number(version)),
            base_version: delta.map(|delta| number(delta.base)),
            delta_encoding: delta.map(|delta| delta.encoding),
            compression_format: delta.map(|_| "zstd".to_owned()),
            checksum_format: Some(checksum),
            total_size: Some(total_size),
            checksums,
        };
        serde_json::to_vec_pretty(&Json { metadata, weight_map }).map_err(|error| {
            Error::new(ErrorKind::Io, "writing a version", "its index could not be written")
                .with_source(error)
        })
    }
}

impl Index {
    /// Reads the text of the index of a version; of one that only itself knows, without `version`.
    ///
    /// # Errors
    ///
    /// `Protocol`: text that is none, of another version, of a format that is not known, or with files elsewhere.
    pub(crate) fn read(text: &[u8], version: Option<Version>) -> Result<Self> {
        let wrong = |message: String| {
            let error = Error::new(ErrorKind::Protocol, READING, message);
            match version {
                Some(version) => error.version(version),
                None => error,
            }
        };
        let Json { metadata, weight_map } =
            serde_json::from_slice(text).map_err(|error| wrong(format!("{INDEX}: {error}")))?;
        let parsed = |what: &str, text: &str| {
            let version = text.parse().map(Version);
            version.map_err(|_| wrong(format!("{INDEX}: {what} is `{text}`, which is no number")))
        };
        let said =
            metadata.version.as_deref().map(|text| parsed("its version", text)).transpose()?;
        if let (Some(said), Some(version)) = (said, version)
            && said != version
        {
            return Err(wrong(format!("{INDEX} is of version {said}")));
        }
        let delta = match metadata.delta_encoding {
            None => None,
            Some(encoding) => {
                let compression = metadata.compression_format.as_deref().unwrap_or("none");
                if compression != "zstd" {
                    return Err(wrong(format!("compressed by `{compression}`; zstd is known")));
                }
                let Some(base) = &metadata.base_version else {
                    return Err(wrong(format!("{INDEX} has changes and no base_version")));
                };
                let base = parsed("its base_version", base)?;
                if version.or(said).is_some_and(|version| base >= version) {
                    return Err(wrong(format!("it is based on version {base}, which comes later")));
                }
                if metadata.checksum_format.is_none() {
                    return Err(wrong(format!("{INDEX} has changes and no checksum_format")));
                }
                Some(Delta { base, encoding })
            }
        };
        let mut files: Vec<String> = weight_map.into_values().collect();
        files.sort_unstable();
        files.dedup();
        let elsewhere = |file: &&String| file.contains(['/', '\\', '\0']) || file.starts_with('.');
        if let Some(file) = files.iter().find(elsewhere) {
            return Err(wrong(format!("{INDEX} names `{file}`, which is not within the version")));
        }
        let Metadata { checksum_format, checksums, .. } = metadata;
        Ok(Self { delta, version: said, checksum: checksum_format, checksums, files })
    }
}

/// What is wrong with a tensor's change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) String);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn broken(error: impl fmt::Display) -> Broken {
    Broken(error.to_string())
}

/// A tensor's change from `old` to `new`, which are equally long, and how many bytes it changes; `None` if they are equal.
///
/// # Errors
///
/// For positions that do not fit four bytes.
pub(crate) fn change(
    encoding: Encoding,
    old: &[u8],
    new: &[u8],
) -> std::result::Result<Option<(Vec<u8>, u64)>, Broken> {
    debug_assert_eq!(old.len(), new.len());
    let pairs = || old.iter().zip(new);
    let changed = pairs().filter(|(old, new)| old != new).count();
    if changed == 0 {
        return Ok(None);
    }
    let raw: Vec<u8> = match encoding {
        Encoding::Xor => pairs().map(|(old, new)| old ^ new).collect(),
        Encoding::Overwrite => {
            if u32::try_from(new.len()).is_err() {
                let message = "4 GiB or more: its positions do not fit `overwrite`, use `xor`";
                return Err(Broken(message.into()));
            }
            let mut raw = Vec::with_capacity(4 + 5 * changed);
            raw.extend((changed as u32).to_le_bytes());
            let positions = (0_u32..).zip(pairs()).filter(|(_, (old, new))| old != new);
            positions.clone().for_each(|(at, _)| raw.extend(at.to_le_bytes()));
            raw.extend(positions.map(|(_, (_, new))| *new));
            raw
        }
    };
    // In one call, so that the frame begins with its size: readers allocate that.
    Ok(Some((zstd::bulk::compress(&raw, LEVEL).map_err(broken)?, changed as u64)))
}

/// Applies a change to a tensor's bytes. Where it fails, they are neither old nor new.
///
/// Takes memory of the tensor's size at most, whatever the change says.
///
/// # Errors
///
/// If it is not a change of so many bytes.
pub(crate) fn apply(
    encoding: Encoding,
    bytes: &mut [u8],
    change: &[u8],
) -> std::result::Result<(), Broken> {
    let mut decoder = zstd::Decoder::new(change).map_err(broken)?;
    match encoding {
        Encoding::Xor => {
            let mut piece = vec![0; bytes.len().min(1 << 20)];
            for part in bytes.chunks_mut(1 << 20) {
                let piece = &mut piece[..part.len()];
                decoder.read_exact(piece).map_err(broken)?;
                part.iter_mut().zip(piece).for_each(|(byte, change)| *byte ^= *change);
            }
        }
        Encoding::Overwrite => {
            let mut count = [0; 4];
            decoder.read_exact(&mut count).map_err(broken)?;
            let count = u32::from_le_bytes(count) as usize;
            if count > bytes.len() {
                let message = format!("changes {count} bytes of {}", bytes.len());
                return Err(Broken(message));
            }
            let mut positions = vec![0; 4 * count];
            decoder.read_exact(&mut positions).map_err(broken)?;
            let mut values = vec![0; count];
            decoder.read_exact(&mut values).map_err(broken)?;
            let (positions, _) = positions.as_chunks::<4>();
            for (position, value) in positions.iter().zip(values) {
                let at = u32::from_le_bytes(*position) as usize;
                let Some(byte) = bytes.get_mut(at) else {
                    return Err(Broken(format!("changes byte {at} of {}", bytes.len())));
                };
                *byte = value;
            }
        }
    }
    let rest = decoder.read(&mut [0]).map_err(broken)?;
    if rest > 0 { Err(Broken("longer than the tensor".into())) } else { Ok(()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn both() -> impl Strategy<Value = Encoding> {
        prop_oneof![Just(Encoding::Xor), Just(Encoding::Overwrite)]
    }

    proptest! {
        #[test]
        fn a_change_makes_the_new_bytes_of_the_old_ones(
            encoding in both(),
            old in proptest::collection::vec(0_u8..4, 0..3000),
            seeds in proptest::collection::vec((0_usize..3000, 0_u8..4), 0..40),
        ) {
            let mut new = old.clone();
            for (at, value) in seeds {
                if let Some(byte) = new.get_mut(at) {
                    *byte = value;
                }
            }
            let differ = old.iter().zip(&new).filter(|(old, new)| old != new).count() as u64;
            match change(encoding, &old, &new).unwrap() {
                None => prop_assert_eq!(differ, 0),
                Some((bytes, changed)) => {
                    prop_assert_eq!(changed, differ);
                    let size = zstd::zstd_safe::get_frame_content_size(&bytes);
                    let expected = match encoding {
                        Encoding::Xor => old.len() as u64,
                        Encoding::Overwrite => 4 + 5 * differ,
                    };
                    prop_assert_eq!(size.ok().flatten(), Some(expected));
                    let mut applied = old;
                    apply(encoding, &mut applied, &bytes).unwrap();
                    prop_assert_eq!(applied, new);
                }
            }
        }

        #[test]
        fn no_bytes_make_it_panic_or_write_beyond_the_tensor(
            encoding in both(),
            raw in proptest::collection::vec(any::<u8>(), 0..64),
            len in 0_usize..32,
            compressed in any::<bool>(),
        ) {
            let text = if compressed { zstd::encode_all(&*raw, LEVEL).unwrap() } else { raw.clone() };
            let done = apply(encoding, &mut vec![0; len], &text);
            if compressed && encoding == Encoding::Xor {
                prop_assert_eq!(done.is_ok(), raw.len() == len);
            }
        }

        #[test]
        fn an_index_is_read_as_it_was_written(
            version in 1_u64..2_000_000,
            back in proptest::option::of(1_u64..50),
            names in proptest::collection::btree_map("[a-z.]{1,8}", "model-[0-9]{5}", 0..6),
        ) {
            let delta = back.map(|back| Delta {
                base: Version(version.saturating_sub(back)),
                encoding: Encoding::Overwrite,
            });
            let checksum = Checksum::Blake3;
            let weight_map = names.clone();
            let contents = Contents { delta, checksum, weight_map, ..Contents::default() };
            let text = contents.text(Version(version)).unwrap();
            let index = Index::read(&text, Some(Version(version))).unwrap();
            prop_assert_eq!(index.version, Some(Version(version)));
            prop_assert_eq!(index.delta, delta);
            prop_assert_eq!(index.checksum, Some(Checksum::Blake3));
            let mut files: Vec<String> = names.into_values().collect();
            files.sort_unstable();
            files.dedup();
            prop_assert_eq!(index.files, files);
        }
    }

    #[test]
    fn what_an_index_cannot_be_is_refused_in_words() {
        let refused = |metadata: &str, file: &str| {
            let text = format!(r#"{{"metadata": {metadata}, "weight_map": {{"w": "{file}"}}}}"#);
            Index::read(text.as_bytes(), Some(Version(7))).unwrap_err().to_string()
        };
        let file = "model.safetensors";
        let delta = r#""delta_encoding": "xor", "compression_format": "zstd""#;
        for (metadata, file, words) in [
            ("{}", "../other", "not within the version"),
            ("{}", ".hidden", "not within the version"),
            (r#"{"version": "000008"}"#, file, "is of version 8"),
            (r#"{"version": "new"}"#, file, "which is no number"),
            (r#"{"delta_encoding": "add"}"#, file, "add"),
            (r#"{"delta_encoding": "xor", "compression_format": "lz4"}"#, file, "lz4"),
            (&format!("{{{delta}}}"), file, "no base_version"),
            (&format!(r#"{{{delta}, "base_version": "7"}}"#), file, "comes later"),
            (&format!(r#"{{{delta}, "base_version": "6"}}"#), file, "no checksum_format"),
        ] {
            let error = refused(metadata, file);
            assert!(error.contains(words), "{metadata}: {error}");
        }
        assert!(Index::read(b"{", Some(Version(7))).is_err());
    }

    #[test]
    fn a_folder_is_a_version_by_its_one_spelling() {
        assert_eq!(folder_name(Version(7)), "weight_v000007");
        for (name, version) in [
            ("weight_v000007", Some(7)),
            ("weight_v1234567", Some(1_234_567)),
            ("weight_v7", None),
            ("weight_v+00007", None),
            ("weight_v0000007", None),
            (".weight_v000007", None),
            ("weight_v", None),
        ] {
            assert_eq!(version_of(name), version.map(Version), "{name}");
        }
    }

    #[test]
    fn digests_are_those_of_their_definitions() {
        // The first from xxHash's own test of an empty input, the others from RFC 1950's definition and BLAKE3's paper.
        assert_eq!(Checksum::Xxh3.of(b""), "99aa06d3014798d86001c324468d497f");
        assert_eq!(Checksum::Adler32.of(b"Wikipedia"), "11e60398");
        assert!(Checksum::Blake3.of(b"").starts_with("af1349b9f5f9a1a6a0404dea36dcc949"));
    }
}

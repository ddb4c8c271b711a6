//! Reads the versions of a folder. A trainer of this project or of slime has written them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use engine_core::{Error, ErrorKind, Result, TensorMeta, Version, Weight};

use crate::folder::{read_index, versions};
use crate::format::{self, Checksum, Encoding, READING, apply};
use crate::leases::Lease;
use crate::tensors::Tensors;

/// The versions of a folder, read without a connection to who writes them.
///
/// The writer is a trainer with the backend `dir`, or one of slime, whose disk deltas have the same format.
///
/// # Examples
///
/// ```no_run
/// # fn main() -> engine_core::Result<()> {
/// let versions = backend_dir::Versions::new("/mnt/weights");
/// if let Some(newest) = versions.newest()? {
///     for weight in versions.open(newest)?.weights() {
///         println!("{:?}", weight?.meta());
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Versions {
    path: PathBuf,
    base: Option<PathBuf>,
}

impl Versions {
    /// The versions of this folder, which need not have any yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), base: None }
    }

    /// With the checkpoint that version 0 is: the folder that trainer and engines of slime start from.
    #[must_use]
    pub fn with_base(self, checkpoint: impl Into<PathBuf>) -> Self {
        Self { base: Some(checkpoint.into()), ..self }
    }

    /// All complete versions, in order.
    ///
    /// # Errors
    ///
    /// `Io`.
    pub fn list(&self) -> Result<Vec<Version>> {
        versions(&self.path)
    }

    /// The newest complete version; `None` if there is none yet.
    ///
    /// # Errors
    ///
    /// `Io`.
    pub fn newest(&self) -> Result<Option<Version>> {
        Ok(self.list()?.pop())
    }

    /// Opens a version: the last whole one up to it, and what has changed since. Its files stay as long as the result lives, also
    /// if the trainer does not keep the version any longer (where this process may write to the folder, else a version that is
    /// removed fails as it is read).
    ///
    /// # Errors
    ///
    /// `State` if the folder does not have the version, or one that it is based on; `Io`, `Protocol` for files that cannot be
    /// read.
    pub fn open(&self, version: Version) -> Result<VersionReader> {
        let lease = Lease::take(&self.path, version);
        let (mut changes, mut at) = (Vec::new(), version);
        let (whole, checksums, checksum) = loop {
            let folder = self.folder(at);
            let Some(folder) = folder else { return Err(self.missing(version, at)) };
            let named = (at.0 > 0).then_some(at);
            let index = read_index(&folder, named).map_err(|error| error.version(at))?;
            let tensors =
                Tensors::open(&folder, &index.files).map_err(|error| error.version(at))?;
            match index.delta {
                None => break (tensors, index.checksums, index.checksum),
                Some(delta) => {
                    // The index of changes has one.
                    let checksum = index.checksum.unwrap_or_default();
                    changes.push(Change {
                        tensors,
                        encoding: delta.encoding,
                        checksum,
                        version: at,
                    });
                    at = delta.base;
                }
            }
        };
        changes.reverse();
        for change in &changes {
            if let Some(meta) = change.tensors.metas().find(|meta| whole.meta(&meta.name).is_none())
            {
                let message = "it changes a tensor that its base does not have";
                let error = Error::new(ErrorKind::Protocol, READING, message);
                return Err(error.tensor(&*meta.name).version(change.version));
            }
        }
        let checksum = checksum.unwrap_or_default();
        Ok(VersionReader(Arc::new(Read { version, whole, checksums, checksum, changes, lease })))
    }

    /// The folder of a version.
    fn folder(&self, version: Version) -> Option<PathBuf> {
        if version.0 == 0 {
            return self.base.clone();
        }
        let folder = self.path.join(format::folder_name(version));
        folder.exists().then_some(folder)
    }

    fn missing(&self, version: Version, at: Version) -> Error {
        let path = self.path.display();
        let message = match at {
            Version(0) => format!(
                "{path} has changes only, down to version 0: give the checkpoint that the trainer started from as the base"
            ),
            _ if at == version => format!("{path} has no such version"),
            _ => format!("it is based on version {at}, which {path} does not have"),
        };
        Error::new(ErrorKind::State, READING, message).version(version)
    }
}

/// A version that is read, tensor by tensor.
#[derive(Clone, Debug)]
pub struct VersionReader(Arc<Read>);

#[derive(Debug)]
struct Read {
    version: Version,
    whole: Tensors,
    /// Digests of the whole version's tensors, if it has any.
    checksums: std::collections::BTreeMap<String, String>,
    checksum: Checksum,
    /// What has changed since, in order.
    changes: Vec<Change>,
    lease: Option<Lease>,
}

#[derive(Debug)]
struct Change {
    tensors: Tensors,
    encoding: Encoding,
    checksum: Checksum,
    version: Version,
}

impl VersionReader {
    /// Its number.
    pub fn version(&self) -> Version {
        self.0.version
    }

    /// How many versions have changes that are applied.
    pub fn changes(&self) -> usize {
        self.0.changes.len()
    }

    /// The descriptions of its tensors, in the order of the files.
    pub fn metas(&self) -> impl ExactSizeIterator<Item = &TensorMeta> {
        self.0.whole.metas()
    }

    /// The bytes of a tensor, with what has changed, verified.
    ///
    /// # Errors
    ///
    /// `State` if there is no such tensor; `Digest` if its bytes are not those that were written; `Protocol` for changes that
    /// are none; `Io`; `Resource`.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let read = &*self.0;
        if let Some(lease) = &read.lease {
            lease.renew();
        }
        let refuse = |kind, message: String, version: Version| {
            Error::new(kind, READING, message).tensor(name).version(version)
        };
        let Some(mut bytes) = read.whole.read(name)? else {
            return Err(refuse(ErrorKind::State, "there is no such tensor".into(), read.version));
        };
        let mut expected = read.checksums.get(name).map(|digest| (read.checksum, digest));
        for change in &read.changes {
            let Some(changed) = change.tensors.read(name)? else { continue };
            // The digest of what is changed covers all of it, so that of its base is not needed.
            apply(change.encoding, &mut bytes, &changed).map_err(|broken| {
                refuse(ErrorKind::Protocol, broken.to_string(), change.version)
            })?;
            let Some(digest) = change.tensors.metadata.get(name) else {
                let message = "its change has no digest";
                return Err(refuse(ErrorKind::Protocol, message.into(), change.version));
            };
            expected = Some((change.checksum, digest));
        }
        if let Some((checksum, expected)) = expected {
            let here = checksum.of(&bytes);
            if here != *expected {
                let message = format!("its digest is {here}, the version says {expected}");
                return Err(refuse(ErrorKind::Digest, message, read.version));
            }
        }
        Ok(bytes)
    }

    /// All tensors, read one after the other, as a trainer sends them.
    pub fn weights(&self) -> impl Iterator<Item = Result<Weight>> + Send + 'static {
        let metas: Vec<TensorMeta> = self.metas().cloned().collect();
        let this = self.clone();
        metas.into_iter().map(move |meta| {
            let bytes = this.bytes(&meta.name)?;
            Weight::from_meta(meta, Bytes::from(bytes))
        })
    }
}

/// Opens a folder that has a whole checkpoint.
///
/// # Errors
///
/// Those of [`Versions::open`].
pub(crate) fn open_whole(folder: &Path) -> Result<Tensors> {
    Tensors::open(folder, &read_index(folder, None)?.files)
}

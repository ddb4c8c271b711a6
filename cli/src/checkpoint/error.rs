//! What can be wrong with a checkpoint.

use std::path::{Path, PathBuf};

use engine_core::{Error, ErrorKind, Recovery};

/// What is wrong with a checkpoint, naming the file and, where it is one tensor's fault, the tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused to open, map, read or write something.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried: `open`, `map`.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A folder without anything that is recognised as a checkpoint.
    #[error("{}: no checkpoint in this folder: {found}", path.display())]
    NoCheckpoint {
        /// The folder.
        path: PathBuf,
        /// What was looked for, and what is there instead.
        found: String,
    },
    /// The file is not a safetensors file at all.
    #[error("{}: not a safetensors file: {reason}", path.display())]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// What a safetensors file has and this one lacks.
        reason: String,
    },
    /// The file ends before the bytes that its header promises.
    #[error("{}: truncated: {len} bytes of {expected}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The length that the header implies.
        expected: u64,
        /// The length of the file.
        len: u64,
    },
    /// A header whose entries contradict each other or the file.
    #[error("{}: invalid header: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        reason: String,
    },
    /// A header entry that describes an impossible tensor.
    #[error("{}: invalid tensor `{tensor}`: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is impossible about it.
        reason: String,
    },
    /// The index is not readable as one.
    #[error("{}: invalid index: {reason}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Files that the index names and the folder does not have.
    #[error(
        "{}: {} of {total} shards missing: {}",
        path.display(), missing.len(), missing.join(", ")
    )]
    MissingShards {
        /// The index file.
        path: PathBuf,
        /// The file names of the missing shards.
        missing: Vec<String>,
        /// How many shards the index names.
        total: usize,
    },
    /// A tensor that the index places in a shard which does not have it.
    #[error("{}: the index promises tensor `{tensor}`, which this shard lacks", shard.display())]
    NotInShard {
        /// The shard.
        shard: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A name that is used twice, in one header or in two shards.
    #[error("tensor `{tensor}` is in {} and again in {}", first.display(), second.display())]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// The file that has it first.
        first: PathBuf,
        /// The file that has it again.
        second: PathBuf,
    },
    /// Pieces of a tensor that do not follow each other, given to the writer.
    #[error("{}: cannot write tensor `{tensor}`: {reason}", path.display())]
    OutOfOrder {
        /// The file being written.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What was expected and what came.
        reason: String,
    },
}

impl CheckpointError {
    pub(super) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), action, source }
    }

    pub(super) fn header(path: &Path, reason: impl Into<String>) -> Self {
        Self::Header { path: path.to_owned(), reason: reason.into() }
    }

    pub(super) fn tensor(path: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), reason: reason.into() }
    }

    fn tensor_name(&self) -> Option<&str> {
        match self {
            Self::Tensor { tensor, .. }
            | Self::NotInShard { tensor, .. }
            | Self::Duplicate { tensor, .. }
            | Self::OutOfOrder { tensor, .. } => Some(tensor),
            _ => None,
        }
    }
}

/// `Io` and `Resource` for what the operating system refused; `Weight` for one tensor's fault and
/// `Source` for the rest. None gets better by trying the same call again.
impl From<CheckpointError> for Error {
    fn from(error: CheckpointError) -> Self {
        const OPERATION: &str = "using a checkpoint";
        let tensor = error.tensor_name().map(str::to_owned);
        let kind = match &error {
            CheckpointError::Io { source, .. } => {
                let copy = std::io::Error::from(source.kind());
                match Self::io(OPERATION, copy).kind() {
                    ErrorKind::Resource => ErrorKind::Resource,
                    _ => ErrorKind::Io,
                }
            }
            _ if tensor.is_some() => ErrorKind::Weight,
            _ => ErrorKind::Source,
        };
        let result = Self::new(kind, OPERATION, error.to_string()).recovery(Recovery::Abort);
        let result = match tensor {
            Some(tensor) => result.tensor(tensor),
            None => result,
        };
        match error {
            CheckpointError::Io { source, .. } => result.with_source(source),
            _ => result,
        }
    }
}

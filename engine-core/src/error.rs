//! The one public error type.
//!
//! Every failure of every engine is an [`Error`]: a [kind](ErrorKind) to branch on, a
//! [hint](Recovery) that says what the caller can do about it, the operation that failed, and the
//! rank, bucket, tensor and version it concerns.

use std::error::Error as StdError;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Rank, Version};

/// The result of every fallible operation of a checkpoint engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Cause = Box<dyn StdError + Send + Sync + 'static>;

/// What went wrong, to branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A configuration that cannot be used: an unknown key, a value out of range.
    Config,
    /// No backend of that name, or one that cannot run on this machine.
    Backend,
    /// A weight that cannot be sent: a wrong size, a name used twice, a cast that does not exist.
    Weight,
    /// The caller's stream of weights ended with an error.
    Source,
    /// A call in a wrong state: of a cache that has no version yet, for example.
    State,
    /// A peer that could not prove that it knows the shared token.
    Authentication,
    /// A peer of another protocol version, or a message that breaks the protocol.
    Protocol,
    /// Sender and receiver want different formats, versions or group shapes.
    Mismatch,
    /// Nothing happened within the deadline of a wait.
    Timeout,
    /// The connection to a peer ended without a goodbye: its process died, for example.
    PeerLost,
    /// The trainer ended its part in the group in order: there will be no more updates of it.
    TrainerLeft,
    /// Bytes arrived that are not the bytes that were sent.
    Digest,
    /// The update was given up, by this rank or by another one.
    Aborted,
    /// Memory, disk or another resource of the machine is exhausted.
    Resource,
    /// The operating system refused an operation.
    Io,
}

impl ErrorKind {
    /// The recovery hint that errors of this kind carry unless one is set.
    fn default_recovery(self) -> Recovery {
        match self {
            Self::Timeout | Self::PeerLost | Self::Digest | Self::Aborted | Self::Source => {
                Recovery::Retry
            }
            Self::Authentication
            | Self::Protocol
            | Self::Io
            | Self::Resource
            | Self::TrainerLeft => Recovery::Reconnect,
            Self::Config | Self::Backend | Self::Weight | Self::State | Self::Mismatch => {
                Recovery::Abort
            }
        }
    }
}

/// What the caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Recovery {
    /// Start the next update as usual; the engine is in order.
    Retry,
    /// Finalize the engine and form the group anew.
    Reconnect,
    /// The same call will fail again until the caller changes something.
    Abort,
}

/// The failure of an operation of a checkpoint engine.
///
/// `Display` prints the operation, what went wrong and the context, in one line, and never the
/// [source](StdError::source), which error reporters print themselves.
///
/// # Examples
///
/// ```
/// use engine_core::{Error, ErrorKind, Rank};
///
/// let error = Error::new(ErrorKind::Timeout, "waiting for a release", "nothing in 60 s")
///     .rank(Rank(2))
///     .bucket(17);
/// assert_eq!(error.to_string(), "waiting for a release: nothing in 60 s (rank 2, bucket 17)");
/// ```
pub struct Error(Box<Repr>);

struct Repr {
    report: ErrorReport,
    source: Option<Cause>,
}

/// The parts of an [`Error`] that travel to other ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ErrorReport {
    /// What went wrong, to branch on.
    pub kind: ErrorKind,
    /// What the caller can do.
    pub recovery: Recovery,
    /// What was being done, as a phrase: `waiting for a release`.
    pub operation: String,
    /// What went wrong, in words.
    pub message: String,
    /// The rank that the failure concerns: the one that was waited for, or that died.
    pub rank: Option<Rank>,
    /// The bucket, counted from 0 within the update.
    pub bucket: Option<u64>,
    /// The tensor's name.
    pub tensor: Option<String>,
    /// The update's version.
    pub version: Option<Version>,
}

impl Error {
    /// An error of a kind: what was being done, and what went wrong.
    pub fn new(kind: ErrorKind, operation: impl Into<String>, message: impl Into<String>) -> Self {
        Self(Box::new(Repr {
            report: ErrorReport {
                kind,
                recovery: kind.default_recovery(),
                operation: operation.into(),
                message: message.into(),
                rank: None,
                bucket: None,
                tensor: None,
                version: None,
            },
            source: None,
        }))
    }

    /// An operating system error; timeouts, full disks and broken connections get a kind of their own, all others are
    /// `Io`.
    pub fn io(operation: impl Into<String>, error: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::TimedOut => ErrorKind::Timeout,
            Io::StorageFull | Io::OutOfMemory | Io::QuotaExceeded => ErrorKind::Resource,
            Io::UnexpectedEof
            | Io::BrokenPipe
            | Io::ConnectionReset
            | Io::ConnectionAborted
            | Io::NotConnected => ErrorKind::PeerLost,
            _ => ErrorKind::Io,
        };
        Self::new(kind, operation, error.to_string()).with_source(error)
    }
    /// Names the rank that the failure concerns, unless one is named already.
    #[must_use]
    pub fn rank(mut self, rank: Rank) -> Self {
        self.0.report.rank.get_or_insert(rank);
        self
    }

    /// Names the bucket, unless one is named already.
    #[must_use]
    pub fn bucket(mut self, bucket: u64) -> Self {
        self.0.report.bucket.get_or_insert(bucket);
        self
    }

    /// Names the tensor, unless one is named already.
    #[must_use]
    pub fn tensor(mut self, tensor: impl Into<String>) -> Self {
        self.0.report.tensor.get_or_insert_with(|| tensor.into());
        self
    }

    /// Names the update's version, unless one is named already.
    #[must_use]
    pub fn version(mut self, version: Version) -> Self {
        self.0.report.version.get_or_insert(version);
        self
    }

    /// Replaces the recovery hint.
    #[must_use]
    pub fn recovery(mut self, recovery: Recovery) -> Self {
        self.0.report.recovery = recovery;
        self
    }

    /// Whether it says that the leading trainer is gone, in order or not: then there is no next update in this group.
    pub fn says_trainer_is_gone(&self) -> bool {
        let gone = matches!(self.kind(), ErrorKind::PeerLost | ErrorKind::TrainerLeft);
        gone && self.report().rank == Some(Rank::LEADER)
    }

    /// Attaches the error that caused this one.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Cause>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What went wrong, to branch on.
    pub fn kind(&self) -> ErrorKind {
        self.0.report.kind
    }

    /// The parts of the error as data: kind, hint, words and context.
    pub fn report(&self) -> &ErrorReport {
        &self.0.report
    }
}

/// An error that another rank reported; its source chain stayed there, folded into the message.
impl From<ErrorReport> for Error {
    fn from(report: ErrorReport) -> Self {
        Self(Box::new(Repr { report, source: None }))
    }
}

/// The error as it travels: the messages of the source chain are appended to its own.
impl From<&Error> for ErrorReport {
    fn from(error: &Error) -> Self {
        let mut report = error.0.report.clone();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            if !report.message.contains(&text) {
                report.message = format!("{}: {text}", report.message);
            }
            source = cause.source();
        }
        report
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.report, f)
    }
}

impl fmt::Display for ErrorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, self.message)?;
        let mut open = " (";
        let mut item = |f: &mut fmt::Formatter<'_>, text: fmt::Arguments<'_>| {
            let result = write!(f, "{open}{text}");
            open = ", ";
            result
        };
        if let Some(rank) = self.rank {
            item(f, format_args!("rank {rank}"))?;
        }
        if let Some(bucket) = self.bucket {
            item(f, format_args!("bucket {bucket}"))?;
        }
        if let Some(tensor) = &self.tensor {
            item(f, format_args!("tensor `{tensor}`"))?;
        }
        if let Some(version) = self.version {
            item(f, format_args!("version {version}"))?;
        }
        if open == ", " { f.write_str(")") } else { Ok(()) }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("report", &self.0.report)
            .field("source", &self.0.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_the_context_once_and_never_repeats_the_source() {
        let io = std::io::Error::other("cable unplugged");
        let error = Error::new(ErrorKind::Io, "reading a frame", "the connection failed")
            .rank(Rank(3))
            .version(Version(9))
            .with_source(io);
        assert_eq!(error.to_string(), "reading a frame: the connection failed (rank 3, version 9)");
        assert!(error.source().is_some());
    }

    #[test]
    fn the_first_context_wins_because_it_is_nearest_to_the_failure() {
        let error = Error::new(ErrorKind::Weight, "packing", "too large").tensor("a").tensor("b");
        assert_eq!(error.report().tensor.as_deref(), Some("a"));
    }

    #[test]
    fn a_report_carries_the_messages_of_the_source_chain_to_other_ranks() {
        let error = Error::new(ErrorKind::Source, "reading weights", "the stream failed")
            .with_source(std::io::Error::other("disk on fire"));
        let report = ErrorReport::from(&error);
        assert_eq!(report.message, "the stream failed: disk on fire");
        assert_eq!(Error::from(report).kind(), ErrorKind::Source);
    }
}

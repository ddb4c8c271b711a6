//! Errors of the file system, and of what files say.

use std::io;
use std::path::Path;

use engine_core::{Error, ErrorKind};

/// An error of the file system at a path.
pub(crate) fn io(operation: &str, path: &Path, error: io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::OutOfMemory => {
            ErrorKind::Resource
        }
        // Only reads ask for more bytes than there are.
        io::ErrorKind::UnexpectedEof => ErrorKind::Protocol,
        _ => ErrorKind::Io,
    };
    Error::new(kind, operation, format!("{}: {error}", path.display())).with_source(error)
}

/// A file that says what cannot be.
pub(crate) fn wrong(operation: &str, path: &Path, message: impl std::fmt::Display) -> Error {
    let message = format!("{}: {message}", path.display());
    Error::new(ErrorKind::Protocol, operation, message)
}

//! Memory files that processes of one host share.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;

/// A file of memory that this process has open: one that it made (`memfd_create`), or that of memory which a library made.
///
/// One that it made has no path: it disappears with its last descriptor and mapping, however their processes end. It is not
/// in `/dev/shm`, so only memory limits its size. It can be sealed, and no process can undo that.
#[derive(Debug)]
pub(crate) struct MemFile {
    file: OwnedFd,
    address: FileAddress,
}

/// The address of a [`MemFile`] for processes of the same host, user and PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct FileAddress {
    /// The process that owns it.
    pub(crate) pid: u32,
    /// Its descriptor in that process.
    pub(crate) fd: i32,
    /// The file's identity, so that another file with the same descriptor is noticed.
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl MemFile {
    /// An empty file. The name only shows in `/proc`.
    pub(crate) fn create(name: &str) -> Result<Self, SegmentError> {
        let system = |call| move |errno| SegmentError::System { call, errno };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        Self::of(rustix::fs::memfd_create(name, flags).map_err(system("memfd_create"))?)
    }

    /// A file that is open here, of memory that this process has mapped.
    pub(crate) fn of(file: OwnedFd) -> Result<Self, SegmentError> {
        let stat = rustix::fs::fstat(&file)
            .map_err(|errno| SegmentError::System { call: "fstat", errno })?;
        let (pid, fd) = (std::process::id(), file.as_raw_fd());
        let address = FileAddress { pid, fd, device: stat.st_dev, inode: stat.st_ino };
        Ok(Self { file, address })
    }

    /// The address by which other processes open it while this lives.
    pub(crate) fn address(&self) -> FileAddress {
        self.address
    }

    /// Seals the file for every process, this one included.
    pub(crate) fn seal(&self, seals: SealFlags) -> Result<(), SegmentError> {
        rustix::fs::fcntl_add_seals(&self.file, seals)
            .map_err(|errno| SegmentError::System { call: "fcntl(F_ADD_SEALS)", errno })
    }
}

impl AsFd for MemFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl FileAddress {
    /// The path of the file in `/proc`.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", self.pid, self.fd)
    }

    /// Opens the file for reading.
    ///
    /// # Errors
    ///
    /// `Open` without access to the file's process, `Gone` if the process ended, or if another file or none has the descriptor now.
    pub(crate) fn open(&self) -> Result<File, SegmentError> {
        self.open_by(File::options().read(true))
    }

    /// Opens the file for reading and writing.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub(crate) fn open_to_write(&self) -> Result<File, SegmentError> {
        self.open_by(File::options().read(true).write(true))
    }

    /// Opens the file for appending.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn open_to_append(&self) -> Result<File, SegmentError> {
        self.open_by(File::options().append(true))
    }

    fn open_by(&self, options: &OpenOptions) -> Result<File, SegmentError> {
        let path = self.path();
        let opened = options.open(&path).and_then(|file| Ok((file.metadata()?, file)));
        match opened {
            Ok((metadata, file))
                if (metadata.dev(), metadata.ino()) == (self.device, self.inode) =>
            {
                Ok(file)
            }
            Ok(_) => Err(SegmentError::Gone { path }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(SegmentError::Gone { path })
            }
            Err(source) => Err(SegmentError::Open { path, source }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use engine_core::{Error, ErrorKind};

    use super::*;

    #[test]
    fn a_file_whose_process_ended_or_took_it_back_is_that_of_a_peer_that_is_lost() {
        let file = MemFile::create("test").unwrap();
        let address = file.address();
        address.open().unwrap();
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        let pid = ended.id();
        ended.wait().unwrap();
        // The number is one that no other test of this process opens.
        let none = FileAddress { fd: 1 << 19, ..address };
        let other = FileAddress { inode: address.inode + 1, ..address };
        for gone in [FileAddress { pid, ..address }, none, other] {
            let error = Error::from(gone.open().unwrap_err());
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        }
    }
}

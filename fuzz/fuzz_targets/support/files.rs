//! Files in memory.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// A file that nobody else has, and that is gone when it is dropped.
pub(crate) struct InMemory(std::fs::File);

/// # Panics
///
/// If there is no memory.
pub(crate) fn in_memory(bytes: &[u8]) -> InMemory {
    let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
    let mut file = std::fs::File::from(file);
    file.write_all(bytes).expect("memory");
    InMemory(file)
}

impl InMemory {
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

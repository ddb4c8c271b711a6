//! Mapping files into memory, and the process's environment: all of this crate's `unsafe`.

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// Maps a whole file for reading.
///
/// The mapping shows the file as it is at each read. Nothing in this program keeps a conclusion
/// about bytes that it read earlier (headers are parsed into owned values), so that a file which
/// another process overwrites gives other weights, and one that is truncated ends the process with
/// `SIGBUS`, as with every loader that maps checkpoints. Checkpoints that this program writes are
/// replaced by renaming, which leaves mappings of the old file intact.
pub(crate) fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the mapping is private and read-only, and `Mmap` unmaps it only when dropped. The
    // bytes are plain data of which every value is valid; nobody in this process writes the file.
    // Another process that does breaks the promise above, not this program's memory.
    unsafe { Mmap::map(file) }
}

/// Maps an unnamed file of shared memory that this process alone has, for reading and writing.
pub(crate) fn map_private_file_shared(file: &File) -> io::Result<memmap2::MmapMut> {
    // SAFETY: the caller made the file without a name and shares its descriptor with nobody, so
    // that nothing else can write or truncate it while it is mapped.
    unsafe { memmap2::MmapMut::map_mut(file) }
}

/// Sets an environment variable of this process, which its children inherit, unless the user has.
///
/// # Safety
///
/// No other thread of the process runs.
pub unsafe fn set_variable(name: &str, value: &str) {
    if std::env::var_os(name).is_none() {
        // SAFETY: the caller says that no other thread runs, which could read the environment now.
        unsafe { std::env::set_var(name, value) };
    }
}

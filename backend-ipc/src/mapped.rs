//! The files behind this process's shared memory, whichever library has mapped them.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use crate::error::SegmentError;
use crate::memfile::MemFile;

/// A file's number on its host: its device and its inode.
pub(crate) type FileId = (u64, u64);

/// A shared, writable mapping of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MappedFile {
    addresses: Range<u64>,
    /// The offset of its first byte in the file.
    offset: u64,
    id: FileId,
    path: String,
}

/// The mappings of this process that other processes can have too, in ascending order.
#[derive(Debug)]
pub(crate) struct MappedFiles(Vec<MappedFile>);

impl MappedFiles {
    pub(crate) fn of_this_process() -> Result<Self, SegmentError> {
        let path = "/proc/self/maps";
        let text = std::fs::read_to_string(path)
            .map_err(|source| SegmentError::Open { path: path.into(), source })?;
        Ok(Self(parse(&text)))
    }

    fn find(&self, address: u64, len: u64) -> Option<&MappedFile> {
        let after = self.0.partition_point(|mapped| mapped.addresses.start <= address);
        let mapped = after.checked_sub(1).and_then(|before| self.0.get(before));
        let end = address.checked_add(len);
        mapped.filter(|mapped| end.is_some_and(|end| end <= mapped.addresses.end))
    }

    /// The file that has the bytes at an address, and their offset in it; `None` for memory of this process alone.
    pub(crate) fn locate(&self, address: u64, len: u64) -> Option<(FileId, u64)> {
        let mapped = self.find(address, len)?;
        Some((mapped.id, mapped.offset + (address - mapped.addresses.start)))
    }

    /// Opens those of the files with these numbers that have a path, or a descriptor in this process, by which they can be opened for writing.
    /// Other processes cannot open the rest either.
    ///
    /// # Errors
    ///
    /// Those of the system.
    pub(crate) fn open(
        &self,
        files: impl Iterator<Item = FileId>,
    ) -> Result<HashMap<FileId, MemFile>, SegmentError> {
        let mut open = None;
        let mut opened = HashMap::new();
        for id in files {
            let path = self.0.iter().find(|mapped| mapped.id == id).map(|mapped| &mapped.path);
            let path = path.map_or("", String::as_str);
            let by_path = path.starts_with('/').then(|| open_if(path, id)).flatten();
            let file = by_path.or_else(|| {
                let path = open.get_or_insert_with(descriptors).get(&id)?;
                open_if(path, id)
            });
            if let Some(file) = file {
                opened.insert(id, MemFile::of(file.into())?);
            }
        }
        Ok(opened)
    }
}

fn open_if(path: &str, id: FileId) -> Option<File> {
    let file = File::options().read(true).write(true).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    ((metadata.dev(), metadata.ino()) == id).then_some(file)
}

/// Paths of this process's descriptors, by their files. Of several descriptors of a file, those come first that were opened first.
fn descriptors() -> HashMap<FileId, String> {
    let mut found = HashMap::new();
    let numbers = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    for number in numbers {
        let path = number.path();
        if let (Ok(metadata), Some(path)) = (std::fs::metadata(&path), path.to_str()) {
            found.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.to_owned());
        }
    }
    found
}

/// Reads `/proc/<pid>/maps`. Neighbours that go on in the same file are one.
fn parse(text: &str) -> Vec<MappedFile> {
    let mut all: Vec<MappedFile> = Vec::new();
    for mapped in text.lines().filter_map(line) {
        match all.last_mut() {
            Some(last)
                if last.id == mapped.id
                    && last.addresses.end == mapped.addresses.start
                    && last.offset + (last.addresses.end - last.addresses.start)
                        == mapped.offset =>
            {
                last.addresses.end = mapped.addresses.end;
            }
            _ => all.push(mapped),
        }
    }
    all
}

/// Reads a line, if it is that of a shared, writable mapping of a file.
fn line(line: &str) -> Option<MappedFile> {
    let number = |hex| u64::from_str_radix(hex, 16).ok();
    let (addresses, rest) = line.split_once(' ')?;
    let (access, rest) = rest.split_once(' ')?;
    let (offset, rest) = rest.split_once(' ')?;
    let (device, rest) = rest.split_once(' ')?;
    let (inode, path) = rest.split_once(' ').unwrap_or((rest, ""));
    let ((start, end), (major, minor)) = (addresses.split_once('-')?, device.split_once(':')?);
    let inode: u64 = inode.parse().ok()?;
    let is_shared = access.starts_with("rw") && access.ends_with('s') && inode != 0;
    let [major, minor] = [major, minor].map(|hex| u32::from_str_radix(hex, 16).ok());
    let mapped = MappedFile {
        addresses: number(start)?..number(end)?,
        offset: number(offset)?,
        id: (rustix::fs::makedev(major?, minor?), inode),
        path: path.trim_start().to_owned(),
    };
    is_shared.then_some(mapped)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    #[test]
    fn shared_files_are_read_with_their_offsets_and_private_memory_is_left_out() {
        let text = "\
00400000-0040b000 r-xp 00000000 103:02 173521                            /usr/bin/program
7f0000000000-7f0000001000 rw-p 00000000 00:00 0
7f0000001000-7f0000003000 rw-s 00004000 00:1b 73879                      /dev/shm/torch_1 (deleted)
7f0000003000-7f0000004000 rw-s 00006000 00:1b 73879                      /dev/shm/torch_1 (deleted)
7f0000004000-7f0000005000 rw-s 00000000 00:1b 73880                      /dev/shm/a name
7f0000005000-7f0000006000 r--s 00000000 00:1b 73881                      /dev/shm/read only
7f0000006000-7f0000007000 rw-s 00000000 00:05 12                         /memfd:x (deleted)
7fff00000000-7fff00001000 rw-p 00000000 00:00 0                          [stack]
nonsense
";
        let files = MappedFiles(parse(text));
        let tmpfs = rustix::fs::makedev(0, 0x1b);
        let at = |address, len| files.locate(address, len);
        assert_eq!(at(0x7f00_0000_1010, 16).unwrap(), ((tmpfs, 73879), 0x4010));
        // Also where two neighbours are of one file, but not where they are of two.
        assert_eq!(at(0x7f00_0000_2ff0, 0x20).unwrap(), ((tmpfs, 73879), 0x5ff0));
        assert!(at(0x7f00_0000_3ff0, 0x20).is_none());
        assert_eq!(files.find(0x7f00_0000_4000, 1).unwrap().path, "/dev/shm/a name");
        for private in [0x0040_0000, 0x7f00_0000_0000, 0x7f00_0000_5000, 0x7fff_0000_0000, 0, !0] {
            assert!(at(private, 8).is_none(), "{private:#x}");
        }
    }

    #[test]
    fn this_process_finds_and_opens_the_file_of_memory_that_it_has_mapped() {
        let (file, mapping) =
            crate::segment::allocate("ckpt-engine-test", 8192, || SegmentError::Lent).unwrap();
        mapping.put(5000, b"here");
        let files = MappedFiles::of_this_process().unwrap();
        let (id, offset) = files.locate(mapping.address() + 5000, 4).unwrap();
        let opened = files.open([id].into_iter()).unwrap();
        let again = opened[&id].address().open().unwrap();
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&again, &mut bytes, offset).unwrap();
        assert_eq!((&bytes, offset), (b"here", 5000));
        drop((file, opened));
        let own = Box::new([0_u8; 64]);
        assert!(files.locate(own.as_ptr().addr() as u64, 64).is_none());
    }
}

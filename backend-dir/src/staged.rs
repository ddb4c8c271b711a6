//! A version that is being written: its files grow bucket by bucket.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use engine_core::memory::Pool;
use engine_core::plan::Piece;
use engine_core::{Result, Version};
use tempfile::TempDir;

use crate::error::io;
use crate::folder::{Folder, PUBLISHING, write_whole};
use crate::format::{Checksum, Contents, Hasher, INDEX};
use crate::shards::{Shards, file_name};

/// A version that is being written. Its folder is removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Staged {
    folder: TempDir,
    shards: Shards,
    contents: Contents,
    /// The digest of the weight that the last bucket left incomplete.
    open: Option<Hasher>,
    /// No other trainer takes the folder of versions before this one is removed.
    _owner: Arc<Folder>,
}

impl Staged {
    /// Begins one. Blocks.
    pub(crate) fn new(owner: Arc<Folder>, checksum: Checksum) -> Result<Self> {
        let contents = Contents { checksum, ..Contents::default() };
        let (folder, shards) = (owner.stage()?, Shards::default());
        Ok(Self { folder, shards, contents, open: None, _owner: owner })
    }

    pub(crate) fn folder(&self) -> &TempDir {
        &self.folder
    }

    /// Writes the next bucket. It is on disk, and visible to others, when this returns.
    pub(crate) fn write(&mut self, pieces: &[Piece], bucket: &[u8], pool: &Pool) -> Result<()> {
        let own = self.shards.bucket();
        let placed = self.shards.place(pieces)?;
        let mut files: HashMap<u64, File> = HashMap::new();
        if let Some(header) = &placed.header {
            let path = self.folder.path().join(file_name(own));
            let failed = |error| io(PUBLISHING, &path, error);
            let mut file =
                OpenOptions::new().write(true).create_new(true).open(&path).map_err(failed)?;
            file.write_all(header).map_err(failed)?;
            files.insert(own, file);
        }
        let mut digested = Vec::with_capacity(pieces.len());
        for (piece, part) in pieces.iter().zip(&placed.parts) {
            if let std::collections::hash_map::Entry::Vacant(entry) = files.entry(part.file) {
                let path = self.folder.path().join(file_name(part.file));
                let file = OpenOptions::new().write(true).open(&path);
                entry.insert(file.map_err(|error| io(PUBLISHING, &path, error))?);
            }
            let begun = self.open.take().filter(|_| piece.start > 0);
            digested.push((piece, begun.unwrap_or_else(|| Hasher::new(self.contents.checksum))));
            let name = piece.meta.name.to_string();
            self.contents.weight_map.entry(name).or_insert_with(|| file_name(part.file));
            self.contents.total_size += piece.len;
        }
        let folder = self.folder.path();
        let write = || {
            let steps = placed.parts.iter().flat_map(|part| part.steps());
            let written = pool.map(steps, |step| {
                let bytes = &bucket[step.offset as usize..(step.offset + step.len) as usize];
                let Some(file) = files.get(&step.file) else { return Ok(()) };
                file.write_all_at(bytes, step.at)
                    .map_err(|error| io(PUBLISHING, &folder.join(file_name(step.file)), error))
            });
            written.into_iter().collect::<Result<()>>()
        };
        let digest = || {
            pool.map(digested, |(piece, mut hasher)| {
                let bytes = piece.offset as usize..(piece.offset + piece.len) as usize;
                hasher.update(&bucket[bytes]);
                (piece, hasher)
            })
        };
        let (written, digested) = pool.join(write, digest);
        written?;
        for (piece, hasher) in digested {
            if piece.start + piece.len == piece.meta.byte_len()? {
                self.contents.checksums.insert(piece.meta.name.to_string(), hasher.hex());
            } else {
                self.open = Some(hasher);
            }
        }
        for (number, file) in &files {
            let synced = file.sync_data();
            synced.map_err(|error| io(PUBLISHING, &folder.join(file_name(*number)), error))?;
        }
        Ok(())
    }

    /// Writes the index: the version is complete, and has no name yet.
    pub(crate) fn complete(self, version: Version) -> Result<TempDir> {
        let Self { folder, contents, .. } = self;
        write_index(folder.path(), contents, version)?;
        Ok(folder)
    }
}

/// Writes the index of a version whose files are complete.
pub(crate) fn write_index(folder: &Path, contents: Contents, version: Version) -> Result<()> {
    write_whole(&folder.join(INDEX), &contents.text(version)?)
}

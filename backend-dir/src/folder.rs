//! The folder that a trainer owns: its versions, what is being written, and what is removed.
//!
//! ```text
//! .trainer          the trainer's lock, and the mark by which rollouts know that their folder is the same
//! .staging-…/       a version that is being written
//! .removed-…/       one that is being removed
//! .base/            the last whole version, where versions are published as changes
//! .readers/…        which version each reader is reading
//! weight_v000007/   a version, complete
//! ```
//!
//! A version gets its name when it is complete and on disk, by a rename. So a crash at any time leaves complete versions, and hidden
//! folders that the next trainer removes.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use engine_core::{Error, ErrorKind, Result, Version, clock};
use tempfile::TempDir;
use tracing::{debug, warn};

use crate::error::io;
use crate::format::{self, INDEX, Index};
use crate::leases;

const TRAINER: &str = ".trainer";
const STAGING: &str = ".staging-";
const REMOVED: &str = ".removed-";
const BASE: &str = ".base";

/// How long a trainer waits for the one before it to end.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a trainer does, in errors.
const OPENING: &str = "opening the folder of versions";
pub(crate) const PUBLISHING: &str = "publishing a version";

/// A folder, and the right to publish versions in it.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    mark: String,
    /// Locked as long as this lives. The system unlocks it when the process ends.
    _lock: File,
    /// One version is published at a time, whatever becomes of who waits for it.
    publishing: Mutex<()>,
}

impl Folder {
    /// Makes the folder if it is missing, and takes it for this trainer.
    ///
    /// # Errors
    ///
    /// `State` if another trainer has it; `Io`, `Resource`.
    pub(crate) async fn own(path: PathBuf) -> Result<Self> {
        let failed = |error| io(OPENING, &path, error);
        fs::create_dir_all(&path).map_err(failed)?;
        let options =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
        let mut lock = options.open(path.join(TRAINER)).map_err(failed)?;
        let mut waited = Duration::ZERO;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if waited < PATIENCE => {
                    let pause = Duration::from_millis(50);
                    waited += pause;
                    clock::sleep(pause).await;
                }
                Err(TryLockError::WouldBlock) => {
                    let message = format!("another trainer publishes in {}", path.display());
                    return Err(Error::new(ErrorKind::State, OPENING, message));
                }
                Err(TryLockError::Error(error)) => {
                    warn!(%error, "the folder's file system has no locks: keep other trainers out of it");
                    break;
                }
            }
        }
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        let mark = format!("{}-{since}", std::process::id());
        lock.set_len(0).and_then(|()| lock.write_all(mark.as_bytes())).map_err(failed)?;
        lock.sync_all().map_err(failed)?;
        Ok(Self { path, mark, _lock: lock, publishing: Mutex::default() })
    }

    /// Removes what a trainer that was killed left unfinished. Blocks.
    pub(crate) fn tidy(&self) -> Result<()> {
        let names = names(&self.path).map_err(|error| io(OPENING, &self.path, error))?;
        let left = |name: &&String| name.starts_with(STAGING) || name.starts_with(REMOVED);
        names.iter().filter(left).for_each(|name| remove(&self.path.join(name)));
        Ok(())
    }

    /// What rollouts find in the folder if theirs is the same.
    pub(crate) fn mark(&self) -> &str {
        &self.mark
    }

    /// The right to give versions names, and to remove some, for one thread.
    pub(crate) fn alone(&self) -> MutexGuard<'_, ()> {
        // What a panic left is what a crash leaves.
        self.publishing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A folder for a version that is being written. It is removed when it is dropped.
    pub(crate) fn stage(&self) -> Result<TempDir> {
        use std::os::unix::fs::PermissionsExt;
        let mut builder = tempfile::Builder::new();
        // Readers may be other users: what the umask leaves.
        builder.prefix(STAGING).permissions(fs::Permissions::from_mode(0o777));
        builder.tempdir_in(&self.path).map_err(|error| io(PUBLISHING, &self.path, error))
    }

    /// Gives what is staged the name of a version. A version of that name is replaced.
    pub(crate) fn install(&self, staged: TempDir, version: Version) -> Result<()> {
        self.rename(staged, &format::folder_name(version))
    }

    /// Keeps what is staged as the base of the next version's changes.
    pub(crate) fn keep_as_base(&self, staged: TempDir) -> Result<()> {
        self.rename(staged, BASE)
    }

    /// Removes the base: a whole version in the folder is one.
    pub(crate) fn forget_base(&self) -> Result<()> {
        self.put_away(&self.path.join(BASE))
    }

    /// The path of the base, if it is that of this version.
    pub(crate) fn base(&self, version: Version) -> Option<PathBuf> {
        let whole = self.path.join(format::folder_name(version));
        [self.path.join(BASE), whole].into_iter().find(|path| {
            let index = read_index(path, None);
            index.is_ok_and(|index| index.version == Some(version) && index.delta.is_none())
        })
    }

    fn rename(&self, staged: TempDir, name: &str) -> Result<()> {
        let to = self.path.join(name);
        self.put_away(&to)?;
        let failed = |error| io(PUBLISHING, &to, error);
        fs::rename(staged.path(), &to).map_err(failed)?;
        // It is somewhere else now.
        let _gone = staged.keep();
        sync_folder(&self.path).map_err(failed)
    }

    /// Removes a folder, if it is there: at once for readers, who find all of it or nothing.
    fn put_away(&self, path: &Path) -> Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let failed = |error| io("removing a version", path, error);
        let room =
            tempfile::Builder::new().prefix(REMOVED).tempdir_in(&self.path).map_err(failed)?;
        fs::rename(path, room.path().join("version")).map_err(failed)?;
        remove(&room.keep());
        Ok(())
    }

    /// Removes versions that nobody needs any more, after `newest` was published: those before the newest `keep`, and those after it,
    /// which are of a run that went back. Versions stay that a reader reads, and whatever a version that stays is based on.
    pub(crate) fn collect(&self, newest: Version, keep: usize) -> Result<()> {
        let versions = versions(&self.path)?;
        let kept = versions.iter().rev().filter(|version| **version <= newest).take(keep.max(1));
        let mut needed: Vec<Version> = kept.copied().collect();
        needed.extend(leases::read_now(&self.path, &self.path.join(format::folder_name(newest)))?);
        let mut at = 0;
        while let Some(&version) = needed.get(at) {
            at += 1;
            let index = read_index(&self.path.join(format::folder_name(version)), Some(version));
            if let Some(base) = index.ok().and_then(|index| index.delta).map(|delta| delta.base)
                && !needed.contains(&base)
            {
                needed.push(base);
            }
        }
        for version in versions.iter().filter(|version| !needed.contains(version)) {
            debug!(%version, "nobody needs it any more");
            self.put_away(&self.path.join(format::folder_name(*version)))?;
        }
        Ok(())
    }

    /// The number of versions that have to be read before this one, down to the last whole one.
    pub(crate) fn depth(&self, mut version: Version) -> u64 {
        let mut depth = 0;
        loop {
            let index = read_index(&self.path.join(format::folder_name(version)), Some(version));
            let Ok(Some(delta)) = index.map(|index| index.delta) else { return depth };
            depth += 1;
            version = delta.base;
        }
    }
}

/// Whether a rollout's folder is the one of the trainer that has this mark.
///
/// # Errors
///
/// `Mismatch`; `Io`.
pub(crate) fn check_mark(path: &Path, mark: &str, theirs: &str) -> Result<()> {
    let refuse = |words: String| {
        let message = format!(
            "{} is not the folder in which the trainer publishes ({theirs} where it runs): {words}; set `path` to where \
             this rank's host has it",
            path.display()
        );
        Error::new(ErrorKind::Mismatch, "joining the group", message)
    };
    match fs::read_to_string(path.join(TRAINER)) {
        Ok(found) if found == mark => Ok(()),
        Ok(_) => Err(refuse("another trainer has been there".into())),
        Err(error) => Err(refuse(format!("{TRAINER}: {error}"))),
    }
}

/// The name of a folder that is being written, for rollouts.
pub(crate) fn staged_name(staged: &TempDir) -> Result<String> {
    let name = staged.path().file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| {
        let message = format!("{} is no name", staged.path().display());
        Error::new(ErrorKind::Io, PUBLISHING, message)
    })
}

/// Where a rollout finds a folder that is being written.
///
/// # Errors
///
/// `Protocol` for what is no such name.
pub(crate) fn staged_path(path: &Path, name: &[u8]) -> Result<PathBuf> {
    let name = std::str::from_utf8(name).ok();
    match name.filter(|name| name.starts_with(STAGING) && !name.contains(['/', '\0'])) {
        Some(name) => Ok(path.join(name)),
        None => {
            let message = "the trainer names a folder that is none of a version";
            Err(Error::new(ErrorKind::Protocol, "joining an update", message))
        }
    }
}

/// The complete versions of a folder, in order.
///
/// # Errors
///
/// `Io`.
pub(crate) fn versions(path: &Path) -> Result<Vec<Version>> {
    let names = names(path).map_err(|error| io(format::READING, path, error))?;
    let version = |name: &String| format::version_of(name);
    let is_whole = |version: &Version| {
        let folder = path.join(format::folder_name(*version));
        folder.join(INDEX).exists() || folder.join(format::SINGLE).exists()
    };
    let mut versions: Vec<Version> = names.iter().filter_map(version).filter(is_whole).collect();
    versions.sort_unstable();
    Ok(versions)
}

/// Reads the index of a version's folder. A folder without one has a single file.
///
/// # Errors
///
/// `Io`; those of [`Index::read`].
pub(crate) fn read_index(folder: &Path, version: Option<Version>) -> Result<Index> {
    let path = folder.join(INDEX);
    let failed = |error| io(format::READING, &path, error);
    let file = match File::open(&path) {
        Err(error)
            if error.kind() == std::io::ErrorKind::NotFound
                && folder.join(format::SINGLE).exists() =>
        {
            return Ok(Index { files: vec![format::SINGLE.into()], ..Index::default() });
        }
        opened => opened.map_err(failed)?,
    };
    let mut text = Vec::new();
    let limit = format::MAX_INDEX_BYTES;
    let mut limited = std::io::Read::take(file, limit + 1);
    std::io::Read::read_to_end(&mut limited, &mut text).map_err(failed)?;
    if text.len() as u64 > limit {
        return Err(crate::error::wrong(
            format::READING,
            &path,
            format_args!("over {limit} bytes"),
        ));
    }
    Index::read(&text, version)
}

/// Writes a file so that it is on disk, complete, when it has its name.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error| io(PUBLISHING, path, error);
    let other = path.with_extension("unfinished");
    let mut file = File::create(&other).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&other, path).map_err(failed)?;
    path.parent().map_or(Ok(()), sync_folder).map_err(failed)
}

/// Makes names of a folder survive a crash of the machine. File systems that cannot do so are taken as they are.
pub(crate) fn sync_folder(path: &Path) -> std::io::Result<()> {
    match File::open(path)?.sync_all() {
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(()),
        synced => synced,
    }
}

fn names(path: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

/// Removes a folder. What cannot be removed stays until a trainer starts again.
fn remove(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path) {
        warn!(path = %path.display(), %error, "could not be removed");
    }
}

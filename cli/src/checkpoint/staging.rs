//! Output that is there whole or not at all: it is made under a hidden name and renamed when it is
//! complete.
//!
//! A hidden file or folder `.unfinished-XXXXXX` has a lock file `.unfinished-XXXXXX.lock` beside it,
//! which its process holds. Whatever ends the process ends the lock, and the next output in the same
//! folder removes what it finds without a holder. Signals that a program can answer remove it at
//! once: see [`end_unfinished`].

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

const PREFIX: &str = ".unfinished-";
const LOCK: &str = ".lock";

/// What this process has unfinished; `None` once it ends.
static UNFINISHED: Mutex<Option<Vec<PathBuf>>> = Mutex::new(Some(Vec::new()));

fn unfinished() -> MutexGuard<'static, Option<Vec<PathBuf>>> {
    // A list of paths: a panic elsewhere cannot leave it half changed.
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes everything that this process has not finished, before it ends. Nothing is finished or
/// begun after this.
pub fn end_unfinished() {
    let Some(paths) = unfinished().take() else { return };
    for path in paths {
        // Other threads may still write into a folder while it is removed.
        for _ in 0..100 {
            if remove(&path).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        if !exists(&path) {
            let _gone_anyway = std::fs::remove_file(lock_of(&path));
        }
    }
}

/// Whether the process ends, and its output has gone.
pub fn is_ending() -> bool {
    unfinished().is_none()
}

/// A file or a folder that is not finished. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    /// Holds the lock as long as it is open.
    _lock: File,
    finished: bool,
}

impl Staging {
    /// A new folder that will be renamed to a name in `parent`.
    pub(crate) fn folder(parent: &Path) -> io::Result<Self> {
        let staging = Self::begin(parent)?;
        std::fs::create_dir(&staging.path)?;
        Ok(staging)
    }

    /// A new file that will be renamed to a name in `parent`.
    pub(crate) fn file(parent: &Path) -> io::Result<(Self, File)> {
        let staging = Self::begin(parent)?;
        let file = File::options().read(true).write(true).create_new(true).open(&staging.path)?;
        Ok((staging, file))
    }

    /// A name that nobody else uses, locked.
    fn begin(parent: &Path) -> io::Result<Self> {
        remove_left(parent);
        loop {
            let (lock, path) = tempfile::Builder::new()
                .prefix(PREFIX)
                .suffix(LOCK)
                .make_in(parent, |path| File::options().write(true).create_new(true).open(path))?
                .keep()
                .map_err(|error| error.error)?;
            match lock.try_lock() {
                // Another process has taken it for one that was left, and removes it.
                Err(TryLockError::WouldBlock) => continue,
                // Without locks nobody removes it either.
                Err(TryLockError::Error(_)) => {}
                Ok(()) if lock.metadata()?.nlink() == 0 => continue,
                Ok(()) => {}
            }
            let path = path.with_extension("");
            let mut list = unfinished();
            let Some(list) = &mut *list else {
                let _gone_anyway = std::fs::remove_file(lock_of(&path));
                return Err(io::Error::new(io::ErrorKind::Interrupted, "the program ends"));
            };
            list.push(path.clone());
            return Ok(Self { path, _lock: lock, finished: false });
        }
    }

    /// Where it is until it is finished.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name, in the same folder. A file replaces another one if it may.
    pub(crate) fn finish(mut self, name: &Path, replace: bool) -> io::Result<()> {
        // Held until it has its name: a signal finds it unfinished or finished.
        let mut list = unfinished();
        let Some(list) = &mut *list else {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "the program ends"));
        };
        if replace {
            std::fs::rename(&self.path, name)?;
        } else {
            rename_new(&self.path, name)?;
        }
        list.retain(|path| *path != self.path);
        self.finished = true;
        let _gone_anyway = std::fs::remove_file(lock_of(&self.path));
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut list = unfinished();
        let Some(list) = &mut *list else { return };
        list.retain(|path| *path != self.path);
        if remove(&self.path).is_ok() {
            let _gone_anyway = std::fs::remove_file(lock_of(&self.path));
        }
    }
}

/// Renames to a name that must be free.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // A file system, or a kernel, that cannot do it in one step.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if !exists(to) => {
            std::fs::rename(from, to)
        }
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            Err(io::ErrorKind::AlreadyExists.into())
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Removes what processes left that are no more. What cannot be removed stays: it is not ours to
/// complain of.
fn remove_left(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if !name.starts_with(PREFIX) || !name.ends_with(LOCK) {
            continue;
        }
        // Opening a pipe would wait.
        if !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let lock_path = entry.path();
        let Ok(lock) = File::options().write(true).open(&lock_path) else { continue };
        if lock.try_lock().is_err() {
            continue;
        }
        // The lock file goes last: if this process dies now, the next one finds it.
        if remove(&lock_path.with_extension("")).is_ok() {
            let _gone_anyway = std::fs::remove_file(&lock_path);
        }
    }
}

fn lock_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(LOCK);
    name.into()
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    let result = match path.symlink_metadata() {
        Ok(about) if about.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Puts the names in a folder on disk, where the file system can.
///
/// Some cannot (CIFS of older kernels, gocryptfs, shared folders of virtual machines). The files in
/// it are on disk all the same; whether their names outlive a crash is up to the file system.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) =>
        {
            tracing::debug!(folder = %folder.display(), "this file system cannot sync folders");
            Ok(())
        }
        result => result,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_gets_its_name_when_it_is_finished_and_goes_when_it_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let staging = Staging::folder(parent.path()).unwrap();
        std::fs::write(staging.path().join("a"), "a").unwrap();
        assert_eq!(names(parent.path()).len(), 2);
        staging.finish(&parent.path().join("done"), false).unwrap();
        assert_eq!(names(parent.path()), ["done"]);
        drop(Staging::folder(parent.path()).unwrap());
        assert_eq!(names(parent.path()), ["done"]);
        let staging = Staging::folder(parent.path()).unwrap();
        let error = staging.finish(&parent.path().join("done"), false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(names(parent.path()), ["done"]);
    }

    #[test]
    fn what_the_dead_left_is_removed_and_what_the_living_have_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let alive = Staging::folder(parent.path()).unwrap();
        let path = |name: &str| parent.path().join(name);
        for name in [".unfinished-dead", ".unfinished-nobodys"] {
            std::fs::create_dir(path(name)).unwrap();
            std::fs::write(path(name).join("x"), "x").unwrap();
        }
        std::fs::write(path(".unfinished-dead.lock"), "").unwrap();
        std::fs::write(path(".unfinished-alone.lock"), "").unwrap();
        drop(Staging::file(parent.path()).unwrap());
        let own = alive.path().file_name().unwrap().to_str().unwrap().to_owned();
        let mut expected = vec![".unfinished-nobodys".to_owned(), format!("{own}.lock"), own];
        expected.sort();
        assert_eq!(names(parent.path()), expected);
    }

    #[test]
    fn a_file_system_that_cannot_sync_folders_is_good_enough() {
        // The kernel's own files cannot.
        let folder = Path::new("/proc/self");
        let error = File::open(folder).unwrap().sync_all().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        sync_folder(folder).unwrap();
        assert!(sync_folder(Path::new("/nonexistent")).is_err());
    }
}

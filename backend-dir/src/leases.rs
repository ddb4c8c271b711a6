//! Who reads which version: a file for each reader, which it touches while it reads.
//!
//! Only the folder's own clock is compared: that of the file system, which gives files their times.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use engine_core::{Result, Version};
use tempfile::TempPath;
use tracing::debug;

use crate::error::io;
use crate::format::READING;

const READERS: &str = ".readers";

/// How long a reader is believed that has not touched its file.
const LIMIT: Duration = Duration::from_secs(600);
/// How often a reader touches it.
const INTERVAL: Duration = Duration::from_secs(30);

/// Keeps a version while this lives.
#[derive(Debug)]
pub(crate) struct Lease {
    /// Removed when this is dropped.
    path: TempPath,
    version: Version,
    touched: Mutex<Instant>,
}

impl Lease {
    /// Says that a version is read. `None` where the reader must not write: versions may then be removed under it.
    pub(crate) fn take(folder: &Path, version: Version) -> Option<Self> {
        let taken = || {
            let readers = folder.join(READERS);
            fs::create_dir_all(&readers)?;
            let mut builder = tempfile::Builder::new();
            // The trainer may be another user.
            builder.prefix("").permissions(fs::Permissions::from_mode(0o666));
            let mut file = builder.tempfile_in(&readers)?;
            file.write_all(version.0.to_string().as_bytes())?;
            Ok::<_, std::io::Error>(file.into_temp_path())
        };
        match taken() {
            Ok(path) => Some(Self { path, version, touched: Mutex::new(Instant::now()) }),
            Err(error) => {
                debug!(%error, "a reader cannot say what it reads");
                None
            }
        }
    }

    /// Says so again, if it was said a while ago.
    pub(crate) fn renew(&self) {
        let mut touched = self.touched.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if touched.elapsed() >= INTERVAL {
            *touched = Instant::now();
            let written = File::create(&self.path)
                .and_then(|mut file| file.write_all(self.version.0.to_string().as_bytes()));
            if let Err(error) = written {
                debug!(%error, "a reader cannot say what it reads");
            }
        }
    }
}

/// The versions that readers read. `just_written` is a path that was written now. Files of readers that have ended are removed.
pub(crate) fn read_now(folder: &Path, just_written: &Path) -> Result<Vec<Version>> {
    let readers = folder.join(READERS);
    let failed = |error| io(READING, &readers, error);
    let entries = match fs::read_dir(&readers) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let now = fs::metadata(just_written).and_then(|about| about.modified()).map_err(failed)?;
    let mut versions = Vec::new();
    for entry in entries {
        let path: PathBuf = entry.map_err(failed)?.path();
        // One that has just ended is gone.
        let Ok(touched) = fs::metadata(&path).and_then(|about| about.modified()) else { continue };
        if now.duration_since(touched).is_ok_and(|age| age > LIMIT) {
            debug!(path = %path.display(), "a reader that ended long ago");
            let _gone_anyway = fs::remove_file(&path);
            continue;
        }
        let text = fs::read_to_string(&path).unwrap_or_default();
        versions.extend(text.trim().parse().map(Version));
    }
    Ok(versions)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_kept_while_a_reader_lives_and_for_a_while_after_one_was_killed() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("mark");
        File::create(&mark).unwrap();
        assert_eq!(read_now(folder.path(), &mark).unwrap(), []);
        let one = Lease::take(folder.path(), Version(7)).unwrap();
        assert_eq!(read_now(folder.path(), &mark).unwrap(), [Version(7)]);
        drop(one);
        assert_eq!(read_now(folder.path(), &mark).unwrap(), []);
        let killed = Lease::take(folder.path(), Version(3)).unwrap();
        let file = File::options().write(true).open(&killed.path).unwrap();
        let past = |age| std::time::SystemTime::now() - age;
        file.set_modified(past(LIMIT / 2)).unwrap();
        assert_eq!(read_now(folder.path(), &mark).unwrap(), [Version(3)]);
        file.set_modified(past(2 * LIMIT)).unwrap();
        assert_eq!(read_now(folder.path(), &mark).unwrap(), []);
        assert!(!killed.path.exists());
    }
}

//! How a version that all rollouts have becomes one of the folder's.

use engine_core::memory::Pool;
use engine_core::{Result, Version};
use tempfile::TempDir;
use tracing::info;

use crate::DirOptions;
use crate::changes::{differ, write_changes};
use crate::folder::Folder;
use crate::format::Delta;
use crate::staged::{Staged, write_index};
use crate::version::open_whole;

/// Publishes a version, and removes those that nobody needs any more.
///
/// Blocks.
///
/// # Errors
///
/// `Io`, `Resource`. The versions before it stay.
pub(crate) fn publish(
    folder: &Folder,
    staged: Staged,
    version: Version,
    options: &DirOptions,
    pool: &Pool,
) -> Result<()> {
    if options.keep == 0 {
        return Ok(());
    }
    let _alone = folder.alone();
    let whole = staged.complete(version)?;
    match changes(folder, &whole, version, options, pool)? {
        Some(changes) => {
            folder.install(changes, version)?;
            folder.keep_as_base(whole)?;
        }
        None => {
            folder.install(whole, version)?;
            folder.forget_base()?;
        }
    }
    folder.collect(version, options.keep)
}

/// What has changed since the version before, if it is to be published so, and can be.
fn changes(
    folder: &Folder,
    whole: &TempDir,
    version: Version,
    options: &DirOptions,
    pool: &Pool,
) -> Result<Option<TempDir>> {
    let Some(encoding) = options.changes else { return Ok(None) };
    let base = version.0.checked_sub(1).map(Version);
    // Readers follow numbers: a version changes the one of the number before it, or is whole.
    let Some((base, path)) = base.and_then(|base| Some((base, folder.base(base)?))) else {
        return Ok(None);
    };
    if folder.depth(base) >= options.anchor_every {
        return Ok(None);
    }
    let (old, new) = (open_whole(&path)?, open_whole(whole.path())?);
    if let Some(what) = differ(&old, &new) {
        info!(%version, what, "published whole, because it has other tensors than the version before");
        return Ok(None);
    }
    let staged = folder.stage()?;
    let delta = Delta { base, encoding };
    let contents = write_changes((&old, &new), delta, options.checksum, staged.path(), pool)?;
    write_index(staged.path(), contents, version)?;
    Ok(Some(staged))
}

//! The folder with the libraries by their names.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::abi::{ENTRIES, Entry, Library};

/// The copy that has the state.
pub(crate) const CORE: &str = "libhccl_sim_core.so";

/// The file in the folder that says which profile it is.
pub(crate) const PROFILE: &str = "hccl-sim-profile";

/// Which release the libraries look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// `libascendcl.so` and `libhccl.so` with everything that the simulator knows.
    Current,
    /// The communicator's functions are in a `libhcomm.so`, and not in `libhccl.so`.
    Split,
    /// What CANN 8.1 has: no sharing of memory between processes, no FP8 types.
    Cann81,
}

impl Profile {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Current, Self::Split, Self::Cann81];

    /// As it is written on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Split => "split",
            Self::Cann81 => "8.1",
        }
    }

    /// The profile of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|profile| profile.name() == name)
    }

    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Split => &["libascendcl.so", "libhccl.so", "libhcomm.so"],
            Self::Current | Self::Cann81 => &["libascendcl.so", "libhccl.so"],
        }
    }

    /// Whether that library of this profile has a function.
    fn has(self, file: &str, entry: &Entry) -> bool {
        if self == Self::Cann81 && !entry.old {
            return false;
        }
        match (file, entry.library) {
            (_, Library::All) | ("libascendcl.so", Library::Acl) => true,
            ("libhccl.so", Library::Operations) => true,
            ("libhccl.so", Library::Communicators) => self != Self::Split,
            ("libhcomm.so", Library::Communicators) => true,
            _ => false,
        }
    }
}

/// The folder that has the libraries of a profile, for `dlopen` by their absolute paths.
///
/// For tests: they depend on this crate, so cargo has built the shared object beside them, and the
/// folder is laid out next to it when it is first asked for. Several processes may ask at once.
///
/// # Errors
///
/// If the shared object is not where cargo puts it, or the folder cannot be written.
pub fn libraries(profile: Profile) -> io::Result<PathBuf> {
    let built = built()?;
    let metadata = fs::metadata(&built)?;
    // A new build gets a new folder: a process may have loaded the libraries of the old one.
    let build = format!("{:x}-{:x}", metadata.mtime(), metadata.mtime_nsec());
    let parent = built.with_file_name("hccl-sim-libraries");
    let folder = parent.join(format!("{}-{build}", profile.name()));
    if folder.is_dir() {
        return Ok(folder);
    }
    fs::create_dir_all(&parent)?;
    remove_old(&parent, &build);
    let temporary = tempfile::tempdir_in(&parent)?;
    lay_out(&built, profile, temporary.path())?;
    match fs::rename(temporary.path(), &folder) {
        // Renamed; the guard finds nothing to remove.
        Ok(()) => {}
        // Another process was first.
        Err(_) if folder.is_dir() => {}
        Err(error) => return Err(error),
    }
    Ok(folder)
}

/// Removes what builds of other days have left.
fn remove_old(parent: &Path, build: &str) {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(build) {
            continue;
        }
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        if modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > DAY)) {
            // Another process may be doing the same.
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

/// Writes the libraries of a profile into a folder that is there.
///
/// # Errors
///
/// If the shared object is not where cargo puts it, or the folder cannot be written.
pub fn write_libraries(profile: Profile, folder: &Path) -> io::Result<()> {
    lay_out(&built()?, profile, folder)
}

/// Where cargo put this crate's shared object, seen from the program that runs.
fn built() -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    // Tests are in `deps` themselves, programs above it, examples beside it.
    for candidate in [folder.join("deps"), folder.to_owned(), folder.join("../deps")] {
        let library = candidate.join("libhccl_sim.so");
        if library.is_file() {
            return library.canonicalize();
        }
    }
    let message = format!("no libhccl_sim.so around {}: was it moved?", program.display());
    Err(io::Error::new(io::ErrorKind::NotFound, message))
}

fn lay_out(built: &Path, profile: Profile, folder: &Path) -> io::Result<()> {
    let object = fs::read(built)?;
    write(&folder.join(CORE), &object)?;
    write(&folder.join(PROFILE), profile.name().as_bytes())?;
    for file in profile.files() {
        let mut copy = object.clone();
        hide(&mut copy, |entry| !profile.has(file, entry))?;
        write(&folder.join(file), &copy)?;
    }
    Ok(())
}

/// Whole or not at all: a file that is loaded must not change.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new("/")))?;
    io::Write::write_all(&mut file, bytes)?;
    // For other users too, as a compiler would.
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    file.persist(path)?;
    Ok(())
}

/// Takes functions out of a shared object's list of symbols, by giving them names that nobody asks for.
fn hide(object: &mut [u8], hidden: impl Fn(&Entry) -> bool) -> io::Result<()> {
    let before = symbols(object)?;
    for (name, offset) in &before {
        let entry = ENTRIES.iter().find(|entry| entry.name == name);
        if let Some(first) = entry.filter(|entry| hidden(entry)).and(object.get_mut(*offset)) {
            *first = b'-';
        }
    }
    // Names may share their endings: none may have lost one that it needs.
    let after: Vec<String> = symbols(object)?.into_iter().map(|(name, _)| name).collect();
    for entry in ENTRIES {
        if after.iter().any(|name| name == entry.name) == hidden(entry) {
            return Err(malformed(entry.name));
        }
    }
    Ok(())
}

/// The names of the dynamic symbols of an ELF file of 64 bits, and where in the file they are.
fn symbols(object: &[u8]) -> io::Result<Vec<(String, usize)>> {
    const DYNAMIC_SYMBOLS: u64 = 11;
    if !object.starts_with(b"\x7fELF\x02\x01") {
        return Err(malformed("not a little-endian ELF file of 64 bits"));
    }
    let number = |at: usize, bytes: usize| -> io::Result<u64> {
        let field = object.get(at..at + bytes).ok_or_else(|| malformed("too short"))?;
        Ok(field.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    let sections = number(0x28, 8)? as usize;
    let (size, count) = (number(0x3a, 2)? as usize, number(0x3c, 2)? as usize);
    let section = |index: usize| sections + index * size;
    let mut found = Vec::new();
    for index in 0..count {
        if number(section(index) + 4, 4)? != DYNAMIC_SYMBOLS {
            continue;
        }
        let names = section(number(section(index) + 0x28, 4)? as usize);
        let names = number(names + 0x18, 8)? as usize;
        let (from, bytes) = (number(section(index) + 0x18, 8)?, number(section(index) + 0x20, 8)?);
        for symbol in (from..from + bytes).step_by(24) {
            let at = names + number(symbol as usize, 4)? as usize;
            let name = object.get(at..).ok_or_else(|| malformed("a name outside of the file"))?;
            let name: Vec<u8> = name.iter().copied().take_while(|&byte| byte != 0).collect();
            found.push((String::from_utf8_lossy(&name).into_owned(), at));
        }
    }
    Ok(found)
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the shared object's symbols: {what}"))
}

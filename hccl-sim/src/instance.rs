//! Which copy of the shared object has the state.
//!
//! `libascendcl.so`, `libhccl.so` and `libhcomm.so` are copies of one file, so a process that loads
//! them has as many copies of its code and variables. Only one may have streams and memory: a fourth
//! copy beside them, [`CORE`], which the others load and hand every call to.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::abi::{TABLE, Table};
use crate::layout::CORE;

/// The name by which a copy finds the core's table.
pub(crate) const TABLE_SYMBOL: &str = "hccl_sim_table";

/// The functions of the core. Ends the process if the core cannot be loaded: a caller in C has no way
/// to hear of it, and the simulated libraries belong together.
pub(crate) fn table() -> &'static Table {
    static CHOSEN: OnceLock<&'static Table> = OnceLock::new();
    CHOSEN.get_or_init(|| match folder() {
        Some(folder) if !is_core() => {
            load(&folder.join(CORE)).unwrap_or_else(|error| fail(&error.to_string()))
        }
        _ => &TABLE,
    })
}

/// The folder of the libraries, if this is a copy in one.
pub(crate) fn folder() -> Option<&'static Path> {
    own_path().parent().filter(|folder| folder.join(CORE).is_file())
}

fn is_core() -> bool {
    own_path().file_name().is_some_and(|name| name == CORE)
}

/// Ends the process with the reason.
pub(crate) fn fail(reason: &str) -> ! {
    use std::io::Write;
    // If standard error is closed there is nobody to tell.
    drop(writeln!(std::io::stderr(), "hccl-sim: {reason}"));
    std::process::abort()
}

/// What this process has not given back to the simulated libraries in a folder, which it uses: communicators,
/// streams, events, memory and keys, in words. Empty if nothing.
///
/// # Errors
///
/// If they cannot be loaded from there.
pub fn held(folder: &Path) -> std::io::Result<String> {
    // SAFETY: the library has no initialisers of its own.
    let library =
        unsafe { Library::open(Some(folder.join("libascendcl.so")), RTLD_NOW | RTLD_LOCAL) };
    let library = library.map_err(std::io::Error::other)?;
    type Held = unsafe extern "C" fn() -> *const std::ffi::c_char;
    // SAFETY: the signature is the one in `abi.rs`.
    let get = unsafe { library.get::<Held>(b"HcclSimHeld\0") }.map_err(std::io::Error::other)?;
    // SAFETY: it takes nothing.
    let words = unsafe { get() };
    // SAFETY: it is text that stays as it is until this thread asks again.
    let words = unsafe { std::ffi::CStr::from_ptr(words) };
    Ok(words.to_string_lossy().into_owned())
}

fn load(path: &Path) -> Result<&'static Table, libloading::Error> {
    // SAFETY: the core has no initialisers of its own.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }?;
    // SAFETY: the core was laid out together with this copy, and is the same code.
    let get = unsafe { library.get::<extern "C" fn() -> *const Table>(TABLE_SYMBOL.as_bytes()) }?;
    let table = get();
    // Never unloaded: its threads run until the process ends.
    std::mem::forget(library);
    // SAFETY: it is a static of a library that stays loaded.
    Ok(unsafe { &*table })
}

#[unsafe(no_mangle)]
extern "C" fn hccl_sim_table() -> *const Table {
    &raw const TABLE
}

/// The file that this code was loaded from.
fn own_path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let own = own_path as fn() -> &'static Path as usize;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let file = maps.lines().find_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (from, to) = range.split_once('-')?;
            let from = usize::from_str_radix(from, 16).ok()?;
            let to = usize::from_str_radix(to, 16).ok()?;
            let path = rest.find('/').map(|at| &rest[at..])?;
            (from..to).contains(&own).then(|| PathBuf::from(path))
        });
        file.unwrap_or_else(|| fail("/proc/self/maps does not say where the library is"))
    })
}

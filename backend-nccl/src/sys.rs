//! The part of NCCL's C interface that this crate uses, and the search for the library.
//!
//! The declarations follow NCCL's own `nccl.h`, of version 2.19 and later ones. They are resolved when the
//! library is loaded, so that building takes no NCCL, and functions that came later may be missing.
#![allow(unsafe_code, reason = "loading a library and resolving its functions")]

use std::ffi::{c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use engine_core::native;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::error::NcclError;

/// Names the library's file.
pub(crate) const LIBRARY_VARIABLE: &str = "CKPT_ENGINE_NCCL_LIB";

/// The oldest version that this crate works with: 2.19 has `ncclCommRegister`, and a configuration of
/// the form below.
pub(crate) const OLDEST: c_int = 21900;

/// What a call returns: `ncclResult_t`.
pub(crate) type Status = c_int;
pub(crate) const SUCCESS: Status = 0;
pub(crate) const IN_PROGRESS: Status = 7;

/// `ncclUint8`.
pub(crate) const UINT8: c_int = 1;
/// `ncclFloat32`.
pub(crate) const FLOAT32: c_int = 7;
/// `ncclSum`.
pub(crate) const SUM: c_int = 0;
/// `NCCL_SHRINK_ABORT`: what a member that died has left under way is ended first.
pub(crate) const SHRINK_ABORT: c_int = 1;

/// A communicator: `ncclComm_t`.
pub(crate) type Comm = *mut c_void;
/// A stream of the CUDA driver, which the runtime's streams are.
pub(crate) type RawStream = *mut c_void;

/// What the members of a communicator find one another by: `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct UniqueId {
    pub(crate) internal: [u8; UNIQUE_ID_BYTES],
}
pub(crate) const UNIQUE_ID_BYTES: usize = 128;

/// How a communicator works: the fields of `ncclConfig_t` that 2.19 has. The library reads as many as
/// `size` says, and takes its defaults for those that came later.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// A communicator whose calls do not block.
    pub(crate) fn non_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: OLDEST.unsigned_abs(),
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

macro_rules! functions {
    (needed { $($name:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)* }
     optional { $($later:ident = $later_symbol:literal: fn($($later_argument:ty),*);)* }) => {
        /// The library's functions; `None` for those that the version does not have.
        pub(crate) struct Api {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> $result,)*
            $(pub(crate) $later: Option<unsafe extern "C" fn($($later_argument),*) -> Status>,)*
            /// What was loaded.
            pub(crate) found: Found,
            /// Never unloaded: the library's threads may outlive every communicator.
            _library: Library,
        }

        impl Api {
            fn resolve(library: Library, path: PathBuf) -> Result<Self, NcclError> {
                $(let $name = {
                    // SAFETY: the type is the one that nccl.h declares for this name.
                    let address = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol)
                    };
                    *address.map_err(|source| NcclError::Symbol { path: path.clone(), source })?
                };)*
                $(let $later = {
                    // SAFETY: as above.
                    let address = unsafe {
                        library.get::<unsafe extern "C" fn($($later_argument),*) -> Status>(
                            $later_symbol,
                        )
                    };
                    address.ok().map(|address| *address)
                };)*
                let found = Found { path, version: 0 };
                let mut api = Self { $($name,)* $($later,)* found, _library: library };
                // SAFETY: it writes one number.
                let status = unsafe { (api.get_version)(&mut api.found.version) };
                if status != SUCCESS || api.found.version < OLDEST {
                    let version = api.found.version();
                    return Err(NcclError::Version { path: api.found.path, version });
                }
                Ok(api)
            }
        }
    };
}

functions! {
    needed {
        get_version = "ncclGetVersion": fn(*mut c_int) -> Status;
        get_unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> Status;
        error_string = "ncclGetErrorString": fn(Status) -> *const c_char;
        last_error = "ncclGetLastError": fn(Comm) -> *const c_char;
        init = "ncclCommInitRankConfig":
            fn(*mut Comm, c_int, UniqueId, c_int, *const Config) -> Status;
        async_error = "ncclCommGetAsyncError": fn(Comm, *mut Status) -> Status;
        abort = "ncclCommAbort": fn(Comm) -> Status;
        broadcast = "ncclBroadcast":
            fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, RawStream) -> Status;
        all_reduce = "ncclAllReduce":
            fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, RawStream) -> Status;
    }
    optional {
        register = "ncclCommRegister": fn(Comm, *mut c_void, usize, *mut *mut c_void);
        deregister = "ncclCommDeregister": fn(Comm, *mut c_void);
        shrink = "ncclCommShrink": fn(Comm, *mut c_int, c_int, *mut Comm, *const Config, c_int);
    }
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("found", &self.found).finish_non_exhaustive()
    }
}

/// A library that was loaded.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// The file, as it was named or found.
    pub(crate) path: PathBuf,
    version: c_int,
}

impl Found {
    /// The version as people write it: 2.28.9.
    pub(crate) fn version(&self) -> String {
        in_words(self.version)
    }

    /// Whether several ranks may share a GPU, which NCCL allows for tests since 2.30.
    pub(crate) fn can_share_gpus(&self) -> bool {
        self.version >= 23000
    }
}

fn in_words(version: c_int) -> String {
    format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
}

/// Loads NCCL, once for the process.
///
/// # Errors
///
/// `Missing` if there is none, saying where it was looked for; `Load`, `Symbol` and `Version` if what was
/// found cannot be used; `Another` if the process has loaded it from somewhere else.
pub(crate) fn load(library: Option<&Path>) -> Result<&'static Api, NcclError> {
    static LOADED: Mutex<Option<&'static Api>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(api) = *loaded {
        return match library {
            Some(wanted) if wanted != api.found.path => {
                Err(NcclError::Another { wanted: wanted.into(), loaded: api.found.path.clone() })
            }
            _ => Ok(api),
        };
    }
    let api = &*Box::leak(Box::new(find(library)?));
    *loaded = Some(api);
    Ok(api)
}

/// What the user names is the only place to look at: another library would be a surprise.
fn find(library: Option<&Path>) -> Result<Api, NcclError> {
    let named = library.map(PathBuf::from);
    let named = named.or_else(|| std::env::var_os(LIBRARY_VARIABLE).map(PathBuf::from));
    if let Some(path) = named {
        return open(path);
    }
    let folders = usual_folders();
    let there = |folder: &PathBuf| {
        ["libnccl.so.2", "libnccl.so"]
            .map(|name| folder.join(name))
            .into_iter()
            .find(|p| p.is_file())
    };
    match folders.iter().find_map(there) {
        Some(path) => open(path),
        // The system's loader knows folders that nobody else does.
        None => open("libnccl.so.2".into()).map_err(|error| match error {
            NcclError::Load { .. } => NcclError::Missing { folders: folders.len() },
            error => error,
        }),
    }
}

fn open(path: PathBuf) -> Result<Api, NcclError> {
    // SAFETY: the library's constructors are those of NCCL, which expect nothing of the process.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
    let library = library.map_err(|source| NcclError::Load { path: path.clone(), source })?;
    Api::resolve(library, path)
}

/// Where `cargo xtask setup`, Python and packages put the library.
fn usual_folders() -> Vec<PathBuf> {
    let wheel = |folder: PathBuf| folder.join("nvidia/nccl/lib");
    let native = native::beside_the_program();
    let set_up =
        native.iter().flat_map(|folder| native::entries(folder, |name| name.starts_with("nccl")));
    let mut folders: Vec<PathBuf> = set_up.map(wheel).collect();
    folders.extend(native::python_packages().into_iter().map(wheel));
    folders.extend(native::system_folders());
    folders.push("/usr/local/cuda/lib64".into());
    native::distinct(folders)
}

//! The part of NIXL's C interface that this crate uses, and the search for the library.
//!
//! The declarations follow `wrapper.h` of the crate `nixl-sys` 1.5. They are resolved when the library is loaded: building needs neither
//! NIXL nor a C++ compiler, and a library that is missing or too old is an ordinary error.
#![allow(unsafe_code, reason = "loading a library and resolving its functions")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use engine_core::native;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::error::NixlError;

/// The variable that names the folder of the library, or of an unpacked wheel with it.
pub(crate) const LIBRARY_DIR_VARIABLE: &str = "CKPT_ENGINE_NIXL_DIR";

/// The result of a call: 0 for success, 1 for "still under way", negative for a failure.
pub(crate) type Status = c_int;
pub(crate) const SUCCESS: Status = 0;
pub(crate) const IN_PROGRESS: Status = 1;
pub(crate) const BACKEND_ERROR: Status = -2;
pub(crate) const NOT_FOUND: Status = -6;

/// An object of the library.
pub(crate) type Handle = *mut c_void;

/// The kind of memory of the host.
pub(crate) const DRAM: c_int = 0;
/// The kind of memory of a device.
pub(crate) const VRAM: c_int = 1;
/// The kind of transfer from the peer to here.
pub(crate) const READ: c_int = 0;
/// The kind of transfer from here to the peer.
pub(crate) const WRITE: c_int = 1;

/// How an agent works: `nixl_capi_agent_config_t`.
#[repr(C)]
pub(crate) struct AgentConfig {
    pub(crate) enable_prog_thread: bool,
    pub(crate) enable_listen_thread: bool,
    pub(crate) listen_port: c_int,
    pub(crate) thread_sync: c_int,
    pub(crate) num_workers: c_uint,
    pub(crate) pthr_delay_us: u64,
    pub(crate) lthr_delay_us: u64,
    pub(crate) capture_telemetry: bool,
}

macro_rules! functions {
    ($($name:ident($($argument:ty),*);)*) => {
        /// The library's functions, by their names without `nixl_capi_`.
        pub(crate) struct Api {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> Status,)*
            /// What was loaded.
            pub(crate) found: Found,
            /// Never unloaded: NIXL's and UCX's threads and exit handlers may outlive every agent.
            _libraries: Vec<Library>,
        }

        impl Api {
            fn resolve(library: Library, mut kept: Vec<Library>, found: Found)
                -> Result<Self, NixlError>
            {
                $(let $name = {
                    let symbol = concat!("nixl_capi_", stringify!($name));
                    // SAFETY: the type is the one that NIXL's header declares for this name.
                    let address = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> Status>(symbol)
                    };
                    *address.map_err(|source| NixlError::Symbol {
                        path: found.path.clone(),
                        source,
                    })?
                };)*
                kept.push(library);
                Ok(Self { $($name,)* found, _libraries: kept })
            }
        }
    };
}

functions! {
    create_configured_agent(*const c_char, *const AgentConfig, *mut Handle);
    destroy_agent(Handle);
    create_params(*mut Handle);
    params_add(Handle, *const c_char, *const c_char);
    destroy_params(Handle);
    create_backend(Handle, *const c_char, Handle, *mut Handle);
    destroy_backend(Handle);
    create_opt_args(*mut Handle);
    opt_args_add_backend(Handle, Handle);
    destroy_opt_args(Handle);
    create_reg_dlist(c_int, *mut Handle);
    reg_dlist_add_desc(Handle, usize, usize, u64, *const c_void, usize);
    destroy_reg_dlist(Handle);
    register_mem(Handle, Handle, Handle);
    deregister_mem(Handle, Handle, Handle);
    get_local_md(Handle, *mut *mut c_void, *mut usize);
    load_remote_md(Handle, *const c_void, usize, *mut *mut c_char);
    invalidate_remote_md(Handle, *const c_char);
    create_xfer_dlist(c_int, *mut Handle);
    xfer_dlist_add_desc(Handle, usize, usize, u64);
    destroy_xfer_dlist(Handle);
    create_xfer_req(Handle, c_int, Handle, Handle, *const c_char, *mut Handle, Handle);
    post_xfer_req(Handle, Handle, Handle);
    get_xfer_status(Handle, Handle);
    release_xfer_req(Handle, Handle);
    destroy_xfer_req(Handle);
    gen_notif(Handle, *const c_char, *const c_void, usize, Handle);
    create_notif_map(*mut Handle);
    destroy_notif_map(Handle);
    get_notifs(Handle, Handle, Handle);
    notif_map_size(Handle, *mut usize);
    notif_map_get_agent_at(Handle, usize, *mut *const c_char);
    notif_map_get_notifs_size(Handle, *const c_char, *mut usize);
    notif_map_get_notif(Handle, *const c_char, usize, *mut *const c_void, *mut usize);
    notif_map_clear(Handle);
}

unsafe extern "C" {
    /// Blobs and names that the library returns come from `malloc`.
    pub(crate) fn free(pointer: *mut c_void);
    fn atexit(function: extern "C" fn()) -> c_int;
    fn getifaddrs(list: *mut *mut InterfaceAddress) -> c_int;
    fn freeifaddrs(list: *mut InterfaceAddress);
}

/// An address of an interface: Linux's `struct ifaddrs`.
#[repr(C)]
struct InterfaceAddress {
    next: *mut Self,
    name: *const c_char,
    flags: c_uint,
    address: *const SocketAddress,
    netmask: *const c_void,
    peer: *const c_void,
    data: *const c_void,
}

/// The beginning of Linux's `struct sockaddr`.
#[repr(C)]
struct SocketAddress {
    family: u16,
}

/// Linux's `struct sockaddr_in`, as far as it is read.
#[repr(C)]
struct SocketAddressV4 {
    family: u16,
    port: u16,
    address: [u8; 4],
}

/// Linux's `struct sockaddr_in6`, as far as it is read.
#[repr(C)]
struct SocketAddressV6 {
    family: u16,
    port: u16,
    flow: u32,
    address: [u8; 16],
}

/// The addresses of this host's interfaces, with the interfaces' names. Empty if the system does not tell.
pub(crate) fn interfaces() -> Vec<(String, IpAddr)> {
    const INET: u16 = 2;
    const INET6: u16 = 10;
    let mut list = std::ptr::null_mut();
    // SAFETY: the call writes a pointer to a list.
    if unsafe { getifaddrs(&raw mut list) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: the list's pointers lead to its entries, and the last one nowhere, until it is freed.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.next;
        // SAFETY: it leads to an address, whose beginning is its family, or nowhere.
        let family = unsafe { entry.address.as_ref() }.map(|address| address.family);
        let address = match family {
            Some(INET) => {
                // SAFETY: an address of this family is of this type.
                let address = unsafe { &*entry.address.cast::<SocketAddressV4>() };
                IpAddr::from(address.address)
            }
            Some(INET6) => {
                // SAFETY: an address of this family is of this type.
                let address = unsafe { &*entry.address.cast::<SocketAddressV6>() };
                IpAddr::from(address.address)
            }
            _ => continue,
        };
        // SAFETY: each entry has a name, which ends with a zero.
        let name = unsafe { CStr::from_ptr(entry.name) };
        found.push((name.to_string_lossy().into_owned(), address));
    }
    // SAFETY: it is the list from above, of which nothing is left.
    unsafe { freeifaddrs(list) };
    found
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("found", &self.found).finish_non_exhaustive()
    }
}

/// A library that was loaded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// The file.
    pub(crate) path: PathBuf,
    /// NIXL's version, from its wheel.
    pub(crate) nixl: Option<String>,
    /// UCX's version, from UCX.
    pub(crate) ucx: Option<String>,
    /// NIXL's plugins: the transports and stores that it can use.
    pub(crate) plugins: Vec<String>,
}

/// Registers a function to be called when the process ends, before all that were registered so far.
pub(crate) fn at_exit(function: extern "C" fn()) {
    // SAFETY: the function may be called at any time, in any thread.
    if unsafe { atexit(function) } != 0 {
        tracing::warn!("agents that are not closed may crash the process at its end");
    }
}

/// Loads NIXL, once for the process.
///
/// # Errors
///
/// `Missing` if there is none, with the searched folders; `Load`, `Symbol` and `Version` if the library cannot be used; `Another` if the
/// process has loaded it from somewhere else.
pub(crate) fn load(library_dir: Option<&Path>) -> Result<&'static Api, NixlError> {
    static LOADED: Mutex<Option<&'static Api>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(api) = *loaded {
        return match library_dir {
            Some(dir) if find_in(dir).is_none_or(|path| path != api.found.path) => {
                Err(NixlError::Another { wanted: dir.into(), loaded: api.found.path.clone() })
            }
            _ => Ok(api),
        };
    }
    let api = &*Box::leak(Box::new(open(find(library_dir)?)?));
    *loaded = Some(api);
    Ok(api)
}

fn open(path: PathBuf) -> Result<Api, NixlError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let nixl = wheel_version(folder);
    if let Some(version) = nixl.as_ref().filter(|version| !version.starts_with("1.")) {
        return Err(NixlError::Version { path, version: version.clone() });
    }
    let mut kept = Vec::new();
    let ucx = prepare_ucx(folder, &mut kept);
    let plugins = plugins(folder);
    // SAFETY: the library's constructors are those of NIXL, which expect nothing of the process. The
    // symbols are global because NIXL's plugins, loaded later, look for them there.
    let opened = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
    let library = opened.map_err(|source| NixlError::Load { path: path.clone(), source })?;
    Api::resolve(library, kept, Found { path, nixl, ucx, plugins })
}

/// Loads UCX before NIXL does, to disable what this host does not need. Returns its version.
fn prepare_ucx(folder: &Path, kept: &mut Vec<Library>) -> Option<String> {
    let beside = ucx_folder(folder)?;
    let open = |stem: &str| {
        let path = native::entries(&beside, |name| name.starts_with(stem) && name.contains(".so"))
            .pop()?;
        // SAFETY: UCX's constructors expect nothing of the process; NIXL's plugin would load the same
        // file.
        unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.ok()
    };
    let (ucs, ucp) = (open("libucs")?, open("libucp")?);
    type Set = unsafe extern "C" fn(*const c_char, *const c_char) -> c_int;
    // SAFETY: the type is the one that UCX's header ucs/config/global_opts.h declares.
    if let Ok(set) = unsafe { ucs.get::<Set>("ucs_global_opts_set_value") } {
        let choose = |variable: &str, name: &CStr, value: &CStr| {
            if std::env::var_os(variable).is_some() {
                return;
            }
            // SAFETY: both strings end with a zero; no other thread uses UCX yet.
            let status = unsafe { set(name.as_ptr(), value.as_ptr()) };
            if status != 0 {
                tracing::debug!(status, variable, "UCX refuses an option");
            }
        };
        // UCX would cache the kind of memory of each allocation, by hooks into the CUDA runtime. It misses earlier allocations, and
        // everything if its hooks cannot be loaded.
        choose("UCX_MEMTYPE_CACHE", c"MEMTYPE_CACHE", c"n");
        if infiniband_devices().is_empty() {
            // UCX's InfiniBand module, beside a distribution's InfiniBand drivers, crashes the process if there is no such device.
            choose("UCX_MODULES", c"MODULES", c"^ib");
        }
    }
    type Version = unsafe extern "C" fn() -> *const c_char;
    // SAFETY: the type is the one that UCX's header ucp/api/ucp.h declares.
    let version = unsafe { ucp.get::<Version>("ucp_get_version_string") }.ok().map(|version| {
        // SAFETY: it takes nothing and returns a string that is never freed.
        let text = unsafe { version() };
        // SAFETY: as above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    });
    kept.extend([ucs, ucp]);
    version
}

/// The names of this host's InfiniBand and RoCE devices.
pub(crate) fn infiniband_devices() -> Vec<String> {
    let devices = native::entries(Path::new("/sys/class/infiniband"), |_| true);
    devices.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect()
}

/// The folder of the UCX that belongs to a NIXL: beside it, or in the wheel's folder of libraries.
fn ucx_folder(folder: &Path) -> Option<PathBuf> {
    let has_ucx =
        |folder: &PathBuf| !native::entries(folder, |name| name.starts_with("libucp")).is_empty();
    let wheel = folder.parent().map(|parent| {
        native::entries(parent, |name| name.starts_with("nixl") && name.ends_with(".libs"))
    });
    let mut candidates = vec![folder.to_path_buf()];
    candidates.extend(wheel.into_iter().flatten());
    candidates.into_iter().find(has_ucx)
}

/// The version in the name of the wheel's metadata folder.
fn wheel_version(folder: &Path) -> Option<String> {
    let described = native::entries(folder.parent()?, |name| {
        name.starts_with("nixl") && name.ends_with(".dist-info")
    });
    let flavour = folder.file_name()?.to_str()?.trim_start_matches('.').split('.').next()?;
    described.iter().find_map(|path| {
        let name = path.file_name()?.to_str()?.strip_suffix(".dist-info")?;
        let (package, version) = name.split_once('-')?;
        (package == flavour).then(|| version.to_owned())
    })
}

fn plugins(folder: &Path) -> Vec<String> {
    let files = native::entries(&folder.join("plugins"), |name| name.starts_with("libplugin_"));
    let name = |path: &PathBuf| {
        Some(
            path.file_name()?.to_str()?.strip_prefix("libplugin_")?.strip_suffix(".so")?.to_owned(),
        )
    };
    files.iter().filter_map(name).collect()
}

const FILE: &str = "libnixl_capi.so";

fn find(library_dir: Option<&Path>) -> Result<PathBuf, NixlError> {
    let named = library_dir.map(PathBuf::from);
    let named = named.or_else(|| std::env::var_os(LIBRARY_DIR_VARIABLE).map(PathBuf::from));
    // A folder that the user names is the only one searched: another library would be a surprise.
    let folders = named.map_or_else(usual_folders, |folder| vec![folder]);
    folders.iter().find_map(|folder| find_in(folder)).ok_or(NixlError::Missing { folders })
}

/// The library in a folder, or in a wheel that was unpacked or installed there.
fn find_in(folder: &Path) -> Option<PathBuf> {
    let mut places = vec![folder.to_path_buf()];
    let libraries = |name: &str| name.starts_with(".nixl") && name.ends_with(".mesonpy.libs");
    places.extend(native::entries(folder, libraries));
    let file = places.into_iter().map(|place| place.join(FILE)).find(|path| path.is_file())?;
    file.canonicalize().ok()
}

/// The folders where `cargo xtask setup`, Python and packages put libraries.
fn usual_folders() -> Vec<PathBuf> {
    let native = native::beside_the_program();
    let mut folders: Vec<PathBuf> = native
        .iter()
        .flat_map(|folder| native::entries(folder, |name| name.starts_with("nixl")))
        .collect();
    folders.extend(native::python_packages());
    folders.extend(native::system_folders());
    let arch = std::env::consts::ARCH;
    folders.extend([
        "/usr/local/nixl/lib".into(),
        format!("/usr/local/nixl/lib/{arch}-linux-gnu").into(),
        format!("/opt/nvidia/nvda_nixl/lib/{arch}-linux-gnu").into(),
        "/opt/nvidia/nvda_nixl/lib64".into(),
    ]);
    native::distinct(folders)
}

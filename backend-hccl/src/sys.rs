//! The part of ACL's and HCCL's C interfaces that this crate uses, and the search for the libraries.
//!
//! The declarations follow the headers of CANN 8.1 and later, as the Python package `torch_npu` has
//! them. They are resolved when the libraries are loaded, so that building takes none of it. A function
//! that only some versions have is an `Option`: what it is for degrades, with a reason.
#![allow(unsafe_code, reason = "loading libraries and resolving their functions")]
#![allow(non_snake_case, reason = "these are the names of the C headers")]

use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::error::HcclError;

/// Names the folder of the libraries.
pub(crate) const LIBRARY_DIR_VARIABLE: &str = "CKPT_ENGINE_HCCL_DIR";

/// What a call returns: `aclError` or `HcclResult`, 0 for success.
pub(crate) type Status = i32;

/// A stream, an event or a communicator.
pub(crate) type Handle = *mut c_void;

macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:literal, $known:ident($($words:literal),+);)*) => {
        $($(#[$doc])* pub(crate) const $name: $type = $value;)*

        /// All of these, to be compared with the headers.
        #[cfg(test)]
        pub(crate) const CONSTANTS: &[Constant] = &[$(Constant {
            name: stringify!($name),
            value: $name as i128,
            known: Known::$known(&[$($words),+]),
        }),*];
    };
}

/// A number that the libraries know as well.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Constant {
    pub(crate) name: &'static str,
    pub(crate) value: i128,
    pub(crate) known: Known,
}

/// Where a number comes from.
#[cfg(test)]
#[derive(Debug)]
pub(crate) enum Known {
    /// What the headers call it.
    Header(&'static [&'static str]),
    /// They do not have it: what does.
    Elsewhere(&'static [&'static str]),
}

constants! {
    SUCCESS: Status = 0, Header("ACL_SUCCESS", "HCCL_SUCCESS");
    /// What ranks need to find the one that asked for it; most of it is never written.
    ROOT_INFO_BYTES: usize = 4108, Header("HCCL_ROOT_INFO_BYTES", "sizeof(HcclRootInfo)");

    HUGE_FIRST: i32 = 0, Header("ACL_MEM_MALLOC_HUGE_FIRST");
    HOST_TO_DEVICE: i32 = 1, Header("ACL_MEMCPY_HOST_TO_DEVICE");
    DEVICE_TO_HOST: i32 = 2, Header("ACL_MEMCPY_DEVICE_TO_HOST");
    STREAM_COMPLETE: i32 = 0, Header("ACL_STREAM_STATUS_COMPLETE");
    /// The other way round than a stream's.
    EVENT_COMPLETE: i32 = 1, Header("ACL_EVENT_RECORDED_STATUS_COMPLETE");
    HBM_MEMORY: i32 = 1, Header("ACL_HBM_MEM");
    INT8: i32 = 0, Header("HCCL_DATA_TYPE_INT8");
    UINT8: i32 = 7, Header("HCCL_DATA_TYPE_UINT8");
    REDUCE_MAX: i32 = 2, Header("HCCL_REDUCE_MAX");
    /// The most elements of one operation.
    MOST_ELEMENTS: u64 = 0x7_ffff_ffff, Elsewhere("HCCL's source checks counts against it");
    EXPORT_TO_ALL: u64 = 1, Header("ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION");
    /// The length of a key, its final zero included.
    IPC_KEY_BYTES: usize = 65, Elsewhere("the manual of aclrtIpcMemGetExportKey says it");

    INVALID_PARAMETER: Status = 100_000, Header("ACL_ERROR_INVALID_PARAM");
    NOT_INITIALISED: Status = 100_001, Header("ACL_ERROR_UNINITIALIZE");
    /// `aclInit` was called before, by the embedding program.
    REPEATED_INIT: Status = 100_002, Header("ACL_ERROR_REPEAT_INITIALIZE");
    RUNTIME_PARAMETER: Status = 107_000, Header("ACL_ERROR_RT_PARAM_INVALID");
    INVALID_DEVICE: Status = 107_001, Header("ACL_ERROR_RT_INVALID_DEVICEID");
    NO_CONTEXT: Status = 107_002, Header("ACL_ERROR_RT_CONTEXT_NULL");
    STREAM_OF_ANOTHER_CONTEXT: Status = 107_003, Header("ACL_ERROR_RT_STREAM_CONTEXT");
    UNALIGNED: Status = 107_008, Header("ACL_ERROR_RT_ADDR_UNALIGNED");
    STREAM_ABORTED: Status = 107_023, Header("ACL_ERROR_RT_STREAM_ABORT");
    UNSUPPORTED: Status = 207_000, Header("ACL_ERROR_RT_FEATURE_NOT_SUPPORT");
    OUT_OF_DEVICE_MEMORY: Status = 207_001, Header("ACL_ERROR_RT_MEMORY_ALLOCATION");
    NOT_PERMITTED: Status = 207_006, Header("ACL_ERROR_RT_NO_PERMISSION");
    AI_CPU_EXCEPTION: Status = 507_018, Header("ACL_ERROR_RT_AICPU_EXCEPTION");
    SHARING_FAILED: Status = 507_022, Header("ACL_ERROR_RT_IPC_ERROR");
    SYNCHRONISE_TIMEOUT: Status = 507_046, Header("ACL_ERROR_RT_STREAM_SYNC_TIMEOUT");
    OPERATION_TIMEOUT: Status = 507_048, Header("ACL_ERROR_RT_FFTS_PLUS_TIMEOUT");
    DEVICE_MEMORY_ERROR: Status = 507_053, Header("ACL_ERROR_RT_DEVICE_MEM_ERROR");
    LINK_ERROR: Status = 507_056, Header("ACL_ERROR_RT_LINK_ERROR");

    HCCL_PARAMETER: Status = 1, Header("HCCL_E_PARA");
    HCCL_NULL_POINTER: Status = 2, Header("HCCL_E_PTR");
    HCCL_MEMORY: Status = 3, Header("HCCL_E_MEMORY");
    HCCL_INTERNAL: Status = 4, Header("HCCL_E_INTERNAL");
    HCCL_UNSUPPORTED: Status = 5, Header("HCCL_E_NOT_SUPPORT");
    HCCL_NOT_FOUND: Status = 6, Header("HCCL_E_NOT_FOUND");
    HCCL_UNAVAILABLE: Status = 7, Header("HCCL_E_UNAVAIL");
    HCCL_SYSTEM_CALL: Status = 8, Header("HCCL_E_SYSCALL");
    HCCL_TIMEOUT: Status = 9, Header("HCCL_E_TIMEOUT");
    HCCL_OPEN_FILE: Status = 10, Header("HCCL_E_OPEN_FILE_FAILURE");
    HCCL_TCP_CONNECT: Status = 11, Header("HCCL_E_TCP_CONNECT");
    HCCL_ROCE_CONNECT: Status = 12, Header("HCCL_E_ROCE_CONNECT");
    HCCL_TCP_TRANSFER: Status = 13, Header("HCCL_E_TCP_TRANSFER");
    HCCL_ROCE_TRANSFER: Status = 14, Header("HCCL_E_ROCE_TRANSFER");
    HCCL_RUNTIME: Status = 15, Header("HCCL_E_RUNTIME");
    HCCL_DRIVER: Status = 16, Header("HCCL_E_DRV");
    HCCL_PROFILING: Status = 17, Header("HCCL_E_PROFILING");
    HCCL_DEVICE_LIBRARY: Status = 18, Header("HCCL_E_CCE");
    HCCL_NETWORK: Status = 19, Header("HCCL_E_NETWORK");
    /// Still in use.
    AGAIN: Status = 20, Header("HCCL_E_AGAIN");
    /// The only asynchronous error.
    REMOTE: Status = 21, Header("HCCL_E_REMOTE");
    HCCL_SUSPENDING: Status = 22, Header("HCCL_E_SUSPENDING");
    HCCL_NOT_REPEATED: Status = 23, Header("HCCL_E_OPRETRY_FAIL");
    HCCL_OUT_OF_MEMORY: Status = 24, Header("HCCL_E_OOM");
}

macro_rules! functions {
    ($($library:ident $need:ident $name:ident($($argument:ty),*) -> $result:ty;)*) => {
        /// The libraries' functions.
        pub(crate) struct Api {
            $(pub(crate) $name: functions!(@type $need unsafe extern "C" fn($($argument),*) -> $result),)*
            /// What was loaded.
            pub(crate) found: Found,
            /// Never unloaded: their threads outlive every engine.
            _libraries: Libraries,
        }

        impl Api {
            fn resolve(libraries: Libraries) -> Result<Self, HcclError> {
                let (mut missing, mut absent) = (Vec::new(), Vec::new());
                $(
                    let $name = {
                        type Function = unsafe extern "C" fn($($argument),*) -> $result;
                        // SAFETY: the type is the one that the headers declare for this name.
                        let function = unsafe {
                            libraries.find::<Function>(Of::$library, stringify!($name))
                        };
                        if function.is_none() {
                            functions!(@list $need missing absent).push(stringify!($name));
                        }
                        function
                    };
                )*
                if !missing.is_empty() {
                    return Err(libraries.refuse(missing));
                }
                let mut found = Found { paths: libraries.paths(), absent, ..Found::default() };
                let Some(api) = (|| Some(Self {
                    $($name: functions!(@value $need $name),)*
                    found: Found::default(),
                    _libraries: libraries,
                }))() else {
                    return Err(HcclError::Symbols { paths: found.paths, names: Vec::new() });
                };
                found.simulated = api.HcclSimVersion.map(|version| {
                    // SAFETY: it takes nothing.
                    let text = unsafe { version() };
                    // SAFETY: it returns a string that is never freed.
                    unsafe { words(text) }
                });
                Ok(Self { found, ..api })
            }
        }

        /// The names of all functions that are looked for, and whether an engine can do without each.
        pub(crate) const FUNCTIONS: &[(&str, bool)] =
            &[$((stringify!($name), functions!(@optional $need))),*];

        /// The same functions, by what their calls pass: to be compared with the headers.
        #[cfg(test)]
        pub(crate) fn calls() -> Vec<hccl_sim::headers::Call> {
            use hccl_sim::headers::{Abi, Call};
            vec![$(Call {
                name: stringify!($name).to_owned(),
                result: <$result as Abi>::value(),
                arguments: vec![$(<$argument as Abi>::value()),*],
            }),*]
        }
    };
    (@type required $type:ty) => { $type };
    (@type optional $type:ty) => { Option<$type> };
    (@value required $value:ident) => { $value? };
    (@value optional $value:ident) => { $value };
    (@optional required) => { false };
    (@optional optional) => { true };
    (@list required $missing:ident $absent:ident) => { $missing };
    (@list optional $missing:ident $absent:ident) => { $absent };
}

functions! {
    Acl required aclInit(*const c_char) -> Status;
    Acl required aclrtSetDevice(i32) -> Status;
    Acl required aclrtGetDeviceCount(*mut u32) -> Status;
    Acl required aclrtMalloc(*mut *mut c_void, usize, i32) -> Status;
    Acl required aclrtFree(*mut c_void) -> Status;
    Acl required aclrtMallocHost(*mut *mut c_void, usize) -> Status;
    Acl required aclrtFreeHost(*mut c_void) -> Status;
    Acl required aclrtMemcpy(*mut c_void, usize, *const c_void, usize, i32) -> Status;
    Acl required aclrtMemcpyAsync(*mut c_void, usize, *const c_void, usize, i32, Handle) -> Status;
    Acl required aclrtMemset(*mut c_void, usize, i32, usize) -> Status;
    Acl required aclrtCreateStream(*mut Handle) -> Status;
    Acl required aclrtDestroyStream(Handle) -> Status;
    Acl required aclrtSynchronizeStreamWithTimeout(Handle, i32) -> Status;
    Acl required aclrtStreamQuery(Handle, *mut i32) -> Status;
    Acl required aclrtCreateEvent(*mut Handle) -> Status;
    Acl required aclrtDestroyEvent(Handle) -> Status;
    Acl required aclrtRecordEvent(Handle, Handle) -> Status;
    Acl required aclrtStreamWaitEvent(Handle, Handle) -> Status;
    Acl required aclrtQueryEventStatus(Handle, *mut i32) -> Status;
    Acl optional aclrtStreamAbort(Handle) -> Status;
    Acl optional aclGetRecentErrMsg() -> *const c_char;
    Acl optional aclrtGetSocName() -> *const c_char;
    Acl optional aclrtGetVersion(*mut i32, *mut i32, *mut i32) -> Status;
    Acl optional aclrtGetMemInfo(i32, *mut usize, *mut usize) -> Status;
    Acl optional aclrtIpcMemGetExportKey(*mut c_void, usize, *mut c_char, usize, u64) -> Status;
    Acl optional aclrtIpcMemImportByKey(*mut *mut c_void, *const c_char, u64) -> Status;
    Acl optional aclrtIpcMemClose(*const c_char) -> Status;
    Acl optional aclrtGetLogicDevIdByUserDevId(i32, *mut i32) -> Status;
    Acl optional aclrtGetPhyDevIdByLogicDevId(i32, *mut i32) -> Status;
    Hccl required HcclGetRootInfo(*mut c_char) -> Status;
    Hccl required HcclCommInitRootInfo(u32, *const c_char, u32, *mut Handle) -> Status;
    Hccl required HcclBroadcast(*mut c_void, u64, i32, u32, Handle, Handle) -> Status;
    Hccl required HcclAllReduce(*mut c_void, *mut c_void, u64, i32, i32, Handle, Handle) -> Status;
    Hccl required HcclCommDestroy(Handle) -> Status;
    Hccl optional HcclGetCommAsyncError(Handle, *mut Status) -> Status;
    Hccl optional HcclGetErrorString(Status) -> *const c_char;
    Hccl optional HcclGetCommConfigCapability() -> u32;
    Acl optional HcclSimVersion() -> *const c_char;
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("found", &self.found).finish_non_exhaustive()
    }
}

/// A string of the libraries; empty for null.
///
/// # Safety
///
/// `text` is null, or a string that stays as it is during the call.
pub(crate) unsafe fn words(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, so a string by contract.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
}

/// What was loaded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// The files: ACL's, then HCCL's.
    pub(crate) paths: Vec<PathBuf>,
    /// The optional functions that they lack.
    pub(crate) absent: Vec<&'static str>,
    /// What a simulator says of itself; `None` for the real libraries.
    pub(crate) simulated: Option<String>,
}

/// Whose function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    Acl,
    Hccl,
}

#[derive(Debug)]
struct Libraries {
    acl: (PathBuf, Library),
    /// `libhccl.so`, and `libhcomm.so` where there is one.
    hccl: Vec<(PathBuf, Library)>,
}

impl Libraries {
    /// # Safety
    ///
    /// `T` is a function pointer of the type that the function of that name has.
    unsafe fn find<T: Copy>(&self, of: Of, symbol: &str) -> Option<T> {
        let acl = std::iter::once(&self.acl).filter(|_| of == Of::Acl);
        let hccl = self.hccl.iter().filter(|_| of == Of::Hccl);
        acl.chain(hccl).find_map(|(_, library)| {
            // SAFETY: the type is right by contract.
            unsafe { library.get::<T>(symbol) }.ok().map(|found| *found)
        })
    }

    fn paths(&self) -> Vec<PathBuf> {
        let hccl = self.hccl.iter().map(|(path, _)| path.clone());
        std::iter::once(self.acl.0.clone()).chain(hccl).collect()
    }

    /// Why libraries without these functions are of no use.
    fn refuse(&self, names: Vec<&'static str>) -> HcclError {
        if names.contains(&"HcclGetRootInfo") {
            let path = self.hccl.first().map(|(path, _)| path.clone()).unwrap_or_default();
            return HcclError::Foreign { path };
        }
        HcclError::Symbols { paths: self.paths(), names }
    }
}

const ACL: &str = "libascendcl.so";
const HCCL: &str = "libhccl.so";
const HCOMM: &str = "libhcomm.so";

static LOADED: Mutex<Option<&'static Api>> = Mutex::new(None);

/// The libraries that the process has loaded.
pub(crate) fn loaded() -> Option<&'static Api> {
    *LOADED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Loads the libraries, once for the process.
///
/// # Errors
///
/// `Missing` if there are none, saying where they were looked for; `Load`, `Foreign` and `Symbols` if
/// what was found cannot be used; `Another` if the process has loaded them from somewhere else.
pub(crate) fn load(library_dir: Option<&Path>) -> Result<&'static Api, HcclError> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(api) = *loaded {
        let own = api.found.paths.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
        return match library_dir {
            Some(dir) if find_in(dir, ACL).is_none_or(|path| path != own) => {
                Err(HcclError::Another { wanted: dir.into(), loaded: own.into() })
            }
            _ => Ok(api),
        };
    }
    let api = &*Box::leak(Box::new(open(library_dir)?));
    *loaded = Some(api);
    Ok(api)
}

fn open(library_dir: Option<&Path>) -> Result<Api, HcclError> {
    let named = library_dir.map(PathBuf::from);
    let named = named.or_else(|| std::env::var_os(LIBRARY_DIR_VARIABLE).map(PathBuf::from));
    // What the user names is the only place to look at: another library would be a surprise.
    let is_named = named.is_some();
    let folders = named.map_or_else(usual_folders, |folder| vec![folder]);
    let find = |file: &str| folders.iter().find_map(|folder| find_in(folder, file));
    let missing = |file| HcclError::Missing { file, folders: folders.clone(), named: is_named };
    let (acl, hccl) = (find(ACL), find(HCCL));
    let Some(acl) = acl else {
        // Where another vendor's library of that name is all there is, it is better to say so.
        if let Some(path) = hccl.filter(|path| is_foreign(path)) {
            return Err(HcclError::Foreign { path });
        }
        return Err(missing(ACL));
    };
    let hccl = hccl.ok_or_else(|| missing(HCCL))?;
    // HCCL's own dependencies include ACL, which therefore comes first.
    let acl = (acl.clone(), dlopen(&acl)?);
    let mut libraries = Libraries { acl, hccl: vec![(hccl.clone(), dlopen(&hccl)?)] };
    let beside = hccl.parent().and_then(|folder| find_in(folder, HCOMM));
    if let Some(path) = beside.or_else(|| find(HCOMM)) {
        libraries.hccl.push((path.clone(), dlopen(&path)?));
    }
    Api::resolve(libraries)
}

fn dlopen(path: &Path) -> Result<Library, HcclError> {
    // SAFETY: the libraries' constructors are those of CANN, which expect nothing of the process.
    let opened = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    opened.map_err(|source| HcclError::Load { path: path.into(), source })
}

/// Whether a `libhccl.so` is none of Ascend's: Habana's Gaudi has one.
fn is_foreign(path: &Path) -> bool {
    let Ok(library) = dlopen(path) else { return false };
    type Function = unsafe extern "C" fn(*mut c_char) -> Status;
    // SAFETY: the type is the one that HCCL's header declares; it is not called.
    unsafe { library.get::<Function>("HcclGetRootInfo") }.is_err()
}

fn find_in(folder: &Path, file: &str) -> Option<PathBuf> {
    let path = folder.join(file);
    if path.is_file() { path.canonicalize().ok() } else { None }
}

/// Where CANN's installers put the libraries, and where the loader would look.
fn usual_folders() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let mut toolkits: Vec<PathBuf> =
        ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"].into_iter().filter_map(variable).collect();
    toolkits.extend(
        [
            "/usr/local/Ascend/ascend-toolkit/latest",
            "/usr/local/Ascend/cann",
            "/usr/local/Ascend/nnrt/latest",
            "/usr/local/Ascend/nnae/latest",
            "/usr/local/Ascend/latest",
        ]
        .map(PathBuf::from),
    );
    if let Some(home) = variable("HOME") {
        toolkits.push(home.join("Ascend/ascend-toolkit/latest"));
    }
    let machine = format!("{}-linux/lib64", std::env::consts::ARCH);
    let mut folders: Vec<PathBuf> = toolkits
        .into_iter()
        .flat_map(|toolkit| [toolkit.join("lib64"), toolkit.join(&machine)])
        .collect();
    let searched = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&searched));
    folders.retain(|folder| folder.is_absolute());
    let mut seen = std::collections::HashSet::new();
    folders.retain(|folder| seen.insert(folder.clone()));
    folders
}

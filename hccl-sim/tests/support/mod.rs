//! What the tests of this crate share: their own declarations of the C interface, and processes.
//!
//! The libraries are loaded by their paths, as any client would. Nothing of the simulator's own
//! declarations is used here.

#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::too_many_arguments, reason = "functions of the C headers have as many")]
#![allow(non_snake_case, reason = "these are the names of the C headers")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::{CStr, c_char, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::ptr;
use std::time::{Duration, Instant};

use hccl_sim::Profile;
use libloading::Library;

pub(crate) type Pointer = *mut c_void;

pub(crate) const ROOT_INFO: usize = 4108;
pub(crate) const INT8: i32 = 0;
pub(crate) const INT32: i32 = 2;
pub(crate) const FP32: i32 = 4;
pub(crate) const UINT8: i32 = 7;
pub(crate) const SUM: i32 = 0;
pub(crate) const HOST_TO_DEVICE: i32 = 1;
pub(crate) const DEVICE_TO_HOST: i32 = 2;
pub(crate) const DEVICE_TO_DEVICE: i32 = 3;
pub(crate) const HUGE_FIRST: i32 = 0;
pub(crate) const NORMAL_ONLY: i32 = 2;

/// How long anything here may take before it counts as a hang.
const LIMIT: Duration = Duration::from_secs(60);

const ROLE: &str = "CKPT_ENGINE_TEST_ROLE";
const RANK: &str = "CKPT_ENGINE_TEST_RANK";
const FOLDER: &str = "CKPT_ENGINE_TEST_FOLDER";

macro_rules! api {
    ($($library:ident fn $name:ident($($argument:ident: $ty:ty),*) -> $result:ty;)*) => {
        /// The functions of the simulated libraries that tests call. One that a profile lacks panics
        /// when it is called.
        #[derive(Debug)]
        pub(crate) struct Api {
            $($name: Option<unsafe extern "C" fn($($ty),*) -> $result>,)*
        }

        impl Api {
            pub(crate) fn load(folder: &Path) -> Self {
                let open = |name: &str| {
                    // SAFETY: the simulated libraries have no initialisers of their own.
                    let library = unsafe { Library::new(folder.join(name)) };
                    library.ok().map(|library| &*Box::leak(Box::new(library)))
                };
                let acl = [open("libascendcl.so"), None];
                let hccl = [open("libhccl.so"), open("libhcomm.so")];
                assert!(acl[0].is_some() && hccl[0].is_some(), "{}", folder.display());
                let of = |library| if library == "acl" { acl } else { hccl };
                Self {
                    $($name: of(stringify!($library)).iter().flatten().find_map(|library| {
                        let name = concat!(stringify!($name), "\0");
                        // SAFETY: the signature is the one of the C headers.
                        unsafe { library.get(name.as_bytes()) }.ok().map(|symbol| *symbol)
                    }),)*
                }
            }

            $(
                pub(crate) fn $name(&self, $($argument: $ty),*) -> $result {
                    let function = self.$name.expect(stringify!($name));
                    // SAFETY: tests pass pointers to what lives as long as the call, or such ones
                    // as the simulator has to refuse without following them.
                    unsafe { function($($argument),*) }
                }
            )*
        }
    };
}

api! {
    acl fn HcclSimVersion() -> *const c_char;
    acl fn HcclSimHeld() -> *const c_char;
    acl fn aclInit(config: *const c_char) -> i32;
    acl fn aclFinalize() -> i32;
    acl fn aclGetRecentErrMsg() -> *const c_char;
    acl fn aclrtGetSocName() -> *const c_char;
    acl fn aclrtSetDevice(device: i32) -> i32;
    acl fn aclrtResetDevice(device: i32) -> i32;
    acl fn aclrtGetDevice(device: *mut i32) -> i32;
    acl fn aclrtGetDeviceCount(count: *mut u32) -> i32;
    acl fn aclrtGetMemInfo(attr: i32, free: *mut usize, total: *mut usize) -> i32;
    acl fn aclrtMalloc(out: *mut Pointer, size: usize, policy: i32) -> i32;
    acl fn aclrtFree(address: Pointer) -> i32;
    acl fn aclrtMallocHost(out: *mut Pointer, size: usize) -> i32;
    acl fn aclrtFreeHost(address: Pointer) -> i32;
    acl fn aclrtMemcpy(dst: Pointer, max: usize, src: *const c_void, n: usize, kind: i32) -> i32;
    acl fn aclrtMemcpyAsync(dst: Pointer, max: usize, src: *const c_void, n: usize, kind: i32, stream: Pointer) -> i32;
    acl fn aclrtMemset(address: Pointer, max: usize, value: i32, n: usize) -> i32;
    acl fn aclrtMemsetAsync(address: Pointer, max: usize, value: i32, n: usize, stream: Pointer) -> i32;
    acl fn aclrtCreateStream(out: *mut Pointer) -> i32;
    acl fn aclrtDestroyStream(stream: Pointer) -> i32;
    acl fn aclrtSynchronizeStream(stream: Pointer) -> i32;
    acl fn aclrtSynchronizeStreamWithTimeout(stream: Pointer, milliseconds: i32) -> i32;
    acl fn aclrtStreamQuery(stream: Pointer, status: *mut i32) -> i32;
    acl fn aclrtStreamAbort(stream: Pointer) -> i32;
    acl fn aclrtCreateEvent(out: *mut Pointer) -> i32;
    acl fn aclrtDestroyEvent(event: Pointer) -> i32;
    acl fn aclrtRecordEvent(event: Pointer, stream: Pointer) -> i32;
    acl fn aclrtStreamWaitEvent(stream: Pointer, event: Pointer) -> i32;
    acl fn aclrtSynchronizeEvent(event: Pointer) -> i32;
    acl fn aclrtSynchronizeEventWithTimeout(event: Pointer, milliseconds: i32) -> i32;
    acl fn aclrtQueryEventStatus(event: Pointer, status: *mut i32) -> i32;
    acl fn aclrtDeviceGetBareTgid(pid: *mut i32) -> i32;
    acl fn aclrtIpcMemGetExportKey(address: Pointer, size: usize, key: *mut c_char, len: usize, flags: u64) -> i32;
    acl fn aclrtIpcMemSetImportPid(key: *const c_char, pids: *mut i32, count: usize) -> i32;
    acl fn aclrtIpcMemImportByKey(out: *mut Pointer, key: *const c_char, flags: u64) -> i32;
    acl fn aclrtIpcMemClose(key: *const c_char) -> i32;
    hccl fn HcclGetRootInfo(info: *mut u8) -> i32;
    hccl fn HcclCommInitRootInfo(ranks: u32, info: *const u8, rank: u32, out: *mut Pointer) -> i32;
    hccl fn HcclCommInitRootInfoConfig(ranks: u32, info: *const u8, rank: u32, config: *const u8, out: *mut Pointer) -> i32;
    hccl fn HcclCommDestroy(comm: Pointer) -> i32;
    hccl fn HcclGetRankSize(comm: Pointer, ranks: *mut u32) -> i32;
    hccl fn HcclGetRankId(comm: Pointer, rank: *mut u32) -> i32;
    hccl fn HcclGetCommName(comm: Pointer, name: *mut c_char) -> i32;
    hccl fn HcclGetCommAsyncError(comm: Pointer, error: *mut i32) -> i32;
    hccl fn HcclGetErrorString(code: i32) -> *const c_char;
    hccl fn HcclGetCommConfigCapability() -> u32;
    hccl fn HcclBroadcast(buffer: Pointer, count: u64, dtype: i32, root: u32, comm: Pointer, stream: Pointer) -> i32;
    hccl fn HcclAllReduce(send: Pointer, receive: Pointer, count: u64, dtype: i32, op: i32, comm: Pointer, stream: Pointer) -> i32;
    hccl fn HcclAllGather(send: Pointer, receive: Pointer, count: u64, dtype: i32, comm: Pointer, stream: Pointer) -> i32;
    hccl fn HcclSend(buffer: Pointer, count: u64, dtype: i32, peer: u32, comm: Pointer, stream: Pointer) -> i32;
    hccl fn HcclRecv(buffer: Pointer, count: u64, dtype: i32, peer: u32, comm: Pointer, stream: Pointer) -> i32;
    hccl fn HcclBarrier(comm: Pointer, stream: Pointer) -> i32;
}

/// A pointer that may go to another thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent(pub(crate) Pointer);

// SAFETY: a handle or an address of the simulator, which may be used from any thread.
unsafe impl Send for Sent {}
// SAFETY: as above.
unsafe impl Sync for Sent {}

impl Sent {
    pub(crate) fn get(self) -> Pointer {
        self.0
    }
}

/// What one process of a test works with.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) rank: u32,
    pub(crate) ranks: u32,
    pub(crate) api: Api,
    folder: PathBuf,
}

/// Runs `body` in so many new processes, with environment variables: `1:NAME` is for rank 1 only, and
/// `profile` selects the libraries. All have to succeed. The calling test's name is taken from the body.
pub(crate) fn processes<F: Fn(&Process)>(ranks: u32, variables: &[(&str, &str)], body: F) {
    for (rank, output) in outputs(ranks, variables, body).into_iter().enumerate() {
        assert!(
            output.status.success(),
            "rank {rank}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// The same, where processes may end as they like; in such a process itself, nothing.
pub(crate) fn outputs<F: Fn(&Process)>(
    ranks: u32,
    variables: &[(&str, &str)],
    body: F,
) -> Vec<Output> {
    // `program::test::{{closure}}`
    let test = std::any::type_name::<F>().split("::").nth(1).unwrap();
    if let Ok(role) = std::env::var(ROLE) {
        assert_eq!(role, test, "a process runs its own test only");
        let folder = PathBuf::from(std::env::var(FOLDER).unwrap());
        let libraries = fs::read_to_string(folder.join("libraries")).unwrap();
        let rank = std::env::var(RANK).unwrap().parse().unwrap();
        let process = Process { rank, ranks, api: Api::load(Path::new(&libraries)), folder };
        body(&process);
        process.put(&format!("ran-{rank}"), &[]);
        return Vec::new();
    }
    let folder = tempfile::tempdir().unwrap();
    let profile = variables.iter().find(|(name, _)| *name == "profile");
    let profile = profile.map_or(Profile::Current, |(_, name)| Profile::from_name(name).unwrap());
    let libraries = hccl_sim::libraries(profile).unwrap();
    fs::write(folder.path().join("libraries"), libraries.to_str().unwrap()).unwrap();
    let children: Vec<Child> = (0..ranks)
        .map(|rank| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args([test, "--exact", "--nocapture", "--include-ignored"]);
            for (name, _) in std::env::vars_os() {
                if name.to_string_lossy().starts_with("HCCL_") {
                    command.env_remove(name);
                }
            }
            command.env(ROLE, test).env(RANK, rank.to_string()).env(FOLDER, folder.path());
            command.env("HCCL_SIM_TIME_SCALE", "0.25").env("HCCL_HOST_SOCKET_PORT_RANGE", "auto");
            for (name, value) in variables.iter().filter(|(name, _)| *name != "profile") {
                match name.split_once(':') {
                    Some((only, name)) if only == rank.to_string() => command.env(name, value),
                    Some(_) => &mut command,
                    None => command.env(name, value),
                };
            }
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let outputs: Vec<Output> = children.into_iter().map(|child| end(child, test)).collect();
    for (rank, output) in outputs.iter().enumerate() {
        // A name that is no test's would succeed as well.
        let ran = folder.path().join(format!("ran-{rank}")).exists();
        assert_eq!(ran, output.status.success(), "{test}: rank {rank}: {output:?}");
    }
    outputs
}

/// Waits for a process, which must not hang.
pub(crate) fn end(child: Child, what: &str) -> Output {
    hccl_sim::foreign::wait(child, LIMIT).unwrap_or_else(|error| panic!("{what}: {error}"))
}

impl Process {
    /// Tells the other processes something.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        let temporary = self.folder.join(format!("{name}.{}", self.rank));
        fs::write(&temporary, bytes).unwrap();
        fs::rename(temporary, self.folder.join(name)).unwrap();
    }

    /// Waits for what another process tells.
    pub(crate) fn get(&self, name: &str) -> Vec<u8> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match fs::read(self.folder.join(name)) {
                Ok(bytes) => return bytes,
                Err(_) => assert!(Instant::now() < deadline, "{name} did not come"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until all processes are here.
    pub(crate) fn meet(&self, name: &str) {
        self.put(&format!("{name}-{}", self.rank), &[]);
        for rank in 0..self.ranks {
            self.get(&format!("{name}-{rank}"));
        }
    }

    /// Begins as clients do, on the device of the rank's number.
    pub(crate) fn begin(&self) {
        self.ok(self.api.aclInit(ptr::null()));
        self.ok(self.api.aclrtSetDevice(self.rank as i32));
    }

    /// A call's status that has to be 0.
    #[track_caller]
    pub(crate) fn ok(&self, code: i32) {
        assert_eq!(code, 0, "rank {}: {}", self.rank, self.message());
    }

    /// The words for this thread's last failure.
    pub(crate) fn message(&self) -> String {
        text(self.api.aclGetRecentErrMsg())
    }

    pub(crate) fn stream(&self) -> Pointer {
        let mut stream = ptr::null_mut();
        self.ok(self.api.aclrtCreateStream(&raw mut stream));
        stream
    }

    pub(crate) fn event(&self) -> Pointer {
        let mut event = ptr::null_mut();
        self.ok(self.api.aclrtCreateEvent(&raw mut event));
        event
    }

    /// Device memory that holds these bytes.
    pub(crate) fn device(&self, bytes: &[u8]) -> Pointer {
        let mut buffer = ptr::null_mut();
        self.ok(self.api.aclrtMalloc(&raw mut buffer, bytes.len(), HUGE_FIRST));
        let (from, n) = (bytes.as_ptr().cast(), bytes.len());
        self.ok(self.api.aclrtMemcpy(buffer, n, from, n, HOST_TO_DEVICE));
        buffer
    }

    /// What device memory holds.
    pub(crate) fn bytes(&self, buffer: Pointer, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n];
        let to = bytes.as_mut_ptr().cast();
        self.ok(self.api.aclrtMemcpy(to, n, buffer, n, DEVICE_TO_HOST));
        bytes
    }

    /// A communicator of all processes.
    pub(crate) fn comm(&self, name: &str) -> Pointer {
        let (code, comm) = self.try_comm(name);
        self.ok(code);
        comm
    }

    pub(crate) fn try_comm(&self, name: &str) -> (i32, Pointer) {
        if self.rank == 0 {
            self.put(name, &self.root_info());
        }
        let info = self.get(name);
        self.init(&info, self.rank)
    }

    pub(crate) fn root_info(&self) -> Vec<u8> {
        let mut info = vec![0; ROOT_INFO];
        self.ok(self.api.HcclGetRootInfo(info.as_mut_ptr()));
        info
    }

    pub(crate) fn init(&self, info: &[u8], rank: u32) -> (i32, Pointer) {
        let mut comm = ptr::null_mut();
        let code = self.api.HcclCommInitRootInfo(self.ranks, info.as_ptr(), rank, &raw mut comm);
        (code, comm)
    }

    pub(crate) fn free_memory(&self) -> usize {
        let (mut free, mut total) = (0, 0);
        self.ok(self.api.aclrtGetMemInfo(1, &raw mut free, &raw mut total));
        free
    }
}

pub(crate) fn text(words: *const c_char) -> String {
    if words.is_null() {
        return String::new();
    }
    // SAFETY: the libraries give text that ends with a zero byte.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}

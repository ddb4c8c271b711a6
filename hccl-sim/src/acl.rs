//! The functions of `libascendcl.so`.

#![allow(non_snake_case, reason = "these are the names of the C headers")]

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::abi::*;
use crate::device::{Context, chip};
use crate::memory::Place;
use crate::settings::Chip;
use crate::stream::{Cancel, Event, Stream};
use crate::{Fault, Outcome, Profile, fault, lock, sim};

thread_local! {
    static RECENT: RefCell<CString> = RefCell::default();
}

/// Keeps the words of a failure for `aclGetRecentErrMsg`, and gives its code.
pub(crate) fn code(outcome: Outcome) -> i32 {
    let Err(fault) = outcome else { return 0 };
    let words = format!("hccl-sim: {}: {}", fault.code, fault.message).replace('\0', " ");
    RECENT.with_borrow_mut(|recent| *recent = CString::new(words).unwrap_or_default());
    fault.code
}

/// Whether `aclInit` was called.
pub(crate) fn ready() -> Outcome {
    match sim().life.load(Ordering::Acquire) {
        1 => Ok(()),
        0 => Err(fault(ACL_ERROR_UNINITIALIZE, "before aclInit")),
        _ => Err(fault(ACL_ERROR_UNINITIALIZE, "after aclFinalize")),
    }
}

/// The thread's context; most functions need one.
pub(crate) fn context() -> Result<Context, Fault> {
    ready()?;
    sim().devices.current()
}

/// A stream of the thread's context.
pub(crate) fn stream(handle: aclrtStream) -> Result<Arc<Stream>, Fault> {
    let context = context()?;
    let stream = sim().streams.get(handle as usize);
    let stream = stream.ok_or_else(|| fault(ACL_ERROR_RT_PARAM_INVALID, "not a stream"))?;
    if stream.context() == context {
        Ok(stream)
    } else {
        Err(fault(ACL_ERROR_RT_STREAM_CONTEXT, "a stream of another context"))
    }
}

fn event(handle: aclrtEvent) -> Result<Arc<Event>, Fault> {
    let context = context()?;
    let event = sim().events.get(handle as usize);
    let event = event.ok_or_else(|| fault(ACL_ERROR_RT_PARAM_INVALID, "not an event"))?;
    if event.context == context {
        Ok(event)
    } else {
        Err(fault(ACL_ERROR_RT_PARAM_INVALID, "an event of another context"))
    }
}

/// Writes a result where the caller wants it.
///
/// # Safety
///
/// `out` is null or valid for writes.
pub(crate) unsafe fn put<T>(out: *mut T, value: T, null: i64) -> Outcome {
    if out.is_null() {
        return Err(fault(null, "a null pointer for a result"));
    }
    // SAFETY: not null, so valid by contract; unaligned because callers in C get it wrong silently.
    unsafe { out.write_unaligned(value) };
    Ok(())
}

/// Text of a caller.
///
/// # Safety
///
/// `text` is null or ends with a zero byte.
unsafe fn text(text: *const c_char) -> Result<String, Fault> {
    if text.is_null() {
        return Err(fault(ACL_ERROR_INVALID_PARAM, "a null pointer for a text"));
    }
    // SAFETY: not null, so it ends with a zero byte by contract.
    let text = unsafe { CStr::from_ptr(text) };
    Ok(text.to_string_lossy().into_owned())
}

/// What no real library has: the text says that this one is simulated.
pub(crate) unsafe extern "C" fn HcclSimVersion() -> *const c_char {
    static VERSION: OnceLock<CString> = OnceLock::new();
    let version = VERSION.get_or_init(|| {
        let sim = sim();
        let text = format!(
            "hccl-sim {}, profile {}, chip {:?}: simulated",
            env!("CARGO_PKG_VERSION"),
            sim.profile.name(),
            sim.settings.chip
        );
        CString::new(text).unwrap_or_default()
    });
    version.as_ptr()
}

/// What no real library has either: what the process holds at this moment, in words; empty if nothing. It stays
/// until this thread asks again.
pub(crate) unsafe extern "C" fn HcclSimHeld() -> *const c_char {
    thread_local! {
        static HELD: RefCell<CString> = RefCell::default();
    }
    HELD.with_borrow_mut(|held| {
        *held = CString::new(sim().held()).unwrap_or_default();
        held.as_ptr()
    })
}

pub(crate) unsafe extern "C" fn aclInit(_config: *const c_char) -> aclError {
    let life = &sim().life;
    code(match life.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Ok(()),
        Err(1) => Err(fault(ACL_ERROR_REPEAT_INITIALIZE, "aclInit was called before")),
        Err(_) => Err(fault(ACL_ERROR_FAILURE, "aclInit after aclFinalize")),
    })
}

pub(crate) unsafe extern "C" fn aclFinalize() -> aclError {
    let life = &sim().life;
    code(match life.compare_exchange(1, 2, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Ok(()),
        Err(0) => Err(fault(ACL_ERROR_UNINITIALIZE, "before aclInit")),
        Err(_) => Err(fault(ACL_ERROR_REPEAT_FINALIZE, "aclFinalize was called before")),
    })
}

pub(crate) unsafe extern "C" fn aclGetRecentErrMsg() -> *const c_char {
    // As in the real library, valid until this thread's next failure.
    RECENT.with_borrow(|recent| if recent.is_empty() { std::ptr::null() } else { recent.as_ptr() })
}

pub(crate) unsafe extern "C" fn aclrtGetSocName() -> *const c_char {
    let name = match sim().settings.chip {
        Chip::A2 => c"Ascend910B-simulated",
        Chip::A3 => c"Ascend910_93-simulated",
        Chip::Ascend950 => c"Ascend950-simulated",
    };
    name.as_ptr()
}

pub(crate) unsafe extern "C" fn aclrtGetVersion(
    major: *mut i32,
    minor: *mut i32,
    patch: *mut i32,
) -> aclError {
    let version = if sim().profile == Profile::Cann81 { [1, 13, 0] } else { [1, 15, 0] };
    let write = |(out, value): (*mut i32, i32)| {
        // SAFETY: valid or null by the function's contract.
        unsafe { put(out, value, ACL_ERROR_INVALID_PARAM) }
    };
    code([major, minor, patch].into_iter().zip(version).try_for_each(write))
}

pub(crate) unsafe extern "C" fn aclrtSetDevice(device: i32) -> aclError {
    code(ready().and_then(|()| sim().devices.set(device)))
}

pub(crate) unsafe extern "C" fn aclrtResetDevice(device: i32) -> aclError {
    code(ready().and_then(|()| sim().devices.reset(device)))
}

pub(crate) unsafe extern "C" fn aclrtGetDevice(device: *mut i32) -> aclError {
    code(context().and_then(|context| {
        // SAFETY: valid or null by the function's contract.
        unsafe { put(device, context.device, ACL_ERROR_INVALID_PARAM) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtGetDeviceCount(count: *mut u32) -> aclError {
    code(ready().and_then(|()| {
        let devices = sim().settings.devices.len() as u32;
        // SAFETY: valid or null by the function's contract.
        unsafe { put(count, devices, ACL_ERROR_INVALID_PARAM) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtGetMemInfo(
    attr: aclrtMemAttr,
    free: *mut usize,
    total: *mut usize,
) -> aclError {
    code(context().and_then(|context| {
        if i64::from(attr) != ACL_HBM_MEM {
            return Err(fault(ACL_ERROR_INVALID_PARAM, "only ACL_HBM_MEM is known"));
        }
        let (free_bytes, all_bytes) = sim().memory.info(context.device);
        // SAFETY: valid or null by the function's contract.
        unsafe { put(free, free_bytes as usize, ACL_ERROR_INVALID_PARAM) }?;
        // SAFETY: valid or null by the function's contract.
        unsafe { put(total, all_bytes as usize, ACL_ERROR_INVALID_PARAM) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtMalloc(
    out: *mut *mut c_void,
    size: usize,
    policy: aclrtMemMallocPolicy,
) -> aclError {
    code(context().and_then(|context| {
        if out.is_null() {
            return Err(fault(ACL_ERROR_INVALID_PARAM, "a null pointer for a result"));
        }
        let address = sim().memory.allocate(context.device, size, policy)?;
        // SAFETY: valid by the function's contract.
        unsafe { put(out, address as *mut c_void, ACL_ERROR_INVALID_PARAM) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtFree(address: *mut c_void) -> aclError {
    code(context().and_then(|_| {
        if address.is_null() {
            return Err(fault(ACL_ERROR_INVALID_PARAM, "null cannot be freed"));
        }
        sim().memory.free(address as usize)
    }))
}

pub(crate) unsafe extern "C" fn aclrtMallocHost(out: *mut *mut c_void, size: usize) -> aclError {
    code(context().and_then(|_| {
        if out.is_null() {
            return Err(fault(ACL_ERROR_INVALID_PARAM, "a null pointer for a result"));
        }
        let address = sim().memory.allocate_host(size)?;
        // SAFETY: valid by the function's contract.
        unsafe { put(out, address as *mut c_void, ACL_ERROR_INVALID_PARAM) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtFreeHost(address: *mut c_void) -> aclError {
    code(context().and_then(|_| sim().memory.free_host(address as usize)))
}

/// The two ends of a copy, if they are what the caller says.
fn ends(dst: usize, src: usize, n: usize, kind: aclrtMemcpyKind) -> Result<(Place, Place), Fault> {
    let (to, from) = (sim().memory.find(dst, n)?, sim().memory.find(src, n)?);
    let is = (from.device().is_some(), to.device().is_some());
    let said = match i64::from(kind) {
        ACL_MEMCPY_HOST_TO_HOST => (false, false),
        ACL_MEMCPY_HOST_TO_DEVICE => (false, true),
        ACL_MEMCPY_DEVICE_TO_HOST => (true, false),
        ACL_MEMCPY_DEVICE_TO_DEVICE => (true, true),
        ACL_MEMCPY_DEFAULT => is,
        _ => return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "an unknown kind of copy")),
    };
    if is != said {
        let name = |device| if device { "device" } else { "host" };
        let message = format!(
            "the kind of the copy says {} to {}, the addresses {} to {}",
            name(said.0),
            name(said.1),
            name(is.0),
            name(is.1)
        );
        return Err(fault(ACL_ERROR_RT_PARAM_INVALID, message));
    }
    Ok((to, from))
}

fn fits(dst: *mut c_void, max: usize, src: *const c_void, n: usize) -> Outcome {
    if dst.is_null() || src.is_null() || n == 0 || n > max {
        let message = "a null pointer, nothing to do, or more than fits";
        return Err(fault(ACL_ERROR_INVALID_PARAM, message));
    }
    Ok(())
}

pub(crate) unsafe extern "C" fn aclrtMemcpy(
    dst: *mut c_void,
    max: usize,
    src: *const c_void,
    n: usize,
    kind: aclrtMemcpyKind,
) -> aclError {
    code(context().and_then(|_| {
        fits(dst, max, src, n)?;
        let (to, from) = ends(dst as usize, src as usize, n, kind)?;
        // SAFETY: host memory of that length by the function's contract.
        unsafe { to.copy_from(&from, n) };
        Ok(())
    }))
}

pub(crate) unsafe extern "C" fn aclrtMemcpyAsync(
    dst: *mut c_void,
    max: usize,
    src: *const c_void,
    n: usize,
    kind: aclrtMemcpyKind,
    stream: aclrtStream,
) -> aclError {
    code(self::stream(stream).and_then(|stream| {
        fits(dst, max, src, n)?;
        let (dst, src) = (dst as usize, src as usize);
        let (to, from) = ends(dst, src, n, kind)?;
        if [&to, &from].into_iter().any(|place| matches!(place, Place::Host { .. })) {
            let message = "host memory of an asynchronous copy has to come from aclrtMallocHost";
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, message));
        }
        if to.device().and(from.device()).is_some() && (dst | src) % 64 != 0 {
            let message = "copies within a device need addresses that are multiples of 64";
            return Err(fault(ACL_ERROR_RT_ADDR_UNALIGNED, message));
        }
        drop((to, from));
        let task = move |_: &Cancel| {
            // What was there when it was enqueued may be gone.
            let (to, from) = ends(dst, src, n, kind)?;
            if [&to, &from].into_iter().any(|place| matches!(place, Place::Host { .. })) {
                let message = "pinned memory of a copy was freed before it ran";
                return Err(fault(ACL_ERROR_RT_DEVICE_MEM_ERROR, message));
            }
            // SAFETY: neither end is unknown host memory.
            unsafe { to.copy_from(&from, n) };
            Ok(())
        };
        stream.push(task).map(drop)
    }))
}

fn set_place(address: usize, n: usize) -> Result<Place, Fault> {
    let place = sim().memory.find(address, n)?;
    if place.device().is_none() {
        return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "not device memory"));
    }
    Ok(place)
}

pub(crate) unsafe extern "C" fn aclrtMemset(
    address: *mut c_void,
    max: usize,
    value: i32,
    n: usize,
) -> aclError {
    code(context().and_then(|_| {
        fits(address, max, address, n)?;
        let place = set_place(address as usize, n)?;
        // SAFETY: it is device memory.
        unsafe { place.fill(value as u8, n) };
        Ok(())
    }))
}

pub(crate) unsafe extern "C" fn aclrtMemsetAsync(
    address: *mut c_void,
    max: usize,
    value: i32,
    n: usize,
    stream: aclrtStream,
) -> aclError {
    code(self::stream(stream).and_then(|stream| {
        fits(address, max, address, n)?;
        let address = address as usize;
        drop(set_place(address, n)?);
        let task = move |_: &Cancel| {
            let place = set_place(address, n)?;
            // SAFETY: it is device memory.
            unsafe { place.fill(value as u8, n) };
            Ok(())
        };
        stream.push(task).map(drop)
    }))
}

pub(crate) unsafe extern "C" fn aclrtCreateStream(out: *mut aclrtStream) -> aclError {
    code(context().and_then(|context| {
        if out.is_null() {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "a null pointer for a result"));
        }
        let handle = sim().streams.insert(Stream::start(context));
        // SAFETY: valid by the function's contract.
        unsafe { put(out, handle as aclrtStream, ACL_ERROR_RT_PARAM_INVALID) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtCreateStreamWithConfig(
    out: *mut aclrtStream,
    _priority: u32,
    _flag: u32,
) -> aclError {
    // SAFETY: the same contract.
    unsafe { aclrtCreateStream(out) }
}

pub(crate) unsafe extern "C" fn aclrtDestroyStream(stream: aclrtStream) -> aclError {
    code(self::stream(stream).map(|found| {
        found.close();
        drop(sim().streams.remove(stream as usize));
    }))
}

pub(crate) unsafe extern "C" fn aclrtDestroyStreamForce(stream: aclrtStream) -> aclError {
    // SAFETY: the same contract.
    unsafe { aclrtDestroyStream(stream) }
}

/// A limit in milliseconds; -1 is none.
fn limit(milliseconds: i32) -> Result<Option<Duration>, Fault> {
    match milliseconds {
        -1 => Ok(None),
        0.. => Ok(Some(Duration::from_millis(milliseconds.unsigned_abs().into()))),
        _ => Err(fault(ACL_ERROR_RT_PARAM_INVALID, "a negative timeout that is not -1")),
    }
}

pub(crate) unsafe extern "C" fn aclrtSynchronizeStream(stream: aclrtStream) -> aclError {
    // SAFETY: it asks nothing of its caller.
    unsafe { aclrtSynchronizeStreamWithTimeout(stream, -1) }
}

pub(crate) unsafe extern "C" fn aclrtSynchronizeStreamWithTimeout(
    stream: aclrtStream,
    milliseconds: i32,
) -> aclError {
    code(self::stream(stream).and_then(|stream| {
        let done = stream.wait(stream.submitted()?, limit(milliseconds)?, None)?;
        let message = format!("not done after {milliseconds} ms");
        done.ok_or_else(|| fault(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, message))
    }))
}

pub(crate) unsafe extern "C" fn aclrtStreamQuery(
    stream: aclrtStream,
    status: *mut aclrtStreamStatus,
) -> aclError {
    code(self::stream(stream).and_then(|stream| {
        let done = stream.is_complete(stream.submitted()?)?;
        let word = if done { ACL_STREAM_STATUS_COMPLETE } else { ACL_STREAM_STATUS_NOT_READY };
        // SAFETY: valid or null by the function's contract.
        unsafe { put(status, word as i32, ACL_ERROR_RT_PARAM_INVALID) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtStreamAbort(stream: aclrtStream) -> aclError {
    // From any thread of the device: it is how another one ends a wait.
    code(self::stream(stream).map(|stream| stream.abort()))
}

pub(crate) unsafe extern "C" fn aclrtCreateEvent(out: *mut aclrtEvent) -> aclError {
    code(context().and_then(|context| {
        if out.is_null() {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "a null pointer for a result"));
        }
        let event = Event { context, record: Mutex::new(None) };
        let handle = sim().events.insert(Arc::new(event));
        // SAFETY: valid by the function's contract.
        unsafe { put(out, handle as aclrtEvent, ACL_ERROR_RT_PARAM_INVALID) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtCreateEventExWithFlag(
    out: *mut aclrtEvent,
    _flag: u32,
) -> aclError {
    // SAFETY: the same contract.
    unsafe { aclrtCreateEvent(out) }
}

pub(crate) unsafe extern "C" fn aclrtDestroyEvent(event: aclrtEvent) -> aclError {
    code(self::event(event).map(|_| drop(sim().events.remove(event as usize))))
}

pub(crate) unsafe extern "C" fn aclrtRecordEvent(
    event: aclrtEvent,
    stream: aclrtStream,
) -> aclError {
    code(self::event(event).and_then(|event| {
        let stream = self::stream(stream)?;
        let mut record = lock(&event.record);
        let number = stream.push(|_: &Cancel| Ok(()))?;
        *record = Some((stream, number));
        Ok(())
    }))
}

pub(crate) unsafe extern "C" fn aclrtStreamWaitEvent(
    stream: aclrtStream,
    event: aclrtEvent,
) -> aclError {
    code(self::event(event).and_then(|event| {
        let stream = self::stream(stream)?;
        let (other, number) = event.recorded()?;
        let task = move |cancel: &Cancel| {
            other.wait(number, None, Some(cancel))?.ok_or_else(Cancel::fault)
        };
        stream.push(task).map(drop)
    }))
}

pub(crate) unsafe extern "C" fn aclrtSynchronizeEvent(event: aclrtEvent) -> aclError {
    // SAFETY: it asks nothing of its caller.
    unsafe { aclrtSynchronizeEventWithTimeout(event, -1) }
}

pub(crate) unsafe extern "C" fn aclrtSynchronizeEventWithTimeout(
    event: aclrtEvent,
    milliseconds: i32,
) -> aclError {
    code(self::event(event).and_then(|event| {
        let (stream, number) = event.recorded()?;
        let done = stream.wait(number, limit(milliseconds)?, None)?;
        let message = format!("not reached after {milliseconds} ms");
        done.ok_or_else(|| fault(ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, message))
    }))
}

pub(crate) unsafe extern "C" fn aclrtQueryEventStatus(
    event: aclrtEvent,
    status: *mut aclrtEventRecordedStatus,
) -> aclError {
    code(self::event(event).and_then(|event| {
        let record = lock(&event.record).clone();
        let done = record.map_or(Ok(false), |(stream, number)| stream.is_complete(number))?;
        let word = if done {
            ACL_EVENT_RECORDED_STATUS_COMPLETE
        } else {
            ACL_EVENT_RECORDED_STATUS_NOT_READY
        };
        // SAFETY: valid or null by the function's contract.
        unsafe { put(status, word as i32, ACL_ERROR_RT_PARAM_INVALID) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtDeviceGetBareTgid(pid: *mut i32) -> aclError {
    code(context().and_then(|_| {
        let own = std::process::id() as i32;
        // SAFETY: valid or null by the function's contract.
        unsafe { put(pid, own, ACL_ERROR_INVALID_PARAM) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtGetLogicDevIdByUserDevId(
    device: i32,
    logic: *mut i32,
) -> aclError {
    code(ready().and_then(|()| {
        let chip = chip(device)?;
        // SAFETY: valid or null by the function's contract.
        unsafe { put(logic, chip, ACL_ERROR_INVALID_PARAM) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtGetPhyDevIdByLogicDevId(
    logic: i32,
    out: *mut i32,
) -> aclError {
    code(ready().and_then(|()| {
        if !(0..sim().settings.chips).contains(&logic) {
            return Err(fault(ACL_ERROR_RT_INVALID_DEVICEID, format!("there is no chip {logic}")));
        }
        // SAFETY: valid or null by the function's contract.
        unsafe { put(out, logic, ACL_ERROR_INVALID_PARAM) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtIpcMemGetExportKey(
    address: *mut c_void,
    size: usize,
    key: *mut c_char,
    len: usize,
    flags: u64,
) -> aclError {
    code(context().and_then(|context| {
        if key.is_null() || len < crate::ipc::KEY_BYTES {
            let message = format!("a key has {} bytes", crate::ipc::KEY_BYTES);
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, message));
        }
        if flags & !(ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION as u64) != 0 {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "an unknown flag"));
        }
        let check_pids = flags == 0;
        let chip = chip(context.device)?;
        let text = sim().sharing.export(address as usize, size, chip, check_pids)?;
        let bytes: [u8; crate::ipc::KEY_BYTES] = crate::ipc::key_bytes(&text);
        // SAFETY: not null, and at least that long by the function's contract.
        unsafe { put(key.cast(), bytes, ACL_ERROR_RT_PARAM_INVALID) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtIpcMemSetImportPid(
    key: *const c_char,
    pids: *mut i32,
    count: usize,
) -> aclError {
    code(context().and_then(|_| {
        // SAFETY: null or text by the function's contract.
        let key = unsafe { text(key) }?;
        if pids.is_null() || count == 0 || count > 1 << 16 {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "no processes"));
        }
        // SAFETY: not null, and so many numbers by the function's contract.
        let pids = unsafe { std::slice::from_raw_parts(pids, count) };
        sim().sharing.allow(&key, pids)
    }))
}

pub(crate) unsafe extern "C" fn aclrtIpcMemImportByKey(
    out: *mut *mut c_void,
    key: *const c_char,
    flags: u64,
) -> aclError {
    code(context().and_then(|context| {
        if out.is_null() {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "a null pointer for a result"));
        }
        if flags & !(ACL_RT_IPC_MEM_IMPORT_FLAG_ENABLE_PEER_ACCESS as u64) != 0 {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "an unknown flag"));
        }
        // SAFETY: null or text by the function's contract.
        let key = unsafe { text(key) }?;
        let chip = chip(context.device)?;
        let address = sim().sharing.import(&key, context.device, chip, flags != 0)?;
        // SAFETY: valid by the function's contract.
        unsafe { put(out, address as *mut c_void, ACL_ERROR_RT_PARAM_INVALID) }
    }))
}

pub(crate) unsafe extern "C" fn aclrtIpcMemClose(key: *const c_char) -> aclError {
    code(context().and_then(|_| {
        // SAFETY: null or text by the function's contract.
        let key = unsafe { text(key) }?;
        sim().sharing.close(&key)
    }))
}

//! One function for each call of the driver and of NVRTC: status in, `Result` out.
#![allow(unsafe_code, reason = "calls into CUDA")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

use cudarc::driver::sys as cu;
use cudarc::nvrtc::sys as rtc;

use crate::CudaError;

pub(crate) type Context = cu::CUcontext;
pub(crate) type RawStream = cu::CUstream;
pub(crate) type RawEvent = cu::CUevent;
pub(crate) type Module = cu::CUmodule;
pub(crate) type Function = cu::CUfunction;
/// An exported allocation; plain bytes.
pub(crate) const IPC_HANDLE_BYTES: usize = 64;

fn checked(call: &'static str, status: cu::CUresult) -> Result<(), CudaError> {
    if status == cu::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const c_char = null();
    // SAFETY: the out pointer is valid; the driver writes a static string or null.
    let named = unsafe { cu::cuGetErrorString(status, &mut text) };
    let words = if named == cu::CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: not null, and a static C string of the driver.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        format!("{status:?}")
    };
    Err(CudaError::Driver { call, code: status as u32, words })
}

/// Whether there is a driver at all: every other function needs that asked before.
pub(crate) fn driver_is_present() -> bool {
    // SAFETY: loads the system's own driver library, which runs its initialisers.
    unsafe { cu::is_culib_present() }
}

pub(crate) fn init() -> Result<(), CudaError> {
    // SAFETY: no arguments but flags, which have to be 0.
    checked("cuInit", unsafe { cu::cuInit(0) })
}

pub(crate) fn driver_version() -> Result<i32, CudaError> {
    let mut version = 0;
    // SAFETY: the out pointer is valid.
    checked("cuDriverGetVersion", unsafe { cu::cuDriverGetVersion(&mut version) })?;
    Ok(version)
}

pub(crate) fn device_count() -> Result<i32, CudaError> {
    let mut count = 0;
    // SAFETY: the out pointer is valid.
    checked("cuDeviceGetCount", unsafe { cu::cuDeviceGetCount(&mut count) })?;
    Ok(count)
}

pub(crate) fn device(ordinal: i32) -> Result<i32, CudaError> {
    let mut device = 0;
    // SAFETY: the out pointer is valid; the driver checks the ordinal.
    checked("cuDeviceGet", unsafe { cu::cuDeviceGet(&mut device, ordinal) })?;
    Ok(device)
}

pub(crate) fn device_name(device: i32) -> Result<String, CudaError> {
    let mut name = [0 as c_char; 256];
    // SAFETY: the buffer is as long as it is said to be, and the driver ends the name with a zero.
    let status = unsafe { cu::cuDeviceGetName(name.as_mut_ptr(), 255, device) };
    checked("cuDeviceGetName", status)?;
    // SAFETY: the last byte was never written, so there is a zero.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}

pub(crate) fn attribute(device: i32, what: cu::CUdevice_attribute) -> Result<i32, CudaError> {
    let mut value = 0;
    // SAFETY: the out pointer is valid.
    let status = unsafe { cu::cuDeviceGetAttribute(&mut value, what, device) };
    checked("cuDeviceGetAttribute", status)?;
    Ok(value)
}

pub(crate) fn retain(device: i32) -> Result<Context, CudaError> {
    let mut context = null_mut();
    // SAFETY: the out pointer is valid; the reference is given back by `release`.
    let status = unsafe { cu::cuDevicePrimaryCtxRetain(&mut context, device) };
    checked("cuDevicePrimaryCtxRetain", status)?;
    Ok(context)
}

pub(crate) fn release(device: i32) -> Result<(), CudaError> {
    // SAFETY: pairs with a `retain` of this device.
    checked("cuDevicePrimaryCtxRelease", unsafe { cu::cuDevicePrimaryCtxRelease_v2(device) })
}

pub(crate) fn set_current(context: Context) -> Result<(), CudaError> {
    // SAFETY: the context is one that `retain` gave and that is not released yet.
    checked("cuCtxSetCurrent", unsafe { cu::cuCtxSetCurrent(context) })
}

pub(crate) fn memory_info() -> Result<(usize, usize), CudaError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the out pointers are valid.
    checked("cuMemGetInfo", unsafe { cu::cuMemGetInfo_v2(&mut free, &mut total) })?;
    Ok((free, total))
}

pub(crate) fn alloc(bytes: usize) -> Result<u64, CudaError> {
    let mut address = 0;
    // SAFETY: the out pointer is valid.
    checked("cuMemAlloc", unsafe { cu::cuMemAlloc_v2(&mut address, bytes) })?;
    Ok(address)
}

pub(crate) fn free(address: u64) -> Result<(), CudaError> {
    // SAFETY: the address is one that `alloc` gave; the driver waits for work that uses it.
    checked("cuMemFree", unsafe { cu::cuMemFree_v2(address) })
}

/// Pinned host memory, zeroed.
pub(crate) fn alloc_host(bytes: usize) -> Result<*mut u8, CudaError> {
    let mut address: *mut c_void = null_mut();
    // SAFETY: the out pointer is valid.
    checked("cuMemHostAlloc", unsafe { cu::cuMemHostAlloc(&mut address, bytes, 0) })?;
    // SAFETY: the driver gave so many bytes at this address.
    unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
    Ok(address.cast())
}

pub(crate) fn free_host(address: *mut u8) -> Result<(), CudaError> {
    // SAFETY: the address is one that `alloc_host` gave.
    checked("cuMemFreeHost", unsafe { cu::cuMemFreeHost(address.cast()) })
}

/// The bytes of pinned memory.
///
/// # Safety
///
/// `address` is that of `len` bytes of `alloc_host` that live as long as the slice, which nothing else
/// writes to meanwhile, a stream included.
pub(crate) unsafe fn host_bytes<'a>(address: *mut u8, len: usize) -> &'a mut [u8] {
    // SAFETY: the caller's, word by word.
    unsafe { std::slice::from_raw_parts_mut(address, len) }
}

pub(crate) fn copy_from_pinned(
    target: u64,
    source: *const u8,
    bytes: usize,
    stream: RawStream,
) -> Result<(), CudaError> {
    // SAFETY: callers pass ranges that they have checked, and keep both until the stream is done.
    let status = unsafe { cu::cuMemcpyHtoDAsync_v2(target, source.cast(), bytes, stream) };
    checked("cuMemcpyHtoDAsync", status)
}

pub(crate) fn copy_to_pinned(
    target: *mut u8,
    source: u64,
    bytes: usize,
    stream: RawStream,
) -> Result<(), CudaError> {
    // SAFETY: callers pass ranges that they have checked, and keep both until the stream is done.
    let status = unsafe { cu::cuMemcpyDtoHAsync_v2(target.cast(), source, bytes, stream) };
    checked("cuMemcpyDtoHAsync", status)
}

pub(crate) fn write(target: u64, source: &[u8]) -> Result<(), CudaError> {
    // SAFETY: the range was checked by the caller; the call returns when it has read the source.
    let status = unsafe { cu::cuMemcpyHtoD_v2(target, source.as_ptr().cast(), source.len()) };
    checked("cuMemcpyHtoD", status)?;
    // The last part may still be on its way from the driver's own memory, and no other stream of ours
    // waits for the default one, which it is on.
    synchronize(null_mut())
}

pub(crate) fn read(target: &mut [u8], source: u64) -> Result<(), CudaError> {
    // SAFETY: as in `write`.
    let status = unsafe { cu::cuMemcpyDtoH_v2(target.as_mut_ptr().cast(), source, target.len()) };
    checked("cuMemcpyDtoH", status)
}

pub(crate) fn copy_on_device(
    target: u64,
    source: u64,
    bytes: usize,
    stream: RawStream,
) -> Result<(), CudaError> {
    // SAFETY: callers pass ranges that they have checked, and keep both until the stream is done.
    let status = unsafe { cu::cuMemcpyDtoDAsync_v2(target, source, bytes, stream) };
    checked("cuMemcpyDtoDAsync", status)
}

pub(crate) fn fill(
    target: u64,
    byte: u8,
    bytes: usize,
    stream: RawStream,
) -> Result<(), CudaError> {
    // SAFETY: as in `copy_on_device`.
    let status = unsafe { cu::cuMemsetD8Async(target, byte, bytes, stream) };
    checked("cuMemsetD8Async", status)
}

pub(crate) fn stream() -> Result<RawStream, CudaError> {
    let mut stream = null_mut();
    let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: the out pointer is valid.
    checked("cuStreamCreate", unsafe { cu::cuStreamCreate(&mut stream, flags) })?;
    Ok(stream)
}

pub(crate) fn destroy_stream(stream: RawStream) -> Result<(), CudaError> {
    // SAFETY: the stream is one that `stream` gave, and is not used any more.
    checked("cuStreamDestroy", unsafe { cu::cuStreamDestroy_v2(stream) })
}

pub(crate) fn synchronize(stream: RawStream) -> Result<(), CudaError> {
    // SAFETY: the stream is alive.
    checked("cuStreamSynchronize", unsafe { cu::cuStreamSynchronize(stream) })
}

pub(crate) fn wait_for(stream: RawStream, event: RawEvent) -> Result<(), CudaError> {
    // SAFETY: both are alive.
    checked("cuStreamWaitEvent", unsafe { cu::cuStreamWaitEvent(stream, event, 0) })
}

pub(crate) fn event(timing: bool) -> Result<RawEvent, CudaError> {
    let mut event = null_mut();
    let flags = match timing {
        true => cu::CUevent_flags::CU_EVENT_DEFAULT,
        false => cu::CUevent_flags::CU_EVENT_DISABLE_TIMING,
    };
    // SAFETY: the out pointer is valid.
    checked("cuEventCreate", unsafe { cu::cuEventCreate(&mut event, flags as u32) })?;
    Ok(event)
}

pub(crate) fn destroy_event(event: RawEvent) -> Result<(), CudaError> {
    // SAFETY: the event is one that `event` gave.
    checked("cuEventDestroy", unsafe { cu::cuEventDestroy_v2(event) })
}

pub(crate) fn record(event: RawEvent, stream: RawStream) -> Result<(), CudaError> {
    // SAFETY: both are alive.
    checked("cuEventRecord", unsafe { cu::cuEventRecord(event, stream) })
}

/// Whether all that was recorded before is done.
pub(crate) fn is_done(event: RawEvent) -> Result<bool, CudaError> {
    // SAFETY: the event is alive.
    match unsafe { cu::cuEventQuery(event) } {
        cu::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        status => checked("cuEventQuery", status).map(|()| true),
    }
}

pub(crate) fn await_event(event: RawEvent) -> Result<(), CudaError> {
    // SAFETY: the event is alive.
    checked("cuEventSynchronize", unsafe { cu::cuEventSynchronize(event) })
}

pub(crate) fn elapsed_ms(start: RawEvent, end: RawEvent) -> Result<f32, CudaError> {
    let mut milliseconds = 0.0;
    // SAFETY: the out pointer is valid, the events are alive.
    let status = unsafe { cu::cuEventElapsedTime_v2(&mut milliseconds, start, end) };
    checked("cuEventElapsedTime", status)?;
    Ok(milliseconds)
}

pub(crate) fn export(address: u64) -> Result<[u8; IPC_HANDLE_BYTES], CudaError> {
    let mut handle = cu::CUipcMemHandle { reserved: [0; IPC_HANDLE_BYTES] };
    // SAFETY: the out pointer is valid, the address is the start of an allocation.
    checked("cuIpcGetMemHandle", unsafe { cu::cuIpcGetMemHandle(&mut handle, address) })?;
    Ok(handle.reserved.map(|byte| byte as u8))
}

pub(crate) fn import(handle: [u8; IPC_HANDLE_BYTES]) -> Result<u64, CudaError> {
    let handle = cu::CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
    let mut address = 0;
    // SAFETY: the out pointer is valid; the driver checks the handle.
    let status = unsafe { cu::cuIpcOpenMemHandle_v2(&mut address, handle, 1) };
    checked("cuIpcOpenMemHandle", status)?;
    Ok(address)
}

pub(crate) fn close_import(address: u64) -> Result<(), CudaError> {
    // SAFETY: the address is one that `import` gave.
    checked("cuIpcCloseMemHandle", unsafe { cu::cuIpcCloseMemHandle(address) })
}

pub(crate) fn load_module(image: &[u8]) -> Result<Module, CudaError> {
    let mut module = null_mut();
    // SAFETY: the image is a cubin as NVRTC made it; the driver checks it.
    let status = unsafe { cu::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
    checked("cuModuleLoadData", status)?;
    Ok(module)
}

pub(crate) fn unload(module: Module) -> Result<(), CudaError> {
    // SAFETY: the module is one that `load_module` gave, none of its kernels runs any more.
    checked("cuModuleUnload", unsafe { cu::cuModuleUnload(module) })
}

pub(crate) fn function(module: Module, name: &CStr) -> Result<Function, CudaError> {
    let mut function = null_mut();
    // SAFETY: the out pointer is valid, the module is alive.
    let status = unsafe { cu::cuModuleGetFunction(&mut function, module, name.as_ptr()) };
    checked("cuModuleGetFunction", status)?;
    Ok(function)
}

pub(crate) fn blocks_per_multiprocessor(
    function: Function,
    threads: u32,
) -> Result<i32, CudaError> {
    let mut blocks = 0;
    // SAFETY: the out pointer is valid, the function's module is alive.
    let status = unsafe {
        cu::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, function, threads as c_int, 0)
    };
    checked("cuOccupancyMaxActiveBlocksPerMultiprocessor", status)?;
    Ok(blocks)
}

/// Launches a kernel whose parameters are 8 bytes each, or fit into 8 little-endian ones.
pub(crate) fn launch(
    function: Function,
    grid: u32,
    threads: u32,
    stream: RawStream,
    parameters: &mut [u64],
) -> Result<(), CudaError> {
    let mut pointers: Vec<*mut c_void> =
        parameters.iter_mut().map(|parameter| std::ptr::from_mut(parameter).cast()).collect();
    // SAFETY: there is a pointer for each parameter of the kernel, to at least as many bytes as it has;
    // what the addresses among them point to is kept until the stream is done.
    let status = unsafe {
        cu::cuLaunchKernel(
            function,
            grid,
            1,
            1,
            threads,
            1,
            1,
            0,
            stream,
            pointers.as_mut_ptr(),
            null_mut(),
        )
    };
    checked("cuLaunchKernel", status)
}

fn compiled(call: &'static str, status: rtc::nvrtcResult) -> Result<(), CudaError> {
    if status == rtc::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    Err(CudaError::Compiler { call, log: format!("{status:?}") })
}

/// Opens NVRTC by its path, for good, so that it is found under its name.
pub(crate) fn preload_nvrtc(library: &Path) -> Result<(), CudaError> {
    // SAFETY: loads NVIDIA's compiler library, which the user named; it runs its initialisers.
    match unsafe { libloading::Library::new(library) } {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => {
            Err(CudaError::NoCompiler { reason: format!("{}: {error}", library.display()) })
        }
    }
}

/// Whether NVRTC can be loaded: `compile` needs that asked before.
pub(crate) fn nvrtc_is_present() -> bool {
    // SAFETY: loads NVIDIA's compiler library, which runs its initialisers.
    unsafe { rtc::is_culib_present() }
}

pub(crate) fn nvrtc_version() -> Result<(i32, i32), CudaError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the out pointers are valid.
    compiled("nvrtcVersion", unsafe { rtc::nvrtcVersion(&mut major, &mut minor) })?;
    Ok((major, minor))
}

/// Compiles a source to a cubin.
pub(crate) fn compile(
    source: &CStr,
    name: &CStr,
    options: &[CString],
) -> Result<Vec<u8>, CudaError> {
    let mut program = null_mut();
    // SAFETY: the strings end with zeros, there are no headers.
    let status = unsafe {
        rtc::nvrtcCreateProgram(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null())
    };
    compiled("nvrtcCreateProgram", status)?;
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    // SAFETY: the program is alive, and there are as many options as is said.
    let status =
        unsafe { rtc::nvrtcCompileProgram(program, options.len() as c_int, options.as_ptr()) };
    let result = compiled("nvrtcCompileProgram", status)
        .map_err(|_| CudaError::Compiler { call: "nvrtcCompileProgram", log: log(program) })
        .and_then(|()| cubin(program));
    // SAFETY: the program is alive, and not used after this.
    compiled("nvrtcDestroyProgram", unsafe { rtc::nvrtcDestroyProgram(&mut program) })?;
    result
}

fn cubin(program: rtc::nvrtcProgram) -> Result<Vec<u8>, CudaError> {
    let mut size = 0;
    // SAFETY: the out pointer is valid, the program is alive.
    compiled("nvrtcGetCUBINSize", unsafe { rtc::nvrtcGetCUBINSize(program, &mut size) })?;
    let mut image = vec![0_u8; size];
    // SAFETY: the buffer has the size that was asked for.
    let status = unsafe { rtc::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()) };
    compiled("nvrtcGetCUBIN", status)?;
    Ok(image)
}

fn log(program: rtc::nvrtcProgram) -> String {
    let mut size = 0;
    // SAFETY: the out pointer is valid, the program is alive.
    let status = unsafe { rtc::nvrtcGetProgramLogSize(program, &mut size) };
    if compiled("nvrtcGetProgramLogSize", status).is_err() {
        return "no log".into();
    }
    let mut text = vec![0_u8; size];
    // SAFETY: the buffer has the size that was asked for.
    let status = unsafe { rtc::nvrtcGetProgramLog(program, text.as_mut_ptr().cast()) };
    match compiled("nvrtcGetProgramLog", status) {
        Ok(()) => String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned(),
        Err(_) => "no log".into(),
    }
}

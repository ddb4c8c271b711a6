//! The functions of `libhccl.so`, and of `libhcomm.so` where there is one.

#![allow(non_snake_case, reason = "these are the names of the C headers")]

use std::ffi::{c_char, c_void};
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::abi::*;
use crate::acl::{self, code, put};
use crate::comm::{Comm, Execution, Kind, Operation, Planned};
use crate::settings::Chip;
use crate::stream::{Cancel, Stream};
use crate::{Fault, Outcome, Profile, bootstrap, fault, sim};

/// The longest operation, in elements.
const MOST: u64 = 0x7_ffff_ffff;

/// The bytes of one element, if this chip can move them.
fn element(dtype: i32) -> Result<usize, Fault> {
    let new = sim().settings.chip == Chip::Ascend950 && sim().profile != Profile::Cann81;
    match i64::from(dtype) {
        HCCL_DATA_TYPE_INT8 | HCCL_DATA_TYPE_UINT8 => Ok(1),
        HCCL_DATA_TYPE_INT16
        | HCCL_DATA_TYPE_UINT16
        | HCCL_DATA_TYPE_FP16
        | HCCL_DATA_TYPE_BFP16 => Ok(2),
        HCCL_DATA_TYPE_INT32 | HCCL_DATA_TYPE_UINT32 | HCCL_DATA_TYPE_FP32 => Ok(4),
        HCCL_DATA_TYPE_INT64 | HCCL_DATA_TYPE_UINT64 | HCCL_DATA_TYPE_FP64 => Ok(8),
        HCCL_DATA_TYPE_HIF8
        | HCCL_DATA_TYPE_FP8E4M3
        | HCCL_DATA_TYPE_FP8E5M2
        | HCCL_DATA_TYPE_FP8E8M0
            if new =>
        {
            Ok(1)
        }
        _ => Err(fault(HCCL_E_NOT_SUPPORT, format!("data type {dtype} on this chip"))),
    }
}

/// Whether this chip can reduce such numbers so.
fn reducible(dtype: i32, op: i32) -> Outcome {
    let (wide, narrow) = match i64::from(dtype) {
        HCCL_DATA_TYPE_INT8 | HCCL_DATA_TYPE_INT32 | HCCL_DATA_TYPE_FP16 | HCCL_DATA_TYPE_FP32 => {
            (true, true)
        }
        HCCL_DATA_TYPE_INT64 => (true, true),
        // These have no products.
        HCCL_DATA_TYPE_INT16 | HCCL_DATA_TYPE_BFP16 => (true, false),
        _ => (false, false),
    };
    let can = match i64::from(op) {
        HCCL_REDUCE_PROD => narrow,
        HCCL_REDUCE_SUM | HCCL_REDUCE_MAX | HCCL_REDUCE_MIN => wide,
        _ => false,
    };
    let message = format!("reduction {op} of data type {dtype}");
    if can { Ok(()) } else { Err(fault(HCCL_E_NOT_SUPPORT, message)) }
}

/// The device of the thread; without one, HCCL reports that the runtime failed.
fn thread_device() -> Result<i32, Fault> {
    let context = acl::context();
    context.map(|context| context.device).map_err(|one| fault(HCCL_E_RUNTIME, one.message))
}

fn communicator(handle: HcclComm) -> Result<Arc<Comm>, Fault> {
    if handle.is_null() {
        return Err(fault(HCCL_E_PTR, "a null communicator"));
    }
    let comm = sim().comms.get(handle as usize);
    comm.ok_or_else(|| fault(HCCL_E_PARA, "not a communicator, or one that was destroyed"))
}

pub(crate) unsafe extern "C" fn HcclGetRootInfo(info: *mut HcclRootInfo) -> HcclResult {
    code(thread_device().and_then(|_| {
        if info.is_null() {
            return Err(fault(HCCL_E_PTR, "a null pointer for the root info"));
        }
        let bytes = bootstrap::open()?;
        // SAFETY: not null, so valid by the function's contract.
        unsafe { put(info.cast(), bytes, HCCL_E_PTR) }
    }))
}

pub(crate) unsafe extern "C" fn HcclCommInitRootInfo(
    ranks: u32,
    info: *const HcclRootInfo,
    rank: u32,
    out: *mut HcclComm,
) -> HcclResult {
    // SAFETY: the same contract.
    code(unsafe { init(ranks, info, rank, &Config::default(), out) })
}

pub(crate) unsafe extern "C" fn HcclCommInitRootInfoConfig(
    ranks: u32,
    info: *const HcclRootInfo,
    rank: u32,
    config: *const HcclCommConfig,
    out: *mut HcclComm,
) -> HcclResult {
    // SAFETY: null, or as long as it says by the function's contract.
    let config = unsafe { Config::read(config.cast()) };
    // SAFETY: the same contract.
    code(config.and_then(|config| unsafe { init(ranks, info, rank, &config, out) }))
}

unsafe fn init(
    ranks: u32,
    info: *const HcclRootInfo,
    rank: u32,
    config: &Config,
    out: *mut HcclComm,
) -> Outcome {
    if info.is_null() || out.is_null() {
        return Err(fault(HCCL_E_PTR, "a null pointer"));
    }
    let device = thread_device()?;
    // SAFETY: not null, so valid by the function's contract; of alignment 1.
    let info: bootstrap::RootInfo = unsafe { info.cast::<bootstrap::RootInfo>().read() };
    let bytes = config.buffer_bytes.unwrap_or(sim().settings.buffer_bytes);
    let join = || bootstrap::join(&info, ranks, rank, device);
    let comm = Comm::join(device, rank, ranks, bytes, join, config.name.clone())?;
    let handle = sim().comms.insert(comm);
    // SAFETY: not null, so valid by the function's contract.
    unsafe { put(out, handle as HcclComm, HCCL_E_PTR) }
}

/// What of a configuration the simulator heeds.
#[derive(Debug, Default)]
struct Config {
    buffer_bytes: Option<u64>,
    name: Option<String>,
}

impl Config {
    /// The size that a version has, as far as it is known. Later versions only add to it.
    fn size(version: u32) -> Option<&'static [u64]> {
        match version {
            1 => Some(&[32]),
            2 => Some(&[160]),
            3 => Some(&[288]),
            4 => Some(&[292]),
            5 => Some(&[300]),
            10 => Some(&[2232, 2240]),
            11 => Some(&[2248]),
            _ => None,
        }
    }

    /// Reads a configuration, and no byte beyond what it says is its size.
    ///
    /// # Safety
    ///
    /// It is null or has as many bytes as its first 8 say.
    unsafe fn read(config: *const u8) -> Result<Self, Fault> {
        if config.is_null() {
            return Err(fault(HCCL_E_PTR, "a null configuration"));
        }
        // SAFETY: every configuration begins with its size.
        let size: [u8; 8] = unsafe { config.cast::<[u8; 8]>().read() };
        let size = u64::from_le_bytes(size);
        let wrong = |what: &str| Err(fault(HCCL_E_PARA, format!("configuration: {what}")));
        if !(32..=2248).contains(&size) {
            return wrong("no version has this size");
        }
        // SAFETY: it is that long, by the function's contract. All of it is read, so that a size that
        // is not true is found here.
        let bytes = unsafe { std::slice::from_raw_parts(config, size as usize) }.to_vec();
        let number = |at: usize| {
            let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
            field.map(u32::from_le_bytes)
        };
        if number(8).map(i64::from) != Some(HCCL_COMM_CONFIG_MAGIC_WORD) {
            return wrong("another magic word");
        }
        let version = number(12).unwrap_or(0);
        if !Self::size(version).is_some_and(|sizes| sizes.contains(&size)) {
            return wrong("its version does not have its size, or is not known");
        }
        let unset = HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET as u32;
        let buffer = number(offset_of!(HcclCommConfig, hcclBufferSize)).unwrap_or(unset);
        if buffer == 0 {
            return wrong("a buffer of 0 megabytes");
        }
        let deterministic = number(offset_of!(HcclCommConfig, hcclDeterministic));
        if !deterministic.is_none_or(|value| value <= 2 || value == unset) {
            return wrong("hcclDeterministic");
        }
        let mode = number(offset_of!(HcclCommConfig, hcclOpExpansionMode));
        if mode.is_some_and(|mode| mode > 5) {
            return wrong("hcclOpExpansionMode");
        }
        let class = number(offset_of!(HcclCommConfig, hcclRdmaTrafficClass));
        if !class.is_none_or(|class| class == unset || class <= 255 && class % 4 == 0) {
            return wrong("hcclRdmaTrafficClass");
        }
        let level = number(offset_of!(HcclCommConfig, hcclRdmaServiceLevel));
        if !level.is_none_or(|level| level == unset || level <= 7) {
            return wrong("hcclRdmaServiceLevel");
        }
        let start = offset_of!(HcclCommConfig, hcclCommName);
        let name = match bytes.get(start..start + COMM_NAME_MAX_LENGTH as usize) {
            None => None,
            Some(field) => match field.iter().position(|&byte| byte == 0) {
                None => return wrong("a name without an end"),
                Some(0) => None,
                Some(end) => Some(String::from_utf8_lossy(&field[..end]).into_owned()),
            },
        };
        let buffer_bytes = (buffer != unset).then(|| u64::from(buffer) << 20);
        Ok(Self { buffer_bytes, name })
    }
}

pub(crate) unsafe extern "C" fn HcclCommDestroy(comm: HcclComm) -> HcclResult {
    code(communicator(comm).and_then(|found| {
        thread_device()?;
        if found.is_in_use() {
            return Err(fault(HCCL_E_AGAIN, "operations of the communicator are not done"));
        }
        found.close();
        drop(sim().comms.remove(comm as usize));
        Ok(())
    }))
}

pub(crate) unsafe extern "C" fn HcclGetRankSize(comm: HcclComm, ranks: *mut u32) -> HcclResult {
    code(communicator(comm).and_then(|comm| {
        // SAFETY: null or valid by the function's contract.
        unsafe { put(ranks, comm.ranks, HCCL_E_PTR) }
    }))
}

pub(crate) unsafe extern "C" fn HcclGetRankId(comm: HcclComm, rank: *mut u32) -> HcclResult {
    code(communicator(comm).and_then(|comm| {
        // SAFETY: null or valid by the function's contract.
        unsafe { put(rank, comm.rank, HCCL_E_PTR) }
    }))
}

pub(crate) unsafe extern "C" fn HcclGetCommName(comm: HcclComm, name: *mut c_char) -> HcclResult {
    code(communicator(comm).and_then(|comm| {
        let mut bytes = [0; COMM_NAME_MAX_LENGTH as usize];
        let own = comm.name.bytes().take(bytes.len() - 1);
        bytes.iter_mut().zip(own).for_each(|(to, from)| *to = from);
        // SAFETY: null, or so many bytes by the function's contract.
        unsafe { put(name.cast(), bytes, HCCL_E_PTR) }
    }))
}

pub(crate) unsafe extern "C" fn HcclGetCommAsyncError(
    comm: HcclComm,
    error: *mut HcclResult,
) -> HcclResult {
    code(communicator(comm).and_then(|comm| {
        // SAFETY: null or valid by the function's contract.
        unsafe { put(error, comm.async_error(), HCCL_E_PTR) }
    }))
}

pub(crate) unsafe extern "C" fn HcclGetErrorString(code: HcclResult) -> *const c_char {
    let words = match i64::from(code) {
        HCCL_SUCCESS => c"no error (simulated)",
        HCCL_E_PARA => c"a wrong argument (simulated)",
        HCCL_E_PTR => c"a null pointer (simulated)",
        HCCL_E_MEMORY => c"not enough memory (simulated)",
        HCCL_E_NOT_SUPPORT => c"not supported (simulated)",
        HCCL_E_NOT_FOUND => c"a resource was not found (simulated)",
        HCCL_E_UNAVAIL => c"a resource is not available (simulated)",
        HCCL_E_SYSCALL => c"a system call failed (simulated)",
        HCCL_E_TIMEOUT => c"time is over (simulated)",
        HCCL_E_RUNTIME => c"the runtime failed (simulated)",
        HCCL_E_AGAIN => c"in use, try again (simulated)",
        HCCL_E_REMOTE => c"a remote error (simulated)",
        _ => c"another error (simulated)",
    };
    words.as_ptr()
}

pub(crate) unsafe extern "C" fn HcclGetCommConfigCapability() -> u32 {
    // 8.1 knows the first ones.
    if sim().profile == Profile::Cann81 { 5 } else { HCCL_COMM_CONFIG_RESERVED as u32 }
}

/// An operation that was checked, up to the stream.
struct Prepared {
    comm: Arc<Comm>,
    stream: Arc<Stream>,
    operation: Operation,
    bytes: usize,
}

/// What all operations check, in HCCL's order. Nothing is to be done if there is nothing to move.
fn prepare(
    comm: HcclComm,
    stream: aclrtStream,
    buffers: &[*mut c_void],
    operation: impl FnOnce(&Comm) -> Result<Operation, Fault>,
) -> Result<Option<Prepared>, Fault> {
    let comm = communicator(comm)?;
    if stream.is_null() {
        return Err(fault(HCCL_E_PTR, "a null stream"));
    }
    let device = thread_device()?;
    if device != comm.device {
        let message = format!("the thread is on device {device}, the communicator on another");
        return Err(fault(HCCL_E_RUNTIME, message));
    }
    let stream = acl::stream(stream).map_err(|one| fault(HCCL_E_RUNTIME, one.message))?;
    let operation = operation(&comm)?;
    let element = element(operation.dtype)?;
    if operation.count > MOST {
        return Err(fault(HCCL_E_PARA, "more elements than an operation may have"));
    }
    if operation.count == 0 && operation.kind != Kind::Barrier {
        return Ok(None);
    }
    if buffers.iter().any(|buffer| buffer.is_null()) {
        return Err(fault(HCCL_E_PTR, "a null buffer"));
    }
    comm.establish(&operation)?;
    let bytes = operation.count as usize * element;
    Ok(Some(Prepared { comm, stream, operation, bytes }))
}

impl Prepared {
    /// Hands the work to the stream.
    fn enqueue(
        self,
        work: impl FnOnce(&Execution<'_>, &Operation, usize) -> Outcome + Send + 'static,
    ) -> Outcome {
        let Self { comm, stream, operation, bytes } = self;
        let tag = comm.next_tag(&operation);
        let in_use = comm.hold();
        let number = Some(sim().operations.fetch_add(1, Ordering::Relaxed) + 1);
        let settings = &sim().settings;
        let planned = Planned {
            kill: settings.kill_at == number,
            hang: settings.hang_at == number,
            error: settings.async_error_at == number,
        };
        let task = move |cancel: &Cancel| {
            let _in_use = in_use;
            let deadline = sim().settings.exec_timeout;
            let deadline = deadline.and_then(|limit| Instant::now().checked_add(limit));
            let execution = Execution { comm: &comm, tag, cancel, deadline, planned };
            execution.begin()?;
            work(&execution, &operation, bytes)
        };
        stream.push(task).map(drop).map_err(|one| fault(HCCL_E_RUNTIME, one.message))
    }
}

pub(crate) unsafe extern "C" fn HcclBroadcast(
    buffer: *mut c_void,
    count: u64,
    dtype: HcclDataType,
    root: u32,
    comm: HcclComm,
    stream: aclrtStream,
) -> HcclResult {
    let operation = |comm: &Comm| {
        if root >= comm.ranks {
            return Err(fault(HCCL_E_PARA, "the root is not a rank"));
        }
        Ok(Operation { kind: Kind::Broadcast, count, dtype, op: 0, root })
    };
    let address = buffer as usize;
    code(prepare(comm, stream, &[buffer], operation).and_then(|prepared| {
        let Some(prepared) = prepared else { return Ok(()) };
        prepared.enqueue(move |execution, operation, bytes| {
            execution.broadcast(operation.root, address, bytes)
        })
    }))
}

pub(crate) unsafe extern "C" fn HcclAllReduce(
    send: *mut c_void,
    receive: *mut c_void,
    count: u64,
    dtype: HcclDataType,
    op: HcclReduceOp,
    comm: HcclComm,
    stream: aclrtStream,
) -> HcclResult {
    let operation = |_: &Comm| {
        reducible(dtype, op)?;
        Ok(Operation { kind: Kind::AllReduce, count, dtype, op, root: 0 })
    };
    let (from, to) = (send as usize, receive as usize);
    code(prepare(comm, stream, &[send, receive], operation).and_then(|prepared| {
        let Some(prepared) = prepared else { return Ok(()) };
        prepared.enqueue(move |execution, operation, bytes| {
            execution.all_reduce(operation, from, to, bytes)
        })
    }))
}

pub(crate) unsafe extern "C" fn HcclAllGather(
    send: *mut c_void,
    receive: *mut c_void,
    count: u64,
    dtype: HcclDataType,
    comm: HcclComm,
    stream: aclrtStream,
) -> HcclResult {
    let operation =
        |_: &Comm| Ok(Operation { kind: Kind::AllGather, count, dtype, op: 0, root: 0 });
    let (from, to) = (send as usize, receive as usize);
    code(prepare(comm, stream, &[send, receive], operation).and_then(|prepared| {
        let Some(prepared) = prepared else { return Ok(()) };
        prepared.enqueue(move |execution, _, bytes| execution.all_gather(from, to, bytes))
    }))
}

fn pair(comm: &Comm, peer: u32, count: u64, dtype: i32, sends: bool) -> Result<Operation, Fault> {
    if peer >= comm.ranks || peer == comm.rank {
        return Err(fault(HCCL_E_PARA, "the peer is not another rank"));
    }
    let (from, to) = if sends { (comm.rank, peer) } else { (peer, comm.rank) };
    Ok(Operation { kind: Kind::Pair { from, to }, count, dtype, op: 0, root: 0 })
}

pub(crate) unsafe extern "C" fn HcclSend(
    buffer: *mut c_void,
    count: u64,
    dtype: HcclDataType,
    peer: u32,
    comm: HcclComm,
    stream: aclrtStream,
) -> HcclResult {
    let operation = |comm: &Comm| pair(comm, peer, count, dtype, true);
    let address = buffer as usize;
    code(prepare(comm, stream, &[buffer], operation).and_then(|prepared| {
        let Some(prepared) = prepared else { return Ok(()) };
        prepared.enqueue(move |execution, _, bytes| execution.give(&[peer], address, bytes))
    }))
}

pub(crate) unsafe extern "C" fn HcclRecv(
    buffer: *mut c_void,
    count: u64,
    dtype: HcclDataType,
    peer: u32,
    comm: HcclComm,
    stream: aclrtStream,
) -> HcclResult {
    let operation = |comm: &Comm| pair(comm, peer, count, dtype, false);
    let address = buffer as usize;
    code(prepare(comm, stream, &[buffer], operation).and_then(|prepared| {
        let Some(prepared) = prepared else { return Ok(()) };
        prepared.enqueue(move |execution, _, bytes| execution.receive(peer, address, bytes))
    }))
}

pub(crate) unsafe extern "C" fn HcclBarrier(comm: HcclComm, stream: aclrtStream) -> HcclResult {
    let operation =
        |_: &Comm| Ok(Operation { kind: Kind::Barrier, count: 0, dtype: 0, op: 0, root: 0 });
    code(prepare(comm, stream, &[], operation).and_then(|prepared| {
        let Some(prepared) = prepared else { return Ok(()) };
        prepared.enqueue(|execution, _, _| execution.exchange(Vec::new()).map(drop))
    }))
}

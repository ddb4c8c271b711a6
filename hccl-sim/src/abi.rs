//! The binary interface: types, constants, and the table of all functions.
//!
//! Everything that a C header would say is here as Rust declarations, and once more as data
//! ([`declarations`]), made from the same lines, so that it can be compared with the real headers.

#![allow(non_camel_case_types, reason = "these are the names of the C headers")]
#![allow(non_snake_case, reason = "these are the names of the C headers")]

use std::ffi::{c_char, c_void};

use crate::headers::{Declarations, Field, Signature, Type};
use crate::{acl, hccl, instance};

pub(crate) type aclError = i32;
pub(crate) type aclrtStream = *mut c_void;
pub(crate) type aclrtEvent = *mut c_void;
pub(crate) type aclrtMemMallocPolicy = i32;
pub(crate) type aclrtMemcpyKind = i32;
pub(crate) type aclrtMemAttr = i32;
pub(crate) type aclrtStreamStatus = i32;
pub(crate) type aclrtEventRecordedStatus = i32;
pub(crate) type HcclResult = i32;
pub(crate) type HcclComm = *mut c_void;
pub(crate) type HcclDataType = i32;
pub(crate) type HcclReduceOp = i32;

/// What ranks need to find the one that asked for it.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct HcclRootInfo {
    internal: [u8; HCCL_ROOT_INFO_BYTES as usize],
}

/// The part of a communicator's configuration that all versions since 5 share.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct HcclCommConfig {
    pub(crate) reserved: [u8; 24],
    pub(crate) hcclBufferSize: u32,
    pub(crate) hcclDeterministic: u32,
    pub(crate) hcclCommName: [u8; COMM_NAME_MAX_LENGTH as usize],
    pub(crate) hcclUdi: [u8; 128],
    pub(crate) hcclOpExpansionMode: u32,
    pub(crate) hcclRdmaTrafficClass: u32,
    pub(crate) hcclRdmaServiceLevel: u32,
}

macro_rules! constants {
    ($($name:ident = $value:expr;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "` of the headers.")]
            pub(crate) const $name: i64 = $value;
        )*
        const CONSTANTS: &[(&str, i64)] = &[$((stringify!($name), $name)),*];
    };
}

constants! {
    HCCL_ROOT_INFO_BYTES = 4108;
    COMM_NAME_MAX_LENGTH = 128;
    UDI_MAX_LENGTH = 128;
    HCCL_COMM_CONFIG_MAGIC_WORD = 0xf0f0_f0f0;
    HCCL_COMM_DEFAULT_BUFFSIZE = 200;
    HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET = 0xffff_ffff;
    HCCL_COMM_DETERMINISTIC_CONFIG_NOT_SET = 0xffff_ffff;
    HCCL_COMM_DEFAULT_OP_EXPANSION_MODE = 0;
    HCCL_COMM_TRAFFIC_CLASS_CONFIG_NOT_SET = 0xffff_ffff;
    HCCL_COMM_SERVICE_LEVEL_CONFIG_NOT_SET = 0xffff_ffff;
    HCCL_COMM_CONFIG_RESERVED = 12;

    HCCL_SUCCESS = 0;
    HCCL_E_PARA = 1;
    HCCL_E_PTR = 2;
    HCCL_E_MEMORY = 3;
    HCCL_E_INTERNAL = 4;
    HCCL_E_NOT_SUPPORT = 5;
    HCCL_E_NOT_FOUND = 6;
    HCCL_E_UNAVAIL = 7;
    HCCL_E_SYSCALL = 8;
    HCCL_E_TIMEOUT = 9;
    HCCL_E_OPEN_FILE_FAILURE = 10;
    HCCL_E_TCP_CONNECT = 11;
    HCCL_E_ROCE_CONNECT = 12;
    HCCL_E_TCP_TRANSFER = 13;
    HCCL_E_ROCE_TRANSFER = 14;
    HCCL_E_RUNTIME = 15;
    HCCL_E_DRV = 16;
    HCCL_E_PROFILING = 17;
    HCCL_E_CCE = 18;
    HCCL_E_NETWORK = 19;
    HCCL_E_AGAIN = 20;
    HCCL_E_REMOTE = 21;
    HCCL_E_SUSPENDING = 22;
    HCCL_E_OPRETRY_FAIL = 23;
    HCCL_E_OOM = 24;

    HCCL_REDUCE_SUM = 0;
    HCCL_REDUCE_PROD = 1;
    HCCL_REDUCE_MAX = 2;
    HCCL_REDUCE_MIN = 3;

    HCCL_DATA_TYPE_INT8 = 0;
    HCCL_DATA_TYPE_INT16 = 1;
    HCCL_DATA_TYPE_INT32 = 2;
    HCCL_DATA_TYPE_FP16 = 3;
    HCCL_DATA_TYPE_FP32 = 4;
    HCCL_DATA_TYPE_INT64 = 5;
    HCCL_DATA_TYPE_UINT64 = 6;
    HCCL_DATA_TYPE_UINT8 = 7;
    HCCL_DATA_TYPE_UINT16 = 8;
    HCCL_DATA_TYPE_UINT32 = 9;
    HCCL_DATA_TYPE_FP64 = 10;
    HCCL_DATA_TYPE_BFP16 = 11;
    HCCL_DATA_TYPE_INT128 = 12;
    HCCL_DATA_TYPE_HIF8 = 14;
    HCCL_DATA_TYPE_FP8E4M3 = 15;
    HCCL_DATA_TYPE_FP8E5M2 = 16;
    HCCL_DATA_TYPE_FP8E8M0 = 17;
    HCCL_DATA_TYPE_RESERVED = 255;

    ACL_SUCCESS = 0;
    ACL_ERROR_INVALID_PARAM = 100_000;
    ACL_ERROR_UNINITIALIZE = 100_001;
    ACL_ERROR_REPEAT_INITIALIZE = 100_002;
    ACL_ERROR_REPEAT_FINALIZE = 100_037;
    ACL_ERROR_FAILURE = 500_001;
    ACL_ERROR_RT_PARAM_INVALID = 107_000;
    ACL_ERROR_RT_INVALID_DEVICEID = 107_001;
    ACL_ERROR_RT_CONTEXT_NULL = 107_002;
    ACL_ERROR_RT_STREAM_CONTEXT = 107_003;
    ACL_ERROR_RT_ADDR_UNALIGNED = 107_008;
    ACL_ERROR_RT_STREAM_ABORT = 107_023;
    ACL_ERROR_RT_FEATURE_NOT_SUPPORT = 207_000;
    ACL_ERROR_RT_MEMORY_ALLOCATION = 207_001;
    ACL_ERROR_RT_MEMORY_FREE = 207_002;
    ACL_ERROR_RT_NO_PERMISSION = 207_006;
    ACL_ERROR_RT_INTERNAL_ERROR = 507_000;
    ACL_ERROR_RT_AICPU_EXCEPTION = 507_018;
    ACL_ERROR_RT_IPC_ERROR = 507_022;
    ACL_ERROR_RT_STREAM_SYNC_TIMEOUT = 507_046;
    ACL_ERROR_RT_EVENT_SYNC_TIMEOUT = 507_047;
    ACL_ERROR_RT_FFTS_PLUS_TIMEOUT = 507_048;
    ACL_ERROR_RT_DEVICE_MEM_ERROR = 507_053;
    ACL_ERROR_RT_LINK_ERROR = 507_056;

    ACL_MEM_MALLOC_HUGE_FIRST = 0;
    ACL_MEM_MALLOC_HUGE_ONLY = 1;
    ACL_MEM_MALLOC_NORMAL_ONLY = 2;
    ACL_MEMCPY_HOST_TO_HOST = 0;
    ACL_MEMCPY_HOST_TO_DEVICE = 1;
    ACL_MEMCPY_DEVICE_TO_HOST = 2;
    ACL_MEMCPY_DEVICE_TO_DEVICE = 3;
    ACL_MEMCPY_DEFAULT = 4;
    ACL_STREAM_STATUS_COMPLETE = 0;
    ACL_STREAM_STATUS_NOT_READY = 1;
    ACL_EVENT_RECORDED_STATUS_NOT_READY = 0;
    ACL_EVENT_RECORDED_STATUS_COMPLETE = 1;
    ACL_HBM_MEM = 1;
    ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION = 1;
    ACL_RT_IPC_MEM_IMPORT_FLAG_ENABLE_PEER_ACCESS = 1;
}

/// Which library has a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Library {
    /// `libascendcl.so`.
    Acl,
    /// `libhccl.so`: the operations.
    Operations,
    /// `libhccl.so`, or `libhcomm.so` where there is one: the communicators.
    Communicators,
    /// All of them: what says that they are simulated.
    All,
}

/// The name and place of a function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) name: &'static str,
    pub(crate) library: Library,
    /// Whether CANN 8.1 has it.
    pub(crate) old: bool,
    result: &'static str,
    arguments: &'static [&'static str],
}

macro_rules! functions {
    ($($library:ident $old:literal $module:ident :: $name:ident ($($argument:ident: $ty:ty),* $(,)?) -> $result:ty;)*) => {
        /// The functions of the one instance that has the state.
        #[repr(C)]
        pub(crate) struct Table {
            $($name: unsafe extern "C" fn($($ty),*) -> $result,)*
        }

        pub(crate) static TABLE: Table = Table { $($name: $module::$name,)* };

        /// Every function that some profile exports.
        pub(crate) const ENTRIES: &[Entry] = &[$(Entry {
            name: stringify!($name),
            library: Library::$library,
            old: $old,
            result: stringify!($result),
            arguments: &[$(stringify!($ty)),*],
        },)*];

        mod exports {
            use super::*;

            $(
                #[unsafe(no_mangle)]
                unsafe extern "C" fn $name($($argument: $ty),*) -> $result {
                    // SAFETY: the caller keeps the C function's contract, and the table's function
                    // has the same one.
                    unsafe { (instance::table().$name)($($argument),*) }
                }
            )*
        }
    };
}

functions! {
    All true acl::HcclSimVersion() -> *const c_char;
    All true acl::HcclSimHeld() -> *const c_char;

    Acl true acl::aclInit(config: *const c_char) -> aclError;
    Acl true acl::aclFinalize() -> aclError;
    Acl true acl::aclGetRecentErrMsg() -> *const c_char;
    Acl true acl::aclrtGetSocName() -> *const c_char;
    Acl true acl::aclrtGetVersion(major: *mut i32, minor: *mut i32, patch: *mut i32) -> aclError;
    Acl true acl::aclrtSetDevice(device: i32) -> aclError;
    Acl true acl::aclrtResetDevice(device: i32) -> aclError;
    Acl true acl::aclrtGetDevice(device: *mut i32) -> aclError;
    Acl true acl::aclrtGetDeviceCount(count: *mut u32) -> aclError;
    Acl true acl::aclrtGetMemInfo(attr: aclrtMemAttr, free: *mut usize, total: *mut usize) -> aclError;
    Acl true acl::aclrtMalloc(out: *mut *mut c_void, size: usize, policy: aclrtMemMallocPolicy) -> aclError;
    Acl true acl::aclrtFree(address: *mut c_void) -> aclError;
    Acl true acl::aclrtMallocHost(out: *mut *mut c_void, size: usize) -> aclError;
    Acl true acl::aclrtFreeHost(address: *mut c_void) -> aclError;
    Acl true acl::aclrtMemcpy(dst: *mut c_void, max: usize, src: *const c_void, n: usize, kind: aclrtMemcpyKind) -> aclError;
    Acl true acl::aclrtMemcpyAsync(dst: *mut c_void, max: usize, src: *const c_void, n: usize, kind: aclrtMemcpyKind, stream: aclrtStream) -> aclError;
    Acl true acl::aclrtMemset(address: *mut c_void, max: usize, value: i32, n: usize) -> aclError;
    Acl true acl::aclrtMemsetAsync(address: *mut c_void, max: usize, value: i32, n: usize, stream: aclrtStream) -> aclError;
    Acl true acl::aclrtCreateStream(out: *mut aclrtStream) -> aclError;
    Acl true acl::aclrtCreateStreamWithConfig(out: *mut aclrtStream, priority: u32, flag: u32) -> aclError;
    Acl true acl::aclrtDestroyStream(stream: aclrtStream) -> aclError;
    Acl true acl::aclrtDestroyStreamForce(stream: aclrtStream) -> aclError;
    Acl true acl::aclrtSynchronizeStream(stream: aclrtStream) -> aclError;
    Acl true acl::aclrtSynchronizeStreamWithTimeout(stream: aclrtStream, milliseconds: i32) -> aclError;
    Acl true acl::aclrtStreamQuery(stream: aclrtStream, status: *mut aclrtStreamStatus) -> aclError;
    Acl true acl::aclrtStreamAbort(stream: aclrtStream) -> aclError;
    Acl true acl::aclrtCreateEvent(out: *mut aclrtEvent) -> aclError;
    Acl true acl::aclrtCreateEventExWithFlag(out: *mut aclrtEvent, flag: u32) -> aclError;
    Acl true acl::aclrtDestroyEvent(event: aclrtEvent) -> aclError;
    Acl true acl::aclrtRecordEvent(event: aclrtEvent, stream: aclrtStream) -> aclError;
    Acl true acl::aclrtStreamWaitEvent(stream: aclrtStream, event: aclrtEvent) -> aclError;
    Acl true acl::aclrtSynchronizeEvent(event: aclrtEvent) -> aclError;
    Acl true acl::aclrtSynchronizeEventWithTimeout(event: aclrtEvent, milliseconds: i32) -> aclError;
    Acl true acl::aclrtQueryEventStatus(event: aclrtEvent, status: *mut aclrtEventRecordedStatus) -> aclError;
    Acl false acl::aclrtDeviceGetBareTgid(pid: *mut i32) -> aclError;
    Acl false acl::aclrtIpcMemGetExportKey(address: *mut c_void, size: usize, key: *mut c_char, len: usize, flags: u64) -> aclError;
    Acl false acl::aclrtIpcMemSetImportPid(key: *const c_char, pids: *mut i32, count: usize) -> aclError;
    Acl false acl::aclrtIpcMemImportByKey(out: *mut *mut c_void, key: *const c_char, flags: u64) -> aclError;
    Acl false acl::aclrtIpcMemClose(key: *const c_char) -> aclError;
    Acl false acl::aclrtGetLogicDevIdByUserDevId(device: i32, logic: *mut i32) -> aclError;
    Acl false acl::aclrtGetPhyDevIdByLogicDevId(logic: i32, chip: *mut i32) -> aclError;

    Communicators true hccl::HcclGetRootInfo(info: *mut HcclRootInfo) -> HcclResult;
    Communicators true hccl::HcclCommInitRootInfo(ranks: u32, info: *const HcclRootInfo, rank: u32, out: *mut HcclComm) -> HcclResult;
    Communicators true hccl::HcclCommInitRootInfoConfig(ranks: u32, info: *const HcclRootInfo, rank: u32, config: *const HcclCommConfig, out: *mut HcclComm) -> HcclResult;
    Communicators true hccl::HcclCommDestroy(comm: HcclComm) -> HcclResult;
    Communicators true hccl::HcclGetRankSize(comm: HcclComm, ranks: *mut u32) -> HcclResult;
    Communicators true hccl::HcclGetRankId(comm: HcclComm, rank: *mut u32) -> HcclResult;
    Communicators true hccl::HcclGetCommName(comm: HcclComm, name: *mut c_char) -> HcclResult;
    Communicators true hccl::HcclGetCommAsyncError(comm: HcclComm, error: *mut HcclResult) -> HcclResult;
    Communicators true hccl::HcclGetErrorString(code: HcclResult) -> *const c_char;
    Communicators true hccl::HcclGetCommConfigCapability() -> u32;

    Operations true hccl::HcclBroadcast(buffer: *mut c_void, count: u64, dtype: HcclDataType, root: u32, comm: HcclComm, stream: aclrtStream) -> HcclResult;
    Operations true hccl::HcclAllReduce(send: *mut c_void, receive: *mut c_void, count: u64, dtype: HcclDataType, op: HcclReduceOp, comm: HcclComm, stream: aclrtStream) -> HcclResult;
    Operations true hccl::HcclAllGather(send: *mut c_void, receive: *mut c_void, count: u64, dtype: HcclDataType, comm: HcclComm, stream: aclrtStream) -> HcclResult;
    Operations true hccl::HcclSend(buffer: *mut c_void, count: u64, dtype: HcclDataType, peer: u32, comm: HcclComm, stream: aclrtStream) -> HcclResult;
    Operations true hccl::HcclRecv(buffer: *mut c_void, count: u64, dtype: HcclDataType, peer: u32, comm: HcclComm, stream: aclrtStream) -> HcclResult;
    Operations true hccl::HcclBarrier(comm: HcclComm, stream: aclrtStream) -> HcclResult;
}

/// Everything that the headers say as well.
#[must_use]
pub fn declarations() -> Declarations {
    macro_rules! field {
        ($ty:ident . $field:ident) => {
            Field {
                name: stringify!($field).to_owned(),
                offset: std::mem::offset_of!($ty, $field),
                size: size_of_field(|value: &$ty| &value.$field),
            }
        };
    }
    macro_rules! number {
        ($($ty:ident)*) => {
            vec![$(Type {
                name: stringify!($ty).to_owned(),
                size: Some(size_of::<$ty>()),
                align: Some(align_of::<$ty>()),
                fields: Vec::new(),
            }),*]
        };
    }
    let mut types = number!(aclError aclrtStream aclrtEvent aclrtMemMallocPolicy aclrtMemcpyKind
        aclrtMemAttr aclrtStreamStatus aclrtEventRecordedStatus HcclResult HcclComm HcclDataType HcclReduceOp);
    types.push(Type {
        name: "HcclRootInfo".to_owned(),
        size: Some(size_of::<HcclRootInfo>()),
        align: Some(align_of::<HcclRootInfo>()),
        fields: vec![field!(HcclRootInfo.internal)],
    });
    types.push(Type {
        name: "HcclCommConfig".to_owned(),
        // Later versions are longer.
        size: None,
        align: None,
        fields: vec![
            field!(HcclCommConfig.reserved),
            field!(HcclCommConfig.hcclBufferSize),
            field!(HcclCommConfig.hcclDeterministic),
            field!(HcclCommConfig.hcclCommName),
            field!(HcclCommConfig.hcclUdi),
            field!(HcclCommConfig.hcclOpExpansionMode),
            field!(HcclCommConfig.hcclRdmaTrafficClass),
            field!(HcclCommConfig.hcclRdmaServiceLevel),
        ],
    });
    Declarations {
        functions: ENTRIES
            .iter()
            .filter(|entry| entry.library != Library::All)
            .map(|entry| Signature::from_rust(entry.name, entry.result, entry.arguments))
            .collect(),
        calls: Vec::new(),
        constants: CONSTANTS.iter().map(|&(name, value)| (name.to_owned(), value)).collect(),
        types,
    }
}

fn size_of_field<T, F>(_: impl FnOnce(&T) -> &F) -> usize {
    size_of::<F>()
}

//! The transport's own errors, and what they are to its users.

use std::path::PathBuf;

use engine_core::{ErrorKind, Recovery};

use crate::sys::{self, LIBRARY_DIR_VARIABLE, Status};

/// What to do about libraries that are not there.
pub(crate) const REMEDY: &str = "install the CANN toolkit and source its set_env.sh, or name the \
                                 folder of libascendcl.so and libhccl.so in CKPT_ENGINE_HCCL_DIR";

#[derive(Debug, thiserror::Error)]
pub(crate) enum HcclError {
    #[error("there is no {file} {}; {REMEDY}", in_words(folders, *named))]
    Missing { file: &'static str, folders: Vec<PathBuf>, named: bool },
    #[error(
        "{} cannot be loaded: {source}; what it needs itself is found by the LD_LIBRARY_PATH that \
         CANN's set_env.sh makes",
        path.display()
    )]
    Load { path: PathBuf, source: libloading::Error },
    #[error(
        "{} is not Ascend's HCCL: it has no HcclGetRootInfo (Habana's library for Gaudi has the same \
         name); {REMEDY}",
        path.display()
    )]
    Foreign { path: PathBuf },
    #[error("{} lack {}; CANN 8.1 or later is needed", list(paths), names.join(", "))]
    Symbols { paths: Vec<PathBuf>, names: Vec<&'static str> },
    #[error(
        "library_dir is {}, and this process has loaded {} before: a process has one HCCL",
        wanted.display(), loaded.display()
    )]
    Another { wanted: PathBuf, loaded: PathBuf },
    #[error("{call} failed: {}", with_detail(acl_in_words(*status), *status, detail))]
    Acl { call: &'static str, status: Status, detail: String },
    #[error("{call} failed: {}{}", with_detail(hccl_in_words(*status), *status, detail), advice(call, *status))]
    Hccl { call: &'static str, status: Status, detail: String },
    #[error("the libraries lack {0}, which CANN 8.1 does not have: {1}")]
    Absent(&'static str, &'static str),
    #[error(
        "there is no NPU {device}: this process sees {count} (ASCEND_RT_VISIBLE_DEVICES says which)"
    )]
    NoDevice { device: u32, count: u32 },
    #[error("no memory for {bytes} bytes of buckets on NPU {device}{}; use smaller ones (update_weights_bucket_megabytes)", free_in_words(*free))]
    Full { device: i32, bytes: usize, free: Option<(usize, usize)> },
    #[error("no pinned memory for {bytes} bytes: {detail}")]
    NoPinned { bytes: usize, detail: String },
    #[error("what the members of a group need to find one another has {0} bytes, not {want}", want = sys::ROOT_INFO_BYTES)]
    RootInfo(usize),
    #[error("bytes {at}..{at}+{len} lie outside an allocation of {size}")]
    Outside { at: usize, len: usize, size: usize },
    #[error("{0} elements are more than one operation takes")]
    TooMany(u64),
    #[error("other ranks still have the memory mapped")]
    Mapped,
    #[error("this rank has no slots of its own: it reads the leader's")]
    NoSlots,
    #[error("this rank is not attached to the leader's slots")]
    Detached,
    #[error(
        "the leader has filled the slot anew: it has given this rank up, and goes on without it"
    )]
    Overwritten,
    #[error("the group's first broadcast brought other bytes than were sent")]
    Garbled,
    #[error("this rank is not in group {0}")]
    NotJoined(usize),
    #[error(
        "a communicator of an earlier group is still in use: what it had under way has not ended; \
         the engine has to be made anew"
    )]
    Lingering,
    #[error("a peer of the group reports a failure (asynchronous error {0}: {words})", words = hccl_in_words(*.0))]
    Asynchronous(Status),
}

fn in_words(folders: &[PathBuf], named: bool) -> String {
    match folders {
        [folder] if named => {
            format!("in {} (named by {LIBRARY_DIR_VARIABLE} or library_dir)", folder.display())
        }
        folders => format!("in any of the {} usual folders", folders.len()),
    }
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    paths.join(" and ")
}

fn with_detail(words: &str, status: Status, detail: &str) -> String {
    if detail.is_empty() {
        format!("{words} ({status})")
    } else {
        format!("{words} ({status}: {detail})")
    }
}

fn free_in_words(free: Option<(usize, usize)>) -> String {
    free.map_or_else(String::new, |(free, total)| format!(", {free} of {total} are free"))
}

/// ACL's codes. Which of them hardware reports for what has not been seen.
fn acl_in_words(status: Status) -> &'static str {
    match status {
        sys::INVALID_PARAMETER | sys::RUNTIME_PARAMETER => "an invalid parameter",
        sys::NOT_INITIALISED => "ACL is not initialised",
        sys::INVALID_DEVICE => "no such device",
        sys::NO_CONTEXT => "no device was set on this thread",
        sys::STREAM_OF_ANOTHER_CONTEXT => "a stream of another context",
        sys::UNALIGNED => "an address that is not aligned",
        sys::STREAM_ABORTED => "the stream was aborted",
        sys::UNSUPPORTED => "not supported here",
        sys::OUT_OF_DEVICE_MEMORY => "the device has no memory left",
        sys::NOT_PERMITTED => "not permitted",
        sys::AI_CPU_EXCEPTION => "an exception on the device's AI CPU",
        sys::SHARING_FAILED => "sharing memory between processes failed",
        sys::SYNCHRONISE_TIMEOUT => "the stream did not end in time",
        sys::OPERATION_TIMEOUT => {
            "an operation on the device did not end in time: a peer is gone, or does another one"
        }
        sys::DEVICE_MEMORY_ERROR => "an error of the device's memory",
        sys::LINK_ERROR => "an error of a link between devices",
        _ => "an unknown failure",
    }
}

fn hccl_in_words(status: Status) -> &'static str {
    match status {
        sys::HCCL_PARAMETER => "an invalid parameter",
        sys::HCCL_NULL_POINTER => "a null pointer",
        sys::HCCL_MEMORY => "no memory",
        sys::HCCL_INTERNAL => "an internal error",
        sys::HCCL_UNSUPPORTED => "not supported",
        sys::HCCL_NOT_FOUND => "not found, or no link left",
        sys::HCCL_UNAVAILABLE => "unavailable",
        sys::HCCL_SYSTEM_CALL => "a system call failed",
        sys::HCCL_TIMEOUT => "it did not happen in time",
        sys::HCCL_OPEN_FILE => "a file cannot be opened",
        sys::HCCL_TCP_CONNECT => "no connection over TCP",
        sys::HCCL_ROCE_CONNECT => "no connection over RoCE",
        sys::HCCL_TCP_TRANSFER => "a transfer over TCP failed",
        sys::HCCL_ROCE_TRANSFER => "a transfer over RoCE failed",
        sys::HCCL_RUNTIME => "an error of the runtime",
        sys::HCCL_DRIVER => "an error of the driver",
        sys::HCCL_PROFILING => "an error of profiling",
        sys::HCCL_DEVICE_LIBRARY => "an error of the device's library",
        sys::HCCL_NETWORK => "an error of the network",
        sys::AGAIN => "still in use",
        sys::REMOTE => "a peer failed",
        sys::HCCL_SUSPENDING => "it is being suspended",
        sys::HCCL_NOT_REPEATED => "an operation could not be repeated",
        sys::HCCL_OUT_OF_MEMORY => "the device has no memory left",
        _ => "an unknown failure",
    }
}

/// What usually helps.
fn advice(call: &str, status: Status) -> &'static str {
    match (call, status) {
        (
            "HcclGetRootInfo",
            sys::HCCL_UNAVAILABLE
            | sys::HCCL_SYSTEM_CALL
            | sys::HCCL_TCP_CONNECT
            | sys::HCCL_NETWORK,
        ) => {
            "; its ports (60000 to 60031) may be in use: set HCCL_HOST_SOCKET_PORT_RANGE=auto and \
             HCCL_NPU_SOCKET_PORT_RANGE=auto on all ranks; HCCL_IF_IP or HCCL_SOCKET_IFNAME choose \
             the network"
        }
        ("HcclCommInitRootInfo", sys::HCCL_PARAMETER) => {
            "; two ranks of a group cannot be on one chip: give each rank an NPU of its own \
             (device: npu:N)"
        }
        ("HcclCommInitRootInfo", sys::HCCL_NOT_FOUND) => {
            "; communicators that were not destroyed, of this process or of another one on the NPU, \
             may hold all links"
        }
        (
            "HcclCommInitRootInfo",
            sys::HCCL_UNAVAILABLE
            | sys::HCCL_TCP_CONNECT
            | sys::HCCL_ROCE_CONNECT
            | sys::HCCL_NETWORK,
        ) => {
            "; HCCL_IF_IP or HCCL_SOCKET_IFNAME choose the network, and several processes on one NPU \
             need HCCL_HOST_SOCKET_PORT_RANGE=auto and HCCL_NPU_SOCKET_PORT_RANGE=auto"
        }
        ("HcclCommInitRootInfo", sys::HCCL_TIMEOUT) => {
            "; HCCL_CONNECT_TIMEOUT says how long it waits"
        }
        ("HcclCommInitRootInfo", sys::HCCL_MEMORY | sys::HCCL_OUT_OF_MEMORY) => {
            "; a communicator takes twice HCCL_BUFFSIZE (200 MB) of its NPU"
        }
        _ => "",
    }
}

impl HcclError {
    /// Whether a call failed with this code.
    pub(crate) fn is(&self, code: Status) -> bool {
        matches!(self, Self::Acl { status, .. } | Self::Hccl { status, .. } if *status == code)
    }

    /// Whether the next update may work, whose group is another one.
    fn is_of_a_link(&self) -> bool {
        match self {
            Self::Asynchronous(_) => true,
            Self::Acl { status, .. } => *status == sys::LINK_ERROR,
            Self::Hccl { status, .. } => matches!(
                *status,
                sys::HCCL_TCP_CONNECT..=sys::HCCL_ROCE_TRANSFER | sys::HCCL_NETWORK | sys::REMOTE
            ),
            _ => false,
        }
    }

    fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. }
            | Self::Load { .. }
            | Self::Foreign { .. }
            | Self::Symbols { .. }
            | Self::Absent(..) => ErrorKind::Backend,
            Self::Another { .. } | Self::NoDevice { .. } => ErrorKind::Config,
            Self::Full { .. } | Self::NoPinned { .. } => ErrorKind::Resource,
            Self::RootInfo(_) | Self::Outside { .. } | Self::TooMany(_) => ErrorKind::Protocol,
            Self::Garbled => ErrorKind::Digest,
            Self::NotJoined(_)
            | Self::Lingering
            | Self::Mapped
            | Self::NoSlots
            | Self::Detached => ErrorKind::State,
            Self::Overwritten => ErrorKind::Aborted,
            // Not that a peer is gone: the control plane knows that, and HCCL does not.
            Self::Asynchronous(_) => ErrorKind::Io,
            Self::Acl { status, .. } => match *status {
                sys::INVALID_DEVICE => ErrorKind::Config,
                sys::NO_CONTEXT | sys::STREAM_OF_ANOTHER_CONTEXT => ErrorKind::State,
                sys::STREAM_ABORTED => ErrorKind::Aborted,
                sys::OUT_OF_DEVICE_MEMORY => ErrorKind::Resource,
                sys::UNSUPPORTED => ErrorKind::Backend,
                sys::SYNCHRONISE_TIMEOUT | sys::OPERATION_TIMEOUT => ErrorKind::Timeout,
                _ => ErrorKind::Io,
            },
            Self::Hccl { call, status, .. } => match (*call, *status) {
                ("HcclCommInitRootInfo", sys::HCCL_PARAMETER) => ErrorKind::Config,
                ("HcclCommInitRootInfo", sys::HCCL_NOT_FOUND)
                | ("HcclGetRootInfo", sys::HCCL_UNAVAILABLE)
                | (_, sys::HCCL_MEMORY | sys::HCCL_OUT_OF_MEMORY) => ErrorKind::Resource,
                (_, sys::HCCL_UNSUPPORTED) => ErrorKind::Backend,
                (_, sys::HCCL_TIMEOUT) => ErrorKind::Timeout,
                _ => ErrorKind::Io,
            },
        }
    }
}

impl From<HcclError> for engine_core::Error {
    fn from(error: HcclError) -> Self {
        let retry = error.is_of_a_link();
        let this = Self::new(error.kind(), "using HCCL", error.to_string()).with_source(error);
        if retry { this.recovery(Recovery::Retry) } else { this }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::Error;

    #[test]
    fn codes_are_said_in_words_with_what_helps() {
        let error = HcclError::Hccl {
            call: "HcclCommInitRootInfo",
            status: 1,
            detail: "EI0003: repeated device".into(),
        };
        let error = Error::from(error);
        assert_eq!(error.kind(), ErrorKind::Config);
        let words = error.to_string();
        assert!(words.contains("invalid parameter (1: EI0003: repeated device)"), "{words}");
        assert!(words.contains("two ranks of a group cannot be on one chip"), "{words}");
    }

    #[test]
    fn the_same_code_means_different_things_in_the_two_libraries() {
        let acl = |status| HcclError::Acl { call: "c", status, detail: String::new() }.kind();
        let hccl = |status| HcclError::Hccl { call: "c", status, detail: String::new() }.kind();
        assert_eq!(acl(207_001), ErrorKind::Resource);
        assert_eq!(acl(507_048), ErrorKind::Timeout);
        assert_eq!(hccl(9), ErrorKind::Timeout);
        assert_eq!(hccl(24), ErrorKind::Resource);
        assert_eq!(acl(9), ErrorKind::Io);
    }

    #[test]
    fn a_link_that_failed_is_no_lost_peer_and_the_next_update_may_work() {
        let acl = HcclError::Acl { call: "c", status: 507_056, detail: String::new() };
        let hccl = HcclError::Hccl { call: "c", status: 19, detail: String::new() };
        for error in [acl, hccl, HcclError::Asynchronous(sys::REMOTE)] {
            let error = Error::from(error);
            assert_eq!((error.kind(), error.report().recovery), (ErrorKind::Io, Recovery::Retry));
        }
    }
}

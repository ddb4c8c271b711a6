//! The transport's own errors, and what they are to its users.

use std::path::PathBuf;

use engine_core::{ErrorKind, Recovery};

use crate::sys::Status;

/// What to do about a library that is not there.
pub(crate) const REMEDY: &str =
    "install it with `pip install nvidia-nccl-cu13`, or name its file in CKPT_ENGINE_NCCL_LIB";

#[derive(Debug, thiserror::Error)]
pub(crate) enum NcclError {
    #[error(
        "there is no libnccl.so.2 in an installed wheel, nor in any of the {folders} usual folders, nor \
         where the system's loader looks; {REMEDY}"
    )]
    Missing { folders: usize },
    #[error("{} cannot be loaded: {source}; {REMEDY}", path.display())]
    Load { path: PathBuf, source: libloading::Error },
    #[error("{} lacks a function of NCCL 2.19: {source}; {REMEDY}", path.display())]
    Symbol { path: PathBuf, source: libloading::Error },
    #[error("{} is NCCL {version}; 2.19 or later is needed; {REMEDY}", path.display())]
    Version { path: PathBuf, version: String },
    #[error(
        "the library is {}, and this process has loaded {} before: a process has one NCCL",
        wanted.display(), loaded.display()
    )]
    Another { wanted: PathBuf, loaded: PathBuf },
    #[error("{call}: {words}{}", after(last))]
    Call { call: &'static str, status: Status, words: String, last: String },
    #[error("the group's id has {0} bytes: it is not NCCL's")]
    Id(usize),
    #[error("this rank is not in the group")]
    NotJoined,
    #[error("the slots are not in memory that NCCL reaches")]
    OutOfReach,
    #[error("bytes {start}..{end} of memory of {len}")]
    Outside { start: u64, end: u64, len: u64 },
    #[error(transparent)]
    Cuda(#[from] device_cuda::CudaError),
    #[error(transparent)]
    Wait(#[from] engine_core::Error),
}

fn after(last: &str) -> String {
    if last.is_empty() { String::new() } else { format!(" ({last})") }
}

/// `ncclInvalidUsage`: what ranks of different versions get, or two ranks on one GPU.
const INVALID_USAGE: Status = 5;

impl From<NcclError> for engine_core::Error {
    fn from(error: NcclError) -> Self {
        use NcclError as E;
        let kind = match error {
            E::Wait(error) => return error,
            E::Cuda(error) => return error.into(),
            E::Missing { .. } | E::Load { .. } | E::Symbol { .. } | E::Version { .. } => {
                ErrorKind::Backend
            }
            E::Another { .. } | E::OutOfReach => ErrorKind::Config,
            E::Call { status: INVALID_USAGE, .. } => ErrorKind::Mismatch,
            // Also what NCCL calls a remote error: whether a rank is gone or the network to it, it cannot know. Who
            // is lost, the control plane says.
            E::Call { .. } => ErrorKind::Io,
            E::Id(_) => ErrorKind::Protocol,
            E::NotJoined | E::Outside { .. } => ErrorKind::State,
        };
        // Groups are formed anew by the next update.
        let recovery = match kind {
            ErrorKind::Io => Some(Recovery::Retry),
            _ => None,
        };
        let error = Self::new(kind, "using NCCL", error.to_string()).with_source(error);
        match recovery {
            Some(recovery) => error.recovery(recovery),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_answer_of_the_library_says_that_a_rank_is_lost_or_which() {
        for status in -1..12 {
            let (words, last) = ("words".into(), String::new());
            let error = NcclError::Call { call: "ncclBroadcast", status, words, last };
            let error = engine_core::Error::from(error);
            assert_ne!(error.kind(), ErrorKind::PeerLost, "{status}");
            assert_eq!(error.report().rank, None, "{status}");
        }
    }
}

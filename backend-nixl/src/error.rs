//! The transport's own errors, and their conversion.

use std::path::PathBuf;
use std::time::Duration;

use engine_core::{ErrorKind, Recovery};
use rustix::io::Errno;

use crate::sys::{LIBRARY_DIR_VARIABLE, Status};

/// The remedy for a missing library.
pub(crate) const REMEDY: &str =
    "install it with `pip install nixl-cu12==1.5.1`, or name its folder in CKPT_ENGINE_NIXL_DIR";

#[derive(Debug, thiserror::Error)]
pub(crate) enum NixlError {
    #[error("there is no libnixl_capi.so {}; {REMEDY}", in_words(folders))]
    Missing { folders: Vec<PathBuf> },
    #[error("{} cannot be loaded: {source}", path.display())]
    Load { path: PathBuf, source: libloading::Error },
    #[error("{} lacks a function of NIXL 1.x: {source}; {REMEDY}", path.display())]
    Symbol { path: PathBuf, source: libloading::Error },
    #[error("{} is NIXL {version}; 1.x is needed; {REMEDY}", path.display())]
    Version { path: PathBuf, version: String },
    #[error(
        "library_dir is {}, and this process has loaded {} before: a process has one NIXL",
        wanted.display(), loaded.display()
    )]
    Another { wanted: PathBuf, loaded: PathBuf },
    #[error("NIXL's {call} failed: {}", status_in_words(*status))]
    Call { call: &'static str, status: Status },
    #[error(
        "UCX finds no transport or no network interface that it can use with {settings} (status {status})"
    )]
    Transports { settings: String, status: Status },
    #[error("the transfer failed: {}", status_in_words(*status))]
    Transfer { status: Status },
    #[error("the transfer did not end within {:.1} s", .0.as_secs_f64())]
    Slow(Duration),
    #[error("the transfer was given up")]
    Abandoned,
    #[error(
        "UCX cannot connect to it: if the rank is alive, UCX takes an interface that does not lead there, or the two \
         have no transport in common; the variable UCX_NET_DEVICES names the interfaces, the option `transports` \
         the transports"
    )]
    Unreachable,
    #[error("the peer could not write it: {0}")]
    Refused(String),
    #[error(
        "a slot had to be moved before the others knew that slots move; they know in the next update"
    )]
    Moved,
    #[error("this rank's agent has ended")]
    Closed,
    #[error("the system refused {call}: {errno}")]
    System { call: &'static str, errno: Errno },
    #[error(
        "no memory for {0} bytes of buckets; use smaller ones (update_weights_bucket_megabytes)"
    )]
    Full(u64),
    #[error(
        "this process may open {left} more files, and an agent of NIXL opens up to {wanted}: raise its limit (ulimit -n)"
    )]
    Descriptors { left: u64, wanted: u64 },
    #[error(
        "this process may map {} MB more, and an agent of NIXL maps up to {} MB: raise its limit (ulimit -v)",
        left >> 20, wanted >> 20
    )]
    Addresses { left: u64, wanted: u64 },
    #[error("{slots} slots of {bytes} bytes are more than this machine can address")]
    TooLarge { slots: u32, bytes: u64 },
    #[error("bytes 0..{filled} of slot {slot} lie outside {slots} slots of {bytes} bytes")]
    Outside { slot: u32, filled: u64, slots: u32, bytes: u64 },
    #[error("NIXL cannot reach memory of this kind: it has no address")]
    OutOfReach,
    #[error("{filled} bytes of a slot of {bytes}")]
    OutsideSlot { filled: u64, bytes: u64 },
    #[error("slot {slot} is still in use after {:.1} s: {by}", waited.as_secs_f64())]
    InUse { slot: u32, waited: Duration, by: String },
    #[error(
        "slot {slot} has no memory: peers that were given up may still write to what it had, and there is no other"
    )]
    Vacant { slot: u32 },
    #[error("the memory of {ranges} slots is kept already for peers that may still write to it")]
    Kept { ranges: usize },
    #[error("this rank was not told how to reach it")]
    Unknown,
    #[error("{0}")]
    Device(engine_core::Error),
    #[error("what it says of itself cannot be read: {0}")]
    Card(postcard::Error),
    #[error("no memory for {0} bytes of tensors to lend, or to gather what is written to them in")]
    NoMemoryToLend(u64),
    #[error("it has taken its tensors back")]
    Withdrawn,
    #[error("it lends what no memory has")]
    Offer,
}

fn in_words(folders: &[PathBuf]) -> String {
    match folders {
        [folder] => {
            format!("in {} (named by {LIBRARY_DIR_VARIABLE} or library_dir)", folder.display())
        }
        folders => {
            format!("in an installed wheel or in any of the {} usual folders", folders.len())
        }
    }
}

fn status_in_words(status: Status) -> String {
    let words = match status {
        -1 => "an invalid parameter",
        -2 => "the backend reports an error; the peer or the connection may be gone",
        -3 => "an invalid state",
        -4 => "an exception",
        -6 => "not found",
        _ => "an unknown failure",
    };
    format!("{words} (status {status})")
}

impl NixlError {
    /// Whether it is about this rank, and not about a peer.
    pub(crate) fn is_of_this_rank(&self) -> bool {
        use NixlError as E;
        match self {
            E::Call { .. } | E::Transfer { .. } | E::Slow(_) | E::Abandoned | E::Refused(_) => {
                false
            }
            E::Unreachable | E::Outside { .. } | E::Unknown | E::Card(_) => false,
            E::Withdrawn | E::Offer => false,
            E::Missing { .. } | E::Load { .. } | E::Symbol { .. } | E::Version { .. } => true,
            E::Another { .. } | E::Transports { .. } | E::TooLarge { .. } | E::Moved => true,
            E::Closed | E::System { .. } | E::Full(_) | E::InUse { .. } | E::Vacant { .. } => true,
            E::Kept { .. } | E::OutsideSlot { .. } | E::OutOfReach | E::Device(_) => true,
            E::Descriptors { .. } | E::Addresses { .. } | E::NoMemoryToLend(_) => true,
        }
    }
}

impl From<NixlError> for engine_core::Error {
    fn from(error: NixlError) -> Self {
        use NixlError as E;
        // None is `PeerLost`: the control plane reports lost peers. The library cannot tell whether a failure between this rank and a peer
        // is the peer's or the network's.
        let kind = match &error {
            E::Missing { .. } | E::Load { .. } | E::Symbol { .. } | E::Version { .. } => {
                ErrorKind::Backend
            }
            E::Another { .. } | E::Transports { .. } | E::TooLarge { .. } | E::OutOfReach => {
                ErrorKind::Config
            }
            E::Moved | E::Refused(_) | E::Abandoned => ErrorKind::Aborted,
            E::Slow(_) | E::InUse { .. } => ErrorKind::Timeout,
            E::Closed | E::OutsideSlot { .. } => ErrorKind::State,
            E::Call { .. } | E::Transfer { .. } | E::Unreachable | E::System { .. } => {
                ErrorKind::Io
            }
            E::Withdrawn => ErrorKind::Aborted,
            E::Full(_) | E::Vacant { .. } | E::Kept { .. } => ErrorKind::Resource,
            E::Descriptors { .. } | E::Addresses { .. } | E::NoMemoryToLend(_) => {
                ErrorKind::Resource
            }
            E::Device(error) => error.kind(),
            E::Outside { .. } | E::Unknown | E::Card(_) | E::Offer => ErrorKind::Protocol,
        };
        // The next update connects again.
        let retry = matches!(error, E::Transfer { .. } | E::Unreachable);
        let this = Self::new(kind, "using NIXL", error.to_string()).with_source(error);
        if retry { this.recovery(Recovery::Retry) } else { this }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn no_error_of_the_library_or_of_a_peer_says_that_a_peer_is_lost() {
        for error in [
            NixlError::Transfer { status: -2 },
            NixlError::Call { call: "load_remote_md", status: -2 },
            NixlError::Unreachable,
            NixlError::Refused("it did not end in time".into()),
            NixlError::Abandoned,
            NixlError::Slow(Duration::from_secs(1)),
        ] {
            let words = error.to_string();
            let error = engine_core::Error::from(error);
            assert_ne!(error.kind(), ErrorKind::PeerLost, "{words}");
        }
    }

    #[test]
    fn after_a_refusal_or_a_transfer_that_failed_the_next_update_may_be_tried() {
        for error in [
            NixlError::Transfer { status: -2 },
            NixlError::Unreachable,
            NixlError::Refused("a write failed".into()),
            NixlError::Abandoned,
            NixlError::Slow(Duration::from_secs(1)),
        ] {
            let words = error.to_string();
            let error = engine_core::Error::from(error);
            assert_eq!(error.report().recovery, Recovery::Retry, "{words}");
        }
    }
}

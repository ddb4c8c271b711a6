//! The transport's own errors, and the kinds that its users see.

use engine_core::ErrorKind;
use rustix::io::Errno;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SegmentError {
    #[error(
        "no memory for {needed} bytes of buckets ({available}); use smaller buckets \
             (update_weights_bucket_megabytes)"
    )]
    Full { needed: u64, available: String },
    #[error("the system refused {call}: {errno}")]
    System { call: &'static str, errno: Errno },
    #[error("shared memory cannot be opened at {path} ({source}); ranks of a host need one user")]
    Open { path: String, source: std::io::Error },
    #[error(
        "what was shared at {path} is not there: its process ended or took it back, or is in another PID \
             namespace than this one"
    )]
    Gone { path: String },
    #[error(
        "shared memory that another process could shorten is not mapped: reading it could end this process"
    )]
    Unsealed,
    #[error("shared memory of {size} bytes was said to have {len}")]
    Short { len: usize, size: i64 },
    #[error("bytes up to {end} lie outside of {size} bytes of memory")]
    OutsideMemory { end: u64, size: u64 },
    #[error("no memory for {needed} bytes of tensors to lend ({available})")]
    NoMemoryToLend { needed: u64, available: String },
    #[error("{len} bytes at {at} lie outside of what is lent")]
    OutsideLent { at: u64, len: u64 },
    #[error("the rollout has refused a parcel, whose bytes are not for it")]
    Refused,
    #[error("the rollout has not emptied a parcel for {:.1} s", .0.as_secs_f64())]
    NotEmptied(std::time::Duration),
    #[error("no thread to scatter parcels: {0}")]
    NoThread(String),
    #[error("{len} bytes at {at} are in no tensor that is lent")]
    NotLent { at: u64, len: u64 },
    #[error("the tensors are lent: trainers may write to them")]
    Lent,
    #[error("no memory for a version of {needed} bytes or more in the cache")]
    NoMemory { needed: u64 },
    #[error("{path} is not the cache any more: its process ended")]
    CacheGone { path: String },
    #[error("the cache cannot be read: {0}")]
    Damaged(String),
    #[error("{0} × {1} bytes of buckets are more than this machine can address")]
    TooLarge(u32, u64),
}

impl From<SegmentError> for engine_core::Error {
    fn from(error: SegmentError) -> Self {
        let kind = match &error {
            SegmentError::NotEmptied(_) => ErrorKind::Timeout,
            SegmentError::Full { .. }
            | SegmentError::NoThread(_)
            | SegmentError::NoMemory { .. }
            | SegmentError::NoMemoryToLend { .. } => ErrorKind::Resource,
            SegmentError::System { .. } | SegmentError::Open { .. } => ErrorKind::Io,
            SegmentError::Gone { .. } | SegmentError::CacheGone { .. } => ErrorKind::PeerLost,
            SegmentError::Unsealed
            | SegmentError::Short { .. }
            | SegmentError::OutsideMemory { .. }
            | SegmentError::OutsideLent { .. }
            | SegmentError::Refused
            | SegmentError::Damaged(_) => ErrorKind::Protocol,
            SegmentError::TooLarge(..) => ErrorKind::Config,
            SegmentError::Lent | SegmentError::NotLent { .. } => ErrorKind::State,
        };
        Self::new(kind, "using shared memory", error.to_string()).with_source(error)
    }
}

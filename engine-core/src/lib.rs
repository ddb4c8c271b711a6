//! The contract of a checkpoint engine: weights and streams of them, plans, digests, errors, reports, and the traits
//! of engines and backends. It knows no transport, no device and no quantisation.

mod arena;
mod available;
mod base;
mod boxes;
pub mod changes;
pub mod clock;
mod config;
pub mod control;
pub mod digest;
mod dtype;
mod elements;
mod engine;
mod error;
mod expected;
mod ids;
mod isa;
mod kernel;
pub mod memory;
pub mod native;
pub mod observe;
mod parts;
mod pattern;
pub mod plan;
mod process;
pub mod provider;
mod received;
mod registry;
mod report;
mod sets;
mod storage;
mod store;
mod stream;
pub mod telemetry;
mod weight;

pub use arena::{Arena, ArenaArc};
pub use available::available_memory;
pub use base::{Base, Bases, Entrant};
pub use boxes::TensorBox;
pub use config::{CheckpointEngineConfig, DeviceChoice};
pub use control::{Control, Role};
pub use dtype::DType;
pub use elements::{Element, Numbers};
pub use engine::{
    Availability, Backend, CheckpointEngine, CheckpointEngineWithCache, Devices, EngineContext,
    Placement, Prepared, PreparedRollout, PreparedTrainer, RolloutEngine, TrainerEngine,
    WorkerMetadata, form_local_group, no_copies,
};
pub use error::{Error, ErrorKind, ErrorReport, Recovery, Result};
pub use expected::{Expected, check_names};
pub use ids::{Rank, Version};
pub use kernel::{Kernel, Program};
pub use parts::{PartSet, Parts};
pub use pattern::NamePattern;
pub use process::ProcessStat;
pub use received::{
    BucketContent, CopiedOut, CopyOut, Install, OnePass, Outcome, ReceivedBucket, ReceivedPiece,
    ReceivedWeights, TensorMap,
};
pub use registry::{Layer, Registry};
pub use report::{
    ChangedElements, DeltaReport, PartReport, ReceiveReport, ReceiverReport, SendReport,
    StageTimes, TensorCounts, VersionState,
};
pub use sets::{BitSet, RankMap, RankSet};
pub use storage::{DeviceBytes, DeviceMemory, Storage};
pub use store::{CacheStore, CacheWriter, ensure_fresh};
pub use stream::{
    Cast, FromIterator, FromStream, IntoWeight, IntoWeightStream, WeightStream, WeightStreamExt,
    ensure_async_iterator,
};
pub use weight::{Encoding, StridedView, TensorMeta, Treatment, Weight};

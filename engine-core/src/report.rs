//! What an update did, in numbers.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Rank, Treatment, Version, Weight};

/// Where a version stands at a receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VersionState {
    /// Weights are arriving.
    #[default]
    Staging,
    /// All weights arrived and were verified here; other receivers may not be that far.
    Ready,
    /// Every receiver has verified the version.
    Active,
    /// The update failed: the version must not be used.
    Aborted,
}

/// The tensors of an update by what happened to them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TensorCounts {
    /// Weights of the stream; what layers added to them is not counted.
    pub tensors: u64,
    /// Weights that a layer converted.
    pub converted: u64,
    /// Weights that a layer which converts others left as they are.
    pub kept: u64,
    /// Weights that were in the layer's format already.
    pub passed_through: u64,
    /// Why weights were kept: the reason, and how many.
    pub kept_reasons: BTreeMap<String, u64>,
    /// Bytes read from the trainer's memory.
    pub source_bytes: u64,
    /// Bytes of weights and scales that travelled, alignment not counted.
    pub wire_bytes: u64,
}

impl TensorCounts {
    /// Counts one more weight.
    pub fn add(&mut self, weight: &Weight) {
        self.source_bytes += weight.source_bytes();
        self.wire_bytes += weight.byte_len();
        match weight.treatment() {
            Treatment::Plain => self.tensors += 1,
            Treatment::Added => {}
            Treatment::Converted => {
                self.tensors += 1;
                self.converted += 1;
            }
            Treatment::PassedThrough => {
                self.tensors += 1;
                self.passed_through += 1;
            }
            Treatment::Kept(reason) => {
                self.tensors += 1;
                self.kept += 1;
                match self.kept_reasons.get_mut(&**reason) {
                    Some(count) => *count += 1,
                    None => {
                        self.kept_reasons.insert(reason.to_string(), 1);
                    }
                }
            }
        }
    }
}

/// Where the time of an update went on the trainer. Stages overlap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StageTimes {
    /// Waiting for the trainer's own stream of weights.
    pub source: Duration,
    /// Waiting for receivers to release a bucket.
    pub release: Duration,
    /// Encoding weights into buckets.
    pub encode: Duration,
    /// Making filled buckets visible to receivers: transports that push bytes do it here.
    #[serde(default)]
    pub publish: Duration,
    /// Waiting for the receivers' confirmation after the last bucket.
    pub confirm: Duration,
}

/// How one receiver ended an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ReceiverReport {
    /// The receiver.
    pub rank: Rank,
    /// The version's state there.
    pub state: VersionState,
    /// Seconds from the beginning of the update to the receiver's confirmation, by the receiver's clock.
    pub seconds: f64,
    /// The digest that the receiver computed of the version, as far as it wants it; absent if digests are off or the
    /// transport hands memory over without a copy.
    pub digest: Option<u64>,
    /// The receiver's own additions: what its program found worth telling.
    pub notes: serde_json::Value,
    /// The named parts of the version that it got: those that it wants. Empty if the trainer's versions have no named parts.
    #[serde(default)]
    pub parts: Vec<String>,
}

impl ReceiverReport {
    /// The report of a receiver that has said no more than its state.
    pub fn new(rank: Rank, state: VersionState) -> Self {
        Self {
            rank,
            state,
            seconds: 0.0,
            digest: None,
            notes: serde_json::Value::Null,
            parts: Vec::new(),
        }
    }
}

/// What a trainer's update did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SendReport {
    /// The version sent.
    pub version: Version,
    /// The tensors, by what happened to them, and their bytes.
    pub counts: TensorCounts,
    /// Buckets sent.
    pub buckets: u64,
    /// Whether names and shapes equalled the last update's, so that no metadata travelled.
    pub plan_reused: bool,
    /// From the call to the last receiver's confirmation.
    pub elapsed: Duration,
    /// Where that time went.
    pub stages: StageTimes,
    /// The digest of the whole version, if digests are on.
    pub digest: Option<u64>,
    /// Every receiver that took part.
    pub receivers: Vec<ReceiverReport>,
    /// Ranks of the group that took no part because their processes died or left.
    pub absent: Vec<Rank>,
    /// What fell back to something slower, each with the reason, in words. Empty if nothing did.
    #[serde(default)]
    pub slower: Vec<String>,
    /// What changed since the version that rollouts have, if updates carry only changes.
    #[serde(default)]
    pub delta: Option<DeltaReport>,
}

/// What changed in an update that sends only changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DeltaReport {
    /// Why whole weights travelled; `None` if changes did.
    pub whole: Option<String>,
    /// The elements that were compared, and how many of them had changed, by their type as they travel: `BF16`, `F8_E4M3`.
    pub elements: BTreeMap<String, ChangedElements>,
    /// Weights that were there before and had changes.
    pub changed_weights: u64,
    /// Bytes of the copy that the trainer keeps of what it sent.
    pub shadow_bytes: u64,
    /// Whether all ranks computed the digest of their copies anew from memory.
    #[serde(default)]
    pub attested: bool,
    /// The named parts of the version, if a copy of it is kept.
    #[serde(default)]
    pub parts: BTreeMap<String, PartReport>,
}

/// A named part of a version: of the policy, of a draft model, of an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PartReport {
    /// The number of what is in it: a digest of its names, types, shapes and bytes, in any order. A part that has the same number as before is
    /// unchanged; one that has the same on two ranks is the same there.
    pub digest: u64,
    /// Its tensors, scales included.
    pub tensors: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those of which anything travelled, changes or all of it. None did of a part that is unchanged.
    pub sent: u64,
}

/// Elements of one type, and how many of them changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ChangedElements {
    /// All of the weights that were there before.
    pub compared: u64,
    /// Those that have another value.
    pub changed: u64,
}

impl SendReport {
    /// The report of an update that sent nothing yet. An engine fills in what it knows.
    pub fn new(version: Version) -> Self {
        Self {
            version,
            counts: TensorCounts::default(),
            buckets: 0,
            plan_reused: false,
            elapsed: Duration::ZERO,
            stages: StageTimes::default(),
            digest: None,
            receivers: Vec::new(),
            absent: Vec::new(),
            slower: Vec::new(),
            delta: None,
        }
    }

    /// Source bytes per second, in 10⁹ bytes.
    pub fn gb_per_s(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.counts.source_bytes as f64 / 1e9 / seconds } else { 0.0 }
    }
}

/// What an update brought a receiver.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ReceiveReport {
    /// The version received.
    pub version: Version,
    /// Its state here.
    pub state: VersionState,
    /// Tensors, scales included: the wire does not tell them apart.
    pub tensors: u64,
    /// Bytes of tensors.
    pub bytes: u64,
    /// Buckets received.
    pub buckets: u64,
    /// From the trainer's announcement to the end.
    pub elapsed: Duration,
    /// The digest of the version, as far as this rank wants it, if digests are on.
    pub digest: Option<u64>,
    /// The named parts of the version that are here, if this rank keeps a copy of it.
    #[serde(default)]
    pub parts: BTreeMap<String, PartReport>,
    /// The parts that this rank wants, by their names, which is what it got; `None` for all.
    #[serde(default)]
    pub wants: Option<Vec<String>>,
    /// What of this rank made the update slower than possible, each with the reason, in words. Empty if nothing did.
    #[serde(default)]
    pub slower: Vec<String>,
}

impl ReceiveReport {
    /// The report of an update that brought nothing yet. An engine fills in what it knows.
    pub fn new(version: Version, state: VersionState) -> Self {
        Self {
            version,
            state,
            tensors: 0,
            bytes: 0,
            buckets: 0,
            elapsed: Duration::ZERO,
            digest: None,
            parts: BTreeMap::new(),
            wants: None,
            slower: Vec::new(),
        }
    }
}

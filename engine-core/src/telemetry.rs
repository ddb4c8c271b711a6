//! What updates tell of themselves through the `metrics` crate, on trainer and rollouts alike.
//!
//! An embedding program that installs a recorder gets all of it; without one, nothing is kept. Every
//! metric has the label `rank`, because ranks may share a process.

use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, gauge, histogram};

use crate::observe::{Observer, Progress};
use crate::report::{SendReport, VersionState};
use crate::{Rank, Version};

/// A metric that this crate emits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// How it changes.
    pub kind: MetricKind,
    /// What its numbers count.
    pub unit: &'static str,
    /// Its labels beside `rank`, with their values.
    pub labels: &'static [(&'static str, &'static [&'static str])],
    /// What it says.
    pub help: &'static str,
}

/// How a metric changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// It only grows.
    Counter,
    /// It is set.
    Gauge,
    /// A value for each update.
    Histogram,
}

const UPDATES: &str = "ckpt_engine_updates_total";
const TENSORS: &str = "ckpt_engine_tensors_total";
const SOURCE_BYTES: &str = "ckpt_engine_source_bytes_total";
const SENT_BYTES: &str = "ckpt_engine_sent_bytes_total";
const RECEIVED_BYTES: &str = "ckpt_engine_received_bytes_total";
const RATE: &str = "ckpt_engine_bytes_per_second";
const UPDATE_SECONDS: &str = "ckpt_engine_update_seconds";
const STAGE_SECONDS: &str = "ckpt_engine_stage_seconds";
const VERSION: &str = "ckpt_engine_version";
const STATE: &str = "ckpt_engine_state";

/// Every metric that is emitted.
pub const METRICS: [Metric; 10] = [
    Metric {
        name: UPDATES,
        kind: MetricKind::Counter,
        unit: "updates",
        labels: &[("outcome", &["committed", "aborted"])],
        help: "Updates that ended on this rank, by how.",
    },
    Metric {
        name: TENSORS,
        kind: MetricKind::Counter,
        unit: "tensors",
        labels: &[("treatment", &["plain", "converted", "kept", "passed_through"])],
        help: "Trainer: tensors of committed updates, by what happened to them.",
    },
    Metric {
        name: SOURCE_BYTES,
        kind: MetricKind::Counter,
        unit: "bytes",
        labels: &[],
        help: "Trainer: bytes of the source in buckets that were sent, aborted updates included.",
    },
    Metric {
        name: SENT_BYTES,
        kind: MetricKind::Counter,
        unit: "bytes",
        labels: &[],
        help: "Trainer: bytes of weights and scales of committed updates, as they travelled.",
    },
    Metric {
        name: RECEIVED_BYTES,
        kind: MetricKind::Counter,
        unit: "bytes",
        labels: &[],
        help: "Rollout: bytes of weights that arrived and were verified, aborted updates included.",
    },
    Metric {
        name: RATE,
        kind: MetricKind::Gauge,
        unit: "bytes per second",
        labels: &[],
        help: "The last committed update: on the trainer source bytes, on a rollout bytes that arrived.",
    },
    Metric {
        name: UPDATE_SECONDS,
        kind: MetricKind::Histogram,
        unit: "seconds",
        labels: &[],
        help: "Committed updates, from their begin to their commit.",
    },
    Metric {
        name: STAGE_SECONDS,
        kind: MetricKind::Histogram,
        unit: "seconds",
        labels: &[(
            "stage",
            &["collect", "release", "encode", "publish", "confirm", "fetch", "verify", "install"],
        )],
        help: "Where the time of a committed update went, summed over its buckets; stages overlap. \
               Trainer: collect to confirm. Rollout: fetch to install.",
    },
    Metric {
        name: VERSION,
        kind: MetricKind::Gauge,
        unit: "version",
        labels: &[],
        help: "The version that the rank sends or receives, or else the last one. The trainer tells \
               it of all ranks.",
    },
    Metric {
        name: STATE,
        kind: MetricKind::Gauge,
        unit: "state",
        labels: &[],
        help: "Where that version stands: 0 staging, 1 ready, 2 active, 3 aborted. The trainer tells \
               it of all ranks.",
    },
];

/// Gives the recorder that is installed the descriptions of all metrics.
pub fn describe() {
    for metric in METRICS {
        match metric.kind {
            MetricKind::Counter => metrics::describe_counter!(metric.name, metric.help),
            MetricKind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            MetricKind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
}

/// Time that an update's stages took on a rollout.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct ReceiveStages {
    /// Until buckets were here.
    pub fetch: Duration,
    /// Computing digests.
    pub verify: Duration,
    /// The receiver's own work on buckets.
    pub install: Duration,
}

/// A rank's metrics: what its observer is told, and how its updates ended.
#[derive(Clone, Debug)]
pub struct Meter {
    rank: Rank,
    observer: Arc<dyn Observer>,
}

impl Meter {
    /// The meter of a rank, which tells an observer as well.
    pub fn new(rank: Rank, observer: Arc<dyn Observer>) -> Self {
        Self { rank, observer }
    }

    /// A trainer's update that was committed.
    pub fn sent(&self, report: &SendReport) {
        let counts = &report.counts;
        counter!(SENT_BYTES, "rank" => self.label()).increment(counts.wire_bytes);
        let treated = counts.converted + counts.kept + counts.passed_through;
        for (treatment, tensors) in [
            ("plain", counts.tensors.saturating_sub(treated)),
            ("converted", counts.converted),
            ("kept", counts.kept),
            ("passed_through", counts.passed_through),
        ] {
            counter!(TENSORS, "rank" => self.label(), "treatment" => treatment).increment(tensors);
        }
        let stages = &report.stages;
        self.stages([
            ("collect", stages.source),
            ("release", stages.release),
            ("encode", stages.encode),
            ("publish", stages.publish),
            ("confirm", stages.confirm),
        ]);
        self.committed(counts.source_bytes, report.elapsed);
    }

    /// A rollout's update that was committed.
    pub fn received(&self, bytes: u64, elapsed: Duration, stages: ReceiveStages) {
        let ReceiveStages { fetch, verify, install } = stages;
        self.stages([("fetch", fetch), ("verify", verify), ("install", install)]);
        self.committed(bytes, elapsed);
    }

    /// An update that failed here or anywhere, and the other ranks that were in it.
    pub fn aborted(&self, others: &[Rank]) {
        counter!(UPDATES, "rank" => self.label(), "outcome" => "aborted").increment(1);
        for &rank in others.iter().chain([&self.rank]) {
            state(rank, VersionState::Aborted);
        }
    }

    fn committed(&self, bytes: u64, elapsed: Duration) {
        counter!(UPDATES, "rank" => self.label(), "outcome" => "committed").increment(1);
        histogram!(UPDATE_SECONDS, "rank" => self.label()).record(elapsed);
        let seconds = elapsed.as_secs_f64();
        if seconds > 0.0 {
            gauge!(RATE, "rank" => self.label()).set(bytes as f64 / seconds);
        }
        state(self.rank, VersionState::Active);
    }

    fn stages<const N: usize>(&self, stages: [(&'static str, Duration); N]) {
        for (stage, time) in stages {
            histogram!(STAGE_SECONDS, "rank" => self.label(), "stage" => stage).record(time);
        }
    }

    fn label(&self) -> String {
        self.rank.0.to_string()
    }
}

impl Observer for Meter {
    fn observe(&self, progress: &Progress) {
        match progress {
            Progress::Began { version: begun, receivers } => {
                version(self.rank, *begun);
                state(self.rank, VersionState::Staging);
                for &rank in receivers.iter().filter(|rank| **rank != self.rank) {
                    version(rank, *begun);
                    state(rank, VersionState::Staging);
                }
            }
            Progress::Bucket { bytes, .. } => {
                let name = if self.rank == Rank::LEADER { SOURCE_BYTES } else { RECEIVED_BYTES };
                counter!(name, "rank" => self.label()).increment(*bytes);
            }
            Progress::State { rank, state: now } => state(*rank, *now),
        }
        self.observer.observe(progress);
    }
}

fn version(rank: Rank, version: Version) {
    gauge!(VERSION, "rank" => rank.0.to_string()).set(version.0 as f64);
}

fn state(rank: Rank, state: VersionState) {
    let number = match state {
        VersionState::Staging => 0.0,
        VersionState::Ready => 1.0,
        VersionState::Active => 2.0,
        VersionState::Aborted => 3.0,
    };
    gauge!(STATE, "rank" => rank.0.to_string()).set(number);
}

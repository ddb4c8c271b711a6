//! What is told of an update, in one line.

use checkpoint_engine::{
    ChangedElements, DeltaReport, PartReport, Parts, ReceiverReport, SendReport, Version,
    VersionState,
};
use serde::Serialize;
use serde_json::Value;

use crate::bench::transfer::StageSeconds;
use crate::device;
use crate::roles::RolloutNotes;
use crate::source::Source;

/// One update, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct UpdateLine {
    /// The update's version.
    pub version: Version,
    /// The transport.
    pub backend: String,
    /// Whether the transport's devices are simulated: then no figure says anything of hardware.
    pub simulated: bool,
    /// Tensors sent, scales of quantised ones not counted.
    pub tensors: u64,
    /// Bytes read from the trainer's memory.
    pub source_bytes: u64,
    /// Bytes of weights that travelled.
    pub wire_bytes: u64,
    /// Tensors that were quantised.
    pub quantized: u64,
    /// Tensors left alone although quantisation is on.
    pub kept: u64,
    /// Tensors that were quantised already.
    pub passed_through: u64,
    /// From the beginning to the last confirmation.
    pub seconds: f64,
    /// Where that time went on the trainer. Stages overlap.
    pub stages: StageSeconds,
    /// Source bytes per second.
    pub gb_per_s: f64,
    /// What one thread's copy of the same bytes into shared memory reached, in the same run, where that was measured.
    pub memcpy_gb_per_s: Option<f64>,
    /// The most memory that the trainer took beyond what it had before it prepared.
    pub extra_peak_bytes: u64,
    /// Whether every rollout compared every byte with the source.
    pub verified: bool,
    /// Whether names and shapes equalled the last update's, so that no metadata travelled.
    pub plan_reused: bool,
    /// What fell back to something slower than was asked for, and why.
    pub slower: Vec<String>,
    /// What had changed, where only that travels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<DeltaReport>,
    /// What attesting the version took then, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attested_seconds: Option<f64>,
    /// The rollouts.
    pub rollouts: Vec<RolloutLine>,
}

/// A rollout's end of an update.
#[derive(Clone, Debug, Serialize)]
pub struct RolloutLine {
    /// Its rank.
    pub rank: u32,
    /// From the announcement to its confirmation, by its own clock.
    pub seconds: f64,
    /// The version's state there.
    pub state: VersionState,
    /// The digest of the whole version, in hexadecimal.
    pub digest: Option<String>,
    /// The most memory that it took beyond what it had before it prepared.
    pub extra_peak_bytes: u64,
    /// What was sent of the weights, where only changes are.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub delta: Value,
}

/// What had changed in an update, in words.
pub fn delta_in_words(delta: &DeltaReport, wire_bytes: u64) -> String {
    let kept = delta.shadow_bytes as f64 / f64::from(1 << 20);
    let part = |(name, part): (&String, &PartReport)| match part.sent {
        0 => format!("; {name} unchanged"),
        sent => format!("; {name}: {sent} of {} tensors", part.tensors),
    };
    // One part is the whole version, of which the rest says enough.
    let parts: String = match delta.parts.len() {
        0 | 1 => String::new(),
        _ => delta.parts.iter().map(part).collect(),
    };
    if let Some(why) = &delta.whole {
        return format!("whole weights: {why}; a copy of {kept:.1} MiB on each side{parts}");
    }
    let of_type = |(name, counts): (&String, &ChangedElements)| {
        let share = counts.changed as f64 / counts.compared.max(1) as f64;
        format!("{:.3} % of {name}", share * 100.0)
    };
    let changed: Vec<String> = delta.elements.iter().map(of_type).collect();
    format!(
        "changes: {:.3} MB travelled; {} in {} weights; a copy of {kept:.1} MiB on each side{parts}",
        wire_bytes as f64 / 1e6,
        if changed.is_empty() { "nothing".to_owned() } else { changed.join(", ") },
        delta.changed_weights
    )
}

/// An update's line from its report.
///
/// A rollout that verified saw every tensor and byte of the source, also of those that an update does not send; of the parts that it wants
/// if it does not want all.
pub fn line(
    report: &SendReport,
    source: &Source,
    parts: &Parts,
    backend: &str,
    memcpy: Option<f64>,
    extra: u64,
) -> UpdateLine {
    let counts = &report.counts;
    let notes: Vec<RolloutNotes> = report
        .receivers
        .iter()
        .map(|receiver| serde_json::from_value(receiver.notes.clone()).unwrap_or_default())
        .collect();
    let names: Vec<&str> = parts.names().collect();
    let is_verified = |(receiver, notes): (&ReceiverReport, &RolloutNotes)| {
        let (tensors, bytes) = match &*receiver.parts {
            got if got.is_empty() || got.len() == names.len() => {
                let is_part = source.spec().is_part(report.version);
                let bytes = if is_part { source.byte_len() } else { counts.source_bytes };
                (source.tensors() as u64, bytes)
            }
            got => source.only(|name| {
                let part = names.get(parts.part_of(name) as usize);
                part.is_some_and(|part| got.iter().any(|got| got == part))
            }),
        };
        notes.verified_bytes == bytes && notes.verified_tensors == tensors
    };
    let verified = !notes.is_empty() && report.receivers.iter().zip(&notes).all(is_verified);
    let rollouts = report.receivers.iter().zip(&notes).map(|(receiver, notes)| RolloutLine {
        rank: receiver.rank.0,
        seconds: receiver.seconds,
        state: receiver.state,
        digest: receiver.digest.map(|digest| format!("{digest:016x}")),
        extra_peak_bytes: notes.extra_peak_bytes,
        delta: receiver.notes["delta"].clone(),
    });
    UpdateLine {
        version: report.version,
        backend: backend.to_owned(),
        simulated: device::is_simulated(backend),
        tensors: counts.tensors,
        source_bytes: counts.source_bytes,
        wire_bytes: counts.wire_bytes,
        quantized: counts.converted,
        kept: counts.kept,
        passed_through: counts.passed_through,
        seconds: report.elapsed.as_secs_f64(),
        stages: report.stages.into(),
        gb_per_s: report.gb_per_s(),
        memcpy_gb_per_s: memcpy,
        extra_peak_bytes: extra,
        verified,
        plan_reused: report.plan_reused,
        slower: report.slower.clone(),
        delta: report.delta.clone(),
        attested_seconds: None,
        rollouts: rollouts.collect(),
    }
}

impl UpdateLine {
    /// Adds that the version was attested, if it was.
    pub fn attested_in(&mut self, report: Option<&SendReport>) {
        self.attested_seconds = report.map(|report| report.elapsed.as_secs_f64());
    }
}

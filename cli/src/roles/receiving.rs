//! What a rollout does with the buckets that arrive: compares, installs, keeps and writes them.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint_engine::{
    CacheUpdate, Error, ErrorKind, ErrorReport, Install, ReceiveReport, ReceivedBucket,
    ReceivedPiece, ReceivedWeights, Result, RolloutEngine, Version, WeightCache,
};

use super::RolloutNotes;
use crate::checkpoint::CheckpointWriter;
use crate::memory::PeakMemory;
use crate::runtime::aside;
use crate::source::{Checked, Source};
use crate::threads::pool;

/// A rollout that reads weights in place, compares them with their source, and writes them out, as
/// it is asked to.
pub struct Rollout {
    /// What received weights are compared with.
    pub source: Option<Arc<Source>>,
    /// The folder that the weights are written to.
    pub out: Option<PathBuf>,
    /// The memory of the process, measured since before it joined.
    pub memory: Option<Arc<PeakMemory>>,
    /// What everything is copied to that arrives; without one, weights are read in place.
    pub destination: Option<Destination>,
    /// Where the last version is kept, for those who join later.
    pub cache: Option<WeightCache>,
}

/// Tensors that a rollout installs buckets into.
pub type Destination = Arc<Mutex<Box<dyn Install>>>;

impl fmt::Debug for Rollout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rollout").field("out", &self.out).finish_non_exhaustive()
    }
}

impl Rollout {
    /// Receives the next update; `None` if none began within the deadline, which is no failure: the
    /// trainer is training, and if it died the control plane says so.
    ///
    /// # Errors
    ///
    /// Why the update failed; `PeerLost` or `TrainerLeft` if the trainer is gone.
    pub async fn update(&self, engine: &mut dyn RolloutEngine) -> Result<Option<ReceiveReport>> {
        match engine.receive_weights(None).await {
            Ok(received) => self.take(received).await.map(Some),
            Err(error) if error.kind() == ErrorKind::Timeout => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes in a version that arrives, from the trainer or from a holder.
    ///
    /// # Errors
    ///
    /// Why it did not arrive, or what is wrong with it.
    pub async fn take(&self, mut received: ReceivedWeights<'_>) -> Result<ReceiveReport> {
        let version = received.version();
        let begun = || {
            let kept = self.cache.as_ref().map(|cache| cache.begin(version)).transpose()?;
            let writer = self.out.as_ref().map(CheckpointWriter::in_folder).transpose();
            Ok::<_, Error>((kept, writer.map_err(Error::from)?))
        };
        let (mut kept, mut writer) = match begun() {
            Ok(begun) => begun,
            Err(error) => {
                // So that the others hear of the cause.
                let report = ErrorReport::from(&error);
                received.fail(error);
                return Err(report.into());
            }
        };
        if let Some(kept) = &kept {
            kept.check_before(&received);
        }
        if let Some(destination) = &self.destination {
            let to = destination.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(copies) = to.copies() {
                received.copy_by(copies);
            }
        }
        let mut notes = RolloutNotes::default();
        loop {
            if let Some(memory) = &self.memory {
                notes.extra_peak_bytes = memory.extra_peak_bytes();
            }
            received.note(serde_json::json!(notes));
            let Some(bucket) = received.next_bucket().await? else { break };
            if self.source.is_none()
                && writer.is_none()
                && self.destination.is_none()
                && kept.is_none()
            {
                continue; // The engine has verified its digest; there is nothing more to do.
            }
            let (source, open, mut keeps) = (self.source.clone(), writer.take(), kept.take());
            let destination = self.destination.clone();
            let examined = move || {
                if let Some(destination) = destination {
                    // One bucket at a time; a panic has ended the update.
                    let mut to = destination.lock().unwrap_or_else(PoisonError::into_inner);
                    to.install(&bucket).map_err(|error| error.bucket(bucket.index()))?;
                }
                if let Some(keeps) = &mut keeps {
                    keeps.add(&bucket)?;
                }
                Ok((examine(&bucket, version, source.as_deref(), open)?, keeps))
            };
            match aside(examined).await.flatten() {
                Ok(((open, tensors, bytes), keeps)) => {
                    (writer, kept) = (open, keeps);
                    notes.verified_tensors += tensors;
                    notes.verified_bytes += bytes;
                }
                Err(error) => {
                    let report = ErrorReport::from(&error);
                    received.fail(error);
                    return Err(report.into());
                }
            }
        }
        let report = received.finish().await?;
        kept.map(CacheUpdate::complete).transpose()?;
        if let Some(writer) = writer {
            aside(move || writer.finish()).await?.map_err(Error::from)?;
        }
        Ok(report)
    }
}

type Examined = (Option<CheckpointWriter>, u64, u64);

/// Compares a bucket with the source and writes it out; returns the tensors that ended and the bytes
/// that were compared.
fn examine(
    bucket: &ReceivedBucket,
    version: Version,
    source: Option<&Source>,
    mut writer: Option<CheckpointWriter>,
) -> Result<Examined> {
    let pieces: Vec<ReceivedPiece> = bucket.pieces().collect();
    let (mut tensors, mut bytes) = (0, 0);
    if let Some(source) = source {
        let (scales, weights): (Vec<_>, Vec<_>) =
            pieces.iter().partition(|piece| source.follows_a_weight(&piece.meta.name));
        for group in [weights, scales] {
            let check = |piece: &ReceivedPiece| {
                source.check(&piece.meta, version, piece.start, &piece.bytes.to_host()?)
            };
            for checked in pool()?.map(group, check) {
                let Checked { source_bytes, ends_tensor } = checked?;
                bytes += source_bytes;
                tensors += u64::from(ends_tensor);
            }
        }
    }
    if let Some(writer) = &mut writer {
        for piece in &pieces {
            let bytes = piece.bytes.to_host()?;
            writer.write_chunk(&piece.meta, piece.start, &bytes).map_err(Error::from)?;
        }
    }
    Ok((writer, tensors, bytes))
}

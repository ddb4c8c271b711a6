//! Copies buckets of a device to the places of their pieces, in one pass once their layout is known.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine_core::plan::BucketLayout;
use engine_core::{CopyOut, ReceivedBucket, Result, Storage};

use crate::CudaSlice;
use crate::bucket::{Packer, Places};

/// The most pieces whose places are remembered, eight bytes each.
const MOST_PLACES: usize = 1 << 20;

/// Copies buckets of a device to the places of their pieces there, each by one launch, however many pieces it has.
///
/// It remembers the layouts whose places it was [told](Self::install). A bucket of such a layout is copied out while it is verified, so
/// that it is read once ([`CopyOut`]). Destinations share this, whatever their tensors are.
#[derive(Debug)]
pub struct CudaCopyOut {
    packer: Packer,
    layouts: Mutex<Layouts>,
}

/// The layouts that were installed, and the places of their pieces.
#[derive(Debug, Default)]
struct Layouts {
    /// By their digests. Layouts are compared as well.
    known: HashMap<u64, (Arc<BucketLayout>, Arc<Places>)>,
    pieces: usize,
}

impl CudaCopyOut {
    /// One without layouts, for the packer's device.
    pub fn new(packer: Packer) -> Self {
        Self { packer, layouts: Mutex::default() }
    }

    /// The packer that makes its launches.
    pub fn packer(&self) -> &Packer {
        &self.packer
    }

    /// Copies a bucket to the places of its pieces, unless that was done when it was verified. Returns whether it is copied. Blocks.
    ///
    /// `false` if the bucket is not in one allocation of this device, or if `place` has no places: then nothing was copied. `place` is
    /// called once for each layout, and again after [`forget`](Self::forget). It returns a place for each piece.
    ///
    /// # Errors
    ///
    /// Those of `place`; what the driver reports.
    pub fn install(
        self: &Arc<Self>,
        bucket: &ReceivedBucket,
        place: impl FnOnce(&BucketLayout) -> Result<Option<Places>>,
    ) -> Result<bool> {
        let copies: Arc<dyn CopyOut> = self.clone();
        if bucket.was_copied_by(&copies) {
            return Ok(true);
        }
        let Some(source) = bucket.buffer().and_then(|bytes| self.source(bytes)) else {
            return Ok(false);
        };
        let layout = bucket.layout();
        if let Some(places) = self.find(layout) {
            self.packer.copy_out(&source, layout.pieces(), &places, false)?;
            return Ok(true);
        }
        let Some(places) = place(layout)? else { return Ok(false) };
        self.packer.copy_out(&source, layout.pieces(), &places, false)?;
        self.remember(layout, places);
        Ok(true)
    }

    /// Forgets all layouts: call it when tensors have moved or were replaced.
    pub fn forget(&self) {
        *self.lock() = Layouts::default();
    }

    /// A bucket's memory, if it is this device's.
    fn source(&self, bucket: &Storage) -> Option<CudaSlice> {
        let here = self.packer.device().ordinal();
        CudaSlice::of_storage(bucket).filter(|source| source.device().ordinal() == here)
    }

    fn find(&self, layout: &BucketLayout) -> Option<Arc<Places>> {
        let layouts = self.lock();
        let (known, places) = layouts.known.get(&layout.digest())?;
        (std::ptr::eq(&**known, layout) || **known == *layout).then(|| Arc::clone(places))
    }

    fn remember(&self, layout: &Arc<BucketLayout>, places: Places) {
        let mut layouts = self.lock();
        let count = layout.pieces().len();
        if layouts.pieces + count > MOST_PLACES {
            *layouts = Layouts::default();
        }
        layouts.pieces += count;
        layouts.known.insert(layout.digest(), (Arc::clone(layout), Arc::new(places)));
    }

    fn lock(&self) -> MutexGuard<'_, Layouts> {
        // A panic leaves the entries valid: each is inserted whole.
        self.layouts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CopyOut for CudaCopyOut {
    fn copy_out(&self, layout: &BucketLayout, bucket: &Storage) -> Result<Option<u64>> {
        let (Some(source), Some(places)) = (self.source(bucket), self.find(layout)) else {
            return Ok(None);
        };
        self.packer.copy_out(&source, layout.pieces(), &places, true).map(Some)
    }
}

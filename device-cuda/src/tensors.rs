//! A model's tensors on a device, which buckets are installed into.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine_core::plan::BucketLayout;
use engine_core::{CopyOut, Install, ReceivedBucket, Result, Storage, TensorMeta};

use crate::bucket::{Packer, Places};
use crate::{CudaMemory, CudaSlice, Device};

/// Offsets of tensors that share an allocation.
const ALIGNMENT: usize = 256;

/// The most pieces whose places are remembered, eight bytes each.
const MOST_PLACES: usize = 1 << 20;

/// A model's tensors on a device, by name: a destination that grows as weights arrive.
///
/// Memory is allocated at the first update and used again for tensors whose size stays. A bucket is
/// copied out by one launch, however many tensors are in it.
///
/// A bucket of a layout that was installed before is copied out as it is verified, so that it is read once
/// ([`CopyOut`]): an update that fails has written to some tensors then, as one that fails later has.
#[derive(Debug)]
pub struct CudaTensorMap {
    tensors: HashMap<Arc<str>, (TensorMeta, CudaSlice)>,
    known: Arc<Known>,
    /// Memory for tensors that are still to come, and how much of it is taken.
    reserve: Option<(CudaMemory, usize)>,
}

impl CudaTensorMap {
    /// A map without tensors.
    ///
    /// # Errors
    ///
    /// Those of [`Packer::new`].
    pub fn new(device: &Device) -> Result<Self> {
        let known = Known { packer: Packer::new(device)?, layouts: Mutex::default() };
        Ok(Self { tensors: HashMap::new(), known: Arc::new(known), reserve: None })
    }

    /// Allocates memory for tensors of so many bytes together, so that the first update does not have to.
    ///
    /// # Errors
    ///
    /// `Resource` if there is not so much.
    pub fn reserve(&mut self, bytes: u64) -> Result<()> {
        self.reserve = Some((CudaMemory::new(self.known.packer.device(), bytes as usize)?, 0));
        Ok(())
    }

    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// A tensor's description and memory.
    pub fn get(&self, name: &str) -> Option<(&TensorMeta, &CudaSlice)> {
        self.tensors.get(name).map(|(meta, memory)| (meta, memory))
    }

    /// All tensors, in any order.
    pub fn iter(&self) -> impl Iterator<Item = (&TensorMeta, &CudaSlice)> {
        self.tensors.values().map(|(meta, memory)| (meta, memory))
    }

    /// Memory for the tensors of a bucket that have none of their size: one allocation for all of them.
    fn allocate(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        let (mut new, mut bytes, mut changes) = (Vec::new(), 0_usize, false);
        for piece in bucket.layout().pieces() {
            let len = piece.meta.byte_len()? as usize;
            match self.tensors.get_mut(&piece.meta.name) {
                Some((meta, memory)) if memory.len() == len => {
                    changes |= *meta != piece.meta;
                    *meta = piece.meta.clone();
                }
                _ => {
                    new.push((piece.meta.clone(), bytes, len));
                    bytes += len.next_multiple_of(ALIGNMENT);
                }
            }
        }
        if changes || !new.is_empty() {
            self.known.forget();
        }
        if new.is_empty() {
            return Ok(());
        }
        let (memory, at) = match &mut self.reserve {
            Some((memory, taken)) if memory.len() - *taken >= bytes => {
                let at = *taken;
                *taken += bytes;
                (memory.clone(), at)
            }
            _ => (CudaMemory::new(self.known.packer.device(), bytes)?, 0),
        };
        for (meta, start, len) in new {
            self.tensors.insert(meta.name.clone(), (meta, memory.slice(at + start, len)?));
        }
        Ok(())
    }

    /// Where the pieces of a bucket belong, for whose tensors there is memory.
    fn places(&self, layout: &BucketLayout) -> Result<Places> {
        let mut places = Places::default();
        for piece in layout.pieces() {
            // `allocate` has seen every name of the bucket.
            let Some((_, tensor)) = self.tensors.get(&piece.meta.name) else { continue };
            places.addresses.push(tensor.address_of(piece.start, piece.len)?);
            let memory = tensor.memory();
            if places.memory.last().is_none_or(|last| last.address() != memory.address()) {
                places.memory.push(memory.clone());
            }
        }
        Ok(places)
    }
}

impl Install for CudaTensorMap {
    fn install(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        let copies: Arc<dyn CopyOut> = self.known.clone();
        if bucket.was_copied_by(&copies) {
            return Ok(());
        }
        let Some(source) = bucket.buffer().and_then(CudaSlice::of_storage) else {
            return self.install_apart(bucket);
        };
        let (layout, packer) = (bucket.layout(), &self.known.packer);
        if let Some(places) = self.known.find(layout) {
            return packer.copy_out(&source, layout.pieces(), &places, false).map(drop);
        }
        self.allocate(bucket)?;
        let places = self.places(layout)?;
        self.known.packer.copy_out(&source, layout.pieces(), &places, false)?;
        self.known.remember(layout, places);
        Ok(())
    }

    fn copies(&self) -> Option<Arc<dyn CopyOut>> {
        Some(self.known.clone())
    }
}

impl CudaTensorMap {
    /// Installs a bucket whose pieces are not all in one memory of a device.
    fn install_apart(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        self.allocate(bucket)?;
        let mut copies = Vec::with_capacity(bucket.pieces().len());
        for piece in bucket.pieces() {
            let Some((_, memory)) = self.tensors.get(&piece.meta.name) else { continue };
            let target = memory.slice(piece.start as usize, piece.bytes.len() as usize)?;
            match CudaSlice::of_storage(&piece.bytes) {
                Some(source) => copies.push((source, target)),
                None => target.write(&piece.bytes.to_host()?)?,
            }
        }
        self.known.packer.copy(copies)
    }
}

/// The layouts that were installed, and where their pieces belong.
#[derive(Debug)]
struct Known {
    packer: Packer,
    layouts: Mutex<Layouts>,
}

#[derive(Debug, Default)]
struct Layouts {
    /// By their digests, which are compared as well as the layouts.
    known: HashMap<u64, (Arc<BucketLayout>, Arc<Places>)>,
    pieces: usize,
}

impl Known {
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

    /// Tensors have moved, or are others.
    fn forget(&self) {
        *self.lock() = Layouts::default();
    }

    fn lock(&self) -> MutexGuard<'_, Layouts> {
        // A panic leaves what is there true: it was put in whole.
        self.layouts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CopyOut for Known {
    fn copy_out(&self, layout: &BucketLayout, bucket: &Storage) -> Result<Option<u64>> {
        let (Some(source), Some(places)) = (CudaSlice::of_storage(bucket), self.find(layout))
        else {
            return Ok(None);
        };
        self.packer.copy_out(&source, layout.pieces(), &places, true).map(Some)
    }
}

//! A model's tensors on a device, as a destination for buckets.

use std::collections::HashMap;
use std::sync::Arc;

use engine_core::plan::BucketLayout;
use engine_core::{ArenaArc, CopyOut, Install, ReceivedBucket, Result, TensorMeta};

use crate::bucket::{Packer, Places};
use crate::{CudaCopyOut, CudaMemory, CudaSlice, Device};

/// Offsets of tensors that share an allocation.
const ALIGNMENT: usize = 256;

/// A model's tensors on a device, by name: a destination that grows as weights arrive.
///
/// Memory is allocated at the first update and reused for tensors whose size stays. A bucket is copied out by one launch, however many
/// tensors it has.
///
/// A bucket whose layout was installed before is copied out while it is verified, so that it is read once ([`CopyOut`]). If an update
/// fails, some tensors have been written, whether verification fails or something later.
#[derive(Debug)]
pub struct CudaTensorMap {
    tensors: HashMap<Arc<str>, (ArenaArc<TensorMeta>, CudaSlice)>,
    copies: Arc<CudaCopyOut>,
    /// Memory for tensors that have yet to come, and how much of it is taken.
    reserve: Option<(CudaMemory, usize)>,
}

impl CudaTensorMap {
    /// A map without tensors.
    ///
    /// # Errors
    ///
    /// Those of [`Packer::new`].
    pub fn new(device: &Device) -> Result<Self> {
        let copies = Arc::new(CudaCopyOut::new(Packer::new(device)?));
        Ok(Self { tensors: HashMap::new(), copies, reserve: None })
    }

    fn device(&self) -> &Device {
        self.copies.packer().device()
    }

    /// Allocates memory for tensors of `bytes` bytes together, so that the first update does not have to.
    ///
    /// # Errors
    ///
    /// `Resource` if there is not enough memory.
    pub fn reserve(&mut self, bytes: u64) -> Result<()> {
        self.reserve = Some((CudaMemory::new(self.device(), bytes as usize)?, 0));
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
    pub fn get(&self, name: &str) -> Option<(&ArenaArc<TensorMeta>, &CudaSlice)> {
        self.tensors.get(name).map(|(meta, memory)| (meta, memory))
    }

    /// All tensors, in any order.
    pub fn iter(&self) -> impl Iterator<Item = (&ArenaArc<TensorMeta>, &CudaSlice)> {
        self.tensors.values().map(|(meta, memory)| (meta, memory))
    }

    /// Allocates memory for the tensors of a bucket that have none of their size: one allocation for all of them.
    fn allocate(&mut self, layout: &BucketLayout) -> Result<()> {
        let (mut new, mut bytes, mut changes) = (Vec::new(), 0_usize, false);
        for piece in layout.pieces() {
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
            self.copies.forget();
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
            _ => (CudaMemory::new(self.device(), bytes)?, 0),
        };
        for (meta, start, len) in new {
            self.tensors.insert(meta.name.clone(), (meta, memory.slice(at + start, len)?));
        }
        Ok(())
    }

    /// The places of the pieces of a bucket. All their tensors have memory.
    fn places(&self, layout: &BucketLayout) -> Result<Places> {
        let mut places = Places::default();
        for piece in layout.pieces() {
            // `allocate` has seen every name of the bucket.
            let Some((_, tensor)) = self.tensors.get(&piece.meta.name) else { continue };
            places.push(piece, tensor)?;
        }
        Ok(places)
    }
}

impl Install for CudaTensorMap {
    fn install(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        let copies = Arc::clone(&self.copies);
        let place = |layout: &BucketLayout| {
            self.allocate(layout)?;
            self.places(layout).map(Some)
        };
        match copies.install(bucket, place)? {
            true => Ok(()),
            false => self.install_apart(bucket),
        }
    }

    fn copies(&self) -> Option<Arc<dyn CopyOut>> {
        Some(self.copies.clone())
    }
}

impl CudaTensorMap {
    /// Installs a bucket whose pieces are not all in one allocation of the device.
    fn install_apart(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        self.allocate(bucket.layout())?;
        let mut copies = Vec::with_capacity(bucket.pieces().len());
        for piece in bucket.pieces() {
            let Some((_, memory)) = self.tensors.get(&piece.meta.name) else { continue };
            let target = memory.slice(piece.start as usize, piece.bytes.len() as usize)?;
            match CudaSlice::of_storage(&piece.bytes) {
                Some(source) => copies.push((source, target)),
                None => target.write(&piece.bytes.to_host()?)?,
            }
        }
        self.copies.packer().copy(copies)
    }
}

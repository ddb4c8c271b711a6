//! A model's tensors on a device, which buckets are installed into.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_core::{Install, ReceivedBucket, Result, TensorMeta};

use crate::bucket::Packer;
use crate::{CudaMemory, CudaSlice, Device};

/// Offsets of tensors that share an allocation.
const ALIGNMENT: usize = 256;

/// A model's tensors on a device, by name: a destination that grows as weights arrive.
///
/// Memory is allocated at the first update and used again for tensors whose size stays. A bucket is
/// copied out by one launch, however many tensors are in it.
#[derive(Debug)]
pub struct CudaTensorMap {
    tensors: BTreeMap<Arc<str>, (TensorMeta, CudaSlice)>,
    packer: Packer,
}

impl CudaTensorMap {
    /// A map without tensors.
    ///
    /// # Errors
    ///
    /// Those of [`Packer::new`].
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { tensors: BTreeMap::new(), packer: Packer::new(device)? })
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

    /// All tensors, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&TensorMeta, &CudaSlice)> {
        self.tensors.values().map(|(meta, memory)| (meta, memory))
    }

    /// Memory for the tensors of a bucket that have none of their size: one allocation for all of them.
    fn allocate(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        let (mut new, mut bytes) = (Vec::new(), 0_usize);
        for piece in bucket.pieces() {
            let len = piece.meta.byte_len()? as usize;
            match self.tensors.get_mut(&piece.meta.name) {
                Some((meta, memory)) if memory.len() == len => *meta = piece.meta,
                _ => {
                    new.push((piece.meta, bytes, len));
                    bytes += len.next_multiple_of(ALIGNMENT);
                }
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let memory = CudaMemory::new(self.packer.device(), bytes)?;
        for (meta, start, len) in new {
            self.tensors.insert(meta.name.clone(), (meta, memory.slice(start, len)?));
        }
        Ok(())
    }
}

impl Install for CudaTensorMap {
    fn install(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        self.allocate(bucket)?;
        let mut copies = Vec::with_capacity(bucket.pieces().len());
        for piece in bucket.pieces() {
            // `allocate` has seen every name of the bucket.
            let Some((_, memory)) = self.tensors.get(&piece.meta.name) else { continue };
            let target = memory.slice(piece.start as usize, piece.bytes.len() as usize)?;
            match CudaSlice::of_storage(&piece.bytes) {
                Some(source) => copies.push((source, target)),
                None => target.write(&piece.bytes.to_host()?)?,
            }
        }
        self.packer.copy(copies)
    }
}

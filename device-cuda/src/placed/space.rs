//! Memory that rollouts lend: slices of a device's memory, each at an offset.

use std::sync::Arc;

use super::launches::Room;
use crate::{CudaError, CudaMemory, CudaSlice, Device};

/// Slices of a device's memory that are spoken of by offsets, as if they were one. Whatever is written or digested lies within one of them.
#[derive(Clone, Debug)]
pub struct CudaSpace {
    device: Device,
    /// In ascending order, without overlap.
    slices: Arc<[(u64, CudaSlice)]>,
}

impl CudaSpace {
    /// Slices of memory of this device, each with the offset of its first byte.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] for slices of another device, and for slices that overlap by their offsets.
    pub fn new(
        device: &Device,
        slices: impl IntoIterator<Item = (u64, CudaSlice)>,
    ) -> Result<Self, CudaError> {
        let mut slices: Vec<(u64, CudaSlice)> = slices.into_iter().collect();
        slices.sort_by_key(|(at, _)| *at);
        let mut end = 0;
        for (at, slice) in &slices {
            if slice.device().ordinal() != device.ordinal() {
                let (there, here) = (slice.device().ordinal(), device.ordinal());
                return Err(CudaError::Range(format!(
                    "memory of device {there} among that of {here}"
                )));
            }
            let until = at.checked_add(slice.len() as u64).filter(|_| *at >= end);
            end = until.ok_or_else(|| CudaError::Range(format!("memory at {at} overlaps")))?;
        }
        Ok(Self { device: device.clone(), slices: slices.into() })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The offset behind its last byte.
    pub fn len(&self) -> u64 {
        self.slices.last().map_or(0, |(at, slice)| at + slice.len() as u64)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn slice_at(&self, at: u64) -> Option<&(u64, CudaSlice)> {
        let after = self.slices.partition_point(|(start, _)| *start <= at);
        self.slices.get(after.checked_sub(1)?)
    }

    /// The bytes at an offset.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] unless one slice has all of them.
    pub fn slice(&self, at: u64, len: usize) -> Result<CudaSlice, CudaError> {
        let outside = || CudaError::Range(format!("{len} bytes at {at} are not in one slice"));
        let (start, slice) = self.slice_at(at).ok_or_else(outside)?;
        slice.slice((at - start) as usize, len).map_err(|_| outside())
    }

    /// How many bytes there are from an offset on to the end of its slice; 0 if there is no memory.
    pub fn rest(&self, at: u64) -> u64 {
        self.slice_at(at)
            .map_or(0, |(start, slice)| (start + slice.len() as u64).saturating_sub(at))
    }

    /// The room around an offset; one without bytes if there is no memory.
    pub(super) fn room(&self, at: u64) -> Room {
        self.slice_at(at).map_or_else(Room::default, |(start, slice)| Room {
            base: slice.address().wrapping_sub(*start),
            start: *start,
            end: start + slice.len() as u64,
        })
    }

    /// The allocations.
    pub(super) fn memory(&self) -> impl Iterator<Item = &CudaMemory> {
        self.slices.iter().map(|(_, slice)| slice.memory())
    }

    /// Whether it is another's clone.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.slices, &other.slices)
    }
}

impl From<CudaSlice> for CudaSpace {
    /// A single slice, at 0.
    fn from(slice: CudaSlice) -> Self {
        Self { device: slice.device().clone(), slices: [(0, slice)].into() }
    }
}

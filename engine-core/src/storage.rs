//! Bytes of tensors and buckets: in host memory, or on a device that this crate does not know.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::memory::TensorMemory;
use crate::plan::Piece;
use crate::{Result, digest};

/// Bytes in host memory or on a device, shared by reference count and never changed.
///
/// Cloning and slicing are free. Host memory is viewed through [`host`](Self::host); code that knows a
/// device recognises its memory through [`device`](Self::device); everything else works on any storage,
/// by copies.
#[derive(Clone, Debug)]
pub enum Storage {
    /// Host memory.
    Host(Bytes),
    /// Memory of a device.
    Device(DeviceBytes),
}

impl Storage {
    /// The length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Host(bytes) => bytes.len() as u64,
            Self::Device(bytes) => bytes.len,
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, if they are in host memory.
    pub fn host(&self) -> Option<&Bytes> {
        match self {
            Self::Host(bytes) => Some(bytes),
            Self::Device(_) => None,
        }
    }

    /// The bytes, if they are on a device.
    pub fn device(&self) -> Option<&DeviceBytes> {
        match self {
            Self::Host(_) => None,
            Self::Device(bytes) => Some(bytes),
        }
    }

    /// The bytes in host memory: shared if they are there, else copied from the device, which blocks.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no memory for the copy; those of the device.
    pub fn to_host(&self) -> Result<Bytes> {
        match self {
            Self::Host(bytes) => Ok(bytes.clone()),
            Self::Device(bytes) => {
                let mut memory = TensorMemory::new(bytes.len, "copying from a device")?;
                bytes.read(0, memory.bytes_mut())?;
                Ok(memory.freeze())
            }
        }
    }

    /// Copies the bytes from `start` on to host memory, which blocks.
    ///
    /// # Errors
    ///
    /// Those of the device.
    ///
    /// # Panics
    ///
    /// If there are not so many bytes.
    pub fn read(&self, start: u64, destination: &mut [u8]) -> Result<()> {
        match self {
            Self::Host(bytes) => {
                let start = start as usize;
                destination.copy_from_slice(&bytes[start..start + destination.len()]);
                Ok(())
            }
            Self::Device(bytes) => bytes.read(start, destination),
        }
    }

    /// A part of it.
    ///
    /// # Panics
    ///
    /// If the range is not within it.
    #[must_use]
    pub fn slice(&self, range: Range<u64>) -> Self {
        match self {
            Self::Host(bytes) => Self::Host(bytes.slice(range.start as usize..range.end as usize)),
            Self::Device(bytes) => {
                assert!(range.start <= range.end && range.end <= bytes.len, "beyond the storage");
                let start = bytes.start + range.start;
                Self::Device(DeviceBytes { start, len: range.end - range.start, ..bytes.clone() })
            }
        }
    }

    /// The same bytes; `guard` is dropped with the last view of them.
    #[must_use]
    pub fn guarded(self, guard: impl Send + Sync + 'static) -> Self {
        match self {
            Self::Host(bytes) => Self::Host(Bytes::from_owner(Guarded { bytes, _guard: guard })),
            Self::Device(bytes) => {
                let guard = Some(Arc::new((guard, bytes.guard)) as Arc<dyn Any + Send + Sync>);
                Self::Device(DeviceBytes { guard, ..bytes })
            }
        }
    }
}

struct Guarded<G> {
    bytes: Bytes,
    _guard: G,
}

impl<G> AsRef<[u8]> for Guarded<G> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl From<Bytes> for Storage {
    fn from(bytes: Bytes) -> Self {
        Self::Host(bytes)
    }
}

impl From<Vec<u8>> for Storage {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Host(bytes.into())
    }
}

impl From<&'static [u8]> for Storage {
    fn from(bytes: &'static [u8]) -> Self {
        Self::Host(bytes.into())
    }
}

impl From<DeviceBytes> for Storage {
    fn from(bytes: DeviceBytes) -> Self {
        Self::Device(bytes)
    }
}

/// Memory of a device, for code that knows no device.
///
/// The crate of a device implements it for its allocations, and recognises them in a [`DeviceBytes`]:
/// `&dyn DeviceMemory` upcasts to `&dyn Any`.
///
/// # Contract
///
/// The memory does not change while anyone holds it. All work that fills it was done before it was put
/// into a [`DeviceBytes`], or is ordered before whatever these methods do.
pub trait DeviceMemory: Any + fmt::Debug + Send + Sync {
    /// Which device it is on: its kind and number, as in `gpu:0`.
    fn device(&self) -> String;

    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the bytes from `start` on to host memory; blocks.
    ///
    /// # Errors
    ///
    /// Those of the device.
    fn read(&self, start: u64, destination: &mut [u8]) -> Result<()>;

    /// The digest sum of a bucket that begins at `start`; blocks. See [`digest::sum`].
    ///
    /// # Errors
    ///
    /// Those of the device.
    fn digest(&self, start: u64, pieces: &[Piece]) -> Result<u64> {
        let mut bytes = Vec::new();
        pieces.iter().try_fold(0_u64, |sum, piece| {
            bytes.resize(piece.len as usize, 0);
            self.read(start + piece.offset, &mut bytes)?;
            Ok(sum.wrapping_add(digest::sum(piece.offset, &bytes)))
        })
    }
}

/// A part of a device's memory, which it keeps alive.
#[derive(Clone, Debug)]
pub struct DeviceBytes {
    memory: Arc<dyn DeviceMemory>,
    start: u64,
    len: u64,
    guard: Option<Arc<dyn Any + Send + Sync>>,
}

impl DeviceBytes {
    /// All of a device's allocation.
    pub fn new(memory: Arc<dyn DeviceMemory>) -> Self {
        let len = memory.len();
        Self { memory, start: 0, len, guard: None }
    }

    /// The memory that it is a part of.
    pub fn memory(&self) -> &Arc<dyn DeviceMemory> {
        &self.memory
    }

    /// Where it begins in that memory.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the bytes from `start` on to host memory; blocks.
    ///
    /// # Errors
    ///
    /// Those of the device.
    ///
    /// # Panics
    ///
    /// If there are not so many bytes.
    pub fn read(&self, start: u64, destination: &mut [u8]) -> Result<()> {
        let end = start.checked_add(destination.len() as u64);
        assert!(end.is_some_and(|end| end <= self.len), "beyond the storage");
        if destination.is_empty() {
            Ok(())
        } else {
            self.memory.read(self.start + start, destination)
        }
    }

    pub(crate) fn digest(&self, pieces: &[Piece]) -> Result<u64> {
        self.memory.digest(self.start, pieces)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::memory::Pool;
    use crate::plan::BucketLayout;
    use crate::{DType, Error, ErrorKind, Install, ReceivedBucket, TensorMap, TensorMeta, Weight};
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A device whose memory is somewhere else in the host's.
    #[derive(Debug)]
    pub(crate) struct Elsewhere(pub(crate) Vec<u8>);

    impl DeviceMemory for Elsewhere {
        fn device(&self) -> String {
            "elsewhere:0".into()
        }
        fn len(&self) -> u64 {
            self.0.len() as u64
        }
        fn read(&self, start: u64, destination: &mut [u8]) -> Result<()> {
            let start = start as usize;
            match self.0.get(start..start + destination.len()) {
                Some(bytes) => destination.copy_from_slice(bytes),
                None => return Err(Error::new(ErrorKind::Io, "reading", "beyond the memory")),
            }
            Ok(())
        }
    }

    fn device(bytes: Vec<u8>) -> Storage {
        DeviceBytes::new(Arc::new(Elsewhere(bytes))).into()
    }

    fn numbered(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn a_weight_on_a_device_is_encoded_into_host_memory_like_any_other() {
        let bytes = numbered(4096);
        let weight = Weight::new("w", DType::U8, [4096], device(bytes.clone())).unwrap();
        assert!(weight.contiguous_bytes().is_none());
        let mut part = [0; 100];
        weight.encode(1000..1100, &mut part).unwrap();
        assert_eq!(part, bytes[1000..1100]);
        assert_eq!(weight.to_bytes().unwrap(), bytes);
        assert!(Weight::new("short", DType::U8, [4097], device(bytes)).is_err());
    }

    #[test]
    fn a_bucket_on_a_device_is_viewed_in_place_checked_there_and_installed() {
        let bytes = numbered(1024);
        let (a, b) = (TensorMeta::new("a", DType::U8, [300]), TensorMeta::new("b", DType::U8, [7]));
        let pieces = vec![
            Piece { meta: a.into(), start: 0, len: 300, offset: 0 },
            Piece { meta: b.into(), start: 0, len: 7, offset: 512 },
        ];
        let pool = Pool::new(1).unwrap();
        let here = pool.digest(&pieces, &bytes.clone().into()).unwrap();
        assert_eq!(pool.digest(&pieces, &device(bytes.clone())).unwrap(), here);

        let layout = Arc::new(BucketLayout::new(pieces));
        let filled = layout.filled();
        let bucket =
            ReceivedBucket::new(0, layout, device(bytes.clone()).slice(0..filled)).unwrap();
        assert!(bucket.pieces().all(|piece| piece.bytes.device().is_some()));
        let mut map = TensorMap::new();
        map.install(&bucket).unwrap();
        assert_eq!(map.get("b").unwrap().1, &bytes[512..519]);
    }

    struct Flag(Arc<AtomicBool>);

    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_guard_is_dropped_with_the_last_view_on_a_device_as_on_the_host() {
        for storage in [device(numbered(64)), numbered(64).into()] {
            let (dropped, both) = (Arc::new(AtomicBool::new(false)), Arc::default());
            let storage = storage.guarded(Flag(dropped.clone())).guarded(Flag(Arc::clone(&both)));
            let view = storage.slice(8..16);
            drop(storage);
            assert_eq!(view.to_host().unwrap(), numbered(64)[8..16]);
            assert!(!dropped.load(Ordering::SeqCst) && !both.load(Ordering::SeqCst));
            drop(view);
            assert!(dropped.load(Ordering::SeqCst) && both.load(Ordering::SeqCst));
        }
    }
}

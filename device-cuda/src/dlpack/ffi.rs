//! DLPack's structures, and who frees them.
#![allow(unsafe_code, reason = "structures that other libraries made")]

use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use bytes::Bytes;
use engine_core::{Storage, TensorMeta};

use crate::{CudaMemory, Device};

/// `DLTensor`, with its device and data type as plain fields.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Tensor {
    /// A pointer; an address on the device, if it is on one.
    pub(super) data: usize,
    pub(super) device_type: i32,
    pub(super) device_id: i32,
    pub(super) ndim: i32,
    pub(super) code: u8,
    pub(super) bits: u8,
    pub(super) lanes: u16,
    pub(super) shape: *mut i64,
    pub(super) strides: *mut i64,
    pub(super) byte_offset: u64,
}

impl Tensor {
    fn is_on_host(&self) -> bool {
        matches!(self.device_type, super::CPU | super::CUDA_HOST)
    }
}

/// `DLManagedTensor`: a tensor, and how to give it back.
#[repr(C)]
#[derive(Debug)]
pub struct ManagedTensor {
    tensor: Tensor,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// A tensor of another library, given back when this is dropped.
#[derive(Debug)]
pub(super) struct Imported(NonNull<ManagedTensor>);

// SAFETY: the caller of `Imported::take` promised that the deleter may be called from any thread, and that nobody writes to the tensor.
unsafe impl Send for Imported {}
// SAFETY: as above.
unsafe impl Sync for Imported {}

/// A copy of a tensor's description.
#[derive(Debug)]
pub(super) struct View {
    pub(super) address: u64,
    /// Kind and number.
    pub(super) device: (i32, i32),
    pub(super) code: u8,
    pub(super) bits: u8,
    pub(super) lanes: u16,
    pub(super) shape: Vec<u64>,
    /// In elements.
    pub(super) strides: Option<Vec<i64>>,
}

impl Imported {
    /// # Safety
    ///
    /// As [`weight`](super::weight).
    pub(super) unsafe fn take(tensor: NonNull<ManagedTensor>) -> Self {
        Self(tensor)
    }

    fn tensor(&self) -> &Tensor {
        // SAFETY: `take` was promised a valid structure, which lives until it is given back.
        let managed = unsafe { self.0.as_ref() };
        &managed.tensor
    }

    pub(super) fn view(&self) -> Result<View, String> {
        let tensor = self.tensor();
        let ndim = usize::try_from(tensor.ndim).ok();
        let ndim = ndim.filter(|&ndim| ndim <= TensorMeta::MAX_DIMENSIONS);
        let ndim = ndim.ok_or_else(|| format!("it has {} dimensions", tensor.ndim))?;
        let sides = |pointer: *mut i64| -> Option<Vec<i64>> {
            if ndim == 0 {
                return Some(Vec::new());
            }
            let first = NonNull::new(pointer)?;
            // SAFETY: `take` was promised that shape and strides, where they are, have `ndim` numbers.
            Some(unsafe { std::slice::from_raw_parts(first.as_ptr(), ndim) }.to_vec())
        };
        let shape = sides(tensor.shape).ok_or("it has no shape")?;
        let shape: Result<Vec<u64>, _> = shape.into_iter().map(u64::try_from).collect();
        let shape = shape.map_err(|_| "a side of its shape is negative")?;
        let address = (tensor.data as u64).checked_add(tensor.byte_offset);
        Ok(View {
            address: address.ok_or("its offset is beyond all memory")?,
            device: (tensor.device_type, tensor.device_id),
            code: tensor.code,
            bits: tensor.bits,
            lanes: tensor.lanes,
            shape,
            strides: sides(tensor.strides).filter(|_| ndim > 0),
        })
    }

    /// The number of bytes from the first element on, by shape, strides and type.
    fn extent(&self) -> Option<usize> {
        let View { bits, lanes, shape, strides, .. } = self.view().ok()?;
        if shape.contains(&0) {
            return Some(0);
        }
        let last = match &strides {
            // Contiguous: the last element follows all others.
            None => shape.iter().try_fold(1_u64, |all, &side| all.checked_mul(side))? - 1,
            Some(strides) => {
                shape.iter().zip(strides).try_fold(0_u64, |sum, (&side, &stride)| {
                    let stride = u64::try_from(stride).ok()?;
                    sum.checked_add(side.saturating_sub(1).checked_mul(stride)?)
                })?
            }
        };
        let element = usize::from(bits) * usize::from(lanes) / 8;
        usize::try_from(last.checked_add(1)?).ok()?.checked_mul(element)
    }

    fn check(&self, len: usize) {
        assert!(
            self.extent().is_some_and(|extent| len <= extent),
            "more bytes than the tensor has"
        );
    }

    /// The first bytes of a tensor in host memory, which keep it.
    ///
    /// # Panics
    ///
    /// If it is not in host memory or has fewer bytes.
    pub(super) fn host(self, len: usize) -> Bytes {
        if len == 0 {
            return Bytes::new();
        }
        self.check(len);
        assert!(self.tensor().is_on_host(), "the tensor is not in host memory");
        Bytes::from_owner(Host { tensor: self, len })
    }

    /// The first bytes of a tensor on the device that it names, which keep it.
    ///
    /// # Panics
    ///
    /// If it is on another device or has fewer bytes.
    pub(super) fn on_device(self, device: &Device, len: usize) -> CudaMemory {
        self.check(len);
        let Tensor { data, byte_offset, device_type, device_id, .. } = *self.tensor();
        assert_eq!((device_type, device_id), (super::CUDA, device.ordinal()), "another device");
        let address = (data as u64).wrapping_add(byte_offset);
        // SAFETY: `take` was promised a valid tensor, whose elements are there until it is given back, which
        // is when this is dropped; `check` has seen that there are so many.
        let memory =
            unsafe { crate::ffi::Memory::borrowed(device.context(), address, len, Arc::new(self)) };
        CudaMemory::of(device, memory)
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        // SAFETY: `take` was promised a valid structure, which is given back here and only here.
        let deleter = unsafe { self.0.as_ref() }.deleter;
        if let Some(deleter) = deleter {
            // SAFETY: it is this structure's own deleter, called once.
            unsafe { deleter(self.0.as_ptr()) };
        }
    }
}

struct Host {
    tensor: Imported,
    len: usize,
}

impl AsRef<[u8]> for Host {
    fn as_ref(&self) -> &[u8] {
        let Tensor { data, byte_offset, .. } = self.tensor.tensor();
        let start = std::ptr::with_exposed_provenance::<u8>(data + *byte_offset as usize);
        // SAFETY: `host` has seen that there are so many bytes in host memory, which are not written to, as
        // `take` was promised; the tensor lives as long as this.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

/// A tensor of this library, with everything that it points to.
struct Exported {
    managed: ManagedTensor,
    shape: Vec<i64>,
    _bytes: Storage,
}

unsafe extern "C" fn delete(managed: *mut ManagedTensor) {
    // SAFETY: `export` made it, and put there what this takes.
    let exported = unsafe { (*managed).manager }.cast::<Exported>();
    // SAFETY: it came from `Box::into_raw`, and is freed once, as DLPack demands.
    drop(unsafe { Box::from_raw(exported) });
}

pub(super) fn export(
    bytes: Storage,
    address: u64,
    (device_type, device_id): (i32, i32),
    (code, bits): (u8, u8),
    shape: Vec<i64>,
) -> NonNull<ManagedTensor> {
    let tensor = Tensor {
        data: address as usize,
        device_type,
        device_id,
        ndim: shape.len() as i32,
        code,
        bits,
        lanes: 1,
        shape: null_mut(),
        strides: null_mut(),
        byte_offset: 0,
    };
    let managed = ManagedTensor { tensor, manager: null_mut(), deleter: Some(delete) };
    let exported = Box::leak(Box::new(Exported { managed, shape, _bytes: bytes }));
    exported.managed.tensor.shape = exported.shape.as_mut_ptr();
    let whole: *mut Exported = exported;
    // SAFETY: it was just leaked, and nobody else has it.
    let managed = unsafe { &mut (*whole).managed };
    managed.manager = whole.cast();
    NonNull::from(managed)
}

/// Changes the description of a tensor.
#[cfg(test)]
pub(super) fn lie(mut tensor: NonNull<ManagedTensor>, lie: impl FnOnce(&mut Tensor)) {
    // SAFETY: a test has just exported it, and nobody else has it.
    lie(&mut unsafe { tensor.as_mut() }.tensor);
}

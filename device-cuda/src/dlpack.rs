//! Exchanges tensors with other libraries of this process by DLPack, without a copy.
//!
//! The declarations are those of `dlpack.h` (version 0.8, the structure that PyTorch's `__dlpack__()`, JAX and CuPy exchange when no
//! version is asked for). Enumerations are plain numbers, because a library may use a value that is not known here.

mod ffi;

use engine_core::{DType, Error, ErrorKind, Result, Storage, TensorMeta, Weight};
use std::ptr::NonNull;

use crate::{CudaSlice, Device};
use ffi::{Imported, View};

pub use ffi::ManagedTensor;

/// `kDLCPU`, `kDLCUDA`, `kDLCUDAHost`.
const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_HOST: i32 = 3;

/// Types by DLPack's code and bits.
const TYPES: [(DType, u8, u8); 16] = [
    (DType::I8, 0, 8),
    (DType::I16, 0, 16),
    (DType::I32, 0, 32),
    (DType::I64, 0, 64),
    (DType::U8, 1, 8),
    (DType::U16, 1, 16),
    (DType::U32, 1, 32),
    (DType::U64, 1, 64),
    (DType::F16, 2, 16),
    (DType::F32, 2, 32),
    (DType::F64, 2, 64),
    (DType::BF16, 4, 16),
    (DType::C64, 5, 64),
    (DType::BOOL, 6, 8),
    (DType::F8_E4M3, 10, 8),
    (DType::F8_E5M2, 12, 8),
];

fn refuse(name: &str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Weight, "taking a DLPack tensor", message).tensor(name)
}

/// A tensor of another library as a weight, in host memory or on a CUDA device.
///
/// The tensor is given back, by its own deleter, when the last view of the weight is dropped, on whichever thread. After an error it is
/// given back at once.
///
/// # Safety
///
/// `tensor` is a DLPack tensor that nobody else has taken: its pointers are valid as DLPack says, and its deleter may be called from any
/// thread. Its data is complete, and nobody writes to it before it is given back.
///
/// # Errors
///
/// `Weight` for a type that has no name in checkpoints, for memory that is neither the host's nor a CUDA
/// device's, for sizes that contradict each other; what the driver reports.
#[allow(unsafe_code, reason = "hands the caller's promise on")]
pub unsafe fn weight(name: &str, tensor: NonNull<ManagedTensor>) -> Result<Weight> {
    // SAFETY: the caller's.
    let imported = unsafe { Imported::take(tensor) };
    let View { address, device, code, bits, lanes, shape, strides } =
        imported.view().map_err(|message| refuse(name, message))?;
    let known = TYPES.iter().find(|known| (known.1, known.2) == (code, bits) && lanes == 1);
    let Some(&(dtype, ..)) = known else {
        let message = format!("no type has the code {code}, {bits} bits and {lanes} lanes");
        return Err(refuse(name, message));
    };
    let meta = TensorMeta::new(name, dtype, shape);
    let len = usize::try_from(meta.validate()?).map_err(|_| refuse(name, "it is too large"))?;
    if address == 0 && len > 0 {
        return Err(refuse(name, "it has no memory"));
    }
    let strides = strides.filter(|strides| !contiguous(&meta.shape, strides));
    let len = match &strides {
        None => len,
        Some(strides) => reach(name, &meta.shape, strides, u64::from(bits / 8))?,
    };
    let storage: Storage = match device {
        (CPU | CUDA_HOST, _) => imported.host(len).into(),
        (CUDA, ordinal) => imported.on_device(&Device::open(ordinal)?, len).all().storage(),
        (other, _) => return Err(refuse(name, format!("it is on a device of kind {other}"))),
    };
    match strides {
        None => Weight::from_meta(meta, storage),
        Some(strides) => Weight::strided(name, dtype, meta.shape, strides, 0, storage),
    }
}

/// The number of bytes from the first to the last element of a view.
fn reach(name: &str, shape: &[u64], strides: &[i64], size: u64) -> Result<usize> {
    if strides.iter().any(|&stride| stride < 0) {
        return Err(refuse(name, "it has negative strides"));
    }
    if shape.contains(&0) {
        return Ok(0);
    }
    let last = shape.iter().zip(strides).try_fold(0_u64, |sum, (&side, &stride)| {
        sum.checked_add((side - 1).checked_mul(stride.unsigned_abs())?)
    });
    let len = last.and_then(|last| last.checked_add(1)?.checked_mul(size));
    let len = len.and_then(|len| usize::try_from(len).ok());
    len.ok_or_else(|| refuse(name, "it is too large"))
}

/// Whether strides, in elements, are those of a contiguous tensor.
fn contiguous(shape: &[u64], strides: &[i64]) -> bool {
    let mut expected = 1_i128;
    shape.iter().zip(strides).rev().all(|(&side, &stride)| {
        let fits = side <= 1 || i128::from(stride) == expected;
        expected *= i128::from(side);
        fits
    }) || shape.contains(&0)
}

/// Bytes as a tensor for another library, which gives it back by calling its deleter. Nothing is copied. The memory is kept until then.
///
/// # Errors
///
/// `Weight` for a type that DLPack has no code for, for memory that is neither the host's nor a CUDA device's, or if the number of bytes
/// contradicts the description.
pub fn export(meta: &TensorMeta, bytes: &Storage) -> Result<NonNull<ManagedTensor>> {
    let known = TYPES.iter().find(|(dtype, ..)| *dtype == meta.dtype);
    let Some(&(_, code, bits)) = known else {
        return Err(refuse(&meta.name, format!("DLPack has no code for {}", meta.dtype)));
    };
    if meta.validate()? != bytes.len() {
        let message = format!("{} bytes for {:?}", bytes.len(), meta.shape);
        return Err(refuse(&meta.name, message));
    }
    let (address, device) = match (bytes.host(), CudaSlice::of_storage(bytes)) {
        (Some(bytes), _) => (bytes.as_ptr().expose_provenance() as u64, (CPU, 0)),
        (None, Some(slice)) => (slice.address(), (CUDA, slice.device().ordinal())),
        (None, None) => return Err(refuse(&meta.name, "its memory is of an unknown device")),
    };
    let side = |&side: &u64| i64::try_from(side);
    let shape: std::result::Result<Vec<i64>, _> = meta.shape.iter().map(side).collect();
    let shape = shape.map_err(|_| refuse(&meta.name, "a side is too large"))?;
    Ok(ffi::export(bytes.clone(), address, device, (code, bits), shape))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, unsafe_code, reason = "tests of an interface of pointers")]
mod tests {
    use super::*;
    use engine_core::DeviceBytes;
    use std::sync::Arc;

    fn exported(meta: &TensorMeta, bytes: &Storage) -> NonNull<ManagedTensor> {
        export(meta, bytes).unwrap()
    }

    struct Count(Arc<std::sync::atomic::AtomicU32>);

    impl Drop for Count {
        fn drop(&mut self) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }

    #[test]
    fn a_tensor_goes_out_and_comes_back_without_a_copy_and_is_given_back_once() {
        let meta = TensorMeta::new("w", DType::BF16, [3, 4]);
        let bytes = Storage::from((0..24_u8).collect::<Vec<_>>());
        let place = bytes.host().unwrap().as_ptr();
        let drops = Arc::default();
        let tensor = exported(&meta, &bytes.guarded(Count(Arc::clone(&drops))));
        let count = || drops.load(std::sync::atomic::Ordering::SeqCst);
        // SAFETY: just exported, and taken once.
        let weight = unsafe { weight("other", tensor) }.unwrap();
        assert_eq!(**weight.meta(), TensorMeta { name: "other".into(), ..meta });
        let here = weight.contiguous_bytes().unwrap().clone();
        assert_eq!((here.as_ptr(), here.len(), count()), (place, 24, 0));
        drop(weight);
        assert_eq!(count(), 0, "a view is left");
        drop(here);
        assert_eq!(count(), 1);
    }

    #[test]
    fn a_transposed_tensor_is_packed_as_it_is_read() {
        let meta = TensorMeta::new("w", DType::U8, [2, 3]);
        let bytes = Storage::from((0..6_u8).collect::<Vec<_>>());
        let tensor = exported(&meta, &bytes);
        let (mut shape, mut strides) = ([3_i64, 2], [1_i64, 3]);
        ffi::lie(tensor, |fields| {
            fields.shape = shape.as_mut_ptr();
            fields.strides = strides.as_mut_ptr();
        });
        // SAFETY: as the other test; shape and strides live to the end.
        let weight = unsafe { weight("t", tensor) }.unwrap();
        assert_eq!(&weight.to_bytes().unwrap()[..], [0, 3, 1, 4, 2, 5]);
    }

    #[test]
    fn tensors_that_cannot_be_are_errors_and_given_back() {
        let meta = TensorMeta::new("w", DType::F32, [2, 2]);
        let lies: [fn(&mut ffi::Tensor); 8] = [
            |tensor| tensor.ndim = -1,
            |tensor| tensor.ndim = 1 << 20,
            |tensor| tensor.shape = std::ptr::null_mut(),
            |tensor| tensor.code = 99,
            |tensor| tensor.lanes = 4,
            |tensor| tensor.device_type = 10,
            |tensor| tensor.data = 0,
            |tensor| tensor.byte_offset = u64::MAX,
        ];
        for (index, lie) in lies.into_iter().enumerate() {
            let drops = Arc::default();
            let bytes = Storage::from(vec![0; 16]).guarded(Count(Arc::clone(&drops)));
            let tensor = exported(&meta, &bytes);
            drop(bytes);
            ffi::lie(tensor, lie);
            // SAFETY: as above; the lies point nowhere that would be read.
            let error = unsafe { weight("w", tensor) }.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Weight, "{index}: {error}");
            assert_eq!(drops.load(std::sync::atomic::Ordering::SeqCst), 1, "{index}: {error}");
        }
    }

    #[test]
    fn what_dlpack_has_no_word_for_is_not_exported() {
        let meta = TensorMeta::new("w", DType::F8_E8M0, [2]);
        assert!(export(&meta, &vec![0; 2].into()).is_err());
        let meta = TensorMeta::new("w", DType::U8, [3]);
        assert!(export(&meta, &vec![0; 2].into()).is_err());

        #[derive(Debug)]
        struct Elsewhere;
        impl engine_core::DeviceMemory for Elsewhere {
            fn device(&self) -> String {
                "elsewhere".into()
            }
            fn len(&self) -> u64 {
                3
            }
            fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
                Ok(())
            }
        }
        assert!(export(&meta, &DeviceBytes::new(Arc::new(Elsewhere)).into()).is_err());
    }
}

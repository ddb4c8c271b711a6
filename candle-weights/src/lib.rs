//! Tensors of candle as weights of an update, and received weights as tensors of candle.
//!
//! [`weights`] makes weights of a trainer's tensors, for any
//! [`WeightStream`](engine_core::WeightStream). A rollout installs the received weights into a [`TensorMap`].
//! [`tensors`] turns that into candle's tensors, in a map from which
//! `VarBuilder::from_tensors` builds a model.

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use candle_core::{CpuStorage, DType as CandleType, Device, Storage, Tensor};
use engine_core::{DType, Error, ErrorKind, Result, TensorMap, TensorMeta, Weight};
use quant_fp8::{Codec, Fp8Format, SourceType};

/// Weights of candle's tensors, in the order of their names.
///
/// The order makes every update of a model have the same plan, whichever map the tensors come from.
///
/// # Contract
///
/// Each tensor's bytes are copied once, when its turn comes in the stream: a `Var` may be set while
/// an update is under way, and the weight then is what the tensor held at its turn, never half of
/// each. Only the weights that are being packed are in memory twice. Tensors on a device are copied to the host.
///
/// # Errors
///
/// The weight's turn gives `Weight`, naming the tensor, for a type that weights do not have.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let builder = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// candle_nn::linear(4, 2, builder.pp("head"))?;
///
/// let vars = vars.data().lock().expect("nobody panics with the lock");
/// let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
/// let names: Vec<_> = candle_weights::weights(tensors)
///     .map(|weight| Ok(weight?.name().to_owned()))
///     .collect::<engine_core::Result<_>>()?;
/// assert_eq!(names, ["head.bias", "head.weight"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn weights<N: Into<Arc<str>>>(
    tensors: impl IntoIterator<Item = (N, Tensor)>,
) -> impl Iterator<Item = Result<Weight>> + Send {
    let mut tensors: Vec<(Arc<str>, Tensor)> =
        tensors.into_iter().map(|(name, tensor)| (name.into(), tensor)).collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors.into_iter().map(|(name, tensor)| weight(name, &tensor))
}

fn weight(name: Arc<str>, tensor: &Tensor) -> Result<Weight> {
    let operation = "reading a tensor of candle";
    let dtype = to_engine(tensor.dtype());
    let dtype = dtype.ok_or_else(|| {
        let message = format!("the type {:?} has no counterpart", tensor.dtype());
        Error::new(ErrorKind::Weight, operation, message).tensor(&*name)
    })?;
    let shape: Vec<u64> = tensor.dims().iter().map(|&side| side as u64).collect();
    let bytes = host_bytes(tensor).map_err(|error| of_candle(operation, &name, &error))?;
    Weight::new(name, dtype, shape, bytes)
}

/// The only copy: from the storage, under its lock.
fn host_bytes(tensor: &Tensor) -> candle_core::Result<Bytes> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        candle_core::bail!("a tensor was copied to the host and is not there")
    };
    let start = layout.start_offset();
    let range = start..start + tensor.elem_count();
    let bytes: Cow<'_, [u8]> = match storage {
        CpuStorage::U8(v) => v[range].into(),
        CpuStorage::U32(v) => bytemuck::cast_slice(&v[range]).into(),
        CpuStorage::I16(v) => bytemuck::cast_slice(&v[range]).into(),
        CpuStorage::I32(v) => bytemuck::cast_slice(&v[range]).into(),
        CpuStorage::I64(v) => bytemuck::cast_slice(&v[range]).into(),
        CpuStorage::BF16(v) => bytemuck::cast_slice(&v[range]).into(),
        CpuStorage::F16(v) => bytemuck::cast_slice(&v[range]).into(),
        CpuStorage::F32(v) => bytemuck::cast_slice(&v[range]).into(),
        CpuStorage::F64(v) => bytemuck::cast_slice(&v[range]).into(),
        CpuStorage::F8E4M3(v) => v[range].iter().map(|code| code.to_bits()).collect(),
        CpuStorage::F6E2M3(_)
        | CpuStorage::F6E3M2(_)
        | CpuStorage::F4(_)
        | CpuStorage::F8E8M0(_) => {
            candle_core::bail!("candle does not compute with {:?}", tensor.dtype())
        }
    };
    Ok(bytes.into_owned().into())
}

/// What a rollout makes of FP8 weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fp8Weights {
    /// They become tensors of that type (F32, BF16 or F16); their scales disappear.
    Dequantized(CandleType, Fp8Format),
    /// They stay codes of type F8E4M3, beside their scales.
    Kept,
}

/// Candle's tensors of installed weights, on a device, each by its name.
///
/// # Errors
///
/// `Weight`, naming the tensor, for a type that candle does not have; with
/// [`Dequantized`](Fp8Weights::Dequantized) also for an FP8 weight whose scales are missing or of
/// another shape than the format gives them.
pub fn tensors(
    map: &TensorMap,
    device: &Device,
    fp8: Fp8Weights,
) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::with_capacity(map.len());
    let mut scales_used = Vec::new();
    for (meta, bytes) in map.iter() {
        let tensor = match fp8 {
            Fp8Weights::Dequantized(ty, format) if meta.dtype == DType::F8_E4M3 => {
                scales_used.push(format.scale_name.of(&meta.name));
                dequantized(map, meta, bytes, device, ty, &format)?
            }
            _ => {
                let ty = to_candle(meta.dtype).ok_or_else(|| {
                    refused(&meta.name, format!("candle has no type {}", meta.dtype))
                })?;
                made(meta, bytes, ty, device)?
            }
        };
        tensors.insert(meta.name.to_string(), tensor);
    }
    for scale in scales_used {
        tensors.remove(&scale);
    }
    Ok(tensors)
}

fn dequantized(
    map: &TensorMap,
    meta: &TensorMeta,
    codes: &[u8],
    device: &Device,
    ty: CandleType,
    format: &Fp8Format,
) -> Result<Tensor> {
    let target = match ty {
        CandleType::F32 => SourceType::F32,
        CandleType::BF16 => SourceType::Bf16,
        CandleType::F16 => SourceType::F16,
        other => return Err(refused(&meta.name, format!("FP8 is not dequantised to {other:?}"))),
    };
    let shape = sides(meta)?;
    let grid = format.granularity.grid(&shape)?;
    let name = format.scale_name.of(&meta.name);
    let (scale_meta, scales) = map
        .get(&name)
        .ok_or_else(|| refused(&meta.name, format!("its scales `{name}` did not arrive")))?;
    if scale_meta.dtype != DType::F32 || sides(scale_meta)? != grid.scale_shape() {
        let message = format!(
            "its scales are {} {:?}, the format says F32 {:?}",
            scale_meta.dtype,
            scale_meta.shape,
            grid.scale_shape()
        );
        return Err(refused(&meta.name, message));
    }
    // They may begin anywhere.
    let scales: Vec<f32> = scales.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
    let mut bytes = vec![0; codes.len() * target.size()];
    let elements = 0..grid.elements();
    Codec::best()
        .dequantize(codes, &grid, elements, &scales, target, &mut bytes)
        .map_err(|error| Error::from(error).tensor(&*meta.name))?;
    made(meta, &bytes, ty, device)
}

fn made(meta: &TensorMeta, bytes: &[u8], ty: CandleType, device: &Device) -> Result<Tensor> {
    Tensor::from_raw_buffer(bytes, ty, &sides(meta)?, device)
        .map_err(|error| of_candle("making a tensor of candle", &meta.name, &error))
}

fn sides(meta: &TensorMeta) -> Result<Vec<usize>> {
    let side = |&side: &u64| usize::try_from(side).ok();
    let sides: Option<_> = meta.shape.iter().map(side).collect();
    sides.ok_or_else(|| refused(&meta.name, format!("the shape {:?} is too large", meta.shape)))
}

fn refused(tensor: &str, message: String) -> Error {
    Error::new(ErrorKind::Weight, "making a tensor of candle", message).tensor(tensor)
}

fn of_candle(operation: &'static str, tensor: &str, error: &candle_core::Error) -> Error {
    Error::new(ErrorKind::Weight, operation, error.to_string()).tensor(tensor)
}

const TYPES: [(CandleType, DType); 10] = [
    (CandleType::U8, DType::U8),
    (CandleType::U32, DType::U32),
    (CandleType::I16, DType::I16),
    (CandleType::I32, DType::I32),
    (CandleType::I64, DType::I64),
    (CandleType::BF16, DType::BF16),
    (CandleType::F16, DType::F16),
    (CandleType::F32, DType::F32),
    (CandleType::F64, DType::F64),
    (CandleType::F8E4M3, DType::F8_E4M3),
];

fn to_engine(ty: CandleType) -> Option<DType> {
    TYPES.iter().find(|(candle, _)| *candle == ty).map(|(_, engine)| *engine)
}

fn to_candle(ty: DType) -> Option<CandleType> {
    TYPES.iter().find(|(_, engine)| *engine == ty).map(|(candle, _)| *candle)
}

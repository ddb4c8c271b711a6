//! A rollout's own tensors, lent for placed updates, and the parts of tensors that ranks have.

use std::sync::Arc;

use checkpoint_engine::placed::{LentTensor, Wanted};
use checkpoint_engine::{CheckpointEngineConfig, fp8};
use device_cuda::Device;
use engine_core::{DType, Error, ErrorKind, Result, Storage, TensorBox, TensorMeta};
use pyo3::intern;
use pyo3::prelude::*;

use crate::errors::{OrRaise, not_now};
use crate::tensor::{Reader, class_name, item, synchronize_torch};
use crate::work::Own;

const WHAT: &str = "lending tensors";

/// A part of a full tensor, that a rank holds or wants.
#[pyclass(frozen, name = "Box", module = "ckpt_engine")]
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) tensor: Py<PyAny>,
    shape: Arc<[u64]>,
    offset: Vec<u64>,
}

impl Part {
    /// The full shape, and the box that a tensor of this shape is.
    pub(crate) fn around(&self, name: &str, part: &[u64]) -> Result<(Arc<[u64]>, TensorBox)> {
        let region = TensorBox::new(&self.offset, part).map_err(|error| error.tensor(name))?;
        Ok((self.shape.clone(), region))
    }
}

#[pymethods]
impl Part {
    #[new]
    fn new(tensor: Py<PyAny>, shape: Vec<u64>, offset: Vec<u64>) -> Self {
        Self { tensor, shape: shape.into(), offset }
    }
}

/// Tensors that get the codes and the scales of a weight that is quantised.
#[pyclass(frozen, module = "ckpt_engine")]
#[derive(Debug)]
pub(crate) struct Fp8 {
    codes: Py<PyAny>,
    scales: Py<PyAny>,
}

#[pymethods]
impl Fp8 {
    #[new]
    fn new(codes: Py<PyAny>, scales: Py<PyAny>) -> Self {
        Self { codes, scales }
    }
}

/// A tensor, or a part of one, that is written to where it is.
#[derive(Debug)]
pub(crate) struct Place {
    /// Of the full tensor.
    pub(crate) meta: TensorMeta,
    pub(crate) region: TensorBox,
    pub(crate) memory: Storage,
    pub(crate) owner: Py<PyAny>,
    /// Where torch said that it is.
    pub(crate) address: Option<usize>,
    pub(crate) device: Option<Device>,
}

#[derive(Clone, Debug)]
struct Entry {
    meta: TensorMeta,
    region: TensorBox,
    elements: Storage,
    scales: Option<Storage>,
}

/// A program's tensors, of which a rollout has a box each.
#[pyclass(frozen)]
#[derive(Debug)]
pub(crate) struct Lent {
    own: Own<(Vec<Entry>, Arc<Lending>)>,
}

/// What is known of tensors that are lent.
#[derive(Debug)]
pub(crate) struct Lending {
    /// The name, the tensor, and its address when it was lent.
    tensors: Vec<(Arc<str>, Py<PyAny>, usize)>,
    devices: Vec<Device>,
}

#[pymethods]
impl Lent {
    /// Of pairs of a name and a tensor.
    #[new]
    fn new(tensors: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = tensors.py();
        let mut reader = Reader::default();
        let (mut entries, mut known) = (Vec::new(), Vec::new());
        let mut devices: Vec<Device> = Vec::new();
        for pair in tensors.try_iter()? {
            let (name, object) = item(&pair?)?;
            let name = name.to_str()?;
            let (codes, scales) = match object.cast::<Fp8>() {
                Ok(both) => (both.get().codes.bind(py), Some(both.get().scales.bind(py))),
                Err(_) => (&object, None),
            };
            let elements = reader.place(name, codes).or_raise(py)?;
            let scales =
                scales.map(|scales| reader.place(name, scales)).transpose().or_raise(py)?;
            if let Some(scales) = &scales {
                let types = (elements.meta.dtype, scales.meta.dtype);
                if types != (DType::F8_E4M3, DType::F32) {
                    let message = format!(
                        "codes are F8_E4M3 and their scales F32, not {} and {}",
                        types.0, types.1
                    );
                    return Err(Error::new(ErrorKind::Weight, WHAT, message).tensor(name))
                        .or_raise(py);
                }
            }
            let meta = elements.meta.clone();
            let region = elements.region.clone();
            let mut keep = |place: Place| {
                if let Some(device) = place.device
                    && devices.iter().all(|known| known.ordinal() != device.ordinal())
                {
                    devices.push(device);
                }
                if let Some(address) = place.address {
                    known.push((meta.name.clone(), place.owner, address));
                }
                place.memory
            };
            let (elements, scales) = (keep(elements), scales.map(&mut keep));
            entries.push(Entry { meta, region, elements, scales });
        }
        reader.synchronize(py).or_raise(py)?;
        let lending = Lending { tensors: known, devices };
        Ok(Self { own: Own::new((entries, Arc::new(lending))) })
    }
}

impl Lent {
    pub(crate) fn lending(&self, py: Python<'_>) -> PyResult<Arc<Lending>> {
        Ok(self.own.get().or_raise(py)?.1.clone())
    }

    /// The tensors, quantised as a configuration says.
    pub(crate) fn tensors(&self, config: &CheckpointEngineConfig) -> Result<Vec<LentTensor>> {
        let format = fp8::Fp8Config::of(config)?.quantization.rules().format;
        let (entries, _) = self.own.get()?;
        let lend = |Entry { meta, region, elements, scales }: Entry| {
            let mut wanted = Wanted::whole(meta).part(region);
            if scales.is_some() {
                wanted = wanted.quantized(format);
            }
            #[expect(unsafe_code, reason = "hands the program's promise on")]
            // SAFETY: the memory is that of a tensor that can be written to, and its program promises that nothing else uses it while an
            // update is under way.
            unsafe {
                LentTensor::new(wanted, elements, scales)
            }
        };
        entries.iter().cloned().map(lend).collect()
    }
}

impl Lending {
    /// Checks that all tensors are where they were, and waits for the work that this thread has enqueued on torch's streams: it may read
    /// them.
    pub(crate) fn check(&self, py: Python<'_>) -> PyResult<()> {
        for (name, tensor, before) in &self.tensors {
            let now: usize = tensor.bind(py).call_method0(intern!(py, "data_ptr"))?.extract()?;
            if now != *before {
                let message = "its memory was freed or moved (its storage was resized) after it was lent: form the group anew";
                return Err(not_now("updating", message).tensor(&**name)).or_raise(py);
            }
        }
        synchronize_torch(py, &self.devices)
    }
}

/// The scales of a weight that is quantised: the weight's name, and the name and the shape of the scales.
pub(crate) type Scales = (String, String, Vec<usize>);

/// The weights that become FP8 where a configuration has trainers quantise, out of all weights of a model: each with its name, its type and
/// its shape.
pub(crate) fn quantized(
    config: &CheckpointEngineConfig,
    weights: Vec<(String, DType, Vec<usize>)>,
) -> Result<Vec<Scales>> {
    let fp8 = fp8::Fp8Config::of(config)?;
    if !fp8.trainer_quantize_fp8 {
        return Ok(Vec::new());
    }
    let parameters =
        weights.into_iter().map(|(name, dtype, shape)| (name, shape, fp8::stored(dtype)));
    let plan = fp8::rules::QuantPlan::resolve(parameters, &fp8.quantization.rules())?;
    let format = *plan.format();
    let entries = plan.entries().iter();
    let quantized = entries.filter(|entry| entry.decision == fp8::rules::Decision::Quantize);
    let scales = quantized.map(|entry| {
        let shape = format.granularity.scale_shape(&entry.shape)?;
        Ok((entry.name.clone(), format.scale_name.of(&entry.name), shape))
    });
    scales.collect()
}

/// A tensor that is a part of a full tensor: the tensor, the full tensor's shape, and the box that the part is.
type Shard<'py> = (Bound<'py, PyAny>, Arc<[u64]>, TensorBox);

/// The local part of a DTensor, and the box of the full tensor that it is.
pub(crate) fn shard<'py>(name: &str, tensor: &Bound<'py, PyAny>) -> PyResult<Result<Shard<'py>>> {
    use checkpoint_engine::reshard::{Mesh, Placement};
    let py = tensor.py();
    let refuse =
        |message: String| Error::new(ErrorKind::Weight, "reading a DTensor", message).tensor(name);
    let shape: Vec<u64> = tensor.getattr(intern!(py, "shape"))?.extract()?;
    let mesh = tensor.getattr(intern!(py, "device_mesh"))?;
    let coordinate: Option<Vec<u32>> =
        mesh.call_method0(intern!(py, "get_coordinate"))?.extract()?;
    let Some(coordinate) = coordinate else {
        return Ok(Err(refuse("this rank is not in its mesh".into())));
    };
    let sides: Vec<u32> = mesh.getattr(intern!(py, "shape"))?.extract()?;
    let mut placements = Vec::with_capacity(sides.len());
    for placement in tensor.getattr(intern!(py, "placements"))?.try_iter()? {
        let placement = placement?;
        let dimension = || -> PyResult<usize> {
            let dimension: isize = placement.getattr(intern!(py, "dim"))?.extract()?;
            let wrapped = if dimension < 0 { dimension + shape.len() as isize } else { dimension };
            usize::try_from(wrapped).map_err(PyErr::from)
        };
        placements.push(match &*placement.get_type().name()?.to_cow()? {
            "Replicate" => Placement::Replicate,
            "Shard" => Placement::Shard(dimension()?),
            "_StridedShard" => Placement::StridedShard(dimension()?),
            _ => {
                let words = placement.str()?;
                let message = format!("it is placed as {words}: send `tensor.full_tensor()`");
                return Ok(Err(refuse(message)));
            }
        });
    }
    let region = Mesh::region(&sides, &coordinate, &shape, &placements);
    let region = match region {
        Ok(region) => region,
        Err(error) => return Ok(Err(error.tensor(name))),
    };
    let local = tensor.call_method0(intern!(py, "to_local"))?;
    let sides: Vec<u64> = local.getattr(intern!(py, "shape"))?.extract()?;
    let extent = region.ranges().iter().map(|range| range.end - range.start);
    if !extent.eq(sides.iter().copied()) {
        let class = class_name(tensor);
        let message = format!(
            "its part of this rank is {sides:?}, and its placements say {region} ({class}): send `tensor.full_tensor()`"
        );
        return Ok(Err(refuse(message)));
    }
    Ok(Ok((local, shape.into(), region)))
}

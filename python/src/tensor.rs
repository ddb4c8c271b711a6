//! Tensors of Python's libraries as weights, and weights as tensors for them. Nothing is copied.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use device_cuda::{CudaMemory, CudaSlice, Device, ForeignStream, Stream, keeping_current};
use engine_core::{DType, Error, ErrorKind, Result, Storage, TensorBox, TensorMeta, Weight};
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyList, PyTuple, PyType};

use crate::errors::{OrRaise, exception};
use crate::ffi::{self, Exchange};
use crate::lending::{self, Part};
use crate::readers::Readers;
use crate::work::lock;

/// Types by the names that torch, numpy, ml_dtypes and jax give them, DLPack's code and bits, and the
/// character of `__array_interface__`; 0 where there is none.
const TYPES: [(DType, &[&str], u8, char); 20] = [
    (DType::BOOL, &["bool"], 6, 'b'),
    (DType::U8, &["uint8"], 1, 'u'),
    (DType::I8, &["int8"], 0, 'i'),
    (DType::F8_E5M2, &["float8_e5m2"], 12, ' '),
    (DType::F8_E4M3, &["float8_e4m3fn"], 10, ' '),
    (DType::F8_E8M0, &["float8_e8m0fnu"], 14, ' '),
    (DType::F8_E4M3FNUZ, &["float8_e4m3fnuz"], 11, ' '),
    (DType::F8_E5M2FNUZ, &["float8_e5m2fnuz"], 13, ' '),
    (DType::I16, &["int16"], 0, 'i'),
    (DType::U16, &["uint16"], 1, 'u'),
    (DType::F16, &["float16"], 2, 'f'),
    (DType::BF16, &["bfloat16"], 4, ' '),
    (DType::I32, &["int32"], 0, 'i'),
    (DType::U32, &["uint32"], 1, 'u'),
    (DType::F32, &["float32"], 2, 'f'),
    (DType::C64, &["complex64"], 5, 'c'),
    (DType::F64, &["float64"], 2, 'f'),
    (DType::I64, &["int64"], 0, 'i'),
    (DType::U64, &["uint64"], 1, 'u'),
    (DType::F4, &["float4_e2m1fn_x2"], 0, ' '),
];

pub(crate) fn named(name: &str) -> Option<DType> {
    let name = name.strip_prefix("torch.").unwrap_or(name);
    let known =
        TYPES.iter().find(|(dtype, names, ..)| names.contains(&name) || dtype.name() == name);
    // Packed types have another number of elements than bytes; nothing here says which.
    known.map(|known| known.0).filter(|dtype| dtype.bytes().is_some())
}

/// By DLPack's code, bits and lanes.
fn numbered((code, bits, lanes): (u8, u8, u16)) -> Option<DType> {
    let fits = |dtype: DType| dtype.bytes().is_some_and(|bytes| bytes * 8 == u64::from(bits));
    let known = TYPES.iter().find(|(dtype, _, known, _)| *known == code && fits(*dtype));
    known.map(|known| known.0).filter(|_| lanes == 1)
}

/// Whether elements lie one after the other, by their strides in elements.
fn are_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1_i64;
    let fits = |(&side, &stride): (&i64, &i64)| {
        let fits = side == 1 || stride == expected;
        expected = expected.wrapping_mul(side);
        fits
    };
    shape.contains(&0) || shape.iter().zip(strides).rev().all(fits)
}

fn refuse(name: &str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Weight, "taking a tensor", message).tensor(name)
}

const NO_MEMORY: &str =
    "it has no memory of its own (a fake, lazy or distributed tensor?): give a real one";

const APART: &str = "its elements are not contiguous";

/// What an object says of its memory.
struct Described {
    meta: TensorMeta,
    /// In elements; none where they are contiguous.
    strides: Option<Vec<i64>>,
    address: usize,
    /// The number of its CUDA device, and the stream whose work may be filling it.
    device: Option<(i32, usize)>,
    is_writable: bool,
}

/// A program's own tensor, which weights are copied into.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) meta: TensorMeta,
    pub(crate) place: Place,
}

#[derive(Debug)]
pub(crate) enum Place {
    Host(ffi::Writable),
    Device(CudaSlice),
}

/// How a class of tensors is read.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// One of ours.
    Own,
    /// torch: by the functions that its class has for this, in the versions that have them (2.11 does), else by the
    /// tensor's attributes. Both are faster than `__dlpack__`, and know FP8 and parameters in every version.
    Torch(Option<Exchange>),
    /// A part of a tensor, as the program says.
    Part,
    /// A `DTensor`: a part of a tensor, by a mesh.
    Distributed,
    /// numpy, also with the types of `ml_dtypes`.
    Array,
    Dlpack,
    Buffer,
}

/// What is remembered of classes and types, which are few.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    ways: HashMap<usize, (Way, Py<PyType>)>,
    dtypes: HashMap<usize, (Option<DType>, Py<PyAny>)>,
    /// The devices whose tensors came, by number; with a stream where DLPack lets one wait for producers.
    devices: HashMap<i32, (Device, Option<Stream>)>,
    /// Streams that were torch's current ones when tensors came: they may be filling them.
    producers: Vec<ForeignStream>,
}

impl Reader {
    /// A named tensor as a weight; the inner error is the tensor's.
    ///
    /// Of a tensor on a device the work that fills it may not be done: [`synchronize`](Self::synchronize).
    pub(crate) fn weight(&mut self, name: &str, tensor: &Bound<'_, PyAny>) -> Result<Weight> {
        let way = self.way(tensor);
        let raised = |error: PyErr| {
            let message = format!("{} cannot be read: {error}", class_name(tensor));
            refuse(name, message)
        };
        match way.map_err(raised)? {
            Way::Own => {
                let own = tensor.cast::<Tensor>().map_err(|error| raised(error.into()))?;
                Ok(own.get().weight.clone().with_name(name))
            }
            Way::Torch(exchange) => match self.torch(name, tensor, exchange).map_err(raised)?? {
                Some(described) => self.described(described, tensor),
                None => {
                    let detached = tensor.call_method0(intern!(tensor.py(), "detach"));
                    self.dlpack(name, &detached.map_err(raised)?).map_err(raised)?
                }
            },
            Way::Array => {
                let described = self.array(name, tensor).map_err(raised)??;
                self.described(described, tensor)
            }
            Way::Dlpack => self.dlpack(name, tensor).map_err(raised)?,
            Way::Buffer => self.buffer(name, tensor).map_err(raised)?,
            Way::Part => {
                let part = tensor.cast::<Part>().map_err(|error| raised(error.into()))?.get();
                let weight = self.weight(name, part.tensor.bind(tensor.py()))?;
                weight.require_whole("reading a box")?;
                let (shape, region) = part.around(name, &weight.meta().shape)?;
                weight.of_box(shape, region)
            }
            Way::Distributed => {
                let (local, shape, region) = lending::shard(name, tensor).map_err(raised)??;
                self.weight(name, &local)?.of_box(shape, region)
            }
        }
    }

    /// A tensor of a program, or a part of one, that is to be written to where it is.
    ///
    /// Work that reads or writes it on a device may not be done: [`synchronize`](Self::synchronize).
    pub(crate) fn place(
        &mut self,
        name: &str,
        tensor: &Bound<'_, PyAny>,
    ) -> Result<lending::Place> {
        let raised = |error: PyErr| {
            let message = format!("{} cannot be written to: {error}", class_name(tensor));
            refuse(name, message)
        };
        let of_box = |place: lending::Place, shape, region| {
            let meta = TensorMeta { shape, ..place.meta };
            lending::Place { meta, region, ..place }
        };
        match self.way(tensor).map_err(raised)? {
            Way::Part => {
                let part = tensor.cast::<Part>().map_err(|error| raised(error.into()))?.get();
                let place = self.place(name, part.tensor.bind(tensor.py()))?;
                let (shape, region) = part.around(name, &place.meta.shape)?;
                Ok(of_box(place, shape, region))
            }
            Way::Distributed => {
                let (local, shape, region) = lending::shard(name, tensor).map_err(raised)??;
                Ok(of_box(self.place(name, &local)?, shape, region))
            }
            way => {
                let (described, owner) = self.writable(name, tensor)?;
                let Described { meta, address, device: on, .. } = described;
                let len = usize::try_from(meta.validate()?);
                let len = len.map_err(|_| refuse(name, "it is too large"))?;
                let (memory, device) = match on {
                    Some(on) => {
                        let memory = self.of_device(&meta, address, on, &owner)?;
                        let device = memory.device().clone();
                        (memory.storage(), Some(device))
                    }
                    None => {
                        #[expect(
                            unsafe_code,
                            reason = "an object is believed what it says of its own memory"
                        )]
                        // SAFETY: as for `of_memory`. It is read only between updates, when nobody writes to it.
                        let bytes = unsafe { ffi::of_object(address, len, owner.clone().unbind()) };
                        (bytes.into(), None)
                    }
                };
                let address = matches!(way, Way::Torch(_)).then_some(address);
                let region = TensorBox::whole(&meta.shape);
                Ok(lending::Place { meta, region, memory, owner: owner.unbind(), address, device })
            }
        }
    }

    fn way(&mut self, tensor: &Bound<'_, PyAny>) -> PyResult<Way> {
        let class = tensor.get_type();
        let key = class.as_ptr() as usize;
        if let Some((way, _)) = self.ways.get(&key) {
            return Ok(*way);
        }
        let way = if class.is_subclass_of::<Tensor>()? {
            Way::Own
        } else if class.is(PyType::new::<Part>(tensor.py())) {
            Way::Part
        } else if class.hasattr("data_ptr")? && class.hasattr("untyped_storage")? {
            match class.hasattr("full_tensor")? {
                true => Way::Distributed,
                false => Way::Torch(Exchange::of_class(&class)?),
            }
        } else if class.hasattr("__array_interface__")? && class.hasattr("dtype")? {
            Way::Array
        } else if class.hasattr("__dlpack__")? {
            Way::Dlpack
        } else {
            Way::Buffer
        };
        self.ways.insert(key, (way, class.unbind()));
        Ok(way)
    }

    fn dtype(&mut self, dtype: &Bound<'_, PyAny>) -> PyResult<Option<DType>> {
        let key = dtype.as_ptr() as usize;
        if let Some((known, _)) = self.dtypes.get(&key) {
            return Ok(*known);
        }
        // numpy's types have a name, torch's only words.
        let name = match dtype.getattr_opt("name")? {
            Some(name) => name.extract::<String>()?,
            None => dtype.str()?.to_string(),
        };
        let known = named(&name);
        self.dtypes.insert(key, (known, dtype.clone().unbind()));
        Ok(known)
    }

    /// What a tensor of torch says of its memory; `None` where only DLPack knows its device.
    fn torch(
        &mut self,
        name: &str,
        tensor: &Bound<'_, PyAny>,
        exchange: Option<Exchange>,
    ) -> PyResult<Result<Option<Described>>> {
        let py = tensor.py();
        let described = exchange.map(|exchange| exchanged(name, tensor, exchange));
        if let Some(described) = described.transpose()?.flatten() {
            return Ok(match is_lazy(tensor, described.meta.dtype)? {
                true => Err(refuse(name, LAZY)),
                false => Ok(Some(described)),
            });
        }
        let on_host = tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()?;
        if !on_host && !tensor.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
            return Ok(Ok(None));
        }
        let dtype = tensor.getattr(intern!(py, "dtype"))?;
        let Some(known) = self.dtype(&dtype)? else {
            return Ok(Err(refuse(name, format!("no checkpoint has the type {dtype}"))));
        };
        if is_lazy(tensor, known)? {
            return Ok(Err(refuse(name, LAZY)));
        }
        let shape: Vec<u64> = tensor.getattr(intern!(py, "shape"))?.extract()?;
        let contiguous = tensor.call_method0(intern!(py, "is_contiguous"))?;
        let strides = if contiguous.is_truthy()? {
            None
        } else {
            Some(tensor.call_method0(intern!(py, "stride"))?.extract::<Vec<i64>>()?)
        };
        let address: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let device = match on_host {
            true => None,
            false => {
                let number: i32 = tensor.call_method0(intern!(py, "get_device"))?.extract()?;
                Some((number, torch_stream(py, number)?))
            }
        };
        let meta = TensorMeta::new(name, known, shape);
        let is_writable = true; // torch has no other.
        Ok(Ok(Some(Described { meta, strides, address, device, is_writable })))
    }

    /// Memory of a device that a tensor of torch keeps, and which work of a stream may be filling.
    fn of_device(
        &mut self,
        meta: &TensorMeta,
        address: usize,
        (number, stream): (i32, usize),
        owner: &Bound<'_, PyAny>,
    ) -> Result<CudaSlice> {
        let len = meta.validate()?;
        let too_large = |_| refuse(&meta.name, "it is too large");
        let len = usize::try_from(len).map_err(too_large)?;
        if address == 0 && len > 0 {
            return Err(refuse(&meta.name, NO_MEMORY));
        }
        let device = self.device(number).map_err(|error| error.tensor(&*meta.name))?.0.clone();
        let owner = Arc::new(owner.clone().unbind());
        #[expect(unsafe_code, reason = "torch is believed what it says of its own memory")]
        // SAFETY: torch said that the tensor, which this keeps, has so many bytes there.
        let memory = unsafe { CudaMemory::borrowed(&device, address as u64, len, owner) };
        #[expect(unsafe_code, reason = "torch is believed what it says of its own streams")]
        // SAFETY: streams that torch makes current live as long as the process: they come from a pool, or their owner
        // keeps them.
        let producer = unsafe { ForeignStream::new(&device, Some(stream)) };
        if !self.producers.iter().any(|known| known.is(&device, Some(stream))) {
            self.producers.push(producer);
        }
        Ok(memory.all())
    }

    /// A described tensor as a weight.
    fn described(&mut self, tensor: Described, owner: &Bound<'_, PyAny>) -> Result<Weight> {
        let Described { meta, strides, address, device, .. } = tensor;
        match device {
            None => of_memory(meta, strides, address, owner),
            Some(_) if strides.is_some() => {
                Err(refuse(&meta.name, format!("{APART}: send `tensor.contiguous()`")))
            }
            Some(device) => {
                let memory = self.of_device(&meta, address, device, owner)?;
                Weight::from_meta(meta, memory.storage())
            }
        }
    }

    /// What a program's own tensor that is to be written to says of its memory, and an object that keeps this memory.
    fn writable<'py>(
        &mut self,
        name: &str,
        tensor: &Bound<'py, PyAny>,
    ) -> Result<(Described, Bound<'py, PyAny>)> {
        let raised = |error: PyErr| {
            let message = format!("{} cannot be written to: {error}", class_name(tensor));
            refuse(name, message)
        };
        let py = tensor.py();
        let mut owner = tensor.clone();
        let described = match self.way(tensor).map_err(raised)? {
            Way::Torch(_) => {
                // Another tensor of the same memory: the program may give the tensor another one.
                owner = tensor.call_method0(intern!(py, "detach")).map_err(raised)?;
                match self.way(&owner).map_err(raised)? {
                    Way::Torch(exchange) => {
                        self.torch(name, &owner, exchange).map_err(raised)??
                    }
                    _ => None,
                }
            }
            Way::Array => Some(self.array(name, tensor).map_err(raised)??),
            Way::Distributed => {
                return Err(refuse(name, "it is a DTensor, of which this rank has a part"));
            }
            Way::Own | Way::Part | Way::Dlpack | Way::Buffer => None,
        };
        let Some(described) = described else {
            let message = format!(
                "weights are copied into tensors of torch, on the CPU or a CUDA device, and into arrays of numpy; this is {}",
                class_name(tensor)
            );
            return Err(refuse(name, message));
        };
        if described.strides.is_some() {
            return Err(refuse(name, APART));
        }
        if !described.is_writable {
            return Err(refuse(name, "it is read-only"));
        }
        if described.address == 0 && described.meta.validate()? > 0 {
            return Err(refuse(name, NO_MEMORY));
        }
        Ok((described, owner))
    }

    /// A program's own tensor, to be written to: of torch, or an array of numpy.
    ///
    /// Work that reads or writes a tensor on a device may not be done: [`synchronize`](Self::synchronize).
    pub(crate) fn target(&mut self, name: &str, tensor: &Bound<'_, PyAny>) -> Result<Target> {
        let (Described { meta, address, device, .. }, owner) = self.writable(name, tensor)?;
        let len = meta.validate()?;
        if let Some(device) = device {
            let memory = self.of_device(&meta, address, device, &owner)?;
            return Ok(Target { meta, place: Place::Device(memory) });
        }
        let len = usize::try_from(len).map_err(|_| refuse(name, "it is too large"))?;
        #[expect(unsafe_code, reason = "an object is believed what it says of its own memory")]
        // SAFETY: as for `of_memory`, of an object that says that it can be written to. A program that makes a
        // destination of it promises that nothing else uses it while an update is received into it.
        let memory = unsafe { ffi::Writable::new(address, len, owner.unbind()) };
        Ok(Target { meta, place: Place::Host(memory) })
    }

    fn array(&mut self, name: &str, array: &Bound<'_, PyAny>) -> PyResult<Result<Described>> {
        let py = array.py();
        let dtype = array.getattr(intern!(py, "dtype"))?;
        let Some(known) = self.dtype(&dtype)? else {
            return Ok(Err(refuse(name, format!("no checkpoint has the type {dtype}"))));
        };
        let interface = array.getattr(intern!(py, "__array_interface__"))?;
        let typestr: String = interface.get_item(intern!(py, "typestr"))?.extract()?;
        if typestr.starts_with('>') {
            return Ok(Err(refuse(name, "its bytes are in big-endian order")));
        }
        let shape: Vec<u64> = interface.get_item(intern!(py, "shape"))?.extract()?;
        let (address, is_read_only): (usize, bool) =
            interface.get_item(intern!(py, "data"))?.extract()?;
        let strides: Option<Vec<i64>> = interface.get_item(intern!(py, "strides"))?.extract()?;
        // `named` knows types of whole bytes only.
        let size = known.bytes().unwrap_or(1) as i64;
        let strides = match strides {
            Some(strides) if strides.iter().any(|stride| stride % size != 0) => {
                return Ok(Err(refuse(name, "its elements do not lie on whole elements")));
            }
            strides => strides.map(|strides| strides.into_iter().map(|s| s / size).collect()),
        };
        let meta = TensorMeta::new(name, known, shape);
        Ok(Ok(Described { meta, strides, address, device: None, is_writable: !is_read_only }))
    }

    fn dlpack(&mut self, name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<Result<Weight>> {
        let py = tensor.py();
        let device = tensor.call_method0(intern!(py, "__dlpack_device__"))?;
        let (kind, number): (i32, i32) = device.extract()?;
        let export = intern!(py, "__dlpack__");
        const CUDA: i32 = 2;
        let capsule = if kind == CUDA {
            let stream = match self.stream(number) {
                Ok(stream) => stream,
                Err(error) => return Ok(Err(error.tensor(name))),
            };
            let arguments = PyDict::new(py);
            arguments.set_item("stream", stream)?;
            tensor.call_method(export, (), Some(&arguments))?
        } else {
            tensor.call_method0(export)?
        };
        ffi::of_capsule(name, &capsule)
    }

    fn buffer(&self, name: &str, object: &Bound<'_, PyAny>) -> PyResult<Result<Weight>> {
        let view = object.py().import("builtins")?.getattr("memoryview")?.call1((object,))?;
        let format: String = view.getattr("format")?.extract()?;
        let size: u64 = view.getattr("itemsize")?.extract()?;
        let kind = match format.trim_start_matches(['@', '=', '<']) {
            "?" => 'b',
            "e" | "f" | "d" => 'f',
            "b" | "h" | "i" | "l" | "q" => 'i',
            "c" | "B" | "H" | "I" | "L" | "Q" => 'u',
            _ => ' ',
        };
        let known = TYPES.iter().find(|(dtype, .., known)| {
            kind != ' ' && *known == kind && dtype.bytes() == Some(size)
        });
        let Some(&(dtype, ..)) = known else {
            let message = format!(
                "no checkpoint has the type `{format}` of {}: give it one with `ckpt_engine.Tensor(data, dtype, \
                 shape)`",
                class_name(object)
            );
            return Ok(Err(refuse(name, message)));
        };
        let shape: Vec<u64> = view.getattr("shape")?.extract()?;
        let bytes = ffi::buffer(object)?;
        Ok(Weight::new(name, dtype, shape, bytes))
    }

    fn device(&mut self, number: i32) -> Result<&mut (Device, Option<Stream>)> {
        use std::collections::hash_map::Entry;
        if !cfg!(feature = "cuda") {
            let message = "it is on a CUDA device, and this package was built without `cuda`";
            return Err(Error::new(ErrorKind::Backend, "taking a tensor", message));
        }
        Ok(match self.devices.entry(number) {
            Entry::Occupied(device) => device.into_mut(),
            Entry::Vacant(place) => place.insert((Device::open(number)?, None)),
        })
    }

    /// The stream that waits for the work that fills tensors of a device.
    fn stream(&mut self, number: i32) -> Result<usize> {
        let (device, stream) = self.device(number)?;
        let stream = match stream {
            Some(stream) => stream,
            None => stream.insert(keeping_current(|| Stream::new(device))?),
        };
        Ok(stream.as_raw().expose_provenance())
    }

    /// Waits until the tensors of devices that were read are filled: for their producers' streams, not for the
    /// devices.
    pub(crate) fn synchronize(&mut self, py: Python<'_>) -> Result<()> {
        let producers = std::mem::take(&mut self.producers);
        let streams: Vec<_> =
            self.devices.values().filter_map(|(_, stream)| stream.as_ref()).collect();
        if producers.is_empty() && streams.is_empty() {
            // Where there is no driver, each question for it would look for its library.
            return Ok(());
        }
        py.detach(|| {
            producers.iter().try_for_each(ForeignStream::synchronize)?;
            keeping_current(|| streams.into_iter().try_for_each(Stream::synchronize))
        })?;
        Ok(())
    }
}

/// What a tensor of torch says of its memory by its class's functions; `None` where only its attributes say it, or why not.
fn exchanged(
    name: &str,
    tensor: &Bound<'_, PyAny>,
    exchange: Exchange,
) -> PyResult<Option<Described>> {
    const CPU: i32 = 1;
    const CUDA: i32 = 2;
    let seen = exchange.describe(tensor, |seen| {
        let strides = seen.strides.filter(|strides| !are_contiguous(seen.shape, strides));
        let shape: Option<Vec<u64>> =
            seen.shape.iter().map(|&side| u64::try_from(side).ok()).collect();
        let meta = TensorMeta::new(name, numbered(seen.dtype)?, shape?);
        Some((meta, strides.map(<[i64]>::to_vec), seen.address, seen.device))
    });
    // What DLPack has no words for, such as a tensor without memory, has better ones of its own.
    let Some((meta, strides, address, device)) = seen.ok().flatten() else { return Ok(None) };
    let device = match device {
        (CPU, _) => None,
        (CUDA, number) => Some((number, exchange.current_stream(tensor.py(), device)?)),
        _ => return Ok(None),
    };
    let is_writable = true; // torch has no other.
    Ok(Some(Described { meta, strides, address, device, is_writable }))
}

const LAZY: &str =
    "it is a lazy negation or conjugation: send `tensor.resolve_neg().resolve_conj()`";

/// Whether the elements of a tensor of torch are not what its memory has.
fn is_lazy(tensor: &Bound<'_, PyAny>, dtype: DType) -> PyResult<bool> {
    let py = tensor.py();
    let flagged = |flag| tensor.call_method0(flag)?.is_truthy();
    Ok(flagged(intern!(py, "is_neg"))? || dtype == DType::C64 && flagged(intern!(py, "is_conj"))?)
}

/// Waits for the work that this thread has given devices through torch, not for the devices.
pub(crate) fn synchronize_torch(py: Python<'_>, devices: &[Device]) -> PyResult<()> {
    let mut streams = Vec::new();
    for device in devices {
        let stream = torch_stream(py, device.ordinal())?;
        #[expect(unsafe_code, reason = "torch is believed what it says of its own streams")]
        // SAFETY: it is current on this thread, which waits here.
        streams.push(unsafe { ForeignStream::new(device, Some(stream)) });
    }
    let done = py.detach(|| streams.iter().try_for_each(ForeignStream::synchronize));
    done.map_err(Error::from).or_raise(py)
}

/// The handle of the stream of a device that is torch's current one on this thread.
fn torch_stream(py: Python<'_>, number: i32) -> PyResult<usize> {
    static CURRENT: PyOnceLock<Option<Py<PyAny>>> = PyOnceLock::new();
    // What torch's compilers call for each kernel; `torch.cuda.current_stream` makes an object first.
    let fast = CURRENT.get_or_try_init(py, || {
        let inner = py.import("torch._C")?;
        let found = inner.getattr_opt("_cuda_getCurrentRawStream")?;
        PyResult::Ok(found.map(Bound::unbind))
    })?;
    if let Some(fast) = fast {
        return fast.bind(py).call1((number,))?.extract();
    }
    let stream = py.import("torch.cuda")?.call_method1("current_stream", (number,))?;
    stream.getattr("cuda_stream")?.extract()
}

pub(crate) fn class_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().fully_qualified_name().map_or("an object".into(), |name| name.to_string())
}

/// Host memory that an object keeps, as a weight.
fn of_memory(
    meta: TensorMeta,
    strides: Option<Vec<i64>>,
    address: usize,
    owner: &Bound<'_, PyAny>,
) -> Result<Weight> {
    let (name, dtype) = (Arc::clone(&meta.name), meta.dtype);
    let len = meta.validate()?;
    // `named` knows types of whole bytes only.
    let size = dtype.bytes().unwrap_or(1);
    let too_large = || refuse(&name, "it is too large");
    let extent = match &strides {
        None => Some(len),
        Some(_) if len == 0 => Some(0),
        Some(strides) => {
            if strides.len() != meta.shape.len() || strides.iter().any(|&stride| stride < 0) {
                return Err(refuse(&name, "it has negative strides: send a copy"));
            }
            let last = meta.shape.iter().zip(strides).try_fold(0_u64, |last, (&side, &stride)| {
                last.checked_add((side - 1).checked_mul(stride.unsigned_abs())?)
            });
            last.and_then(|last| last.checked_add(1)?.checked_mul(size))
        }
    };
    let extent = extent.and_then(|extent| usize::try_from(extent).ok()).ok_or_else(too_large)?;
    if address == 0 && extent > 0 {
        return Err(refuse(&name, NO_MEMORY));
    }
    #[expect(unsafe_code, reason = "an object is believed what it says of its own memory")]
    // SAFETY: the object is a tensor that said where its memory is, of which type and shape; its library keeps that as
    // long as the object lives. One that lies could as well lie to torch.
    let bytes = unsafe { ffi::of_object(address, extent, owner.clone().unbind()) };
    match strides {
        None => Weight::from_meta(meta, bytes),
        Some(strides) => Weight::strided(name, dtype, meta.shape, strides, 0, bytes),
    }
}

/// A tensor that owns its memory, read-only: one that was received, or bytes of any object with a type and a
/// shape.
#[pyclass(frozen, module = "ckpt_engine")]
#[derive(Debug)]
pub(crate) struct Tensor {
    weight: Weight,
    /// Of its bucket, if that is on a device.
    readers: Option<Arc<Readers>>,
    /// Whether torch is to copy it where Python takes it.
    is_lent: bool,
}

impl Tensor {
    pub(crate) fn new(weight: Weight) -> Self {
        Self { weight, readers: None, is_lent: false }
    }

    /// A tensor in a bucket, which keeps it.
    pub(crate) fn in_bucket(weight: Weight, readers: Option<Arc<Readers>>) -> Self {
        Self { weight, readers, is_lent: false }
    }

    /// The same, as a copy that torch makes where it is on a device: in the order of the stream that reads it, out of memory that
    /// torch has already. Memory from the driver, and giving it back, would wait for all work of the device.
    pub(crate) fn lent(self) -> Self {
        Self { is_lent: true, ..self }
    }

    pub(crate) fn is_on_device(&self) -> bool {
        self.weight.storage().is_some_and(|bytes| bytes.device().is_some())
    }

    pub(crate) fn weight(&self) -> &Weight {
        &self.weight
    }

    pub(crate) fn byte_len(&self) -> u64 {
        self.weight.byte_len()
    }

    /// Work of a stream of its device will read it, or of any stream without one.
    fn read_by(&self, stream: Option<usize>) {
        let slice = self.weight.storage().and_then(CudaSlice::of_storage);
        if let (Some(readers), Some(slice)) = (&self.readers, slice) {
            #[expect(unsafe_code, reason = "a library is believed which stream it reads on")]
            // SAFETY: DLPack and torch say that it is one of the device's, and those that libraries make current
            // come from pools, or live as long as they are used.
            unsafe {
                readers.add(slice.device(), stream);
            }
        }
    }

    /// A capsule of DLPack with the tensor, or with its bytes, which keeps it.
    fn capsule<'py>(
        &self,
        py: Python<'py>,
        bytes: Storage,
        of_bytes: bool,
        versioned: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let known = TYPES.iter().find(|known| known.0 == self.dtype());
        let Some(&(dtype, _, code, _)) = known else {
            let message = format!("DLPack has no code for {}", self.dtype());
            return Err(PyBufferError::new_err(message));
        };
        const UNSIGNED: u8 = 1;
        let (code, bits) = if of_bytes { (UNSIGNED, 8) } else { (code, dtype.bits() as u8) };
        let (address, device) = match &bytes {
            Storage::Host(bytes) => (bytes.as_ptr().expose_provenance() as u64, (1, 0)),
            Storage::Device(_) => {
                let slice = CudaSlice::of_storage(&bytes)
                    .ok_or_else(|| PyBufferError::new_err("its device is not known"))?;
                (slice.address(), (2, slice.device().ordinal()))
            }
        };
        let description = ffi::Description { address, device, code, bits, shape: self.sides()? };
        ffi::export(py, bytes, description, versioned)
    }

    /// A tensor of torch over the same memory, which it keeps, or a copy of one that is [lent](Self::lent).
    pub(crate) fn torch<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let tensor = self.torch_in_place(py)?;
        if self.is_lent { tensor.call_method0(intern!(py, "clone")) } else { Ok(tensor) }
    }

    fn torch_in_place<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        // The function that takes capsules: a tenth of the time of `torch.from_dlpack`, which asks an object for one.
        static FROM_CAPSULE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let from_capsule = FROM_CAPSULE.get_or_try_init(py, || {
            py.import("torch.utils.dlpack")?.getattr("from_dlpack").map(Bound::unbind)
        })?;
        let from_capsule = from_capsule.bind(py);
        if let (2, number) = self.device()? {
            self.read_by(Some(torch_stream(py, number)?));
        }
        let convert = |of_bytes| {
            let capsule = self.capsule(py, self.bytes(py)?, of_bytes, false)?;
            from_capsule.call1((capsule,))
        };
        let known = TYPES.iter().find(|known| known.0 == self.dtype());
        let Some((dtype, names, ..)) =
            known.filter(|(dtype, _, code, _)| dtype.bits() == 8 && *code >= 10)
        else {
            return convert(false);
        };
        // Older versions of torch take some types by DLPack as bytes only.
        static AS_BYTES: Mutex<Vec<DType>> = Mutex::new(Vec::new());
        if !lock(&AS_BYTES).contains(dtype) {
            match convert(false) {
                Ok(tensor) => return Ok(tensor),
                Err(_) => lock(&AS_BYTES).push(*dtype),
            }
        }
        let dtype = py.import(intern!(py, "torch"))?.getattr(names[0])?;
        convert(true)?.call_method1(intern!(py, "view"), (dtype,))
    }

    fn dtype(&self) -> DType {
        self.weight.meta().dtype
    }

    fn bytes(&self, py: Python<'_>) -> PyResult<Storage> {
        match self.weight.storage() {
            Some(storage) => Ok(storage.clone()),
            // It is strided: the caller gets a packed copy.
            None => py.detach(|| self.weight.to_bytes()).or_raise(py).map(Storage::from),
        }
    }

    fn host(&self, py: Python<'_>) -> PyResult<Bytes> {
        match self.bytes(py)? {
            Storage::Host(bytes) => Ok(bytes),
            Storage::Device(bytes) => {
                let device = bytes.memory().device();
                Err(PyBufferError::new_err(format!("the tensor is on {device}: use DLPack")))
            }
        }
    }

    fn device(&self) -> PyResult<(i32, i32)> {
        let Some(Storage::Device(_)) = self.weight.storage() else { return Ok((1, 0)) };
        let slice = self.weight.storage().and_then(CudaSlice::of_storage);
        let slice = slice.ok_or_else(|| PyBufferError::new_err("its device has no number"))?;
        Ok((2, slice.device().ordinal()))
    }

    fn sides(&self) -> PyResult<Vec<i64>> {
        let sides = self.weight.meta().shape.iter().map(|&side| i64::try_from(side));
        sides.collect::<std::result::Result<_, _>>().map_err(|_| PyValueError::new_err("too large"))
    }

    fn typestr(&self) -> Option<String> {
        let &(dtype, .., kind) = TYPES.iter().find(|known| known.0 == self.dtype())?;
        let size = dtype.bytes()?;
        let order = if size == 1 { '|' } else { '<' };
        (kind != ' ').then(|| format!("{order}{kind}{size}"))
    }
}

#[pymethods]
impl Tensor {
    /// A view of an object's memory, with another type and shape where they are given.
    #[new]
    #[pyo3(signature = (data, dtype=None, shape=None))]
    fn make(
        py: Python<'_>,
        data: &Bound<'_, PyAny>,
        dtype: Option<&str>,
        shape: Option<Vec<u64>>,
    ) -> PyResult<Self> {
        let name = "tensor";
        let known = |text: &str| {
            named(text).ok_or_else(|| PyValueError::new_err(format!("no type is named {text:?}")))
        };
        let dtype = dtype.map(known).transpose()?;
        if let (Some(dtype), true) = (dtype, is_plain_buffer(data)?) {
            let bytes = ffi::buffer(data)?;
            let size = dtype.bytes().unwrap_or(1);
            let shape = shape.unwrap_or_else(|| vec![bytes.len() as u64 / size]);
            return Ok(Self::new(Weight::new(name, dtype, shape, bytes).or_raise(py)?));
        }
        let mut reader = Reader::default();
        let weight = reader.weight(name, data).or_raise(py)?;
        reader.synchronize(py).or_raise(py)?;
        if dtype.is_none() && shape.is_none() {
            return Ok(Self::new(weight));
        }
        let Some(storage) = weight.storage() else {
            return Err(PyValueError::new_err("a tensor that is not contiguous has no other view"));
        };
        let dtype = dtype.unwrap_or(weight.meta().dtype);
        let shape = shape.unwrap_or_else(|| weight.meta().shape.to_vec());
        Ok(Self::new(Weight::new(name, dtype, shape, storage.clone()).or_raise(py)?))
    }

    /// The name that it was received by.
    #[getter]
    fn name(&self) -> &str {
        self.weight.name()
    }

    #[getter(dtype)]
    fn dtype_name(&self) -> &'static str {
        self.dtype().name()
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.weight.meta().shape.iter())
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.weight.byte_len()
    }

    /// `cpu`, or `cuda:0`.
    #[getter(device)]
    fn device_name(&self) -> String {
        match self.weight.storage() {
            Some(Storage::Device(bytes)) => bytes.memory().device(),
            _ => "cpu".into(),
        }
    }

    fn __repr__(&self) -> String {
        let meta = self.weight.meta();
        format!("<ckpt_engine.Tensor {} {:?} on {}>", meta.dtype, meta.shape, self.device_name())
    }

    fn __dlpack_device__(&self) -> PyResult<(i32, i32)> {
        self.device()
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let device = self.device()?;
        if dl_device.is_some_and(|wanted| wanted != device) {
            return Err(PyBufferError::new_err("the tensor is on another device; copy it there"));
        }
        // Whatever wrote the bytes was waited for before they were verified: every stream may read them. When the
        // bucket goes back depends on the stream.
        self.read_by(match stream.map(|stream| stream.extract::<i64>()).transpose()? {
            None => Some(1), // DLPack's words for it: the default stream.
            Some(stream @ (0 | 1 | 3..)) => Some(stream as usize),
            Some(_) => None, // Unknown, or the calling thread's own.
        });
        let mut bytes = self.bytes(py)?;
        if copy == Some(true) {
            let host = self.host(py)?;
            bytes = py.detach(|| Storage::from(host.to_vec()));
        }
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        self.capsule(py, bytes, false, versioned)
    }

    /// What numpy reads without a copy; not there for types that numpy does not have.
    #[getter]
    fn __array_interface__<'py>(
        slf: &Bound<'py, Self>,
        py: Python<'py>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let this = slf.get();
        let Some(typestr) = this.typestr() else {
            let message = format!(
                "numpy has no type for {}: use `.torch()`, or `.numpy()` with the package ml_dtypes",
                this.dtype()
            );
            return Err(pyo3::exceptions::PyAttributeError::new_err(message));
        };
        if this.weight.storage().is_none() {
            return Err(pyo3::exceptions::PyAttributeError::new_err("it is not contiguous"));
        }
        let bytes = this.host(py)?;
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", typestr)?;
        interface.set_item("shape", this.shape(py)?)?;
        interface.set_item("data", (bytes.as_ptr().expose_provenance(), true))?;
        Ok(interface)
    }

    /// A tensor of torch over the same memory, which it keeps. torch knows no read-only memory: do not write to it.
    #[pyo3(name = "torch")]
    fn to_torch<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.torch(py)
    }

    /// An array of numpy over the same memory, read-only, which it keeps. BF16 and FP8 need the package ml_dtypes.
    fn numpy<'py>(slf: &Bound<'py, Self>, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let numpy = py.import(intern!(py, "numpy"))?;
        let this = slf.get();
        if this.typestr().is_some() {
            return numpy.call_method1(intern!(py, "asarray"), (slf,));
        }
        let known = TYPES.iter().find(|known| known.0 == this.dtype());
        let name = known.map_or("", |known| known.1[0]);
        let types = py.import("ml_dtypes").map_err(|_| {
            let dtype = this.dtype();
            PyTypeError::new_err(format!("numpy has {dtype} only with the package ml_dtypes"))
        })?;
        let (bytes, shape) = (this.bytes(py)?, vec![this.nbytes()]);
        let weight = Weight::new(this.weight.name(), DType::U8, shape, bytes).or_raise(py)?;
        let bytes = Bound::new(py, Self::new(weight))?;
        let array = numpy.call_method1(intern!(py, "asarray"), (bytes,))?;
        let array = array.call_method1("view", (types.getattr(name)?,))?;
        array.call_method1("reshape", (this.shape(py)?,))
    }

    /// A copy of its bytes.
    fn tobytes(&self, py: Python<'_>) -> PyResult<Py<pyo3::types::PyBytes>> {
        let bytes = self.host(py)?;
        Ok(pyo3::types::PyBytes::new(py, &bytes).unbind())
    }
}

/// Whether an object has a buffer and no types of its own: `bytes`, `bytearray`, `memoryview`, `mmap`.
fn is_plain_buffer(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let class = object.get_type();
    Ok(!class.hasattr("__dlpack__")? && !class.hasattr("dtype")?)
}

/// Splits an item of a program's stream.
pub(crate) fn item<'py>(
    item: &Bound<'py, PyAny>,
) -> PyResult<(Bound<'py, pyo3::types::PyString>, Bound<'py, PyAny>)> {
    let wrong = || {
        let message =
            format!("the stream has to yield (name, tensor), and yielded {}", class_name(item));
        PyTypeError::new_err(message)
    };
    let pair = if let Ok(pair) = item.cast::<PyTuple>() {
        (pair.len() == 2).then(|| Ok::<_, PyErr>((pair.get_item(0)?, pair.get_item(1)?)))
    } else if let Ok(pair) = item.cast::<PyList>() {
        (pair.len() == 2).then(|| Ok((pair.get_item(0)?, pair.get_item(1)?)))
    } else {
        None
    };
    let (name, tensor) = pair.ok_or_else(wrong)??;
    Ok((name.cast_into().map_err(|_| wrong())?, tensor))
}

/// A weight made of an item of a program's stream.
pub(crate) fn weight(
    reader: &mut Reader,
    py: Python<'_>,
    name: &Bound<'_, pyo3::types::PyString>,
    tensor: &Bound<'_, PyAny>,
) -> PyResult<Weight> {
    let name = name.to_str()?;
    reader.weight(name, tensor).map_err(|error| exception(py, &error))
}

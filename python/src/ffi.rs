//! Memory of Python's objects, and capsules of DLPack. All `unsafe` of this crate is here.
#![allow(unsafe_code, reason = "pointers that Python and other libraries hand over")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{NonNull, null_mut};

use bytes::Bytes;
use engine_core::{Result as EngineResult, Storage, Weight};
use pyo3::exceptions::PyBufferError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

const PLAIN: &CStr = c"dltensor";
const PLAIN_USED: &CStr = c"used_dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";

/// Host memory of a Python object, which it keeps.
///
/// The object is given back whenever the last view is dropped, on any thread: where that has no interpreter,
/// PyO3 keeps it until the next thread that has.
struct OfObject {
    address: usize,
    len: usize,
    _owner: Py<PyAny>,
}

impl AsRef<[u8]> for OfObject {
    fn as_ref(&self) -> &[u8] {
        let start = std::ptr::with_exposed_provenance::<u8>(self.address);
        // SAFETY: `of_object` was promised that there are so many bytes as long as the owner lives, which
        // this keeps, and that nobody writes to them while they are read.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

/// The bytes at an address of the host, which belong to a Python object.
///
/// # Safety
///
/// There are `len` bytes at `address` as long as `owner` lives, and nobody writes to them while a view is read. A program promises the
/// second: of weights that it sends, which are unchanged while they are sent, and of tensors that it lends, which are read between
/// updates.
pub(crate) unsafe fn of_object(address: usize, len: usize, owner: Py<PyAny>) -> Bytes {
    if len == 0 {
        Bytes::new()
    } else {
        Bytes::from_owner(OfObject { address, len, _owner: owner })
    }
}

/// Host memory of a Python object, which it keeps, to be written to.
#[derive(Debug)]
pub(crate) struct Writable {
    address: usize,
    len: usize,
    _owner: Py<PyAny>,
}

impl Writable {
    /// # Safety
    ///
    /// There are `len` bytes at `address` as long as `owner` lives, and they may be written to. Nobody else uses them while a
    /// slice of [`bytes`](Self::bytes) lives.
    pub(crate) unsafe fn new(address: usize, len: usize, owner: Py<PyAny>) -> Self {
        Self { address, len, _owner: owner }
    }

    /// The addresses that it has.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.address as u64..(self.address + self.len) as u64
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        if self.len == 0 {
            return &mut [];
        }
        let start = std::ptr::with_exposed_provenance_mut::<u8>(self.address);
        // SAFETY: `new` was promised that there are so many bytes which nobody else uses, and the slice borrows this.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

/// `Py_buffer`, as it has been since Python 3.3. The stable ABI has it from 3.11 on, the interpreters
/// before that have it all the same.
#[repr(C)]
struct PyBuffer {
    buf: *mut c_void,
    obj: *mut pyo3::ffi::PyObject,
    len: isize,
    itemsize: isize,
    readonly: c_int,
    ndim: c_int,
    format: *mut c_char,
    shape: *mut isize,
    strides: *mut isize,
    suboffsets: *mut isize,
    internal: *mut c_void,
}

unsafe extern "C" {
    fn PyObject_GetBuffer(
        object: *mut pyo3::ffi::PyObject,
        view: *mut PyBuffer,
        flags: c_int,
    ) -> c_int;
    fn PyBuffer_Release(view: *mut PyBuffer);
}

/// An object's buffer, contiguous, which stays exported as long as this lives.
#[pyclass(frozen)]
pub(crate) struct HeldBuffer(Box<PyBuffer>);

impl std::fmt::Debug for HeldBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldBuffer").field("len", &self.0.len).finish_non_exhaustive()
    }
}

// SAFETY: the structure is written to when it is made and when it is dropped, and Python drops objects
// only on threads that have the interpreter.
unsafe impl Send for HeldBuffer {}
// SAFETY: as above.
unsafe impl Sync for HeldBuffer {}

impl Drop for HeldBuffer {
    fn drop(&mut self) {
        // SAFETY: `PyObject_GetBuffer` filled it, and it is released once, by a thread that has the interpreter.
        unsafe { PyBuffer_Release(&raw mut *self.0) };
    }
}

/// The bytes of an object that has the buffer protocol, contiguous, without a copy.
///
/// # Errors
///
/// Python's, where it has no such buffer.
pub(crate) fn buffer(object: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    let mut view = Box::new(PyBuffer {
        buf: null_mut(),
        obj: null_mut(),
        len: 0,
        itemsize: 0,
        readonly: 0,
        ndim: 0,
        format: null_mut(),
        shape: null_mut(),
        strides: null_mut(),
        suboffsets: null_mut(),
        internal: null_mut(),
    });
    const SIMPLE: c_int = 0;
    // SAFETY: the object lives, and the structure is the one that Python fills.
    let status = unsafe { PyObject_GetBuffer(object.as_ptr(), &raw mut *view, SIMPLE) };
    if status != 0 {
        return Err(PyErr::fetch(object.py()));
    }
    let (address, len) = (view.buf.expose_provenance(), view.len);
    let owner = Bound::new(object.py(), HeldBuffer(view))?.into_any().unbind();
    let len = usize::try_from(len).map_err(|_| PyBufferError::new_err("a negative length"))?;
    // SAFETY: the buffer has so many bytes until it is released, which is when the owner goes.
    Ok(unsafe { of_object(address, len, owner) })
}

/// The tensor in a capsule that an object's `__dlpack__` returned, as a weight.
///
/// # Errors
///
/// Python's, if it is no capsule of DLPack or was taken before; the inner ones are those of
/// [`device_cuda::dlpack::weight`].
pub(crate) fn of_capsule(name: &str, capsule: &Bound<'_, PyAny>) -> PyResult<EngineResult<Weight>> {
    let capsule = capsule.cast::<PyCapsule>()?;
    let tensor = capsule.pointer_checked(Some(PLAIN))?.cast::<device_cuda::dlpack::ManagedTensor>();
    // SAFETY: the capsule lives, and the name is static.
    let renamed = unsafe { pyo3::ffi::PyCapsule_SetName(capsule.as_ptr(), PLAIN_USED.as_ptr()) };
    if renamed != 0 {
        return Err(PyErr::fetch(capsule.py()));
    }
    // SAFETY: DLPack says that a capsule of this name has such a tensor, and the new name that it was taken.
    // Programs promise that weights are unchanged while they are sent, and `__dlpack__` was given the stream
    // whose work is waited for before the weight is used.
    Ok(unsafe { device_cuda::dlpack::weight(name, tensor) })
}

/// `DLTensor`.
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLPackExchangeAPI`, since version 1.3: what a library has for its class of tensors. Later minor versions only add to it.
#[repr(C)]
struct ExchangeTable {
    major: u32,
    minor: u32,
    previous: *const Self,
    allocate: *const c_void,
    export: *const c_void,
    import: *const c_void,
    describe: Option<Describe>,
    current_stream: Option<CurrentStream>,
}

type Describe = unsafe extern "C" fn(*mut pyo3::ffi::PyObject, *mut Tensor) -> c_int;
type CurrentStream = unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int;

/// Functions of a library that say what a tensor of a class is, without an object of Python for each thing that they say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exchange {
    describe: Describe,
    current_stream: CurrentStream,
}

/// A tensor as its library describes it, in DLPack's numbers.
#[derive(Debug)]
pub(crate) struct Seen<'a> {
    pub(crate) address: usize,
    /// Kind and number.
    pub(crate) device: (i32, i32),
    /// Code, bits and lanes.
    pub(crate) dtype: (u8, u8, u16),
    pub(crate) shape: &'a [i64],
    /// In elements; none where they are contiguous.
    pub(crate) strides: Option<&'a [i64]>,
}

impl Exchange {
    /// Those of a class, if it has them in a version that is known here.
    pub(crate) fn of_class(class: &Bound<'_, pyo3::types::PyType>) -> PyResult<Option<Self>> {
        let Some(capsule) = class.getattr_opt(intern!(class.py(), "__dlpack_c_exchange_api__"))?
        else {
            return Ok(None);
        };
        // It was a number before that version.
        let Ok(capsule) = capsule.cast::<PyCapsule>() else { return Ok(None) };
        let table = capsule.pointer_checked(Some(c"dlpack_exchange_api"))?.cast::<ExchangeTable>();
        // SAFETY: DLPack says that a capsule of this name has such a table, for as long as the process lives.
        let table = unsafe { table.as_ref() };
        Ok(match (table.major, table.describe, table.current_stream) {
            (1, Some(describe), Some(current_stream)) => Some(Self { describe, current_stream }),
            _ => None,
        })
    }

    /// What a tensor of the class is; nothing is said about whether the work is done that fills it.
    ///
    /// # Errors
    ///
    /// Python's, for a tensor that DLPack has no words for.
    pub(crate) fn describe<R>(
        &self,
        tensor: &Bound<'_, PyAny>,
        look: impl FnOnce(Seen<'_>) -> R,
    ) -> PyResult<R> {
        let mut seen = Tensor {
            data: null_mut(),
            device_type: 0,
            device_id: 0,
            ndim: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            shape: null_mut(),
            strides: null_mut(),
            byte_offset: 0,
        };
        // SAFETY: the tensor is one of the class that the function came from, and this thread has the interpreter.
        if unsafe { (self.describe)(tensor.as_ptr(), &raw mut seen) } != 0 {
            return Err(PyErr::fetch(tensor.py()));
        }
        let ndim = usize::try_from(seen.ndim).unwrap_or(0);
        let numbers = |of: *mut i64| {
            // SAFETY: DLPack says that there are so many, until the tensor is changed: nothing runs before `look` returns
            // that could.
            NonNull::new(of).map(|of| unsafe { std::slice::from_raw_parts(of.as_ptr(), ndim) })
        };
        let shape = if ndim == 0 { Some(&[][..]) } else { numbers(seen.shape) };
        let no_shape = || PyBufferError::new_err("a tensor without a shape");
        Ok(look(Seen {
            address: seen.data.expose_provenance() + seen.byte_offset as usize,
            device: (seen.device_type, seen.device_id),
            dtype: (seen.code, seen.bits, seen.lanes),
            shape: shape.ok_or_else(no_shape)?,
            strides: if ndim == 0 { None } else { numbers(seen.strides) },
        }))
    }

    /// The handle of the stream of a device that is the library's current one on this thread.
    ///
    /// # Errors
    ///
    /// Python's, if there is no such device.
    pub(crate) fn current_stream(
        &self,
        py: Python<'_>,
        (kind, number): (i32, i32),
    ) -> PyResult<usize> {
        let mut stream = null_mut();
        // SAFETY: this thread has the interpreter, and the function writes one pointer.
        if unsafe { (self.current_stream)(kind, number, &raw mut stream) } != 0 {
            return Err(PyErr::fetch(py));
        }
        Ok(stream.expose_provenance())
    }
}

/// `DLManagedTensor`, as before version 1.
#[repr(C)]
struct Plain {
    tensor: Tensor,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
    flags: u64,
    tensor: Tensor,
}

const READ_ONLY: u64 = 1;

/// A managed tensor, with everything that it points to.
#[repr(C)]
struct Exported<M> {
    managed: M,
    shape: Vec<i64>,
    strides: Vec<i64>,
    _bytes: Storage,
}

unsafe extern "C" fn delete<M>(managed: *mut M) {
    // SAFETY: `managed` is the first field of an `Exported` that came from `Box::into_raw`, and DLPack says
    // that the deleter is called once.
    drop(unsafe { Box::from_raw(managed.cast::<Exported<M>>()) });
}

unsafe extern "C" fn forget<M: Managed>(capsule: *mut pyo3::ffi::PyObject) {
    // SAFETY: Python calls it with the capsule that it destroys.
    let taken = unsafe { pyo3::ffi::PyCapsule_IsValid(capsule, M::NAME.as_ptr()) } == 0;
    if taken {
        return; // The library that took the tensor gives it back.
    }
    // SAFETY: it was just seen that the capsule is one of this name, so with a tensor of `export`.
    let tensor = unsafe { pyo3::ffi::PyCapsule_GetPointer(capsule, M::NAME.as_ptr()) };
    if !tensor.is_null() {
        // SAFETY: nobody has taken it.
        unsafe { delete::<M>(tensor.cast()) };
    }
}

trait Managed: Sized {
    const NAME: &'static CStr;
    fn new(tensor: Tensor) -> Self;
    fn tensor(&mut self) -> &mut Tensor;
}

impl Managed for Plain {
    const NAME: &'static CStr = PLAIN;
    fn new(tensor: Tensor) -> Self {
        Self { tensor, manager: null_mut(), deleter: Some(delete::<Self>) }
    }
    fn tensor(&mut self) -> &mut Tensor {
        &mut self.tensor
    }
}

impl Managed for Versioned {
    const NAME: &'static CStr = VERSIONED;
    fn new(tensor: Tensor) -> Self {
        let (manager, deleter) = (null_mut(), Some(delete::<Self> as _));
        Self { major: 1, minor: 0, manager, deleter, flags: READ_ONLY, tensor }
    }
    fn tensor(&mut self) -> &mut Tensor {
        &mut self.tensor
    }
}

/// What a tensor is, in DLPack's numbers.
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) address: u64,
    /// Kind and number.
    pub(crate) device: (i32, i32),
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) shape: Vec<i64>,
}

/// A capsule with a tensor that keeps its bytes; the versioned one says that they are read-only.
///
/// # Errors
///
/// Python's, where it has no memory.
pub(crate) fn export<'py>(
    py: Python<'py>,
    bytes: Storage,
    description: Description,
    versioned: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if versioned {
        capsule::<Versioned>(py, bytes, description)
    } else {
        capsule::<Plain>(py, bytes, description)
    }
}

fn capsule<'py, M: Managed>(
    py: Python<'py>,
    bytes: Storage,
    Description { address, device: (device_type, device_id), code, bits, shape }: Description,
) -> PyResult<Bound<'py, PyAny>> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i].max(1);
    }
    let tensor = Tensor {
        data: std::ptr::with_exposed_provenance_mut(address as usize),
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
    let mut exported =
        Box::new(Exported { managed: M::new(tensor), shape, strides, _bytes: bytes });
    let (shape, strides) = (exported.shape.as_mut_ptr(), exported.strides.as_mut_ptr());
    exported.managed.tensor().shape = shape;
    exported.managed.tensor().strides = strides;
    let exported = NonNull::from(Box::leak(exported)).cast::<c_void>();
    let name = M::NAME.as_ptr();
    // SAFETY: the interpreter is there, the name is static, the destructor is one for such a tensor.
    let capsule = unsafe { pyo3::ffi::PyCapsule_New(exported.as_ptr(), name, Some(forget::<M>)) };
    if capsule.is_null() {
        // SAFETY: nobody else has it.
        unsafe { delete::<M>(exported.as_ptr().cast()) };
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a new reference to an object, not null.
    Ok(unsafe { Bound::from_owned_ptr(py, capsule) })
}

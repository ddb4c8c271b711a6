//! CUDA for checkpoint engines: memory, streams, sharing between processes, and the kernels that fill
//! and read buckets.
//!
//! Nothing is linked: the driver and the compiler of the kernels are loaded at run time, and without them calls return an error. Start with
//! [`Device::open`]. [`Kernels::encode`] copies and quantises all weights of a bucket in one launch. [`MEMORY`] is the kind of memory for
//! transports.

#![deny(unsafe_code)]

mod arena;
mod bucket;
mod copy_out;
mod delta;
mod device;
pub mod dlpack;
mod error;
mod ffi;
mod kernels;
mod ledger;
mod placed;
mod programs;
mod provider;
mod release;
mod resident;
mod storage;
mod table;
mod tensors;
mod turns;
mod work;

pub use arena::CudaArena;
pub use bucket::{Packer, Places};
pub use copy_out::CudaCopyOut;
pub use delta::CudaShadows;
pub use device::{
    CudaMemory, CudaSlice, Device, Event, ForeignStream, IpcHandle, Pending, PinnedMemory, Stream,
    count, driver_version, keeping_current,
};
pub use error::CudaError;
pub use kernels::{Kernels, Launch, Prepared, Ran, compile, compile_program, local_memory, nvrtc};
pub use placed::{Check, CudaSpace, Failed, Found, Maxima, Placer, Write, places};
pub use provider::{MEMORY, export, import, reachable};
pub use release::CollectiveUnderWay;
pub use storage::{bucket_storage, upload};
pub use table::DeviceJob;
pub use tensors::CudaTensorMap;

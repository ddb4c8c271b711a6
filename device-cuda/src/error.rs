//! Errors of CUDA, and their conversion.

use engine_core::{Error, ErrorKind};

/// A failure of the driver or of the compiler.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver on this machine.
    #[error("there is no CUDA driver (libcuda.so.1): install NVIDIA's driver")]
    NoDriver,
    /// There is no such device.
    #[error("there is no CUDA device {ordinal}, of {count} that CUDA_VISIBLE_DEVICES leaves")]
    NoDevice {
        /// The requested number.
        ordinal: i32,
        /// The number of devices.
        count: i32,
    },
    /// The driver refused a call.
    #[error("{call}: {words} ({code})")]
    Driver {
        /// The function.
        call: &'static str,
        /// Its status.
        code: u32,
        /// The status in words.
        words: String,
    },
    /// There is no compiler for the kernels.
    #[error(
        "NVRTC cannot be loaded ({reason}): install the CUDA toolkit or the wheel \
         nvidia-cuda-nvrtc, and name its folder in CKPT_ENGINE_NVRTC_DIR"
    )]
    NoCompiler {
        /// The reason.
        reason: String,
    },
    /// The compiler refused a kernel.
    #[error("{call}: {log}")]
    Compiler {
        /// The function.
        call: &'static str,
        /// The compiler's log.
        log: String,
    },
    /// Arguments that contradict each other.
    #[error("{0}")]
    Range(String),
    /// A block of a weight has no finite form in FP8.
    #[error("block {block} of job {job} has no finite FP8 form: it holds NaN or infinity")]
    NonFinite {
        /// Which of the jobs.
        job: usize,
        /// Which block of it, counted row by row over all matrices.
        block: usize,
    },
}

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;

impl From<CudaError> for Error {
    fn from(error: CudaError) -> Self {
        let kind = match &error {
            CudaError::NoDriver | CudaError::NoDevice { .. } | CudaError::NoCompiler { .. } => {
                ErrorKind::Backend
            }
            CudaError::Driver { code: OUT_OF_MEMORY, .. } => ErrorKind::Resource,
            CudaError::Driver { .. } | CudaError::Compiler { .. } => ErrorKind::Io,
            CudaError::Range(_) => ErrorKind::State,
            CudaError::NonFinite { .. } => ErrorKind::Weight,
        };
        Self::new(kind, "using CUDA", error.to_string())
    }
}

//! The kernels: compiled for the device that is there, launched over job tables.

use std::ffi::{CStr, CString};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::OnceLock;

use engine_core::digest;
use quant_fp8::Fp8Format;
use sha2::{Digest as _, Sha256};

use crate::table::{Table, mode_number};
use crate::{CudaError, CudaMemory, CudaSlice, Device, DeviceJob, PinnedMemory, Stream, ffi};

const SOURCE: &str = include_str!("../kernels/bucket.cu");

/// The folder that has NVRTC, where it is not on the loader's path.
const FOLDER_VARIABLE: &str = "CKPT_ENGINE_NVRTC_DIR";

/// Threads of a block; as `THREADS` in the kernels.
const THREADS: u32 = 256;

/// The source, with the digest's keys put in.
fn source() -> Result<CString, CudaError> {
    let keys = digest::keys();
    let mut text = SOURCE.to_owned();
    for (name, values) in [
        ("@LOW@", keys.low),
        ("@HIGH@", keys.high),
        ("@LOW_STEP@", keys.low_step),
        ("@HIGH_STEP@", keys.high_step),
    ] {
        let list = values.iter().fold(String::new(), |mut list, key| {
            // Writing to a string cannot fail.
            write!(list, "{key:#x}u,").ok();
            list
        });
        text = text.replace(name, &list);
    }
    CString::new(text).map_err(|error| CudaError::Range(error.to_string()))
}

/// Options that decide the bytes of results: no contraction of products and sums, correctly rounded
/// division, subnormal numbers kept.
fn options(capability: (i32, i32)) -> Vec<String> {
    let (major, minor) = capability;
    vec![
        format!("--gpu-architecture=sm_{major}{minor}"),
        "--std=c++17".into(),
        "--fmad=false".into(),
        "--ftz=false".into(),
        "--prec-div=true".into(),
    ]
}

/// Compiles the kernels for a compute capability, without any device.
///
/// # Errors
///
/// [`CudaError::NoCompiler`], and [`CudaError::Compiler`] with NVRTC's log.
pub fn compile(capability: (i32, i32)) -> Result<Vec<u8>, CudaError> {
    nvrtc()?;
    let options: Vec<CString> = options(capability)
        .into_iter()
        .map(|option| CString::new(option).unwrap_or_default())
        .collect();
    ffi::compile(&source()?, c"bucket.cu", &options)
}

/// NVRTC's version, once it is loaded.
///
/// # Errors
///
/// [`CudaError::NoCompiler`].
pub fn nvrtc() -> Result<(i32, i32), CudaError> {
    static LOADED: OnceLock<Result<(i32, i32), String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        if let Some(folder) = std::env::var_os(FOLDER_VARIABLE) {
            let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            let files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
            // The compiler looks for its built-in headers by name, on the loader's path.
            for prefix in ["libnvrtc-builtins.so", "libnvrtc.so"] {
                let is_it = |path: &&PathBuf| {
                    path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix))
                };
                let Some(library) = files.iter().find(is_it) else {
                    return Err(format!("no {prefix} in {}", folder.display()));
                };
                ffi::preload_nvrtc(library).map_err(|error| error.to_string())?;
            }
        }
        if !ffi::nvrtc_is_present() {
            return Err("libnvrtc.so is not on the loader's path".into());
        }
        ffi::nvrtc_version().map_err(|error| error.to_string())
    });
    loaded.clone().map_err(|reason| CudaError::NoCompiler { reason })
}

/// The compiled kernels of this source for a device: from the cache, or compiled and put there.
fn image(capability: (i32, i32)) -> Result<Vec<u8>, CudaError> {
    let mut hash = Sha256::new();
    hash.update(source()?.as_bytes());
    hash.update(options(capability).join(" "));
    let name = hash.finalize().iter().fold(String::new(), |mut name, byte| {
        write!(name, "{byte:02x}").ok();
        name
    });
    let folder = cache_folder();
    let path = folder.as_ref().map(|folder| folder.join(format!("{name}.cubin")));
    if let Some(image) = path.as_ref().and_then(|path| std::fs::read(path).ok()) {
        return Ok(image);
    }
    let image = compile(capability)?;
    if let (Some(folder), Some(path)) = (folder, path) {
        // A cache that cannot be written costs the next start a second; nothing else.
        let kept = std::fs::create_dir_all(&folder)
            .and_then(|()| tempfile::NamedTempFile::new_in(&folder))
            .and_then(|mut file| {
                std::io::Write::write_all(&mut file, &image)?;
                file.persist(&path).map_err(|error| error.error)
            });
        if let Err(error) = kept {
            tracing::debug!(%error, path = %path.display(), "the kernels are not cached");
        }
    }
    Ok(image)
}

fn cache_folder() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(cache.join("ckpt-engine"))
}

/// The kernels on a device, and the memory that their job tables travel through.
#[derive(Debug)]
pub struct Kernels {
    device: Device,
    module: ffi::Module,
    encode: Kernel,
    encode_wide: Kernel,
    digest: Kernel,
    staging: PinnedMemory,
    table: CudaMemory,
    /// Two results of 8 bytes: the first block that is not finite, and the digest's sum.
    results: CudaMemory,
}

#[derive(Clone, Copy, Debug)]
struct Kernel {
    function: ffi::Function,
    /// As many blocks as the device runs at a time.
    grid: u32,
}

#[allow(unsafe_code, reason = "the driver's handles are not bound to threads")]
mod send {
    // SAFETY: modules and functions may be used from any thread; launches take `&mut self`.
    unsafe impl Send for super::Kernels {}
}

impl Kernels {
    /// Loads the kernels, compiling them if it is the first time on such a device.
    ///
    /// # Errors
    ///
    /// Those of [`compile`], and what the driver reports.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let image = image(device.capability())?;
        device.enter()?;
        let module = ffi::load_module(&image)?;
        let kernel = |name: &CStr| -> Result<Kernel, CudaError> {
            let function = ffi::function(module, name)?;
            let blocks = ffi::blocks_per_multiprocessor(function, THREADS)?.unsigned_abs().max(1);
            Ok(Kernel { function, grid: blocks * device.multiprocessors() })
        };
        const TABLE: usize = 1 << 20;
        let results = CudaMemory::new(device, 16)?;
        results.all().write(&[0xff; 16])?;
        Ok(Self {
            device: device.clone(),
            module,
            encode: kernel(c"encode")?,
            encode_wide: kernel(c"encode_wide")?,
            digest: kernel(c"digest")?,
            staging: PinnedMemory::new(device, TABLE)?,
            table: CudaMemory::new(device, TABLE)?,
            results,
        })
    }

    /// Does all jobs in one launch on a stream: fills a bucket, or copies one out into tensors.
    ///
    /// # Contract
    ///
    /// The jobs' targets do not overlap. All memory stays allocated until the stream has done the work,
    /// and is not written to meanwhile. Waits for the stream's earlier work before it begins.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] for jobs whose sizes contradict each other, and what the driver reports.
    /// Blocks that are not finite are reported by [`check`](Self::check).
    pub fn encode(
        &mut self,
        jobs: &[DeviceJob],
        format: &Fp8Format,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let prepared = self.prepare(jobs, format, None, stream)?;
        self.encode_prepared(&prepared, stream)
    }

    /// Brings the job table of a launch to the device, to be used any number of times. With the bucket
    /// that the targets lie in, the launch adds to the [digest sum](Self::sum) what it writes: all codes
    /// and copies in aligned places, and no scales.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn prepare(
        &mut self,
        jobs: &[DeviceJob],
        format: &Fp8Format,
        summed: Option<&CudaSlice>,
        stream: &Stream,
    ) -> Result<Prepared, CudaError> {
        let table = Table::of_jobs(jobs, format, summed.is_some())?;
        self.upload(&table, stream)?;
        let prepared = Prepared {
            table: self.table.clone(),
            tiles_at: table.tiles_at,
            tiles: table.tiles,
            mode: mode_number(format.mode),
            wide: table.wide,
            base: summed.map_or(0, CudaSlice::address),
        };
        Ok(prepared)
    }

    /// Does the jobs of a table that was prepared.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn encode_prepared(
        &mut self,
        prepared: &Prepared,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        if prepared.tiles == 0 {
            return Ok(());
        }
        let jobs = prepared.table.address();
        let mut parameters = [
            jobs,
            jobs + prepared.tiles_at as u64,
            prepared.tiles.into(),
            prepared.mode,
            self.results.address(),
            prepared.base,
        ];
        let kernel = if prepared.wide { self.encode_wide } else { self.encode };
        let grid = kernel.grid.min(prepared.tiles);
        self.device.enter()?;
        ffi::launch(kernel.function, grid, THREADS, stream.raw(), &mut parameters)
    }

    /// Sets the digest sum to 0, on a stream.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn reset_sum(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.results.slice(8, 8)?.fill(0, stream)
    }

    /// Adds parts of a bucket to the digest sum, each with its offset in the bucket, on a stream.
    ///
    /// # Contract
    ///
    /// As [`encode`](Self::encode).
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] for a part that does not begin at a multiple of 64 bytes, and what the
    /// driver reports.
    pub fn add_to_sum(
        &mut self,
        parts: &[(u64, CudaSlice)],
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let table = Table::of_parts(parts)?;
        if table.tiles == 0 {
            return Ok(());
        }
        self.upload(&table, stream)?;
        let sum = self.results.slice(8, 8)?;
        let jobs = self.table.address();
        let tiles = jobs + table.tiles_at as u64;
        let mut parameters = [jobs, tiles, table.tiles.into(), sum.address()];
        let grid = self.digest.grid.min(table.tiles);
        self.device.enter()?;
        ffi::launch(self.digest.function, grid, THREADS, stream.raw(), &mut parameters)
    }

    /// The digest sum of all that was added to it. Waits for the stream.
    ///
    /// # Errors
    ///
    /// What the driver reports, and what the work made go wrong.
    pub fn sum(&self, stream: &Stream) -> Result<u64, CudaError> {
        stream.synchronize()?;
        let mut bytes = [0; 8];
        self.results.slice(8, 8)?.read(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Waits for all launches of `encode` so far on the stream and says whether every block had a finite form.
    ///
    /// # Errors
    ///
    /// [`CudaError::NonFinite`] with the first that had none, and what the launch made go wrong.
    pub fn check(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.synchronize()?;
        let mut failed = [0; 8];
        let result = self.results.slice(0, 8)?;
        result.read(&mut failed)?;
        let failed = u64::from_le_bytes(failed);
        if failed == u64::MAX {
            return Ok(());
        }
        // Made ready for the next launches here, where it is rare, and not before each of them.
        result.write(&[0xff; 8])?;
        Err(CudaError::NonFinite {
            job: (failed >> 32) as usize,
            block: (failed & 0xffff_ffff) as usize,
        })
    }

    /// The digest sum of a bucket's parts, each with its offset in the bucket: the same as
    /// [`engine_core::digest::sum`] over them. Waits for the stream.
    ///
    /// # Errors
    ///
    /// As [`add_to_sum`](Self::add_to_sum).
    pub fn digest(
        &mut self,
        parts: &[(u64, CudaSlice)],
        stream: &Stream,
    ) -> Result<u64, CudaError> {
        self.reset_sum(stream)?;
        self.add_to_sum(parts, stream)?;
        self.sum(stream)
    }

    fn upload(&mut self, table: &Table, stream: &Stream) -> Result<(), CudaError> {
        let len = table.bytes.len();
        if len > self.staging.len() {
            let len = len.next_power_of_two();
            stream.synchronize()?;
            self.staging = PinnedMemory::new(&self.device, len)?;
            self.table = CudaMemory::new(&self.device, len)?;
        }
        self.staging.bytes(stream)?[..len].copy_from_slice(&table.bytes);
        self.staging.copy_to(0, &self.table.slice(0, len)?, stream)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if let Err(error) = self.device.enter().and_then(|()| ffi::unload(self.module)) {
            tracing::debug!(%error, "while unloading kernels");
        }
    }
}

/// A job table on the device; of the last [`Kernels::prepare`] only.
#[derive(Debug)]
pub struct Prepared {
    table: CudaMemory,
    tiles_at: usize,
    tiles: u32,
    mode: u64,
    /// Whether a job has F32 elements.
    wide: bool,
    /// Where the bucket begins, for the digest.
    base: u64,
}

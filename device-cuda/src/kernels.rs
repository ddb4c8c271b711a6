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

/// The most launches that run together.
const MOST_LAUNCHES: usize = 8;

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
    /// What is brought to the device: results as they begin, then tables.
    staging: PinnedMemory,
    table: CudaMemory,
    /// What comes back.
    results: PinnedMemory,
}

/// What a launch does.
#[derive(Clone, Copy, Debug)]
pub enum Launch<'a> {
    /// All jobs: fills a bucket, or copies one out into tensors. With the bucket that the targets lie in,
    /// it adds to the digest sum what it writes: all codes and copies in aligned places, and no scales.
    Encode {
        /// The jobs. Their targets do not overlap.
        jobs: &'a [DeviceJob],
        /// How they quantise.
        format: &'a Fp8Format,
        /// The bucket, if the digest is wanted.
        summed: Option<&'a CudaSlice>,
    },
    /// Adds parts of a bucket, each with its offset in the bucket, to the digest sum. They begin at
    /// multiples of 64 bytes.
    Digest(&'a [(u64, CudaSlice)]),
}

/// What launches that ran together found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// The digest sum of all that was added to it: the same as [`engine_core::digest::sum`] over it.
    pub sum: u64,
    /// The first launch with a block that has no finite form, and the error.
    pub failed: Option<(usize, usize, usize)>,
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
        Ok(Self {
            device: device.clone(),
            module,
            encode: kernel(c"encode")?,
            encode_wide: kernel(c"encode_wide")?,
            digest: kernel(c"digest")?,
            staging: PinnedMemory::new(device, TABLE)?,
            table: CudaMemory::new(device, TABLE)?,
            results: PinnedMemory::new(device, (1 + MOST_LAUNCHES) * 8)?,
        })
    }

    /// Runs launches one after the other on a stream, and waits for their end.
    ///
    /// Everything is handed to the device at once and waited for once: where processes take turns on a
    /// device, every further wait costs a turn.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] for jobs whose sizes contradict each other or for more than eight launches;
    /// what the driver reports, and what the work made go wrong.
    pub fn run(&mut self, launches: &[Launch<'_>], stream: &Stream) -> Result<Ran, CudaError> {
        let prepared = self.prepare(launches, stream)?;
        self.launch(&prepared, stream)?;
        let words = 1 + launches.len();
        let header = self.table.slice(0, words * 8)?;
        self.results.copy_from(&header, stream)?;
        let bytes = self.results.bytes(stream)?;
        let (found, _) = bytes.as_chunks::<8>();
        let mut found = found[..words].iter().map(|word| u64::from_le_bytes(*word));
        let sum = found.next().unwrap_or(0);
        let failed = found.enumerate().find(|(_, word)| *word != u64::MAX);
        let failed = failed.map(|(launch, word)| {
            (launch, (word >> 32) as usize, (word & u64::from(u32::MAX)) as usize)
        });
        Ok(Ran { sum, failed })
    }

    /// Does all jobs in one launch, and waits for its end.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run), and [`CudaError::NonFinite`] with the first block that has no finite form.
    pub fn encode(
        &mut self,
        jobs: &[DeviceJob],
        format: &Fp8Format,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let launch = Launch::Encode { jobs, format, summed: None };
        match self.run(&[launch], stream)?.failed {
            None => Ok(()),
            Some((_, job, block)) => Err(CudaError::NonFinite { job, block }),
        }
    }

    /// Brings the tables of launches to the device, to be launched any number of times until others are
    /// prepared.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn prepare(
        &mut self,
        launches: &[Launch<'_>],
        stream: &Stream,
    ) -> Result<Prepared, CudaError> {
        if launches.len() > MOST_LAUNCHES {
            return Err(CudaError::Range(format!("{} launches at once", launches.len())));
        }
        // The sum begins at 0, the failures at nothing.
        let mut bytes = vec![0xff; (1 + launches.len()) * 8];
        bytes[..8].fill(0);
        let mut parts = Vec::new();
        for launch in launches {
            bytes.resize(bytes.len().next_multiple_of(64), 0);
            let start = bytes.len();
            let (table, mode, base) = match *launch {
                Launch::Encode { jobs, format, summed } => {
                    let table = Table::of_jobs(&mut bytes, jobs, format, summed.is_some())?;
                    (table, Some(mode_number(format.mode)), summed.map_or(0, CudaSlice::address))
                }
                Launch::Digest(parts) => (Table::of_parts(&mut bytes, parts)?, None, 0),
            };
            parts.push(Part { start, table, mode, base });
        }
        if bytes.len() > self.staging.len() {
            let len = bytes.len().next_power_of_two();
            stream.synchronize()?;
            self.staging = PinnedMemory::new(&self.device, len)?;
            self.table = CudaMemory::new(&self.device, len)?;
        }
        self.staging.bytes(stream)?[..bytes.len()].copy_from_slice(&bytes);
        self.staging.copy_to(0, &self.table.slice(0, bytes.len())?, stream)?;
        Ok(Prepared { memory: self.table.clone(), parts })
    }

    /// Launches what was prepared, on a stream, and does not wait.
    ///
    /// # Contract
    ///
    /// All memory stays allocated until the stream has done the work, and is not written to meanwhile.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn launch(&mut self, prepared: &Prepared, stream: &Stream) -> Result<(), CudaError> {
        self.device.enter()?;
        let sum = prepared.memory.address();
        for (index, part) in (1..).zip(&prepared.parts) {
            let Part { start, table, mode, base } = part;
            if table.tiles == 0 {
                continue;
            }
            let jobs = prepared.memory.address() + *start as u64;
            let firsts = jobs + table.firsts_at as u64;
            let (count, tiles) = (table.jobs.into(), table.tiles.into());
            let (kernel, mut parameters) = match mode {
                Some(mode) => {
                    let kernel = if table.wide { self.encode_wide } else { self.encode };
                    (kernel, vec![jobs, firsts, count, tiles, *mode, sum + index * 8, sum, *base])
                }
                None => (self.digest, vec![jobs, firsts, count, tiles, sum]),
            };
            let grid = kernel.grid.min(table.tiles);
            ffi::launch(kernel.function, grid, THREADS, stream.raw(), &mut parameters)?;
        }
        Ok(())
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if let Err(error) = self.device.enter().and_then(|()| ffi::unload(self.module)) {
            tracing::debug!(%error, "while unloading kernels");
        }
    }
}

/// Launches whose tables are on the device; of the last [`Kernels::prepare`] only.
#[derive(Debug)]
pub struct Prepared {
    memory: CudaMemory,
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    /// Where its table begins.
    start: usize,
    table: Table,
    /// How it quantises; a digest does not.
    mode: Option<u64>,
    /// Where the bucket begins, for the digest.
    base: u64,
}

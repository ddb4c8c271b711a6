//! The kernels: compiled for the present device, launched over job tables.

mod ffi;

use std::any::Any;
use std::ffi::{CStr, CString};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use engine_core::{Program, digest};
use quant_fp8::Fp8Format;
use sha2::{Digest as _, Sha256};

use crate::ffi::{Compiler, Function, Image, Module};
use crate::programs::OWN;
use crate::resident::{Known, MOST_BYTES, Resident};
use crate::table::{Part, Table, Tables, Task, mode_number};
use crate::{CudaError, CudaMemory, CudaSlice, Device, DeviceJob, PinnedMemory, Stream};

const COMMON: &str = include_str!("../kernels/common.cuh");
const ROWS: &str = include_str!("../kernels/rows.cuh");
const BUCKET: &str = include_str!("../kernels/bucket.cu");
const PROGRAM: &str = include_str!("../kernels/program.cu");
const PLACED: &str = include_str!("../kernels/placed.cu");
const DELTA: &str = include_str!("../kernels/delta.cu");

/// The variable with the folder of NVRTC, if it is not on the loader's path.
const FOLDER_VARIABLE: &str = "CKPT_ENGINE_NVRTC_DIR";

/// The most launches that run together.
const MOST_LAUNCHES: usize = 64;

/// Threads of a block: `THREADS` of the kernels.
pub(crate) const THREADS: u32 = 256;

/// Bytes of shared memory for a block of `encode_odd`: `UNITS` of `Rows::UNIT` in the kernels.
const ODD_STAGE: u32 = 2 * 128 * (128 * 2 + 16);

/// Bytes of shared memory for a block of a kernel that copies through it: `STAGES` of `STAGE` in the kernels.
const BULK_STAGES: u32 = 4 * (16 << 10);

/// The first compute capability with the bulk engine, for which `copy_bulk` and `place_bulk` are compiled.
const BULK_CAPABILITY: (i32, i32) = (9, 0);

/// The kernels of buckets and of placed updates.
fn own() -> Result<CString, CudaError> {
    source(&[COMMON, quant_fp8::device::CUDA, ROWS, BUCKET, PLACED])
}

/// The kernels of deltas, which are compiled where there are any.
fn of_deltas() -> Result<CString, CudaError> {
    source(&[COMMON, DELTA])
}

/// The kernel of an encoding's program.
fn of_program(program: &Program) -> Result<CString, CudaError> {
    source(&[COMMON, program.source(), PROGRAM])
}

/// The source of kernels, with the digest's keys inserted.
fn source(parts: &[&str]) -> Result<CString, CudaError> {
    let keys = digest::keys();
    let mut text = parts.join("\n");
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

/// Options on which the bytes of results depend: no contraction of products and sums, correctly rounded division, subnormal numbers kept.
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

/// Compiles all kernels for a compute capability, without a device. Returns the image of the kernels of buckets and of placed updates.
///
/// # Errors
///
/// [`CudaError::NoCompiler`], and [`CudaError::Compiler`] with NVRTC's log.
pub fn compile(capability: (i32, i32)) -> Result<Vec<u8>, CudaError> {
    for program in OWN {
        compile_program(program, capability)?;
    }
    compiled(&of_deltas()?, capability)?;
    compiled(&own()?, capability).map(Image::into_bytes)
}

/// Compiles the kernel of an encoding's [program](engine_core::Program) for a compute capability, without a device. The module `programs`
/// documents the source of a program.
///
/// # Errors
///
/// Those of [`compile`].
pub fn compile_program(program: &Program, capability: (i32, i32)) -> Result<Vec<u8>, CudaError> {
    compiled(&of_program(program)?, capability).map(Image::into_bytes)
}

/// What the compiler says of kernels that use local memory on devices of a compute capability; nothing if none does. Every thread writes
/// that memory for every tile and waits for it, which once cost a quarter of the speed.
///
/// # Errors
///
/// Those of [`compile`].
pub fn local_memory(capability: (i32, i32)) -> Result<String, CudaError> {
    let mut options = options(capability);
    options.push("--ptxas-options=--warn-on-local-memory-usage".into());
    let mut said = String::new();
    for program in OWN {
        said += &with_options(&of_program(program)?, options.clone())?.1;
    }
    said += &with_options(&of_deltas()?, options.clone())?.1;
    Ok(said + &with_options(&own()?, options)?.1)
}

fn compiled(source: &CStr, capability: (i32, i32)) -> Result<Image, CudaError> {
    with_options(source, options(capability)).map(|(image, _)| image)
}

fn with_options(source: &CStr, options: Vec<String>) -> Result<(Image, String), CudaError> {
    let options: Vec<CString> =
        options.into_iter().map(|option| CString::new(option).unwrap_or_default()).collect();
    compiler()?.compile(source, c"bucket.cu", &options)
}

/// Loads NVRTC, and returns its version.
///
/// # Errors
///
/// [`CudaError::NoCompiler`].
pub fn nvrtc() -> Result<(i32, i32), CudaError> {
    compiler()?.version().map_err(|error| CudaError::NoCompiler { reason: error.to_string() })
}

fn compiler() -> Result<Compiler, CudaError> {
    static LOADED: OnceLock<Result<Compiler, String>> = OnceLock::new();
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
                Compiler::preload(library).map_err(|error| error.to_string())?;
            }
        }
        Compiler::load().ok_or_else(|| "libnvrtc.so is not on the loader's path".into())
    });
    loaded.clone().map_err(|reason| CudaError::NoCompiler { reason })
}

/// The cache file for the compiled kernels of this source for a compute capability.
fn cached_file(source: &CStr, capability: (i32, i32)) -> Option<PathBuf> {
    let mut hash = Sha256::new();
    hash.update(source.to_bytes());
    hash.update(options(capability).join(" "));
    let name = hash.finalize().iter().fold(String::new(), |mut name, byte| {
        // Writing to a string cannot fail.
        write!(name, "{byte:02x}").ok();
        name
    });
    cache_folder().map(|folder| folder.join(format!("{name}.kernels")))
}

/// Reads an image from a file, if the file is intact.
fn recall(file: &Path) -> Option<Image> {
    let bytes = std::fs::read(file).ok()?;
    let image = Image::from_file(&bytes);
    if image.is_none() {
        tracing::warn!(path = %file.display(), "the kernels in the cache are damaged, and compiled anew");
    }
    image
}

/// Writes an image to a file, atomically.
fn remember(file: &Path, image: &Image) {
    let kept =
        file.parent().ok_or_else(|| std::io::ErrorKind::InvalidInput.into()).and_then(|folder| {
            std::fs::create_dir_all(folder)?;
            let mut kept = tempfile::NamedTempFile::new_in(folder)?;
            std::io::Write::write_all(&mut kept, &image.to_file())?;
            kept.persist(file).map_err(|error| error.error)
        });
    // A failure costs only the compilation at the next start, about a second.
    if let Err(error) = kept {
        tracing::debug!(%error, path = %file.display(), "the kernels are not cached");
    }
}

/// Loads the image in a file. If the file has none that `load` accepts, loads one that `make` makes, and stores that.
fn loaded<T>(
    file: Option<&Path>,
    make: impl FnOnce() -> Result<Image, CudaError>,
    mut load: impl FnMut(&Image) -> Result<T, CudaError>,
) -> Result<T, CudaError> {
    if let Some(image) = file.and_then(recall) {
        match load(&image) {
            Ok(loaded) => return Ok(loaded),
            Err(error) => tracing::warn!(%error, "the cached kernels do not load: compiled anew"),
        }
    }
    let image = make()?;
    let loaded = load(&image)?;
    if let Some(file) = file {
        remember(file, &image);
    }
    Ok(loaded)
}

fn cache_folder() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(cache.join("ckpt-engine"))
}

/// The kernels on a device, and the memory through which their job tables travel. All their work is on one stream.
#[derive(Debug)]
pub struct Kernels {
    stream: Stream,
    encode: Kernel,
    encode_compared: Kernel,
    encode_wide: Kernel,
    /// `None` on a device with too little shared memory: the others do its work.
    encode_odd: Option<Kernel>,
    copy: Kernel,
    sum_scales: Kernel,
    digest: Kernel,
    /// Tables on their way to the device.
    staging: PinnedMemory,
    /// The table on the device, if it does not stay there.
    table: CudaMemory,
    /// Tables that stay on the device.
    resident: Resident<CudaMemory>,
    /// For the results of what was prepared, which nobody collects.
    found: CudaMemory,
    /// For the results of runs, while there is none.
    spare: Vec<Found>,
    /// The initial value of results.
    nothing: PinnedMemory,
    /// The number of the [`Prepared`] whose tables are in `table`.
    prepared: u64,
    /// The kernels of encodings that were needed so far.
    programs: Vec<(&'static Program, Kernel)>,
}

/// Launches whose results are waited for together. The stream may have other work between them.
#[derive(Debug)]
pub(crate) struct Run {
    found: Found,
    launches: usize,
}

impl Run {
    /// The number of launches that it can still have.
    pub(crate) fn room(&self) -> usize {
        MOST_LAUNCHES - self.launches
    }
}

/// The results of launches: the digest sum, and the failure of each launch.
#[derive(Debug)]
struct Found {
    memory: CudaMemory,
    /// For copying them back.
    host: PinnedMemory,
}

/// Bytes of results.
const FOUND: usize = (1 + MOST_LAUNCHES) * 8;

/// What a launch does.
#[derive(Clone, Copy, Debug)]
pub enum Launch<'a> {
    /// Does all jobs: fills a bucket, or copies one out into tensors. With `summed`, it adds what it writes to the digest sum: all codes
    /// and copies in aligned places, and no scales.
    Encode {
        /// The jobs. Their targets do not overlap.
        jobs: &'a [DeviceJob],
        /// How they quantise.
        format: &'a Fp8Format,
        /// The bucket in which the targets lie, if the digest is wanted.
        summed: Option<&'a CudaSlice>,
    },
    /// Adds parts of a bucket, each with its offset in the bucket, to the digest sum. They begin at
    /// multiples of 64 bytes.
    Digest(&'a [(u64, CudaSlice)]),
}

/// The results of launches that ran together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ran {
    /// The digest sum of all bytes that were added to it, equal to [`engine_core::digest::sum`] of them.
    pub sum: u64,
    /// The first block without a finite form: its launch, its job, and its number in the job.
    pub failed: Option<(usize, usize, usize)>,
}

#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) function: Function,
    /// The number of blocks that the device runs at a time.
    pub(crate) grid: u32,
}

/// The kernels of a source on a device.
#[derive(Debug)]
pub(crate) struct Library {
    module: Arc<Module>,
    multiprocessors: u32,
    has_bulk: bool,
}

impl Library {
    pub(crate) fn load(device: &Device) -> Result<Self, CudaError> {
        Self::of(device, &own()?)
    }

    /// The kernels of deltas.
    pub(crate) fn of_deltas(device: &Device) -> Result<Self, CudaError> {
        Self::of(device, &of_deltas()?)
    }

    /// Loads the kernels of a source, or compiles them if they are not in the cache.
    fn of(device: &Device, source: &CStr) -> Result<Self, CudaError> {
        let capability = device.capability();
        let file = cached_file(source, capability);
        let load = |image: &Image| Module::load(device.context(), image).map(Arc::new);
        let module = loaded(file.as_deref(), || compiled(source, capability), load)?;
        let multiprocessors = device.multiprocessors();
        Ok(Self { module, multiprocessors, has_bulk: capability >= BULK_CAPABILITY })
    }

    pub(crate) fn kernel(&self, name: &CStr) -> Result<Kernel, CudaError> {
        self.made(self.module.function(name)?)
    }

    /// A kernel that reads ahead into so many bytes of shared memory; `None` on a device with too little of it.
    fn staged(&self, name: &CStr, bytes: u32) -> Result<Option<Kernel>, CudaError> {
        let function = self.module.function(name)?.with_shared_memory(bytes)?;
        function.map(|function| self.made(function)).transpose()
    }

    /// The kernel that copies through shared memory, or else the other one.
    pub(crate) fn bulk(&self, name: &CStr, other: &CStr) -> Result<Kernel, CudaError> {
        let bulk = if self.has_bulk { self.staged(name, BULK_STAGES)? } else { None };
        bulk.map_or_else(|| self.kernel(other), Ok)
    }

    fn made(&self, function: Function) -> Result<Kernel, CudaError> {
        let blocks = function.blocks_per_multiprocessor(THREADS)?.unsigned_abs().max(1);
        Ok(Kernel { function, grid: blocks * self.multiprocessors })
    }
}

impl Kernels {
    /// Loads the kernels. The first time for this kind of device, it compiles them.
    ///
    /// # Errors
    ///
    /// Those of [`compile`], and what the driver reports.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let library = Library::load(device)?;
        const TABLE: usize = 1 << 20;
        let stream = Stream::new(device)?;
        let mut nothing = PinnedMemory::new(&stream, FOUND)?;
        nothing.bytes()?.fill(0xff);
        nothing.bytes()?[..8].fill(0);
        Ok(Self {
            encode: library.kernel(c"encode")?,
            encode_compared: library.kernel(c"encode_compared")?,
            encode_wide: library.kernel(c"encode_wide")?,
            encode_odd: library.staged(c"encode_odd", ODD_STAGE)?,
            copy: library.bulk(c"copy_bulk", c"encode")?,
            sum_scales: library.kernel(c"sum_scales")?,
            digest: library.kernel(c"digest")?,
            staging: PinnedMemory::new(&stream, TABLE)?,
            table: CudaMemory::new(device, TABLE)?,
            resident: Resident::new(MOST_BYTES),
            found: CudaMemory::new(device, FOUND)?,
            spare: Vec::new(),
            nothing,
            stream,
            prepared: 0,
            programs: Vec::new(),
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.stream.device()
    }

    /// The stream that all launches are on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Runs launches one after the other, and waits for their end. No work is under way when it returns, not even after an error.
    ///
    /// Everything is enqueued at once and waited for once: where processes take turns on a device, every further wait costs a turn.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] for jobs whose sizes contradict each other, for memory of another device or for
    /// more than 64 launches; what the driver reports, and what the work made go wrong.
    pub fn run(&mut self, launches: &[Launch<'_>]) -> Result<Ran, CudaError> {
        let mut tables = self.tables(launches)?;
        self.run_tables(&mut tables)
    }

    /// As [`run`](Self::run), for launches whose tables are made. When it returns, it no longer keeps what they use.
    ///
    /// Tables that come again are on the device already.
    pub(crate) fn run_tables(&mut self, tables: &mut Tables) -> Result<Ran, CudaError> {
        let ran = self.begin().and_then(|mut run| {
            self.enqueue(&mut run, tables)?;
            self.collect(run)
        });
        tables.used.clear();
        if ran.is_err() {
            self.give_up();
        }
        ran
    }

    /// Begins a run, which has no launches yet. After an error of a run, [give up](Self::give_up).
    pub(crate) fn begin(&mut self) -> Result<Run, CudaError> {
        let found = match self.spare.pop() {
            Some(found) => found,
            None => Found {
                memory: CudaMemory::new(self.stream.device(), FOUND)?,
                host: PinnedMemory::new(&self.stream, FOUND)?,
            },
        };
        self.nothing.copy_to(0, &found.memory.all())?;
        Ok(Run { found, launches: 0 })
    }

    /// Adds launches to a run, and does not wait. The stream keeps what the tables keep until it was waited for.
    pub(crate) fn enqueue(&mut self, run: &mut Run, tables: &mut Tables) -> Result<(), CudaError> {
        if tables.parts.is_empty() {
            return Ok(());
        }
        if tables.parts.len() > run.room() {
            let launches = run.launches + tables.parts.len();
            return Err(CudaError::Range(format!("{launches} launches at once")));
        }
        for part in &tables.parts {
            if let Task::Program { program, .. } = part.task {
                self.load_program(program)?;
            }
        }
        let memory = match self.resident.want(&tables.bytes) {
            Known::Here(memory) => memory,
            Known::Again => {
                let memory = CudaMemory::new(self.stream.device(), tables.bytes.len())?;
                self.bring(&tables.bytes, &memory)?;
                self.resident.keep(&tables.bytes, memory.clone());
                tracing::debug!(bytes = self.resident.bytes(), "job tables stay on the device");
                memory
            }
            Known::New => self.bring_once(&tables.bytes)?,
        };
        let used = Used { table: memory, _owners: std::mem::take(&mut tables.used) };
        self.start(&tables.parts, Arc::new(used), &run.found.memory, run.launches)?;
        run.launches += tables.parts.len();
        Ok(())
    }

    /// After an error: waits for all work, and forgets tables, which may not have arrived.
    pub(crate) fn give_up(&mut self) {
        self.resident.clear();
        if let Err(error) = self.stream.synchronize() {
            tracing::debug!(%error, "while work that failed was waited for");
        }
    }

    /// Loads the kernel of a program, if it is not loaded yet.
    fn load_program(&mut self, program: &'static Program) -> Result<(), CudaError> {
        if self.program(program).is_none() {
            let device = self.device().clone();
            let library = Library::of(&device, &of_program(program)?)?;
            self.programs.push((program, library.kernel(c"encode")?));
        }
        Ok(())
    }

    fn program(&self, program: &Program) -> Option<&Kernel> {
        self.programs
            .iter()
            .find(|(known, _)| std::ptr::eq(*known, program))
            .map(|(_, kernel)| kernel)
    }

    /// Copies tables to the device for one use.
    fn bring_once(&mut self, bytes: &[u8]) -> Result<CudaMemory, CudaError> {
        // This overwrites what was prepared before.
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        self.prepared = NUMBERS.fetch_add(1, Ordering::Relaxed);
        if bytes.len() > self.table.len() {
            self.table = CudaMemory::new(self.stream.device(), bytes.len().next_power_of_two())?;
        }
        let table = self.table.clone();
        self.bring(bytes, &table)?;
        Ok(table)
    }

    fn bring(&mut self, bytes: &[u8], to: &CudaMemory) -> Result<(), CudaError> {
        if bytes.len() > self.staging.len() {
            self.staging = PinnedMemory::new(&self.stream, bytes.len().next_power_of_two())?;
        }
        self.staging.bytes()?[..bytes.len()].copy_from_slice(bytes);
        self.staging.copy_to(0, &to.slice(0, bytes.len())?)
    }

    /// Waits for the launches of a run and returns their results.
    pub(crate) fn collect(&mut self, run: Run) -> Result<Ran, CudaError> {
        let Run { mut found, launches } = run;
        let words = 1 + launches;
        found.host.copy_from(&found.memory.slice(0, words * 8)?)?;
        let (numbers, _) = found.host.bytes()?.as_chunks::<8>();
        let mut numbers = numbers[..words].iter().map(|word| u64::from_le_bytes(*word));
        let sum = numbers.next().unwrap_or(0);
        let failed = numbers.enumerate().find(|(_, word)| *word != u64::MAX);
        let failed = failed.map(|(launch, word)| {
            (launch, (word >> 32) as usize, (word & u64::from(u32::MAX)) as usize)
        });
        self.spare.push(found);
        Ok(Ran { sum, failed })
    }

    /// Does all jobs in one launch, and waits for its end.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run), and [`CudaError::NonFinite`] with the first block that has no finite form.
    pub fn encode(&mut self, jobs: &[DeviceJob], format: &Fp8Format) -> Result<(), CudaError> {
        let launch = Launch::Encode { jobs, format, summed: None };
        match self.run(&[launch])?.failed {
            None => Ok(()),
            Some((_, job, block)) => Err(CudaError::NonFinite { job, block }),
        }
    }

    /// Copies the tables of launches to the device. They can be launched any number of times until others are prepared.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn prepare(&mut self, launches: &[Launch<'_>]) -> Result<Prepared, CudaError> {
        if launches.len() > MOST_LAUNCHES {
            return Err(CudaError::Range(format!("{} launches at once", launches.len())));
        }
        let Tables { bytes, parts, used } = self.tables(launches)?;
        let table = self.bring_once(&bytes)?;
        self.nothing.copy_to(0, &self.found.all())?;
        let used = Arc::new(Used { table, _owners: used });
        Ok(Prepared { number: self.prepared, used, parts })
    }

    /// The tables of launches, with the memory that their jobs use.
    fn tables(&self, launches: &[Launch<'_>]) -> Result<Tables, CudaError> {
        let mut tables = Tables::default();
        let mut owners = Owners { ordinal: self.device().ordinal(), ..Owners::default() };
        for launch in launches {
            match *launch {
                Launch::Encode { jobs, format, summed } => {
                    for job in jobs {
                        job.slices().try_for_each(|(role, slice)| owners.add(role, slice))?;
                    }
                    let base = summed.map_or(0, CudaSlice::address);
                    let task = Task::Encode { mode: mode_number(format.mode), base };
                    tables.add(&Table::of_jobs(jobs, format, summed.is_some())?, task);
                }
                Launch::Digest(parts) => {
                    parts.iter().try_for_each(|(_, slice)| owners.add(0, slice))?;
                    tables.add(&Table::of_parts(parts)?, Task::Digest);
                }
            }
        }
        tables.used.push(Arc::new(owners.memory));
        Ok(tables)
    }
}

/// The allocations of jobs, most of them once.
#[derive(Debug, Default)]
struct Owners {
    ordinal: i32,
    memory: Vec<CudaMemory>,
    /// The address of the last allocation of each role.
    last: [Option<u64>; 3],
}

impl Owners {
    fn add(&mut self, role: usize, slice: &CudaSlice) -> Result<(), CudaError> {
        let memory = slice.memory();
        let ordinal = memory.device().ordinal();
        if ordinal != self.ordinal {
            let words = format!("memory of device {ordinal} for kernels of {}", self.ordinal);
            return Err(CudaError::Range(words));
        }
        // An address identifies an allocation as long as it is kept.
        if self.last[role].replace(memory.address()) != Some(memory.address()) {
            self.memory.push(memory.clone());
        }
        Ok(())
    }
}

/// Launches whose tables are on the device, with the memory of their jobs. Valid until the next [`Kernels::prepare`].
#[derive(Debug)]
pub struct Prepared {
    number: u64,
    used: Arc<Used>,
    parts: Vec<Part>,
}

/// The memory that launches use.
#[derive(Debug)]
struct Used {
    table: CudaMemory,
    _owners: Vec<Arc<dyn Any + Send + Sync>>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    fn image(byte: u8) -> Image {
        Image::of_bytes(&[byte; 1000])
    }

    #[test]
    fn kernels_in_a_cache_that_are_cut_short_or_changed_or_refused_are_made_anew_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("deeper").join("some.kernels");
        let made = std::cell::Cell::new(0);
        let take = |refused: &Image| {
            let make = || {
                made.set(made.get() + 1);
                Ok(image(made.get()))
            };
            let load = |image: &Image| match image == refused {
                true => Err(CudaError::Range("refused".into())),
                false => Ok(image.clone()),
            };
            loaded(Some(&file), make, load).unwrap()
        };
        let nothing = image(0);
        assert_eq!((take(&nothing), made.get()), (image(1), 1));
        assert_eq!((take(&nothing), made.get()), (image(1), 1), "it was cached");
        let whole = std::fs::read(&file).unwrap();
        let mut made_so_far = 1;
        for len in [0, 1, 16, 24, 56, 57, whole.len() - 1] {
            std::fs::write(&file, &whole[..len]).unwrap();
            made_so_far += 1;
            assert_eq!(take(&nothing), image(made_so_far), "cut to {len} bytes");
            assert_eq!(take(&nothing), image(made_so_far), "replaced after {len} bytes");
        }
        for at in [0, 20, 30, 500, whole.len() - 1] {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            std::fs::write(&file, changed).unwrap();
            made_so_far += 1;
            assert_eq!(take(&nothing), image(made_so_far), "changed at {at}");
        }
        let refused = image(made_so_far);
        assert_eq!(take(&refused), image(made_so_far + 1), "refused by the driver");
        assert_eq!(take(&nothing), image(made_so_far + 1));
        assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
    }
}

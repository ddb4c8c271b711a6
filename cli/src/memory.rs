//! What the process's memory and the machine's memory bandwidth are.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use checkpoint_engine::{Error, Result};

/// How often the memory is looked at.
const INTERVAL: Duration = Duration::from_millis(5);

/// The most memory that this process took beyond what it had at a moment: anonymous and shared
/// pages. Pages of mapped files are not counted; the kernel takes them back when it needs them.
#[derive(Debug)]
pub struct PeakMemory {
    baseline: u64,
    peak: AtomicU64,
    stop: AtomicBool,
}

impl PeakMemory {
    /// Starts measuring from what the process has now.
    ///
    /// # Errors
    ///
    /// `Io` if the system does not tell, or the measuring thread cannot be started.
    pub fn start() -> Result<Arc<Self>> {
        let baseline = resident()?;
        let (peak, stop) = (AtomicU64::new(baseline), AtomicBool::new(false));
        let memory = Arc::new(Self { baseline, peak, stop });
        let sampled = Arc::downgrade(&memory);
        std::thread::Builder::new()
            .name("ckpt-memory".into())
            .spawn(move || {
                while let Some(memory) = sampled.upgrade() {
                    if memory.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    memory.sample();
                    drop(memory);
                    std::thread::sleep(INTERVAL);
                }
            })
            .map_err(|error| Error::io("starting to measure memory", error))?;
        Ok(memory)
    }

    /// The most bytes beyond the baseline so far.
    pub fn extra_peak_bytes(&self) -> u64 {
        self.sample();
        self.peak.load(Ordering::Relaxed).saturating_sub(self.baseline)
    }

    fn sample(&self) {
        if let Ok(bytes) = resident() {
            self.peak.fetch_max(bytes, Ordering::Relaxed);
        }
    }
}

impl Drop for PeakMemory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Anonymous and shared resident bytes of this process.
fn resident() -> Result<u64> {
    let operation = "reading /proc/self/status";
    let status =
        std::fs::read_to_string("/proc/self/status").map_err(|e| Error::io(operation, e))?;
    let kib = status
        .lines()
        .filter(|line| line.starts_with("RssAnon:") || line.starts_with("RssShmem:"))
        .filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
        .sum::<u64>();
    Ok(kib << 10)
}

/// Copies `source` into shared memory, a ring of two buckets of at most 64 MiB, as one thread can; in 10⁹ bytes per
/// second, the median of `repeats`. What an update that only copies could reach.
///
/// # Errors
///
/// `Io` if the shared memory cannot be had.
pub fn memcpy_gb_per_s(source: &[&[u8]], bucket_bytes: u64, repeats: usize) -> Result<f64> {
    // Beyond the caches' size, a larger ring is no slower; it would only take memory.
    let len = 2 * bucket_bytes.min(64 << 20) as usize;
    let failed = |error: io::Error| Error::io("measuring the bandwidth of a copy", error);
    // Memory as that of the buckets of `ipc`, which `/dev/shm` does not limit either.
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("ckpt-engine-copy", flags);
    let file = std::fs::File::from(file.map_err(|errno| failed(errno.into()))?);
    file.set_len(len as u64).map_err(failed)?;
    let mut ring = crate::ffi::map_private_file_shared(&file).map_err(failed)?;
    let mut rates: Vec<f64> = (0..=repeats)
        .map(|_| {
            let (mut at, mut bytes) = (0, 0_usize);
            let started = Instant::now();
            for &part in source {
                let mut rest = part;
                while !rest.is_empty() {
                    if at == len {
                        at = 0;
                    }
                    let now = rest.len().min(len - at);
                    ring[at..at + now].copy_from_slice(&rest[..now]);
                    rest = &rest[now..];
                    at += now;
                    bytes += now;
                }
            }
            std::hint::black_box(&ring);
            bytes as f64 / 1e9 / started.elapsed().as_secs_f64().max(1e-9)
        })
        .skip(1) // The first one pays for page faults.
        .collect();
    rates.sort_by(f64::total_cmp);
    Ok(rates.get(rates.len() / 2).copied().unwrap_or(0.0))
}

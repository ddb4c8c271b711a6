//! What the program does on devices: models that are there, rollouts that install there, and the
//! bandwidth to measure them by.

use checkpoint_engine::{DeviceChoice, Install, Result, Weight};

use crate::bench::quant::{QuantLine, QuantOptions};

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "device/none.rs"]
mod cuda;

pub use cuda::DeviceModel;

/// The device of a rank: if the kind is given and no number, the ranks take one device each, and begin
/// anew when there are no more.
///
/// # Errors
///
/// `Backend` without a driver; `Config` if the program was built without the device.
pub fn of_rank(device: &DeviceChoice, rank: u32) -> Result<DeviceChoice> {
    // An NPU is chosen by the engine, which counts them on a thread of its own.
    if !keeps_tensors(device) || device.ordinal().is_some() {
        return Ok(device.clone());
    }
    let count = cuda::count(device)?.max(1);
    Ok(DeviceChoice::new(device.kind(), rank % count))
}

/// Whether so many ranks with a device each would have to share GPUs. Looks at the system only: no library
/// is loaded.
pub fn ranks_share_gpus(device: &DeviceChoice, ranks: u32) -> bool {
    if device.kind() != "cuda" {
        return false;
    }
    if device.ordinal().is_some() {
        return ranks > 1;
    }
    let is_gpu = |name: &str| {
        let number = name.strip_prefix("nvidia");
        number.is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let gpus = engine_core::native::entries(std::path::Path::new("/dev"), is_gpu).len();
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").map(|list| list.split(',').count());
    let gpus = visible.map_or(gpus, |visible| gpus.min(visible));
    gpus > 0 && (gpus as u64) < u64::from(ranks)
}

/// Whether this program can have tensors on a device: on NPUs it has only the engine's buckets.
pub fn keeps_tensors(device: &DeviceChoice) -> bool {
    !device.is_cpu() && device.kind() != "npu"
}

/// Whether what a transport does in this process it does on simulated devices.
pub fn is_simulated(backend: &str) -> bool {
    backend == "hccl" && checkpoint_engine::hccl::is_simulated()
}

/// Tensors on a device that a rollout copies everything to that it receives, with memory for so many bytes;
/// nothing for the host, where rollouts read in place.
///
/// # Errors
///
/// As [`of_rank`], and what the device reports.
pub fn destination(device: &DeviceChoice, bytes: u64) -> Result<Option<Box<dyn Install>>> {
    if keeps_tensors(device) { cuda::destination(device, bytes).map(Some) } else { Ok(None) }
}

/// What the driver's copy of `bytes` within the device reaches, counting each byte once; in 10⁹ bytes
/// per second, the median of several.
///
/// # Errors
///
/// As [`destination`].
pub fn copy_gb_per_s(device: &DeviceChoice, bytes: u64) -> Result<f64> {
    cuda::copy_gb_per_s(device, bytes)
}

/// What quantising on a device reaches, beside the driver's copy of as many bytes.
///
/// # Errors
///
/// As [`destination`]; a format that the device has no kernel for.
pub fn quantize_rate(options: &QuantOptions) -> Result<QuantLine> {
    cuda::quantize_rate(options)
}

/// Devices of this machine in words, for people who look for what is wrong.
pub fn describe() -> Vec<String> {
    cuda::describe()
}

/// Weights as they are made for the host, to be put on a device.
type HostWeights<'a> = &'a mut dyn Iterator<Item = Result<Weight>>;

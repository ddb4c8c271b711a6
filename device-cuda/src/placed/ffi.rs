//! Launches of the tables of placed updates.
#![allow(unsafe_code, reason = "kernels take addresses")]

use std::sync::Arc;

use super::launches::Launch;
use super::table::ENTRY;
use crate::kernels::{Kernel, THREADS};
use crate::{CudaError, CudaMemory, Stream};

/// Launches a kernel over a table that is in `memory`, and does not wait.
///
/// The stream keeps `memory`, `numbers` and all that is in `used`.
pub(super) fn launch(
    kernel: &Kernel,
    stream: &Stream,
    launch: &Launch,
    memory: &CudaMemory,
    numbers: &CudaMemory,
    used: &Arc<Vec<CudaMemory>>,
) -> Result<(), CudaError> {
    let raw = stream.raw();
    raw.keep(memory.raw().clone());
    raw.keep(numbers.raw().clone());
    raw.keep(used.clone());
    let (entries, found) = (memory.address() + launch.at as u64, numbers.address());
    let mut parameters = [
        entries,
        entries + u64::from(launch.entries) * ENTRY as u64,
        launch.entries.into(),
        launch.tiles.into(),
        found,
        found + 8,
    ];
    // SAFETY: these are the parameters of the kernels. The table is at `launch.at`, with so many entries. Its addresses are of ranges of memory
    // that `launches` has checked to be within their memory, which is in `used`, or in storages that `super` borrows until it has waited for
    // the stream. `numbers` has one number for a failure and one for each slot of the table.
    unsafe { kernel.function.launch(kernel.grid.min(launch.tiles), THREADS, raw, &mut parameters) }
}

//! Launches that find changes or apply them.
#![allow(unsafe_code, reason = "kernels take addresses")]

use crate::kernels::{Kernel, THREADS};
use crate::{CudaError, CudaMemory, Stream};

/// Launches a kernel of `delta.cu` over so many tiles, and does not wait. The stream keeps the memory.
///
/// # Contract
///
/// For the module above: `parameters` are those of the kernel. The table's entries are ranges of copies and of weights that the caller keeps
/// until it has waited for the stream; all other addresses are of ranges of `memory`, which are as long as the table says.
pub(super) fn launch(
    kernel: &Kernel,
    stream: &Stream,
    tiles: u32,
    memory: &[&CudaMemory],
    parameters: &mut [u64],
) -> Result<(), CudaError> {
    if tiles == 0 {
        return Ok(());
    }
    memory.iter().for_each(|memory| stream.raw().keep(memory.raw().clone()));
    // SAFETY: the module above, which alone can call this, makes the tables from slices of memory that it holds. Copies are as long as their
    // weights (`parts_of`), what is encoded has room for each part (`encode_parts`), and words and values are as many as announced (`Cut::places`
    // in `apply`, `find`). Kernels check the places of units, which come from outside, before they use them.
    unsafe { kernel.function.launch(kernel.grid.min(tiles), THREADS, stream.raw(), parameters) }
}

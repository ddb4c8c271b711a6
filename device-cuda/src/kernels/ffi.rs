//! Launching what was prepared.
#![allow(unsafe_code, reason = "kernels take addresses")]

use super::{Kernels, Part, Prepared, THREADS};
use crate::CudaError;

impl Kernels {
    /// Launches what was prepared, and does not wait. The stream keeps all memory that is in it until it
    /// was waited for. Until then none of it may be written to by others, or the results mean nothing.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] if something else was prepared since; what the driver reports.
    pub fn launch(&mut self, prepared: &Prepared) -> Result<(), CudaError> {
        if prepared.number != self.prepared {
            let words = "what is launched is not what was prepared last";
            return Err(CudaError::Range(words.into()));
        }
        let stream = self.stream.raw();
        stream.keep(prepared.used.clone());
        let sum = prepared.used.table.address();
        for (index, part) in (1..).zip(&prepared.parts) {
            let Part { start, table, mode, base } = part;
            if table.tiles == 0 {
                continue;
            }
            let jobs = sum + *start as u64;
            let firsts = jobs + table.firsts_at as u64;
            let (count, tiles) = (table.jobs.into(), table.tiles.into());
            let (kernel, mut parameters) = match mode {
                Some(mode) => {
                    let kernel = if table.wide { &self.encode_wide } else { &self.encode };
                    (kernel, vec![jobs, firsts, count, tiles, *mode, sum + index * 8, sum, *base])
                }
                None => (&self.digest, vec![jobs, firsts, count, tiles, sum]),
            };
            let grid = kernel.grid.min(table.tiles);
            // SAFETY: these are the parameters of the kernels. The addresses are of the table, which is the one
            // that was prepared last, and the table's are of slices that lie within their allocations and are
            // as long as the job's shape says, as `Table` has checked: all of them kept by the stream.
            unsafe { kernel.function.launch(grid, THREADS, stream, &mut parameters) }?;
        }
        Ok(())
    }
}

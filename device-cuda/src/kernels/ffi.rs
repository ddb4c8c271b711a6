//! Launches of prepared tables.
#![allow(unsafe_code, reason = "kernels take addresses")]

use std::sync::Arc;

use super::{Kernels, Prepared, THREADS, Used};
use crate::table::{Against, Encoder, Part, Task};
use crate::{CudaError, CudaMemory};

/// Tiles whose scales a block of threads adds to the digest.
const SCALES_TILES: u32 = 64 * THREADS / 32;

impl Kernels {
    /// Launches what was prepared, and does not wait. The stream keeps all memory of the jobs until the work was waited for. If others
    /// write to that memory before, the results are undefined.
    ///
    /// # Errors
    ///
    /// [`CudaError::Range`] if something else was prepared since; what the driver reports.
    pub fn launch(&mut self, prepared: &Prepared) -> Result<(), CudaError> {
        if prepared.number != self.prepared {
            let words = "what is launched is not what was prepared last";
            return Err(CudaError::Range(words.into()));
        }
        self.start(&prepared.parts, prepared.used.clone(), &self.found, 0)
    }

    /// Launches the parts of a table, and does not wait. Their results go to `found`, after those of `earlier` launches.
    pub(super) fn start(
        &self,
        parts: &[Part],
        used: Arc<Used>,
        found: &CudaMemory,
        earlier: usize,
    ) -> Result<(), CudaError> {
        let stream = self.stream.raw();
        let (table, sum) = (used.table.address(), found.address());
        stream.keep(used);
        stream.keep(found.raw().clone());
        for (index, part) in (1 + earlier as u64..).zip(parts) {
            let Part { task, jobs_at, firsts_at, parameters_at, jobs, tiles, .. } = *part;
            if tiles == 0 {
                continue;
            }
            let (entries, firsts) = (table + jobs_at as u64, table + firsts_at as u64);
            let (count, all) = (jobs.into(), tiles.into());
            let (kernel, mut parameters) = match task {
                Task::Compare { mode, base, against } => {
                    let Against { old, marks } = against;
                    let failed = sum + index * 8;
                    let mut parameters = vec![entries, firsts, count, all, mode, failed];
                    parameters.extend([base, old, marks]);
                    (&self.encode_compared, parameters)
                }
                Task::Encode { mode, base } => {
                    let kernel = match part.encoder {
                        Encoder::Copy => &self.copy,
                        Encoder::Even | Encoder::Compared => &self.encode,
                        Encoder::Wide => &self.encode_wide,
                        Encoder::Odd => self.encode_odd.as_ref().unwrap_or(&self.encode_wide),
                    };
                    (kernel, vec![entries, firsts, count, all, mode, sum + index * 8, sum, base])
                }
                Task::Digest => (&self.digest, vec![entries, firsts, count, all, sum]),
                Task::Program { program, base } => {
                    let words = || CudaError::Range(format!("`{}` is not loaded", program.name()));
                    let kernel = self.program(program).ok_or_else(words)?;
                    let parameters = table + parameters_at as u64;
                    (kernel, vec![entries, firsts, count, all, parameters, sum, base])
                }
            };
            let grid = kernel.grid.min(tiles);
            // SAFETY: these are the parameters of the kernels. The addresses point into the table, whose bytes are those that the parts
            // were made with. The addresses in the table are of ranges of the memory in `used`, which the makers of tables have checked. A
            // program reads nothing else, as its author has promised. The stream keeps `used` and `found`, which has room for the results of
            // the most launches.
            unsafe { kernel.function.launch(grid, THREADS, stream, &mut parameters) }?;
            if let (true, Task::Encode { base, .. }) = (part.sums_scales, task) {
                let kernel = &self.sum_scales;
                let grid = kernel.grid.min(tiles.div_ceil(SCALES_TILES));
                let mut parameters = [entries, firsts, count, all, sum, base];
                // SAFETY: as above; the scales lie where the launch before has written them.
                unsafe { kernel.function.launch(grid, THREADS, stream, &mut parameters) }?;
            }
        }
        Ok(())
    }
}

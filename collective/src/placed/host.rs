//! Tensors of rollouts in host memory.
#![allow(unsafe_code, reason = "the promise of a program that lends its own tensors is passed on")]

use std::sync::Arc;

use ::placed::parcels::{Run, Scatter};
use ::placed::{HostTensors, Layout, LentBytes, LentTensor, Wanted};

use engine_core::{Result, Storage};

use super::Tensors;

impl Tensors for HostTensors {
    fn len(&self) -> u64 {
        self.len()
    }

    fn scatter(&self, runs: &[Run], parcel: &Storage) -> Result<()> {
        Scatter::scatter(self, runs, &parcel.to_host()?)
    }

    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>> {
        self.bytes(at, len)
    }
}

/// Memory of the host for what a rollout wants, and the layout there.
///
/// # Errors
///
/// Those of [`Layout::new`]; `Resource` if there is not so much.
pub fn host_tensors(
    wanted: impl IntoIterator<Item = Wanted>,
) -> Result<(Layout, Arc<dyn Tensors>)> {
    let layout = Layout::new(wanted)?;
    // SAFETY: one thread scatters, and only while the tensors are lent; then nobody reads them.
    let memory = unsafe { HostTensors::allocate(layout.bytes()) }?;
    Ok((layout, Arc::new(memory)))
}

/// Tensors of a program in host memory of any kind, where they are, and their layout.
///
/// # Errors
///
/// `Mismatch` for a tensor on a device, `Weight` for tensors that share memory; both name it.
pub fn own_host_tensors(
    tensors: impl IntoIterator<Item = LentTensor>,
) -> Result<(Layout, Arc<dyn Tensors>)> {
    // SAFETY: as above.
    let (layout, memory) = unsafe { HostTensors::of(tensors) }?;
    Ok((layout, Arc::new(memory)))
}

//! How what a trainer's device has encoded is carried: by NIXL's writes from there.

use std::any::Any;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use device_cuda::{CudaMemory, Device, reachable};
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result};
use placed::Reached;
use placed::cuda::{Carries, Reads, WindowEncoder};
use placed::parcels::Gathered;

use super::parcel::{Encoded, Parcel, RUNS, Ranges};
use super::reach::{Holding, Shared};
use super::writer::{Command, Target};
use crate::arena::Memory;
use crate::error::NixlError;

/// Encodes on the trainer's device.
pub(super) type Encoding = WindowEncoder<Writes>;

/// What is encoded is written.
#[derive(Debug)]
pub(super) struct Writes(Arc<Shared>);

/// The encoder of a trainer on this device.
///
/// # Errors
///
/// Those of the device.
pub(super) fn encoding(device: &DeviceChoice, shared: Arc<Shared>) -> Result<Encoding> {
    let limit = shared.limit;
    WindowEncoder::new(&Device::of(device)?, Writes(shared), limit)
}

impl Carries for Writes {
    type Target = Arc<Target>;
    type Memory = Memory;

    fn target<'a>(&self, to: &'a dyn Reached) -> Option<&'a Arc<Target>> {
        let to: &dyn Any = to;
        to.downcast_ref().map(Holding::target).filter(|target| target.is_on_device())
    }

    fn rank(&self, target: &Arc<Target>) -> Rank {
        target.rank()
    }

    fn check(&self, target: &Arc<Target>) -> Result<()> {
        target.check()
    }

    /// Has the agent's thread register it.
    fn memory(&self, memory: &CudaMemory) -> Result<Memory> {
        let memory = Memory::new(reachable(memory.clone()))?;
        let Self(shared) = self;
        let (told, is_told) = sync_channel(1);
        if !shared.tell(Command::Register(memory.clone(), told)) {
            return Err(NixlError::Closed.into());
        }
        let limit = shared.limit;
        is_told.recv_timeout(limit).map_err(|_| NixlError::Slow(limit))??;
        Ok(memory)
    }

    fn carry(
        &self,
        target: &Arc<Target>,
        memory: &Memory,
        runs: &[Gathered],
        reads: &dyn Fn() -> Reads,
    ) -> Result<()> {
        let address = memory.address();
        let mut sides: (Ranges, Ranges) = Default::default();
        let write = |sides: &mut (Ranges, Ranges)| {
            let (sides, reading) = (std::mem::take(sides), Box::new(reads()));
            let encoded = Encoded { memory: memory.clone(), sides, _reading: reading };
            self.0.write(target, Parcel::Encoded(Box::new(encoded)));
        };
        for Gathered { run, from } in runs {
            for row in (0..run.rows).map(|row| row * run.stride) {
                let (mut at, mut from, mut left) = (run.at + row, from + row, run.len);
                // A row may go on in the next part of what is lent.
                while left > 0 {
                    let found = target.parts().rest(at).filter(|(_, _, rest)| *rest > 0);
                    let (&part, start, rest) = found.ok_or_else(|| {
                        let message = format!("{left} bytes at {at} lie outside of what is lent");
                        let error = Error::new(ErrorKind::Protocol, "writing tensors", message);
                        error.rank(target.rank())
                    })?;
                    let len = left.min(rest);
                    // What is offered was checked to be addresses of this platform.
                    sides.0.push((address + from as usize, len as usize));
                    sides.1.push((part + start as usize, len as usize));
                    (at, from, left) = (at + len, from + len, left - len);
                    if sides.0.len() == RUNS {
                        write(&mut sides);
                    }
                }
            }
        }
        if !sides.0.is_empty() {
            write(&mut sides);
        }
        Ok(())
    }

    /// A write reads its memory until it has ended where the bytes go.
    fn arrived(&self, _: &Arc<Target>) -> Result<()> {
        Ok(())
    }
}

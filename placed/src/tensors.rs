//! Tensors of a rollout's program that are lent where they are.
#![allow(unsafe_code, reason = "the caller's promise, which is kept with the tensor")]

use bytes::Bytes;
use engine_core::{Error, ErrorKind, Result, Storage};

use crate::declared::Wanted;

pub(crate) const LENDING: &str = "lending tensors";

/// A tensor of a rollout's program, which trainers write each update to.
#[derive(Clone, Debug)]
pub struct LentTensor {
    wanted: Wanted,
    elements: Storage,
    scales: Storage,
}

impl LentTensor {
    /// A box of a tensor, and the memory of its elements and of its [scales](Wanted::scales), both row-major; without scales `None`.
    ///
    /// # Safety
    ///
    /// The memory may be written to as long as any clone of its storages lives. Nobody else in this process reads or writes it while an
    /// update is under way.
    ///
    /// # Errors
    ///
    /// `Weight` and `Config`, which name the tensor, for a box that cannot be placed, and for memory that has not its bytes.
    pub unsafe fn new(wanted: Wanted, elements: Storage, scales: Option<Storage>) -> Result<Self> {
        let (len, scales_len) = wanted.validate()?;
        let scales = scales.unwrap_or_else(|| Storage::from(Vec::new()));
        for (what, needed, bytes) in
            [("elements", len, elements.len()), ("scales", scales_len, scales.len())]
        {
            if needed != bytes {
                let message = format!("{bytes} bytes of {what} for {needed}");
                let error = Error::new(ErrorKind::Weight, LENDING, message);
                return Err(error.tensor(&*wanted.meta.name));
            }
        }
        Ok(Self { wanted, elements, scales })
    }

    /// For transports: the box, and the memory of its elements and of its scales. Who has the memory keeps the promise of [`new`](Self::new)
    /// as long as it writes there.
    pub fn into_parts(self) -> (Wanted, Storage, Storage) {
        (self.wanted, self.elements, self.scales)
    }

    /// For transports: the box, and the memory of its elements and of its scales, which is the host's.
    ///
    /// # Errors
    ///
    /// `Mismatch`, which names the tensor, if it is on a device.
    pub fn into_host_parts(self) -> Result<(Wanted, [Bytes; 2])> {
        let Self { wanted, elements, scales } = self;
        match (elements, scales) {
            (Storage::Host(elements), Storage::Host(scales)) => Ok((wanted, [elements, scales])),
            _ => {
                let message = "it is on a device, and this rollout's `device` is `cpu`";
                let error = Error::new(ErrorKind::Mismatch, LENDING, message);
                Err(error.tensor(&*wanted.meta.name))
            }
        }
    }
}

//! Describes a slot to servers that read it in place, as torch's processes describe shared tensors to one another.
//!
//! A process that shares a tensor sends the arguments from which `torch.multiprocessing` rebuilds it: CUDA's handle of the allocation, and
//! the place in it. torch also counts the readers of each tensor, in a file that the sender makes. Here there is no such file: a reader
//! that does not find it goes on. The trainer keeps the memory for its whole life, so readers need not be counted.

use collective::SharedSlot;

use crate::pickle::Pickle;

/// For readers that replace the device by their own number.
pub(crate) const ANY_DEVICE: Pickle = Pickle::Int(0);

/// The arguments of `rebuild_cuda_tensor` for a slot's tensor: the whole slot, as bytes, on a device named as its readers name it.
///
/// The same slot has the same arguments each time, whatever its contents: a reader keeps what it has opened.
pub(crate) fn arguments(slot: &SharedSlot, device: Pickle) -> Vec<Pickle> {
    let size = || Pickle::size(slot.bytes);
    vec![
        Pickle::Global("torch", "Tensor"),
        Pickle::Tuple(vec![size()]),
        Pickle::Tuple(vec![Pickle::Int(1)]),
        Pickle::Int(0),
        Pickle::Global("torch.storage", "TypedStorage"),
        Pickle::Global("torch", "uint8"),
        device,
        Pickle::Bytes(slot.handle.clone()),
        size(),
        Pickle::size(slot.start),
        Pickle::Bool(false),
        // A file of this name never exists.
        Pickle::Bytes(b"/ckpt-engine-counts-nobody".to_vec()),
        Pickle::Int(0),
        // No event: the bytes are written before readers hear of the slot.
        Pickle::Bytes(Vec::new()),
        Pickle::Bool(false),
    ]
}

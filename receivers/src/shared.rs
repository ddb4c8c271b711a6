//! Where servers on the trainer's own GPU read a bucket, as torch's processes tell one another.
//!
//! A process that shares a tensor sends what `torch.multiprocessing` rebuilds it from: CUDA's handle of the allocation, and the
//! place in it. torch also counts the readers of each tensor, in a file that the sender makes. There is none here: a reader
//! that does not find it goes on. The memory is the trainer's for its life, so nobody has to be counted.

use collective::SharedSlot;

use crate::pickle::Pickle;

/// For readers that put their own number of the device in its place.
pub(crate) const ANY_DEVICE: Pickle = Pickle::Int(0);

/// The arguments that `rebuild_cuda_tensor` makes a slot's tensor of: all of it, as bytes, on a device that is named as its
/// readers name it.
///
/// The same slot is the same tensor each time, whatever is in it: a reader keeps what it has opened.
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
        // No file of this name is ever made.
        Pickle::Bytes(b"/ckpt-engine-counts-nobody".to_vec()),
        Pickle::Int(0),
        // What was written is there: nobody has to wait for an event.
        Pickle::Bytes(Vec::new()),
        Pickle::Bool(false),
    ]
}

//! A safetensors file: what it is refused for, or tensors that lie within it.

#![no_main]

use cli::checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;

#[path = "support/files.rs"]
mod files;

fuzz_target!(|bytes: &[u8]| {
    let file = files::in_memory(bytes);
    let Ok(checkpoint) = Checkpoint::open(file.path()) else { return };
    let mut held = 0;
    for weight in checkpoint.weights() {
        held += weight.meta().byte_len().expect("a length that was checked");
        assert!(checkpoint.bytes(weight.name()).is_some());
    }
    assert!(held < bytes.len() as u64, "tensors and header do not fit into the file");
});

//! The index of a checkpoint in shards: no file outside the folder is opened, and what opens has every tensor that the
//! index names.

#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use cli::checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// One shard, with the tensors `a` and `b`.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
    let folder = folder.expect("a folder");
    let header = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    let shard = [&(header.len() as u64).to_le_bytes()[..], header, b"ab"].concat();
    std::fs::write(folder.path().join("s.safetensors"), shard).expect("a shard");
    folder
});

fuzz_target!(|bytes: &[u8]| {
    let index = FOLDER.path().join("model.safetensors.index.json");
    std::fs::write(&index, bytes).expect("an index");
    if let Ok(checkpoint) = Checkpoint::open(FOLDER.path()) {
        for shard in checkpoint.shards() {
            assert!(shard.path().starts_with(FOLDER.path()));
        }
        assert!(checkpoint.weights().all(|weight| ["a", "b"].contains(&weight.name())));
    }
});

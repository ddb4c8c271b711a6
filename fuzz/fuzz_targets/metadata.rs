//! What ranks say of themselves when a group forms, and what transports make of it.

#![no_main]

use backend_nixl::BACKEND;
use engine_core::WorkerMetadata;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payloads: Vec<&[u8]>| {
    let read = |payload: &&[u8]| serde_json::from_slice(payload).ok();
    let workers: Vec<WorkerMetadata> = payloads.iter().filter_map(read).collect();
    if let Ok(places) = BACKEND.build_topology(&workers) {
        assert_eq!(places.len(), workers.len());
    }
});

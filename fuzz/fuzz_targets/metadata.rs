//! What ranks say of themselves when a group forms, a line each, and what transports make of it.

#![no_main]

use backend_nixl::BACKEND;
use engine_core::WorkerMetadata;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payloads: &[u8]| {
    let lines = payloads.split(|byte| *byte == b'\n');
    let workers: Vec<WorkerMetadata> =
        lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
    if let Ok(places) = BACKEND.build_topology(&workers) {
        assert_eq!(places.len(), workers.len());
    }
});

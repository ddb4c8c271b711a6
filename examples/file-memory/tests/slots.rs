//! The slots of transports that broadcast, in a kind of memory that they do not know.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::File;
use std::os::unix::fs::FileExt;

use collective::{MemorySlots, Shape, SharedSlot, SlotLocks, Slots};
use engine_core::memory::{Job, Pool};
use engine_core::{DType, DeviceChoice, ErrorKind, Weight};
use file_memory::MEMORY;

const SHAPE: Shape = Shape { slots: 2, slot_bytes: 4096 };

fn device(number: u32) -> DeviceChoice {
    DeviceChoice::new("file", number)
}

/// Jobs that fill a slot with so many bytes, and the bytes.
fn filling(len: usize, seed: u8) -> (Vec<Job>, Vec<u8>) {
    let bytes: Vec<u8> = (0..len).map(|at| (at * 7 + usize::from(seed)) as u8).collect();
    let weight = Weight::new("w", DType::U8, [len as u64], bytes.clone()).unwrap();
    (vec![Job { weight, start: 0, len: len as u64, offset: 0 }], bytes)
}

fn contents(at: &SharedSlot, len: usize) -> Vec<u8> {
    let path = String::from_utf8(at.handle.clone()).unwrap();
    let mut bytes = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut bytes, at.start).unwrap();
    bytes
}

#[tokio::test]
async fn what_fills_a_slot_is_seen_in_it_and_the_slot_is_free_again_after_the_last_view() {
    let slots = MemorySlots::new(MEMORY, &device(0), SHAPE).unwrap();
    let (pool, locks) = (Pool::new(1).unwrap(), SlotLocks::new(SHAPE.slots));
    for round in 0..3 {
        let (jobs, bytes) = filling(3000, round);
        let guard = locks.lock(1).await.unwrap();
        let sum = slots.fill(guard, jobs, &pool, true).await.unwrap();
        assert_eq!(sum, engine_core::digest::sum(0, &bytes));
        let view = slots.view(locks.lock(1).await.unwrap(), 3000).unwrap();
        assert_eq!(view.to_host().unwrap(), bytes);
        drop(view);
    }
    let error = slots.view(locks.lock(0).await.unwrap(), SHAPE.slot_bytes + 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State, "{error}");
    let (jobs, _) = filling(5000, 0);
    let error = slots.fill(locks.lock(0).await.unwrap(), jobs, &pool, false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State, "{error}");
    let error = slots.shared(&locks.lock(0).await.unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State, "they are given back with their user: {error}");
}

#[tokio::test]
async fn readers_on_other_devices_find_what_fills_a_slot_also_after_it_was_enlarged() {
    let readers = [device(1), device(0), device(2), device(1)];
    let slots = MemorySlots::shared(MEMORY, &device(0), &readers, SHAPE).unwrap();
    let (pool, locks) = (Pool::new(1).unwrap(), SlotLocks::new(SHAPE.slots));
    let mut before = Vec::new();
    for (round, len) in [(0, 4096), (1, 10_000), (2, 100)] {
        let (jobs, bytes) = filling(len, round);
        let guard = locks.lock(1).await.unwrap();
        let guard = slots.enlarge(guard, len as u64).await.unwrap();
        slots.fill(guard, jobs, &pool, false).await.unwrap();
        let guard = locks.lock(1).await.unwrap();
        let places = slots.shared(&guard).unwrap();
        assert_eq!(places.len(), readers.len());
        assert_eq!(places[0], places[3], "they are on one device");
        for place in &places {
            assert!(place.bytes >= len as u64, "{place:?}");
            assert_eq!(contents(place, len), bytes);
        }
        match round {
            1 => assert_ne!(places, before, "the slots have other memory"),
            2 => assert_eq!(places, before, "they are large enough"),
            _ => assert!(places.iter().all(|place| place.start == SHAPE.slot_bytes)),
        }
        before = places;
    }
    let cpu = DeviceChoice::default();
    let error = MemorySlots::shared(MEMORY, &device(0), &[cpu], SHAPE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
}

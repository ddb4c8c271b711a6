//! Weights on a device that are encoded in host memory: every read of a device takes its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use engine_core::memory::{Job, Pool};
use engine_core::{
    DType, DeviceBytes, DeviceMemory, Result, Weight, WeightStreamExt as _, ensure_async_iterator,
};
use futures::StreamExt;
use futures::executor::block_on;

/// Memory of a device that counts how often it is read.
#[derive(Debug)]
struct Counted(Vec<u8>, AtomicU64);

impl DeviceMemory for Counted {
    fn device(&self) -> String {
        "npu:0".into()
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, start: u64, destination: &mut [u8]) -> Result<()> {
        self.1.fetch_add(1, Ordering::Relaxed);
        let start = start as usize;
        destination.copy_from_slice(&self.0[start..start + destination.len()]);
        Ok(())
    }
}

/// 16 MiB of F32, and the same in the host's memory.
fn weights() -> (Arc<Counted>, Weight, Weight) {
    let count = 4_u64 << 20;
    let bytes: Vec<u8> = (0..count as u32).flat_map(|i| (i as f32 * 0.37).to_le_bytes()).collect();
    let memory = Arc::new(Counted(bytes.clone(), AtomicU64::new(0)));
    let there = Weight::new("w", DType::F32, [count], DeviceBytes::new(memory.clone()));
    let here = Weight::new("w", DType::F32, [count], bytes);
    (memory, there.expect("a weight"), here.expect("a weight"))
}

fn cast(weight: Weight, to: &[DType]) -> Weight {
    let mut weights = ensure_async_iterator(vec![weight]);
    for dtype in to {
        weights = weights.cast(*dtype);
    }
    block_on(weights.next()).expect("one").expect("a weight")
}

#[test]
fn a_bucket_reads_a_weight_of_a_device_in_a_few_large_pieces_whatever_is_made_of_it() {
    let pool = Pool::new(4).expect("threads");
    let chains: [&[DType]; 4] =
        [&[], &[DType::BF16], &[DType::F16], &[DType::F64, DType::BF16, DType::F32]];
    for chain in chains {
        for (start, digests) in [(0, true), (0, false), (3, true)] {
            let (memory, there, here) = weights();
            let (there, here) = (cast(there, chain), cast(here, chain));
            let len = there.byte_len() - start;
            let filled = |weight: &Weight| {
                let mut bucket = vec![0; len as usize];
                let job = Job { weight: weight.clone(), start, len, offset: 0 };
                let sum = pool.encode(&[job], &mut bucket, digests).expect("a bucket");
                (sum, bucket)
            };
            assert!(filled(&there) == filled(&here), "{chain:?} from {start}");
            let reads = memory.1.load(Ordering::Relaxed);
            assert!(reads <= 8, "{chain:?} from {start}: {reads} reads of 16 MiB");
        }
    }
}

//! A weight on a device that is quantised in host memory: every read of a device takes its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use engine_core::memory::{Job, Pool};
use engine_core::{DType, DeviceBytes, DeviceMemory, Result, Weight};
use futures::StreamExt;
use futures::executor::block_on;
use quant_fp8::QuantizeFp8;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};

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

#[test]
fn rows_of_blocks_are_read_together() {
    let pool = Pool::new(4).expect("threads");
    // Experts whose last row of blocks is shorter, and a matrix with many rows of blocks.
    for shape in [vec![16_u64, 200, 1000], vec![10_000, 256]] {
        let count: u64 = shape.iter().product();
        // BF16 of about 1.
        let bytes: Vec<u8> =
            (0..count).flat_map(|i| (0x3f80 + (i * 7 % 128) as u16).to_le_bytes()).collect();
        let memory = Arc::new(Counted(bytes.clone(), AtomicU64::new(0)));
        let encoded = |storage: engine_core::Storage| {
            let name = "model.layers.0.mlp.experts.up_proj.weight";
            let weight = Weight::new(name, DType::BF16, shape.clone(), storage).expect("a weight");
            // The shapes are odd on purpose: no engine's profile takes them.
            let mut config = RulesConfig::default();
            config.receiver = Receiver::Any;
            let rules = Rules::new(&config).expect("rules");
            let weights: Vec<_> = block_on(vec![weight].quantize_fp8(rules).collect());
            let (mut jobs, mut offset) = (Vec::new(), 0_u64);
            for weight in weights {
                let weight: Weight = weight.expect("a weight");
                let len = weight.byte_len();
                jobs.push(Job { weight, start: 0, len, offset });
                offset = (offset + len).next_multiple_of(256);
            }
            assert_eq!(jobs.len(), 2, "it was not quantised");
            let mut bucket = vec![0; offset as usize];
            let sum = pool.encode(&jobs, &mut bucket, true).expect("a bucket");
            (sum, bucket)
        };
        let there = encoded(DeviceBytes::new(memory.clone()).into());
        assert!(there == encoded(bytes.into()), "{shape:?}");
        let reads = memory.1.load(Ordering::Relaxed);
        assert!(reads <= 6, "{shape:?}: {reads} reads of {} KiB", count >> 9);
    }
}

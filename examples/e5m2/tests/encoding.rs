//! The encoding behaves as those of the project do: in front of a transport, on the host and on a device.

use std::sync::LazyLock;

use conformance::{Suite, on_memory};
use device_cuda::{CudaMemory, Device, Packer, compile_program, upload};
use engine_core::memory::{Job, Pool};
use engine_core::{DType, Result, Role, Weight};
use half::f16;
use proptest::prelude::*;

fn expected(weights: Vec<Weight>) -> Vec<Weight> {
    weights.into_iter().map(|weight| e5m2::encoded(weight).expect("a weight")).collect()
}

fn suite(device: &str) -> Suite {
    Suite::new(on_memory(backend_ipc::BACKEND, device_cuda::MEMORY))
        .with_control_plane()
        .with_layer(e5m2::LAYER, Role::Trainer, expected)
        .with_config(|config| {
            config.device = device.parse().expect("a device");
            config.timeout_seconds = 4.0;
            config.layers.insert("send_e5m2".into(), true.into());
        })
}

fn on_the_device(weight: Weight) -> Result<Weight> {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));
    upload(&DEVICE, &weight)
}

mod on_the_host {
    conformance::suite!(super::suite("cpu"));
}

mod on_a_device {
    conformance::suite!(
        super::suite("cuda").with_weights_placed(super::on_the_device),
        ignored = "needs a CUDA device"
    );
}

#[test]
#[ignore = "needs NVRTC: CKPT_ENGINE_NVRTC_DIR, or the CUDA toolkit; `cargo xtask test` installs it"]
fn the_kernel_compiles_for_ampere_hopper_and_blackwell() {
    for capability in [(8, 0), (8, 9), (9, 0), (10, 0)] {
        let image = compile_program(&e5m2::CUDA, capability);
        let image = image.unwrap_or_else(|error| panic!("{capability:?}: {error}"));
        assert_eq!(image[..4], *b"\x7fELF", "{capability:?}");
    }
}

/// Every half, of a weight and in a bucket on the device: the same bytes and digest as on the host, and the CPU encodes none.
#[test]
#[ignore = "needs a CUDA device"]
fn a_device_encodes_its_own_weights_by_the_kernel() {
    let device = Device::open(0).expect("a device");
    let packer = Packer::new(&device).expect("a packer");
    let pool = Pool::new(2).expect("threads");
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let host = Weight::new("w", DType::F16, [1 << 16], halves).expect("a weight");
    let there = upload(&device, &host).expect("on the device");
    let job = |weight| {
        let weight = e5m2::encoded(weight).expect("encoded");
        vec![Job { weight, start: 0, len: 1 << 16, offset: 0 }]
    };
    let mut expected = vec![0; 1 << 16];
    let sum = pool.encode(&job(host), &mut expected, true).expect("encoded");
    let bucket = CudaMemory::new(&device, 1 << 16).expect("memory").all();
    assert_eq!(packer.fill(job(there), &bucket, &pool, true).expect("filled"), sum);
    let mut found = vec![0; 1 << 16];
    bucket.read(&mut found).expect("read");
    assert!(found == expected);
    assert_eq!(packer.slower(), [""; 0]);
}

/// The value of a code.
fn value_of(code: u8) -> f32 {
    f16::from_bits(u16::from(code) << 8).to_f32()
}

proptest! {
    #[test]
    fn every_half_becomes_the_nearest_code_and_the_even_one_between_two(bits in any::<u16>()) {
        let half = f16::from_bits(bits);
        let bytes = bits.to_le_bytes().to_vec();
        let weight = Weight::new("w", DType::F16, [1], bytes).expect("a weight");
        let code = e5m2::encoded(weight).expect("encoded").to_bytes().expect("its byte")[0];
        let found = value_of(code);
        prop_assert_eq!(half.is_nan(), found.is_nan());
        // Of all codes of its sign; beyond the last finite one by half a step is infinity.
        let value = half.to_f32();
        let distance = |code: u8| (value_of(code).clamp(-65536.0, 65536.0) - value).abs();
        if value.is_finite() {
            let sign = code & 0x80;
            let nearest = (0..=0x7c).map(|code| sign | code).min_by(|&a, &b| {
                distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))
            });
            prop_assert_eq!(Some(code), nearest);
        } else if value.is_infinite() {
            prop_assert_eq!(found, value);
        }
    }
}

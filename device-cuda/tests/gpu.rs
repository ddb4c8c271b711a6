//! The kernels on a GPU, bit for bit against the codecs of the CPU and against what other people's
//! kernels gave on a GPU.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::{Arc, LazyLock};

use device_cuda::{
    Check, CudaError, CudaMemory, CudaSlice, CudaSpace, CudaTensorMap, Device, DeviceJob, Kernels,
    Launch, Packer, Placer, Write, bucket_storage,
};
use engine_core::memory::{Job, Pool};
use engine_core::plan::{BucketLayout, BucketPlanner, Piece};
use engine_core::{DType, Install, ReceivedBucket, TensorMeta, Weight, WeightStreamExt};
use futures::StreamExt;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{
    Codec, Fp8Format, Fp8Quantizer, Granularity, Mode, Precast, QuantizeFp8, Source, SourceType,
    Store, StridedBlocks, StridedPart, Strides,
};
use safetensors::{Dtype, SafeTensors};

const GOLDEN: &[u8] = include_bytes!("../../quant-fp8/tests/data/golden.safetensors");
const GOLDEN_GPU: &[u8] = include_bytes!("../../quant-fp8/tests/data/golden_gpu.safetensors");

struct Gpu {
    device: Device,
    kernels: Kernels,
}

impl Gpu {
    fn open() -> Self {
        let device = Device::open(0).unwrap();
        let kernels = Kernels::load(&device).unwrap();
        Self { device, kernels }
    }

    fn put(&self, bytes: &[u8]) -> CudaSlice {
        let memory = CudaMemory::new(&self.device, bytes.len()).unwrap();
        let all = memory.slice(0, bytes.len()).unwrap();
        all.write(bytes).unwrap();
        all
    }

    /// Memory that is not zero, so that what is not written shows.
    fn poisoned(&self, len: usize) -> CudaSlice {
        let slice = CudaMemory::new(&self.device, len).unwrap().slice(0, len).unwrap();
        slice.fill(0xa5, self.kernels.stream()).unwrap();
        slice
    }

    /// Codes and scales, in one launch. Sources begin so many elements behind a multiple of 256 bytes, codes so many bytes. Nothing around
    /// the codes is written.
    fn quantize(
        &mut self,
        matrices: &[Matrix],
        format: &Fp8Format,
        shift: usize,
    ) -> Vec<(Vec<u8>, Vec<u8>)> {
        const BEHIND: usize = 40;
        let mut places = Vec::new();
        let jobs: Vec<_> = matrices
            .iter()
            .map(|matrix| {
                let grid = format.granularity.grid(&matrix.shape).unwrap();
                let before = shift * matrix.ty.size();
                let source = self.put(&[&vec![0; before], &matrix.bytes[..]].concat());
                let codes = self.poisoned(shift + grid.elements() + BEHIND);
                places.push((codes.clone(), shift + grid.elements()));
                DeviceJob::Fp8 {
                    source: source.slice(before, matrix.bytes.len()).unwrap(),
                    ty: matrix.ty,
                    shape: matrix.shape.clone(),
                    codes: codes.slice(shift, grid.elements()).unwrap(),
                    scales: self.poisoned(grid.scales() * 4),
                }
            })
            .collect();
        self.kernels.encode(&jobs, format).unwrap();
        let read = |slice: &CudaSlice| {
            let mut bytes = vec![0; slice.len()];
            slice.read(&mut bytes).unwrap();
            bytes
        };
        for (memory, end) in places {
            let bytes = read(&memory);
            let around = bytes[..shift].iter().chain(&bytes[end..]);
            assert!(around.copied().all(|byte| byte == 0xa5), "{shift}: bytes around the codes");
        }
        jobs.iter()
            .map(|job| match job {
                DeviceJob::Fp8 { codes, scales, .. } => (read(codes), read(scales)),
                DeviceJob::Copy { .. } => (Vec::new(), Vec::new()),
            })
            .collect()
    }
}

struct Matrix {
    name: String,
    ty: SourceType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn golden_inputs() -> Vec<Matrix> {
    let golden = SafeTensors::deserialize(GOLDEN).unwrap();
    let inputs = golden.tensors().into_iter().filter_map(|(name, view)| {
        let ty = match view.dtype() {
            Dtype::BF16 => SourceType::Bf16,
            Dtype::F16 => SourceType::F16,
            _ => SourceType::F32,
        };
        let name = name.strip_suffix(".x")?.to_owned();
        Some(Matrix { name, ty, shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    });
    inputs.collect()
}

#[test]
#[ignore = "needs a CUDA device"]
fn golden_inputs_give_the_golden_codes_and_scales_in_every_mode() {
    let mut gpu = Gpu::open();
    let inputs = golden_inputs();
    assert_eq!(inputs.len(), 14);
    for (mode, mode_name, file) in [
        (Mode::Triton, "triton", GOLDEN),
        (Mode::Pytorch, "pytorch", GOLDEN),
        (Mode::Ue8m0, "ue8m0", GOLDEN),
        (Mode::TritonGpu, "triton_gpu", GOLDEN_GPU),
    ] {
        let golden = SafeTensors::deserialize(file).unwrap();
        let format = Fp8Format { mode, precast: Precast::None, ..Fp8Format::default() };
        for (matrix, (codes, scales)) in inputs.iter().zip(gpu.quantize(&inputs, &format, 0)) {
            let what = format!("{} {mode_name}", matrix.name);
            let Ok(expected) = golden.tensor(&format!("{}.{mode_name}.q", matrix.name)) else {
                panic!("no golden data for {what}");
            };
            assert!(expected.data() == codes, "codes of {what}");
            let expected = golden.tensor(&format!("{}.{mode_name}.s", matrix.name)).unwrap();
            assert!(expected.data() == scales, "scales of {what}");
        }
    }
}

/// The threads that make matrices and quantise them for comparison.
fn pool() -> &'static Pool {
    static POOL: LazyLock<Pool> = LazyLock::new(|| Pool::new(8).unwrap());
    &POOL
}

/// Finite numbers of many magnitudes, zeros and subnormal ones among them.
fn random(ty: SourceType, shape: &[usize], seed: u64) -> Matrix {
    let count: usize = shape.iter().product();
    let mut bytes = vec![0; count * ty.size()];
    pool().map(bytes.chunks_mut(1 << 16).enumerate(), |(chunk, bytes)| {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (chunk as u64) << 20 | 1;
        for element in bytes.chunks_exact_mut(ty.size()) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let bits = (state >> 32) as u32;
            let sign_mantissa = bits & 0x807f_ffff;
            // Mostly what weights are, now and then next to nothing.
            let exponent =
                if bits & 0x7f00_0000 == 0 { 20 } else { 113 + (state >> 20) as u32 % 14 };
            let value = f32::from_bits(sign_mantissa | exponent << 23);
            match ty {
                SourceType::Bf16 => {
                    element.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
                }
                SourceType::F16 => {
                    element.copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
                }
                SourceType::F32 => element.copy_from_slice(&value.to_le_bytes()),
            }
        }
    });
    Matrix { name: format!("{ty:?} {shape:?}"), ty, shape: shape.to_vec(), bytes }
}

fn on_the_cpu(matrix: &Matrix, format: &Fp8Format) -> (Vec<u8>, Vec<u8>) {
    let source = Source::new(&matrix.bytes, matrix.ty, &matrix.shape).unwrap();
    let grid = format.granularity.grid(&matrix.shape).unwrap();
    let (mut codes, mut scales) = (vec![0; grid.elements()], vec![0_f32; grid.scales()]);
    let (codec, store) = (Codec::best(), Store::Cached);
    codec.quantize_parallel(pool(), &source, format, &mut codes, &mut scales, store).unwrap();
    (codes, scales.iter().flat_map(|scale| scale.to_le_bytes()).collect())
}

fn same_as_on_the_cpu(gpu: &mut Gpu, matrices: &[Matrix], format: &Fp8Format) {
    for (matrix, found) in matrices.iter().zip(gpu.quantize(matrices, format, 0)) {
        same(matrix, &found, &on_the_cpu(matrix, format), &format!("{format:?}"));
    }
}

/// Compares codes and scales.
fn same(matrix: &Matrix, found: &(Vec<u8>, Vec<u8>), expected: &(Vec<u8>, Vec<u8>), how: &str) {
    let differs = found.0.iter().zip(&expected.0).position(|(a, b)| a != b);
    assert_eq!(differs, None, "codes of {} in {how}", matrix.name);
    assert!(found.1 == expected.1, "scales of {} in {how}", matrix.name);
}

#[test]
#[ignore = "needs a CUDA device"]
fn matrices_of_all_shapes_and_types_at_any_alignment_in_one_launch_and_alone_are_what_they_are_on_the_cpu()
 {
    let mut gpu = Gpu::open();
    let shapes: [&[usize]; 14] = [
        &[1, 1],
        &[1, 1000],
        &[1000, 1],
        &[127, 127],
        &[128, 128],
        &[129, 129],
        &[256, 384],
        &[300, 515],
        &[77, 1024],
        &[1024, 72],
        &[3, 130, 264],
        &[5, 128, 256],
        &[2, 1, 7],
        &[2048, 776],
    ];
    let types = [SourceType::Bf16, SourceType::F16, SourceType::F32];
    let matrices: Vec<Matrix> = types
        .iter()
        .flat_map(|&ty| shapes.iter().zip(1..).map(move |(shape, seed)| random(ty, shape, seed)))
        .collect();
    for mode in [Mode::Triton, Mode::Pytorch, Mode::Ue8m0] {
        for precast in [Precast::Bf16, Precast::None] {
            for (rows, cols) in [(128, 128), (64, 32), (32, 256), (256, 128)] {
                let granularity = Granularity::Block { rows, cols };
                let format = Fp8Format { mode, precast, granularity, ..Fp8Format::default() };
                let expected: Vec<_> =
                    matrices.iter().map(|matrix| on_the_cpu(matrix, &format)).collect();
                for shift in [0, 1, 3, 8] {
                    let how = format!("{format:?}, {shift} elements behind an aligned place");
                    let together = gpu.quantize(&matrices, &format, shift);
                    for (index, matrix) in matrices.iter().enumerate() {
                        // Launches of one kind of blocks have kernels of their own.
                        let alone = gpu.quantize(std::slice::from_ref(matrix), &format, shift);
                        for found in [&together[index], &alone[0]] {
                            same(matrix, found, &expected[index], &how);
                        }
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn blocks_that_begin_anywhere_are_right_where_one_block_of_threads_has_neighbours() {
    // So many blocks that each block of threads has several in a row, and few elements in each.
    let mut gpu = Gpu::open();
    for (ty, seed) in [(SourceType::Bf16, 1), (SourceType::F16, 2), (SourceType::F32, 3)] {
        for shape in [[1100, 3, 1001], [800, 9, 1159], [2000, 1, 513], [1200, 2, 1023]] {
            let matrix = random(ty, &shape, seed);
            for precast in [Precast::Bf16, Precast::None] {
                let format = Fp8Format { precast, ..Fp8Format::default() };
                let expected = on_the_cpu(&matrix, &format);
                for shift in [0, 1, 2, 3, 8] {
                    let found = gpu.quantize(std::slice::from_ref(&matrix), &format, shift);
                    same(
                        &matrix,
                        &found[0],
                        &expected,
                        &format!("{precast:?}, shifted by {shift}"),
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_thousand_million_elements_are_what_they_are_on_the_cpu() {
    let mut gpu = Gpu::open();
    let mut elements = 0;
    for (seed, (ty, shape)) in (1..).zip([
        (SourceType::Bf16, [8191, 16_384]),
        (SourceType::Bf16, [16_385, 8192]),
        (SourceType::Bf16, [9000, 15_001]),
        (SourceType::F16, [8192, 16_392]),
        (SourceType::F32, [8100, 16_640]),
        (SourceType::F32, [4096, 16_387]),
        (SourceType::Bf16, [18_944, 14_336]),
    ]) {
        for mode in [Mode::Triton, Mode::Pytorch, Mode::Ue8m0] {
            let matrix = random(ty, &shape, seed);
            elements += shape[0] * shape[1];
            let format = Fp8Format { mode, ..Fp8Format::default() };
            same_as_on_the_cpu(&mut gpu, &[matrix], &format);
        }
    }
    assert!(elements > 1_000_000_000);
}

#[test]
#[ignore = "needs a CUDA device"]
fn copies_arrive_at_any_alignment_and_the_digest_is_that_of_the_host() {
    let mut gpu = Gpu::open();
    let bytes: Vec<u8> =
        (0..3_000_000_u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    let source = CudaMemory::new(&gpu.device, bytes.len()).unwrap();
    source.all().write(&bytes).unwrap();
    let lens = [0, 1, 7, 15, 16, 17, 255, 256, 4097, 32_768, 32_769, 100_000, 1_000_001];
    for (from, to) in [(0, 0), (1, 0), (4, 8), (2, 2), (16, 256), (3, 7)] {
        let bucket = gpu.poisoned(2_000_000);
        let mut expected = vec![0xa5; 2_000_000];
        let (mut jobs, mut at) = (Vec::new(), 0);
        for len in lens {
            let target = bucket.slice(at + to, len).unwrap();
            jobs.push(DeviceJob::Copy { source: source.slice(at + from, len).unwrap(), target });
            expected[at + to..at + to + len].copy_from_slice(&bytes[at + from..at + from + len]);
            at = (at + len + 16).next_multiple_of(256);
        }
        gpu.kernels.encode(&jobs, &Fp8Format::default()).unwrap();
        let mut here = vec![0; bucket.len()];
        bucket.read(&mut here).unwrap();
        assert!(here == expected, "from {from} to {to}");
    }
    let (mut parts, mut sum, mut at) = (Vec::new(), 0_u64, 0);
    for len in lens {
        parts.push((at as u64, source.slice(at, len).unwrap()));
        sum = sum.wrapping_add(engine_core::digest::sum(at as u64, &bytes[at..at + len]));
        at = (at + len).next_multiple_of(256);
    }
    let digest = |gpu: &mut Gpu| gpu.kernels.run(&[Launch::Digest(&parts)]).unwrap().sum;
    assert_eq!(digest(&mut gpu), sum);
    source.slice(200_000, 1).unwrap().write(&[bytes[200_000] ^ 1]).unwrap();
    assert_ne!(digest(&mut gpu), sum);
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_first_block_that_is_not_finite_is_named_and_the_next_launch_works() {
    let mut gpu = Gpu::open();
    let good = random(SourceType::Bf16, &[256, 256], 1);
    let mut bad = random(SourceType::Bf16, &[300, 300], 2);
    for (row, col, bits) in [(200, 299, 0x7fc0_u16), (299, 0, 0xff80)] {
        let at = (row * 300 + col) * 2;
        bad.bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    }
    let format = Fp8Format::default();
    let jobs: Vec<DeviceJob> = [&good, &bad, &bad]
        .map(|matrix| DeviceJob::Fp8 {
            source: gpu.put(&matrix.bytes),
            ty: matrix.ty,
            shape: matrix.shape.clone(),
            codes: gpu.poisoned(matrix.bytes.len() / 2),
            scales: gpu.poisoned(if matrix.shape[0] == 256 { 16 } else { 36 }),
        })
        .into();
    match gpu.kernels.encode(&jobs, &format) {
        Err(CudaError::NonFinite { job: 1, block: 5 }) => {}
        other => panic!("{other:?}"),
    }
    same_as_on_the_cpu(&mut gpu, &[good], &format);
}

#[test]
#[ignore = "needs a CUDA device"]
fn memory_that_there_is_not_is_an_error_and_what_there_was_is_given_back() {
    let gpu = Gpu::open();
    let (before, total) = gpu.device.memory().unwrap();
    let error = CudaMemory::new(&gpu.device, total * 2).unwrap_err();
    let error = engine_core::Error::from(error);
    assert_eq!(error.kind(), engine_core::ErrorKind::Resource, "{error}");
    for _ in 0..50 {
        drop(CudaMemory::new(&gpu.device, total / 4).unwrap());
    }
    let (after, _) = gpu.device.memory().unwrap();
    assert!(after + (64 << 20) >= before, "{before} bytes were free, {after} are");
}

#[test]
#[ignore = "needs a CUDA device"]
fn memory_for_life_is_given_out_again_when_nobody_has_it_and_to_nobody_else_before() {
    let gpu = Gpu::open();
    // No other test has this length.
    let get = || CudaMemory::for_life(&gpu.device, 3 << 20).unwrap();
    let (first, second) = (get(), get());
    assert_ne!(first.address(), second.address());
    let address = first.address();
    let clone = first.clone();
    drop(first);
    let third = get();
    assert_ne!(third.address(), address, "a clone of the first is still there");
    drop(clone);
    assert_eq!(get().address(), address);
}

const CHILD: &str = "CKPT_ENGINE_TEST_IPC";

#[test]
#[ignore = "needs a CUDA device"]
fn another_process_reads_the_memory_in_place() {
    let gpu = Gpu::open();
    if let Some(text) = std::env::var_os(CHILD) {
        // This is the other process.
        let text = text.into_string().unwrap();
        let byte = |at: usize| u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).unwrap();
        let handle = std::array::from_fn(byte);
        let memory =
            CudaMemory::import(&gpu.device, handle, 1 << 20, std::sync::Arc::new(())).unwrap();
        let mut bytes = vec![0; 1 << 20];
        memory.all().read(&mut bytes).unwrap();
        assert!(bytes.iter().enumerate().all(|(i, &byte)| byte == (i % 251) as u8));
        memory.slice(5, 1).unwrap().write(&[77]).unwrap();
        return;
    }
    let memory = CudaMemory::new(&gpu.device, 1 << 20).unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
    memory.all().write(&bytes).unwrap();
    let handle: String =
        memory.export().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["another_process_reads_the_memory_in_place", "--exact", "--ignored"])
        .env(CHILD, handle)
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    let mut byte = [0];
    memory.slice(5, 1).unwrap().read(&mut byte).unwrap();
    assert_eq!(byte, [77]);
}

/// Weights of all kinds, quantised where the rules say so, in plans of buckets of several sizes: what the
/// packer writes and sums up is what the CPU does.
#[test]
#[ignore = "needs a CUDA device"]
fn a_bucket_that_the_device_fills_is_what_the_cpu_fills_digest_included() {
    let device = Device::open(0).unwrap();
    let packer = Packer::new(&device).unwrap();
    let pool = Pool::new(4).unwrap();
    let on_device = |matrix: &Matrix, name: &str, dtype: DType, device: Option<&Device>| {
        let shape: Vec<u64> = matrix.shape.iter().map(|&side| side as u64).collect();
        let storage = match device {
            None => matrix.bytes.clone().into(),
            Some(device) => {
                let memory = CudaMemory::new(device, matrix.bytes.len()).unwrap();
                memory.all().write(&matrix.bytes).unwrap();
                memory.all().storage()
            }
        };
        Weight::new(name, dtype, shape, storage).unwrap()
    };
    let shapes: [&[usize]; 9] = [
        &[1, 8],
        &[300, 515],
        &[1024, 776],
        &[3, 130, 264],
        &[4, 256, 128],
        &[128, 4096],
        &[2, 1, 7],
        &[65, 3],
        &[700, 1000],
    ];
    let model = |device: Option<&Device>| -> Vec<Weight> {
        let types = [
            (SourceType::Bf16, DType::BF16),
            (SourceType::F16, DType::F16),
            (SourceType::F32, DType::F32),
        ];
        let mut weights = Vec::new();
        for (layer, &(ty, dtype)) in types.iter().enumerate() {
            for (index, shape) in shapes.iter().enumerate() {
                let matrix = random(ty, shape, index as u64);
                let name = format!("model.layers.{layer}.mlp.{index}.up_proj.weight");
                // Every fifth stays in host memory.
                let device = device.filter(|_| index % 5 != 4);
                weights.push(on_device(&matrix, &name, dtype, device));
                let norm = random(ty, &[1, 333], 7);
                let name = format!("model.layers.{layer}.{index}.norm.weight");
                weights.push(on_device(&norm, &name, dtype, device));
            }
        }
        quantized(weights, &quantizer())
    };
    // The same weights every time: where their scales are differs from one size to the next.
    let (here, there) = (model(None), model(Some(&device)));
    for bucket_bytes in [64 << 20, 100_096, 4096_u64, 1 << 20, 100_096, 64 << 20] {
        let bucket = CudaMemory::new(&device, bucket_bytes as usize).unwrap();
        let plans = [plan(&here, bucket_bytes), plan(&there, bucket_bytes)];
        assert_eq!(plans[0].len(), plans[1].len());
        for (index, (here, there)) in plans[0].iter().zip(&plans[1]).enumerate() {
            let mut expected = vec![0xee_u8; bucket_bytes as usize];
            bucket.all().write(&expected).unwrap();
            let sum = pool.encode(here, &mut expected, true).unwrap();
            let filled = packer.fill(there.clone(), &bucket.all(), &pool, true).unwrap();
            let mut bytes = vec![0; bucket_bytes as usize];
            bucket.all().read(&mut bytes).unwrap();
            for (job, other) in here.iter().zip(there) {
                let part = job.offset as usize..(job.offset + job.len) as usize;
                let name = job.weight.name();
                assert_eq!((other.offset, other.len), (job.offset, job.len), "{name}");
                assert!(bytes[part.clone()] == expected[part], "{name} in bucket {index}");
            }
            assert!(bytes == expected, "bytes between weights of bucket {index}");
            assert_eq!(filled, sum, "bucket {index} of {bucket_bytes} bytes");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn weights_of_a_device_that_the_cpu_has_to_encode_are_said_once() {
    let device = Device::open(0).unwrap();
    let packer = Packer::new(&device).unwrap();
    let pool = Pool::new(2).unwrap();
    let bucket = CudaMemory::new(&device, 1 << 20).unwrap();
    let weight = |name: &str| {
        let memory = CudaMemory::new(&device, 2 * 128 * 256).unwrap();
        memory.all().write(&[0; 2 * 128 * 256]).unwrap();
        let name = format!("model.layers.0.mlp.{name}.weight");
        Weight::new(name, DType::BF16, [128_u64, 256], memory.all().storage()).unwrap()
    };
    let fill = |weights: Vec<Weight>| {
        for jobs in plan(&weights, 1 << 20) {
            packer.fill(jobs, &bucket.all(), &pool, true).unwrap();
        }
        packer.slower()
    };
    let codes = quantized(vec![weight("up_proj")], &quantizer());
    assert_eq!(fill(codes), [""; 0], "there is a kernel for it");
    // From F64 the CPU rounds to 16 bits.
    let wide = |name| {
        let storage = weight(name).storage().unwrap().clone();
        Weight::new(name, DType::F64, [64_u64, 128], storage).unwrap()
    };
    let weights = vec![wide("up_proj"), wide("down_proj"), wide("gate_proj")];
    let cast = weights.cast(DType::BF16).map(|weight| weight.unwrap());
    let said = fill(futures::executor::block_on(cast.collect()));
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("3 weights on a device") && said[0].contains("`cast`"), "{said:?}");
    assert_eq!(packer.slower(), [""; 0], "it was said");
}

/// All halves, floats of all exponents with their neighbours, and what is no number; cast to every other type, in views of all
/// sorts, in buckets of several sizes.
#[test]
#[ignore = "needs a CUDA device"]
fn casts_and_views_that_are_not_contiguous_are_encoded_on_the_device_as_on_the_cpu() {
    let device = Device::open(0).unwrap();
    let packer = Packer::new(&device).unwrap();
    let pool = Pool::new(4).unwrap();
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let floats: Vec<u8> = (0..=u16::MAX)
        .flat_map(|upper| {
            [0_u32, 1, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xefff, 0xf000, 0xffff]
                .map(|lower| (u32::from(upper) << 16 | lower).to_le_bytes())
        })
        .flatten()
        .collect();
    let doubles: Vec<u8> = (0..=u16::MAX)
        .flat_map(|upper| {
            [0_u64, 1, 1 << 28, 1 << 29, (1 << 28) + 1, 3 << 28, (1 << 48) - 1]
                .map(|lower| (u64::from(upper) << 48 | lower).to_le_bytes())
        })
        .flatten()
        .collect();
    let model = |put: &dyn Fn(&[u8]) -> engine_core::Storage| -> Vec<Weight> {
        let mut weights = Vec::new();
        let sources = [
            (DType::BF16, &halves, &[DType::F16, DType::F32, DType::F64][..]),
            (DType::F16, &halves, &[DType::BF16, DType::F32, DType::F64]),
            (DType::F32, &floats, &[DType::BF16, DType::F16, DType::F64]),
            (DType::F64, &doubles, &[DType::F32]),
        ];
        for (from, bytes, casts) in sources {
            let size = from.bytes().unwrap();
            for &to in casts {
                // Whole, and a part of odd length, at an address that is not that of a vector.
                for (skipped, dropped) in [(0, 0), (8, 5 * size)] {
                    let storage = put(bytes);
                    let storage = storage.slice(skipped..storage.len() - dropped);
                    let len = storage.len() / size;
                    let name = format!("{from}.{to}.{skipped}");
                    let weight = Weight::new(name, from, [len], storage.slice(0..len * size));
                    let cast = vec![weight.unwrap()].cast(to).map(|weight| weight.unwrap());
                    weights.extend(futures::executor::block_on(cast.collect::<Vec<_>>()));
                }
            }
        }
        for (dtype, shape, strides, offset) in [
            (DType::U8, &[60_u64, 1000][..], &[1_i64, 60][..], 3),
            (DType::BF16, &[123, 77], &[1, 123], 8),
            (DType::F32, &[5, 7, 11], &[-77, 11, -1], 318),
            (DType::F64, &[33, 65], &[2, 130], 1),
            (DType::F16, &[1000], &[0], 9),
        ] {
            let name = format!("view.{dtype}");
            let view = Weight::strided(name, dtype, shape, strides, offset, put(&floats));
            weights.push(view.unwrap());
        }
        weights
    };
    let there = model(&|bytes| {
        let memory = CudaMemory::new(&device, bytes.len()).unwrap();
        memory.all().write(bytes).unwrap();
        memory.all().storage()
    });
    let here = model(&|bytes| bytes.to_vec().into());
    for bucket_bytes in [64 << 20, 100_096, 1_u64 << 20, 64 << 20, 64 << 20] {
        let bucket = CudaMemory::new(&device, bucket_bytes as usize).unwrap();
        for (here, there) in plan(&here, bucket_bytes).iter().zip(plan(&there, bucket_bytes)) {
            let mut expected = vec![0xee_u8; bucket_bytes as usize];
            bucket.all().write(&expected).unwrap();
            let sum = pool.encode(here, &mut expected, true).unwrap();
            let filled = packer.fill(there, &bucket.all(), &pool, true).unwrap();
            let mut bytes = vec![0; bucket_bytes as usize];
            bucket.all().read(&mut bytes).unwrap();
            for job in here {
                let part = job.offset as usize..(job.offset + job.len) as usize;
                let (found, expected) = (&bytes[part.clone()], &expected[part]);
                let differs = found.iter().zip(expected).position(|(a, b)| a != b);
                assert_eq!(differs, None, "{} from {}", job.weight.name(), job.start);
            }
            assert!(bytes == expected, "bytes between weights");
            assert_eq!(filled, sum, "a bucket of {bucket_bytes} bytes");
        }
    }
    assert_eq!(packer.slower(), [""; 0], "the CPU had to encode some");
}

#[test]
#[ignore = "needs a CUDA device"]
fn scales_are_right_where_another_rank_fills_every_second_bucket() {
    let device = Device::open(0).unwrap();
    let packers = [Packer::new(&device).unwrap(), Packer::new(&device).unwrap()];
    let pool = Pool::new(4).unwrap();
    let model = |device: Option<&Device>| -> Vec<Weight> {
        let weights: Vec<Weight> = (0..6)
            .map(|index| {
                let matrix = random(SourceType::Bf16, &[700, 1000], index);
                let storage = match device {
                    None => matrix.bytes.into(),
                    Some(device) => {
                        let memory = CudaMemory::new(device, matrix.bytes.len()).unwrap();
                        memory.all().write(&matrix.bytes).unwrap();
                        memory.all().storage()
                    }
                };
                let name = format!("model.layers.{index}.mlp.up_proj.weight");
                Weight::new(name, DType::BF16, [700_u64, 1000], storage).unwrap()
            })
            .collect();
        quantized(weights, &quantizer())
    };
    // Each of the ranks has the model, and encodes its own buckets of it.
    let (here, there) = (model(None), [model(Some(&device)), model(Some(&device))]);
    for bucket_bytes in [200_192_u64, 500_224] {
        let bucket = CudaMemory::new(&device, bucket_bytes as usize).unwrap();
        let there = [plan(&there[0], bucket_bytes), plan(&there[1], bucket_bytes)];
        for (index, here) in plan(&here, bucket_bytes).iter().enumerate() {
            let mut expected = vec![0xee_u8; bucket_bytes as usize];
            bucket.all().write(&expected).unwrap();
            let sum = pool.encode(here, &mut expected, true).unwrap();
            let jobs = &there[index % 2][index];
            let filled = packers[index % 2].fill(jobs.clone(), &bucket.all(), &pool, true).unwrap();
            let mut bytes = vec![0; bucket_bytes as usize];
            bucket.all().read(&mut bytes).unwrap();
            assert!(bytes == expected, "bucket {index} of {bucket_bytes} bytes");
            assert_eq!(filled, sum, "bucket {index} of {bucket_bytes} bytes");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn what_was_prepared_keeps_its_memory_and_is_launched_only_as_long_as_it_is_the_last() {
    let mut gpu = Gpu::open();
    let (source, target) = (gpu.put(&[7; 5000]), gpu.poisoned(5000));
    let jobs = [DeviceJob::Copy { source, target: target.clone() }];
    let launch = Launch::Encode { jobs: &jobs, format: &Fp8Format::default(), summed: None };
    let first = gpu.kernels.prepare(&[launch]).unwrap();
    // The source is now the prepared launch's alone.
    drop(jobs);
    gpu.kernels.launch(&first).unwrap();
    gpu.kernels.stream().synchronize().unwrap();
    let mut bytes = vec![0; 5000];
    target.read(&mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 7));
    let _second = gpu.kernels.prepare(&[Launch::Digest(&[])]).unwrap();
    match gpu.kernels.launch(&first) {
        Err(CudaError::Range(_)) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn memory_that_work_of_a_stream_uses_goes_when_the_work_is_done() {
    let gpu = Gpu::open();
    let (free, _) = gpu.device.memory().unwrap();
    let stream = gpu.kernels.stream();
    let last = CudaMemory::new(&gpu.device, 256 << 20).unwrap();
    for round in 0..20_u8 {
        let (from, to) = (
            CudaMemory::new(&gpu.device, 256 << 20).unwrap(),
            CudaMemory::new(&gpu.device, 256 << 20).unwrap(),
        );
        from.all().fill(round, stream).unwrap();
        to.all().copy_from(&from.all(), stream).unwrap();
        last.all().copy_from(&to.all(), stream).unwrap();
        drop((from, to));
        if round % 2 == 1 {
            stream.synchronize().unwrap();
        }
    }
    let mut bytes = vec![0; 1 << 20];
    last.slice(255 << 20, 1 << 20).unwrap().read(&mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 19));
    drop(last);
    let (now, _) = gpu.device.memory().unwrap();
    assert!(now + (64 << 20) >= free, "{free} bytes were free, {now} are");
}

/// A weight of a model in memory of the device, which counts who keeps it.
#[allow(unsafe_code, reason = "memory with an owner of its own")]
fn counted(device: &Device, matrix: &Matrix, name: &str, owner: &Arc<()>) -> Weight {
    let memory = CudaMemory::new(device, matrix.bytes.len()).unwrap();
    memory.all().write(&matrix.bytes).unwrap();
    let (address, len) = (memory.address(), memory.len());
    let owner = Arc::new((memory, Arc::clone(owner)));
    // SAFETY: the owner has the memory.
    let memory = unsafe { CudaMemory::borrowed(device, address, len, owner) };
    let shape: Vec<u64> = matrix.shape.iter().map(|&side| side as u64).collect();
    Weight::new(name, DType::BF16, shape, memory.all().storage()).unwrap()
}

/// Updates of which most are like the one before; in some, weights have moved, are others, or are missing, and
/// buckets change their slots. Each bucket of each is what the CPU makes of the same weights, and in between the packer
/// keeps no weight alive.
#[test]
#[ignore = "needs a CUDA device"]
fn updates_that_repeat_are_right_also_when_weights_move_and_no_weight_is_kept_between_them() {
    const BUCKET: u64 = 300_032;
    let device = Device::open(0).unwrap();
    let packer = Packer::new(&device).unwrap();
    let pool = Pool::new(4).unwrap();
    let quantizer = quantizer();
    let quantize = |weights| quantized(weights, &quantizer);
    let shapes: [&[usize]; 5] = [&[256, 384], &[700, 1000], &[1, 333], &[128, 128], &[130, 264]];
    let make = |index: usize, seed| random(SourceType::Bf16, shapes[index % shapes.len()], seed);
    let name = |index: usize| match shapes[index % shapes.len()] {
        [1, _] => format!("model.layers.{index}.input_layernorm.weight"),
        _ => format!("model.layers.{index}.mlp.up_proj.weight"),
    };
    let owner = Arc::new(());
    let mut here: Vec<Matrix> = (0..20).map(|index| make(index, index as u64)).collect();
    let put = |here: &[Matrix]| -> Vec<Weight> {
        let each = here.iter().enumerate();
        each.map(|(index, matrix)| counted(&device, matrix, &name(index), &owner)).collect()
    };
    let mut there = put(&here);
    let slots = CudaMemory::new(&device, 3 * BUCKET as usize).unwrap();
    for update in 0..16_usize {
        match update {
            // Other bytes where the old ones were.
            4 => {
                here[3] = make(3, 99);
                let storage = there[3].storage().unwrap();
                CudaSlice::of_storage(storage).unwrap().write(&here[3].bytes).unwrap();
            }
            // One has moved.
            6 => there[6] = counted(&device, &here[6], &name(6), &owner),
            // All have moved, as if they had been gathered anew: some to where others were.
            9 => {
                there.clear();
                here.rotate_left(5);
                there = put(&here);
            }
            // One is missing.
            12 => drop((here.pop(), there.pop())),
            _ => {}
        }
        let on_host = here.iter().enumerate().map(|(index, matrix)| {
            let shape: Vec<u64> = matrix.shape.iter().map(|&side| side as u64).collect();
            Weight::new(name(index), DType::BF16, shape, matrix.bytes.clone()).unwrap()
        });
        let expected = plan(&quantize(on_host.collect()), BUCKET);
        let jobs = plan(&quantize(there.clone()), BUCKET);
        assert!(jobs.len() > 4, "{} buckets", jobs.len());
        for (index, (expected, jobs)) in expected.iter().zip(jobs).enumerate() {
            let slot = if update == 8 { index % 3 } else { index % 2 };
            let bucket = slots.slice(slot * BUCKET as usize, BUCKET as usize).unwrap();
            let mut bytes = vec![0xee_u8; BUCKET as usize];
            bucket.write(&bytes).unwrap();
            let sum = pool.encode(expected, &mut bytes, true).unwrap();
            let filled = packer.fill(jobs, &bucket, &pool, true).unwrap();
            let mut made = vec![0; BUCKET as usize];
            bucket.read(&mut made).unwrap();
            assert!(made == bytes, "bucket {index} of update {update}");
            assert_eq!(filled, sum, "bucket {index} of update {update}");
        }
        // A weight and its source's clone were all that had an owner.
        assert_eq!(Arc::strong_count(&owner), 1 + there.len(), "after update {update}");
    }
    drop(there);
    assert_eq!(Arc::strong_count(&owner), 1);
}

/// Buckets of an update as a rollout gets them: what the map copies out has the digest of what is in the bucket, also where
/// pieces end within a word, and a map whose tensors are others copies nothing.
#[test]
#[ignore = "needs a CUDA device"]
fn a_map_copies_buckets_that_it_knows_out_and_digests_them_in_one_pass() {
    let device = Device::open(0).unwrap();
    let packer = Packer::new(&device).unwrap();
    let pool = Pool::new(2).unwrap();
    let mut map = CudaTensorMap::new(&device).unwrap();
    let pieces = |lens: &[u64]| -> Vec<Piece> {
        let mut offset = 0;
        let place = |(index, &len): (usize, &u64)| {
            let meta = TensorMeta::new(format!("w{index}"), DType::U8, [len]).into();
            let piece = Piece { meta, start: 0, len, offset };
            offset = (offset + len).next_multiple_of(256);
            piece
        };
        lens.iter().enumerate().map(place).collect()
    };
    // The last one is a part of a larger tensor, which begins anywhere.
    let lens = [300, 16_384, 7, 100_001, 0, 64, 33];
    let mut all = pieces(&lens);
    all.last_mut().unwrap().meta = TensorMeta::new("part", DType::U8, [1000]).into();
    all.last_mut().unwrap().start = 13;
    let layout = Arc::new(BucketLayout::new(all));
    let memory = CudaMemory::new(&device, 1 << 20).unwrap();
    let storage = bucket_storage(&memory, &packer).slice(4096..4096 + layout.filled());
    let copies = map.copies().unwrap();
    for round in 0..4_u64 {
        let bytes: Vec<u8> =
            (0..layout.filled()).map(|at| (at.wrapping_mul(0x9e37 + round) >> 7) as u8).collect();
        memory.slice(4096, bytes.len()).unwrap().write(&bytes).unwrap();
        let expected = pool.digest(layout.pieces(), &bytes.clone().into()).unwrap();
        assert_eq!(pool.digest(layout.pieces(), &storage).unwrap(), expected);
        let bucket = ReceivedBucket::new(0, layout.clone(), storage.clone()).unwrap();
        match copies.copy_out(&layout, &storage).unwrap() {
            None => {
                assert_eq!(round, 0, "it was installed before");
                map.install(&bucket).unwrap();
            }
            Some(sum) => assert_eq!(sum, expected, "round {round}"),
        }
        for piece in layout.pieces() {
            let (_, tensor) = map.get(&piece.meta.name).unwrap();
            let part = tensor.slice(piece.start as usize, piece.len as usize).unwrap();
            let mut here = vec![0; part.len()];
            part.read(&mut here).unwrap();
            let at = piece.offset as usize;
            assert!(here == bytes[at..at + here.len()], "{} in round {round}", piece.meta.name);
        }
    }
    // The same names with other sizes: the memory is another one.
    let other = Arc::new(BucketLayout::new(pieces(&[301, 16_384])));
    let there = storage.slice(0..other.filled());
    map.install(&ReceivedBucket::new(0, other.clone(), there.clone()).unwrap()).unwrap();
    assert_eq!(copies.copy_out(&layout, &storage).unwrap(), None);
    assert!(copies.copy_out(&other, &there).unwrap().is_some());
}

/// A weight that is not finite fails an update in its middle; the next ones are right.
#[test]
#[ignore = "needs a CUDA device"]
fn an_update_that_failed_leaves_nothing_behind_for_the_next_ones() {
    let device = Device::open(0).unwrap();
    let packer = Packer::new(&device).unwrap();
    let pool = Pool::new(2).unwrap();
    let quantizer = quantizer();
    let matrix = random(SourceType::Bf16, &[700, 1000], 1);
    let owner = Arc::new(());
    let weights: Vec<Weight> = (0..3)
        .map(|index| {
            let name = format!("model.layers.{index}.mlp.up_proj.weight");
            counted(&device, &matrix, &name, &owner)
        })
        .collect();
    let bucket = CudaMemory::new(&device, 500_224).unwrap();
    let mut sums = Vec::new();
    for update in 0..8 {
        let last = CudaSlice::of_storage(weights[2].storage().unwrap()).unwrap();
        let mut bytes = matrix.bytes.clone();
        if matches!(update, 1 | 4) {
            bytes[600_000..600_002].copy_from_slice(&0x7fc0_u16.to_le_bytes());
        }
        last.write(&bytes).unwrap();
        let quantized = quantized(weights.clone(), &quantizer);
        let fill = |jobs| packer.fill(jobs, &bucket.all(), &pool, true);
        let all: engine_core::Result<Vec<u64>> =
            plan(&quantized, 500_224).into_iter().map(fill).collect();
        match update {
            1 | 4 => assert_eq!(all.unwrap_err().kind(), engine_core::ErrorKind::Weight),
            _ => sums.push(all.unwrap()),
        }
        drop(quantized);
        assert_eq!(Arc::strong_count(&owner), 4, "after update {update}");
    }
    assert!(sums.iter().all(|all| *all == sums[0]));
}

/// So many weights that the device begins before all are sorted, in several launches: the bucket is what the CPU makes of them, also when
/// they come again; a weight that is not finite is named, whichever launch it is in; and nothing is kept once the packer has settled.
#[test]
#[ignore = "needs a CUDA device"]
fn a_bucket_of_a_thousand_weights_is_right_and_names_what_is_not_finite_and_keeps_nothing() {
    const BUCKET: u64 = 32 << 20;
    let device = Device::open(0).unwrap();
    let packer = Packer::new(&device).unwrap();
    let pool = Pool::new(4).unwrap();
    let quantizer = quantizer();
    let owner = Arc::new(());
    let name = |index: usize| format!("model.layers.{index}.mlp.up_proj.weight");
    let here: Vec<Matrix> =
        (0..1000).map(|seed| random(SourceType::Bf16, &[128, 136], seed)).collect();
    let each = || here.iter().enumerate();
    let there: Vec<Weight> =
        each().map(|(index, matrix)| counted(&device, matrix, &name(index), &owner)).collect();
    let on_host = each().map(|(index, matrix)| {
        Weight::new(name(index), DType::BF16, [128_u64, 136], matrix.bytes.clone()).unwrap()
    });
    let expected = plan(&quantized(on_host.collect(), &quantizer), BUCKET).remove(0);
    let mut bytes = vec![0_u8; BUCKET as usize];
    let sum = pool.encode(&expected, &mut bytes, true).unwrap();
    let bucket = CudaMemory::new(&device, BUCKET as usize).unwrap();
    let fill = || {
        let jobs = plan(&quantized(there.clone(), &quantizer), BUCKET).remove(0);
        assert_eq!(jobs.len(), 2000, "codes and scales");
        packer.fill(jobs, &bucket.all(), &pool, true)
    };
    for update in 0..3 {
        bucket.all().write(&vec![0; BUCKET as usize]).unwrap();
        assert_eq!(fill().unwrap(), sum, "update {update}");
        let mut made = vec![0; BUCKET as usize];
        bucket.all().read(&mut made).unwrap();
        assert!(made == bytes, "update {update}");
        packer.settle();
        assert_eq!(Arc::strong_count(&owner), 1 + there.len(), "after update {update}");
    }
    for index in [3, 200, 700, 999] {
        let storage = CudaSlice::of_storage(there[index].storage().unwrap()).unwrap();
        let mut wrong = here[index].bytes.clone();
        wrong[70..72].copy_from_slice(&0x7fc0_u16.to_le_bytes());
        storage.write(&wrong).unwrap();
        let error = fill().unwrap_err();
        assert_eq!(error.report().tensor, Some(name(index)), "{error}");
        storage.write(&here[index].bytes).unwrap();
        assert_eq!(Arc::strong_count(&owner), 1 + there.len(), "after a failure");
        assert_eq!(fill().unwrap(), sum, "after the failure of weight {index}");
    }
    packer.settle();
    drop(there);
    assert_eq!(Arc::strong_count(&owner), 1);
}

/// Quantises every matrix, whatever its sides.
fn quantizer() -> Fp8Quantizer {
    let mut config = RulesConfig::default();
    config.receiver = Receiver::Any;
    Rules::new(&config).unwrap().into()
}

fn quantized(weights: Vec<Weight>, quantizer: &Fp8Quantizer) -> Vec<Weight> {
    let quantized = weights.quantize_fp8(quantizer).map(|weight| weight.unwrap());
    let quantized: Vec<Weight> = futures::executor::block_on(quantized.collect());
    assert!(quantized.iter().any(|weight| weight.meta().dtype == DType::F8_E4M3));
    quantized
}

/// The jobs of each bucket of a plan.
fn plan(weights: &[Weight], bucket_bytes: u64) -> Vec<Vec<Job>> {
    let mut planner = BucketPlanner::new(bucket_bytes).unwrap();
    let (mut buckets, mut jobs) = (Vec::new(), Vec::new());
    for weight in weights {
        let (mut start, total) = (0, weight.byte_len());
        loop {
            let name = weight.name().len();
            if let Some(place) = planner.place(name, total, total - start, weight.granule()) {
                let weight = weight.clone();
                jobs.push(Job { weight, start, len: place.len, offset: place.offset });
                start += place.len;
            }
            if start == total && jobs.last().is_some_and(|job| job.weight.name() == weight.name()) {
                break;
            }
            planner.close();
            buckets.push(std::mem::take(&mut jobs));
        }
    }
    planner.close();
    buckets.push(jobs);
    buckets
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_weight_that_is_not_finite_is_named_by_the_packer() {
    let device = Device::open(0).unwrap();
    let packer = Packer::new(&device).unwrap();
    let mut matrix = random(SourceType::Bf16, &[300, 300], 2);
    let at = (200 * 300 + 299) * 2;
    matrix.bytes[at..at + 2].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    let memory = CudaMemory::new(&device, matrix.bytes.len()).unwrap();
    memory.all().write(&matrix.bytes).unwrap();
    let name = "model.layers.3.mlp.up_proj.weight";
    let weight = Weight::new(name, DType::BF16, [300, 300], memory.all().storage()).unwrap();
    let weights = quantized(vec![weight], &quantizer());
    let bucket = CudaMemory::new(&device, 1 << 20).unwrap();
    let pool = Pool::new(1).unwrap();
    let jobs = plan(&weights, 1 << 20).remove(0);
    let error = packer.fill(jobs, &bucket.all(), &pool, true).unwrap_err();
    assert_eq!(error.kind(), engine_core::ErrorKind::Weight);
    let text = error.to_string();
    assert!(text.contains(name) && text.contains("(1, 2)"), "{text}");
}

/// The Python that has Triton; `python3` unless it is named.
const PYTHON: &str = "CKPT_ENGINE_TRITON_PYTHON";

#[test]
#[ignore = "needs a CUDA device, and a Python with Triton and PyTorch"]
fn triton_itself_gives_the_codes_and_scales_of_mode_triton_gpu() {
    let mut gpu = Gpu::open();
    let folder = tempfile::tempdir().unwrap();
    let (script, input, output) =
        (folder.path().join("t.py"), folder.path().join("in"), folder.path().join("out"));
    std::fs::write(&script, include_str!("triton_reference.py")).unwrap();
    // Other numbers in every run.
    let seed = std::process::id().into();
    let shapes = [[1000, 1000], [128, 128], [129, 4096], [4096, 1], [3584, 18_944], [77, 776]];
    let matrices: Vec<Matrix> = shapes
        .iter()
        .zip(seed..)
        .map(|(shape, seed)| random(SourceType::Bf16, shape, seed))
        .collect();
    let mut bytes = Vec::new();
    for matrix in &matrices {
        matrix.shape.iter().for_each(|&side| bytes.extend((side as u32).to_le_bytes()));
        bytes.extend(&matrix.bytes);
    }
    std::fs::write(&input, bytes).unwrap();
    let python = std::env::var_os(PYTHON).unwrap_or_else(|| "python3".into());
    let ran = std::process::Command::new(&python).arg(&script).args([&input, &output]).output();
    let ran = ran.unwrap_or_else(|error| panic!("{PYTHON}: {error}"));
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));

    let theirs = std::fs::read(&output).unwrap();
    let format = Fp8Format { mode: Mode::TritonGpu, ..Fp8Format::default() };
    let mut rest = &theirs[..];
    for (matrix, (codes, scales)) in matrices.iter().zip(gpu.quantize(&matrices, &format, 0)) {
        let (their_codes, after) = rest.split_at(codes.len());
        let (their_scales, after) = after.split_at(scales.len());
        rest = after;
        let differ = codes.iter().zip(their_codes).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 0, "codes of {}, seed {seed}", matrix.name);
        assert!(scales == their_scales, "scales of {}, seed {seed}", matrix.name);
    }
    assert!(rest.is_empty());
}

#[test]
#[ignore = "needs a CUDA device"]
#[allow(unsafe_code, reason = "an interface of pointers")]
fn a_tensor_of_the_device_goes_out_and_comes_back_by_dlpack_without_a_copy() {
    let gpu = Gpu::open();
    let slice = gpu.put(&(0..200).collect::<Vec<u8>>()).slice(64, 128).unwrap();
    let weight = Weight::new("w", DType::BF16, [8, 8], slice.storage()).unwrap();
    let tensor = device_cuda::dlpack::export(weight.meta(), weight.storage().unwrap()).unwrap();
    let address = slice.address();
    drop((slice, weight));
    // SAFETY: just exported, and taken once.
    let weight = unsafe { device_cuda::dlpack::weight("back", tensor) }.unwrap();
    assert_eq!((weight.meta().dtype, &*weight.meta().shape), (DType::BF16, &[8, 8][..]));
    assert_eq!(CudaSlice::of_storage(weight.storage().unwrap()).unwrap().address(), address);
    assert_eq!(weight.to_bytes().unwrap(), (64..192).collect::<Vec<u8>>());
}

/// A whole matrix on its way to `to`, quantised if its scales go to `scales`.
fn whole(matrix: &Matrix, to: u64, scales: Option<u64>) -> Arc<[StridedPart]> {
    let (rows, cols) = (matrix.shape[0] as u64, matrix.shape[1] as u64);
    let element = matrix.ty.size() as u64;
    let written = if scales.is_some() { 1 } else { element };
    let blocks = scales.map(|at| StridedBlocks {
        format: Fp8Format::default(),
        sides: [128, 128],
        first: [128, 128],
        block: [0; 3],
        scales: Strides { at, matrix: 0, row: cols.div_ceil(128) * 4 },
        skips: [false; 2],
    });
    let part = StridedPart {
        from: Strides { at: 0, matrix: 0, row: cols * element },
        to: Strides { at: to, matrix: 0, row: cols * written },
        extent: [1, rows, cols],
        element,
        blocks,
    };
    [part].into()
}

#[test]
#[ignore = "needs a CUDA device"]
fn weights_are_placed_right_in_updates_that_repeat_also_when_they_move_or_change_their_alignment() {
    const TYPES: [SourceType; 3] = [SourceType::Bf16, SourceType::F16, SourceType::F32];
    const SHAPES: [[usize; 2]; 5] = [[1, 1], [128, 128], [300, 520], [257, 129], [2000, 512]];
    let gpu = Gpu::open();
    let mut placer = Placer::new(&gpu.device).unwrap();
    let format = Fp8Format::default();
    let matrices: Vec<(Matrix, bool)> = TYPES
        .into_iter()
        .flat_map(|ty| SHAPES.map(|shape| (ty, shape)))
        .flat_map(|of| [(of, false), (of, true)])
        .map(|((ty, shape), quantises)| (random(ty, &shape, shape[0] as u64), quantises))
        .collect();
    // Where each lies in the memory that is lent.
    let mut end = 0_u64;
    let mut room = |bytes: usize| {
        let at = end.next_multiple_of(64);
        end = at + bytes as u64;
        at
    };
    let places: Vec<(u64, Option<u64>)> = matrices
        .iter()
        .map(|(matrix, quantises)| match quantises {
            false => (room(matrix.bytes.len()), None),
            true => {
                let grid = format.granularity.grid(&matrix.shape).unwrap();
                (room(grid.elements()), Some(room(grid.scales() * 4)))
            }
        })
        .collect();
    let parts: Vec<_> = matrices
        .iter()
        .zip(&places)
        .map(|((matrix, _), (to, scales))| whole(matrix, *to, *scales))
        .collect();
    let lent = CudaMemory::new(&gpu.device, end as usize).unwrap().all();
    let space = CudaSpace::from(lent.clone());
    let mut sums = Vec::new();
    // Twice at the same addresses, then at others, then at some that fit no fast path.
    for (update, offset) in [(0_u8, 0), (1, 0), (2, 256), (3, 260), (4, 0)] {
        let memory: Vec<CudaSlice> = matrices
            .iter()
            .map(|(matrix, _)| {
                // What is in front of the weight moves it.
                gpu.put(&[&vec![0x11; offset][..], &matrix.bytes].concat())
            })
            .collect();
        let sources: Vec<_> = memory
            .iter()
            .map(|slice| slice.storage().slice(offset as u64..slice.len() as u64))
            .collect();
        lent.write(&vec![0xa5 ^ update; lent.len()]).unwrap();
        let jobs: Vec<Write<'_>> = sources
            .iter()
            .zip(&matrices)
            .zip(&parts)
            .map(|((source, (matrix, quantises)), parts)| {
                let ty = quantises.then_some(matrix.ty);
                Write { source, ty, parts, to: &space, known: None }
            })
            .collect();
        let found = placer.write(&jobs, || Ok(())).unwrap();
        assert_eq!(found.failed, None, "update {update}");
        let checks: Vec<Check<'_>> =
            parts.iter().map(|parts| Check { memory: &space, parts }).collect();
        let there = placer.check(&checks, || Ok(())).unwrap();
        assert_eq!(found.sums, there, "update {update}");
        let mut bytes = vec![0; lent.len()];
        lent.read(&mut bytes).unwrap();
        for ((matrix, _), (to, scales)) in matrices.iter().zip(&places) {
            let at = |at: u64, len: usize| &bytes[at as usize..at as usize + len];
            let name = &matrix.name;
            match scales {
                None => assert_eq!(at(*to, matrix.bytes.len()), matrix.bytes, "{name}"),
                Some(scales) => {
                    let (codes, expected) = on_the_cpu(matrix, &format);
                    assert_eq!(at(*to, codes.len()), codes, "{name} in update {update}");
                    assert_eq!(at(*scales, expected.len()), expected, "{name} in update {update}");
                }
            }
        }
        sums.push(found.sums);
    }
    assert!(sums.iter().all(|of_update| *of_update == sums[0]));
}

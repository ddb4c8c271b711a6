//! Codes and scales of the formulas as the implementations that people run compute them.
//!
//! `data/golden.safetensors` has inputs `NAME.x` and, made with PyTorch for each mode, codes
//! `NAME.<mode>.q` and scales `NAME.<mode>.s`. F32 and
//! F16 inputs were quantised as they are, without a cast to BF16.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use quant_fp8::{Codec, Fp8Format, Granularity, Mode, Precast, Source, SourceType, Store};
use safetensors::{Dtype, SafeTensors};

const GOLDEN: &[u8] = include_bytes!("data/golden.safetensors");

fn inputs(golden: &SafeTensors<'_>) -> Vec<(String, SourceType, Vec<usize>, Vec<u8>)> {
    let mut inputs = Vec::new();
    for (name, view) in golden.tensors() {
        if let Some(name) = name.strip_suffix(".x") {
            let ty = match view.dtype() {
                Dtype::BF16 => SourceType::Bf16,
                Dtype::F16 => SourceType::F16,
                Dtype::F32 => SourceType::F32,
                other => panic!("{name} has type {other:?}"),
            };
            inputs.push((name.to_owned(), ty, view.shape().to_vec(), view.data().to_vec()));
        }
    }
    inputs
}

#[test]
fn every_codec_gives_the_golden_codes_and_scales_in_every_mode() {
    let golden = SafeTensors::deserialize(GOLDEN).unwrap();
    let inputs = inputs(&golden);
    assert_eq!(inputs.len(), 14, "the golden file has changed");
    let modes = [(Mode::Triton, "triton"), (Mode::Pytorch, "pytorch"), (Mode::Ue8m0, "ue8m0")];
    for codec in Codec::available() {
        for (name, ty, shape, bytes) in &inputs {
            for (mode, mode_name) in modes {
                let what = format!("{} {name} {mode_name}", codec.name());
                let source = Source::new(bytes, *ty, shape).unwrap();
                let grid = Granularity::default().grid(shape).unwrap();
                let format = Fp8Format { mode, precast: Precast::None, ..Fp8Format::default() };
                let mut codes = vec![0; grid.elements()];
                let mut scales = vec![0f32; grid.scales()];
                let all = 0..grid.elements();
                codec
                    .quantize(&source, &format, all, &mut codes, &mut scales, Store::NonTemporal)
                    .unwrap();
                let expected = golden.tensor(&format!("{name}.{mode_name}.q")).unwrap();
                assert_eq!(expected.data(), codes, "codes of {what}");
                let expected = golden.tensor(&format!("{name}.{mode_name}.s")).unwrap();
                assert_eq!(expected.shape(), grid.scale_shape(), "scale shape of {what}");
                let scales: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
                assert_eq!(expected.data(), scales, "scales of {what}");
            }
        }
    }
}

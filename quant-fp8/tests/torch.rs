//! The reference formula, written in PyTorch operations, gives the same bytes.

use std::path::Path;
use std::process::Command;

use half::{bf16, f16};
use quant_fp8::{Codec, Fp8Format, Granularity, Mode, Source, SourceType, Store};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn run(command: &mut Command) -> Outcome<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// Values of many magnitudes in both signs, zeros among them, and the same block of zeros only.
fn values(rows: usize, cols: usize) -> Vec<f32> {
    let mut state = (rows * 4099 + cols) as u64 | 1;
    let mut value = |i: usize| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let sign_and_mantissa = (state >> 32) as u32 & 0x807f_ffff;
        let exponent = 112 + (state >> 20) as u32 % 15;
        match (i % cols, state >> 56) {
            (128..256, _) => 0.0,
            (_, 0) => -0.0,
            _ => f32::from_bits(sign_and_mantissa | exponent << 23),
        }
    };
    (0..rows * cols).map(&mut value).collect()
}

/// `cargo xtask test` installs PyTorch and runs it.
#[test]
#[ignore = "needs a Python with PyTorch, named by CKPT_ENGINE_TORCH_PYTHON"]
fn the_formula_in_torch_operations_gives_the_same_bytes() -> Outcome<()> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("torch-reference");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/torch_reference.py");
    std::fs::create_dir_all(&folder)?;
    let python = std::env::var_os("CKPT_ENGINE_TORCH_PYTHON");
    let python = python.ok_or("CKPT_ENGINE_TORCH_PYTHON is not set: run `cargo xtask test`")?;

    let cases = folder.join("cases");
    if cases.exists() {
        std::fs::remove_dir_all(&cases)?;
    }
    std::fs::create_dir(&cases)?;
    let modes = [(Mode::Triton, "triton"), (Mode::Pytorch, "pytorch"), (Mode::Ue8m0, "ue8m0")];
    let mut expected = Vec::new();
    for (mode, mode_name) in modes {
        for (rows, cols) in [(1, 1), (127, 129), (128, 128), (300, 515), (512, 640)] {
            let values = values(rows, cols);
            for (ty, ty_name) in
                [(SourceType::Bf16, "bf16"), (SourceType::F16, "f16"), (SourceType::F32, "f32")]
            {
                let to_bytes = |value: &f32| match ty {
                    SourceType::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
                    SourceType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
                    SourceType::F32 => value.to_le_bytes().to_vec(),
                };
                let bytes: Vec<u8> = values.iter().flat_map(to_bytes).collect();
                let shape = [rows, cols];
                let grid = Granularity::default().grid(&shape)?;
                let format = Fp8Format { mode, ..Fp8Format::default() };
                let mut codes = vec![0; rows * cols];
                let mut scales = vec![0f32; grid.scales()];
                Codec::best().quantize(
                    &Source::new(&bytes, ty, &shape)?,
                    &format,
                    0..rows * cols,
                    &mut codes,
                    &mut scales,
                    Store::Cached,
                )?;
                let name = format!("{mode_name}-{rows}x{cols}-{ty_name}");
                let head = format!("{mode_name} {ty_name} {rows} {cols}\n");
                let input = [head.into_bytes(), bytes].concat();
                std::fs::write(cases.join(&name).with_extension("in"), input)?;
                let scales: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
                expected.push((name, codes, scales));
            }
        }
    }
    run(Command::new(&python).arg(&script).arg(&cases))?;
    for (name, codes, scales) in expected {
        let read = |extension| std::fs::read(cases.join(&name).with_extension(extension));
        assert!(read("codes")? == codes, "codes of {name}");
        assert!(read("scales")? == scales, "scales of {name}");
    }
    Ok(())
}

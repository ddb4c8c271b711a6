//! The files of a version in a folder: its index, the header of a file, and what changed in a tensor.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u16, bool, &[u8])| {
    let (what, len, xor, bytes) = input;
    match what % 3 {
        0 => backend_dir::fuzzing::index(len.into(), bytes),
        1 => backend_dir::fuzzing::header(bytes),
        _ => {
            let encoding = if xor { backend_dir::Encoding::Xor } else { backend_dir::Encoding::Overwrite };
            let tensor: Vec<u8> = (0..len % 4096).map(|at| at as u8).collect();
            backend_dir::fuzzing::change(encoding, &tensor, bytes);
        }
    }
});

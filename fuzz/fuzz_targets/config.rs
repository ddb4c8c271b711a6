//! Configurations: every text is one, or an error that says what it takes.

#![no_main]

use engine_config::Format;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &str)| {
    let (format, text) = input;
    let format = [Format::Yaml, Format::Json, Format::Toml][usize::from(format) % 3];
    if let Err(error) = engine_config::parse(text, format) {
        assert_eq!(error.kind(), engine_core::ErrorKind::Config);
    }
});

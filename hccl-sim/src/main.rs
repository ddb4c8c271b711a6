//! Writes the simulated libraries into a folder, or prints their declarations.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use hccl_sim::Profile;

const USAGE: &str = "\
hccl-sim FOLDER [--profile current|split|8.1]   writes the libraries into a folder
hccl-sim --declarations                         prints what they declare, as JSON
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["--declarations"] => serde_json::to_string_pretty(&hccl_sim::declarations())
            .map_err(io::Error::other)
            .and_then(|json| writeln!(io::stdout(), "{json}")),
        [folder] if !folder.starts_with('-') => write(folder, Profile::Current.name()),
        [folder, "--profile", profile] => write(folder, profile),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, USAGE)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If standard error is closed there is nobody to tell.
            drop(writeln!(io::stderr(), "{error}"));
            ExitCode::FAILURE
        }
    }
}

fn write(folder: &str, profile: &str) -> io::Result<()> {
    let profile = Profile::from_name(profile)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, USAGE))?;
    std::fs::create_dir_all(folder)?;
    hccl_sim::write_libraries(profile, Path::new(folder))
}

//! What the program writes to the terminal. A reader that goes away is an error, never a panic.

use std::error::Error as StdError;

use checkpoint_engine::{Error, ErrorKind};
use indicatif::{ProgressBar, ProgressStyle};

/// Prints a line; a reader that went away is an error and not a panic.
pub(crate) fn say(line: String) -> checkpoint_engine::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout().lock(), "{line}")
        .map_err(|error| Error::io("writing to standard output", error))
}

pub(crate) fn json_line(value: &impl serde::Serialize) -> checkpoint_engine::Result<String> {
    serde_json::to_string(value).map_err(|error| {
        Error::new(ErrorKind::Io, "writing a report", error.to_string()).with_source(error)
    })
}

/// Prints an error and what caused it, each cause once.
pub(crate) fn report(error: &dyn StdError) {
    let mut text = format!("error: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}\n  caused by: {cause_text}");
        }
        source = cause.source();
    }
    complain(&text);
}

/// Writes a line to standard error. If that is gone, too, there is nobody left to tell.
pub(crate) fn complain(line: &str) {
    use std::io::Write;
    let _nobody = writeln!(std::io::stderr().lock(), "{line}");
}

/// A progress bar of bytes on the terminal; nothing where standard error is none.
pub(crate) fn byte_bar(bytes: u64) -> ProgressBar {
    const TEMPLATE: &str = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let bar = ProgressBar::new(bytes);
    match ProgressStyle::with_template(TEMPLATE) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

//! Runs other programs.

use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use crate::Result;

/// Runs a command on this program's own terminal; a status other than 0 is an error.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let status = command.status().map_err(|error| format!("{}: {error}", line(&command)))?;
    succeeded(&command, status)
}

fn succeeded(command: &Command, status: ExitStatus) -> Result<()> {
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", line(command))) }
}

/// Runs a command, prints what it is about, and what it took.
pub(crate) fn stage(title: &str, command: Command) -> Result<()> {
    println!("\n-- {title}: {}", line(&command));
    let start = Instant::now();
    run(command)?;
    println!("-- {title}: {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Runs a command beside others, and prints what it said when it has ended.
pub(crate) fn quiet_stage(title: &str, mut command: Command) -> Result<()> {
    let start = Instant::now();
    let output = command.output().map_err(|error| format!("{}: {error}", line(&command)))?;
    let said = [output.stdout, output.stderr].concat();
    let seconds = start.elapsed().as_secs_f64();
    print!(
        "\n-- {title}: {}\n{}-- {title}: {seconds:.0} s\n",
        line(&command),
        String::from_utf8_lossy(&said)
    );
    succeeded(&command, output.status)
}

/// Whether a command can be run and succeeds; what it prints is not shown.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// The command as one would type it: the program's name without its folder, and its arguments.
fn line(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(name).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

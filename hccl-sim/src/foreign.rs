//! Ranks that others have written, for tests: the HCCL wrapper of `vllm_ascend`, in Python.

use std::io::{Error, ErrorKind, Result};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The environment variable that says where the wrapper is.
pub const WRAPPER: &str = "CKPT_ENGINE_PYHCCL_WRAPPER";

/// What a rank broadcasts, in bytes: no multiple of anything.
pub const BYTES: usize = 3_000_001;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pyhccl_rank.py");

/// A program that is a rank in Python, in a group of two.
///
/// # Errors
///
/// Without the wrapper.
pub fn python_rank(rank: u32, libraries: &Path, root_info: &Path) -> Result<Command> {
    let Some(wrapper) = std::env::var_os(WRAPPER) else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{WRAPPER} is not set; see the reason"),
        ));
    };
    let mut command = Command::new("python3");
    command.arg(SCRIPT).arg("--libraries").arg(libraries).arg("--wrapper").arg(wrapper);
    command.args(["--ranks", "2", "--rank", &rank.to_string(), "--root-info"]).arg(root_info);
    command.args(["--bytes", &BYTES.to_string()]);
    Ok(command)
}

/// Starts a rank on simulated links; what it prints is kept for [`wait`].
///
/// # Errors
///
/// Those of the system.
pub fn start(command: &mut Command) -> Result<Child> {
    command.env("HCCL_SIM_TIME_SCALE", "0.25").env("HCCL_HOST_SOCKET_PORT_RANGE", "auto");
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
}

/// Waits for a process, which is killed if it hangs.
///
/// # Errors
///
/// `TimedOut`, with what it printed, if it does; those of the system.
pub fn wait(mut child: Child, limit: Duration) -> Result<Output> {
    let until = Instant::now() + limit;
    while child.try_wait()?.is_none() {
        if Instant::now() >= until {
            child.kill()?;
            let output = child.wait_with_output()?;
            let [out, err] =
                [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
            return Err(Error::new(ErrorKind::TimedOut, format!("a process hangs\n{out}{err}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output()
}

//! Workers in Python, with libraries that only some machines have.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// A worker's process, which ends with this.
#[derive(Debug)]
pub(crate) struct Worker {
    process: Child,
    port: String,
}

/// What the set-up of the tests says.
pub(crate) fn variable(name: &str) -> std::ffi::OsString {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test`"))
}

impl Worker {
    /// Starts a script of `tests/support`, which says on which port it listens.
    pub(crate) fn start(script: &str, arguments: &[&str]) -> Self {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support");
        let mut command = Command::new(variable("CKPT_ENGINE_TORCH_PYTHON"));
        command.arg(format!("{folder}/{script}")).args(arguments).stdout(Stdio::piped());
        let process = command.env("PYTHONDONTWRITEBYTECODE", "1").spawn().expect("a process");
        let mut worker = Self { process, port: String::new() };
        let said = worker.process.stdout.take().expect("its output");
        BufReader::new(said).read_line(&mut worker.port).expect("a line");
        worker
    }

    /// Its address without the scheme.
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port.trim())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

//! Tests that need a process of their own, because a library is loaded and initialised once in a process.

use std::process::Command;

use crate::sys;

const ALONE: &str = "CKPT_ENGINE_TEST_ALONE";

/// Whether this is the process that [`run`] started. A test that is run with all others does nothing.
pub(crate) fn is_alone() -> bool {
    std::env::var_os(ALONE).is_some()
}

/// Runs a test of this crate in another process, with the simulator and one of its settings.
pub(crate) fn run(test: &str, setting: (&str, &str)) {
    let libraries = hccl_sim::libraries(hccl_sim::Profile::Current).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test]).env(ALONE, "1");
    child.env(sys::LIBRARY_DIR_VARIABLE, libraries).env(setting.0, setting.1);
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

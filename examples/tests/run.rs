//! Every example runs to its end.

use std::path::PathBuf;
use std::process::Command;

/// Cargo builds the examples before the tests, beside them.
fn runs(name: &str) {
    let test = std::env::current_exe().expect("this program");
    let folder: PathBuf = test.ancestors().nth(2).expect("the profile's folder").join("examples");
    let output = Command::new(folder.join(name)).output().expect("the example is built");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(!errors.contains("Failed"), "{errors}");
}

macro_rules! examples {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            runs(stringify!($name));
        })*
    };
}

// custom_backend is run by its own tests: the whole conformance suite.
examples! { in_process iterators_and_streams two_processes server quantized shared_cache }

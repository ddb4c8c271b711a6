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

#[test]
fn a_trainer_and_a_server_embed_the_engine_in_thirty_lines() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/server.rs");
    let text = std::fs::read_to_string(path).expect("the example");
    // Lines of code between marks are written for the engine, all others are the program's own.
    let (mut engine, mut own, mut is_marked) = (Vec::new(), Vec::new(), false);
    for line in text.lines().map(str::trim) {
        match line.split_once("// ANCHOR") {
            Some((_, mark)) => is_marked = mark.starts_with(": "),
            None if line.is_empty() || line.starts_with("//") => {}
            None if is_marked => engine.push(line),
            None => own.push(line),
        }
    }
    assert!((20..=30).contains(&engine.len()), "{}: {engine:#?}", engine.len());
    for word in
        ["ControlPlane", "ControlConfig", "engine.", "form_group", "Weight::", "Replica", "fp8::"]
    {
        assert!(!own.iter().any(|line| line.contains(word)), "{word} is not marked");
    }
}

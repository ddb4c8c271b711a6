//! The configuration's values, and the options of backends. How texts are read is tested where they are.

use engine_core::{CheckpointEngineConfig, EngineContext, ErrorKind, Registry};
use serde::Deserialize;

/// Options are checked by the backend that has them, and not here.
fn read(json: &str) -> CheckpointEngineConfig {
    serde_json::from_str(json).expect("a valid configuration")
}

#[track_caller]
fn assert_has(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is missing in: {message}");
    }
}

#[test]
fn a_configuration_that_a_program_filled_in_is_checked_too() {
    let valid = CheckpointEngineConfig::default();
    valid.validate().expect("the defaults are valid");
    for (config, key) in [
        (
            {
                let mut config = valid.clone();
                config.backend = String::new();
                config
            },
            "`backend`",
        ),
        (
            {
                let mut config = valid.clone();
                config.update_weights_bucket_megabytes = Some(0);
                config
            },
            "`update_weights_bucket_megabytes`",
        ),
        (
            {
                let mut config = valid.clone();
                config.timeout_seconds = f64::NAN;
                config
            },
            "`timeout_seconds`",
        ),
    ] {
        let error = config.validate().expect_err(key);
        assert_eq!(error.kind(), ErrorKind::Config);
        assert_has(&error.to_string(), &[key]);
    }
}

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Options {
    socket_folder: String,
    depth: Option<u8>,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
struct NoOptions {}

#[test]
fn a_backend_gets_its_options_typed_and_defaults_where_there_are_none() {
    let config = read(r#"{"engine_kwargs": {"ipc": {"socket_folder": "/run/ckpt", "depth": 2}}}"#);
    let options = Options { socket_folder: "/run/ckpt".to_owned(), depth: Some(2) };
    assert_eq!(config.kwargs::<Options>("ipc").expect("valid options"), options);
    assert_eq!(config.kwargs::<Options>("nixl").expect("no options"), Options::default());
}

#[test]
fn a_backends_unknown_or_wrong_option_is_an_error_that_names_it() {
    let config =
        read(r#"{"engine_kwargs": {"a": {"dept": 1}, "b": {"depth": "deep"}, "c": {"x": 1}}}"#);
    let message = |backend| {
        let error = config.kwargs::<Options>(backend).expect_err("a wrong option");
        assert_eq!(error.kind(), ErrorKind::Config);
        error.to_string()
    };
    assert_has(
        &message("a"),
        &["`engine_kwargs.a`", "unknown key `dept`; known keys: `socket_folder`, `depth`"],
    );
    assert_has(&message("b"), &["`engine_kwargs.b`: `depth`: ", "\"deep\""]);
    let error = config.kwargs::<NoOptions>("c").expect_err("it has none");
    assert_has(&error.to_string(), &["unknown key `x`; this backend has no options"]);
}

#[test]
fn what_serde_alone_reads_is_checked_when_an_engine_is_made() {
    for (json, words) in [
        (r#"{"timeout_seconds": 0}"#, "`timeout_seconds` to be a number above 0"),
        (r#"{"backend": ""}"#, "`backend` to be the name of a backend"),
        (r#"{"bakend": "ipc"}"#, "nothing in this program understands the key `bakend`"),
    ] {
        let registry = Registry::new();
        let prepared = registry.prepare_trainer(EngineContext::new(read(json)));
        let error = futures::executor::block_on(prepared).expect_err("it is not valid");
        assert_eq!(error.kind(), ErrorKind::Config);
        assert_has(&error.to_string(), &[words]);
    }
    for json in [r#"{"device": "cuda:x"}"#, r#"{"threads": 0}"#, r#"{"digests": "yes"}"#] {
        serde_json::from_str::<CheckpointEngineConfig>(json).expect_err("a wrong type");
    }
}

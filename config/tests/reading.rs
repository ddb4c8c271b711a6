//! The configuration as users write it, and as it goes wrong.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::Duration;

use engine_config::Format;
use engine_core::{CheckpointEngineConfig, DeviceChoice, Error, ErrorKind};

const TOML: &str = r#"
backend = "ipc"
update_weights_bucket_megabytes = 256
trainer_quantize_fp8 = true
timeout_seconds = 5
digests = false
device = "cuda:1"
threads = 3
max_staleness = 2
wants = ["policy"]

[parts]
draft = ["mtp.*", "draft.*"]

[engine_kwargs.ipc]
socket_folder = "/run/ckpt"
depth = 2

[engine_kwargs.nccl]
rebuild_group = false

[quantization]
mode = "ue8m0"
"#;

const JSON: &str = r#"{
  "backend": "ipc",
  "update_weights_bucket_megabytes": 256,
  "trainer_quantize_fp8": true,
  "timeout_seconds": 5.0,
  "digests": false,
  "device": "cuda:1",
  "threads": 3,
  "max_staleness": 2,
  "wants": ["policy"],
  "parts": {"draft": ["mtp.*", "draft.*"]},
  "engine_kwargs": {
    "ipc": {"socket_folder": "/run/ckpt", "depth": 2},
    "nccl": {"rebuild_group": false}
  },
  "quantization": {"mode": "ue8m0"}
}"#;

const YAML: &str = "
backend: ipc
update_weights_bucket_megabytes: 256
trainer_quantize_fp8: true
timeout_seconds: 5
digests: false
device: cuda:1
threads: 3
max_staleness: 2
wants: [policy]
parts:
  draft: [mtp.*, draft.*]
engine_kwargs:
  ipc: {socket_folder: /run/ckpt, depth: 2}
  nccl:
    rebuild_group: false
quantization:
  mode: ue8m0
";

fn read(format: Format, text: &str) -> Result<CheckpointEngineConfig, Error> {
    engine_config::parse(text, format)
}

/// The message of the configuration error that a text must give.
#[track_caller]
fn refused(format: Format, text: &str) -> String {
    let error = read(format, text).expect_err("this text is not a valid configuration");
    assert_eq!(error.kind(), ErrorKind::Config);
    error.report().message.clone()
}

#[track_caller]
fn assert_has(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is missing in: {message}");
    }
}

fn object(json: serde_json::Value) -> serde_json::Map<String, serde_json::Value> {
    json.as_object().expect("an object").clone()
}

#[test]
fn the_same_configuration_reads_alike_from_toml_json_and_yaml() {
    let mut expected = CheckpointEngineConfig::new("ipc");
    expected.update_weights_bucket_megabytes = Some(256);
    expected.engine_kwargs = BTreeMap::from([
        ("ipc".to_owned(), object(serde_json::json!({"socket_folder": "/run/ckpt", "depth": 2}))),
        ("nccl".to_owned(), object(serde_json::json!({"rebuild_group": false}))),
    ]);
    expected.layers = object(serde_json::json!({
        "trainer_quantize_fp8": true,
        "quantization": {"mode": "ue8m0"},
    }));
    expected.timeout_seconds = 5.0;
    expected.digests = false;
    expected.device = DeviceChoice::new("cuda", 1);
    expected.threads = NonZeroUsize::new(3);
    expected.max_staleness = Some(2);
    expected.wants = Some(vec!["policy".into()]);
    expected.parts.insert("draft".into(), vec!["mtp.*".into(), "draft.*".into()]);
    for (format, text) in [(Format::Toml, TOML), (Format::Json, JSON), (Format::Yaml, YAML)] {
        assert_eq!(read(format, text).expect("a valid configuration"), expected, "{format:?}");
    }
    assert_eq!(expected.timeout(), Duration::from_secs(5));
    assert_eq!(expected.bucket_bytes(), Some(256 << 20));
}

#[test]
fn a_written_configuration_reads_back_as_it_was() {
    let config = read(Format::Toml, TOML).expect("a valid configuration");
    let text = serde_json::to_string(&config).expect("it can be written");
    assert_eq!(read(Format::Json, &text).expect("a valid configuration"), config);
}

#[test]
fn an_empty_text_gives_the_defaults() {
    let default = CheckpointEngineConfig::default();
    assert_eq!(default.backend, "naive");
    assert_eq!(default.bucket_bytes(), None);
    assert_eq!(default.timeout(), Duration::from_secs(60));
    assert!(default.digests && default.layers.is_empty());
    for (format, text) in [
        (Format::Toml, ""),
        (Format::Toml, "# nothing yet\n"),
        (Format::Json, "{}"),
        (Format::Yaml, "\n"),
        (Format::Yaml, "# nothing yet\n"),
        (Format::Yaml, "checkpoint_engine:\n"),
    ] {
        assert_eq!(read(format, text).expect("valid"), default, "{format:?} {text:?}");
    }
}

#[test]
fn null_stands_for_the_default_as_verl_writes_it() {
    let text = "
        checkpoint_engine:
          _target_: verl.workers.config.CheckpointEngineConfig
          backend: null
          update_weights_bucket_megabytes: 2048
          engine_kwargs: {nccl: null}
          custom_backend_module: null
    ";
    let config = read(Format::Yaml, text).expect("a valid configuration");
    assert_eq!(config.backend, "naive");
    assert_eq!(config.update_weights_bucket_megabytes, Some(2048));
    assert!(config.engine_kwargs["nccl"].is_empty());
}

#[test]
fn the_section_is_found_where_verl_has_it_and_the_rest_of_the_document_is_left_alone() {
    let yaml = "
data: {train_files: [a, b], 3: x}
actor_rollout_ref:
  actor: {strategy: fsdp}
  rollout:
    name: vllm
    engine_kwargs: {vllm: {max_num_seqs: 8}}
    checkpoint_engine:
      backend: nccl
trainer: {n_gpus_per_node: 8}
";
    assert_eq!(read(Format::Yaml, yaml).expect("valid").backend, "nccl");
    let json = r#"{"seed": 1, "rollout": {"name": "x", "checkpoint_engine": {"backend": "ipc"}}}"#;
    assert_eq!(read(Format::Json, json).expect("valid").backend, "ipc");
    let toml = "day = 2026-01-01\nrollout = 4\n[checkpoint_engine]\nbackend = 'nixl'\n";
    assert_eq!(read(Format::Toml, toml).expect("valid").backend, "nixl");
}

#[test]
fn two_sections_in_one_document_are_an_error_that_names_both() {
    let text = "checkpoint_engine: {}\nrollout: {checkpoint_engine: {}}\n";
    assert_has(
        &refused(Format::Yaml, text),
        &["more than one section", "`checkpoint_engine` and `rollout.checkpoint_engine`"],
    );
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_known_ones() {
    let known = "unknown key `bucket_mb`; known keys: `backend`, \
        `update_weights_bucket_megabytes`, `engine_kwargs`, `trainer_quantize_fp8`, \
        `quantization`, `delta`, `delta_on_host`, `parts`, `wants`, `timeout_seconds`, `digests`, `device`, `threads`, `max_staleness`";
    for (format, text) in [
        (Format::Toml, "[checkpoint_engine]\nbackend = 'ipc'\nbucket_mb = 4\n"),
        (Format::Json, "{\n\"backend\": \"ipc\",\n\"bucket_mb\": 4}"),
        (Format::Yaml, "checkpoint_engine:\n  backend: ipc\n  bucket_mb: 4\n"),
    ] {
        assert_has(&refused(format, text), &["line 3: ", known]);
    }
}

#[test]
fn a_bucket_of_size_zero_is_an_error_in_every_format() {
    let wanted = "expected `update_weights_bucket_megabytes` to be a whole number of at least 1";
    for (format, text) in [
        (Format::Toml, "# a\nupdate_weights_bucket_megabytes = 0\nbackend = 'ipc'\n"),
        (Format::Json, "{\n\"update_weights_bucket_megabytes\": 0,\n\"backend\": \"ipc\"}"),
        (Format::Yaml, "backend: ipc\nupdate_weights_bucket_megabytes: 0\n"),
    ] {
        assert_has(&refused(format, text), &["line 2: ", "integer `0`", wanted]);
    }
}

#[test]
fn a_value_of_the_wrong_type_names_its_key_and_what_it_takes() {
    for (text, parts) in [
        ("backend: [ipc]", ["sequence", "`backend` to be the name"]),
        ("backend: ''", ["\"\"", "`backend` to be the name"]),
        ("update_weights_bucket_megabytes: 1.5", ["1.5", "`update_weights_bucket_megabytes`"]),
        ("update_weights_bucket_megabytes: -1", ["-1", "`update_weights_bucket_megabytes`"]),
        ("update_weights_bucket_megabytes: 4294967296", ["4294967296", "below 2^32"]),
        ("trainer_quantize_fp8: 1", ["integer `1`", "`trainer_quantize_fp8` to be true or false"]),
        ("digests: 'yes'", ["\"yes\"", "`digests` to be true or false"]),
        ("device: cuda:x", ["string \"cuda:x\"", "`device` to be `cpu`, or a kind of device"]),
        ("threads: 0", ["integer `0`", "`threads` to be a whole number of at least 1"]),
        ("engine_kwargs: fast", ["\"fast\"", "`engine_kwargs` to be a table"]),
        ("engine_kwargs: {ipc: 3}", ["integer `3`", "`engine_kwargs.ipc` to be a table"]),
        ("quantization: true", ["true", "`quantization` to be a table"]),
        ("parts: [draft]", ["sequence", "`parts` to be a table"]),
        ("parts: {draft: 3}", ["integer `3`", "`parts.draft` to be a list of patterns"]),
        ("parts: {draft: []}", ["length 0", "`parts.draft` to be a list of patterns"]),
        ("wants: policy", ["\"policy\"", "`wants` to be a list of parts"]),
        ("wants: []", ["length 0", "`wants` to be a list of parts"]),
    ] {
        assert_has(&refused(Format::Yaml, text), &["line 1: ", parts[0], parts[1]]);
    }
}

#[test]
fn a_timeout_has_to_be_positive_finite_and_sane() {
    for value in ["0", "-1", "0.0", ".nan", ".inf", "-.inf", "1e300", "soon"] {
        let text = format!("backend: ipc\ntimeout_seconds: {value}\n");
        assert_has(
            &refused(Format::Yaml, &text),
            &["line 2: ", "`timeout_seconds` to be a number above 0"],
        );
    }
    assert_has(&refused(Format::Toml, "timeout_seconds = nan"), &["`timeout_seconds`"]);
    let config = read(Format::Toml, "timeout_seconds = 0.25").expect("valid");
    assert_eq!(config.timeout(), Duration::from_millis(250));
}

#[test]
fn a_key_that_is_there_twice_is_an_error() {
    let json = "{\"backend\": \"ipc\",\n\"backend\": \"naive\"}";
    assert_has(&refused(Format::Json, json), &["line 2", "`backend` is there twice"]);
    let yaml = "engine_kwargs:\n  ipc: {a: 1}\n  ipc: {b: 1}\n";
    assert_has(&refused(Format::Yaml, yaml), &["`engine_kwargs.ipc` is there twice"]);
}

#[test]
fn a_python_module_is_refused_with_the_reason() {
    let text = "custom_backend_module: my.backends\n";
    assert_has(
        &refused(Format::Yaml, text),
        &["\"my.backends\"", "`custom_backend_module`", "registered by the program"],
    );
}

#[test]
fn a_text_that_does_not_parse_says_at_which_line() {
    for (format, text) in [
        (Format::Toml, "backend = 'ipc'\ndigests = \n"),
        (Format::Json, "{\"backend\": \"ipc\",\n\"digests\": }"),
        (Format::Yaml, "backend: ipc\n  digests: true\n"),
    ] {
        assert_has(&refused(format, text), &["line 2: "]);
    }
    refused(Format::Json, "{} {}");
    refused(Format::Yaml, "[1, 2]");
    refused(Format::Json, "3");
}

#[test]
fn a_file_is_read_by_its_extension_and_named_in_errors() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("engine.YML");
    std::fs::write(&path, "backend: ipc\n").expect("a file");
    assert_eq!(engine_config::load(&path).expect("valid").backend, "ipc");

    std::fs::write(&path, "backend: ipc\nthreads: 0\n").expect("a file");
    let error = engine_config::load(&path).expect_err("no threads");
    assert_has(&error.to_string(), &[&format!("{}:2: ", path.display()), "`threads`"]);

    let error = engine_config::load("engine.ini").expect_err("no such format");
    assert_has(&error.to_string(), &["engine.ini", "`toml`, `json`, `yaml`, `yml`"]);

    let error = engine_config::load(folder.path().join("no.json")).expect_err("");
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_has(&error.to_string(), &["no.json"]);
}

#[test]
fn brackets_within_one_another_are_refused_before_a_parser_takes_minutes_for_them() {
    for (format, start) in [
        (Format::Yaml, "quantization: "),
        (Format::Json, "{\"quantization\": "),
        (Format::Toml, "quantization = "),
    ] {
        // A parser whose time grows with the square of the depth would take hours.
        let text = format!("{start}{}", "[".repeat(2_000_000));
        let error = read(format, &text).expect_err("too deep");
        assert_eq!(error.kind(), ErrorKind::Config);
    }
    // One after the other they are not deep.
    let text = format!("quantization: {{ignored_layers: [{}]}}", "'re:[a]{1}', ".repeat(10_000));
    read(Format::Yaml, &text).expect("valid");
}

#[test]
fn a_large_number_is_shown_as_it_was_written() {
    let error = read(Format::Json, r#"{"timeout_seconds": 1e300}"#).expect_err("too long");
    let text = error.to_string();
    assert!(text.contains("`1e300`") && text.len() < 200, "{text}");
}

#[test]
fn what_yaml_says_once_and_refers_to_is_read_as_if_it_was_written_there() {
    let text = "
shared: &shared {backend: ipc, threads: 2}
checkpoint_engine:
  <<: *shared
  threads: 3
";
    let config = read(Format::Yaml, text).expect("a valid configuration");
    assert_eq!((&*config.backend, config.threads), ("ipc", NonZeroUsize::new(3)));
}

#[test]
fn what_yaml_1_1_and_yaml_1_2_read_differently_is_refused() {
    for (text, key) in [
        ("threads: 010", "`threads` to be a whole number"),
        ("digests: yes", "`digests` to be true or false"),
    ] {
        assert_has(&refused(Format::Yaml, text), &["line 1: ", key]);
    }
}

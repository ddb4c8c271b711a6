//! The pages of the user guide that are made from the code: they are what the code says.
//!
//! `CKPT_ENGINE_WRITE_REFERENCE=1 cargo test -p checkpoint-engine-cli --test reference` writes them.

use std::fmt::Write as _;
use std::path::Path;

use checkpoint_engine::backend::telemetry::{METRICS, MetricKind};
use checkpoint_engine::delta::DeltaConfig;
use checkpoint_engine::dir::DirOptions;
use checkpoint_engine::fp8::{Fp8Config, Quantization};
use checkpoint_engine::hccl::HcclOptions;
use checkpoint_engine::nccl::NcclOptions;
use checkpoint_engine::nixl::NixlOptions;
use checkpoint_engine::receivers::{SglangOptions, VllmOptions};
use checkpoint_engine::{CheckpointEngineConfig, config, registry};
use schemars::{JsonSchema, schema_for};
use serde_json::Value;

/// Compares a page with what it should be, or writes it.
fn is_up_to_date(name: &str, made: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    if std::env::var_os("CKPT_ENGINE_WRITE_REFERENCE").is_some() {
        std::fs::write(&path, made).expect("the page can be written");
        return;
    }
    let page = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        page == made,
        "docs/{name} differs from the code; \
         CKPT_ENGINE_WRITE_REFERENCE=1 cargo test -p checkpoint-engine-cli --test reference writes it anew"
    );
}

#[test]
fn the_configuration_page_is_made_from_the_types() {
    let mut page = String::from(
        "# Configuration\n\n\
         <!-- Made from the types by cli/tests/reference.rs; do not edit. -->\n\n\
         A `checkpoint_engine` section in TOML, JSON or YAML, alone or where verl has it (under \
         `checkpoint_engine`, `rollout.checkpoint_engine` or `actor_rollout_ref.rollout.\
         checkpoint_engine`). Every key is optional, and `null` stands for the default. An unknown \
         key is an error that lists the known ones.\n\n\
         ```yaml\n{{#include ../examples/checkpoint_engine.yaml}}\n```\n",
    );
    let defaults = |value: Result<Value, serde_json::Error>| value.expect("defaults are JSON");
    let engine = defaults(serde_json::to_value(CheckpointEngineConfig::default()));
    table::<CheckpointEngineConfig>(&mut page, "`checkpoint_engine`", &engine);
    let layer = serde_json::json!({"trainer_quantize_fp8": false, "quantization": {}});
    let delta = defaults(serde_json::to_value(DeltaConfig::default()));
    table::<DeltaConfig>(&mut page, "`checkpoint_engine`, of the layer `delta`", &delta);
    table::<Fp8Config>(&mut page, "`checkpoint_engine`, with the feature `fp8`", &layer);
    let quantization = defaults(serde_json::to_value(Quantization::default()));
    table::<Quantization>(&mut page, "`quantization`", &quantization);
    let nccl = defaults(serde_json::to_value(NcclOptions::default()));
    table::<NcclOptions>(&mut page, "`engine_kwargs.nccl`", &nccl);
    let nixl = defaults(serde_json::to_value(NixlOptions::default()));
    table::<NixlOptions>(&mut page, "`engine_kwargs.nixl`", &nixl);
    let hccl = defaults(serde_json::to_value(HcclOptions::default()));
    table::<HcclOptions>(&mut page, "`engine_kwargs.hccl`", &hccl);
    let dir = defaults(serde_json::to_value(DirOptions::default()));
    table::<DirOptions>(&mut page, "`engine_kwargs.dir`", &dir);
    let vllm = defaults(serde_json::to_value(VllmOptions::default()));
    table::<VllmOptions>(&mut page, "`engine_kwargs.vllm`", &vllm);
    let sglang = defaults(serde_json::to_value(SglangOptions::default()));
    table::<SglangOptions>(&mut page, "`engine_kwargs.sglang`", &sglang);
    page.push_str("\n`ipc` has `placed`, with the meaning that it has for the others. `naive` has no options of its own.\n");
    is_up_to_date("configuration.md", &page);
}

#[test]
fn the_configuration_that_the_page_shows_is_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/checkpoint_engine.yaml");
    let config = config::load(path).expect("a configuration");
    assert_ne!(Fp8Config::of(&config).expect("a section"), Fp8Config::default());
    assert_ne!(config.timeout(), CheckpointEngineConfig::default().timeout());
}

#[test]
fn what_the_page_for_those_who_come_from_verl_says_is_so() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = std::fs::read_to_string(root.join("docs/from-verl.md")).expect("the page");
    let shown = config::load(root.join("examples/from_verl.yaml")).expect("verl's section");
    assert_eq!((&*shown.backend, shown.bucket_bytes()), ("nccl", Some(2048 << 20)));
    assert_eq!(shown.kwargs::<NcclOptions>("nccl").expect("options"), NcclOptions::default());

    let refused = |section: &str, words: &str| {
        assert!(page.contains(&format!("`{section}`")), "the page does not show {section}");
        let words = page.lines().find(|line| line.contains(words)).expect("the page's words");
        let (_, words) = words.trim_end_matches(" |").rsplit_once(" | ").expect("a row");
        let error = config::parse(section, config::Format::Yaml).and_then(|config| {
            config.kwargs::<NcclOptions>("nccl")?;
            registry().get(&config.backend).map(|_| ())
        });
        let error = error.expect_err("verl has it, and this engine has not").to_string();
        let words = words.trim_end_matches(", …");
        assert!(error.contains(words), "{error}\nis not what the page says:\n{words}");
    };
    refused("backend: kimi_ckpt_engine", "there is no backend");
    refused("engine_kwargs: {nccl: {multi_sender: true}}", "unknown key `multi_sender`");
    refused("custom_backend_module: my.backends", "expected `custom_backend_module`");
    refused("checkpoint_manager_class: my.Manager", "unknown key `checkpoint_manager_class`");
    for name in ["mooncake", "delta_sharded"] {
        assert!(page.contains(name) && registry().get(name).is_err(), "{name}");
    }
}

/// A table of a type's keys, and below it the values of keys that have few.
fn table<T: JsonSchema>(page: &mut String, title: &str, defaults: &Value) {
    let schema = Value::from(schema_for!(T));
    let text = |value: &Value| value.as_str().map(plain).unwrap_or_default();
    write!(page, "\n## {title}\n\n| key | takes | default | |\n|---|---|---|---|\n").expect("text");
    let mut choices = String::new();
    for (key, property) in schema["properties"].as_object().expect("a struct") {
        let (takes, values) = kind(property, &schema);
        let default = match (&defaults[key], &property["default"]) {
            (Value::Null, Value::Null) => "",
            (Value::Null, default) | (default, _) => &format!("`{default}`"),
        };
        let default = if ["`{}`", "`[]`", "`\"\"`"].contains(&default) { "" } else { default };
        let help = text(&property["description"]);
        writeln!(page, "| `{key}` | {takes} | {default} | {help} |").expect("text");
        for value in values {
            let (name, help) =
                (value["const"].as_str().expect("a name"), text(&value["description"]));
            writeln!(choices, "| `{key}` | `{name}` | {help} |").expect("text");
        }
    }
    if !choices.is_empty() {
        write!(page, "\n| key | value | |\n|---|---|---|\n{choices}").expect("text");
    }
}

/// What a key takes, and its values if they are few.
fn kind(property: &Value, schema: &Value) -> (String, Vec<Value>) {
    if let Some(path) = property["$ref"].as_str() {
        let name = path.rsplit('/').next().unwrap_or_default();
        return kind(&schema["$defs"][name], schema);
    }
    for alternatives in ["anyOf", "oneOf"] {
        let Some(all) = property[alternatives].as_array() else { continue };
        if all.iter().all(|value| value["const"].is_string()) {
            return ("one of the values below".into(), all.clone());
        }
        let other = all.iter().find(|value| value["type"] != "null").expect("an alternative");
        return kind(other, schema);
    }
    let types = match &property["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        Value::String(one) => vec![one.as_str()],
        _ => vec![],
    };
    let words = match types.iter().find(|name| **name != "null") {
        Some(&"boolean") => "true or false",
        Some(&"integer") => "whole number",
        Some(&"number") => "number",
        Some(&"string") => "text",
        Some(&"array") => "list of text",
        Some(&"object") | None => "table",
        Some(other) => other,
    };
    (words.into(), vec![])
}

/// A doc comment's first paragraph in one line of a table, links to other items without the link.
fn plain(text: &str) -> String {
    let first = text.split("\n\n").next().unwrap_or_default().replace('\n', " ");
    let mut out = String::new();
    let mut rest = first.as_str();
    while let Some((before, link)) = rest.split_once('[') {
        out.push_str(before);
        let Some((name, after)) = link.split_once(']') else { break };
        out.push_str(name);
        rest = match after.strip_prefix('(').and_then(|target| target.split_once(')')) {
            Some((_, after)) => after,
            None => after,
        };
    }
    out.push_str(rest);
    out.replace('|', "\\|")
}

#[test]
fn the_metrics_page_is_made_from_the_table() {
    let mut page = String::from(
        "# Metrics and spans\n\n\
         <!-- Made from engine_core::telemetry by cli/tests/reference.rs; do not edit. -->\n\n\
         The library emits metrics through the crate [`metrics`](https://docs.rs/metrics). A program that \
         embeds it installs a recorder and calls `telemetry::describe()`. `ckpt-engine` serves its \
         metrics over HTTP, in Prometheus's format:\n\n\
         ```\n\
         ckpt-engine sync --synthetic qwen2.5-0.5b --rollouts 2 --updates 100 --metrics 127.0.0.1:9400\n\
         ckpt-engine top 127.0.0.1:9400 127.0.0.1:9401 127.0.0.1:9402\n\
         ```\n\n\
         `sync`, `trainer` and `rollout` have the option `--metrics`. Rollout *n* of a `sync` listens *n* ports \
         higher. `top` reads the same addresses, and shows each rank's state, version, rate and mean \
         stage times; `--once` prints them and ends. There is no authentication: anyone who reaches \
         an address can read its metrics.\n\n\
         [grafana.json](grafana.json) is a dashboard for Grafana. It shows versions and states of all ranks, \
         the time of updates and of their stages, rates, and aborted updates. [Tuning](tuning.md) explains how to \
         use the stages.\n\n\
         Every metric has the label `rank`.\n\n\
         | metric | kind | unit | labels | |\n|---|---|---|---|---|\n",
    );
    for metric in METRICS {
        let kind = match metric.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        };
        let labels: Vec<String> = metric
            .labels
            .iter()
            .map(|(name, values)| format!("`{name}`: {}", values.join(", ")))
            .collect();
        let (name, unit, labels, help) = (metric.name, metric.unit, labels.join("; "), metric.help);
        writeln!(page, "| `{name}` | {kind} | {unit} | {labels} | {help} |").expect("text");
    }
    page.push_str(
        "\n## Spans\n\n\
         Each update has a [`tracing`](https://docs.rs/tracing) span on every rank, `send` or \
         `receive`, with its version. Within it are spans of the level `DEBUG` with the bucket's \
         number: `collect` (waiting for the trainer's own stream), `encode`, `publish` and `confirm` \
         on the trainer, `fetch`, `verify` and `install` on a rollout. `install` begins when the caller gets a \
         bucket, and ends when it asks for the next.\n\n\
         ```\n\
         CKPT_ENGINE_LOG=protocol=debug ckpt-engine sync --synthetic tiny-moe\n\
         ```\n",
    );
    is_up_to_date("metrics.md", &page);
}

#[test]
fn the_dashboard_asks_for_metrics_and_labels_that_are_there() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/grafana.json");
    let dashboard = std::fs::read_to_string(path).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&dashboard).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let queries: Vec<&str> = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().expect("targets"))
        .map(|target| target["expr"].as_str().expect("a query"))
        .collect();
    let mut shown = std::collections::BTreeSet::new();
    for query in &queries {
        for rest in query.split("ckpt_engine_").skip(1) {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let (name, rest) = rest.split_at(end.expect("a selector"));
            let name = format!("ckpt_engine_{name}");
            let metric = METRICS.iter().find(|metric| match metric.kind {
                MetricKind::Histogram => ["_bucket", "_sum", "_count"]
                    .iter()
                    .any(|suffix| name.strip_suffix(suffix) == Some(metric.name)),
                _ => name == metric.name,
            });
            let metric = metric.unwrap_or_else(|| panic!("there is no {name}: {query}"));
            shown.insert(metric.name);
            let selector = rest.split(['{', '}']).nth(1).expect("a selector");
            for matcher in selector.split(", ") {
                let (label, values) = matcher.split_once('=').expect("a matcher");
                if ["job", "rank"].contains(&label) {
                    continue;
                }
                let known = metric.labels.iter().find(|(name, _)| *name == label);
                let (_, known) = known.unwrap_or_else(|| panic!("{name} has no label {label}"));
                for value in values.trim_matches(['~', '"']).split('|') {
                    assert!(known.contains(&value), "{label} of {name} is never {value}");
                }
            }
        }
    }
    assert!(shown.len() >= 7, "only {shown:?}");
}

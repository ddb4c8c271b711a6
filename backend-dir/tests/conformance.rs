//! The engine over a folder behaves as every engine has to.

use std::path::Path;

use conformance::Suite;
use engine_core::CheckpointEngineConfig;
use serde_json::Value;

/// A suite with a folder of the test's own, empty when it begins.
fn suite(options: Value) -> Suite {
    let test = std::thread::current().name().unwrap_or_default().replace("::", "/");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance").join(test);
    // Left by an earlier run.
    drop(std::fs::remove_dir_all(&folder));
    Suite::new(backend_dir::BACKEND)
        .with_control_plane()
        .with_config(|config| set(config, &folder, options))
}

fn set(config: &mut CheckpointEngineConfig, path: &Path, options: Value) {
    let section = config.engine_kwargs.entry("dir".into()).or_default();
    section.insert("path".into(), path.to_str().expect("a path").into());
    if let Value::Object(options) = options {
        section.extend(options);
    }
}

mod with_whole_versions {
    conformance::suite!(super::suite(serde_json::json!({})));
}

mod with_changes {
    conformance::suite!(super::suite(serde_json::json!({"changes": "xor", "anchor_every": 2})));
}

/// The layer's changes are no version for others, so none is kept.
mod with_the_layer_delta {
    fn suite() -> conformance::Suite {
        super::suite(serde_json::json!({"keep": 0}))
            .with_layer(delta::LAYER, engine_core::Role::Trainer, |weights| weights)
            .with_config(|config| {
                config.layers.insert("delta".into(), true.into());
            })
    }

    conformance::suite!(suite());
}

//! The layers that a server's checkpoint does not quantise, if the server tells where the checkpoint is and it can be read here.

use std::path::Path;
use std::time::Duration;

use engine_core::clock::within;
use serde_json::Value;
use tokio::sync::oneshot;

/// The longest `config.json` that is read.
const MAX_BYTES: u64 = 16 << 20;

/// The layers that the `config.json` of a checkpoint excludes from quantisation. Empty if there is no such file, if the name is not an
/// absolute path (such as a model's name in a hub), or if the file cannot be read within the limit, because its file system does not
/// answer.
pub(crate) async fn read(checkpoint: &str, limit: Duration) -> Vec<String> {
    let file = Path::new(checkpoint).join("config.json");
    if !Path::new(checkpoint).is_absolute() {
        return Vec::new();
    }
    let (tell, told) = oneshot::channel();
    let read = move || {
        let is_small = std::fs::metadata(&file).is_ok_and(|found| found.len() <= MAX_BYTES);
        // The receiver has gone if the limit has passed.
        drop(tell.send(is_small.then(|| std::fs::read(&file).ok()).flatten()));
    };
    if let Err(error) = std::thread::Builder::new().name("ckpt-config".into()).spawn(read) {
        tracing::debug!(%error, "there is no thread to read a checkpoint's configuration");
    }
    let text = within(limit, told).await.and_then(std::result::Result::ok).flatten();
    let text = text.unwrap_or_default();
    ignored(&serde_json::from_slice(&text).unwrap_or_default())
}

/// The layers that a model's configuration excludes from quantisation.
fn ignored(config: &Value) -> Vec<String> {
    let own = &config["quantization_config"];
    let lists = ["ignored_layers", "modules_to_not_convert"].map(|key| own[key].as_array());
    let entries = lists.into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.as_str().map(str::to_owned)).collect()
}

/// The first weight that a server would misread: one in FP8 of a layer that it does not quantise, and the entry that says so. An entry
/// names a layer, or all layers below it.
pub(crate) fn clash<'a>(
    ignored: &'a [String],
    weights: impl Iterator<Item = (&'a str, &'a str)>,
) -> Option<(&'a str, &'a str)> {
    let mut in_fp8 = weights.filter(|(_, dtype)| dtype.starts_with("float8_e4m3"));
    in_fp8.find_map(|(name, _)| {
        let layer = name.strip_suffix(".weight").unwrap_or(name);
        let has = |entry: &&String| {
            let rest = layer.strip_prefix(&***entry);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        ignored.iter().find(has).map(|entry| (name, &**entry))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_layer_and_those_below_it_are_left_alone_and_no_others() {
        let config = serde_json::json!({ "quantization_config": {
            "modules_to_not_convert": ["lm_head", "model.layers.1"], "ignored_layers": ["visual", 7],
        }});
        let ignored = ignored(&config);
        for (name, dtype, entry) in [
            ("lm_head.weight", "float8_e4m3fn", Some("lm_head")),
            ("lm_head.weight", "bfloat16", None),
            ("model.layers.1.mlp.down_proj.weight", "float8_e4m3fn", Some("model.layers.1")),
            ("model.layers.10.mlp.down_proj.weight", "float8_e4m3fn", None),
            ("visual.blocks.0.weight", "float8_e4m3fnuz", Some("visual")),
            ("model.lm_head.weight", "float8_e4m3fn", None),
        ] {
            let found = clash(&ignored, [(name, dtype)].into_iter());
            assert_eq!(found, entry.map(|entry| (name, entry)), "{name}");
        }
        assert!(super::ignored(&Value::Null).is_empty());
    }

    proptest! {
        #[test]
        fn a_clash_is_that_of_whole_segments(entry in "[ab.]{1,4}", layer in "[ab.]{1,6}") {
            let segments = |text: &str| text.split('.').map(str::to_owned).collect::<Vec<_>>();
            let name = format!("{layer}.weight");
            let found = clash(std::slice::from_ref(&entry), [(&*name, "float8_e4m3fn")].into_iter()).is_some();
            prop_assert_eq!(found, segments(&layer).starts_with(&segments(&entry)));
        }
    }
}

//! What a server of either kind is not sent: layers in FP8 that its checkpoint leaves alone.

use engine_core::{Rank, Version, ensure_async_iterator};
use serde_json::json;

use super::server::{Server, Started, tensors};
use super::{model, plain, trainer};

/// A layer that a server's checkpoint names is not sent to it in FP8, and other servers get the update all the same.
pub(crate) async fn are_not_sent_in_fp8(started: impl Fn() -> Started) {
    let kind = started().contract;
    let folder = std::env::temp_dir().join(format!("ckpt-ignored-{kind:?}-{}", std::process::id()));
    // The first bucket has several layers.
    let small = |version| model(version).split_off(1);
    let has = |server: &Server| {
        let (version, weights) = server.generate().expect("it generates");
        assert!(version == "1" && weights == tensors(&small(1)));
    };
    std::fs::create_dir_all(&folder).expect("a folder");
    for (layer, is_first) in [("layers.0", true), ("layers.5.proj", false), ("layers.50", false)] {
        let own = json!({ "quantization_config": { "modules_to_not_convert": [layer] } });
        std::fs::write(folder.join("config.json"), own.to_string()).expect("a file");
        let checkpoint = Some(folder.clone());
        let server = Server::start(&small(0), Started { checkpoint, ..started() }).await;
        let other = Server::start(&small(0), started()).await;
        let mut trainer = trainer(&[&server, &other], plain()).await;
        let sent = trainer.send_weights(ensure_async_iterator(small(1)), Version(1)).await;
        let report = sent.expect("an update of the other one");
        has(&other);
        if layer == "layers.50" {
            has(&server);
            continue;
        }
        assert_eq!(report.absent, [Rank(1)]);
        let words = report.receivers[1].notes["error"].to_string();
        for part in [&format!("`{layer}`"), &format!("{layer}."), "proj.weight", "ignored_layers"] {
            assert!(words.contains(part), "{words}");
        }
        // Nobody is stopped for what the first bucket has.
        assert_eq!(server.generate().is_ok(), is_first, "{layer}");
    }
    std::fs::remove_dir_all(&folder).expect("it was there");
}

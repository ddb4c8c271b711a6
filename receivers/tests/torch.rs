//! The trainer beside torch's own code: a server whose worker meets it as SGLang's do, in a process with PyTorch.

mod support;

use engine_core::{Rank, Version, ensure_async_iterator};
use serde_json::json;
use support::python::Worker;
use support::{join, model, plain};

/// What the worker answers to the first bucket of an update.
async fn found(options: serde_json::Value) -> String {
    let worker = Worker::start("torch_worker.py", &[]);
    let mut options = options.as_object().cloned().expect("options");
    options.insert("servers".into(), json!([format!("http://{}", worker.address())]));
    let mut config = support::config(&[], plain());
    config.backend = "sglang".into();
    config.engine_kwargs.insert("sglang".into(), options);
    // Importing, and meeting, as slow as a busy machine does it.
    config.timeout_seconds = 60.0;
    let mut trainer = join(config, false).await.expect("a trainer");
    // The worker answers with what it found, and loads nothing.
    let sent = trainer.send_weights(ensure_async_iterator(model(1)), Version(1)).await;
    let error = sent.expect_err("it loads nothing");
    assert_eq!(error.report().rank, Some(Rank(1)), "{error}");
    error.to_string()
}

#[tokio::test]
#[ignore = "needs a Python with PyTorch, named by CKPT_ENGINE_TORCH_PYTHON"]
async fn a_worker_finds_the_worlds_id_with_torchs_own_rendezvous_and_stores() {
    let found = found(plain()).await;
    let (_, id) = found.split_once("the id is ").expect(&found);
    let id: String = id.chars().take_while(char::is_ascii_hexdigit).collect();
    // As the library of these tests makes them.
    assert!(id.len() == 256 && id.ends_with(&"5a".repeat(120)), "{found}");
}

#[tokio::test]
#[ignore = "needs a Python with PyTorch, named by CKPT_ENGINE_TORCH_PYTHON"]
async fn what_a_worker_is_told_of_a_bucket_is_what_torch_rebuilds_a_shared_tensor_from() {
    let found = found(json!({ "transport": "ipc" })).await;
    assert!(found.contains("a bucket of 1 tensors, the first one embed.weight"), "{found}");
}

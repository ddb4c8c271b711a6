//! The trainer beside ZeroMQ's own library: a server whose worker hears of buckets by it, in a process with PyTorch.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use engine_core::{DType, ErrorKind, Version, Weight, ensure_async_iterator};
use serde_json::{Value, json};
use support::collectives::DEVICES;
use support::python::{Worker, variable};
use support::{even, join, plain};

/// What a worker says of itself.
fn says(worker: &Worker) -> Value {
    let mut stream = TcpStream::connect(worker.address()).expect("it listens");
    stream.write_all(b"GET /model_info HTTP/1.0\r\n\r\n").expect("a question");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    serde_json::from_str(body).expect("JSON")
}

#[tokio::test]
#[ignore = "needs a Python with PyTorch and ZeroMQ, named by CKPT_ENGINE_TORCH_PYTHON and CKPT_ENGINE_PYZMQ"]
async fn a_worker_with_zeromqs_own_library_hears_of_every_bucket_and_of_every_end() {
    variable("CKPT_ENGINE_PYZMQ");
    let worker = Worker::start("zmq_worker.py", &[DEVICES[0]]);
    let mut config = support::config(&[], plain());
    config.backend = "sglang".into();
    let options = json!({
        "servers": [format!("http://{}", worker.address())],
        "transport": "zmq",
    });
    config.engine_kwargs.insert("sglang".into(), options.as_object().cloned().expect("options"));
    // As slow as a busy machine does it.
    config.timeout_seconds = 60.0;
    let mut trainer = join(config, false).await.expect("a trainer");
    let names: Vec<String> = even(1).iter().map(|weight| weight.name().to_owned()).collect();
    for version in 1..=2 {
        let sent = trainer.send_weights(ensure_async_iterator(even(version)), Version(version));
        assert!(sent.await.expect("an update").absent.is_empty());
        let said = says(&worker);
        assert_eq!(said["loaded"], json!(names));
        assert_eq!(
            (&said["weight_version"], &said["finished"]),
            (&json!(version.to_string()), &json!(version))
        );
    }
    // An update that is called off ends there, and the next one begins.
    let mut broken: Vec<std::io::Result<Weight>> = even(3).into_iter().take(4).map(Ok).collect();
    broken.push(Err(std::io::Error::other("the gather failed")));
    let sent = trainer.send_weights(ensure_async_iterator(broken), Version(3)).await;
    assert_eq!(sent.expect_err("it fails").kind(), ErrorKind::Source);
    assert_eq!(says(&worker)["finished"], 2);
    // What a worker says of a bucket, however long, is what the trainer says.
    let mut refused = even(4);
    refused.push(Weight::new("refused", DType::U8, [1], vec![0_u8]).expect("a weight"));
    let sent = trainer.send_weights(ensure_async_iterator(refused), Version(4)).await;
    let error = sent.expect_err("nobody has it").to_string();
    assert!(error.contains("RuntimeError: refused: CUDA out of memory"), "{error}");
    let sent = trainer.send_weights(ensure_async_iterator(even(5)), Version(5)).await;
    assert!(sent.expect("an update").absent.is_empty());
    assert_eq!(says(&worker)["weight_version"], "5");
}

//! A transport that does not know the kind of memory behaves on it as on any other.

use conformance::{Suite, on_memory};
use engine_core::{Backend, EngineContext, ErrorKind, Registry, Result, Weight};
use file_memory::MEMORY;

fn suite() -> Suite {
    Suite::new(on_memory(backend_ipc::BACKEND, MEMORY)).with_control_plane().with_config(|config| {
        config.device = "file".parse().expect("a device");
    })
}

fn upload(weight: Weight) -> Result<Weight> {
    file_memory::upload(&weight)
}

mod buckets {
    conformance::suite!(super::suite());
}

#[test]
fn weights_and_buckets_of_the_kind_arrive() {
    suite().with_weights_placed(upload).test("a_tensor_larger_than_a_bucket_arrives_whole");
}

#[tokio::test]
async fn a_transport_that_needs_addresses_says_that_the_kind_has_none() {
    let mut config = engine_core::CheckpointEngineConfig::new("nixl");
    config.device = "file".parse().expect("a device");
    let at = control_plane::ControlConfig::new(
        format!("unix:@file-memory-{}", std::process::id()).parse().expect("an address"),
        control_plane::Token::generate().expect("a token"),
    );
    let control = control_plane::ControlPlane::lead(at).await.expect("a control plane");
    let registry = Registry::new().with(backend_nixl::BACKEND).with_memory(MEMORY);
    let backend = registry.get("nixl").expect("the backend");
    let error = backend
        .prepare_trainer(EngineContext::new(config).with_control(control))
        .await
        .expect_err("it has no address");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains("no address"), "{error}");
}

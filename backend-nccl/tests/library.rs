//! What there is of NCCL on a machine without a GPU: the library is found, says its version and what it
//! can do, and why it cannot be used.

use std::sync::atomic::{AtomicU32, Ordering};

use control_plane::ControlPlane;
use engine_core::{Availability, CheckpointEngineConfig, EngineContext, ErrorKind};

fn words() -> String {
    match backend_nccl::BACKEND.probe() {
        Availability::Usable { details } => details,
        Availability::Unusable { reason, remedy } => format!("{reason}; {remedy}"),
        other => format!("{other:?}"),
    }
}

async fn prepare(config: CheckpointEngineConfig) -> engine_core::Error {
    // Tests of one process run at the same time.
    static CALLS: AtomicU32 = AtomicU32::new(0);
    let count = CALLS.fetch_add(1, Ordering::Relaxed);
    let address = format!("unix:@nccl-library-{}-{count}", std::process::id()).parse();
    let address = address.expect("an address");
    let token = control_plane::Token::generate().expect("a token");
    let control = control_plane::ControlConfig::new(address, token);
    let control = ControlPlane::lead(control).await.expect("an address");
    let context = EngineContext::new(config).with_control(control);
    backend_nccl::BACKEND.prepare_trainer(context).await.expect_err("it cannot be prepared")
}

#[tokio::test]
async fn host_memory_is_refused_in_words() {
    let config = CheckpointEngineConfig::new("nccl");
    let error = prepare(config).await;
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("set `device` to `cuda`"), "{error}");
}

#[tokio::test]
async fn a_library_that_is_not_there_is_an_error_that_names_it_and_says_what_to_install() {
    let text = r#"{"backend": "nccl", "device": "cuda", "engine_kwargs": {
        "nccl": {"library": "/nowhere/libnccl.so.2"}}}"#;
    let config = serde_json::from_str(text);
    let error = prepare(config.expect("a configuration")).await;
    assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
    assert!(error.to_string().contains("/nowhere/libnccl.so.2"), "{error}");
    assert!(error.to_string().contains("pip install nvidia-nccl"), "{error}");
}

#[tokio::test]
async fn an_option_that_nobody_knows_is_an_error_that_lists_those_that_are_known() {
    let text = r#"{"backend": "nccl", "engine_kwargs": {"nccl": {"sender": 2}}}"#;
    let config = serde_json::from_str(text);
    let context = EngineContext::new(config.expect("a configuration"));
    let prepared = backend_nccl::BACKEND.prepare_trainer(context.clone()).await;
    let error = prepared.expect_err("an unknown option");
    assert!(error.to_string().contains("`senders`"), "{error}");
    let error = backend_nccl::BACKEND.prepare_rollout(context).await.expect_err("on a rollout too");
    assert!(error.to_string().contains("`senders`"), "{error}");
}

#[test]
#[ignore = "needs NCCL"]
fn the_library_says_its_version_and_what_it_can_do() {
    let words = words();
    assert!(words.contains("NCCL 2."), "{words}");
    assert!(words.contains("can leave ranks out of a group"), "{words}");
}

#[test]
#[ignore = "needs NCCL"]
fn an_id_can_be_made_anywhere() {
    let id = backend_nccl::bare::group_id(None).expect("an id");
    assert_eq!(id.len(), 128);
    assert!(id.iter().any(|byte| *byte != 0));
}

#[test]
#[ignore = "needs NCCL"]
fn a_group_without_a_gpu_is_an_error_in_words() {
    const NAME: &str = "a_group_without_a_gpu_is_an_error_in_words";
    const CHILD: &str = "CKPT_ENGINE_TEST_WITHOUT_A_GPU";
    if std::env::var_os(CHILD).is_some() {
        assert!(!device_cuda::count().is_ok_and(|count| count > 0), "there is a GPU");
        let error = backend_nccl::bare::join_alone(None).expect_err("no GPU");
        assert!(error.to_string().contains("ncclCommInitRankConfig"), "{error}");
        assert!(error.to_string().len() > 40, "no words: {error}");
        return;
    }
    // A process that sees none, whatever the machine has.
    let child = std::process::Command::new(std::env::current_exe().expect("this program"))
        .args([NAME, "--exact", "--include-ignored"])
        .envs([(CHILD, "1"), ("CUDA_VISIBLE_DEVICES", "-1")])
        .output()
        .expect("a child");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
}

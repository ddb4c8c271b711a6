//! What is said of libraries that are missing, that are another vendor's, or that lack something.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use control_plane::{ControlConfig, ControlPlane, Token};
use engine_core::{Availability, CheckpointEngineConfig, EngineContext, Error, ErrorKind};
use hccl_sim::Profile;

const PROBE: &str = "CKPT_ENGINE_TEST_PROBE";

/// What a child process does; nothing when this file's tests are run.
#[test]
fn probe_here() {
    if std::env::var_os(PROBE).is_none() {
        return;
    }
    let said = match backend_hccl::BACKEND.probe() {
        Availability::Usable { details } => format!("usable: {details}"),
        Availability::Unusable { reason, .. } => format!("unusable: {reason}"),
        other => format!("{other:?}"),
    };
    writeln!(std::io::stdout(), "\n>{said}").unwrap();
}

/// What a process says that looks for the libraries with these variables alone.
fn probed(variables: &[(&str, &Path)]) -> String {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "probe_here", "--nocapture"]).env_clear().env(PROBE, "1");
    let output = child.envs(variables.iter().copied()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = text.lines().find_map(|line| line.strip_prefix('>'));
    said.unwrap_or_else(|| panic!("{text}")).to_owned()
}

/// A shared object with nothing but these functions.
fn library(path: &Path, functions: &[&str]) {
    let source = path.with_extension("c");
    let text: String =
        functions.iter().map(|name| format!("int {name}(void) {{ return 0; }}\n")).collect();
    fs::write(&source, text).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(path).arg(&source).status();
    assert!(built.unwrap().success());
}

const DIR: &str = "CKPT_ENGINE_HCCL_DIR";

#[test]
fn a_missing_library_is_an_error_that_says_what_to_install() {
    let folder = tempfile::tempdir().unwrap();
    let said = probed(&[(DIR, folder.path())]);
    assert!(said.starts_with("unusable: there is no libascendcl.so in "), "{said}");
    assert!(said.contains("install the CANN toolkit and source its set_env.sh"), "{said}");
}

#[test]
fn habanas_library_of_the_same_name_is_recognised_and_refused() {
    let folder = tempfile::tempdir().unwrap();
    library(&folder.path().join("libhccl.so"), &["hcclGetUniqueId", "hcclCommInitRank"]);
    let alone = probed(&[(DIR, folder.path())]);
    assert!(alone.contains("is not Ascend's HCCL: it has no HcclGetRootInfo"), "{alone}");
    // Beside Ascend's ACL it is no better.
    library(&folder.path().join("libascendcl.so"), &["aclInit"]);
    let beside = probed(&[(DIR, folder.path())]);
    assert!(beside.contains("is not Ascend's HCCL: it has no HcclGetRootInfo"), "{beside}");
}

#[test]
fn libraries_that_are_too_old_are_an_error_that_lists_what_they_lack() {
    let folder = tempfile::tempdir().unwrap();
    library(&folder.path().join("libascendcl.so"), &["aclInit", "aclrtSetDevice"]);
    library(&folder.path().join("libhccl.so"), &["HcclGetRootInfo", "HcclBroadcast"]);
    let said = probed(&[(DIR, folder.path())]);
    assert!(said.contains("aclrtMalloc") && said.contains("HcclCommDestroy"), "{said}");
    assert!(!said.contains("aclInit,") && said.contains("CANN 8.1 or later is needed"), "{said}");
}

#[test]
fn libraries_are_found_by_the_variables_that_cann_sets() {
    let libraries = hccl_sim::libraries(Profile::Split).unwrap();
    let home = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(&libraries, home.path().join("lib64")).unwrap();
    for (name, path) in [
        (DIR, &*libraries),
        ("ASCEND_HOME_PATH", home.path()),
        ("ASCEND_TOOLKIT_HOME", home.path()),
        ("LD_LIBRARY_PATH", &libraries),
    ] {
        let said = probed(&[(name, path)]);
        assert!(said.starts_with("usable: HCCL with ACL "), "{name}: {said}");
        assert!(said.contains("(simulated)") && said.contains("8 NPUs"), "{name}: {said}");
    }
}

async fn refused(change: impl FnOnce(&mut CheckpointEngineConfig)) -> Error {
    // The one before may still be being closed.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let address = format!("unix:@hccl-libraries-{}-{count}", std::process::id()).parse().unwrap();
    let control = ControlConfig::new(address, Token::generate().unwrap());
    let control = ControlPlane::lead(control).await.unwrap();
    let device = "npu".parse().unwrap();
    let mut config = CheckpointEngineConfig::new("hccl");
    config.device = device;
    change(&mut config);
    let context = EngineContext::new(config).with_control(control);
    backend_hccl::BACKEND.prepare_trainer(context).await.unwrap_err()
}

#[tokio::test]
async fn options_that_hccl_cannot_have_are_errors_with_the_reason() {
    let error = refused(|config| {
        let section = config.engine_kwargs.entry("hccl".into()).or_default();
        section.insert("senders".into(), 2.into());
    });
    let error = error.await;
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("HCCL sends from one trainer"), "{error}");
    let error = refused(|config| config.device = Default::default()).await;
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("set device to npu (by rank) or npu:N"), "{error}");
}

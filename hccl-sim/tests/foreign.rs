//! Clients that others have written.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::Path;
use std::process::{Child, Command};

use hccl_sim::Profile;
use hccl_sim::foreign::{self, BYTES};
use support::*;

fn python(rank: u32, libraries: &Path, root_info: &Path) -> Child {
    let command = foreign::python_rank(rank, libraries, root_info);
    foreign::start(&mut command.unwrap_or_else(|error| panic!("{error}"))).unwrap()
}

fn answer(child: Child) -> serde_json::Value {
    let output = end(child, "python3");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {words}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
#[ignore = "needs python3 and vllm_ascend's wrapper: CKPT_ENGINE_PYHCCL_WRAPPER; `cargo xtask test` installs it"]
fn two_ranks_of_the_python_wrapper_broadcast_to_each_other() {
    let libraries = hccl_sim::libraries(Profile::Current).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let info = folder.path().join("root-info");
    let ranks = [0, 1].map(|rank| python(rank, &libraries, &info));
    let [root, other] = ranks.map(answer);
    assert_eq!(root["own"], true, "the root keeps its bytes");
    assert_eq!(other["own"], false, "the other rank has the root's");
    assert_eq!(root["sha256"], other["sha256"]);
}

#[test]
#[ignore = "needs python3 and vllm_ascend's wrapper: CKPT_ENGINE_PYHCCL_WRAPPER; `cargo xtask test` installs it"]
fn a_rank_of_this_test_and_one_of_the_python_wrapper_understand_each_other() {
    processes(1, &[], |process| {
        process.begin();
        let api = &process.api;
        let libraries = hccl_sim::libraries(Profile::Current).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let info = folder.path().join("root-info");
        let bytes = process.root_info();
        std::fs::write(&info, &bytes).unwrap();
        let other = python(1, &libraries, &info);
        let mut comm = std::ptr::null_mut();
        process.ok(api.HcclCommInitRootInfo(2, bytes.as_ptr(), 0, &raw mut comm));
        let stream = process.stream();
        // What a Python rank 0 would have.
        let own: Vec<u8> = (0..251_u32).map(|i| (7 * i % 251) as u8).cycle().take(BYTES).collect();
        let (buffer, flag) = (process.device(&own), process.device(&[1]));
        process.ok(api.HcclBroadcast(buffer, BYTES as u64, UINT8, 0, comm, stream));
        process.ok(api.HcclAllReduce(flag, flag, 1, INT8, SUM, comm, stream));
        process.ok(api.aclrtSynchronizeStream(stream));
        assert_eq!(process.bytes(flag, 1), [2]);
        process.ok(api.HcclCommDestroy(comm));
        let answer = answer(other);
        assert_eq!(answer["own"], false);
        assert_eq!(answer["sha256"], digest(&own));
    });
}

/// By the same tool as the script, so that no digest has to be believed.
fn digest(bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let program =
        "import hashlib,sys;print(hashlib.sha256(open(sys.argv[1],'rb').read()).hexdigest())";
    let output = Command::new("python3").args(["-c", program]).arg(file.path()).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

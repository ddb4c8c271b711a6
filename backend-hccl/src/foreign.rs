//! Groups with a member that others have written: the HCCL wrapper of `vllm_ascend`, in Python.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::Duration;

use collective::{Communicator, Shape, Thread, Wait};
use hccl_sim::Profile;
use hccl_sim::foreign::{self, BYTES};

use crate::comm::{HcclCommunicator, Plan};
use crate::sys;

/// Where the member of this crate finds the root info, and its place in the group.
const FOLDER: &str = "CKPT_ENGINE_TEST_FOREIGN";
const PLACE: &str = "CKPT_ENGINE_TEST_PLACE";
/// How long anything here may take before it counts as a hang.
const LIMIT: Duration = Duration::from_secs(30);

/// What the two members do.
const OPERATIONS: &str = "join,broadcast:0,broadcast:1,broadcast:0,broadcast:1";

/// What the script's rank of this number broadcasts.
fn bytes_of(rank: u32) -> Vec<u8> {
    (0..251).map(|i| ((7 * i + rank) % 251) as u8).cycle().take(BYTES).collect()
}

/// What a child process does; nothing when the tests are run.
#[tokio::test]
async fn member_here() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let place = std::env::var(PLACE).unwrap().parse().unwrap();
    let plan = Plan {
        library_dir: None,
        device: Some(place),
        rank: place,
        shape: Shape { slots: 1, slot_bytes: 4 << 20 },
        deadline: LIMIT,
        shares: false,
    };
    let open = move || Ok(HcclCommunicator::open(&plan)?);
    let thread = Thread::start("ckpt-hccl", open).await.unwrap();
    let member = move |own: &mut HcclCommunicator, wait: &Wait<'_>| {
        let before = own.device().memory_info();
        let info = folder.join("root-info");
        if place == 0 {
            let part = folder.join("part");
            fs::write(&part, own.new_group()?).unwrap();
            fs::rename(&part, &info).unwrap();
        }
        while !info.exists() {
            wait.check("waiting for the root info")?;
            std::thread::sleep(Duration::from_millis(5));
        }
        own.join(0, &fs::read(info).unwrap(), 2, place, wait)?;
        for (ended, root) in [0, 1, 0, 1].into_iter().enumerate() {
            let given = if root == place { bytes_of(place) } else { vec![0xee; BYTES] };
            own.memory()?.write(0, &given)?;
            own.broadcast_from(0, root, 0, 0..BYTES as u64, wait)?;
            while own.ended(0)? == ended as u64 {
                wait.check("broadcasting")?;
                std::thread::sleep(Duration::from_millis(1));
            }
            let mut here = vec![0; BYTES];
            own.read(0, 0, &mut here, &OnceLock::new())?;
            assert!(here == bytes_of(root), "other bytes arrived from member {root}");
        }
        own.leave();
        assert_eq!(own.device().memory_info(), before, "the communicator is still there");
        Ok(())
    };
    thread.run(LIMIT, member).await.unwrap();
    thread.close().await;
}

/// Waits for a process: what it wrote, if it ended well.
fn end(child: Child, what: &str) -> Result<String, String> {
    let output = foreign::wait(child, LIMIT + LIMIT).map_err(|error| format!("{what}: {error}"))?;
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{what}: {}: {text}", output.status))
    }
}

/// A group of two, with the member of this crate at a place.
fn group(profile: Profile, place: u32) {
    let libraries = hccl_sim::libraries(profile).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut own = Command::new(std::env::current_exe().unwrap());
    own.args(["--exact", "foreign::member_here", "--nocapture"]);
    own.env(FOLDER, folder.path()).env(PLACE, place.to_string());
    own.env(sys::LIBRARY_DIR_VARIABLE, &libraries);
    let info = folder.path().join("root-info");
    let python = foreign::python_rank(1 - place, &libraries, &info);
    let mut python = python.unwrap_or_else(|error| panic!("{error}"));
    python.args(["--operations", OPERATIONS]);
    let [own, python] = [own, python].map(|mut rank| foreign::start(&mut rank).unwrap());
    let (own, python) = (end(own, "the member of this crate"), end(python, "the other member"));
    let (own, python) = match (own, python) {
        (Ok(own), Ok(python)) => (own, python),
        (own, python) => panic!("{own:?}\n{python:?}"),
    };
    assert!(own.contains("1 passed"), "{own}");
    // The last bytes are those of member 1.
    assert!(python.contains(&format!("\"own\": {}", place == 0)), "{python}");
}

#[test]
#[ignore = "needs python3 and vllm_ascend's wrapper: CKPT_ENGINE_PYHCCL_WRAPPER; `cargo xtask test` installs it"]
fn it_and_a_member_in_python_broadcast_to_each_other() {
    group(Profile::Current, 0);
    group(Profile::Cann81, 0);
}

#[test]
#[ignore = "needs python3 and vllm_ascend's wrapper: CKPT_ENGINE_PYHCCL_WRAPPER; `cargo xtask test` installs it"]
fn it_joins_the_group_of_a_member_in_python_and_they_broadcast_to_each_other() {
    group(Profile::Current, 1);
    group(Profile::Cann81, 1);
}

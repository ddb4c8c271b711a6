//! The control plane as embedders see it: rendezvous, messages, and every way a peer can go wrong.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine_core::control::{
    Address, ControlConfig, ControlPlane, Event, Peer, Role, Token, from_lookup,
};
use engine_core::{Error, ErrorKind, Rank, Recovery, Result};
use futures::executor::block_on;
use futures::future::{join_all, try_join_all};
use rustix::process::Signal;

/// Far above what anything here takes, so that a slow machine fails no test.
const DEADLINE: Duration = Duration::from_secs(30);
/// For waits that are meant to end by their deadline.
const SHORT: Duration = Duration::from_millis(200);

fn config(address: &str) -> ControlConfig {
    let token = Token::new(b"the secret of these tests").unwrap();
    ControlConfig::new(address.parse().unwrap(), token)
}

fn impatient(address: &str) -> ControlConfig {
    let mut config = config(address);
    config.heartbeat_interval = Duration::from_millis(100);
    config.heartbeat_timeout = Duration::from_secs(1);
    config
}

fn abstract_name(test: &str) -> String {
    format!("unix:@control-test-{test}-{}", std::process::id())
}

fn body(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn lead() -> ControlPlane {
    ControlPlane::lead(config("127.0.0.1:0")).await.unwrap()
}

async fn join(leader: &ControlPlane) -> ControlPlane {
    try_join(leader, Role::Rollout, None).await.unwrap()
}

async fn try_join(leader: &ControlPlane, role: Role, rank: Option<Rank>) -> Result<ControlPlane> {
    ControlPlane::join(config(&leader.address().to_string()), role, rank).await
}

/// Every plane gathers; its payload is its rank.
async fn gather(planes: &[&ControlPlane]) -> Vec<Peer> {
    let size = u32::try_from(planes.len()).unwrap();
    let gathers = planes.iter().map(|p| p.gather(size, body(&p.rank().to_string()), DEADLINE));
    let mut tables = try_join_all(gathers).await.unwrap();
    let table = tables.pop().unwrap();
    assert!(tables.iter().all(|other| *other == table));
    table
}

/// A leader and rollouts 1..=N, gathered.
async fn group(rollouts: usize) -> (ControlPlane, Vec<ControlPlane>) {
    let leader = lead().await;
    let mut members = Vec::new();
    for _ in 0..rollouts {
        members.push(join(&leader).await);
    }
    gather(&std::iter::once(&leader).chain(&members).collect::<Vec<_>>()).await;
    (leader, members)
}

async fn event(plane: &ControlPlane) -> Event {
    plane.recv(DEADLINE).await.unwrap().expect("an event before the deadline")
}

fn assert_names(error: &Error, kind: ErrorKind, words: &[&str]) {
    assert_eq!(error.kind(), kind, "{error}");
    for word in words {
        assert!(error.to_string().contains(word), "`{word}` is not in: {error}");
    }
}

/// This test executable once more, as another process that leads a group of two or is its member.
struct Other(Child);

impl Other {
    fn start(what: &str, address: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "other_process", "--test-threads=1"])
            .env("CONTROL_TEST_OTHER", format!("{what} {address}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// What `Other` runs; by itself it does nothing.
#[test]
fn other_process() {
    let Ok(what) = std::env::var("CONTROL_TEST_OTHER") else { return };
    let (what, address) = what.split_once(' ').unwrap();
    block_on(async {
        let plane = match what {
            "lead" => ControlPlane::lead(config(address)).await.unwrap(),
            _ => ControlPlane::join(config(address), Role::Rollout, None).await.unwrap(),
        };
        plane.gather(2, body("other"), DEADLINE).await.unwrap();
        // The executor stays blocked until the parent dies or kills this process.
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    });
}

#[test]
fn a_group_forms_over_tcp() {
    block_on(async {
        let leader = lead().await;
        assert_eq!((leader.rank(), leader.role()), (Rank(0), Role::Trainer));
        assert!(!leader.address().to_string().ends_with(":0"));
        let trainer = try_join(&leader, Role::Trainer, Some(Rank(2))).await.unwrap();
        let rollout = join(&leader).await;
        assert_eq!((trainer.rank(), rollout.rank()), (Rank(2), Rank(1)));
        let table = gather(&[&leader, &trainer, &rollout]).await;
        let expected = [(0, Role::Trainer), (1, Role::Rollout), (2, Role::Trainer)]
            .map(|(rank, role)| Peer { rank: Rank(rank), role, payload: body(&rank.to_string()) });
        assert_eq!(table, expected);
        for plane in [&leader, &trainer, &rollout] {
            assert_eq!(plane.peers(), expected);
        }
        leader.send(Rank(1), body("down")).unwrap();
        rollout.send(Rank(0), body("up")).unwrap();
        assert_eq!(event(&rollout).await, Event::Message { from: Rank(0), body: body("down") });
        assert_eq!(event(&leader).await, Event::Message { from: Rank(1), body: body("up") });
        for plane in [rollout, trainer, leader] {
            plane.close().await.unwrap();
        }
    });
}

#[test]
fn a_group_forms_over_an_abstract_socket() {
    block_on(async {
        let address = abstract_name("forms");
        let leader = ControlPlane::lead(config(&address)).await.unwrap();
        assert_eq!(leader.address().to_string(), address);
        let second = ControlPlane::lead(config(&address)).await.unwrap_err();
        assert_names(&second, ErrorKind::Io, &["another process listens"]);
        let member = join(&leader).await;
        gather(&[&leader, &member]).await;
    });
}

#[test]
fn a_group_forms_over_a_socket_file_that_close_removes() {
    block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let address = format!("unix:{}", path.display());
        let leader = ControlPlane::lead(config(&address)).await.unwrap();
        let member = join(&leader).await;
        gather(&[&leader, &member]).await;
        assert!(path.exists());
        member.close().await.unwrap();
        leader.close().await.unwrap();
        assert!(!path.exists());
    });
}

#[test]
fn a_stale_socket_file_is_replaced_and_a_live_one_is_not() {
    block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let address = format!("unix:{}", path.display());
        // As a killed leader leaves it: std's listener does not remove its file.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let leader = ControlPlane::lead(config(&address)).await.unwrap();
        let error = ControlPlane::lead(config(&address)).await.unwrap_err();
        assert_names(&error, ErrorKind::Io, &["another process listens", &address]);
        let member = join(&leader).await;
        gather(&[&leader, &member]).await;
    });
}

#[test]
fn a_file_that_is_no_socket_is_not_replaced() {
    block_on(async {
        let file = tempfile::NamedTempFile::new().unwrap();
        let address = format!("unix:{}", file.path().display());
        let error = ControlPlane::lead(config(&address)).await.unwrap_err();
        assert_names(&error, ErrorKind::Config, &["no socket"]);
        assert!(file.path().exists());
    });
}

#[test]
fn the_socket_file_of_a_killed_leader_does_not_stop_the_next_one() {
    block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix:{}/control", folder.path().display());
        let mut other = Other::start("lead", &address);
        let member = ControlPlane::join(config(&address), Role::Rollout, None).await.unwrap();
        member.gather(2, Bytes::new(), DEADLINE).await.unwrap();
        other.signal(Signal::KILL);
        assert_eq!(other.0.wait().unwrap().signal(), Some(9));
        assert!(matches!(event(&member).await, Event::Lost { rank: Rank(0), .. }));
        let leader = ControlPlane::lead(config(&address)).await.unwrap();
        let member = join(&leader).await;
        gather(&[&leader, &member]).await;
    });
}

#[test]
fn members_may_start_before_the_leader() {
    block_on(async {
        let address = abstract_name("early");
        let early = ControlPlane::join(config(&address), Role::Rollout, None);
        let late = async {
            std::thread::sleep(SHORT);
            ControlPlane::lead(config(&address)).await
        };
        let (member, leader) = futures::future::try_join(early, late).await.unwrap();
        gather(&[&leader, &member]).await;
    });
}

#[test]
fn joining_without_a_leader_times_out_and_says_where_it_looked() {
    block_on(async {
        let mut config = config("127.0.0.1:1");
        config.connect_timeout = SHORT;
        let error = ControlPlane::join(config, Role::Rollout, None).await.unwrap_err();
        assert_names(&error, ErrorKind::Timeout, &["tcp://127.0.0.1:1", "rank 0"]);
        assert!(std::error::Error::source(&error).is_some());
    });
}

#[test]
fn a_wrong_token_is_refused_and_the_group_forms_without_it() {
    block_on(async {
        let leader = lead().await;
        let mut wrong = config(&leader.address().to_string());
        wrong.token = Token::generate().unwrap();
        let error = ControlPlane::join(wrong, Role::Rollout, None).await.unwrap_err();
        assert_names(&error, ErrorKind::Authentication, &["token"]);
        let member = join(&leader).await;
        assert_eq!(member.rank(), Rank(1), "the stranger took no rank");
        gather(&[&leader, &member]).await;
        assert_eq!(leader.recv(SHORT).await.unwrap(), None);
    });
}

//! The control plane as embedders see it: rendezvous, messages, and every way a peer can go wrong.

#![allow(clippy::unwrap_used, reason = "the helpers of tests may panic as tests do")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use control_plane::{
    Address, ChannelId, ControlConfig, ControlPlane, Event, Peer, Role, Token, UPDATES, form_group,
    from_lookup,
};
use engine_core::control::PROTOCOL_VERSION;
use engine_core::{
    CheckpointEngineConfig, DType, Error, ErrorKind, Rank, Recovery, Registry, Result, TensorMap,
    Version, Weight, ensure_async_iterator,
};
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

/// What most tests say and hear is on the channel of updates.
#[allow(async_fn_in_trait, reason = "of these tests alone")]
trait Talk {
    fn send(&self, to: Rank, body: Bytes) -> Result<()>;
    async fn recv(&self, deadline: Duration) -> Result<Option<Event>>;
}

impl Talk for ControlPlane {
    fn send(&self, to: Rank, body: Bytes) -> Result<()> {
        self.channel(UPDATES).send(to, body)
    }

    async fn recv(&self, deadline: Duration) -> Result<Option<Event>> {
        self.channel(UPDATES).recv(deadline).await
    }
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
            "rank-1" => {
                let rank = Some(Rank(1));
                ControlPlane::join(config(address), Role::Rollout, rank).await.unwrap()
            }
            "join-impatient" => {
                ControlPlane::join(impatient(address), Role::Rollout, None).await.unwrap()
            }
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
fn a_group_forms_at_the_name_of_a_host_and_an_unknown_name_is_an_error() {
    block_on(async {
        let leader = ControlPlane::lead(config("localhost:0")).await.unwrap();
        assert!(leader.address().to_string().starts_with("tcp://localhost:"));
        let member = join(&leader).await;
        gather(&[&leader, &member]).await;
        let error = ControlPlane::lead(config("no-such-host.invalid:0")).await.unwrap_err();
        assert_names(&error, ErrorKind::Io, &["no-such-host.invalid"]);
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

fn read_frame(stream: &mut impl Read) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut frame).ok()?;
    Some(frame)
}

fn write_frame(stream: &mut impl Write, frame: &[u8]) {
    stream.write_all(&u32::try_from(frame.len()).unwrap().to_be_bytes()).unwrap();
    stream.write_all(frame).unwrap();
}

/// An address between a member and `leader`; the hooks change what passes: up, down.
fn between(
    leader: &ControlPlane,
    up: impl Fn(usize, &mut Vec<u8>) + Send + 'static,
    down: impl Fn(usize, &mut Vec<u8>) + Send + 'static,
) -> ControlConfig {
    let leader = tcp(leader);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut member, _) = listener.accept().unwrap();
        let mut leader = TcpStream::connect(leader).unwrap();
        for step in 0.. {
            let Some(mut frame) = read_frame(&mut member) else { break };
            up(step, &mut frame);
            write_frame(&mut leader, &frame);
            let Some(mut frame) = read_frame(&mut leader) else { break };
            down(step, &mut frame);
            write_frame(&mut member, &frame);
        }
    });
    config(&address)
}

fn tcp(plane: &ControlPlane) -> String {
    match plane.address() {
        Address::Tcp(tcp) => tcp.clone(),
        Address::Unix(_) => panic!("{} is not TCP", plane.address()),
    }
}

fn flip_last(frame: &mut [u8]) {
    *frame.last_mut().unwrap() ^= 1;
}

#[test]
fn a_leader_without_the_token_is_refused_by_the_member() {
    block_on(async {
        let leader = lead().await;
        // The leader's first frame ends with what only a key made of the token can seal.
        let forge = |step, frame: &mut Vec<u8>| {
            if step == 0 {
                flip_last(frame);
            }
        };
        let config = between(&leader, |_, _| (), forge);
        let error = ControlPlane::join(config, Role::Rollout, None).await.unwrap_err();
        assert_names(&error, ErrorKind::Authentication, &["leader", "token"]);
    });
}

#[test]
fn a_greeting_that_was_changed_on_the_way_proves_nothing() {
    block_on(async {
        let leader = lead().await;
        // The Hello ends with what only a key made of the token can seal.
        let change = |step, frame: &mut Vec<u8>| {
            if step == 0 {
                flip_last(frame);
            }
        };
        let config = between(&leader, change, |_, _| ());
        let error = ControlPlane::join(config, Role::Rollout, None).await.unwrap_err();
        assert_names(&error, ErrorKind::Authentication, &["token"]);
    });
}

#[test]
fn a_member_of_another_protocol_version_learns_both_versions() {
    block_on(async {
        let leader = lead().await;
        let change = |step, frame: &mut Vec<u8>| {
            if step == 0 {
                // Kind, the Hello's tag and eight bytes of magic precede the version.
                assert_eq!((&frame[2..10], frame[10].into()), (&b"ckpt-eng"[..], PROTOCOL_VERSION));
                frame[10] = 77;
            }
        };
        let config = between(&leader, change, |_, _| ());
        let error = ControlPlane::join(config, Role::Rollout, None).await.unwrap_err();
        let own = format!("version {PROTOCOL_VERSION}");
        assert_names(&error, ErrorKind::Protocol, &[&own, "version 77"]);
        let member = join(&leader).await;
        gather(&[&leader, &member]).await;
    });
}

/// A leader, a member that reaches it through a relay, and everything that the relay passed on, both ways
/// together. While `flip` is set, the next bytes towards the leader lose one bit.
struct Relayed {
    leader: ControlPlane,
    member: ControlPlane,
    passed: Arc<Mutex<Vec<u8>>>,
    flip: Arc<AtomicBool>,
}

async fn relayed() -> Relayed {
    let leader = lead().await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (passed, flip) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<AtomicBool>::default());
    let (seen, spoil, to) = (Arc::clone(&passed), Arc::clone(&flip), tcp(&leader));
    std::thread::spawn(move || {
        let (member, _) = listener.accept().unwrap();
        let leader = TcpStream::connect(to).unwrap();
        let ways = [
            (member.try_clone().unwrap(), leader.try_clone().unwrap(), spoil),
            (leader, member, Arc::default()),
        ];
        for (mut from, mut to, spoil) in ways {
            let seen = Arc::clone(&seen);
            std::thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(length @ 1..) = from.read(&mut bytes) {
                    seen.lock().unwrap().extend(&bytes[..length]);
                    if spoil.swap(false, Ordering::Relaxed) {
                        bytes[length - 1] ^= 1;
                    }
                    if to.write_all(&bytes[..length]).is_err() {
                        break;
                    }
                }
                // The other way ends as well: its reads do, at least.
                from.shutdown(Shutdown::Both).ok();
                to.shutdown(Shutdown::Both).ok();
            });
        }
    });
    let member = ControlPlane::join(config(&address), Role::Rollout, None).await.unwrap();
    gather(&[&leader, &member]).await;
    Relayed { leader, member, passed, flip }
}

#[test]
fn what_ranks_say_to_each_other_crosses_the_network_encrypted() {
    block_on(async {
        let Relayed { leader, member, passed, .. } = relayed().await;
        let secret = body("the digest of a model that nobody has published");
        member.send(Rank(0), secret.clone()).unwrap();
        leader.send(Rank(1), secret.clone()).unwrap();
        assert_eq!(event(&leader).await, Event::Message { from: Rank(1), body: secret.clone() });
        assert_eq!(event(&member).await, Event::Message { from: Rank(0), body: secret.clone() });
        let passed = passed.lock().unwrap();
        assert!(passed.len() > 2 * secret.len());
        assert!(passed.windows(10).all(|bytes| bytes != &secret[..10]));
    });
}

#[test]
fn one_bit_that_changes_on_the_way_ends_the_connection_and_says_so() {
    block_on(async {
        let Relayed { leader, member, flip, .. } = relayed().await;
        flip.store(true, Ordering::Relaxed);
        member.send(Rank(0), body("one bit of this will be another")).unwrap();
        let Event::Lost { rank, error } = event(&leader).await else { panic!() };
        assert_eq!(rank, Rank(1));
        assert_names(&Error::from(error), ErrorKind::Protocol, &["changed on the way"]);
        // The rank is free for the next member, and the group goes on.
        let next = try_join(&leader, Role::Rollout, Some(Rank(1))).await.unwrap();
        gather(&[&leader, &next]).await;
    });
}

#[test]
fn a_recorded_greeting_takes_no_rank() {
    block_on(async {
        let Relayed { leader, member: _has_rank_1, passed, .. } = relayed().await;
        let recorded = passed.lock().unwrap().clone();
        let length = 4 + u32::from_be_bytes(*recorded.first_chunk().unwrap()) as usize;
        let mut stream = TcpStream::connect(tcp(&leader)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(&recorded[..length]).unwrap();
        assert!(read_frame(&mut stream).is_some(), "the leader answers a greeting");
        // All that was ever sealed with the keys of the recorded connection.
        stream.write_all(&recorded[length..]).ok();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).ok();
        assert!(rest.is_empty(), "{} bytes", rest.len());
        let next = join(&leader).await;
        assert_eq!(next.rank(), Rank(2), "the recording took no rank");
    });
}

#[test]
fn a_token_can_be_handed_to_a_child() {
    let token = Token::generate().unwrap();
    let copy = Token::new(token.expose()).unwrap();
    block_on(async {
        let leader = ControlPlane::lead(ControlConfig::new("127.0.0.1:0".parse().unwrap(), token));
        let leader = leader.await.unwrap();
        let config = ControlConfig::new(leader.address().clone(), copy);
        assert_eq!(ControlPlane::join(config, Role::Rollout, None).await.unwrap().rank(), Rank(1));
    });
}

#[test]
fn foreign_bytes_close_their_connection_and_disturb_nobody() {
    block_on(async {
        let (leader, members) = group(1).await;
        let giant = [&u32::MAX.to_be_bytes()[..], &[0; 64]].concat();
        let oversized = [&1025u32.to_be_bytes()[..], &[0; 1025]].concat();
        let message = [0, 0, 0, 4, 0, 0, 0, b'x'];
        let goodbye = [0, 0, 0, 2, 1, 9];
        let http = b"GET / HTTP/1.1\r\nHost: trainer\r\n\r\n";
        for bytes in [&giant[..], &oversized, &message, &goodbye, http, &[0; 4], &[0xff; 300]] {
            let mut stream = TcpStream::connect(tcp(&leader)).unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            stream.write_all(bytes).unwrap();
            let mut answer = Vec::new();
            if let Err(error) = stream.read_to_end(&mut answer) {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            }
            assert!(answer.is_empty(), "nothing is said to strangers");
        }
        members[0].send(Rank(0), body("still here")).unwrap();
        assert!(matches!(event(&leader).await, Event::Message { from: Rank(1), .. }));
    });
}

#[test]
fn strangers_that_say_nothing_keep_nobody_out() {
    block_on(async {
        let leader = lead().await;
        // They are many rounds of those whose silence is waited for at a time.
        let silent: Vec<_> = (0..400).map(|_| TcpStream::connect(tcp(&leader)).unwrap()).collect();
        let mut config = config(&leader.address().to_string());
        config.connect_timeout = Duration::from_secs(15);
        let member = ControlPlane::join(config, Role::Rollout, None).await.unwrap();
        gather(&[&leader, &member]).await;
        drop(silent);
    });
}

#[test]
fn a_taken_rank_is_refused_until_its_process_is_gone() {
    block_on(async {
        let (leader, mut members) = group(2).await;
        for (taken, is_free_later) in [(Rank(2), true), (Rank(0), false)] {
            let config = impatient(&leader.address().to_string());
            let error = ControlPlane::join(config, Role::Rollout, Some(taken)).await.unwrap_err();
            assert_names(&error, ErrorKind::Mismatch, &[&format!("rank {taken}")]);
            assert_eq!(error.report().recovery == Recovery::Retry, is_free_later);
        }
        members.pop().unwrap().close().await.unwrap();
        assert_eq!(event(&leader).await, Event::Left { rank: Rank(2) });
        let again = try_join(&leader, Role::Rollout, Some(Rank(2))).await.unwrap();
        assert_eq!(again.rank(), Rank(2));
    });
}

#[test]
fn a_process_gets_its_rank_as_soon_as_the_end_of_the_one_before_is_noticed() {
    block_on(async {
        let (leader, mut members) = group(1).await;
        let again = try_join(&leader, Role::Rollout, Some(Rank(1)));
        let old = async {
            assert_eq!(leader.recv(Duration::from_secs(1)).await.unwrap(), None);
            members.pop().unwrap().close().await
        };
        let (again, ()) = futures::future::try_join(again, old).await.unwrap();
        assert_eq!(again.rank(), Rank(1));
    });
}

#[test]
fn a_rank_whose_process_is_killed_is_that_of_its_successor_at_once_every_time() {
    block_on(async {
        let leader = lead().await;
        leader.gather(1, Bytes::new(), DEADLINE).await.unwrap();
        let address = leader.address().to_string();
        let mut other = Other::start("rank-1", &address);
        for round in 0..20 {
            while !matches!(event(&leader).await, Event::Joined(peer) if peer.rank == Rank(1)) {}
            other.signal(Signal::KILL);
            let next = Other::start("rank-1", &address);
            drop(std::mem::replace(&mut other, next));
            assert!(matches!(event(&leader).await, Event::Lost { rank: Rank(1), .. }), "{round}");
        }
    });
}

#[test]
fn a_world_that_is_larger_than_the_leader_allows_is_refused_by_name_and_costs_it_nothing() {
    block_on(async {
        let leader = lead().await;
        let member = join(&leader).await;
        let error = member.gather(u32::MAX, Bytes::new(), DEADLINE).await.unwrap_err();
        assert_names(&error, ErrorKind::Mismatch, &["4294967295", "max_world_size", "rank 1"]);
        let error = leader.gather(65_537, Bytes::new(), DEADLINE).await.unwrap_err();
        assert_names(&error, ErrorKind::Mismatch, &["65536", "rank 0"]);
        gather(&[&leader, &member]).await;
        let error = member.gather(u32::MAX, Bytes::new(), DEADLINE).await.unwrap_err();
        assert_names(&error, ErrorKind::Mismatch, &["max_world_size"]);
    });
}

#[test]
fn a_member_that_is_cut_for_what_it_said_is_lost_for_that_reason_and_may_join_again() {
    block_on(async {
        let (leader, members) = group(2).await;
        let reason = Error::new(ErrorKind::Protocol, "reading a message", "it is garbage");
        leader.cut(Rank(1), &reason).unwrap();
        let Event::Lost { rank, error } = event(&leader).await else { panic!("not lost") };
        assert_eq!((rank, error.kind, error.rank), (Rank(1), ErrorKind::Protocol, Some(Rank(1))));
        assert!(error.message.contains("garbage"), "{error}");
        assert!(matches!(event(&members[0]).await, Event::Lost { rank: Rank(0), .. }));
        // The other one has nothing to do with it.
        members[1].send(Rank(0), body("here")).unwrap();
        assert!(matches!(event(&leader).await, Event::Message { from: Rank(2), .. }));
        assert_names(&leader.cut(Rank(1), &reason).unwrap_err(), ErrorKind::PeerLost, &["rank 1"]);
        let again = try_join(&leader, Role::Rollout, Some(Rank(1))).await.unwrap();
        assert_eq!(again.rank(), Rank(1));
    });
}

#[test]
fn a_member_whose_messages_of_updates_nobody_reads_is_cut_before_they_fill_the_leaders_memory() {
    block_on(async {
        let mut at = config("127.0.0.1:0");
        at.max_frame_bytes = 64 << 10;
        let leader = ControlPlane::lead(at).await.unwrap();
        let member = join(&leader).await;
        gather(&[&leader, &member]).await;
        let message = Bytes::from(vec![7; 60_000]);
        for _ in 0..10 {
            // Any number of them is in order, as long as they are read.
            member.send(Rank(0), message.clone()).unwrap();
            assert!(matches!(event(&leader).await, Event::Message { .. }));
        }
        for _ in 0..3 {
            member.send(Rank(0), message.clone()).unwrap();
        }
        assert!(matches!(event(&member).await, Event::Lost { rank: Rank(0), .. }));
        for _ in 0..2 {
            assert!(matches!(event(&leader).await, Event::Message { .. }));
        }
        let Event::Lost { rank: Rank(1), error } = event(&leader).await else { panic!("not lost") };
        assert_eq!(error.kind, ErrorKind::Resource, "{error}");
        assert!(error.message.contains("unread"), "{error}");
    });
}

#[test]
fn a_member_that_is_killed_with_unread_bytes_is_lost_as_any_other() {
    block_on(async {
        let leader = lead().await;
        let other = Other::start("join", &leader.address().to_string());
        leader.gather(2, Bytes::new(), DEADLINE).await.unwrap();
        other.signal(Signal::STOP);
        leader.send(Rank(1), Bytes::from(vec![0; 100_000])).unwrap();
        // Long enough for some of it to be on its way: the system resets the connection then.
        assert_eq!(leader.recv(Duration::from_millis(500)).await.unwrap(), None);
        other.signal(Signal::KILL);
        let Event::Lost { rank: Rank(1), error } = event(&leader).await else { panic!("not lost") };
        assert_eq!(error.kind, ErrorKind::PeerLost, "{error}");
        assert!(error.message.contains("its process died"), "{error}");
    });
}

#[test]
fn a_late_member_takes_the_lowest_lost_rank_of_its_role_and_gets_the_table_at_once() {
    block_on(async {
        let leader = lead().await;
        let trainer = try_join(&leader, Role::Trainer, None).await.unwrap();
        let (lost, kept) = (join(&leader).await, join(&leader).await);
        gather(&[&leader, &trainer, &lost, &kept]).await;
        for (plane, rank) in [(trainer, Rank(1)), (lost, Rank(2))] {
            plane.close().await.unwrap();
            assert_eq!(event(&leader).await, Event::Left { rank });
        }
        let replacement = join(&leader).await;
        assert_eq!(replacement.rank(), Rank(2), "rank 1 was a trainer's");
        let table = replacement.gather(99, body("new"), DEADLINE).await.unwrap();
        let ranks: Vec<_> = table.iter().map(|peer| peer.rank).collect();
        assert_eq!(ranks, [Rank(0), Rank(2), Rank(3)]);
        let joined = Peer { rank: Rank(2), role: Role::Rollout, payload: body("new") };
        assert_eq!(event(&leader).await, Event::Joined(joined));
        assert_eq!(leader.peers(), table);
        assert_eq!(join(&leader).await.rank(), Rank(4), "a new rank");
    });
}

#[test]
fn a_gather_that_lacks_ranks_times_out_everywhere_and_names_them() {
    block_on(async {
        let leader = lead().await;
        let member = join(&leader).await;
        let _silent = join(&leader).await;
        let gathers = [&leader, &member].map(|plane| plane.gather(4, Bytes::new(), SHORT));
        for error in join_all(gathers).await.into_iter().map(Result::unwrap_err) {
            assert_names(&error, ErrorKind::Timeout, &["gathering", "2", "3"]);
        }
        // The contributions were withdrawn, so a later gather starts afresh.
        gather(&[&leader, &member]).await;
    });
}

#[test]
fn a_member_of_another_world_size_learns_both_sizes() {
    block_on(async {
        let leader = lead().await;
        let member = join(&leader).await;
        let (of_leader, of_member) =
            futures::future::join(leader.gather(2, Bytes::new(), DEADLINE), async {
                let error = member.gather(3, Bytes::new(), DEADLINE).await.unwrap_err();
                assert_names(&error, ErrorKind::Mismatch, &["is 2", "is 3", "rank 1"]);
                member.gather(2, Bytes::new(), DEADLINE).await
            })
            .await;
        assert_eq!(of_leader.unwrap(), of_member.unwrap());
    });
}

#[test]
fn a_member_that_says_no_world_size_joins_whatever_the_leader_says_and_so_it_does_again() {
    block_on(async {
        let leader = lead().await;
        let mut members = vec![join(&leader).await, join(&leader).await];
        let round = async |size: u32, members: &[ControlPlane]| {
            let gathers = members.iter().map(|member| member.gather(None, body("m"), DEADLINE));
            let all = futures::future::try_join(
                leader.gather(size, body("l"), DEADLINE),
                try_join_all(gathers),
            );
            let (table, tables) = all.await.unwrap();
            assert!(tables.iter().all(|other| *other == table), "{table:?} and {tables:?}");
            table.iter().map(|peer| peer.rank.0).collect::<Vec<u32>>()
        };
        assert_eq!(round(3, &members).await, [0, 1, 2]);
        // One that joins the group that exists, which the leader then gathers anew: larger, and smaller again.
        let late = join(&leader).await;
        assert_eq!(late.gather(None, body("late"), DEADLINE).await.unwrap().len(), 4);
        assert!(matches!(event(&leader).await, Event::Joined(_)));
        members.push(late);
        assert_eq!(round(4, &members).await, [0, 1, 2, 3]);
        members.remove(0).close().await.unwrap();
        assert_eq!(event(&leader).await, Event::Left { rank: Rank(1) });
        assert_eq!(round(3, &members).await, [0, 2, 3]);
    });
}

#[test]
fn a_leader_without_a_world_size_is_refused_and_the_group_forms_when_it_says_one() {
    block_on(async {
        let leader = lead().await;
        let member = join(&leader).await;
        let words = &["rank 0", "the leader has to say how many ranks the group has"];
        let error = leader.gather(None, Bytes::new(), DEADLINE).await.unwrap_err();
        assert_names(&error, ErrorKind::Config, words);
        gather(&[&leader, &member]).await;
        let error = leader.gather(None, Bytes::new(), DEADLINE).await.unwrap_err();
        assert_names(&error, ErrorKind::Config, words);
        gather(&[&leader, &member]).await;
    });
}

#[test]
fn members_without_a_world_size_that_wait_in_vain_name_the_leader() {
    block_on(async {
        let leader = lead().await;
        let members = [join(&leader).await, join(&leader).await];
        let in_vain = async || {
            let gathers = members.each_ref().map(|m| m.gather(None, Bytes::new(), SHORT));
            for error in join_all(gathers).await.into_iter().map(Result::unwrap_err) {
                assert_names(
                    &error,
                    ErrorKind::Timeout,
                    &["gathering", "a rank is missing", "(rank 0)"],
                );
            }
        };
        in_vain().await;
        gather(&[&leader, &members[0], &members[1]]).await;
        in_vain().await;
    });
}

#[test]
fn a_trainer_and_a_rollout_form_a_group_and_each_knows_what_the_other_says_of_itself() {
    block_on(async {
        let leader = lead().await;
        let member = join(&leader).await;
        let (registry, config) =
            (Registry::new().with(backend_naive::BACKEND), CheckpointEngineConfig::default());
        let trainer = form_group(&registry, config.clone(), &leader)
            .world_size(2)
            .attributes(serde_json::json!({"source": "a disk"}))
            .trainer();
        let rollout = form_group(&registry, config, &member)
            .attributes(serde_json::json!({"holds": [1, 2]}))
            .rollout();
        let formed = futures::future::try_join(trainer, rollout).await.unwrap();
        let ((mut trainer, on_trainer), (mut rollout, on_rollout)) = formed;
        assert_eq!((on_trainer.rank, on_rollout.rank), (Rank(0), Rank(1)));
        assert_eq!(on_trainer.peers, on_rollout.peers);
        assert_eq!(on_rollout.peer(Rank(0)).unwrap().attributes["source"], "a disk");
        assert_eq!(on_trainer.peer(Rank(1)).unwrap().attributes["holds"][1], 2);

        let weight = Weight::new("w", DType::U8, [3], vec![1, 2, 3]).unwrap();
        let mut model = TensorMap::new();
        let sent = trainer.send_weights(ensure_async_iterator([weight]), Version(1));
        let installed = async { rollout.receive_weights(None).await?.install(&mut model).await };
        futures::future::try_join(sent, installed).await.unwrap();
        assert_eq!(model.iter().count(), 1);
        trainer.finalize().await.unwrap();
        rollout.finalize().await.unwrap();
    });
}

#[test]
fn a_rank_that_is_formed_in_another_role_than_the_control_plane_has_it_in_is_refused() {
    block_on(async {
        let leader = lead().await;
        let trainer = try_join(&leader, Role::Trainer, None).await.unwrap();
        let rollout = join(&leader).await;
        let (registry, config) =
            (Registry::new().with(backend_naive::BACKEND), CheckpointEngineConfig::default());
        for plane in [&leader, &trainer] {
            let formed = form_group(&registry, config.clone(), plane).world_size(2).rollout();
            let words = ["a rollout is prepared", "has the rank as trainer"];
            assert_names(&formed.await.unwrap_err(), ErrorKind::Config, &words);
        }
        let formed = form_group(&registry, config, &rollout).trainer();
        let words = ["a trainer is prepared", "has the rank as rollout", "rank 2"];
        assert_names(&formed.await.unwrap_err(), ErrorKind::Config, &words);
    });
}

#[test]
fn a_group_gathers_again_and_replaces_its_metadata() {
    block_on(async {
        let (leader, members) = group(2).await;
        for round in ["a", "b"] {
            let all = [&leader, &members[0], &members[1]];
            let gathers = all.map(|plane| plane.gather(3, body(round), DEADLINE));
            for table in try_join_all(gathers).await.unwrap() {
                assert!(table.iter().all(|peer| peer.payload == body(round)), "{table:?}");
            }
        }
        assert_eq!(leader.recv(SHORT).await.unwrap(), None);
    });
}

#[test]
fn a_barrier_ends_when_every_rank_is_in_it() {
    block_on(async {
        let (leader, members) = group(3).await;
        for name in ["start", "end"] {
            let all = std::iter::once(&leader).chain(&members);
            try_join_all(all.map(|plane| plane.barrier(name, DEADLINE))).await.unwrap();
        }
    });
}

#[test]
fn a_barrier_names_the_missing_ranks_when_it_times_out() {
    block_on(async {
        let (leader, members) = group(3).await;
        let waits = [&leader, &members[1]].map(|plane| plane.barrier("installed", SHORT));
        for error in join_all(waits).await.into_iter().map(Result::unwrap_err) {
            assert_names(&error, ErrorKind::Timeout, &["`installed`", "1", "3"]);
        }
        let all = std::iter::once(&leader).chain(&members);
        try_join_all(all.map(|plane| plane.barrier("again", DEADLINE))).await.unwrap();
    });
}

#[test]
fn barriers_of_different_names_are_an_error_on_every_waiting_rank() {
    block_on(async {
        let (leader, members) = group(1).await;
        let waits = [leader.barrier("send", DEADLINE), members[0].barrier("receive", DEADLINE)];
        for error in join_all(waits).await.into_iter().map(Result::unwrap_err) {
            assert_names(&error, ErrorKind::Mismatch, &["`send`", "`receive`"]);
        }
    });
}

#[test]
fn a_rank_that_leaves_holds_no_barrier_up_and_one_that_dies_fails_it() {
    block_on(async {
        let (leader, mut members) = group(2).await;
        let leaver = members.pop().unwrap();
        let rest = [&leader, &members[0]].map(|plane| plane.barrier("b", DEADLINE));
        let (passed, left) = futures::future::join(try_join_all(rest), leaver.close()).await;
        passed.unwrap();
        left.unwrap();
        assert_eq!(event(&leader).await, Event::Left { rank: Rank(2) });

        let other = Other::start("join", &leader.address().to_string());
        assert!(matches!(event(&leader).await, Event::Joined(Peer { rank: Rank(2), .. })));
        let kill = async {
            // Time enough for the barrier to begin.
            assert_eq!(leader.recv(SHORT).await.unwrap(), None);
            other.signal(Signal::KILL);
            event(&leader).await
        };
        let (result, lost) = futures::future::join(members[0].barrier("c", DEADLINE), kill).await;
        assert_names(&result.unwrap_err(), ErrorKind::PeerLost, &["rank 2"]);
        assert!(matches!(lost, Event::Lost { rank: Rank(2), .. }));
    });
}

#[test]
fn a_rank_outside_the_group_cannot_enter_a_barrier() {
    block_on(async {
        let error = lead().await.barrier("b", DEADLINE).await.unwrap_err();
        assert_names(&error, ErrorKind::State, &["gather first"]);
    });
}

#[test]
fn a_dropped_barrier_is_left() {
    block_on(async {
        let (leader, members) = group(1).await;
        for plane in [&leader, &members[0]] {
            let wait = std::pin::pin!(plane.barrier("dropped", DEADLINE));
            assert!(futures::poll!(wait).is_pending());
        }
        // The leader has heard of the withdrawal once it hears what was said after it.
        members[0].send(Rank(0), body("withdrawn")).unwrap();
        assert!(matches!(event(&leader).await, Event::Message { .. }));
        // A rank that were still in the other one would not be let in.
        let all = [&leader, &members[0]].map(|plane| plane.barrier("next", DEADLINE));
        try_join_all(all).await.unwrap();
    });
}

#[test]
fn one_rank_cannot_wait_in_two_barriers() {
    block_on(async {
        let (leader, members) = group(1).await;
        for plane in [&leader, &members[0]] {
            let waits = [plane.barrier("one", SHORT), plane.barrier("two", SHORT)];
            let results = join_all(waits).await;
            let kinds: Vec<_> = results.iter().map(|r| r.as_ref().unwrap_err().kind()).collect();
            assert_eq!(kinds, [ErrorKind::Timeout, ErrorKind::State]);
        }
    });
}

#[test]
fn a_killed_member_is_lost_at_once() {
    block_on(async {
        let leader = lead().await;
        let other = Other::start("join", &leader.address().to_string());
        leader.gather(2, Bytes::new(), DEADLINE).await.unwrap();
        let killed = Instant::now();
        other.signal(Signal::KILL);
        let Event::Lost { rank, error } = event(&leader).await else { panic!("not lost") };
        assert_eq!((rank, error.rank), (Rank(1), Some(Rank(1))));
        assert_eq!(error.kind, ErrorKind::PeerLost);
        assert!(killed.elapsed() < Duration::from_secs(10), "found by its silence, not its end");
        let error = leader.send(Rank(1), body("anyone?")).unwrap_err();
        assert_names(&error, ErrorKind::PeerLost, &["rank 1"]);
        assert_eq!(leader.peers().len(), 1);
        // The next one takes its place.
        let member = join(&leader).await;
        assert_eq!(member.rank(), Rank(1));
        gather(&[&leader, &member]).await;
    });
}

#[test]
fn a_killed_leader_is_lost_on_its_members_and_ends_their_waits() {
    block_on(async {
        let address = abstract_name("killed-leader");
        let other = Other::start("lead", &address);
        let member = ControlPlane::join(config(&address), Role::Rollout, None).await.unwrap();
        member.gather(2, Bytes::new(), DEADLINE).await.unwrap();
        let kill = async { other.signal(Signal::KILL) };
        let (result, ()) = futures::future::join(member.barrier("b", DEADLINE), kill).await;
        assert_names(&result.unwrap_err(), ErrorKind::PeerLost, &["rank 0"]);
        assert!(matches!(event(&member).await, Event::Lost { rank: Rank(0), .. }));
        let error = member.recv(DEADLINE).await.unwrap_err();
        assert_names(&error, ErrorKind::PeerLost, &["leader", "rank 0"]);
        let error = member.send(Rank(0), Bytes::new()).unwrap_err();
        assert_names(&error, ErrorKind::PeerLost, &["rank 0"]);
        member.close().await.unwrap();
    });
}

#[test]
fn a_stopped_member_is_lost_for_its_silence_and_a_blocked_one_is_not() {
    block_on(async {
        let leader = ControlPlane::lead(impatient("127.0.0.1:0")).await.unwrap();
        let other = Other::start("join", &leader.address().to_string());
        leader.gather(2, Bytes::new(), DEADLINE).await.unwrap();
        // Its executor is blocked in a read, and its own interval is as long as our timeout.
        assert_eq!(leader.recv(Duration::from_secs(3)).await.unwrap(), None);
        other.signal(Signal::STOP);
        let Event::Lost { rank: Rank(1), error } = event(&leader).await else { panic!("not lost") };
        assert_eq!(error.kind, ErrorKind::PeerLost);
        assert_eq!(error.message.matches("silent").count(), 1, "{error}");
    });
}

#[test]
fn the_leader_knows_of_whom_heartbeats_come_and_since_when_they_do_not() {
    block_on(async {
        let leader = ControlPlane::lead(config("127.0.0.1:0")).await.unwrap();
        let address = leader.address().to_string();
        let other = Other::start("join-impatient", &address);
        leader.gather(2, Bytes::new(), DEADLINE).await.unwrap();
        let idle = ControlPlane::join(impatient(&address), Role::Rollout, None).await.unwrap();
        other.signal(Signal::STOP);
        assert_eq!(leader.recv(Duration::from_secs(2)).await.unwrap(), None);
        assert_eq!(leader.silence(idle.rank()), Some(Duration::ZERO));
        let silence = leader.silence(Rank(1)).unwrap();
        assert!(silence > Duration::from_millis(1500), "{silence:?}");
        assert_eq!((leader.silence(Rank(9)), idle.silence(Rank(0))), (None, None));
        other.signal(Signal::CONT);
    });
}

#[test]
fn a_stopped_leader_is_lost_on_its_members() {
    block_on(async {
        let address = abstract_name("stopped-leader");
        let other = Other::start("lead", &address);
        let member = ControlPlane::join(impatient(&address), Role::Rollout, None).await.unwrap();
        member.gather(2, Bytes::new(), DEADLINE).await.unwrap();
        other.signal(Signal::STOP);
        let Event::Lost { rank: Rank(0), error } = event(&member).await else { panic!("not lost") };
        assert_eq!(error.kind, ErrorKind::PeerLost);
        member.close().await.unwrap();
    });
}

#[test]
fn a_stopped_member_with_a_full_queue_does_not_hold_close_up() {
    block_on(async {
        let leader = ControlPlane::lead(impatient("127.0.0.1:0")).await.unwrap();
        let other = Other::start("join", &leader.address().to_string());
        leader.gather(2, Bytes::new(), DEADLINE).await.unwrap();
        other.signal(Signal::STOP);
        for _ in 0..64 {
            leader.send(Rank(1), Bytes::from(vec![0; 1 << 20])).unwrap();
        }
        leader.close().await.unwrap();
    });
}

#[test]
fn messages_arrive_in_order_under_load_in_both_directions() {
    const COUNT: u32 = 20_000;
    let numbered = |number: u32| {
        // Mostly small, and some larger than what is read or written at once.
        let size = if number.is_multiple_of(1000) { 300_000 } else { number as usize % 97 };
        let mut body = number.to_le_bytes().to_vec();
        body.resize(4 + size, number.to_le_bytes()[0]);
        Bytes::from(body)
    };
    let (leader, members) = block_on(group(2));
    std::thread::scope(|scope| {
        for member in &members {
            scope.spawn(move || {
                block_on(async {
                    for number in 0..COUNT {
                        member.send(Rank(0), numbered(number)).unwrap();
                        let expected = Event::Message { from: Rank(0), body: numbered(number) };
                        assert_eq!(event(member).await, expected);
                    }
                });
            });
        }
        block_on(async {
            for number in 0..COUNT {
                for member in &members {
                    leader.send(member.rank(), numbered(number)).unwrap();
                }
            }
            let mut next = [0; 2];
            for _ in 0..2 * COUNT {
                let Event::Message { from, body } = event(&leader).await else { panic!("lost") };
                let next = &mut next[from.index() - 1];
                assert_eq!(body, numbered(*next));
                *next += 1;
            }
        });
    });
}

#[test]
fn messages_beyond_the_receivers_limit_are_refused_before_they_leave() {
    block_on(async {
        let mut small = config("127.0.0.1:0");
        small.max_frame_bytes = 4096;
        let leader = ControlPlane::lead(small).await.unwrap();
        let member = join(&leader).await;
        gather(&[&leader, &member]).await;
        let large = Bytes::from(vec![7; 5000]);
        let error = member.send(Rank(0), large.clone()).unwrap_err();
        assert_names(&error, ErrorKind::Config, &["5000", "4096", "max_frame_bytes"]);
        let error = member.gather(2, large.clone(), DEADLINE).await.unwrap_err();
        assert_names(&error, ErrorKind::Config, &["max_frame_bytes"]);
        // The member accepts more than the leader does.
        leader.send(Rank(1), large.clone()).unwrap();
        assert_eq!(event(&member).await, Event::Message { from: Rank(0), body: large });
    });
}

#[test]
fn a_table_beyond_a_members_limit_is_an_error_on_that_member() {
    block_on(async {
        let leader = lead().await;
        let mut small = config(&leader.address().to_string());
        small.max_frame_bytes = 4096;
        let member = ControlPlane::join(small, Role::Rollout, None).await.unwrap();
        let metadata = || Bytes::from(vec![7; 3000]);
        let gathers = [&leader, &member].map(|plane| plane.gather(2, metadata(), DEADLINE));
        let mut results = join_all(gathers).await;
        assert_names(
            &results.pop().unwrap().unwrap_err(),
            ErrorKind::Config,
            &["4096", "max_frame_bytes"],
        );
    });
}

const TALK: ChannelId = ChannelId::FIRST_FREE;
const OTHER: ChannelId = ChannelId(700);

async fn said(plane: &ControlPlane, channel: ChannelId) -> Event {
    plane.channel(channel).recv(DEADLINE).await.unwrap().expect("an event before the deadline")
}

#[test]
fn channels_do_not_see_each_others_messages_and_all_hear_who_leaves() {
    block_on(async {
        let (leader, mut members) = group(1).await;
        let member = members.pop().unwrap();
        let [talk, other] = [TALK, OTHER].map(|id| leader.channel(id));
        for (channel, text) in [(OTHER, "o1"), (TALK, "t1"), (UPDATES, "u1"), (TALK, "t2")] {
            member.channel(channel).send(Rank(0), body(text)).unwrap();
            leader.channel(channel).send(Rank(1), body(text)).unwrap();
        }
        for (plane, from) in [(&leader, Rank(1)), (&member, Rank(0))] {
            for (channel, text) in [(UPDATES, "u1"), (TALK, "t1"), (TALK, "t2"), (OTHER, "o1")] {
                let message = Event::Message { from, body: body(text) };
                assert_eq!(said(plane, channel).await, message, "{channel}");
            }
        }
        member.close().await.unwrap();
        for channel in [&talk, &other, &leader.channel(UPDATES)] {
            let left = channel.recv(DEADLINE).await.unwrap();
            assert_eq!(left, Some(Event::Left { rank: Rank(1) }));
        }
    });
}

#[test]
fn a_message_to_a_channel_that_nobody_has_opened_waits_for_that() {
    block_on(async {
        let (leader, members) = group(1).await;
        members[0].channel(TALK).send(Rank(0), body("early")).unwrap();
        members[0].send(Rank(0), body("afterwards")).unwrap();
        assert!(matches!(event(&leader).await, Event::Message { .. }));
        let early = Event::Message { from: Rank(1), body: body("early") };
        assert_eq!(said(&leader, TALK).await, early);
    });
}

/// A leader and a member that accept frames of so many bytes.
async fn pair(max_frame_bytes: usize) -> (ControlPlane, ControlPlane) {
    let mut at = config("127.0.0.1:0");
    at.max_frame_bytes = max_frame_bytes;
    let leader = ControlPlane::lead(at.clone()).await.unwrap();
    at.address = leader.address().clone();
    let member = ControlPlane::join(at, Role::Rollout, None).await.unwrap();
    gather(&[&leader, &member]).await;
    (leader, member)
}

/// Sends until the channel is full; how many messages it took, and what it said then.
async fn fill(from: &ControlPlane, to: Rank, channel: ChannelId, message: &Bytes) -> (u32, Error) {
    let mut sent = 0;
    loop {
        match from.channel(channel).send(to, message.clone()) {
            Ok(()) => sent += 1,
            // Only what waits for the socket goes away by itself.
            Err(error) if error.to_string().contains("wait for the connection") => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return (sent, error),
        }
    }
}

/// Sends as soon as there is room.
fn send_soon(from: &ControlPlane, to: Rank, channel: ChannelId, message: &Bytes) {
    let until = Instant::now() + DEADLINE;
    while let Err(error) = from.channel(channel).send(to, message.clone()) {
        assert_names(&error, ErrorKind::Resource, &["channel"]);
        assert!(Instant::now() < until, "no room: {error}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_channel_that_nobody_reads_is_its_senders_error_and_disturbs_no_other_one() {
    block_on(async {
        let (leader, member) = pair(64 << 10).await;
        let message = Bytes::from(vec![7; 10_000]);
        for (from, to) in [(&member, &leader), (&leader, &member)] {
            // Opened on one side, and on the other one not.
            member.channel(TALK);
            let (sent, error) = fill(from, to.rank(), TALK, &message).await;
            assert_eq!(sent, 6, "as many as max_frame_bytes hold");
            assert_names(&error, ErrorKind::Resource, &["channel 16 is full"]);
            assert_eq!(error.report().recovery, Recovery::Retry);
            // Further ones share what all of them may have together, and the error names where it is.
            assert_eq!(fill(from, to.rank(), OTHER, &message).await.0, 6);
            let (sent, error) = fill(from, to.rank(), ChannelId(701), &message).await;
            assert_eq!(sent, 1, "{error}");
            assert_names(&error, ErrorKind::Resource, &["no room for channel 701", "of them on"]);
            // Updates go on, however many there are.
            for _ in 0..50 {
                from.send(to.rank(), message.clone()).unwrap();
                assert!(matches!(event(to).await, Event::Message { .. }));
            }
        }
        // What is read makes room, and nothing was lost.
        for _ in 0..6 {
            assert!(matches!(said(&leader, TALK).await, Event::Message { from: Rank(1), .. }));
        }
        send_soon(&member, Rank(0), TALK, &message);
        assert!(matches!(said(&leader, TALK).await, Event::Message { from: Rank(1), .. }));
    });
}

#[test]
fn any_number_of_messages_passes_a_channel_that_is_read() {
    block_on(async {
        let (leader, member) = pair(64 << 10).await;
        for round in 0..200_usize {
            // Up to the largest one that fits.
            let message = Bytes::from(vec![1; round * 7919 % ((64 << 10) - 64)]);
            for (from, to) in [(&member, &leader), (&leader, &member)] {
                for channel in [TALK, OTHER] {
                    send_soon(from, to.rank(), channel, &message);
                    assert!(matches!(said(to, channel).await, Event::Message { .. }));
                }
            }
        }
        let large = Bytes::from(vec![1; 64 << 10]);
        let error = member.channel(TALK).send(Rank(0), large).unwrap_err();
        assert_names(&error, ErrorKind::Config, &["max_frame_bytes"]);
    });
}

#[test]
fn a_process_that_follows_another_one_on_a_rank_has_the_room_that_was_left_to_it() {
    block_on(async {
        let (leader, member) = pair(64 << 10).await;
        let message = Bytes::from(vec![7; 10_000]);
        assert_eq!(fill(&member, Rank(0), TALK, &message).await.0, 6);
        let mut at = config(&leader.address().to_string());
        at.max_frame_bytes = 64 << 10;
        member.close().await.unwrap();
        assert_eq!(event(&leader).await, Event::Left { rank: Rank(1) });
        let next = ControlPlane::join(at, Role::Rollout, Some(Rank(1))).await.unwrap();
        let error = next.channel(TALK).send(Rank(0), message.clone()).unwrap_err();
        assert_names(&error, ErrorKind::Resource, &["channel 16 is full"]);
        for _ in 0..6 {
            assert!(matches!(said(&leader, TALK).await, Event::Message { from: Rank(1), .. }));
        }
        send_soon(&next, Rank(0), TALK, &message);
    });
}

#[test]
fn members_speak_to_the_leader_only() {
    block_on(async {
        let (leader, members) = group(2).await;
        let error = members[0].send(Rank(2), Bytes::new()).unwrap_err();
        assert_names(&error, ErrorKind::State, &["rank 0 only", "rank 2"]);
        let error = leader.send(Rank(0), Bytes::new()).unwrap_err();
        assert_names(&error, ErrorKind::State, &["itself"]);
        let error = leader.send(Rank(9), Bytes::new()).unwrap_err();
        assert_names(&error, ErrorKind::PeerLost, &["rank 9"]);
    });
}

#[test]
fn close_delivers_what_was_sent_and_ends_the_waits_of_clones() {
    block_on(async {
        let (leader, mut members) = group(1).await;
        let member = members.pop().unwrap();
        let clone = member.clone();
        for _ in 0..100 {
            member.send(Rank(0), Bytes::from(vec![1; 10_000])).unwrap();
        }
        let (waited, closed) = futures::future::join(clone.recv(DEADLINE), member.close()).await;
        closed.unwrap();
        assert_names(&waited.unwrap_err(), ErrorKind::State, &["closed"]);
        let error = clone.send(Rank(0), Bytes::new()).unwrap_err();
        assert_names(&error, ErrorKind::State, &["closed"]);
        for _ in 0..100 {
            assert!(matches!(event(&leader).await, Event::Message { from: Rank(1), .. }));
        }
        assert_eq!(event(&leader).await, Event::Left { rank: Rank(1) });
    });
}

#[test]
fn a_leader_that_closes_is_gone_for_its_members() {
    block_on(async {
        let (leader, members) = group(1).await;
        leader.send(Rank(1), body("last words")).unwrap();
        leader.close().await.unwrap();
        assert!(matches!(event(&members[0]).await, Event::Message { .. }));
        assert_eq!(event(&members[0]).await, Event::Left { rank: Rank(0) });
        let error = members[0].recv(DEADLINE).await.unwrap_err();
        assert_names(&error, ErrorKind::TrainerLeft, &["rank 0"]);
    });
}

#[test]
fn dropping_the_last_handle_says_goodbye() {
    block_on(async {
        let (leader, members) = group(1).await;
        let clone = members[0].clone();
        drop(members);
        clone.send(Rank(0), body("from the clone")).unwrap();
        drop(clone);
        assert!(matches!(event(&leader).await, Event::Message { .. }));
        assert_eq!(event(&leader).await, Event::Left { rank: Rank(1) });
    });
}

/// In a process of its own, where no other test's threads and files count.
#[test]
fn close_leaves_no_thread_and_no_file() {
    const NAME: &str = "close_leaves_no_thread_and_no_file";
    if std::env::var_os("CONTROL_TEST_ALONE").is_none() {
        let alone = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--test-threads=1"])
            .env("CONTROL_TEST_ALONE", "1")
            .output()
            .unwrap();
        assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stdout));
        return;
    }
    fn threads() -> usize {
        std::fs::read_dir("/proc/self/task").unwrap().count()
    }
    fn files() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }
    async fn cycle() {
        let (leader, members) = group(2).await;
        let clones = members.clone();
        try_join_all(members.into_iter().map(ControlPlane::close)).await.unwrap();
        leader.close().await.unwrap();
        drop(clones);
    }
    block_on(async {
        let before = threads();
        cycle().await;
        // What the process keeps after its first cycle is not a cycle's own.
        let open = files();
        cycle().await;
        cycle().await;
        assert_eq!((threads(), files()), (before, open));
    });
}

#[test]
fn handles_work_on_a_tokio_executor_and_may_be_dropped_there() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let (leader, mut members) = group(1).await;
        let member = members.pop().unwrap();
        let waiting = tokio::spawn(async move { event(&member).await });
        leader.send(Rank(1), body("hello")).unwrap();
        assert!(matches!(waiting.await.unwrap(), Event::Message { .. }));
        assert_eq!(event(&leader).await, Event::Left { rank: Rank(1) });
    });
}

#[test]
fn a_dropped_join_leaves_no_member_behind() {
    block_on(async {
        let (leader, _members) = group(1).await;
        for _ in 0..5 {
            let joining = std::pin::pin!(try_join(&leader, Role::Rollout, None));
            // Dropped at whatever point it has come to.
            drop(futures::poll!(joining));
        }
        assert_eq!(leader.recv(SHORT).await.unwrap(), None);
        assert_eq!(leader.peers().len(), 2);
    });
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    block_on(async {
        let mut silent = config("127.0.0.1:0");
        silent.heartbeat_interval = silent.heartbeat_timeout;
        let error = ControlPlane::lead(silent).await.unwrap_err();
        assert_names(&error, ErrorKind::Config, &["heartbeat_interval", "heartbeat_timeout"]);
        let mut tiny = config("127.0.0.1:0");
        tiny.max_frame_bytes = 10;
        let error = ControlPlane::join(tiny, Role::Rollout, None).await.unwrap_err();
        assert_names(&error, ErrorKind::Config, &["max_frame_bytes"]);
    });
}

#[test]
fn a_token_file_is_for_its_owner_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    let set_mode = |mode| {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let created = Token::create(&path).unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(Token::create(&path).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(format!("{created:?}"), "Token(secret)");
    block_on(async {
        let address = "127.0.0.1:0".parse().unwrap();
        let leader = ControlPlane::lead(ControlConfig::new(address, created)).await.unwrap();
        let read = ControlConfig::new(leader.address().clone(), Token::read(&path).unwrap());
        ControlPlane::join(read, Role::Rollout, None).await.unwrap();
    });
    for mode in [0o640, 0o604, 0o620] {
        set_mode(mode);
        let error = Token::read(&path).unwrap_err();
        assert_names(&error, ErrorKind::Config, &["chmod 600", &format!("{mode:o}")]);
    }
    set_mode(0o600);
    std::fs::write(&path, "too short\n").unwrap();
    assert_names(&Token::read(&path).unwrap_err(), ErrorKind::Config, &["9 bytes", "16"]);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(Token::read(&path).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn torchruns_environment_is_all_there_or_not_at_all() {
    let full = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("MASTER_ADDR", "trainer-0"),
        ("MASTER_PORT", "29500"),
    ];
    let read = |changes: &[(&str, &str)]| {
        from_lookup(|name| {
            let (_, value) = changes.iter().chain(&full).find(|(key, _)| *key == name)?;
            (*value != "unset").then(|| (*value).to_owned())
        })
    };
    let env = read(&[]).unwrap().unwrap();
    assert_eq!((env.rank, env.world_size), (Rank(3), 4));
    assert_eq!(env.address.to_string(), "tcp://trainer-0:29500");
    let ipv6 = read(&[("MASTER_ADDR", "fd00::1")]).unwrap().unwrap();
    assert_eq!(ipv6.address.to_string(), "tcp://[fd00::1]:29500");
    assert_eq!(from_lookup(|_| None).unwrap(), None);

    let missing = read(&[("RANK", "unset"), ("MASTER_ADDR", "")]).unwrap_err();
    assert_names(&missing, ErrorKind::Config, &["RANK, MASTER_ADDR missing"]);
    for bad in [("RANK", "-1"), ("RANK", "4"), ("WORLD_SIZE", "four"), ("MASTER_PORT", "99999")] {
        assert_names(&read(&[bad]).unwrap_err(), ErrorKind::Config, &[bad.0]);
    }
}

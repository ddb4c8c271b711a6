//! How ranks find one another: they all connect to the one that made the root info.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::abi::*;
use crate::device::chip;
use crate::settings::Ports;
use crate::{Fault, Outcome, fault, lock, sim, wire};

pub(crate) type RootInfo = [u8; HCCL_ROOT_INFO_BYTES as usize];

/// What a usable root info begins with.
const MAGIC: &[u8; 8] = b"hcclsim1";

/// How long somebody who has connected may take to say who it is.
const GREETING: Duration = Duration::from_secs(2);

/// How long to sleep between two looks at a socket.
const PAUSE: Duration = Duration::from_millis(5);

/// What a rank says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Hello {
    nonce: [u8; 16],
    ranks: u32,
    pid: u32,
    member: Member,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Member {
    rank: u32,
    machine: String,
    chip: i32,
    /// Where higher ranks connect to.
    data: SocketAddr,
}

type Answer = Result<Vec<Member>, i32>;

/// Connections to all other ranks, and the name that all have for the group.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) name: String,
    pub(crate) peers: Vec<Option<TcpStream>>,
}

/// Starts to listen, and says where.
pub(crate) fn open() -> Result<RootInfo, Fault> {
    let settings = &sim().settings;
    let bind = |port| TcpListener::bind((settings.address, port));
    let listener = match &settings.ports {
        Ports::Auto => bind(0).ok(),
        Ports::Range(ports) => ports.clone().find_map(|port| bind(port).ok()),
    };
    let message = "no port of the host can be listened on";
    let listener = listener.ok_or_else(|| fault(HCCL_E_UNAVAIL, message))?;
    let own = listener.local_addr().map_err(|error| fault(HCCL_E_SYSCALL, error.to_string()))?;
    let mut info: RootInfo = random()?;
    let nonce: [u8; 16] = random()?;
    info[..8].copy_from_slice(MAGIC);
    info[8..24].copy_from_slice(&nonce);
    info[24..26].copy_from_slice(&own.port().to_le_bytes());
    let address = match own.ip() {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    info[26..42].copy_from_slice(&address.octets());
    std::thread::spawn(move || serve(&listener, nonce));
    Ok(info)
}

fn random<const N: usize>() -> Result<[u8; N], Fault> {
    let mut bytes = [0; N];
    for chunk in bytes.chunks_mut(256) {
        rustix::rand::getrandom(chunk, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| fault(HCCL_E_SYSCALL, error.to_string()))?;
    }
    Ok(bytes)
}

/// Waits for all ranks, and tells each of them of the others. Then nobody listens any more: a root
/// info is good for one communicator.
fn serve(listener: &TcpListener, nonce: [u8; 16]) {
    let limit = sim().settings.connect_timeout;
    let mut deadline = Instant::now() + limit;
    let mut arrived: Vec<(Hello, TcpStream)> = Vec::new();
    let answer: Answer = loop {
        let Ok(mut stream) = accept(listener, deadline) else { return };
        let Ok(hello) = wire::receive::<Hello>(&mut stream) else { continue };
        if hello.nonce != nonce {
            continue;
        }
        deadline = Instant::now() + limit;
        let (ranks, new) = (hello.ranks, hello.member.clone());
        let conflict =
            arrived.iter().any(|(other, _)| other.ranks != ranks || other.member.rank == new.rank);
        arrived.push((hello, stream));
        if conflict || new.rank >= ranks {
            break Err(HCCL_E_PARA as i32);
        }
        if arrived.len() == ranks as usize {
            let mut members: Vec<Member> =
                arrived.iter().map(|(hello, _)| hello.member.clone()).collect();
            members.sort_by_key(|member| member.rank);
            // Every rank finds it in the list of all, which is made when all have come.
            break if shares_a_chip(&members) { Err(HCCL_E_PARA as i32) } else { Ok(members) };
        }
    };
    // This process last: it may end when it has its answer.
    arrived.sort_by_key(|(hello, _)| hello.pid == std::process::id());
    for (_, stream) in &mut arrived {
        // A rank that has gone meanwhile will be missed by the others.
        drop(wire::send(stream, &answer));
    }
}

/// Whether two ranks are on one chip.
fn shares_a_chip(members: &[Member]) -> bool {
    let mut chips = HashSet::new();
    !members.iter().all(|member| chips.insert((&member.machine, member.chip)))
}

/// Accepts one connection, on which reading ends soon.
fn accept(listener: &TcpListener, deadline: Instant) -> io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                limit_reading(&stream, deadline.min(Instant::now() + GREETING))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(PAUSE);
    }
}

fn limit_reading(stream: &TcpStream, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now()).max(PAUSE);
    stream.set_read_timeout(Some(left))
}

/// Blocks until all ranks have come, or until the time is over.
pub(crate) fn join(info: &RootInfo, ranks: u32, rank: u32, device: i32) -> Result<Joined, Fault> {
    let settings = &sim().settings;
    if ranks == 0 || rank >= ranks {
        return Err(fault(HCCL_E_PARA, format!("rank {rank} of {ranks}")));
    }
    if &info[..8] != MAGIC {
        return Err(fault(HCCL_E_PARA, "not a root info"));
    }
    let part = |from: usize| <[u8; 16]>::try_from(&info[from..from + 16]).unwrap_or_default();
    let nonce = part(8);
    let address = Ipv6Addr::from(part(26)).to_canonical();
    let root = SocketAddr::new(address, u16::from_le_bytes([info[24], info[25]]));
    let chip = chip(device).map_err(|error| fault(HCCL_E_RUNTIME, error.message))?;
    take_ports(chip)?;

    let deadline = Instant::now() + settings.connect_timeout;
    let system = |error: io::Error| fault(HCCL_E_SYSCALL, error.to_string());
    let listener = TcpListener::bind((settings.address, 0)).map_err(system)?;
    let data = listener.local_addr().map_err(system)?;
    let member = Member { rank, machine: settings.machine.clone(), chip, data };
    let hello = Hello { nonce, ranks, pid: std::process::id(), member };
    let members = loop {
        match ask(root, &hello, deadline) {
            Ok(answer) => {
                break answer.map_err(|code| {
                    let message = "ranks that do not fit together, or two of them on one chip";
                    fault(code.into(), message)
                })?;
            }
            Err(error) if Instant::now() >= deadline => {
                let message = format!("not all ranks came to {root}: {error}");
                return Err(fault(HCCL_E_TIMEOUT, message));
            }
            Err(_) => std::thread::sleep(4 * PAUSE),
        }
    };
    let peers = connect(&listener, &members, nonce, rank, deadline).map_err(|error| {
        fault(HCCL_E_TIMEOUT, format!("no connection to every other rank: {error}"))
    })?;
    let tail: String = nonce[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Joined { name: format!("{}_{}_{tail}", root.ip(), root.port()), peers })
}

fn ask(root: SocketAddr, hello: &Hello, deadline: Instant) -> io::Result<Answer> {
    let left = deadline.saturating_duration_since(Instant::now()).max(PAUSE);
    let mut stream = TcpStream::connect_timeout(&root, left)?;
    wire::send(&mut stream, hello)?;
    limit_reading(&stream, deadline)?;
    wire::receive(&mut stream)
}

/// A connection to every other rank: higher ranks come to lower ones.
fn connect(
    listener: &TcpListener,
    members: &[Member],
    nonce: [u8; 16],
    rank: u32,
    deadline: Instant,
) -> io::Result<Vec<Option<TcpStream>>> {
    let mut peers: Vec<Option<TcpStream>> = members.iter().map(|_| None).collect();
    for member in members.iter().filter(|member| member.rank < rank) {
        let left = deadline.saturating_duration_since(Instant::now()).max(PAUSE);
        let mut stream = TcpStream::connect_timeout(&member.data, left)?;
        stream.write_all(&nonce)?;
        stream.write_all(&rank.to_le_bytes())?;
        peers[member.rank as usize] = Some(stream);
    }
    let missing = members.iter().filter(|member| member.rank > rank).count();
    let mut found = 0;
    while found < missing {
        let mut stream = accept(listener, deadline)?;
        let (mut theirs, mut number) = ([0; 16], [0; 4]);
        if stream.read_exact(&mut theirs).is_err() || theirs != nonce {
            continue;
        }
        if stream.read_exact(&mut number).is_err() {
            continue;
        }
        stream.set_read_timeout(None)?;
        let number = u32::from_le_bytes(number);
        if let Some(place @ None) = peers.get_mut(number as usize) {
            *place = Some(stream);
            found += 1;
        }
    }
    Ok(peers)
}

/// On a machine with a name, a chip's ports belong to the first process that uses them, unless both
/// port ranges are `auto`.
fn take_ports(chip: i32) -> Outcome {
    static TAKEN: OnceLock<Mutex<HashMap<i32, UnixListener>>> = OnceLock::new();
    let settings = &sim().settings;
    if settings.machine.is_empty() || settings.shared_ports {
        return Ok(());
    }
    let mut taken = lock(TAKEN.get_or_init(Mutex::default));
    if taken.contains_key(&chip) {
        return Ok(());
    }
    let name = format!("hccl-sim-chip-{}-{chip}", settings.machine);
    let listener =
        UnixAddress::from_abstract_name(name).and_then(|address| UnixListener::bind_addr(&address));
    let listener = listener.map_err(|error| {
        fault(HCCL_E_UNAVAIL, format!("another process uses the ports of chip {chip}: {error}"))
    })?;
    taken.insert(chip, listener);
    Ok(())
}

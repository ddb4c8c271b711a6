//! Communicators: connections to other ranks, and what operations do over them.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::abi::*;
use crate::bootstrap::Joined;
use crate::stream::{Cancel, TICK};
use crate::{Fault, Outcome, fault, lock, reduce, sim};

/// How much of a broadcast travels at once.
const CHUNK: usize = 1 << 20;

/// Links that a process has to other ranks.
#[derive(Debug)]
pub(crate) struct Links {
    left: Mutex<u64>,
}

impl Links {
    pub(crate) fn new(all: u64) -> Self {
        Self { left: Mutex::new(all) }
    }

    fn take(&self, links: u64) -> bool {
        let mut left = lock(&self.left);
        let enough = *left >= links;
        if enough {
            *left -= links;
        }
        enough
    }

    fn give_back(&self, links: u64) {
        *lock(&self.left) += links;
    }
}

/// Device memory and links of one communicator.
#[derive(Debug)]
struct Resources {
    device: i32,
    bytes: u64,
    links: u64,
}

impl Resources {
    fn take(device: i32, bytes: u64, links: u64, planned_failure: bool) -> Result<Self, Fault> {
        if planned_failure || !sim().memory.charge(device, bytes) {
            let message = format!("{bytes} bytes for a communicator's buffers");
            return Err(fault(HCCL_E_MEMORY, message));
        }
        if !sim().links.take(links) {
            sim().memory.refund(device, bytes);
            let message = "no links are left: are communicators destroyed?";
            return Err(fault(HCCL_E_NOT_FOUND, message));
        }
        Ok(Self { device, bytes, links })
    }
}

impl Drop for Resources {
    fn drop(&mut self) {
        sim().memory.refund(self.device, self.bytes);
        sim().links.give_back(self.links);
    }
}

/// What a frame is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// The arguments of a kind's first operation.
    Check = 1,
    /// A receiver has a place for what comes.
    Ready,
    Data,
    /// A receiver has everything.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Label {
    peer: u32,
    tag: u64,
    phase: u8,
}

/// Frames that came, until someone wants them. That a connection ended is not told to anyone.
#[derive(Debug, Default)]
struct Mailbox {
    frames: Mutex<HashMap<Label, VecDeque<Vec<u8>>>>,
    changed: Condvar,
}

/// Why a wait ended without a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missed {
    Deadline,
    Cancelled,
}

impl Mailbox {
    /// Files everything that a peer sends, until the connection ends.
    fn fill(&self, peer: u32, mut from: TcpStream) -> io::Result<()> {
        loop {
            let mut head = [0; 13];
            from.read_exact(&mut head)?;
            let (tag, rest) = head.split_at(8);
            let (phase, len) = rest.split_at(1);
            let tag = u64::from_le_bytes(tag.try_into().unwrap_or_default());
            let len = u32::from_le_bytes(len.try_into().unwrap_or_default());
            let mut frame = vec![0; len as usize];
            from.read_exact(&mut frame)?;
            let label = Label { peer, tag, phase: phase[0] };
            lock(&self.frames).entry(label).or_default().push_back(frame);
            self.changed.notify_all();
        }
    }

    fn take(
        &self,
        label: Label,
        deadline: Option<Instant>,
        cancel: Option<&Cancel>,
    ) -> Result<Vec<u8>, Missed> {
        let mut frames = lock(&self.frames);
        loop {
            if let Some(queue) = frames.get_mut(&label)
                && let Some(frame) = queue.pop_front()
            {
                if queue.is_empty() {
                    frames.remove(&label);
                }
                return Ok(frame);
            }
            if cancel.is_some_and(Cancel::is_set) {
                return Err(Missed::Cancelled);
            }
            let left = deadline.map_or(TICK, |deadline| {
                deadline.saturating_duration_since(Instant::now()).min(TICK)
            });
            if left.is_zero() {
                return Err(Missed::Deadline);
            }
            let waited = self.changed.wait_timeout(frames, left);
            frames = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Which operations need links of their own, built by the first of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Broadcast,
    AllReduce,
    AllGather,
    Barrier,
    /// From this rank to another one.
    Pair {
        from: u32,
        to: u32,
    },
}

/// An operation's arguments that all ranks have to agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Operation {
    pub(crate) kind: Kind,
    pub(crate) count: u64,
    pub(crate) dtype: i32,
    pub(crate) op: i32,
    pub(crate) root: u32,
}

impl Operation {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.count.to_le_bytes().to_vec();
        bytes.extend(self.dtype.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.root.to_le_bytes());
        bytes
    }
}

fn tag(of: impl Hash) -> u64 {
    // Its keys are fixed, so all processes agree.
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What fails in an operation by a setting.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Planned {
    pub(crate) kill: bool,
    pub(crate) hang: bool,
    pub(crate) error: bool,
}

impl Planned {
    /// Ends this process as if by a signal from outside.
    fn kill_now(self) {
        if self.kill {
            let own = rustix::process::getpid();
            let killed = rustix::process::kill_process(own, rustix::process::Signal::KILL);
            debug_assert!(killed.is_ok());
        }
    }
}

#[derive(Debug)]
struct Peer {
    stream: Mutex<TcpStream>,
}

/// A group of ranks, as this one sees it.
#[derive(Debug)]
pub(crate) struct Comm {
    pub(crate) name: String,
    pub(crate) device: i32,
    pub(crate) rank: u32,
    pub(crate) ranks: u32,
    mailbox: Arc<Mailbox>,
    peers: Vec<Option<Peer>>,
    /// How often each kind was tried for the first time, and whether that succeeded.
    kinds: Mutex<HashMap<Kind, (u64, bool)>>,
    /// How many operations were enqueued: of all collectives, and of each pair.
    counts: Mutex<HashMap<Option<Kind>, u64>>,
    in_use: AtomicUsize,
    async_error: AtomicI32,
    _resources: Resources,
}

/// Held by what is enqueued.
#[derive(Debug)]
pub(crate) struct InUse(Arc<Comm>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.in_use.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One execution of an operation on a stream.
#[derive(Debug)]
pub(crate) struct Execution<'a> {
    pub(crate) comm: &'a Comm,
    pub(crate) tag: u64,
    pub(crate) cancel: &'a Cancel,
    pub(crate) deadline: Option<Instant>,
    pub(crate) planned: Planned,
}

impl Comm {
    /// Takes what a communicator needs, before any other rank is waited for.
    pub(crate) fn join(
        device: i32,
        rank: u32,
        ranks: u32,
        buffer_bytes: u64,
        join: impl FnOnce() -> Result<Joined, Fault>,
        name: Option<String>,
    ) -> Result<Arc<Self>, Fault> {
        let links = u64::from(ranks.saturating_sub(1));
        let settings = &sim().settings;
        let number = Some(sim().joins.fetch_add(1, Ordering::Relaxed) + 1);
        let bytes = buffer_bytes.saturating_mul(2);
        let resources = Resources::take(device, bytes, links, settings.comm_oom_at == number)?;
        if settings.lost_at == number {
            std::thread::sleep(settings.connect_timeout);
            return Err(fault(HCCL_E_TIMEOUT, "the other ranks are not to be reached"));
        }
        let joined = join()?;
        let mailbox = Arc::new(Mailbox::default());
        let mut peers = Vec::new();
        for (peer, stream) in (0..).zip(joined.peers) {
            let system = |error: io::Error| fault(HCCL_E_SYSCALL, error.to_string());
            peers.push(match stream {
                None => None,
                Some(stream) => {
                    stream.set_nodelay(true).map_err(system)?;
                    // A peer that was stopped must not hold a stream for ever.
                    let limit = sim().settings.exec_timeout.unwrap_or(Duration::from_secs(3600));
                    stream.set_write_timeout(Some(limit)).map_err(system)?;
                    let reader = stream.try_clone().map_err(system)?;
                    let mailbox = Arc::clone(&mailbox);
                    // It ends with an error, because every connection ends some time.
                    std::thread::spawn(move || drop(mailbox.fill(peer, reader)));
                    Some(Peer { stream: Mutex::new(stream) })
                }
            });
        }
        Ok(Arc::new(Self {
            name: name.unwrap_or(joined.name),
            device,
            rank,
            ranks,
            mailbox,
            peers,
            kinds: Mutex::default(),
            counts: Mutex::default(),
            in_use: AtomicUsize::new(0),
            async_error: AtomicI32::new(0),
            _resources: resources,
        }))
    }

    pub(crate) fn is_in_use(&self) -> bool {
        self.in_use.load(Ordering::Acquire) > 0
    }

    pub(crate) fn hold(self: &Arc<Self>) -> InUse {
        self.in_use.fetch_add(1, Ordering::AcqRel);
        InUse(Arc::clone(self))
    }

    pub(crate) fn async_error(&self) -> i32 {
        self.async_error.load(Ordering::Acquire)
    }

    /// Ends the connections. Other ranks are not told.
    pub(crate) fn close(&self) {
        for peer in self.peers.iter().flatten() {
            // It may have ended by itself.
            drop(lock(&peer.stream).shutdown(Shutdown::Both));
        }
    }

    fn others(&self) -> impl Iterator<Item = u32> + use<> {
        let own = self.rank;
        (0..self.ranks).filter(move |&rank| rank != own)
    }

    fn send(&self, peer: u32, tag: u64, phase: Phase, bytes: &[u8]) {
        let Some(Some(to)) = self.peers.get(peer as usize) else { return };
        let mut frame = tag.to_le_bytes().to_vec();
        frame.push(phase as u8);
        frame.extend((bytes.len() as u32).to_le_bytes());
        frame.extend(bytes);
        // A peer that is gone is noticed by what does not come from it.
        drop(lock(&to.stream).write_all(&frame));
    }

    /// Before the first operation of a kind: all that take part compare their arguments.
    pub(crate) fn establish(&self, operation: &Operation) -> Outcome {
        let mut kinds = lock(&self.kinds);
        let (attempts, established) = kinds.entry(operation.kind).or_default();
        if *established {
            return Ok(());
        }
        *attempts += 1;
        let tag = tag((operation.kind, *attempts));
        let deadline = Instant::now() + sim().settings.connect_timeout;
        let peers: Vec<u32> = match operation.kind {
            Kind::Pair { from, to } => vec![if from == self.rank { to } else { from }],
            _ => self.others().collect(),
        };
        let own = operation.bytes();
        for &peer in &peers {
            self.send(peer, tag, Phase::Check, &own);
        }
        let mut agree = true;
        for &peer in &peers {
            let label = Label { peer, tag, phase: Phase::Check as u8 };
            match self.mailbox.take(label, Some(deadline), None) {
                Ok(theirs) => agree &= theirs == own,
                Err(_) => {
                    let message = format!("rank {peer} did not begin {:?}", operation.kind);
                    return Err(fault(HCCL_E_TIMEOUT, message));
                }
            }
        }
        if !agree {
            let message = format!("ranks have other arguments than {operation:?}");
            return Err(fault(HCCL_E_PARA, message));
        }
        *established = true;
        Ok(())
    }

    /// A label that only the same operation in the same place of the order has on other ranks.
    pub(crate) fn next_tag(&self, operation: &Operation) -> u64 {
        let place = match operation.kind {
            pair @ Kind::Pair { .. } => Some(pair),
            _ => None,
        };
        let mut counts = lock(&self.counts);
        let count = counts.entry(place).or_default();
        *count += 1;
        tag((operation, *count))
    }
}

impl Execution<'_> {
    /// What was planned to go wrong with the whole operation.
    pub(crate) fn begin(&self) -> Outcome {
        if self.planned.error {
            self.comm.async_error.store(HCCL_E_REMOTE as i32, Ordering::Release);
            return Err(fault(
                ACL_ERROR_RT_LINK_ERROR,
                "a link failed, as HCCL_SIM_ASYNC_ERROR_AT says",
            ));
        }
        if self.planned.hang {
            while !self.cancel.is_set() {
                std::thread::sleep(TICK);
            }
            return Err(Cancel::fault());
        }
        Ok(())
    }

    fn take(&self, peer: u32, phase: Phase) -> Result<Vec<u8>, Fault> {
        let label = Label { peer, tag: self.tag, phase: phase as u8 };
        self.comm.mailbox.take(label, self.deadline, Some(self.cancel)).map_err(|missed| {
            match missed {
                Missed::Cancelled => Cancel::fault(),
                Missed::Deadline => fault(
                    ACL_ERROR_RT_FFTS_PLUS_TIMEOUT,
                    format!("nothing came from rank {peer} ({phase:?})"),
                ),
            }
        })
    }

    fn send(&self, peer: u32, phase: Phase, bytes: &[u8]) {
        self.comm.send(peer, self.tag, phase, bytes);
    }

    /// Gives the device's memory to some ranks, when all of them are there.
    pub(crate) fn give(&self, to: &[u32], address: usize, len: usize) -> Outcome {
        let device = self.comm.device;
        // Memory is looked at before anyone waits for it.
        drop(sim().memory.find_device(address, len, device)?);
        for &peer in to {
            self.take(peer, Phase::Ready)?;
        }
        let chunks = len.div_ceil(CHUNK);
        for chunk in 0..chunks {
            if chunk == chunks / 2 {
                self.planned.kill_now();
            }
            if self.cancel.is_set() {
                return Err(Cancel::fault());
            }
            let at = chunk * CHUNK;
            let part = (len - at).min(CHUNK);
            let bytes = sim().memory.find_device(address + at, part, device)?.read(part);
            for &peer in to {
                self.send(peer, Phase::Data, &bytes);
            }
        }
        for &peer in to {
            self.take(peer, Phase::Done)?;
        }
        Ok(())
    }

    /// Writes into the device's memory what another rank gives.
    pub(crate) fn receive(&self, from: u32, address: usize, len: usize) -> Outcome {
        let device = self.comm.device;
        drop(sim().memory.find_device(address, len, device)?);
        self.send(from, Phase::Ready, &[]);
        let chunks = len.div_ceil(CHUNK);
        for chunk in 0..chunks {
            let bytes = self.take(from, Phase::Data)?;
            let at = chunk * CHUNK;
            sim().memory.find_device(address + at, bytes.len(), device)?.write(&bytes);
            if chunk == chunks / 2 {
                self.planned.kill_now();
            }
        }
        self.send(from, Phase::Done, &[]);
        Ok(())
    }

    /// Everybody's bytes, by rank.
    pub(crate) fn exchange(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault> {
        if u32::try_from(own.len()).is_err() {
            let message = "the simulator exchanges no more than 4 GiB";
            return Err(fault(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, message));
        }
        self.planned.kill_now();
        for peer in self.comm.others() {
            self.send(peer, Phase::Data, &own);
        }
        let mut all = Vec::new();
        for rank in 0..self.comm.ranks {
            all.push(if rank == self.comm.rank {
                own.clone()
            } else {
                self.take(rank, Phase::Data)?
            });
        }
        Ok(all)
    }

    pub(crate) fn broadcast(&self, root: u32, address: usize, len: usize) -> Outcome {
        if root == self.comm.rank {
            let others: Vec<u32> = self.comm.others().collect();
            self.give(&others, address, len)
        } else {
            self.receive(root, address, len)
        }
    }

    pub(crate) fn all_reduce(
        &self,
        operation: &Operation,
        send: usize,
        receive: usize,
        len: usize,
    ) -> Outcome {
        let device = self.comm.device;
        let own = sim().memory.find_device(send, len, device)?.read(len);
        let mut all = self.exchange(own)?.into_iter();
        let mut result = all.next().unwrap_or_default();
        for other in all {
            reduce::reduce(operation.dtype, operation.op, &mut result, &other);
        }
        sim().memory.find_device(receive, len, device)?.write(&result);
        Ok(())
    }

    pub(crate) fn all_gather(&self, send: usize, receive: usize, len: usize) -> Outcome {
        let device = self.comm.device;
        let all = len * self.comm.ranks as usize;
        drop(sim().memory.find_device(receive, all, device)?);
        let own = sim().memory.find_device(send, len, device)?.read(len);
        let all = self.exchange(own)?.concat();
        sim().memory.find_device(receive, all.len(), device)?.write(&all);
        Ok(())
    }
}

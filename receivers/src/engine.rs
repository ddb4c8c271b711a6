//! The trainer's engine. It does what the [machine](crate::fleet) decides, and itself decides only how long to wait.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use collective::{Communicator, Library, Opened, Shape, SharedSlot, SlotLocks, Slots, Thread};
use engine_core::clock::{sleep, within};
use engine_core::memory::Pool;
use engine_core::observe::{Observer, Progress};
use engine_core::plan::ALIGNMENT;
use engine_core::telemetry::Meter;
use engine_core::{
    CheckpointEngine, EngineContext, Error, ErrorKind, Prepared, PreparedTrainer, Rank,
    ReceiverReport, Result, Role, SendReport, StageTimes, TrainerEngine, Version, VersionState,
    WeightStream, WorkerMetadata, no_copies,
};
use futures::future::{join, join_all};
use futures::stream::{FuturesUnordered, StreamExt};
use serde::Serialize;
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tracing::info;

use crate::chunk::{Chunk, Chunks, Tensors, parts};
use crate::delta::{Shadow, compare};
use crate::fleet::{Act, Answers, Ask, Fleet, Outcome, Said, rank_of};
use crate::http::{FOREVER, ServerUrl};
use crate::ignored::clash;
use crate::server::{Meeting, Meets, Server, Told, World};
use crate::store::{TorchStore, id_key};
use crate::whole::Whole;

/// One slot is filled while the other travels.
const SLOTS: u32 = 2;
/// The world's index in the library: there is one world at a time.
const WORLD: usize = 0;
/// The longest wait for the answer to a question that changes nothing.
const SHORT: Duration = Duration::from_secs(10);
/// How long the others may take once one member has failed.
const GRACE: Duration = Duration::from_secs(5);
/// The pause between two checks of a broadcast.
const PAUSE: Duration = Duration::from_micros(30);
/// The most members of a world that meets at a store: torch's default of `TORCH_NCCL_RANKS_PER_ROOT`.
const MAX_WORLD: u32 = 128;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The servers that an engine sends to.
#[derive(Debug)]
pub(crate) struct Receivers {
    /// The backend's name.
    pub(crate) backend: &'static str,
    pub(crate) servers: Vec<Arc<dyn Server>>,
    /// Whether servers are paused during an update.
    pub(crate) pauses: bool,
    /// How their workers learn of a world.
    pub(crate) meets: Meets,
    /// Whether they take each weight by a broadcast of its own, instead of each bucket.
    pub(crate) unpacked: bool,
    /// Whether an update may be one call.
    pub(crate) whole: bool,
    /// Whether they take only what changed, instead of all weights.
    pub(crate) delta: bool,
    /// Whether workers learn once where all buckets are.
    pub(crate) one_buffer: bool,
}

/// How long answers of servers may take: to questions that change nothing, and to requests that change something.
pub(crate) fn limits(context: &EngineContext) -> (Duration, Duration) {
    let long = context.deadline();
    (SHORT.min(long), long)
}

/// Prepares a trainer that sends to servers over a library of collectives.
///
/// # Errors
///
/// `Config` for servers that cannot be used; `State` outside of a tokio runtime; those of [`Library::open`].
pub(crate) async fn prepare<L: Library>(
    library: L,
    context: EngineContext,
    receivers: Receivers,
) -> Result<PreparedTrainer> {
    let Receivers { backend, servers, pauses, meets, unpacked, whole, delta, one_buffer } =
        receivers;
    let refuse = |kind, message: &str| Err(Error::new(kind, "preparing", message));
    if servers.is_empty() {
        let message = format!(
            "engine_kwargs.{backend}.servers is empty: list the servers, such as http://10.0.0.7:8000"
        );
        return refuse(ErrorKind::Config, &message);
    }
    let mut seen = HashSet::new();
    if let Some(twice) = servers.iter().find(|server| !seen.insert(server.url().to_string())) {
        return refuse(ErrorKind::Config, &format!("{} is listed twice", twice.url()));
    }
    if tokio::runtime::Handle::try_current().is_err() {
        return refuse(ErrorKind::State, "servers are asked on a tokio runtime, and here is none");
    }
    let rank = context.rank().unwrap_or(Rank::LEADER);
    let bucket = context.config.bucket_bytes().unwrap_or(library.default_bucket_bytes());
    let shape = Shape { slots: SLOTS, slot_bytes: bucket / ALIGNMENT * ALIGNMENT };
    let pool = Pool::new(context.threads(Role::Trainer))?;
    let Opened { thread, slots, version, .. } = library.open(&context, shape, &pool).await?;
    let locks = Arc::new(SlotLocks::new(SLOTS));
    if one_buffer {
        let buffer = buffer(&*slots, &locks).await?;
        servers.iter().for_each(|server| server.reads(buffer.clone()));
    }
    let urls: Vec<&ServerUrl> = servers.iter().map(|server| server.url()).collect();
    let details = json!({ "library": version, "servers": urls });
    let metadata = WorkerMetadata::of_this_process(backend, rank, Role::Trainer, details);
    Ok(Prepared::new(metadata, move |_| async move {
        let deadline = context.deadline();
        let is_shared = meets == Meets::Nowhere;
        let engine = ServersEngine {
            fleet: Fleet::new(servers.len(), pauses),
            under_way: UnderWay::default(),
            loaded: vec![Loaded::default(); servers.len()],
            servers,
            meets,
            store: None,
            announced: whole.then(Announced::default),
            meter: Meter::new(rank, context.observer.clone()),
            deadline,
            sending: Sending {
                thread,
                slots,
                locks,
                awaited: Arc::default(),
                is_shared,
                unpacked,
                shadow: delta.then(Mutex::default),
                one_buffer,
                shape,
                pool,
                limit: deadline,
            },
        };
        Ok(Box::new(engine) as Box<dyn TrainerEngine>)
    }))
}

/// All slots as one piece of memory, on each GPU that has them.
///
/// # Errors
///
/// Those of [`Slots::shared`]; `Backend` if the slots are not in one piece of memory.
async fn buffer(slots: &dyn Slots, locks: &SlotLocks) -> Result<Vec<SharedSlot>> {
    let mut buffer = Vec::new();
    for index in 0..SLOTS {
        let Some(guard) = locks.lock(index).await else { break };
        let places = slots.shared(&guard)?;
        if index == 0 {
            buffer.clone_from(&places);
        }
        for (all, slot) in buffer.iter_mut().zip(places) {
            if all.handle != slot.handle || slot.start < all.start {
                let message = "its slots are not in one piece of memory";
                return Err(Error::new(ErrorKind::Backend, "sharing the slots", message));
            }
            all.bytes = slot.start + slot.bytes - all.start;
        }
    }
    Ok(buffer)
}

/// The error for a weight that fits no slot.
fn too_large(tensors: &Tensors, slot_bytes: u64) -> Error {
    let bytes: u64 = tensors.sizes.iter().sum();
    let message = format!(
        "{bytes} bytes, and a bucket has {slot_bytes}: raise update_weights_bucket_megabytes, because workers know the buckets' \
         memory from the beginning of an update"
    );
    let error = Error::new(ErrorKind::Config, "filling a bucket", message);
    match tensors.names.first() {
        Some(name) => error.tensor(&**name),
        None => error,
    }
}

/// The trainer's end of the world that it forms with the servers' workers.
#[derive(Debug)]
struct ServersEngine<C: Communicator> {
    fleet: Fleet,
    /// The act that the servers have not all answered, of this update or of one that was dropped.
    under_way: UnderWay,
    servers: Vec<Arc<dyn Server>>,
    meets: Meets,
    /// What each server said that it loaded in this update.
    loaded: Vec<Loaded>,
    /// The store where the workers of the present world find its id.
    store: Option<TorchStore>,
    /// What servers may be told of by one call, if that is wanted.
    announced: Option<Announced>,
    meter: Meter,
    deadline: Duration,
    sending: Sending<C>,
}

/// The weights of the last update.
#[derive(Debug, Default)]
struct Announced {
    /// `None` if that update failed, or cannot be one call.
    whole: Option<Arc<Whole>>,
    /// Whether it was the last call of all members of the present world.
    is_known: bool,
}

/// The trainer's slots, and the thread that makes the library's calls.
#[derive(Debug)]
struct Sending<C: Communicator> {
    thread: Thread<C>,
    slots: Arc<dyn Slots>,
    locks: Arc<SlotLocks>,
    /// A world that is joined at the first broadcast.
    awaited: Arc<Mutex<Option<Awaited>>>,
    /// Whether servers read the slots in place.
    is_shared: bool,
    /// Whether each weight is broadcast by itself.
    unpacked: bool,
    /// What the servers were sent, if they take only what changed.
    shadow: Option<Mutex<Shadow>>,
    /// Whether servers learn only once where the slots are.
    one_buffer: bool,
    shape: Shape,
    pool: Pool,
    /// How long to wait for the library to leave the world.
    limit: Duration,
}

impl<C: Communicator> Drop for Sending<C> {
    fn drop(&mut self) {
        self.thread.close_later(self.limit);
    }
}

/// What a server has loaded of an update.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Loaded {
    buckets: u64,
    tensors: u64,
    bytes: u64,
}

/// One act of the machine. It goes on when nobody waits for it any more.
///
/// A server that was told of an act may do its part at any later time: a worker that waits in a broadcast takes the next one, and a worker
/// that reads a slot reads its present contents. So an act is never left half done, and none begins before the last one has ended.
#[derive(Debug, Default)]
struct UnderWay(Option<JoinHandle<Done>>);

/// The result of an act.
#[derive(Debug)]
enum Done {
    Asked(Vec<(usize, Ask, Result<Said>)>),
    Formed(Result<()>, Answers),
    /// Buckets with their number, and those of their tensors and bytes.
    Sent {
        own: Result<()>,
        answers: Answers,
        sent: Loaded,
    },
    /// The result is unknown.
    Lost(Error),
}

impl UnderWay {
    fn begin(&mut self, act: impl Future<Output = Done> + Send + 'static) {
        self.0 = Some(tokio::spawn(act));
    }

    /// Waits for the end of the act, if there is one. If the future is dropped, the act is kept.
    async fn ended(&mut self) -> Option<Done> {
        let ended = self.0.as_mut()?.await;
        self.0 = None;
        Some(ended.unwrap_or_else(|error| {
            Done::Lost(Error::new(ErrorKind::Aborted, "asking the servers", error.to_string()))
        }))
    }
}

/// A world that has yet to be joined.
#[derive(Debug)]
struct Awaited {
    id: Vec<u8>,
    size: u32,
}

/// Weights that were read, and their description for servers.
type Read = (Chunk, Tensors);

/// A filled bucket.
struct Bucket {
    slot: u32,
    len: u64,
    source_bytes: u64,
    tensors: Tensors,
}

/// A bucket on its way to the act that broadcasts it.
struct Handed {
    slot: u32,
    len: u64,
    /// While it is kept, the slot is not filled again.
    _turn: OwnedSemaphorePermit,
}

/// The trainer's stream, and what was read from it.
struct Feed<'a, 'w> {
    chunks: Chunks,
    weights: &'a mut WeightStream<'w>,
    /// What the stream has to bring, if one call announces it.
    whole: Option<Arc<Whole>>,
    /// The number of buckets read.
    read: usize,
    /// Whether the stream has ended.
    is_whole: bool,
    /// The number of buckets filled.
    filled: u64,
    stages: StageTimes,
}

impl Feed<'_, '_> {
    /// The next bucket's weights.
    async fn next(&mut self, deadline: Duration) -> Result<Option<Chunk>> {
        if let Some(whole) = self.whole.clone() {
            let bucket = whole.buckets().get(self.read);
            let chunk = self.chunks.next_of(self.weights, &whole, bucket, deadline).await;
            match chunk {
                // Nobody was told of any weight yet.
                Err(error) if self.read == 0 && error.kind() == ErrorKind::Mismatch => {
                    self.whole = None;
                }
                chunk => return chunk,
            }
        }
        self.chunks.next(self.weights, deadline).await
    }
}

impl<C: Communicator> Sending<C> {
    /// Reads the next bucket's weights, and describes them; `None` at the end of the stream.
    async fn read(&self, feed: &mut Feed<'_, '_>, deadline: Duration) -> Result<Option<Read>> {
        let begun = Instant::now();
        let chunk = feed.next(deadline).await;
        feed.stages.source += begun.elapsed();
        let Some(chunk) = chunk.map_err(|error| error.bucket(feed.filled))? else {
            feed.is_whole = true;
            return Ok(None);
        };
        feed.read += 1;
        let tensors = chunk.tensors()?;
        Ok(Some((chunk, tensors)))
    }

    /// Reduces a chunk to what changed, which is sent.
    async fn changed(&self, shadow: &Mutex<Shadow>, chunk: Chunk) -> Result<Read> {
        let base = lock(shadow).base(&chunk);
        let pool = self.pool.clone();
        let compared = self.pool.start(move || compare(&pool, chunk, base)).await?;
        lock(shadow).patch(compared)
    }

    /// Fills the next bucket that is not empty, from the weights that were read and those that follow; `None` at the end of the stream.
    async fn fill(
        &self,
        feed: &mut Feed<'_, '_>,
        read: Option<Read>,
        deadline: Duration,
    ) -> Result<Option<Bucket>> {
        let mut next = read;
        loop {
            let read = match next.take() {
                Some(read) => read,
                None => match self.read(feed, deadline).await? {
                    Some(read) => read,
                    None => return Ok(None),
                },
            };
            let Some(shadow) = &self.shadow else {
                return self.encode(feed, read, deadline).await.map(Some);
            };
            let begun = Instant::now();
            let changed = self.changed(shadow, read.0).await;
            feed.stages.encode += begun.elapsed();
            let changed = changed.map_err(|error| error.bucket(feed.filled))?;
            if !changed.0.jobs.is_empty() {
                return self.encode(feed, changed, deadline).await.map(Some);
            }
        }
    }

    /// Encodes a bucket into the next slot.
    async fn encode(
        &self,
        feed: &mut Feed<'_, '_>,
        (chunk, mut tensors): Read,
        deadline: Duration,
    ) -> Result<Bucket> {
        let index = feed.filled;
        let Chunk { jobs, len, source_bytes } = chunk;
        let slot = (index % u64::from(SLOTS)) as u32;
        let begun = Instant::now();
        let guard = within(deadline, self.locks.lock(slot)).await.flatten().ok_or_else(|| {
            let message = "its slot is still in use";
            Error::new(ErrorKind::Timeout, "filling a bucket", message).bucket(index)
        })?;
        // A bucket that was announced may have to be sent from any slot.
        let room = len.max(feed.whole.as_ref().map_or(0, |whole| whole.largest()));
        let filled = async {
            let guard = match room > self.shape.slot_bytes {
                true if self.one_buffer => return Err(too_large(&tensors, self.shape.slot_bytes)),
                true => self.slots.enlarge(guard, room).await?,
                false => guard,
            };
            let shared = self.is_shared.then(|| self.slots.shared(&guard)).transpose()?;
            self.slots.fill(guard, jobs, &self.pool, false).await?;
            Ok::<_, Error>(shared.unwrap_or_default())
        };
        tensors.shared = filled.await.map_err(|error| error.bucket(index))?;
        feed.stages.encode += begun.elapsed();
        feed.filled += 1;
        Ok(Bucket { slot, len, source_bytes, tensors })
    }

    /// Whether the world is intact, or none is needed.
    async fn is_joined(&self, limit: Duration) -> bool {
        self.is_shared || self.thread.run(limit, |library, _| library.ended(WORLD)).await.is_ok()
    }

    /// Joins a world of `size` members as the first of them, and warms it up.
    fn join(&self, id: Vec<u8>, size: u32, limit: Duration) -> JoinHandle<Result<()>> {
        let thread = self.thread.clone();
        tokio::spawn(async move {
            let work = thread.run(limit, move |library, wait| {
                library.leave();
                let joined = library.join(WORLD, &id, size, 0, wait);
                let ready = joined.and_then(|()| library.greet(WORLD, wait));
                ready.inspect_err(|_| library.leave())
            });
            work.await
        })
    }

    /// Makes the next broadcast join a world of `size` members first, as its first member.
    async fn join_later(&self, id: Vec<u8>, size: u32, limit: Duration) -> Result<()> {
        let awaited = self.awaited.clone();
        let work = self.thread.run(limit, move |library, _| {
            library.leave();
            *lock(&awaited) = Some(Awaited { id, size });
            Ok(())
        });
        work.await
    }

    /// Broadcasts a bucket to the world. It goes on when nobody waits for it any more: members that have begun a broadcast wait for it
    /// without an end.
    fn broadcast(&self, bucket: &Bucket, limit: Duration) -> JoinHandle<Result<()>> {
        let parts = match self.unpacked || self.shadow.is_some() {
            true => bucket.tensors.pieces(),
            false => parts(&[bucket.len]),
        };
        tokio::spawn(self.caster().cast(bucket.slot, parts, limit))
    }

    fn caster(&self) -> Caster<C> {
        let (thread, locks) = (self.thread.clone(), self.locks.clone());
        Caster { thread, locks, awaited: self.awaited.clone() }
    }
}

/// Makes broadcasts.
struct Caster<C: Communicator> {
    thread: Thread<C>,
    locks: Arc<SlotLocks>,
    awaited: Arc<Mutex<Option<Awaited>>>,
}

impl<C: Communicator> Caster<C> {
    /// Broadcasts parts of a slot to the world one by one, after joining it if this is the first broadcast.
    fn cast(
        &self,
        slot: u32,
        parts: Vec<Range<u64>>,
        limit: Duration,
    ) -> impl Future<Output = Result<()>> + Send + use<C> {
        // Empty weights are not broadcast.
        let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        let (thread, locks) = (self.thread.clone(), self.locks.clone());
        let awaited = self.awaited.clone();
        async move {
            let guard = locks.lock(slot).await;
            let work = thread.run(limit, move |library, wait| {
                let done = (|| {
                    if let Some(Awaited { id, size }) = lock(&awaited).take() {
                        library.join(WORLD, &id, size, 0, wait)?;
                    }
                    let all = library.ended(WORLD)? + parts.len() as u64;
                    for part in parts {
                        library.broadcast_part(WORLD, slot, part, wait)?;
                    }
                    while library.ended(WORLD)? < all {
                        wait.check("broadcasting a bucket")?;
                        std::thread::sleep(PAUSE);
                    }
                    Ok(())
                })();
                let done = done.inspect_err(|_| library.leave());
                // Nothing reads the slot from here on.
                drop(guard);
                done
            });
            work.await
        }
    }

    /// Broadcasts all buckets that one call has announced, of these lengths, as they are handed over. It owes each of them to the workers:
    /// if no more are handed over, it sends what a slot has, and the update fails for the reason for which none came.
    async fn cast_all(
        self,
        lens: Vec<u64>,
        mut handed: mpsc::Receiver<Handed>,
        pace: Arc<Pace>,
        limit: Duration,
    ) -> Result<()> {
        let mut slot = 0;
        for len in lens {
            pace.rests();
            let bucket = handed.recv().await;
            pace.goes_on();
            if let Some(bucket) = &bucket {
                debug_assert_eq!(bucket.len, len, "the stream was compared with the list");
                slot = bucket.slot;
            }
            self.cast(slot, parts(&[len]), limit).await?;
        }
        pace.rests();
        // Until the stream has ended, too: only then is it known to have no further weights.
        while handed.recv().await.is_some() {}
        pace.goes_on();
        Ok(())
    }
}

/// When an act made its last step. Its deadline counts from there.
#[derive(Debug)]
struct Pace(Mutex<Option<Instant>>);

impl Pace {
    fn new() -> Self {
        Self(Mutex::new(Some(Instant::now())))
    }

    fn goes_on(&self) {
        *lock(&self.0) = Some(Instant::now());
    }

    /// It waits for the trainer's stream, which has a deadline of its own.
    fn rests(&self) {
        *lock(&self.0) = None;
    }

    fn until(&self, deadline: Duration) -> Option<Instant> {
        lock(&self.0).map(|last| last + deadline)
    }
}

/// Waits for the trainer's part of a call and for those of the servers, which end together or not at all.
async fn together(
    mut own: JoinHandle<Result<()>>,
    mut theirs: FuturesUnordered<impl Future<Output = (usize, Result<()>)>>,
    members: Vec<usize>,
    pace: &Pace,
    deadline: Duration,
) -> (Result<()>, Answers) {
    let begun = Instant::now();
    let grace = GRACE.min(deadline / 4);
    let mut last: Option<Instant> = None;
    let mut ended: Option<Result<()>> = None;
    let mut answers: Answers = members.into_iter().map(|index| (index, None)).collect();
    while ended.is_none() || !theirs.is_empty() {
        let now = Instant::now();
        let until = last.or_else(|| pace.until(deadline)).unwrap_or(now + deadline);
        let left = until.saturating_duration_since(now);
        let failed = tokio::select! {
            done = &mut own, if ended.is_none() => {
                let done = done.unwrap_or_else(|error| {
                    Err(Error::new(ErrorKind::Aborted, "calling NCCL", error.to_string()))
                });
                let failed = done.is_err();
                ended = Some(done);
                failed
            }
            Some((index, answer)) = theirs.next(), if !theirs.is_empty() => {
                let failed = answer.is_err();
                // A timeout is not an answer.
                let is_silence =
                    answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::Timeout);
                let place = answers.iter_mut().find(|(of, _)| *of == index);
                if let Some((_, place)) = place.filter(|_| !is_silence) {
                    *place = Some(answer);
                }
                failed
            }
            () = sleep(left) => match last.or_else(|| pace.until(deadline)) {
                Some(until) if until <= Instant::now() => break,
                _ => false,
            },
        };
        if failed {
            let until = Instant::now() + grace;
            last = Some(last.or_else(|| pace.until(deadline)).map_or(until, |own| own.min(until)));
        }
    }
    let ended = ended.unwrap_or_else(|| {
        own.abort();
        let seconds = begun.elapsed().as_secs_f64();
        let message = format!("the world was given up after {seconds:.1} s");
        Err(Error::new(ErrorKind::Timeout, "waiting for the servers' workers in NCCL", message))
    });
    (ended, answers)
}

impl<C: Communicator> ServersEngine<C> {
    /// Does what the machine decides until the update is over. Returns the number of buckets sent.
    async fn run(&mut self, feed: &mut Feed<'_, '_>, version: Version) -> u64 {
        // An empty stream, or one that fails at once, does not concern the servers.
        let (mut first, mut ready, mut sent) = (None, None, 0);
        match self.sending.read(feed, self.deadline).await {
            Ok(Some(read)) => first = Some(read),
            Ok(None) => {
                let message = "the stream has no weights";
                self.fleet.fail(Error::new(ErrorKind::Weight, "sending weights", message));
            }
            Err(error) => self.fleet.fail(error),
        }
        loop {
            let act = self.fleet.next();
            let looks = act.looks();
            // The servers' versions are known, and none is paused yet.
            if let Some(read) = first.take_if(|_| !looks && act != Act::End) {
                self.base();
                match self.sending.fill(feed, Some(read), self.deadline).await {
                    Ok(filled) => ready = filled,
                    Err(error) => self.fleet.fail(error),
                }
                continue;
            }
            match act {
                Act::Ask(asks) => {
                    let (begun, is_last) = (Instant::now(), sent > 0 && ready.is_none());
                    let asked = asks.into_iter().map(|(index, ask)| {
                        let server = self.servers[index].clone();
                        async move { (index, ask, server.ask(ask, version).await) }
                    });
                    let asked = join_all(asked);
                    self.under_way.begin(async { Done::Asked(asked.await) });
                    let done = self.under_way.ended().await;
                    self.tell(done);
                    if let Some((_, tensors)) = first.as_ref().filter(|_| looks) {
                        // Before any server is paused.
                        self.refuse(tensors);
                    }
                    if is_last {
                        feed.stages.confirm += begun.elapsed();
                    }
                }
                Act::Form(members) => {
                    match self.form(&members).await {
                        Ok(()) => {
                            let done = self.under_way.ended().await;
                            self.tell(done);
                        }
                        // Nobody was asked.
                        Err(error) => self.fleet.formed(Err(error), Vec::new()),
                    }
                }
                Act::Send(members) => {
                    let Some(bucket) = ready.take() else {
                        self.fleet.end_of_stream(Ok(()));
                        continue;
                    };
                    let whole = feed.whole.clone();
                    let all = whole.as_ref().map_or(&bucket.tensors, |whole| whole.tensors());
                    if self.refuse(all) {
                        ready = Some(bucket);
                        continue;
                    }
                    if let Some(whole) = whole {
                        sent += self.send_whole(&members, bucket, &whole, feed).await;
                        continue;
                    }
                    let begun = Instant::now();
                    self.send(&members, &bucket);
                    let filling = self.sending.fill(feed, None, self.deadline);
                    let (done, next) = join(self.under_way.ended(), filling).await;
                    feed.stages.publish += begun.elapsed();
                    self.tell(done);
                    let bytes = bucket.source_bytes;
                    self.meter.observe(&Progress::Bucket { index: sent, bytes });
                    sent += 1;
                    match next {
                        Ok(next) => ready = next,
                        Err(error) => self.fleet.end_of_stream(Err(error)),
                    }
                }
                Act::End => return sent,
            }
        }
    }

    /// Chooses the base of the changes: the version of all servers, if it is the same.
    fn base(&self) {
        let Some(shadow) = &self.sending.shadow else { return };
        let mut shadow = lock(shadow);
        let has_it = |index: &usize| shadow.is_held_by(*index) && self.fleet.has_kept(*index);
        let of_changes = self.fleet.known().iter().all(has_it);
        shadow.begin(of_changes);
    }

    /// Ends what a failed or dropped update has left under way.
    async fn settle(&mut self) {
        let left = self.under_way.ended().await;
        self.tell(left);
        join_all(self.servers.iter().map(|server| server.call_off())).await;
    }

    /// Leaves out servers that would misread a weight. Returns whether there is one.
    fn refuse(&mut self, tensors: &Tensors) -> bool {
        let mut refused = false;
        for index in self.fleet.known() {
            let names = tensors.names.iter().map(|name| &**name).zip(tensors.types.iter().copied());
            let Some((name, entry)) = clash(self.fleet.ignored(index), names) else { continue };
            let message = format!(
                "its checkpoint leaves this layer alone (`{entry}`), and the stream has it in FP8: put it into the trainer's \
                 quantization.ignored_layers"
            );
            let url = self.servers[index].url().to_string();
            let error = Error::new(ErrorKind::Config, url, message).tensor(name);
            self.fleet.refuse(index, error);
            refused = true;
        }
        refused
    }

    /// Tells the machine the result of an act.
    fn tell(&mut self, done: Option<Done>) {
        match done {
            None => {}
            Some(Done::Asked(answers)) => {
                for (index, ask, said) in answers {
                    tracing::debug!(server = index + 1, ?ask, ?said, "asked");
                    self.fleet.answer(index, ask, said);
                }
            }
            Some(Done::Formed(own, answers)) => self.fleet.formed(own, answers),
            Some(Done::Sent { own, answers, sent }) => {
                let has = |answer: &Option<Result<()>>| matches!(answer, Some(Ok(())));
                for (index, _) in answers.iter().filter(|(_, answer)| has(answer)) {
                    let loaded = &mut self.loaded[*index];
                    loaded.buckets += sent.buckets;
                    loaded.tensors += sent.tensors;
                    loaded.bytes += sent.bytes;
                }
                self.fleet.sent(own, answers);
            }
            Some(Done::Lost(error)) => {
                self.fleet.sent(Err(error.report().clone().into()), Vec::new());
                self.fleet.fail(error);
            }
        }
    }

    /// Begins to form a world with the workers of servers, which all join at the same time.
    ///
    /// # Errors
    ///
    /// Those that keep the trainer from asking any server.
    async fn form(&mut self, members: &[usize]) -> Result<()> {
        self.forget();
        let limit = self.deadline;
        let id = match self.meets {
            Meets::Nowhere => Vec::new(),
            _ => {
                let id = self.sending.thread.run(limit, |library, _| library.new_group());
                id.await?.to_vec()
            }
        };
        let workers: u32 = members.iter().map(|&index| self.fleet.workers(index)).sum();
        let size = workers + 1;
        info!(servers = members.len(), ranks = size, "forming a world");
        let meeting = self.meeting(&id, size).await?;
        let mut first = 1;
        let theirs: FuturesUnordered<_> = members
            .iter()
            .map(|&index| {
                let (id, bucket_bytes) = (id.clone(), self.sending.shape.slot_bytes);
                let world = World { id, size, first, bucket_bytes, meeting: meeting.clone() };
                first += self.fleet.workers(index);
                let server = self.servers[index].clone();
                async move { (index, server.join(&world).await) }
            })
            .collect();
        let own = match self.meets {
            Meets::Nowhere => tokio::spawn(async { Ok(()) }),
            Meets::AtOnce => self.sending.join(id, size, limit),
            Meets::AtFirstBroadcast { .. } => {
                let ready = self.sending.join_later(id, size, limit).await;
                tokio::spawn(async { ready })
            }
        };
        let members = members.to_vec();
        self.under_way.begin(async move {
            let (own, answers) = together(own, theirs, members, &Pace::new(), limit).await;
            Done::Formed(own, answers)
        });
        Ok(())
    }

    /// Stores the id of a world where its workers look for it, if they do. Workers of an older world find nothing any more.
    async fn meeting(&mut self, id: &[u8], size: u32) -> Result<Option<Meeting>> {
        self.store = None;
        let Meets::AtFirstBroadcast { address, port } = &self.meets else { return Ok(None) };
        if size > MAX_WORLD {
            let message = format!(
                "{size} members; above {MAX_WORLD}, torch joins in another way, which is not spoken here"
            );
            return Err(Error::new(ErrorKind::Config, "forming a world", message));
        }
        let store = TorchStore::open(*port).await?;
        // The name is unique among the worlds of all trainers.
        let group = format!("ckpt-engine-{:016x}", RandomState::new().hash_one(id));
        store.set(&id_key(&group), id);
        let meeting = Meeting { group, address: address.clone(), port: store.port() };
        self.store = Some(store);
        Ok(Some(meeting))
    }

    /// Begins to send a bucket to servers, which all learn of it at the same time.
    fn send(&mut self, members: &[usize], bucket: &Bucket) {
        self.forget();
        let theirs = self.call(members, &bucket.tensors, self.deadline);
        let own = match self.sending.is_shared {
            true => tokio::spawn(async { Ok(()) }),
            false => self.sending.broadcast(bucket, self.deadline),
        };
        let tensors = bucket.tensors.names.len() as u64;
        let sent = Loaded { buckets: 1, tensors, bytes: bucket.len };
        let (members, deadline) = (members.to_vec(), self.deadline);
        self.under_way.begin(async move {
            let (own, answers) = together(own, theirs, members, &Pace::new(), deadline).await;
            Done::Sent { own, answers, sent }
        });
    }

    /// Makes a call to servers, which all learn at the same time what they are to load.
    fn call(
        &self,
        members: &[usize],
        tensors: &Tensors,
        limit: Duration,
    ) -> FuturesUnordered<impl Future<Output = (usize, Result<()>)> + Send + use<C>> {
        // All servers are of one kind and in one world.
        let told = members.first().map(|&index| self.servers[index].describe(tensors));
        let told = Arc::new(told.unwrap_or(Told::Json(json!(null))));
        let one = |&index: &usize| {
            let (server, told) = (self.servers[index].clone(), told.clone());
            async move { (index, server.update(&told, limit).await) }
        };
        members.iter().map(one).collect()
    }

    /// Sends all buckets by one call, the first of which is filled. Returns how many were sent.
    async fn send_whole(
        &mut self,
        members: &[usize],
        first: Bucket,
        whole: &Whole,
        feed: &mut Feed<'_, '_>,
    ) -> u64 {
        let begun = Instant::now();
        let is_known = self.announced.as_ref().is_some_and(|announced| announced.is_known);
        // Until this call has succeeded.
        self.forget();
        // Servers that have the list take an empty one for it.
        let empty = Tensors::default();
        let tensors = if is_known { &empty } else { whole.tensors() };
        let theirs = self.call(members, tensors, FOREVER);
        let (hand, handed) = mpsc::channel(1);
        let pace = Arc::new(Pace::new());
        let lens: Vec<u64> = whole.buckets().iter().map(|bucket| bucket.len).collect();
        let all = Loaded {
            buckets: lens.len() as u64,
            tensors: whole.metas().len() as u64,
            bytes: lens.iter().sum(),
        };
        let deadline = self.deadline;
        let own = self.sending.caster().cast_all(lens, handed, pace.clone(), deadline);
        let (own, all_members) = (tokio::spawn(own), members.to_vec());
        self.under_way.begin(async move {
            let (own, answers) = together(own, theirs, all_members, &pace, deadline).await;
            Done::Sent { own, answers, sent: all }
        });
        // A bucket has a turn from before it is filled until it has been sent: then its slot is free for the next but one.
        let turns = Arc::new(Semaphore::new(SLOTS as usize));
        let (mut next, mut sent) = (Some(first), 0);
        let ended = loop {
            let filled = async {
                let turn = turns.clone().acquire_owned().await;
                let bucket = match next.take() {
                    Some(first) => Some(first),
                    None => self.sending.fill(feed, None, deadline).await?,
                };
                Ok::<_, Error>(bucket.zip(turn.ok()))
            };
            let filled = tokio::select! {
                biased;
                () = hand.closed() => break None,
                filled = filled => filled,
            };
            let (bucket, turn) = match filled {
                Ok(Some(filled)) => filled,
                Ok(None) => break Some(Ok(())),
                Err(error) => break Some(Err(error)),
            };
            let handed = Handed { slot: bucket.slot, len: bucket.len, _turn: turn };
            if hand.send(handed).await.is_err() {
                break None;
            }
            self.meter.observe(&Progress::Bucket { index: sent, bytes: bucket.source_bytes });
            sent += 1;
        };
        drop(hand);
        feed.stages.publish += begun.elapsed();
        let done = self.under_way.ended().await;
        self.tell(done);
        let is_sent = matches!(ended, Some(Ok(())));
        if let Some(announced) = self.announced.as_mut().filter(|_| is_sent) {
            announced.is_known = self.fleet.members() == members;
        }
        self.fleet.end_of_stream(ended.unwrap_or_else(|| match self.fleet.known().is_empty() {
            // The servers' own errors are the cause.
            true => Ok(()),
            false => {
                let message = "servers answered before they had all buckets";
                Err(Error::new(ErrorKind::Protocol, "sending an update by one call", message))
            }
        }));
        sent
    }

    /// Servers are told something else than the list that they know, or nobody knows any more what they have.
    fn forget(&mut self) {
        if let Some(announced) = &mut self.announced {
            announced.is_known = false;
        }
    }

    fn report(
        &self,
        outcome: &Outcome,
        feed: Feed<'_, '_>,
        version: Version,
        buckets: u64,
        elapsed: Duration,
    ) -> SendReport {
        let delta = self.sending.shadow.as_ref().map(|shadow| lock(shadow).sent());
        let line = |index: usize, state, error: Option<String>| {
            let url = self.servers[index].url();
            let workers = self.fleet.workers(index);
            let mut report = ReceiverReport::new(rank_of(index), state);
            report.seconds = elapsed.as_secs_f64();
            report.notes = json!({
                "server": url,
                "workers": workers,
                "loaded": self.loaded[index],
                "delta": delta,
                "error": error,
            });
            report
        };
        let loaded = outcome.loaded.iter().map(|&index| line(index, VersionState::Active, None));
        let out = outcome.out.iter().map(|(index, report)| {
            let error = Error::from(report.clone()).to_string();
            line(*index, VersionState::Aborted, Some(error))
        });
        let mut report = SendReport::new(version);
        report.counts = feed.chunks.counts;
        report.buckets = buckets;
        report.elapsed = elapsed;
        report.stages = feed.stages;
        report.receivers = loaded.chain(out).collect();
        report.absent = outcome.out.iter().map(|(index, _)| rank_of(*index)).collect();
        report.slower = self.sending.slots.slower();
        report
    }
}

#[async_trait]
impl<C: Communicator> CheckpointEngine for ServersEngine<C> {
    async fn finalize(mut self: Box<Self>) -> Result<()> {
        self.settle().await;
        // A server that cannot leave now can still join again in a later update.
        let limit = SHORT.min(self.deadline);
        let leaving = self
            .fleet
            .members()
            .into_iter()
            .map(|index| within(limit, self.servers[index].ask(Ask::Leave, Version(0))));
        for left in join_all(leaving).await {
            if !matches!(left, Some(Ok(_))) {
                tracing::debug!(?left, "while the world was left");
            }
        }
        self.sending.thread.close().await;
        Ok(())
    }
}

#[async_trait]
impl<C: Communicator> TrainerEngine for ServersEngine<C> {
    #[tracing::instrument(name = "send", skip_all, fields(version = %version))]
    async fn send_weights(
        &mut self,
        mut weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let begun = Instant::now();
        let ranks: Vec<Rank> = (0..self.servers.len()).map(rank_of).collect();
        self.settle().await;
        let has_world = self.sending.is_joined(self.deadline).await;
        self.fleet.begin(version, has_world);
        self.loaded.fill(Loaded::default());
        self.meter.observe(&Progress::Began { version, receivers: ranks.clone() });
        let chunks = Chunks::new(match &self.sending.shadow {
            None => self.sending.shape.slot_bytes,
            // With their positions, all elements of a weight take up to three times its bytes.
            Some(_) => self.sending.shape.slot_bytes / 3,
        });
        let whole = self.announced.as_mut().and_then(|announced| announced.whole.take());
        let mut feed = Feed {
            chunks,
            weights: &mut weights,
            whole,
            read: 0,
            is_whole: false,
            filled: 0,
            stages: StageTimes::default(),
        };
        feed.chunks.metas = self.announced.is_some().then(Vec::new);
        let buckets = self.run(&mut feed, version).await;
        self.settle().await;
        let outcome = self.fleet.outcome().inspect_err(|error| {
            tracing::warn!(%error, "update failed");
            self.meter.aborted(&ranks);
        })?;
        for &index in &outcome.loaded {
            let state = VersionState::Active;
            self.meter.observe(&Progress::State { rank: rank_of(index), state });
        }
        if let Some(shadow) = &self.sending.shadow {
            lock(shadow).commit(version, &outcome.loaded);
        }
        if let (Some(announced), true) = (&mut self.announced, feed.is_whole) {
            announced.whole = match (feed.whole.take(), feed.chunks.metas.take()) {
                (Some(whole), _) => Some(whole),
                (None, Some(metas)) => {
                    Whole::of(metas, self.sending.shape.slot_bytes)?.map(Arc::new)
                }
                (None, None) => None,
            };
        }
        let report = self.report(&outcome, feed, version, buckets, begun.elapsed());
        self.meter.sent(&report);
        info!(servers = outcome.loaded.len(), left_out = outcome.out.len(), "update loaded");
        Ok(report)
    }

    async fn send_part(&mut self, _: WeightStream<'_>, _: Version) -> Result<SendReport> {
        Err(no_copies("sending a part of a version"))
    }

    async fn attest(&mut self) -> Result<SendReport> {
        Err(no_copies("attesting a version"))
    }
}

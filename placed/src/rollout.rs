//! A rollout's engine.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine_core::control::Control;
use engine_core::memory::Pool;
use engine_core::{
    EngineContext, Error, ErrorKind, Rank, ReceiveReport, Result, Role, Storage, Version,
    VersionState,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use protocol::encode;
use tokio::sync::Mutex as Lock;

use crate::coordinator::digest_of;
use crate::declared::{Declaration, Lent, Piece, Table, Wanted, lay_out};
use crate::encode::{Going, verify};
use crate::member::{Done, Member, Task, TensorState};
use crate::memory::{Lender, LentBytes};
use crate::message::Digest;
use crate::seat::{Seat, Worker, busy, ready};
use crate::trainer::Plans;

/// A rollout that lends its tensors: trainers write each update straight into them.
///
/// Its tensors are what a program serves from, once it is told that a version is active. During an update they hold no version, and
/// after one that failed neither: the next update that succeeds makes them whole. A rollout that has to go on serving during
/// updates receives into a cache instead.
pub struct PlacedRollout {
    seat: Seat,
    digests: bool,
    worker: Keeper,
}

struct Keeper {
    rank: Rank,
    deadline: Duration,
    pool: Pool,
    memory: Arc<Mutex<Box<dyn Lender>>>,
    tensors: Arc<Vec<Lent>>,
    inspect: Option<Inspect>,
    declared: (Digest, Bytes),
    plans: Arc<Mutex<Plans>>,
    working: Arc<Lock<()>>,
    table: Arc<Mutex<Option<Arc<Table>>>>,
}

impl fmt::Debug for PlacedRollout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlacedRollout").field("seat", &self.seat).finish_non_exhaustive()
    }
}

/// A box of a rollout's tensors, with what an update has brought.
#[derive(Clone, Debug)]
pub struct PlacedTensor<'a> {
    /// What it is.
    pub wanted: &'a Wanted,
    elements: LentBytes<'a>,
    scales: LentBytes<'a>,
}

impl<'a> PlacedTensor<'a> {
    /// Its elements, row-major: where they are, or copied from the device, which blocks.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub fn bytes(&self) -> Result<Cow<'a, [u8]>> {
        self.elements.to_host()
    }

    /// The [scales](Wanted::scales) of its blocks, row-major; empty unless it is quantised. As [`bytes`](Self::bytes).
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub fn scales(&self) -> Result<Cow<'a, [u8]>> {
        self.scales.to_host()
    }

    /// Where its elements and its scales are, if that is a device. They are what the update has brought as long as the borrow lasts.
    pub fn on_device(&self) -> Option<(&Storage, &Storage)> {
        match (&self.elements, &self.scales) {
            (LentBytes::Device(elements), LentBytes::Device(scales)) => Some((elements, scales)),
            _ => None,
        }
    }
}

/// Looks at what an update has brought to a rollout, before it says that the version is whole there. An error fails the
/// update on every rank. Boxes are looked at in parallel.
pub type Inspect = Arc<dyn Fn(Version, PlacedTensor<'_>) -> Result<()> + Send + Sync>;

fn placed<'a>(lent: &'a Lent, memory: &LentBytes<'a>) -> Result<PlacedTensor<'a>> {
    let (len, scales) = lent.wanted.validate()?;
    let part = |at: u64, len: u64| {
        memory.part(at, len).ok_or_else(|| {
            let message = "its memory is not that of the layout";
            let error = Error::new(ErrorKind::State, "reading a tensor", message);
            error.tensor(&*lent.wanted.meta.name)
        })
    };
    let (elements, scales) = (part(lent.at, len)?, part(lent.scales_at, scales)?);
    Ok(PlacedTensor { wanted: &lent.wanted, elements, scales })
}

/// The tensors that a rollout wants, laid out: how much memory they take.
#[derive(Clone, Debug)]
pub struct Layout {
    tensors: Vec<Lent>,
    bytes: u64,
}

impl Layout {
    /// Lays tensors out, one behind the other.
    ///
    /// # Errors
    ///
    /// `Weight` and `Config`, naming the tensor: boxes outside of it, formats that are not placed.
    pub fn new(wanted: impl IntoIterator<Item = Wanted>) -> Result<Self> {
        let (tensors, bytes) = lay_out(wanted.into_iter().collect())?;
        Ok(Self { tensors, bytes })
    }

    /// Bytes of the memory to lend.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl PlacedRollout {
    /// A rollout with its connection in the context, which lends `memory` for what was laid out.
    ///
    /// # Errors
    ///
    /// `Config` without a control plane, and if the memory is smaller than the layout; `Resource` if its threads cannot be
    /// started.
    pub fn new(context: &EngineContext, layout: Layout, memory: Box<dyn Lender>) -> Result<Self> {
        let control: Arc<dyn Control> = context.require_control()?;
        let (rank, deadline) = (control.rank(), context.deadline());
        let pool = Pool::new(context.threads(Role::Rollout))?;
        let Layout { tensors, bytes } = layout;
        if memory.len() < bytes {
            let message = format!("{} bytes for tensors of {bytes}", memory.len());
            return Err(Error::new(ErrorKind::Config, "lending tensors", message));
        }
        let body = encode(&Declaration::Wants { tensors: tensors.clone(), bytes })?;
        let worker = Keeper {
            rank,
            deadline,
            pool,
            memory: Arc::new(Mutex::new(memory)),
            tensors: tensors.into(),
            inspect: None,
            declared: (digest_of(&body), body),
            plans: Arc::default(),
            working: Arc::default(),
            table: Arc::default(),
        };
        let seat = Seat::new(control, deadline, Member::new(Role::Rollout, deadline), None);
        Ok(Self { seat, digests: context.config.digests, worker })
    }

    /// Has something look at what every update brings.
    #[must_use]
    pub fn inspected_by(mut self, inspect: Inspect) -> Self {
        self.worker.inspect = Some(inspect);
        self
    }

    /// The rank.
    pub fn rank(&self) -> Rank {
        self.seat.rank()
    }

    /// What the tensors hold.
    pub fn state(&self) -> &TensorState {
        self.seat.member.state()
    }

    /// Takes part in the next update, of this version if one is given. When it ends well the tensors hold it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future before an update begins loses nothing; after that it gives the update up on every rank.
    ///
    /// # Errors
    ///
    /// `Timeout` if no update begins within the deadline (call again to go on waiting); `PeerLost` and `TrainerLeft` if the trainer is
    /// gone; why the update failed, naming the rank. What the tensors hold then is [`state`](Self::state)'s to say: a plan
    /// that did not fit has left them as they were.
    pub async fn update(&mut self, version: Option<Version>) -> Result<ReceiveReport> {
        let begun = Instant::now();
        let ended = self.seat.take_part(&mut self.worker, version, self.digests).await?;
        let bytes = {
            let table = lock(&self.worker.table);
            let pieces = table.iter().flat_map(|table| &table.pieces);
            pieces.map(Piece::bytes).sum()
        };
        let mut report = ReceiveReport::new(ended.version, VersionState::Active);
        report.tensors = self.worker.tensors.len() as u64;
        report.bytes = bytes;
        report.elapsed = begun.elapsed();
        Ok(report)
    }

    /// Calls `each` with every box that is lent, in the order in which they were laid out.
    ///
    /// # Errors
    ///
    /// `State` unless a version is active, saying which update left the tensors without one; those of `each`.
    pub fn read(&self, mut each: impl FnMut(PlacedTensor<'_>) -> Result<()>) -> Result<Version> {
        let version = self.active()?;
        let memory = lock(&self.worker.memory);
        let bytes = memory.bytes()?;
        for lent in &*self.worker.tensors {
            each(placed(lent, &bytes)?)?;
        }
        Ok(version)
    }

    fn active(&self) -> Result<Version> {
        let message = match self.state() {
            TensorState::Active(version) => return Ok(*version),
            TensorState::Empty => "no version has been written yet".into(),
            TensorState::Updating { version, failed: None } => {
                format!("the update to version {version} has not ended")
            }
            TensorState::Updating { version, failed: Some(error) } => {
                format!(
                    "the update to version {version} failed, and they have to be updated again: {error}"
                )
            }
        };
        Err(Error::new(ErrorKind::State, "reading the rollout's tensors", message)
            .rank(self.rank()))
    }

    /// Takes the memory back and frees it.
    ///
    /// # Errors
    ///
    /// `Timeout` if a trainer still has it; its process may write to it until it ends, which does no harm here.
    pub async fn finalize(self) -> Result<()> {
        Seat::idle(&self.worker.working).await;
        take_back(&self.worker.memory, self.worker.deadline / 2).await
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What a panic left half done belongs to an update that it has ended.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes lent memory back. Only one call at a time has the memory.
async fn take_back(memory: &Arc<Mutex<Box<dyn Lender>>>, limit: Duration) -> Result<()> {
    let until = Instant::now() + limit;
    loop {
        let taken = lock(memory).take_back();
        match taken {
            Ok(true) => return Ok(()),
            Ok(false) if Instant::now() < until => {
                engine_core::clock::sleep(Duration::from_millis(2)).await;
            }
            Ok(false) => {
                let message = "a trainer of an update that has ended may still write to them";
                return Err(Error::new(ErrorKind::Timeout, "taking tensors back", message));
            }
            Err(error) => return Err(error),
        }
    }
}

impl Worker for Keeper {
    fn start(&mut self, task: Task, going: Going) -> BoxFuture<'static, Result<Done>> {
        let (rank, pool, plans) = (self.rank, self.pool.clone(), self.plans.clone());
        let (working, present) = (self.working.clone(), self.table.clone());
        let (memory, limit) = (self.memory.clone(), self.deadline / 2);
        let (digest, body) = self.declared.clone();
        let guard = match (&task, busy(&working)) {
            (Task::Prepare, _) => None,
            (_, Ok(guard)) => Some(guard),
            (_, Err(error)) => return ready(Err(error)),
        };
        match task {
            Task::Prepare => async move {
                Seat::idle(&working).await;
                take_back(&memory, limit).await.map_err(|error| error.rank(rank))?;
                let known = lock(&plans).known();
                Ok(Done::Prepared { digest, body, known })
            }
            .boxed(),
            Task::Plan { set, declared } => pool
                .start(move || {
                    let _guard = guard;
                    let table = lock(&plans).table(rank, set, declared)?;
                    going.step()?;
                    let (plan, maxima) = (table.digest, Vec::new());
                    *lock(&present) = Some(table);
                    Ok(Done::Planned { plan, terms: lock(&memory).lend()?, maxima })
                })
                .boxed(),
            Task::Verify { version, written, digests } => {
                let threads = pool.clone();
                let (tensors, inspect) = (self.tensors.clone(), self.inspect.clone());
                async move {
                    take_back(&memory, limit).await.map_err(|error| error.rank(rank))?;
                    let work = threads.start(move || {
                        let _guard = guard;
                        let table = lock(&present).clone().ok_or_else(|| {
                            Error::new(ErrorKind::Protocol, "updating", "there is no plan")
                        })?;
                        let memory = lock(&memory);
                        let found = verify(&table, &**memory, &written, digests, &pool, &going)?;
                        let bytes = memory.bytes()?;
                        let mut inspected = 0;
                        if let Some(inspect) = inspect {
                            let looked = pool.map(tensors.iter(), |lent| {
                                going.step()?;
                                inspect(version, placed(lent, &bytes)?)
                                    .map_err(|error| error.tensor(&*lent.wanted.meta.name))
                            });
                            inspected = looked.len() as u64;
                            looked.into_iter().collect::<Result<()>>()?;
                        }
                        let (digest, bytes) = found;
                        Ok(Done::Verified { digest, bytes, inspected })
                    });
                    work.await
                }
                .boxed()
            }
            Task::Write { .. } => {
                let message = "a rollout was asked to write";
                ready(Err(Error::new(ErrorKind::Protocol, "updating", message).rank(Rank::LEADER)))
            }
        }
    }
}

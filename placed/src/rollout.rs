//! The engine of a rollout.

use std::borrow::Cow;
use std::fmt;
use std::pin::pin;
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
use crate::declared::{Declaration, Lent, Table, Wanted, check_places, lay_out, no_plan, planned};
use crate::encode::{Compared, Going};
use crate::member::{Done, Member, Task, TensorState};
use crate::memory::{Lender, LentBytes};
use crate::message::Digest;
use crate::seat::{Seat, Worker, busy, ready};
use crate::trainer::Plans;

/// A rollout that lends its tensors: trainers write each update straight into them.
///
/// A program serves from these tensors while a version is active. During an update they hold no version. After a failed
/// update they hold none until a later update succeeds, unless the leader says that nothing was written: then the version
/// before is active again. A rollout that has to go on serving during updates receives into a cache instead.
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
    /// What of this update was compared.
    compared: Arc<Mutex<Option<Compared>>>,
}

impl fmt::Debug for PlacedRollout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlacedRollout").field("seat", &self.seat).finish_non_exhaustive()
    }
}

/// A box of a rollout's tensors, with the values of an update.
#[derive(Clone, Debug)]
pub struct PlacedTensor<'a> {
    /// The box, its tensor and its format.
    pub wanted: &'a Wanted,
    elements: LentBytes<'a>,
    scales: LentBytes<'a>,
}

impl<'a> PlacedTensor<'a> {
    /// Its elements, row-major: in place, or copied from the device, which blocks.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub fn bytes(&self) -> Result<Cow<'a, [u8]>> {
        self.elements.to_host()
    }

    /// The [scales](Wanted::scales) of its blocks, row-major: in place or copied, as [`bytes`](Self::bytes). Empty unless
    /// it is quantised.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub fn scales(&self) -> Result<Cow<'a, [u8]>> {
        self.scales.to_host()
    }

    /// Its elements and its scales, if they are on a device. They have the values of the update only as long as the borrow
    /// lasts.
    pub fn on_device(&self) -> Option<(&Storage, &Storage)> {
        match (&self.elements, &self.scales) {
            (LentBytes::Device(elements), LentBytes::Device(scales)) => Some((elements, scales)),
            _ => None,
        }
    }
}

/// Inspects a box after an update has written it, before the rollout says that it has verified the version. An error
/// fails the update on every rank. It is called for several boxes in parallel.
pub type Inspect = Arc<dyn Fn(Version, PlacedTensor<'_>) -> Result<()> + Send + Sync>;

fn placed<'a>(lent: &'a Lent, memory: &'a dyn Lender) -> Result<PlacedTensor<'a>> {
    let (elements, scales) = lent.bytes(memory)?;
    Ok(PlacedTensor { wanted: &lent.wanted, elements, scales })
}

/// Where the tensors that a rollout wants lie in the memory that it lends.
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
    /// `Weight` and `Config`, which name the tensor, for boxes outside of it and for formats that cannot be placed;
    /// `Resource` if the layout does not fit 64 bits.
    pub fn new(wanted: impl IntoIterator<Item = Wanted>) -> Result<Self> {
        let (tensors, bytes) = lay_out(wanted.into_iter().collect())?;
        Ok(Self { tensors, bytes })
    }

    /// Tensors that have their places already: for each, the offset of its elements and that of its scales. `bytes` is the length of the
    /// memory.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and `Weight` for tensors that overlap or lie outside of the memory.
    pub fn at(wanted: impl IntoIterator<Item = (Wanted, u64, u64)>, bytes: u64) -> Result<Self> {
        let lent = |(wanted, at, scales_at)| Lent { wanted, at, scales_at };
        let tensors: Vec<Lent> = wanted.into_iter().map(lent).collect();
        check_places(&tensors, bytes, ErrorKind::Weight)?;
        Ok(Self { tensors, bytes })
    }

    /// The bytes of the memory to lend.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl PlacedRollout {
    /// A rollout that lends `memory` for this layout. Its control plane is in the context.
    ///
    /// # Errors
    ///
    /// `Config` without a control plane, or if the memory is smaller than the layout; `Resource` if its threads cannot be
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
            compared: Arc::default(),
        };
        let seat = Seat::new(control, deadline, Member::new(rank, Role::Rollout, deadline), None);
        Ok(Self { seat, digests: context.config.digests, worker })
    }

    /// Calls `inspect` for every box in every update.
    #[must_use]
    pub fn inspected_by(mut self, inspect: Inspect) -> Self {
        self.worker.inspect = Some(inspect);
        self
    }

    /// This rollout's rank.
    pub fn rank(&self) -> Rank {
        self.seat.rank()
    }

    /// What the tensors hold.
    pub fn state(&self) -> &TensorState {
        self.seat.member.state()
    }

    /// Takes part in the next update, which must have this version if one is given. On success the tensors hold its version.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future before an update begins loses nothing. Dropping it later fails the update on every rank.
    ///
    /// # Errors
    ///
    /// `Timeout` if no update begins within the deadline (call again to go on waiting); `PeerLost` and `TrainerLeft` if
    /// the trainer is gone; otherwise the cause of the failed update, which names the rank. [`state`](Self::state) says
    /// what the tensors hold then. For example, a plan that does not fit leaves them unchanged.
    pub async fn update(&mut self, version: Option<Version>) -> Result<ReceiveReport> {
        let begun = Instant::now();
        let ended = self
            .seat
            .take_part(&mut self.worker, version, self.digests, pin!(ready(Ok(()))))
            .await?;
        let bytes = lock(&self.worker.table).as_ref().map_or(0, |table| table.bytes);
        let mut report = ReceiveReport::new(ended.version, VersionState::Active);
        report.tensors = self.worker.tensors.len() as u64;
        report.bytes = bytes;
        report.slower = lock(&self.worker.memory).slower();
        report.elapsed = begun.elapsed();
        Ok(report)
    }

    /// Calls `each` with every box, in the order of the layout. Returns the active version.
    ///
    /// # Errors
    ///
    /// `State` unless a version is active, which names the update that left the tensors without one; those of `each`.
    pub fn read(&self, mut each: impl FnMut(PlacedTensor<'_>) -> Result<()>) -> Result<Version> {
        let version = self.active()?;
        let memory = lock(&self.worker.memory);
        for lent in &*self.worker.tensors {
            each(placed(lent, &**memory)?)?;
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
    /// `Timeout` if a trainer still has the memory. It may write to it until its process ends, which does no harm here.
    pub async fn finalize(self) -> Result<()> {
        Seat::idle(&self.worker.working).await;
        let taken = take_back(&self.worker.memory, self.worker.deadline / 2).await;
        let closed = lock(&self.worker.memory).close();
        closed.await;
        taken
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic may leave a change incomplete, but it also ends the update that the change belongs to.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes lent memory back, and waits for that at most `limit`.
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
        let compared = self.compared.clone();
        let (memory, limit) = (self.memory.clone(), self.deadline / 2);
        let (digest, body) = self.declared.clone();
        let guard = match (&task, busy(&working)) {
            (Task::Prepare { .. }, _) => None,
            (_, Ok(guard)) => Some(guard),
            (_, Err(error)) => return ready(Err(error)),
        };
        match task {
            Task::Prepare { .. } => async move {
                Seat::idle(&working).await;
                take_back(&memory, limit).await.map_err(|error| error.rank(rank))?;
                let known = lock(&plans).known();
                Ok(Done::Prepared { digest, body, known, guessed: false })
            }
            .boxed(),
            Task::Plan { set, declared } => pool
                .start(move || {
                    let _guard = guard;
                    let table = lock(&plans).table(rank, set, declared)?;
                    going.step()?;
                    let (plan, maxima) = (table.digest, Vec::new());
                    *lock(&compared) = Some(Compared::new(&table));
                    *lock(&present) = Some(table);
                    let trainers: Vec<Rank> =
                        lock(&present).iter().flat_map(|t| t.of_trainers.keys()).copied().collect();
                    let terms = lock(&memory).lend(&trainers)?;
                    Ok(Done::Planned { plan, terms, maxima })
                })
                .boxed(),
            Task::Check { from, batch } => pool
                .start(move || {
                    let _guard = guard;
                    let table = planned(&present)?;
                    let mut compared = lock(&compared);
                    let compared = compared.as_mut().ok_or_else(no_plan)?;
                    compared.batch(&table, &**lock(&memory), from, &batch, &going)?;
                    Ok(Done::Checked)
                })
                .boxed(),
            Task::Verify { version, digests } => {
                let threads = pool.clone();
                let (tensors, inspect) = (self.tensors.clone(), self.inspect.clone());
                async move {
                    take_back(&memory, limit).await.map_err(|error| error.rank(rank))?;
                    let work = threads.start(move || {
                        let _guard = guard;
                        let table = planned(&present)?;
                        let memory = lock(&memory);
                        let memory = &**memory;
                        let digest = match digests {
                            true => {
                                let compared = lock(&compared).take().ok_or_else(no_plan)?;
                                compared.end(&table, memory, &pool, &going)?
                            }
                            false => 0,
                        };
                        let mut inspected = 0;
                        if let Some(inspect) = inspect {
                            let looked = pool.map(tensors.iter(), |lent| {
                                going.step()?;
                                inspect(version, placed(lent, memory)?)
                                    .map_err(|error| error.tensor(&*lent.wanted.meta.name))
                            });
                            inspected = looked.len() as u64;
                            looked.into_iter().collect::<Result<()>>()?;
                        }
                        let (bytes, slower) = (table.bytes, memory.slower());
                        Ok(Done::Verified { digest, bytes, inspected, slower })
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

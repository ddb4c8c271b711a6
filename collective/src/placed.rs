//! Placed updates over a library that broadcasts. A trainer and a rollout that have pieces in common are a group of two. The trainer broadcasts
//! [parcels](::placed::parcels), each behind a head that says how long it is. The rollout scatters them, and broadcasts an answer when the
//! trainer asks whether all were scattered.
//!
//! ```text
//! trainer                                   rollout
//!   head: a parcel of so many bytes ─────▶
//!   bytes, and behind them runs     ─────▶  scatter
//!   …
//!   head: what became of them?      ─────▶
//!                                   ◀─────  answer, when all are scattered
//!   head: that was all              ─────▶  the group is kept for the next update
//! ```
//!
//! Both ends enqueue the same broadcasts in the same order, because each says what comes next. A rollout makes the ids of new groups, and
//! gives them away with its terms. Ranks join new groups in the order of the pairs' ranks, so that they never wait in a circle. A group in
//! which an update did not come to its last head is left by both ends, and formed anew when it is needed again.

mod host;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::placed::parcels::{Carrier, Gathered, Packing, RUNS, Room, Run, cut};
use ::placed::{Encoder, Layout, Lender, LentBytes, PlacedRollout, Reach, Reached};
use bytes::Bytes;
use engine_core::memory::{Job, Pool};
use engine_core::plan::ALIGNMENT;
use engine_core::{
    DType, EngineContext, Error, ErrorKind, Prepared, PreparedTrainer, Rank, Result, Storage,
    Weight, digest,
};
use futures::executor::block_on;
use futures::future::BoxFuture;
use protocol::{decode, encode};
use quant_fp8::StridedPart;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

pub use host::{host_tensors, own_host_tensors};

use super::{Communicator, Library, Opened, Shape, SlotGuard, SlotLocks, Slots, Thread};

/// The most ranks that a rank has groups with.
const PAIRS: u32 = 24;
/// A parcel is in one slot while another one is in the other.
const SLOTS: u32 = 2;
/// The least size of a slot.
const LEAST: u64 = 256 << 10;
/// Slots are not enlarged beyond it: moving so many bytes takes far longer than what is done once for each parcel.
const ENOUGH: u64 = 256 << 20;
/// The places of members.
const ROLLOUT: u32 = 0;
const TRAINER: u32 = 1;
/// The bytes of a head or an answer.
const HEAD: usize = 64;
/// How long a rank has to come to its last head after an update has ended, before its group is given up.
const GRACE: Duration = Duration::from_secs(1);
/// How often broadcasts are looked at without a pause, and the pause then.
const SPINS: u32 = 100;
const PAUSE: Duration = Duration::from_micros(50);

const USING: &str = "passing parcels on";

/// A rollout's tensors, as parcels are scattered to them.
pub trait Tensors: fmt::Debug + Send + Sync + 'static {
    /// As [`Lender::len`].
    fn len(&self) -> u64;

    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the bytes of a parcel to their places, and returns when they are there.
    ///
    /// # Errors
    ///
    /// `Protocol` for runs that are in no tensor; those of the device.
    fn scatter(&self, runs: &[Run], parcel: &Storage) -> Result<()>;

    /// As [`Lender::bytes`]. Nothing is scattered meanwhile.
    ///
    /// # Errors
    ///
    /// As there.
    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>>;

    /// As [`Lender::sums`].
    ///
    /// # Errors
    ///
    /// As there.
    fn sums(
        &self,
        _pieces: &[&Arc<[StridedPart]>],
        _step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        Ok(None)
    }
}

/// Where the runs are in a slot, behind so many bytes of a parcel; `None` if there is no such place.
fn runs_at(bytes: u64) -> Option<u64> {
    bytes.checked_add(HEAD as u64)?.checked_next_multiple_of(ALIGNMENT)
}

/// What a head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// A parcel of so many bytes and runs comes.
    Parcel { bytes: u64, runs: u64 },
    /// The rollout answers.
    Ask,
    /// Nothing comes any more.
    End,
    /// The answer, whether all parcels have been scattered.
    Answer { scattered: bool },
}

impl Head {
    fn to_bytes(self) -> [u8; HEAD] {
        let words = match self {
            Self::Parcel { bytes, runs } => [1, bytes, runs],
            Self::Ask => [2, 0, 0],
            Self::End => [3, 0, 0],
            Self::Answer { scattered } => [4, u64::from(scattered), 0],
        };
        let mut all = [0; HEAD];
        for (to, word) in all.as_chunks_mut().0.iter_mut().zip(words) {
            *to = u64::to_le_bytes(word);
        }
        all
    }

    /// `None` for other bytes than a head has.
    fn of(bytes: &[u8]) -> Option<Self> {
        let (words, _) = bytes.as_chunks();
        match words.get(..3)? {
            [kind, one, two] => {
                let [kind, one, two] = [kind, one, two].map(|word| u64::from_le_bytes(*word));
                Some(match kind {
                    1 => Self::Parcel { bytes: one, runs: two },
                    2 => Self::Ask,
                    3 => Self::End,
                    4 => Self::Answer { scattered: one == 1 },
                    _ => return None,
                })
            }
            _ => None,
        }
    }
}

/// A rollout's terms.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    /// In the order of the trainers.
    pairs: Vec<OfferedPair>,
}

#[derive(Debug, Serialize, Deserialize)]
struct OfferedPair {
    trainer: Rank,
    /// What tells this group from others that the two have been in.
    name: u64,
    /// If the group is a new one.
    id: Option<Bytes>,
    /// The most bytes of a slot.
    slot_bytes: u64,
}

/// This rank's end of a group of two.
#[derive(Debug)]
struct Pair {
    name: u64,
    /// The number of the group, and of the slots that it uses.
    lane: u32,
    /// How many broadcasts this rank has enqueued.
    begun: AtomicU64,
}

impl Pair {
    fn slot(&self, number: u32) -> u32 {
        self.lane * SLOTS + number % SLOTS
    }
}

/// The ends of a rank's groups, and the thread that makes the library's calls.
#[derive(Debug)]
struct Ends<C: Communicator> {
    thread: Thread<C>,
    slots: Arc<dyn Slots>,
    locks: SlotLocks,
    /// What all slots may take together.
    bytes: u64,
    /// The size of a slot at first, and whether it can become larger.
    first: u64,
    enlarges: bool,
    rank: Rank,
    deadline: Duration,
    /// How long a broadcast or a join takes at most.
    limit: Duration,
    /// Fills slots.
    pool: Pool,
    pairs: Mutex<BTreeMap<Rank, Arc<Pair>>>,
}

impl<C: Communicator> Drop for Ends<C> {
    fn drop(&mut self) {
        self.thread.close_later(self.deadline);
    }
}

impl<C: Communicator> Ends<C> {
    async fn open<L>(library: &L, context: &EngineContext, rank: Rank) -> Result<Self>
    where
        L: Library<Communicator = C>,
    {
        let bucket = context.config.bucket_bytes().unwrap_or(library.default_bucket_bytes());
        let (bytes, enlarges) = (bucket.saturating_mul(2), library.enlarges_slots());
        let first = if enlarges { LEAST } else { share(bytes, PAIRS as usize) };
        let shape = Shape { slots: PAIRS * SLOTS, slot_bytes: first };
        let pool = Pool::new(1)?;
        let Opened { thread, slots, .. } = library.open(context, shape, &pool).await?;
        let deadline = context.deadline();
        Ok(Self {
            thread,
            slots,
            locks: SlotLocks::new(shape.slots),
            bytes,
            first,
            enlarges,
            rank,
            deadline,
            limit: deadline / 2,
            pool,
            pairs: Mutex::default(),
        })
    }

    /// Leaves all groups, and ends the thread.
    fn close(&self) -> BoxFuture<'static, ()> {
        let thread = self.thread.clone();
        Box::pin(async move { thread.close().await })
    }

    fn pairs(&self) -> MutexGuard<'_, BTreeMap<Rank, Arc<Pair>>> {
        // Every change is one assignment.
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves the groups with ranks other than these.
    fn keep(&self, ranks: &[Rank]) -> Result<()> {
        self.leave(|rank, _| !ranks.contains(rank))
    }

    /// Leaves the groups with some ranks, and those in which something is under way: a library may be unable to leave one group before it is
    /// over in another. In the others both ends know what comes next, and they stay.
    fn give_up(&self, with: &[Rank]) {
        if let Err(error) = self.leave(|rank, busy| busy || with.contains(rank)) {
            debug!(%error, "groups could not be left");
        }
    }

    /// Leaves those groups for which `leaves` says so, given the rank and whether something is under way.
    fn leave(&self, leaves: impl Fn(&Rank, bool) -> bool) -> Result<()> {
        let mut pairs = self.pairs();
        let lanes: Vec<u32> = pairs.values().map(|pair| pair.lane).collect();
        let ended = self.thread.run_blocking(self.deadline, move |library, _| {
            // Of a group that has failed, something is under way.
            Ok(lanes.into_iter().map(|lane| library.ended(lane as usize).ok()).collect::<Vec<_>>())
        })?;
        let busy = pairs.values().zip(ended).map(|(pair, ended)| {
            ended.is_none_or(|ended| ended < pair.begun.load(Ordering::Relaxed))
        });
        let left: Vec<(Rank, usize)> = pairs
            .iter()
            .zip(busy)
            .filter(|((rank, _), busy)| leaves(rank, *busy))
            .map(|((rank, pair), _)| (*rank, pair.lane as usize))
            .collect();
        left.iter().for_each(|(rank, _)| drop(pairs.remove(rank)));
        drop(pairs);
        if left.is_empty() {
            return Ok(());
        }
        let groups: Vec<usize> = left.into_iter().map(|(_, group)| group).collect();
        self.thread.run_blocking(self.deadline, move |library, _| {
            library.leave_groups(&groups);
            Ok(())
        })
    }

    /// A pair with a rank, in a lane that no other pair has. A pair that it had before is left.
    fn new_pair(&self, with: Rank, name: u64) -> Result<Arc<Pair>> {
        self.leave(|rank, _| *rank == with)?;
        let mut pairs = self.pairs();
        let taken: BTreeSet<u32> = pairs.values().map(|pair| pair.lane).collect();
        let lane = (0..PAIRS).find(|lane| !taken.contains(lane)).ok_or_else(|| {
            let message = format!("a rank has pieces in common with more than {PAIRS} others");
            Error::new(ErrorKind::Resource, USING, message).rank(with)
        })?;
        let pair = Arc::new(Pair { name, lane, begun: AtomicU64::new(0) });
        pairs.insert(with, pair.clone());
        Ok(pair)
    }

    /// Joins the group of a pair, in which this rank has a place.
    fn join(&self, pair: &Pair, id: Bytes, place: u32, with: Rank) -> Result<()> {
        let group = pair.lane as usize;
        debug!(%with, group, "joining a group of two");
        let join = self.thread.run_blocking(self.limit, move |library, wait| {
            library.join(group, &id, 2, place, wait)?;
            library.connect_members(group, wait)
        });
        join.map_err(|error| error.rank(with))
    }

    /// The size of a slot if this rank has so many groups.
    fn slot_bytes(&self, pairs: usize) -> u64 {
        if self.enlarges { share(self.bytes, pairs) } else { self.first }
    }

    /// Makes a pair's slots so large, unless they are larger.
    fn enlarge(&self, pair: &Pair, bytes: u64) -> Result<()> {
        if bytes <= self.first {
            return Ok(());
        }
        (0..SLOTS).try_for_each(|number| {
            block_on(self.slots.enlarge(self.lock(pair.slot(number))?, bytes)).map(drop)
        })
    }

    fn lock(&self, slot: u32) -> Result<SlotGuard> {
        block_on(self.locks.lock(slot)).ok_or_else(|| {
            Error::new(ErrorKind::State, USING, format!("there is no slot {slot}")).rank(self.rank)
        })
    }

    /// Puts parts into a slot, each at an offset that is a multiple of 256.
    fn fill(&self, slot: u32, parts: impl IntoIterator<Item = (u64, Vec<u8>)>) -> Result<()> {
        let jobs = parts.into_iter().map(|(offset, bytes)| {
            let len = bytes.len() as u64;
            let weight = Weight::new("a parcel", DType::U8, [len], bytes)?;
            Ok(Job { weight, start: 0, len, offset })
        });
        let jobs = jobs.collect::<Result<Vec<_>>>()?;
        block_on(self.slots.fill(self.lock(slot)?, jobs, &self.pool, false)).map(drop)
    }

    /// The first bytes of a slot.
    fn view(&self, slot: u32, len: u64) -> Result<Storage> {
        self.slots.view(self.lock(slot)?, len)
    }

    /// Enqueues the broadcast of a part of a slot. Returns its number.
    fn broadcast(&self, pair: &Pair, from: u32, slot: u32, part: Range<u64>) -> Result<u64> {
        let group = pair.lane as usize;
        let begin = move |library: &mut C, wait: &super::Wait<'_>| {
            library.broadcast_from(group, from, slot, part, wait)
        };
        self.thread.run_blocking(self.limit, begin)?;
        Ok(pair.begun.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// How many broadcasts of each of these lanes have ended.
    fn ended(&self, lanes: Vec<u32>) -> Result<Vec<u64>> {
        self.thread.run_blocking(self.limit, move |library, _| {
            lanes.into_iter().map(|lane| library.ended(lane as usize)).collect()
        })
    }

    /// Waits for the end of a broadcast.
    fn wait(&self, pair: &Pair, number: u64, limit: Duration) -> Result<()> {
        let (since, mut looks) = (Instant::now(), 0);
        loop {
            let ended = self.ended(vec![pair.lane])?;
            if ended.first().is_some_and(|ended| *ended >= number) {
                return Ok(());
            }
            if since.elapsed() >= limit {
                let message = format!("nothing within {:.1} s", limit.as_secs_f64());
                return Err(Error::new(ErrorKind::Timeout, USING, message));
            }
            pause(&mut looks);
        }
    }
}

/// The size of each slot of so many groups that together have so many bytes.
fn share(bytes: u64, pairs: usize) -> u64 {
    let slots = pairs.max(1) as u64 * u64::from(SLOTS);
    (bytes / slots).clamp(LEAST, ENOUGH) / ALIGNMENT * ALIGNMENT
}

/// The most bytes of a parcel in a slot of this size: a multiple of 256 that leaves room for its head and its runs.
fn parcel_bytes(slot_bytes: u64) -> u64 {
    let bytes = slot_bytes.saturating_sub((RUNS * Run::BYTES) as u64);
    (bytes / ALIGNMENT * ALIGNMENT).saturating_sub(ALIGNMENT)
}

fn pause(looks: &mut u32) {
    *looks = looks.saturating_add(1);
    if *looks < SPINS { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
}

/// A trainer's end of a group while it may write.
#[derive(Debug)]
struct ToRollout<C: Communicator> {
    ends: Arc<Ends<C>>,
    rollout: Rank,
    pair: Arc<Pair>,
    /// The most bytes of a slot.
    slot_bytes: u64,
    state: Mutex<Sent>,
}

#[derive(Debug, Default)]
struct Sent {
    /// How many heads were sent.
    heads: u32,
    /// The last broadcast of each slot.
    last: [u64; SLOTS as usize],
    /// Whether something has failed. Then the other end does not know what comes next.
    failed: bool,
}

impl<C: Communicator> ToRollout<C> {
    fn say(&self, work: impl FnOnce(&mut Sent) -> Result<()>) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let done = match state.failed {
            false => work(&mut state),
            true => {
                let message = "the group has failed";
                Err(Error::new(ErrorKind::PeerLost, USING, message))
            }
        };
        state.failed |= done.is_err();
        done.map_err(|error| error.rank(self.rollout))
    }

    /// Sends a head, and of the next slot so many bytes, which `fill` puts there. Returns the slot.
    fn send(
        &self,
        state: &mut Sent,
        len: u64,
        limit: Duration,
        fill: impl FnOnce(u32) -> Result<()>,
    ) -> Result<u32> {
        let (Self { ends, pair, .. }, number) = (self, state.heads % SLOTS);
        let slot = pair.slot(number);
        ends.wait(pair, state.last[number as usize], limit)?;
        fill(slot)?;
        state.heads = state.heads.wrapping_add(1);
        let mut last = ends.broadcast(pair, TRAINER, slot, 0..HEAD as u64)?;
        if len > HEAD as u64 {
            last = ends.broadcast(pair, TRAINER, slot, HEAD as u64..len)?;
        }
        state.last[number as usize] = last;
        Ok(slot)
    }

    /// Sends a head with nothing behind it.
    fn send_head(&self, state: &mut Sent, head: Head, limit: Duration) -> Result<u32> {
        let fill = |slot| self.ends.fill(slot, [(0, head.to_bytes().to_vec())]);
        self.send(state, HEAD as u64, limit, fill)
    }

    /// Sends a parcel. `fill` is given a slot, the number of the parcel's bytes, the head, and the runs with their place. It puts all of them
    /// into the slot.
    fn send_parcel(
        &self,
        runs: &[Run],
        fill: impl FnOnce(u32, u64, Head, (u64, Vec<u8>)) -> Result<()>,
    ) -> Result<()> {
        let bytes = Run::all_bytes(runs);
        let head = Head::Parcel { bytes, runs: runs.len() as u64 };
        let runs: Vec<u8> = runs.iter().flat_map(|run| run.to_bytes()).collect();
        let at = runs_at(bytes).ok_or_else(|| {
            let message = format!("a parcel of {bytes} bytes");
            Error::new(ErrorKind::State, USING, message)
        })?;
        let len = at + runs.len() as u64;
        let fill = |slot| fill(slot, bytes, head, (at, runs));
        self.say(|state| self.send(state, len, self.ends.limit, fill).map(drop))
    }
}

impl<C: Communicator> Carrier for ToRollout<C> {
    type Room = Buffer;

    fn room(&self) -> Result<Buffer> {
        Ok(Buffer(vec![0; HEAD + parcel_bytes(self.slot_bytes) as usize]))
    }

    fn send(&self, room: Buffer, runs: &[Run]) -> Result<()> {
        let Buffer(mut all) = room;
        self.send_parcel(runs, |slot, bytes, head, runs| {
            all.truncate(HEAD + bytes as usize);
            all[..HEAD].copy_from_slice(&head.to_bytes());
            self.ends.fill(slot, [(0, all), runs])
        })
    }

    fn wait(&self) -> Result<()> {
        self.say(|state| {
            let (ends, pair) = (&self.ends, &*self.pair);
            let slot = self.send_head(state, Head::Ask, ends.limit)?;
            let answer = ends.broadcast(pair, ROLLOUT, slot, 0..HEAD as u64)?;
            ends.wait(pair, answer, ends.limit)?;
            let answer = ends.view(slot, HEAD as u64)?.to_host()?;
            match Head::of(&answer) {
                Some(Head::Answer { scattered: true }) => Ok(()),
                Some(Head::Answer { scattered: false }) => {
                    let message = "the rollout has refused a parcel, whose bytes are not for it";
                    Err(Error::new(ErrorKind::Protocol, USING, message))
                }
                _ => Err(Error::new(ErrorKind::Protocol, USING, "it answers something else")),
            }
        })
    }
}

impl<C: Communicator> Drop for ToRollout<C> {
    fn drop(&mut self) {
        let limit = GRACE.min(self.ends.limit);
        let ended = self.say(|state| {
            self.send_head(state, Head::End, limit)?;
            let last = self.pair.begun.load(Ordering::Relaxed);
            self.ends.wait(&self.pair, last, limit)
        });
        if let Err(error) = ended {
            debug!(%error, "the group with a rollout is given up");
            self.ends.give_up(&[self.rollout]);
        }
    }
}

/// A parcel that is being filled, behind room for its head.
#[derive(Debug)]
struct Buffer(Vec<u8>);

impl Room for Buffer {
    fn len(&self) -> usize {
        self.0.len() - HEAD
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.0[HEAD + at..HEAD + at + bytes.len()].copy_from_slice(bytes);
    }
}

/// A rollout's tensors at a trainer, while it may write there.
#[derive(Debug)]
pub struct ParcelsTo<C: Communicator>(Packing<ToRollout<C>>);

impl<C: Communicator> ParcelsTo<C> {
    /// The rollout.
    pub fn rank(&self) -> Rank {
        self.0.carrier().rollout
    }

    /// Whether parcels still get there.
    ///
    /// # Errors
    ///
    /// `PeerLost` after a failure.
    pub fn check(&self) -> Result<()> {
        self.0.carrier().say(|_| Ok(()))
    }

    /// Sends runs of this rank's memory. `gather` copies the runs of a parcel to the memory of its slot, one behind the other, and returns when
    /// they are there.
    ///
    /// # Errors
    ///
    /// Those of `gather` and of the library, which name the rollout.
    pub fn carry(
        &self,
        runs: &[Gathered],
        gather: impl Fn(&[Gathered], &Storage) -> Result<()>,
    ) -> Result<()> {
        let carrier = self.0.carrier();
        let ends = &carrier.ends;
        cut(runs, parcel_bytes(carrier.slot_bytes)).iter().try_for_each(|parcel| {
            let runs: Vec<Run> = parcel.iter().map(|gathered| gathered.run).collect();
            carrier.send_parcel(&runs, |slot, bytes, head, runs| {
                ends.fill(slot, [(0, head.to_bytes().to_vec()), runs])?;
                let end = HEAD as u64 + bytes;
                gather(parcel, &ends.view(slot, end)?.slice(HEAD as u64..end))
            })
        })
    }

    /// Waits until the rollout has scattered all parcels.
    ///
    /// # Errors
    ///
    /// `Protocol` if it has refused one; those of the library. All name the rollout.
    pub fn arrived(&self) -> Result<()> {
        self.0.carrier().wait()
    }
}

impl<C: Communicator> Reached for ParcelsTo<C> {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.0.put(at, bytes)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
}

/// How a trainer reaches rollouts.
#[derive(Debug)]
struct Broadcasts<C: Communicator> {
    ends: Arc<Ends<C>>,
    encoder: Option<Box<dyn Encoder>>,
}

impl<C: Communicator> Reach for Broadcasts<C> {
    fn reach(&self, terms: &[(Rank, Bytes)]) -> Result<Vec<Arc<dyn Reached>>> {
        let ends = &self.ends;
        let ranks: Vec<Rank> = terms.iter().map(|(rank, _)| *rank).collect();
        ends.keep(&ranks)?;
        // In the order in which all ranks join.
        let mut reached: BTreeMap<Rank, Arc<dyn Reached>> = BTreeMap::new();
        let mut offers = BTreeMap::new();
        for (rank, terms) in terms {
            let offer: Offer = decode(terms).map_err(|error| error.rank(*rank))?;
            let own = offer.pairs.into_iter().find(|pair| pair.trainer == ends.rank);
            let own = own.ok_or_else(|| {
                let message = "its terms are for other trainers";
                Error::new(ErrorKind::Protocol, USING, message).rank(*rank)
            })?;
            offers.insert(*rank, own);
        }
        let own_bytes = ends.slot_bytes(terms.len());
        for (rollout, OfferedPair { name, id, slot_bytes, .. }) in offers {
            let slot_bytes = slot_bytes.min(own_bytes);
            if slot_bytes < LEAST {
                let message = format!("its slots have {slot_bytes} bytes");
                return Err(Error::new(ErrorKind::Protocol, USING, message).rank(rollout));
            }
            let known = ends.pairs().get(&rollout).filter(|pair| pair.name == name).cloned();
            let pair = match (known, id) {
                (Some(pair), None) => pair,
                (_, Some(id)) => {
                    let pair = ends.new_pair(rollout, name)?;
                    if let Err(error) = ends.join(&pair, id, TRAINER, rollout) {
                        ends.give_up(&[rollout]);
                        return Err(error);
                    }
                    pair
                }
                (None, None) => {
                    let message =
                        "the group with it has failed here: the next update forms another";
                    return Err(Error::new(ErrorKind::PeerLost, USING, message).rank(rollout));
                }
            };
            ends.enlarge(&pair, slot_bytes)?;
            let state = Mutex::default();
            let to = ToRollout { ends: ends.clone(), rollout, pair, slot_bytes, state };
            reached.insert(rollout, Arc::new(ParcelsTo(Packing::new(to))));
        }
        let found = terms.iter().filter_map(|(rank, _)| reached.get(rank).cloned());
        Ok(found.collect())
    }

    fn encoder(&self) -> Option<&dyn Encoder> {
        self.encoder.as_deref()
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.ends.close()
    }
}

/// A rollout's tensors, to which trainers broadcast.
#[derive(Debug)]
struct LentTensors<C: Communicator> {
    ends: Arc<Ends<C>>,
    memory: Arc<dyn Tensors>,
    taking: Option<Taking>,
}

/// The thread that takes parcels.
#[derive(Debug)]
struct Taking {
    /// Whether the tensors are to be taken back.
    closing: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl<C: Communicator> LentTensors<C> {
    fn require_own(&self) -> Result<()> {
        match self.taking {
            None => Ok(()),
            Some(_) => {
                let message = "the tensors are lent: trainers may write to them";
                Err(Error::new(ErrorKind::State, "using what is lent", message))
            }
        }
    }
}

impl<C: Communicator> Lender for LentTensors<C> {
    fn len(&self) -> u64 {
        self.memory.len()
    }

    fn lend(&mut self, to: &[Rank]) -> Result<Bytes> {
        self.require_own()?;
        let ends = &self.ends;
        ends.keep(to)?;
        let new: Vec<Rank> =
            to.iter().filter(|rank| !ends.pairs().contains_key(rank)).copied().collect();
        let count = new.len();
        let make = move |library: &mut C, _: &super::Wait<'_>| library.new_groups(count);
        let ids = if count > 0 { ends.thread.run_blocking(ends.limit, make)? } else { Vec::new() };
        let mut ids: BTreeMap<Rank, Bytes> = new.into_iter().zip(ids).collect();
        let (mut offered, mut froms) = (Vec::new(), Vec::new());
        let slot_bytes = ends.slot_bytes(to.len());
        for trainer in to.iter().copied() {
            let id = ids.remove(&trainer);
            let known = ends.pairs().get(&trainer).cloned();
            let pair = match (known, &id) {
                (Some(pair), None) => pair,
                (_, id) => {
                    let name = digest::sum(0, id.as_deref().unwrap_or_default());
                    ends.new_pair(trainer, name)?
                }
            };
            ends.enlarge(&pair, slot_bytes)?;
            offered.push(OfferedPair { trainer, name: pair.name, id: id.clone(), slot_bytes });
            let step = Step::Head { slot: 0 };
            froms.push(FromTrainer { trainer, pair, id, slot_bytes, step, until: 0 });
        }
        let terms = encode(&Offer { pairs: offered })?;
        let closing = Arc::new(AtomicBool::new(false));
        let taker = Taker {
            ends: ends.clone(),
            memory: self.memory.clone(),
            closing: closing.clone(),
            refused: BTreeSet::new(),
        };
        let thread = std::thread::Builder::new()
            .name("ckpt-parcels".into())
            .spawn(move || taker.run(froms))
            .map_err(|error| {
                let message = format!("no thread to take parcels: {error}");
                Error::new(ErrorKind::Resource, "lending tensors", message).with_source(error)
            })?;
        self.taking = Some(Taking { closing, thread });
        Ok(terms)
    }

    fn take_back(&mut self) -> Result<bool> {
        if let Some(Taking { closing, thread }) = &self.taking {
            closing.store(true, Ordering::Release);
            if thread.is_finished() {
                self.taking = None;
            }
        }
        Ok(self.taking.is_none())
    }

    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>> {
        self.require_own()?;
        self.memory.bytes(at, len)
    }

    fn sums(
        &self,
        pieces: &[&Arc<[StridedPart]>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        self.memory.sums(pieces, step)
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.ends.close()
    }
}

impl<C: Communicator> Drop for LentTensors<C> {
    fn drop(&mut self) {
        if let Some(Taking { closing, thread }) = self.taking.take() {
            closing.store(true, Ordering::Release);
            // The tensors are the program's again.
            if thread.join().is_err() {
                warn!("the thread that takes parcels has panicked");
            }
        }
    }
}

/// A rollout's end of a group while its tensors are lent.
#[derive(Debug)]
struct FromTrainer {
    trainer: Rank,
    pair: Arc<Pair>,
    /// If the group is a new one.
    id: Option<Bytes>,
    /// The most bytes of a slot.
    slot_bytes: u64,
    step: Step,
    /// The broadcast that it waits for.
    until: u64,
}

/// What a rollout waits for.
#[derive(Clone, Copy, Debug)]
enum Step {
    Head {
        slot: u32,
    },
    Parcel {
        slot: u32,
        bytes: u64,
        runs: u64,
    },
    /// The trainer takes the answer.
    Answered {
        slot: u32,
    },
    Ended,
}

#[derive(Debug)]
struct Taker<C: Communicator> {
    ends: Arc<Ends<C>>,
    memory: Arc<dyn Tensors>,
    closing: Arc<AtomicBool>,
    /// The lanes of which a parcel was refused.
    refused: BTreeSet<u32>,
}

impl<C: Communicator> Taker<C> {
    fn run(mut self, mut froms: Vec<FromTrainer>) {
        if let Err(error) = self.take(&mut froms) {
            let open = froms.iter().filter(|from| !matches!(from.step, Step::Ended));
            let open: Vec<Rank> = open.map(|from| from.trainer).collect();
            match error.kind() {
                ErrorKind::Aborted => debug!(%error, ?open, "groups with trainers are given up"),
                _ => warn!(%error, ?open, "groups with trainers are given up"),
            }
            self.ends.give_up(&open);
        }
    }

    /// Takes parcels until all trainers have said that nothing comes any more.
    fn take(&mut self, froms: &mut [FromTrainer]) -> Result<()> {
        for from in froms.iter_mut() {
            if let Some(id) = from.id.take() {
                self.ends.join(&from.pair, id, ROLLOUT, from.trainer)?;
            }
        }
        for from in froms.iter_mut() {
            self.expect_head(from, 0)?;
        }
        let (mut closing, mut looks) = (None, 0);
        loop {
            let open = froms.iter_mut().filter(|from| !matches!(from.step, Step::Ended));
            let mut open: Vec<&mut FromTrainer> = open.collect();
            if open.is_empty() {
                return Ok(());
            }
            let ended = self.ends.ended(open.iter().map(|from| from.pair.lane).collect())?;
            let mut came = false;
            for (from, ended) in open.iter_mut().zip(ended) {
                if ended >= from.until {
                    came = true;
                    self.advance(from).map_err(|error| error.rank(from.trainer))?;
                }
            }
            if self.closing.load(Ordering::Acquire) {
                let since = *closing.get_or_insert_with(Instant::now);
                if since.elapsed() >= GRACE.min(self.ends.deadline / 8) {
                    let message = "the update has ended, and a trainer has not said so";
                    return Err(Error::new(ErrorKind::Aborted, USING, message));
                }
            }
            if came { looks = 0 } else { pause(&mut looks) }
        }
    }

    fn expect_head(&self, from: &mut FromTrainer, number: u32) -> Result<()> {
        let slot = from.pair.slot(number);
        from.until = self.ends.broadcast(&from.pair, TRAINER, slot, 0..HEAD as u64)?;
        from.step = Step::Head { slot };
        Ok(())
    }

    fn advance(&mut self, from: &mut FromTrainer) -> Result<()> {
        let ends = &self.ends;
        let broken = |message| Error::new(ErrorKind::Protocol, USING, message);
        match from.step {
            Step::Head { slot } => {
                let head = ends.view(slot, HEAD as u64)?.to_host()?;
                match Head::of(&head) {
                    Some(Head::Parcel { bytes, runs }) => {
                        let all = runs.checked_mul(Run::BYTES as u64);
                        let all = all.and_then(|all| runs_at(bytes)?.checked_add(all));
                        let end = all.filter(|end| *end <= from.slot_bytes && *end > HEAD as u64);
                        let end = end.ok_or_else(|| broken("a parcel of another size"))?;
                        let part = HEAD as u64..end;
                        from.until = ends.broadcast(&from.pair, TRAINER, slot, part)?;
                        from.step = Step::Parcel { slot, bytes, runs };
                        Ok(())
                    }
                    Some(Head::Ask) => {
                        let scattered = !self.refused.contains(&from.pair.lane);
                        ends.fill(slot, [(0, Head::Answer { scattered }.to_bytes().to_vec())])?;
                        from.until = ends.broadcast(&from.pair, ROLLOUT, slot, 0..HEAD as u64)?;
                        from.step = Step::Answered { slot };
                        Ok(())
                    }
                    Some(Head::End) => {
                        from.step = Step::Ended;
                        Ok(())
                    }
                    Some(Head::Answer { .. }) | None => Err(broken("it sends something else")),
                }
            }
            Step::Parcel { slot, bytes, runs } => {
                // The next one comes to the other slot meanwhile.
                self.expect_head(from, slot + 1)?;
                let (start, end) = (HEAD as u64, HEAD as u64 + bytes);
                let at = runs_at(bytes).unwrap_or(end);
                let all = self.ends.view(slot, at + runs * Run::BYTES as u64)?;
                let runs = all.slice(at..all.len()).to_host()?;
                let runs: Vec<Run> = runs.as_chunks().0.iter().map(Run::of_bytes).collect();
                if let Err(error) = self.memory.scatter(&runs, &all.slice(start..end)) {
                    warn!(%error, trainer = %from.trainer, "a parcel is refused");
                    self.refused.insert(from.pair.lane);
                }
                Ok(())
            }
            Step::Answered { slot } => self.expect_head(from, slot + 1),
            Step::Ended => Ok(()),
        }
    }
}

/// Prepares a trainer of placed updates over a library. The CPU encodes what `encoder` does not take.
///
/// # Errors
///
/// `Config` without a control plane; those of [`Library::open`].
pub async fn prepare_placed_trainer<L: Library>(
    library: L,
    context: EngineContext,
    encoder: Option<Box<dyn Encoder>>,
) -> Result<PreparedTrainer> {
    let rank = context.require_control()?.rank();
    let ends = Ends::open(&library, &context, rank).await?;
    let reach = Broadcasts { ends: Arc::new(ends), encoder };
    ::placed::prepare_trainer(library.name(), context, Arc::new(reach))
}

/// Prepares a rollout of placed updates over a library, whose tensors have this layout. The library is opened when it joins its group.
///
/// # Errors
///
/// `Config` without a control plane.
pub fn prepare_placed_rollout<L: Library>(
    library: L,
    context: EngineContext,
    layout: Layout,
    tensors: Arc<dyn Tensors>,
) -> Result<Prepared<PlacedRollout>> {
    let rank = context.require_control()?.rank();
    let (name, own) = (library.name(), context.clone());
    let memory = async move {
        let ends = Arc::new(Ends::open(&library, &own, rank).await?);
        Ok(Box::new(LentTensors { ends, memory: tensors, taking: None }) as Box<dyn Lender>)
    };
    ::placed::prepare_rollout(name, context, layout, memory)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_head_is_read_as_it_was_written_and_other_bytes_are_none(
            bytes in 0_u64.., runs in 0_u64.., scattered in any::<bool>(),
        ) {
            for head in [Head::Parcel { bytes, runs }, Head::Ask, Head::End, Head::Answer { scattered }] {
                prop_assert_eq!(Head::of(&head.to_bytes()), Some(head));
            }
            prop_assert_eq!(Head::of(&[0; HEAD]), None);
        }

        #[test]
        fn arbitrary_bytes_are_terms_or_heads_or_not_but_never_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            drop(decode::<Offer>(&bytes));
            let _ = Head::of(&bytes);
        }
    }

    proptest! {
        #[test]
        fn slots_of_all_groups_have_together_what_they_may_have_and_parcels_fit_them(
            bytes in 0_u64..1 << 40, pairs in 0_usize..=PAIRS as usize,
        ) {
            let each = share(bytes, pairs);
            prop_assert!((LEAST..=ENOUGH).contains(&each) && each.is_multiple_of(ALIGNMENT));
            prop_assert!(each == LEAST || each * pairs as u64 * u64::from(SLOTS) <= bytes);
            let most = parcel_bytes(each);
            prop_assert!(most > 0 && most.is_multiple_of(256));
            let end = runs_at(most).unwrap() + (RUNS * Run::BYTES) as u64;
            prop_assert!(end <= each);
        }
    }

    /// In each of its groups as many broadcasts have ended as it is told.
    #[derive(Debug, Default)]
    struct Fake {
        ended: BTreeMap<usize, u64>,
        left: Vec<usize>,
        /// Clones of it are gone when the library is.
        _kept: Arc<()>,
    }

    impl Communicator for Fake {
        fn new_group(&mut self) -> Result<Bytes> {
            Ok(Bytes::new())
        }

        fn join(
            &mut self,
            group: usize,
            _: &[u8],
            _: u32,
            _: u32,
            _: &super::super::Wait<'_>,
        ) -> Result<()> {
            self.ended.insert(group, 0);
            Ok(())
        }

        fn shrink(&mut self, _: usize, _: &[u32], _: &super::super::Wait<'_>) -> Result<()> {
            Ok(())
        }

        fn broadcast(
            &mut self,
            _: usize,
            _: u32,
            _: u64,
            _: &super::super::Wait<'_>,
        ) -> Result<()> {
            Ok(())
        }

        fn ended(&mut self, group: usize) -> Result<u64> {
            let failed = || Error::new(ErrorKind::Backend, "looking", "it has failed");
            self.ended.get(&group).copied().ok_or_else(failed)
        }

        fn leave_groups(&mut self, groups: &[usize]) {
            self.left.extend(groups);
        }

        fn leave(&mut self) {}
    }

    #[derive(Debug)]
    struct NoSlots;

    #[async_trait]
    impl Slots for NoSlots {
        async fn fill(&self, _: SlotGuard, _: Vec<Job>, _: &Pool, _: bool) -> Result<u64> {
            Ok(0)
        }

        fn view(&self, _: SlotGuard, _: u64) -> Result<Storage> {
            Ok(Storage::from(Vec::new()))
        }
    }

    async fn ends(library: Fake) -> Ends<Fake> {
        let deadline = Duration::from_secs(10);
        Ends {
            thread: Thread::start("test", || Ok(library)).await.unwrap(),
            slots: Arc::new(NoSlots),
            locks: SlotLocks::new(PAIRS * SLOTS),
            bytes: 0,
            first: LEAST,
            enlarges: false,
            rank: Rank(0),
            deadline,
            limit: deadline,
            pool: Pool::new(1).unwrap(),
            pairs: Mutex::default(),
        }
    }

    fn joined(ends: &Ends<Fake>, with: u32) -> Arc<Pair> {
        let pair = ends.new_pair(Rank(with), u64::from(with)).unwrap();
        ends.join(&pair, Bytes::new(), TRAINER, Rank(with)).unwrap();
        pair
    }

    #[tokio::test]
    async fn a_rank_leaves_the_groups_that_have_failed_or_are_in_use_and_keeps_the_others() {
        let ends = ends(Fake::default()).await;
        let pairs: Vec<_> = (1..=4).map(|with| joined(&ends, with)).collect();
        // In the second one something is under way, and the fourth one has failed in the library.
        ends.broadcast(&pairs[1], ROLLOUT, 0, 0..1).unwrap();
        let fails = |library: &mut Fake, _: &super::super::Wait<'_>| Ok(library.ended.remove(&3));
        ends.thread.run_blocking(ends.limit, fails).unwrap();
        ends.give_up(&[Rank(1)]);
        let left =
            |library: &mut Fake, _: &super::super::Wait<'_>| Ok(std::mem::take(&mut library.left));
        assert_eq!(ends.thread.run_blocking(ends.limit, left).unwrap(), [0, 1, 3]);
        assert!(ends.pairs().keys().eq([&Rank(3)]));
        // A group with another rank is in the place of one that was left.
        assert_eq!(joined(&ends, 5).lane, 0);
        ends.keep(&[Rank(5)]).unwrap();
        assert_eq!(ends.thread.run_blocking(ends.limit, left).unwrap(), [2]);
    }

    #[tokio::test]
    async fn ends_that_are_closed_have_freed_the_library_also_while_somebody_has_them() {
        let kept = Arc::new(());
        let library = Fake { _kept: kept.clone(), ..Fake::default() };
        let ends = Arc::new(ends(library).await);
        assert_eq!(Arc::strong_count(&kept), 2);
        Broadcasts { ends: ends.clone(), encoder: None }.close().await;
        assert_eq!(Arc::strong_count(&kept), 1);
        assert_eq!(ends.ended(vec![0]).unwrap_err().kind(), ErrorKind::State);
        // Both sides may have it closed.
        ends.close().await;
    }

    #[tokio::test]
    async fn more_groups_than_a_rank_has_slots_for_are_an_error_that_names_the_other_rank() {
        let ends = ends(Fake::default()).await;
        for with in 1..=PAIRS {
            joined(&ends, with);
        }
        let error = ends.new_pair(Rank(77), 77).unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::Resource, Some(Rank(77))));
        assert!(error.to_string().contains("more than 24"), "{error}");
    }
}

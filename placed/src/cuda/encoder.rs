//! Weights on a trainer's device: encoded there, and carried from there.
//!
//! A piece is encoded into memory of this device that stands in for the rollout's ([`windows`](super::windows)), so kernels, bytes and
//! digests are those of memory that they reach. While one half of that memory is being carried to rollouts, the other is filled.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use device_cuda::{CudaMemory, CudaSpace, Device};
use engine_core::{Error, ErrorKind, Rank, Result, Weight};
use quant_fp8::{Fp8Format, SourceType, StridedPart};

use super::CudaKernels;
use super::windows::{Windows, elements_of};
use crate::memory::{Encoded, Encoder, Reached, Written};
use crate::parcels::Gathered;

/// Bytes of pieces that are encoded at a time, unless one is larger.
const CHUNK: u64 = 256 << 20;

/// The least memory of a half.
const LEAST: usize = 1 << 20;

/// Chunks whose places are kept for the next update. More are those of other plans.
const CHUNKS: usize = 4096;

/// How often a trainer that waits looks whether it still should.
const LOOK: Duration = Duration::from_millis(20);

const WRITING: &str = "writing tensors";

/// How a transport carries what a trainer has encoded in its own memory to rollouts.
pub trait Carries: fmt::Debug + Send + Sync {
    /// A rollout's memory while this trainer may write there.
    type Target: fmt::Debug;
    /// Memory that is carried from, as the transport knows it.
    type Memory: fmt::Debug + Send;

    /// The target of what a trainer reaches; `None` if it is none of this transport's, or if nothing is carried there from a device.
    fn target<'a>(&self, to: &'a dyn Reached) -> Option<&'a Self::Target>;

    /// The rollout.
    fn rank(&self, target: &Self::Target) -> Rank;

    /// Whether bytes may still arrive there.
    ///
    /// # Errors
    ///
    /// What was found to be wrong with the target.
    fn check(&self, target: &Self::Target) -> Result<()>;

    /// Makes memory known to the transport.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn memory(&self, memory: &CudaMemory) -> Result<Self::Memory>;

    /// Begins to carry runs. `reads` makes what is held as long as the memory is read.
    ///
    /// # Errors
    ///
    /// Those of the transport, which name the rollout.
    fn carry(
        &self,
        target: &Self::Target,
        memory: &Self::Memory,
        runs: &[Gathered],
        reads: &dyn Fn() -> Reads,
    ) -> Result<()>;

    /// Returns when all that was carried to a target is there. By then nothing reads the memory any more.
    ///
    /// # Errors
    ///
    /// As [`carry`](Self::carry).
    fn arrived(&self, target: &Self::Target) -> Result<()>;
}

/// Encodes weights of a device in memory of this device, from which a transport carries them.
#[derive(Debug)]
pub struct WindowEncoder<C: Carries> {
    carries: C,
    kernels: CudaKernels,
    /// How long nothing of what reads a half may end.
    limit: Duration,
    state: Mutex<State<C>>,
}

#[derive(Debug)]
struct State<C: Carries> {
    /// Made when they are needed.
    halves: [Option<Half<C>>; 2],
    /// By their first piece: its rollout, and the address of its parts.
    chunks: HashMap<(Rank, usize), Arc<Chunk>>,
}

/// Half of the memory that pieces are encoded into.
#[derive(Debug)]
struct Half<C: Carries> {
    all: CudaMemory,
    known: C::Memory,
    reading: Arc<Reading>,
}

/// What reads a half.
#[derive(Debug, Default)]
struct Reading {
    count: Mutex<u64>,
    changed: Condvar,
}

/// Something reads a half as long as this lives.
#[derive(Debug)]
pub struct Reads(Arc<Reading>);

/// Where the pieces of a chunk are.
#[derive(Debug)]
struct Chunk {
    /// The rollout and the parts of each piece.
    pieces: Vec<(Rank, Arc<[StridedPart]>)>,
    /// The address of the half that they are in.
    half: u64,
    /// What stands in for the memory of each rollout, and the runs that go there.
    of_rollouts: Vec<(Rank, CudaSpace, Vec<Gathered>)>,
}

impl Reading {
    fn lock(&self) -> MutexGuard<'_, u64> {
        // Each change is one assignment.
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>) -> Reads {
        *self.lock() += 1;
        Reads(self.clone())
    }

    fn is_idle(&self) -> bool {
        *self.lock() == 0
    }

    /// Waits until nothing reads the half, as long as a read ends within `limit`.
    ///
    /// # Errors
    ///
    /// Those of `check`; `Timeout` if no read ends.
    fn wait(&self, limit: Duration, mut check: impl FnMut() -> Result<()>) -> Result<()> {
        let mut count = self.lock();
        let (mut last, mut since) = (*count, Instant::now());
        // The transport gives up earlier, and says to which rollout.
        let limit = limit + limit / 8;
        loop {
            check()?;
            if *count == 0 {
                return Ok(());
            }
            if std::mem::replace(&mut last, *count) != *count {
                since = Instant::now();
            } else if since.elapsed() >= limit {
                let message = format!("nothing within {:.1} s", limit.as_secs_f64());
                return Err(Error::new(ErrorKind::Timeout, WRITING, message));
            }
            let waited = self.changed.wait_timeout(count, LOOK);
            count = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Reads {
    fn drop(&mut self) {
        let mut count = self.0.lock();
        *count = count.saturating_sub(1);
        drop(count);
        self.0.changed.notify_all();
    }
}

impl<C: Carries> Half<C> {
    fn new(device: &Device, bytes: usize, carries: &C) -> Result<Self> {
        let all = CudaMemory::new(device, bytes)?;
        let known = carries.memory(&all)?;
        Ok(Self { all, known, reading: Arc::default() })
    }
}

impl<C: Carries> WindowEncoder<C> {
    /// Encodes with the kernels of this device. `limit` is how long nothing of what was carried may arrive.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub fn new(device: &Device, carries: C, limit: Duration) -> Result<Self> {
        let state = State { halves: [None, None], chunks: HashMap::new() };
        let (kernels, state) = (CudaKernels::new(device)?, Mutex::new(state));
        Ok(Self { carries, kernels, limit, state })
    }

    fn target_of<'a>(&self, piece: &Encoded<'a>) -> Result<&'a C::Target> {
        self.carries.target(piece.to).ok_or_else(|| {
            let message = "its place is not one that this transport writes to";
            Error::new(ErrorKind::State, WRITING, message).tensor(piece.weight.name())
        })
    }

    /// Waits until nothing reads a half.
    fn wait(
        &self,
        half: Option<&Half<C>>,
        target: &C::Target,
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let Some(half) = half else { return Ok(()) };
        half.reading.wait(self.limit, || {
            step()?;
            self.carries.check(target)
        })
    }
}

impl<C: Carries> Encoder for WindowEncoder<C> {
    fn takes(&self, weight: &Weight, format: Option<&Fp8Format>) -> bool {
        self.kernels.takes(weight, format)
    }

    fn writes_to(&self, to: &dyn Reached, _: &[u64]) -> bool {
        self.carries.target(to).is_some()
    }

    fn maxima(&self, parts: &[(&Weight, SourceType, &StridedPart)]) -> Result<Vec<Vec<u32>>> {
        self.kernels.maxima(parts)
    }

    /// When it returns without an error, all pieces are there.
    fn write(
        &self,
        pieces: &[Encoded<'_>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Written> {
        let Some(first) = pieces.first() else { return Ok(Written::default()) };
        // A failure of one target fails all.
        let first = self.target_of(first)?;
        // What a panic has left is made anew: halves that are read, and chunks that are not the same.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for half in &mut state.halves {
            // What reads it since an update that failed may do so as long as it likes.
            if let Some(read) = half.take_if(|half| !half.reading.is_idle()) {
                let bytes = read.all.len();
                *half = Some(Half::new(self.kernels.device(), bytes, &self.carries)?);
            }
        }
        let (mut sums, mut begin) = (Vec::with_capacity(pieces.len()), 0);
        let mut reached: Vec<&C::Target> = Vec::new();
        for turn in 0.. {
            let Some(rest) = pieces.get(begin..).filter(|rest| !rest.is_empty()) else { break };
            let some = &rest[..fitting(rest)];
            let targets =
                some.iter().map(|piece| self.target_of(piece)).collect::<Result<Vec<_>>>()?;
            let ranks: Vec<Rank> = targets.iter().map(|target| self.carries.rank(target)).collect();
            self.wait(state.halves[turn % 2].as_ref(), first, step)?;
            let chunk = self.chunk(&mut state, turn % 2, some, &ranks)?;
            let of = |rank: &Rank| chunk.of_rollouts.iter().find(|(of, _, _)| of == rank);
            let jobs = some.iter().zip(&ranks);
            let jobs =
                jobs.filter_map(|(piece, rank)| of(rank).map(|(_, space, _)| (piece, space)));
            let written = self.kernels.write(&jobs.collect::<Vec<_>>(), step)?;
            if let Some((number, block)) = written.failed {
                return Ok(Written { sums, failed: Some((begin + number, block)) });
            }
            sums.extend(written.sums);
            if let Some(half) = &state.halves[turn % 2] {
                let reads = || half.reading.begin();
                for (rank, _, runs) in &chunk.of_rollouts {
                    let target = ranks.iter().position(|of| of == rank).map(|at| targets[at]);
                    let Some(target) = target else { continue };
                    self.carries.carry(target, &half.known, runs, &reads)?;
                    if !reached.iter().any(|known| self.carries.rank(known) == *rank) {
                        reached.push(target);
                    }
                }
            }
            begin += some.len();
        }
        // Whoever hears of these pieces compares them.
        for half in &state.halves {
            self.wait(half.as_ref(), first, step)?;
        }
        reached.iter().try_for_each(|target| self.carries.arrived(target))?;
        Ok(Written { sums, failed: None })
    }
}

impl<C: Carries> WindowEncoder<C> {
    /// The places of pieces in a half, which nothing reads any more. The ranks are those of their rollouts.
    fn chunk(
        &self,
        state: &mut State<C>,
        half: usize,
        pieces: &[Encoded<'_>],
        ranks: &[Rank],
    ) -> Result<Arc<Chunk>> {
        let Some((first, rank)) = pieces.first().zip(ranks.first()) else {
            return Err(Error::new(ErrorKind::State, WRITING, "there are no pieces"));
        };
        let key = (*rank, Arc::as_ptr(first.parts).addr());
        let address = state.halves[half].as_ref().map(|half| half.all.address());
        let is_it = |chunk: &Chunk| {
            let same = pieces.iter().zip(ranks).zip(&chunk.pieces);
            Some(chunk.half) == address
                && chunk.pieces.len() == pieces.len()
                && same.into_iter().all(|((piece, rank), (known, parts))| {
                    rank == known && Arc::ptr_eq(parts, piece.parts)
                })
        };
        if let Some(known) = state.chunks.get(&key).filter(|chunk| is_it(chunk)) {
            return Ok(known.clone());
        }
        if state.chunks.len() >= CHUNKS {
            state.chunks.clear();
        }
        let chunk = Arc::new(self.lay_out(&mut state.halves[half], pieces, ranks)?);
        state.chunks.insert(key, chunk.clone());
        Ok(chunk)
    }

    fn lay_out(
        &self,
        half: &mut Option<Half<C>>,
        pieces: &[Encoded<'_>],
        ranks: &[Rank],
    ) -> Result<Chunk> {
        let device = self.kernels.device();
        let mut by_rollout: Vec<(Rank, Vec<&Arc<[StridedPart]>>)> = Vec::new();
        for (piece, rank) in pieces.iter().zip(ranks) {
            match by_rollout.iter_mut().find(|(of, _)| of == rank) {
                Some((_, parts)) => parts.push(piece.parts),
                None => by_rollout.push((*rank, vec![piece.parts])),
            }
        }
        let (mut all, mut end) = (Vec::with_capacity(by_rollout.len()), 0);
        for (rank, parts) in by_rollout {
            let windows = Windows::of(&parts, end);
            end = windows.end;
            all.push((rank, windows));
        }
        let needed = usize::try_from(end).map_err(|_| {
            let message = format!("{end} bytes are more than this machine can address");
            Error::new(ErrorKind::Resource, WRITING, message)
        })?;
        let memory = match half.take().filter(|half| needed <= half.all.len()) {
            Some(enough) => half.insert(enough),
            // Twice as much each time, so that little of what was there before is in vain.
            None => {
                let bytes = needed.max(LEAST).next_power_of_two();
                half.insert(Half::new(device, bytes, &self.carries)?)
            }
        };
        let memory = &memory.all;
        let of_rollouts = all.into_iter().map(|(rank, windows)| {
            let slices = windows.windows.iter().map(|window| {
                let slice = memory.slice(window.from as usize, window.len as usize)?;
                Ok((window.at, slice))
            });
            let slices = slices.collect::<Result<Vec<_>>>()?;
            Ok((rank, CudaSpace::new(device, slices)?, windows.runs))
        });
        let of_rollouts = of_rollouts.collect::<Result<Vec<_>>>()?;
        let pieces = pieces.iter().zip(ranks);
        let pieces = pieces.map(|(piece, rank)| (*rank, piece.parts.clone())).collect();
        Ok(Chunk { pieces, half: memory.address(), of_rollouts })
    }
}

/// How many of the first pieces are encoded together.
fn fitting(pieces: &[Encoded<'_>]) -> usize {
    let mut all = 0;
    let fits = |piece: &&Encoded<'_>| {
        let bytes = piece.parts.iter().map(|part| elements_of(part).1.iter().product::<u64>());
        all += bytes.sum::<u64>();
        all <= CHUNK
    };
    pieces.iter().take_while(fits).count().max(1)
}

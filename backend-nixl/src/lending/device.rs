//! Weights on a trainer's device: encoded there, and written from there.
//!
//! A piece is encoded into memory of this device that stands in for the rollout's ([`windows`](super::windows)), so kernels, bytes and
//! digests are those of memory that they reach. While one half of that memory is being written to rollouts, the other is filled.

use std::any::Any;
use std::collections::HashMap;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use device_cuda::{CudaMemory, CudaSpace, Device, reachable};
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result, Weight};
use placed::cuda::CudaKernels;
use placed::{Encoded as Piece, Encoder, Reached, Written};
use quant_fp8::{Fp8Format, SourceType, StridedPart};

use super::parcel::{Encoded, Parcel, RUNS, Ranges};
use super::reach::{Holding, Shared};
use super::staging::LOOK;
use super::windows::{Run, Windows, elements_of};
use super::writer::{Command, Target};
use crate::arena::Memory;
use crate::error::NixlError;

/// Bytes of pieces that are encoded at a time, unless one is larger.
const CHUNK: u64 = 256 << 20;

/// The least memory of a half.
const LEAST: usize = 1 << 20;

/// Chunks whose places are kept for the next update. More are those of other plans.
const CHUNKS: usize = 4096;

/// A trainer's device.
#[derive(Debug)]
pub(super) struct Encoding {
    shared: Arc<Shared>,
    kernels: CudaKernels,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    halves: [Half; 2],
    /// By their first piece: its rollout, and the address of its parts.
    chunks: HashMap<(Rank, usize), Arc<Chunk>>,
}

/// Half of the memory that pieces are encoded into.
#[derive(Debug)]
struct Half {
    all: CudaMemory,
    memory: Memory,
    reading: Arc<Reading>,
}

/// The writes that read a half.
#[derive(Debug, Default)]
struct Reading {
    count: Mutex<u64>,
    changed: Condvar,
}

/// A write reads a half as long as this lives.
#[derive(Debug)]
struct Reads(Arc<Reading>);

/// Where the pieces of a chunk are.
#[derive(Debug)]
struct Chunk {
    /// The rollout and the parts of each piece.
    pieces: Vec<(Rank, Arc<[StridedPart]>)>,
    /// The address of the half that they are in.
    half: u64,
    /// What stands in for the memory of each rollout, and the runs that go there.
    of_rollouts: Vec<(Rank, CudaSpace, Vec<Run>)>,
}

impl Reading {
    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
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

    /// Waits until nothing reads the half, as long as a write ends within `limit`.
    ///
    /// # Errors
    ///
    /// Those of `check`; `Slow` if no write ends.
    fn wait(&self, limit: Duration, mut check: impl FnMut() -> Result<()>) -> Result<()> {
        let mut count = self.lock();
        let (mut last, mut since) = (*count, Instant::now());
        // The agent's thread gives a write up earlier, and says to which rollout.
        let limit = limit + limit / 8;
        loop {
            check()?;
            if *count == 0 {
                return Ok(());
            }
            if std::mem::replace(&mut last, *count) != *count {
                since = Instant::now();
            } else if since.elapsed() >= limit {
                return Err(NixlError::Slow(limit).into());
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

impl Half {
    fn new(device: &Device, bytes: usize) -> Result<Self> {
        let all = CudaMemory::new(device, bytes)?;
        let memory = Memory::new(reachable(all.clone()))?;
        Ok(Self { all, memory, reading: Arc::default() })
    }

    /// As [`new`](Self::new), for an agent that is there already.
    fn registered(device: &Device, bytes: usize, shared: &Shared) -> Result<Self> {
        let half = Self::new(device, bytes)?;
        shared.register(&half.memory)?;
        Ok(half)
    }

    /// Waits until nothing reads it.
    fn wait(
        &self,
        shared: &Shared,
        target: &Target,
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.reading.wait(shared.limit, || {
            step()?;
            target.check()
        })
    }
}

impl Encoding {
    /// The kernels of a device, and a little memory, which grows when it is needed.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub(super) fn new(device: &DeviceChoice, shared: Arc<Shared>) -> Result<Self> {
        let device = Device::of(device)?;
        let kernels = CudaKernels::new(&device)?;
        let halves = [Half::new(&device, LEAST)?, Half::new(&device, LEAST)?];
        let state = Mutex::new(State { halves, chunks: HashMap::new() });
        Ok(Self { shared, kernels, state })
    }

    /// The memory that it begins with, for the agent to register.
    pub(super) fn memory(&self) -> Vec<Memory> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.halves.iter().map(|half| half.memory.clone()).collect()
    }
}

impl Encoder for Encoding {
    fn takes(&self, weight: &Weight, format: Option<&Fp8Format>) -> bool {
        self.kernels.takes(weight, format)
    }

    fn writes_to(&self, to: &dyn Reached, _: &[u64]) -> bool {
        let to: &dyn Any = to;
        to.downcast_ref::<Holding>().is_some_and(|holding| holding.target().is_on_device())
    }

    fn maxima(&self, parts: &[(&Weight, SourceType, &StridedPart)]) -> Result<Vec<Vec<u32>>> {
        self.kernels.maxima(parts)
    }

    /// When it returns without an error, all pieces are there.
    fn write(&self, pieces: &[Piece<'_>], step: &mut dyn FnMut() -> Result<()>) -> Result<Written> {
        let shared = &*self.shared;
        let Some(first) = pieces.first() else { return Ok(Written::default()) };
        // A failure of one target fails all.
        let first = target_of(first)?;
        // What a panic has left is made anew: halves that are read, and chunks that are not the same.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for half in &mut state.halves {
            if !half.reading.is_idle() {
                // Writes of an update that failed may read it as long as they like.
                *half = Half::registered(self.kernels.device(), half.all.len(), shared)?;
            }
        }
        let (mut sums, mut begin) = (Vec::with_capacity(pieces.len()), 0);
        for turn in 0.. {
            let Some(rest) = pieces.get(begin..).filter(|rest| !rest.is_empty()) else { break };
            let some = &rest[..fitting(rest)];
            let targets = some.iter().map(|piece| target_of(piece)).collect::<Result<Vec<_>>>()?;
            state.halves[turn % 2].wait(shared, &first, step)?;
            let chunk = state.chunk(&self.kernels, shared, turn % 2, some, &targets)?;
            let of = |rank: Rank| chunk.of_rollouts.iter().find(|(of, _, _)| *of == rank);
            let jobs = some.iter().zip(&targets).filter_map(|(piece, target)| {
                of(target.rank()).map(|(_, space, _)| (piece, space))
            });
            let written = self.kernels.write(&jobs.collect::<Vec<_>>(), step)?;
            if let Some((number, block)) = written.failed {
                return Ok(Written { sums, failed: Some((begin + number, block)) });
            }
            sums.extend(written.sums);
            let half = &state.halves[turn % 2];
            for (rank, _, runs) in &chunk.of_rollouts {
                let target = targets.iter().find(|target| target.rank() == *rank);
                if let Some(target) = target {
                    send(shared, target, half, runs)?;
                }
            }
            begin += some.len();
        }
        // Whoever hears of these pieces compares them.
        for half in &state.halves {
            half.wait(shared, &first, step)?;
        }
        Ok(Written { sums, failed: None })
    }
}

impl State {
    /// The places of pieces in a half, which nothing reads any more.
    fn chunk(
        &mut self,
        kernels: &CudaKernels,
        shared: &Shared,
        half: usize,
        pieces: &[Piece<'_>],
        targets: &[Arc<Target>],
    ) -> Result<Arc<Chunk>> {
        let Some(first) = pieces.first().zip(targets.first()) else {
            return Err(Error::new(ErrorKind::State, "writing tensors", "there are no pieces"));
        };
        let key = (first.1.rank(), Arc::as_ptr(first.0.parts).addr());
        let is_it = |chunk: &Chunk| {
            let same = pieces.iter().zip(targets).zip(&chunk.pieces);
            chunk.half == self.halves[half].all.address()
                && chunk.pieces.len() == pieces.len()
                && same.into_iter().all(|((piece, target), (rank, parts))| {
                    *rank == target.rank() && Arc::ptr_eq(parts, piece.parts)
                })
        };
        if let Some(known) = self.chunks.get(&key).filter(|chunk| is_it(chunk)) {
            return Ok(known.clone());
        }
        if self.chunks.len() >= CHUNKS {
            self.chunks.clear();
        }
        let chunk = Arc::new(self.lay_out(kernels, shared, half, pieces, targets)?);
        self.chunks.insert(key, chunk.clone());
        Ok(chunk)
    }

    fn lay_out(
        &mut self,
        kernels: &CudaKernels,
        shared: &Shared,
        half: usize,
        pieces: &[Piece<'_>],
        targets: &[Arc<Target>],
    ) -> Result<Chunk> {
        let mut by_rollout: Vec<(Rank, Vec<&Arc<[StridedPart]>>)> = Vec::new();
        for (piece, target) in pieces.iter().zip(targets) {
            match by_rollout.iter_mut().find(|(rank, _)| *rank == target.rank()) {
                Some((_, parts)) => parts.push(piece.parts),
                None => by_rollout.push((target.rank(), vec![piece.parts])),
            }
        }
        let (mut all, mut end) = (Vec::with_capacity(by_rollout.len()), 0);
        for (rank, parts) in by_rollout {
            let windows = Windows::of(&parts, end);
            end = windows.end;
            all.push((rank, windows));
        }
        let needed = usize::try_from(end).map_err(|_| NixlError::NoMemoryToLend(end))?;
        if self.halves[half].all.len() < needed {
            // Twice as much each time, so that little of what was there before is in vain.
            let bytes = needed.next_power_of_two();
            self.halves[half] = Half::registered(kernels.device(), bytes, shared)?;
        }
        let memory = &self.halves[half].all;
        let of_rollouts = all.into_iter().map(|(rank, windows)| {
            let slices = windows.windows.iter().map(|window| {
                let slice = memory.slice(window.from as usize, window.len as usize)?;
                Ok((window.at, slice))
            });
            let slices = slices.collect::<Result<Vec<_>>>()?;
            Ok((rank, CudaSpace::new(kernels.device(), slices)?, windows.runs))
        });
        let of_rollouts = of_rollouts.collect::<Result<Vec<_>>>()?;
        let pieces = pieces.iter().zip(targets);
        let pieces = pieces.map(|(piece, target)| (target.rank(), piece.parts.clone())).collect();
        Ok(Chunk { pieces, half: memory.address(), of_rollouts })
    }
}

/// How many of the first pieces are encoded together.
fn fitting(pieces: &[Piece<'_>]) -> usize {
    let mut all = 0;
    let fits = |piece: &&Piece<'_>| {
        let bytes = piece.parts.iter().map(|part| elements_of(part).1.iter().product::<u64>());
        all += bytes.sum::<u64>();
        all <= CHUNK
    };
    pieces.iter().take_while(fits).count().max(1)
}

fn target_of(piece: &Piece<'_>) -> Result<Arc<Target>> {
    let to: &dyn Any = piece.to;
    let holding: Option<&Holding> = to.downcast_ref();
    holding.map(|holding| holding.target().clone()).ok_or_else(|| {
        let message = "its place is not one that NIXL writes to";
        Error::new(ErrorKind::State, "writing tensors", message).tensor(piece.weight.name())
    })
}

/// Begins to write runs of a half to where they belong.
fn send(shared: &Shared, target: &Arc<Target>, half: &Half, runs: &[Run]) -> Result<()> {
    let address = half.memory.address();
    let outside = |run: &Run| {
        let message = format!("{} bytes at {} lie outside of what is lent", run.len, run.at);
        Error::new(ErrorKind::Protocol, "writing tensors", message).rank(target.rank())
    };
    let mut sides: (Ranges, Ranges) = Default::default();
    let write = |sides: &mut (Ranges, Ranges)| {
        let sides = std::mem::take(sides);
        let (memory, reading) = (half.memory.clone(), Box::new(half.reading.begin()));
        let encoded = Encoded { memory, sides, _reading: reading };
        shared.write(target, Parcel::Encoded(Box::new(encoded)));
    };
    for run in runs {
        let mut run = *run;
        // A run may go on in the next part of what is lent.
        while run.len > 0 {
            let found = target.parts().rest(run.at).filter(|(_, _, left)| *left > 0);
            let (&part, from, left) = found.ok_or_else(|| outside(&run))?;
            let len = run.len.min(left);
            // What is offered was checked to be addresses of this platform.
            sides.0.push((address + run.from as usize, len as usize));
            sides.1.push((part + from as usize, len as usize));
            run = Run { at: run.at + len, len: run.len - len, from: run.from + len };
            if sides.0.len() == RUNS {
                write(&mut sides);
            }
        }
    }
    if !sides.0.is_empty() {
        write(&mut sides);
    }
    Ok(())
}

impl Shared {
    /// Has the agent's thread register memory that is written from.
    fn register(&self, memory: &Memory) -> Result<()> {
        let (told, is_told) = sync_channel(1);
        if !self.tell(Command::Register(memory.clone(), told)) {
            return Err(NixlError::Closed.into());
        }
        let limit = self.limit;
        Ok(is_told.recv_timeout(limit).map_err(|_| NixlError::Slow(limit))??)
    }
}

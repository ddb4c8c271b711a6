//! Memory in which a trainer gathers what it puts, until it is enough to be worth a write.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine_core::Result;

use super::parcel::{RUNS, Ranges};
use super::writer::Target;
use crate::arena::Memory;
use crate::error::NixlError;
use crate::host::{Piece, pieces};

/// The bytes of a block, which is written at once. Writes of this size reach nearly the rate of larger ones.
const BLOCK: usize = 512 << 10;

/// How long a thread waits before it looks whether to wait any longer.
pub(super) const LOOK: Duration = Duration::from_millis(20);

/// A block with what was gathered in it, for one rollout.
#[derive(Debug)]
pub(crate) struct Staged {
    piece: Piece,
    used: usize,
    runs: Vec<Run>,
}

/// Bytes that lie together at both ends.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// The address of the part of the rollout's memory that it belongs to: a run has bytes of one part only.
    part: usize,
    /// Where it belongs in the rollout's process.
    to: usize,
    len: usize,
}

impl Staged {
    pub(super) fn new(piece: Piece) -> Self {
        Self { piece, used: 0, runs: Vec::new() }
    }

    /// Adds bytes that belong to an address in a part, as many as there is room for, and returns how many.
    pub(super) fn add(&mut self, part: usize, to: usize, bytes: &[u8]) -> usize {
        let len = bytes.len().min(self.piece.len() - self.used);
        let count = self.runs.len();
        let last = self.runs.last_mut();
        match last.filter(|run| run.part == part && run.to + run.len == to) {
            Some(run) => run.len += len,
            None if count == RUNS => return 0,
            None => self.runs.push(Run { part, to, len }),
        }
        self.piece.bytes_mut()[self.used..self.used + len].copy_from_slice(&bytes[..len]);
        self.used += len;
        len
    }

    /// Whether there is no room for more.
    pub(super) fn is_full(&self) -> bool {
        self.used == self.piece.len() || self.runs.len() == RUNS
    }

    /// The addresses and lengths of its runs, here and at the rollout.
    pub(super) fn sides(&self) -> (Ranges, Ranges) {
        let mut from = self.piece.address();
        let here = self.runs.iter().map(|run| {
            let start = from;
            from += run.len;
            (start, run.len)
        });
        (here.collect(), self.runs.iter().map(|run| (run.to, run.len)).collect())
    }

    pub(super) fn into_piece(self) -> Piece {
        self.piece
    }
}

/// A trainer's blocks.
#[derive(Debug)]
pub(super) struct Staging {
    blocks: Mutex<Blocks>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Blocks {
    free: Vec<Piece>,
    /// Those that are being filled and that no thread has at this moment, the one that was filled last at the end.
    open: VecDeque<(Arc<Target>, Staged)>,
    /// How many have been given back.
    given: u64,
}

/// What a thread that puts has to do next.
pub(super) enum Next {
    /// Fill this block.
    Fill(Staged),
    /// Write this block: none is free, and it will be when it is written.
    Write(Arc<Target>, Staged),
}

impl Staging {
    /// Allocates blocks of about so many bytes together. Returns their memory too.
    pub(super) fn new(bytes: u64) -> Result<(Self, Memory)> {
        let count = usize::try_from(bytes / BLOCK as u64).unwrap_or(usize::MAX).max(2);
        let (memory, free) = pieces(count, BLOCK)?;
        let blocks = Mutex::new(Blocks { free, ..Blocks::default() });
        Ok((Self { blocks, changed: Condvar::new() }, memory))
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        // Each change is complete before anything can panic.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block for a rollout. Waits until there is one, as long as writes end within `limit`.
    ///
    /// # Errors
    ///
    /// Those of `check`; `Slow` if no write ends.
    pub(super) fn take(
        &self,
        target: &Arc<Target>,
        limit: Duration,
        check: impl Fn() -> Result<()>,
    ) -> Result<Next> {
        let mut blocks = self.lock();
        let (mut given, mut since) = (blocks.given, Instant::now());
        loop {
            let own = blocks.open.iter().rposition(|(of, _)| Arc::ptr_eq(of, target));
            if let Some((_, staged)) = own.and_then(|at| blocks.open.remove(at)) {
                return Ok(Next::Fill(staged));
            }
            if let Some(piece) = blocks.free.pop() {
                return Ok(Next::Fill(Staged::new(piece)));
            }
            if let Some((target, staged)) = blocks.open.pop_front() {
                return Ok(Next::Write(target, staged));
            }
            if std::mem::replace(&mut given, blocks.given) != given {
                since = Instant::now();
            } else if since.elapsed() >= limit {
                return Err(NixlError::Slow(limit).into());
            }
            let waited = self.changed.wait_timeout(blocks, LOOK);
            blocks = waited.unwrap_or_else(PoisonError::into_inner).0;
            check()?;
        }
    }

    /// Puts back a block that has room for more.
    pub(super) fn put_back(&self, target: Arc<Target>, staged: Staged) {
        self.lock().open.push_back((target, staged));
        // Another thread may wait for a block.
        self.changed.notify_one();
    }

    /// Takes out what is gathered for a rollout and not written yet.
    pub(super) fn drain(&self, target: &Arc<Target>) -> Vec<Staged> {
        let mut blocks = self.lock();
        let (own, others) = std::mem::take(&mut blocks.open)
            .into_iter()
            .partition::<VecDeque<_>, _>(|(of, _)| Arc::ptr_eq(of, target));
        blocks.open = others;
        own.into_iter().map(|(_, staged)| staged).collect()
    }

    /// Gives a block back.
    pub(super) fn give(&self, staged: Staged) {
        let mut blocks = self.lock();
        blocks.free.push(staged.into_piece());
        blocks.given += 1;
        drop(blocks);
        self.changed.notify_one();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_gathered_goes_where_it_belongs_whatever_is_neighbours(
            puts in proptest::collection::vec((0_usize..2, 0_usize..40, 1_usize..30), 1..30),
        ) {
            const PART: usize = 64;
            // Two parts, one directly behind the other.
            let base = 1_000_000;
            let (mut expected, mut found) = ([0_u8; 2 * PART], [0_u8; 2 * PART]);
            let (_memory, mut free) = pieces(1, 96).unwrap();
            let mut staged = Some(Staged::new(free.pop().unwrap()));
            let mut write = |staged: Staged| {
                let (here, there) = staged.sides();
                assert_eq!(here.iter().map(|(_, len)| len).sum::<usize>(), staged.used);
                let mut from = 0;
                for ((address, len), (to, same)) in here.into_iter().zip(there) {
                    assert_eq!((address - staged.piece.address(), len), (from, same));
                    // A run has bytes of one part.
                    assert_eq!((to - base) / PART, (to - base + len - 1) / PART);
                    found[to - base..to - base + len]
                        .copy_from_slice(&staged.piece.bytes()[from..from + len]);
                    from += len;
                }
                Staged::new(staged.into_piece())
            };
            for (number, (part, at, len)) in puts.into_iter().enumerate() {
                let len = len.min(PART - at);
                let bytes: Vec<u8> = (0..len).map(|byte| (number * 37 + byte) as u8).collect();
                let part = base + part * PART;
                let mut to = part + at;
                expected[to - base..to - base + len].copy_from_slice(&bytes);
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let mut block = staged.take().unwrap();
                    let taken = block.add(part, to, rest);
                    rest = &rest[taken..];
                    to += taken;
                    staged = Some(if block.is_full() || !rest.is_empty() { write(block) } else { block });
                }
            }
            write(staged.take().unwrap());
            prop_assert_eq!(found, expected);
        }
    }
}

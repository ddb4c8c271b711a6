//! A rollout's host memory, as it lends it.
#![allow(unsafe_code, reason = "the promise of a program that lends its own tensors is passed on")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use engine_core::{Error, ErrorKind, Result};
use placed::{Layout, Lender, LentBytes, LentTensor, Parts};
use protocol::encode;
use tracing::debug;

use super::lender::{Command, Keeper};
use super::notice::OfferedPart;
use crate::agent::{AgentOptions, thread};
use crate::arena::Memory;
use crate::error::NixlError;
use crate::host::{Piece, PromisedMemory, pieces};

/// Parts of memory begin at multiples of it in what is lent, so that offsets there are aligned as addresses are.
const PAGE: u64 = 4096;

/// Memory that can be lent.
#[derive(Debug)]
pub(super) struct Lendable {
    /// As this process reads it while it is not lent.
    views: Parts<Bytes>,
    /// In ascending order of what is lent, each with its memory.
    pub(super) parts: Vec<(OfferedPart, Memory)>,
}

/// Allocates so much memory, with all pages present.
pub(super) fn allocate(bytes: u64) -> Result<Lendable> {
    let len = usize::try_from(bytes.max(1)).map_err(|_| NixlError::NoMemoryToLend(bytes))?;
    let (memory, mut cut) = pieces(1, len)?;
    let piece = cut.pop().ok_or(NixlError::NoMemoryToLend(bytes))?;
    let part = OfferedPart { at: 0, bytes: len as u64, address: piece.address() as u64 };
    let view = Bytes::from_owner(View(piece));
    Ok(Lendable { views: Parts::new([(0, len as u64, view)]), parts: vec![(part, memory)] })
}

/// All bytes of a piece, to be read while it is not lent.
struct View(Piece);

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// Tensors of a program, where they are. Returns their layout too.
pub(super) fn of_tensors(
    tensors: impl IntoIterator<Item = LentTensor>,
) -> Result<(Layout, Lendable)> {
    let tensors: Vec<_> =
        tensors.into_iter().map(LentTensor::into_host_parts).collect::<Result<_>>()?;
    let all = tensors.iter().flat_map(|(_, both)| both).map(range);
    let places = places(all.filter(|(_, len)| *len > 0).collect());
    // The number of the part that has bytes, and their offset. Those of a tensor without elements are nowhere.
    let find = |bytes: &Bytes| {
        let (address, len) = range(bytes);
        let after = places.partition_point(|part| part.address <= address);
        let number = after.checked_sub(1).filter(|_| len > 0)?;
        let part = places.get(number)?;
        Some((number, part.at + (address - part.address)))
    };
    let at = |bytes: &Bytes| find(bytes).map_or(0, |(_, at)| at);
    let end = places.last().map_or(0, |part| part.at + part.bytes);
    let wanted = tensors
        .iter()
        .map(|(wanted, [elements, scales])| (wanted.clone(), at(elements), at(scales)));
    let layout = Layout::at(wanted.collect::<Vec<_>>(), end)?;
    let mut views = Vec::new();
    // A part may have several tensors, one directly behind the other.
    let mut owners = vec![Vec::new(); places.len()];
    for bytes in tensors.into_iter().flat_map(|(_, both)| both) {
        if let Some((number, at)) = find(&bytes) {
            owners[number].push(bytes.clone());
            views.push((at, bytes.len() as u64, bytes));
        }
    }
    let mut parts = Vec::with_capacity(places.len());
    for (part, owners) in places.iter().zip(owners) {
        // SAFETY: the owners are tensors that a program lends, which has promised it of each, and the part is what they are together.
        let memory = unsafe { PromisedMemory::new(part.address, part.bytes as usize, owners) };
        parts.push((*part, Memory::new(Arc::new(memory))?));
    }
    Ok((layout, Lendable { views: Parts::new(views), parts }))
}

fn range(bytes: &Bytes) -> (u64, u64) {
    (bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64)
}

/// Puts ranges of addresses together where they touch or overlap, and gives each an offset. The result is in ascending order of both.
fn places(mut ranges: Vec<(u64, u64)>) -> Vec<OfferedPart> {
    ranges.sort_unstable();
    let mut parts: Vec<OfferedPart> = Vec::new();
    for (address, len) in ranges {
        let end = parts.last().map_or(0, |part| part.at + part.bytes);
        match parts.last_mut().filter(|part| address <= part.address + part.bytes) {
            Some(part) => part.bytes = part.bytes.max(address + len - part.address),
            None => {
                let at = end.next_multiple_of(PAGE) + address % PAGE;
                parts.push(OfferedPart { at, bytes: len, address });
            }
        }
    }
    parts
}

/// A rollout's memory, with the agent that lends it.
#[derive(Debug)]
pub(super) struct LentMemory {
    views: Parts<Bytes>,
    bytes: u64,
    commands: Sender<Command>,
    state: State,
    /// Whether nobody can write since it was last lent. The agent's thread says so.
    over: Arc<AtomicBool>,
    /// How long lending may take.
    limit: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Own,
    Lent,
    /// The agent's thread was told to take it back.
    Returning,
}

impl LentMemory {
    /// Starts the agent, which registers the memory. `deadline` is that of the group.
    pub(super) async fn start(
        options: AgentOptions,
        name: String,
        memory: Lendable,
        deadline: Duration,
    ) -> Result<Self, NixlError> {
        let (commands, inbox) = channel();
        let closing = commands.clone();
        let over = Arc::new(AtomicBool::new(true));
        let Lendable { views, parts } = memory;
        let bytes = parts.last().map_or(0, |(part, _)| part.at + part.bytes);
        let theirs = over.clone();
        let make = move || Keeper::new(options, name, parts, theirs, deadline);
        // A thread that has ended needs no command.
        let close = move || drop(closing.send(Command::Close));
        thread::start(close, make, move |keeper| keeper.run(&inbox)).await?;
        Ok(Self { views, bytes, commands, state: State::Own, over, limit: deadline / 2 })
    }

    fn require_own(&self) -> Result<()> {
        match self.state {
            State::Own => Ok(()),
            State::Lent | State::Returning => {
                let message = "the tensors are lent: trainers may write to them";
                Err(Error::new(ErrorKind::State, "reading what is lent", message))
            }
        }
    }
}

impl Lender for LentMemory {
    fn len(&self) -> u64 {
        self.bytes.next_multiple_of(PAGE)
    }

    fn lend(&mut self) -> Result<Bytes> {
        self.require_own()?;
        let (told, is_told) = sync_channel(1);
        // Whatever comes of it, the agent's thread says when it is over.
        self.over.store(false, Ordering::Release);
        self.state = State::Lent;
        self.commands.send(Command::Lend(told)).map_err(|_| NixlError::Closed)?;
        let offer = is_told.recv_timeout(self.limit).map_err(|_| NixlError::Slow(self.limit))??;
        encode(&offer)
    }

    fn take_back(&mut self) -> Result<bool> {
        if self.state == State::Lent {
            self.commands.send(Command::TakeBack).map_err(|_| NixlError::Closed)?;
            self.state = State::Returning;
        }
        if self.state == State::Returning && self.over.load(Ordering::Acquire) {
            self.state = State::Own;
        }
        Ok(self.state == State::Own)
    }

    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>> {
        self.require_own()?;
        // Nobody writes: no trainer has the lease, and none is granted it any more.
        let bytes = self.views.bytes(at, len);
        let nowhere = || {
            let message = format!("{len} bytes at {at} are in no tensor that is lent");
            Error::new(ErrorKind::State, "reading what is lent", message)
        };
        Ok(LentBytes::Host(bytes.ok_or_else(nowhere)?))
    }
}

impl Drop for LentMemory {
    fn drop(&mut self) {
        if self.commands.send(Command::Close).is_err() {
            debug!("the agent has ended before");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn offsets_share_bytes_where_addresses_do_and_nowhere_else(
            ranges in proptest::collection::vec((1_u64..40_000, 1_u64..5000), 1..12),
        ) {
            let parts = places(ranges.clone());
            for pair in parts.windows(2) {
                prop_assert!(pair[0].address + pair[0].bytes < pair[1].address);
                prop_assert!(pair[0].at + pair[0].bytes <= pair[1].at);
            }
            let place = |(address, len): (u64, u64)| {
                let holds = |part: &&OfferedPart| {
                    part.address <= address && address + len <= part.address + part.bytes
                };
                let all: Vec<_> = parts.iter().filter(holds).collect();
                assert_eq!(all.len(), 1);
                assert_eq!(all[0].at % PAGE, all[0].address % PAGE);
                all[0].at + (address - all[0].address)
            };
            for one in &ranges {
                for other in &ranges {
                    let overlap = |(at, len): (u64, u64), (to, also): (u64, u64)| at < to + also && to < at + len;
                    let there = overlap((place(*one), one.1), (place(*other), other.1));
                    prop_assert_eq!(there, overlap(*one, *other));
                }
            }
        }
    }
}

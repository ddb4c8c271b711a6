//! Copies in host memory, with changes found and applied by the CPU.

use std::any::Any;
use std::cell::RefCell;
use std::sync::Arc;

use bytes::Bytes;
use engine_core::changes::{
    Applied, Changes, Compared, Cut, Difference, Due, ShadowBytes, ShadowMemory, ShadowPart,
    exchange,
};
use engine_core::memory::{Job, Pool, TensorMemory};
use engine_core::{Error, ErrorKind, Result, Storage, Weight, digest};

use crate::message::APPLYING;
use crate::shadow::KEEPING;

/// Bytes that one thread sums up at a time.
const GRAIN: usize = 1 << 20;
/// Bytes of weights that are encoded or compared at a time.
const BATCH: u64 = 32 << 20;
/// Bytes of a weight that one thread encodes and compares at a time, so that they stay in its cache.
const STEP: usize = 256 << 10;
/// The same for weights that are read from a device.
const DEVICE_STEP: usize = 4 << 20;

/// Host memory.
#[derive(Debug)]
pub(crate) struct HostShadows;

/// The copy of a weight: memory that readers share. It is written in place while nobody reads it. While somebody does, a copy is written and
/// replaces it.
#[derive(Debug)]
struct Memory(Arc<TensorMemory>);

#[derive(Debug)]
struct View(Arc<TensorMemory>);

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl ShadowBytes for Memory {
    fn len(&self) -> u64 {
        self.0.bytes().len() as u64
    }

    fn view(&self) -> Storage {
        Bytes::from_owner(View(self.0.clone())).into()
    }
}

impl Memory {
    fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        if Arc::get_mut(&mut self.0).is_none() {
            let bytes = self.0.bytes();
            let mut copy = TensorMemory::new(bytes.len() as u64, KEEPING)?;
            copy.bytes_mut().copy_from_slice(bytes);
            self.0 = Arc::new(copy);
        }
        let memory = Arc::get_mut(&mut self.0).map(TensorMemory::bytes_mut);
        memory.ok_or_else(|| Error::new(ErrorKind::State, KEEPING, "new memory is shared"))
    }
}

fn other() -> Error {
    Error::new(ErrorKind::State, KEEPING, "a copy that is not in host memory")
}

fn memory_of(copy: &dyn ShadowBytes) -> Result<&Memory> {
    let copy: &dyn Any = copy;
    copy.downcast_ref().ok_or_else(other)
}

fn bytes_of(copy: &mut dyn ShadowBytes) -> Result<&mut [u8]> {
    let copy: &mut dyn Any = copy;
    copy.downcast_mut().ok_or_else(other).and_then(Memory::bytes_mut)
}

impl ShadowMemory for HostShadows {
    fn batch(&self) -> u64 {
        BATCH
    }

    fn allocate(&self, lens: &[u64]) -> Result<Vec<Box<dyn ShadowBytes>>> {
        let allocate = |len: &u64| {
            let memory = Memory(Arc::new(TensorMemory::new(*len, KEEPING)?));
            Ok(Box::new(memory) as Box<dyn ShadowBytes>)
        };
        lens.iter().map(allocate).collect()
    }

    fn encode(
        &self,
        weights: &[Weight],
        to: &mut [Box<dyn ShadowBytes>],
        pool: &Pool,
    ) -> Result<Vec<u64>> {
        let due = weights.iter().zip(to);
        in_order(
            due,
            |(weight, _)| weight,
            pool,
            |(weight, to)| {
                let job =
                    Job { weight: weight.clone(), start: 0, len: weight.byte_len(), offset: 0 };
                pool.encode(&[job], bytes_of(&mut **to)?, true)
            },
        )
    }

    fn write(
        &self,
        to: &mut [Box<dyn ShadowBytes>],
        parts: &[ShadowPart],
        pool: &Pool,
    ) -> Result<()> {
        let mut due: Vec<_> = to.iter_mut().map(|to| (to, Vec::new())).collect();
        for part in parts {
            let (_, parts) = due.get_mut(part.of).ok_or_else(outside)?;
            parts.push(part);
        }
        let written = pool.map(due, |(to, parts)| {
            for ShadowPart { start, bytes, .. } in parts {
                let end = start.checked_add(bytes.len()).ok_or_else(outside)?;
                let to = bytes_of(&mut **to)?.get_mut(*start as usize..end as usize);
                bytes.read(0, to.ok_or_else(outside)?)?;
            }
            Ok(())
        });
        written.into_iter().collect()
    }

    fn sums(&self, of: &[&dyn ShadowBytes], pool: &Pool) -> Result<Vec<u64>> {
        let sums = pool.map(of, |copy| Ok(sum(memory_of(*copy)?.0.bytes(), pool)));
        sums.into_iter().collect()
    }

    fn compare(&self, weights: &[(&Weight, &dyn ShadowBytes)], pool: &Pool) -> Result<Compared> {
        let compared = in_order(
            weights,
            |(weight, _)| weight,
            pool,
            |(weight, copy)| compare(weight, memory_of(*copy)?.0.bytes(), pool),
        )?;
        let mut values = Vec::new();
        values.reserve_exact(
            compared.iter().flat_map(|(_, parts)| parts).map(|p| p.values.len()).sum(),
        );
        let join = |(cut, parts): (Cut, Vec<Changes>)| {
            let mut all = Difference { cut, words: Vec::new(), len: 0, units: 0, sum: 0 };
            for Changes { words, values: own, units, sum, .. } in parts {
                values.extend_from_slice(&own);
                all.extend(Difference { cut, words, len: own.len() as u64, units, sum });
            }
            all.without_words_of_nothing()
        };
        let weights = compared.into_iter().map(join).collect();
        Ok(Compared { weights, values: values.into() })
    }

    fn apply(
        &self,
        due: &mut [Due<'_>],
        values: &Storage,
        wanted: bool,
        pool: &Pool,
    ) -> Result<Applied> {
        let mut values = Vec::from(values.to_host()?);
        let (mut rest, mut jobs) = (&mut values[..], Vec::with_capacity(due.len()));
        for Due { name, to, cut, words } in due {
            let mut len = 0;
            if !words.is_empty() {
                let places = cut.places(to.len(), words);
                len = places.and_then(|places| places.last().copied()).ok_or_else(no_changes)?;
            }
            let len = usize::try_from(len).ok();
            let own = len.and_then(|len| std::mem::take(&mut rest).split_at_mut_checked(len));
            let (own, others) = own.ok_or_else(no_changes)?;
            rest = others;
            jobs.push((*name, to, *cut, *words, own));
        }
        if !rest.is_empty() {
            return Err(no_changes());
        }
        let sums = pool.map(jobs, |(name, to, cut, words, own)| {
            if words.is_empty() {
                return Ok(0);
            }
            let exchanged = exchange(cut, bytes_of(&mut ***to)?, words, own);
            exchanged.map_err(|words| Error::new(ErrorKind::Protocol, APPLYING, words).tensor(name))
        });
        let sums = sums.into_iter().collect::<Result<_>>()?;
        Ok(Applied { sums, undo: wanted.then(|| values.into()) })
    }
}

fn outside() -> Error {
    Error::new(ErrorKind::Protocol, KEEPING, "a part outside its weight")
}

fn no_changes() -> Error {
    Error::new(ErrorKind::Protocol, APPLYING, "other values than the words announce")
}

/// Does something with each item on all threads: first with those whose weights are not deferred, which get their bytes when the others are
/// encoded.
fn in_order<I: Send, T: Send>(
    items: impl IntoIterator<Item = I>,
    weight: impl Fn(&I) -> &Weight,
    pool: &Pool,
    each: impl Fn(I) -> Result<T> + Sync + Send,
) -> Result<Vec<T>> {
    let mut due: Vec<_> = items.into_iter().map(|item| (Some(item), None)).collect();
    for deferred in [false, true] {
        let now = due.iter_mut().filter(|(item, _)| {
            item.as_ref().is_some_and(|item| weight(item).is_deferred() == deferred)
        });
        let done = pool.map(now, |(item, done)| {
            *done = item.take().map(&each).transpose()?;
            Ok(())
        });
        done.into_iter().collect::<Result<()>>()?;
    }
    Ok(due.into_iter().filter_map(|(_, done)| done).collect())
}

/// Encodes a weight and compares it with its copy, part by part, while a part is in the cache.
fn compare(weight: &Weight, old: &[u8], pool: &Pool) -> Result<(Cut, Vec<Changes>)> {
    let cut = Cut::at(weight.meta().dtype, weight.granule());
    let step = step(cut, weight);
    let part = |from: usize| {
        let to = old.len().min(from.saturating_add(step));
        let mut changes = Changes::default();
        match weight.contiguous_bytes() {
            Some(bytes) => changes.compare(cut, from, &old[from..to], &bytes[from..to]),
            None => SCRATCH.with_borrow_mut(|scratch| {
                scratch.resize(scratch.len().max(to - from), 0);
                let new = &mut scratch[..to - from];
                weight.encode(from as u64..to as u64, new)?;
                changes.compare(cut, from, &old[from..to], new);
                Ok::<_, Error>(())
            })?,
        }
        Ok(changes)
    };
    let parts = match old.len() <= step {
        true => vec![part(0)?],
        false => {
            let parts = pool.map((0..old.len()).step_by(step), part);
            parts.into_iter().collect::<Result<_>>()?
        }
    };
    Ok((cut, parts))
}

thread_local! {
    /// The buffer into which a thread encodes before it compares.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that are encoded at a time: whole tiles, and whole granules if these consist of tiles.
fn step(cut: Cut, weight: &Weight) -> usize {
    cut.step(weight.granule(), if weight.reads_device() { DEVICE_STEP } else { STEP })
}

/// The digest sum of a weight.
fn sum(bytes: &[u8], pool: &Pool) -> u64 {
    if bytes.len() <= GRAIN {
        return digest::sum(0, bytes);
    }
    let parts = bytes.chunks(GRAIN).enumerate();
    let sums = pool.map(parts, |(part, bytes)| digest::sum((part * GRAIN) as u64, bytes));
    sums.into_iter().fold(0, u64::wrapping_add)
}

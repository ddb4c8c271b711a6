//! A copy of a version as it travelled: its weights, each with its digest sum, and the memory in which they lie.

use std::collections::HashMap;
use std::sync::Arc;

use engine_core::changes::{Cut, Due, ShadowBytes, ShadowMemory, ShadowPart};
use engine_core::memory::Pool;
use engine_core::{
    ArenaArc, EngineContext, Error, ErrorKind, PartSet, Parts, Result, Role, Storage, TensorMeta,
    Weight, digest,
};
use sha2::{Digest, Sha256};

use crate::DeltaConfig;
use crate::host::HostShadows;

pub(crate) const KEEPING: &str = "keeping a copy of what travels";

/// A weight of a version.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) meta: ArenaArc<TensorMeta>,
    /// A hash of name, type and shape.
    key: u64,
    bytes: Box<dyn ShadowBytes>,
    /// The digest's sum of its bytes.
    sum: u64,
    /// The weight that it was added to on the trainer, as scales are to their codes: it is there only as long as that one comes with it.
    follows: Option<Arc<str>>,
    /// The number of the part that it belongs to.
    part: u32,
}

/// All weights of a version, in the order sent.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    pub(crate) entries: Vec<Entry>,
}

/// The changes of a weight, without their values.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) cut: Cut,
    /// The word of each tile; none if nothing changed.
    pub(crate) words: Vec<u32>,
}

/// Batches at work at a time where the copies are on a device: one is encoded and one is compared, and the next one is there when they
/// end. On the host one has all threads: of three, each would take three times as long, and the engine waits for the first.
const ON_A_DEVICE: usize = 3;

/// Where a rank's copies lie, and what works on them.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    pub(crate) memory: Arc<dyn ShadowMemory>,
    /// The named parts of versions.
    pub(crate) parts: Parts,
    /// How many batches are at work at a time.
    pub(crate) batches: usize,
    pub(crate) pool: Pool,
}

impl Copies {
    /// On the device of a configuration, if its kind of memory can have copies; else, and if asked for, in host memory.
    ///
    /// # Errors
    ///
    /// Those of the device; `Config` for parts that cannot be; `Resource` if the threads cannot be started.
    pub(crate) fn of(context: &EngineContext, role: Role, config: &DeltaConfig) -> Result<Self> {
        let on_host = config.delta_on_host;
        let kind = context.memory.filter(|_| !on_host && !context.config.device.is_cpu());
        let memory = kind.map(|kind| kind.shadows(&context.config.device)).transpose()?.flatten();
        let batches = if memory.is_some() { ON_A_DEVICE } else { 1 };
        let memory = memory.unwrap_or_else(|| Arc::new(HostShadows));
        let (parts, pool) = (Parts::of(&context.config)?, Pool::new(context.threads(role))?);
        Ok(Self { memory, parts, batches, pool })
    }

    /// Weights whose bytes are not known yet, with new memory.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no memory.
    pub(crate) fn allocate(&self, metas: Vec<ArenaArc<TensorMeta>>) -> Result<Vec<Entry>> {
        let lens = metas.iter().map(|meta| meta.byte_len()).collect::<Result<Vec<_>>>()?;
        let all = metas.into_iter().zip(self.memory.allocate(&lens)?);
        let entry = |(meta, bytes): (ArenaArc<TensorMeta>, _)| Entry {
            key: key(&meta),
            part: self.parts.part_of(&meta.name),
            meta,
            bytes,
            sum: 0,
            follows: None,
        };
        Ok(all.map(entry).collect())
    }

    /// Encodes weights into new memory. Blocks.
    ///
    /// # Errors
    ///
    /// Those of the encoding, and `Resource`, before anything was encoded.
    pub(crate) fn encoded(&self, weights: &[Weight]) -> Result<Vec<Entry>> {
        let metas = weights.iter().map(|weight| weight.meta().clone()).collect();
        let mut entries = self.allocate(metas)?;
        self.with_bytes(&mut entries, |bytes| self.memory.encode(weights, bytes, &self.pool)).map(
            |sums| {
                entries.iter_mut().zip(sums).for_each(|(entry, sum)| entry.sum = sum);
                entries
            },
        )
    }

    /// Writes parts of weights, given by their indices. Call [`seal`](Self::seal) when all parts of a weight are written. Blocks.
    ///
    /// # Errors
    ///
    /// Those of reading the parts; `Resource` if a weight is read and there is no memory for another copy.
    pub(crate) fn write(&self, entries: &mut [Entry], parts: &[ShadowPart]) -> Result<()> {
        self.with_bytes(entries, |bytes| self.memory.write(bytes, parts, &self.pool))
    }

    /// Computes the digest sums of weights. Blocks.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub(crate) fn seal(&self, entries: &mut [Entry]) -> Result<()> {
        let bytes: Vec<&dyn ShadowBytes> = entries.iter().map(|entry| &*entry.bytes).collect();
        let sums = self.memory.sums(&bytes, &self.pool)?;
        entries.iter_mut().zip(sums).for_each(|(entry, sum)| entry.sum = sum);
        Ok(())
    }

    /// Runs something with the bytes of entries.
    fn with_bytes<T>(
        &self,
        entries: &mut [Entry],
        run: impl FnOnce(&mut [Box<dyn ShadowBytes>]) -> Result<T>,
    ) -> Result<T> {
        let nothing = || Box::new(Nothing) as Box<dyn ShadowBytes>;
        let mut bytes: Vec<_> = entries
            .iter_mut()
            .map(|entry| std::mem::replace(&mut entry.bytes, nothing()))
            .collect();
        let result = run(&mut bytes);
        entries.iter_mut().zip(bytes).for_each(|(entry, bytes)| entry.bytes = bytes);
        result
    }

    /// Exchanges the values of weights and of their changes. Returns the old values if they are `wanted`. Blocks.
    ///
    /// # Errors
    ///
    /// `Protocol` if these are not changes of them; `Resource` if one is read and there is no memory for another copy. The bytes of all are
    /// undefined then.
    pub(crate) fn apply(
        &self,
        due: &mut [(usize, Entry, Change)],
        values: &Storage,
        wanted: bool,
    ) -> Result<Option<Storage>> {
        let mut all: Vec<Due<'_>> = due
            .iter_mut()
            .map(|(_, Entry { meta, bytes, .. }, Change { cut, words })| Due {
                name: &meta.name,
                to: bytes,
                cut: *cut,
                words,
            })
            .collect();
        let applied = self.memory.apply(&mut all, values, wanted, &self.pool)?;
        for ((_, entry, _), changed) in due.iter_mut().zip(applied.sums) {
            entry.sum = entry.sum.wrapping_add(changed);
        }
        Ok(applied.undo)
    }

    /// Computes the sums of weights again from memory. Blocks.
    ///
    /// # Errors
    ///
    /// `Digest`, naming the first whose bytes do not have the sum that was kept; those of the device.
    pub(crate) fn attest<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) -> Result<()> {
        let entries: Vec<&Entry> = entries.into_iter().collect();
        let bytes: Vec<&dyn ShadowBytes> = entries.iter().map(|entry| &*entry.bytes).collect();
        let sums = self.memory.sums(&bytes, &self.pool)?;
        let changed = entries.into_iter().zip(sums).find(|(entry, sum)| entry.sum != *sum);
        changed.map_or(Ok(()), |(entry, _)| {
            let message = "bytes in memory are not those that were written there";
            Err(Error::new(ErrorKind::Digest, KEEPING, message).tensor(&*entry.meta.name))
        })
    }
}

impl Entry {
    /// Its bytes in memory.
    pub(crate) fn bytes(&self) -> &dyn ShadowBytes {
        &*self.bytes
    }

    /// The weight that it was added to, if it was.
    pub(crate) fn follows(&self) -> Option<&Arc<str>> {
        self.follows.as_ref()
    }

    /// The number of the part that it belongs to.
    pub(crate) fn part(&self) -> u32 {
        self.part
    }

    /// The bytes, shared.
    pub(crate) fn view(&self) -> Storage {
        self.bytes.view()
    }

    /// The same weight, added to this one.
    pub(crate) fn following(self, follows: Option<Arc<str>>) -> Self {
        Self { follows, ..self }
    }

    /// Adds the weight to the number of a version, with its sum changed by `changed`.
    pub(crate) fn add_to(&self, version: u64, changed: u64) -> u64 {
        digest::chain(digest::chain(version, self.key), self.sum.wrapping_add(changed))
    }
}

fn key(meta: &TensorMeta) -> u64 {
    let mut hash = Sha256::new();
    hash.update((meta.name.len() as u64).to_le_bytes());
    hash.update(meta.name.as_bytes());
    hash.update(meta.dtype.name());
    meta.shape.iter().for_each(|dimension| hash.update(dimension.to_le_bytes()));
    let mut key = [0; 8];
    key.copy_from_slice(&hash.finalize()[..8]);
    u64::from_le_bytes(key)
}

/// In place of bytes that are elsewhere for a moment.
#[derive(Debug)]
struct Nothing;

impl ShadowBytes for Nothing {
    fn len(&self) -> u64 {
        0
    }

    fn view(&self) -> Storage {
        Vec::new().into()
    }
}

impl Shadow {
    /// The number of the version, a digest of its contents: names, types, shapes, order, and every byte by its digest sum.
    pub(crate) fn version(&self) -> u64 {
        self.entries.iter().fold(0, |version, entry| entry.add_to(version, 0))
    }

    /// The number of the version as a rank has it that wants these parts.
    pub(crate) fn version_of(&self, parts: &PartSet) -> u64 {
        let has = |entry: &&Entry| parts.contains(entry.part);
        self.entries.iter().filter(has).fold(0, |version, entry| entry.add_to(version, 0))
    }

    /// Bytes of all weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes.len()).sum()
    }

    /// The index of each weight, by its name.
    pub(crate) fn places(&self) -> HashMap<Arc<str>, usize> {
        let named = self.entries.iter().enumerate();
        named.map(|(at, entry)| (entry.meta.name.clone(), at)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::DType;

    fn copies() -> Copies {
        let pool = Pool::new(2).expect("threads");
        Copies { memory: Arc::new(HostShadows), parts: Parts::default(), batches: 1, pool }
    }

    fn entry(name: &str, bytes: Vec<u8>) -> Entry {
        let weight = Weight::new(name, DType::U8, [bytes.len() as u64], bytes).expect("a weight");
        copies().encoded(&[weight]).expect("memory").remove(0)
    }

    fn write(entries: &mut [Entry], of: usize, start: u64, bytes: Vec<u8>) {
        let part = ShadowPart { of, start, bytes: bytes.into() };
        copies().write(entries, &[part]).expect("memory");
    }

    #[test]
    fn a_byte_that_changed_by_itself_is_found_and_the_weight_named() {
        for (len, at) in [(1, 0), (1000, 999), ((1 << 20) + 100, (1 << 20) + 50)] {
            let mut entries = vec![entry("a", vec![1; 9]), entry("b", vec![2; len])];
            copies().attest(&entries).expect("nothing changed");
            // Written without `seal`: the sum is not updated.
            write(&mut entries, 1, at as u64, vec![3]);
            let error = copies().attest(&entries).expect_err("a byte changed");
            assert_eq!(
                (error.kind(), error.report().tensor.as_deref()),
                (ErrorKind::Digest, Some("b"))
            );
        }
    }

    #[test]
    fn a_weight_that_is_read_is_changed_in_a_copy() {
        let mut entries = vec![entry("a", vec![7; 100])];
        let before = entries[0].view();
        write(&mut entries, 0, 0, vec![8; 100]);
        assert_eq!(before.to_host().expect("host memory")[..], [7; 100]);
        assert_eq!(entries[0].view().to_host().expect("host memory")[..], [8; 100]);
    }

    #[test]
    fn a_part_outside_its_weight_is_refused() {
        let mut entries = vec![entry("a", vec![7; 100])];
        for (of, start) in [(0, 100), (0, u64::MAX), (1, 0)] {
            let part = ShadowPart { of, start, bytes: vec![1].into() };
            let error = copies().write(&mut entries, &[part]).expect_err("outside");
            assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        }
    }

    #[test]
    fn names_types_shapes_order_and_bytes_make_the_number_of_a_version() {
        let version = |entries: Vec<Entry>| Shadow { entries }.version();
        let all = || vec![entry("a", vec![1, 2]), entry("b", vec![3])];
        let mut others = vec![version(Vec::new()), version(all())];
        others.push(version(all().into_iter().rev().collect()));
        others.push(version(vec![entry("a", vec![1, 2])]));
        others.push(version(vec![entry("a", vec![1, 2]), entry("c", vec![3])]));
        others.push(version(vec![entry("a", vec![1, 3]), entry("b", vec![3])]));
        others.push(version(vec![entry("a", vec![1]), entry("b", vec![2, 3])]));
        assert_eq!(version(all()), others[1]);
        others.sort_unstable();
        others.dedup();
        assert_eq!(others.len(), 7);
    }
}

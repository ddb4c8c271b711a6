//! A copy of a version as it travelled: weights in host memory, each with its digest sum.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use engine_core::memory::{Job, Pool, TensorMemory};
use engine_core::{Error, ErrorKind, Result, Storage, TensorMeta, Weight, digest};
use sha2::{Digest, Sha256};

use crate::tiles::{self, Cut};

/// Bytes that one thread sums up at a time.
const GRAIN: usize = 1 << 20;

/// A weight of a version.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) meta: TensorMeta,
    /// A hash of name, type and shape.
    key: u64,
    memory: Memory,
    /// The digest's sum of its bytes.
    sum: u64,
}

/// All weights of a version, in the order sent.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    pub(crate) entries: Vec<Entry>,
}

/// Memory that readers share. It is written in place while nobody reads it. While somebody does, a copy is written and replaces it.
#[derive(Debug)]
struct Memory(Arc<TensorMemory>);

#[derive(Debug)]
struct View(Arc<TensorMemory>);

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
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

const KEEPING: &str = "keeping a copy of what travels";

impl Entry {
    /// A weight whose bytes are not known yet, with new memory.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no memory.
    pub(crate) fn new(meta: TensorMeta) -> Result<Self> {
        let memory = TensorMemory::new(meta.byte_len()?, KEEPING);
        let memory = memory.map_err(|error| error.tensor(&*meta.name))?;
        let mut hash = Sha256::new();
        hash.update((meta.name.len() as u64).to_le_bytes());
        hash.update(meta.name.as_bytes());
        hash.update(meta.dtype.name());
        meta.shape.iter().for_each(|dimension| hash.update(dimension.to_le_bytes()));
        let mut key = [0; 8];
        key.copy_from_slice(&hash.finalize()[..8]);
        let key = u64::from_le_bytes(key);
        Ok(Self { meta, key, memory: Memory(Arc::new(memory)), sum: 0 })
    }

    /// Encodes a weight into new memory. Blocks.
    ///
    /// # Errors
    ///
    /// Those of the encoding, and `Resource`.
    pub(crate) fn encoded(weight: &Weight, pool: &Pool) -> Result<Self> {
        let mut entry = Self::new(weight.meta().clone())?;
        let job = Job { weight: weight.clone(), start: 0, len: weight.byte_len(), offset: 0 };
        entry.sum = pool.encode(&[job], entry.memory.bytes_mut()?, true)?;
        Ok(entry)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.memory.0.bytes()
    }

    /// The bytes, shared.
    pub(crate) fn view(&self) -> Storage {
        Bytes::from_owner(View(self.memory.0.clone())).into()
    }

    /// Writes a part of the bytes. Call [`seal`](Self::seal) when all are written.
    ///
    /// # Errors
    ///
    /// Those of reading a device's memory; `Resource` if the weight is read and there is no memory for another copy.
    pub(crate) fn write(&mut self, start: u64, from: &Storage) -> Result<()> {
        let end = start + from.len();
        let to = self.memory.bytes_mut()?.get_mut(start as usize..end as usize);
        let outside = || {
            Error::new(ErrorKind::Protocol, KEEPING, "a part outside its weight")
                .tensor(&*self.meta.name)
        };
        from.read(0, to.ok_or_else(outside)?)
    }

    /// Computes the digest sum of the bytes. Blocks.
    pub(crate) fn seal(&mut self, pool: &Pool) {
        self.sum = sum(self.bytes(), pool);
    }

    /// Exchanges the values of the weight and of its changes.
    ///
    /// # Errors
    ///
    /// `Protocol` if these are not changes of it, after which its bytes are undefined; `Resource` if it is read and there is no memory for
    /// another copy.
    pub(crate) fn exchange(&mut self, cut: Cut, changes: &mut [u8]) -> Result<()> {
        let changed = tiles::exchange(cut, self.memory.bytes_mut()?, changes).map_err(|words| {
            Error::new(ErrorKind::Protocol, crate::message::APPLYING, words)
                .tensor(&*self.meta.name)
        })?;
        self.sum = self.sum.wrapping_add(changed);
        Ok(())
    }

    /// Adds the weight to the number of a version, with its sum changed by `changed`.
    pub(crate) fn add_to(&self, version: u64, changed: u64) -> u64 {
        digest::chain(digest::chain(version, self.key), self.sum.wrapping_add(changed))
    }
}

impl Shadow {
    /// The number of the version, a digest of its contents: names, types, shapes, order, and every byte by its digest sum.
    pub(crate) fn version(&self) -> u64 {
        self.entries.iter().fold(0, |version, entry| entry.add_to(version, 0))
    }

    /// Bytes of all weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes().len() as u64).sum()
    }

    /// The index of each weight, by its name.
    pub(crate) fn places(&self) -> HashMap<Arc<str>, usize> {
        let named = self.entries.iter().enumerate();
        named.map(|(at, entry)| (entry.meta.name.clone(), at)).collect()
    }

    /// Computes all sums again from memory. Blocks.
    ///
    /// # Errors
    ///
    /// `Digest`, naming the first weight whose bytes do not have the sum that was kept.
    pub(crate) fn attest(&self, pool: &Pool) -> Result<()> {
        attest(&self.entries, pool)
    }
}

/// Computes the sums of weights again from memory. Blocks.
///
/// # Errors
///
/// `Digest`, naming the first whose bytes do not have the sum that was kept.
pub(crate) fn attest<'a>(entries: impl IntoIterator<Item = &'a Entry>, pool: &Pool) -> Result<()> {
    let entries: Vec<&Entry> = entries.into_iter().collect();
    let are_right = pool.map(&entries, |entry| sum(entry.bytes(), pool) == entry.sum);
    let changed = entries.into_iter().zip(are_right).find(|(_, is_right)| !is_right);
    changed.map_or(Ok(()), |(entry, _)| {
        let message = "bytes in memory are not those that were written there";
        Err(Error::new(ErrorKind::Digest, KEEPING, message).tensor(&*entry.meta.name))
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::DType;

    fn pool() -> Pool {
        Pool::new(2).expect("threads")
    }

    fn entry(name: &str, bytes: Vec<u8>) -> Entry {
        let weight = Weight::new(name, DType::U8, [bytes.len() as u64], bytes).expect("a weight");
        Entry::encoded(&weight, &pool()).expect("memory")
    }

    #[test]
    fn a_byte_that_changed_by_itself_is_found_and_the_weight_named() {
        for (len, at) in [(1, 0), (1000, 999), (GRAIN + 100, GRAIN + 50)] {
            let mut shadow =
                Shadow { entries: vec![entry("a", vec![1; 9]), entry("b", vec![2; len])] };
            shadow.attest(&pool()).expect("nothing changed");
            // Written without `seal`: the sum is not updated.
            shadow.entries[1].write(at as u64, &vec![3].into()).expect("a byte");
            let error = shadow.attest(&pool()).expect_err("a byte changed");
            assert_eq!(
                (error.kind(), error.report().tensor.as_deref()),
                (ErrorKind::Digest, Some("b"))
            );
        }
    }

    #[test]
    fn a_weight_that_is_read_is_changed_in_a_copy() {
        let mut entry = entry("a", vec![7; 100]);
        let before = entry.view();
        entry.write(0, &vec![8; 100].into()).expect("memory");
        assert_eq!(before.to_host().expect("host memory")[..], [7; 100]);
        assert_eq!(entry.bytes(), [8; 100]);
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

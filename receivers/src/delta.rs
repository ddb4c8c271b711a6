//! Finds what changed in the weights since they were last sent to the servers.
//!
//! The trainer keeps a copy of what it sent, its *shadow*, and sends the elements that differ from it: their positions and their values,
//! never differences. The shadow moves to the new version when the update is over and the servers that loaded it have confirmed it. A
//! failed update of changes leaves the shadow as it is. An update with all elements replaces the shadow from the beginning: servers that
//! have anything else cannot use the old one.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use engine_core::memory::{Job, Pool};
use engine_core::{ArenaArc, DType, Error, ErrorKind, Result, TensorMeta, Version, Weight};
use serde::Serialize;

use crate::chunk::{Chunk, Tensors, torch_name};

const COMPARING: &str = "comparing a weight with the version before";

/// Elements per piece. Pieces are compared in parallel.
const PIECE: usize = 1 << 20;

/// Elements of a tensor: their flat positions, ascending, as little-endian numbers of 32 bits; and their bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Changes {
    pub(crate) positions: Vec<u8>,
    pub(crate) values: Vec<u8>,
}

/// The elements, of `size` bytes each, in which `new` differs from `old`, bit by bit; all elements without an `old`. Positions are counted
/// from `first`.
pub(crate) fn changes(old: Option<&[u8]>, new: &[u8], size: usize, first: u32) -> Changes {
    /// Bytes that are compared at once, before single elements are.
    const BLOCK: usize = 256;
    let mut found = Changes::default();
    let per_block = (BLOCK / size).max(1);
    for (block, after) in new.chunks(per_block * size).enumerate() {
        let start = block * per_block * size;
        let before = old.map(|old| &old[start..start + after.len()]);
        if before == Some(after) {
            continue;
        }
        for (index, value) in after.chunks_exact(size).enumerate() {
            if before.is_none_or(|before| before[index * size..][..size] != *value) {
                let position = first + (block * per_block + index) as u32;
                found.positions.extend(position.to_le_bytes());
                found.values.extend(value);
            }
        }
    }
    found
}

/// As [`changes`], on all threads of a pool.
fn changes_on(pool: &Pool, old: Option<&[u8]>, new: &[u8], size: usize) -> Changes {
    let pieces = new.chunks(PIECE * size).enumerate();
    let each = |(index, piece): (usize, &[u8])| {
        let start = index * PIECE * size;
        let old = old.map(|old| &old[start..start + piece.len()]);
        changes(old, piece, size, (index * PIECE) as u32)
    };
    let mut all = pool.map(pieces.collect::<Vec<_>>(), each);
    if all.len() == 1 {
        return all.remove(0);
    }
    let join = |part: fn(&Changes) -> &[u8]| all.iter().map(part).collect::<Vec<_>>().concat();
    Changes { positions: join(|part| &part.positions), values: join(|part| &part.values) }
}

/// Whether some element is a NaN.
fn has_nan(dtype: DType, values: &[u8]) -> bool {
    // A NaN is above infinity, apart from the sign.
    match dtype {
        DType::BF16 | DType::F16 => {
            let infinity = if dtype == DType::BF16 { 0x7f80 } else { 0x7c00 };
            let (values, _) = values.as_chunks();
            values.iter().any(|value| u16::from_le_bytes(*value) & 0x7fff > infinity)
        }
        DType::F32 => {
            let (values, _) = values.as_chunks();
            values.iter().any(|value| f32::from_le_bytes(*value).is_nan())
        }
        _ => {
            let (values, _) = values.as_chunks();
            values.iter().any(|value| f64::from_le_bytes(*value).is_nan())
        }
    }
}

/// The bytes of an element of a weight that can be patched.
///
/// # Errors
///
/// `Weight` for other types, and for more elements than positions can address.
fn element(meta: &TensorMeta) -> Result<usize> {
    let refuse = |message: String| {
        Err(Error::new(ErrorKind::Weight, COMPARING, message).tensor(&*meta.name))
    };
    let size = match meta.dtype {
        DType::BF16 | DType::F16 => 2,
        DType::F32 => 4,
        DType::F64 => 8,
        other => {
            let message = format!(
                "{other}: with `delta`, servers take BF16, F16, F32 and F64 alone; send without it, to servers that \
                 were started with the backend nccl"
            );
            return refuse(message);
        }
    };
    if meta.elements()? > i32::MAX as u64 {
        return refuse("it has more elements than a position of 32 bits can name".into());
    }
    Ok(size)
}

/// What the trainer has sent.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    weights: HashMap<Arc<str>, Held>,
    /// The version of the contents. `holders` are the servers that have confirmed it.
    version: Option<Version>,
    holders: HashSet<usize>,
    /// Changes of the present update, which are not applied yet.
    pending: Vec<(ArenaArc<TensorMeta>, Pending)>,
    sent: Sent,
}

#[derive(Debug)]
struct Held {
    meta: ArenaArc<TensorMeta>,
    bytes: Arc<Vec<u8>>,
}

#[derive(Debug)]
enum Pending {
    Patched { positions: Bytes, values: Bytes },
    Whole(Vec<u8>),
}

/// What an update has sent, for its report.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Sent {
    /// The base version of the changes; none if all elements were sent.
    base: Option<Version>,
    /// The number of elements sent. `of` is the number that the weights have.
    elements: u64,
    of: u64,
    /// The bytes of the shadow, in host memory.
    shadow_bytes: u64,
}

/// A weight that was compared.
pub(crate) struct Compared {
    weight: Weight,
    name: &'static str,
    size: usize,
    positions: Bytes,
    values: Bytes,
    /// All bytes, if there was nothing to compare with.
    whole: Option<Vec<u8>>,
}

impl Shadow {
    /// Whether a server has confirmed this version.
    pub(crate) fn is_held_by(&self, server: usize) -> bool {
        self.holders.contains(&server)
    }

    /// Begins an update, of changes or of all elements. One that was not committed is discarded.
    pub(crate) fn begin(&mut self, of_changes: bool) {
        self.pending.clear();
        if !of_changes {
            (self.version, self.weights, self.holders) = Default::default();
        }
        self.sent = Sent { base: self.version, ..Sent::default() };
    }

    /// The bytes with which the weights of a chunk are compared.
    pub(crate) fn base(&self, chunk: &Chunk) -> Vec<Option<Arc<Vec<u8>>>> {
        let base = |job: &Job| {
            let meta = job.weight.meta();
            let held = self.weights.get(&meta.name)?;
            (held.meta == *meta && self.version.is_some()).then(|| held.bytes.clone())
        };
        chunk.jobs.iter().map(base).collect()
    }

    /// Records what changed in a chunk, and makes the chunk that is sent: for each changed weight, its positions and then its values.
    pub(crate) fn patch(&mut self, compared: Vec<Compared>) -> Result<(Chunk, Tensors)> {
        let mut chunk = Chunk { jobs: Vec::new(), len: 0, source_bytes: 0 };
        let mut tensors = Tensors { patches: Some(Vec::new()), ..Tensors::default() };
        for Compared { weight, name, size, positions, values, whole } in compared {
            let (meta, count) = (weight.meta().clone(), positions.len() as u64 / 4);
            chunk.source_bytes += weight.source_bytes();
            self.sent.elements += count;
            self.sent.of += meta.elements()?;
            match whole {
                // All elements are sent: no old version has to be kept.
                Some(bytes) if self.version.is_none() => {
                    let held = Held { meta: meta.clone(), bytes: Arc::new(bytes) };
                    self.weights.insert(meta.name.clone(), held);
                }
                Some(bytes) => self.pending.push((meta.clone(), Pending::Whole(bytes))),
                None if count > 0 => {
                    let (positions, values) = (positions.clone(), values.clone());
                    self.pending.push((meta.clone(), Pending::Patched { positions, values }));
                }
                None => {}
            }
            if count == 0 {
                continue;
            }
            for (dtype, bytes) in [(DType::I32, positions), (meta.dtype, values)] {
                let len = bytes.len() as u64;
                let weight = Weight::new(meta.name.clone(), dtype, [count], bytes)?;
                chunk.jobs.push(Job { start: 0, len, offset: chunk.len, weight });
                chunk.len += len;
            }
            tensors.names.push(meta.name.clone());
            tensors.types.push(name);
            tensors.shapes.push(meta.shape.to_vec());
            tensors.sizes.push(count * (4 + size as u64));
            tensors.patches.get_or_insert_default().push(count);
        }
        Ok((chunk, tensors))
    }

    /// Moves the shadow to the version, which these servers have confirmed.
    pub(crate) fn commit(&mut self, version: Version, loaded: &[usize]) {
        for (meta, change) in self.pending.drain(..) {
            match change {
                Pending::Whole(bytes) => {
                    let held = Held { meta: meta.clone(), bytes: Arc::new(bytes) };
                    self.weights.insert(meta.name.clone(), held);
                }
                Pending::Patched { positions, values } => {
                    let Some(held) = self.weights.get_mut(&meta.name) else { continue };
                    apply(Arc::make_mut(&mut held.bytes).as_mut_slice(), &positions, &values);
                }
            }
        }
        self.version = Some(version);
        self.holders = loaded.iter().copied().collect();
    }

    /// What the update has sent.
    pub(crate) fn sent(&self) -> Sent {
        let shadow_bytes = self.weights.values().map(|held| held.bytes.len() as u64).sum();
        Sent { shadow_bytes, ..self.sent.clone() }
    }
}

/// Writes elements at their positions.
fn apply(bytes: &mut [u8], positions: &[u8], values: &[u8]) {
    let (positions, _) = positions.as_chunks();
    let size = values.len() / positions.len().max(1);
    for (position, value) in positions.iter().zip(values.chunks_exact(size.max(1))) {
        let at = u32::from_le_bytes(*position) as usize * size;
        bytes[at..at + size].copy_from_slice(value);
    }
}

/// Compares the weights of a chunk with what they were.
///
/// Blocks.
///
/// # Errors
///
/// `Weight` for types that cannot be patched, and for NaNs, which servers take for elements that did not change; those of the weights. All
/// name the weight.
pub(crate) fn compare(
    pool: &Pool,
    chunk: Chunk,
    base: Vec<Option<Arc<Vec<u8>>>>,
) -> Result<Vec<Compared>> {
    let each = |(job, base): (Job, Option<Arc<Vec<u8>>>)| {
        let weight = job.weight;
        let (size, name) = (element(weight.meta())?, torch_name(weight.meta())?);
        let new = weight.to_bytes()?;
        let old = base.as_deref().map(Vec::as_slice);
        let Changes { positions, values } = changes_on(pool, old, &new, size);
        if has_nan(weight.meta().dtype, &values) {
            let message = "a value that is not a number: in a patch, servers take it for one that has not changed";
            return Err(Error::new(ErrorKind::Weight, COMPARING, message).tensor(weight.name()));
        }
        let whole = base.is_none().then(|| new.to_vec());
        let (positions, values) = (positions.into(), values.into());
        Ok(Compared { weight, name, size, positions, values, whole })
    };
    pool.map(chunk.jobs.into_iter().zip(base), each).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_changed_is_every_element_that_differs_and_makes_the_old_ones_the_new_ones(
            size in prop_oneof![Just(2_usize), Just(4), Just(8)],
            old in proptest::collection::vec(0_u8..3, 0..3000),
            flips in proptest::collection::vec((any::<prop::sample::Index>(), 0_u8..3), 0..40),
            first in 0_u32..9,
        ) {
            let old = &old[..old.len() / size * size];
            let mut new = old.to_vec();
            for (at, value) in flips {
                if !new.is_empty() {
                    let at = at.index(new.len());
                    new[at] = value;
                }
            }
            let found = changes(Some(old), &new, size, first);
            let differs: Vec<u32> = (0..new.len() / size)
                .filter(|at| old[at * size..][..size] != new[at * size..][..size])
                .map(|at| at as u32 + first)
                .collect();
            let positions: Vec<u32> =
                found.positions.as_chunks().0.iter().map(|at| u32::from_le_bytes(*at)).collect();
            prop_assert_eq!(positions, differs);
            let mut patched = old.to_vec();
            let from_zero = changes(Some(old), &new, size, 0);
            apply(&mut patched, &from_zero.positions, &from_zero.values);
            prop_assert_eq!(&patched, &new);
            let all = changes(None, &new, size, 0);
            prop_assert_eq!(all.values, new);
        }

        #[test]
        fn pieces_on_several_threads_find_what_one_finds(len in 0_usize..3 * PIECE, at in any::<prop::sample::Index>()) {
            let pool = Pool::new(2).expect("threads");
            let old = vec![0_u8; len * 2];
            let mut new = old.clone();
            if len > 0 {
                new[at.index(len) * 2] = 1;
            }
            prop_assert_eq!(changes_on(&pool, Some(&old), &new, 2), changes(Some(&old), &new, 2, 0));
        }
    }

    #[test]
    fn what_is_not_a_number_is_found_in_every_type_and_infinity_is_a_number() {
        let nan = |dtype, bytes: &[u8]| has_nan(dtype, bytes);
        assert!(
            nan(DType::BF16, &0xffc0_u16.to_le_bytes())
                && !nan(DType::BF16, &0xff80_u16.to_le_bytes())
        );
        assert!(
            nan(DType::F16, &0x7c01_u16.to_le_bytes())
                && !nan(DType::F16, &0xfc00_u16.to_le_bytes())
        );
        assert!(
            nan(DType::F32, &f32::NAN.to_le_bytes())
                && !nan(DType::F32, &f32::INFINITY.to_le_bytes())
        );
        assert!(nan(DType::F64, &f64::NAN.to_le_bytes()) && !nan(DType::F64, &0_f64.to_le_bytes()));
    }
}

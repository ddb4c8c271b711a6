//! Tensors of a program in host memory: where they lie in what is lent, and writing to them from this process.
#![allow(unsafe_code, reason = "the promise of a program that lends its own tensors")]

use std::cell::UnsafeCell;

use bytes::Bytes;
use engine_core::{Error, ErrorKind, Result, available_memory};

use crate::memory::LentBytes;
use crate::parcels::{Run, SCATTERING, Scatter, places};
use crate::parts::Parts;
use crate::rollout::Layout;
use crate::tensors::LentTensor;

/// Ranges of memory begin at multiples of it in what is lent, or as far behind one as their addresses do, so that offsets there are aligned as
/// addresses are.
const PAGE: u64 = 4096;

/// A range of host memory, and its place in what is lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRange {
    /// The offset of its first byte in what is lent.
    pub at: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its address in this process.
    pub address: u64,
}

/// Ranges of host memory that do not touch, in ascending order of their addresses and of their places.
#[derive(Clone, Debug)]
pub struct HostRanges(Vec<HostRange>);

impl HostRanges {
    /// Those of some bytes, put together where they touch or overlap. Their places are behind `from`.
    pub fn new<'a>(from: u64, all: impl IntoIterator<Item = &'a Bytes>) -> Self {
        let all = all.into_iter().map(range).filter(|(_, len)| *len > 0);
        Self::of_addresses(from, all.collect())
    }

    fn of_addresses(from: u64, mut all: Vec<(u64, u64)>) -> Self {
        all.sort_unstable();
        let mut ranges: Vec<HostRange> = Vec::new();
        for (address, len) in all {
            let end = ranges.last().map_or(from, |range| range.at + range.bytes);
            match ranges.last_mut().filter(|range| address <= range.address + range.bytes) {
                Some(range) => range.bytes = range.bytes.max(address + len - range.address),
                None => {
                    let at = end.next_multiple_of(PAGE) + address % PAGE;
                    ranges.push(HostRange { at, bytes: len, address });
                }
            }
        }
        Self(ranges)
    }

    /// The ranges.
    pub fn all(&self) -> &[HostRange] {
        &self.0
    }

    /// The offset behind the last of them, or `from` without any.
    pub fn end(&self, from: u64) -> u64 {
        self.0.last().map_or(from, |range| range.at + range.bytes)
    }

    /// The number of the range that has these bytes, and their offset in what is lent. Those of a tensor without elements are nowhere.
    pub fn find(&self, bytes: &Bytes) -> Option<(usize, u64)> {
        let (address, len) = range(bytes);
        let after = self.0.partition_point(|range| range.address <= address);
        let number = after.checked_sub(1).filter(|_| len > 0)?;
        let range = self.0.get(number)?;
        let from = address - range.address;
        (from + len <= range.bytes).then_some((number, range.at + from))
    }
}

fn range(bytes: &Bytes) -> (u64, u64) {
    (bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64)
}

/// Host memory of tensors that this process writes to, by its offsets in what is lent.
#[derive(Debug)]
pub struct HostTensors(Parts<Bytes>);

/// Memory for tensors, which is written to while nobody reads it.
struct Owned(Box<[UnsafeCell<u8>]>);

// SAFETY: it is memory like any other. Who writes to it is what the promise of `HostTensors::new` is about.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: so many initialised bytes are there, and nobody writes to them while they are read.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len()) }
    }
}

impl HostTensors {
    /// These bytes, each with its offset. They do not overlap.
    ///
    /// # Safety
    ///
    /// All of them are memory of [tensors that are lent](crate::LentTensor). Nothing is [scattered](Scatter::scatter) while such bytes are
    /// read, nor by two threads at the same time.
    pub unsafe fn new(bytes: impl IntoIterator<Item = (u64, Bytes)>) -> Self {
        Self(Parts::new(bytes.into_iter().map(|(at, bytes)| (at, bytes.len() as u64, bytes))))
    }

    /// Tensors of a program, where they are, and their layout.
    ///
    /// # Safety
    ///
    /// As of [`new`](Self::new).
    ///
    /// # Errors
    ///
    /// `Mismatch` for a tensor on a device, `Weight` for tensors that share memory; both name it.
    pub unsafe fn of(tensors: impl IntoIterator<Item = LentTensor>) -> Result<(Layout, Self)> {
        let tensors: Vec<_> =
            tensors.into_iter().map(LentTensor::into_host_parts).collect::<Result<_>>()?;
        let ranges = HostRanges::new(0, tensors.iter().flat_map(|(_, both)| both));
        let at = |bytes: &Bytes| ranges.find(bytes).map_or(0, |(_, at)| at);
        let wanted = tensors
            .iter()
            .map(|(wanted, [elements, scales])| (wanted.clone(), at(elements), at(scales)));
        let layout = Layout::at(wanted.collect::<Vec<_>>(), ranges.end(0))?;
        let bytes = tensors.into_iter().flat_map(|(_, both)| both);
        let bytes: Vec<_> = bytes.map(|bytes| (at(&bytes), bytes)).collect();
        // SAFETY: they are tensors that are lent, and the rest is the caller's promise.
        Ok((layout, unsafe { Self::new(bytes) }))
    }

    /// So many bytes of new memory, which is zeroed.
    ///
    /// # Safety
    ///
    /// As of [`new`](Self::new).
    ///
    /// # Errors
    ///
    /// `Resource` if there is not so much.
    pub unsafe fn allocate(bytes: u64) -> Result<Self> {
        let available = available_memory().is_none_or(|available| bytes <= available);
        let len = usize::try_from(bytes).ok().filter(|_| available).ok_or_else(|| {
            let message = format!("no memory for {bytes} bytes of tensors");
            Error::new(ErrorKind::Resource, "lending tensors", message)
        })?;
        let memory = std::iter::repeat_with(|| UnsafeCell::new(0)).take(len).collect();
        // SAFETY: it is memory that nobody else has, and the rest is the caller's promise.
        Ok(unsafe { Self::new([(0, Bytes::from_owner(Owned(memory)))]) })
    }

    /// The offset behind the last byte.
    #[expect(
        clippy::len_without_is_empty,
        reason = "as of a lender, which is empty without tensors alone"
    )]
    pub fn len(&self) -> u64 {
        self.0.end()
    }

    /// As [`Lender::bytes`](crate::Lender::bytes).
    ///
    /// # Errors
    ///
    /// `State` for bytes that are not in one piece.
    pub fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>> {
        self.0.bytes(at, len).map(LentBytes::Host).ok_or_else(|| {
            let message = format!("{len} bytes at {at} are in no tensor that is lent");
            Error::new(ErrorKind::State, "reading what is lent", message)
        })
    }
}

impl Scatter for HostTensors {
    fn scatter(&self, runs: &[Run], parcel: &[u8]) -> Result<()> {
        for place in places(runs, parcel.len() as u64) {
            let (from, Run { at, len, rows, stride }) = place?;
            for row in 0..rows {
                // `places` has made sure that they are within the parcel.
                let from = (from + row * len) as usize;
                self.write(at + row * stride, &parcel[from..from + len as usize])?;
            }
        }
        Ok(())
    }
}

impl HostTensors {
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        // Tensors may be neighbours.
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let (own, from, left) = self.0.rest(at).ok_or_else(|| {
                let message = format!("the byte at {at} is in no tensor for which parcels come");
                Error::new(ErrorKind::Protocol, SCATTERING, message)
            })?;
            let here = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
            let (now, later) = rest.split_at(here);
            let address = own.as_ptr().expose_provenance() + from as usize;
            let to = std::ptr::with_exposed_provenance_mut::<u8>(address);
            // SAFETY: `rest` has made sure that so many bytes are within `own`. They are those of a lent tensor, whose program has promised
            // that they may be written to, and that it does not access them meanwhile; or they are memory of a transport. `new` has the
            // promise that nobody else accesses them. A parcel is memory of its own.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), to, now.len()) };
            (at, rest) = (at + here as u64, later);
        }
        Ok(())
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
            from in 0_u64..10_000,
        ) {
            let found = HostRanges::of_addresses(from, ranges.clone());
            for pair in found.all().windows(2) {
                prop_assert!(pair[0].address + pair[0].bytes < pair[1].address);
                prop_assert!(pair[0].at + pair[0].bytes <= pair[1].at);
            }
            prop_assert!(found.all().iter().all(|range| range.at >= from));
            let place = |(address, len): (u64, u64)| {
                let holds = |range: &&HostRange| {
                    range.address <= address && address + len <= range.address + range.bytes
                };
                let all: Vec<_> = found.all().iter().filter(holds).collect();
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

    #[test]
    fn a_parcel_is_scattered_to_tensors_and_nothing_beside_them() {
        let memory = [vec![0_u8; 8], vec![0; 4]].map(Bytes::from_owner);
        let [one, other] = memory.clone();
        // SAFETY: they are read only when nothing is scattered.
        let tensors = unsafe { HostTensors::new([(16, one), (24, other)]) };
        let parcel: Vec<u8> = (1..=10).collect();
        // The second run is in both.
        let runs = [Run { at: 17, len: 1, rows: 2, stride: 1 }, Run::together(20, 8)];
        tensors.scatter(&runs, &parcel).expect("places");
        let bytes = |at, len| match tensors.bytes(at, len).expect("a tensor") {
            LentBytes::Host(bytes) => bytes.to_vec(),
            LentBytes::Device(_) => unreachable!("host memory"),
        };
        assert_eq!(bytes(16, 8), [0, 1, 2, 0, 3, 4, 5, 6]);
        assert_eq!(bytes(24, 4), [7, 8, 9, 10]);
        for outside in [0, 15, 27, 28, u64::MAX - 1] {
            let error =
                tensors.scatter(&[Run::together(outside, 2)], &parcel).expect_err("no place");
            assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        }
    }
}

//! Scales that launches have computed and that nobody has asked for yet.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Weak};

use engine_core::Encoding;

/// Where scales of weights are, and which scales are there.
///
/// It identifies a weight by its encoding, and its entries hold for that encoding alone: they list the scales that launches have written,
/// whatever was sent before.
#[derive(Debug)]
pub(crate) struct Ledger<P>(HashMap<usize, Entry<P>>);

#[derive(Debug)]
struct Entry<P> {
    /// Keeps the address from being reused.
    of: Weak<dyn Encoding>,
    place: P,
    /// Sorted ranges that do not touch one another.
    known: Vec<Range<usize>>,
}

impl<P> Default for Ledger<P> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

/// The key of an encoding in a ledger.
pub(crate) fn key<T: ?Sized>(encoding: &Arc<T>) -> usize {
    Arc::as_ptr(encoding).cast::<()>().addr()
}

impl<P: Clone + PartialEq> Ledger<P> {
    /// The place of an encoding's scales.
    pub(crate) fn place(&self, key: usize) -> Option<&P> {
        self.0.get(&key).map(|entry| &entry.place)
    }

    /// Which scales are there.
    fn known(&self, key: usize) -> &[Range<usize>] {
        self.0.get(&key).map_or(&[], |entry| &entry.known)
    }

    /// Records that scales of an encoding are at a place.
    pub(crate) fn add(&mut self, of: &Arc<dyn Encoding>, place: &P, scales: Range<usize>) {
        let entry = self.0.entry(key(of)).or_insert_with(|| Entry {
            of: Arc::downgrade(of),
            place: place.clone(),
            known: Vec::new(),
        });
        entry.add(scales);
    }

    /// The place of scales, if all of them are there: some by this ledger, others by `more`.
    pub(crate) fn covers<'a>(
        &'a self,
        more: &'a Self,
        key: usize,
        scales: &Range<usize>,
    ) -> Option<&'a P> {
        let mut all: Vec<_> = self.known(key).iter().chain(more.known(key)).cloned().collect();
        all.sort_by_key(|range| range.start);
        let mut from = scales.start;
        for range in all.iter().filter(|range| !range.is_empty()) {
            if range.start > from {
                break;
            }
            from = from.max(range.end);
        }
        (from >= scales.end).then(|| self.place(key).or_else(|| more.place(key)))?
    }

    /// Merges another ledger, and forgets encodings that were dropped.
    pub(crate) fn extend(&mut self, more: Self) {
        for (key, entry) in more.0 {
            match self.0.get_mut(&key) {
                Some(here) if here.place == entry.place => {
                    entry.known.into_iter().for_each(|range| here.add(range));
                }
                // The newer entry wins: scales may have been computed elsewhere meanwhile.
                _ => drop(self.0.insert(key, entry)),
            }
        }
        self.0.retain(|_, entry| entry.of.strong_count() > 0);
    }

    /// Forgets an encoding, all of whose scales were asked for.
    pub(crate) fn forget(&mut self, key: usize) {
        self.0.remove(&key);
    }
}

impl<P> Entry<P> {
    fn add(&mut self, scales: Range<usize>) {
        self.known.push(scales);
        self.known.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<usize>> = Vec::with_capacity(self.known.len());
        for range in self.known.drain(..) {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        self.known = merged;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug)]
    struct Nothing;

    impl Encoding for Nothing {
        fn name(&self) -> &'static str {
            "nothing"
        }
        fn source_bytes(&self) -> u64 {
            0
        }
        fn encode_host(&self, _: Range<u64>, _: &mut [u8]) -> engine_core::Result<()> {
            Ok(())
        }
    }

    fn encoding() -> Arc<dyn Encoding> {
        Arc::new(Nothing)
    }

    #[test]
    fn an_encoding_that_is_sent_again_has_the_scales_that_were_written_and_no_others() {
        let (weight, mut ledger) = (encoding(), Ledger::default());
        let none = Ledger::default();
        let key = key(&weight);
        // The first time, codes and scales are in one bucket: nothing is kept.
        assert_eq!(ledger.covers(&none, key, &(0..4)), None::<&u32>);
        // The second time, the codes are in two buckets, the second of which another rank fills.
        let mut now = Ledger::default();
        now.add(&weight, &7, 0..2);
        assert_eq!(ledger.covers(&now, key, &(0..2)), Some(&7));
        assert_eq!(ledger.covers(&now, key, &(0..4)), None);
        ledger.extend(now);
        let mut now = Ledger::default();
        now.add(&weight, &7, 2..4);
        assert_eq!(ledger.covers(&now, key, &(0..4)), Some(&7));
        ledger.extend(now);
        ledger.forget(key);
        assert_eq!(ledger.covers(&none, key, &(0..1)), None);
    }

    #[test]
    fn an_encoding_that_is_gone_is_forgotten_and_never_taken_for_another_one() {
        let mut ledger = Ledger::default();
        let weight = encoding();
        ledger.add(&weight, &1, 0..4);
        drop(weight);
        // Its address is not reused as long as the ledger knows it.
        let others: Vec<_> = (0..100).map(|_| encoding()).collect();
        let none = Ledger::default();
        assert!(others.iter().all(|other| ledger.covers(&none, key(other), &(0..1)).is_none()));
        ledger.extend(Ledger::default());
        assert!(ledger.0.is_empty());
    }

    proptest! {
        #[test]
        fn scales_are_covered_exactly_when_each_of_them_was_written(
            here in proptest::collection::vec((0_usize..40, 0_usize..10), 0..8),
            more in proptest::collection::vec((0_usize..40, 0_usize..10), 0..8),
            asked in (0_usize..45, 1_usize..12),
        ) {
            let weight = encoding();
            let (mut kept, mut now) = (Ledger::default(), Ledger::default());
            let mut written = [false; 64];
            for (ledger, ranges) in [(&mut kept, here), (&mut now, more)] {
                for (start, len) in ranges {
                    ledger.add(&weight, &(), start..start + len);
                    written[start..start + len].fill(true);
                }
            }
            let asked = asked.0..asked.0 + asked.1;
            let all = written[asked.clone()].iter().all(|written| *written);
            let key = key(&weight);
            prop_assert_eq!(kept.covers(&now, key, &asked).is_some(), all);
            kept.extend(now);
            prop_assert_eq!(kept.covers(&Ledger::default(), key, &asked).is_some(), all);
        }
    }
}

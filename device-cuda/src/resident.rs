//! Keeps tables on the device, for updates that repeat.

use std::collections::{HashMap, HashSet};

use engine_core::digest;

/// The most bytes of all tables that stay: on the device, and again on the host.
pub(crate) const MOST_BYTES: usize = 32 << 20;

/// The most keys of tables that are remembered as seen, eight bytes each.
const MOST_SEEN: usize = 1 << 14;

/// Tables that stay on a device, identified by their bytes: equal bytes are the same table, however they were made.
///
/// A table stays from its second use on, so that a table that is used once takes no memory. It consists of bytes alone: it does not keep
/// the memory behind its addresses alive, and only callers that have that memory now launch it.
#[derive(Debug)]
pub(crate) struct Resident<M> {
    tables: HashMap<u64, Stays<M>>,
    seen: HashSet<u64>,
    bytes: usize,
    most: usize,
    /// The number of calls of [`want`](Self::want) so far.
    now: u64,
}

#[derive(Debug)]
struct Stays<M> {
    bytes: Box<[u8]>,
    memory: M,
    wanted: u64,
}

/// What is known of a table.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Known<M> {
    /// It is on the device.
    Here(M),
    /// It was wanted before, so [keep](Resident::keep) it.
    Again,
    New,
}

impl<M: Clone> Resident<M> {
    /// An empty one, in which at most `most` bytes stay.
    pub(crate) fn new(most: usize) -> Self {
        Self { tables: HashMap::new(), seen: HashSet::new(), bytes: 0, most, now: 0 }
    }

    /// Looks up a table that is wanted now.
    pub(crate) fn want(&mut self, table: &[u8]) -> Known<M> {
        self.now += 1;
        // The key only finds a table; its bytes decide.
        let key = digest::sum(0, table);
        if let Some(stays) = self.tables.get_mut(&key)
            && *stays.bytes == *table
        {
            stays.wanted = self.now;
            return Known::Here(stays.memory.clone());
        }
        if self.seen.len() >= MOST_SEEN {
            self.seen.clear();
        }
        if self.seen.insert(key) { Known::New } else { Known::Again }
    }

    /// Keeps a table that is in `memory`, if there is room. Tables that are wanted less often make room.
    pub(crate) fn keep(&mut self, table: &[u8], memory: M) {
        let key = digest::sum(0, table);
        self.remove(key);
        while self.bytes + table.len() > self.most {
            let eldest = self.tables.iter().min_by_key(|(_, stays)| stays.wanted);
            let Some((&eldest, stays)) = eldest else { return };
            // All tables are wanted in turn: keeping one more would evict the next one.
            if self.now - stays.wanted <= 2 * self.tables.len() as u64 {
                return;
            }
            self.remove(eldest);
        }
        self.bytes += table.len();
        self.tables.insert(key, Stays { bytes: table.into(), memory, wanted: self.now });
    }

    /// Forgets all tables: after failed work, tables on their way may not have arrived.
    pub(crate) fn clear(&mut self) {
        self.tables.clear();
        self.bytes = 0;
    }

    /// Bytes of the tables that stay.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn remove(&mut self, key: u64) {
        if let Some(gone) = self.tables.remove(&key) {
            self.bytes -= gone.bytes.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A device: the tables that were copied to it, by their places.
    #[derive(Default)]
    struct Brought(Vec<Vec<u8>>);

    /// Launches a table as the kernels do. Returns the bytes that the launch reads, and whether they were brought now.
    fn launch(
        resident: &mut Resident<usize>,
        brought: &mut Brought,
        table: &[u8],
    ) -> (Vec<u8>, bool) {
        match resident.want(table) {
            Known::Here(at) => (brought.0[at].clone(), false),
            known => {
                brought.0.push(table.to_vec());
                if known == Known::Again {
                    resident.keep(table, brought.0.len() - 1);
                }
                (table.to_vec(), true)
            }
        }
    }

    #[test]
    fn the_tables_of_an_update_that_repeats_are_brought_twice_and_then_never_again() {
        let tables: Vec<Vec<u8>> = (0..28_u8).map(|bucket| vec![bucket; 1000]).collect();
        let (mut resident, mut brought) = (Resident::new(1 << 20), Brought::default());
        for update in 0..5 {
            for table in &tables {
                let (_, was_brought) = launch(&mut resident, &mut brought, table);
                assert_eq!(was_brought, update < 2, "update {update}");
            }
        }
        assert_eq!(resident.bytes(), 28_000);
    }

    #[test]
    fn addresses_that_move_in_every_update_take_no_memory() {
        let (mut resident, mut brought) = (Resident::new(1 << 20), Brought::default());
        for update in 0..1000_u32 {
            launch(&mut resident, &mut brought, &update.to_le_bytes().repeat(20));
        }
        assert_eq!(resident.bytes(), 0);
    }

    #[test]
    fn the_tables_of_a_model_that_is_gone_make_room_for_those_of_the_next_one() {
        let (mut resident, mut brought) = (Resident::new(10_000), Brought::default());
        for model in 0..3_u8 {
            let tables: Vec<Vec<u8>> = (0..9).map(|at| vec![model * 16 + at; 1000]).collect();
            let mut last = Vec::new();
            for _ in 0..8 {
                last = tables.iter().map(|t| launch(&mut resident, &mut brought, t).1).collect();
            }
            assert_eq!(last, [false; 9], "model {model}");
        }
    }

    #[test]
    fn what_was_forgotten_is_brought_again() {
        let (mut resident, mut brought) = (Resident::new(10_000), Brought::default());
        for _ in 0..3 {
            launch(&mut resident, &mut brought, &[1; 100]);
        }
        assert!(!launch(&mut resident, &mut brought, &[1; 100]).1);
        resident.clear();
        assert!(launch(&mut resident, &mut brought, &[1; 100]).1);
        assert!(!launch(&mut resident, &mut brought, &[1; 100]).1);
    }

    proptest! {
        #[test]
        fn a_launch_reads_the_bytes_of_its_own_table_and_what_stays_is_bounded(
            most in 0_usize..400,
            wanted in proptest::collection::vec((0_u8..12, 0_usize..100, 0_u8..40), 0..300),
        ) {
            let (mut resident, mut brought) = (Resident::new(most), Brought::default());
            for (byte, len, what) in wanted {
                if what == 0 {
                    resident.clear();
                }
                let table = vec![byte; len];
                let (read, _) = launch(&mut resident, &mut brought, &table);
                prop_assert_eq!(read, table);
                prop_assert!(resident.bytes() <= most);
                let all: usize = resident.tables.values().map(|stays| stays.bytes.len()).sum();
                prop_assert_eq!(all, resident.bytes());
            }
        }
    }
}

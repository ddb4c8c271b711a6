//! Parcels: how bytes get to a rollout whose tensors a trainer cannot write to by itself. The trainer packs them, with the places where they
//! belong, into bounded memory. A transport carries that to the rollout, which copies them to their places and gives the memory back.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use engine_core::{Error, ErrorKind, Result};

/// The most runs of a parcel.
pub const RUNS: usize = 2048;

/// Rows of bytes that belong at equal distances in what is lent. In the parcel they follow one another, behind those of the run before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The offset of the first row in what is lent.
    pub at: u64,
    /// The bytes of a row.
    pub len: u64,
    /// The number of rows.
    pub rows: u64,
    /// How far the beginning of a row is behind that of the row before.
    pub stride: u64,
}

impl Run {
    /// Bytes of its own form.
    pub const BYTES: usize = 32;

    /// Bytes that lie together.
    pub fn together(at: u64, len: u64) -> Self {
        Self { at, len, rows: 1, stride: len }
    }

    /// All of its bytes; `None` if these are none, or not all of their offsets are numbers of 64 bits.
    pub fn bytes(&self) -> Option<u64> {
        let Self { at, len, rows, stride } = *self;
        let last = rows.checked_sub(1)?.checked_mul(stride)?.checked_add(at)?;
        last.checked_add(len)?;
        len.checked_mul(rows).filter(|bytes| *bytes > 0)
    }

    /// The bytes of these runs together: `u64::MAX` if one of them has [none](Self::bytes).
    pub fn all_bytes(runs: &[Self]) -> u64 {
        runs.iter().map(|run| run.bytes().unwrap_or(u64::MAX)).fold(0, u64::saturating_add)
    }

    /// Whether more bytes continue it, which it then has. A single row grows, or begins a row like it behind itself.
    pub(crate) fn takes(&mut self, at: u64, len: u64) -> bool {
        let Self { at: first, len: own, rows, stride } = *self;
        if rows == 1 && first + own == at {
            *self = Self::together(first, own + len);
            return true;
        }
        let is_next = own == len
            && match rows {
                1 => at > first + own,
                _ => at == first + rows * stride,
            };
        if is_next {
            *self = Self { rows: rows + 1, stride: (at - first) / rows, ..*self };
        }
        is_next
    }

    /// Its form in a parcel.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut all = [0; Self::BYTES];
        let words = [self.at, self.len, self.rows, self.stride];
        for (to, word) in all.as_chunks_mut().0.iter_mut().zip(words) {
            *to = u64::to_le_bytes(word);
        }
        all
    }

    /// The run that has this form, which comes from another process.
    pub fn of_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let (words, _) = bytes.as_chunks();
        let word = |number: usize| words.get(number).map_or(0, |word| u64::from_le_bytes(*word));
        Self { at: word(0), len: word(1), rows: word(2), stride: word(3) }
    }
}

/// A run, and where its rows are in a trainer's memory, at the same distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gathered {
    /// What belongs together at the rollout.
    pub run: Run,
    /// The offset of its first row in the trainer's memory.
    pub from: u64,
}

/// Cuts runs into parcels. Each has `most` bytes and [`RUNS`] runs at the most.
pub fn cut(runs: &[Gathered], most: u64) -> Vec<Vec<Gathered>> {
    let (mut parcels, mut parcel, mut left) = (Vec::new(), Vec::new(), most);
    let mut rest: Vec<Gathered> = runs.iter().rev().copied().collect();
    while let Some(next) = rest.pop() {
        let Gathered { run: Run { at, len, rows, stride }, from } = next;
        if len == 0 || rows == 0 {
            continue;
        }
        let (whole, is_full) = ((left / len).min(rows), parcel.len() == RUNS);
        let behind = |rows: u64| Gathered {
            run: Run { at: at + rows * stride, rows: next.run.rows - rows, ..next.run },
            from: from + rows * stride,
        };
        if whole > 0 && !is_full {
            parcel.push(Gathered { run: Run { rows: whole, ..next.run }, from });
            left -= whole * len;
            rest.extend((whole < rows).then(|| behind(whole)));
        } else if parcel.is_empty() {
            // A row that is longer than a parcel.
            parcel.push(Gathered { run: Run::together(at, most), from });
            rest.extend((rows > 1).then(|| behind(1)));
            rest.push(Gathered { run: Run::together(at + most, len - most), from: from + most });
            left = 0;
        } else {
            parcels.push(std::mem::take(&mut parcel));
            rest.push(next);
            left = most;
        }
    }
    parcels.extend((!parcel.is_empty()).then_some(parcel));
    parcels
}

/// Memory for the bytes of a parcel.
pub trait Room: fmt::Debug + Send {
    /// Its length in bytes.
    fn len(&self) -> usize;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes bytes that are within it.
    fn write(&mut self, at: usize, bytes: &[u8]);
}

/// Carries a trainer's parcels to one rollout.
pub trait Carrier: fmt::Debug + Send + Sync {
    /// The memory of a parcel.
    type Room: Room;

    /// Memory for the next parcel. Waits until the rollout has given some back.
    ///
    /// # Errors
    ///
    /// `PeerLost` if the rollout has ended, `Timeout` if it gives none back; both name it.
    fn room(&self) -> Result<Self::Room>;

    /// Hands a parcel over: the runs fill the memory from its beginning.
    ///
    /// # Errors
    ///
    /// Those of the transport, which name the rollout.
    fn send(&self, room: Self::Room, runs: &[Run]) -> Result<()>;

    /// Waits until the rollout has scattered all parcels.
    ///
    /// # Errors
    ///
    /// As [`room`](Self::room), and `Protocol` if the rollout has refused a parcel.
    fn wait(&self) -> Result<()>;
}

/// Packs what is put into parcels.
#[derive(Debug)]
pub struct Packing<C: Carrier> {
    carrier: C,
    /// The parcel that is being filled.
    open: Mutex<Option<Open<C::Room>>>,
}

#[derive(Debug)]
struct Open<R> {
    room: R,
    used: usize,
    runs: Vec<Run>,
}

impl<R: Room> Open<R> {
    /// Adds as many bytes as there is room for, and returns how many.
    fn add(&mut self, at: u64, bytes: &[u8]) -> usize {
        let len = bytes.len().min(self.room.len() - self.used);
        if !self.runs.last_mut().is_some_and(|run| run.takes(at, len as u64)) {
            self.runs.push(Run::together(at, len as u64));
        }
        self.room.write(self.used, &bytes[..len]);
        self.used += len;
        len
    }

    fn is_full(&self) -> bool {
        self.used == self.room.len() || self.runs.len() == RUNS
    }
}

impl<C: Carrier> Packing<C> {
    /// Packs for this carrier.
    pub fn new(carrier: C) -> Self {
        Self { carrier, open: Mutex::new(None) }
    }

    /// The carrier.
    pub fn carrier(&self) -> &C {
        &self.carrier
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open<C::Room>>> {
        // A parcel that a panic has interrupted is taken out, and its update fails.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Reached::put`](crate::Reached::put).
    ///
    /// # Errors
    ///
    /// Those of the carrier.
    pub fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut open = self.lock();
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let mut parcel = match open.take() {
                Some(parcel) => parcel,
                None => Open { room: self.carrier.room()?, used: 0, runs: Vec::new() },
            };
            let taken = parcel.add(at, rest);
            (at, rest) = (at + taken as u64, &rest[taken..]);
            if parcel.is_full() {
                self.carrier.send(parcel.room, &parcel.runs)?;
            } else {
                *open = Some(parcel);
            }
        }
        Ok(())
    }

    /// As [`Reached::flush`](crate::Reached::flush).
    ///
    /// # Errors
    ///
    /// Those of the carrier.
    pub fn flush(&self) -> Result<()> {
        let mut open = self.lock();
        if let Some(parcel) = open.take() {
            self.carrier.send(parcel.room, &parcel.runs)?;
        }
        self.carrier.wait()
    }
}

/// Memory of a rollout to which it copies what comes in parcels.
pub trait Scatter: fmt::Debug + Send + Sync {
    /// Copies the bytes of a parcel to their places, and returns when they are there. After an error some of them may be there.
    ///
    /// # Errors
    ///
    /// `Protocol` for runs that are longer than the parcel or in no tensor for which parcels come; those of the device.
    fn scatter(&self, runs: &[Run], parcel: &[u8]) -> Result<()>;
}

/// Where each run of a parcel of so many bytes begins in it, with the run.
///
/// # Errors
///
/// `Protocol` for a run without bytes, and for one that ends behind the parcel.
pub fn places(runs: &[Run], bytes: u64) -> impl Iterator<Item = Result<(u64, Run)>> + '_ {
    let mut from = 0_u64;
    runs.iter().map(move |run| {
        let start = from;
        let end = run.bytes().and_then(|len| from.checked_add(len)).filter(|end| *end <= bytes);
        from = end.ok_or_else(|| {
            let message = format!("runs of none or of more than its {bytes} bytes");
            Error::new(ErrorKind::Protocol, SCATTERING, message)
        })?;
        Ok((start, *run))
    })
}

pub(crate) const SCATTERING: &str = "scattering a parcel";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A rollout that scatters each parcel as it comes.
    #[derive(Debug)]
    struct Rollout {
        memory: Mutex<Vec<u8>>,
        sent: Mutex<Vec<Vec<Run>>>,
        room: usize,
    }

    impl Room for Vec<u8> {
        fn len(&self) -> usize {
            self.len()
        }

        fn write(&mut self, at: usize, bytes: &[u8]) {
            self[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    impl Scatter for Rollout {
        fn scatter(&self, runs: &[Run], parcel: &[u8]) -> Result<()> {
            let mut memory = self.memory.lock().expect("no panic");
            for place in places(runs, parcel.len() as u64) {
                let (from, run) = place?;
                for row in 0..run.rows {
                    let (from, at) =
                        ((from + row * run.len) as usize, (run.at + row * run.stride) as usize);
                    let len = run.len as usize;
                    memory[at..at + len].copy_from_slice(&parcel[from..from + len]);
                }
            }
            Ok(())
        }
    }

    impl Carrier for &Rollout {
        type Room = Vec<u8>;

        fn room(&self) -> Result<Vec<u8>> {
            Ok(vec![0; self.room])
        }

        fn send(&self, room: Vec<u8>, runs: &[Run]) -> Result<()> {
            self.sent.lock().expect("no panic").push(runs.to_vec());
            self.scatter(runs, &room)
        }

        fn wait(&self) -> Result<()> {
            Ok(())
        }
    }

    fn rollout(bytes: usize, room: usize) -> Rollout {
        Rollout { memory: Mutex::new(vec![0; bytes]), sent: Mutex::default(), room }
    }

    proptest! {
        #[test]
        fn what_is_put_is_where_it_belongs_once_it_was_flushed(
            puts in proptest::collection::vec((0_usize..80, 1_usize..40), 0..20),
            room in 1_usize..60,
        ) {
            let rollout = rollout(128, room);
            let packing = Packing::new(&rollout);
            let mut expected = vec![0; 128];
            for (number, (at, len)) in (1_u8..).zip(puts) {
                packing.put(at as u64, &vec![number; len]).expect("room");
                expected[at..at + len].fill(number);
            }
            packing.flush().expect("a rollout");
            prop_assert_eq!(&*rollout.memory.lock().expect("no panic"), &expected);
        }
    }

    #[test]
    fn neighbours_and_rows_are_one_run_and_a_parcel_has_no_more_runs_than_its_limit() {
        let rollout = rollout(1 << 27, 1 << 16);
        let packing = Packing::new(&rollout);
        for at in 0..16 {
            packing.put(at, &[1]).expect("room");
        }
        for row in 0..9 {
            packing.put(100 + row * 30, &[2; 7]).expect("room");
        }
        // Two of them are rows of a run, unless its first one fills a parcel.
        for number in 30..30 + 4 * RUNS as u64 {
            packing.put(number * number, &[1]).expect("room");
        }
        packing.flush().expect("a rollout");
        let sent = rollout.sent.lock().expect("no panic");
        assert_eq!(sent[0][0], Run::together(0, 16));
        assert_eq!(sent[0][1], Run { at: 100, len: 7, rows: 9, stride: 30 });
        let runs: Vec<usize> = sent.iter().map(Vec::len).collect();
        assert_eq!(runs, [RUNS, RUNS, 3]);
    }

    fn any_run() -> impl Strategy<Value = (u64, u64, u64)> {
        (0_u64..700, 0_u64..5, 0_u64..40)
    }

    proptest! {
        #[test]
        fn runs_are_cut_into_parcels_that_have_each_byte_once_and_are_full(
            runs in proptest::collection::vec(any_run(), 0..9),
        ) {
            let (mut at, mut all) = (0, Vec::new());
            for (len, rows, gap) in runs {
                let run = Run { at, len, rows, stride: len + gap };
                all.push(Gathered { run, from: at + 5 });
                at += (len + gap) * rows;
            }
            let bytes = |runs: &[Gathered]| -> Vec<(u64, u64)> {
                let mut each = Vec::new();
                for Gathered { run, from } in runs {
                    for row in (0..run.rows).map(|row| row * run.stride) {
                        each.extend((row..row + run.len).map(|byte| (run.at + byte, from + byte)));
                    }
                }
                each
            };
            let parcels = cut(&all, 256);
            let of_parcels: Vec<Vec<(u64, u64)>> = parcels.iter().map(|parcel| bytes(parcel)).collect();
            let mut once = of_parcels.concat();
            once.sort_unstable();
            prop_assert_eq!(once, bytes(&all));
            for (number, (parcel, bytes)) in parcels.iter().zip(&of_parcels).enumerate() {
                prop_assert!(!bytes.is_empty() && bytes.len() <= 256 && parcel.len() <= RUNS);
                // What would still fit is a part of a row at the most.
                let next = parcels.get(number + 1).and_then(|next| next.first());
                prop_assert!(next.is_none_or(|next| next.run.len.min(256) + bytes.len() as u64 > 256));
            }
        }

        #[test]
        fn no_parcel_has_more_runs_than_its_limit_however_short_they_are(count in 0..3 * RUNS) {
            let byte = |at: usize| Gathered { run: Run::together(2 * at as u64, 1), from: at as u64 };
            let runs: Vec<Gathered> = (0..count).map(byte).collect();
            let parcels = cut(&runs, 1 << 20);
            prop_assert!(parcels.iter().all(|parcel| parcel.len() <= RUNS));
            prop_assert_eq!(parcels.len(), count.div_ceil(RUNS));
            prop_assert_eq!(parcels.concat(), runs);
        }

        #[test]
        fn a_run_is_read_as_it_was_written(words in any::<[u64; 4]>()) {
            let [at, len, rows, stride] = words;
            let run = Run { at, len, rows, stride };
            prop_assert_eq!(Run::of_bytes(&run.to_bytes()), run);
        }
    }

    /// If this fails, ranks of this version and of older ones misread one another: change `PROTOCOL_VERSION` too.
    #[test]
    fn the_form_of_a_run_is_that_of_the_protocols_version() {
        let bytes = Run { at: 1, len: 2, rows: 3, stride: 0x0405 }.to_bytes();
        let words = bytes.as_chunks::<8>().0.iter().map(|word| word[..2].to_vec());
        assert_eq!(words.collect::<Vec<_>>(), [[1, 0], [2, 0], [3, 0], [5, 4]]);
        assert_eq!(engine_core::control::PROTOCOL_VERSION, 14);
    }

    #[test]
    fn runs_without_bytes_and_those_that_are_longer_than_their_parcel_are_refused() {
        let run = |len| Run::together(0, len);
        assert_eq!(Run::all_bytes(&[run(5), run(2)]), 7);
        assert_eq!(Run::all_bytes(&[run(5), run(0)]), u64::MAX);
        let rows = |rows, len, stride| Run { at: 0, len, rows, stride };
        for runs in [
            &[run(5)][..],
            &[run(4), run(1)],
            &[run(1), run(u64::MAX)],
            &[run(0)],
            &[rows(u64::MAX, 0, 1)],
            &[rows(0, 1, 1)],
            &[rows(3, 2, 8)],
            &[rows(2, 1, u64::MAX)],
            &[rows(1 << 63, 2, 2)],
        ] {
            let found: Result<Vec<_>> = places(runs, 4).collect();
            assert_eq!(found.expect_err("too long").kind(), ErrorKind::Protocol);
        }
        let run = Run { at: 9, len: 1, rows: 2, stride: 5 };
        let found: Result<Vec<_>> = places(&[run, run], 4).collect();
        assert_eq!(found.expect("all of it"), [(0, run), (2, run)]);
    }
}

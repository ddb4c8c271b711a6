//! Parcels: how bytes get to a rollout whose tensors a trainer cannot write to by itself. The trainer packs them, with the places where they
//! belong, into bounded memory. A transport carries that to the rollout, which copies them to their places and gives the memory back.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use engine_core::{Error, ErrorKind, Result};

/// The most runs of a parcel.
pub const RUNS: usize = 2048;

/// Bytes of a parcel that lie together at the rollout, too. They follow those of the run before in the parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Their offset in what is lent.
    pub at: u64,
    /// Their number.
    pub len: u64,
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
        match self.runs.last_mut().filter(|run| run.at + run.len == at) {
            Some(run) => run.len += len as u64,
            None => self.runs.push(Run { at, len: len as u64 }),
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
/// `Protocol` for a run that ends behind the parcel.
pub fn places(runs: &[Run], bytes: u64) -> impl Iterator<Item = Result<(u64, Run)>> + '_ {
    let mut from = 0_u64;
    runs.iter().map(move |run| {
        let start = from;
        from = from.checked_add(run.len).filter(|end| *end <= bytes).ok_or_else(|| {
            let message = format!("runs of more than its {bytes} bytes");
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
                let (from, Run { at, len }) = place?;
                let bytes = &parcel[from as usize..(from + len) as usize];
                memory[at as usize..(at + len) as usize].copy_from_slice(bytes);
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
    fn neighbours_are_one_run_and_a_parcel_has_no_more_runs_than_its_limit() {
        let rollout = rollout(1 << 16, 1 << 16);
        let packing = Packing::new(&rollout);
        for at in 0..16 {
            packing.put(at, &[1]).expect("room");
        }
        for at in 16..16 + RUNS as u64 {
            packing.put(at * 2, &[1]).expect("room");
        }
        packing.flush().expect("a rollout");
        let sent = rollout.sent.lock().expect("no panic");
        assert_eq!(sent[0][0], Run { at: 0, len: 16 });
        assert_eq!([sent[0].len(), sent[1].len()], [RUNS, 1]);
    }

    #[test]
    fn runs_that_are_longer_than_their_parcel_are_refused() {
        for lens in [&[5][..], &[4, 1], &[1, u64::MAX]] {
            let runs: Vec<Run> = lens.iter().map(|&len| Run { at: 0, len }).collect();
            let found: Result<Vec<_>> = places(&runs, 4).collect();
            assert_eq!(found.expect_err("too long").kind(), ErrorKind::Protocol);
        }
        let run = Run { at: 9, len: 2 };
        let found: Result<Vec<_>> = places(&[run, run], 4).collect();
        assert_eq!(found.expect("all of it"), [(0, run), (2, run)]);
    }
}

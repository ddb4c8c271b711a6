//! A value that threads of a pool use in turns.

use std::sync::{Mutex, PoisonError};

use engine_core::Result;

/// A value that one thread uses at a time, never while it waits for other threads.
///
/// While a thread of a pool waits for pieces of its own work, it takes up other work of the pool. If it held a lock and that work needed
/// the same one, it would wait for itself.
#[derive(Debug, Default)]
pub(crate) struct Turns<T>(Mutex<T>);

impl<T> Turns<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Does work in a turn. The work must not wait for threads of a pool.
    pub(crate) fn take<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Does work in two turns, with work between them that may wait for threads of a pool.
    ///
    /// # Errors
    ///
    /// Those of `begin`; those that `end` returns for errors of the other work.
    pub(crate) fn in_steps<S, R>(
        &self,
        begin: impl FnOnce(&mut T) -> Result<S>,
        between: impl FnOnce(&mut S) -> Result<()>,
        end: impl FnOnce(&mut T, S, Result<()>) -> Result<R>,
    ) -> Result<R> {
        let mut state = self.take(begin)?;
        let done = between(&mut state);
        self.take(|value| end(value, state, done))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;
    use std::ops::Range;
    use std::sync::Arc;
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    use engine_core::memory::{Job, Pool};
    use engine_core::{DType, Encoding, TensorMeta, Treatment, Weight};

    /// Takes its time, and says when it begins.
    #[derive(Debug)]
    struct Slow(u64, std::sync::mpsc::Sender<()>);

    impl Encoding for Slow {
        fn name(&self) -> &'static str {
            "slow"
        }
        fn source_bytes(&self) -> u64 {
            0
        }
        fn encode_host(&self, range: Range<u64>, to: &mut [u8]) -> Result<()> {
            if range.start == 0 {
                self.1.send(()).ok();
                std::thread::sleep(Duration::from_millis(self.0));
            }
            to.fill(1);
            Ok(())
        }
    }

    /// Like filling a bucket: its weights are divided among the threads of the pool whose work it is.
    fn fill(
        pool: &Pool,
        turns: &Arc<Turns<u32>>,
        milliseconds: [u64; 2],
        begun: &std::sync::mpsc::Sender<()>,
    ) -> engine_core::memory::Work<u32> {
        const LEN: u64 = 1 << 18;
        let job = |milliseconds, offset| {
            let meta = TensorMeta::new(format!("w{offset}"), DType::U8, [LEN]);
            let slow = Arc::new(Slow(milliseconds, begun.clone()));
            let weight = Weight::encoded(meta, slow, Treatment::Plain).unwrap();
            Job { weight, start: 0, len: LEN, offset }
        };
        let jobs = [job(milliseconds[0], 0), job(milliseconds[1], LEN)];
        let (threads, turns) = (pool.clone(), turns.clone());
        pool.start(move || {
            turns.in_steps(
                |_| Ok(vec![0; 2 * LEN as usize]),
                |bytes| threads.encode(&jobs, bytes, false).map(drop),
                |turns, bytes, done| {
                    done?;
                    assert!(bytes.iter().all(|&byte| byte == 1));
                    *turns += 1;
                    Ok(*turns)
                },
            )
        })
    }

    #[test]
    fn a_bucket_is_filled_soon_after_another_one_that_nobody_waits_for_any_more() {
        // In a separate thread, which is left behind if it hangs.
        let (tell, told) = channel();
        std::thread::spawn(move || {
            let pool = Pool::new(2).unwrap();
            let turns = Arc::new(Turns::new(0));
            let (begin, begun) = channel();
            // One half takes long, so that the thread of the other one waits for it.
            let first = fill(&pool, &turns, [50, 400], &begin);
            begun.recv().unwrap();
            drop(first);
            let second = fill(&pool, &turns, [1, 1], &begin);
            tell.send(futures::executor::block_on(second).unwrap()).ok();
        });
        let filled = told.recv_timeout(Duration::from_secs(30));
        assert_ne!(filled, Err(RecvTimeoutError::Timeout), "the second one waits for itself");
        assert!(filled.is_ok());
    }
}

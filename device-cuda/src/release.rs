//! Gives memory and modules back to the driver only while no collective of this process is under way.
//!
//! The driver waits for all work on a device before it frees memory of it or unloads a module, and holds a lock of the process meanwhile. A
//! collective ends when every rank has joined it. If one of those ranks is in this process and needs the lock, all of them wait for ever.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

/// Dropped when the memory is closed: an owner elsewhere, which may own memory as well.
pub(crate) type Owner = Option<Arc<dyn Any + Send + Sync>>;
type Release = Box<dyn FnOnce() -> Owner + Send>;

/// The collectives under way, and the releases that wait for their end.
#[derive(Default)]
struct Gate(Mutex<State>);

#[derive(Default)]
struct State {
    under_way: usize,
    waiting: Vec<Release>,
}

static PROCESS: Gate = Gate(Mutex::new(State { under_way: 0, waiting: Vec::new() }));

impl Gate {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Every change is complete before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) {
        self.lock().under_way += 1;
    }

    fn end(&self) {
        let mut state = self.lock();
        state.under_way = state.under_way.saturating_sub(1);
        if state.under_way > 0 {
            return;
        }
        // Releases run under the lock, so that no collective begins meanwhile.
        let owners: Vec<Owner> = state.waiting.drain(..).map(|release| release()).collect();
        drop(state);
        drop(owners);
    }

    fn release(&self, release: Release) {
        let mut state = self.lock();
        if state.under_way > 0 {
            state.waiting.push(release);
            return;
        }
        let owner = release();
        drop(state);
        drop(owner);
    }
}

/// Runs `release` now, or when the last collective of this process has ended.
pub(crate) fn release(release: impl FnOnce() -> Owner + Send + 'static) {
    PROCESS.release(Box::new(release));
}

/// A collective that a rank of this process has begun, until this is dropped.
///
/// Device memory and kernels that are dropped meanwhile are given back to the driver when the last collective has ended: freeing them would
/// wait for the collective, and keep other ranks of the process from joining it.
#[derive(Debug)]
#[must_use = "the collective counts as ended when this is dropped"]
pub struct CollectiveUnderWay(());

impl CollectiveUnderWay {
    /// Begins a collective. Call it before the collective's first work is enqueued.
    #[expect(clippy::new_without_default, reason = "making one has an effect")]
    pub fn new() -> Self {
        PROCESS.begin();
        Self(())
    }
}

impl Drop for CollectiveUnderWay {
    fn drop(&mut self) {
        PROCESS.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn counted(freed: &Arc<AtomicU32>, owner: Owner) -> Release {
        let freed = freed.clone();
        Box::new(move || {
            freed.fetch_add(1, Ordering::Relaxed);
            owner
        })
    }

    #[test]
    fn memory_is_given_back_at_once_or_when_the_last_collective_has_ended() {
        let (gate, freed) = (Gate::default(), Arc::default());
        let so_far = || AtomicU32::load(&freed, Ordering::Relaxed);
        gate.release(counted(&freed, None));
        assert_eq!(so_far(), 1);
        gate.begin();
        gate.begin();
        gate.release(counted(&freed, None));
        gate.release(counted(&freed, None));
        gate.end();
        assert_eq!(so_far(), 1, "one collective is still under way");
        gate.end();
        assert_eq!(so_far(), 3);
        gate.release(counted(&freed, None));
        assert_eq!(so_far(), 4);
    }

    /// Memory that owns other memory: giving it back gives back more.
    struct Owning(Arc<AtomicU32>, &'static Gate);

    impl Drop for Owning {
        fn drop(&mut self) {
            self.1.release(counted(&self.0, None));
        }
    }

    #[test]
    fn an_owner_that_gives_back_memory_of_its_own_does_not_wait_for_itself() {
        static GATE: Gate = Gate(Mutex::new(State { under_way: 0, waiting: Vec::new() }));
        let freed = Arc::default();
        let owner = || -> Owner { Some(Arc::new(Owning(Arc::clone(&freed), &GATE))) };
        GATE.release(counted(&freed, owner()));
        GATE.begin();
        GATE.release(counted(&freed, owner()));
        GATE.end();
        assert_eq!(freed.load(Ordering::Relaxed), 4);
    }
}

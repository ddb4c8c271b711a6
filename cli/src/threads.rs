//! The threads of the program's own work: making weights, comparing them, encoding them for a file.

use std::sync::{Mutex, PoisonError};

use engine_core::Result;
use engine_core::memory::Pool;

/// The one pool of the process, of a thread for every core. It is started when it is first asked for.
///
/// Engines have pools of their own, whose sizes their configurations say.
///
/// # Errors
///
/// `Resource` if the threads cannot be started. The next call tries again.
pub(crate) fn pool() -> Result<Pool> {
    static POOL: Mutex<Option<Pool>> = Mutex::new(None);
    // Nothing is half done where it panics.
    let mut started = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = &*started {
        return Ok(pool.clone());
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(started.insert(Pool::new(cores)?).clone())
}

//! Deadlines that work on every executor.
//!
//! tokio's timers need a tokio runtime that drives them, and panic without one. So a thread of its own drives the
//! timers of engines. It sleeps until the next deadline; waits may run on any executor.

use std::future::Future;
use std::sync::LazyLock;
use std::time::Duration;

use tokio::runtime::{Builder, EnterGuard, Handle};

/// The runtime that turns the timers; `None` if there is no thread for it.
static CLOCK: LazyLock<Option<Handle>> = LazyLock::new(|| {
    let started = Builder::new_current_thread().enable_time().build().and_then(|runtime| {
        let handle = runtime.handle().clone();
        let run = move || runtime.block_on(std::future::pending::<()>());
        std::thread::Builder::new().name("ckpt-clock".into()).spawn(run).map(|_| handle)
    });
    // Then timers are those of the caller's runtime, which most programs have.
    started.inspect_err(|error| tracing::error!(%error, "there is no thread for timers")).ok()
});

fn entered() -> Option<EnterGuard<'static>> {
    CLOCK.as_ref().map(Handle::enter)
}

/// The future's value; `None` if the deadline passes first.
///
/// # Cancel safety
///
/// That of the future.
pub async fn within<T>(deadline: Duration, future: impl Future<Output = T>) -> Option<T> {
    let timed = {
        let _clock = entered();
        tokio::time::timeout(deadline, future)
    };
    timed.await.ok()
}

/// Waits for this duration.
pub async fn sleep(duration: Duration) {
    let sleep = {
        let _clock = entered();
        tokio::time::sleep(duration)
    };
    sleep.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_end_waits_on_a_thread_without_any_runtime() {
        let waited = std::thread::spawn(|| {
            futures::executor::block_on(async {
                sleep(Duration::from_millis(1)).await;
                let ready = within(Duration::from_secs(60), async { 7 }).await;
                (ready, within(Duration::from_millis(1), std::future::pending::<()>()).await)
            })
        });
        assert_eq!(waited.join().ok(), Some((Some(7), None)));
    }
}

//! The program's executor, and threads for work that blocks.
//!
//! The runtimes of tokio panic where the system gives them no further thread. What is here says so instead.

use std::thread::JoinHandle;
use std::time::Duration;

use engine_core::{Error, ErrorKind, Result};
use futures::channel::oneshot;
use tokio::runtime::{Builder, Handle};

/// How long work in the background may take to end with the program.
const GRACE: Duration = Duration::from_millis(200);

/// An executor whose sockets, timers and background tasks have one thread, and whose main future has the thread that
/// waits for it.
#[derive(Debug)]
pub struct Runtime {
    handle: Handle,
    /// Ends the thread when it is dropped.
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Runtime {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// `Resource` if the thread cannot be started; `Io` if the system refuses what sockets and timers need.
    pub fn start() -> Result<Self> {
        let built = Builder::new_current_thread().enable_all().build();
        let runtime = built.map_err(|error| Error::io("starting the program's executor", error))?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = spawn("ckpt-tasks", move || {
            // It ends when `stop` is dropped.
            runtime.block_on(stopped).unwrap_or_default();
            // Work that nobody waits for any more must not delay the end.
            runtime.shutdown_timeout(GRACE);
        })?;
        Ok(Self { handle, stop, thread })
    }

    /// Runs a future to its end on this thread.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.handle.block_on(future)
    }

    /// Ends tasks that still run.
    pub fn end(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            tracing::error!("the thread of background tasks panicked");
        }
    }
}

/// Runs work that blocks, on a thread of its own.
///
/// # Cancel safety
///
/// The work goes on when the future is dropped.
///
/// # Errors
///
/// `Resource` if the thread cannot be started, `Aborted` if the work panics.
pub(crate) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (tell, told) = oneshot::channel();
    spawn("ckpt-aside", move || {
        // Nobody waits any more if the future was dropped.
        drop(tell.send(work()));
    })?;
    told.await.map_err(|_| {
        Error::new(ErrorKind::Aborted, "running work on a thread of its own", "it panicked")
    })
}

fn spawn(name: &str, main: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(main);
    thread.map_err(|error| {
        let message = "the system gives this process no further thread";
        Error::new(ErrorKind::Resource, format!("starting the thread `{name}`"), message)
            .with_source(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_sockets_and_timers_go_on_while_the_main_future_blocks_its_thread() {
        let runtime = Runtime::start().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        runtime.block_on(async {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(1)).await;
                tell.send(()).unwrap();
            });
            told.recv_timeout(Duration::from_secs(30)).unwrap();
            assert_eq!(aside(|| 7).await.unwrap(), 7);
        });
        runtime.end();
    }

    #[test]
    fn work_that_panics_is_an_error() {
        let runtime = Runtime::start().unwrap();
        let error = runtime.block_on(aside(|| panic!("on purpose"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Aborted);
        runtime.end();
    }
}

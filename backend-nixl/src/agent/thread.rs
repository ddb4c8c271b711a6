//! Threads that own agents.

use rustix::io::Errno;
use tokio::sync::oneshot;

use super::exit::Running;
use crate::error::NixlError;

/// Starts a thread that makes what owns an agent, and runs it. Returns when it is made, with what is closed when the thread has ended.
/// `close` tells the thread to end; it is called at the end of the process.
///
/// # Errors
///
/// Those of making it; `System` without a thread.
pub(crate) async fn start<W>(
    close: impl Fn() + Send + 'static,
    make: impl FnOnce() -> Result<W, NixlError> + Send + 'static,
    run: impl FnOnce(W) + Send + 'static,
) -> Result<oneshot::Receiver<()>, NixlError> {
    let (ready, is_ready) = oneshot::channel();
    let (ending, ended) = oneshot::channel::<()>();
    let running = Running::new(close);
    let body = move || {
        let _running = running;
        match make() {
            Ok(worker) => {
                // If nobody waits for the agent, it is not run.
                if ready.send(Ok(())).is_ok() {
                    run(worker);
                }
            }
            Err(error) => drop(ready.send(Err(error))),
        }
        drop(ending);
    };
    let thread = std::thread::Builder::new().name("ckpt-nixl".into()).spawn(body);
    thread.map_err(|error| NixlError::System {
        call: "clone",
        errno: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
    })?;
    is_ready.await.map_err(|_| NixlError::Closed)??;
    Ok(ended)
}

//! `--metrics ADDR`: this process's metrics over HTTP, as Prometheus reads them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use checkpoint_engine::backend::telemetry;
use checkpoint_engine::{Error, ErrorKind, Result};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

const OPERATION: &str = "serving metrics";

/// Bounds of histograms: updates and their stages take milliseconds to minutes.
const BOUNDS: [f64; 14] =
    [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0];

/// A client has this long to ask and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The most of a request that is read; its headers are not looked at.
const REQUEST: usize = 8 << 10;

/// How many may ask at a time; further ones wait.
const AT_ONCE: usize = 8;

/// How often samples of histograms are folded, so that they do not pile up if nobody asks.
const UPKEEP: Duration = Duration::from_secs(5);

/// Serves metrics until it is dropped.
#[derive(Debug)]
pub struct Exporter {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Exporter {
    /// Installs the process's recorder and listens; port 0 takes any port that is free.
    ///
    /// # Errors
    ///
    /// `Io` if the address cannot be listened at, `State` if the process has a recorder already.
    pub async fn start(address: SocketAddr) -> Result<Self> {
        let failed = |error| Error::io(format!("{OPERATION} at {address}"), error);
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let handle = PrometheusBuilder::new()
            .set_buckets(&BOUNDS)
            .and_then(PrometheusBuilder::install_recorder)
            .map_err(|error| Error::new(ErrorKind::State, OPERATION, error.to_string()))?;
        telemetry::describe();
        Ok(Self { address, task: tokio::spawn(serve(listener, handle)) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, handle: PrometheusHandle) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut upkeep = tokio::time::interval(UPKEEP);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        tokio::select! {
            (place, accepted) = accepted => match accepted {
                Ok((stream, _)) => {
                    let handle = handle.clone();
                    tokio::spawn(async move {
                        let _place = place;
                        let answered = tokio::time::timeout(PATIENCE, answer(stream, &handle)).await;
                        if !matches!(answered, Ok(Ok(()))) {
                            tracing::debug!(?answered, "a reader of metrics went away");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a reader of metrics cannot be accepted");
                    // The system is out of something: try again, and not at once.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            _ = upkeep.tick() => handle.run_upkeep(),
        }
    }
}

/// Answers one request, whatever its path, and closes the connection.
async fn answer(mut stream: TcpStream, handle: &PrometheusHandle) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let read = stream.read(&mut part).await?;
        if read == 0 || request.len() + read > REQUEST {
            return Ok(()); // Not HTTP.
        }
        request.extend_from_slice(&part[..read]);
    }
    let (status, body) = match request.starts_with(b"GET ") {
        true => ("200 OK", handle.render()),
        false => ("405 Method Not Allowed", String::new()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

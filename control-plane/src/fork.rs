//! Keeps sockets from forked children.
//!
//! A connection closes when the last process that has it open ends. A forked child would have all connections of its
//! rank, so only missing heartbeats would show the rank's death. A leader's child would also keep the leader's port. No
//! flag of a socket prevents that: `CLOEXEC` only acts when a program is executed. So the sockets are recorded here. In
//! a child, their descriptors are redirected to `/dev/null` from the start. The descriptors stay in use, so that a
//! socket that the child drops closes none of the child's own files.

use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use std::task::{Context, Poll};

use tokio::io::{self, AsyncRead, AsyncWrite, ReadBuf};

use crate::ffi;

/// A bit for each descriptor: whether it is one of ours. There is no lock, because a forked child cannot wait for one.
/// Descriptors beyond a million (Linux's default limit is lower) are not kept from children.
static OURS: [AtomicU64; 1 << 14] = [const { AtomicU64::new(0) }; 1 << 14];

/// How many words of `OURS` have been used.
static WORDS: AtomicUsize = AtomicUsize::new(0);

/// Keeps a descriptor from forked children while this lives. It must be dropped before the descriptor is closed.
#[derive(Debug)]
pub(super) struct Kept(RawFd);

impl Kept {
    pub(super) fn from_children(socket: &impl AsRawFd) -> Self {
        static REGISTERED: Once = Once::new();
        REGISTERED.call_once(|| {
            if let Err(error) = ffi::in_forked_children(cut_off) {
                tracing::warn!(%error, "forked children will keep this rank's connections");
            }
        });
        let fd = socket.as_raw_fd();
        if let Some((at, bit)) = place(fd) {
            WORDS.fetch_max(at + 1, Ordering::Relaxed);
            OURS[at].fetch_or(bit, Ordering::Relaxed);
        }
        Self(fd)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some((at, bit)) = place(self.0) {
            OURS[at].fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

/// The word and the bit of a descriptor.
fn place(fd: RawFd) -> Option<(usize, u64)> {
    let fd = usize::try_from(fd).ok()?;
    let at = fd / 64;
    (at < OURS.len()).then(|| (at, 1 << (fd % 64)))
}

/// Runs in a forked child, which may do only what a signal handler may.
extern "C" fn cut_off() {
    let words = WORDS.load(Ordering::Relaxed).min(OURS.len());
    for (at, word) in OURS[..words].iter().enumerate() {
        let mut bits = word.swap(0, Ordering::Relaxed);
        while bits != 0 {
            let fd = at * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            ffi::lead_nowhere(fd as RawFd);
        }
    }
}

/// One direction of a socket. Both directions share the [`Kept`]. It comes before the socket here, so it is dropped
/// first: the descriptor is no longer recorded when the last direction closes it.
pub(super) struct Half<T> {
    _kept: Arc<Kept>,
    socket: T,
}

/// Both directions of a socket that was split.
pub(super) fn halves<R, W>(kept: Kept, (reader, writer): (R, W)) -> (Half<R>, Half<W>) {
    let kept = Arc::new(kept);
    (Half { _kept: kept.clone(), socket: reader }, Half { _kept: kept, socket: writer })
}

impl<R: AsyncRead + Unpin> AsyncRead for Half<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buffer)
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Half<W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[std::io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

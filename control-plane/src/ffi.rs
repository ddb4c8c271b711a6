//! System calls around a fork: all of this crate's `unsafe`.
#![allow(unsafe_code, reason = "calls of the C library")]

use std::io;
use std::os::fd::RawFd;

/// Makes every forked child of this process run `handler` first, in the only thread that the child has.
///
/// The handler may do only what a signal handler may: it must not lock, allocate or panic.
pub(super) fn in_forked_children(handler: extern "C" fn()) -> io::Result<()> {
    // SAFETY: `handler` is a function without arguments that does not unwind, and stays loaded as long as the process: a
    // library with threads of its own, as this one has, is never unloaded.
    match unsafe { libc::pthread_atfork(None, None, Some(handler)) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

/// Redirects a descriptor of a forked child to `/dev/null`.
///
/// It makes only async-signal-safe calls. For descriptors that the child itself does not use.
pub(super) fn lead_nowhere(fd: RawFd) {
    // SAFETY: the path is a string with a terminating zero.
    let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if null < 0 {
        // SAFETY: closing a descriptor touches no memory; the child's copy of what owns it is never used.
        unsafe { libc::close(fd) };
        return;
    }
    // SAFETY: replaces a descriptor and touches no memory.
    unsafe { libc::dup3(null, fd, libc::O_CLOEXEC) };
    // SAFETY: opened above, and used by nobody else.
    unsafe { libc::close(null) };
}

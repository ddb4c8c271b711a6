//! Leases, which tell a process whether others still use the memory that it lends. Each borrower holds a lock on a file of the
//! lender. The system releases the lock when the borrower ends, however it ends.

#[cfg(any(feature = "cuda", test))]
mod marks;

use std::fmt::Debug;
use std::fs::File;
use std::ops::Deref;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::memfile::{FileAddress, MemFile};
#[cfg(feature = "cuda")]
pub(crate) use marks::Marked;

/// The pause between two checks whether all borrowers have let go.
const PAUSE: Duration = Duration::from_millis(5);

/// The lender's side of a lease.
#[derive(Debug)]
pub(crate) struct Lease(MemFile);

/// What a borrower needs to accept a lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Terms(FileAddress);

/// A borrower's side: the lease is in use while this lives.
#[derive(Debug)]
pub(crate) struct Borrowed(#[expect(dead_code, reason = "kept open")] File);

impl Lease {
    pub(crate) fn new() -> Result<Self, SegmentError> {
        MemFile::create("ckpt-engine-lease").map(Self)
    }

    pub(crate) fn terms(&self) -> Terms {
        Terms(self.0.address())
    }

    /// Whether nobody uses the lease. If so, nobody can accept it any more.
    pub(crate) fn is_over(&self) -> bool {
        match flock(&self.0, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => true,
            Err(Errno::WOULDBLOCK) => false,
            Err(error) => {
                tracing::warn!(%error, "whether lent memory is in use cannot be found out");
                false
            }
        }
    }

    /// Waits at most `limit` until nobody uses the lease, and returns whether that is so.
    pub(crate) async fn wait_until_over(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while !self.is_over() {
            if Instant::now() >= until {
                return false;
            }
            engine_core::clock::sleep(PAUSE).await;
        }
        true
    }
}

/// Memory that other processes may have open. It is freed only when they have closed it.
#[derive(Debug)]
pub(crate) struct Leased<M: Debug + Clone + Send + 'static> {
    memory: M,
    /// Taken out by the drop.
    lease: Option<Lease>,
}

/// The memory that was dropped while other processes had it open.
static LEFT: Mutex<Vec<(Box<dyn Debug + Send>, Lease)>> = Mutex::new(Vec::new());

/// Frees dropped memory that other processes have closed meanwhile.
pub(crate) fn sweep() {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, lease)| !lease.is_over());
}

impl<M: Debug + Clone + Send + 'static> Leased<M> {
    /// Memory, and the lease of the processes that have it open, if the memory needs one.
    pub(crate) fn new(memory: M, lease: Option<Lease>) -> Self {
        Self { memory, lease }
    }

    /// The lease that other processes hold while they have the memory open.
    pub(crate) fn terms(&self) -> Option<Terms> {
        self.lease.as_ref().map(Lease::terms)
    }

    /// Waits at most `limit` until no other process has the memory open, and returns whether that is so.
    pub(crate) async fn wait_until_closed(&self, limit: Duration) -> bool {
        match &self.lease {
            Some(lease) => lease.wait_until_over(limit).await,
            None => true,
        }
    }
}

impl<M: Debug + Clone + Send + 'static> Deref for Leased<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.memory
    }
}

impl<M: Debug + Clone + Send + 'static> Drop for Leased<M> {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take().filter(|lease| !lease.is_over()) {
            tracing::warn!(
                "other processes have memory open that this one gave up: it is not freed yet"
            );
            let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
            left.push((Box::new(self.memory.clone()), lease));
        }
    }
}

impl Terms {
    /// Whether the lender still offers them.
    ///
    /// # Errors
    ///
    /// `Gone` if it has ended or has taken them back.
    pub(crate) fn check(&self) -> Result<(), SegmentError> {
        self.0.open().map(drop)
    }

    /// Accepts the lease.
    ///
    /// # Errors
    ///
    /// `Open` without access to the lender's process; `Gone` if that ended, or if the lease is over.
    pub(crate) fn accept(&self) -> Result<Borrowed, SegmentError> {
        let file = self.0.open()?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            // Checked again: after the file was opened, the lender may have found the lease over and closed it.
            Ok(()) => self.0.open().map(|_| Borrowed(file)),
            Err(Errno::WOULDBLOCK) => Err(SegmentError::Gone { path: self.0.path() }),
            Err(errno) => Err(SegmentError::System { call: "flock", errno }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_lease_is_over_when_the_last_borrower_has_let_go_and_then_nobody_can_begin() {
        let lease = Lease::new().unwrap();
        let (one, two) = (lease.terms().accept().unwrap(), lease.terms().accept().unwrap());
        assert!(!lease.is_over());
        drop(one);
        assert!(!lease.wait_until_over(Duration::from_millis(30)).await);
        let letting_go = async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            drop(two);
        };
        let over = lease.wait_until_over(Duration::from_secs(30));
        assert!(futures::future::join(over, letting_go).await.0);
        assert!(matches!(lease.terms().accept(), Err(SegmentError::Gone { .. })));
    }

    #[test]
    fn a_borrower_that_is_killed_has_let_go() {
        let lease = Lease::new().unwrap();
        let path = lease.0.address().path();
        // A program that holds a lock. The `flock` of util-linux and that of busybox both take these arguments.
        let mut other = std::process::Command::new("sh")
            .args(["-c", r#"exec 9<"$0" && flock -s 9 && echo held && exec sleep 600"#, &path])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let out = other.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
        assert_eq!(line, "held\n");
        assert!(!lease.is_over());
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(lease.is_over());
    }

    #[test]
    fn memory_that_is_given_up_while_others_have_it_open_is_freed_when_they_have_closed_it() {
        let memory = Arc::new(());
        let is_there = Arc::downgrade(&memory);
        let leased = Leased::new(memory, Some(Lease::new().unwrap()));
        let borrowed = leased.terms().unwrap().accept().unwrap();
        drop(leased);
        sweep();
        assert!(is_there.upgrade().is_some());
        drop(borrowed);
        sweep();
        assert!(is_there.upgrade().is_none());
    }

    #[test]
    fn terms_of_a_lender_that_is_gone_are_refused() {
        let lease = Lease::new().unwrap();
        let terms = lease.terms();
        drop(lease);
        let _other = File::open("/proc/self/cmdline").unwrap();
        assert!(terms.accept().is_err());
    }
}

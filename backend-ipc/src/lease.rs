//! How a process knows whether others still use what it lends them: each user of it holds a lock on a file of
//! the lender's, which the system releases when that process ends, however it does.

use std::fs::File;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::memfile::{FileAddress, MemFile};

/// The pause between two looks at whether others have let go.
const PAUSE: Duration = Duration::from_millis(5);

/// The lender's end.
#[derive(Debug)]
pub(crate) struct Lease(MemFile);

/// What a borrower needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Terms(FileAddress);

/// A borrower's end: what was lent is in use as long as it lives.
#[derive(Debug)]
pub(crate) struct Borrowed(#[expect(dead_code, reason = "kept open")] File);

impl Lease {
    pub(crate) fn new() -> Result<Self, SegmentError> {
        MemFile::create("ckpt-engine-lease").map(Self)
    }

    pub(crate) fn terms(&self) -> Terms {
        Terms(self.0.address())
    }

    /// Whether nobody uses what was lent; nobody can begin to any more if so.
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

    /// Waits until nobody uses it, but no longer than that; whether nobody does.
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

impl Terms {
    /// Begins to use what was lent.
    ///
    /// # Errors
    ///
    /// `Open` without access to the lender's process, `Replaced` if it has ended or lends it no more.
    pub(crate) fn accept(&self) -> Result<Borrowed, SegmentError> {
        let file = self.0.open()?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            // The lender may have found that nobody uses it, and be done with it, after the file was opened.
            Ok(()) => self.0.open().map(|_| Borrowed(file)),
            Err(Errno::WOULDBLOCK) => Err(SegmentError::Replaced { path: self.0.path() }),
            Err(errno) => Err(SegmentError::System { call: "flock", errno }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
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
        assert!(matches!(lease.terms().accept(), Err(SegmentError::Replaced { .. })));
    }

    #[test]
    fn a_borrower_that_is_killed_has_let_go() {
        let lease = Lease::new().unwrap();
        let path = lease.0.address().path();
        // `flock` of util-linux and of busybox alike: a lock, and a program that holds it.
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
    fn terms_of_a_lender_that_is_gone_are_refused() {
        let lease = Lease::new().unwrap();
        let terms = lease.terms();
        drop(lease);
        let _other = File::open("/proc/self/cmdline").unwrap();
        assert!(terms.accept().is_err());
    }
}

//! How a process knows whether others still use what it lends them: each user of it holds a lock on a file of
//! the lender's, which the system releases when that process ends, however it does.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, MemfdFlags, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;

/// The pause between two looks at whether others have let go.
const PAUSE: Duration = Duration::from_millis(5);

/// The lender's end.
#[derive(Debug)]
pub(crate) struct Lease {
    file: OwnedFd,
    terms: Terms,
}

/// What a borrower needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terms {
    /// The lender's process, and the file's descriptor there.
    pub(crate) pid: u32,
    fd: i32,
    /// The file's identity, so that another file behind the same number is noticed.
    device: u64,
    inode: u64,
}

/// A borrower's end: what was lent is in use as long as it lives.
#[derive(Debug)]
pub(crate) struct Borrowed(#[expect(dead_code, reason = "kept open")] File);

impl Lease {
    pub(crate) fn new() -> Result<Self, SegmentError> {
        let system = |call| move |errno| SegmentError::System { call, errno };
        let file = rustix::fs::memfd_create("ckpt-engine-lease", MemfdFlags::CLOEXEC)
            .map_err(system("memfd_create"))?;
        let stat = rustix::fs::fstat(&file).map_err(system("fstat"))?;
        let (pid, fd) = (std::process::id(), file.as_raw_fd());
        Ok(Self { file, terms: Terms { pid, fd, device: stat.st_dev, inode: stat.st_ino } })
    }

    pub(crate) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Whether nobody uses what was lent; nobody can begin to any more if so.
    pub(crate) fn is_over(&self) -> bool {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
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
        let path = format!("/proc/{}/fd/{}", self.pid, self.fd);
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?, file)));
        let (metadata, file) =
            opened.map_err(|source| SegmentError::Open { path: path.clone(), source })?;
        if (metadata.dev(), metadata.ino()) != (self.device, self.inode) {
            return Err(SegmentError::Replaced { path });
        }
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(Borrowed(file)),
            Err(Errno::WOULDBLOCK) => Err(SegmentError::Replaced { path }),
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
        let Terms { pid, fd, .. } = lease.terms();
        let path = format!("/proc/{pid}/fd/{fd}");
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
        let terms = lease.terms().clone();
        drop(lease);
        let _other = File::open("/proc/self/cmdline").unwrap();
        assert!(terms.accept().is_err());
    }
}

//! Leases, which tell a process whether others still use the memory that it lends. Each borrower holds a lock on a file of the
//! lender. The system releases the lock when the borrower ends, however it ends.

use std::fmt::Debug;
use std::fs::File;
#[cfg(any(feature = "cuda", test))]
use std::io::{Seek, Write};
use std::ops::Deref;
#[cfg(any(feature = "cuda", test))]
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::SegmentError;
use crate::memfile::{FileAddress, MemFile};

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

/// The bytes of a mark: the process, and when it began.
#[cfg(any(feature = "cuda", test))]
const MARK: usize = 16;

/// A borrower's side with a mark in the lender's file. For use by kernels of a device: when a process is killed, its
/// kernels may run on after the system has released its locks. They have ended only when the process is gone.
#[cfg(any(feature = "cuda", test))]
#[derive(Debug)]
pub(crate) struct Marked {
    at: u64,
    marks: File,
    _borrowed: Borrowed,
}

#[cfg(any(feature = "cuda", test))]
impl Drop for Marked {
    fn drop(&mut self) {
        if let Err(error) = self.marks.write_all_at(&[0; MARK], self.at) {
            tracing::warn!(%error, "lent memory counts as in use until this process ends");
        }
    }
}

/// When a process began, in the system's ticks. `None` if it is gone.
#[cfg(any(feature = "cuda", test))]
fn began(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain any character.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // A zombie has ended: only its number is left.
    let is_gone = matches!(fields.next(), Some("Z" | "X") | None);
    fields.nth(18)?.parse().ok().filter(|_| !is_gone)
}

#[cfg(any(feature = "cuda", test))]
impl Lease {
    /// As [`is_over`](Self::is_over), and also whether all processes whose marks remain are gone.
    pub(crate) fn is_over_and_unmarked(&self) -> bool {
        self.is_over()
            && self
                .marks()
                .is_ok_and(|marks| marks.into_iter().all(|(pid, at)| began(pid) != Some(at)))
    }

    fn marks(&self) -> Result<Vec<(u32, u64)>, SegmentError> {
        let mut marks = Vec::new();
        let mut mark = [0; MARK];
        let system = |errno| SegmentError::System { call: "pread", errno };
        while rustix::io::pread(&self.0, &mut mark, (marks.len() * MARK) as u64).map_err(system)?
            == MARK
        {
            let (pid, began) = mark.split_at(MARK / 2);
            let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
            marks.push((number(pid) as u32, number(began)));
        }
        Ok(marks)
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
    /// As [`accept`](Self::accept), and leaves a mark.
    ///
    /// # Errors
    ///
    /// Those of [`accept`](Self::accept), and `System` if the mark cannot be written.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn accept_marked(&self) -> Result<Marked, SegmentError> {
        let borrowed = self.accept()?;
        let mut marks = self.0.open_to_append()?;
        let pid = std::process::id();
        let began = began(pid).unwrap_or(0);
        let mark = [u64::from(pid).to_le_bytes(), began.to_le_bytes()].concat();
        let system = |call| {
            move |error: std::io::Error| SegmentError::System {
                call,
                errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
            }
        };
        // Appended, because other borrowers may add marks at the same time.
        marks.write_all(&mark).map_err(system("write"))?;
        let end = marks.stream_position().map_err(system("lseek"))?;
        // Opened anew, because a file that is open for appending ignores the position of a write.
        let marks = self.0.open_to_write()?;
        Ok(Marked { at: end - MARK as u64, marks, _borrowed: borrowed })
    }

    /// Accepts the lease.
    ///
    /// # Errors
    ///
    /// `Open` without access to the lender's process, or if that or the lease's file is gone; `Replaced` if the lease is over.
    pub(crate) fn accept(&self) -> Result<Borrowed, SegmentError> {
        let file = self.0.open()?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            // Checked again: after the file was opened, the lender may have found the lease over and closed it.
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
    fn a_lease_with_marks_is_over_when_these_are_taken_off_or_their_processes_are_gone() {
        let lease = Lease::new().unwrap();
        assert!(Lease::new().unwrap().is_over_and_unmarked());
        let (one, two) =
            (lease.terms().accept_marked().unwrap(), lease.terms().accept_marked().unwrap());
        drop(one);
        assert!(!lease.is_over_and_unmarked());
        drop(two);
        // A process that is still there, but holds no lock.
        let mut other = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let began = began(other.id()).unwrap();
        let mark = [u64::from(other.id()).to_le_bytes(), began.to_le_bytes()].concat();
        lease.terms().0.open_to_append().unwrap().write_all(&mark).unwrap();
        assert!(lease.is_over());
        assert!(!lease.is_over_and_unmarked());
        other.kill().unwrap();
        while !lease.is_over_and_unmarked() {
            std::thread::sleep(Duration::from_millis(1));
        }
        other.wait().unwrap();
        assert!(lease.is_over_and_unmarked());
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

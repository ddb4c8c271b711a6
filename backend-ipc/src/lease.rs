//! How a process knows whether others still use what it lends them: each user of it holds a lock on a file of
//! the lender's, which the system releases when that process ends, however it does.

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

/// The pause between two looks at whether others have let go.
const PAUSE: Duration = Duration::from_millis(5);

/// The lender's end.
#[derive(Debug)]
pub(crate) struct Lease(MemFile);

/// What a borrower needs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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

/// Bytes of a mark: the process, and when it began.
#[cfg(any(feature = "cuda", test))]
const MARK: usize = 16;

/// A borrower's end whose use may outlast the system's hold on its files by a little: kernels of a device run until the driver has taken
/// down what the process had there, and the process is gone only then.
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

/// When a process began, in the system's ticks; nothing if it is gone.
#[cfg(any(feature = "cuda", test))]
fn began(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may have any character in it.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // One that has ended has nothing left but its number.
    let is_gone = matches!(fields.next(), Some("Z" | "X") | None);
    fields.nth(18)?.parse().ok().filter(|_| !is_gone)
}

#[cfg(any(feature = "cuda", test))]
impl Lease {
    /// As [`is_over`](Self::is_over), and whether no process is there any more that has left a mark.
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

/// Memory that others may have open. It is given back when they have closed it, and never under them.
#[derive(Debug)]
pub(crate) struct Leased<M: Debug + Clone + Send + 'static> {
    memory: M,
    /// Taken when it is dropped.
    lease: Option<Lease>,
}

/// What was dropped while other processes had it open.
static LEFT: Mutex<Vec<(Box<dyn Debug + Send>, Lease)>> = Mutex::new(Vec::new());

/// Gives back what others have closed meanwhile.
pub(crate) fn sweep() {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, lease)| !lease.is_over());
}

impl<M: Debug + Clone + Send + 'static> Leased<M> {
    /// Memory, and the lease of those who have it open, if it does not stay without them.
    pub(crate) fn new(memory: M, lease: Option<Lease>) -> Self {
        Self { memory, lease }
    }

    /// What others hold as long as they have it open.
    pub(crate) fn terms(&self) -> Option<Terms> {
        self.lease.as_ref().map(Lease::terms)
    }

    /// Waits until nobody has it open, but no longer than that; whether nobody does.
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
    /// As [`accept`](Self::accept), with a mark.
    ///
    /// # Errors
    ///
    /// The same.
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
        // At the end, wherever that is when others do the same.
        marks.write_all(&mark).map_err(system("write"))?;
        let end = marks.stream_position().map_err(system("lseek"))?;
        // What is written at a place goes there only if it is not opened to append.
        let marks = self.0.open_to_write()?;
        Ok(Marked { at: end - MARK as u64, marks, _borrowed: borrowed })
    }

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
    fn a_lease_with_marks_is_over_when_these_are_taken_off_or_their_processes_are_gone() {
        let lease = Lease::new().unwrap();
        assert!(Lease::new().unwrap().is_over_and_unmarked());
        let (one, two) =
            (lease.terms().accept_marked().unwrap(), lease.terms().accept_marked().unwrap());
        drop(one);
        assert!(!lease.is_over_and_unmarked());
        drop(two);
        // A process whose files are closed, and that is there as yet.
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

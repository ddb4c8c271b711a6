//! Marks in a lease, for borrowers whose use of the memory may outlast the system's hold on their files.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::FileExt;

use engine_core::ProcessStat;
use rustix::io::Errno;

use super::{Borrowed, Lease, Terms};
use crate::error::SegmentError;

/// The bytes of a mark: the process, and when it began.
const MARK: usize = 16;

/// A borrower's side with a mark in the lender's file. For use by kernels of a device: when a process is killed, its
/// kernels may run on after the system has released its locks. They have ended only when the process is gone.
#[derive(Debug)]
pub(crate) struct Marked {
    at: u64,
    marks: File,
    _borrowed: Borrowed,
}

impl Drop for Marked {
    fn drop(&mut self) {
        if let Err(error) = self.marks.write_all_at(&[0; MARK], self.at) {
            tracing::warn!(%error, "lent memory counts as in use until this process ends");
        }
    }
}

/// When a process began, in the system's ticks. `None` if it is gone.
fn began(pid: u32) -> Option<u64> {
    ProcessStat::of(pid).filter(|process| !process.has_ended).map(|process| process.began)
}

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

impl Terms {
    /// As [`accept`](Self::accept), and leaves a mark.
    ///
    /// # Errors
    ///
    /// Those of [`accept`](Self::accept), and `System` if the mark cannot be written.
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
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use std::time::Duration;

    use super::*;

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
}

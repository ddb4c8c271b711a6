//! A rollout process as the trainer holds it.

use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use crate::Failure;
use crate::pipe::{self, Reply, Request};

pub(crate) struct Child {
    process: std::process::Child,
    input: Option<ChildStdin>,
    replies: Receiver<(u64, Reply)>,
    asked: u64,
}

impl Child {
    /// Starts this program again, as a rollout.
    pub(crate) fn start(rank: u32) -> Result<Self, Failure> {
        let mut process = Command::new(std::env::current_exe()?)
            .arg("rollout")
            // Two rollouts and the trainer share the processors.
            .env("RAYON_NUM_THREADS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        eprintln!("rollout {rank} is process {}", process.id());
        let (input, output) = (process.stdin.take(), process.stdout.take());
        let mut output = output.ok_or("a rollout without an output")?;
        let (sender, replies) = sync_channel(4);
        // A thread of its own, so that waiting for a reply can have a deadline. It ends with the
        // process; the channel's end tells the trainer.
        std::thread::spawn(move || {
            while let Ok(Some(reply)) = pipe::read(&mut output) {
                if sender.send(reply).is_err() {
                    break;
                }
            }
        });
        Ok(Self { process, input, replies, asked: 0 })
    }

    pub(crate) fn ask(&mut self, request: &Request) -> Result<(), Failure> {
        self.asked += 1;
        let input = self.input.as_mut().ok_or("the rollout was told to end")?;
        pipe::write(input, self.asked, request)
    }

    /// The reply to the last request; older ones are of steps that were given up.
    pub(crate) fn answer(&mut self, deadline: Duration) -> Result<Reply, Failure> {
        let end = Instant::now() + deadline;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.replies.recv_timeout(left) {
                Ok((id, reply)) if id == self.asked => {
                    return match reply {
                        Reply::Failed(message) => Err(message.into()),
                        reply => Ok(reply),
                    };
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("process {} does not reply", self.process.id()).into());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(format!("process {} ended", self.process.id()).into());
                }
            }
        }
    }

    /// Whether the process has ended, or does within a moment.
    pub(crate) fn died(&mut self, within: Duration) -> Result<bool, Failure> {
        let end = Instant::now() + within;
        while Instant::now() < end {
            if self.process.try_wait()?.is_some() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(false)
    }

    pub(crate) fn hang_up(&mut self) {
        self.input = None;
    }

    pub(crate) fn wait(&mut self, deadline: Duration) -> Result<(), Failure> {
        if self.died(deadline)? && self.process.wait()?.success() {
            return Ok(());
        }
        Err(format!("process {} did not end well", self.process.id()).into())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // A trainer that failed leaves no process behind; one that ended cannot be killed.
        if matches!(self.process.try_wait(), Ok(None)) && self.process.kill().is_ok() {
            self.process.wait().ok();
        }
    }
}

//! How a trainer reaches what rollouts lend.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result};
use placed::{Reach, Reached};
use protocol::decode;
#[cfg(feature = "cuda")]
use {
    super::device::{Encoding, encoding},
    placed::Encoder,
};

use super::notice::Offer;
use super::parcel::Parcel;
use super::staging::{Next, Staging};
use super::writer::{Command, Failure, Target, Writer};
use crate::agent::{AgentOptions, thread};
use crate::error::NixlError;

/// A trainer's agent.
#[derive(Debug)]
pub(super) struct Writers {
    shared: Arc<Shared>,
    /// What encodes weights that are on this rank's device, if it has one.
    #[cfg(feature = "cuda")]
    encoding: Option<Encoding>,
}

/// What all who write share.
#[derive(Debug)]
pub(super) struct Shared {
    commands: Sender<Command>,
    staging: Arc<Staging>,
    /// How long a grant may take, and writes without an end of any of them.
    pub(super) limit: Duration,
}

impl Writers {
    /// Starts the agent of a rank with a device, which may be the CPU, with about so many bytes to gather in what is written.
    pub(super) async fn start(
        options: AgentOptions,
        device: &DeviceChoice,
        rank: Rank,
        bytes: u64,
        limit: Duration,
    ) -> Result<Self> {
        let (commands, inbox) = channel();
        let closing = commands.clone();
        let (staging, memory) = Staging::new(bytes)?;
        let staging = Arc::new(staging);
        let theirs = staging.clone();
        let shared = Arc::new(Shared { commands, staging, limit });
        #[cfg(feature = "cuda")]
        let encoding = match device.is_cpu() {
            true => None,
            false => Some(encoding(device, shared.clone())?),
        };
        #[cfg(not(feature = "cuda"))]
        let _ = device;
        let make = move || Writer::new(options, rank, theirs, vec![memory], limit);
        // A thread that has ended needs no command.
        let close = move || drop(closing.send(Command::Close));
        thread::start(close, make, move |writer| writer.run(&inbox)).await?;
        Ok(Self {
            shared,
            #[cfg(feature = "cuda")]
            encoding,
        })
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.shared.tell(Command::Close);
    }
}

impl Reach for Writers {
    fn reach(&self, terms: &[(Rank, Bytes)]) -> Result<Vec<Arc<dyn Reached>>> {
        let failure = Arc::new(Failure::default());
        let mut offers = Vec::with_capacity(terms.len());
        let mut reached: Vec<Arc<dyn Reached>> = Vec::with_capacity(terms.len());
        for (rank, terms) in terms {
            let offer: Offer = decode(terms).map_err(|error| error.rank(*rank))?;
            let target = Arc::new(Target::new(*rank, &offer, failure.clone())?);
            offers.push((target.clone(), offer.metadata));
            // Dropped if this fails, it lets go of what was granted.
            reached.push(Arc::new(Holding { target, shared: self.shared.clone() }));
        }
        let (told, is_told) = sync_channel(1);
        let until = Instant::now() + self.shared.limit;
        if !self.shared.tell(Command::Reach { offers, until, told }) {
            return Err(NixlError::Closed.into());
        }
        // The thread ends earlier by itself, and says who has not answered.
        let limit = self.shared.limit + self.shared.limit / 8;
        match is_told.recv_timeout(limit) {
            Ok(result) => result.map(|()| reached),
            Err(_) => Err(NixlError::Slow(limit).into()),
        }
    }

    #[cfg(feature = "cuda")]
    fn encoder(&self) -> Option<&dyn Encoder> {
        self.encoding.as_ref().map(|encoding| encoding as &dyn Encoder)
    }
}

impl Shared {
    /// Returns whether the agent's thread is there to be told.
    pub(super) fn tell(&self, command: Command) -> bool {
        self.commands.send(command).is_ok()
    }

    pub(super) fn write(&self, target: &Arc<Target>, parcel: Parcel) {
        target.begun();
        if !self.tell(Command::Write(target.clone(), parcel)) {
            target.fail(NixlError::Closed);
        }
    }
}

/// A rollout's memory, while this trainer may write there.
#[derive(Debug)]
pub(super) struct Holding {
    target: Arc<Target>,
    shared: Arc<Shared>,
}

#[cfg(feature = "cuda")]
impl Holding {
    pub(super) fn target(&self) -> &Arc<Target> {
        &self.target
    }
}

impl Reached for Holding {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let (target, Shared { staging, limit, .. }) = (&self.target, &*self.shared);
        target.check()?;
        let found = target.parts().find(at, bytes.len() as u64);
        let outside = || {
            let message = format!("{} bytes at {at} lie outside of what is lent", bytes.len());
            Error::new(ErrorKind::Protocol, "writing tensors", message).rank(target.rank())
        };
        let (&part, from) = found.ok_or_else(outside)?;
        // What is offered was checked to be addresses of this platform.
        let (mut to, mut rest) = (part + from as usize, bytes);
        while !rest.is_empty() {
            let next = staging.take(target, *limit, || target.check());
            match next.map_err(|error| error.rank(target.rank()))? {
                Next::Fill(mut staged) => {
                    let taken = staged.add(part, to, rest);
                    (to, rest) = (to + taken, &rest[taken..]);
                    match staged.is_full() {
                        true => self.shared.write(target, Parcel::Gathered(staged)),
                        false => staging.put_back(target.clone(), staged),
                    }
                }
                Next::Write(target, staged) => self.shared.write(&target, Parcel::Gathered(staged)),
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        for staged in self.shared.staging.drain(&self.target) {
            self.shared.write(&self.target, Parcel::Gathered(staged));
        }
        self.target.wait(self.shared.limit)
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        // What was not written belongs to an update that has failed.
        for staged in self.shared.staging.drain(&self.target) {
            self.shared.staging.give(staged);
        }
        self.shared.tell(Command::LetGo(self.target.clone()));
    }
}

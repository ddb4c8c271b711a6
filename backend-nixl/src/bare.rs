//! Bare transfers as a baseline for updates: the same library, settings, slots and processes, and nothing else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine_core::provider::MemoryKind;
use engine_core::{CheckpointEngineConfig, Result};

use crate::NAME;
use crate::agent::{Agent, AgentOptions, Card, Reach, open};
use crate::engine::{NixlOptions, Transfer, arena, unique_name};
use crate::error::NixlError;
use crate::ffi::{NotStarted, RawAgent, RawTransfer, Remote};

/// The deadline of a transfer.
const DEADLINE: Duration = Duration::from_secs(60);

/// The passive end of bare transfers: an agent and slots apart from those of the engine.
#[derive(Debug)]
pub struct Target {
    agent: Agent,
}

impl Target {
    /// Makes an agent and slots like those of an engine of this configuration, on the kind of memory of its device.
    ///
    /// # Errors
    ///
    /// Those of preparing an engine.
    pub async fn new(
        config: &CheckpointEngineConfig,
        memory: Option<&dyn MemoryKind>,
    ) -> Result<Self> {
        let options = config.kwargs::<NixlOptions>(NAME)?;
        let arena = Arc::new(arena(config, memory)?);
        let agent = Agent::start(as_usual(&options), unique_name("target"), arena).await?;
        Ok(Self { agent })
    }

    /// Its card, for [`seconds`].
    pub fn card(&self) -> serde_json::Value {
        self.agent.card().map_or(serde_json::Value::Null, |card| serde_json::json!(*card))
    }
}

/// The options of an agent that works as NIXL intends: with a thread of its own, too.
fn as_usual(options: &NixlOptions) -> AgentOptions {
    AgentOptions { own_thread: true, ..options.of_agent() }
}

/// Seconds for raw NIXL transfers of `bytes` bytes between slots of this process and of another process's [`Target`], slot by slot: read
/// from there, or written to there, as the configuration says; written also if nothing can be read. The first slots are moved twice, and
/// the first time does not count. Blocks.
///
/// # Errors
///
/// Those of preparing an engine, and of the transfers.
pub fn seconds(
    config: &CheckpointEngineConfig,
    memory: Option<&dyn MemoryKind>,
    target: &serde_json::Value,
    bytes: u64,
) -> Result<f64> {
    let options = config.kwargs::<NixlOptions>(NAME)?;
    let target: Card = serde_json::from_value(target.clone()).map_err(|_| NixlError::Unknown)?;
    let arena = arena(config, memory)?;
    let mut reads = options.transfer == Transfer::Read
        && !Reach::new(&options.of_agent(), arena.device().is_some()).excludes(&target);
    let (agent, _) = open(&as_usual(&options), unique_name("bare"), &arena, Vec::new())?;
    agent.load_peer(&target.metadata)?;
    let mut begun = Instant::now();
    let warm = i64::from(arena.slots());
    let mut left = bytes;
    let mut number = -warm;
    while left > 0 {
        if number == 0 {
            begun = Instant::now();
        }
        let len = if number < 0 { arena.slot_bytes() } else { left.min(arena.slot_bytes()) };
        let slot = number.rem_euclid(warm) as u32;
        let remote = Remote { range: target.range(slot, len)?, device: target.device };
        let started = if reads {
            let to = arena.try_lock(slot, len)?;
            agent.read(&target.name, remote, to).map_err(told).and_then(|raw| wait(&agent, raw))
        } else {
            let from = arena.place(slot, len)?;
            agent.write(&target.name, from, remote).map_err(told).and_then(|raw| wait(&agent, raw))
        };
        if started.is_err() && reads && number == -warm {
            // UCX has no transport here that can read.
            reads = false;
            agent.forget_peer(&target.name)?;
            agent.load_peer(&target.metadata)?;
            continue;
        }
        started?;
        if number >= 0 {
            left -= len;
        }
        number += 1;
    }
    Ok(begun.elapsed().as_secs_f64())
}

fn told<M>(not: NotStarted<M>) -> NixlError {
    not.error
}

/// Waits for the end of a transfer.
fn wait<M>(agent: &RawAgent, transfer: RawTransfer<M>) -> Result<(), NixlError> {
    let until = Instant::now() + DEADLINE;
    let ended = loop {
        match agent.is_done(&transfer) {
            // A pause would slow down transfers that progress with each poll (`cma`). Polling without yielding would slow down those that
            // other threads progress (`tcp`).
            Ok(false) if Instant::now() < until => std::thread::yield_now(),
            Ok(false) => return Err(NixlError::Slow(DEADLINE)),
            Ok(true) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    let mut transfer = Some(transfer);
    while let Some(left) = transfer.take().and_then(|transfer| agent.end(transfer).err()) {
        if Instant::now() >= until {
            return Err(NixlError::Slow(DEADLINE));
        }
        transfer = Some(left);
        std::thread::yield_now();
    }
    ended
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bare_transfers_end_whichever_way_they_go_and_whatever_is_no_target_is_an_error() {
        for transfer in ["read", "write"] {
            let mut config = CheckpointEngineConfig::new(NAME);
            config.update_weights_bucket_megabytes = Some(1);
            let options = serde_json::json!({ "transfer": transfer });
            config.engine_kwargs.insert(NAME.into(), options.as_object().unwrap().clone());
            let target = Target::new(&config, None).await.unwrap();
            assert!(seconds(&config, None, &target.card(), 3_000_001).unwrap() > 0.0);
            assert!(seconds(&config, None, &serde_json::json!("nobody"), 1).is_err());
        }
    }
}

//! Groups that are larger than a machine can run.

use std::time::Duration;

use checkpoint_engine::backend::protocol::{Simulated, Simulation, simulate};
use checkpoint_engine::{Error, ErrorKind, Result};
use serde::Serialize;

use super::{MEASURING, ScaleLine, Setting, scale};

/// What an update of a simulated group would cost rank 0.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SimulatedLine {
    /// Ranks beside the trainer.
    pub rollouts: u32,
    /// How many of them share a relay; 0 without relays.
    pub behind: u32,
    /// Buckets of the update.
    pub buckets: u32,
    /// Microseconds of processor time for a frame of a connection, as measured.
    pub frame_us: f64,
    /// Microseconds for a message in it, without the state machine, as measured.
    pub message_us: f64,
    /// Microseconds for a bucket, whatever the number of ranks, without the state machine, as measured.
    pub bucket_us: f64,
    /// Frames of the simulated update at rank 0.
    pub frames: u64,
    /// Messages of the simulated update at rank 0, each counted for each rank.
    pub messages: u64,
    /// Seconds of processor time of the leader's state machine, measured while it ran.
    pub machine: f64,
    /// Seconds of processor time of rank 0: all of these together.
    pub cpu: f64,
}

/// The real groups that costs are measured with.
const ROLLOUTS: u32 = 64;
const BUCKETS: u32 = 100;

/// Measures what a frame, a message and a bucket cost, with real groups of 64 rollouts and of one, and runs the state
/// machines of a larger group.
///
/// # Cancel safety
///
/// Dropping the future ends the processes.
///
/// # Errors
///
/// The first failure of an update.
pub async fn simulated(rollouts: u32, behind: u32, buckets: u32) -> Result<SimulatedLine> {
    let setting = |rollouts, behind| Setting {
        rollouts,
        tensors: BUCKETS,
        buckets: BUCKETS,
        behind,
        repeats: 20,
    };
    let mut lines: Vec<ScaleLine> = Vec::new();
    scale(&[setting(1, 0), setting(ROLLOUTS, 0), setting(ROLLOUTS, ROLLOUTS)], |line| {
        lines.push(line.clone());
        Ok(())
    })
    .await?;
    let [one, alone, shared] = &lines[..] else {
        return Err(Error::new(ErrorKind::State, MEASURING, "a measurement is missing"));
    };
    let run = |rollouts, behind, buckets: u32| {
        let mut simulation = Simulation::default();
        (simulation.rollouts, simulation.behind) = (rollouts, behind);
        simulation.buckets = buckets.into();
        simulation.latency = Duration::from_micros(50);
        simulation.fill = Duration::from_millis(1);
        simulate(simulation)
    };
    let small =
        [run(1, 0, BUCKETS)?, run(ROLLOUTS, 0, BUCKETS)?, run(ROLLOUTS, ROLLOUTS, BUCKETS)?];
    let rest = |line: &ScaleLine, of: &Simulated| line.steady.cpu - of.machine.as_secs_f64();
    let of_messages = small[2].messages.saturating_sub(small[0].messages).max(1) as f64;
    // Three measurements, three unknowns: the costs of a frame, of a message, and of a bucket.
    let frames = alone.steady.frames.saturating_sub(shared.steady.frames).max(1);
    let frame = (rest(alone, &small[1]) - rest(shared, &small[2])) / frames as f64;
    let without_frames =
        |line: &ScaleLine, of: &Simulated| rest(line, of) - frame * line.steady.frames as f64;
    let (least, most) = (without_frames(one, &small[0]), without_frames(shared, &small[2]));
    let message = ((most - least) / of_messages).max(0.0);
    let bucket = (least - message * small[0].messages as f64).max(0.0) / f64::from(BUCKETS);
    let took = run(rollouts, behind, buckets)?;
    let machine = took.machine.as_secs_f64();
    Ok(SimulatedLine {
        rollouts,
        behind,
        buckets,
        frame_us: frame * 1e6,
        message_us: message * 1e6,
        bucket_us: bucket * 1e6,
        frames: took.frames,
        messages: took.messages,
        machine,
        cpu: took.frames as f64 * frame
            + took.messages as f64 * message
            + f64::from(buckets) * bucket
            + machine,
    })
}

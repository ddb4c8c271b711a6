//! NCCL without an engine: what it reaches by itself, for benchmarks to compare with.

use std::path::Path;
use std::time::{Duration, Instant};

use collective::{Communicator, MemorySlots, Shape, Thread};
use engine_core::{DeviceChoice, Result};

use crate::comm::Nccl;
use crate::error::NcclError;
use crate::ffi::{RawComm, unique_id};
use crate::sys;

/// What to broadcast.
#[derive(Clone, Debug)]
pub struct Broadcasts {
    /// The rank's device.
    pub device: DeviceChoice,
    /// The group's id, which rank 0 has made.
    pub id: Vec<u8>,
    /// How many ranks.
    pub ranks: u32,
    /// This one.
    pub rank: u32,
    /// Bytes of a broadcast.
    pub bytes: u64,
    /// Broadcasts that are enqueued one behind the other and timed together.
    pub batch: u32,
    /// How often.
    pub repeats: u32,
}

/// The id of a new group, which this process answers for.
///
/// # Errors
///
/// `Backend` without NCCL; what it reports.
pub fn group_id(library: Option<&Path>) -> Result<Vec<u8>> {
    Ok(unique_id(sys::load(library)?)?.to_vec())
}

/// Joins a group of one: whether NCCL works on this machine at all.
///
/// # Errors
///
/// As [`group_id`].
pub fn join_alone(library: Option<&Path>) -> Result<()> {
    let api = sys::load(library)?;
    let comm = RawComm::init(api, unique_id(api)?, 1, 0)?;
    let until = Instant::now() + Duration::from_secs(30);
    while !comm.is_ready()? {
        if Instant::now() > until {
            let message = "not within 30 s";
            let kind = engine_core::ErrorKind::Timeout;
            return Err(engine_core::Error::new(kind, "joining a group of one", message));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Broadcasts device memory from rank 0 to all others, in place; the seconds of one broadcast of each
/// batch, after two batches that do not count. The same call runs on all ranks at the same time.
///
/// # Errors
///
/// `Backend` without NCCL or a GPU; what it reports.
pub async fn broadcasts(library: Option<&Path>, what: Broadcasts) -> Result<Vec<f64>> {
    const DEADLINE: Duration = Duration::from_secs(60);
    let api = sys::load(library)?;
    let shape = Shape { slots: 2, slot_bytes: what.bytes };
    let slots = MemorySlots::new(device_cuda::MEMORY, &what.device, shape)?;
    let thread = Thread::start("ckpt-nccl", move || Nccl::new(api, slots)).await?;
    let run = thread.run(DEADLINE, move |nccl, wait| {
        let id: [u8; sys::UNIQUE_ID_BYTES] =
            what.id.as_slice().try_into().map_err(|_| NcclError::Id(what.id.len()))?;
        nccl.join(0, &id, what.ranks, what.rank, wait)?;
        let (mut begun, mut seconds) = (0, Vec::new());
        for batch in 0..what.repeats + 2 {
            let start = Instant::now();
            for _ in 0..what.batch {
                nccl.broadcast(0, (begun % 2) as u32, what.bytes, wait)?;
                begun += 1;
            }
            while nccl.ended(0)? < begun {
                wait.check("broadcasting")?;
                std::hint::spin_loop();
            }
            if batch >= 2 {
                seconds.push(start.elapsed().as_secs_f64() / f64::from(what.batch));
            }
        }
        nccl.leave();
        Ok(seconds)
    });
    let seconds = run.await;
    thread.close().await;
    seconds
}

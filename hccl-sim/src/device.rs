//! Devices, and which of them each thread has chosen.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Mutex;

use crate::abi::*;
use crate::{Fault, Outcome, fault, lock, sim};

/// A device's context: another one after each reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Context {
    pub(crate) device: i32,
    generation: u64,
}

#[derive(Debug, Default)]
struct State {
    /// With how often each was set and not reset.
    live: HashMap<i32, (Context, u64)>,
    generations: u64,
}

/// The devices that this process uses.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    state: Mutex<State>,
}

thread_local! {
    static CURRENT: Cell<Option<Context>> = const { Cell::new(None) };
}

impl Devices {
    /// The context of the calling thread.
    pub(crate) fn current(&self) -> Result<Context, Fault> {
        let message = "no device was set on this thread, or it was reset";
        let missing = || fault(ACL_ERROR_RT_CONTEXT_NULL, message);
        let context = CURRENT.get().ok_or_else(missing)?;
        let live = lock(&self.state).live.get(&context.device).is_some_and(|one| one.0 == context);
        if live { Ok(context) } else { Err(missing()) }
    }

    pub(crate) fn set(&self, device: i32) -> Outcome {
        chip(device)?;
        let mut state = lock(&self.state);
        let generation = state.generations + 1;
        let entry = state.live.entry(device);
        let new = matches!(entry, std::collections::hash_map::Entry::Vacant(_));
        let (context, times) = entry.or_insert((Context { device, generation }, 0));
        *times += 1;
        CURRENT.set(Some(*context));
        if new {
            state.generations = generation;
        }
        Ok(())
    }

    /// Ends everything on a device that was reset, by whatever thread, as often as it was set.
    pub(crate) fn reset(&self, device: i32) -> Outcome {
        chip(device)?;
        let mut state = lock(&self.state);
        let Some((context, times)) = state.live.get_mut(&device) else {
            return Err(fault(ACL_ERROR_RT_CONTEXT_NULL, "this device was not set"));
        };
        let context = *context;
        *times -= 1;
        let last = *times == 0;
        if last {
            state.live.remove(&device);
        }
        drop(state);
        if last {
            for stream in sim().streams.all() {
                if stream.context() == context {
                    stream.close();
                }
            }
            sim().memory.reset(device);
        }
        Ok(())
    }
}

/// The chip that a device number stands for.
pub(crate) fn chip(device: i32) -> Result<i32, Fault> {
    let devices = &sim().settings.devices;
    let chip = usize::try_from(device).ok().and_then(|device| devices.get(device));
    chip.copied().ok_or_else(|| {
        let message = format!("there is no device {device}, there are {}", devices.len());
        fault(ACL_ERROR_RT_INVALID_DEVICEID, message)
    })
}

//! The behaviour that every checkpoint engine has, as a suite that takes a backend as a value.
//!
//! A backend's tests name the suite once, and [`suite!`] makes a test of every case:
//!
//! ```
//! conformance::suite!(conformance::Suite::new(backend_naive::BACKEND), within a process);
//! ```
//!
//! [`broken`] has engines with one fault each, which the suite must notice. [`collective`] has a library of
//! collectives within a process, with faults at will, for the flow control that backends over such
//! libraries share.

pub mod broken;
mod cases;
pub mod collective;
mod group;
pub mod placed;
pub mod processes;

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use engine_core::provider::MemoryKind;
use engine_core::{
    Backend, CheckpointEngineConfig, DeviceChoice, Layer, Registry, Result, Role, Weight,
};

pub use cases::CASES;

/// A backend, and what the suite has to know of it.
#[derive(Clone, Debug)]
pub struct Suite {
    pub(crate) backend: &'static dyn Backend,
    pub(crate) config: CheckpointEngineConfig,
    pub(crate) control: bool,
    pub(crate) layer: Option<Layered>,
    pub(crate) place: Option<Place>,
    pub(crate) trainers: u32,
    pub(crate) devices: Vec<DeviceChoice>,
}

/// A backend where there is a kind of memory, which configurations name as their device.
///
/// # Panics
///
/// Never: a registry has the backend that was put into it.
pub fn on_memory(
    backend: &'static dyn Backend,
    kind: &'static dyn MemoryKind,
) -> &'static dyn Backend {
    let registry = Registry::new().with(backend).with_memory(kind);
    // A test has a few of them, until it ends.
    &**Box::leak(Box::new(registry.get(backend.name()).expect("the backend").clone()))
}

/// Moves a weight to where the trainer has its weights.
pub type Place = fn(Weight) -> Result<Weight>;

/// A layer in front of the engines, and what it makes of weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layered {
    pub(crate) layer: Layer,
    pub(crate) at: Role,
    pub(crate) expected: fn(Vec<Weight>) -> Vec<Weight>,
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The engine behaves as it has to.
    Passed,
    /// It does not: in words.
    Failed(String),
    /// The case is about something that the backend does not have.
    Ignored(&'static str),
}

/// A case's future.
pub type Running<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// One behaviour.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The behaviour as a sentence.
    pub name: &'static str,
    /// What an engine that hands memory over within a process does not have, if the case is about that.
    pub lacking: Option<Lacking>,
    pub(crate) run: for<'a> fn(&'a Suite) -> Running<'a>,
}

/// What an engine that hands memory over within a process does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacking {
    /// Memory of its own that weights are packed into.
    Buffers,
    /// Connections that others than its ranks can have.
    ControlPlane,
}

impl Suite {
    /// The suite for a backend that hands memory over within a process, and needs no control plane.
    pub fn new(backend: &'static dyn Backend) -> Self {
        let mut config = CheckpointEngineConfig::new(backend.name());
        config.update_weights_bucket_megabytes = Some(1);
        config.timeout_seconds = 2.0;
        Self {
            backend,
            config,
            control: false,
            layer: None,
            place: None,
            trainers: 1,
            devices: Vec::new(),
        }
    }

    /// The backend fills buckets and talks over a control plane.
    #[must_use]
    pub fn with_control_plane(mut self) -> Self {
        self.control = true;
        self
    }

    /// With a layer in front of every engine, which changes weights at the ranks of this role; `expected` is
    /// what a rollout has to get of weights that are sent, in order.
    #[must_use]
    pub fn with_layer(
        mut self,
        layer: Layer,
        at: Role,
        expected: fn(Vec<Weight>) -> Vec<Weight>,
    ) -> Self {
        self.layer = Some(Layered { layer, at, expected });
        self
    }

    /// Every weight is put elsewhere before it is sent, with the same bytes: on a device.
    #[must_use]
    pub fn with_weights_placed(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }

    /// With so many trainers, all of which have the same weights.
    #[must_use]
    pub fn with_trainers(mut self, trainers: u32) -> Self {
        self.trainers = trainers;
        self
    }

    /// With these devices, in the order of the ranks; when there are no more, all other ranks are on the last
    /// one. Without them, all ranks have that of the configuration.
    #[must_use]
    pub fn with_devices(mut self, devices: impl IntoIterator<Item = DeviceChoice>) -> Self {
        self.devices = devices.into_iter().collect();
        self
    }

    /// A rank's configuration.
    pub(crate) fn config_of(&self, rank: u32) -> CheckpointEngineConfig {
        let mut config = self.config.clone();
        let device = self.devices.get(rank as usize).or(self.devices.last());
        if let Some(device) = device {
            config.device.clone_from(device);
        }
        config
    }

    /// What has to arrive of weights that are sent.
    pub(crate) fn expected(&self, weights: Vec<Weight>) -> Vec<Weight> {
        match self.layer {
            // On a thread of its own, because it may run an executor, and the caller's may be one.
            Some(layered) => std::thread::scope(|scope| {
                scope.spawn(|| (layered.expected)(weights)).join().expect("no panic")
            }),
            None => weights,
        }
    }

    /// What has to travel for weights that are sent: a rollout's layer may change what arrives.
    pub(crate) fn on_the_wire(&self, weights: Vec<Weight>) -> Vec<Weight> {
        let changed = self.layer.is_some_and(|layered| layered.at == Role::Trainer);
        if changed { self.expected(weights) } else { weights }
    }

    /// With another configuration than the suite's own, which has buckets of 1 MiB and deadlines of
    /// 2 s.
    #[must_use]
    pub fn with_config(mut self, change: impl FnOnce(&mut CheckpointEngineConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Runs one case, in a runtime of its own.
    ///
    /// # Panics
    ///
    /// If the runtime cannot be made.
    pub fn run(&self, case: &Case) -> Outcome {
        match case.lacking {
            Some(Lacking::Buffers) if !self.control => {
                return Outcome::Ignored("this engine hands memory over and has no buffers");
            }
            Some(Lacking::ControlPlane) if !self.control => {
                return Outcome::Ignored("this engine stays within a process");
            }
            _ => {}
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .expect("a runtime");
        // Nothing that the suite does takes long but for waits that are meant to reach a deadline: what does, hangs.
        let limit = Duration::from_secs_f64(self.config.timeout_seconds.mul_add(4.0, 60.0));
        let limited = async { tokio::time::timeout(limit, (case.run)(self)).await };
        let result = runtime.block_on(limited);
        // It waits for engines that were dropped. A library that is still at work when the process ends crashes
        // it, and NCCL takes seconds to let go of a group.
        runtime.shutdown_timeout(limit);
        match result {
            Ok(Ok(())) => Outcome::Passed,
            Ok(Err(words)) => Outcome::Failed(words),
            Err(_) => Outcome::Failed(format!("it hung for {limit:.0?}")),
        }
    }

    /// Runs the case of a name as a test.
    ///
    /// # Panics
    ///
    /// If the engine fails the case or does not have what it is about, or if there is no such case.
    pub fn test(&self, name: &str) {
        log();
        let case = CASES.iter().find(|case| case.name == name).expect("a case of that name");
        match self.run(case) {
            Outcome::Passed => {}
            Outcome::Failed(words) => panic!("{} does not: {name}: {words}", self.backend.name()),
            Outcome::Ignored(reason) => panic!("{name}: {reason}"),
        }
    }
}

/// Lets `CKPT_ENGINE_LOG` say what of the ranks' logs is printed, to standard error.
pub(crate) fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CKPT_ENGINE_LOG");
    let Ok(filter) = filter else { return };
    let logger = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Another test of the process may have begun to log.
    drop(logger.try_init());
}

//! The behaviour that every checkpoint engine must have, as a suite that takes a backend as a value.
//!
//! A backend's tests name the suite once, and [`suite!`] makes a test of every case:
//!
//! ```
//! conformance::suite!(conformance::Suite::new(backend_naive::BACKEND), within a process);
//! ```
//!
//! [`broken`] has engines with one fault each, which the suite must detect. [`collective`] has a library of collectives within a process,
//! with configurable faults, to test the flow control that backends over such libraries share.

pub mod broken;
mod cases;
pub mod collective;
mod group;
pub mod hosts;
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

/// A backend, and what the suite needs to know about it.
#[derive(Clone, Debug)]
pub struct Suite {
    pub(crate) backend: &'static dyn Backend,
    pub(crate) config: CheckpointEngineConfig,
    pub(crate) control: bool,
    pub(crate) layer: Option<Layered>,
    pub(crate) place: Option<Place>,
    pub(crate) trainers: u32,
    pub(crate) devices: Vec<DeviceChoice>,
    pub(crate) memory: Option<&'static dyn MemoryKind>,
    /// The parts that each rollout wants, in the order of their ranks; all for further ones.
    pub(crate) wants: Vec<Option<Vec<String>>>,
}

/// A backend in a registry with a kind of memory, which configurations name as their device.
///
/// # Panics
///
/// Never: the registry has the backend that was registered.
pub fn on_memory(
    backend: &'static dyn Backend,
    kind: &'static dyn MemoryKind,
) -> &'static dyn Backend {
    let registry = Registry::new().with(backend).with_memory(kind);
    // Leaked: a test needs a few of them until it ends.
    &**Box::leak(Box::new(registry.get(backend.name()).expect("the backend").clone()))
}

/// Moves a weight to where the trainer has its weights.
pub type Place = fn(Weight) -> Result<Weight>;

/// A layer in front of the engines, and its effect on weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layered {
    pub(crate) layer: Layer,
    pub(crate) at: Role,
    pub(crate) expected: fn(Vec<Weight>) -> Vec<Weight>,
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The engine behaves as it must.
    Passed,
    /// It does not, with the reason.
    Failed(String),
    /// The case needs something that the backend does not have, with the reason.
    Ignored(&'static str),
}

/// A case's future.
pub type Running<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// One behaviour.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The behaviour as a sentence.
    pub name: &'static str,
    /// What the case needs that an engine within a process does not have.
    pub lacking: Option<Lacking>,
    pub(crate) run: for<'a> fn(&'a Suite) -> Running<'a>,
}

/// What an engine that hands memory over within a process lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacking {
    /// Memory of its own that weights are packed into.
    Buffers,
    /// Connections that processes other than its ranks can make.
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
            memory: None,
            wants: Vec::new(),
        }
    }

    /// For a backend that fills buckets and talks over a control plane.
    #[must_use]
    pub fn with_control_plane(mut self) -> Self {
        self.control = true;
        self
    }

    /// With the kind of memory of the ranks' device, for layers; the backend has its own ([`on_memory`]).
    #[must_use]
    pub fn with_memory(mut self, kind: &'static dyn MemoryKind) -> Self {
        self.memory = Some(kind);
        self
    }

    /// With a layer in front of every engine, which changes weights at the ranks of this role. `expected` returns what a rollout must get
    /// for the weights that are sent, in order.
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

    /// With weights that are moved before they are sent, with the same bytes: to a device.
    #[must_use]
    pub fn with_weights_placed(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }

    /// With `trainers` trainers, which all have the same weights.
    #[must_use]
    pub fn with_trainers(mut self, trainers: u32) -> Self {
        self.trainers = trainers;
        self
    }

    /// With these devices, in the order of the ranks. The last one is for all further ranks. Without them, all ranks use the device of the
    /// configuration.
    #[must_use]
    pub fn with_devices(mut self, devices: impl IntoIterator<Item = DeviceChoice>) -> Self {
        self.devices = devices.into_iter().collect();
        self
    }

    /// With versions of the parts that these patterns name, of which rollouts want these.
    pub(crate) fn with_parts(&self, parts: &[(&str, &str)], wants: &[Option<&[&str]>]) -> Self {
        let mut suite = self.clone();
        for (part, pattern) in parts {
            suite.config.parts.insert((*part).to_owned(), vec![(*pattern).into()]);
        }
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        suite.wants = wants.iter().map(|wants| wants.map(names)).collect();
        suite
    }

    /// A rank's configuration.
    pub(crate) fn config_of(&self, rank: u32) -> CheckpointEngineConfig {
        let mut config = self.config.clone();
        let device = self.devices.get(rank as usize).or(self.devices.last());
        if let Some(device) = device {
            config.device.clone_from(device);
        }
        let rollout = rank.checked_sub(self.trainers);
        config.wants = rollout.and_then(|rollout| self.wants.get(rollout as usize)?.clone());
        config
    }

    /// The weights that must arrive for those that are sent.
    pub(crate) fn expected(&self, weights: Vec<Weight>) -> Vec<Weight> {
        match self.layer {
            // On a separate thread: it may run an executor, and the caller's thread may be running one.
            Some(layered) => std::thread::scope(|scope| {
                scope.spawn(|| (layered.expected)(weights)).join().expect("no panic")
            }),
            None => weights,
        }
    }

    /// The weights that must travel for those that are sent: a rollout's layer may change what arrives.
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

    /// Runs one case in a separate runtime.
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
        // Only waits that are meant to reach a deadline take long. A case beyond this limit hangs.
        let limit = Duration::from_secs_f64(self.config.timeout_seconds.mul_add(4.0, 60.0));
        let limited = async { tokio::time::timeout(limit, (case.run)(self)).await };
        let result = runtime.block_on(limited);
        // Waits for engines that were dropped. A library that still works when the process ends crashes it, and NCCL takes seconds to leave
        // a group.
        runtime.shutdown_timeout(limit);
        match result {
            Ok(Ok(())) => Outcome::Passed,
            Ok(Err(words)) => Outcome::Failed(words),
            Err(_) => Outcome::Failed(format!("it hung for {limit:.0?}")),
        }
    }

    /// Runs the case of this name as a test.
    ///
    /// # Panics
    ///
    /// If the engine fails the case or lacks what it needs, or if there is no such case.
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

/// Prints the ranks' logs to standard error, filtered by `CKPT_ENGINE_LOG`.
pub(crate) fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CKPT_ENGINE_LOG");
    let Ok(filter) = filter else { return };
    let logger = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Another test of the process may have set the logger.
    drop(logger.try_init());
}

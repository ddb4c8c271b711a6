//! Backends by name.

use std::sync::Arc;

use async_trait::async_trait;

use crate::provider::MemoryKind;
use crate::{
    Availability, Backend, Bases, DeviceChoice, Devices, EngineContext, Error, ErrorKind,
    Placement, PreparedRollout, PreparedTrainer, Result, Role, WorkerMetadata,
};

/// The backends that a program knows.
///
/// Nothing registers itself before `main`: a program lists its backends, and adds others.
///
/// # Examples
///
/// ```
/// # use engine_core::{Backend, CheckpointEngineConfig, EngineContext, Registry, Result};
/// # async fn example(naive: &'static dyn Backend) -> Result<()> {
/// let registry = Registry::new().with(naive);
/// let config = CheckpointEngineConfig::new("naive");
/// let trainer = registry.prepare_trainer(EngineContext::new(config)).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Registry {
    /// As they were added, and as they know the kinds of memory.
    backends: Vec<(Arc<dyn Backend>, Arc<dyn Backend>)>,
    layers: Vec<Layer>,
    memories: Vec<&'static dyn MemoryKind>,
}

/// Code between a program and an engine that changes what is sent or received, as its keys of the configuration say.
/// The engine does not know of it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Layer {
    /// Its name, for errors and lists.
    pub name: &'static str,
    /// The keys of the configuration that it understands, beside those of
    /// [`CheckpointEngineConfig`](crate::CheckpointEngineConfig) itself.
    pub keys: &'static [&'static str],
    /// Puts it in front of a trainer's engine, as the context's configuration says.
    pub trainer: fn(PreparedTrainer, &EngineContext) -> Result<PreparedTrainer>,
    /// Puts it in front of a rollout's engine, as the context's configuration says.
    pub rollout: fn(PreparedRollout, &EngineContext) -> Result<PreparedRollout>,
}

impl Layer {
    /// A layer of this name, with its keys, and what puts it in front of a trainer's and of a rollout's engine.
    pub const fn new(
        name: &'static str,
        keys: &'static [&'static str],
        trainer: fn(PreparedTrainer, &EngineContext) -> Result<PreparedTrainer>,
        rollout: fn(PreparedRollout, &EngineContext) -> Result<PreparedRollout>,
    ) -> Self {
        Self { name, keys, trainer, rollout }
    }
}

impl Registry {
    /// A registry without backends and layers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a backend; one of the same name is replaced.
    #[must_use]
    pub fn with(mut self, backend: impl Backend + 'static) -> Self {
        self.backends.retain(|(other, _)| other.name() != backend.name());
        self.backends.push(provided(Arc::new(backend), &self.memories));
        self
    }

    /// Adds a layer in front of every engine; one of the same name is replaced. What a program sends goes
    /// through the last one first.
    #[must_use]
    pub fn with_layer(mut self, layer: Layer) -> Self {
        self.layers.retain(|other| other.name != layer.name);
        self.layers.push(layer);
        self
    }

    /// Adds a kind of memory that buckets may be in; one of the same name is replaced.
    #[must_use]
    pub fn with_memory(mut self, kind: &'static dyn MemoryKind) -> Self {
        self.memories.retain(|other| other.name() != kind.name());
        self.memories.push(kind);
        for (added, known) in &mut self.backends {
            (_, *known) = provided(added.clone(), &self.memories);
        }
        self
    }

    /// The kind of memory of a device; `None` for one that no kind here is of, and for the host.
    pub fn memory(&self, device: &DeviceChoice) -> Option<&'static dyn MemoryKind> {
        of_device(&self.memories, device)
    }

    /// All backends.
    pub fn backends(&self) -> impl Iterator<Item = &Arc<dyn Backend>> + '_ {
        self.backends.iter().map(|(_, provided)| provided)
    }

    /// A backend by its name. It knows the kinds of memory of this registry, wherever it is used.
    ///
    /// # Errors
    ///
    /// `Backend`, listing the names that there are.
    pub fn get(&self, name: &str) -> Result<&Arc<dyn Backend>> {
        self.backends().find(|backend| backend.name() == name).ok_or_else(|| {
            let known: Vec<&str> = self.backends().map(|backend| backend.name()).collect();
            let known = match known.is_empty() {
                true => "this registry has none".to_owned(),
                false => format!("known: {}", known.join(", ")),
            };
            let message = format!("there is no backend `{name}`; {known}");
            Error::new(ErrorKind::Backend, "choosing a backend", message)
        })
    }

    /// Prepares a trainer with the backend that a configuration names, behind all layers.
    ///
    /// # Errors
    ///
    /// Those of [`validate`](crate::CheckpointEngineConfig::validate), of [`get`](Self::get), of
    /// [`Backend::prepare_trainer`] and of the layers; `Config` if the configuration asks for something that no layer
    /// understands, or for a device that the backend does not know, or if the control plane has the rank as a rollout.
    pub async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        let context = self.completed(context);
        let backend = self.checked(&context, Role::Trainer)?;
        let prepared = backend.prepare_trainer(context.clone()).await?;
        self.layers.iter().try_fold(prepared, |prepared, layer| (layer.trainer)(prepared, &context))
    }

    /// Prepares a rollout, as a trainer.
    ///
    /// # Errors
    ///
    /// Those of [`prepare_trainer`](Self::prepare_trainer).
    pub async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        let context = self.completed(context);
        let backend = self.checked(&context, Role::Rollout)?;
        let prepared = backend.prepare_rollout(context.clone()).await?;
        self.layers.iter().try_fold(prepared, |prepared, layer| (layer.rollout)(prepared, &context))
    }

    /// A context of its own for an engine and its layers, with the kind of memory of its device.
    fn completed(&self, context: EngineContext) -> EngineContext {
        let memory = self.memory(&context.config.device).or(context.memory);
        EngineContext { bases: Bases::default(), memory, ..context }
    }

    /// The backend of a context that can be used.
    fn checked(&self, context: &EngineContext, role: Role) -> Result<&Arc<dyn Backend>> {
        let refuse = |message: String| Error::new(ErrorKind::Config, PREPARING, message);
        context.config.validate()?;
        let known: Vec<&str> = self.layers.iter().flat_map(|layer| layer.keys).copied().collect();
        if let Some(key) = context.config.not_understood(&known) {
            let known = match known.is_empty() {
                true => "it has no layers".to_owned(),
                false => format!("its layers know `{}`", known.join("`, `")),
            };
            return Err(refuse(format!(
                "nothing in this program understands the key `{key}`: {known}"
            )));
        }
        let backend = self.get(&context.config.backend)?;
        if let Some(control) = &context.control
            && control.role() != role
        {
            let its = control.role();
            let message =
                format!("a {role} is prepared, and the control plane has the rank as {its}");
            return Err(refuse(message).rank(control.rank()));
        }
        if role == Role::Rollout && context.config.wants.is_some() && !backend.sends_parts() {
            let able = self.backends().filter(|backend| backend.sends_parts());
            let able: Vec<&str> = able.map(|backend| backend.name()).collect();
            let message = format!(
                "wants: {} sends every version whole to all; backends that can leave parts out: {}",
                backend.name(),
                if able.is_empty() { "none here".to_owned() } else { able.join(", ") }
            );
            let error = refuse(message);
            return Err(context.rank().into_iter().fold(error, Error::rank));
        }
        let device = &context.config.device;
        let kinds = match backend.devices() {
            Devices::Any => return Ok(backend),
            Devices::Kinds(kinds) => kinds.to_vec(),
            Devices::Registered => self.memories.iter().map(|kind| kind.name()).collect(),
        };
        if !device.is_cpu() && !kinds.contains(&device.kind()) {
            let (name, kinds) = (backend.name(), [&["cpu"], &*kinds].concat().join(", "));
            let message = format!("device: `{device}`: {name} has buckets on these here: {kinds}");
            return Err(refuse(message));
        }
        Ok(backend)
    }
}

/// A backend in a program that has kinds of memory.
#[derive(Debug)]
struct Provided {
    backend: Arc<dyn Backend>,
    memories: Vec<&'static dyn MemoryKind>,
}

/// A backend as it was added, and as it knows these kinds of memory.
fn provided(
    backend: Arc<dyn Backend>,
    memories: &[&'static dyn MemoryKind],
) -> (Arc<dyn Backend>, Arc<dyn Backend>) {
    let provided = Provided { backend: backend.clone(), memories: memories.to_vec() };
    (backend, Arc::new(provided))
}

impl Provided {
    fn completed(&self, context: EngineContext) -> EngineContext {
        let memory = of_device(&self.memories, &context.config.device).or(context.memory);
        EngineContext { memory, ..context }
    }
}

#[async_trait]
impl Backend for Provided {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn summary(&self) -> &'static str {
        self.backend.summary()
    }

    fn devices(&self) -> Devices {
        self.backend.devices()
    }

    fn sends_parts(&self) -> bool {
        self.backend.sends_parts()
    }

    fn probe(&self) -> Availability {
        self.backend.probe()
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        self.backend.prepare_trainer(self.completed(context)).await
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        self.backend.prepare_rollout(self.completed(context)).await
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        self.backend.build_topology(workers)
    }
}

/// The kind that a device is of.
fn of_device(
    memories: &[&'static dyn MemoryKind],
    device: &DeviceChoice,
) -> Option<&'static dyn MemoryKind> {
    memories.iter().copied().find(|kind| kind.name() == device.kind())
}

const PREPARING: &str = "preparing";

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use serde_json::json;

    use super::*;
    use crate::provider::{Allocation, Lifetime};
    use crate::{CheckpointEngineConfig, Prepared, Rank};

    #[test]
    fn an_unknown_backend_is_an_error_that_lists_the_known_ones() {
        let error = stubs().get("nccl").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Backend);
        assert!(error.to_string().contains("known: naive, abacuses"), "{error}");
        let error = Registry::new().get("naive").unwrap_err();
        assert!(error.to_string().contains("this registry has none"), "{error}");
    }

    #[test]
    fn a_rollout_that_wants_some_parts_is_refused_where_all_get_everything() {
        let mut config = CheckpointEngineConfig::new("naive");
        config.wants = Some(vec!["policy".into()]);
        let context = EngineContext::new(config).with_rank(Rank(3));
        let error = block_on(stubs().prepare_rollout(context.clone())).unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::Config, Some(Rank(3))));
        let words = error.to_string();
        assert!(words.contains("backends that can leave parts out: none here"), "{words}");
        // A trainer sends what there is.
        block_on(stubs().prepare_trainer(context)).unwrap();
    }

    /// A backend of which nobody joins a group.
    #[derive(Debug)]
    struct Stub(&'static str, Devices);

    fn prepared<E>(name: &str, rank: Rank, role: Role) -> Result<Prepared<E>> {
        let metadata = WorkerMetadata::of_this_process(name, rank, role, json!(null));
        let join = |_| async { Err(Error::new(ErrorKind::State, "joining the group", "a stub")) };
        Ok(Prepared::new(metadata, join))
    }

    #[async_trait::async_trait]
    impl Backend for Stub {
        fn name(&self) -> &'static str {
            self.0
        }

        fn summary(&self) -> &'static str {
            "a stub"
        }

        fn devices(&self) -> Devices {
            self.1
        }

        fn probe(&self) -> Availability {
            Availability::Usable { details: "always".into() }
        }

        async fn prepare_trainer(&self, _: EngineContext) -> Result<PreparedTrainer> {
            prepared(self.0, Rank::LEADER, Role::Trainer)
        }

        async fn prepare_rollout(&self, _: EngineContext) -> Result<PreparedRollout> {
            prepared(self.0, Rank(1), Role::Rollout)
        }

        fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
            Placement::for_all(self.0, workers)
        }
    }

    /// Backends for any device, and for abacuses.
    fn stubs() -> Registry {
        let abacuses = Stub("abacuses", Devices::Kinds(&["abacus"]));
        Registry::new().with(Stub("naive", Devices::Any)).with(abacuses)
    }

    fn create(backend: &str, device: &str) -> Result<PreparedTrainer> {
        let (backend, device) = (backend.into(), device.parse().unwrap());
        let config = CheckpointEngineConfig { backend, device, ..Default::default() };
        block_on(stubs().prepare_trainer(EngineContext::new(config)))
    }

    #[test]
    fn a_device_that_the_backend_does_not_know_is_an_error_that_lists_those_it_does() {
        create("abacuses", "abacus:1").unwrap();
        create("abacuses", "cpu").unwrap();
        let error = create("abacuses", "quipu:1").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        let words = "`quipu:1`: abacuses has buckets on these here: cpu, abacus";
        assert!(error.to_string().contains(words), "{error}");
    }

    /// A kind of memory whose allocations always fail.
    #[derive(Debug)]
    struct Slates;

    impl MemoryKind for Slates {
        fn name(&self) -> &'static str {
            "slate"
        }

        fn allocate(&self, _: &DeviceChoice, _: u32, _: u64, _: Lifetime) -> Result<Allocation> {
            Err(Error::new(ErrorKind::Resource, "allocating", "there are no slates"))
        }
    }

    #[test]
    fn a_backend_for_any_kind_of_memory_gets_the_one_that_the_device_names_wherever_it_is_used() {
        /// Needs memory of the device.
        #[derive(Debug)]
        struct Needs;

        #[async_trait::async_trait]
        impl Backend for Needs {
            fn name(&self) -> &'static str {
                "needs"
            }
            fn summary(&self) -> &'static str {
                "a stub"
            }
            fn devices(&self) -> Devices {
                Devices::Registered
            }
            fn probe(&self) -> Availability {
                Availability::Usable { details: "always".into() }
            }
            async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
                let kind = context.memory_kind()?;
                if let Some(kind) = kind {
                    kind.allocate(&context.config.device, 2, 1, Lifetime::Users)?;
                }
                prepared(if kind.is_some() { "slate" } else { "host" }, Rank(0), Role::Trainer)
            }
            async fn prepare_rollout(&self, _: EngineContext) -> Result<PreparedRollout> {
                prepared("needs", Rank(1), Role::Rollout)
            }
            fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
                Placement::for_all("needs", workers)
            }
        }

        let config = |device: &str| CheckpointEngineConfig {
            backend: "needs".into(),
            device: device.parse().unwrap(),
            ..Default::default()
        };
        let context = |device| EngineContext::new(config(device));
        let without = Registry::new().with(Needs);
        let error = block_on(without.prepare_trainer(context("slate"))).unwrap_err();
        assert!(error.to_string().contains("buckets on these here: cpu"), "{error}");
        let with = without.with_memory(&Slates);
        for prepared in [
            block_on(with.prepare_trainer(context("slate"))),
            block_on(with.get("needs").unwrap().prepare_trainer(context("slate"))),
        ] {
            let error = prepared.unwrap_err();
            assert!(error.to_string().contains("there are no slates"), "{error}");
        }
        let host = block_on(with.prepare_trainer(context("cpu"))).unwrap();
        assert_eq!(host.metadata().backend, "host");
        // Without a registry, the host's memory is not taken for that of a device.
        let error = block_on(Needs.prepare_trainer(context("slate"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    }

    #[test]
    fn a_backend_that_hands_memory_over_takes_any_device() {
        create("naive", "quipu:1").unwrap();
    }

    fn config_with(layers: serde_json::Value) -> EngineContext {
        let layers = layers.as_object().cloned().unwrap();
        let config = CheckpointEngineConfig { layers, ..Default::default() };
        EngineContext::new(config)
    }

    #[test]
    fn asking_for_a_layer_where_there_is_none_is_an_error() {
        for (key, asks) in [("convert", json!(true)), ("how", json!({"mode": 1})), ("n", json!(0))]
        {
            let error =
                block_on(stubs().prepare_trainer(config_with(json!({ key: asks })))).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(
                error
                    .to_string()
                    .contains(&format!("understands the key `{key}`: it has no layers")),
                "{error}"
            );
        }
        for nothing in [json!({}), json!({"convert": false}), json!({"how": {}, "n": null})] {
            block_on(stubs().prepare_trainer(config_with(nothing))).unwrap();
        }
    }

    #[test]
    fn layers_are_put_in_front_of_an_engine_in_their_order_and_their_keys_are_known() {
        fn wants(key: &str, context: &EngineContext) -> Result<()> {
            #[derive(Default, serde::Deserialize)]
            #[serde(default)]
            struct Keys {
                first: Vec<u8>,
                second: bool,
            }
            let keys: Keys = context.config.layer(&[key])?;
            let message = format!("{key}: {:?} {}", keys.first, keys.second);
            Err(Error::new(ErrorKind::State, "a layer", message))
        }
        let first = Layer {
            name: "first",
            keys: &["first"],
            trainer: |prepared, context| match context.config.layers.contains_key("first") {
                true => Err(wants("first", context).unwrap_err()),
                false => Ok(prepared),
            },
            rollout: |prepared, _| Ok(prepared),
        };
        let second = Layer {
            name: "second",
            keys: &["second"],
            trainer: |_, context| Err(wants("second", context).unwrap_err()),
            rollout: |prepared, _| Ok(prepared),
        };
        let registry = stubs().with_layer(first).with_layer(second);
        let message = |layers| {
            let prepared = block_on(registry.prepare_trainer(config_with(layers)));
            prepared.unwrap_err().report().message.clone()
        };
        assert_eq!(message(json!({"first": [1], "second": true})), "first: [1] false");
        assert_eq!(message(json!({"second": true})), "second: [] true");
        assert!(message(json!({"third": 1})).contains("its layers know `first`, `second`"));
        assert!(message(json!({"second": 7})).contains("`second`: "));
    }
}

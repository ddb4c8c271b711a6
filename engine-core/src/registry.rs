//! Backends by name.

use crate::{Backend, CheckpointEngine, EngineContext, Error, ErrorKind, Result};

/// The backends that a program knows. `naive` is always among them.
///
/// There is no registration before `main`: a program lists what it has, and adds what it likes.
///
/// # Examples
///
/// ```
/// use engine_core::{CheckpointEngineConfig, EngineContext, Registry, Role};
///
/// let registry = Registry::new();
/// let config = CheckpointEngineConfig { backend: "naive".into(), ..Default::default() };
/// let engine = registry.create(EngineContext::new(config, Role::Trainer))?;
/// # Ok::<(), engine_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Registry {
    backends: Vec<&'static dyn Backend>,
    layers: Vec<Layer>,
}

/// Something between a program and an engine, which knows nothing of it: it changes what is sent, or what
/// is received, as its keys of the configuration say.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// Its name, for errors and lists.
    pub name: &'static str,
    /// The keys of the configuration that it understands, beside those of
    /// [`CheckpointEngineConfig`](crate::CheckpointEngineConfig) itself.
    pub keys: &'static [&'static str],
    /// Puts it in front of an engine.
    pub put: PutLayer,
}

/// Puts a layer in front of an engine, as the context's configuration says.
pub type PutLayer =
    fn(Box<dyn CheckpointEngine>, &EngineContext) -> Result<Box<dyn CheckpointEngine>>;

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// A registry of `naive` alone.
    pub fn new() -> Self {
        Self { backends: vec![crate::naive::BACKEND], layers: Vec::new() }
    }

    /// Adds a backend; one of the same name is replaced.
    #[must_use]
    pub fn with(mut self, backend: &'static dyn Backend) -> Self {
        self.backends.retain(|other| other.name() != backend.name());
        self.backends.push(backend);
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

    /// All backends.
    pub fn backends(&self) -> impl Iterator<Item = &'static dyn Backend> + '_ {
        self.backends.iter().copied()
    }

    /// A backend by its name.
    ///
    /// # Errors
    ///
    /// `Backend`, listing the names that there are.
    pub fn get(&self, name: &str) -> Result<&'static dyn Backend> {
        self.backends().find(|backend| backend.name() == name).ok_or_else(|| {
            let known: Vec<&str> = self.backends().map(Backend::name).collect();
            let message = format!("there is no backend `{name}`; known: {}", known.join(", "));
            Error::new(ErrorKind::Backend, "choosing a backend", message)
        })
    }

    /// Makes the engine that a configuration names.
    ///
    /// # Errors
    ///
    /// Those of [`validate`](crate::CheckpointEngineConfig::validate), of [`get`](Self::get), of
    /// [`Backend::create`] and of the layers; `Config` if the configuration
    /// asks for something that no layer understands, or for a device that the backend does not know.
    pub fn create(&self, context: EngineContext) -> Result<Box<dyn CheckpointEngine>> {
        let refuse = |message: String| Error::new(ErrorKind::Config, "making an engine", message);
        context.config.validate()?;
        let backend = self.get(&context.config.backend)?;
        let device = &context.config.device;
        if !device.is_cpu() && !backend.devices().has(device.kind()) {
            let (name, devices) = (backend.name(), backend.devices());
            return Err(refuse(format!("device: `{device}`: {name} has buckets on {devices}")));
        }
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
        let engine = backend.create(context.clone())?;
        self.layers.iter().try_fold(engine, |engine, layer| (layer.put)(engine, &context))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{Availability, CheckpointEngineConfig, Devices, Placement, Role, WorkerMetadata};

    #[test]
    fn an_unknown_backend_is_an_error_that_lists_the_known_ones() {
        let error = Registry::new().get("nccl").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Backend);
        assert!(error.to_string().contains("known: naive"), "{error}");
    }

    #[derive(Debug)]
    struct OnAbacuses;

    impl Backend for OnAbacuses {
        fn name(&self) -> &'static str {
            "abacuses"
        }

        fn summary(&self) -> &'static str {
            "a backend with buckets on abacuses"
        }

        fn devices(&self) -> Devices {
            Devices::Kinds(&["abacus"])
        }

        fn probe(&self) -> Availability {
            Availability::Usable { details: "always".into() }
        }

        fn create(&self, context: EngineContext) -> Result<Box<dyn CheckpointEngine>> {
            crate::naive::BACKEND.create(context)
        }

        fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
            crate::naive::BACKEND.build_topology(workers)
        }
    }

    fn create(backend: &str, device: &str) -> Result<Box<dyn CheckpointEngine>> {
        let (backend, device) = (backend.into(), device.parse().unwrap());
        let config = CheckpointEngineConfig { backend, device, ..Default::default() };
        let registry = Registry::new().with(&OnAbacuses);
        registry.create(EngineContext::new(config, Role::Trainer))
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

    #[test]
    fn a_backend_without_buckets_takes_any_device() {
        create("naive", "quipu:1").unwrap();
    }

    fn config_with(layers: serde_json::Value) -> EngineContext {
        let layers = layers.as_object().cloned().unwrap();
        let config = CheckpointEngineConfig { layers, ..Default::default() };
        EngineContext::new(config, Role::Trainer)
    }

    #[test]
    fn asking_for_quantisation_where_there_is_none_is_an_error() {
        for (key, asks) in [("quantize", json!(true)), ("how", json!({"mode": 1})), ("n", json!(0))]
        {
            let error = Registry::new().create(config_with(json!({ key: asks }))).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(
                error
                    .to_string()
                    .contains(&format!("understands the key `{key}`: it has no layers")),
                "{error}"
            );
        }
        for nothing in [json!({}), json!({"quantize": false}), json!({"how": {}, "n": null})] {
            Registry::new().create(config_with(nothing)).unwrap();
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
            put: |engine, context| match context.config.layers.contains_key("first") {
                true => Err(wants("first", context).unwrap_err()),
                false => Ok(engine),
            },
        };
        let second = Layer {
            name: "second",
            keys: &["second"],
            put: |_, context| Err(wants("second", context).unwrap_err()),
        };
        let registry = Registry::new().with_layer(first).with_layer(second);
        let message =
            |layers| registry.create(config_with(layers)).unwrap_err().report().message.clone();
        assert_eq!(message(json!({"first": [1], "second": true})), "first: [1] false");
        assert_eq!(message(json!({"second": true})), "second: [] true");
        assert!(message(json!({"third": 1})).contains("its layers know `first`, `second`"));
        assert!(message(json!({"second": 7})).contains("`second`: "));
    }
}

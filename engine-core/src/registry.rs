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
    quantizer: Option<QuantizerLayer>,
}

/// Puts quantisation in front of an engine, as the context's configuration says.
pub type QuantizerLayer =
    fn(Box<dyn CheckpointEngine>, &EngineContext) -> Result<Box<dyn CheckpointEngine>>;

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// A registry of `naive` alone.
    pub fn new() -> Self {
        Self { backends: vec![crate::naive::BACKEND], quantizer: None }
    }

    /// Adds a backend; one of the same name is replaced.
    #[must_use]
    pub fn with(mut self, backend: &'static dyn Backend) -> Self {
        self.backends.retain(|other| other.name() != backend.name());
        self.backends.push(backend);
        self
    }

    /// Adds quantisation, for every backend.
    #[must_use]
    pub fn with_quantizer(mut self, layer: QuantizerLayer) -> Self {
        self.quantizer = Some(layer);
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
    /// Those of [`get`](Self::get) and of [`Backend::create`]; `Config` if the configuration asks
    /// for quantisation and there is none, or not of this kind, or for a device that the backend does
    /// not know.
    pub fn create(&self, context: EngineContext) -> Result<Box<dyn CheckpointEngine>> {
        let backend = self.get(&context.config.backend)?;
        let config = &context.config;
        let (device, devices) = (&config.device, backend.devices());
        if !device.is_cpu() && !devices.contains(&device.kind()) {
            let message = format!(
                "device: `{device}`: {} has buckets on these here: {}",
                backend.name(),
                [&["cpu"], devices].concat().join(", ")
            );
            return Err(Error::new(ErrorKind::Config, "making an engine", message));
        }
        let Some(layer) = self.quantizer else {
            if config.trainer_quantize_fp8 || !config.quantization.is_empty() {
                let message = "it asks for quantisation, and this program was built without it";
                return Err(Error::new(ErrorKind::Config, "making an engine", message));
            }
            return backend.create(context);
        };
        layer(backend.create(context.clone())?, &context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_backend_is_an_error_that_lists_the_known_ones() {
        let error = Registry::new().get("nccl").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Backend);
        assert!(error.to_string().contains("known: naive"), "{error}");
    }

    #[test]
    fn a_device_that_the_backend_does_not_know_is_an_error_that_lists_those_it_does() {
        let device = "abacus:1".parse().unwrap();
        let config = crate::CheckpointEngineConfig { device, ..Default::default() };
        let context = EngineContext::new(config, crate::Role::Trainer);
        let error = Registry::new().create(context).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("`abacus:1`: naive has buckets on"), "{error}");
    }

    #[test]
    fn asking_for_quantisation_where_there_is_none_is_an_error() {
        let config =
            crate::CheckpointEngineConfig { trainer_quantize_fp8: true, ..Default::default() };
        let context = EngineContext::new(config, crate::Role::Trainer);
        assert_eq!(Registry::new().create(context).unwrap_err().kind(), ErrorKind::Config);
    }
}

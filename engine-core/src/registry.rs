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
pub struct Registry(Vec<&'static dyn Backend>);

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// A registry of `naive` alone.
    pub fn new() -> Self {
        Self(vec![crate::naive::BACKEND])
    }

    /// Adds a backend; one of the same name is replaced.
    #[must_use]
    pub fn with(mut self, backend: &'static dyn Backend) -> Self {
        self.0.retain(|other| other.name() != backend.name());
        self.0.push(backend);
        self
    }

    /// All backends.
    pub fn backends(&self) -> impl Iterator<Item = &'static dyn Backend> + '_ {
        self.0.iter().copied()
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
    /// Those of [`get`](Self::get) and of [`Backend::create`].
    pub fn create(&self, context: EngineContext) -> Result<Box<dyn CheckpointEngine>> {
        self.get(&context.config.backend)?.create(context)
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
}

//! Reads an engine's configuration from TOML, JSON or YAML.
//!
//! The keys are those of verl's `checkpoint_engine` section, so that a section moves over as it is,
//! and a few of this engine's own: the fields of [`CheckpointEngineConfig`]. A text is either the bare
//! section or a document that has the section where verl has it: under `checkpoint_engine`,
//! `rollout.checkpoint_engine` or `actor_rollout_ref.rollout.checkpoint_engine`. The rest of such a document is not
//! read. Within the section nothing is ignored: an unknown key and a value
//! out of range are errors, which say the line. `null` stands for the default.
//!
//! Two keys of verl are accepted without effect: `_target_` names a Python class for Hydra, and
//! `custom_backend_module` may be null or empty; with a value it is refused, because a program registers its
//! own backends in Rust.
//!
//! # Examples
//!
//! ```
//! use engine_config::Format;
//!
//! let text = "
//! checkpoint_engine:
//!   backend: ipc
//!   update_weights_bucket_megabytes: 512
//! ";
//! let config = engine_config::parse(text, Format::Yaml)?;
//! assert_eq!(config.backend, "ipc");
//! assert_eq!(config.bucket_bytes(), Some(512 << 20));
//!
//! let error = engine_config::parse("bakend = 'ipc'", Format::Toml).unwrap_err();
//! assert!(error.to_string().contains("line 1: unknown key `bakend`; known keys: `backend`, "));
//! # Ok::<(), engine_core::Error>(())
//! ```

#![forbid(unsafe_code)]

mod document;
mod section;
mod text;

use std::path::Path;

use engine_core::{CheckpointEngineConfig, Error, ErrorKind, Result};

const READING: &str = "reading the configuration";

/// The format of a configuration's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// TOML 1.
    Toml,
    /// JSON.
    Json,
    /// YAML 1.2, one document.
    Yaml,
}

impl Format {
    /// The format that a file's extension stands for.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for any other than `toml`, `json`, `yaml` and `yml`, in any case.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        match extension.to_str() {
            Some("toml") => Ok(Self::Toml),
            Some("json") => Ok(Self::Json),
            Some("yaml" | "yml") => Ok(Self::Yaml),
            _ => Err(config_error(format!(
                "{}: the extension has to be one of `toml`, `json`, `yaml`, `yml`",
                path.display()
            ))),
        }
    }
}

/// Reads a file; its extension (`toml`, `json`, `yaml`, `yml`) says how.
///
/// # Errors
///
/// [`ErrorKind::Io`] if the file cannot be read, otherwise as [`parse`], with the file's name before
/// the line.
pub fn load(path: impl AsRef<Path>) -> Result<CheckpointEngineConfig> {
    let path = path.as_ref();
    let format = Format::from_path(path)?;
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io(format!("{READING} {}", path.display()), error))?;
    document::read(&text, format).map_err(|problem| {
        let line = problem.line.map(|line| format!(":{line}")).unwrap_or_default();
        config_error(format!("{}{line}: {}", path.display(), problem.message))
    })
}

/// Reads a text.
///
/// # Errors
///
/// [`ErrorKind::Config`] with the line: a text that is not of this format; an unknown key (the
/// message lists the known ones), a key that is there twice, a value of a wrong type or out of
/// range (the message names the key and what it takes); more than one `checkpoint_engine`
/// section.
pub fn parse(text: &str, format: Format) -> Result<CheckpointEngineConfig> {
    document::read(text, format).map_err(|problem| {
        let line = problem.line.map(|line| format!("line {line}: ")).unwrap_or_default();
        config_error(format!("{line}{}", problem.message))
    })
}

fn config_error(message: String) -> Error {
    Error::new(ErrorKind::Config, READING, message)
}

//! The configuration of an engine, in the words of verl's `checkpoint_engine` section.

mod document;
mod kwargs;
mod section;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, ErrorKind, Result};

const READING: &str = "reading the configuration";

/// The longest wait that can be configured, about thirty years: a larger number of seconds is a
/// slip, and would overflow the clock.
const MAX_TIMEOUT_SECONDS: f64 = 1e9;

/// Which backend moves the weights, and how.
///
/// The keys are those of verl's `checkpoint_engine` section, so that a section moves over as it is,
/// and a few of this engine's own. Every key is optional, and a `null` stands for the default.
///
/// It is read from TOML, JSON or YAML, either as the bare section or as a document that has the
/// section where verl has it: under `checkpoint_engine`, `rollout.checkpoint_engine` or
/// `actor_rollout_ref.rollout.checkpoint_engine`. What else such a document says is not looked at.
/// Within the section nothing is ignored: an unknown key and a value out of range are errors.
///
/// Two keys of verl are understood without having a field here. `custom_backend_module` may be null
/// or empty; with a value it is refused, because a program registers its own backends in Rust.
/// `_target_` names a Python class for Hydra and says nothing to a Rust program.
///
/// # Examples
///
/// ```
/// use engine_core::{CheckpointEngineConfig, ConfigFormat};
///
/// let text = "
/// checkpoint_engine:
///   backend: ipc
///   update_weights_bucket_megabytes: 512
/// ";
/// let config = CheckpointEngineConfig::from_text(text, ConfigFormat::Yaml)?;
/// assert_eq!(config.backend, "ipc");
/// assert_eq!(config.bucket_bytes(), Some(512 << 20));
///
/// let error = CheckpointEngineConfig::from_text("bakend = 'ipc'", ConfigFormat::Toml).unwrap_err();
/// assert!(error.to_string().contains("line 1: unknown key `bakend`; known keys: `backend`, "));
/// # Ok::<(), engine_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CheckpointEngineConfig {
    /// The backend's name: `naive` unless set.
    pub backend: String,
    /// The size of a bucket in MiB, at least 1; each backend has a default of its own.
    pub update_weights_bucket_megabytes: Option<u32>,
    /// Options of single backends, by the backend's name; [`kwargs`](Self::kwargs) gives them types.
    pub engine_kwargs: BTreeMap<String, serde_json::Map<String, serde_json::Value>>,
    /// Whether the trainer quantises to FP8 what it sends.
    pub trainer_quantize_fp8: bool,
    /// How to quantise; the crate that does it knows the keys.
    pub quantization: serde_json::Map<String, serde_json::Value>,
    /// The deadline of every wait, in seconds: 60 unless set.
    pub timeout_seconds: f64,
    /// Whether buckets carry digests that receivers verify: yes unless set.
    pub digests: bool,
    /// The device whose memory the rank's buckets are in: the host's unless set. Weights may be anywhere.
    pub device: DeviceChoice,
    /// How many threads copy, encode and verify; [`EngineContext::threads`](crate::EngineContext::threads)
    /// says how many unless set.
    pub threads: Option<NonZeroUsize>,
    /// How many updates may have begun since the version of a rollout's cache before it is refused; any
    /// number unless set. See [`CachedEngine`](crate::CachedEngine).
    pub max_staleness: Option<u64>,
}

impl Default for CheckpointEngineConfig {
    fn default() -> Self {
        Self {
            backend: "naive".to_owned(),
            update_weights_bucket_megabytes: None,
            engine_kwargs: BTreeMap::new(),
            trainer_quantize_fp8: false,
            quantization: serde_json::Map::new(),
            timeout_seconds: 60.0,
            digests: true,
            device: DeviceChoice::default(),
            threads: None,
            max_staleness: None,
        }
    }
}

impl CheckpointEngineConfig {
    /// Reads a file; its extension (`toml`, `json`, `yaml`, `yml`) says how.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if the file cannot be read, otherwise as [`from_text`](Self::from_text),
    /// with the file's name before the line.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let format = ConfigFormat::from_path(path)?;
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
    pub fn from_text(text: &str, format: ConfigFormat) -> Result<Self> {
        document::read(text, format).map_err(|problem| {
            let line = problem.line.map(|line| format!("line {line}: ")).unwrap_or_default();
            config_error(format!("{line}{}", problem.message))
        })
    }

    /// Checks the ranges that the fields' types do not express.
    ///
    /// Reading checks them already; this is for a configuration that a program filled in.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`], naming the key.
    pub fn validate(&self) -> Result<()> {
        let problem = if self.backend.is_empty() {
            section::BACKEND
        } else if self.update_weights_bucket_megabytes == Some(0) {
            section::BUCKET
        } else if !valid_timeout(self.timeout_seconds) {
            section::TIMEOUT
        } else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Config,
            "checking the configuration",
            format!("expected {problem}"),
        ))
    }

    /// The options of one backend, from its section of `engine_kwargs`; the defaults if it has none.
    ///
    /// A key that is not a field of `T` is an error whether or not `T` says
    /// `deny_unknown_fields`; structs nested within `T` have to say so themselves.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`], naming the key; for an unknown one the message lists the known ones.
    ///
    /// # Examples
    ///
    /// ```
    /// use engine_core::{CheckpointEngineConfig, ConfigFormat};
    ///
    /// #[derive(Default, serde::Deserialize)]
    /// #[serde(default)]
    /// struct Options {
    ///     huge_pages: bool,
    /// }
    ///
    /// let text = r#"{"engine_kwargs": {"ipc": {"huge_pages": true}}}"#;
    /// let config = CheckpointEngineConfig::from_text(text, ConfigFormat::Json)?;
    /// assert!(config.kwargs::<Options>("ipc")?.huge_pages);
    /// assert!(!config.kwargs::<Options>("nccl")?.huge_pages);
    /// # Ok::<(), engine_core::Error>(())
    /// ```
    pub fn kwargs<T: DeserializeOwned + Default>(&self, backend: &str) -> Result<T> {
        let Some(section) = self.engine_kwargs.get(backend) else { return Ok(T::default()) };
        kwargs::typed(section).map_err(|error| {
            Error::new(
                ErrorKind::Config,
                "reading a backend's options",
                format!("`engine_kwargs.{backend}`: {error}"),
            )
        })
    }

    /// The deadline of every wait.
    ///
    /// A value that [`validate`](Self::validate) refuses gives the default deadline.
    pub fn timeout(&self) -> Duration {
        let seconds = if valid_timeout(self.timeout_seconds) {
            self.timeout_seconds
        } else {
            Self::default().timeout_seconds
        };
        Duration::from_secs_f64(seconds)
    }

    /// The size of a bucket in bytes, if one is set.
    pub fn bucket_bytes(&self) -> Option<u64> {
        self.update_weights_bucket_megabytes.map(|megabytes| u64::from(megabytes) << 20)
    }
}

/// A kind of device, and which one of it: `cpu`, `cuda`, `cuda:1`.
///
/// What kinds there are, backends say ([`Backend::devices`](crate::Backend::devices)).
///
/// # Examples
///
/// ```
/// use engine_core::DeviceChoice;
///
/// let device: DeviceChoice = "cuda:1".parse()?;
/// assert_eq!((device.kind(), device.ordinal()), ("cuda", Some(1)));
/// assert!("cuda:-1".parse::<DeviceChoice>().is_err());
/// assert!(DeviceChoice::default().is_cpu());
/// # Ok::<(), engine_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
pub struct DeviceChoice {
    kind: String,
    ordinal: Option<u32>,
}

impl Default for DeviceChoice {
    fn default() -> Self {
        Self { kind: "cpu".into(), ordinal: None }
    }
}

impl DeviceChoice {
    /// A device of a kind by its number.
    pub fn new(kind: impl Into<String>, ordinal: u32) -> Self {
        Self { kind: kind.into(), ordinal: Some(ordinal) }
    }

    /// What kind of device: `cpu`, `cuda`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Which one, if that was said.
    pub fn ordinal(&self) -> Option<u32> {
        self.ordinal
    }

    /// Whether it is the host itself.
    pub fn is_cpu(&self) -> bool {
        self.kind == "cpu"
    }
}

impl std::str::FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, ordinal) = match text.split_once(':') {
            None => (text, None),
            Some((kind, ordinal)) => (kind, Some(ordinal.parse())),
        };
        let named = !kind.is_empty() && kind.bytes().all(|byte| byte.is_ascii_lowercase());
        match ordinal.transpose() {
            Ok(ordinal) if named && (kind != "cpu" || ordinal.is_none()) => {
                Ok(Self { kind: kind.into(), ordinal })
            }
            _ => Err(config_error(format!("expected {}, found `{text}`", section::DEVICE))),
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.ordinal {
            None => f.write_str(&self.kind),
            Some(ordinal) => write!(f, "{}:{ordinal}", self.kind),
        }
    }
}

impl Serialize for DeviceChoice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The format of a configuration's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConfigFormat {
    /// TOML 1.
    Toml,
    /// JSON.
    Json,
    /// YAML 1.2, one document.
    Yaml,
}

impl ConfigFormat {
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

/// Written so that NaN is not valid either.
fn valid_timeout(seconds: f64) -> bool {
    seconds > 0.0 && seconds <= MAX_TIMEOUT_SECONDS
}

fn config_error(message: String) -> Error {
    Error::new(ErrorKind::Config, READING, message)
}

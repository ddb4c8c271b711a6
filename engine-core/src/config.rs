//! The configuration of an engine, in the words of verl's `checkpoint_engine` section.

mod kwargs;
mod section;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, ErrorKind, Result};

/// The longest wait that can be configured, about thirty years: a larger number of seconds is a
/// slip, and would overflow the clock.
const MAX_TIMEOUT_SECONDS: f64 = 1e9;

/// Which backend moves the weights, and how.
///
/// The keys are those of verl's `checkpoint_engine` section, so that a section moves over as it is,
/// and a few of this engine's own. Every key is optional, and a `null` stands for the default.
///
/// A program fills the fields in, or deserialises a section with any of serde's formats; the crate
/// `engine-config` reads files of TOML, JSON and YAML, also verl's whole documents. Nothing is ignored:
/// an unknown key and a value out of range are errors.
///
/// Two keys of verl are understood without having a field here. `custom_backend_module` may be null
/// or empty; with a value it is refused, because a program registers its own backends in Rust.
/// `_target_` names a Python class for Hydra and says nothing to a Rust program.
///
/// # Examples
///
/// ```
/// use engine_core::CheckpointEngineConfig;
///
/// let text = r#"{"backend": "ipc", "update_weights_bucket_megabytes": 512}"#;
/// let config: CheckpointEngineConfig = serde_json::from_str(text)?;
/// assert_eq!(config.backend, "ipc");
/// assert_eq!(config.bucket_bytes(), Some(512 << 20));
///
/// let error = serde_json::from_str::<CheckpointEngineConfig>(r#"{"bakend": "ipc"}"#).unwrap_err();
/// assert!(error.to_string().contains("unknown key `bakend`; known keys: `backend`, "));
/// # Ok::<(), serde_json::Error>(())
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
    /// use engine_core::CheckpointEngineConfig;
    ///
    /// #[derive(Default, serde::Deserialize)]
    /// #[serde(default)]
    /// struct Options {
    ///     huge_pages: bool,
    /// }
    ///
    /// let text = r#"{"engine_kwargs": {"ipc": {"huge_pages": true}}}"#;
    /// let config: CheckpointEngineConfig = serde_json::from_str(text)?;
    /// assert!(config.kwargs::<Options>("ipc")?.huge_pages);
    /// assert!(!config.kwargs::<Options>("nccl")?.huge_pages);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
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
            _ => Err(Error::new(
                ErrorKind::Config,
                "reading the name of a device",
                format!("expected {}, found `{text}`", section::DEVICE),
            )),
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

/// Written so that NaN is not valid either.
fn valid_timeout(seconds: f64) -> bool {
    seconds > 0.0 && seconds <= MAX_TIMEOUT_SECONDS
}

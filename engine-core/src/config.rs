//! The configuration of an engine, in the words of verl's `checkpoint_engine` section.

mod kwargs;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::Duration;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::{Error, ErrorKind, NamePattern, Parts, Result};

/// Which backend moves the weights, and how.
///
/// The keys are those of verl's `checkpoint_engine` section, so that a section moves over as it is,
/// and a few of this engine's own. Every key is optional, and a `null` stands for the default.
///
/// A program fills the fields in; the crate `engine-config` reads them from TOML, JSON and YAML, also from
/// verl's whole documents, and refuses unknown keys and values out of range with their line. A configuration that
/// serde alone has read is checked by [`validate`](Self::validate) and
/// [`Registry::prepare_trainer`](crate::Registry::prepare_trainer). No key that asks for something is ignored.
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
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct CheckpointEngineConfig {
    /// The backend's name: `naive` unless set.
    pub backend: String,
    /// The size of a bucket in MiB, at least 1; each backend has a default of its own.
    pub update_weights_bucket_megabytes: Option<u32>,
    /// Options of single backends, by the backend's name; [`kwargs`](Self::kwargs) gives them types.
    pub engine_kwargs: BTreeMap<String, Map<String, Value>>,
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
    /// number unless set. The cache of a rollout obeys it.
    pub max_staleness: Option<u64>,
    /// The named parts of a version, each with a list of patterns of its weights' names: `mtp.*` or `*.lora_*`, where `*` stands for
    /// any text. All other weights are the part `policy`. The trainer's decide what rollouts may want.
    pub parts: BTreeMap<String, Vec<NamePattern>>,
    /// The parts that a rollout wants, by their names: all unless set. It gets the bytes of these alone. A trainer does not read
    /// this key.
    pub wants: Option<Vec<String>>,
    /// All other keys: those of the layers in front of the engine. [`Layer::keys`](crate::Layer) are the ones
    /// that a layer knows, and [`layer`](Self::layer) gives them types.
    #[serde(flatten)]
    pub layers: Map<String, Value>,
}

impl Default for CheckpointEngineConfig {
    fn default() -> Self {
        Self {
            backend: "naive".to_owned(),
            update_weights_bucket_megabytes: None,
            engine_kwargs: BTreeMap::new(),
            timeout_seconds: 60.0,
            digests: true,
            device: DeviceChoice::default(),
            threads: None,
            max_staleness: None,
            parts: BTreeMap::new(),
            wants: None,
            layers: Map::new(),
        }
    }
}

impl CheckpointEngineConfig {
    /// The defaults, with a backend. A program sets the other fields that it needs.
    pub fn new(backend: impl Into<String>) -> Self {
        Self { backend: backend.into(), ..Self::default() }
    }

    /// The longest wait that can be configured, about thirty years. A larger number of seconds is a mistake, and
    /// would overflow the clock.
    pub const MAX_TIMEOUT_SECONDS: f64 = 1e9;

    /// Checks the ranges that the fields' types do not express.
    ///
    /// The crate that reads texts checks them already; this is for a configuration that a program filled in.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`], naming the key.
    pub fn validate(&self) -> Result<()> {
        let problem = if self.backend.is_empty() {
            "`backend` to be the name of a backend"
        } else if self.update_weights_bucket_megabytes == Some(0) {
            "`update_weights_bucket_megabytes` to be at least 1"
        } else if !valid_timeout(self.timeout_seconds) {
            "`timeout_seconds` to be a number above 0 and of at most 1000000000"
        } else if self.wants.as_ref().is_some_and(Vec::is_empty) {
            "`wants` to name at least one part"
        } else {
            return Parts::of(self).map(drop);
        };
        Err(Error::new(
            ErrorKind::Config,
            "checking the configuration",
            format!("expected {problem}"),
        ))
    }

    /// What a layer is asked for: its keys, with their types; the defaults where they are not there or null.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`], naming the key.
    pub fn layer<T: DeserializeOwned>(&self, keys: &[&str]) -> Result<T> {
        let given =
            self.layers.iter().filter(|(key, value)| keys.contains(&&***key) && !value.is_null());
        let given: Map<String, Value> =
            given.map(|(key, value)| (key.clone(), value.clone())).collect();
        kwargs::typed(&given).map_err(|error| {
            Error::new(ErrorKind::Config, "reading the configuration", error.to_string())
        })
    }

    /// The first key that asks for something and is not among the known ones.
    pub(crate) fn not_understood(&self, known: &[&str]) -> Option<&str> {
        let asks = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Object(table) => !table.is_empty(),
            _ => true,
        };
        let mut keys = self.layers.iter().filter(|(_, value)| asks(value)).map(|(key, _)| &**key);
        keys.find(|key| !known.contains(key))
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

/// A kind of device, by the name that its backends have for it, and which one of it: `cpu`, `gpu`, `gpu:1`.
///
/// Backends say which kinds there are ([`Backend::devices`](crate::Backend::devices)).
///
/// # Examples
///
/// ```
/// use engine_core::DeviceChoice;
///
/// let device: DeviceChoice = "gpu:1".parse()?;
/// assert_eq!((device.kind(), device.ordinal()), ("gpu", Some(1)));
/// assert!("gpu:-1".parse::<DeviceChoice>().is_err());
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
    /// What a name of a device looks like, in words.
    const EXPECTED: &str = "`cpu`, or a kind of device in lower case, and its number after a colon";

    /// A device of a kind by its number.
    pub fn new(kind: impl Into<String>, ordinal: u32) -> Self {
        Self { kind: kind.into(), ordinal: Some(ordinal) }
    }

    /// What kind of device: `cpu`, or a name of backends.
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
                format!("expected {}, found `{text}`", Self::EXPECTED),
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

impl<'de> Deserialize<'de> for DeviceChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error: Error| D::Error::custom(&error.report().message))
    }
}

/// Written so that NaN is not valid either.
fn valid_timeout(seconds: f64) -> bool {
    seconds > 0.0 && seconds <= CheckpointEngineConfig::MAX_TIMEOUT_SECONDS
}

//! The keys of the section, those of layers among them, and what each of them takes.
//!
//! Written by hand rather than derived: each check runs inside the visitor that is handed the value,
//! because that is where a format's parser still knows the line, and each message names its key.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Unexpected, Visitor,
};
use serde_json::{Map, Value};

use engine_core::{CheckpointEngineConfig, NamePattern};

const BACKEND: &str = "`backend` to be the name of a backend";
const BUCKET: &str =
    "`update_weights_bucket_megabytes` to be a whole number of at least 1 and below 2^32";
const DEVICE: &str = "`device` to be `cpu`, or a kind of device and a number: `cuda:0`";
const TIMEOUT: &str = "`timeout_seconds` to be a number above 0 and of at most 1000000000";

/// The keys to offer when an unknown one was given.
const KNOWN: [&str; 14] = [
    "backend",
    "update_weights_bucket_megabytes",
    "engine_kwargs",
    "trainer_quantize_fp8",
    "quantization",
    "delta",
    "delta_on_host",
    "parts",
    "wants",
    "timeout_seconds",
    "digests",
    "device",
    "threads",
    "max_staleness",
];

/// Those of them that layers in front of the engine have, with what they take.
const OF_LAYERS: [(&str, Takes); 4] = [
    ("trainer_quantize_fp8", Takes::Flag),
    ("quantization", Takes::Table),
    ("delta", Takes::Flag),
    ("delta_on_host", Takes::Flag),
];

/// What a layer's key takes.
#[derive(Clone, Copy)]
enum Takes {
    Flag,
    Table,
}

/// Keys of verl that stand for nothing here.
///
/// `custom_backend_module` may be null or empty; with a value it is refused, because a program registers its own
/// backends in Rust. `_target_` names a Python class for Hydra.
const UNDERSTOOD: [&str; 2] = ["custom_backend_module", "_target_"];

/// Reads the section.
pub(crate) struct Section;

impl<'de> DeserializeSeed<'de> for Section {
    type Value = CheckpointEngineConfig;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Section {
    type Value = CheckpointEngineConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a checkpoint engine's section: a table of keys and values")
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(CheckpointEngineConfig::default())
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(CheckpointEngineConfig::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut config = CheckpointEngineConfig::default();
        let seen = RefCell::new(Vec::new());
        while let Some(key) = map.next_key_seed(Key(&seen))? {
            match key {
                "backend" => scalar(&mut map, BACKEND, &mut config.backend, |found| match found {
                    Found::Text(name) if !name.is_empty() => Some(name.to_owned()),
                    _ => None,
                })?,
                "update_weights_bucket_megabytes" => {
                    let field = &mut config.update_weights_bucket_megabytes;
                    scalar(&mut map, BUCKET, field, |found| match found {
                        Found::Integer(megabytes @ 1..) => megabytes.try_into().ok().map(Some),
                        _ => None,
                    })?;
                }
                "engine_kwargs" => {
                    config.engine_kwargs = map.next_value_seed(Tables)?;
                }
                "parts" => config.parts = map.next_value_seed(Parts)?,
                "wants" => {
                    config.wants = map.next_value_seed(Names("`wants` to be a list of parts"))?;
                }
                "timeout_seconds" => {
                    scalar(&mut map, TIMEOUT, &mut config.timeout_seconds, |found| {
                        let seconds = match found {
                            Found::Integer(seconds) => seconds as f64,
                            Found::Float(seconds) => seconds,
                            _ => return None,
                        };
                        let most = CheckpointEngineConfig::MAX_TIMEOUT_SECONDS;
                        (seconds > 0.0 && seconds <= most).then_some(seconds)
                    })?;
                }
                "digests" => {
                    scalar(&mut map, "`digests` to be true or false", &mut config.digests, flag)?;
                }
                "device" => {
                    scalar(&mut map, DEVICE, &mut config.device, |found| match found {
                        Found::Text(name) => name.parse().ok(),
                        _ => None,
                    })?;
                }
                "threads" => {
                    let expected = "`threads` to be a whole number of at least 1";
                    scalar(&mut map, expected, &mut config.threads, |found| match found {
                        Found::Integer(threads) => {
                            NonZeroUsize::new(threads.try_into().ok()?).map(Some)
                        }
                        _ => None,
                    })?;
                }
                "max_staleness" => {
                    let expected = "`max_staleness` to be a whole number of at least 0";
                    scalar(&mut map, expected, &mut config.max_staleness, |found| match found {
                        Found::Integer(versions) => versions.try_into().ok().map(Some),
                        _ => None,
                    })?;
                }
                "custom_backend_module" => {
                    let expected = "`custom_backend_module` to be null: it names a Python module, \
                        which this program cannot import. Backends of your own are registered by \
                        the program, in Rust, before it reads its configuration";
                    scalar(&mut map, expected, &mut (), |found| match found {
                        Found::Text("") => Some(()),
                        _ => None,
                    })?;
                }
                _ => match OF_LAYERS.iter().find(|(name, _)| *name == key) {
                    Some((_, Takes::Flag)) => {
                        let mut given = false;
                        let expected = format!("`{key}` to be true or false");
                        scalar(&mut map, &expected, &mut given, flag)?;
                        if given {
                            config.layers.insert(key.to_owned(), given.into());
                        }
                    }
                    Some((_, Takes::Table)) => {
                        let table = map.next_value_seed(Table(key))?;
                        if !table.is_empty() {
                            config.layers.insert(key.to_owned(), table.into());
                        }
                    }
                    None => {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    }
                },
            }
        }
        Ok(config)
    }
}

/// A key of the section: known, and not there before.
struct Key<'a>(&'a RefCell<Vec<&'static str>>);

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = &'static str;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<&'static str, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = &'static str;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<&'static str, E> {
        let mut keys = KNOWN.into_iter().chain(UNDERSTOOD);
        let Some(key) = keys.find(|key| *key == text) else {
            return Err(E::custom(format_args!(
                "unknown key `{text}`; known keys: `{}`",
                KNOWN.join("`, `")
            )));
        };
        let mut seen = self.0.borrow_mut();
        if seen.contains(&key) {
            return Err(E::custom(format_args!("the key `{key}` is there twice")));
        }
        seen.push(key);
        Ok(key)
    }
}

/// A value that is not a table or a list.
enum Found<'a> {
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(&'a str),
}

fn flag(found: Found<'_>) -> Option<bool> {
    match found {
        Found::Bool(flag) => Some(flag),
        _ => None,
    }
}

/// Reads the next value into a field, which keeps its default when the value is null.
fn scalar<'de, A: MapAccess<'de>, T>(
    map: &mut A,
    expected: &str,
    field: &mut T,
    check: impl FnOnce(Found<'_>) -> Option<T>,
) -> Result<(), A::Error> {
    if let Some(value) = map.next_value_seed(Scalar { expected, check })? {
        *field = value;
    }
    Ok(())
}

struct Scalar<'a, F> {
    expected: &'a str,
    check: F,
}

impl<'de, T, F: FnOnce(Found<'_>) -> Option<T>> DeserializeSeed<'de> for Scalar<'_, F> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<F> Scalar<'_, F> {
    fn take<T, E: serde::de::Error>(
        self,
        found: Found<'_>,
        unexpected: Unexpected<'_>,
    ) -> Result<Option<T>, E>
    where
        F: FnOnce(Found<'_>) -> Option<T>,
    {
        match (self.check)(found) {
            Some(value) => Ok(Some(value)),
            None => Err(E::invalid_value(unexpected, &self.expected)),
        }
    }
}

impl<T, F: FnOnce(Found<'_>) -> Option<T>> Visitor<'_> for Scalar<'_, F> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_unit<E>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Option<T>, E> {
        self.take(Found::Bool(value), Unexpected::Bool(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Option<T>, E> {
        self.take(Found::Integer(value.into()), Unexpected::Signed(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Option<T>, E> {
        self.take(Found::Integer(value.into()), Unexpected::Unsigned(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Option<T>, E> {
        // `Unexpected::Float` writes 1e300 with three hundred digits.
        let words = format!("floating point `{value:?}`");
        self.take(Found::Float(value), Unexpected::Other(&words))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Option<T>, E> {
        self.take(Found::Text(value), Unexpected::Str(value))
    }
}

/// `engine_kwargs`: a table of tables.
struct Tables;

impl<'de> DeserializeSeed<'de> for Tables {
    type Value = BTreeMap<String, Map<String, Value>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tables {
    type Value = BTreeMap<String, Map<String, Value>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`engine_kwargs` to be a table with one table of options for each backend")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(BTreeMap::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tables = BTreeMap::new();
        while let Some(backend) = map.next_key::<String>()? {
            let key = format!("engine_kwargs.{backend}");
            let table = map.next_value_seed(Table(&key))?;
            if tables.insert(backend, table).is_some() {
                return Err(A::Error::custom(format_args!("the key `{key}` is there twice")));
            }
        }
        Ok(tables)
    }
}

/// `parts`: a table of lists.
struct Parts;

impl<'de> DeserializeSeed<'de> for Parts {
    type Value = BTreeMap<String, Vec<NamePattern>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Parts {
    type Value = BTreeMap<String, Vec<NamePattern>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`parts` to be a table of lists of patterns")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(BTreeMap::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut parts = BTreeMap::new();
        while let Some(part) = map.next_key::<String>()? {
            let expected = format!("`parts.{part}` to be a list of patterns");
            let patterns = map.next_value_seed(Names(&expected))?.unwrap_or_default();
            let patterns = patterns.iter().map(|pattern| NamePattern::from(&**pattern)).collect();
            if parts.contains_key(&part) {
                return Err(A::Error::custom(format_args!(
                    "the key `parts.{part}` is there twice"
                )));
            }
            parts.insert(part, patterns);
        }
        Ok(parts)
    }
}

/// A list of names that is not empty, or null.
struct Names<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Names<'_> {
    type Value = Option<Vec<String>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Names<'_> {
    type Value = Option<Vec<String>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut names = Vec::new();
        while let Some(name) = list.next_element()? {
            names.push(name);
        }
        match names.is_empty() {
            true => Err(A::Error::invalid_length(0, &self)),
            false => Ok(Some(names)),
        }
    }
}

/// A table whose keys are not known here.
struct Table<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Table<'_> {
    type Value = Map<String, Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Table<'_> {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` to be a table of options", self.0)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Map::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut table = Map::new();
        while let Some((key, value)) = map.next_entry::<String, Value>()? {
            if table.contains_key(&key) {
                let path = self.0;
                return Err(A::Error::custom(format_args!(
                    "the key `{path}.{key}` is there twice"
                )));
            }
            table.insert(key, value);
        }
        Ok(table)
    }
}

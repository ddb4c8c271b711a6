//! Finds the section in a document, and turns three parsers' errors into one form.

use std::fmt;

use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::{CheckpointEngineConfig, ConfigFormat};

/// What is wrong with a text, and where.
pub(super) struct Problem {
    pub(super) line: Option<usize>,
    pub(super) message: String,
}

/// Reads twice: where the section lies decides whether a key beside it is an unknown key or none of
/// our business, and that has to be known when the key is met, while the parser can say the line.
pub(super) fn read(text: &str, format: ConfigFormat) -> Result<CheckpointEngineConfig, Problem> {
    if text.trim().is_empty() {
        return Ok(CheckpointEngineConfig::default());
    }
    let sections = run(text, format, Locate(Vec::new()))?;
    if let [_, _, ..] = sections.as_slice() {
        let names: Vec<String> = sections.iter().map(|path| path.join(".")).collect();
        let message = format!("more than one section: `{}`", names.join("` and `"));
        return Err(Problem { line: None, message });
    }
    let path = sections.into_iter().next().unwrap_or_default();
    run(text, format, Descend(&path))
}

fn run<T>(
    text: &str,
    format: ConfigFormat,
    seed: impl for<'de> DeserializeSeed<'de, Value = T>,
) -> Result<T, Problem> {
    match format {
        ConfigFormat::Toml => toml::Deserializer::parse(text)
            .and_then(|deserializer| seed.deserialize(deserializer))
            .map_err(|error| Problem {
                line: error.span().and_then(|span| line_at(text, span.start)),
                message: error.message().to_owned(),
            }),
        ConfigFormat::Json => {
            let mut deserializer = serde_json::Deserializer::from_str(text);
            seed.deserialize(&mut deserializer)
                .and_then(|value| deserializer.end().map(|()| value))
                .map_err(|error| {
                    let (line, column) = (error.line(), error.column());
                    Problem {
                        line: (line > 0).then_some(line),
                        message: without_place(error.to_string(), line, column),
                    }
                })
        }
        ConfigFormat::Yaml if is_too_deep(text) => Err(Problem {
            line: None,
            message: format!("more than {DEEPEST} brackets within one another"),
        }),
        ConfigFormat::Yaml => seed.deserialize(serde_norway::Deserializer::from_str(text)).map_err(
            |error| match error.location() {
                Some(place) => Problem {
                    line: Some(place.line()),
                    message: without_place(error.to_string(), place.line(), place.column()),
                },
                None => Problem { line: None, message: error.to_string() },
            },
        ),
    }
}

/// The most brackets within one another, as in JSON.
const DEEPEST: usize = 128;

/// Whether brackets are nested so deeply that the YAML parser, which looks at all open ones at each
/// character, would take minutes before it refuses them.
///
/// Brackets in texts count, too; those that no other closes are few there.
fn is_too_deep(text: &str) -> bool {
    let mut depth: usize = 0;
    text.bytes().any(|byte| {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > DEEPEST
    })
}

fn line_at(text: &str, offset: usize) -> Option<usize> {
    Some(text.get(..offset)?.matches('\n').count() + 1)
}

/// The line stands before the message already.
fn without_place(message: String, line: usize, column: usize) -> String {
    match message.strip_suffix(&format!(" at line {line} column {column}")) {
        Some(message) => message.to_owned(),
        None => message,
    }
}

/// The key of the section in verl's documents.
const SECTION: &str = "checkpoint_engine";

type SectionPath = Vec<&'static str>;

/// Finds the sections of a document; the path is the one down to here.
struct Locate(SectionPath);

impl Locate {
    fn below(&self, key: &'static str) -> SectionPath {
        let mut path = self.0.clone();
        path.push(key);
        path
    }
}

impl<'de> DeserializeSeed<'de> for Locate {
    type Value = Vec<SectionPath>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Locate {
    type Value = Vec<SectionPath>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of keys and values")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            match (self.0.as_slice(), key.as_str()) {
                (_, SECTION) => {
                    map.next_value::<IgnoredAny>()?;
                    found.push(self.below(SECTION));
                }
                ([], "actor_rollout_ref") => {
                    found.extend(map.next_value_seed(Self(self.below("actor_rollout_ref")))?);
                }
                ([] | ["actor_rollout_ref"], "rollout") => {
                    found.extend(map.next_value_seed(Self(self.below("rollout")))?);
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(found)
    }

    // Anything but a table has no section in it; `none` is what an empty YAML document is.

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Vec::new())
    }
}

/// Reads the section at the end of a path that is known to be there.
struct Descend<'a>(&'a [&'static str]);

impl<'de> DeserializeSeed<'de> for Descend<'_> {
    type Value = CheckpointEngineConfig;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.0.is_empty() {
            CheckpointEngineConfig::deserialize(deserializer)
        } else {
            deserializer.deserialize_map(self)
        }
    }
}

impl<'de> Visitor<'de> for Descend<'_> {
    type Value = CheckpointEngineConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of keys and values")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut config = None;
        while let Some(key) = map.next_key::<String>()? {
            match self.0.split_first() {
                Some((first, rest)) if *first == key => {
                    config = Some(map.next_value_seed(Descend(rest))?);
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        config.ok_or_else(|| A::Error::missing_field(SECTION))
    }
}

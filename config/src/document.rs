//! Finds the section in a document.

use std::fmt;

use engine_core::CheckpointEngineConfig;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use crate::Format;
use crate::section::Section;
use crate::text::{Problem, run};

/// Reads twice: where the section lies decides whether a key beside it is an unknown key or none of
/// our business, and that has to be known when the key is met, while the parser can say the line.
pub(crate) fn read(text: &str, format: Format) -> Result<CheckpointEngineConfig, Problem> {
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
            Section.deserialize(deserializer)
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

//! The named parts of a version.

use std::sync::Arc;

use crate::{BitSet, Error, ErrorKind, NamePattern, Result};

/// The part of all weights that no other one has.
const REST: &str = "policy";

/// Some of the parts of versions, by their numbers.
pub type PartSet = BitSet<u32>;

/// Which weight of a version belongs to which of its named parts, by its name.
///
/// The parts that a configuration names come in the order of their names, and `policy` last: all weights that no other part has. Clones
/// share it.
///
/// # Examples
///
/// ```
/// use engine_core::{CheckpointEngineConfig, Parts};
///
/// let config: CheckpointEngineConfig = serde_json::from_str(r#"{"parts": {"draft": ["mtp.*"]}}"#)?;
/// let parts = Parts::of(&config)?;
/// assert_eq!(parts.names().collect::<Vec<_>>(), ["draft", "policy"]);
/// assert_eq!((parts.part_of("mtp.fc.weight"), parts.part_of("lm_head.weight")), (0, 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Parts(Arc<[Part]>);

#[derive(Debug)]
struct Part {
    name: String,
    patterns: Vec<NamePattern>,
}

impl Default for Parts {
    /// Versions of one part, `policy`.
    fn default() -> Self {
        Self([Part { name: REST.to_owned(), patterns: Vec::new() }].into())
    }
}

impl Parts {
    /// The parts that a configuration names.
    ///
    /// # Errors
    ///
    /// `Config` for a part that has the name of the rest, or none, or no patterns.
    pub fn of(config: &crate::CheckpointEngineConfig) -> Result<Self> {
        for (name, patterns) in &config.parts {
            let message = match &**name {
                "" => "parts: a part without a name".to_owned(),
                REST => format!("parts: `{REST}` is all weights that no other part has"),
                _ if patterns.is_empty() => format!("parts: `{name}` has no patterns"),
                _ => continue,
            };
            return Err(Error::new(ErrorKind::Config, "preparing", message));
        }
        let part = |(name, patterns): (&String, &Vec<NamePattern>)| Part {
            name: name.clone(),
            patterns: patterns.clone(),
        };
        let rest = Part { name: REST.to_owned(), patterns: Vec::new() };
        Ok(Self(config.parts.iter().map(part).chain([rest]).collect()))
    }

    /// The parts' names, by their numbers.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|part| &*part.name)
    }

    /// The number of the part that a weight of this name belongs to.
    pub fn part_of(&self, weight: &str) -> u32 {
        let has = |part: &Part| part.patterns.iter().any(|pattern| pattern.matches(weight));
        self.0.iter().position(has).unwrap_or(self.0.len() - 1) as u32
    }

    /// All parts.
    pub fn all(&self) -> PartSet {
        (0..self.0.len() as u32).collect()
    }

    /// What a rank wants that names these parts; without names it wants all.
    ///
    /// # Errors
    ///
    /// `Mismatch` for a name that is none of a part.
    pub fn wanted(&self, names: Option<&[String]>) -> Result<PartSet> {
        let Some(names) = names else { return Ok(self.all()) };
        let number = |wanted: &String| {
            let at = self.names().position(|name| name == wanted);
            at.map(|at| at as u32).ok_or_else(|| {
                let known = self.names().collect::<Vec<_>>().join("`, `");
                let message = format!(
                    "wants: the trainer's versions have no part `{wanted}`; their parts are `{known}`"
                );
                Error::new(ErrorKind::Mismatch, "choosing parts of a version", message)
            })
        };
        names.iter().map(number).collect()
    }

    /// The names of these parts.
    pub fn named(&self, parts: &PartSet) -> Vec<String> {
        let names = self.names().enumerate().filter(|(at, _)| parts.contains(*at as u32));
        names.map(|(_, name)| name.to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CheckpointEngineConfig;

    fn parts() -> Parts {
        let mut config = CheckpointEngineConfig::default();
        config.parts.insert("draft".into(), vec!["mtp.*".into()]);
        config.parts.insert("adapter".into(), vec!["*.lora_*".into()]);
        Parts::of(&config).expect("parts")
    }

    #[test]
    fn a_rank_wants_the_parts_that_it_names_or_all() {
        let parts = parts();
        let named =
            |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let wanted = parts.wanted(Some(&named(&["policy", "adapter"]))).expect("parts");
        assert_eq!(parts.named(&wanted), ["adapter", "policy"]);
        assert_eq!(parts.wanted(None).expect("all"), parts.all());
        assert_eq!(
            parts.wanted(Some(&named(&["draft", "policy", "adapter"]))).expect("all"),
            parts.all()
        );
        let error = parts.wanted(Some(&named(&["policy", "critic"]))).expect_err("no such part");
        let words = error.to_string();
        assert!(
            words.contains("`critic`") && words.contains("adapter`, `draft`, `policy"),
            "{words}"
        );
    }
}

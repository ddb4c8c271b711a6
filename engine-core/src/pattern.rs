//! Which weights belong together, by their names.

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A pattern of names, in which `*` stands for any text, dots included: `mtp.*`, `*.lora_*`.
///
/// # Examples
///
/// ```
/// let adapter: engine_core::NamePattern = "*.lora_*".into();
/// assert!(adapter.matches("base_model.model.layers.0.q_proj.lora_A.weight"));
/// assert!(!adapter.matches("base_model.model.layers.0.q_proj.weight"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NamePattern(String);

impl NamePattern {
    /// Whether the whole name is what the pattern describes.
    pub fn matches(&self, name: &str) -> bool {
        let Some((first, rest)) = self.0.split_once('*') else { return self.0 == name };
        let Some(mut left) = name.strip_prefix(first) else { return false };
        // Of the texts between two stars, the first place in the name is as good as any later one.
        let mut between = rest.split('*');
        let last = between.next_back().unwrap_or_default();
        for text in between {
            let Some(at) = left.find(text) else { return false };
            left = &left[at + text.len()..];
        }
        left.ends_with(last)
    }
}

impl From<&str> for NamePattern {
    fn from(pattern: &str) -> Self {
        Self(pattern.to_owned())
    }
}

impl FromStr for NamePattern {
    type Err = Infallible;

    fn from_str(pattern: &str) -> Result<Self, Infallible> {
        Ok(pattern.into())
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same by trying every length for every star.
    fn slowly(pattern: &[u8], name: &[u8]) -> bool {
        match pattern.split_first() {
            None => name.is_empty(),
            Some((b'*', rest)) => (0..=name.len()).any(|skip| slowly(rest, &name[skip..])),
            Some((byte, rest)) => name.first() == Some(byte) && slowly(rest, &name[1..]),
        }
    }

    proptest! {
        #[test]
        fn a_pattern_matches_what_some_text_for_each_star_makes_of_it(
            pattern in "[ab*]{0,6}", name in "[ab]{0,8}",
        ) {
            let matches = NamePattern::from(&*pattern).matches(&name);
            prop_assert_eq!(matches, slowly(pattern.as_bytes(), name.as_bytes()));
        }
    }
}

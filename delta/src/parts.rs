//! The named parts of a version.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_core::{Error, ErrorKind, PartReport, Result};

use crate::NamePattern;
use crate::shadow::Entry;

/// The part of all weights that no other one has.
const REST: &str = "policy";

/// Which weight belongs to which part, by its name.
#[derive(Clone, Debug)]
pub(crate) struct Parts(Arc<[Part]>);

#[derive(Debug)]
struct Part {
    name: String,
    patterns: Vec<NamePattern>,
}

impl Parts {
    /// # Errors
    ///
    /// `Config` for a part that has the name of the rest, or none, or no patterns.
    pub(crate) fn new(parts: &BTreeMap<String, Vec<NamePattern>>) -> Result<Self> {
        for (name, patterns) in parts {
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
        Ok(Self(parts.iter().map(part).chain([rest]).collect()))
    }

    /// The number of the part that a weight of this name belongs to.
    pub(crate) fn of(&self, name: &str) -> usize {
        let has = |part: &Part| part.patterns.iter().any(|pattern| pattern.matches(name));
        self.0.iter().position(has).unwrap_or(self.0.len() - 1)
    }

    /// The parts that the weights of a version make: each weight with the change of its digest sum that is not in it yet, and whether anything
    /// of it travelled.
    pub(crate) fn report<'a>(
        &self,
        weights: impl Iterator<Item = (&'a Entry, u64, bool)>,
    ) -> BTreeMap<String, PartReport> {
        let mut reports = vec![PartReport::default(); self.0.len()];
        for (entry, sum, sent) in weights {
            let Some(report) = reports.get_mut(entry.part()) else { continue };
            // In any order: a weight that is sent again comes before those that are not, which changes nothing about its part.
            report.digest = report.digest.wrapping_add(entry.add_to(0, sum));
            report.tensors += 1;
            report.bytes += entry.bytes().len();
            report.sent += u64::from(sent);
        }
        let named = self.0.iter().map(|part| part.name.clone()).zip(reports);
        named.filter(|(_, report)| report.tensors > 0).collect()
    }
}

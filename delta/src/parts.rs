//! The named parts of a version, in reports.

use std::collections::BTreeMap;

use engine_core::{PartReport, Parts};

use crate::shadow::Entry;

/// The parts that the weights of a version make: each weight with the change of its digest sum that is not in it yet, and whether anything
/// of it travelled.
pub(crate) fn report<'a>(
    parts: &Parts,
    weights: impl Iterator<Item = (&'a Entry, u64, bool)>,
) -> BTreeMap<String, PartReport> {
    let mut reports: Vec<PartReport> = parts.names().map(|_| PartReport::default()).collect();
    for (entry, sum, sent) in weights {
        let Some(report) = reports.get_mut(entry.part() as usize) else { continue };
        // In any order: a weight that is sent again comes before those that are not, which changes nothing about its part.
        report.digest = report.digest.wrapping_add(entry.add_to(0, sum));
        report.tensors += 1;
        report.bytes += entry.bytes().len();
        report.sent += u64::from(sent);
    }
    let named = parts.names().map(str::to_owned).zip(reports);
    named.filter(|(_, report)| report.tensors > 0).collect()
}

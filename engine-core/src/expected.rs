//! Which weights a receiver expects of an update.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// Which weights an update has to bring to a receiver that has a version already.
///
/// A stream that ends early, or an exhausted generator, must not replace a model by a part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expected {
    /// The names of the version that the receiver has: no more, and no fewer.
    #[default]
    SameNames,
    /// Any names: weights that do not come keep their values.
    Partial,
}

/// How many names an error spells out.
const NAMED: usize = 3;

/// Compares the names that came with the expected ones: those of the version before, or of a destination.
///
/// # Errors
///
/// `Mismatch`, naming some of those that are missing and some that nobody expects.
pub fn check_names(expected: &[Arc<str>], came: &[Arc<str>]) -> Result<()> {
    // The usual case: the same weights in the same order.
    if expected == came {
        return Ok(());
    }
    let before: BTreeSet<&str> = expected.iter().map(|name| &**name).collect();
    let now: BTreeSet<&str> = came.iter().map(|name| &**name).collect();
    let list = |what: &str, names: Vec<&str>| match names.len() {
        0 => None,
        count => {
            let spelled: Vec<String> =
                names.iter().take(NAMED).map(|name| format!("`{name}`")).collect();
            let more = if count > NAMED { ", …" } else { "" };
            Some(format!("{count} {what} ({}{more})", spelled.join(", ")))
        }
    };
    let missing = list("are missing", before.difference(&now).copied().collect());
    let unknown = list("are new", now.difference(&before).copied().collect());
    let differences: Vec<String> = missing.into_iter().chain(unknown).collect();
    if differences.is_empty() {
        return Ok(());
    }
    let message = format!(
        "its names are not the expected ones, of the version before or of the destination: of {}, {}; a \
         receiver that wants parts of a model has to say so (`partial`)",
        before.len(),
        differences.join(" and "),
    );
    Err(Error::new(ErrorKind::Mismatch, "comparing the weights of an update", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<Arc<str>> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    #[test]
    fn the_same_names_in_any_order_are_what_is_expected() {
        assert!(check_names(&names(&["a", "b"]), &names(&["b", "a"])).is_ok());
        assert!(check_names(&[], &[]).is_ok());
    }

    #[test]
    fn names_that_are_missing_or_new_are_an_error_that_names_them() {
        let error = check_names(&names(&["a", "b", "c"]), &names(&["a", "d"])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        let words = error.to_string();
        assert!(words.contains("2 are missing (`b`, `c`)") && words.contains("1 are new (`d`)"));
        let many: Vec<Arc<str>> = (0..9).map(|i| format!("w{i}").into()).collect();
        let words = check_names(&many, &[]).unwrap_err().to_string();
        assert!(words.contains("9 are missing (`w0`, `w1`, `w2`, …)"), "{words}");
    }
}

//! The suite notices every fault that it was made to notice.

#![allow(clippy::print_stdout, reason = "a test says what it saw")]

use conformance::broken::BACKENDS;
use conformance::{CASES, Outcome, Suite};

#[test]
fn every_broken_engine_fails_a_case_and_says_how() {
    for &backend in BACKENDS {
        let suite = Suite::new(backend);
        let failed = CASES.iter().find_map(|case| match suite.run(case) {
            Outcome::Failed(words) => Some((case.name, words)),
            _ => None,
        });
        let (case, words) = failed.unwrap_or_else(|| panic!("{backend:?} passes"));
        println!("{backend:?} does not: {case}: {words}");
    }
}

//! The paths between receivers on which fetches failed. They are avoided for a while. No IO and no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use engine_core::Rank;

use super::tree::{Path, path};

/// For how many deadlines a path is avoided after its first failure. A retry of a path that has not healed may cost an
/// update one deadline, so retries cost at most a sixteenth of the time.
const FIRST: u32 = 16;
/// How often that time may double, once for each failure soon after it.
const DOUBLINGS: u32 = 6;

/// The paths of a group.
#[derive(Debug, Default)]
pub(super) struct Paths(BTreeMap<Path, Avoided>);

#[derive(Clone, Copy, Debug)]
struct Avoided {
    until: Instant,
    /// How long the path is, or was, avoided.
    long: Duration,
    doublings: u32,
}

impl Paths {
    /// A fetch has failed between two receivers.
    pub(super) fn fail(&mut self, one: Rank, other: Rank, deadline: Duration, now: Instant) {
        let path = path(one, other);
        let doublings = match self.0.get(&path) {
            // Another fetch was under way when the path failed.
            Some(avoided) if now < avoided.until => return,
            // It failed again before it had worked for as long as it had been avoided.
            Some(avoided) if now < avoided.until + avoided.long => {
                (avoided.doublings + 1).min(DOUBLINGS)
            }
            _ => 0,
        };
        let long = deadline * (FIRST << doublings);
        self.0.insert(path, Avoided { until: now + long, long, doublings });
    }

    /// Forgets the paths of a rank that is gone: another process may get its number.
    pub(super) fn forget(&mut self, rank: Rank) {
        self.0.retain(|(one, other), _| *one != rank && *other != rank);
    }

    /// The paths that are avoided now.
    pub(super) fn avoided(&self, now: Instant) -> BTreeSet<Path> {
        self.0.iter().filter(|(_, avoided)| now < avoided.until).map(|(path, _)| *path).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(5);

    #[test]
    fn a_path_that_failed_is_avoided_in_both_directions_and_twice_as_long_if_it_fails_again() {
        let mut paths = Paths::default();
        let mut now = Instant::now();
        for times in [16, 32, 64, 128, 256, 512, 1024, 1024] {
            paths.fail(Rank(2), Rank(1), DEADLINE, now);
            // Another failure while the path is avoided changes nothing.
            paths.fail(Rank(1), Rank(2), DEADLINE, now + DEADLINE);
            let end = now + DEADLINE * times;
            assert!(paths.avoided(end - DEADLINE).contains(&(Rank(1), Rank(2))));
            assert!(paths.avoided(end).is_empty());
            now = end;
        }
        // It has worked for as long as it was avoided.
        now += DEADLINE * 1024;
        paths.fail(Rank(1), Rank(2), DEADLINE, now);
        assert!(paths.avoided(now + DEADLINE * 16).is_empty());
    }

    #[test]
    fn a_rank_that_starts_anew_begins_without_failures() {
        let mut paths = Paths::default();
        let now = Instant::now();
        paths.fail(Rank(1), Rank(2), DEADLINE, now);
        paths.fail(Rank(3), Rank(2), DEADLINE, now);
        paths.forget(Rank(1));
        assert_eq!(paths.avoided(now), BTreeSet::from([(Rank(2), Rank(3))]));
    }
}

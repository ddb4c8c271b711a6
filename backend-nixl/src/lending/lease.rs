//! Who may write to what is lent for one update, and whether nobody can any more. No IO and no clock: time is an input.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::lent::Writer;

/// The lender's side of a lease.
#[derive(Debug)]
pub(super) struct Lease {
    number: u64,
    /// The agents that may write, by their names.
    holders: BTreeMap<String, Writer>,
    /// When it was closed: since then nobody is granted anything.
    closed: Option<Instant>,
}

impl Lease {
    pub(super) fn new(number: u64) -> Self {
        Self { number, holders: BTreeMap::new(), closed: None }
    }

    /// An agent wants to write. Returns whether it may. If so, it counts as one that does from now on.
    pub(super) fn accept(&mut self, lease: u64, agent: &str, writer: Writer) -> bool {
        let granted = lease == self.number && self.closed.is_none();
        if granted {
            self.holders.insert(agent.to_owned(), writer);
        }
        granted
    }

    /// An agent says that all of its writes have ended with their bytes there, which is a proof.
    pub(super) fn let_go(&mut self, lease: u64, agent: &str) {
        if lease == self.number {
            self.holders.remove(agent);
        }
    }

    /// Grants no more.
    pub(super) fn close(&mut self, now: Instant) {
        self.closed.get_or_insert(now);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    pub(super) fn has_holders(&self) -> bool {
        !self.holders.is_empty()
    }

    /// Whether nobody can write any more.
    pub(super) fn is_over(&self) -> bool {
        self.is_closed() && !self.has_holders()
    }

    /// Whether somebody has not let go `grace` after it was closed.
    pub(super) fn is_overdue(&self, now: Instant, grace: Duration) -> bool {
        let is_late = |closed| now.saturating_duration_since(closed) >= grace;
        self.has_holders() && self.closed.is_some_and(is_late)
    }

    /// Whether none of those who have not let go can write once the lender's agent has ended.
    pub(super) fn is_over_with_agent(&self) -> bool {
        self.holders.values().all(Writer::is_over_with_agent)
    }

    /// The lender's agent has ended, with all of its connections.
    pub(super) fn agent_ended(&mut self) {
        self.holders.retain(|_, writer| !writer.is_over_with_agent());
    }

    /// The names of those who may write.
    pub(super) fn holders(&self) -> impl Iterator<Item = &str> {
        self.holders.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    const NUMBER: u64 = 7;
    const GRACE: Duration = Duration::from_millis(10);

    #[derive(Clone, Debug)]
    enum Step {
        Accept {
            lease: u64,
            agent: usize,
        },
        LetGo {
            lease: u64,
            agent: usize,
        },
        Close,
        Wait,
        /// The lender replaces its agent, if that is worth it.
        End,
    }

    fn step() -> impl Strategy<Value = Step> {
        let lease = || prop_oneof![5 => Just(NUMBER), 1 => Just(NUMBER - 1)];
        prop_oneof![
            4 => (lease(), 0..3_usize).prop_map(|(lease, agent)| Step::Accept { lease, agent }),
            4 => (lease(), 0..3_usize).prop_map(|(lease, agent)| Step::LetGo { lease, agent }),
            1 => Just(Step::Close),
            1 => Just(Step::Wait),
            2 => Just(Step::End),
        ]
    }

    proptest! {
        #[test]
        fn a_lease_is_over_only_when_nobody_who_was_granted_it_can_write(
            steps in proptest::collection::vec(step(), 0..40),
            ends in proptest::array::uniform3(any::<bool>()),
        ) {
            let mut now = Instant::now();
            let mut lease = Lease::new(NUMBER);
            // Those who can write: they were granted it, have not let go, and were not cut off.
            let mut writing = BTreeSet::new();
            let mut closed = None;
            for step in steps {
                match step {
                    Step::Accept { lease: number, agent } => {
                        let writer = Writer { ends_with_agent: ends[agent], process: None };
                        let granted = lease.accept(number, &agent.to_string(), writer);
                        prop_assert_eq!(granted, number == NUMBER && closed.is_none());
                        if granted {
                            writing.insert(agent);
                        }
                    }
                    Step::LetGo { lease: number, agent } => {
                        lease.let_go(number, &agent.to_string());
                        if number == NUMBER {
                            writing.remove(&agent);
                        }
                    }
                    Step::Close => {
                        lease.close(now);
                        closed.get_or_insert(now);
                    }
                    Step::Wait => now += GRACE / 2 + Duration::from_millis(1),
                    Step::End => {
                        let is_overdue = lease.is_overdue(now, GRACE);
                        if is_overdue {
                            prop_assert!(!writing.is_empty());
                            prop_assert!(closed.is_some_and(|at| now - at >= GRACE));
                        }
                        if is_overdue && lease.is_over_with_agent() {
                            lease.agent_ended();
                            writing.retain(|agent| !ends[*agent]);
                            prop_assert!(lease.is_over(), "an end that proves nothing");
                        }
                    }
                }
                prop_assert_eq!(lease.is_over(), closed.is_some() && writing.is_empty());
            }
        }
    }
}

//! Which peers an agent can read from, and which can write to it after its end.

use std::collections::{HashMap, VecDeque};

use engine_core::{Rank, Role, WorkerMetadata};

use super::{AgentOptions, Card};
use crate::NAME;
use crate::lent::{Process, Writer};
use crate::sys;

/// The number of agents for which it is remembered whether they can be read from: each restart of a process is another agent.
const DECISIONS: usize = 1024;

/// Which peers an agent can read from, as far as that is certain before it is tried, and after.
#[derive(Debug)]
pub(crate) struct Reach {
    /// Whether there is nothing but TCP.
    only_tcp: bool,
    /// Whether there is nothing but TCP between hosts.
    only_tcp_between_hosts: bool,
    host: String,
    /// Whether UCX emulates what its transports cannot do. It does for device memory.
    emulates: bool,
    /// Whether an agent can be read from, as tried, by its name.
    decided: HashMap<String, bool>,
    /// These names, in the order of the decisions.
    order: VecDeque<String>,
}

impl Reach {
    /// For an agent with these options, whose memory is on a device or of the host.
    pub(crate) fn new(options: &AgentOptions, on_device: bool) -> Self {
        // NIXL also prefers the variable.
        let transports = std::env::var("UCX_TLS").unwrap_or_else(|_| options.transports.clone());
        Self {
            only_tcp: transports.split(',').all(|name| matches!(name, "tcp" | "self")),
            only_tcp_between_hosts: sys::infiniband_devices().is_empty(),
            host: this_host(),
            emulates: on_device,
            decided: HashMap::new(),
            order: VecDeque::new(),
        }
    }

    /// The properties of a peer on a host that was told to write here.
    pub(crate) fn writer(&self, host: &str, process: Option<&Process>) -> Writer {
        let here = is_same_machine(&self.host, host);
        let ends_with_agent = self.reads_nobody() || !(here || self.emulates);
        Writer { ends_with_agent, process: process.cloned().filter(|_| here) }
    }

    /// Whether an agent certainly cannot be read from.
    pub(crate) fn excludes(&self, peer: &Card) -> bool {
        let only_tcp = self.only_tcp || (self.only_tcp_between_hosts && peer.host != self.host);
        let known = only_tcp && !self.emulates && peer.device.is_none();
        known || self.decided.get(&peer.name) == Some(&false)
    }

    /// Whether nothing was decided for an agent. If one could be read from once and no longer can, it is gone.
    pub(super) fn is_undecided(&self, peer: &str) -> bool {
        !self.decided.contains_key(peer)
    }

    /// Records whether an agent can be read from.
    pub(super) fn decide(&mut self, peer: &str, readable: bool) {
        if self.is_undecided(peer) {
            self.decided.insert(peer.to_owned(), readable);
            self.order.push_back(peer.to_owned());
            if self.order.len() > DECISIONS
                && let Some(oldest) = self.order.pop_front()
            {
                self.decided.remove(&oldest);
            }
        }
    }

    /// Whether certainly no host memory can be read.
    pub(super) fn reads_nobody(&self) -> bool {
        self.only_tcp && !self.emulates
    }
}

pub(crate) fn this_host() -> String {
    let nothing = serde_json::Value::Null;
    WorkerMetadata::of_this_process(NAME, Rank::LEADER, Role::Rollout, nothing).host
}

/// Whether two host identities may be of one machine: containers of one machine have names of their own.
fn is_same_machine(one: &str, other: &str) -> bool {
    let boot = |host: &str| host.rsplit('/').next().unwrap_or_default().to_owned();
    boot(one) == boot(other) || boot(one).is_empty() || boot(other).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach(only_tcp: bool, only_tcp_between_hosts: bool, emulates: bool) -> Reach {
        let (host, decided, order) = ("here".into(), HashMap::new(), VecDeque::new());
        Reach { only_tcp, only_tcp_between_hosts, host, emulates, decided, order }
    }

    #[test]
    fn of_agents_that_came_and_went_only_the_last_ones_are_remembered() {
        let mut reach = reach(false, false, false);
        for agent in 0..3 * DECISIONS {
            reach.decide(&agent.to_string(), true);
        }
        assert_eq!((reach.decided.len(), reach.order.len()), (DECISIONS, DECISIONS));
        assert!(reach.is_undecided("0") && !reach.is_undecided(&(3 * DECISIONS - 1).to_string()));
    }

    #[test]
    fn what_can_still_write_after_this_agents_end_is_what_is_on_this_machine_or_on_a_device() {
        let ends = |host, only_tcp, emulates| {
            let mut reach = reach(only_tcp, true, emulates);
            reach.host = "here/boot".into();
            let writer = reach.writer(host, Process::this().as_ref());
            (writer.ends_with_agent, writer.process.is_some())
        };
        assert_eq!(ends("here/boot", false, false), (false, true));
        assert_eq!(ends("a-container/boot", false, false), (false, true));
        assert_eq!(ends("unknown/", false, false), (false, true));
        assert_eq!(ends("elsewhere/other", false, false), (true, false));
        assert_eq!(ends("here/boot", true, false), (true, true));
        assert_eq!(ends("elsewhere/other", true, true), (false, false));
    }

    #[test]
    fn what_cannot_be_read_is_known_from_hosts_and_transports_or_was_found_out() {
        let here = Card {
            name: "peer".into(),
            metadata: Vec::new(),
            address: 0,
            slots: 1,
            slot_bytes: 1,
            device: None,
            host: "here".into(),
            process: None,
            moves: false,
        };
        let elsewhere = Card { host: "elsewhere".into(), ..here.clone() };
        let on_a_device = Card { device: Some(0), ..elsewhere.clone() };
        let excluded = |only_tcp, only_tcp_between_hosts, emulates| {
            let reach = reach(only_tcp, only_tcp_between_hosts, emulates);
            [&here, &elsewhere, &on_a_device].map(|peer| reach.excludes(peer))
        };
        assert_eq!(excluded(false, false, false), [false, false, false]);
        assert_eq!(excluded(false, true, false), [false, true, false]);
        assert_eq!(excluded(true, true, false), [true, true, false]);
        assert_eq!(excluded(true, true, true), [false, false, false]);

        // A decision about an agent stays, whatever happens to the agent later.
        let mut reach = reach(false, false, false);
        let never = Card { name: "never".into(), ..here.clone() };
        assert!(reach.is_undecided("peer") && !reach.excludes(&here) && !reach.excludes(&never));
        for readable in [true, false] {
            reach.decide("peer", readable);
            reach.decide("never", !readable);
            assert_eq!([reach.excludes(&here), reach.excludes(&never)], [false, true]);
            assert!(!reach.is_undecided("peer") && !reach.is_undecided("never"));
        }
    }
}

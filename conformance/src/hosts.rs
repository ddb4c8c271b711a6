//! Hosts, as far as a network is concerned: what happens between them can be tested on one machine.

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Network namespaces, each with one interface that a bridge joins, and one that leads nowhere. Removed when dropped.
///
/// Making them takes root and iproute2.
#[derive(Debug)]
pub struct Hosts {
    hub: String,
    hosts: Vec<String>,
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status();
    assert!(status.is_ok_and(|status| status.success()), "ip {arguments}");
}

impl Hosts {
    /// Makes this many.
    ///
    /// # Panics
    ///
    /// If they cannot be made.
    pub fn new(count: usize) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = |part: &str| format!("ckpt-{}-{number}-{part}", std::process::id());
        let this = Self {
            hub: name("hub"),
            hosts: (0..count).map(|index| name(&index.to_string())).collect(),
        };
        let Self { hub, hosts } = &this;
        ip(&format!("netns add {hub}"));
        ip(&format!("-n {hub} link add bridge type bridge"));
        ip(&format!("-n {hub} link set bridge up"));
        for (index, host) in hosts.iter().enumerate() {
            let address = this.address(index);
            ip(&format!("netns add {host}"));
            ip(&format!("-n {host} link set lo up"));
            ip(&format!("-n {hub} link add port{index} type veth peer name wire netns {host}"));
            ip(&format!("-n {hub} link set port{index} master bridge up"));
            ip(&format!("-n {host} addr add {address}/24 dev wire"));
            ip(&format!("-n {host} link set wire up"));
            // One more, which leads nowhere, in a private network of the same number on all of them.
            ip(&format!("-n {host} link add further type veth peer name nowhere"));
            ip(&format!("-n {host} addr add 192.168.50.{}/24 dev further", index + 1));
            ip(&format!("-n {host} link set further up"));
            ip(&format!("-n {host} link set nowhere up"));
        }
        this
    }

    /// The address of a host, at which the others reach it.
    pub fn address(&self, host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, host as u8 + 1)
    }

    /// A command that runs what its further arguments say on a host.
    pub fn command(&self, host: usize) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.hosts[host]]);
        command
    }

    /// Sets the link of a host to `up` or `down`.
    ///
    /// # Panics
    ///
    /// If it cannot be set.
    pub fn link(&self, host: u32, state: &str) {
        ip(&format!("-n {} link set port{host} {state}", self.hub));
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.hub]) {
            // It may not have been made.
            drop(Command::new("ip").args(["netns", "del", name]).status());
        }
    }
}

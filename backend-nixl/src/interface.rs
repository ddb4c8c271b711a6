//! Finds the network interface that leads to the other ranks.
//!
//! UCX assumes that an interface leads to a peer if the peer has an interface in the same subnet. Two hosts that also have interfaces in
//! the same private subnet (the network of virtual machines, a storage network of one host) are then connected by one that leads nowhere.
//! The control plane's connection shows one that works.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::path::Path;
use std::time::Duration;

use tracing::debug;

use crate::sys;

/// How long the resolution of a host's name may take. It was resolved before.
const RESOLVE: Duration = Duration::from_secs(5);

/// The interface for UCX's TCP in a group whose leader is at this host and port. Empty for any: if UCX has devices other than interfaces,
/// which the same setting would exclude, or if the address does not tell.
pub(crate) async fn towards(leader: Option<String>) -> String {
    let Some(leader) = leader else { return String::new() };
    if !sys::infiniband_devices().is_empty() {
        return String::new();
    }
    // On a separate thread: resolving blocks, and the runtime may have no threads for that.
    let (resolved, resolving) = tokio::sync::oneshot::channel();
    let name = leader.clone();
    let resolve = move || {
        let addresses: Vec<_> = name.to_socket_addrs().into_iter().flatten().collect();
        // The receiver has gone if the deadline has passed.
        drop(resolved.send(addresses));
    };
    if let Err(error) = std::thread::Builder::new().name("ckpt-resolve".into()).spawn(resolve) {
        debug!(%error, "no thread to resolve the leader's name");
    }
    let resolved = engine_core::clock::within(RESOLVE, resolving).await;
    let found = resolved.and_then(Result::ok).into_iter().flatten().find_map(interface_to);
    debug!(leader, interface = found, "the way of the control plane");
    found.unwrap_or_default()
}

/// The interface whose address a connection to the leader would have.
fn interface_to(leader: SocketAddr) -> Option<String> {
    if leader.ip().is_loopback() || leader.ip().is_unspecified() {
        return None;
    }
    let any: SocketAddr = if leader.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().ok()?;
    // Nothing is sent: the kernel only looks up a route.
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(leader).ok()?;
    let own = socket.local_addr().ok()?.ip();
    named(own, sys::interfaces(), |name| {
        // UCX's TCP does not use bridges.
        Path::new("/sys/class/net").join(name).join("bridge").exists()
    })
}

/// The interface that has an address, unless UCX cannot use it.
fn named(
    own: IpAddr,
    interfaces: Vec<(String, IpAddr)>,
    is_bridge: impl Fn(&str) -> bool,
) -> Option<String> {
    if own.is_loopback() || own.is_unspecified() {
        return None;
    }
    let (label, _) = interfaces.into_iter().find(|(_, address)| *address == own)?;
    // Further addresses of an interface may have labels of their own: `eth0:1`.
    let name = label.split(':').next().filter(|name| !name.is_empty())?;
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.@".contains(c));
    (plain && !is_bridge(name)).then(|| name.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_control_plane_within_a_host_says_nothing_of_interfaces() {
        for address in [None, Some("127.0.0.1:1"), Some("[::1]:1"), Some("0.0.0.0:1")] {
            assert_eq!(towards(address.map(str::to_owned)).await, "", "{address:?}");
        }
    }

    #[test]
    fn the_interface_is_the_one_that_has_the_address_by_its_own_name() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let all = || {
            let one = |name: &str, text| (name.to_owned(), address(text));
            vec![
                one("lo", "127.0.0.1"),
                one("eth0", "10.0.0.1"),
                one("eth0:1", "10.0.1.1"),
                one("br0", "10.0.2.1"),
                one("eth1", "fd00::1"),
            ]
        };
        let found = |text| named(address(text), all(), |name| name == "br0");
        assert_eq!(found("10.0.0.1").as_deref(), Some("eth0"));
        assert_eq!(found("10.0.1.1").as_deref(), Some("eth0"));
        assert_eq!(found("fd00::1").as_deref(), Some("eth1"));
        for nothing in ["127.0.0.1", "10.0.2.1", "10.0.3.1", "0.0.0.0"] {
            assert_eq!(found(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn this_hosts_interfaces_have_the_loopback_address_among_them() {
        let all = sys::interfaces();
        assert!(all.iter().any(|(_, address)| address.is_loopback()), "{all:?}");
    }
}

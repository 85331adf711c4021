//! Checks of the MTU on the path behind a port: bridges, NICs and tunnels.

use super::finding::{Finding, quoted};
use super::network::Network;
use super::options::Requirements;
use crate::config::Host as HostSide;
use crate::sys::link::Link;

const CHECK: &str = "tunnel";

/// Returns the bytes that a kind of tunnel adds to each packet over IPv4; an IPv6 header adds 20 more.
/// Tunnels that carry Ethernet frames count the inner Ethernet header too (`VXLAN_HEADROOM`,
/// `GENEVE_IPV4_HLEN`). WireGuard counts `MESSAGE_MINIMUM_LENGTH`, UDP and IP.
fn overhead(kind: &str) -> Option<u32> {
    Some(match kind {
        "ipip" | "sit" => 20,
        "gre" => 24,
        "gretap" => 38,
        "ip6tnl" => 40,
        "ip6gre" => 44,
        "ip6gretap" => 58,
        "vxlan" | "geneve" => 50,
        "wireguard" => 60,
        _ => return None,
    })
}

/// Checks each tunnel, NIC and bridge port that is up.
pub(super) fn check(network: &Network, requirements: &Requirements) -> Vec<Finding> {
    let up = network.links.iter().filter(|link| link.is_up);
    let mut found = Vec::new();
    for link in up {
        let overhead = overhead(&link.kind);
        if overhead.is_none() && link.parent.is_none() && link.master.is_none() {
            continue;
        }
        if let Some(overhead) = overhead {
            found.push(tunnel_mtu(network, link, overhead));
        }
        found.extend(path_mtu(network, link, requirements));
    }
    found
}

/// Checks that a tunnel's packets fit the device below the tunnel.
fn tunnel_mtu(network: &Network, tunnel: &Link, overhead: u32) -> Finding {
    let (what, kind, mtu) = (&tunnel.name, &tunnel.kind, tunnel.mtu);
    let Some(lower) = tunnel.lower.and_then(|index| network.at(index)) else {
        let why = format!(
            "MTU {mtu}; {kind} takes {overhead} bytes (20 more over IPv6) of the MTU of the outgoing \
             device, which the kernel does not report"
        );
        return Finding::pass(CHECK, what, why);
    };
    let most = lower.mtu.saturating_sub(overhead);
    let (below, lower_mtu) = (&lower.name, lower.mtu);
    if mtu <= most {
        let why = format!(
            "MTU {mtu} fits: {kind} takes {overhead} bytes (20 more over IPv6) of the MTU {lower_mtu} of \
             {below}"
        );
        return Finding::pass(CHECK, what, why);
    }
    let why = format!(
        "MTU {mtu} exceeds the MTU {lower_mtu} of {below} less {overhead} bytes of {kind} headers; packets \
         are fragmented or lost"
    );
    let command = format!("ip link set {} mtu {most}", quoted(what));
    Finding::warn(CHECK, what, why).fix(command)
}

/// Checks that frames of the ports' MTU fit a device that they may leave by.
fn path_mtu(network: &Network, link: &Link, requirements: &Requirements) -> Option<Finding> {
    let what = &link.name;
    // TAPs and AF_XDP devices of ports have checks of their own.
    let is_port = requirements.ports.iter().any(|port| match &port.host {
        HostSide::Tap(name) => *name == link.name,
        HostSide::AfXdp(af_xdp) => af_xdp.name == link.name,
        _ => false,
    });
    if is_port {
        return None;
    }
    let bridged: Vec<&str> = requirements
        .ports
        .iter()
        .filter(|port| port.named)
        .filter_map(|port| match &port.host {
            HostSide::Tap(name) => network.find(name),
            _ => None,
        })
        .filter(|tap| tap.master.is_some() && tap.master == link.master)
        .map(|tap| tap.name.as_str())
        .collect();
    if link.master.is_some() && link.parent.is_none() && bridged.is_empty() {
        // A port of a bridge without a checked TAP.
        return None;
    }
    let wanted = u32::from(requirements.mtu);
    if link.mtu >= wanted {
        let why = format!("MTU {} is at least the port's {wanted}", link.mtu);
        return Some(Finding::pass("path-mtu", what, why));
    }
    let less = link.mtu;
    Some(match bridged.first() {
        Some(tap) => {
            let why = format!(
                "MTU {less} is below the {wanted} of the port on {tap} in the same bridge, which silently \
                 drops larger frames. Also start the daemon with --mtu={less}"
            );
            let command = format!("ip link set {} mtu {less}", quoted(tap));
            Finding::fail("path-mtu", what, why).fix(command)
        }
        None => {
            let why = format!(
                "MTU {less} is below the port's {wanted}: the host fragments or refuses larger packets \
                 that it routes here, and senders must learn the path MTU. If guests send this way, start \
                 the daemon with --mtu={less}"
            );
            Finding::warn("path-mtu", what, why)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Options, Status};

    fn network(links: Vec<Link>) -> Network {
        Network { links, ethtool: None }
    }

    fn link(index: u32, name: &str, kind: &str, mtu: u32) -> Link {
        Link { index, name: name.into(), kind: kind.into(), mtu, is_up: true, ..Link::default() }
    }

    #[test]
    fn tunnel_overhead_depends_on_its_kind() {
        let nic = Link { parent: Some(("pci".into(), "x".into())), ..link(1, "e", "", 1500) };
        for (kind, most) in [("ipip", 1480), ("vxlan", 1450), ("wireguard", 1440), ("gre", 1476)] {
            let tunnel = |mtu| Link { lower: Some(1), ..link(2, "t", kind, mtu) };
            let found = |mtu| {
                let network = network(vec![nic.clone(), tunnel(mtu)]);
                tunnel_mtu(&network, &network.links[1], overhead(kind).unwrap())
            };
            assert_eq!(found(most).status, Status::Pass);
            let fix = format!("ip link set t mtu {most}");
            assert_eq!(found(most + 1).fix, Some(fix));
        }
        assert_eq!(overhead("bridge"), None);
    }

    #[test]
    fn tunnel_in_the_guests_bridge_fails_and_elsewhere_warns() {
        let tap = Link { master: Some(9), ..link(1, "tap0", "tun", 1500) };
        let finding = |master| {
            let network =
                network(vec![tap.clone(), Link { master, ..link(2, "t", "vxlan", 1450) }]);
            let options =
                Options { tap: vec!["tap0".into()], queue_pairs: 1, ..Options::default() };
            let requirements = Requirements::new(options, None, &network);
            let found = check(&network, &requirements);
            found.into_iter().find(|finding| finding.check == "path-mtu").unwrap()
        };
        let bridged = finding(Some(9));
        assert_eq!(bridged.status, Status::Fail);
        assert_eq!(bridged.fix.as_deref(), Some("ip link set tap0 mtu 1450"));
        assert_eq!(finding(None).status, Status::Warn);
    }
}

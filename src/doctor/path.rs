//! The way behind a port: what bridges, cards and tunnels carry, and what tunnels take off.

use super::finding::{Finding, quoted};
use super::network::Network;
use super::options::Requirements;
use crate::config::Host as HostSide;
use crate::sys::link::Link;

const CHECK: &str = "tunnel";

/// Bytes that a kind of tunnel puts before what it carries, over IPv4; over IPv6 its header is 20
/// longer. Those that carry Ethernet frames count the inner header too (`VXLAN_HEADROOM`,
/// `GENEVE_IPV4_HLEN`, `MESSAGE_MINIMUM_LENGTH` of WireGuard with UDP and IP).
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

/// Checks each tunnel and card that is up.
pub(super) fn check(network: &Network, requirements: &Requirements) -> Vec<Finding> {
    let up = network.links.iter().filter(|link| link.is_up);
    let mut found = Vec::new();
    for link in up {
        let overhead = overhead(&link.kind);
        if overhead.is_none() && link.parent.is_none() && link.master.is_none() {
            continue;
        }
        if let Some(overhead) = overhead {
            found.push(inside(network, link, overhead));
        }
        found.extend(carries(network, link, requirements));
    }
    found
}

/// Whether what a tunnel makes of a frame fits the device below it.
fn inside(network: &Network, tunnel: &Link, overhead: u32) -> Finding {
    let what = format!("{} {}", tunnel.kind, tunnel.name);
    let Some(lower) = tunnel.lower.and_then(|index| network.at(index)) else {
        let why = format!(
            "it takes {overhead} bytes off the MTU of the device that its packets leave by (20 more \
             over IPv6), and does not say which that is; its own MTU is {}",
            tunnel.mtu
        );
        return Finding::pass(CHECK, what, why);
    };
    let room = lower.mtu.saturating_sub(overhead);
    if tunnel.mtu <= room {
        let why = format!(
            "it takes {overhead} bytes (20 more over IPv6) off the {} of {}, and its MTU of {} fits",
            lower.mtu, lower.name, tunnel.mtu
        );
        return Finding::pass(CHECK, what, why);
    }
    let why = format!(
        "its MTU is {}, and {} carries {} less {overhead}: its packets go in fragments, or are lost",
        tunnel.mtu, lower.name, lower.mtu
    );
    let command = format!("ip link set {} mtu {room}", quoted(&tunnel.name));
    Finding::warn(CHECK, what, why).fix(command)
}

/// Whether the cards' frames fit a device that they may leave by.
fn carries(network: &Network, link: &Link, requirements: &Requirements) -> Option<Finding> {
    let what = format!("path through {}", link.name);
    // TAPs and AF_XDP devices of ports are checked as such.
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
        // A bridge's port beside none of ours.
        return None;
    }
    let wanted = u32::from(requirements.mtu);
    if link.mtu >= wanted {
        let why = format!("it carries {} bytes, and the card's MTU is {wanted}", link.mtu);
        return Some(Finding::pass("path-mtu", what, why));
    }
    let less = link.mtu;
    Some(match bridged.first() {
        Some(tap) => {
            let why = format!(
                "it carries {less} bytes, and is in one bridge with {tap}, whose card's MTU is \
                 {wanted}: longer frames are lost without a word; start the daemon with --mtu={less} \
                 too"
            );
            let command = format!("ip link set {} mtu {less}", quoted(tap));
            Finding::fail("path-mtu", what, why).fix(command)
        }
        None => {
            let why = format!(
                "it carries {less} bytes, and the card's MTU is {wanted}: what is routed through it is \
                 refused or cut, and senders must learn that; start the daemon with --mtu={less}, \
                 if its guests send that way"
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
    fn each_kind_of_tunnel_takes_its_bytes_off() {
        let card = Link { parent: Some(("pci".into(), "x".into())), ..link(1, "e", "", 1500) };
        for (kind, room) in [("ipip", 1480), ("vxlan", 1450), ("wireguard", 1440), ("gre", 1476)] {
            let tunnel = |mtu| Link { lower: Some(1), ..link(2, "t", kind, mtu) };
            let judged = |mtu| {
                let network = network(vec![card.clone(), tunnel(mtu)]);
                inside(&network, &network.links[1], overhead(kind).unwrap())
            };
            assert_eq!(judged(room).status, Status::Pass);
            let fix = format!("ip link set t mtu {room}");
            assert_eq!(judged(room + 1).fix, Some(fix));
        }
        assert_eq!(overhead("bridge"), None);
    }

    #[test]
    fn a_tunnel_in_the_guests_bridge_fails_and_one_beside_it_warns() {
        let tap = Link { master: Some(9), ..link(1, "tap0", "tun", 1500) };
        let judged = |master| {
            let network =
                network(vec![tap.clone(), Link { master, ..link(2, "t", "vxlan", 1450) }]);
            let options =
                Options { tap: vec!["tap0".into()], queue_pairs: 1, ..Options::default() };
            let requirements = Requirements::new(options, None, &network);
            let found = check(&network, &requirements);
            found.into_iter().find(|finding| finding.check == "path-mtu").unwrap()
        };
        let bridged = judged(Some(9));
        assert_eq!(bridged.status, Status::Fail);
        assert_eq!(bridged.fix.as_deref(), Some("ip link set tap0 mtu 1450"));
        assert_eq!(judged(None).status, Status::Warn);
    }
}

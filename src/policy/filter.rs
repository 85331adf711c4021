//! Packet filters: lists of rules that allow or deny by protocol, port and prefix. The first rule that a frame
//! matches decides.
//!
//! A filter has three forms, which must agree. [`Filter::check`] checks frames from the guest. The kernel runs a
//! program on frames to the guest: classic BPF as a socket filter of a TAP (`classic`), or eBPF in an XDP program
//! (`extended`). Both programs are assembled from the same list of steps (`steps`).
//!
//! Invariant: an unknown property of a frame counts against the frame, for example a port in a later fragment, or
//! the fields behind a truncated header. Such a frame matches a rule that denies, and no rule that allows. A frame
//! that carries another packet or frame, which the filter does not parse, matches every rule that denies.

mod classic;
mod extended;
mod facts;
mod language;
mod steps;
#[cfg(test)]
mod tests;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::counters::DropReason;
use crate::frame::{ethertype, protocol};

pub use classic::{MAX_INSTRUCTIONS, classic};
pub use extended::{SEEN, SEEN_AT, extended, seen};
use facts::Facts;
pub use facts::carried;

/// Maximum number of rules of a filter.
pub const MAX_RULES: usize = 64;

/// The decision on a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Action {
    /// The frame passes.
    #[default]
    Allow,
    /// The frame is dropped.
    Deny,
}

/// A list of rules, such as `deny tcp dport 25; allow udp from 192.0.2.0/24; default deny`; or `none`, which allows
/// all frames.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "language::Text", into = "String")]
pub struct Filter {
    rules: Vec<Rule>,
    default: Action,
}

/// A rule: the conditions that a frame must meet, and the action then. An absent condition matches all frames.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    action: Action,
    protocol: Option<Protocol>,
    from: Option<IpNet>,
    to: Option<IpNet>,
    source_port: Option<Ports>,
    destination_port: Option<Ports>,
}

/// The protocol that a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Ethertype in the Ethernet header or in the last VLAN tag.
    Ethertype(u16),
    /// ICMP in IPv4.
    Icmp,
    /// ICMPv6 in IPv6.
    Icmp6,
    /// Protocol number in the IPv4 header, or in the last of the IPv6 headers.
    Ip(u8),
    /// Any protocol but IPv4, IPv6 and ARP.
    Other,
}

/// A range of ports, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    first: u16,
    last: u16,
}

impl Filter {
    /// Returns true if the filter allows all frames.
    pub fn is_none(&self) -> bool {
        *self == Filter::default()
    }

    /// Checks a frame by its start. The frame must be sent with exactly these bytes.
    ///
    /// # Errors
    /// [`DropReason::Filtered`] if the filter denies the frame.
    pub fn check(&self, start: &[u8]) -> Result<(), DropReason> {
        let facts = Facts::read(start);
        let first = self.rules.iter().find(|rule| rule.matches(&facts));
        match first.map_or(self.default, |rule| rule.action) {
            Action::Allow => Ok(()),
            Action::Deny => Err(DropReason::Filtered),
        }
    }
}

impl Rule {
    fn matches(&self, facts: &Facts) -> bool {
        let unknown = self.action == Action::Deny;
        if unknown && facts.carries {
            return true;
        }
        let address = |net: &Option<IpNet>, place: usize| {
            net.is_none_or(|net| facts.addresses.is(unknown, |pair| net.contains(&pair[place])))
        };
        let port = |ports: &Option<Ports>, place: usize| {
            let within = |ports: Ports, port| (ports.first..=ports.last).contains(&port);
            ports.is_none_or(|ports| facts.ports.is(unknown, |pair| within(ports, pair[place])))
        };
        let is_ipv4 = || facts.addresses.is(unknown, |pair| pair[0].is_ipv4());
        let is_ipv6 = || facts.addresses.is(unknown, |pair| pair[0].is_ipv6());
        let protocol = match self.protocol {
            None => true,
            // RARP packets have ARP's format.
            Some(Protocol::Ethertype(ethertype::ARP)) if unknown => {
                facts.ethertype.is(unknown, |it| [ethertype::ARP, ethertype::RARP].contains(&it))
            }
            Some(Protocol::Ethertype(wanted)) => facts.ethertype.is(unknown, |it| it == wanted),
            Some(Protocol::Other) => {
                facts.ethertype.is(unknown, |it| !facts::UNDERSTOOD.contains(&it))
            }
            Some(Protocol::Icmp) => {
                is_ipv4() && facts.protocol.is(unknown, |it| it == protocol::ICMP)
            }
            Some(Protocol::Icmp6) => {
                is_ipv6() && facts.protocol.is(unknown, |it| it == protocol::ICMPV6)
            }
            Some(Protocol::Ip(wanted)) => facts.protocol.is(unknown, |it| it == wanted),
        };
        protocol
            && address(&self.from, 0)
            && address(&self.to, 1)
            && port(&self.source_port, 0)
            && port(&self.destination_port, 1)
    }
}

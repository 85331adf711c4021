//! Lists of what is allowed and denied, by protocol, port and prefix: the first rule that a frame
//! matches decides.
//!
//! One list has three judges that must agree: [`Filter::judge`], for frames from the guest, and the
//! programs that the kernel runs on frames for it, for a socket filter (`classic`) or in an XDP
//! program (`extended`). Both are emitted from the same steps (`steps`).
//!
//! Invariant: what can't be known of a frame (a port in a later fragment, what lies behind a
//! header that is cut short) counts against it: it matches a rule that denies, and none that
//! allows. A frame that carries another one, which nobody looks at, matches every rule that denies.

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

/// Most rules of a filter.
pub const MAX_RULES: usize = 64;

/// What becomes of a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Action {
    /// It passes.
    #[default]
    Allow,
    /// It is dropped.
    Deny,
}

/// A list of rules, as `deny tcp dport 25; allow udp from 192.0.2.0/24; default deny`, or `none`,
/// which allows all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "language::Text", into = "String")]
pub struct Filter {
    rules: Vec<Rule>,
    default: Action,
}

/// What a frame must be for a rule to decide.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    action: Action,
    protocol: Option<Protocol>,
    from: Option<IpNet>,
    to: Option<IpNet>,
    source_port: Option<Ports>,
    destination_port: Option<Ports>,
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// By the Ethernet header, or the last VLAN tag.
    Ethertype(u16),
    /// ICMP, which is IPv4's.
    Icmp,
    /// ICMPv6, which is IPv6's.
    Icmp6,
    /// By the header of IPv4, or the last one of IPv6.
    Ip(u8),
    /// Neither IPv4, IPv6 nor ARP.
    Other,
}

/// Ports, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    first: u16,
    last: u16,
}

impl Filter {
    /// Whether it lets everything pass.
    pub fn is_none(&self) -> bool {
        *self == Filter::default()
    }

    /// Judges a frame by its start, which must be what is sent.
    ///
    /// # Errors
    /// [`DropReason::Filtered`] if the filter denies it.
    pub fn check(&self, start: &[u8]) -> Result<(), DropReason> {
        let facts = Facts::read(start);
        let first = self.rules.iter().find(|rule| rule.decides(&facts));
        match first.map_or(self.default, |rule| rule.action) {
            Action::Allow => Ok(()),
            Action::Deny => Err(DropReason::Filtered),
        }
    }
}

impl Rule {
    fn decides(&self, facts: &Facts) -> bool {
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
            // RARP has ARP's packets.
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

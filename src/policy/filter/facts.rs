//! The properties of a frame that rules test, read from its headers.

use std::net::IpAddr;

use super::Protocol;
use crate::frame::{Ipv4, Ipv6, Link, MAX_VLAN_TAGS, Walk, ethertype, protocol, u16_at, up_to};

/// Ethertypes with a keyword of their own. The keyword `other` means all others.
pub(super) const UNDERSTOOD: [u16; 3] = [ethertype::IPV4, ethertype::IPV6, ethertype::ARP];

/// Maximum number of VLAN tags that are skipped.
pub(super) const MAX_TAGS: usize = MAX_VLAN_TAGS;
/// Maximum number of IPv6 extension headers that are skipped.
pub(super) const MAX_EXTENSIONS: usize = 6;
/// Offset in bytes from the frame's start. A header at this offset or behind it is not parsed.
pub(super) const MAX_OFFSET: usize = Walk::MAX_OFFSET;

/// A property of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fact<T> {
    /// The frame shows the property.
    Known(T),
    /// The frame has no such property.
    Absent,
    /// The frame may have the property, and does not show it.
    Unknown,
}

impl<T: Copy> Fact<T> {
    fn known(self) -> Option<T> {
        if let Fact::Known(it) = self { Some(it) } else { None }
    }

    /// Returns true if the property is as wanted, and `unknown` if the frame does not show the property.
    pub(super) fn is(self, unknown: bool, wanted: impl FnOnce(T) -> bool) -> bool {
        match self {
            Fact::Known(it) => wanted(it),
            Fact::Absent => false,
            Fact::Unknown => unknown,
        }
    }
}

/// All properties of a frame that rules test. Pairs have the source first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) ethertype: Fact<u16>,
    pub(super) addresses: Fact<[IpAddr; 2]>,
    pub(super) protocol: Fact<u8>,
    pub(super) ports: Fact<[u16; 2]>,
    /// True if the frame carries another packet or frame, which the filter does not parse.
    pub(super) carries: bool,
}

/// Returns the protocol that a frame carries, if its headers show it, and the source and destination address of its
/// IP packet, if it has one.
pub fn carried(start: &[u8]) -> (Option<Protocol>, Option<[IpAddr; 2]>) {
    let facts = Facts::read(start);
    let addresses = facts.addresses.known();
    let version = addresses.map(|[source, _]| source.is_ipv4());
    (protocol(facts.ethertype.known(), facts.protocol.known(), version), addresses)
}

/// Returns the protocol of a packet with these header fields.
pub(super) fn protocol(
    ethertype: Option<u16>,
    protocol: Option<u8>,
    is_ipv4: Option<bool>,
) -> Option<Protocol> {
    match (protocol, is_ipv4) {
        (Some(protocol::ICMP), Some(true)) => Some(Protocol::Icmp),
        (Some(protocol::ICMPV6), Some(false)) => Some(Protocol::Icmp6),
        (Some(other), _) => Some(Protocol::Ip(other)),
        (None, _) => ethertype.map(Protocol::Ethertype),
    }
}

impl Facts {
    const UNKNOWN: Facts = Facts {
        ethertype: Fact::Unknown,
        addresses: Fact::Unknown,
        protocol: Fact::Unknown,
        ports: Fact::Unknown,
        carries: false,
    };

    /// Reads the start of a frame.
    pub(super) fn read(frame: &[u8]) -> Facts {
        // A tag behind the last one that is skipped may hide any protocol.
        let link = Link::parse(frame, MAX_TAGS).filter(|it| !ethertype::is_vlan_tag(it.ethertype));
        let Some(Link { ethertype, network }) = link else { return Facts::UNKNOWN };
        let facts = match ethertype {
            ethertype::IPV4 => Facts::of_ipv4(frame, network).unwrap_or(Facts::UNKNOWN),
            ethertype::IPV6 => Facts::of_ipv6(frame, network).unwrap_or(Facts::UNKNOWN),
            _ => Facts {
                addresses: Fact::Absent,
                protocol: Fact::Absent,
                ports: Fact::Absent,
                carries: ethertype < ethertype::MIN || ethertype::CARRIERS.contains(&ethertype),
                ..Facts::UNKNOWN
            },
        };
        Facts { ethertype: Fact::Known(ethertype), ..facts }
    }

    /// Reads an IPv4 packet. Returns `None` if its header is truncated, longer than the packet, or not IPv4.
    fn of_ipv4(frame: &[u8], network: usize) -> Option<Facts> {
        let header = Ipv4::parse(frame.get(network..)?)?;
        let (length, total) = (header.header_length(), header.total_length());
        if total < length {
            return None;
        }
        let packet = up_to(frame, network + total);
        let protocol = header.protocol();
        let transport = (header.fragment_offset() == 0).then_some(network + length);
        Some(Facts {
            addresses: Fact::Known([header.source().into(), header.destination().into()]),
            protocol: Fact::Known(protocol),
            ports: ports(packet, protocol, transport),
            carries: protocol::CARRIERS.contains(&protocol),
            ..Facts::UNKNOWN
        })
    }

    /// Reads an IPv6 packet. Returns `None` if its header is truncated, or not IPv6.
    fn of_ipv6(frame: &[u8], network: usize) -> Option<Facts> {
        let header = Ipv6::parse(frame.get(network..)?)?;
        let addresses = Fact::Known([header.source().into(), header.destination().into()]);
        let packet = up_to(frame, network + header.total_length());
        let walk = Walk::over_all(MAX_EXTENSIONS);
        // A later fragment names its protocol itself. A false protocol gains nothing: the receiver that reassembles
        // the packet uses the first fragment's.
        let upper = walk
            .walk(packet, header.next_header(), network + Ipv6::LENGTH)
            .filter(|upper| !protocol::is_extension(upper.protocol));
        let (protocol, ports) = match upper {
            Some(upper) => {
                (Fact::Known(upper.protocol), ports(packet, upper.protocol, upper.transport))
            }
            None => (Fact::Unknown, Fact::Unknown),
        };
        let carries = protocol.is(false, |it| protocol::CARRIERS.contains(&it));
        Some(Facts { addresses, protocol, ports, carries, ..Facts::UNKNOWN })
    }
}

/// Reads the ports of the transport header at `at`; `None` means that the header is in another fragment.
fn ports(frame: &[u8], protocol: u8, at: Option<usize>) -> Fact<[u16; 2]> {
    if !protocol::WITH_PORTS.contains(&protocol) {
        return Fact::Absent;
    }
    match at.and_then(|at| Some([u16_at(frame, at)?, u16_at(frame, at + 2)?])) {
        Some(ports) => Fact::Known(ports),
        None => Fact::Unknown,
    }
}

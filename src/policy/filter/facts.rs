//! What a frame shows of itself.

use std::net::IpAddr;

use super::Protocol;
use crate::frame::{Ipv4, Ipv6, Link, MAX_VLAN_TAGS, Walk, ethertype, protocol, u16_at, up_to};

/// Ethertypes that rules have words for; `other` is all the rest.
pub(super) const UNDERSTOOD: [u16; 3] = [ethertype::IPV4, ethertype::IPV6, ethertype::ARP];

/// VLAN tags that are looked behind.
pub(super) const MAX_TAGS: usize = MAX_VLAN_TAGS;
/// Extension headers that are looked behind.
pub(super) const MAX_EXTENSIONS: usize = 6;
/// No header is looked for that begins so many bytes behind the frame's start.
pub(super) const MAX_OFFSET: usize = Walk::MAX_OFFSET;

/// Something about a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fact<T> {
    /// It is so.
    Known(T),
    /// The frame has no such thing.
    Absent,
    /// The frame may have it, and does not show it.
    Unknown,
}

impl<T: Copy> Fact<T> {
    fn known(self) -> Option<T> {
        if let Fact::Known(it) = self { Some(it) } else { None }
    }

    /// Whether it is as wanted; `unknown` if nobody knows.
    pub(super) fn is(self, unknown: bool, wanted: impl FnOnce(T) -> bool) -> bool {
        match self {
            Fact::Known(it) => wanted(it),
            Fact::Absent => false,
            Fact::Unknown => unknown,
        }
    }
}

/// What rules ask for: of two, the source's first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) ethertype: Fact<u16>,
    pub(super) addresses: Fact<[IpAddr; 2]>,
    pub(super) protocol: Fact<u8>,
    pub(super) ports: Fact<[u16; 2]>,
    /// True if the frame carries another packet or frame, which the filter does not parse.
    pub(super) carries: bool,
}

/// What a frame carries, as far as it shows that, and the addresses of its IP packet, if it has one:
/// the source's first.
pub fn carried(start: &[u8]) -> (Option<Protocol>, Option<[IpAddr; 2]>) {
    let facts = Facts::read(start);
    let addresses = facts.addresses.known();
    let version = addresses.map(|[source, _]| source.is_ipv4());
    (protocol(facts.ethertype.known(), facts.protocol.known(), version), addresses)
}

/// What a packet with these numbers carries.
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
        // A tag behind the last one that is looked behind may hide anything.
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

    /// Reads an IPv4 packet; nothing if its header is cut short, longer than the packet, or none.
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

    /// Reads an IPv6 packet; nothing if its header is cut short, or none.
    fn of_ipv6(frame: &[u8], network: usize) -> Option<Facts> {
        let header = Ipv6::parse(frame.get(network..)?)?;
        let addresses = Fact::Known([header.source().into(), header.destination().into()]);
        let packet = up_to(frame, network + header.total_length());
        let walk = Walk::over_all(MAX_EXTENSIONS);
        // A later fragment says by itself what protocol it is of. It may lie, and gains nothing: whoever
        // puts the packet together believes the first fragment only.
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

/// The ports of a transport header at `at`, if it is not in another fragment.
fn ports(frame: &[u8], protocol: u8, at: Option<usize>) -> Fact<[u16; 2]> {
    if !protocol::WITH_PORTS.contains(&protocol) {
        return Fact::Absent;
    }
    match at.and_then(|at| Some([u16_at(frame, at)?, u16_at(frame, at + 2)?])) {
        Some(ports) => Fact::Known(ports),
        None => Fact::Unknown,
    }
}

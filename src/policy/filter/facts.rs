//! What a frame shows of itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Protocol;

pub(super) const IPV4: u16 = 0x0800;
pub(super) const ARP: u16 = 0x0806;
/// RARP, whose packets have the layout of [`ARP`]. Bridges may learn from them too.
pub(super) const RARP: u16 = 0x8035;
pub(super) const IPV6: u16 = 0x86dd;
/// Ethertypes that rules have words for; `other` is all the rest.
pub(super) const UNDERSTOOD: [u16; 3] = [IPV4, IPV6, ARP];
pub(super) const VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
pub(super) const SCTP: u8 = 132;
/// Protocols whose headers begin with two ports: also DCCP and UDP-Lite.
pub(super) const WITH_PORTS: [u8; 5] = [TCP, UDP, 33, SCTP, 136];

/// Headers of IPv6 that others follow (RFC 8200, section 4): with their lengths in units of eight
/// bytes, the fragment's, and the authentication's.
pub(super) const OPTIONS: [u8; 6] = [0, 43, 60, 135, 139, 140];
pub(super) const FRAGMENT: u8 = 44;
pub(super) const AUTHENTICATION: u8 = 51;

/// Smallest ethertype. A smaller number is a length, and 802.2 LLC follows, which may carry any
/// ethertype behind a SNAP header (IEEE 802.3, RFC 1042).
pub(super) const MIN_ETHERTYPE: u16 = 0x0600;
/// Ethertypes that another packet or frame follows, which nobody looks at: TRILL, B.A.T.M.A.N.,
/// Ethernet in Ethernet, PPP, MPLS, PPPoE, LLC in jumbo frames, MACsec, PBB, Cisco's tags, HSR, the
/// E-tag, NSH, and VLAN tags of old.
pub(super) const CARRIERS: [u16; 18] = [
    0x22f3, 0x4305, 0x6558, 0x880b, 0x8847, 0x8848, 0x8863, 0x8864, 0x8870, 0x88e5, 0x88e7, 0x8909,
    0x892f, 0x893f, 0x894f, 0x9200, 0x9300, 0x9a22,
];
/// IP protocols that another packet or frame follows, which nobody looks at: IPv4, IPv6, GRE, AH (in
/// IPv4), IP within IP, EtherIP, IPComp, L2TP and MPLS.
pub(super) const IP_CARRIERS: [u8; 9] = [4, 41, 47, AUTHENTICATION, 94, 97, 108, 115, 137];

/// VLAN tags that are looked behind.
pub(super) const MAX_TAGS: usize = 2;
/// Extension headers that are looked behind.
pub(super) const MAX_EXTENSIONS: usize = 6;
/// No header is looked for that begins so many bytes behind the frame's start.
pub(super) const MAX_OFFSET: usize = 1024;
/// Length in bytes of the Ethernet header.
pub(super) const ETHERNET: usize = 14;

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

pub(super) fn is_extension(protocol: u8) -> bool {
    OPTIONS.contains(&protocol) || protocol == FRAGMENT || protocol == AUTHENTICATION
}

fn array<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..).and_then(|rest| rest.first_chunk().copied())
}

fn u16_at(frame: &[u8], at: usize) -> Option<u16> {
    array(frame, at).map(u16::from_be_bytes)
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
    number: Option<u8>,
    is_ipv4: Option<bool>,
) -> Option<Protocol> {
    match (number, is_ipv4) {
        (Some(ICMP), Some(true)) => Some(Protocol::Icmp),
        (Some(ICMPV6), Some(false)) => Some(Protocol::Icmp6),
        (Some(number), _) => Some(Protocol::Ip(number)),
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
        let tagged = |at| u16_at(frame, at).is_some_and(|it| VLAN.contains(&it));
        let tags = (0..MAX_TAGS).take_while(|tag| tagged(12 + 4 * tag)).count();
        let network = ETHERNET + 4 * tags;
        let Some(ethertype) = u16_at(frame, network - 2).filter(|it| !VLAN.contains(it)) else {
            return Facts::UNKNOWN;
        };
        let facts = match ethertype {
            IPV4 => Facts::of_ipv4(frame, network).unwrap_or(Facts::UNKNOWN),
            IPV6 => Facts::of_ipv6(frame, network).unwrap_or(Facts::UNKNOWN),
            _ => Facts {
                addresses: Fact::Absent,
                protocol: Fact::Absent,
                ports: Fact::Absent,
                carries: ethertype < MIN_ETHERTYPE || CARRIERS.contains(&ethertype),
                ..Facts::UNKNOWN
            },
        };
        Facts { ethertype: Fact::Known(ethertype), ..facts }
    }

    /// Reads an IPv4 packet; nothing if its header is cut short, longer than the packet, or none.
    fn of_ipv4(frame: &[u8], network: usize) -> Option<Facts> {
        let header: [u8; 20] = array(frame, network)?;
        let length = usize::from(header[0] & 0xf) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if header[0] >> 4 != 4 || length < 20 || total < length {
            return None;
        }
        let packet = up_to(frame, network + total);
        let address = |at| Some(IpAddr::from(Ipv4Addr::from(array::<4>(frame, network + at)?)));
        let is_first = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
        let transport = is_first.then_some(network + length);
        Some(Facts {
            addresses: Fact::Known([address(12)?, address(16)?]),
            protocol: Fact::Known(header[9]),
            ports: ports(packet, header[9], transport),
            carries: IP_CARRIERS.contains(&header[9]),
            ..Facts::UNKNOWN
        })
    }

    /// Reads an IPv6 packet; nothing if its header is cut short, or none.
    fn of_ipv6(frame: &[u8], network: usize) -> Option<Facts> {
        let header: [u8; 40] = array(frame, network)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let address = |at| Some(IpAddr::from(Ipv6Addr::from(array::<16>(frame, network + at)?)));
        let addresses = Fact::Known([address(8)?, address(24)?]);
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let packet = up_to(frame, network + 40 + length);
        let upper = skip_extensions(packet, header[6], network + 40);
        let (protocol, ports) = match upper {
            Some((protocol, transport)) => {
                (Fact::Known(protocol), ports(packet, protocol, transport))
            }
            None => (Fact::Unknown, Fact::Unknown),
        };
        let carries = protocol.is(false, |it| IP_CARRIERS.contains(&it));
        Some(Facts { addresses, protocol, ports, carries, ..Facts::UNKNOWN })
    }
}

/// The part of a frame that ends with its IP packet, by the packet's own length. The receiver cuts off
/// what follows: padding shows nothing.
fn up_to(frame: &[u8], end: usize) -> &[u8] {
    frame.get(..end).unwrap_or(frame)
}

/// The ports of a transport header at `at`, if it is not in another fragment.
fn ports(frame: &[u8], protocol: u8, at: Option<usize>) -> Fact<[u16; 2]> {
    if !WITH_PORTS.contains(&protocol) {
        return Fact::Absent;
    }
    match at.and_then(|at| Some([u16_at(frame, at)?, u16_at(frame, at + 2)?])) {
        Some(ports) => Fact::Known(ports),
        None => Fact::Unknown,
    }
}

/// Walks over the extension headers of an IPv6 packet: the protocol behind them, and where its
/// header lies, if not in another fragment. Nothing if they are too many, or cut short.
///
/// A later fragment says by itself what protocol it is of. It may lie, and gains nothing: whoever
/// puts the packet together believes the first fragment only.
fn skip_extensions(frame: &[u8], first: u8, start: usize) -> Option<(u8, Option<usize>)> {
    let (mut protocol, mut at) = (first, start);
    for _ in 0..MAX_EXTENSIONS {
        let length = match protocol {
            FRAGMENT => {
                let header: [u8; 8] = array(frame, at)?;
                if u16::from_be_bytes([header[2], header[3]]) >> 3 != 0 {
                    return (!is_extension(header[0])).then_some((header[0], None));
                }
                8
            }
            AUTHENTICATION => (usize::from(*frame.get(at + 1)?) + 2) * 4,
            extension if OPTIONS.contains(&extension) => (usize::from(*frame.get(at + 1)?) + 1) * 8,
            _ => break,
        };
        protocol = *frame.get(at)?;
        at += length;
        if at >= MAX_OFFSET {
            return None;
        }
    }
    (!is_extension(protocol)).then_some((protocol, Some(at)))
}

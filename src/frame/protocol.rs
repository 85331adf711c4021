//! Protocol numbers of IP packets (IANA).

/// ICMP for IPv4.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// SCTP.
pub const SCTP: u8 = 132;
/// Protocols whose headers begin with two ports: TCP, UDP, DCCP, SCTP and UDP-Lite.
pub const WITH_PORTS: [u8; 5] = [TCP, UDP, 33, SCTP, 136];

/// Offset in bytes of the checksum in a TCP header (RFC 9293).
pub const TCP_CHECKSUM: u16 = 16;
/// Offset in bytes of the checksum in a UDP header (RFC 768).
pub const UDP_CHECKSUM: u16 = 6;

/// IPv6 extension headers with a length in units of eight bytes (RFC 8200, section 4).
pub const OPTIONS: [u8; 6] = [HOP_BY_HOP, ROUTING, DESTINATION, MOBILITY, HIP, SHIM6];
/// Hop-by-hop options of IPv6.
pub const HOP_BY_HOP: u8 = 0;
/// Routing header of IPv6.
pub const ROUTING: u8 = 43;
/// Destination options of IPv6.
pub const DESTINATION: u8 = 60;
/// Mobility header (RFC 6275).
pub const MOBILITY: u8 = 135;
/// Host identity protocol (RFC 7401).
pub const HIP: u8 = 139;
/// Shim protocol (RFC 5533).
pub const SHIM6: u8 = 140;
/// Fragment header of IPv6, which has eight bytes.
pub const FRAGMENT: u8 = 44;
/// Authentication header, with a length in units of four bytes (RFC 4302).
pub const AUTHENTICATION: u8 = 51;

/// Protocols of encapsulations, which no reader parses: IPv4, IPv6, GRE, AH (in IPv4), IP within IP, EtherIP, IPComp,
/// L2TP and MPLS.
pub const CARRIERS: [u8; 9] = [4, 41, 47, AUTHENTICATION, 94, 97, 108, 115, 137];

/// Returns true for a protocol of [`OPTIONS`].
#[inline]
pub fn is_option(protocol: u8) -> bool {
    // A search of `OPTIONS` would compile to a function call.
    matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY | HIP | SHIM6)
}

/// Returns true for the number of an IPv6 extension header, behind which another header follows.
#[inline]
pub fn is_extension(protocol: u8) -> bool {
    is_option(protocol) || matches!(protocol, FRAGMENT | AUTHENTICATION)
}

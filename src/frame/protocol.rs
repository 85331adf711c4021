//! Protocol numbers of IP packets (IANA).

/// ICMP, which is IPv4's.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMPv6, which is IPv6's.
pub const ICMPV6: u8 = 58;
/// SCTP.
pub const SCTP: u8 = 132;
/// Protocols whose headers begin with two ports: also DCCP and UDP-Lite.
pub const WITH_PORTS: [u8; 5] = [TCP, UDP, 33, SCTP, 136];

/// Offset in bytes of the checksum in a TCP header (RFC 9293).
pub const TCP_CHECKSUM: u16 = 16;
/// The same in a UDP header (RFC 768).
pub const UDP_CHECKSUM: u16 = 6;

/// Headers of IPv6 that others follow (RFC 8200, section 4), with their lengths in units of eight bytes.
pub const OPTIONS: [u8; 6] = [HOP_BY_HOP, ROUTING, DESTINATION, MOBILITY, HIP, SHIM6];
/// IPv6's hop-by-hop options.
pub const HOP_BY_HOP: u8 = 0;
/// IPv6's routing header.
pub const ROUTING: u8 = 43;
/// IPv6's destination options.
pub const DESTINATION: u8 = 60;
/// The mobility header (RFC 6275).
pub const MOBILITY: u8 = 135;
/// The host identity protocol (RFC 7401).
pub const HIP: u8 = 139;
/// The shim protocol (RFC 5533).
pub const SHIM6: u8 = 140;
/// IPv6's fragment header: eight bytes.
pub const FRAGMENT: u8 = 44;
/// The authentication header, with its length in units of four bytes (RFC 4302).
pub const AUTHENTICATION: u8 = 51;

/// Protocols of encapsulations, which no reader looks into: IPv4, IPv6, GRE, AH (in
/// IPv4), IP within IP, EtherIP, IPComp, L2TP and MPLS.
pub const CARRIERS: [u8; 9] = [4, 41, 47, AUTHENTICATION, 94, 97, 108, 115, 137];

/// Whether it is one of [`OPTIONS`].
#[inline]
pub fn is_option(protocol: u8) -> bool {
    // A search in the array would be a call.
    matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY | HIP | SHIM6)
}

/// Whether it is the number of an IPv6 extension header, which another header follows.
#[inline]
pub fn is_extension(protocol: u8) -> bool {
    is_option(protocol) || matches!(protocol, FRAGMENT | AUTHENTICATION)
}

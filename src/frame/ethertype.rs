//! Ethertypes (IEEE 802 numbers).

/// IPv4.
pub const IPV4: u16 = 0x0800;
/// ARP.
pub const ARP: u16 = 0x0806;
/// RARP, whose packets have the layout of [`ARP`]. Bridges may learn from RARP too.
pub const RARP: u16 = 0x8035;
/// IPv6.
pub const IPV6: u16 = 0x86dd;
/// VLAN tag of a customer (IEEE 802.1Q).
const CUSTOMER_TAG: u16 = 0x8100;
/// VLAN tag of a provider (IEEE 802.1ad).
const PROVIDER_TAG: u16 = 0x88a8;
/// VLAN tag of a provider before IEEE 802.1ad.
const OLD_PROVIDER_TAG: u16 = 0x9100;
/// Ethertypes of VLAN tags.
pub const VLAN_TAGS: [u16; 3] = [CUSTOMER_TAG, PROVIDER_TAG, OLD_PROVIDER_TAG];

/// Smallest ethertype. A smaller number is a length. An 802.2 LLC header follows it, which may carry any ethertype
/// behind a SNAP header (IEEE 802.3, RFC 1042).
pub const MIN: u16 = 0x0600;
/// Ethertypes of encapsulations, which no reader parses: TRILL, B.A.T.M.A.N., Ethernet in Ethernet, PPP, MPLS, PPPoE,
/// LLC in jumbo frames, MACsec, PBB, Cisco's tags, HSR, the E-tag, NSH, and old VLAN tags.
pub const CARRIERS: [u16; 18] = [
    0x22f3, 0x4305, 0x6558, 0x880b, 0x8847, 0x8848, 0x8863, 0x8864, 0x8870, 0x88e5, 0x88e7, 0x8909,
    0x892f, 0x893f, 0x894f, 0x9200, 0x9300, 0x9a22,
];

/// Returns true for the ethertype of a VLAN tag, behind which another ethertype follows.
#[inline]
pub fn is_vlan_tag(ethertype: u16) -> bool {
    // A search of `VLAN_TAGS` would compile to a function call.
    matches!(ethertype, CUSTOMER_TAG | PROVIDER_TAG | OLD_PROVIDER_TAG)
}

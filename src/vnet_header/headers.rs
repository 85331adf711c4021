//! Where the headers of a frame lie.

use super::{VLAN_TAG_LENGTH, VLAN_TAGS};
use crate::policy::filter::VLAN;

/// What segmentation needs to know of a frame's headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Headers {
    /// Version of IP.
    pub version: u8,
    /// IP protocol of the transport header.
    pub protocol: u8,
    /// Offset of the IP header in the frame.
    pub network: usize,
    /// Offset of the transport header in the frame.
    pub transport: usize,
    /// Offset at which the IP packet ends by its own length field. Ethernet padding follows.
    pub end: usize,
    /// Whether the packet is a later fragment, which has no transport header.
    pub is_later_fragment: bool,
}

impl Headers {
    /// Whether a checksum that starts at `start` and is stored `offset` bytes further is the
    /// packet's own TCP or UDP checksum, and lies inside the packet.
    pub fn own_checksum(&self, start: usize, offset: usize) -> bool {
        let own = match self.protocol.into() {
            libc::IPPROTO_TCP => 16,
            libc::IPPROTO_UDP => 6,
            _ => return false,
        };
        start == self.transport
            && offset == own
            && start + offset + 2 <= self.end
            && !self.is_later_fragment
    }

    /// Reads Ethernet, VLAN tags and IP; nothing if they are malformed or reach beyond `frame`.
    #[inline]
    pub fn parse(frame: &[u8]) -> Option<Self> {
        const IPV4: u16 = 0x0800;
        const IPV6: u16 = 0x86dd;
        let u16_at = |at: usize| Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?));
        let mut at = 12;
        let mut ethertype = u16_at(at)?;
        for _ in 0..VLAN_TAGS {
            if VLAN.contains(&ethertype) {
                at += VLAN_TAG_LENGTH;
                ethertype = u16_at(at)?;
            }
        }
        let network = at + 2;
        let first = *frame.get(network)?;
        match (ethertype, first >> 4) {
            (IPV4, 4) if first & 0xf >= 5 => Some(Headers {
                version: 4,
                protocol: *frame.get(network + 9)?,
                network,
                transport: network + usize::from(first & 0xf) * 4,
                end: network + usize::from(u16_at(network + 2)?),
                is_later_fragment: u16_at(network + 6)? & 0x1fff != 0,
            }),
            (IPV6, 6) => {
                let (protocol, transport) = skip_extensions(frame, network)?;
                let end = network + 40 + usize::from(u16_at(network + 4)?);
                // The walk stops at a fragment header: its number is no transport protocol's.
                let is_later_fragment = false;
                Some(Headers { version: 6, protocol, network, transport, end, is_later_fragment })
            }
            _ => None,
        }
    }
}

/// Walks over IPv6 extension headers that may stand before a transport header (RFC 8200,
/// section 4.1); returns the transport protocol and where its header starts.
fn skip_extensions(frame: &[u8], network: usize) -> Option<(u8, usize)> {
    let mut next = *frame.get(network + 6)?;
    let mut at = network + 40;
    while let libc::IPPROTO_HOPOPTS | libc::IPPROTO_ROUTING | libc::IPPROTO_DSTOPTS = next.into() {
        next = *frame.get(at)?;
        at += (usize::from(*frame.get(at + 1)?) + 1) * 8;
    }
    Some((next, at))
}

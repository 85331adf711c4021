//! Where the headers of a frame lie.

use super::{VLAN_TAG_LENGTH, VLAN_TAGS};

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
}

impl Headers {
    /// Whether a checksum that starts at `start` and is stored `offset` bytes further is the own TCP or
    /// UDP checksum of the packet in `frame`, and lies inside the packet.
    pub fn own_checksum(&self, frame: &[u8], start: usize, offset: usize) -> bool {
        let own = match self.protocol.into() {
            libc::IPPROTO_TCP => 16,
            libc::IPPROTO_UDP => 6,
            _ => return false,
        };
        let (at, before) = if self.version == 4 { (2, 0) } else { (4, 40) };
        // Ethernet padding follows.
        let end = u16_at(frame, self.network + at)
            .map_or(0, |length| self.network + before + usize::from(length));
        start == self.transport && offset == own && start + offset + 2 <= end
    }

    /// Reads Ethernet, VLAN tags and IP. Returns `None` if they are malformed or reach beyond `frame`, and
    /// for a later fragment, which has no transport header. (For IPv6 the protocol is that of the fragment
    /// header then, which is no transport protocol's.)
    #[inline]
    pub fn parse(frame: &[u8]) -> Option<Self> {
        const IPV4: u16 = 0x0800;
        const IPV6: u16 = 0x86dd;
        let u16_at = |at: usize| u16_at(frame, at);
        let mut at = 12;
        let mut ethertype = u16_at(at)?;
        if ethertype != IPV4 {
            for _ in 0..VLAN_TAGS {
                if matches!(ethertype, 0x8100 | 0x88a8 | 0x9100) {
                    at += VLAN_TAG_LENGTH;
                    ethertype = u16_at(at)?;
                }
            }
        }
        let network = at + 2;
        match ethertype {
            IPV4 => {
                let header: &[u8; 20] = frame.get(network..)?.first_chunk()?;
                let offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
                // Version 4, and a header of 20 bytes or more.
                if !(0x45..=0x4f).contains(&header[0]) || offset != 0 {
                    return None;
                }
                let transport = network + usize::from(header[0] & 0xf) * 4;
                Some(Headers { version: 4, protocol: header[9], network, transport })
            }
            IPV6 if frame.get(network)? >> 4 == 6 => {
                let (protocol, transport) = skip_extensions(frame, network)?;
                Some(Headers { version: 6, protocol, network, transport })
            }
            _ => None,
        }
    }
}

#[inline]
fn u16_at(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?))
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

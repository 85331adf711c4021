//! IPv4 and IPv6 headers, and the extension headers of IPv6.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::bytes_at;
use super::protocol::{
    AUTHENTICATION, DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING, is_extension, is_option,
};

/// The header of an IPv4 packet, without its options (RFC 791).
#[derive(Debug, Clone, Copy)]
pub struct Ipv4<'a>(&'a [u8; 20]);

impl<'a> Ipv4<'a> {
    /// Reads the header that `packet` begins with. Returns `None` if the packet ends within its first 20 bytes, if the
    /// version is not 4, or if the header's length is below 20 bytes.
    #[inline]
    pub fn parse(packet: &'a [u8]) -> Option<Self> {
        let header: &[u8; 20] = packet.first_chunk()?;
        // Version 4, and a length of five words or more.
        (0x45..=0x4f).contains(&header[0]).then_some(Ipv4(header))
    }

    /// Returns the length of the header with its options: 20 to 60 bytes.
    #[inline]
    pub fn header_length(self) -> usize {
        usize::from(self.0[0] & 0xf) * 4
    }

    /// Returns the packet's length in bytes, from its header.
    #[inline]
    pub fn total_length(self) -> usize {
        usize::from(u16::from_be_bytes([self.0[2], self.0[3]]))
    }

    /// Returns the offset of this fragment in the packet, in units of eight bytes. Only the fragment at 0 has a
    /// transport header.
    #[inline]
    pub fn fragment_offset(self) -> u16 {
        u16::from_be_bytes([self.0[6], self.0[7]]) & 0x1fff
    }

    /// Returns the protocol of the next header.
    #[inline]
    pub fn protocol(self) -> u8 {
        self.0[9]
    }

    /// Returns the source address.
    #[inline]
    pub fn source(self) -> Ipv4Addr {
        let [.., a, b, c, d, _, _, _, _] = *self.0;
        Ipv4Addr::new(a, b, c, d)
    }

    /// Returns the destination address.
    #[inline]
    pub fn destination(self) -> Ipv4Addr {
        let [.., a, b, c, d] = *self.0;
        Ipv4Addr::new(a, b, c, d)
    }
}

/// The header of an IPv6 packet (RFC 8200, section 3).
#[derive(Debug, Clone, Copy)]
pub struct Ipv6<'a>(&'a [u8; Ipv6::LENGTH]);

impl<'a> Ipv6<'a> {
    /// Length of the header in bytes.
    pub const LENGTH: usize = 40;

    /// Reads the header that `packet` begins with. Returns `None` if the packet ends before the header does, or if the
    /// version is not 6.
    #[inline]
    pub fn parse(packet: &'a [u8]) -> Option<Self> {
        let header: &[u8; Ipv6::LENGTH] = packet.first_chunk()?;
        (header[0] >> 4 == 6).then_some(Ipv6(header))
    }

    /// Returns the packet's length in bytes, from its header, which is included.
    #[inline]
    pub fn total_length(self) -> usize {
        Ipv6::LENGTH + usize::from(u16::from_be_bytes([self.0[4], self.0[5]]))
    }

    /// Returns the protocol of the next header: a transport protocol, or an extension header.
    #[inline]
    pub fn next_header(self) -> u8 {
        self.0[6]
    }

    /// Returns the source address.
    #[inline]
    pub fn source(self) -> Ipv6Addr {
        self.address(8)
    }

    /// Returns the destination address.
    #[inline]
    pub fn destination(self) -> Ipv6Addr {
        self.address(24)
    }

    #[inline]
    fn address(self, at: usize) -> Ipv6Addr {
        Ipv6Addr::from(bytes_at::<16>(self.0, at).unwrap_or_default())
    }
}

/// The header behind the extension headers of an IPv6 packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upper {
    /// Protocol of the header. In a later fragment it is the protocol that the fragment header names, which may be an
    /// extension header.
    pub protocol: u8,
    /// Offset of the header, which may lie behind the packet's end. `None` in a later fragment.
    pub transport: Option<usize>,
    /// True for any fragment, the first or a later one.
    pub is_fragment: bool,
}

/// A walk over the extension headers of an IPv6 packet (RFC 8200, section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walk {
    /// True if the walk ends at an extension header behind which Linux does not segment.
    only_segmentable: bool,
    /// Highest number of extension headers in a packet; the walk of a packet with more fails.
    max_headers: usize,
}

impl Walk {
    /// Limit on the offset of a header, in bytes. The walk fails at a header at or behind it.
    pub const MAX_OFFSET: usize = 1024;

    /// Walk for segmentation, over hop-by-hop options, routing headers and destination options, as Linux's
    /// `ipv6_gso_pull_exthdrs` (net/ipv6/ip6_offload.c).
    pub const SEGMENTATION: Walk =
        Walk { only_segmentable: true, max_headers: Walk::MAX_OFFSET / 8 };

    /// Creates a walk over extension headers of all kinds, at most `max_headers`.
    pub const fn over_all(max_headers: usize) -> Walk {
        Walk { only_segmentable: false, max_headers }
    }

    #[inline(always)]
    fn has_length(self, protocol: u8) -> bool {
        match self.only_segmentable {
            true => matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION),
            false => is_option(protocol),
        }
    }

    /// Walks from the header of protocol `first` at `start`. Returns `None` if there are too many headers, if a header
    /// lies at or behind [`MAX_OFFSET`](Self::MAX_OFFSET), or if the packet ends within an extension header.
    #[inline(always)]
    pub fn walk(self, packet: &[u8], first: u8, start: usize) -> Option<Upper> {
        let (mut protocol, mut at, mut is_fragment) = (first, start, false);
        for _ in 0..self.max_headers {
            let length = match protocol {
                FRAGMENT if !self.only_segmentable => {
                    let header: [u8; 8] = bytes_at(packet, at)?;
                    is_fragment = true;
                    if u16::from_be_bytes([header[2], header[3]]) >> 3 != 0 {
                        return Some(Upper { protocol: header[0], transport: None, is_fragment });
                    }
                    8
                }
                AUTHENTICATION if !self.only_segmentable => {
                    (usize::from(*packet.get(at + 1)?) + 2) * 4
                }
                options if self.has_length(options) => (usize::from(*packet.get(at + 1)?) + 1) * 8,
                _ => return Some(Upper { protocol, transport: Some(at), is_fragment }),
            };
            protocol = *packet.get(at)?;
            at += length;
            if at >= Walk::MAX_OFFSET {
                return None;
            }
        }
        let is_last = self.only_segmentable || !is_extension(protocol);
        is_last.then_some(Upper { protocol, transport: Some(at), is_fragment })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns extension headers of the given protocols with eight bytes each; TCP follows.
    fn headers(protocols: &[u8]) -> Vec<u8> {
        let next = protocols[1..].iter().chain(&[6]);
        next.flat_map(|next| [*next, 0, 0, 0, 0, 0, 0, 0]).collect()
    }

    fn behind(walk: Walk, protocols: &[u8]) -> Option<(u8, Option<usize>)> {
        let upper = walk.walk(&headers(protocols), protocols[0], 0)?;
        Some((upper.protocol, upper.transport))
    }

    #[test]
    fn the_reader_sets_how_many_extension_headers_are_skipped() {
        let all = [0, 43, 60, 135, 139, 140];
        assert_eq!(behind(Walk::over_all(6), &all), Some((6, Some(48))));
        assert_eq!(behind(Walk::over_all(5), &all), None);
        // Linux does not segment behind a mobility header.
        assert_eq!(behind(Walk::SEGMENTATION, &all), Some((135, Some(24))));
        assert_eq!(behind(Walk::SEGMENTATION, &[0, 44]), Some((44, Some(8))));
    }

    #[test]
    fn tables_and_tests_of_numbers_agree() {
        use crate::frame::{ethertype, protocol};
        assert!((0..=u8::MAX).all(|it| is_option(it) == protocol::OPTIONS.contains(&it)));
        let tags = ethertype::VLAN_TAGS;
        assert!((0..=u16::MAX).all(|it| ethertype::is_vlan_tag(it) == tags.contains(&it)));
    }

    #[test]
    fn fragments_name_their_protocol() {
        let mut first = headers(&[44]);
        let walk = Walk::over_all(6);
        let upper = walk.walk(&first, 44, 0).unwrap();
        assert_eq!(upper, Upper { protocol: 6, transport: Some(8), is_fragment: true });
        first[3] = 8;
        let upper = walk.walk(&first, 44, 0).unwrap();
        assert_eq!(upper, Upper { protocol: 6, transport: None, is_fragment: true });
        assert_eq!(walk.walk(&first[..7], 44, 0), None);
    }

    #[test]
    fn headers_behind_the_highest_offset_are_refused() {
        let mut far = headers(&[60]);
        far[1] = 126;
        assert_eq!(Walk::over_all(6).walk(&far, 60, 0).unwrap().transport, Some(1016));
        far[1] = 127;
        assert_eq!(Walk::over_all(6).walk(&far, 60, 0), None);
        assert_eq!(Walk::SEGMENTATION.walk(&far, 60, 0), None);
    }
}

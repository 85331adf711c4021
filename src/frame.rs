//! Ethernet frames: one parser of their headers, and the numbers in these headers.
//!
//! The readers of a frame parse it to different depths. Parameters set the depth: the number of VLAN tags that
//! [`Link::parse`] skips, and the IPv6 extension headers that a [`Walk`] skips.
//!
//! | reader | VLAN tags | IPv6 extension headers |
//! |---|---|---|
//! | segmentation and checksums ([`Headers`]) | at most two: a provider's around a customer's | those behind which Linux segments ([`Walk::SEGMENTATION`]) |
//! | anti-spoofing (`policy::anti_spoofing`) | at most one, of an allowed VLAN: the next switch would act on a second | all, at most seven |
//! | packet filters (`policy::filter`) | at most two: the rest of a frame with a third is unknown | all, at most six |
//!
//! Invariant: the parser reads a private copy, which may end anywhere. It reads nothing behind the end,
//! checks each length in the frame before use, and each of its loops has a limit.

pub mod ethertype;
mod ip;
pub mod protocol;

pub use ip::{Ipv4, Ipv6, Upper, Walk};

/// Direction of a frame, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrameDirection {
    /// From the guest.
    Tx,
    /// To the guest.
    Rx,
}

/// Length in bytes of the Ethernet header without VLAN tags.
pub const ETHERNET_LENGTH: usize = 14;
/// Length in bytes of a VLAN tag.
pub const VLAN_TAG_LENGTH: usize = 4;
/// Highest number of VLAN tags that are skipped: a provider's around a customer's.
pub const MAX_VLAN_TAGS: usize = 2;
/// Length in bytes of the Ethernet header and all VLAN tags, which the MTU does not include.
pub const LINK_OVERHEAD: usize = ETHERNET_LENGTH + MAX_VLAN_TAGS * VLAN_TAG_LENGTH;
/// Longest frame in bytes: a GSO frame with the largest IP packet.
pub const MAX_FRAME: usize = 65535 + LINK_OVERHEAD;

/// Offset of the ethertype, or of the first VLAN tag.
const ETHERTYPE_AT: usize = 12;

/// Returns the `N` bytes at an offset, or `None` if `bytes` ends before.
#[inline]
pub fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// Returns the 16-bit number at an offset, in network byte order, or `None` if `bytes` ends before.
#[inline]
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_be_bytes)
}

/// Returns the bytes before `end`, or all if there are fewer. Callers pass the end of a packet: padding follows it,
/// and receivers ignore padding.
#[inline]
pub fn up_to(bytes: &[u8], end: usize) -> &[u8] {
    bytes.get(..end).unwrap_or(bytes)
}

/// Returns the first VLAN tag of a frame, if it has one: priority and VLAN identifier (IEEE 802.1Q).
#[inline]
pub fn first_vlan_tag(frame: &[u8]) -> Option<u16> {
    let tagged = ethertype::is_vlan_tag(u16_at(frame, ETHERTYPE_AT)?);
    if tagged { u16_at(frame, ETHERTYPE_AT + 2) } else { None }
}

/// The link layer of a frame: the Ethernet header, and VLAN tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Ethertype behind the skipped tags. In a frame with more tags, it is the ethertype of the next tag.
    pub ethertype: u16,
    /// Offset in the frame of the byte behind this ethertype. The packet begins there, if no tag is left.
    pub network: usize,
}

impl Link {
    /// Reads the Ethernet header, and up to `max_tags` VLAN tags. Returns `None` if the frame ends before.
    #[inline]
    pub fn parse(frame: &[u8], max_tags: usize) -> Option<Self> {
        let mut at = ETHERTYPE_AT;
        let mut ethertype = u16_at(frame, at)?;
        // Most frames are untagged IPv4.
        if ethertype != ethertype::IPV4 {
            let last = ETHERTYPE_AT + max_tags * VLAN_TAG_LENGTH;
            while at < last && ethertype::is_vlan_tag(ethertype) {
                at += VLAN_TAG_LENGTH;
                ethertype = u16_at(frame, at)?;
            }
        }
        Some(Link { ethertype, network: at + 2 })
    }
}

/// The headers of a frame, as segmentation and checksums need them.
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
    /// Reads the Ethernet header, VLAN tags and IP headers. Returns `None` if they are malformed or reach beyond
    /// `frame`, and for a later fragment of an IPv4 packet, which has no transport header.
    ///
    /// For every fragment of an IPv6 packet, `protocol` is the fragment header's, which no reader segments. The length
    /// in the IP header is not checked: each segment gets a new one.
    #[inline]
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let Link { ethertype, network } = Link::parse(frame, MAX_VLAN_TAGS)?;
        match ethertype {
            ethertype::IPV4 => {
                let header = Ipv4::parse(frame.get(network..)?)?;
                let transport = network + header.header_length();
                let headers =
                    Headers { version: 4, protocol: header.protocol(), network, transport };
                (header.fragment_offset() == 0).then_some(headers)
            }
            ethertype::IPV6 => Headers::of_ipv6(frame, network),
            _ => None,
        }
    }

    // Not inlined, so that the path of IPv4 saves no registers for it.
    #[inline(never)]
    fn of_ipv6(frame: &[u8], network: usize) -> Option<Self> {
        let header = Ipv6::parse(frame.get(network..)?)?;
        let start = network + Ipv6::LENGTH;
        let upper = Walk::SEGMENTATION.walk(frame, header.next_header(), start)?;
        let transport = upper.transport?;
        Some(Headers { version: 6, protocol: upper.protocol, network, transport })
    }

    /// Returns true if a checksum from `start`, stored `offset` bytes further, is the TCP or UDP checksum of the packet
    /// in `frame`, and lies inside the packet.
    pub fn own_checksum(&self, frame: &[u8], start: usize, offset: usize) -> bool {
        let own = match self.protocol {
            protocol::TCP => protocol::TCP_CHECKSUM,
            protocol::UDP => protocol::UDP_CHECKSUM,
            _ => return false,
        };
        let packet = frame.get(self.network..).unwrap_or_default();
        // Ethernet padding may follow the packet.
        let length = match self.version {
            4 => Ipv4::parse(packet).map(|header| header.total_length()),
            _ => Ipv6::parse(packet).map(|header| header.total_length()),
        };
        let end = length.map_or(0, |length| self.network + length);
        start == self.transport && offset == usize::from(own) && start + offset + 2 <= end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tagged(tags: &[u16]) -> Vec<u8> {
        let mut frame = vec![2; ETHERTYPE_AT];
        tags.iter().for_each(|tag| frame.extend([tag.to_be_bytes(), [0, 7]].concat()));
        frame.extend(ethertype::IPV4.to_be_bytes());
        frame
    }

    #[test]
    fn the_reader_sets_how_many_tags_are_skipped() {
        let frame = tagged(&ethertype::VLAN_TAGS);
        for (max_tags, found) in ethertype::VLAN_TAGS.into_iter().enumerate() {
            let network = ETHERNET_LENGTH + max_tags * VLAN_TAG_LENGTH;
            assert_eq!(Link::parse(&frame, max_tags), Some(Link { ethertype: found, network }));
        }
        let network = ETHERNET_LENGTH + 3 * VLAN_TAG_LENGTH;
        let link = Some(Link { ethertype: ethertype::IPV4, network });
        assert_eq!((Link::parse(&frame, 3), Link::parse(&frame, 9)), (link, link));
        for length in 0..frame.len() {
            assert_eq!(Link::parse(&frame[..length], 3), None, "{length}");
        }
    }

    #[test]
    fn only_a_whole_tag_is_the_first_one() {
        let frame = tagged(&[0x88a8]);
        assert_eq!(first_vlan_tag(&frame), Some(7));
        assert_eq!(first_vlan_tag(&frame[..15]), None);
        assert_eq!(first_vlan_tag(&tagged(&[])), None);
    }
}

//! Segmentation of a guest's GSO frames.
//!
//! The kernel segments frames from a TAP (`tcp_gso_segment`, `__udp_gso_segment`). An AF_XDP socket sends
//! frames as they are, so the daemon segments. Each segment gets the checked headers, and a partial checksum
//! like the GSO frame's.

use super::checksum;
use crate::frame::{Headers, Ipv6, protocol};
use crate::vnet_header::{MAX_HEADERS, VnetHeader};

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Plan for the segmentation of one GSO frame.
#[derive(Debug, Clone, Copy)]
pub struct Segmentation {
    /// Offset of the IP header in bytes.
    network: usize,
    /// Offset of the TCP or UDP header in bytes.
    transport: usize,
    /// Bytes before the payload.
    headers: usize,
    /// Offset of the checksum in the transport header in bytes.
    checksum: usize,
    ipv4: bool,
    tcp: bool,
    /// Payload bytes of each segment but the last (`gso_size`).
    size: usize,
    /// Payload bytes of the GSO frame.
    payload: usize,
}

impl Segmentation {
    /// Plans the segmentation of a frame of `length` bytes with a checked virtio-net header. `start` holds
    /// the frame's headers. Returns `None` if the frame is not a GSO frame.
    pub fn of(header: &VnetHeader, start: &[u8], length: usize) -> Option<Self> {
        if !header.needs_segmentation() {
            return None;
        }
        let Headers { version, protocol, network, transport } = Headers::parse(start)?;
        let headers = header.hdr_len.into();
        Some(Segmentation {
            network,
            transport,
            headers,
            checksum: header.csum_offset.into(),
            ipv4: version == 4,
            tcp: protocol == protocol::TCP,
            size: header.gso_size.into(),
            payload: length.checked_sub(headers)?,
        })
    }

    /// Returns the length in bytes of the longest segment, with its headers.
    pub fn longest(&self) -> usize {
        self.headers + self.size.min(self.payload)
    }

    /// Returns the number of bytes before each segment's payload.
    pub fn headers(&self) -> usize {
        self.headers
    }

    /// Returns the payload bytes of the segment at payload `offset`.
    pub fn payload_at(&self, offset: usize) -> usize {
        self.size.min(self.payload - offset)
    }

    /// Returns true if the segment at payload `offset` is the last.
    pub fn is_last(&self, offset: usize) -> bool {
        self.payload - offset <= self.size
    }

    /// Builds the headers of the segment at payload `offset` from those of the GSO frame. The transport
    /// checksum is the sum of the pseudo-header.
    ///
    /// # Panics
    /// If `whole` is shorter than the headers.
    pub fn headers_at(&self, whole: &[u8], offset: usize) -> [u8; MAX_HEADERS] {
        let mut bytes = [0; MAX_HEADERS];
        bytes[..self.headers].copy_from_slice(&whole[..self.headers]);
        let network = &mut bytes[self.network..self.headers];
        let length = (network.len() + self.payload_at(offset)) as u16;
        if self.ipv4 {
            network[2..4].copy_from_slice(&length.to_be_bytes());
            let index = (offset / self.size) as u16;
            let identification = u16::from_be_bytes([network[4], network[5]]).wrapping_add(index);
            network[4..6].copy_from_slice(&identification.to_be_bytes());
            network[10..12].fill(0);
            checksum::complete(&mut network[..self.transport - self.network], 0, 10);
        } else {
            network[4..6].copy_from_slice(&(length - Ipv6::LENGTH as u16).to_be_bytes());
        }
        let transport = &mut bytes[self.transport..self.headers];
        let lengths = [self.payload, self.payload_at(offset)].map(|it| transport.len() + it);
        checksum::replace(&mut transport[self.checksum..], lengths[0] as u16, lengths[1] as u16);
        if self.tcp {
            let number = u32::from_be_bytes(transport[4..8].try_into().unwrap_or_default());
            transport[4..8].copy_from_slice(&number.wrapping_add(offset as u32).to_be_bytes());
            if offset > 0 {
                transport[13] &= !TCP_CWR;
            }
            if !self.is_last(offset) {
                transport[13] &= !(TCP_FIN | TCP_PSH);
            }
        } else {
            transport[4..6].copy_from_slice(&(lengths[1] as u16).to_be_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::af_xdp::checksum::sum_of;

    const MSS: usize = 300;
    const PAYLOAD: usize = 1000;
    const GSO_TCPV4: u8 = 1;
    const GSO_UDP_L4: u8 = 5;

    /// Returns a frame's headers, with `tag` before the ethertype, and its virtio-net header.
    fn frame(ip: &[u8], transport: &[u8], tag: &[u8], gso_type: u8) -> (Vec<u8>, VnetHeader) {
        let mut bytes = vec![2; 12];
        bytes.extend(tag);
        bytes.extend(if ip[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] });
        bytes.extend(ip);
        let csum_start = bytes.len() as u16;
        bytes.extend(transport);
        let header = VnetHeader {
            flags: 1,
            gso_type,
            hdr_len: bytes.len() as u16,
            gso_size: MSS as u16,
            csum_start,
            csum_offset: if gso_type == GSO_UDP_L4 { 6 } else { 16 },
        };
        // A guest's partial checksum: the sum of the GSO frame's pseudo-header.
        let addresses = if ip[0] >> 4 == 4 { &ip[12..20] } else { &ip[8..40] };
        let protocol = if gso_type == GSO_UDP_L4 { 17 } else { 6 };
        let length = (transport.len() + PAYLOAD) as u16;
        let sum = sum_of(&[addresses, &[0, protocol], &length.to_be_bytes()]);
        let at = usize::from(csum_start + header.csum_offset);
        bytes[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
        (bytes, header)
    }

    /// Segments the frame, and completes each segment's checksum.
    fn segment(headers: &[u8], header: &VnetHeader) -> Vec<Vec<u8>> {
        let how = Segmentation::of(header, headers, headers.len() + PAYLOAD).unwrap();
        let payload: Vec<u8> = (0..PAYLOAD).map(|at| (at * 7) as u8).collect();
        let mut segments = Vec::new();
        let mut offset = 0;
        loop {
            let mut bytes = how.headers_at(headers, offset)[..how.headers()].to_vec();
            bytes.extend(&payload[offset..offset + how.payload_at(offset)]);
            assert!(bytes.len() <= how.longest());
            let (start, place) = (header.csum_start.into(), header.csum_offset.into());
            checksum::complete(&mut bytes, start, place);
            segments.push(bytes);
            if how.is_last(offset) {
                break;
            }
            offset += how.payload_at(offset);
        }
        let together: Vec<u8> =
            segments.iter().flat_map(|bytes| bytes[how.headers()..].to_vec()).collect();
        assert_eq!(together, payload);
        segments
    }

    fn ipv4(protocol: u8) -> [u8; 20] {
        let mut ip = [0; 20];
        ip[0] = 0x45;
        ip[4..6].copy_from_slice(&0xfffe_u16.to_be_bytes());
        ip[8..10].copy_from_slice(&[64, protocol]);
        ip[12..20].copy_from_slice(&[198, 18, 0, 1, 198, 18, 0, 2]);
        ip
    }

    #[test]
    fn tcp_segments_have_own_headers_and_valid_checksums() {
        let mut tcp = [0; 32];
        tcp[4..8].copy_from_slice(&0xffff_ff00_u32.to_be_bytes());
        tcp[12] = 0x80;
        tcp[13] = TCP_CWR | TCP_PSH | TCP_FIN | 0x10;
        let (headers, header) = frame(&ipv4(6), &tcp, &[0x81, 0, 0, 7], GSO_TCPV4);
        let segments = segment(&headers, &header);
        assert_eq!(segments.len(), 4);
        for (index, segment) in segments.iter().enumerate() {
            let (ip, tcp) = (&segment[18..38], &segment[38..]);
            assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), segment.len() - 18);
            assert_eq!(u16::from_be_bytes([ip[4], ip[5]]), 0xfffe_u16.wrapping_add(index as u16));
            assert_eq!(sum_of(&[ip]), 0xffff);
            let number = u32::from_be_bytes(tcp[4..8].try_into().unwrap());
            assert_eq!(number, 0xffff_ff00_u32.wrapping_add((index * MSS) as u32));
            let (first, last) = (index == 0, index == 3);
            let cwr = if first { TCP_CWR } else { 0 };
            assert_eq!(tcp[13], cwr | 0x10 | if last { TCP_PSH | TCP_FIN } else { 0 });
            let length = (tcp.len() as u16).to_be_bytes();
            assert_eq!(sum_of(&[&ip[12..20], &[0, 6], &length, tcp]), 0xffff, "{index}");
        }
    }

    #[test]
    fn udp_segments_over_ipv6_have_own_lengths() {
        let mut ip = [0; 40];
        ip[0] = 0x60;
        ip[6] = 17;
        ip[8..].fill(0x20);
        let (headers, header) = frame(&ip, &[0; 8], &[], GSO_UDP_L4);
        for frame in segment(&headers, &header) {
            let (ip, udp) = (&frame[14..54], &frame[54..]);
            let length = (udp.len() as u16).to_be_bytes();
            assert_eq!((&ip[4..6], &udp[4..6]), (&length[..], &length[..]));
            assert_eq!(sum_of(&[&ip[8..40], &[0, 17], &length, udp]), 0xffff);
        }
    }
}

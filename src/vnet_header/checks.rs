//! Checks of a copied virtio-net header against its frame and the negotiated features.
//!
//! Invariant: the header that a check returns has only fields that were checked or that follow from the frame. All
//! other fields are zero.

use super::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader};
use crate::counters::DropReason;
use crate::features::Offloads;
use crate::frame::protocol::{TCP, TCP_CHECKSUM, UDP, UDP_CHECKSUM};
use crate::frame::{ETHERNET_LENGTH, Headers};

/// Smallest payload of a segment in bytes, as Linux's `TCP_MIN_GSO_SIZE`. Segments of one byte would turn one frame
/// into 65,000 packets.
const MIN_SEGMENT: u16 = 8;
/// Value of `gso_size` that Linux uses internally for `GSO_BY_FRAGS`.
const GSO_BY_FRAGS: u16 = 0xffff;
/// Highest number of segments of a UDP frame, as Linux's `UDP_MAX_SEGMENTS`.
const MAX_UDP_SEGMENTS: usize = 128;

/// Checks the header of a frame that is no GSO frame. Returns the header to send.
///
/// # Errors
/// The frame has a partial checksum that was not negotiated, or lies at a wrong place.
#[inline]
pub(super) fn check_plain(
    header: &VnetHeader,
    frame_length: usize,
    offloads: &Offloads,
) -> Result<VnetHeader, DropReason> {
    // Only a device may set other flags. Without NEEDS_CSUM no other field has a meaning.
    let none = VnetHeader::default();
    if !header.needs_checksum() {
        return Ok(none);
    }
    check_checksum(header, frame_length, offloads)?;
    let VnetHeader { csum_start, csum_offset, .. } = *header;
    Ok(VnetHeader { flags: NEEDS_CSUM, csum_start, csum_offset, ..none })
}

#[inline]
fn check_checksum(
    header: &VnetHeader,
    frame_length: usize,
    offloads: &Offloads,
) -> Result<(), DropReason> {
    let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    let sound = offloads.checksum
        && start >= ETHERNET_LENGTH
        && start.is_multiple_of(2)
        && offset.is_multiple_of(2)
        && start + offset + 2 <= frame_length
        && usize::from(header.hdr_len) <= frame_length;
    if sound { Ok(()) } else { Err(DropReason::BadHeader) }
}

/// Checks the header of a GSO frame; `copy` is the frame's start. Returns the header to send.
///
/// # Errors
/// The header contradicts the frame, the negotiated features or Linux's limits, or `copy` does not hold all headers.
#[inline(never)]
pub(super) fn check_segmented(
    header: &VnetHeader,
    copy: &[u8],
    frame_length: usize,
    offloads: &Offloads,
) -> Result<VnetHeader, DropReason> {
    if !header.needs_checksum()
        || !header.accepted_by(offloads)
        || header.gso_size < MIN_SEGMENT
        || header.gso_size == GSO_BY_FRAGS
    {
        return Err(DropReason::BadHeader);
    }
    // The code below checks the checksum's place: the headers determine it.
    if !offloads.checksum || usize::from(header.hdr_len) > frame_length {
        return Err(DropReason::BadHeader);
    }
    let headers = Headers::parse(copy).ok_or(DropReason::BadHeader)?;
    let transport = headers.transport;
    let (protocol, checksum_at, version) = match header.gso_type {
        GSO_UDP_L4 => (UDP, UDP_CHECKSUM, None),
        other => match other & !GSO_ECN {
            GSO_TCPV4 => (TCP, TCP_CHECKSUM, Some(4)),
            GSO_TCPV6 => (TCP, TCP_CHECKSUM, Some(6)),
            _ => return Err(DropReason::BadHeader),
        },
    };
    if version.is_some_and(|version| version != headers.version)
        || headers.protocol != protocol
        || usize::from(header.csum_start) != transport
        || header.csum_offset != checksum_at
    {
        return Err(DropReason::BadHeader);
    }
    let tcp = protocol == TCP;
    let transport_length = if tcp {
        let length = usize::from(copy.get(transport + 12).ok_or(DropReason::BadHeader)? >> 4) * 4;
        if length < 20 {
            return Err(DropReason::BadHeader);
        }
        length
    } else {
        8
    };
    let header_end = transport + transport_length;
    // All headers must be in the copy: the guest could change the others after the check.
    if header_end > copy.len() {
        return Err(DropReason::BadHeader);
    }
    let payload = frame_length - header_end;
    if !tcp && payload > MAX_UDP_SEGMENTS * usize::from(header.gso_size) {
        return Err(DropReason::BadHeader);
    }
    Ok(VnetHeader {
        flags: NEEDS_CSUM,
        gso_type: header.gso_type,
        hdr_len: header_end as u16,
        gso_size: header.gso_size,
        csum_start: header.csum_start,
        csum_offset: header.csum_offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads =
        Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true, udp4: true, udp6: true };

    fn tcp4() -> (VnetHeader, Vec<u8>) {
        let mut frame = vec![0; 142];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[23] = 6;
        frame[46] = 0x80;
        let header = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 66,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
        };
        (header, frame)
    }

    fn check(header: VnetHeader, frame: &[u8]) -> Result<VnetHeader, DropReason> {
        check_segmented(&header, frame, 64_000, &ALL)
    }

    #[test]
    fn a_tcp_frame_passes_with_its_header_length_recalculated() {
        let (header, frame) = tcp4();
        let wrong = VnetHeader { hdr_len: 0, ..header };
        assert_eq!(check(wrong, &frame), Ok(header));
    }

    #[test]
    fn every_field_that_contradicts_the_frame_is_refused() {
        let (good, frame) = tcp4();
        let wrong = [
            VnetHeader { gso_size: 0, ..good },
            VnetHeader { gso_size: 1, ..good },
            VnetHeader { gso_size: 65535, ..good },
            VnetHeader { hdr_len: 64_001, ..good },
            VnetHeader { flags: 0, ..good },
            VnetHeader { gso_type: GSO_TCPV6, ..good },
            VnetHeader { gso_type: GSO_UDP_L4, ..good },
            VnetHeader { gso_type: 2, ..good },
            VnetHeader { gso_type: 3, ..good },
            VnetHeader { gso_type: 0x41, ..good },
            VnetHeader { gso_type: GSO_ECN, ..good },
            VnetHeader { csum_start: 33, ..good },
            VnetHeader { csum_start: 12, ..good },
            VnetHeader { csum_start: 36, ..good },
            VnetHeader { csum_offset: 6, ..good },
            VnetHeader { csum_offset: 65534, ..good },
        ];
        for header in wrong {
            assert_eq!(check(header, &frame), Err(DropReason::BadHeader), "{header:?}");
        }
    }

    #[test]
    fn malformed_ip_and_tcp_headers_are_refused() {
        for (at, value) in [(12, 9), (14, 0x44), (14, 0x65), (23, 17), (46, 0x40)] {
            let (header, mut frame) = tcp4();
            frame[at] = value;
            assert_eq!(check(header, &frame), Err(DropReason::BadHeader), "byte {at} = {value:#x}");
        }
        let (header, frame) = tcp4();
        assert_eq!(check(header, &frame[..60]), Err(DropReason::BadHeader));
    }

    #[test]
    fn vlan_tags_move_the_headers() {
        let (header, mut frame) = tcp4();
        frame.splice(12..12, [0x81, 0, 0, 7]);
        assert_eq!(check(header, &frame), Err(DropReason::BadHeader));
        let moved = VnetHeader { csum_start: 38, ..header };
        assert!(check(moved, &frame).is_ok());
    }

    #[test]
    fn ipv6_extension_headers_are_walked() {
        let mut frame = vec![0; 142];
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14] = 0x60;
        frame[20] = 0;
        frame[54] = 6;
        frame[55] = 1;
        frame[70 + 12] = 0x50;
        let (header, _) = tcp4();
        let header = VnetHeader { gso_type: GSO_TCPV6, csum_start: 70, ..header };
        assert_eq!(check(header, &frame).unwrap().hdr_len, 90);
        frame[55] = 255;
        assert_eq!(check(header, &frame), Err(DropReason::BadHeader));
    }

    #[test]
    fn a_udp_frame_has_at_most_128_segments() {
        let (header, mut frame) = tcp4();
        frame[23] = 17;
        let header = VnetHeader { gso_type: GSO_UDP_L4, csum_offset: 6, gso_size: 512, ..header };
        assert!(check(header, &frame).is_ok());
        assert_eq!(
            check(VnetHeader { gso_size: 256, ..header }, &frame),
            Err(DropReason::BadHeader)
        );
    }

    #[test]
    fn fields_that_a_driver_may_not_set_are_cleared() {
        let noise = VnetHeader {
            flags: 0xfe,
            hdr_len: 9,
            gso_size: 9,
            csum_start: 9,
            ..VnetHeader::default()
        };
        assert_eq!(check_plain(&noise, 60, &ALL), Ok(VnetHeader::default()));
    }

    #[test]
    fn checksums_must_lie_inside_the_frame_and_be_negotiated() {
        let header = VnetHeader {
            flags: NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 16,
            ..VnetHeader::default()
        };
        assert_eq!(check_plain(&header, 60, &ALL), Ok(header));
        assert_eq!(check_plain(&header, 51, &ALL), Err(DropReason::BadHeader));
        assert_eq!(check_plain(&header, 60, &Offloads::default()), Err(DropReason::BadHeader));
    }

    #[test]
    fn own_checksum_is_that_of_the_transport_header() {
        let (_, mut frame) = tcp4();
        frame[16..18].copy_from_slice(&128_u16.to_be_bytes());
        let own = |frame: &[u8], start, offset| {
            Headers::parse(frame).is_some_and(|headers| headers.own_checksum(frame, start, offset))
        };
        assert!(own(&frame, 34, 16));
        for (start, offset) in [(34, 6), (34, 0), (20, 8), (14, 0), (32, 18), (36, 14)] {
            assert!(!own(&frame, start, offset), "{start} {offset}");
        }
        for (at, bytes) in [(20, [0, 1]), (16, [0, 37]), (22, [0, 1])] {
            let mut other = frame.clone();
            other[at..at + 2].copy_from_slice(&bytes);
            assert!(!own(&other, 34, 16), "byte {at}");
        }
        frame[23] = 17;
        assert!(own(&frame, 34, 6) && !own(&frame, 34, 16));
        frame.splice(12..12, [0x91, 0, 0, 7]);
        assert!(own(&frame, 38, 6) && !own(&frame, 34, 6));
    }
}

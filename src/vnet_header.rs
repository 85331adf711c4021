//! `virtio_net_hdr` as a value: read once, checked, written (virtio 1.3, section 5.1.6).
//!
//! Invariant: no header that the guest wrote reaches the host. [`admit`] copies it, checks the
//! copy against the frame and the negotiated features, and what is sent begins with the copy. For
//! a frame to be segmented the copy goes on through the TCP or UDP header, so that the very
//! headers that were checked are the ones the kernel segments by; so it does where the operator has
//! [`Rules`] or a filter for what the guest may send. The guest can rewrite its memory meanwhile and
//! change nothing but its payload.

mod headers;

use std::ops::{AddAssign, Range};
use std::sync::Arc;

use crate::counters::Drop;
use crate::features::{HEADER_LENGTH, Negotiated, Offloads};
use crate::guest::{Chain, Readable, Segment};
use crate::policy::{FilterView, Rules};

pub use headers::Headers;

const NEEDS_CSUM: u8 = 1;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// Length in bytes of a frame's header without VLAN tags.
pub const ETHERNET_LENGTH: usize = 14;
const VLAN_TAG_LENGTH: usize = 4;
/// Tags of one frame at the most: a provider's around a customer's.
const VLAN_TAGS: usize = 2;
/// Ethernet header and VLAN tags: what a frame has on top of its MTU.
pub const LINK_OVERHEAD: usize = ETHERNET_LENGTH + VLAN_TAGS * VLAN_TAG_LENGTH;
/// Longest frame of all, in bytes: the largest IP packet, which only exists unsegmented.
pub const MAX_FRAME: usize = 65535 + LINK_OVERHEAD;

/// Smallest segment that TCP or UDP may be cut into: Linux's TCP_MIN_GSO_SIZE. One byte a segment
/// would make 65,000 packets of one frame.
const MIN_SEGMENT: u16 = 8;
/// `GSO_BY_FRAGS`, which has a meaning of its own inside Linux.
const GSO_BY_FRAGS: u16 = 0xffff;
/// Linux's UDP_MAX_SEGMENTS.
const MAX_UDP_SEGMENTS: usize = 128;

/// Longest headers in bytes of a frame to be segmented: IPv4 and TCP, each with all options, behind
/// two VLAN tags. [`admit`] copies as much.
pub const MAX_HEADERS: usize = LINK_OVERHEAD + 60 + 60;

/// Start of a frame in memory of our own: what [`admit`] has checked.
#[derive(Debug, Clone)]
pub struct PrivateStart {
    bytes: [u8; HEADER_LENGTH + MAX_HEADERS],
    length: usize,
}

impl Default for PrivateStart {
    fn default() -> Self {
        PrivateStart { bytes: [0; HEADER_LENGTH + MAX_HEADERS], length: 0 }
    }
}

impl PrivateStart {
    /// The checked bytes, virtio header first: they replace as many at the chain's start.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Whether the frame is to be segmented.
    #[inline]
    pub fn is_segmented(&self) -> bool {
        self.bytes[1] != GSO_NONE
    }

    /// Whether the host has to complete a checksum.
    #[inline]
    pub fn needs_checksum(&self) -> bool {
        self.bytes[0] & NEEDS_CSUM != 0
    }

    /// What the frame of `length` bytes is on the wire beyond itself.
    #[inline]
    pub fn surplus(&self, length: usize) -> Surplus {
        let header = self.header();
        Surplus::of(&header, header.hdr_len.into(), length)
    }

    /// Puts the virtio header there, of which the guest has so many bytes.
    #[inline]
    fn set_header(&mut self, header: VnetHeader, length: usize) {
        let bytes = header.to_bytes();
        match length {
            HEADER_LENGTH => self.bytes[..HEADER_LENGTH].copy_from_slice(&bytes),
            shorter => self.bytes[..shorter].copy_from_slice(&bytes[..shorter]),
        }
    }

    /// The virtio header.
    #[inline]
    pub fn header(&self) -> VnetHeader {
        VnetHeader::parse(self.bytes.first_chunk().expect("a header has 10 bytes"))
    }
}

/// The header's fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Length of the headers in bytes: a hint.
    pub hdr_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where checksumming starts, counted from the start of the frame.
    pub csum_start: u16,
    /// Where the checksum goes, counted from `csum_start`.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// Offset of `num_buffers`, which headers to the guest have.
    pub const NUM_BUFFERS: usize = 10;

    /// Reads the fields from the first ten bytes.
    #[inline]
    pub fn parse(bytes: &[u8; 10]) -> Self {
        let [first @ .., low, high] = *bytes;
        let word = u64::from_le_bytes(first);
        VnetHeader {
            flags: word as u8,
            gso_type: (word >> 8) as u8,
            hdr_len: (word >> 16) as u16,
            gso_size: (word >> 32) as u16,
            csum_start: (word >> 48) as u16,
            csum_offset: u16::from_le_bytes([low, high]),
        }
    }

    /// The header as it goes before a frame; `num_buffers` is 0, as a driver must send it.
    #[inline]
    pub fn to_bytes(self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        let word = u64::from(self.flags)
            | u64::from(self.gso_type) << 8
            | u64::from(self.hdr_len) << 16
            | u64::from(self.gso_size) << 32
            | u64::from(self.csum_start) << 48;
        bytes[..8].copy_from_slice(&word.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
        bytes
    }

    /// Whether a header that begins with these bytes asks neither for a checksum nor for segmentation.
    #[inline]
    fn asks_for_nothing(bytes: u16) -> bool {
        const FLAGS_AND_TYPE: u16 = u16::from_le_bytes([NEEDS_CSUM, 0xff]);
        bytes & FLAGS_AND_TYPE == 0
    }

    /// Whether the reader has to complete a checksum.
    pub fn needs_checksum(&self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }

    /// Whether the frame is to be segmented.
    pub fn is_segmented(&self) -> bool {
        self.gso_type != GSO_NONE
    }

    /// Whether a frame with this header may be given to someone who accepts `offloads`.
    #[inline]
    pub fn accepted_by(&self, offloads: &Offloads) -> bool {
        let segmentation = match self.gso_type & !GSO_ECN {
            GSO_NONE => true,
            GSO_TCPV4 => offloads.tcp4,
            GSO_TCPV6 => offloads.tcp6,
            GSO_UDP_L4 => offloads.udp4 || offloads.udp6,
            _ => false,
        };
        segmentation
            && (self.gso_type & GSO_ECN == 0 || offloads.ecn)
            && (!self.needs_checksum() || offloads.checksum)
    }
}

/// What goes over the wire on top of frames themselves: each is sent in segments, which all have
/// headers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Surplus {
    /// Segments, but for the first of each frame.
    pub packets: u64,
    /// Bytes of their headers.
    pub bytes: u64,
}

impl Surplus {
    /// That of a frame of `length` bytes with `header`, whose own headers take `headers` bytes.
    #[inline]
    pub fn of(header: &VnetHeader, headers: usize, length: usize) -> Self {
        if !header.is_segmented() {
            return Surplus::default();
        }
        let payload = length.saturating_sub(headers);
        let packets = payload.div_ceil(usize::from(header.gso_size.max(1))).saturating_sub(1);
        Surplus { packets: packets as u64, bytes: (packets * headers) as u64 }
    }
}

impl AddAssign for Surplus {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// What a frame from the guest may be.
#[derive(Debug, Clone)]
pub struct Admission {
    /// Length in bytes of the header that was negotiated.
    pub header_length: usize,
    /// What the guest may leave to the host.
    pub offloads: Offloads,
    /// Longest frame in bytes that is not to be segmented: MTU and [`LINK_OVERHEAD`].
    pub max_frame: usize,
    /// What else it must comply with.
    pub rules: Option<Arc<Rules>>,
    /// And what the operator denies.
    pub filter: FilterView,
    /// Whether frames that fit a [`PrivateStart`] are copied whole: where a second piece costs more.
    pub copies_small: bool,
    /// Bytes of chains whose frames are sent without a further look if they ask for nothing.
    plain: Range<usize>,
    /// The same of those that are copied whole.
    small: Range<usize>,
    /// Both.
    unseen: Range<usize>,
}

/// How a frame was admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admitted {
    /// It asks for nothing: it is sent behind [`PLAIN_HEADER`], and nothing of it was copied.
    Plain,
    /// It begins with what was copied.
    Copied,
}

/// Bytes of a chain at the most whose frame is copied whole, where that is done.
const SMALL: usize = HEADER_LENGTH + MAX_HEADERS;

/// Before each frame that asks for nothing.
pub const PLAIN_HEADER: [u8; HEADER_LENGTH] = [0; HEADER_LENGTH];

impl Admission {
    /// By the negotiated features, and what an operator has set.
    pub fn new(
        negotiated: &Negotiated,
        max_frame: usize,
        rules: Option<Arc<Rules>>,
        filter: FilterView,
    ) -> Self {
        Admission {
            header_length: negotiated.header_length(),
            offloads: negotiated.host(),
            max_frame,
            rules,
            filter,
            copies_small: false,
            plain: 0..0,
            small: 0..0,
            unseen: 0..0,
        }
    }

    /// Prepares for a burst. Headers are copied if somebody else `peeks`.
    pub fn begin_burst(&mut self, peeks: bool) {
        self.filter.refresh();
        self.unseen = match self.judges() || peeks {
            true => 0..0,
            false => self.header_length + ETHERNET_LENGTH..self.header_length + self.max_frame + 1,
        };
        let Range { start, end } = self.unseen;
        let copied = if self.copies_small { SMALL + 1 } else { start };
        self.small = start..copied.min(end);
        self.plain = copied.max(start)..end;
    }

    /// Whether the frame in `chain` is sent without a further look at it.
    #[inline(always)]
    pub fn is_plain(&self, chain: &Segment<'_>) -> bool {
        // Read once: nothing else of the header counts.
        self.plain.contains(&chain.len())
            && chain.first_u16().is_some_and(VnetHeader::asks_for_nothing)
    }

    /// The same for a frame that is copied whole.
    #[inline(always)]
    fn is_small(&self, chain: &Segment<'_>) -> bool {
        self.small.contains(&chain.len())
            && chain.first_u16().is_some_and(VnetHeader::asks_for_nothing)
    }

    /// Whether frames are judged by their headers, which must be sent as they were then.
    #[inline]
    pub fn judges(&self) -> bool {
        self.rules.is_some() || self.filter.current().is_some()
    }

    /// Judges a frame by its virtio header and the start of the frame.
    #[inline(never)]
    fn judge(&self, header: &VnetHeader, headers: &[u8]) -> Result<(), Drop> {
        // The host writes the checksum after the judgement: it must write over nothing that counts.
        // check_segmented() has already seen to that for a frame to be segmented, of which the
        // segments' own lengths count.
        if header.needs_checksum() && !header.is_segmented() {
            let parsed = Headers::parse(headers).ok_or(Drop::BadHeader)?;
            let (start, offset) = (header.csum_start.into(), header.csum_offset.into());
            if !parsed.own_checksum(headers, start, offset) {
                return Err(Drop::BadHeader);
            }
        }
        if let Some(rules) = &self.rules {
            rules.check(headers)?;
        }
        self.filter.current().map_or(Ok(()), |filter| filter.judge(headers))
    }
}

/// Checks a frame from the guest. Unless it is plain, what is to be sent in place of its start is in `start`.
///
/// # Errors
/// Why the frame must be dropped. Behind its virtio header `start` has what was judged then, unless the
/// frame is too short or too long.
#[inline(always)]
pub fn admit(
    chain: &Chain<'_, '_, Readable>,
    admission: &Admission,
    start: &mut PrivateStart,
) -> Result<Admitted, Drop> {
    if let Some(only) = chain.only_piece() {
        if admission.is_plain(&only) {
            return Ok(Admitted::Plain);
        }
        if admission.is_small(&only) {
            start.length = only.copy_to(&mut start.bytes);
            start.set_header(VnetHeader::default(), admission.header_length);
            return Ok(Admitted::Copied);
        }
    }
    admit_copied(chain, admission, start).map(|()| Admitted::Copied)
}

/// The same for a frame that may not be plain, whose start is copied in any case.
///
/// # Errors
/// As for [`admit`].
#[inline(never)]
pub fn admit_copied(
    chain: &Chain<'_, '_, Readable>,
    admission: &Admission,
    start: &mut PrivateStart,
) -> Result<(), Drop> {
    let header_length = admission.header_length;
    // Nearly always it lies in one piece, nobody looks at it, and it is not to be segmented.
    if let Some(only) = chain.only_piece().filter(|only| admission.unseen.contains(&only.len()))
        && only.first_u16().is_some_and(|bytes| bytes >> 8 == u16::from(GSO_NONE))
        && let Some(header) = only.first_bytes().map(|bytes| VnetHeader::parse(&bytes))
        && !header.is_segmented()
    {
        // This copy of the header counts, and no other.
        let checked = check_plain(&header, only.len() - header_length, &admission.offloads)?;
        start.length = match admission.small.contains(&only.len()) {
            true => only.copy_to(&mut start.bytes),
            false => header_length,
        };
        start.set_header(checked, header_length);
        return Ok(());
    }
    admit_any(chain, admission, start)
}

/// The same for a frame of any kind, of which as much is copied as is looked at.
#[inline(never)]
fn admit_any(
    chain: &Chain<'_, '_, Readable>,
    admission: &Admission,
    start: &mut PrivateStart,
) -> Result<(), Drop> {
    let header_length = admission.header_length;
    let Some(frame_length) = chain.len().checked_sub(header_length) else {
        return Err(Drop::TooShort);
    };
    if frame_length < ETHERNET_LENGTH {
        return Err(Drop::TooShort);
    }
    // Read once: only this copy counts.
    start.length = chain.read_start(&mut start.bytes);
    let header = start.header();
    let checked = if !header.is_segmented() {
        if frame_length > admission.max_frame {
            return Err(Drop::TooLong);
        }
        check_plain(&header, frame_length, &admission.offloads)?
    } else {
        if frame_length > MAX_FRAME {
            return Err(Drop::TooLong);
        }
        let frame = &start.bytes[header_length..start.length];
        check_segmented(&header, frame, frame_length, &admission.offloads)?
    };
    start.set_header(checked, header_length);
    if admission.judges() {
        admission.judge(&start.header(), &start.bytes[header_length..start.length])?;
    }
    Ok(())
}

/// The header of a frame that is sent as it is, maybe with its checksum completed.
#[inline]
fn check_plain(
    header: &VnetHeader,
    frame_length: usize,
    offloads: &Offloads,
) -> Result<VnetHeader, Drop> {
    // Flags that only a device may set mean nothing here; nor do the other fields.
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
) -> Result<(), Drop> {
    let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    let sound = offloads.checksum
        && start >= ETHERNET_LENGTH
        && start.is_multiple_of(2)
        && offset.is_multiple_of(2)
        && start + offset + 2 <= frame_length
        && usize::from(header.hdr_len) <= frame_length;
    if sound { Ok(()) } else { Err(Drop::BadHeader) }
}

/// A frame that the host is to segment: `copy` is its start.
#[inline(never)]
fn check_segmented(
    header: &VnetHeader,
    copy: &[u8],
    frame_length: usize,
    offloads: &Offloads,
) -> Result<VnetHeader, Drop> {
    if !header.needs_checksum()
        || !header.accepted_by(offloads)
        || header.gso_size < MIN_SEGMENT
        || header.gso_size == GSO_BY_FRAGS
    {
        return Err(Drop::BadHeader);
    }
    // Where the checksum lies follows from the headers, as is checked below.
    if !offloads.checksum || usize::from(header.hdr_len) > frame_length {
        return Err(Drop::BadHeader);
    }
    let headers = Headers::parse(copy).ok_or(Drop::BadHeader)?;
    let transport = headers.transport;
    let (protocol, checksum_at, version) = match header.gso_type {
        GSO_UDP_L4 => (libc::IPPROTO_UDP, 6, None),
        other => match other & !GSO_ECN {
            GSO_TCPV4 => (libc::IPPROTO_TCP, 16, Some(4)),
            GSO_TCPV6 => (libc::IPPROTO_TCP, 16, Some(6)),
            _ => return Err(Drop::BadHeader),
        },
    };
    if version.is_some_and(|version| version != headers.version)
        || i32::from(headers.protocol) != protocol
        || usize::from(header.csum_start) != transport
        || header.csum_offset != checksum_at
    {
        return Err(Drop::BadHeader);
    }
    let tcp = protocol == libc::IPPROTO_TCP;
    let transport_length = if tcp {
        let length = usize::from(copy.get(transport + 12).ok_or(Drop::BadHeader)? >> 4) * 4;
        if length < 20 {
            return Err(Drop::BadHeader);
        }
        length
    } else {
        8
    };
    let header_end = transport + transport_length;
    // All of the headers must be in the copy, or the guest could still change them.
    if header_end > copy.len() {
        return Err(Drop::BadHeader);
    }
    let payload = frame_length - header_end;
    if !tcp && payload > MAX_UDP_SEGMENTS * usize::from(header.gso_size) {
        return Err(Drop::BadHeader);
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

    fn check(header: VnetHeader, frame: &[u8]) -> Result<VnetHeader, Drop> {
        check_segmented(&header, frame, 64_000, &ALL)
    }

    #[test]
    fn a_tcp_frame_is_admitted_with_its_header_length_recalculated() {
        let (header, frame) = tcp4();
        let lie = VnetHeader { hdr_len: 0, ..header };
        assert_eq!(check(lie, &frame), Ok(header));
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
            assert_eq!(check(header, &frame), Err(Drop::BadHeader), "{header:?}");
        }
    }

    #[test]
    fn malformed_ip_and_tcp_headers_are_refused() {
        for (at, value) in [(12, 9), (14, 0x44), (14, 0x65), (23, 17), (46, 0x40)] {
            let (header, mut frame) = tcp4();
            frame[at] = value;
            assert_eq!(check(header, &frame), Err(Drop::BadHeader), "byte {at} = {value:#x}");
        }
        let (header, frame) = tcp4();
        assert_eq!(check(header, &frame[..60]), Err(Drop::BadHeader));
    }

    #[test]
    fn vlan_tags_move_the_headers() {
        let (header, mut frame) = tcp4();
        frame.splice(12..12, [0x81, 0, 0, 7]);
        assert_eq!(check(header, &frame), Err(Drop::BadHeader));
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
        assert_eq!(check(header, &frame), Err(Drop::BadHeader));
    }

    #[test]
    fn udp_may_be_cut_into_128_segments_at_the_most() {
        let (header, mut frame) = tcp4();
        frame[23] = 17;
        let header = VnetHeader { gso_type: GSO_UDP_L4, csum_offset: 6, gso_size: 512, ..header };
        assert!(check(header, &frame).is_ok());
        assert_eq!(check(VnetHeader { gso_size: 256, ..header }, &frame), Err(Drop::BadHeader));
    }

    #[test]
    fn a_plain_frame_loses_what_a_driver_may_not_set() {
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
        assert_eq!(check_plain(&header, 51, &ALL), Err(Drop::BadHeader));
        assert_eq!(check_plain(&header, 60, &Offloads::default()), Err(Drop::BadHeader));
    }

    #[test]
    fn judged_frames_may_open_their_own_checksum_only() {
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

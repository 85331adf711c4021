//! The virtio-net header, `virtio_net_hdr`, as a value: read once, checked, written (virtio 1.3, section 5.1.6).
//!
//! Invariant: no header in guest memory reaches the host. [`HeaderChecks`] copy the header, and check the copy against
//! the frame and the negotiated features. The port sends the copy. For a GSO frame the copy extends through the TCP
//! or UDP header, so the kernel segments by the headers that were checked. It also does if anti-spoofing or a packet
//! filter inspects the headers. A guest that rewrites its memory meanwhile changes only its payload.

mod checks;
mod validation;

use std::mem::offset_of;
use std::ops::AddAssign;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4, virtio_net_hdr,
    virtio_net_hdr_v1,
};

use crate::features::{HEADER_LENGTH, LEGACY_HEADER_LENGTH, Offloads};
use crate::frame::LINK_OVERHEAD;

pub use validation::{HeaderChecks, HeaderCopy, PLAIN_HEADER, Validated};

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;

const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_UDP_L4: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// Longest headers of a GSO frame, in bytes: IPv4 and TCP, each with all options, behind two VLAN tags. A
/// [`HeaderCopy`] holds that many.
pub const MAX_HEADERS: usize = LINK_OVERHEAD + 60 + 60;

/// Fields of the header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Length of the headers in bytes. It is a hint.
    pub hdr_len: u16,
    /// Payload of each segment in bytes.
    pub gso_size: u16,
    /// Offset in the frame of the first byte to checksum.
    pub csum_start: u16,
    /// Offset of the checksum from `csum_start`.
    pub csum_offset: u16,
}

/// Offset of the last field. The others, at the offsets asserted below, are read and written as one word.
const CSUM_OFFSET: usize = offset_of!(virtio_net_hdr, csum_offset);
const _: () = assert!(
    offset_of!(virtio_net_hdr, flags) == 0
        && offset_of!(virtio_net_hdr, gso_type) == 1
        && offset_of!(virtio_net_hdr, hdr_len) == 2
        && offset_of!(virtio_net_hdr, gso_size) == 4
        && offset_of!(virtio_net_hdr, csum_start) == 6
        && CSUM_OFFSET == 8
);

impl VnetHeader {
    /// Offset of `num_buffers`, which only the long header has.
    pub const NUM_BUFFERS: usize = offset_of!(virtio_net_hdr_v1, num_buffers);

    /// Reads the fields from the bytes that both forms of the header begin with.
    #[inline]
    pub fn parse(bytes: &[u8; LEGACY_HEADER_LENGTH]) -> Self {
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

    /// Returns the header's bytes. `num_buffers` is 0, as the specification requires of a driver.
    #[inline]
    pub fn to_bytes(self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        let word = u64::from(self.flags)
            | u64::from(self.gso_type) << 8
            | u64::from(self.hdr_len) << 16
            | u64::from(self.gso_size) << 32
            | u64::from(self.csum_start) << 48;
        bytes[..CSUM_OFFSET].copy_from_slice(&word.to_le_bytes());
        bytes[CSUM_OFFSET..][..2].copy_from_slice(&self.csum_offset.to_le_bytes());
        bytes
    }

    /// Returns true if a header with these first two bytes requests neither a checksum nor segmentation.
    #[inline]
    fn requests_nothing(bytes: u16) -> bool {
        const FLAGS_AND_TYPE: u16 = u16::from_le_bytes([NEEDS_CSUM, 0xff]);
        bytes & FLAGS_AND_TYPE == 0
    }

    /// Returns true if the frame has a partial checksum, which its receiver must complete.
    pub fn needs_checksum(&self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }

    /// Returns true for a GSO frame.
    pub fn needs_segmentation(&self) -> bool {
        self.gso_type != GSO_NONE
    }

    /// Returns true if a receiver with `offloads` accepts a frame with this header.
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

/// Packets and bytes that segmentation adds to GSO frames on the wire: each segment has headers of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SegmentationOverhead {
    /// Segments, without the first of each frame.
    pub packets: u64,
    /// Bytes of the headers of these segments.
    pub bytes: u64,
}

impl SegmentationOverhead {
    /// Returns the overhead of a frame of `length` bytes with `header`. Its Ethernet, IP and transport headers have
    /// `headers` bytes.
    #[inline]
    pub fn of(header: &VnetHeader, headers: usize, length: usize) -> Self {
        if !header.needs_segmentation() {
            return SegmentationOverhead::default();
        }
        let payload = length.saturating_sub(headers);
        let packets = payload.div_ceil(usize::from(header.gso_size.max(1))).saturating_sub(1);
        SegmentationOverhead { packets: packets as u64, bytes: (packets * headers) as u64 }
    }
}

impl AddAssign for SegmentationOverhead {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

//! `virtio_net_hdr` as a value: read once, checked, written (virtio 1.3, section 5.1.6).
//!
//! Invariant: no header that the guest wrote reaches the host. [`HeaderChecks`] copy it, check the
//! copy against the frame and the negotiated features, and what is sent begins with the copy. For
//! a frame to be segmented the copy goes on through the TCP or UDP header, so that the very
//! headers that were checked are the ones the kernel segments by; so it does where somebody else
//! inspects the frame's headers. The guest can rewrite its memory meanwhile and change nothing but its
//! payload.

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

/// Longest headers in bytes of a frame to be segmented: IPv4 and TCP, each with all options, behind
/// two VLAN tags. A [`HeaderCopy`] has room for as many.
pub const MAX_HEADERS: usize = LINK_OVERHEAD + 60 + 60;

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

/// Where the last field is. The others, at the offsets asserted below, are read and written as one word.
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
    /// Offset of `num_buffers`, which headers to the guest have.
    pub const NUM_BUFFERS: usize = offset_of!(virtio_net_hdr_v1, num_buffers);

    /// Reads the fields, which each form of the header begins with.
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

    /// The header as it goes before a frame; `num_buffers` is 0, as a driver must send it.
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
    pub fn needs_segmentation(&self) -> bool {
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
pub struct SegmentationOverhead {
    /// Segments, but for the first of each frame.
    pub packets: u64,
    /// Bytes of their headers.
    pub bytes: u64,
}

impl SegmentationOverhead {
    /// That of a frame of `length` bytes with `header`, whose own headers take `headers` bytes.
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

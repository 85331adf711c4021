//! Feature bits, from the offer to the negotiated features. No other file names a bit.
//!
//! Invariant: a [`Negotiated`] has only features that were offered, and has no offload whose prerequisite (virtio 1.3,
//! section 5.1.3.1) is missing.

use std::fmt;

use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_F_ANY_LAYOUT, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, virtio_net_hdr,
    virtio_net_hdr_v1,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use crate::guest::Notification;

/// Length in bytes of the virtio-net header before each frame.
pub const HEADER_LENGTH: usize = size_of::<virtio_net_hdr_v1>();
/// Length in bytes of the header, without `num_buffers`, of a driver before virtio 1.0 without mergeable buffers.
pub const LEGACY_HEADER_LENGTH: usize = size_of::<virtio_net_hdr>();

const fn bit(number: u32) -> u64 {
    1 << number
}

const fn bits(numbers: &[u32]) -> u64 {
    let (mut all, mut i) = (0, 0);
    while i < numbers.len() {
        all |= bit(numbers[i]);
        i += 1;
    }
    all
}

/// Features that every port offers.
const ALWAYS: u64 = bits(&[
    VIRTIO_F_VERSION_1,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_IN_ORDER,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_MQ,
    // QEMU and cloud-hypervisor serve the control virtqueue themselves. cloud-hypervisor offers it to the guest only
    // if the backend offers the bit. Other frontends pass the queue on.
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
]) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    | LOG_ALL;

/// Bit for logging writes to guest memory in the dirty log. The frontend sets it while it migrates the guest.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

const HOST_CHECKSUM: u64 = bit(VIRTIO_NET_F_CSUM);
const HOST_SEGMENTATION: u64 =
    bits(&[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN]);
const HOST_UDP_SEGMENTATION: u64 = bit(VIRTIO_NET_F_HOST_USO);
const GUEST_CHECKSUM: u64 = bit(VIRTIO_NET_F_GUEST_CSUM);
const GUEST_SEGMENTATION: u64 =
    bits(&[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN]);
const GUEST_UDP_SEGMENTATION: u64 = bits(&[VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6]);

/// Returns the vhost-user protocol features that the daemon offers.
pub fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::MTU
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::STATUS
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::RARP
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::DEVICE_STATE
}

/// Names of the feature bits in the specification (virtio 1.3, sections 5.1.3 and 6).
const NAMES: [(u32, &str); 24] = [
    (VIRTIO_NET_F_CSUM, "CSUM"),
    (VIRTIO_NET_F_GUEST_CSUM, "GUEST_CSUM"),
    (VIRTIO_NET_F_MTU, "MTU"),
    (VIRTIO_NET_F_MAC, "MAC"),
    (VIRTIO_NET_F_GUEST_TSO4, "GUEST_TSO4"),
    (VIRTIO_NET_F_GUEST_TSO6, "GUEST_TSO6"),
    (VIRTIO_NET_F_GUEST_ECN, "GUEST_ECN"),
    (VIRTIO_NET_F_HOST_TSO4, "HOST_TSO4"),
    (VIRTIO_NET_F_HOST_TSO6, "HOST_TSO6"),
    (VIRTIO_NET_F_HOST_ECN, "HOST_ECN"),
    (VIRTIO_NET_F_MRG_RXBUF, "MRG_RXBUF"),
    (VIRTIO_NET_F_STATUS, "STATUS"),
    (VIRTIO_NET_F_CTRL_VQ, "CTRL_VQ"),
    (VIRTIO_NET_F_GUEST_ANNOUNCE, "GUEST_ANNOUNCE"),
    (VIRTIO_NET_F_MQ, "MQ"),
    (VIRTIO_F_ANY_LAYOUT, "ANY_LAYOUT"),
    (VIRTIO_RING_F_INDIRECT_DESC, "INDIRECT_DESC"),
    (VIRTIO_RING_F_EVENT_IDX, "EVENT_IDX"),
    (VIRTIO_F_VERSION_1, "VERSION_1"),
    (VIRTIO_F_IN_ORDER, "IN_ORDER"),
    (VIRTIO_F_RING_RESET, "RING_RESET"),
    (VIRTIO_NET_F_GUEST_USO4, "GUEST_USO4"),
    (VIRTIO_NET_F_GUEST_USO6, "GUEST_USO6"),
    (VIRTIO_NET_F_HOST_USO, "HOST_USO"),
];

/// Returns the names of the features in `bits`.
pub fn names(bits: u64) -> Vec<&'static str> {
    NAMES.iter().filter(|(number, _)| bits & bit(*number) != 0).map(|(_, name)| *name).collect()
}

/// Offloads of a port. A daemon that takes over receives them by the names of the fields, which must not change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortOffloads {
    /// The port completes partial checksums of the guest's frames.
    pub checksum: bool,
    /// The port segments the guest's TCP frames.
    pub segmentation: bool,
    /// The port segments the guest's UDP frames.
    pub udp_segmentation: bool,
    /// The port supports the same offloads towards the guest.
    pub both_ways: bool,
}

impl PortOffloads {
    /// All offloads, in both directions.
    pub const ALL: Self = PortOffloads {
        checksum: true,
        segmentation: true,
        udp_segmentation: true,
        both_ways: true,
    };
}

/// Options of the operator that change the offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OfferOptions {
    /// Offers GSO frames to the guest (`--guest-tso`).
    pub guest_segmentation: bool,
    /// Sets the MAC address of the virtio-net device (`--mac`).
    pub mac: bool,
    /// Offers the reset of single rings (`--ring-reset`). The daemon can restart a ring at any time, but the frontend
    /// has to pass the reset on. QEMU does so for its own TAP only (`virtio_net_queue_reset`, as of 10.2): behind
    /// vhost-user, a guest that resets a ring waits for its frames for ever.
    pub ring_reset: bool,
}

/// The features that a port offers. The offer never shrinks while the daemon runs: a frontend that reconnects requires
/// the features that it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer(u64);

/// Error: the bits of acknowledged features that were not offered.
#[derive(Debug, PartialEq, Eq)]
pub struct NotOffered(pub u64);

impl fmt::Display for NotOffered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "feature bits {:#x} were not offered", self.0)
    }
}

impl std::error::Error for NotOffered {}

impl Offer {
    /// Creates the offer of a port from its offloads and the operator's options.
    pub fn new(port: PortOffloads, options: OfferOptions) -> Self {
        let mut offer = ALWAYS;
        if options.mac {
            offer |= bit(VIRTIO_NET_F_MAC);
        }
        if options.ring_reset {
            offer |= bit(VIRTIO_F_RING_RESET);
        }
        let guest_segmentation = port.both_ways && options.guest_segmentation;
        for (able, host, guest) in [
            (port.checksum, HOST_CHECKSUM, 0),
            (port.segmentation, HOST_SEGMENTATION, GUEST_SEGMENTATION),
            (port.udp_segmentation, HOST_UDP_SEGMENTATION, GUEST_UDP_SEGMENTATION),
        ] {
            if able {
                offer |= host | if guest_segmentation { guest } else { 0 };
            }
        }
        if port.both_ways {
            offer |= GUEST_CHECKSUM;
        }
        Offer(offer)
    }

    /// Returns the bits for GET_FEATURES.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Checks the acknowledged features. Offloads without their prerequisite are not used.
    ///
    /// # Errors
    /// [`NotOffered`], with the bits that were not offered.
    pub fn accept(self, acknowledged: u64) -> Result<Negotiated, NotOffered> {
        let not_offered = acknowledged & !self.0;
        if not_offered != 0 {
            return Err(NotOffered(not_offered));
        }
        let mut effective = acknowledged;
        // Segmentation requires checksum offload. A driver must not acknowledge the one without the other.
        if effective & HOST_CHECKSUM == 0 {
            effective &= !(HOST_SEGMENTATION | HOST_UDP_SEGMENTATION);
        }
        if effective & GUEST_CHECKSUM == 0 {
            effective &= !(GUEST_SEGMENTATION | GUEST_UDP_SEGMENTATION);
        }
        Ok(Negotiated { acknowledged, effective })
    }
}

/// The features that driver and device have negotiated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Negotiated {
    acknowledged: u64,
    /// Acknowledged features whose prerequisites were acknowledged too.
    effective: u64,
}

/// Offloads in one direction: work on a frame that the sender may leave to the receiver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Completion of partial checksums.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4.
    pub tcp4: bool,
    /// Segmentation of TCP over IPv6.
    pub tcp6: bool,
    /// Segmentation of TCP frames with ECN's CWR bit.
    pub ecn: bool,
    /// Segmentation of UDP over IPv4.
    pub udp4: bool,
    /// Segmentation of UDP over IPv6.
    pub udp6: bool,
}

impl Offloads {
    /// Returns true if any kind of segmentation is offloaded.
    pub fn segmentation(&self) -> bool {
        self.tcp4 || self.tcp6 || self.udp4 || self.udp6
    }
}

impl Negotiated {
    fn has(&self, number: u32) -> bool {
        self.effective & bit(number) != 0
    }

    /// Returns the bits as the driver acknowledged them.
    pub fn bits(&self) -> u64 {
        self.acknowledged
    }

    /// Returns true if the frontend negotiates vhost-user protocol features. Otherwise all rings are enabled from their
    /// start.
    pub fn protocol_features(&self) -> bool {
        self.effective & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    /// Returns true if writes to guest memory must be logged in the dirty log.
    pub fn logs(&self) -> bool {
        self.effective & LOG_ALL != 0
    }

    /// Returns true if `other` has the same features, the dirty log excepted.
    pub fn is_same_but_for_the_log(&self, other: &Self) -> bool {
        (self.acknowledged ^ other.acknowledged) & !LOG_ALL == 0
    }

    /// Returns the negotiated features of the rings.
    pub fn notification(&self) -> Notification {
        Notification {
            event_idx: self.has(VIRTIO_RING_F_EVENT_IDX),
            indirect: self.has(VIRTIO_RING_F_INDIRECT_DESC),
        }
    }

    /// Returns true if a frame to the guest may use several buffers.
    pub fn mergeable(&self) -> bool {
        self.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// Returns the length in bytes of the header before each frame (virtio 1.3, section 5.1.6.1).
    pub fn header_length(&self) -> usize {
        if self.has(VIRTIO_F_VERSION_1) || self.mergeable() {
            HEADER_LENGTH
        } else {
            LEGACY_HEADER_LENGTH
        }
    }

    /// Returns the index of the control virtqueue of a device with `pairs` queue pairs, if it was negotiated (virtio
    /// 1.3, section 5.1.2).
    pub fn control_ring(&self, pairs: usize) -> Option<usize> {
        let pairs = if self.has(VIRTIO_NET_F_MQ) { pairs } else { 1 };
        self.has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs)
    }

    /// Returns the offloads from the guest to the host.
    pub fn host(&self) -> Offloads {
        Offloads {
            checksum: self.has(VIRTIO_NET_F_CSUM),
            tcp4: self.has(VIRTIO_NET_F_HOST_TSO4),
            tcp6: self.has(VIRTIO_NET_F_HOST_TSO6),
            ecn: self.has(VIRTIO_NET_F_HOST_ECN),
            udp4: self.has(VIRTIO_NET_F_HOST_USO),
            udp6: self.has(VIRTIO_NET_F_HOST_USO),
        }
    }

    /// Returns the offloads from the host to the guest.
    pub fn guest(&self) -> Offloads {
        Offloads {
            checksum: self.has(VIRTIO_NET_F_GUEST_CSUM),
            tcp4: self.has(VIRTIO_NET_F_GUEST_TSO4),
            tcp6: self.has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: self.has(VIRTIO_NET_F_GUEST_ECN),
            udp4: self.has(VIRTIO_NET_F_GUEST_USO4),
            udp6: self.has(VIRTIO_NET_F_GUEST_USO6),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: OfferOptions =
        OfferOptions { guest_segmentation: true, mac: true, ring_reset: false };

    #[test]
    fn every_feature_that_is_offered_has_a_name() {
        let options = OfferOptions { ring_reset: true, ..OPTIONS };
        let offer = Offer::new(PortOffloads::ALL, options).bits();
        let frontends = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | LOG_ALL;
        assert_eq!(names(offer).len() as u32, (offer & !frontends).count_ones());
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let offer = Offer::new(PortOffloads::default(), OPTIONS);
        let packed = 1 << 34;
        assert_eq!(offer.accept(offer.bits() | packed), Err(NotOffered(packed)));
        assert!(offer.accept(HOST_SEGMENTATION).is_err());
    }

    #[test]
    fn a_linux_driver_gets_every_offload_of_the_port() {
        let offer = Offer::new(PortOffloads::ALL, OPTIONS);
        let negotiated = offer.accept(offer.bits()).unwrap();
        for offloads in [negotiated.host(), negotiated.guest()] {
            assert!(offloads.checksum && offloads.tcp4 && offloads.tcp6);
            assert!(offloads.ecn && offloads.udp4 && offloads.udp6);
        }
        assert!(negotiated.mergeable());
        assert_eq!(negotiated.header_length(), 12);
    }

    #[test]
    fn a_port_that_only_segments_for_the_guest_leaves_nothing_to_it() {
        let port = PortOffloads { both_ways: false, ..PortOffloads::ALL };
        let offer = Offer::new(port, OPTIONS);
        let negotiated = offer.accept(offer.bits()).unwrap();
        assert!(negotiated.host().tcp4 && negotiated.host().udp6);
        assert_eq!(negotiated.guest(), Offloads::default());
    }

    #[test]
    fn guest_tso_off_keeps_checksums_and_the_other_direction() {
        let offer =
            Offer::new(PortOffloads::ALL, OfferOptions { guest_segmentation: false, ..OPTIONS });
        let negotiated = offer.accept(offer.bits()).unwrap();
        assert!(negotiated.guest().checksum && !negotiated.guest().segmentation());
        assert!(negotiated.host().tcp4);
    }

    #[test]
    fn segmentation_without_checksums_is_not_used() {
        let offer = Offer::new(PortOffloads::ALL, OPTIONS);
        let negotiated = offer.accept(GUEST_SEGMENTATION | HOST_SEGMENTATION).unwrap();
        assert!(!negotiated.guest().segmentation() && !negotiated.host().segmentation());
    }

    #[test]
    fn only_an_old_driver_without_mergeable_buffers_has_a_short_header() {
        let offer = Offer::new(PortOffloads::ALL, OPTIONS);
        assert_eq!(offer.accept(0).unwrap().header_length(), 10);
        assert_eq!(offer.accept(bit(VIRTIO_NET_F_MRG_RXBUF)).unwrap().header_length(), 12);
        assert_eq!(offer.accept(bit(VIRTIO_F_VERSION_1)).unwrap().header_length(), 12);
    }
}

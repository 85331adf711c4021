//! Reasons for dropping or copying frames, and a counter for each.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Counter;

/// Reason for dropping a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DropReason {
    /// The frame is shorter than its headers.
    TooShort,
    /// The frame is longer than the port's MTU allows.
    TooLong,
    /// The virtio-net header contradicts the frame or the negotiated features.
    BadHeader,
    /// The guest's buffers are too small or too few for the frame.
    NoRoom,
    /// The frame needs a checksum or segmentation, which the guest did not negotiate.
    NotAccepted,
    /// The frontend has disabled the ring.
    Disabled,
    /// The operator has set the link of the virtio-net device down.
    LinkDown,
    /// The host's device refused the frame.
    HostRefused,
    /// The Ethernet source address, or the sender's in the payload, is not the guest's.
    SpoofedMac,
    /// The IP source address, or an IP address that the frame claims, is not the guest's.
    SpoofedAddress,
    /// The frame has a VLAN tag that the guest may not set.
    ForbiddenVlan,
    /// Guests may not send such frames: those of a router, a DHCP server or a bridge, and unknown ones.
    Forbidden,
    /// The operator's packet filter denies the frame.
    Filtered,
}

impl DropReason {
    /// All reasons.
    pub const ALL: [DropReason; 13] = [
        DropReason::TooShort,
        DropReason::TooLong,
        DropReason::BadHeader,
        DropReason::NoRoom,
        DropReason::NotAccepted,
        DropReason::Disabled,
        DropReason::LinkDown,
        DropReason::HostRefused,
        DropReason::SpoofedMac,
        DropReason::SpoofedAddress,
        DropReason::ForbiddenVlan,
        DropReason::Forbidden,
        DropReason::Filtered,
    ];

    /// Returns the name in reports, in metrics and in counters that move to another daemon.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::TooShort => "too_short",
            DropReason::TooLong => "too_long",
            DropReason::BadHeader => "bad_header",
            DropReason::NoRoom => "no_room",
            DropReason::NotAccepted => "not_accepted",
            DropReason::Disabled => "disabled",
            DropReason::LinkDown => "link_down",
            DropReason::HostRefused => "host_refused",
            DropReason::SpoofedMac => "spoofed_mac",
            DropReason::SpoofedAddress => "spoofed_address",
            DropReason::ForbiddenVlan => "forbidden_vlan",
            DropReason::Forbidden => "forbidden",
            DropReason::Filtered => "filtered",
        }
    }
}

/// Reason for copying a frame's payload in user space, on a port that copies no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CopyReason {
    /// tx: the guest left the checksum to the host. The checksum, or metadata for it, needs a private copy.
    Checksum,
    /// tx: the frame lies in several buffers.
    Pieces,
    /// tx: anti-spoofing or a packet filter checks the frame, and the port must send the headers that were checked.
    Rules,
    /// tx: the port segmented the frame.
    Segmentation,
    /// rx: the guest's buffer does not suit the kernel, which wrote the frame into a private buffer.
    Unsuitable,
    /// rx: the frame came before the guest's buffer, and waited for it in a private buffer.
    Late,
}

impl CopyReason {
    /// All reasons.
    pub const ALL: [CopyReason; 6] = [
        CopyReason::Checksum,
        CopyReason::Pieces,
        CopyReason::Rules,
        CopyReason::Segmentation,
        CopyReason::Unsuitable,
        CopyReason::Late,
    ];

    /// Returns the name in reports, in metrics and in counters that move to another daemon.
    pub fn name(self) -> &'static str {
        match self {
            CopyReason::Checksum => "checksum",
            CopyReason::Pieces => "pieces",
            CopyReason::Rules => "rules",
            CopyReason::Segmentation => "segmentation",
            CopyReason::Unsuitable => "unsuitable_buffer",
            CopyReason::Late => "late_buffer",
        }
    }
}

/// A set of reasons with a counter for each.
pub(super) trait Reason {
    /// Returns the names of all reasons, in the order of [`number`](Self::number).
    fn names() -> Vec<&'static str>;

    /// Returns the index of the reason, from 0.
    fn number(self) -> usize;
}

impl Reason for DropReason {
    fn names() -> Vec<&'static str> {
        DropReason::ALL.map(DropReason::name).to_vec()
    }

    fn number(self) -> usize {
        self as usize
    }
}

impl Reason for CopyReason {
    fn names() -> Vec<&'static str> {
        CopyReason::ALL.map(CopyReason::name).to_vec()
    }

    fn number(self) -> usize {
        self as usize
    }
}

/// A counter for each reason.
#[derive(Debug)]
pub(super) struct ByReason<R>(Vec<Counter>, PhantomData<R>);

impl<R: Reason> Default for ByReason<R> {
    fn default() -> Self {
        ByReason(R::names().iter().map(|_| Counter::default()).collect(), PhantomData)
    }
}

impl<R: Reason> ByReason<R> {
    /// Returns the counter for a reason.
    pub(super) fn of(&self, reason: R) -> &Counter {
        &self.0[reason.number()]
    }

    /// Adds the counts of another daemon, as [`Counter::restore`] does.
    pub(super) fn restore(&self, other: &Self) {
        self.0.iter().zip(&other.0).for_each(|(ours, theirs)| ours.restore(theirs));
    }
}

/// A map from names to counts: another version may have other reasons.
impl<R: Reason> Serialize for ByReason<R> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(R::names().into_iter().zip(&self.0))
    }
}

impl<'de, R: Reason> Deserialize<'de> for ByReason<R> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut named = BTreeMap::<String, Counter>::deserialize(deserializer)?;
        let counts = R::names().into_iter().map(|name| named.remove(name).unwrap_or_default());
        Ok(ByReason(counts.collect(), PhantomData))
    }
}

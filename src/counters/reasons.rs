//! Reasons that frames are dropped or copied for, and a counter for each.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Counter;

/// Why a frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DropReason {
    /// Shorter than its headers.
    TooShort,
    /// Longer than the port's MTU allows.
    TooLong,
    /// Its virtio header contradicts the frame or the negotiated features.
    BadHeader,
    /// The guest's buffers were too small or too few for it.
    NoRoom,
    /// It needs a checksum or segmentation that the guest did not accept.
    NotAccepted,
    /// Its ring is disabled.
    Disabled,
    /// An operator has set the card's link down.
    LinkDown,
    /// The host refused it.
    HostRefused,
    /// Its source, or the sender that it names, is an Ethernet address that is not the guest's.
    SpoofedMac,
    /// Its source, or what it claims, is an IP address that is not the guest's.
    SpoofedAddress,
    /// It has a VLAN tag that is not the guest's to set.
    ForbiddenVlan,
    /// It is nothing that a guest sends: a router's, a DHCP server's, a bridge's, or unknown.
    Forbidden,
    /// The operator's filter denies it.
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

    /// The reason as it is shown.
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

/// Why a frame's payload was copied in user space, on a port that can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CopyReason {
    /// The host completes its checksum: metadata or the sum itself goes with a private copy.
    Checksum,
    /// The guest's frame lies in several pieces.
    Pieces,
    /// There are rules for the guest's frame, and it must be sent as it was judged.
    Rules,
    /// The guest's frame was cut into segments.
    Segmentation,
    /// The guest's buffer does not suit the host, which put the frame into one of ours.
    Unsuitable,
    /// The frame came before the guest's buffer, and waited for it in one of ours.
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

    /// The reason as it is shown.
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

/// Why something is counted apart.
pub(super) trait Reason {
    /// All reasons by their names, in the order of their numbers.
    fn names() -> Vec<&'static str>;

    /// Place among all reasons.
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
    /// The counter for a reason.
    pub(super) fn of(&self, reason: R) -> &Counter {
        &self.0[reason.number()]
    }

    pub(super) fn restore(&self, told: &Self) {
        self.0.iter().zip(&told.0).for_each(|(ours, theirs)| ours.restore(theirs));
    }
}

/// By name: another version may have other reasons.
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

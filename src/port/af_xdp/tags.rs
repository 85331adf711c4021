//! VLAN tags that the kernel or a NIC keeps beside a frame. An XDP program receives the frame without its
//! tag, and the guest takes the frame for an untagged one. Also partial checksums that a sender leaves in
//! frames.

use std::fmt;

use crate::sys::ethtool::Ethtool;
use crate::sys::link::{self, Link};

/// Kinds of upper devices. The kernel moves a tag beside the frame before they get the frame
/// (`skb_vlan_untag` in net/core/dev.c).
const ABOVE_OTHERS: [&str; 6] = ["bridge", "macvlan", "macvtap", "ipvlan", "bond", "team"];
/// Offloads of a veth's other end that move a tag beside the frame: the kernel's name, and ethtool's.
const OF_PEER: [(&str, &str); 2] =
    [("tx-vlan-hw-insert", "txvlan"), ("tx-vlan-stag-hw-insert", "tx-vlan-stag-hw-insert")];
/// Offloads of a NIC that move a tag beside the frame: the kernel's name, and ethtool's.
const OF_NIC: [(&str, &str); 2] =
    [("rx-vlan-hw-parse", "rxvlan"), ("rx-vlan-stag-hw-parse", "rx-vlan-stag-hw-parse")];

/// Offloads with which a device takes partial checksums: the kernel's names. A veth passes such a frame on
/// with its partial checksum.
pub const CHECKSUMS: [&str; 3] = ["tx-checksum-ip-generic", "tx-checksum-ipv4", "tx-checksum-ipv6"];

/// Returns true if frames sent on the device may have partial checksums; `None` if ethtool cannot tell.
pub(super) fn leaves_checksums(link: &Link) -> Option<bool> {
    let features = Ethtool::open().and_then(|ethtool| ethtool.features(link.index)).ok()?;
    Some(CHECKSUMS.iter().any(|name| features.active.contains(*name)))
}

/// State of VLAN tags of frames to the guest, without an XDP program that restores them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Tags {
    /// Tags are in the frames.
    #[default]
    Kept,
    /// The state is unknown: of a veth's other end in another namespace (`None`), or of the named device.
    Unknown(Option<String>),
    /// A device keeps tags beside the frames.
    Beside {
        /// Name of that device.
        device: String,
        /// Arguments of `ethtool -K` that stop it; empty if nothing can.
        offloads: String,
    },
}

impl Tags {
    /// Finds the state for frames that arrive through `link`.
    pub fn of(link: &Link) -> Self {
        if ABOVE_OTHERS.contains(&&*link.kind) {
            return Tags::Beside { device: link.name.clone(), offloads: String::new() };
        }
        let peer = link.veth_peer.and_then(|peer| link::at(peer).ok());
        let (device, offloads) = match (link.is_veth, &peer) {
            (true, Some(peer)) => (peer, OF_PEER),
            (true, None) => return Tags::Unknown(None),
            (false, _) => (link, OF_NIC),
        };
        let Ok(features) = Ethtool::open().and_then(|ethtool| ethtool.features(device.index))
        else {
            return Tags::Unknown(Some(device.name.clone()));
        };
        let on = offloads.iter().filter(|(name, _)| features.active.contains(*name));
        let mut on = on.peekable();
        if on.peek().is_none() {
            return Tags::Kept;
        }
        let off = on.filter(|(name, _)| features.possible.contains(*name));
        let off: Vec<_> = off.map(|(_, name)| format!("{name} off")).collect();
        Tags::Beside { device: device.name.clone(), offloads: off.join(" ") }
    }

    /// Returns the warning for the log, if tags are or may be lost.
    pub(super) fn warning(&self) -> Option<String> {
        match self {
            Tags::Kept => None,
            Tags::Unknown(_) => Some(format!("VLAN tags may be lost; {self}")),
            Tags::Beside { .. } => {
                Some(format!("VLAN tags are lost; tagged frames reach the guest untagged: {self}"))
            }
        }
    }
}

impl fmt::Display for Tags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tags::Kept => f.write_str("VLAN tags are in the frames"),
            Tags::Unknown(device) => write!(
                f,
                "{} may keep tags beside frames; run 'ethtool -K {} txvlan off \
                 tx-vlan-stag-hw-insert off' there",
                device.as_deref().unwrap_or("the other end of the veth"),
                device.as_deref().unwrap_or("NAME"),
            ),
            Tags::Beside { device, offloads } if offloads.is_empty() => {
                write!(f, "the kernel keeps the tags of {device} beside frames; use a veth instead")
            }
            Tags::Beside { device, offloads } => {
                write!(f, "{device} keeps tags beside frames; run 'ethtool -K {device} {offloads}'")
            }
        }
    }
}

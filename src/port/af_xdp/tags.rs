//! VLAN tags that the kernel, or a card, keeps beside a frame: an XDP program does not get them, and
//! the guest then takes the frame for an untagged one. And checksums that the sender has left open.

use std::fmt;

use crate::sys::ethtool::Ethtool;
use crate::sys::link::{self, Link};

/// Kinds of devices above others. The kernel moves a tag beside the frame before they get it
/// (`skb_vlan_untag` in net/core/dev.c).
const ABOVE_OTHERS: [&str; 6] = ["bridge", "macvlan", "macvtap", "ipvlan", "bond", "team"];
/// Offloads that move a tag beside the frame: of a veth's other end, and of a card; as the kernel
/// names them, and as ethtool does.
const OF_PEER: [(&str, &str); 2] =
    [("tx-vlan-hw-insert", "txvlan"), ("tx-vlan-stag-hw-insert", "tx-vlan-stag-hw-insert")];
const OF_CARD: [(&str, &str); 2] =
    [("rx-vlan-hw-parse", "rxvlan"), ("rx-vlan-stag-hw-parse", "rx-vlan-stag-hw-parse")];

/// Checksums that are left to whoever sends: the kernel's names.
pub const CHECKSUMS: [&str; 3] = ["tx-checksum-ip-generic", "tx-checksum-ipv4", "tx-checksum-ipv6"];

/// Whether a device leaves checksums to whoever gets its frames; `None` if it does not tell.
pub(super) fn leaves_checksums(link: &Link) -> Option<bool> {
    let features = Ethtool::open().and_then(|ethtool| ethtool.features(link.index)).ok()?;
    Some(CHECKSUMS.iter().any(|name| features.active.contains(*name)))
}

/// Whether the tags of frames to the guest are in the frames, where no program puts them back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Tags {
    /// They are.
    #[default]
    Kept,
    /// It is not known: of the other end of a veth in another namespace, or of this device.
    Unknown(Option<String>),
    /// A device keeps them beside the frames.
    Beside {
        /// The device.
        device: String,
        /// What ethtool is to be told for it to leave them alone; nothing if the device can't.
        offloads: String,
    },
}

impl Tags {
    /// Those of frames that come by this device.
    pub fn of(link: &Link) -> Self {
        if ABOVE_OTHERS.contains(&&*link.kind) {
            return Tags::Beside { device: link.name.clone(), offloads: String::new() };
        }
        let peer = link.veth_peer.and_then(|peer| link::at(peer).ok());
        let (device, offloads) = match (link.is_veth, &peer) {
            (true, Some(peer)) => (peer, OF_PEER),
            (true, None) => return Tags::Unknown(None),
            (false, _) => (link, OF_CARD),
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

    /// What is to be said of them in the log.
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
                "whether {} keeps tags beside frames is not known; run 'ethtool -K {} txvlan off \
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
